"""What README.md states is held to the code and to the committed results. A fork that rewrites
README.md, or deletes study/, deletes this file."""
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, run
from data import read_picture
from shapes import Shapes

README = (ROOT / "README.md").read_text()
SCRIPT = r"python ((?:study/)?\w+\.py)(.*)"
MOST_WORDS, MOST_NUMBERS = 900, 50          # beside tables and code; beside links, too


def table_under(first_cell):
    """The rows of the table whose head begins with this cell, as lists of cells."""
    lines = README[README.index(f"| {first_cell} |"):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = ROOT / (path or "README.md")
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert not anchor or anchor in slugs, link
    named = {name.strip("`") for _, name, *_ in table_under("minutes")} - {""}
    assert all((ROOT / name).exists() for name in named)
    assert {file.name for file in ROOT.glob("*.py")} <= named


def test_prose_is_short_and_figures_stand_in_tables():
    prose = re.sub(r"(?m)^(    |\|).*$", "", README)                 # no code, no table
    prose = re.sub(r"`[^`]*`|!\[[^]]*\]\([^)]*\)", "", prose)       # nor in a line; no picture
    assert len(re.sub(r"\]\([^)]*\)", "", prose).split()) <= MOST_WORDS
    numbers = re.findall(r"(?<![\w.-])\d[\d.,]*", re.sub(r"\[[^]]*\]\([^)]*\)", "", prose))
    assert len(numbers) <= MOST_NUMBERS and "±" not in prose, numbers


def test_commands_have_the_options_that_they_use():
    commands = re.findall(r"^    " + SCRIPT, README, re.M) + re.findall("`" + SCRIPT + "`", README)
    assert len(commands) > 10
    helps = {}
    for script, rest in commands:
        helps[script] = helps.get(script) or run(script.removeprefix("study/"), "--help")
        for word in shlex.split(rest.split("`")[0], comments=True):
            if word.startswith("--"):
                assert re.search(rf"{word}\b", helps[script]), (script, word)
    for option in re.findall(r"`(--[\w-]+)[ `]", README):
        assert any(re.search(rf"{option}\b", text) for text in helps.values()), option


def test_results_are_those_of_the_committed_runs():
    from table import COLUMNS, ROWS, numbers, read_runs
    found = read_runs(ROOT / "study" / "results" / "band")
    row_of = {title: row for row, (title, *_) in ROWS.items()}
    for title, *cells, seeds in table_under("run"):
        runs = {seed: found[row_of[title]][seed] for seed in range(1, int(seeds) + 1)}
        for cell, (_, path, factor, digits) in zip(cells, COLUMNS, strict=True):
            values = numbers(runs, path, factor)
            assert cell == (f"{statistics.mean(values):.{digits}f}" if values else ""), title


def test_the_default_run_is_that_of_the_committed_scores():
    results = ROOT / "study" / "results"
    for row, names in zip(table_under("device"), ("cpu-seed?.json", "scale/joint-seed1/eval.json")):
        scores = [json.loads(file.read_text()) for file in results.glob(names)]
        for cell, task, name in zip(row[3:], ("und", "gen"), ("accuracy", "image_accuracy")):
            values = [100 * run[task][name] for run in scores]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            assert cell.startswith(f"{statistics.mean(values):.1f}{spread} %"), row


@pytest.mark.parametrize("name, command, printed", [
    ("weights", "train.py --preset tiny --objective und --steps 3 --device cpu", "und: n"),
    ("plan", "prune.py --preset tiny", r"(?m)^rest "),
    ("question", "train.py --preset tiny --objective und --steps 3 --device cpu", r"last +\d"),
    ("fastv", "train.py --preset tiny --objective und --steps 3 --device cpu", "und: n"),
    ("start", "train.py --preset tiny --start RUN --projections task --steps 3 --device cpu",
     "und: n")])
def test_exercises_have_solutions(name, command, printed, trained, tmp_path):
    """... which still apply if someone has added a plan."""
    patch = (ROOT / "study" / "exercises" / f"{name}.patch").read_text()
    assert 0 < len(re.findall(r"^[-+][^-+].*$", patch, re.M)) <= 15
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    plans, more = tmp_path / "prune.py", '\n    "more": lambda layers, k: (FULL,) * layers,'
    plans.write_text(plans.read_text().replace("\n}\n", more + "\n}\n", 1))
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, check=True, input=patch, text=True)
    command = command.replace("RUN", str(trained / "joint")).split()
    told = subprocess.check_output([sys.executable, *command], cwd=tmp_path, text=True)
    assert re.search(printed, told)


def test_the_python_example_runs(monkeypatch, capsys):
    """... and prints what a picture of the trained model shows."""
    start = README.index("    import torch\n")
    example = re.match(r"(?:    .*\n|\n)+", README[start:]).group()
    monkeypatch.chdir(ROOT)
    exec(textwrap.dedent(example), {})
    assert "blue\n" in capsys.readouterr().out


def test_the_trained_model_can_be_tried(tmp_path):
    """study/trained as the README uses it: it draws what the caption says, and answers."""
    trained, caption = ROOT / "study" / "trained", "a big yellow circle and a small purple cross"
    here = "--device", "cpu", "--out", tmp_path
    run("eval.py", trained, "--draw", caption, "--n", 1, *here)
    picture = tmp_path / "draw-0.png"
    (seen,) = Shapes("cpu").read(read_picture(picture, 32)[None])
    assert {(thing.size, *thing.pair) for thing in seen} == {(1, 3, 0), (0, 4, 3)}
    asked = run("eval.py", trained, "--ask", picture, "what colour is the circle?", *here)
    assert asked.splitlines()[-1] == "yellow"
