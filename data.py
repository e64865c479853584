"""The data sets: a drawn world of coloured shapes with an exact checker, and folders of captioned images.

    python data.py                      writes out/data.png: pictures with a caption and questions
    python data.py --preset gpu         the larger world
    python data.py --data PATH          the same for a folder of your own images

Both kinds give the rest of the project one thing, a `Split`: pixels, one caption and some questions for each picture.
"""
import argparse
import json
import math
import os
import random
import sys
import textwrap
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


# Operators that Apple GPUs lack run on the CPU, and PyTorch says so. It reads this when it is imported: after this file.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def fail(message):
    """Bad input: one line that says what was expected, exit status 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)                    # which clears a progress bar, if there is one
    raise SystemExit(2)


def command(main):
    """Runs a script's main. What ends it from outside, Ctrl-C or a disk that is full, is told in one line, too."""
    try:
        main()
    except KeyboardInterrupt:
        tqdm.write("stopped", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:
        fail(f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}")


@contextmanager
def refusing(message):
    """Around work with what a file holds, which may be anything at all: whatever goes wrong in it is told in one line."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]})")


if sys.version_info < (3, 10):
    fail(f"Python {sys.version.split()[0]} is too old: expected 3.10 or newer")


class Question(NamedTuple):
    text: str
    answer: str
    kind: str


class Caption(NamedTuple):
    text: str
    kind: str
    relation: tuple = ()        # of kind "position": (shape, index into RELATIONS, other shape)


class Split(NamedTuple):
    pixels: np.ndarray          # (N, H, W, 3) uint8
    captions: list              # N Captions
    questions: list             # N lists of Questions
    scenes: list = None         # N tuples of Things, only in the shapes world


# ------------------------------------------------------------------------------------------------ the shapes world

SHAPES = "circle square triangle cross ring diamond heart star".split()
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220), "yellow": (245, 190, 0),
           "purple": (150, 50, 190), "cyan": (0, 190, 210), "black": (40, 40, 40), "orange": (245, 120, 20)}
SIZES = ("small", "big")
NUMBERS = "zero one two three four five six seven eight nine".split()
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = (245, 245, 240)
PHRASINGS = {"colour": ("what colour is {}?", "which colour does {} have?"),
             "shape": ("what shape is {}?", "which shape does {} have?"),
             "size": ("what size is {}?", "is {} small or big?"),
             "existence": ("is there a {}?", "do you see a {}?"),
             "count": ("how many {} are there?", "what is the number of {}?"),
             "place": ("where is {}?", "in which place is {}?"),
             "relation": ("is {} {} {}?", "does {} lie {} {}?"),
             "neighbour": ("what shape is {} {}?", "which shape lies {} {}?")}
KINDS = tuple(PHRASINGS)
# Which fields of an object may stand in its name where a question of that kind is about it.
NAMED_BY = {"colour": (("shape",), ("size", "shape"), ("cell",)), "shape": (("colour",), ("size", "colour"), ("cell",)),
            "size": (("shape",), ("colour",), ("colour", "shape"), ("cell",)),
            "place": (("shape",), ("colour",), ("colour", "shape"))}
# What a caption of each kind states about every object; what it leaves open the model may choose (cf. GenEval).
CAPTIONS = {"scene": ("size", "colour", "shape", "cell"), "single object": ("shape",), "two objects": ("shape",),
            "counting": ("shape",), "colours": ("colour", "shape"), "position": ("shape",),
            "attribute binding": ("colour", "shape")}


class Thing(NamedTuple):
    """One object. Everything is an index into the lists above; dx, dy are pixels off the centre of the cell."""
    size: int
    colour: int
    shape: int
    cell: int
    dx: int = 0
    dy: int = 0

    @property
    def pair(self):
        return self.colour, self.shape


@dataclass(frozen=True)
class World:
    image_size: int             # pixels, height = width
    grid: int                   # grid x grid cells, at most one object in each
    shapes: int                 # how many of SHAPES
    colours: int                # how many of COLOURS
    max_objects: int
    jitter: int                 # pixels that an object may lie off the centre of its cell, each way


WORLDS = {"tiny": World(image_size=16, grid=2, shapes=2, colours=3, max_objects=2, jitter=0),
          "cpu": World(image_size=32, grid=2, shapes=4, colours=6, max_objects=4, jitter=1),
          "gpu": World(image_size=64, grid=3, shapes=8, colours=8, max_objects=6, jitter=2)}


def sprite(shape, diameter, cell):
    """The coverage of a shape, centred in its cell: (cell, cell) in 0..1, antialiased from 8x8 subpixels."""
    scale, r = 8, diameter * 4
    image = Image.new("L", (cell * scale, cell * scale))
    draw, c = ImageDraw.Draw(image), cell * scale // 2

    def polygon(*points):
        draw.polygon([(c + round(x * r), c + round(y * r)) for x, y in points], fill=255)

    if shape in ("circle", "ring"):
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if shape == "ring":
            draw.ellipse((c - r // 2, c - r // 2, c + r // 2, c + r // 2), fill=0)
    elif shape == "square":
        polygon((-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85))
    elif shape == "triangle":
        polygon((0, -1), (1, .8), (-1, .8))
    elif shape == "cross":
        polygon((-.33, -1), (.33, -1), (.33, 1), (-.33, 1))
        polygon((-1, -.33), (-1, .33), (1, .33), (1, -.33))
    elif shape == "diamond":
        polygon((0, -1), (.75, 0), (0, 1), (-.75, 0))
    elif shape == "heart":
        h = r * 11 // 20
        for x in (-h + r // 20, h - r // 20):
            draw.ellipse((c + x - h, c - r, c + x + h, c - r + 2 * h), fill=255)
        polygon((-.98, -.2), (0, 1), (.98, -.2), (0, -.5))
    elif shape == "star":
        polygon(*((math.sin(i * math.pi / 5) * (1, .42)[i % 2], -math.cos(i * math.pi / 5) * (1, .42)[i % 2])
                  for i in range(10)))
    return np.asarray(image.reduce(scale), np.float64) / 255


def ask(rng, kind, answer, *parts):
    return Question(rng.choice(PHRASINGS[kind]).format(*parts), answer, kind)


class Shapes:
    """Scenes, their pictures, captions and questions, and the checker that reads a picture back into a scene."""
    identity = "shapes"

    def __init__(self, preset="cpu"):
        w = self.world = WORLDS[preset]
        self.image_size, self.cell = w.image_size, w.image_size // w.grid
        rows, columns = ([first] + ["middle"] * (w.grid - 2) + [last] for first, last in (("top", "bottom"), ("left", "right")))
        self.cells = [f"{row} {column}".replace("middle middle", "middle") for row in rows for column in columns]
        # The transfer split: pairs that understanding never sees in training but generation does, and vice versa.
        self.held_out = {task: {((2 * i + t) % w.colours, i % w.shapes) for i in range(w.colours // 2)}
                         for t, task in enumerate(("und", "gen"))}
        # Every object that a cell can hold, drawn once; row 0 is the empty cell.
        offsets = range(-w.jitter, w.jitter + 1)
        self.things = [None] + [Thing(z, c, s, 0, x, y) for z in range(2) for c in range(w.colours)
                                for s in range(w.shapes) for x in offsets for y in offsets]
        self.row = {t: i for i, t in enumerate(self.things)}
        masks = {(z, s): sprite(SHAPES[s], round(self.cell * (.42, .75)[z]), self.cell)
                 for z in range(2) for s in range(w.shapes)}
        ink, paper = np.array(list(COLOURS.values()), float), np.array(BACKGROUND, float)
        self.bank = np.empty((len(self.things), self.cell, self.cell, 3), np.uint8)
        self.bank[0] = BACKGROUND
        for i, t in enumerate(self.things[1:], 1):
            room = np.pad(masks[t.size, t.shape], w.jitter)
            mask = room[w.jitter - t.dy:, w.jitter - t.dx:][:self.cell, :self.cell, None]
            self.bank[i] = np.round(mask * ink[t.colour] + (1 - mask) * paper)

    # ---- scenes and pictures

    def scene(self, rng, avoid=()):
        """A random scene: 1 to max_objects Things, sorted by cell, without the (colour, shape) pairs of `avoid`.

        Objects are not independent: a later one often shares its colour or its shape with an earlier one (so that
        counts go up and attributes have to be bound), or is the earlier one's companion (so that some objects often
        occur together, which POPE's adversarial questions need).
        """
        w, things = self.world, []
        for cell in rng.sample(range(w.grid ** 2), rng.randint(1, w.max_objects)):
            while True:
                colour, shape = rng.randrange(w.colours), rng.randrange(w.shapes)
                if things:
                    other = rng.choice(things)
                    how = rng.randrange(4)
                    if how == 0:
                        colour = other.colour
                    elif how == 1:
                        shape = other.shape
                    elif how == 2:
                        colour, shape = self.companion(other)
                if (colour, shape) not in avoid:
                    break
            things.append(Thing(rng.randrange(2), colour, shape, cell, rng.randint(-w.jitter, w.jitter),
                                rng.randint(-w.jitter, w.jitter)))
        return tuple(sorted(things, key=lambda t: t.cell))

    def companion(self, thing):
        return (thing.colour + 1) % self.world.colours, (thing.shape + 1) % self.world.shapes

    def render(self, scenes):
        """Scenes -> (N, H, W, 3) uint8, by copying drawn cells: fast enough never to hold up training."""
        g, c, size = self.world.grid, self.cell, self.image_size
        rows = np.zeros((len(scenes), g * g), np.int64)
        for i, scene in enumerate(scenes):
            for t in scene:
                rows[i, t.cell] = self.row[t._replace(cell=0)]
        pixels = np.empty((len(scenes), size, size, 3), np.uint8)
        pixels[:] = BACKGROUND                                         # 64 = 3 * 21 + 1: a margin may be left over
        tiles = self.bank[rows].reshape(-1, g, g, c, c, 3).transpose(0, 1, 3, 2, 4, 5)
        pixels[:, :g * c, :g * c] = tiles.reshape(-1, g * c, g * c, 3)
        return pixels

    def read(self, pixels, worst=17.0):
        """The checker: pictures -> scenes, by the nearest drawn cell (least squared error), exact on drawn pictures.

        A cell whose nearest match has a PSNR under `worst` dB shows nothing that can be named: a Thing of shape -1.
        """
        g, c = self.world.grid, self.cell
        tiles = pixels[:, :g * c, :g * c].reshape(-1, g, c, g, c, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, c * c * 3)
        bank = self.bank.reshape(len(self.bank), -1).astype(np.float32)
        norms, scenes = (bank ** 2).sum(1), []
        limit = 255 ** 2 * 10 ** (-worst / 10) * bank.shape[1]
        for start in range(0, len(tiles), 1024 * g * g):               # in blocks, so that the products stay small
            block = tiles[start:start + 1024 * g * g].astype(np.float32)
            score = norms - 2 * block @ bank.T                         # |tile - drawn|^2 but for |tile|^2
            best = score.argmin(1)
            good = score[np.arange(len(block)), best] + (block ** 2).sum(1) < limit
            for cells, fine in zip(best.reshape(-1, g * g), good.reshape(-1, g * g)):
                scenes.append(tuple(self.things[b]._replace(cell=i) if ok else Thing(-1, -1, -1, i)
                                    for i, (b, ok) in enumerate(zip(cells, fine)) if b or not ok))
        return scenes

    # ---- language

    def phrase(self, thing, fields, plural=False):
        noun = SHAPES[thing.shape] if "shape" in fields else "object"
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join([self.cells[thing.cell]] * ("cell" in fields) + [SIZES[thing.size]] * ("size" in fields)
                        + [list(COLOURS)[thing.colour]] * ("colour" in fields) + [noun])

    def related(self, a, b):
        """Which RELATIONS (as indices) hold between two things."""
        (ya, xa), (yb, xb) = divmod(a.cell, self.world.grid), divmod(b.cell, self.world.grid)
        return {i for i, holds in enumerate((xa < xb, xa > xb, ya < yb, ya > yb)) if holds}

    def refer(self, rng, scene, thing, *options):
        """A phrase that only `thing` fits, made from one of the options (tuples of fields), or None."""
        fits = [f for f in options if list(map(attrgetter(*f), scene)).count(attrgetter(*f)(thing)) == 1]
        return "the " + self.phrase(thing, rng.choice(fits)) if fits else None

    def caption(self, rng, scene, about=None):
        """A caption that tells of every object, in reading order: all about it (of kind "scene"), or less of it, in which
        case the kinds are those of GenEval (Ghosh et al. 2023): its names, and like there at most two different objects.
        With `about` (the transfer split) it has to tell colours and shapes."""
        n, shapes, kinds = len(scene), {t.shape for t in scene}, ["scene"]
        if n == 1:
            kinds += ["single object", "colours"]
        elif len(shapes) == 1:
            kinds += ["counting"] * 2
        if n == 2:
            kinds += ["two objects", "attribute binding"] + ["position"] * 2 * (len(shapes) == 2)
        kind = rng.choice([k for k in kinds if not about or {"colour", "shape"} <= set(CAPTIONS[k])])
        relation = ()
        if kind == "scene":
            words = [f"{self.cells[t.cell]} a {self.phrase(t, CAPTIONS[kind][:3])}" for t in scene]
        elif kind == "position":
            a, b = rng.sample(scene, 2)
            r = rng.choice(sorted(self.related(a, b)))
            words, relation = [f"a {SHAPES[a.shape]} {RELATIONS[r]} a {SHAPES[b.shape]}"], (a.shape, r, b.shape)
        elif kind == "counting":
            words = [NUMBERS[n] + " " + self.phrase(scene[0], ("shape",), plural=True)]
        else:
            words = ["a " + self.phrase(t, CAPTIONS[kind]) for t in scene]
        text = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
        return Caption(rng.choice(("", "draw ", "a picture of ")) + text, kind, relation)

    def fulfilled(self, caption, wanted, seen):
        """How many of the wanted objects are seen as the caption states them, and whether the picture is all right:
        exactly these objects and, where a relation is stated, in that relation."""
        told = attrgetter(*CAPTIONS[caption.kind])
        want, have = Counter(map(told, wanted)), Counter(map(told, seen))
        right = want == have
        if right and caption.relation:
            first, r, second = caption.relation
            a, b = (next(t for t in seen if t.shape == s) for s in (first, second))
            right = r in self.related(a, b)
        return sum((want & have).values()), right

    def question(self, rng, scene, kind, avoid=(), about=None):
        """One Question of this kind, or None where the scene has none. `avoid`: (colour, shape) pairs never named;
        `about`: the pairs that the question has to be about (for the transfer split)."""
        things = [t for t in scene if not about or t.pair in about]
        thing = rng.choice(things)
        if kind == "place" and len(scene) == 1:                         # where something is, is no question then
            return None
        if kind in NAMED_BY:
            the = self.refer(rng, scene, thing, *NAMED_BY[kind])
            answer = {"colour": list(COLOURS)[thing.colour], "shape": SHAPES[thing.shape], "size": SIZES[thing.size],
                      "place": self.cells[thing.cell]}[kind]
            return the and ask(rng, kind, answer, the)
        if kind == "existence":
            return self.existence(rng, scene, thing, avoid, about)
        if kind == "count":
            groups = {len(scene): [((), 0)]}                            # number -> what there is that number of
            for field, values in (("colour", self.world.colours), ("shape", self.world.shapes), ("size", 2)):
                there = [getattr(t, field) for t in scene]
                for value in range(values):
                    groups.setdefault(there.count(value), []).append(((field,), value))
            number = rng.choice(sorted(groups))
            fields, value = rng.choice(groups[number])
            plural = self.phrase(Thing(0, 0, 0, 0)._replace(**dict.fromkeys(fields, value)), fields, plural=True)
            return ask(rng, kind, NUMBERS[number], plural)
        others = [t for t in scene if t is not thing and (not about or t.pair not in about)]
        if not others:
            return None
        other = rng.choice(others)
        the, that = (self.refer(rng, scene, t, *NAMED_BY["place"]) for t in (thing, other))
        if kind == "relation" and the and that:
            answer, holding = rng.randrange(2), self.related(thing, other)
            # A "no" is the opposite of something true: knowing which two objects are meant is not enough.
            r = rng.choice(sorted(holding)) ^ (1 - answer)
            return ask(rng, kind, ("no", "yes")[answer], the, RELATIONS[r], that)
        if kind == "neighbour" and that:
            for r in rng.sample(range(4), 4):
                there = [t for t in scene if r in self.related(t, other)]
                if there == [thing]:
                    return ask(rng, kind, SHAPES[thing.shape], RELATIONS[r], that)
        return None

    def existence(self, rng, scene, thing, avoid, about):
        """Is there ...? Half of the answers are no, and most of these are hard, as in POPE (Li et al. 2023): the
        companion of an object that is there, or the colour of one object with the shape of another."""
        fields = ("colour", "shape") if about or rng.random() < .6 else rng.choice((("colour",), ("shape",)))
        if rng.randrange(2):
            return ask(rng, "existence", "yes", self.phrase(thing, fields))
        look = attrgetter(*fields)
        present = set(map(look, scene))
        for _ in range(50):
            a, b, how = rng.choice(scene), rng.choice(scene), rng.randrange(3)
            pair = ((a.colour, b.shape) if how == 0 else self.companion(a) if how == 1 else
                    (rng.randrange(self.world.colours), rng.randrange(self.world.shapes)))
            if about:
                pair = rng.choice(sorted(about))
            absent = Thing(0, *pair, 0)
            if look(absent) not in present and (len(fields) == 1 or pair not in avoid):
                return ask(rng, "existence", "no", self.phrase(absent, fields))
        return None

    def ask_about(self, rng, scene, n, counts, avoid, about):
        """n questions, those first of which there are fewest so far (`counts`, by kind), at most two in a row of a kind.
        Not every scene has a question of every kind: without this, relations would be one question in twenty."""
        kinds, asked, tries = ("colour", "shape", "existence") if about else KINDS, [], Counter()
        while len(asked) < n and tries.total() < 4 * n + 8:
            kind = min(kinds, key=lambda k: (tries[k] // 2, counts[k]))
            tries[kind] += 1
            question = self.question(rng, scene, kind, avoid, about)
            if question and question not in asked:
                asked.append(question)
                counts[kind] += 1
        return asked

    # ---- splits

    def split(self, task, part, n, seed=0, questions=10):
        """n scenes for a task ("und", "gen" or None: neither) of a part: "train", "val" or "transfer".

        A scene's part depends on what it shows alone (not on where in the cell an object lies, nor on the seed), so
        no picture of a training scene is ever in another part. In training a task never meets its held-out pairs;
        "val" has no pair that either task lacked, every "transfer" scene has one that this task lacked.
        """
        rng = random.Random(f"{seed} {task} {part}")
        own = self.held_out.get(task, set())
        avoid = {"train": own, "val": self.held_out["und"] | self.held_out["gen"], "transfer": ()}[part]
        about = own if part == "transfer" else None
        scenes, captions, asked, counts = [], [], [], Counter()
        while len(scenes) < n:
            scene = self.scene(rng, avoid)
            validation = zlib.crc32(repr([t[:4] for t in scene]).encode()) % 10 == 0
            if validation != (part != "train") or about and not any(t.pair in about for t in scene):
                continue
            scenes.append(scene)
            captions.append(self.caption(rng, scene, about))
            asked.append(self.ask_about(rng, scene, questions, counts, avoid, about))
        return Split(self.render(scenes), captions, asked, scenes)


# ------------------------------------------------------------------------------------------------ your own images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def open_picture(path, size, where):
    """Any image that Pillow reads -> (size, size, 3) uint8: upright, on white where transparent, its middle square."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)              # of an animation: the first frame
                if image.mode.startswith("I"):                      # 16 bits and more
                    levels = np.asarray(image, np.float64)
                    image = Image.fromarray((levels / max(255, levels.max()) * 255).astype(np.uint8))
                image = image.convert("RGBA")
                paper = Image.new("RGBA", image.size, "white")
                return np.array(ImageOps.fit(Image.alpha_composite(paper, image).convert("RGB"), (size, size)))
    except Exception as error:                                          # Pillow raises nearly anything on broken files
        fail(f"{where}: {path} cannot be used as an image ({(str(error) or type(error).__name__).splitlines()[0]})")


LONGEST = 2000              # characters of a text; a sequence takes far fewer


def check_text(text, where):
    """A caption, question or answer as it can be used: not empty, not too long, and encodable (lone surrogates are not)."""
    if not isinstance(text, str) or not text.strip():
        fail(f"{where}: file_name, text, question and answer have to be strings that are not empty")
    if len(text) > LONGEST:
        fail(f"{where}: a text has {len(text)} characters, expected at most {LONGEST}: {text[:40]!r} ...")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"{where}: {text[:40]!r} is no Unicode text ({error.reason})")


def check_inside(path, root, where):
    """A file below the folder `root`, not reached by `..` or a link that leads out of it."""
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            fail(f"{where}: {str(path)!r} leads out of {root}")
        if not path.is_file():
            fail(f"{where}: no file {path}")
    except (OSError, ValueError, RuntimeError) as error:                # names with NUL, too long ones, loops of links
        fail(f"{where}: {str(error)[:80]}")


def read_metadata(root):
    """metadata.jsonl -> (image path, caption, [(question, answer)], where it was said). Checks each line."""
    rows, file = [], root / "metadata.jsonl"
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")       # not splitlines: strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file} cannot be read as UTF-8 text ({error})")
    for number, line in enumerate(lines, 1):
        where = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            fail(f"{where}: not JSON ({str(error)[:80]})")
        pairs = row.get("qa", [row] if "question" in row else []) if isinstance(row, dict) else None
        if not isinstance(pairs, list) or not all(isinstance(p, dict) for p in pairs):
            fail(f"{where}: expected an object with file_name, text and, if you like, qa: a list of objects")
        for text in [row.get("file_name"), row.get("text"), *(p.get(k) for p in pairs for k in ("question", "answer"))]:
            check_text(text, where)
        path = root / row["file_name"]
        check_inside(path, root, where)
        rows.append((path, row["text"], [(p["question"], p["answer"]) for p in pairs], where))
    return rows


class Folder:
    """A folder of images with captions: a metadata.jsonl (Hugging Face's ImageFolder), or one folder for each class."""

    def __init__(self, path, preset="cpu"):
        root, self.image_size = Path(path), WORLDS[preset].image_size
        if not root.is_dir():
            fail(f"--data {path}: expected `shapes` or a folder of images")
        if (root / "metadata.jsonl").exists():
            rows = read_metadata(root)
        else:
            rows = [(file, file.parent.name.replace("_", " "), [], str(file.parent)) for file in sorted(root.glob("*/*"))
                    if file.suffix.lower() in SUFFIXES]
            for file, text, _, where in rows:
                check_text(text, where)
                check_inside(file, root, where)
        if not rows:
            fail(f"{path}: no images: expected a metadata.jsonl or one folder of images for each class")
        pixels = np.stack([open_picture(file, self.image_size, where)
                           for file, _, _, where in tqdm(rows, desc="reading images", unit="image", leave=False)])
        # By content, so that copies of one picture are never in both parts.
        self.part = np.array(["val" if zlib.crc32(p.tobytes()) % 10 == 0 else "train" for p in pixels])
        if (self.part == "val").sum() < 10 or (self.part == "train").sum() < 10:
            fail(f"{path}: {len(rows)} images are too few: about one in ten is kept for validation, where ten are needed")
        self.identity = f"{root.resolve().name} {zlib.crc32(pixels.tobytes()):08x}"
        self.pixels = pixels
        self.captions = [Caption(text, "text") for _, text, _, _ in rows]
        self.questions = [[Question(q, a, "question") for q, a in pairs or [("what is this?", text)]]
                          for _, text, pairs, _ in rows]

    def split(self, task, part, n, seed=0, questions=10):
        """Up to n pictures of a part ("train" or "val"), the same for both tasks, in an order that `seed` gives."""
        index = np.flatnonzero(self.part == part)
        index = index[np.argsort([zlib.crc32(f"{seed} {i}".encode()) for i in index], kind="stable")][:n]
        return Split(self.pixels[index], [self.captions[i] for i in index],
                     [self.questions[i][:questions] for i in index])


def load(source, preset):
    """The data set that --data names: "shapes" or a folder."""
    return Shapes(preset) if source == "shapes" else Folder(source, preset)


# ------------------------------------------------------------------------------------------------ pictures

BAD, LINE, TEXT = (220, 30, 30), (200, 200, 200), (60, 60, 60)
INK = [(40, 100, 190), (225, 120, 30), (50, 150, 80), (190, 50, 60)]


def contact_sheet(pixels, texts, path, columns=6, size=160, wrong=()):
    """Pictures in a grid, each over its lines of text, those in `wrong` framed in red, as a PNG."""
    font = ImageFont.load_default(12)
    wrapped = [[part for line in text.split("\n") for part in textwrap.wrap(line, size // 6) or [""]] for text in texts]
    gap, rows = 12, [range(i, min(i + columns, len(wrapped))) for i in range(0, len(wrapped), columns)]
    heights = [size + 12 + 15 * max(len(wrapped[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (gap + columns * (size + gap), gap + sum(heights) + gap * len(rows)), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights):
        for i in row:
            x, (frame, ink) = gap + i % columns * (size + gap), ((BAD, BAD) if i in wrong else (LINE, TEXT))
            sheet.paste(Image.fromarray(pixels[i]).resize((size, size), Image.NEAREST), (x, y))
            draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=frame, width=2)
            for j, line in enumerate(wrapped[i]):
                draw.text((x, y + size + 4 + 15 * j), line, ink, font)
        y += height + gap
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def line_chart(lines, title, x_label, top_y=None, size=(560, 360)):
    """{name: [(x, y)]}, y >= 0, as an Image of lines with a legend. The y axis ends at top_y, by default with the data."""
    (width, height), font = size, ImageFont.load_default(12)
    left, top, right, bottom = 50, 50, width - 16, height - 40
    points = [p for line in lines.values() for p in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y1 = top_y or max(y for _, y in points) * 1.05 or 1
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def at(x, y):
        return (left + (x - x0) / max(1e-9, x1 - x0) * (right - left), bottom - y / y1 * (bottom - top))

    unit = 10 ** math.floor(math.log10(y1 / 2))
    unit *= next(k for k in (1, 2, 5, 10) if y1 / (k * unit) <= 6)
    for k in range(int(y1 / unit + 1e-9) + 1):
        draw.line([at(x0, k * unit), at(x1, k * unit)], fill=LINE)
        draw.text((left - 6, at(x0, k * unit)[1]), f"{k * unit:.6g}", TEXT, font, anchor="rm")
    for x in sorted({x0 + round((x1 - x0) * k / 5) for k in range(6)}):
        draw.text((at(x, 0)[0], bottom + 6), f"{x:g}", TEXT, font, anchor="mt")
    draw.text((left, 8), title, TEXT, font)
    draw.text(((left + right) / 2, height - 14), x_label, TEXT, font, anchor="mm")
    for i, (name, line) in enumerate(lines.items()):
        ink, x = INK[i % len(INK)], left + 105 * i
        draw.line([at(*p) for p in line], fill=ink, width=2)
        draw.line([(x, 34), (x + 16, 34)], fill=ink, width=3)
        draw.text((x + 22, 34), name, TEXT, font, anchor="lm")
    return sheet


def strip_chart(names, groups):
    """{title: {name: [percent]}} as an Image: side by side, a dot for each number and a tick at the mean of each row. A title
    without numbers is left out."""
    groups = {title: rows for title, rows in groups.items() if rows}
    font, width, top, step = ImageFont.load_default(13), 150, 74, 21
    left = 30 + max(round(font.getlength(name)) for name in names)
    sheet = Image.new("RGB", (left + len(groups) * (width + 30), top + step * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        draw.text((left - 14, top + step * i), name, TEXT, font, anchor="rm")
    for k, (title, rows) in enumerate(groups.items()):
        x0, low = left + k * (width + 30), min(80, 20 * int(min(map(min, rows.values())) // 20))
        draw.text((x0 - 8, 6), textwrap.fill(title, 24), TEXT, font)
        for tick in range(low, 101, 10 if low >= 60 else 20):
            x = x0 + width * (tick - low) / (100 - low)
            draw.line([(x, top - 14), (x, sheet.height - 8)], LINE)
            draw.text((x, top - 24), str(tick), TEXT, font, anchor="mm")
        for name, some in rows.items():
            y, places = top + step * names.index(name), [x0 + width * (p - low) / (100 - low) for p in some]
            middle = sum(places) / len(places)
            draw.line([(middle, y - 8), (middle, y + 8)], TEXT, 2)
            for x in places:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), INK[k % len(INK)])
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of captioned images")
    parser.add_argument("--preset", default="cpu", choices=WORLDS)
    parser.add_argument("--out", default="out/data.png")
    args = parser.parse_args()
    split = load(args.data, args.preset).split("und", "train", 18)
    texts = ["\n".join([c.text] + [f"{q.text} {q.answer}" for q in some[:4]])
             for c, some in zip(split.captions, split.questions)]
    contact_sheet(split.pixels, texts, args.out)
    print(f"{args.out}: {len(texts)} pictures")


if __name__ == "__main__":
    command(main)
