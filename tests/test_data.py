"""The drawn world, its checker, its splits; presets; both tokenizers."""
import hashlib
import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiktoken._educational import bpe_train

import data
import shapes
import tokenizer as tok
from common import read_checkpoint
from data import PRESETS
from shapes import COLOUR_NAMES, QUESTIONS, SHAPES, SIZE_NAMES, Shapes

@pytest.fixture(scope="module")
def world():
    return Shapes("cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_checker_reads_every_drawn_scene(preset):
    world = Shapes(preset)
    split = world.split("gen", "val", 300, questions=0)
    assert world.read(split.pixels) == split.scenes
    assert world.check(split, split.pixels) == [(len(scene), len(scene), True)
                                                for scene in split.scenes]


def test_the_checker_is_not_to_be_fooled(world):
    split = world.split("gen", "val", 300, questions=0)
    noise = np.random.default_rng(0).integers(0, 256, split.pixels.shape, dtype=np.uint8)
    assert not any(right for _, _, right in world.check(split, noise))
    # One object less or more, or one of another colour, is not what the caption says.
    for change in (lambda scene: scene[1:], lambda scene: (
            *scene, *(scene[0]._replace(cell=cell) for cell in range(4)
                      if cell not in {thing.cell for thing in scene}))[:len(scene) + 1]):
        changed = [change(scene) for scene in split.scenes]
        for scene, other, (_, _, right) in zip(split.scenes, changed,
                                               world.check(split, world.render(changed))):
            assert not right or scene == other
    painted = [(scene[0]._replace(colour=(scene[0].colour + 1) % 6), *scene[1:])
               for scene in split.scenes]
    for caption, (_, _, right) in zip(split.captions, world.check(split, world.render(painted))):
        assert right == ("{colour}" not in shapes.CAPTIONS[caption.kind][0])
    # Of unseen objects these alone are counted; the rest has to be right all the same.
    split = world.split("gen", "unseen", 50, questions=0)
    rows = world.check(split, split.pixels)
    assert all(asked == seen and right for asked, seen, right in rows)
    assert sum(asked for asked, _, _ in rows) < sum(map(len, split.scenes))


def test_answers_are_true(world):
    """Questions answered once more, from the scene and the question's words alone."""
    cells = shapes.CELL_NAMES[4]

    def fits(thing, words):
        """Is this what the words name, by shape, colour, size and place?"""
        own = SHAPES[thing.shape], COLOUR_NAMES[thing.colour], SIZE_NAMES[thing.size], \
            cells[thing.cell]
        return all(word in words or not {*words} & {*names} or {*SIZE_NAMES} <= {*words} & {*names}
                   for word, names in zip(own, (SHAPES, COLOUR_NAMES, SIZE_NAMES, cells)))

    split, checked = world.split("und", "train", 400), Counter()
    for scene, questions in zip(split.scenes, split.questions):
        for q in questions:
            words = q.text.rstrip("?").split()
            if q.kind == "existence":
                assert q.answer == ("yes" if any(fits(t, words) for t in scene) else "no"), q
            elif q.kind == "count":
                singular = [w[:-2] if w == "crosses" else w[:-1] if w[:-1] in SHAPES else w
                            for w in words]
                assert q.answer == shapes.NUMBERS[sum(fits(t, singular) for t in scene)], q
            elif q.kind in ("relation", "neighbour"):
                relation = next(r for r in shapes.RELATIONS if f" {r} " in q.text)
                first, second = q.text.rstrip("?").split(f" {relation} ")
                (b,) = [t for t in scene if fits(t, second.split())]
                here = {"left of": lambda a: a.cell % 2 < b.cell % 2,
                        "right of": lambda a: a.cell % 2 > b.cell % 2,
                        "above": lambda a: a.cell // 2 < b.cell // 2,
                        "below": lambda a: a.cell // 2 > b.cell // 2}[relation]
                if q.kind == "relation":
                    (a,) = [t for t in scene if fits(t, first.split())]
                    assert q.answer == ("yes" if here(a) else "no"), q
                else:
                    assert [q.answer] == [SHAPES[t.shape] for t in scene if here(t)], q
            else:
                (t,) = [t for t in scene if fits(t, words)]
                assert q.answer == {"colour": COLOUR_NAMES[t.colour], "shape": SHAPES[t.shape],
                                    "size": SIZE_NAMES[t.size], "place": cells[t.cell]}[q.kind], q
            checked[q.kind] += 1
    assert set(checked) == set(QUESTIONS) and min(checked.values()) > 100


def test_answers_are_balanced_and_phrased_in_two_ways(world):
    answers, openings = defaultdict(Counter), defaultdict(set)
    for questions in world.split("und", "val", 1000).questions:
        for q in questions:
            answers[q.kind][q.answer] += 1
            openings[q.kind].add(" ".join(q.text.split()[:2]))
    assert set(answers) == set(QUESTIONS) and min(map(len, openings.values())) > 1
    for kind, counts in answers.items():
        most = counts.most_common(1)[0][1] / counts.total()
        limit = .57 if kind in ("size", "existence", "relation") else .42
        assert most < limit, (kind, counts)


def test_splits_do_not_leak(world):
    """Nor do scenes depend on how many questions are asked about them."""
    looks = {}
    for task, parts in world.parts.items():
        for part in ("train", *parts):
            split = world.split(task, part, 400, seed=3)
            looks[task, part] = {tuple(t[:4] for t in scene) for scene in split.scenes}
            pairs = [{t.pair for t in scene} for scene in split.scenes]
            own = world.held_out[task]
            other = world.held_out["und" if task == "gen" else "gen"]
            none = world.split(task, part, 50, seed=3, questions=0)
            assert (none.scenes, none.captions) == (split.scenes[:50], split.captions[:50])
            if part == "train":
                assert not any(p & own for p in pairs) and any(p & other for p in pairs)
                texts = [caption.text for caption in split.captions]
                if task == "und":
                    texts = [q.text for questions in split.questions for q in questions]
                for colour, shape in own:
                    assert f"{COLOUR_NAMES[colour]} {SHAPES[shape]}" not in " ".join(texts)
            elif part == "val":
                assert not any(p & (own | other) for p in pairs)
            else:
                assert all(p & own for p in pairs)
    train = looks["und", "train"] | looks["gen", "train"]
    assert not any(train & seen for (_, part), seen in looks.items() if part != "train")
    assert set(looks) >= {("und", "held_out"), ("gen", "unseen")}


def test_the_same_seed_gives_the_same_bytes(world):
    """On every machine: the digest was written down once."""
    def digest(seed):
        split = world.split("und", "train", 50, seed)
        content = split.pixels.tobytes() + repr((split.questions, split.captions)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    assert digest(0) == "c44fb22e6afc6c08" != digest(1)


# ---------------------------------------------------------------------- presets

@pytest.mark.parametrize("row, values, expected", [
    ("heads", (3, 32), "divides width, 32, into heads of even size"), ("grid", (1, 4), "2 or 3"),
    ("image_size", (18, 3), "a multiple of patch, 4"), ("vq_width", (20,), "a multiple of 8"),
    ("codes", (257, 1), "at most the patches in a batch"), ("colours", (9, 2), "3 to 8"),
    ("shapes", (9, 1), "2 to 8"), ("jitter", (2, -1), "an eighth of a cell"),
    ("max_objects", (5, 1), "2 to 4, the number of cells"), ("held_out", (3, -1), "0 to 2"),
    *((row, (0, -1), "at least 1") for row in vars(PRESETS["tiny"]) if row not in (
        "held_out", "jitter"))])
def test_a_preset_that_cannot_work_is_refused_before_any_work(row, values, expected, monkeypatch,
                                                              error):
    for value in values:
        monkeypatch.setattr(PRESETS["tiny"], row, value)
        line = error(data.load, "shapes", "tiny")
        assert f"preset tiny: {row} is {value}, expected" in line and expected in line


@pytest.mark.parametrize("edits", [{}, {"layers": 1}, {"layers": 2}, {"held_out": 0}, {"patch": 2},
                                   {"held_out": 2, "shapes": 2, "max_objects": 3}])
def test_worlds_that_can_work_have_an_end(edits, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SimpleNamespace(**{**vars(PRESETS["tiny"]), **edits}))
    world = data.load("shapes", "tiny")
    for task, parts in world.parts.items():
        assert len(parts) == 1 + (edits.get("held_out") != 0)
        assert all(len(world.split(task, part, 20).pixels) == 20 for part in ("train", *parts))


# ---------------------------------------------------------------------- tokenizers

def test_any_text_comes_back():
    texts = ["a big red circle", "what colour is the circle?", "two crosses and one square"] * 5
    tokenizer = tok.Tokenizer(tok.train_bpe(texts), tok.VQ(8, 4, 8, 4))
    rng = random.Random(0)
    ranges = ((32, 127), (0, 0x300), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF))
    odd = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(200)]
    for text in [*texts, "", "<|eos|>", "naïve 漢字 🙂\n\t ", "\x00\x7f", *odd]:
        assert tokenizer.string(tokenizer.ids(text)) == text
        assert not set(tokenizer.ids(text)) & set(tok.SPECIAL.values())
    assert len(tokenizer.ids("a big red circle")) == 4
    assert tokenizer.ids("cafe\u0301") == tokenizer.ids("caf\u00e9")    # they look alike


def test_bpe_is_that_of_tiktoken(world):
    """The same tokens as tiktoken's own, slow, educational trainer gives."""
    captions = world.split("gen", "train", 60, questions=0).captions
    text = " ".join(caption.text for caption in captions)
    assert tok.train_bpe([text], 300) == bpe_train(text, 300, tok.PATTERN, visualise=None)


def test_vq_has_learned_and_uses_its_codes(trained):
    tokenizer = tok.Tokenizer.from_state(read_checkpoint(trained / "tokenizer.pt", "tokenizer"))
    pixels = Shapes("tiny").split("gen", "val", 100, questions=0).pixels
    codes = tokenizer.encode(pixels)
    error = ((tokenizer.decode(codes) - pixels.astype(float)) ** 2).mean()
    assert 10 * math.log10(255 ** 2 / error) > 18 and len(codes.unique()) > .5 * 32


def test_a_token_tells_of_its_own_patch_alone():
    torch.manual_seed(0)
    vq = tok.VQ(32, 4, 96, 256)
    a = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    b = a.clone()
    b[0, :4, :4] = 255 - b[0, :4, :4]
    changed = (vq.features(a) - vq.features(b)).abs().sum(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 0, 0]]
