"""A folder of one's own images, and files of strangers: used, or refused in one line each."""
import builtins
import io
import json
import os
import random
import re
import struct
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import read_checkpoint
from conftest import run, train_args
from data import Folder, read_line, read_picture

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))


def encoded(image, kind="png", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def write_classes(root, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(246):
        path = root / ("black_cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 20)).save(path)
    return root


def test_both_conventions_of_folders(tmp_path, capsys, monkeypatch):
    """What a folder is taken for is told. Each file is opened once. Copies are in one part. Each
    task and each seed takes pictures of its own, by chance the same."""
    root, opened, real = write_classes(tmp_path / "images"), [], builtins.open
    for path in (".checkpoints/0.png", "dogs/._0.png", "dogs/deep/0.png", "dogs/scan.pdf"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"%PDF-1.4")
    (root / "linked").symlink_to(root / "dogs")
    monkeypatch.setattr(builtins, "open", lambda *args: opened.append(args) or real(*args))
    folder = Folder(root, "tiny")
    assert len(opened) == 369
    told = capsys.readouterr().out
    assert "left out 4 other" in told and "captions like 'black cats', 'dogs', 'linked'" in told
    train, val = folder.split("und", "train", 1000), folder.split("gen", "val", 1000)
    assert len(train.pixels) + len(val.pixels) == 369 and train.pixels.shape[1:] == (16, 16, 3)
    assert not {p.tobytes() for p in train.pixels} & {p.tobytes() for p in val.pixels}
    assert train.questions[0][0][:2] == ("what is this?", train.captions[0].text)
    some = [{p.tobytes() for p in folder.split(task, "train", 90, seed).pixels}
            for task in ("und", "gen") for seed in (0, 1, 3)]
    every, n = {p.tobytes() for p in train.pixels}, len(some[0])
    for one, other in combinations(some, 2):                # as many in common as by chance
        assert one | other <= every and abs(len(one & other) / n - n / len(every)) < .2

    rows = [{"file_name": f"dogs/{i}.png", "text": f"noise\n {i}",
             "qa": [{"question": "which?", "answer": str(i)}]} for i in range(1, 246, 2)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = Folder(root, "tiny").split("und", "train", 5)
    for caption, (question,) in zip(split.captions, split.questions):
        assert caption.text == f"noise {question.answer}" and question.text == "which?"


def test_what_is_no_data_set_is_told_in_one_line(tmp_path, error, capsys):
    """... or in one for each broken file."""
    root, flat = write_classes(tmp_path / "broken"), tmp_path / "flat"
    for i in (3, 7, 9):
        (root / "dogs" / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        Folder(root, "tiny")
    names = re.findall(r"error: \S*/(\d)\.png: .*\n", capsys.readouterr().err)
    assert names == ["3", "7", "9"]
    (flat / "train").mkdir(parents=True)
    (flat / "a.png").write_bytes(encoded(NOISE))
    assert "0 images" in error(Folder, flat, "tiny")
    (flat / "train" / "metadata.jsonl").write_text("")
    assert "train, where there is a metadata.jsonl" in error(Folder, flat, "tiny")
    for line in (b'{"file_name": "a.png", "text": "\xff"}', b"[" * 99_999, b'{"text": "x"}',
                 b'{"file_name": "../a\\nb.png", "text": "x"}'):
        (flat / "metadata.jsonl").write_bytes(b"\n" + line)
        assert "metadata.jsonl line 2: expected" in error(Folder, flat, "tiny")


def test_a_data_set_is_what_it_contains(tiny, tmp_path):
    """Not where it lies. Other pictures at the old place are noticed."""
    folder, old, new = (tmp_path / name for name in ("run", "old", "new"))
    run("train.py", *train_args(tmp_path, "run", "--steps", 1, "--data", write_classes(old)))
    assert "object_accuracy" not in (folder / "eval.json").read_text()  # nothing checks pictures
    old.rename(new)
    write_classes(old, seed=1)
    for command in (["eval.py"], ["probe.py", "--n", 2], ["train.py", "--resume"]):
        for where, code in ((new, 0), (old, 2)):
            printed = run(*command, folder, "--device", "cpu", "--data", where, code=code)
            assert ("made with data = 246 images" in printed) == (where == old)


def test_pictures_look_as_they_are_meant(tmp_path):
    """Transparency, cameras turned, CMYK, 16-bit grey, odd metadata. Fractions do not tell what is
    white, and there is a limit for pixels."""
    def read(content):
        (tmp_path / "x").write_bytes(content)
        return read_picture(tmp_path / "x", 8).astype(int)

    halves, exif, bmp = Image.new("RGB", (8, 8)), Image.Exif(), encoded(NOISE, "bmp")
    halves.paste("white", (0, 0, 8, 4))                     # the upper half
    exif[0x0112] = 6                                        # turn to the right
    right, grey = np.repeat([0, 255], 4)[:, None], np.arange(64).reshape(8, 8) * 4
    for content, expected in (
            (encoded(halves, exif=exif), right), (encoded(Image.new("LA", (8, 8))), 255),
            (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tiff"), [255, 0, 0]),
            (encoded(Image.fromarray((grey * 257).astype(np.uint16))), grey[..., None]),
            (encoded(NOISE, exif=b"garbage!"), read(bmp))):
        assert abs(read(content) - expected).max() < 30
    huge = bmp[:18] + struct.pack("<ii", 20_000, 20_000) + bmp[26:]
    fractions = encoded(Image.fromarray(grey / 4), "tiff")
    for wrong, complaint in ((huge, "pixels"), (fractions, "white")):
        with pytest.raises(Exception, match=complaint):
            read(wrong)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="its peak is not told")
def test_a_large_picture_takes_little_more_memory_than_its_pixels(tmp_path):
    """... which are 32 bits each in Pillow."""
    NOISE.resize((4000, 3000)).save(tmp_path / "large.png")
    Path("/proc/self/clear_refs").write_text("5")           # the peak, VmHWM, begins anew
    read_picture(tmp_path / "large.png", 16)
    status = Path("/proc/self/status").read_text()
    peak, now = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmHWM", "VmRSS"))
    assert peak - now < 6 * 12_000                          # kilobytes: 6 bytes a pixel


def test_a_hundred_bad_inputs_are_used_or_refused_at_once(tmp_path):
    """... by an exception, which Folder tells in one line."""
    root, rng = tmp_path / "images", random.Random(0)
    (root / "x.png").mkdir(parents=True)
    for path in (root / "a.png", tmp_path / "a.png"):
        path.write_bytes(encoded(NOISE))
    (root / "out.png").symlink_to(tmp_path / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")

    def check(expected, function, *args):
        began, is_used = time.process_time(), True
        try:
            function(*args)
        except Exception:
            is_used = False
        assert time.process_time() - began < 2 and expected in (None, is_used), args

    def line(expected, **changes):
        entry = {"file_name": "a.png", "text": "a picture", **changes}
        check(expected, read_line, root, json.dumps(entry), 16, 360)

    def picture(expected, content):
        (root / "b.png").write_bytes(content)
        check(expected, read_picture, root / "b.png", 16)

    for change in ({"qa": []}, {"text": "<|eos|> 漢字 🙂 \u2028 \0"}, {"file_name": "out.png"}):
        line(True, **change)
    for name in ("../a.png", "/etc/passwd", ".", "b.png", "a.png/x", "x" * 5000, "a\0.png",
                 "\ud800", "x.png", "loop.png", "sub/../../a.png", "~/a.png", "C:\\a.png"):
        line(False, file_name=name)
    for text in ("", " \n\t", "x" * 100_000, "\udfff", None, 1, ["a"], {"a": 1}):
        line(False, text=text)
        line(False, question=text, answer="a")
        line(False, qa=[{"question": "q", "answer": text}])
    for broken in ("{", "[]", "null", "{}", "a picture", "[" * 100_000, "\0", '{"a":' * 5000):
        check(False, read_line, root, broken, 16, 360)
    picture(True, encoded(Image.new("P", (20000, 1)), "gif"))
    for _ in range(40):
        kind = rng.choice(("png", "jpeg", "gif", "bmp", "tiff", "webp"))
        content = bytearray(encoded(NOISE, kind))
        picture(False, content[:rng.randrange(len(content) // 2)])
        for _ in range(rng.randint(1, 30)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        picture(None, content)


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_checkpoints_of_strangers_are_refused_in_one_line(trained, tmp_path, error, monkeypatch):
    """Cut anywhere, of another kind; and one that holds code, which does not run."""
    monkeypatch.chdir(tmp_path)
    good, rng = (trained / "joint" / "checkpoint.pt").read_bytes(), random.Random(0)
    contents = [good[:rng.randrange(len(good))] for _ in range(20)]
    contents += [(trained / "tokenizer.pt").read_bytes(), b"", b"PK\x03\x04", b"{}"]
    for strange in ({"kind": "run", "model": Code()}, {"kind": None}, {}, [], 1, "run", None):
        torch.save(strange, buffer := io.BytesIO())
        contents.append(buffer.getvalue())
    for content in contents:
        Path("checkpoint.pt").write_bytes(content)
        assert "is not a run checkpoint" in error(read_checkpoint, "checkpoint.pt", "run")
    assert not Path("owned").exists()
