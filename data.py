"""The data sets: a world of coloured shapes with an exact checker, and folders of your images.

    python data.py                      writes out/data.png: pictures with a caption and questions
    python data.py --preset gpu         the larger world
    python data.py --data PATH          the same for a folder of your own images

Both give the project the same: a `Split` of pixels, with a caption and questions for each picture.
"""
import json
import os
import random
import unicodedata
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from itertools import product
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from common import (check_output, contact_sheet, fail, is_ours, refuse_errors, run_script,
                    script_parser)

import torch                            # after common.py, which sets an environment variable

# All that has to fit together, and the machine. Options of the scripts override some of it.
PATCH = 4           # pixels that an image token covers, height = width

COLUMNS = dict(
    #                tiny     cpu      gpu
    # the shapes world
    image_size=     (16,      32,      64),     # pixels, height = width (folders', too)
    grid=           (2,       2,       3),      # x grid cells (2 or 3): one object in each, at most
    shapes=         (2,       4,       8),      # how many of SHAPES
    colours=        (3,       6,       8),      # how many of COLOURS
    max_objects=    (2,       4,       6),      # in a scene
    held_out=       (1,       3,       4),      # pairs that each task never sees; see Shapes
    jitter=         (0,       1,       2),      # pixels an object may lie off its cell's centre
    # the tokenizer
    codes=          (32,      256,     512),    # size of the codebook
    vq_width=       (32,      96,      128),    # channels of the image tokenizer
    vq_pictures=    (500,     6000,    8000),   # that it is trained on
    vq_steps=       (150,     1200,    1500),
    vq_batch_size=  (16,      16,      128),
    # the transformer
    layers=         (3,       4,       12),
    width=          (32,      128,     512),    # numbers in a hidden state
    heads=          (2,       4,       8),      # attention heads
    max_text=       (40,      90,      192),    # tokens of all questions and answers on a picture
    # training
    steps=          (100,     1500,    3000),
    batch_size=     (8,       16,      64),     # pictures of each task in a step
    und_scenes=     (300,     8000,    20_000), # training pictures with questions (understanding)
    questions=      (6,       12,      24),     # on each of them, at most
    gen_scenes=     (300,     20_000,  40_000), # training pictures with captions (generation)
    # evaluation
    und_val=        (40,      1000,    1000),   # pictures with questions; of held-out pairs, too
    gen_val=        (21,      700,     700),    # captions to draw; of held-out pairs half
)
PRESETS = {name: SimpleNamespace(**{key: values[column] for key, values in COLUMNS.items()})
           for column, name in enumerate(("tiny", "cpu", "gpu"))}


class Question(NamedTuple):
    text: str
    answer: str
    kind: str                   # one of QUESTION_KINDS; "question" in a folder


class Caption(NamedTuple):
    text: str
    kind: str                   # one of CAPTION_FIELDS; "text" in a folder
    relation: tuple = ()        # of kind "position": (shape, index into RELATIONS, other shape)


class Split(NamedTuple):
    pixels: np.ndarray          # (N, H, W, 3) uint8
    captions: list              # N Captions
    questions: list             # N lists of Questions
    scenes: list = None         # N tuples of Things, only in the shapes world


# ---------------------------------------------------------------------- the shapes world
# Skip it on first reading: scenes, their pictures, captions, questions, and a checker.

# What lies inside a shape: x to the right and y downwards from its centre, in its radius.
INSIDE = {"circle": lambda x, y: x ** 2 + y ** 2 < 1,
          "square": lambda x, y: np.maximum(abs(x), abs(y)) < .85,
          "triangle": lambda x, y: (2 * abs(x) < 1 + y) & (y < .8),
          "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < .33) & (abs(x) < 1) & (abs(y) < 1),
          "ring": lambda x, y: abs(np.hypot(x, y) - .75) < .25,
          "diamond": lambda x, y: abs(x) / .75 + abs(y) < 1,
          "heart": lambda x, y: x ** 2 + (1.2 * y + .6 * np.sqrt(abs(x))) ** 2 < 1,
          "star": lambda x, y: np.hypot(x, y) * (2.4 - 1.4 * abs(
              2 * (np.arctan2(x, -y) / (2 * np.pi / 5) % 1) - 1)) < 1}
SHAPES = tuple(INSIDE)
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220),
           "yellow": (245, 190, 0), "purple": (150, 50, 190), "cyan": (0, 190, 210),
           "black": (40, 40, 40), "orange": (245, 120, 20)}
COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = ("small", "big")
DIAMETERS = (.42, .75)                                      # of small and big, in cells
BACKGROUND = (245, 245, 240)
WORST = 17.                     # PSNR (dB) of a cell that can still be recognised
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = (1, 0, 3, 2)                                     # of each relation, as an index

# Each kind of question in two phrasings, so that words are not tied to one sentence.
PHRASINGS = {"colour": ("what colour is {}?", "which colour does {} have?"),
             "shape": ("what shape is {}?", "which shape does {} have?"),
             "size": ("what size is {}?", "is {} small or big?"),
             "existence": ("is there a {}?", "do you see a {}?"),
             "count": ("how many {} are there?", "what is the number of {}?"),
             "place": ("where is {}?", "in which place is {}?"),
             "relation": ("is {} {} {}?", "does {} lie {} {}?"),
             # Its words are learned here, and then "relation", which is yes or no, succeeds.
             "neighbour": ("what shape is {} {}?", "which shape lies {} {}?")}
QUESTION_KINDS = tuple(PHRASINGS)
# Which fields may name the object that a question of this kind is about: not the answer itself.
NAMED_BY = {"colour": [("shape",), ("size", "shape"), ("cell",)],
            "shape": [("colour",), ("size", "colour"), ("cell",)],
            "size": [("shape",), ("colour",), ("colour", "shape"), ("cell",)],
            "place": [("shape",), ("colour",), ("colour", "shape")]}
# What a caption of each kind states about every object; the model may choose the rest. All but
# "scene" are the kinds of GenEval (Ghosh et al. 2023).
CAPTION_FIELDS = {"scene": ("size", "colour", "shape", "cell"), "single object": ("shape",),
                  "two objects": ("shape",), "counting": ("shape",),
                  "colours": ("colour", "shape"), "position": ("shape",),
                  "attribute binding": ("colour", "shape")}


class Thing(NamedTuple):
    """One object. All but dx, dy are indices into the lists above; shape -1: unrecognisable."""
    size: int
    colour: int
    shape: int
    cell: int                   # row by row, from the top left
    dx: int = 0                 # pixels off the centre of the cell
    dy: int = 0

    @property
    def pair(self):
        return self.colour, self.shape


class Shapes:
    """Scenes, their pictures, captions and questions, and the checker that reads pictures.

    A scene is a tuple of Things, sorted by cell. `rng` is a random.Random throughout. In the
    methods for questions, `avoid` is a set of (colour, shape) pairs that must not be named;
    `required`, if given, a set of pairs: the question has to be about an object of one of them.
    """
    identity = "shapes"         # stands in checkpoints, which fit one data set only

    def __init__(self, preset="cpu"):
        p = self.preset = PRESETS[preset]
        self.image_size = p.image_size
        self.cell_size = p.image_size // p.grid             # pixels
        rows = ["top", "bottom"] if p.grid == 2 else ["top", "middle", "bottom"]
        columns = ["left", "right"] if p.grid == 2 else ["left", "middle", "right"]
        # One word, and so one token: the second of two would have to look for the object once more.
        cells = [f"{row}-{column}" for row in rows for column in columns]
        self.cell_names = [cell.replace("middle-middle", "middle") for cell in cells]
        self.names = {"size": SIZE_NAMES, "colour": COLOUR_NAMES, "shape": SHAPES,
                      "cell": self.cell_names}
        # Pairs of (colour, shape) that a task never sees in training, while the other task does:
        # one of each of the first shapes. Red and green circle, blue and yellow square, ...
        self.held_out = {"und": set(), "gen": set()}
        for shape in range(p.held_out):
            self.held_out["und"].add((2 * shape % p.colours, shape))
            self.held_out["gen"].add(((2 * shape + 1) % p.colours, shape))
        # Every object that a cell can hold is drawn once; number 0 is the empty cell.
        size = self.cell_size
        self.contents, drawn = [None], [np.full((size, size, 3), BACKGROUND)]
        offsets = range(-p.jitter, p.jitter + 1)
        for z, colour, shape, dx, dy in product(range(2), range(p.colours), range(p.shapes),
                                                offsets, offsets):
            # 8 x 8 points a pixel, in radii from the shape's centre.
            points = np.arange(size * 8) + .5 - size * 4
            x, y = ((points - 8 * moved) / (4 * round(size * DIAMETERS[z])) for moved in (dx, dy))
            inside = INSIDE[SHAPES[shape]](x[None, :], y[:, None])
            cover = inside.reshape(size, 8, size, 8).mean((1, 3))[..., None]
            ink, paper = np.array(COLOURS[COLOUR_NAMES[colour]]), np.array(BACKGROUND)
            self.contents.append(Thing(z, colour, shape, 0, dx, dy))
            drawn.append(np.round(cover * ink + (1 - cover) * paper))
        self.drawn = np.array(drawn).astype(np.uint8)       # (contents, size, size, 3)
        self.number = {thing: i for i, thing in enumerate(self.contents)}

    def scene(self, rng, n, avoid=()):
        """A random scene of n Things, without the (colour, shape) pairs of `avoid`.

        A later object often shares its colour or its shape with an earlier one, so that counts go
        up and attributes have to be bound. Or it is the earlier one's companion, so that certain
        objects often occur together, which hard questions about existence need.
        """
        p, things = self.preset, []
        for cell in rng.sample(range(p.grid ** 2), n):
            while True:
                colour, shape = rng.randrange(p.colours), rng.randrange(p.shapes)
                if things:
                    other = rng.choice(things)
                    linked = (other.colour, shape), (colour, other.shape), self.companion(other)
                    colour, shape = rng.choice((*linked, (colour, shape)))
                if (colour, shape) not in avoid:
                    break
            size = rng.randrange(2)
            dx, dy = rng.randint(-p.jitter, p.jitter), rng.randint(-p.jitter, p.jitter)
            things.append(Thing(size, colour, shape, cell, dx, dy))
        return tuple(sorted(things, key=lambda thing: thing.cell))

    def companion(self, thing):
        """The (colour, shape) that often occurs beside this one."""
        p = self.preset
        return (thing.colour + 1) % p.colours, (thing.shape + 1) % p.shapes

    def render(self, scenes):
        """N scenes -> (N, H, W, 3) uint8, by copying drawn cells: never what training waits for."""
        size = self.cell_size
        pixels = np.empty((len(scenes), self.image_size, self.image_size, 3), np.uint8)
        pixels[:] = BACKGROUND                              # 64 = 3 * 21 + 1: a margin is left over
        for picture, scene in zip(pixels, scenes):
            for thing in scene:
                row, column = divmod(thing.cell, self.preset.grid)
                y, x = row * size, column * size
                number = self.number[thing._replace(cell=0)]
                picture[y:y + size, x:x + size] = self.drawn[number]
        return pixels

    def read(self, pixels):
        """The checker: (N, H, W, 3) uint8 -> N scenes, by the nearest drawn cell.

        Nearest is the least squared error, so this is exact on drawn pictures. A cell whose
        nearest match has a PSNR under WORST dB shows nothing that can be named: shape -1.
        """
        n, grid, size = len(pixels), self.preset.grid, self.cell_size
        cells = pixels[:, :grid * size, :grid * size].reshape(n, grid, size, grid, size, 3)
        cells = torch.from_numpy(cells.swapaxes(2, 3).reshape(n * grid ** 2, -1)).float()
        drawn = torch.from_numpy(self.drawn).flatten(1).float()
        distances, numbers = torch.cdist(cells, drawn).min(1)           # of each cell
        numbers[distances ** 2 / drawn.size(1) > 255 ** 2 * 10 ** (-WORST / 10)] = -1
        scenes = []
        for row in numbers.view(n, -1).tolist():
            things = []
            for cell, number in enumerate(row):
                if number == -1:
                    things.append(Thing(-1, -1, -1, cell))
                elif number != 0:                           # 0: empty
                    things.append(self.contents[number]._replace(cell=cell))
            scenes.append(tuple(things))
        return scenes

    # ------------------------------------------------------------------ language

    def phrase(self, thing, fields, plural=False):
        """These fields of a thing in words: "top-left small red circle"."""
        words = [self.names[field][getattr(thing, field)] for field in ("cell", "size", "colour")
                 if field in fields]
        noun = SHAPES[thing.shape] if "shape" in fields else "object"
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join(words + [noun])

    def related(self, a, b):
        """Which RELATIONS (as indices, in order) hold between two things."""
        row_a, column_a = divmod(a.cell, self.preset.grid)
        row_b, column_b = divmod(b.cell, self.preset.grid)
        holds = (column_a < column_b, column_a > column_b, row_a < row_b, row_a > row_b)
        return [i for i in range(4) if holds[i]]

    def has_caption(self, scene, kind):
        """Whether a scene can have a caption of this kind."""
        n, shapes = len(scene), len({thing.shape for thing in scene})
        return {"scene": True, "single object": n == 1, "colours": n == 1,
                "counting": n > 1 and shapes == 1, "two objects": n == 2,
                "attribute binding": n == 2, "position": n == 2 and shapes == 2}[kind]

    def caption(self, rng, scene, kind):
        """A Caption that tells of every object, in reading order: all about it, or less."""
        relation = ()
        if kind == "scene":
            fields = ("size", "colour", "shape")
            parts = [f"{self.cell_names[t.cell]} a {self.phrase(t, fields)}" for t in scene]
        elif kind == "position":
            a, b = rng.sample(scene, 2)
            r = rng.choice(self.related(a, b))
            parts = [f"a {SHAPES[a.shape]} {RELATIONS[r]} a {SHAPES[b.shape]}"]
            relation = (a.shape, r, b.shape)
        elif kind == "counting":
            parts = [f"{NUMBERS[len(scene)]} {self.phrase(scene[0], ('shape',), plural=True)}"]
        else:
            parts = ["a " + self.phrase(thing, CAPTION_FIELDS[kind]) for thing in scene]
        *first, last = parts
        text = f"{', '.join(first)} and {last}" if first else last
        return Caption(rng.choice(("", "draw ", "a picture of ")) + text, kind, relation)

    def fulfilled(self, caption, wanted, seen):
        """How many of the wanted objects are seen as the caption states them; is all right?

        That is: exactly these objects and, where a relation is stated, in that relation.
        """
        stated = attrgetter(*CAPTION_FIELDS[caption.kind])
        want, have = Counter(map(stated, wanted)), Counter(map(stated, seen))
        right = want == have
        if right and caption.relation:
            first, r, second = caption.relation
            a = next(thing for thing in seen if thing.shape == first)
            b = next(thing for thing in seen if thing.shape == second)
            right = r in self.related(a, b)
        return (want & have).total(), right

    def refer(self, rng, scene, thing, kind):
        """A phrase that only `thing` fits, by fields that a question of this kind may use; or
        None. By its cell only if nothing else is unique: that is learned at once."""
        unique = []
        for fields in NAMED_BY[kind]:
            look = attrgetter(*fields)
            if [look(t) for t in scene].count(look(thing)) == 1:
                unique.append(fields)
        if len(unique) > 1 and ("cell",) in unique:
            unique.remove(("cell",))
        return "the " + self.phrase(thing, rng.choice(unique)) if unique else None

    def question(self, rng, scene, kind, avoid=(), required=None):
        """One Question of this kind, or None where the scene gives none."""
        thing = rng.choice([t for t in scene if not required or t.pair in required])
        answer = None
        if kind in ("colour", "shape", "size") or (kind == "place" and len(scene) > 1):
            parts = [self.refer(rng, scene, thing, kind)]
            field = "cell" if kind == "place" else kind
            answer = self.names[field][getattr(thing, field)]
        elif kind == "existence":
            answer, *parts = self.existence(rng, scene, thing, avoid, required)
        elif kind == "count":
            answer, *parts = self.count(rng, scene)
        elif kind in ("relation", "neighbour") and len(scene) > 1:
            other = rng.choice([t for t in scene if t is not thing])
            # Named as for "place", so not by their cells, which would tell the answer.
            first, second = (self.refer(rng, scene, t, "place") for t in (thing, other))
            if kind == "relation":
                r = rng.choice(self.related(thing, other))
                answer = rng.choice(("no", "yes"))
                # The opposite of something true: knowing which two are meant is not enough.
                parts = [first, RELATIONS[r if answer == "yes" else OPPOSITE[r]], second]
            else:
                for r in rng.sample(range(4), 4):
                    there = [t for t in scene if r in self.related(t, other)]
                    if there == [thing]:                    # else several answers were right
                        answer, parts = SHAPES[thing.shape], [RELATIONS[r], second]
        if answer is None or None in parts:
            return None
        return Question(rng.choice(PHRASINGS[kind]).format(*parts), answer, kind)

    def count(self, rng, scene):
        """How many ...? First the number is drawn, then what there is that number of. Returns the
        answer and what is counted."""
        groups = {len(scene): [((), 0)]}                    # number -> [(fields, value)]
        limits = {"colour": self.preset.colours, "shape": self.preset.shapes, "size": 2}
        for field, limit in limits.items():
            present = [getattr(thing, field) for thing in scene]
            for value in range(limit):
                groups.setdefault(present.count(value), []).append(((field,), value))
        number = rng.choice(sorted(groups))
        fields, value = rng.choice(groups[number])
        example = Thing(value, value, value, 0)             # only the field in question is named
        return NUMBERS[number], self.phrase(example, fields, plural=True)

    def existence(self, rng, scene, thing, avoid, required):
        """Is there ...? Half of the answers are no, and most of these are hard, as in POPE (Li et
        al. 2023): one object's colour with another's shape, or the companion of a present object.
        Returns the answer and what is asked for."""
        fields = ("colour", "shape")
        if not required and rng.random() < .4:
            fields = rng.choice((("colour",), ("shape",)))
        if rng.randrange(2) == 1:
            return "yes", self.phrase(thing, fields)
        look = attrgetter(*fields)
        present = {look(t) for t in scene}
        for _ in range(50):                                 # until something absent is drawn
            a, b = rng.choice(scene), rng.choice(scene)
            anything = rng.randrange(self.preset.colours), rng.randrange(self.preset.shapes)
            pair = rng.choice(((a.colour, b.shape), self.companion(a), anything))
            if required:
                pair = rng.choice(sorted(required))
            absent = Thing(0, *pair, 0)
            if look(absent) not in present and (len(fields) == 1 or pair not in avoid):
                return "no", self.phrase(absent, fields)
        return None, None

    def questions(self, rng, scene, n, kinds, counts, avoid, required):
        """Up to n Questions, first of the kinds that `counts` ({kind: number}) has fewest of. A
        kind that stands in `kinds` several times is asked so much more often.

        Not every scene has one of every kind: without this, relations would be one in twenty.
        """
        questions = []
        for kind in sorted(kinds, key=counts.get) * 4:      # in turn
            if len(questions) == n:
                break
            question = self.question(rng, scene, kind, avoid, required)
            if question and question not in questions:
                questions.append(question)
                counts[kind] += 1 / kinds.count(kind)
        return questions

    def split(self, task, part, n, seed=0, questions=10):
        """n scenes for a task ("und" or "gen") of a part, with up to so many questions on each.

        A scene's part depends on what it shows alone (not on where in the cell an object lies, nor
        on the seed), so no picture of a training scene is ever in another part.
            "train"     without the pairs that are held out from this task
            "val"       without those held out from either task
            "transfer"  each with at least one pair held out from this task
        Captions of all kinds are equally frequent in "val", questions as far as scenes have them.
        Training has more of those that take longer to learn, and for understanding more scenes with
        many objects: with one object there is nothing to choose.
        """
        rng = random.Random(f"{seed} {task} {part}")
        question_rng = random.Random(f"{seed} {task} {part} questions")
        held_out = self.held_out[task]
        every_pair = self.held_out["und"] | self.held_out["gen"]
        avoid = {"train": held_out, "val": every_pair, "transfer": set()}[part]
        required = held_out if part == "transfer" else None
        binding = ["scene", "colours", "attribute binding"]             # name colour and shape
        harder = ["scene", "scene", "two objects", "attribute binding", "position"]
        kinds = {"train": [*CAPTION_FIELDS, *harder], "val": [*CAPTION_FIELDS],
                 "transfer": binding}[part]
        question_kinds = {"train": [*QUESTION_KINDS, "relation", "relation"],
                          "val": QUESTION_KINDS,
                          "transfer": ["colour", "shape", "existence"]}[part]
        scenes, captions, asked, tries = [], [], [], 0
        counts = dict.fromkeys(QUESTION_KINDS, 0)           # of questions of each kind
        while len(scenes) < n:
            objects = rng.randint(1, self.preset.max_objects)
            if (task, part) == ("und", "train"):
                objects = max(objects, rng.randint(1, self.preset.max_objects))
            scene = self.scene(rng, objects, avoid)
            look = [thing[:4] for thing in scene]           # all but dx, dy
            in_training = zlib.crc32(repr(look).encode()) % 10 != 0
            if in_training != (part == "train"):
                continue
            if required and not any(thing.pair in required for thing in scene):
                continue
            kind = kinds[len(scenes) % len(kinds)] if task == "gen" else "scene"
            if not self.has_caption(scene, kind):
                tries += 1
                if tries < 100:                 # a small world may have no scene for this kind
                    continue
                kind = "scene"
            tries = 0
            scenes.append(scene)
            captions.append(self.caption(rng, scene, kind))
            asked.append(self.questions(question_rng, scene, questions, question_kinds, counts,
                                        avoid, required))
        return Split(self.render(scenes), captions, asked, scenes)


# ---------------------------------------------------------------------- your own images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26     # bytes; programs that render write long texts into PNGs


def open_picture(path, size, where):
    """Any image that Pillow reads -> (size, size, 3) uint8: upright, on white, cut to a square.
    where: how an error message begins."""
    with refuse_errors(f"{where}: {path} cannot be used as an image"):
        return read_picture(path, size)


def read_picture(path, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.draft(image.mode, (4 * size, 4 * size))   # of a JPEG no more than is needed
            with suppress(Exception):                       # unreadable EXIF says nothing
                image = ImageOps.exif_transpose(image)      # of an animation: the first frame
            if image.mode.startswith("I") or image.mode == "F":
                # White is 65535 in 16 bits. Fractions and 32 bits do not tell: the least of the
                # usual values that is not far below the largest one.
                levels = np.nan_to_num(np.asarray(image, np.float64))
                whites = {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (65535,))
                white = next((w for w in whites if levels.max() < 2 * w), whites[-1])
                levels = (levels / white * 255).round().clip(0, 255).astype(np.uint8)
                image = Image.fromarray(levels)
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image).convert("RGB")
            return np.array(ImageOps.fit(image, (size, size)))


def clean_text(text, longest):
    """A caption, question or answer, with single spaces. ValueError where it cannot be used."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("file_name, text, question and answer must be strings, not empty")
    if len(text) > longest:
        raise ValueError(f"{text[:40]!r} ... has {len(text)} characters, the preset takes "
                         f"{longest}")
    text.encode()                               # fails for lone surrogates, which JSON may hold
    return unicodedata.normalize("NFC", " ".join(text.split()))


def read_folder(path, longest):
    """A folder of images -> [(image path, caption, [(question, answer)], place for messages)].
    longest: so many characters a text may have. Prints what was found."""
    root, file = Path(path), Path(path) / "metadata.jsonl"
    if not root.is_dir():
        fail(f"--data {path}: expected `shapes` or a folder of images")
    entries = read_metadata(file, longest) if file.exists() else read_classes(root, longest)
    pictures = {entry[0] for entry in entries}
    captions = sorted({entry[1] for entry in entries})
    examples = str(captions[:9])[1:-1][:300]                # as str has it: no control characters
    print(f"{path}: {len(pictures)} images, {len(captions)} captions: {examples}")
    left_out = Counter()
    for other in root.rglob("*"):
        hidden = any(part.startswith(".") for part in other.relative_to(root).parts)
        if other.is_file() and other not in pictures and other != file and not hidden:
            left_out[other.suffix or "without suffix"] += 1
    if left_out:
        most = ", ".join(f"{n} {suffix}" for suffix, n in left_out.most_common(5))
        print(f"{path}: left out {left_out.total()} other files ({most})")
    if not entries:
        fail(f"--data {path}: expected images and a metadata.jsonl, or a folder of images for each "
             "class")
    return entries


def read_classes(root, longest):
    entries = []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if not os.access(folder, os.R_OK | os.X_OK):
            fail(f"--data {root}: {folder} cannot be read")
        if (folder / "metadata.jsonl").exists():
            fail(f"--data {root}: expected {folder}, where there is a metadata.jsonl")
        if (folder / "log.jsonl").exists():
            continue                                        # a run: its pictures are results
        with refuse_errors(f"{folder}: the name of a class"):
            name = clean_text(folder.name.replace("_", " "), longest)
        for picture in sorted(folder.iterdir()):
            hidden = picture.name.startswith(".")
            if picture.suffix.lower() in SUFFIXES and picture.is_file() and not hidden \
                    and not is_ours(picture):
                entries.append((picture, name, [], str(folder)))
    return entries


def read_metadata(file, longest):
    entries, root = [], file.parent
    with refuse_errors(f"{file}: expected UTF-8 text"):
        # Not splitlines(): a string may hold U+2028, which is no end of a line in JSON.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        with refuse_errors(f"{where}: expected an object with file_name, text and, if you like, "
                           "qa, a list of objects"):
            entry = json.loads(line)
            text = clean_text(entry.get("text"), longest)
            pairs = [(clean_text(pair.get("question"), longest),
                      clean_text(pair.get("answer"), longest))
                     for pair in entry.get("qa", [entry] if "question" in entry else [])]
            name = entry.get("file_name")
            clean_text(name, 4096)
            # An accent may be stored in two ways, in a file's name, too.
            forms = [root / unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
            picture = next((file for file in forms if file.is_file()), root / name)
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} leads out of {root}")
            if not picture.is_file():
                raise ValueError(f"no file {picture}")
        entries.append((picture, text, pairs, where))
    return entries


class Folder:
    """Images with captions: a metadata.jsonl (Hugging Face's ImageFolder), or a folder for each
    class, whose name is the caption. Without questions, "what is this?" asks for the caption."""

    def __init__(self, path, preset="cpu"):
        self.image_size = PRESETS[preset].image_size
        # A common word is one token and has, with its space, some 6 characters.
        entries = read_folder(path, longest=6 * PRESETS[preset].max_text)
        pixels, self.captions, self.questions, unusable = [], [], [], []
        for file, text, pairs, where in tqdm(entries, "reading images", leave=False):
            try:
                pixels.append(read_picture(file, self.image_size))
            except Exception as error:                      # Pillow raises nearly anything
                unusable.append(f"{where}: {str(file)!r} ({type(error).__name__}: {error})"[:300])
                continue
            self.captions.append(Caption(text, "text"))
            pairs = pairs or [("what is this?", text)]
            self.questions.append([Question(q, a, "question") for q, a in pairs])
        if unusable:
            fail(f"--data {path}: {len(unusable)} files cannot be used as images:\n"
                 + "\n".join(unusable[:20]))
        # By content, so that copies of one picture are never in both parts.
        is_val = np.array([zlib.crc32(p.tobytes()) % 10 == 0 for p in pixels], bool)
        self.indices = {"train": np.flatnonzero(~is_val), "val": np.flatnonzero(is_val)}
        if min(len(self.indices["val"]), len(self.indices["train"])) < 10:
            different = len({p.tobytes() for p in pixels})
            fail(f"--data {path}: {len(pixels)} images, {different} of them different, are too "
                 "few: about one in ten is kept for validation, where ten are needed")
        self.pixels = np.stack(pixels)                      # (N, H, W, 3) uint8
        texts = zlib.crc32(repr((self.captions, self.questions)).encode())
        self.identity = f"{len(pixels)} images {zlib.crc32(self.pixels.tobytes(), texts):08x}"

    def split(self, task, part, n, seed=0, questions=10):
        """Up to n pictures of a part ("train" or "val"), the same for both tasks, shuffled."""
        indices = self.indices[part]
        order = np.argsort([zlib.crc32(f"{seed} {i}".encode()) for i in indices], kind="stable")
        indices = indices[order][:n]
        return Split(self.pixels[indices], [self.captions[i] for i in indices],
                     [self.questions[i][:questions] for i in indices])


def load(source, preset):
    """The data set that --data names: "shapes" or a folder."""
    return Shapes(preset) if source == "shapes" else Folder(source, preset)


def load_of_run(checkpoint, source=None):
    """The data set that a run was trained on; source: where it is now, if it has been moved."""
    options = checkpoint["options"]
    source = source or options["data"]
    dataset = load(source, options["preset"])
    if dataset.identity != checkpoint["identity"]:
        fail(f"--data {source}: the run was trained on {checkpoint['identity']}, this is "
             f"{dataset.identity}; expected the same pictures and texts")
    return dataset


def main():
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of captioned images")
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--out", default="out/data.png")
    args = parser.parse_args()
    check_output(args.out, "picture")
    split = load(args.data, args.preset).split("und", "train", 18)
    texts = []
    for caption, questions in zip(split.captions, split.questions):
        lines = [caption.text] + [f"{q.text} {q.answer}" for q in questions[:4]]
        texts.append("\n".join(lines))
    contact_sheet(split.pixels, texts, args.out)
    print(f"{args.out}: {len(texts)} pictures")


if __name__ == "__main__":
    run_script(main)
