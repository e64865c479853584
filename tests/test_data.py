"""The drawn world, its checker, its splits; presets; both tokenizers."""
import hashlib
import math
import random
import re
from collections import Counter, defaultdict

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
    rows = world.check(split, split.pixels)
    assert rows == [(len(scene), len(scene), True) for scene in split.scenes]


def test_the_checker_is_not_to_be_fooled(world):
    split = world.split("gen", "val", 300, questions=0)
    noise = np.random.default_rng(0).integers(0, 256, split.pixels.shape, dtype=np.uint8)
    assert not any(right for _, _, right in world.check(split, noise))
    for scene in split.scenes:              # one object less, or one of another colour
        other = scene[0]._replace(colour=(scene[0].colour + 1) % 6), *scene[1:]
        asked = split._replace(captions=[world.caption(random.Random(0), scene, "scene")] * 2,
                               scenes=[scene] * 2)
        rows = world.check(asked, world.render([scene[1:], other]))
        assert rows == [(len(scene), len(scene) - 1, False)] * 2
    # Of unseen objects these alone are counted; the rest has to be right all the same.
    split = world.split("gen", "unseen", 50, questions=0)
    rows = world.check(split, split.pixels)
    assert all(asked == seen and right for asked, seen, right in rows)
    assert sum(asked for asked, _, _ in rows) < sum(map(len, split.scenes))


def test_answers_are_true_and_balanced(world):
    """Questions answered once more, from the scene and the question's words alone."""
    fields = SHAPES, COLOUR_NAMES, SIZE_NAMES, shapes.CELL_NAMES[4]
    answers = defaultdict(Counter)

    def fits(thing, text):
        """Is this what the words name, by shape, colour, size and place?"""
        words = {word.removesuffix(end) for word in text.split() for end in ("", "s", "es")}
        own = [names[i] for names, i in zip(fields, (thing.shape, thing.colour, *thing[::3]))]
        return all(word in words or not words & {*names} or names == SIZE_NAMES and
                   words >= {*SIZE_NAMES} for word, names in zip(own, fields))

    split = world.split("und", "val", 1000)
    asked = [(scene, q) for scene, qs in zip(split.scenes, split.questions) for q in qs]
    for scene, q in asked:
        answers[q.kind][q.answer] += 1
        first, relation, second = re.split(f" ({'|'.join(shapes.RELATIONS)}) |$",
                                           q.text.rstrip("?") + " ")[:3]
        named = [t for t in scene if fits(t, second or first)]
        if q.kind == "existence":
            right = "yes" if named else "no"
        elif q.kind == "count":
            right = shapes.NUMBERS[len(named)]
        elif relation:
            (other,), r = named, shapes.RELATIONS.index(relation)
            here = [t for t in scene if t is not other and r in world.related(t, other)]
            right = " or ".join(SHAPES[t.shape] for t in here)
            if q.kind == "relation":
                right = "yes" if any(fits(t, first) for t in here) else "no"
        else:
            (t,) = named
            right = {"colour": COLOUR_NAMES[t.colour], "shape": SHAPES[t.shape],
                     "size": SIZE_NAMES[t.size], "place": fields[3][t.cell]}[q.kind]
        assert q.answer == right, q
    assert set(answers) == set(QUESTIONS)
    for kind, counts in answers.items():
        limit = .57 if kind in ("size", "existence", "relation") else .42
        assert max(counts.values()) < limit * counts.total() > 40, (kind, counts)


def test_splits_do_not_leak(world):
    """Nor do scenes depend on how many questions are asked about them."""
    train, others = set(), set()
    for task, parts in world.parts.items():
        own, other = world.held_out[task], world.held_out["und" if task == "gen" else "gen"]
        for part in ("train", *parts):
            split = world.split(task, part, 400, seed=3)
            none = world.split(task, part, 50, seed=3, questions=0)
            assert (none.scenes, none.captions) == (split.scenes[:50], split.captions[:50])
            looks = train if part == "train" else others
            looks |= {tuple(t[:4] for t in scene) for scene in split.scenes}
            pairs = [{t.pair for t in scene} for scene in split.scenes]
            if part == "train":
                assert not any(p & own for p in pairs) and any(p & other for p in pairs)
                texts = [caption.text for caption in split.captions]
                if task == "und":
                    texts = [q.text for questions in split.questions for q in questions]
                for colour, shape in own:
                    assert f"{COLOUR_NAMES[colour]} {SHAPES[shape]}" not in " ".join(texts)
            elif part == "val":
                assert not any(p & own for p in pairs) and any(p & other for p in pairs)
            else:
                assert all(p & own for p in pairs)
    assert not train & others


def test_the_same_seed_gives_the_same_bytes(world):
    """On every machine: the digest was written down once."""
    split, other = (world.split("und", "train", 50, seed) for seed in (0, 1))
    content = split.pixels.tobytes() + repr((split.questions, split.captions)).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == "2d6ba20eb73ffdcd"
    assert split.scenes != other.scenes


def test_a_preset_that_cannot_work_is_refused_before_any_work(monkeypatch, error):
    wrong = dict(heads=(3, 32), grid=(1, 4), image_size=(18, 3), vq_width=(20,), codes=(257, 1),
                 colours=(9, 2), shapes=(9, 1), jitter=(2,), max_objects=(5, 1),
                 und_colours=(3, 1))
    for row in vars(PRESETS["tiny"]):
        for value in (-1, *([] if row == "jitter" else [0]), *wrong.get(row, ())):
            with monkeypatch.context() as patch:
                patch.setattr(PRESETS["tiny"], row, value)
                line = error(data.load, "shapes", "tiny")
                assert f"preset tiny: {row} is {value}, expected " in line


def test_a_small_world_has_an_end(monkeypatch):
    for row, value in dict(und_colours=2, shapes=2, max_objects=3, patch=2).items():
        monkeypatch.setattr(PRESETS["tiny"], row, value)
    world = data.load("shapes", "tiny")
    for task, parts in world.parts.items():
        assert all(len(world.split(task, part, 20).pixels) == 20 for part in ("train", *parts))


def test_any_text_comes_back():
    rng, ranks = random.Random(0), tok.train_bpe(["a big red circle"] * 2)
    tokenizer = tok.Tokenizer(ranks, tok.VQ(8, 4, 8, 4))
    odd = ["".join(chr(rng.randrange(0x300)) for _ in range(40)) for _ in range(200)]
    for text in ["a ring", "", "<|eos|>", "naïve 漢字 🙂\n\t ", *odd]:
        assert tokenizer.string(tokenizer.ids(text)) == text
        assert not set(tokenizer.ids(text)) & set(tok.SPECIAL.values())
    assert len(tokenizer.ids("a big red circle")) == 4
    assert tokenizer.ids("cafe\u0301") == tokenizer.ids("caf\u00e9")    # they look alike


def test_bpe_is_that_of_tiktoken(world):
    """The same tokens as tiktoken's own, slow, educational trainer gives."""
    captions = world.split("gen", "train", 60, questions=0).captions
    text = " ".join(caption.text for caption in captions)
    assert tok.train_bpe([text], 300) == bpe_train(text, 300, tok.PATTERN, visualise=None)


def test_vq_has_learned_and_a_token_tells_of_its_own_patch_alone(trained):
    tokenizer = tok.Tokenizer.from_state(read_checkpoint(trained / "tokenizer.pt", "tokenizer"))
    pixels = Shapes("tiny").split("gen", "val", 100, questions=0).pixels
    codes = tokenizer.encode(pixels)
    error = ((tokenizer.decode(codes) - pixels.astype(float)) ** 2).mean()
    assert 10 * math.log10(255 ** 2 / error) > 18 and len(codes.unique()) > .5 * 32
    pixels[1] = pixels[0]
    pixels[1, :4, :4] = 255 - pixels[0, :4, :4]
    one, other = tokenizer.vq.features(torch.tensor(pixels[:2]))
    assert ((one - other).abs().sum(-1) > 1e-6).nonzero().tolist() == [[0, 0]]
