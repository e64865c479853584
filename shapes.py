"""The world of coloured shapes: scenes, their pictures, an exact checker; captions and questions.

A data set like any other (see data.py): skip it on first reading, or put your own in its place.
"""
import random
import zlib
from collections import Counter, defaultdict
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from data import PRESETS, Caption, Question, Split

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
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220),
           "yellow": (245, 190, 0), "purple": (150, 50, 190), "cyan": (0, 190, 210),
           "black": (40, 40, 40), "pink": (250, 130, 180)}
DIAMETERS = {"small": .42, "big": .75}                      # in cells
SHAPES, COLOUR_NAMES, SIZE_NAMES = tuple(INSIDE), tuple(COLOURS), tuple(DIAMETERS)
# {number of cells: their names}. Each name is one word, and so one token: the second of two tokens
# would have to look for the object again.
CELL_NAMES = {4: ("top-left", "top-right", "bottom-left", "bottom-right"),
              9: ("top-left", "top-middle", "top-right", "middle-left", "middle", "middle-right",
                  "bottom-left", "bottom-middle", "bottom-right")}
BACKGROUND = (245, 245, 240)
WORST = 17.                                                 # dB: see Shapes.read
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = (1, 0, 3, 2)                                     # of each relation, as an index

# Each kind of caption: what it says of every object (the model may choose the rest), and the
# scenes that it fits, by their numbers of objects and of different shapes. All but "scene" are the
# kinds of GenEval (Ghosh et al. 2023).
CAPTIONS = {"scene": ("{cell} a {size} {colour} {shape}", lambda objects, shapes: True),
            "single object": ("a {shape}", lambda objects, shapes: objects == 1),
            "two objects": ("a {shape}", lambda objects, shapes: objects == 2),
            "counting": ("{shape}", lambda objects, shapes: objects > 1 and shapes == 1),
            "colours": ("a {colour} {shape}", lambda objects, shapes: objects == 1),
            "position": ("a {shape}", lambda objects, shapes: objects == shapes == 2),
            "attribute binding": ("a {colour} {shape}", lambda objects, shapes: objects == 2)}
# Each kind of question: what is asked for, how the object may be named (never by the answer), and
# two phrasings, so that words are not tied to one sentence.
BY_CELL = "the {cell} object"
BY_LOOKS = "the {shape}", "the {colour} object", "the {colour} {shape}"
QUESTIONS = {"colour": ("{colour}", ("the {shape}", "the {size} {shape}", BY_CELL),
                        ("what colour is {}?", "which colour does {} have?")),
             "shape": ("{shape}", ("the {colour} object", "the {size} {colour} object", BY_CELL),
                       ("what shape is {}?", "which shape does {} have?")),
             "size": ("{size}", (*BY_LOOKS, BY_CELL), ("what size is {}?", "is {} small or big?")),
             "existence": (None, ("{colour} {shape}", "{colour} object", "{shape}"),
                           ("is there a {}?", "do you see a {}?")),
             "count": (None, ("{colour} object", "{shape}", "{size} object"),
                       ("how many {} are there?", "what is the number of {}?")),
             "place": ("{cell}", BY_LOOKS, ("where is {}?", "in which place is {}?")),
             "relation": (None, BY_LOOKS, ("is {} {} {}?", "does {} lie {} {}?")),
             # Teaches the words that "relation", which only asks yes or no, needs.
             "neighbour": ("{shape}", BY_LOOKS,
                           ("what shape is {} {}?", "which shape lies {} {}?"))}


class Thing(NamedTuple):
    """One object. All but dx, dy are indices into Shapes.names; -1, "?": unrecognisable."""
    size: int
    colour: int
    shape: int
    cell: int                   # row by row, from the top left
    dx: int = 0                 # pixels off the centre of the cell
    dy: int = 0

    pair = property(lambda self: (self.colour, self.shape))


def draw_thing(thing, size):
    """A cell of size x size pixels with a thing in it, from 8 x 8 points a pixel."""
    radius = 4 * round(size * DIAMETERS[SIZE_NAMES[thing.size]])        # in points
    points = np.arange(8 * size) + .5 - 4 * size
    x, y = (points - 8 * thing.dx) / radius, (points - 8 * thing.dy) / radius
    inside = INSIDE[SHAPES[thing.shape]](x[None, :], y[:, None])
    cover = inside.reshape(size, 8, size, 8).mean((1, 3))[..., None]
    ink, paper = np.array(COLOURS[COLOUR_NAMES[thing.colour]]), np.array(BACKGROUND)
    return np.round(cover * ink + (1 - cover) * paper).astype(np.uint8)


class Shapes:
    """Scenes, their pictures, captions and questions, and the checker that reads pictures.

    A scene is a tuple of Things, sorted by cell. `rng`: a random.Random. `avoid`: (colour, shape)
    pairs that are not shown or named. `required`: if given, pairs that questions are about."""
    identity = "shapes"
    parts = {"und": ["val", "held_out"], "gen": ["val", "unseen"]}
    sampling = 1.5, .5          # guidance and temperature: study/NOTES.md says what was tried

    def __init__(self, preset="cpu"):
        p = self.preset = PRESETS[preset]
        self.image_size, self.cell_size = p.image_size, p.image_size // p.grid      # pixels
        self.names = {"size": (*SIZE_NAMES, "?"), "colour": (*COLOUR_NAMES[:p.colours], "?"),
                      "shape": (*SHAPES[:p.shapes], "?"), "cell": CELL_NAMES[p.grid ** 2]}
        # Pairs of (colour, shape) that one task lacks in training and the other has.
        # Understanding sees `und_colours` neighbouring colours of each shape (others are *held-out
        # pairs*); generation lacks the first (*unseen objects*), but for --practice's pictures.
        pairs = [*product(range(p.colours), range(p.shapes))]
        self.held_out = {"und": {(c, s) for c, s in pairs if (c - s) % p.colours >= p.und_colours},
                         "gen": {(c, s) for c, s in pairs if (c - s) % p.colours == 0}}
        # What a cell can show is drawn once: nothing (None), or a Thing, as if in cell 0.
        size, moves = self.cell_size, range(-p.jitter, p.jitter + 1)
        self.drawn = {None: np.full((size, size, 3), BACKGROUND, np.uint8)}
        for fields in product(range(2), range(p.colours), range(p.shapes), [0], moves, moves):
            self.drawn[Thing(*fields)] = draw_thing(Thing(*fields), size)

    def scene(self, rng, n, avoid=()):
        """A random scene of n Things. A later one often shares its colour or its shape with an
        earlier one, so that attributes have to be bound; or it is the earlier one's companion, so
        that some often occur together, which hard questions about existence need."""
        p, things = self.preset, []
        for cell in rng.sample(range(p.grid ** 2), n):
            pair = None
            while pair is None or pair in avoid:
                colour, shape = pair = rng.randrange(p.colours), rng.randrange(p.shapes)
                if things:
                    other = rng.choice(things)
                    pair = rng.choice(((other.colour, shape), (colour, other.shape),
                                       self.companion(other), pair))
            size = rng.randrange(2)
            dx, dy = rng.randint(-p.jitter, p.jitter), rng.randint(-p.jitter, p.jitter)
            things.append(Thing(size, *pair, cell, dx, dy))
        return tuple(sorted(things, key=lambda thing: thing.cell))

    def companion(self, thing):
        """The (colour, shape) that often occurs beside this one."""
        return (thing.colour + 1) % self.preset.colours, (thing.shape + 1) % self.preset.shapes

    def render(self, scenes):
        """N scenes -> (N, H, W, 3) uint8, by copying drawn cells: never what training waits for."""
        size, shape = self.cell_size, (len(scenes), self.image_size, self.image_size, 3)
        pixels = np.full(shape, BACKGROUND, np.uint8)
        for picture, scene in zip(pixels, scenes):
            for thing in scene:
                y, x = (size * i for i in divmod(thing.cell, self.preset.grid))
                picture[y:y + size, x:x + size] = self.drawn[thing._replace(cell=0)]
        return pixels

    def read(self, pixels):
        """The checker: (N, H, W, 3) uint8 -> N scenes, by the drawn cell of least squared error:
        exact on drawn pictures. Under WORST dB (PSNR) a cell shows nothing that can be named."""
        n, grid, size = len(pixels), self.preset.grid, self.cell_size
        cells = pixels[:, :grid * size, :grid * size].reshape(n, grid, size, grid, size, 3)
        cells = torch.from_numpy(cells.swapaxes(2, 3).reshape(n * grid ** 2, -1)).float()
        drawn = torch.from_numpy(np.stack([*self.drawn.values()])).flatten(1).float()
        distances, numbers = torch.cdist(cells, drawn).min(1)           # of each cell
        numbers[distances ** 2 / drawn.size(1) > 255 ** 2 * 10 ** (-WORST / 10)] = -1
        contents = [*self.drawn, Thing(-1, -1, -1, 0)]                  # its last is number -1
        scenes = []
        for row in numbers.view(n, -1).tolist():
            seen = enumerate(contents[number] for number in row)
            scenes.append(tuple(thing._replace(cell=cell) for cell, thing in seen if thing))
        return scenes

    def split(self, task, part, n, seed=0, questions=10):
        """n scenes of a part for a task ("und" or "gen"), each with at most `questions` questions.

        A scene's part depends only on what it shows (not on where in its cell an object lies, nor
        on the seed), so no picture of a training scene is ever in another part."""
        rng = random.Random(f"{seed} {task} {part}")
        question_rng = random.Random(f"{seed} {task} {part} questions")
        # Pairs in `avoid` are never shown, one in `required` always is. Kinds of text take turns.
        avoid, required = self.held_out[task], None
        caption_kinds, question_kinds = [*CAPTIONS], [*QUESTIONS]
        if part == "train":                     # more of those that take longer to learn
            caption_kinds += ["scene", "two objects", "attribute binding", "position"] * 2
            question_kinds += ["relation", "relation"]
        elif part != "val":                     # "held_out" or "unseen"
            avoid, required = (), self.held_out[task]
            caption_kinds = ["scene", "colours", "attribute binding"]
            question_kinds = ["colour", "shape", "existence"]
        counts = dict.fromkeys(QUESTIONS, 0)                # of questions of each kind
        scenes, captions, asked, tries = [], [], [], 0
        while len(scenes) < n:
            objects = rng.randint(1, self.preset.max_objects)
            if (task, part) == ("und", "train"):            # with one there is nothing to choose
                objects = max(objects, rng.randint(1, self.preset.max_objects))
            scene = self.scene(rng, objects, avoid)
            look = [thing[:4] for thing in scene]           # all but dx, dy
            in_training = zlib.crc32(repr(look).encode()) % 10 != 0
            if in_training != (part == "train"):
                continue
            if required and not any(thing.pair in required for thing in scene):
                continue
            kind = caption_kinds[len(scenes) % len(caption_kinds)] if task == "gen" else "scene"
            _, fits = CAPTIONS[kind]
            if not fits(objects, len({thing.shape for thing in scene})):
                tries += 1
                if tries < 100:                 # a small world may have no scene for this kind
                    continue
                kind = "scene"
            tries = 0
            scenes.append(scene)
            captions.append(self.caption(rng, scene, kind))
            # Not every scene has a question of each kind: first come those asked least so far.
            asked.append([])
            for kind in sorted(question_kinds, key=counts.get) * 4:
                if len(asked[-1]) == questions:
                    break
                question = self.question(question_rng, scene, kind, avoid, required)
                if question and question not in asked[-1]:
                    asked[-1].append(question)
                    counts[kind] += 1 / question_kinds.count(kind)
        return Split(self.render(scenes), captions, asked, scenes)

    @cache                      # of few things, but asked for often
    def say(self, template, thing):
        """What a template says of a thing: "the {size} {shape}", "the small ring"."""
        words = {field: names[getattr(thing, field)] for field, names in self.names.items()}
        return template.format(**words)

    def related(self, a, b):
        """Which RELATIONS (as indices, in order) hold between two things."""
        (row_a, column_a), (row_b, column_b) = (divmod(t.cell, self.preset.grid) for t in (a, b))
        holds = column_a < column_b, column_a > column_b, row_a < row_b, row_a > row_b
        return [i for i in range(4) if holds[i]]

    def caption(self, rng, scene, kind):
        """A Caption that tells of every object, in reading order: all about it, or less."""
        template, _ = CAPTIONS[kind]
        parts, relation = [self.say(template, thing) for thing in scene], ()
        if kind == "counting":
            parts = [f"{NUMBERS[len(scene)]} {plural(parts[0])}"]
        if kind == "position":
            a, b = rng.sample(scene, 2)
            r = rng.choice(self.related(a, b))
            parts = [f"{self.say(template, a)} {RELATIONS[r]} {self.say(template, b)}"]
            relation = a.shape, r, b.shape
        *first, last = parts
        text = f"{', '.join(first)} and {last}" if first else last
        return Caption(rng.choice(("", "draw ", "a picture of ")) + text, kind, relation)

    def check(self, split, pixels):
        """For each picture drawn for a Split's captions: how many objects are asked for, how many
        of them are there, and does the caption fit exactly what is seen, its relation included? If
        a scene has pairs that are held out from generation, only their objects are counted."""
        rows = []
        for caption, scene, seen in zip(split.captions, split.scenes, self.read(pixels)):
            template, _ = CAPTIONS[caption.kind]
            held_out = [thing for thing in scene if thing.pair in self.held_out["gen"]]
            counted, want, have = (Counter(self.say(template, thing) for thing in things)
                                   for things in (held_out or scene, scene, seen))
            right = want == have
            if right and caption.relation:
                first, r, second = caption.relation
                by_shape = {thing.shape: thing for thing in seen}
                right = r in self.related(by_shape[first], by_shape[second])
            rows.append((counted.total(), (counted & have).total(), right))
        return rows

    def question(self, rng, scene, kind, avoid=(), required=None):
        """One Question of this kind, or None where the scene gives none."""
        asked, names, phrasings = QUESTIONS[kind]
        thing = rng.choice([t for t in scene if not required or t.pair in required])
        if kind == "existence":
            answer, *parts = self.existence(rng, scene, thing, names, avoid, required)
        elif kind == "count":
            answer, *parts = self.count(rng, scene, names)
        elif kind in ("place", "relation", "neighbour") and len(scene) == 1:
            return None                                     # a place is one among others
        elif kind in ("relation", "neighbour"):
            answer, *parts = self.relation(rng, scene, thing, names, asked)
        else:
            answer, *parts = self.say(asked, thing), self.refer(rng, scene, thing, names)
        if None in (answer, *parts):
            return None
        return Question(rng.choice(phrasings).format(*parts), answer, kind)

    def refer(self, rng, scene, thing, names):
        """A phrase that only `thing` fits, or None; names: templates. By its cell only if nothing
        else is unique: that is learned at once."""
        unique = [name for name in names
                  if [self.say(name, t) for t in scene].count(self.say(name, thing)) == 1]
        if len(unique) > 1 and BY_CELL in unique:
            unique.remove(BY_CELL)
        return self.say(rng.choice(unique), thing) if unique else None

    def count(self, rng, scene, names):
        """How many ...? Draws the number, then something that occurs that often."""
        groups = defaultdict(list, {len(scene): ["object"]})        # number -> phrases
        for field, name in zip(("colour", "shape", "size"), names):
            present = [self.say(name, thing) for thing in scene]
            for word in self.names[field][:-1]:
                phrase = name.format(**{field: word})
                groups[present.count(phrase)].append(phrase)
        number = rng.choice(sorted(groups))
        return NUMBERS[number], plural(rng.choice(groups[number]))

    def existence(self, rng, scene, thing, names, avoid, required):
        """Is there ...? About half of the answers are no, and most of these are hard, as in POPE
        (Li et al. 2023): one object's colour with another's shape, or its companion."""
        name = names[0] if required or rng.random() >= .4 else rng.choice(names[1:])
        if rng.randrange(2) == 1:
            return "yes", self.say(name, thing)
        present = [self.say(name, t) for t in scene]
        for _ in range(50):                                 # until something absent is drawn
            a, b = rng.choice(scene), rng.choice(scene)
            anything = rng.randrange(self.preset.colours), rng.randrange(self.preset.shapes)
            pair = rng.choice(((a.colour, b.shape), self.companion(a), anything))
            if required:
                pair = rng.choice(sorted(required))
            phrase = self.say(name, Thing(0, *pair, 0))
            if phrase not in present and (name != names[0] or pair not in avoid):
                return "no", phrase
        return None, None

    def relation(self, rng, scene, thing, names, asked):
        """Which thing is left of (above, ...) another? If asked is None: is `thing`, yes or no?"""
        other = rng.choice([t for t in scene if t is not thing])
        first, second = (self.refer(rng, scene, t, names) for t in (thing, other))
        if asked is None:
            r = rng.choice(self.related(thing, other))
            answer = rng.choice(("no", "yes"))
            # The opposite of something true: knowing which two are meant is not enough.
            return answer, first, RELATIONS[r if answer == "yes" else OPPOSITE[r]], second
        alone = [RELATIONS[r] for r in rng.sample(range(4), 4)          # only `thing` stands there
                 if [t for t in scene if r in self.related(t, other)] == [thing]]
        return self.say(asked, thing), alone[-1] if alone else None, second


def plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")
