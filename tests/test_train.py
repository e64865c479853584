"""Runs: what they are trained on, what they leave, that nothing interrupts or confuses them."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._pytree import tree_map

import tokenizer as tok
import train
from common import write_file
from conftest import ROOT, Script, run, train_args
from data import COLUMNS, PRESETS
from model import load_run
from shapes import Shapes
from tokenizer import FIRST_CODE


def options(folder, name, *args):
    return train.parse_options([*map(str, train_args(folder, name, *args))])


def scores_of(folder):
    return json.loads((folder / "eval.json").read_text())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def learned(folder):
    """What must not depend on interruptions, bit for bit: weights, optimizers, losses, scores."""
    checkpoint, scores = saved(folder), scores_of(folder)
    for row in checkpoint["log"]:
        del row["tokens_per_s"], row["tflop_per_s"]         # times differ
    del checkpoint["options"], scores["config"], scores["seconds"]
    found = checkpoint, scores, [row["loss"] for row in rows_of(folder)]
    return tree_map(lambda x: x.tolist() if torch.is_tensor(x) else x, found)


def test_practice_replaces_the_pictures_without_a_caption_and_no_others(trained):
    world, (_, tokenizer, _) = Shapes("tiny"), load_run(trained / "joint", "cpu")
    plain, practice = (train.training_sequences("gen", options(trained, "x", *on)[0], world,
                                                tokenizer) for on in ([], ["--practice"]))
    codes = tokenizer.encode(world.split("und", "train", 300).pixels)
    empty = plain.tokens[:, plain.layout.before - 1] == tokenizer.gen           # (N,)
    plain.tokens[empty, plain.layout.before:] = FIRST_CODE + codes[:empty.sum()]
    assert .05 < empty.double().mean() < .2 and torch.equal(plain.tokens, practice.tokens)


def test_a_run_leaves_what_the_contract_promises_and_is_of_use(trained, tmp_path):
    folder = trained / "joint"
    files, rows, scores = {*os.listdir(folder)}, rows_of(folder), scores_of(folder)
    assert files == {"checkpoint.pt", "log.jsonl", "loss.png", "eval.json", "samples.png"}
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and rows[-1]["loss"] < rows[0]["loss"]
    for found, names in (
            (rows[0], "loss_und loss_gen lr tokens_per_s tflop_per_s gpu_memory_mb"),
            (scores, "config n seconds hardware und gen cost"),
            (scores["und"], "accuracy chance by_type held_out_accuracy loss"),
            (scores["gen"], "object_accuracy image_accuracy by_type unseen_object_accuracy loss"),
            (scores["cost"], "flops_per_step flops_ratio paper_flops_ratio")):
        assert {*names.split()} <= found.keys()
    here = "--device", "cpu", "--out", tmp_path                 # results can go elsewhere
    run("eval.py", folder, "--gen-plan", "hmgen", "--und-plan", "himix", *here)
    reduced = json.loads((tmp_path / "eval-und-himix-gen-hmgen.json").read_text())
    assert reduced["cost"]["flops_ratio"] < 1
    run("probe.py", folder, "--n", 4, "--untrained", *here)
    run("data.py", "--preset", "tiny", "--out", tmp_path / "data.png")
    assert {*os.listdir(tmp_path)} > {"data.png", "heatmaps-untrained.png"}
    assert {*os.listdir(folder)} == files
    assert "tteeeeeett " in run("prune.py", "--preset", "tiny")         # what HiMix sees


@pytest.mark.parametrize("edits, extra", [
    ({"und_colours": 2, "shapes": 3}, []), ({"layers": 1, "gen_val": 1}, []),
    ({"layers": 2}, ["--image-loss"])])
def test_edited_presets_train_and_are_scored(edits, extra, tiny, monkeypatch, tmp_path):
    """On few pictures if the run is short; scores say how many. The image loss is the run's."""
    for row, value in edits.items():
        monkeypatch.setattr(PRESETS["tiny"], row, value)
    printed = run("train.py", *train_args(tmp_path, "run", "--steps", 2, "--batch-size", 3,
                                          "--gen-plan", "hmgen", *extra))
    scores, (model, _, _) = scores_of(tmp_path / "run"), load_run(tmp_path / "run", "cpu")
    assert "held_out_accuracy 0" in printed and "unseen_object_accuracy" in scores["gen"]
    assert scores["n"]["gen"] == scores["gen"]["n"] == min(6, edits.get("gen_val", 6))
    assert scores["n"]["und"] == sum(x["n"] for x in scores["und"]["by_type"].values()) <= 60
    assert model.config.image_loss == bool(extra)


@pytest.mark.parametrize("row, value, had", [
    ("colours", 4, 3), ("und_scenes", 100, 300), ("image_size", 20, 16), ("layers", 4, 3)])
def test_an_edited_preset_is_noticed_by_old_runs_and_tokenizers(row, value, had, trained,
                                                               monkeypatch):
    monkeypatch.setattr(PRESETS["tiny"], row, value)
    old, new = trained / "joint", ["train.py", *train_args(trained, "new")]
    commands = [["eval.py", old], ["train.py", "--resume", old], new]
    for command in commands[:3 if row in COLUMNS["world"] else 2]:
        printed = run(*command, "--device", "cpu", code=2)
        assert f"was made with {row} = {had}, and now it is {value}" in printed
        assert printed.count("error: ") == 1 and "Traceback" not in printed


def test_a_changed_vocabulary_is_noticed(trained, monkeypatch, error):
    _, before, _ = load_run(trained / "joint", "cpu")
    for name in ("PATTERN", "FIRST_CODE", "<|und|>"):
        with monkeypatch.context() as patch:
            patch.setitem(tok.VOCABULARY, name, "other")
            assert f"{name} = " in error(load_run, trained / "joint", "cpu")
    for table in (tok.SPECIAL, tok.VOCABULARY):             # one more, at the end, moves no id
        monkeypatch.setitem(table, "<|edit|>", 506)
    _, after, _ = load_run(trained / "joint", "cpu")
    assert after.ids("a red ring") == before.ids("a red ring") and after.bos == before.bos == 507


def test_a_folder_holds_one_run(trained):
    """A second run is refused at once, and of two that begin together one ends."""
    file = trained / "joint" / "checkpoint.pt"
    before = file.read_bytes()
    assert "is not empty" in run("train.py", *train_args(trained, "joint"), code=2)
    assert "not a tokenizer" in run("tokenizer.py", "--out", file, code=2)
    assert file.read_bytes() == before
    two = [Script("train.py", *train_args(trained, "both", "--seed", seed)) for seed in (0, 1)]
    ends = [script.wait() for script in two]
    assert sorted(ends) == [0, 2] and saved(trained / "both")["options"]["seed"] == ends.index(0)


@pytest.mark.parametrize("command, complaint", [
    ("train.py --und-plan fast", "dense"), ("train.py --steps -1", "--steps"),
    ("train.py --gen-plan himix --preset tiny", "--gen-plan himix"),
    ("train.py --lr nan", "--lr"), ("train.py --data nowhere --out own", "nowhere"),
    ("train.py --out file/run", "file"), ("train.py --out a --resume b", "not allowed with"),
    ("eval.py run --n 0", "--n"), ("probe.py nowhere", "nowhere"), ("data.py --data file", "file")])
def test_bad_options_are_one_line_and_status_2(command, complaint, tmp_path):
    """... and an empty folder of the user's stays."""
    (tmp_path / "file").write_text("")
    (tmp_path / "own").mkdir()
    printed = run(*command.split(), code=2, folder=tmp_path)
    (line,) = [line for line in printed.splitlines() if not line.startswith("device: ")]
    assert line.startswith("error: ") and complaint in line and (tmp_path / "own").is_dir()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ctrl_c_saves_and_says_how_to_go_on(trained, number, code):
    """... and the resumed run, whose options are its own, ends as an unbroken one."""
    folder = trained / f"stopped{code}"
    script = Script("train.py", *train_args(trained, folder.name, "--steps", 40))
    log = folder / "log.jsonl"
    while script.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(.01)
    os.kill(script.pid, number)
    assert script.wait() == code
    assert f"--resume {folder}" in script.output and "Traceback" not in script.output
    assert 10 <= saved(folder)["step"] < 40
    assert "--seed 5: the run in" in run("train.py", "--resume", folder, "--seed", 5, code=2)
    with log.open("ab") as file:
        file.write(b'{"step": 40, "lo\xff')     # as a full disk would leave it
    run("train.py", "--resume", folder, "--device", "cpu")
    assert learned(trained / "joint") == learned(folder)


def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(trained, tmp_path):
    """SIGKILL in training or scoring; then --resume, or once more if there is no checkpoint yet."""
    folder, rng, kills, done = tmp_path / "cut", random.Random(0), 0, False
    args = train_args(tmp_path, "cut", "--steps", 40, "--save-every", .01)
    while kills < 8 or not done:
        begins = done or not (folder / "checkpoint.pt").exists()
        if begins:
            shutil.rmtree(folder, ignore_errors=True)
        script = Script("train.py", *(args if begins else ("--resume", folder, "--device", "cpu")))
        if kills < 8:
            time.sleep(rng.random() * 1.2)
            script.kill()
        done = script.wait() == 0
        assert done or script.exitcode == -signal.SIGKILL, script.output
        assert not done or learned(trained / "joint") == learned(folder)
        kills += not done


def test_training_can_be_called_twice_and_in_a_thread_and_leaves_signals_alone(
        tiny, monkeypatch, tmp_path):
    numbers, real = (signal.SIGINT, signal.SIGTERM), train.apply_gradients
    before = [*map(signal.getsignal, numbers)]
    train.train(*options(tmp_path, "one", "--steps", 2))
    with ThreadPoolExecutor() as pool:
        pool.submit(train.train, *options(tmp_path, "two", "--steps", 2)).result()
    assert learned(tmp_path / "one") == learned(tmp_path / "two")
    monkeypatch.setattr(train, "apply_gradients", lambda optimizers: (
        os.kill(os.getpid(), signal.SIGTERM), real(optimizers)))
    with pytest.raises(SystemExit, match="143"):
        train.train(*options(tmp_path, "three", "--steps", 20))
    assert [*map(signal.getsignal, numbers)] == before and saved(tmp_path / "three")["step"] == 10


def test_weights_that_are_not_finite_keep_the_last_good_checkpoint(trained, error, monkeypatch):
    """The loss is still good at the last step, the weights are not."""
    real, steps = train.apply_gradients, iter(range(1, 40))

    def apply_gradients(optimizers):
        real(optimizers)
        if next(steps) == 20:
            optimizers[1].param_groups[0]["params"][0].data[0, 0] = float("nan")

    monkeypatch.setattr(train, "apply_gradients", apply_gradients)
    line = error(train.train, *options(trained, "nan", "--save-every", 0))
    kept = saved(trained / "nan")
    assert "not finite at step 20" in line and f"{trained / 'nan'} keeps the last good" in line
    assert kept["step"] == 10 and all(x.isfinite().all() for x in kept["model"].values())


def test_a_full_disk_leaves_what_was_there(tmp_path, error, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    write_file(tmp_path / "checkpoint.pt", "old")
    monkeypatch.setattr(os, "fsync", full)
    assert "pt cannot be written: No space" in error(write_file, tmp_path / "checkpoint.pt", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_third_task_and_a_world_of_digits_take_sixty_lines(trained, tmp_path):
    """Captions as output, with a token of their own. Runs from before are of use all the same."""
    patch, out = (ROOT / "tests" / "fork.patch").read_text(), tmp_path / "run"
    assert len(re.findall(r"^[-+](?![-+]{2} )", patch, re.M)) <= 60
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, check=True, input=patch, text=True)

    def script(*args):
        subprocess.run([sys.executable, *args, "--device", "cpu"], cwd=tmp_path, check=True)

    script("train.py", "--preset", "tiny", "--data", "digits", "--steps", "20", "--cap-plan",
           "himix", "--out", out)
    scores, rows = scores_of(out), rows_of(out)
    assert rows[1]["loss_cap"] < rows[0]["loss_cap"] and scores["cap"]["loss"] < 6
    assert scores["n"] == {"und": 80, "gen": 21, "cap": 40} and scores["cost"]["flops_ratio"] < 1
    assert [*scores["und"]["by_type"], *scores["gen"]["by_type"]] == ["digit", "ink", "one digit"]
    assert scores["und"]["chance"] < .5 and scores["gen"]["ceiling"]["image_accuracy"] > .3
    script("train.py", "--resume", out)
    script("eval.py", trained / "joint", "--draw", "a big red circle", "--n", "1", "--out", ".")
