"""A third task and another world, as someone who forks this would add them."""
import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_a_third_task_and_a_world_of_digits_take_sixty_lines(trained, tmp_path):
    """Captions as output, with a special token of their own: in the tokenizer, the sequences, the
    objective, the scores, the data set. Runs from before are of use all the same."""
    patch, out = (ROOT / "tests" / "fork.patch").read_text(), tmp_path / "run"
    assert len(re.findall(r"^[-+](?![-+]{2} )", patch, re.M)) <= 60
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, check=True, input=patch, text=True)

    def script(*args):
        command = [sys.executable, *map(str, args), "--device", "cpu"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    script("train.py", "--preset", "tiny", "--data", "digits", "--steps", 20, "--cap-plan", "himix",
           "--out", out)
    scores = json.loads((out / "eval.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[1]["loss_cap"] < rows[0]["loss_cap"] and scores["cap"]["loss"] < 6
    assert scores["n"] == {"und": 80, "gen": 21, "cap": 40} and scores["cost"]["flops_ratio"] < 1
    assert set(scores["und"]["by_type"]) == {"digit", "ink"} and scores["und"]["chance"] < .5
    assert set(scores["gen"]["by_type"]) == {"one digit"}
    assert scores["gen"]["ceiling"]["image_accuracy"] > .3
    script("train.py", "--resume", out)
    script("eval.py", trained / "joint", "--draw", "a big red circle", "--n", 1, "--out", ".")
