"""Hard to break: killed anywhere, out of space, files of strangers, and three hundred bad inputs."""
import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train as trainer
from data import open_picture, read_metadata
from model import load
from test_scripts import ENV, ROOT, script
from tokenizer import save

resource = pytest.importorskip("resource", reason="signals and limits as POSIX has them")


def command(folder, *args):
    return [sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--device", "cpu", "--tokenizer", str(folder / "tokenizer.pt"),
            *map(str, args)]


def start(folder, *args, **kwargs):
    return subprocess.Popen(command(folder, *args), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kwargs)


def learned(run):
    """What must not depend on interruptions: weights, losses, scores."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    log = [{k: row[k] for k in ("step", "loss", "loss_und", "loss_gen", "lr")} for row in
           map(json.loads, (run / "log.jsonl").read_text().splitlines())]
    scores = {file.name: {k: v for k, v in json.loads(file.read_text()).items() if k in ("und", "gen", "n")} for file in run.glob("*.json")}
    return checkpoint, log, scores


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("out", "tokenizer"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    subprocess.run(command(folder, "--steps", 40, "--save-every", 10, "--out", folder / "joint"), env=ENV, check=True, capture_output=True)
    return folder


def test_killed_at_twenty_random_moments_a_table_ends_as_if_nothing_had_happened(tmp_path):
    """SIGKILL while the tokenizer or a model is trained, while it is scored, between the rows; the same command again."""
    rows = "import sys, train, eval; keep = {'u-dense', 'g-dense', 'joint-share-partial'}; rows = eval.table_rows\n" \
           "eval.table_rows = lambda options: {k: v for k, v in rows(options).items() if k in keep}\n" \
           "sys.argv[0] = 'train.py'; train.command(train.main)"        # three rows of the table are enough
    rng = random.Random(0)

    def table(name, timeout=None):
        folder = tmp_path / name
        args = [sys.executable, "-c", rows, *command(folder, "--steps", 200, "--save-every", 20, "--table", folder / "t")[2:]]
        process = subprocess.Popen(args, env={**ENV, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)           # there, since a table writes into ./results
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    began = time.time()
    subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, env=ENV, check=True)
    startup = time.time() - began
    assert table("whole") == 0
    took = time.time() - began - startup
    for kill in range(20):                                              # half of the work, at most, is done by these
        assert table("cut", startup + rng.random() * took / 20) is None, kill
    assert table("cut") == 0
    runs = sorted(f.name for f in (tmp_path / "whole" / "t").iterdir())
    assert runs == sorted(f.name for f in (tmp_path / "cut" / "t").iterdir()) and len(runs) == 3
    for name in runs:
        assert same(learned(tmp_path / "whole" / "t" / name), learned(tmp_path / "cut" / "t" / name)), name


def wait_for_log(process, run, lines):
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(.02)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_says_how_to_go_on(trained, number, code):
    """... at whatever step it is, and the resumed run ends as an unbroken one."""
    run = trained / f"stopped{code}"
    process = start(trained, "--steps", 40, "--save-every", 40, "--out", run)
    wait_for_log(process, run, 1)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == code and f"--resume --out {run}" in error and "Traceback" not in error
    assert 10 <= torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 40
    assert "holds a run already" in script("train.py", *command(trained, "--out", run)[2:], code=2)
    assert "--seed 5: the run in" in script("train.py", "--resume", "--seed", 5, "--out", run, "--device", "cpu", code=2)
    script("train.py", "--resume", "--out", run, "--device", "cpu")
    whole, cut = learned(trained / "joint"), learned(run)
    assert same(whole[0]["model"], cut[0]["model"]) and same(whole[0]["optimizers"], cut[0]["optimizers"]) and same(whole[1:], cut[1:])


def test_a_full_disk_leaves_the_last_checkpoint(trained):
    """No file may grow beyond 200 kB, as if the disk were full: one line, and what was there is whole."""
    run = trained / "full"
    process = start(trained, "--steps", 40, "--save-every", 10, "--out", run)
    wait_for_log(process, run, 2)
    process.kill()
    process.wait()
    before = (run / "checkpoint.pt").read_bytes()
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(run), "--device", "cpu"], env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    _, error = process.communicate()
    assert process.returncode == 2 and "Traceback" not in error
    (line,) = [x for x in error.replace("\r", "\n").splitlines() if x.startswith("error: ")]
    assert str(run) in line and "File too large" in line
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob("*.part"))


def test_output_where_no_folder_can_be_is_one_line(trained):
    (trained / "file").write_text("")
    error = script("train.py", "--preset", "tiny", "--device", "cpu", "--tokenizer", trained / "tokenizer.pt", "--out",
                   trained / "file" / "run", code=2)
    assert "Traceback" not in error and "file" in error.strip().splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(trained, capsys, monkeypatch):
    run, real, count = trained / "nan", trainer.training_step, []

    def step(forward, *args):
        count.append(1)
        if len(count) == 20:                                            # the loss is still good, the weights are not
            next(forward.parameters()).data[0, 0] = float("nan")
        return real(forward, *args)

    monkeypatch.setattr(trainer, "training_step", step)
    options = trainer.completed({"preset": "tiny", "tokenizer": str(trained / "tokenizer.pt"), "out": str(run), "save_every": 10},
                                torch.device("cpu"))
    with pytest.raises(SystemExit) as stop:
        trainer.run(options, None, torch.device("cpu"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "not finite at step 20" in error and str(run / "checkpoint.pt") in error
    kept = torch.load(run / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 10 and all(x.isfinite().all() for x in kept["model"].values())


def test_one_process_that_dies_ends_the_run(trained):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen([*launcher, *command(trained, "--steps", 100_000, "--out", trained / "two")[1:]], env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_log(process, trained / "two", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("no /proc")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0


# ------------------------------------------------------------------------------------------------ files of strangers

class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


STRANGE = [None, -1, 0, 2 ** 40, 10 ** 400, 1.5, float("nan"), "x", "../../x", [], {}, [1] * 5, True, torch.zeros(3)]


def damaged(checkpoint, rng):
    """A checkpoint in which one thing is not what it should be."""
    found = copy.deepcopy(checkpoint)
    where = rng.choice([found, found["config"], found["options"], found["tokenizer"], found["tokenizer"]["config"]])
    key = rng.choice(list(where))
    if rng.random() < .2:
        del where[key]
    else:
        where[key] = rng.choice(STRANGE)
    return found


def test_checkpoints_of_strangers_are_used_or_refused_in_one_line(trained, tmp_path, capsys, monkeypatch):
    """150 damaged ones: cut, overwritten, with one part replaced; and one that holds code, which does not run."""
    monkeypatch.chdir(tmp_path)
    good, rng = (trained / "joint" / "checkpoint.pt").read_bytes(), random.Random(0)
    checkpoint, refused = torch.load(trained / "joint" / "checkpoint.pt", weights_only=True), 0
    path = tmp_path / "checkpoint.pt"
    for i in range(150):
        if i < 20:
            path.write_bytes(good[:rng.randrange(len(good))])
        elif i < 40:
            content = bytearray(good)
            for _ in range(50):
                content[rng.randrange(len(good))] = rng.randrange(256)
            path.write_bytes(content)
        elif i == 40:
            torch.save({"kind": "run", "model": Code()}, path)
        elif i == 41:                                                   # one number that claims to be a whole table
            small = {name: torch.zeros(1).expand(x.shape) for name, x in checkpoint["model"].items()}
            torch.save({**checkpoint, "model": small}, path)
        else:
            save(damaged(checkpoint, rng), path)
        try:
            load(tmp_path, "cpu")
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.count("\n") == 1 and str(path) in error, error
            refused += 1
    assert refused > 110 and not Path("owned").exists()


# ------------------------------------------------------------------------------------------------ one's own data

def pictures(rng):
    """(name, bytes, whether it is a picture): 200 files that are bad or odd in every way that we could think of."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))

    def encoded(image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    odd = [(mode, encoded(noise.convert("L").convert(mode) if mode in ("1", "I", "F") else noise.convert(mode), kind))
           for mode, kind in (("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpeg"), ("CMYK", "tiff"),
                              ("YCbCr", "jpeg"), ("LAB", "tiff"), ("I", "tiff"), ("F", "tiff"))]
    odd += [("16-bit", encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100), "png")),
            ("1x1", encoded(Image.new("RGB", (1, 1)), "png")), ("20000x1", encoded(Image.new("RGB", (20000, 1)), "png")),
            ("1x20000", encoded(Image.new("RGB", (1, 20000)), "png")),
            ("animated", encoded(noise, "gif", save_all=True, append_images=[noise.rotate(90)] * 3))]
    exif = Image.Exif()
    exif[0x0112] = 6
    odd.append(("rotated", encoded(noise, "jpeg", exif=exif)))
    for name, content in odd:
        yield name, content, True
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "png"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2                       # the size that it claims, with a wrong checksum
    yield "bomb", bytes(bomb), False
    yield "huge", encoded(Image.new("1", (14_000, 14_000)), "png"), False
    for content in (b"", b"\x00" * 1000, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", os.urandom(500)):
        yield "nothing", content, False
    good = [encoded(noise, kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")]
    for i in range(90):
        content = rng.choice(good)
        yield "cut", content[:rng.randrange(len(content) // 2)], False
    for i in range(90):
        content = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 30)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        yield "changed", bytes(content), None                           # may still be one


def lines(rng):
    """(a line of metadata.jsonl, whether it can be used): more than 100."""
    good = {"file_name": "a.png", "text": "a picture"}
    yield from ((json.dumps(x), True) for x in (
        good, good | {"qa": []}, good | {"qa": [{"question": "q?", "answer": "a"}] * 3}, good | {"question": "q?", "answer": "a"},
        good | {"text": "<|eos|><|und|>"}, good | {"text": "漢字 \U0001f642 \u2028 \x00"}, good | {"more": 1}, good | {"file_name": "./a.png"}))
    for name in ("../a.png", "/etc/passwd", "..", ".", "b.png", "a.png/x", "x" * 5000, "a\x00.png", "\ud800", "x.png", "out.png", "loop.png",
                 "sub/../../a.png", "~/a.png", "C:\\a.png", "file:///a.png", "\\\\host\\a.png"):
        yield json.dumps(good | {"file_name": name}), False
    for text in ("", " \n\t", "x" * 100_000, "\udfff", None, 1, True, [], ["a"], {}, {"a": 1}):
        for change in ({"text": text}, {"file_name": text}, {"question": text, "answer": "a"}, {"question": "q", "answer": text},
                       {"qa": [{"question": text, "answer": "a"}]}, {"qa": [{"question": "q", "answer": text}]}):
            yield json.dumps(good | change), False
    for qa in ("x", 1, {}, [1], [[]], [{}], [None]):
        yield json.dumps(good | {"qa": qa}), False
    for line in ("{", "[]", "null", "1", '"a.png"', "{}", "a.png,a picture", "{'file_name': 'a.png'}", "[" * 100_000, '{"file_name": "a.png"}',
                 '{"text": "a"}', "NaN", "\x00", "{" + '"a":{' * 5000):
        yield line, False


def outcome(function, capsys):
    """What a function gives, or its complaint: one line, exit status 2."""
    try:
        return function()
    except SystemExit as stop:
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert stop.code == 2 and error.startswith("error: ")
        return error


def test_three_hundred_bad_inputs_are_used_or_refused_in_one_line(tmp_path, capsys):
    rng, count = random.Random(0), 0
    for name, content, usable in pictures(rng):
        (tmp_path / "x.png").write_bytes(content)
        began, found = time.time(), outcome(lambda: open_picture(tmp_path / "x.png", 16, "here"), capsys)
        is_picture = isinstance(found, np.ndarray) and found.shape == (16, 16, 3) and found.dtype == np.uint8
        assert is_picture or "here: " in found and "x.png" in found
        assert usable in (None, is_picture), (name, found)
        assert time.time() - began < 5, name
        count += 1

    root = tmp_path / "images"
    (root / "x.png").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (root / "out.png").symlink_to(tmp_path / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    for line, usable in lines(rng):
        (root / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "first"}\n' + line)
        began, found = time.time(), outcome(lambda: read_metadata(root), capsys)
        assert isinstance(found, list) == usable and (usable or "metadata.jsonl line 2" in found), (line[:80], found)
        assert time.time() - began < 5, line[:80]
        count += 1
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    assert "UTF-8" in outcome(lambda: read_metadata(root), capsys)
    assert count >= 300
