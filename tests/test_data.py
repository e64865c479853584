"""The drawn world, its checker, its splits; folders of images; both tokenizers."""
import hashlib
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image
from tiktoken._educational import bpe_train

import data
import tokenizer as tok
from common import read_checkpoint, save_checkpoint
from data import COLOUR_NAMES, PRESETS, QUESTION_KINDS, SHAPES, SIZE_NAMES, Folder, Shapes


@pytest.fixture(scope="module")
def world():
    return Shapes("cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_checker_reads_every_drawn_scene(preset):
    world = Shapes(preset)
    split = world.split("gen", "val", 300, questions=0)
    assert world.read(split.pixels) == split.scenes
    for caption, scene in zip(split.captions, split.scenes):
        assert world.fulfilled(caption, scene, scene) == (len(scene), True)


def test_the_checker_is_not_to_be_fooled(world):
    split = world.split("gen", "val", 300, questions=0)
    noise = np.random.default_rng(0).integers(0, 256, split.pixels.shape, dtype=np.uint8)
    for caption, scene, seen in zip(split.captions, split.scenes, world.read(noise)):
        assert not world.fulfilled(caption, scene, seen)[1]
        # One object more, one less, or one of another colour is not what the caption says.
        assert not world.fulfilled(caption, scene, scene[1:])[1]
        assert not world.fulfilled(caption, scene, (*scene, scene[0]))[1]
        if "colour" in data.CAPTION_FIELDS[caption.kind]:
            other = scene[0]._replace(colour=(scene[0].colour + 1) % 6)
            assert not world.fulfilled(caption, scene, (other, *scene[1:]))[1]


def test_answers_are_true(world):
    """Questions answered once more, from the scene and the question's words alone."""
    cells = ("top-left", "top-right", "bottom-left", "bottom-right")

    def fits(thing, words):
        """Is this what the words name, by shape, colour, size and place?"""
        text = " ".join(words)
        named = [cell for cell in cells if cell in text]
        return ((SHAPES[thing.shape] in words or not set(words) & set(SHAPES))
                and (COLOUR_NAMES[thing.colour] in words or not set(words) & set(COLOUR_NAMES))
                and (SIZE_NAMES[thing.size] in words or set(SIZE_NAMES) <= set(words)
                     or not set(words) & set(SIZE_NAMES))
                and (not named or cells[thing.cell] in named))

    split, checked = world.split("und", "train", 400), Counter()
    for scene, questions in zip(split.scenes, split.questions):
        for q in questions:
            words = q.text.rstrip("?").split()
            if q.kind == "existence":
                assert q.answer == ("yes" if any(fits(t, words) for t in scene) else "no"), q
            elif q.kind == "count":
                singular = [w[:-2] if w == "crosses" else w[:-1] if w[:-1] in SHAPES else w
                            for w in words]
                assert q.answer == data.NUMBERS[sum(fits(t, singular) for t in scene)], q
            elif q.kind in ("relation", "neighbour"):
                relation = next(r for r in ("left of", "right of", "above", "below")
                                if f" {r} " in q.text)
                first, second = q.text.rstrip("?").split(f" {relation} ")
                (b,) = [t for t in scene if fits(t, second.split())]
                here = {"left of": lambda a: a.cell % 2 < b.cell % 2, "below": lambda a: a.cell // 2
                        > b.cell // 2, "right of": lambda a: a.cell % 2 > b.cell % 2,
                        "above": lambda a: a.cell // 2 < b.cell // 2}[relation]
                if q.kind == "relation":
                    (a,) = [t for t in scene if fits(t, first.split())]
                    assert q.answer == ("yes" if here(a) else "no"), q
                else:
                    assert [q.answer] == [SHAPES[t.shape] for t in scene if here(t)], q
            else:
                (thing,) = [t for t in scene if fits(t, words)]
                assert q.answer == {"colour": COLOUR_NAMES[thing.colour], "shape":
                                    SHAPES[thing.shape], "size": SIZE_NAMES[thing.size],
                                    "place": cells[thing.cell]}[q.kind], q
            checked[q.kind] += 1
    assert set(checked) == set(QUESTION_KINDS) and min(checked.values()) > 100


def test_answers_are_balanced_and_phrased_in_two_ways(world):
    split = world.split("und", "val", 1000)
    answers, openings = defaultdict(Counter), defaultdict(set)
    for questions in split.questions:
        for q in questions:
            answers[q.kind][q.answer] += 1
            openings[q.kind].add(" ".join(q.text.split()[:2]))
    assert set(answers) == set(QUESTION_KINDS) and min(map(len, openings.values())) > 1
    for kind, counts in answers.items():
        most = counts.most_common(1)[0][1] / counts.total()
        limit = .57 if kind in ("size", "existence", "relation") else .42
        assert most < limit, (kind, counts)


@pytest.mark.parametrize("preset", PRESETS)
def test_held_out_pairs_have_different_shapes(preset):
    held_out, size = Shapes(preset).held_out, PRESETS[preset]
    assert not held_out["und"] & held_out["gen"]
    for pairs in held_out.values():
        assert sorted(shape for _, shape in pairs) == list(range(size.held_out))
        assert all(colour < size.colours for colour, _ in pairs)


def test_scenes_do_not_depend_on_the_number_of_questions(world):
    for part in ("train", "val", "transfer"):
        none, many = (world.split("und", part, 100, questions=n) for n in (0, 10))
        assert (none.scenes, none.captions) == (many.scenes, many.captions)


def test_splits_do_not_leak(world):
    looks = {}
    for task in ("und", "gen"):
        for part in ("train", "val", "transfer"):
            split = world.split(task, part, 600, seed=3)
            looks[task, part] = {tuple(t[:4] for t in scene) for scene in split.scenes}
            pairs = [{t.pair for t in scene} for scene in split.scenes]
            own = world.held_out[task]
            other = world.held_out["und" if task == "gen" else "gen"]
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
    for task in ("und", "gen"):
        assert not train & (looks[task, "val"] | looks[task, "transfer"])


def test_the_same_seed_gives_the_same_bytes(world):
    """On every machine: the digest was written down once."""
    def digest(seed):
        split = world.split("und", "train", 50, seed)
        content = split.pixels.tobytes() + repr((split.questions, split.captions)).encode()
        return hashlib.sha256(content).hexdigest()

    assert digest(0) == digest(0) != digest(1)
    assert digest(0)[:16] == "c44fb22e6afc6c08"


def test_folders(tmp_path):
    for name, colour in (("red_dot", "red"), ("blue_dot", "blue")):
        (tmp_path / name).mkdir()
        for i in range(30):
            mode = ("RGB", "RGBA", "L", "P", "CMYK")[i % 5]
            suffix = "tif" if mode == "CMYK" else "png"
            picture = Image.new("RGB", (20 + i, 30), colour).convert(mode)
            picture.save(tmp_path / name / f"{i}.{suffix}")
        for i in range(100):
            noise = np.random.default_rng([i, len(name)]).integers(0, 255, (9, 9, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"n{i}.png")
    folder = Folder(tmp_path)
    train, val = folder.split("und", "train", 1000), folder.split("gen", "val", 1000)
    assert len(train.pixels) + len(val.pixels) == 260
    assert train.pixels.shape[1:] == (32, 32, 3)
    assert {caption.text for caption in train.captions} == {"red dot", "blue dot"}
    assert not {p.tobytes() for p in train.pixels} & {p.tobytes() for p in val.pixels}

    rows = [{"file_name": f"red_dot/n{i}.png", "text": f"noise {i}",
             "qa": [{"question": "which?", "answer": str(i)}]} for i in range(100)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = Folder(tmp_path).split("und", "train", 5)
    for caption, (question,) in zip(split.captions, split.questions):
        assert caption.text == f"noise {question.answer}"


def test_any_text_comes_back():
    texts = ["a big red circle", "what colour is the circle?", "two crosses and one square"] * 5
    ranks = tok.train_bpe(texts)
    encoding = tiktoken.Encoding("x", pat_str=tok.PATTERN, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(0)
    ranges = ((32, 127), (0, 0xD7FF), (0xE000, 0x10FFFF))
    odd = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(200)]
    for text in [*texts, "", "<|eos|>", "naïve 漢字 🙂\n\t ", "\x00\x7f", *odd]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert len(encoding.encode_ordinary("a big red circle")) == 4


def test_bpe_is_that_of_tiktoken():
    """The same tokens as tiktoken's own, slow, educational trainer gives."""
    captions = Shapes("cpu").split("gen", "train", 60, questions=0).captions
    text = " ".join(caption.text for caption in captions)
    assert tok.train_bpe([text], 300) == bpe_train(text, 300, tok.PATTERN, visualise=None)


def test_vq_learns_and_is_kept(world, tmp_path):
    tokenizer, checkpoint = tok.train_tokenizer(world, "cpu", torch.device("cpu"), steps=60)
    scores, _, _ = tok.score_tokenizer(tokenizer, world, n=50)
    assert scores["psnr"] > 14 and scores["codes_used"] > .25
    save_checkpoint(checkpoint, tmp_path / "t.pt")
    again = tok.Tokenizer.from_state(read_checkpoint(tmp_path / "t.pt", "tokenizer"))
    pixels = world.split("gen", "val", 20, questions=0).pixels
    assert torch.equal(tokenizer.encode(pixels), again.encode(pixels))
    text = "a red circle <|eos|>"
    assert again.ids(text) == tokenizer.ids(text) and again.eos not in again.ids("<|eos|>")
    assert again.string(again.ids("ein Übel 🙂")) == "ein Übel 🙂"


def test_a_token_tells_of_its_own_patch_alone():
    torch.manual_seed(0)
    vq = tok.VQ(32, 96, 256)
    a = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    b = a.clone()
    b[0, :4, :4] = 255 - b[0, :4, :4]
    features = [vq.features(x.permute(0, 3, 1, 2).float() / 127.5 - 1) for x in (a, b)]
    changed = (features[0] - features[1]).abs().sum(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 0, 0]]
