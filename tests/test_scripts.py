"""Every script's command line, tiny but real; several processes = one; bad input."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import CLAIMS, claims
from prune import PLANS
from train import claimed

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def script(name, *args, code=0, launcher=(), folder=ROOT):
    done = subprocess.run([sys.executable, *launcher, ROOT / name, *map(str, args)], capture_output=True, text=True, env=ENV, cwd=folder,
                          timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tokenizer and a joint run of 30 steps."""
    folder = tmp_path_factory.mktemp("out")
    script("tokenizer.py", "--preset", "tiny", "--out", folder / "tokenizer.pt", "--device", "cpu")
    train(folder, "joint")
    return folder


def train(folder, name, *args, steps=30, code=0, **kwargs):
    return script("train.py", "--preset", "tiny", "--steps", steps, "--device", "cpu", "--tokenizer", folder / "tokenizer.pt",
                  "--out", folder / name, *args, code=code, **kwargs)


def test_a_run_leaves_what_the_contract_promises(trained):
    run = trained / "joint"
    assert {f.name for f in run.iterdir()} == {"checkpoint.pt", "log.jsonl", "loss.png", "eval.json", "samples.png"}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [10, 20, 30] and rows[-1]["loss"] < rows[0]["loss"] and rows[0]["mfu"] is None
    assert {"loss_und", "loss_gen", "lr", "tokens_per_s", "step_ms", "peak_memory_mb"} <= rows[0].keys()
    scores = json.loads((run / "eval.json").read_text())
    assert {"config", "n", "seconds", "hardware", "und", "gen", "cost"} <= scores.keys()
    assert {"accuracy", "chance", "by_type", "pope", "transfer_accuracy", "loss"} <= scores["und"].keys()
    assert {"object_accuracy", "image_accuracy", "by_type", "transfer_object_accuracy", "frechet", "loss",
            "ceiling"} <= scores["gen"].keys()
    assert {"flops_per_step", "flops_ratio", "paper_flops_ratio", "step_ms", "step_ratio"} <= scores["cost"].keys()


def test_eval_and_probe(trained):
    run = trained / "joint"
    Image.new("RGB", (40, 30), "red").save(trained / "picture.png")
    assert script("eval.py", run, "--ask", trained / "picture.png", "what colour is the circle?", "--device", "cpu").endswith("\n")
    script("eval.py", run, "--draw", "a red circle", "--n", 3, "--top-k", 5, "--guidance", 1)
    assert Image.open(run / "draw.png").width > 300
    script("eval.py", run, "--gen-plan", "hmgen", "--und-plan", "himix")
    assert json.loads((run / "eval-himix-hmgen1.json").read_text())["cost"]["flops_ratio"] < 1
    script("probe.py", run, "--n", 10)
    script("probe.py", run, "--n", 10, "--untrained")
    shares = json.loads((run / "attention.json").read_text())
    for task in ("und", "gen"):
        for own in (shares[task], shares[task]["output_queries"]):
            for layer in range(3):
                assert abs(sum(own[s][layer] for s in ("system", "image", "instruction", "output")) - 1) < 1e-5


@pytest.mark.parametrize("command", [("data.py", "--preset", "tiny", "--out", "d.png"), ("prune.py", "--preset", "tiny", "--out", "d.png")])
def test_data_and_prune(tmp_path, command):
    script(*command[:-1], tmp_path / command[-1])
    assert Image.open(tmp_path / "d.png").width > 300


def test_a_folder_belongs_to_one_process(tmp_path):
    with claimed(tmp_path / "run") as ours, claimed(tmp_path / "run") as again:
        assert ours and not again
        assert "another process" in train(tmp_path, "run", code=2) and (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()                              # nothing came of it
    with claimed(tmp_path / "run") as ours:
        assert ours


def test_accumulation_and_several_processes_equal_one(trained):
    train(trained, "one", steps=10)
    train(trained, "parts", "--accumulate", 4, steps=10)
    train(trained, "two", steps=10, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    losses = [json.loads((trained / name / "log.jsonl").read_text())["loss"] for name in ("one", "parts", "two")]
    assert max(losses) - min(losses) < 1e-5, losses


def test_the_table_trains_what_is_missing(trained):
    """... each row once, by one of two processes that are started together."""
    args = ("--preset", "tiny", "--steps", 5, "--tokenizer", trained / "tokenizer.pt", "--table", trained / "table", "--device", "cpu")
    both = [subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             env=ENV, cwd=trained) for _ in range(2)]
    printed = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    trained_rows = [re.findall(r"(\S+-seed1)\n.*GFLOP a step", text) for text in printed]
    assert all(trained_rows) and sorted(sum(trained_rows, [])) == sorted(map(str, (trained / "table").iterdir()))
    assert any("another process is at it" in text for text in printed)
    first = max(printed, key=len)
    assert first.count("All in one") == 1 and "share partial" in first and "56.0" in first and "at inference only" in first
    assert script("train.py", *args, folder=trained).count("GFLOP a step") == 0          # nothing is trained twice
    script("eval.py", "--table", trained / "table", folder=trained)
    kept = json.loads((trained / "results" / "table-tiny.json").read_text())
    assert set(kept["runs"]) == set(kept["titles"]) and len(kept["runs"]) == 33
    assert Image.open(trained / "results" / "table-tiny.png").width > 600 < Image.open(trained / "results" / "table-tiny-samples.png").width


def test_claims_are_differences_seed_by_seed_with_an_interval():
    """Three seeds, differences 4, 5 and 6 points: 5 ± 4.30 * 1 / sqrt(3); one seed alone decides nothing."""
    runs = {"joint-dense": {str(i): {"und": {"accuracy": .9}} for i in range(3)},
            "u-dense": {str(i): {"und": {"accuracy": .9 - .04 - .01 * i}} for i in range(3)},
            "u-himix": {"0": {"und": {"accuracy": .1}}}}
    found = {**dict.fromkeys({name for _, a, _, b, *_ in CLAIMS for name in (a, b)}, {}), **runs}
    ((claim, mean, half, n, answer),) = claims(found)
    assert claim == "joint training helps understanding" and n == 3 and answer == "holds"
    assert abs(mean - 5) < 1e-9 and abs(half - 4.30 / 3 ** .5) < 1e-9
    found["u-dense"] = {str(i): {"und": {"accuracy": .9 + .03 * (i - 1)}} for i in range(3)}
    assert claims(found)[0][-1] == "not decided here"
    for i, run in enumerate(found["joint-dense"].values()):             # a claim about layers of the same runs
        run["attention"] = {"und": {"image": [.3, .5, .1 + .01 * i]}}
    ((_, mean, *_, answer), _) = claims(found)
    assert abs(mean - 19) < 1e-9 and answer == "holds"


def test_bench_counts_what_it_times(tmp_path):
    printed = script("train.py", "--bench", "--preset", "tiny", "--batch-size", 1, "--device", "cpu", folder=tmp_path)
    found = json.loads((tmp_path / "results" / "bench-cpu.json").read_text())
    assert len(found["steps"]) == 3 * (2 * len(PLANS) - 1) and len(found["image_tokens"]) == 12 and "with the KV cache" in printed
    for row in found["steps"] + found["image_tokens"]:
        assert row["ms_range"][0] <= row["ms"] <= row["ms_range"][1] and (row["plan"] != "dense" or row["time_ratio"] == 1)
    himix, dense = (next(x for x in found["image_tokens"] if (x["task"], x["plan"], x["image_tokens"]) == ("und", name, 1024))
                    for name in ("himix", "dense"))
    assert himix["flops_ratio"] < .1 and himix["time_ratio"] < .6 and himix["memory_mb"] < dense["memory_mb"] / 2
    assert all(x["same_codes"] == 1 and x["cached_images_per_s"] > x["uncached_images_per_s"] for x in found["drawing"])


def test_regimes_change_what_they_say_and_nothing_else(tmp_path):
    """A condition's runs differ from those of `base` where its patch tells them to, and the patch is gone afterwards."""
    args = (tmp_path / "runs", "base", "few-und", "read", "--preset", "tiny", "--steps", 10, "--device", "cpu")
    first = script("results/regimes.py", *args, folder=tmp_path)
    found = json.loads((tmp_path / "results" / "runs-tiny.json").read_text())["runs"]
    assert {name: set(runs) for name, runs in found.items()} == {
        "base": {"und", "gen", "joint", "reduced", "skip"}, "few-und": {"und", "joint"}, "read": {"und", "joint", "gen"}}
    losses = {name: runs["und"]["seed0"]["und"]["loss"] for name, runs in found.items()}
    assert len(set(losses.values())) == 3, losses
    again = script("results/regimes.py", *args, folder=tmp_path)
    assert "GFLOP a step" not in again and first.endswith(again.split("\n", 1)[1])          # nothing is trained twice
    assert "--steps 20: the run in" in script("results/regimes.py", *args, "--steps", 20, folder=tmp_path, code=2)


def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(120):
            picture = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + (155 if name == "light" else 0)
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    script("train.py", "--data", tmp_path / "images", "--preset", "tiny", "--steps", 30, "--device", "cpu", "--tokenizer", tmp_path / "t.pt",
           "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(scores["und"]["matching"]) == {"caption", "image", "chance"} and scores["gen"]["bits_per_token"] > 0


@pytest.mark.parametrize("args, complaint", [
    (("train.py", "--und-plan", "fast"), "expected one of dense"),
    (("train.py", "--gen-plan", "himix"), "--gen-plan himix"),
    (("train.py", "--gen-plan", "hmgen", "--shallow", "9", "--preset", "tiny"), "do not fit"),
    (("train.py", "--objective", "und", "--gen-plan", "hmgen"), "no such task"),
    (("train.py", "--steps", "-1"), "--steps"),
    (("train.py", "--table", "t", "--projections", "task"), "--projections"),
    (("train.py", "--batch-size", "6", "--accumulate", "4"), "multiple"),
    (("train.py", "--shallow", "1"), "--shallow 1"),
    (("train.py", "--objective", "und", "--projections", "task"), "--projections task"),
    (("train.py", "--objective", "gen", "--image-loss"), "--image-loss"),
    (("train.py", "--seed", "-1"), "--seed -1"),
    (("train.py", "--seed", str(2 ** 70)), "--seed"),
    (("train.py", "--lr", "nan"), "--lr nan"),
    (("train.py", "--save-every", "7"), "--save-every 7"),
    (("train.py", "--seeds", "2"), "--seeds"),
    (("train.py", "--bench", "--steps", "5"), "--steps"),
    (("train.py", "--resume", "--table", "t"), "--resume"),
    (("tokenizer.py", "--steps", "0"), "--steps 0"),
    (("eval.py", "x", "--ask", "a.png", "what?", "--n", "2"), "--n"),
    (("eval.py", "x", "--n", "2"), "--n"),
    (("eval.py", "x", "--draw", "a", "--temperature", "0"), "--temperature"),
    (("eval.py", "--table", "t", "--gen-plan", "hmgen"), "--gen-plan"),
    (("probe.py", "x", "--n", "0"), "--n"),
    (("train.py", "--data", "nowhere"), "nowhere"),
    (("train.py", "--device", "cuda"), "--device cuda"),
    (("train.py", "--resume", "--out", "nowhere"), "nowhere"),
    (("eval.py", "nowhere"), "nowhere"),
    (("eval.py",), "expected"),
    (("eval.py", "--table", "nowhere"), "nowhere"),
    (("probe.py", "nowhere"), "nowhere")])
def test_bad_input_is_one_line_and_status_2(args, complaint, tmp_path):
    if args[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    error = script(*args, code=2, folder=tmp_path)
    assert complaint in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
