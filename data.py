"""Data sets: the presets, what a data set has to offer, and a folder of your own images.

    python data.py [--preset gpu]       out/data.png: pictures with their captions and questions
    python data.py --data PATH          the same for a folder of your own images

A data set is an object with

    identity        a string for checkpoints: a run can only be resumed with the same data
    image_size      pixels, height = width
    sampling        (guidance, temperature) that suit its captions: see `eval.draw`
    parts           {task: [names of the parts that a run is scored on]}; the first is "val"
    split(task, part, n, seed=0, questions=10)      a Split of up to n pictures of "train" or of
                    another part, the same for the same seed; each has at most `questions` questions
    check(split, pixels)    only if a checker can read pictures: for each caption of the split
                    (objects that it asks for, how many of them are seen, is the picture right?)

`load` makes it. It has its own kinds of questions and captions; scores take them from the data.
"""
import json
import random
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from common import contact_sheet, fail, has_bfloat16, refuse_errors, run_script, script_parser

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

# All sizes that must fit together and fit the machine. Command-line options override some of them.
COLUMNS = {
    "world": dict(
        #                tiny     cpu      gpu
        image_size=     (16,      32,      64),     # pixels, height = width (folders', too)
        patch=          (4,       4,       4),      # pixels that an image token covers, likewise
        grid=           (2,       2,       3),      # grid x grid cells, an object in each at most
        shapes=         (2,       4,       8),      # how many of shapes.SHAPES
        colours=        (3,       6,       8),      # how many of shapes.COLOURS
        max_objects=    (2,       4,       6),      # in a scene
        und_colours=    (2,       4,       4),      # of each shape, in understanding: see Shapes
        jitter=         (0,       1,       2)),     # pixels an object may lie off a cell's centre
    "tokenizer": dict(
        codes=          (32,      256,     512),    # size of the codebook
        vq_width=       (32,      96,      128),    # channels of the image tokenizer
        vq_pictures=    (500,     6000,    8000),   # that it is trained on: half from each task
        vq_steps=       (150,     1200,    1500),
        vq_batch_size=  (16,      16,      128)),
    "transformer": dict(
        layers=         (3,       4,       12),
        width=          (32,      128,     512),    # numbers in a hidden state
        heads=          (2,       4,       8),      # attention heads
        max_text=       (40,      90,      192)),   # tokens of all questions on a picture
    "training": dict(
        und_scenes=     (300,     8000,    20_000), # pictures with questions (understanding)
        questions=      (6,       12,      24),     # on each at most, if they fit in max_text
        gen_scenes=     (300,     20_000,  40_000)),    # pictures with captions (generation)
    "usual": dict(                                  # options, and how much is scored
        steps=          (100,     2000,    3000),
        batch_size=     (8,       16,      64),     # pictures of each task in a step
        und_val=        (40,      1000,    1000),   # pictures with questions, of each part
        gen_val=        (21,      700,     700)),   # captions to draw; of other parts half
}
PRESETS = {}
for column, name in enumerate(("tiny", "cpu", "gpu")):
    every_row = [row for section in COLUMNS.values() for row in section.items()]
    PRESETS[name] = SimpleNamespace(**{row: values[column] for row, values in every_row})


def usual_preset(device):       # GPUs from before 2020 are slow at the larger one
    return "gpu" if has_bfloat16(device) else "cpu"


def check_preset(name):
    """Refuses a preset that cannot work: the row of the table, and what is expected there."""
    p = PRESETS.get(name) or fail(f"preset {name}: expected one of {', '.join(PRESETS)}")
    rows = [(row, value > 0 or row == "jitter", "more than 0")
            for row, value in vars(p).items()]
    side, cells = p.image_size // max(1, p.patch), p.grid ** 2
    rows += [
        ("image_size", side * p.patch == p.image_size, f"a multiple of patch, {p.patch}"),
        ("grid", p.grid in (2, 3) and 6 * p.grid <= p.image_size, "2 or 3, cells of >= 6 pixels"),
        ("shapes", 2 <= p.shapes <= 8, "2 to 8"),
        ("colours", 3 <= p.colours <= 8, "3 to 8"),
        ("max_objects", 2 <= p.max_objects <= cells, f"2 to {cells}, the number of cells"),
        ("und_colours", 2 <= p.und_colours < p.colours, f"2 to {p.colours - 1}, not all colours"),
        ("jitter", 0 <= 8 * p.jitter * p.grid <= p.image_size, "0 to an eighth of a cell"),
        ("codes", 1 < p.codes <= p.vq_batch_size * side ** 2, "2 to the patches in a batch"),
        ("vq_width", p.vq_width % 8 == 0, "a multiple of 8"),
        ("heads", p.width % max(1, 2 * p.heads) == 0, f"heads of even size in width, {p.width}")]
    for row, is_right, expected in rows:
        if not is_right:
            fail(f"preset {name}: {row} is {getattr(p, row)}, expected {expected} (data.COLUMNS)")


def made_with(dataset, preset, sections=("world", "tokenizer", "transformer", "training")):
    """What a checkpoint depends on besides options, as {name: value}: the preset's rows in these
    sections of COLUMNS, and the data, identified by some of its content, too."""
    rows = {row: getattr(PRESETS[preset], row) for section in sections for row in COLUMNS[section]}
    some = dataset.split("und", "val", 50)
    content = zlib.crc32(repr((some.captions, some.questions)).encode(), zlib.crc32(some.pixels))
    return {**rows, "data": f"{dataset.identity} {content:08x}"}


def same_settings(had, now, what):
    """Refuses, in one line, settings ({name: value}) that `what` was not made with."""
    for name in {**had, **now}:
        if had.get(name) != now.get(name):
            fail(f"{what} was made with {name} = {had.get(name)}, and now it is {now.get(name)}: "
                 "expected the same, or a new one")


class Question(NamedTuple):
    text: str
    answer: str
    kind: str                   # accuracy is also told for each kind


class Caption(NamedTuple):
    text: str
    kind: str
    relation: tuple = ()        # only in the shapes world, see Shapes.caption


class Split(NamedTuple):
    pixels: np.ndarray          # (N, H, W, 3) uint8
    captions: list              # N Captions
    questions: list             # N lists of Questions
    scenes: list = None         # what a checker needs to know about each picture


Image.MAX_IMAGE_PIXELS = 50_000_000         # Pillow refuses a picture of twice as many
warnings.filterwarnings("ignore", module="PIL")             # of that, and of EXIF
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26     # programs that draw store their whole workflow there


def open_picture(path, size, where):
    with refuse_errors(f"{where} {path}: expected an image"):       # in one line
        return read_picture(path, size)


def read_picture(path, size):
    """Any image of 8 bits, or of 16 in grey (PNG, TIFF) -> (size, size, 3) uint8: upright, on
    white, cut to a square. May raise any exception where it is none."""
    with Image.open(path) as image:
        image.draft(image.mode, (4 * size, 4 * size))       # of a JPEG no more than is needed
        with suppress(Exception):                           # unreadable EXIF says nothing
            ImageOps.exif_transpose(image, in_place=True)   # of an animation: the first frame
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("images of 32 bits or fractions do not say which value is white")
        if image.mode != "RGBA" and (image.mode != "RGB" or image.has_transparency_data):
            image = image.convert("RGBA")
        image = image.reduce(max(1, min(image.size) // (4 * size)))     # large ones, cheaply
        if image.mode == "RGBA":
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image).convert("RGB")
        return np.array(ImageOps.fit(image, (size, size)))


def metadata(root):
    """Lists a folder of images: [(place for messages, line of metadata.jsonl)]. Without that file,
    makes such a line for each file with one of these suffixes in the folders of the classes."""
    suffixes = ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"
    file, nested = root / "metadata.jsonl", list(root.glob("*/metadata.jsonl"))
    if file.exists():
        lines = enumerate(file.read_bytes().split(b"\n"), 1)
        return [(f"{file} line {number}", line) for number, line in lines if line.strip()]
    if nested:
        fail(f"--data {root}: expected {nested[0].parent}, where there is a metadata.jsonl")
    in_classes = sorted(root.glob("[!.]*/[!.]*"))
    pictures = [path for path in in_classes if path.suffix.lower() in suffixes]
    others = {path for path in root.rglob("*") if path.is_file()} - set(pictures)
    if others:
        print(f"{root}: left out {len(others)} other files, {({path.suffix for path in others})}")
    return [(path, json.dumps({"file_name": f"{path.parent.name}/{path.name}",
                               "text": path.parent.name.replace("_", " ")})) for path in pictures]


def read_line(root, line, size, longest):
    """A line of metadata.jsonl -> pixels, a Caption and Questions, or any exception. Without
    questions, "what is this?" asks for the caption."""
    def clean(text):
        text = " ".join(text.split())
        if not 0 < len(text.encode()) <= longest:           # no lone surrogate has bytes
            raise ValueError(f"{text[:40]!r} has {len(text.encode())} bytes")
        return text

    entry = json.loads(line)
    path, text = Path(entry["file_name"]), clean(entry["text"])
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{str(path)!r} leads out of {root}")
    pairs = entry.get("qa", [entry] if "question" in entry else [])
    questions = [Question(clean(pair["question"]), clean(pair["answer"]), "question")
                 for pair in pairs] or [Question("what is this?", text, "question")]
    return read_picture(root / path, size), Caption(text, "text"), questions


class Folder:
    """Images with captions: listed by `metadata`, with texts and questions by `read_line`, checked
    by `read_picture`. Validation: where the CRC-32 of the pixels is a multiple of 10."""

    # The model knows a folder's few pictures by heart, without captions, too: guidance does harm.
    sampling = 1., .1
    parts = {"und": ["val"], "gen": ["val"]}

    def __init__(self, path, preset="cpu"):
        self.image_size = PRESETS[preset].image_size
        longest = 6 * PRESETS[preset].max_text              # a common word is one token
        found, broken = [], []
        for where, line in tqdm(metadata(Path(path)), "reading images", leave=False):
            try:
                found.append(read_line(Path(path), line, self.image_size, longest))
            except Exception as error:                      # Pillow raises nearly anything
                broken.append(f"{where}: expected an image as file_name, and text (and qa) of 1 to "
                              f"{longest} bytes ({type(error).__name__}: {str(error)[:200]})")
        if broken:
            fail("\nerror: ".join(broken[:20]))
        pixels, self.captions, self.questions = zip(*found) if found else ((), (), ())
        # By content, so that copies of one picture are never in both parts.
        is_val = np.array([zlib.crc32(picture) % 10 == 0 for picture in pixels], bool)
        self.indices = {"train": np.flatnonzero(~is_val), "val": np.flatnonzero(is_val)}
        if min(map(len, self.indices.values())) < 10:
            fail(f"--data {path}: {len(pixels)} images, {is_val.sum()} of them for validation, are "
                 "too few: expected 200 different ones, in a folder for each class or with a "
                 "metadata.jsonl")
        self.pixels = np.stack(pixels)                      # (N, H, W, 3) uint8
        texts = zlib.crc32(repr((self.captions, self.questions)).encode())
        self.identity = f"{len(pixels)} images {zlib.crc32(self.pixels, texts):08x}"
        examples = sorted({caption.text for caption in self.captions})[:9]
        print(f"{path}: {len(pixels)} images, with captions like {str(examples)[1:-1][:300]}")

    def split(self, task, part, n, seed=0, questions=10):
        """A random sample of up to n pictures of a part ("train" or "val") for a task and seed."""
        rng, every = random.Random(f"{seed} {task} {part}"), [*self.indices[part]]
        indices = rng.sample(every, min(n, len(every)))
        return Split(self.pixels[indices], [self.captions[i] for i in indices],
                     [self.questions[i][:questions] for i in indices])


def load(source, preset):
    """The data set that --data names: "shapes" or a folder."""
    check_preset(preset)
    if source == "shapes":
        from shapes import Shapes
        return Shapes(preset)
    if not Path(source).is_dir():
        fail(f"--data {source}: expected shapes, or a folder of images")
    return Folder(source, preset)


def load_of_run(checkpoint, source=None):
    """The data set that a run was trained on; source: where it is now, if it has been moved."""
    options = checkpoint["options"]
    dataset = load(source or options["data"], options["preset"])
    now = made_with(dataset, options["preset"])
    same_settings(checkpoint.get("made_with", {}), now, "this run")
    return dataset


def main():
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of captioned images")
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--out", default="out/data.png")
    args = parser.parse_args()
    split = load(args.data, args.preset).split("und", "train", 18)
    texts = ["\n".join([caption.text] + [f"{q.text} {q.answer}" for q in questions[:4]])
             for caption, questions in zip(split.captions, split.questions)]
    contact_sheet(split.pixels, texts, args.out)
    print(f"{args.out}: {len(texts)} pictures")


if __name__ == "__main__":
    run_script(main)
