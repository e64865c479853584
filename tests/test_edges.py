"""What people run into who do this every day: each test stands for a kind of trouble that public
bug reports of comparable projects are full of."""
import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
import data
import prune
from conftest import ROOT, run, train_args
from data import clean_text, open_picture
from tokenizer import VQ, Tokenizer, train_bpe

TINY = ("--preset", "tiny", "--device", "cpu")


def write_classes(root, n=240, classes=("cats", "dogs"), seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 20)).save(folder / f"{i}.png")
    return root


# ---------------------------------------------------------------------- what is printed

def test_a_stream_that_breaks_or_lacks_letters_stops_nothing():
    read_end, write_end = os.pipe()
    stream = common.unbreakable(open(write_end, "w", encoding="ascii", closefd=False), write_end)
    stream.write("ä")
    stream.flush()
    assert os.read(read_end, 10) == b"?"
    os.close(read_end)
    for _ in range(3):
        stream.write("lost")
        stream.flush()


@pytest.mark.parametrize("redirection", ["2>&1 | head -c 1", ">/dev/full 2>&1", ">&- 2>&-"])
def test_scripts_work_whatever_becomes_of_their_output(redirection, tmp_path):
    command = f"set -o pipefail; '{sys.executable}' '{ROOT}/prune.py' --out masks.png {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert Image.open(tmp_path / "masks.png").size > (100, 100)


def test_letters_that_are_not_ascii_get_a_font_that_may_have_them(monkeypatch, capsys):
    common.font_for("plain", 12)
    assert not capsys.readouterr().out
    monkeypatch.setattr(common, "FONTS", ("no such font.ttf",))
    common.font_for("猫", 12)
    assert "boxes" in capsys.readouterr().out


# ---------------------------------------------------------------------- what is written

def test_nothing_is_overwritten_that_was_not_written_for_the_same_purpose(trained, tmp_path):
    photo, own = tmp_path / "photo.png", tmp_path / "masks.png"
    Image.new("RGB", (8, 8)).save(photo)
    before = photo.read_bytes()
    assert "photo.png" in run("prune.py", "--out", photo, code=2)
    assert "did not write" in run("data.py", "--preset", "tiny", "--out", photo, code=2)
    for _ in range(2):
        run("prune.py", "--out", own)
    checkpoint = trained / "joint" / "checkpoint.pt"
    weights = checkpoint.read_bytes()
    assert "not a tokenizer" in run("tokenizer.py", *TINY, "--out", checkpoint, code=2)
    assert checkpoint.read_bytes() == weights and photo.read_bytes() == before
    run("tokenizer.py", *TINY, "--steps", 2, "--out", tmp_path / "a.png")
    assert common.read_checkpoint(tmp_path / "a.png", "tokenizer")
    assert Image.open(tmp_path / "a.png.png").format == "PNG"


def test_a_folder_belongs_to_one_run(trained, tmp_path):
    args = train_args(trained, "locked", "--steps", 2)
    with common.exclusive(trained / "locked"):
        assert "another process is at work" in run("train.py", *args, code=2)
    run("train.py", *args)
    (tmp_path / "no-pictures").mkdir()
    run("train.py", *TINY, "--data", tmp_path / "no-pictures", "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()                  # nothing came of it


def test_results_can_go_elsewhere(trained, tmp_path):
    before = sorted(path.name for path in (trained / "joint").iterdir())
    run("eval.py", trained / "joint", "--device", "cpu", "--draw", "a circle", "--n", 2, "--out",
        tmp_path)
    first = (tmp_path / "draw-0.png").read_bytes()
    run("eval.py", trained / "joint", "--device", "cpu", "--draw", "a circle", "--n", 2, "--out",
        tmp_path, "--seed", 1)
    run("probe.py", trained / "joint", "--device", "cpu", "--n", 2, "--out", tmp_path)
    assert (tmp_path / "attention.json").exists()
    assert (tmp_path / "draw-0.png").read_bytes() != first
    assert before == sorted(path.name for path in (trained / "joint").iterdir())


# ---------------------------------------------------------------------- one's own images

def test_what_a_folder_is_taken_for_is_told(tmp_path, capsys):
    root = write_classes(tmp_path / "images")
    for path in (".ipynb_checkpoints/0.png", "cats/._0.png", "cats/deep/0.png", "run/samples.png"):
        (root / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / path)
    (root / "run" / "log.jsonl").write_text("")
    (root / "cats" / "0.png").rename(root / "cats" / "0")
    (root / "dogs" / "scan.pdf").write_bytes(b"%PDF-1.4")
    (root / "linked").symlink_to(root / "dogs")
    found = data.Folder(root, "tiny")
    printed = capsys.readouterr().out
    assert "359 images, 3 captions: 'cats', 'dogs', 'linked'" in printed
    assert "left out 5 other files" in printed
    assert "1 without suffix" in printed and "1 .pdf" in printed and "ipynb" not in printed
    assert {caption.text for caption in found.captions} == {"cats", "dogs", "linked"}

    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (20, 20)).save(flat / "a.png")
    with pytest.raises(SystemExit):
        data.Folder(flat, "tiny")
    printed = capsys.readouterr()
    assert "metadata.jsonl" in printed.err and "1 .png" in printed.out


def test_all_files_that_cannot_be_used_are_named_at_once(tmp_path, capsys):
    root = write_classes(tmp_path)
    for i in (3, 7, 9):
        (root / "dogs" / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        data.Folder(root, "tiny")
    error = capsys.readouterr().err
    assert "3 files" in error and all(f"{i}.png" in error for i in (3, 7, 9))


def test_a_data_set_is_what_it_contains(trained, tmp_path):
    """Not where it lies. Other pictures or texts at the old place are noticed."""
    root = write_classes(tmp_path / "base")
    args = train_args(tmp_path, "run", "--steps", 2)
    printed = run("train.py", *args, "--data", "base", folder=tmp_path)
    assert "training pictures" in printed and "questions on them" in printed
    run("train.py", "--resume", "--out", tmp_path / "run", "--data", "base/", *TINY,
        folder=tmp_path)
    root.rename(tmp_path / "there")
    moved = ("--device", "cpu", "--data", "there")
    run("eval.py", "run", *moved, folder=tmp_path)
    run("probe.py", "run", "--n", 2, *moved, folder=tmp_path)
    run("match.py", tmp_path / "run", "--n", 10, "--device", "cpu", "--data", tmp_path / "there")
    write_classes(tmp_path / "base", seed=1)
    for args in (("eval.py", "run"), ("probe.py", "run"), ("train.py", "--resume", "--out", "run")):
        assert "was trained on" in run(*args, "--device", "cpu", folder=tmp_path, code=2)
    (tmp_path / "there" / "cats").rename(tmp_path / "there" / "kittens")
    assert "was trained on" in run("eval.py", "run", *moved, folder=tmp_path, code=2)


# ---------------------------------------------------------------------- pictures

def chunk(kind, content):
    """Of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@pytest.mark.parametrize("extra", [
    chunk(b"eXIf", b"garbage!"), chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))])
def test_metadata_does_not_refuse_a_picture(extra, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "png")
    plain = buffer.getvalue()
    (tmp_path / "plain.png").write_bytes(plain)
    (tmp_path / "more.png").write_bytes(plain[:33] + extra + plain[33:])
    pixels = [open_picture(tmp_path / name, 4, "here") for name in ("plain.png", "more.png")]
    assert (pixels[0] == pixels[1]).all()


def test_a_picture_has_the_same_pixels_at_any_depth(tmp_path):
    grey = (np.mgrid[0:16, 0:16][1] * 4).astype(np.uint8)               # 0 to 60: dark
    for name, levels in (("8.png", grey), ("16.png", grey.astype(np.uint16) * 257),
                         ("32.tif", grey.astype(np.int32) * 257),
                         ("1.tif", (grey / 255).astype(np.float32)),
                         ("255.tif", (grey + .2).astype(np.float32))):
        Image.fromarray(levels).save(tmp_path / name)
        found = open_picture(tmp_path / name, 16, "here")
        assert abs(found.astype(int) - grey[..., None]).max() <= 1, name


def test_a_large_jpeg_is_read_as_small_as_it_is_needed(tmp_path):
    path = tmp_path / "large.jpg"
    rough = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((4000, 3000), Image.BICUBIC)
    image.save(path, quality=95)
    began = time.process_time()
    found = open_picture(path, 32, "here")
    assert time.process_time() - began < .25
    expected = np.array(ImageOps.fit(image, (32, 32)))
    assert abs(found.astype(int) - expected).mean() < 1


# ---------------------------------------------------------------------- too much

def test_too_much_is_told_in_one_line(trained, monkeypatch):
    many = ("--steps", 10 ** 6, "--batch-size", 1000)
    assert "10^8 pictures" in run("train.py", *train_args(trained, "many", *many), code=2)
    assert "expected at least 10" in run("match.py", trained / "joint", "--n", 5, code=2)

    for too_much in (lambda: np.empty(2 ** 45), lambda: torch.empty(2 ** 45)):
        monkeypatch.setattr(prune, "main", too_much)
        assert "error: out of memory" in run("prune.py", code=2)


def test_what_looks_alike_is_one_text():
    """An accent may be stored as a letter of its own, as macOS does."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert clean_text(decomposed, 99) == composed
    tokenizer = Tokenizer(train_bpe([composed]), VQ(8, 8, 4))
    assert tokenizer.ids(decomposed) == tokenizer.ids(composed)


def test_metadata_one_folder_deeper_is_told(tmp_path):
    """... and not taken for classes called "train" and "test"."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("")
    assert "train, where there is a metadata.jsonl" in run("data.py", "--data", tmp_path, code=2)


@pytest.mark.parametrize("kind, values, seen", [
    (np.int32, (0, 128, 255), (0, 128, 255)), (np.int32, (0, 32768, 65535), (0, 128, 255)),
    (np.float32, (0, .5, 1.2), (0, 128, 255)), (np.float32, (0, 128, np.nan), (0, 128, 0))])
def test_white_where_no_format_tells_it(kind, values, seen, tmp_path):
    Image.fromarray(np.tile(np.array(values, kind), (3, 1))).save(tmp_path / "x.tiff")
    read = open_picture(tmp_path / "x.tiff", 3, "here")[..., 0]
    assert np.abs(read.astype(int) - np.array(seen)).max() <= 1


def test_names_of_files_may_be_links_and_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    run("prune.py", "--out=~/link.png", folder=tmp_path)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "real.png").stat().st_size > 1000


def test_a_chart_shows_all_its_lines():
    """... though there are more of them than colours."""
    lines = {str(i): [(0, i), (9, i)] for i in range(1, 7)}
    charts = [common.line_chart(dict(list(lines.items())[:n]), "", "", top_y=9) for n in (5, 6)]
    assert charts[0].tobytes() != charts[1].tobytes()
