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
from data import COLOURS, KINDS, SHAPES, Folder, Shapes


@pytest.fixture(scope="module")
def world():
    return Shapes("cpu")


@pytest.mark.parametrize("preset", data.WORLDS)
def test_the_checker_reads_every_drawn_scene(preset):
    world = Shapes(preset)
    split = world.split("gen", "val", 500, questions=0)
    assert world.read(split.pixels) == split.scenes
    assert all(world.fulfilled(*row) == (len(row[1]), True) for row in zip(split.captions, split.scenes, split.scenes))


def test_the_checker_is_not_to_be_fooled(world):
    split = world.split("gen", "val", 300, questions=0)
    noise = np.random.default_rng(0).integers(0, 256, split.pixels.shape, dtype=np.uint8)
    assert not any(world.fulfilled(*row)[1] for row in zip(split.captions, split.scenes, world.read(noise)))
    # A scene with one object more, one less, or one of another colour is not what the caption says.
    for caption, scene in zip(split.captions, split.scenes):
        assert not world.fulfilled(caption, scene, scene[1:])[1]
        assert not world.fulfilled(caption, scene, (*scene, scene[0]))[1]
        if "colour" in data.CAPTIONS[caption.kind]:
            other = scene[0]._replace(colour=(scene[0].colour + 1) % 6)
            assert not world.fulfilled(caption, scene, (other, *scene[1:]))[1]


def test_answers_are_true(world):
    """Questions answered once more, from the scene and the question's words alone."""
    split = world.split("und", "train", 400)

    def fits(thing, words):
        return ((SHAPES[thing.shape] in words or not set(words) & set(SHAPES))
                and (list(COLOURS)[thing.colour] in words or not set(words) & set(COLOURS))
                and (("small", "big")[thing.size] in words or not {"small", "big"} & set(words)))

    checked = Counter()
    for scene, questions in zip(split.scenes, split.questions):
        for q in questions:
            words = q.text.rstrip("?").split()
            if q.kind == "existence":
                assert q.answer == ("yes" if any(fits(t, words) for t in scene) else "no"), q
            elif q.kind == "count":
                names = [w for w in words if w != "objects"]
                plain = [w[:-2] if w == "crosses" else w[:-1] if w[:-1] in SHAPES else w for w in names]
                assert q.answer == data.NUMBERS[sum(fits(t, plain) for t in scene)], q
            elif q.kind in ("colour", "shape") and not {"left", "right", "top", "bottom"} & set(words):
                (thing,) = [t for t in scene if fits(t, words)]
                assert q.answer == (list(COLOURS)[thing.colour] if q.kind == "colour" else SHAPES[thing.shape]), q
            else:
                continue
            checked[q.kind] += 1
    assert min(checked[k] for k in ("existence", "count", "colour", "shape")) > 100


def test_answers_are_balanced_and_phrased_in_two_ways(world):
    split = world.split("und", "val", 1000)
    answers, openings = defaultdict(Counter), defaultdict(set)
    for q in (q for some in split.questions for q in some):
        answers[q.kind][q.answer] += 1
        openings[q.kind].add(" ".join(q.text.split()[:2]))
    assert set(answers) == set(KINDS) and all(len(o) > 1 for o in openings.values())
    for kind, counts in answers.items():
        most = counts.most_common(1)[0][1] / counts.total()
        assert most < (.57 if kind in ("size", "existence", "relation") else .42), (kind, counts)


def test_splits_do_not_leak(world):
    looks = {}
    for task in ("und", "gen"):
        for part in ("train", "val", "transfer"):
            split = world.split(task, part, 600, seed=3)
            looks[task, part] = {tuple(t[:4] for t in scene) for scene in split.scenes}
            pairs = [{(t.colour, t.shape) for t in scene} for scene in split.scenes]
            own, other = (world.held_out[t] for t in ((task, "und" if task == "gen" else "gen")))
            if part == "train":
                assert not any(p & own for p in pairs) and any(p & other for p in pairs)
                names = {f"{list(COLOURS)[c]} {SHAPES[s]}" for c, s in own}
                said = " ".join(q.text for some in split.questions for q in some) if task == "und" else " ".join(
                    c.text for c in split.captions)
                assert not any(name in said for name in names)
            elif part == "val":
                assert not any(p & (own | other) for p in pairs)
            else:
                assert all(p & own for p in pairs)
    train = looks["und", "train"] | looks["gen", "train"]
    assert not train & (looks["und", "val"] | looks["gen", "val"] | looks["und", "transfer"] | looks["gen", "transfer"])


def test_the_same_seed_gives_the_same_bytes(world):
    """On every machine: the digest was written down once."""
    def digest(seed):
        split = world.split("und", "train", 50, seed)
        return hashlib.sha256(split.pixels.tobytes() + repr(split.questions).encode() + repr(split.captions).encode()).hexdigest()

    assert digest(0) == digest(0) != digest(1)
    assert digest(0)[:16] == "2249bfdf8a539c8c"


def test_folders(tmp_path):
    for name, colour in (("red_dot", "red"), ("blue_dot", "blue")):
        (tmp_path / name).mkdir()
        for i in range(30):
            mode = ("RGB", "RGBA", "L", "P", "CMYK")[i % 5]
            Image.new("RGB", (20 + i, 30), colour).convert(mode).save(tmp_path / name / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
        for i in range(100):
            noise = np.random.default_rng([i, len(name)]).integers(0, 255, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"n{i}.png")
    folder = Folder(tmp_path)
    train, val = folder.split("und", "train", 1000), folder.split("gen", "val", 1000)
    assert len(train.pixels) + len(val.pixels) == 260 and train.pixels.shape[1:] == (32, 32, 3)
    assert {c.text for c in train.captions} == {"red dot", "blue dot"}
    assert not {p.tobytes() for p in train.pixels} & {p.tobytes() for p in val.pixels}

    rows = [{"file_name": f"red_dot/n{i}.png", "text": f"noise {i}", "qa": [{"question": "which?", "answer": str(i)}]}
            for i in range(100)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = Folder(tmp_path).split("und", "train", 5)
    assert all(c.text == f"noise {q[0].answer}" for c, q in zip(split.captions, split.questions))


@pytest.mark.parametrize("line, complaint", [
    ("{", "line 2: not JSON"), ('{"file_name": "a.png"}', "line 2"), ('{"file_name": "../a.png", "text": "x"}', "leads out"),
    ('{"file_name": "b.png", "text": "x"}', "no file"), ('{"file_name": "bad.png", "text": "x"}', "cannot be used as an image"),
    ('{"file_name": "a.png", "text": " "}', "not empty"), ("[]", "line 2")])
def test_bad_metadata_is_refused_in_one_line(tmp_path, capsys, line, complaint):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(SystemExit) as stop:
        Folder(tmp_path)
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert stop.value.code == 2 and complaint in error


def test_any_text_comes_back():
    texts = ["a big red circle", "what colour is the circle?", "two crosses and one square"] * 5
    ranks = tok.train_bpe(texts)
    own = tiktoken.Encoding("x", pat_str=tok.PATTERN, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(0)
    for text in [*texts, "", "<|eos|>", "naïve 漢字 🙂\n\t ", "\x00\x7f", *("".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(
            0xD7FF), rng.randrange(0xE000, 0x10FFFF)))) for _ in range(40)) for _ in range(200))]:
        assert own.decode(own.encode_ordinary(text)) == text
    assert len(own.encode_ordinary("a big red circle")) == 4


def test_bpe_is_that_of_tiktoken():
    """The same tokens as tiktoken's own, slow, educational trainer gives."""
    text = " ".join(c.text for c in Shapes("cpu").split("gen", "train", 60, questions=0).captions)
    theirs = bpe_train(text, 300, tok.PATTERN, visualise=None)
    ours = tok.train_bpe([text], 300)
    assert ours == theirs


def test_vq_learns_and_is_kept(world, tmp_path):
    tokenizer, checkpoint = tok.train_tokenizer(world, "cpu", torch.device("cpu"), steps=60)
    scores, _, _ = tok.score_tokenizer(tokenizer, world, n=50)
    assert scores["psnr"] > 14 and scores["codes_used"] > .25
    tok.save(checkpoint, tmp_path / "t.pt")
    again = tok.Tokenizer.from_state(tok.read(tmp_path / "t.pt", "tokenizer"))
    pixels = world.split("gen", "val", 20, questions=0).pixels
    assert torch.equal(tokenizer.encode(pixels), again.encode(pixels))
    assert again.ids("a red circle <|eos|>") == tokenizer.ids("a red circle <|eos|>") and again.eos not in again.ids("<|eos|>")
    assert again.string(again.ids("ein Übel 🙂")) == "ein Übel 🙂"


def test_a_token_tells_of_its_own_patch_alone():
    torch.manual_seed(0)
    vq = tok.VQ(tok.Config())
    a = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    b = a.clone()
    b[0, :4, :4] = 255 - b[0, :4, :4]
    features = [vq.features(x.permute(0, 3, 1, 2).float() / 127.5 - 1) for x in (a, b)]
    assert ((features[0] - features[1]).abs().sum(-1) > 1e-6).nonzero().tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04broken", None])
def test_foreign_checkpoints_are_refused(tmp_path, capsys, content):
    path = tmp_path / "x.pt"
    if content is None:
        torch.save({"kind": "something else"}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        tok.read(path, "tokenizer")
    assert str(path) in capsys.readouterr().err
