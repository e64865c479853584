"""What README.md states is held to the code and to the committed results."""
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

README = (ROOT / "README.md").read_text()
STUDY = (ROOT / "study" / "README.md").read_text()
SCRIPT = r"python ((?:study/)?\w+\.py)(.*)"


def table_under(first_cell, text=README):
    """The rows of the table whose head begins with this cell, as lists of cells."""
    lines = text[text.index(f"| {first_cell} |"):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_it_is_short():
    prose = [line for line in README.splitlines() if not line.startswith(("|", "    "))]
    assert len(" ".join(prose).split()) <= 1300


def test_files_and_their_lengths():
    lines = {name.strip("`"): count for name, _, count in table_under("file")}
    for file in ROOT.glob("*.py"):
        assert int(lines[file.name]) == file.read_text().count("\n"), file.name
    for name in lines:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("text, folder", [(README, ROOT), (STUDY, ROOT / "study")])
def test_links_lead_somewhere(text, folder):
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = folder / path if path else None
            assert target is None or target.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (target or folder / "README.md").read_text()
                                      if target is None or target.suffix else STUDY, re.M)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, link


def test_commands_have_the_options_that_they_use():
    commands = re.findall(r"^    " + SCRIPT, README, re.M) + re.findall("`" + SCRIPT + "`", README)
    assert len(commands) > 10
    helps = {}
    for script, rest in commands:
        if script not in helps:
            name = script.removeprefix("study/")
            helps[script] = run(name, "--help")
        for word in shlex.split(rest.split("`")[0], comments=True):
            if word.startswith("--"):
                assert re.search(rf"{word}\b", helps[script]), (script, word)


def test_results_are_those_of_the_committed_runs():
    sys.path.insert(0, str(ROOT / "study"))
    from table import COLUMNS, ROWS, numbers, read_runs
    found = read_runs(ROOT / "study" / "results" / "synergy")
    row_of = {title: row for row, (title, _) in ROWS.items()}
    shown = table_under("run")
    assert len(shown) == 9
    for title, *cells, seeds in shown:
        runs = found[row_of[title]]
        assert len(runs) >= int(seeds)
        runs = {seed: runs[seed] for seed in range(1, int(seeds) + 1)}
        for cell, (_, path, factor, digits) in zip(cells, COLUMNS, strict=True):
            values = numbers(runs, path, factor)
            assert cell == (f"{statistics.mean(values):.{digits}f}" if values else ""), title


@pytest.mark.parametrize("text", [README, STUDY])
def test_differences_are_those_of_the_committed_runs(text):
    """... which the table of the paper's claims has; and p in README's first row."""
    sys.path.insert(0, str(ROOT / "study"))
    from table import (HELD_OUT, IMAGES, QUESTIONS, ROWS, UNSEEN, answer_claims, differences_of,
                       mean_std, numbers, read_runs, spread)
    found = read_runs(ROOT / "study" / "results" / "synergy")
    expected = [
        [(HELD_OUT, "joint", "u"), (HELD_OUT, "joint", "u-long"), (QUESTIONS, "joint", "u")],
        [(IMAGES, "joint", "g"), (UNSEEN, "joint", "g")],
        [(QUESTIONS, "u-himix", "u"), (HELD_OUT, "u-himix", "u")],
        [(IMAGES, "g-hmgen", "g"), (UNSEEN, "g-hmgen", "g")],
        [(HELD_OUT, "joint", "u", "share-all", "u-himix")],
        [(HELD_OUT, "share-partial", "share-all"),
         (HELD_OUT, "joint", "u", "share-partial", "u-himix")]]
    if text is STUDY:       # it also says what share all loses against joint training
        expected[4].insert(0, (HELD_OUT, "share-all", "joint"))
    rows = table_under("the paper says", text)
    depth = json.loads((ROOT / "study/results/depth-cpu.json").read_text())["runs"].values()
    for layer in (7, 11):
        for task in ("und", "gen"):
            right = [100 * run[task]["right"][layer - 1] for run in depth]
            assert mean_std(right, 1) in " ".join(rows[-1])
    for row, differences in zip(rows, expected):
        shown = re.findall(r"[-+]?[\d.]+ ± [\d.]+", " ".join(row))
        values = [spread(differences_of(found, *difference)) for difference in differences]
        assert [x.lstrip("+") for x in shown] == [x.lstrip("+") for x in values], row
    assert spread(differences_of(found, HELD_OUT, "joint", "share-all")).lstrip("+") in text
    for other in ("joint", "joint-shuffled"):
        assert mean_std(differences_of(found, HELD_OUT, other, "u")[:3], 1, "+") in text
    if text is STUDY:
        row_of = {title: row for row, (title, _) in ROWS.items()}
        controls = table_under("run | held-out pairs | minus understanding only | seeds", text)
        assert len(controls) == 9
        for title, rate, difference, seeds in controls:
            runs = {seed: found[row_of[title]][seed] for seed in range(1, int(seeds) + 1)}
            assert rate == mean_std(numbers(runs, HELD_OUT, 100), 1), title
            differences = differences_of(found, HELD_OUT, row_of[title], "u")[:int(seeds)]
            assert difference == mean_std(differences, 1, "+"), title
    kept = "freeze-hmgen-practice"
    if text is STUDY:
        scores = HELD_OUT, QUESTIONS, IMAGES, UNSEEN
        others = "share-all", "joint", "joint-practice", "share-all-practice"
        for other, row in zip(others, table_under("minus", text), strict=True):
            assert row[1:] == [spread(differences_of(found, score, kept, other))
                               for score in scores]
    if text is README:
        for other in ("share-all", "joint", "joint-practice", "u-freeze"):
            assert spread(differences_of(found, HELD_OUT, kept, other)).lstrip("+") in text
        assert spread(differences_of(found, HELD_OUT, "u-freeze", "u")) in text
        p = {claim: p for claim, _, _, _, p, _ in answer_claims(found)}
        first, second = re.findall(r"\(p (\.\d+)", rows[0][-1])
        for shown, claim in ((first, "joint training helps with held-out pairs"),
                             (second, "joint training helps with questions")):
            assert float(shown) == float(f"{p[claim]:.1g}")


def test_the_default_run_is_that_of_the_committed_scores():
    cpu = [json.loads((ROOT / f"study/results/cpu-seed{seed}.json").read_text())
           for seed in range(5)]
    gpu = json.loads((ROOT / "study/results/scale/joint-seed1/eval.json").read_text())
    shown = {device: cells for device, *cells in table_under("device")}
    for cell, (task, name) in zip(shown["2 CPU cores"][2:], (("und", "accuracy"),
                                                             ("gen", "image_accuracy"))):
        values = [100 * scores[task][name] for scores in cpu]
        assert cell.startswith(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
    assert shown["one H200"][2].startswith(f"{100 * gpu['und']['accuracy']:.1f}")
    assert shown["one H200"][3].startswith(f"{100 * gpu['gen']['image_accuracy']:.1f}")


@pytest.mark.parametrize("name, command", [
    ("4-weights", "train.py --preset tiny --objective und --steps 5 --device cpu"),
    ("5-plan", "prune.py --preset tiny"),
    ("6-question", "train.py --preset tiny --objective und --steps 5 --device cpu")])
def test_exercises_have_solutions(name, command, tmp_path):
    patch = ROOT / "study" / "exercises" / f"{name}.patch"
    changed = re.findall(r"^[-+][^-+].*$", patch.read_text(), re.M)
    assert 0 < len(changed) <= 10
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    if name == "5-plan":
        assert re.search(r"^rest ", done.stdout, re.M)
    if name == "6-question":
        assert re.search(r"last +\d", done.stdout)


def test_the_python_example_runs(monkeypatch, capsys):
    start = README.index("    import torch\n")
    example = README[start:README.index("\n\nA new plan", start)]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(textwrap.dedent(example), names)
    assert capsys.readouterr().out == "blue\n"
    assert len(names["attention"]) == 4
