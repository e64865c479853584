"""Runs: what they are trained on, what they leave, that nothing interrupts or confuses them."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer as tok
import train
from conftest import ROOT, Script, run, train_args, wait_for_log
from data import COLUMNS, PRESETS
from model import load_run
from shapes import Shapes
from tokenizer import FIRST_CODE

CPU = torch.device("cpu")


def tiny(monkeypatch, **edits):
    """The preset "tiny", so small that a run takes a second; or edited otherwise."""
    small = dict(vq_steps=2, vq_pictures=40, und_scenes=20, gen_scenes=20, und_val=5, gen_val=7)
    for row, value in {**(small if not edits.pop("full", False) else {}), **edits}.items():
        monkeypatch.setattr(PRESETS["tiny"], row, value)


def options(folder, name, *args):
    return train.parse_options([*map(str, train_args(folder, name, *args))])


def sequences(folder, task, *given):
    world = Shapes("tiny")
    tokenizer = tok.get_tokenizer(folder / "tokenizer.pt", world, "tiny", CPU)
    of_run, _, _ = options(folder, "sequences", "--seed", 3, *given)
    return train.training_sequences(task, of_run, world, tokenizer), tokenizer


def test_by_default_each_task_predicts_its_own_output(trained):
    """Understanding its text alone, generation its image alone; --image-loss changes the first."""
    for given in ([], ["--image-loss"]):
        batch, _ = sequences(trained, "und", *given)
        before, m, _ = batch.layout
        images, text = batch.targets[:, :before + m], batch.targets[:, before + m:]
        if given:
            assert torch.equal(images[:, before - 1:-1], batch.tokens[:, before:before + m])
        else:
            assert (images == -1).all()
        assert text.max() < FIRST_CODE and (text >= 0).any(1).all()
    batch, _ = sequences(trained, "gen")
    assert (batch.targets[batch.targets >= 0] >= FIRST_CODE).all()
    assert torch.equal(batch.targets >= 0, batch.is_output)


def test_practice_shows_understandings_pictures_where_there_is_no_caption(trained):
    """... and only there; without it all pictures are generation's own."""
    (plain, tokenizer), (practice, _) = (sequences(trained, "gen", *on)
                                         for on in ([], ["--practice"]))
    own, others = (tokenizer.encode(Shapes("tiny").split(task, "train", 300, 3, questions=0).pixels)
                   for task in ("gen", "und"))
    before = plain.layout.before
    no_caption = plain.tokens[:, before - 1] == tokenizer.gen           # (N,)
    assert .05 < no_caption.double().mean() < .2
    assert torch.equal(plain.tokens[:, :before], practice.tokens[:, :before])
    assert torch.equal(plain.tokens[:, before:], FIRST_CODE + own)
    assert torch.equal(practice.tokens[~no_caption, before:], FIRST_CODE + own[~no_caption])
    assert torch.equal(practice.tokens[no_caption, before:],
                       FIRST_CODE + others[:no_caption.sum()])


# ---------------------------------------------------------------------- what a run leaves

def test_a_run_leaves_what_the_contract_promises(trained):
    folder = trained / "joint"
    assert {f.name for f in folder.iterdir()} >= {"checkpoint.pt", "log.jsonl", "loss.png",
                                                  "eval.json", "samples.png"}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and rows[-1]["loss"] < rows[0]["loss"]
    assert {"loss_und", "loss_gen", "lr", "tokens_per_s", "tflop_per_s",
            "gpu_memory_mb"} <= rows[0].keys()
    scores = json.loads((folder / "eval.json").read_text())
    assert {"config", "n", "seconds", "hardware", "und", "gen", "cost"} <= scores.keys()
    assert {"accuracy", "chance", "by_type", "held_out_accuracy", "loss"} <= scores["und"].keys()
    assert {"object_accuracy", "image_accuracy", "by_type", "unseen_object_accuracy", "loss",
            "ceiling"} <= scores["gen"].keys()
    assert {"flops_per_step", "flops_ratio", "paper_flops_ratio"} <= scores["cost"].keys()


def test_eval_and_probe(trained, tmp_path):
    """... whose results can go elsewhere. Kinds of both tasks are those of the data."""
    folder, picture = trained / "joint", tmp_path / "picture.png"
    before = sorted(path.name for path in folder.iterdir())
    Image.new("RGB", (40, 30), "red").save(picture)
    here = "--device", "cpu", "--out", tmp_path
    run("eval.py", folder, "--ask", picture, "what colour is the circle?", *here)
    drawn = []
    for seed in (0, 0, 1):
        run("eval.py", folder, "--draw", "a red circle", "--n", 2, "--seed", seed, *here)
        drawn.append((tmp_path / "draw-0.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2] and Image.open(tmp_path / "draw.png").width > 300
    run("eval.py", folder, "--gen-plan", "hmgen", "--und-plan", "himix", *here)
    scores = json.loads((tmp_path / "eval-himix-hmgen.json").read_text())
    assert scores["cost"]["flops_ratio"] < 1
    split = Shapes("tiny").split("und", "val", 40)
    assert set(scores["und"]["by_type"]) == {q.kind for asked in split.questions for q in asked}
    for extra in ([], ["--untrained"]):
        run("probe.py", folder, "--n", 4, *extra, *here)
    shares = json.loads((tmp_path / "attention.json").read_text())
    for task in ("und", "gen"):
        for of_queries in (shares[task], shares[task]["output_queries"]):
            sums = sum(np.array(of_queries[segment]) for segment in
                       ("system", "image", "instruction", "output"))
            assert np.allclose(sums, 1, atol=1e-5) and len(sums) == 3
    assert Image.open(tmp_path / "heatmaps-untrained.png").width > 800
    assert before == sorted(path.name for path in folder.iterdir())


def test_other_scripts(tmp_path):
    run("data.py", "--preset", "tiny", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 300
    printed = run("prune.py", "--preset", "tiny")
    assert "tteeeeeett " in printed and "freeze" in printed
    done = subprocess.run([sys.executable, ROOT / "eval.py", "nowhere"], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ)      # as the README does
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_a_short_run_is_scored_on_few_pictures_and_scores_say_how_many(monkeypatch, tmp_path):
    """And image loss and practice belong to the run: its FLOPs tell of the first."""
    tiny(monkeypatch, und_val=40, gen_val=21)
    flops = []
    for name, extra in (("plain", []), ("more", ["--image-loss", "--practice"])):
        run("train.py", *train_args(tmp_path, name, "--steps", 2, "--batch-size", 3, *extra))
        scores = json.loads((tmp_path / name / "eval.json").read_text())
        assert scores["n"]["gen"] == scores["gen"]["n"] == scores["gen"]["unseen_n"] == 6
        assert scores["n"]["und"] == sum(kind["n"] for kind in scores["und"]["by_type"].values())
        assert scores["n"]["und"] <= 60
        flops.append(scores["cost"]["flops_per_step"])
    assert flops[1] > flops[0]
    model, _, checkpoint = load_run(tmp_path / "more", CPU)
    assert model.config.image_loss and checkpoint["options"]["practice"]


@pytest.mark.parametrize("edits", [{"held_out": 0}, {"layers": 1, "gen_val": 1}, {"layers": 2}])
def test_edited_presets_train_and_are_scored(edits, monkeypatch, tmp_path):
    tiny(monkeypatch, **edits)
    printed = run("train.py", *train_args(tmp_path, "run", "--steps", 1, "--gen-plan", "hmgen"))
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert ("held_out_accuracy" in scores["und"]) == ("held_out" in printed) == \
        ("unseen_object_accuracy" in scores["gen"]) == ("held_out" not in edits)


# ---------------------------------------------------------------------- one run, one setting

@pytest.mark.parametrize("row, value, told", [
    ("colours", 4, "colours = 3, and now it is 4"), ("und_scenes", 100, "und_scenes = 300"),
    ("image_size", 20, "image_size = 16"), ("width", 64, "width = 32"), ("layers", 4, "layers = 3")])
def test_an_edited_preset_is_noticed_by_old_runs_and_tokenizers(row, value, told, trained,
                                                               monkeypatch):
    folder = trained / "joint"
    monkeypatch.setattr(PRESETS["tiny"], row, value)
    assert told in run("eval.py", folder, "--device", "cpu", code=2)
    assert told in run("train.py", "--resume", folder, "--device", "cpu", code=2)
    if row in COLUMNS["world"]:              # a tokenizer depends on that, too
        printed = run("train.py", *train_args(trained, "stale"), code=2)
        assert f"tokenizer.pt was made with {told}" in printed


def test_a_changed_vocabulary_is_noticed(trained, monkeypatch, error):
    path = trained / "joint"
    for name in ("PATTERN", "FIRST_CODE", "<|und|>"):
        monkeypatch.setitem(tok.VOCABULARY, name, "other")
        assert f"{name} = " in error(load_run, path, CPU)
        monkeypatch.undo()
    _, before, _ = load_run(path, CPU)
    last = min(tok.SPECIAL.values())        # one more, at the end, moves no id
    monkeypatch.setitem(tok.SPECIAL, "<|edit|>", last - 1)
    monkeypatch.setitem(tok.VOCABULARY, "<|edit|>", last - 1)
    try:
        _, tokenizer, _ = load_run(path, CPU)
    except ValueError as wrong:
        pytest.xfail(f"Tokenizer.__init__ unpacks exactly five special tokens: {wrong}")
    assert tokenizer.ids("a red circle") == before.ids("a red circle")
    assert [getattr(tokenizer, name) for name in ("pad", "gen", "und", "eos", "bos")] == \
        [511, 510, 509, 508, 507]


# ---------------------------------------------------------------------- folders of runs

def test_a_folder_holds_one_run(trained):
    """A second run is refused at once, and of two that begin together one ends."""
    before = (trained / "joint" / "checkpoint.pt").read_bytes()
    args = train_args(trained, "joint", "--steps", 40)
    assert "joint is not empty: --resume" in run("train.py", *args, code=2)
    assert (trained / "joint" / "checkpoint.pt").read_bytes() == before
    scripts = [Script("train.py", *train_args(trained, "both", "--steps", 20, "--seed", seed),
                      folder=trained) for seed in (1, 2)]
    ends = [script.wait() for script in scripts]
    assert sorted(ends) == [0, 2]
    loser = scripts[ends.index(2)]
    assert "log.jsonl" in loser.output or "is not empty" in loser.output
    checkpoint = torch.load(trained / "both" / "checkpoint.pt", weights_only=True)
    assert checkpoint["options"]["seed"] == ends.index(0) + 1 and checkpoint["step"] == 20


def test_what_is_the_users_stays(trained, tmp_path):
    """An empty folder, or a link to one, that is given as --out of a run that fails early."""
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for out in ("own", "link", "."):
        printed = run("train.py", "--preset", "tiny", "--device", "cpu", "--data", "nowhere",
                      "--out", out, folder=tmp_path / "own" if out == "." else tmp_path, code=2)
        assert printed.count("error: ") == 1 and "nowhere" in printed
        assert (tmp_path / "own").is_dir() and (tmp_path / "link").is_symlink()
    checkpoint = trained / "joint" / "checkpoint.pt"
    weights = checkpoint.read_bytes()
    printed = run("tokenizer.py", "--preset", "tiny", "--device", "cpu", "--out", checkpoint, code=2)
    assert "not a tokenizer checkpoint" in printed and checkpoint.read_bytes() == weights


@pytest.mark.parametrize("args, complaint", [
    (("train.py", "--und-plan", "fast"), "dense"), (("train.py", "--steps", "-1"), "--steps"),
    (("train.py", "--gen-plan", "himix", "--preset", "tiny"), "--gen-plan himix"),
    (("train.py", "--gen-plan", "hmgen", "--shallow", "9", "--preset", "tiny"), "expected 0 to 1"),
    (("train.py", "--batch-size", "0"), "--batch-size"), (("train.py", "--lr", "nan"), "--lr"),
    (("train.py", "--parts", "0"), "--parts"), (("train.py", "--data", "nowhere"), "nowhere"),
    (("train.py", "--resume", "nowhere"), "nowhere"), (("train.py", "--preset", "x"), "--preset"),
    (("train.py", "--out", "a", "--resume", "b"), "not allowed with"),
    (("train.py", "--out", "file/run"), "file"), (("eval.py", "nowhere"), "nowhere"),
    (("eval.py", "nowhere", "--n", "0"), "--n"), (("probe.py", "nowhere"), "nowhere"),
    (("data.py", "--data", "file"), "file"), (("tokenizer.py", "--data", "nowhere"), "nowhere")])
def test_bad_options_are_one_line_and_status_2(args, complaint, tmp_path):
    (tmp_path / "file").write_text("")
    printed = run(*args, code=2, folder=tmp_path)
    (line,) = [line for line in printed.splitlines() if not line.startswith("device: ")]
    assert line.startswith("error: ") and complaint in line


def test_resume_takes_the_runs_own_options(trained, tmp_path):
    """... and refuses others. A run of one task is not asked for the other."""
    folder = tmp_path / "und"
    run("train.py", *train_args(trained, folder, "--steps", 2, "--objective", "und"))
    printed = run("train.py", "--resume", folder, "--seed", 5, "--device", "cpu", code=2)
    assert "--seed 5: the run in" in printed and "has 0" in printed
    run("train.py", "--resume", folder, "--parts", 2, "--device", "cpu")
    assert "trained for und alone" in run("eval.py", folder, "--draw", "x", code=2)


# ---------------------------------------------------------------------- interrupted

def learned(folder):
    """What must not depend on interruptions: weights, optimizers, losses, scores."""
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


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ctrl_c_saves_and_says_how_to_go_on(trained, number, code):
    """... and the resumed run ends as an unbroken one."""
    folder = trained / f"stopped{code}"
    script = Script("train.py", *train_args(trained, folder.name, "--steps", 40), folder=trained)
    wait_for_log(script, folder, 1)
    script.send(number)
    assert script.wait() == code
    assert f"--resume {folder}" in script.output and "Traceback" not in script.output
    assert 10 <= torch.load(folder / "checkpoint.pt", weights_only=True)["step"] < 40
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 40, "lo\xff')      # as a full disk would leave it
    run("train.py", "--resume", folder, "--device", "cpu")
    assert same(learned(trained / "joint"), learned(folder))


def test_killed_at_eight_random_moments_a_run_ends_as_if_nothing_had_happened(trained, tmp_path):
    """SIGKILL while the tokenizer or the model is trained or scored; then --resume, or the same
    command again where there is no checkpoint yet."""
    folder, rng, kills = tmp_path / "cut", random.Random(0), 0

    def start():
        if (folder / "checkpoint.pt").exists():
            return Script("train.py", "--resume", folder, "--device", "cpu", folder=tmp_path)
        shutil.rmtree(folder, ignore_errors=True)           # killed before its first save
        return Script("train.py", *train_args(tmp_path, "cut", "--steps", 40, "--save-every", .01),
                      folder=tmp_path)

    while kills < 8:
        script = start()
        time.sleep(rng.random() * 1.2)
        if not script.runs():                               # it came to its end: begin once more
            shutil.rmtree(folder)
            (tmp_path / "tokenizer.pt").unlink()
            continue
        script.send(signal.SIGKILL)
        script.wait()
        kills += 1
        if (folder / "checkpoint.pt").exists():
            torch.load(folder / "checkpoint.pt", weights_only=True)     # whole
    script = start()
    assert script.wait() == 0, script.output
    assert same(learned(trained / "joint"), learned(folder))


def test_training_can_be_called_twice_in_a_thread_and_leaves_signals_alone(monkeypatch, tmp_path):
    tiny(monkeypatch)
    numbers = signal.SIGINT, signal.SIGTERM
    before, real = [*map(signal.getsignal, numbers)], train.apply_gradients
    train.train(*options(tmp_path, "one", "--steps", 2))
    done = []
    thread = threading.Thread(target=lambda: done.append(
        train.train(*options(tmp_path, "two", "--steps", 2))))
    thread.start()
    thread.join()
    assert done == [None] and before == [*map(signal.getsignal, numbers)]

    def apply_gradients(optimizers):
        os.kill(os.getpid(), signal.SIGTERM)
        real(optimizers)

    monkeypatch.setattr(train, "apply_gradients", apply_gradients)
    with pytest.raises(SystemExit) as stop:
        train.train(*options(tmp_path, "three", "--steps", 20))
    assert stop.value.code == 143 and before == [*map(signal.getsignal, numbers)]
    checkpoints = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                   for name in ("one", "two", "three")]
    assert same(*(checkpoint["model"] for checkpoint in checkpoints[:2]))
    assert checkpoints[2]["step"] == 10


def test_weights_that_are_not_finite_keep_the_last_good_checkpoint(trained, error, monkeypatch):
    """The loss is still good at the last step, the weights are not."""
    folder, real, steps = trained / "nan", train.apply_gradients, []

    def apply_gradients(optimizers):
        steps.append(1)
        real(optimizers)
        if len(steps) == 20:
            optimizers[1].param_groups[0]["params"][0].data[0, 0] = float("nan")

    monkeypatch.setattr(train, "apply_gradients", apply_gradients)
    line = error(train.train, *options(trained, "nan", "--save-every", 0))
    assert "not finite at step 20" in line and str(folder) in line
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 10 and all(x.isfinite().all() for x in kept["model"].values())


def test_a_full_disk_leaves_the_last_checkpoint(trained, tmp_path):
    """No file may grow beyond 100 kB, as if the disk were full: one line, and what was there is
    whole."""
    folder = tmp_path / "full"
    shutil.copytree(trained / "joint", folder)
    before = (folder / "checkpoint.pt").read_bytes()
    args = [sys.executable, ROOT / "train.py", "--resume", folder, "--device", "cpu"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{folder}/checkpoint.pt cannot be written: File too large" in done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.part"))
