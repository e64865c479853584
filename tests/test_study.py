"""What needs study/: a fork deletes both. Its scripts, tiny but real, its statistics; and what
study/README.md states, held to the committed results."""
import copy
import json
import re
import shlex
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import conflict
import depth
import front
import gpu
import photos
import table
from conftest import ROOT, run, train_args
from data import PRESETS
from match import matching
from model import sequences
from probe import allocation
from prune import FREEZE, FULL, PLANS, can_generate, make_plan
from shapes import Shapes
from table import (HELD_OUT, IMAGES, LOOK, QUESTIONS, ROWS, UNSEEN, answer_claims, differences_of,
                   mean_std, numbers, open_run, p_value, read_runs, value)

CPU, STUDY = torch.device("cpu"), (ROOT / "study" / "README.md").read_text()
NOTES = (ROOT / "study" / "NOTES.md").read_text()
RESULTS = ROOT / "study" / "results"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results of scripts are written here instead."""
    for module in (table, depth, photos, bench, front):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_the_table_trains_what_is_missing(trained, results, monkeypatch):
    out, rows = results / "table", ("u", "joint", "joint-shuffled", "deep-leave-10", "u-long")
    args = (out, "--preset", "tiny", "--steps", 5, "--rows", *rows, "--device", "cpu")
    first = run("table.py", *args)
    assert first.count("GFLOP a step") == 5 and "at inference only" in first
    assert "GFLOP a step" not in run("table.py", *args)     # nothing is trained twice
    found = read_runs(out)
    assert set(found) == {"u-inference", *rows}
    assert "cost" not in found["u-inference"][1]            # nobody trained like that
    assert found["u-long"][1]["cost"]["flops_ratio"] == 8 / 5           # round(1.56 * 5) steps
    # Two rows that differ in the world alone: captions beside the wrong pictures.
    losses = {json.loads((out / f"{row}-seed1" / "log.jsonl").read_text())["loss_gen"]
              for row in ("joint", "joint-shuffled")}
    assert len(losses) == 2
    refused = run("eval.py", out / "u-seed1", "--gen-plan", "hmgen", code=2)
    assert "was trained for und, not for gen" in refused
    # A run of other sizes can be opened, although its preset has others by now.
    assert "made with layers = 12" in run("eval.py", out / "deep-leave-10-seed1", code=2)
    # Where table.py is not loaded, a row's own plan or world is refused, in one line.
    for row, line in (("deep-leave-10", "plan leave-10: expected one of"),
                      ("joint-shuffled", "--data shuffled: expected shapes")):
        fresh = [sys.executable, ROOT / "train.py", "--resume", out / f"{row}-seed1"]
        refused = subprocess.run(fresh, capture_output=True, text=True)
        assert refused.returncode == 2 and line in refused.stderr, refused.stderr
    monkeypatch.setitem(PRESETS, "tiny", copy.copy(PRESETS["tiny"]))
    model, _, _, _, plans = open_run(out / "deep-leave-10-seed1", CPU)
    assert model.config.layers == 12 and not plans["und"][10].query and plans["gen"][10].query


def test_a_stopped_row_goes_on_and_a_locked_one_is_left_alone(trained, results):
    out = results / "runs" / "u-seed1"
    args = (results / "runs", "--preset", "tiny", "--rows", "u", "--device", "cpu", "--steps",
            10)
    run("train.py", *train_args(trained, "unused", "--steps", 10, "--objective", "und", "--seed", 1,
                                "--out", out, "--tokenizer", out.parent / "tokenizer-seed1.pt"))
    (out / "eval.json").unlink()
    with table.lock(out):
        assert "no finished run" in run("table.py", *args, code=2)
    assert "| 1 |" in run("table.py", *args)
    (out / "checkpoint.pt").unlink()                        # as with committed scores
    run("table.py", *args[:-1], 11, code=2)                 # others would be in one table with it
    run("table.py", *args)


def test_the_tables_of_stored_results(results):
    """... are made without training, whatever the rows were when they were trained."""
    for name in ("band", "synergy", "deep", "scale", "look"):
        run("table.py", RESULTS / name, "--seeds", 0, "--preset", "tiny", "--device", "cpu")
    stored = json.loads((RESULTS / "photos-cpu.json").read_text())
    photos.make_table(RESULTS / "photos", stored["real"], stored["names"], "cpu")
    for name in ("band-cpu.md", "synergy-cpu.md", "deep-cpu.md", "scale-gpu.md", "look-cpu.md",
                 "photos-cpu.md"):
        assert (results / name).read_text() == (RESULTS / name).read_text()


def test_gradients_are_compared_while_rows_train(results):
    out = results / "runs"
    run("table.py", out, "--preset", "tiny", "--rows", "joint", "share-partial", "--device", "cpu",
        "--steps", 20)
    found = json.loads((out / "joint-seed1" / "gradients.json").read_text())
    assert [*found] == [*map(str, range(1, 20, 2))]
    last = found["19"]["all"]                               # a task agrees with itself
    assert max(map(abs, last["between"])) < min(last["und"] + last["gen"]) <= 1
    # With projections of their own, image tokens of HiMix use no weights that generation uses.
    found = json.loads((out / "share-partial-seed1" / "gradients.json").read_text())
    assert all(point["image"]["between"] == [0, 0, 0] for point in found.values())
    # ... and in HMGen's shallow layer, the second, they take no part at all.
    assert all(point["image"]["gen"][1] == 0 for point in found.values())
    assert "share-partial | all tokens | both tasks | 1 |" in run("conflict.py", out)


def test_what_image_tokens_contribute_to_a_gradient(trained, monkeypatch):
    """... is the gradient by a copy of the weights that image tokens alone use."""
    model, tokenizer, _, dataset, _ = open_run(trained / "joint", CPU)
    batch, plan = sequences("und", tokenizer, dataset.split("und", "val", 8)), (FULL, FREEZE, FULL)
    found, start = conflict.gradients(model, batch, plan)["image"][1], 0
    is_image = torch.zeros(sum(batch.layout), 1, dtype=torch.bool)
    is_image[batch.layout.before:batch.layout.before + batch.layout.image] = True
    for linear in model.blocks[1].modules():
        if isinstance(linear, torch.nn.Linear):
            copy_of, usual = linear.weight.detach().clone().requires_grad_(), linear.forward
            with monkeypatch.context() as patch:
                patch.setattr(linear, "forward", lambda h: usual(h) if h.size(1) < len(is_image)
                              else torch.where(is_image, h @ copy_of.T, usual(h)))
                model(batch, plan)[1].backward()
            part = found[start:start + copy_of.numel()].view_as(copy_of)
            start += copy_of.numel()
            assert torch.allclose(part, torch.zeros_like(part) if copy_of.grad is None
                                  else copy_of.grad, atol=1e-6)
    assert start == len(found) and found.any()


def test_claims_are_tested_seed_by_seed_and_corrected():
    """Differences of 4, 5 and 6 points: t = 5 sqrt(3), of which the two-sided p with 2 degrees of
    freedom is .0131. Holm's correction takes ten times that for the smallest of ten claims."""
    assert abs(2 * p_value([4, 5, 6], 0) - .0131) < 1e-4

    def answer(*differences):
        rows = ({seed: {"und": {HELD_OUT[1]: .9 - x / 100}} for seed, x in enumerate(xs, 1)}
                for xs in ([0] * 20, differences))
        return answer_claims(dict(zip(("joint", "u"), rows)))[0]

    _, mean, deviation, n, p, words = answer(4, 5, 6)       # too few seeds are no answer
    assert np.allclose((mean, deviation), (5, 1)) and (n, p, words) == (3, None, "3 of 8 seeds")
    eight = 1, 3, -1, 2, 4, 0, 2, 1
    *_, n, p, words = answer(*eight, 50)                    # nor is a ninth one
    assert (n, words) == (8, "undecided") and abs(p - 20 * p_value(eight, 0)) < 1e-9
    assert answer(*(x + 5 for x in eight))[-1] == "holds"
    assert answer(*(x - 9 for x in eight))[-1] == "does not hold"


def test_keeping_is_not_the_lack_of_a_difference():
    """Of images within 2 points, the only claim for which these rows have scores."""
    for right, *points in (("holds", .5, -.4, .2, -.1, .3, 0, -.2, .1),
                           ("undecided", 9, -8, 6, -7, 8, -9, 7, -5),
                           ("does not hold", -4.5, -5.4, -4.8, -5.1, -4.7, -5, -5.2, -4.9)):
        found = {"g": {seed: {"gen": {"image_accuracy": .9}} for seed in range(8)},
                 "joint": {seed: {"gen": {"image_accuracy": .9 + x / 100}}
                           for seed, x in enumerate(points)}}
        assert answer_claims(found)[0][-1] == right


def test_synergy_is_compared_as_a_difference_of_differences():
    """Joint training adds 20 points without reduction, and 5 with it: 15 in between."""
    accuracy = {"joint": .9, "u": .7, "share-weights": .6, "u-himix": .55}
    found = {row: {seed: {"und": {HELD_OUT[1]: x + seed / 100}} for seed in (1, 2)}
             for row, x in accuracy.items()}
    assert np.allclose(differences_of(found, HELD_OUT, *accuracy), [15, 15])
    del found["u"][2]                                       # then seed 2 lacks one
    assert np.allclose(differences_of(found, HELD_OUT, *accuracy), [15])


def test_pictures_are_matched_by_what_they_show():
    """A question tells which answers fit it, but not which picture it is about."""
    model, tokenizer, _, dataset, plans = open_run(ROOT / "study" / "trained", CPU)
    split = dataset.split("und", "val", 30)
    exchanged = split._replace(pixels=np.roll(split.pixels, 7, 0))
    right, wrong = (matching(model, tokenizer, each, "und", plans["und"])
                    for each in (split, exchanged))
    assert right["text"] > .9 and right["picture"] > right["chance"] + .3
    assert wrong["picture"] < wrong["chance"] + .15


def test_bench_counts_what_it_times():
    found = bench.bench("tiny", CPU, repeats=1, sides=(4, 6, 20))
    of_gen = sum(can_generate(make_plan(name, 3)) for name in PLANS)
    assert len(found["steps"]) == len(PLANS) + of_gen + 4 and len(found["image_tokens"]) == 15
    for row in found["steps"] + found["image_tokens"]:
        assert row["plan"] != "dense" or row["time_ratio"] == row["flops_ratio"] == 1
    (large,) = (row for row in found["image_tokens"]
                if (row["task"], row["plan"], row["image_tokens"]) == ("und", "himix", 400))
    assert large["flops_ratio"] < .4 and large["time_ratio"] < .9
    assert all(row["same_codes"] == 1 for row in found["drawing"])


def test_depth(results, monkeypatch):
    """Where the image is hidden nowhere, nearly all is right; without it, little is."""
    monkeypatch.setattr(depth, "SCORED", {"und": 15, "gen": 7})
    found = depth.measure(ROOT / "study" / "trained", CPU)
    for of_task in found.values():
        assert len(of_task["attention"]) == 4 and min(of_task["attention"]) > .4
        assert of_task["right"][-1] > .8 > .5 > of_task["right"][0] and len(of_task["right"]) == 5
    depth.draw([found, found], results / "depth.png")
    assert f"| {found['und']['attention'][0]:.2f} |" in depth.table_of([found, found])


def test_photos(results, monkeypatch):
    """Every stage, with two classes of random pictures; its run is matched among ten, too."""
    rng = np.random.default_rng(0)
    for name, brightness in (("dark", 0), ("light", 155)):
        (results / "images" / name).mkdir(parents=True)
        for i in range(120):
            picture = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(brightness)
            Image.fromarray(picture).save(results / "images" / name / f"{i}.png")
    monkeypatch.setattr(photos, "DRAWN", 10)
    monkeypatch.setitem(table.SIZES, "u-few", {"und_scenes": 20})
    args = (results / "images", "--preset", "tiny", "--device", "cpu", "--seeds", 1, "--rows",
            "u-few", "joint", "--out", results / "out", "--steps")
    assert run("photos.py", *args, 30).count("GFLOP a step") == 2
    assert "GFLOP a step" not in run("photos.py", *args, 30)            # nothing is trained twice
    assert "30 steps: expected 31" in run("photos.py", *args, 31, code=2)
    stored = json.loads((results / "photos-tiny.json").read_text())
    assert stored["real"]["accuracy"] > .95 and stored["names"] == ["dark", "light"]
    few, joint = (results / "out" / f"{row}-seed1" for row in ("u-few", "joint"))
    assert set(json.loads((joint / "photos.json").read_text())) >= {"named", "frechet"}
    assert torch.load(few / "checkpoint.pt")["made_with"]["und_scenes"] == 20
    assert run("match.py", joint).count("of ten") == 2
    # Features shifted by 2 in each of 5 numbers: 20. Twice as wide: the trace of the covariance.
    a = torch.randn(300, 5, dtype=torch.float64)
    assert abs(photos.frechet(a, a + 2) - 20) < 1e-6
    a -= a.mean(0)
    assert abs(photos.frechet(a, 2 * a) - a.T.cov().trace()) < 1e-6


def test_the_front_is_drawn_from_a_run(trained, results, monkeypatch):
    front.shrink(trained / "joint", results)
    assert "optimizers" not in open_run(results, CPU)[2]
    real = Shapes("tiny").split("gen", "val", 6, questions=0).pixels    # a tiny run draws nothing
    monkeypatch.setattr(front, "draw", lambda model, tokenizer, texts, *_: real[:len(texts)])
    run("front.py", results, "--device", "cpu")
    assert Image.open(results / "drawing.gif").n_frames > 5
    front.draw_ten_seconds(read_runs(RESULTS / "band"), results / "ten-seconds.png")
    drawn, committed = (np.array(Image.open(folder / "ten-seconds.png"), float)
                        for folder in (results, RESULTS))
    assert abs(drawn - committed).mean() < 2                # other versions' letters differ a bit


def test_what_a_gpu_measures_can_be_rehearsed(monkeypatch):
    monkeypatch.setattr(gpu, "CASES", gpu.CASES[:2])
    lines = run("gpu.py", "--preset", "tiny", "--device", "cpu").splitlines()
    _, *found = (json.loads(line) for line in lines if line.startswith("{"))
    assert len(found) == 8 and all("error" not in result for result in found)
    for result in found[:2]:
        values = result["loss_and_gradient_norm"]
        assert np.allclose(values["float32"], values["two parts"], rtol=1e-4)


@pytest.mark.parametrize("script", ["conflict.py", "photos.py", "depth.py", "match.py"])
def test_bad_options_are_one_line_and_status_2(script, tmp_path):
    printed = run(script, "nowhere", code=2, folder=tmp_path)
    (line,) = [line for line in printed.splitlines() if "error: " in line]
    assert "nowhere" in line and "Traceback" not in printed


def table_under(first_cell):
    lines = STUDY[STUDY.index(f"| {first_cell} |"):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_differences_are_those_of_the_committed_runs():
    """... which the tables of the paper's claims, of controls, of freeze and of picture 1 have."""
    found, earlier = read_runs(RESULTS / "band"), read_runs(RESULTS / "synergy")
    expected = [
        [(HELD_OUT, "joint", "u"), (QUESTIONS, "joint", "u")],
        [(IMAGES, "joint", "g"), (UNSEEN, "joint", "g")],
        [(QUESTIONS, "u-himix", "u"), (HELD_OUT, "u-himix", "u")],
        [(IMAGES, "g-hmgen", "g"), (UNSEEN, "g-hmgen", "g")],
        [(HELD_OUT, "share-image", "joint"), (HELD_OUT, "joint", "u", "share-image", "u-himix")],
        [(HELD_OUT, "share-partial", "share-image"), (QUESTIONS, "share-partial", "share-image"),
         (HELD_OUT, "joint", "u", "share-partial", "u-himix")]]
    rows = table_under("the paper says")
    for row, differences in zip(rows, expected):
        shown = re.findall(r"[-+]?[\d.]+ ± [\d.]+", " ".join(row))
        runs = earlier if "earlier world" in row[2] else found
        values = [mean_std(differences_of(runs, *which), 1, "+") for which in differences]
        assert shown == values, row
    runs = json.loads((RESULTS / "depth-cpu.json").read_text())["runs"].values()
    for layer, task in ((7, "und"), (7, "gen"), (11, "und"), (11, "gen")):
        right = [100 * run[task]["right"][layer - 1] for run in runs]
        assert mean_std(right, 1) in " ".join(rows[-1])
    row_of = {title: row for row, (title, _) in ROWS.items()}
    for title, rate, difference, seeds in table_under(
            "run | held-out pairs | minus understanding only | seeds"):
        runs = {seed: earlier[row_of[title]][seed] for seed in range(1, int(seeds) + 1)}
        assert rate == mean_std(numbers(runs, HELD_OUT, 100), 1), title
        differences = differences_of(earlier, HELD_OUT, row_of[title], "u")[:int(seeds)]
        assert difference == mean_std(differences, 1, "+"), title
    others = "share-image", "joint", "u", "u-freeze", "g"
    for other, row in zip(others, table_under("compared with"), strict=True):
        each = [differences_of(found, score, "freeze-hmgen-practice", other)
                for score in (HELD_OUT, QUESTIONS, IMAGES, UNSEEN)]
        assert row[1:] == [mean_std(x, 1, "+") if x else "" for x in each]
    look = read_runs(RESULTS / "look")
    alone, joint, gain, _ = table_under("held-out pairs, %, seeds 1 / 2; image read after layer")
    for layer, *cells in zip(LOOK, alone[1:], joint[1:], gain[1:], strict=True):
        of_alone, of_joint = (look[f"{task}-look-{layer}"] for task in ("u", "joint"))
        differences = differences_of(look, HELD_OUT, f"joint-look-{layer}", f"u-look-{layer}")
        assert cells == [" / ".join(f"{x:.1f}" for x in numbers(of_alone, HELD_OUT, 100)),
                         " / ".join(f"{x:.1f}" for x in numbers(of_joint, HELD_OUT, 100)),
                         " / ".join(f"{x:+.1f}" for x in differences)]


def test_rows_and_claims_are_those_of_the_committed_runs():
    found = read_runs(RESULTS / "band")
    for title, *cells, seeds in table_under("run | questions | held-out pairs | images"):
        runs = found[re.search(r"\(`(.+)`\)", title)[1]]
        for cell, (_, path, factor, digits) in zip(cells, table.COLUMNS):
            values = numbers(runs, path, factor)
            assert cell == (mean_std(values, digits) if values else ""), title
        assert len(runs) == int(seeds)
    answers = {claim: answer for claim, *answer in answer_claims(found)}
    shown = table_under("claim")
    assert [claim for claim, *_ in shown] == [claim for claim, *_ in table.CLAIMS]
    for claim, points, seeds, p, answer in shown:
        mean, deviation, n, exact_p, expected = answers.get(
            claim, [0, 0, 0, None, "its runs are to come"])
        assert (int(seeds), answer) == (n, expected)
        assert points == (f"{mean:+.1f} ± {deviation:.1f}" if n else "–")
        assert p == "–" if exact_p is None else float(p) == float(f"{exact_p:.2g}")


def test_figures_that_no_script_prints():
    """The gain without the seed that chose the recipe; what reduction takes from it on photographs;
    the least and the largest cosine of all runs' gradients; uniform attention, which is that of
    queries without weights."""
    found = read_runs(RESULTS / "band")
    others = {row: {seed: runs[seed] for seed in runs if seed != 2} for row, runs in found.items()}
    gain = differences_of(others, HELD_OUT, "joint", "u", "share-image", "u-himix")
    p = 2 * p_value(gain, 0)
    assert f"{mean_std(gain, 1, '+')} (7 seeds, p = {p:.3f} without correction)" in STUDY
    rows = "joint", "u", "share-partial", "u-himix"         # without and with reduction
    photographs = {row: {} for row in rows}
    for row, seed in product(rows, (1, 2, 3)):
        file = RESULTS / "photos" / f"{row}-seed{seed}" / "photos.json"
        photographs[row][seed] = json.loads(file.read_text())
    dense, reduced = (differences_of(photographs, ("named",), *pair)
                      for pair in (rows[:2], rows[2:]))
    gain = differences_of(photographs, ("named",), *rows)
    assert f"training adds {mean_std(gain, 1)} points more without reduction" in NOTES
    assert f"joint training names {mean_std(dense, 1)} points\n  more right" in STUDY
    assert f"share partial {mean_std(reduced, 1)} more than HiMix alone" in STUDY
    files = (RESULTS / "band").glob("*-seed*/gradients.json")
    cosines = [cosine for file in files for point in json.loads(file.read_text()).values()
               for cosine in point["all"]["between"]]
    shown = f"single points: {min(cosines):.2f} to {max(cosines):+.2f}".replace("0.", ".")
    assert shown in STUDY.replace("\n  ", " ")
    model, tokenizer, checkpoint, dataset, plans = open_run(ROOT / "study" / "trained", CPU)
    for block in model.blocks:
        block.query["text"].weight.data.zero_()
    titles = ("und", "understanding", "image"), ("gen", "generation", "output")
    for task, title, segment in titles:
        split = dataset.split(task, "val", 256, checkpoint["options"]["seed"], questions=1)
        _, of_output, _ = allocation(model, sequences(task, tokenizer, split), plans[task])
        share = f"{of_output[segment][0]:.2f}".lstrip("0")
        assert re.search(rf"(?m)^\| {title} \|.*\| {re.escape(share)} \|$", STUDY)


def test_the_world_was_chosen_by_these_runs():
    rows = re.findall(r"^\| (\d), (\.\d+) \|(.*)\|$", NOTES, re.M)
    for k, rate, cells in rows:
        found = read_runs(RESULTS / f"pilot-k{k}-lr{rate}")
        columns = ("u", HELD_OUT), ("joint", HELD_OUT), ("joint", IMAGES)
        for cell, (row, path) in zip(cells.split("|"), columns):
            runs = [found[row][seed] for seed in sorted(found.get(row, {}))]
            assert cell.strip() == " / ".join(f"{100 * value(run, path):.1f}" for run in runs)
    assert len(rows) == 5


def test_links_and_commands():
    for text in (STUDY, NOTES):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("http") or (ROOT / "study" / link).exists(), link
        for script, rest in re.findall(r"python (?:study/)?(\w+\.py)([^`\n]*)", text):
            words = shlex.split(rest.rstrip("\\"), comments=True)
            options = [word for word in words if word[:2] == "--"]
            known = run(script, "--help") if options else ""
            assert all(re.search(rf"{word}\b", known) for word in options), (script, options)
