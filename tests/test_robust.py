"""Hard to break: killed anywhere, no space left, files of strangers, three hundred bad inputs."""
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import model
import train as trainer
from common import read_checkpoint
from conftest import ROOT, Script, run, train_args, wait_for_log
from data import open_picture, read_folder

resource = pytest.importorskip("resource", reason="signals and limits as POSIX has them")


def learned(folder):
    """What must not depend on interruptions: weights, losses, scores."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    del checkpoint["options"], checkpoint["log"]            # its times differ
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [[row[key] for key in ("step", "loss", "loss_und", "loss_gen", "lr")] for row in rows]
    scores = json.loads((folder / "eval.json").read_text())
    return checkpoint, log, scores["und"], scores["gen"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------------- interrupted

def test_killed_at_twenty_random_moments_a_run_ends_as_if_nothing_had_happened(trained, tmp_path):
    """SIGKILL while the tokenizer or the model is trained or scored; then --resume, or the same
    command again where there is no checkpoint yet."""
    def start():
        args = train_args(tmp_path, "cut", "--steps", 40, "--save-every", .1)
        resume = ["--resume"] if (tmp_path / "cut" / "checkpoint.pt").exists() else []
        return Script("train.py", *args, *resume, folder=tmp_path)

    rng, kills = random.Random(0), 0
    while kills < 20:
        script = start()
        time.sleep(rng.random() * 1.2)
        if not script.runs():               # it came to its end: begin once more
            for file in (tmp_path / "cut").iterdir():
                file.unlink()
            (tmp_path / "tokenizer.pt").unlink()
            continue
        script.send(signal.SIGKILL)
        script.wait()
        kills += 1
    script = start()
    assert script.wait() == 0, script.output
    assert same(learned(trained / "joint"), learned(tmp_path / "cut"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ctrl_c_saves_and_says_how_to_go_on(trained, number, code):
    """... at whatever step it is, and the resumed run ends as an unbroken one."""
    folder = trained / f"stopped{code}"
    args = train_args(trained, folder.name, "--steps", 40)
    script = Script("train.py", *args, folder=trained)
    wait_for_log(script, folder, 1)
    script.send(number)
    assert script.wait() == code
    assert f"--resume --out {folder}" in script.output and "Traceback" not in script.output
    assert 10 <= torch.load(folder / "checkpoint.pt", weights_only=True)["step"] < 40
    if number == signal.SIGTERM:
        return                                  # the rest is the same
    assert "holds a run already" in run("train.py", *args, code=2)
    assert "--seed 5: the run in" in run("train.py", *args, "--resume", "--seed", 5, code=2)
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 40, "lo\xff')      # as a full disk would leave it
    run("train.py", "--preset", "tiny", "--resume", "--out", folder, "--device", "cpu")
    assert same(learned(trained / "joint"), learned(folder))


def test_nohup_outlives_the_terminal(trained):
    """A signal that was ignored before stays ignored."""
    folder = trained / "nohup"
    args = [sys.executable, ROOT / "train.py", *train_args(trained, "nohup", "--steps", 40)]
    process = subprocess.Popen(list(map(str, args)), stderr=subprocess.DEVNULL, preexec_fn=lambda:
                               signal.signal(signal.SIGHUP, signal.SIG_IGN))
    while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0 and (folder / "eval.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(trained):
    """No file may grow beyond 100 kB, as if the disk were full: one line, and what was there is
    whole."""
    folder = trained / "full"
    script = Script("train.py", *train_args(trained, "full", "--steps", 40, "--save-every", .1),
                    folder=trained)
    wait_for_log(script, folder, 2)
    script.send(signal.SIGKILL)
    script.wait()
    before = (folder / "checkpoint.pt").read_bytes()
    args = [sys.executable, ROOT / "train.py", "--preset", "tiny", "--resume", "--out", folder,
            "--device", "cpu"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert f"{folder}/checkpoint.pt cannot be written: File too large" in line
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("*.part"))      # neither of the kill nor of the full disk


def test_output_where_no_folder_can_be_is_one_line(trained):
    (trained / "file").write_text("")
    error = run("train.py", *train_args(trained, "file/run"), code=2)
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error and "file/run cannot be a folder" in line


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(trained, capsys, monkeypatch):
    """The loss is still good at the last step, the weights are not."""
    folder, real, steps = trained / "nan", trainer.apply_gradients, []

    def apply_gradients(optimizers):
        steps.append(1)
        real(optimizers)
        if len(steps) == 20:
            optimizers[1].param_groups[0]["params"][0].data[0, 0] = float("nan")

    monkeypatch.setattr(trainer, "apply_gradients", apply_gradients)
    given = {"preset": "tiny", "tokenizer": str(trained / "tokenizer.pt"), "out": str(folder),
             "save_every": 0.}
    with pytest.raises(SystemExit) as stop:
        trainer.train(trainer.complete(given, torch.device("cpu")), torch.device("cpu"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "not finite at step 20" in error and str(folder) in error
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 19 and all(x.isfinite().all() for x in kept["model"].values())


# ---------------------------------------------------------------------- files of strangers

def outcome(function, capsys):
    """What a function gives, or its complaint: one line, exit status 2."""
    try:
        return function()
    except SystemExit as stop:
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert stop.code == 2 and error.startswith("error: ")
        return error


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_checkpoints_of_strangers_are_loaded_or_refused_in_one_line(trained, tmp_path, capsys,
                                                                   monkeypatch):
    """Cut anywhere, overwritten, of another kind; and one that holds code, which does not run.
    Overwritten bytes may be found out by torch.load, or be those of a weight."""
    monkeypatch.chdir(tmp_path)
    good, rng = (trained / "joint" / "checkpoint.pt").read_bytes(), random.Random(0)
    contents = [good[:rng.randrange(len(good))] for _ in range(40)]
    for _ in range(40):
        content = bytearray(good)
        for _ in range(50):
            content[rng.randrange(len(good))] = rng.randrange(256)
        contents.append(content)
    for strange in ({"kind": "run", "model": Code()}, {"kind": "photo"}, {"kind": None}, {}, [], 1,
                    "run", None):
        buffer = io.BytesIO()
        torch.save(strange, buffer)
        contents.append(buffer.getvalue())
    contents += [(trained / "tokenizer.pt").read_bytes(), b"", b"PK\x03\x04", b"{}"]
    path, refused = tmp_path / "checkpoint.pt", 0
    for content in contents:
        path.write_bytes(content)
        found = outcome(lambda: read_checkpoint(path, "run"), capsys)
        if isinstance(found, str):
            assert "is not a run checkpoint" in found
            refused += 1
        else:
            assert found["kind"] == "run"
    assert refused >= 40 + 12 and not (tmp_path / "owned").exists()


def test_what_a_changed_model_lacks_is_named(trained, tmp_path, monkeypatch):
    """A student's module has another name than in the checkpoint: the traceback tells both."""
    class Renamed(model.Model):
        def __init__(self, *args):
            super().__init__(*args)
            self.my_norm = self.norm
            del self.norm

    monkeypatch.setattr(model, "Model", Renamed)
    with pytest.raises(RuntimeError, match="(?s)Missing.*my_norm.weight.*Unexpected.*norm.weight"):
        model.load_run(trained / "joint", "cpu")


# ---------------------------------------------------------------------- one's own data

def pictures(rng):
    """(name, bytes, whether it is a picture): 200 files that are bad or odd in every way that we
    could think of."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    noise = Image.fromarray(noise)

    def encoded(image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    for mode, kind in (("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"),
                       ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "jpeg"), ("LAB", "tiff"),
                       ("I", "tiff"), ("F", "tiff")):
        first = noise.convert("L") if mode in ("1", "I", "F") else noise
        yield mode, encoded(first.convert(mode), kind), True
    levels = np.arange(400, dtype=np.uint16).reshape(20, 20) * 100
    yield "16-bit", encoded(Image.fromarray(levels), "png"), True
    for size in ((1, 1), (20000, 1), (1, 20000)):
        yield str(size), encoded(Image.new("RGB", size), "png"), True
    frames = [noise.rotate(90)] * 3
    yield "animated", encoded(noise, "gif", save_all=True, append_images=frames), True
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "rotated", encoded(noise, "jpeg", exif=exif), True

    bomb = bytearray(encoded(Image.new("1", (8, 8)), "png"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2       # the size that it claims, wrong checksum
    yield "bomb", bytes(bomb), False
    yield "huge", encoded(Image.new("1", (14_000, 14_000)), "png"), False
    for content in (b"", b"\x00" * 1000, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<svg/>",
                    b"%!PS-Adobe-3.0 EPSF-3.0\n", os.urandom(500)):
        yield "nothing", content, False
    good = [encoded(noise, kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")]
    for _ in range(90):
        content = rng.choice(good)
        yield "cut", content[:rng.randrange(len(content) // 2)], False
    for _ in range(90):
        content = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 30)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        yield "changed", bytes(content), None           # may still be one


def lines():
    """(a line of metadata.jsonl, whether it can be used): more than 100."""
    good = {"file_name": "a.png", "text": "a picture"}
    for change in ({}, {"qa": []}, {"qa": [{"question": "q?", "answer": "a"}] * 3},
                   {"question": "q?", "answer": "a"}, {"text": "<|eos|><|und|>"}, {"more": 1},
                   {"text": "漢字 \U0001f642 \u2028 \x00"}, {"file_name": "./a.png"},
                   {"file_name": "out.png"}):
        yield json.dumps(good | change), True
    for name in ("../a.png", "/etc/passwd", "..", ".", "b.png", "a.png/x", "x" * 5000, "a\x00.png",
                 "\ud800", "x.png", "loop.png", "sub/../../a.png", "~/a.png",
                 "C:\\a.png", "file:///a.png", "\\\\host\\a.png"):
        yield json.dumps(good | {"file_name": name}), False
    for text in ("", " \n\t", "x" * 100_000, "\udfff", None, 1, True, [], ["a"], {}, {"a": 1}):
        for change in ({"text": text}, {"file_name": text}, {"question": text, "answer": "a"},
                       {"question": "q", "answer": text},
                       {"qa": [{"question": text, "answer": "a"}]},
                       {"qa": [{"question": "q", "answer": text}]}):
            yield json.dumps(good | change), False
    for qa in ("x", 1, {}, [1], [[]], [{}], [None]):
        yield json.dumps(good | {"qa": qa}), qa == {}
    for line in ("{", "[]", "null", "1", '"a.png"', "{}", "a.png,a picture", "[" * 100_000,
                 "{'file_name': 'a.png'}", '{"file_name": "a.png"}', '{"text": "a"}', "NaN", "\x00",
                 "{" + '"a":{' * 5000):
        yield line, False


def test_three_hundred_bad_inputs_are_used_or_refused_in_one_line(tmp_path, capsys):
    rng, count = random.Random(0), 0
    file = tmp_path / "x.png"
    for name, content, usable in pictures(rng):
        file.write_bytes(content)
        began = time.time()
        found = outcome(lambda: open_picture(file, 16, "here"), capsys)
        is_picture = isinstance(found, np.ndarray) and found.shape == (16, 16, 3)
        assert is_picture or ("here: " in found and "x.png" in found)
        assert usable in (None, is_picture), (name, found)
        assert time.time() - began < 5, name
        count += 1

    root = tmp_path / "images"
    (root / "x.png").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (root / "out.png").symlink_to(tmp_path / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    for line, usable in lines():
        first = '{"file_name": "a.png", "text": "first"}\n'
        (root / "metadata.jsonl").write_text(first + line)
        began = time.time()
        found = outcome(lambda: read_folder(root, 360), capsys)
        assert isinstance(found, list) == usable, (line[:80], found)
        assert usable or "metadata.jsonl line 2" in found, found
        assert time.time() - began < 5, line[:80]
        count += 1
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    assert "UTF-8" in outcome(lambda: read_folder(root, 360), capsys)
    assert count >= 300
