"""Every script's command line, tiny but real; bad options."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import depth
import data
import train
from bench import bench
from conftest import ROOT, run, train_args
from match import log_likelihoods, matching
from model import load_run, understanding
from prune import PLANS, make_plan
from readout import draw_means, named_by, token_labels
from table import answer_claims, check_finished, differences_of, p_values, t_tail


def test_a_run_leaves_what_the_contract_promises(trained):
    folder = trained / "joint"
    assert {f.name for f in folder.iterdir()} >= {"checkpoint.pt", "log.jsonl", "loss.png",
                                                  "eval.json", "samples.png"}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["mfu"] is None
    assert {"loss_und", "loss_gen", "lr", "tokens_per_s", "step_ms",
            "peak_memory_mb"} <= rows[0].keys()
    scores = json.loads((folder / "eval.json").read_text())
    assert {"config", "n", "seconds", "hardware", "und", "gen", "cost"} <= scores.keys()
    assert {"accuracy", "chance", "by_type", "transfer_accuracy", "loss"} <= scores["und"].keys()
    assert {"object_accuracy", "image_accuracy", "by_type", "transfer_object_accuracy", "loss",
            "ceiling"} <= scores["gen"].keys()
    assert {"flops_per_step", "flops_ratio", "paper_flops_ratio"} <= scores["cost"].keys()


def test_eval_and_probe(trained):
    folder = trained / "joint"
    Image.new("RGB", (40, 30), "red").save(trained / "picture.png")
    run("eval.py", folder, "--ask", trained / "picture.png", "what colour is the circle?")
    run("eval.py", folder, "--draw", "a red circle", "--n", 3)
    assert Image.open(folder / "draw.png").width > 300
    run("eval.py", folder, "--gen-plan", "hmgen", "--und-plan", "himix")
    scores = json.loads((folder / "eval-himix-hmgen1.json").read_text())
    assert scores["cost"]["flops_ratio"] < 1
    run("probe.py", folder, "--n", 10)
    run("probe.py", folder, "--n", 10, "--untrained")
    shares = json.loads((folder / "attention.json").read_text())
    for task in ("und", "gen"):
        for of_queries in (shares[task], shares[task]["output_queries"]):
            for layer in range(3):
                total = sum(of_queries[segment][layer]
                            for segment in ("system", "image", "instruction", "output"))
                assert abs(total - 1) < 1e-5


def test_parts_change_nothing(trained):
    for name, extra in (("one", []), ("parts", ["--parts", 2])):
        run("train.py", *train_args(trained, name, "--steps", 10, *extra))
    losses = [json.loads((trained / name / "log.jsonl").read_text())["loss"]
              for name in ("one", "parts")]
    assert max(losses) - min(losses) < 1e-5, losses


def test_the_trained_model_can_be_tried(tmp_path):
    """study/trained as the README uses it: it draws what the caption says, answers, is probed."""
    trained, caption = ROOT / "study" / "trained", "a big yellow circle and a small blue cross"
    here = "--device", "cpu", "--out", tmp_path
    run("eval.py", trained, "--draw", caption, "--n", 1, *here)
    picture = tmp_path / "draw-0.png"
    (seen,) = data.Shapes("cpu").read(np.array(Image.open(picture).convert("RGB"))[None])
    assert {(thing.size, *thing.pair) for thing in seen} == {(1, 3, 0), (0, 2, 3)}
    asked = run("eval.py", trained, "--ask", picture, "what colour is the circle?", *here)
    assert asked.splitlines()[-1] == "yellow"
    run("probe.py", trained, "--n", 8, *here)
    assert {file.name for file in tmp_path.glob("*")} >= {"attention.json", "heatmaps.png"}


def test_image_loss_and_practice(trained):
    """Options that belong to the run: its FLOPs tell of the first, its checkpoint of both."""
    run("train.py", *train_args(trained, "more", "--steps", 10, "--image-loss", "--practice"))
    flops = [json.loads((trained / name / "eval.json").read_text())["cost"]["flops_per_step"]
             for name in ("joint", "more")]
    assert flops[1] > flops[0]
    model, _, checkpoint = load_run(trained / "more", torch.device("cpu"))
    assert model.config.image_loss and checkpoint["options"]["practice"]


@pytest.mark.parametrize("script", ["data.py", "prune.py"])
def test_data_and_prune(tmp_path, script):
    run(script, "--preset", "tiny", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 300


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """A folder with two classes of random pictures, dark and light ones."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, brightness in (("dark", 0), ("light", 155)):
        (folder / name).mkdir()
        for i in range(120):
            picture = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(brightness)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_images(tmp_path, class_folders):
    run("train.py", *train_args(tmp_path, "run", "--data", class_folders, "--steps", 30))
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert "question" in scores["und"]["by_type"] and scores["gen"]["bits_per_token"] > 0
    assert run("match.py", tmp_path / "run", "--n", 20).count("of ten") == 2


def test_long_texts_of_a_folder(tmp_path, class_folders):
    """One that is too long is refused by its line before any work. A question and an answer that
    fit their own partners are matched with those of others."""
    dataset = data.Folder(class_folders, "tiny")
    lines = []
    for i, picture in enumerate(dataset.pixels):
        question, answer = ("what is it?", "it is " + "a " * 20) if i % 2 else ("is " * 25, "a")
        lines.append({"file_name": f"{i}.png", "text": "a picture", "question": question,
                      "answer": answer})
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    args = train_args(tmp_path, "run", "--data", tmp_path, "--steps", 10)

    def write(**change):
        rows = [lines[0], {**lines[1], **change}, *lines[2:]]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    for field in ("text", "question", "answer"):
        write(**{field: "a picture " * 100})
        printed = run("train.py", *args, code=2)
        assert "metadata.jsonl line 2" in printed and "the preset takes 240" in printed
        assert not (tmp_path / "tokenizer.pt").exists()
    write()
    run("train.py", *args)
    assert run("match.py", tmp_path / "run", "--n", 20).count("of ten") == 2


def test_pictures_are_matched_by_what_they_show():
    """A question tells which answers fit it, but not which picture it is about."""
    model, tokenizer, checkpoint = load_run(ROOT / "study" / "trained", torch.device("cpu"))
    split, plan = data.load_of_run(checkpoint).split("und", "val", 30), make_plan("dense", 4)
    rates = matching(model, tokenizer, split, "und", plan)
    assert rates["caption"] > .9 and rates["image"] > rates["chance"] + .3
    exchanged = split._replace(pixels=np.roll(split.pixels, 7, 0))
    rates = matching(model, tokenizer, exchanged, "und", plan)
    assert rates["image"] < rates["chance"] + .15


# ---------------------------------------------------------------------- the study

def test_the_table_trains_what_is_missing(trained, tmp_path, monkeypatch):
    import table
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    args = (trained / "table", "--preset", "tiny", "--steps", 5, "--rows", "u", "joint",
            "joint-shuffled", "--tokenizer", trained / "tokenizer.pt", "--device", "cpu")
    first = run("table.py", *args)
    assert first.count("GFLOP a step") == 3 and "at inference only" in first and "52.86" in first
    assert "GFLOP a step" not in run("table.py", *args)     # nothing is trained twice
    stored = json.loads((tmp_path / "table-tiny.json").read_text())
    assert set(stored["runs"]) == {"u", "u-inference", "joint", "joint-shuffled"}
    assert "cost" not in stored["runs"]["u-inference"]["1"]             # nobody trained like that
    assert Image.open(tmp_path / "table-tiny-samples.png").width > 600
    # Two rows that differ in the world alone: captions beside the wrong pictures.
    logs = [(trained / "table" / f"{row}-seed1" / "log.jsonl").read_text()
            for row in ("joint", "joint-shuffled")]
    losses = [json.loads(log.splitlines()[-1])["loss_gen"] for log in logs]
    assert losses[0] != losses[1]


def test_the_table_of_stored_results(tmp_path, monkeypatch):
    """... is made without training, whatever the rows were when they were trained."""
    import table
    stored = table.RESULTS / "synergy"
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    printed = run("table.py", stored, "--seeds", 0, "--preset", "cpu", "--device", "cpu")
    assert "| joint | 1, 2," in printed
    assert Image.open(tmp_path / "synergy-cpu.png").width > 1000


def test_finished_runs_of_another_size_or_objective_are_refused(tmp_path, capsys):
    options = train.complete({"preset": "cpu"}, torch.device("cpu"))
    check_finished(tmp_path, options)                       # nothing is there yet
    (tmp_path / "eval.json").write_text(json.dumps({"config": options}))
    check_finished(tmp_path, options)
    for changed in ({"preset": "gpu"}, {"steps": 2800}, {"image_loss": True}):
        with pytest.raises(SystemExit):
            check_finished(tmp_path, {**options, **changed})
        assert f"was trained with {list(changed)[0]} " in capsys.readouterr().err


def test_claims_are_tested_seed_by_seed_and_corrected():
    """Differences of 4, 5 and 6 points: t = 5 sqrt(3), of which the two-sided p with 2 degrees of
    freedom is .0131. Holm's correction takes ten times that for the smallest of ten claims."""
    assert abs(t_tail(1, 1) - .25) < 1e-6 and abs(t_tail(-2.365, 7) - .975) < 1e-4
    assert abs(2 * p_values([4, 5, 6], 0)[0] - .0131) < 1e-4
    joint = {seed: {"und": {"accuracy": .9}} for seed in range(1, 20)}

    def answer(*differences):
        alone = {seed: {"und": {"accuracy": .9 - x / 100}} for seed, x in enumerate(differences, 1)}
        return answer_claims({"joint": joint, "u": alone})[0]

    _, mean, deviation, n, p, words = answer(4, 5, 6)       # too few seeds are no answer
    assert abs(mean - 5) < 1e-9 and abs(deviation - 1) < 1e-9
    assert (n, p, words) == (3, None, "3 of 8 seeds")
    eight = 1, 3, -1, 2, 4, 0, 2, 1
    *_, n, p, words = answer(*eight, 50)                    # nor is a ninth one
    assert (n, words) == (8, "undecided") and abs(p - 20 * p_values(eight, 0)[0]) < 1e-9
    assert answer(*(x + 5 for x in eight))[-1] == "holds"
    assert answer(*(x - 9 for x in eight))[-1] == "does not hold"


def test_keeping_is_not_the_lack_of_a_difference():
    """Of images within 2 points, the only claim for which these rows have scores."""
    tight, loose = [.5, -.4, .2, -.1, .3, 0, -.2, .1], [9, -8, 6, -7, 8, -9, 7, -5]
    for differences, right in ((tight, "holds"), (loose, "undecided"),
                               ([x - 5 for x in tight], "does not hold")):
        found = {"g": {i: {"gen": {"image_accuracy": .9}} for i in range(1, 9)},
                 "joint": {i: {"gen": {"image_accuracy": .9 + x / 100}}
                           for i, x in enumerate(differences, 1)}}
        ((*_, answer),) = answer_claims(found)
        assert answer == right


def test_synergy_is_compared_as_a_difference_of_differences():
    """Joint training adds 20 points without reduction, and 5 with it: 15 in between."""
    accuracy = {"joint": .9, "u": .7, "share-all": .6, "u-himix": .55}
    found = {row: {seed: {"und": {"transfer_accuracy": x + seed / 100}} for seed in (1, 2)}
             for row, x in accuracy.items()}
    path = "und", "transfer_accuracy"
    assert np.allclose(differences_of(found, path, *accuracy), [15, 15])
    del found["u"][2]                                       # then seed 2 lacks one
    assert np.allclose(differences_of(found, path, *accuracy), [15])


def test_bench_counts_what_it_times():
    found = bench("tiny", 1, 1, torch.device("cpu"), False, repeats=2, sides=(4, 12, 32))
    assert len(found["steps"]) == 3 * (2 * len(PLANS) - 1) and len(found["image_tokens"]) == 12
    for row in found["steps"] + found["image_tokens"]:
        assert row["ms_range"][0] <= row["ms"] <= row["ms_range"][1]
        assert row["plan"] != "dense" or row["time_ratio"] == 1
    large = {row["plan"]: row for row in found["image_tokens"]
             if (row["task"], row["image_tokens"]) == ("und", 1024)}
    assert large["himix"]["flops_ratio"] < .2 and large["himix"]["time_ratio"] < .6
    assert large["himix"]["memory_mb"] < large["dense"]["memory_mb"] / 2
    for row in found["drawing"]:
        assert row["same_codes"] == 1 and row["cached_images_per_s"] > row["uncached_images_per_s"]


def test_compare_times_steps_of_one_size(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    compare.compare("tiny", 2, 2, False, torch.device("cpu"))
    rows = json.loads((tmp_path / "compare-tiny.json").read_text())["rows"]
    for task in ("und", "gen"):
        steps = [row for row in rows if row["task"] == task]
        assert {"ours", "ours, AdamW alone", "GPT, usual"} <= {row["step"] for row in steps}
        assert len({(row["length"], row["batch_size"]) for row in steps}) == 1


def test_depth(trained, tmp_path, monkeypatch):
    """Where the image is hidden nowhere, scores are those of eval.py; hiding it changes them."""
    size = data.PRESETS["tiny"]
    monkeypatch.setattr(depth, "SCORED", {"und": size.und_val, "gen": size.gen_val})
    found = depth.measure(trained / "joint", torch.device("cpu"))
    scores = json.loads((trained / "joint" / "eval.json").read_text())
    for of_task in found.values():
        assert len(of_task["attention"]) == size.layers and min(of_task["attention"]) > .05
        assert len(of_task["right"]) == size.layers + 1
    loss = found["gen"]["loss"]
    assert loss[-1] == pytest.approx(scores["gen"]["loss"])
    assert len(set(loss)) == size.layers + 1
    assert found["und"]["right"][-1] == pytest.approx(scores["und"]["accuracy"])
    depth.draw([found, found], tmp_path / "depth.png")
    line = depth.table_of([found, found]).splitlines()[2]
    assert f"| {found['und']['attention'][0]:.2f} |" in line


def test_readout(trained, tmp_path):
    """Places can be read from embeddings, into which they were put. Labels say what a patch shows,
    questions how they name their object, and a run on other data is refused."""
    world = data.Shapes("tiny")
    labels, is_last = token_labels(world, [(data.Thing(1, 2, 0, 3),), (data.Thing(0, 0, 1, 0),)])
    shown = labels[0, labels[0, :, 0] >= 0].tolist()
    assert shown == 4 * [[1, 2, 0, 3]] and is_last.sum(1).tolist() == [1, 1] and is_last[0, -1]
    names = {"size": data.SIZE_NAMES, "colour": data.COLOUR_NAMES, "shape": data.SHAPES,
             "cell": world.cell_names}
    for text, kind, name in (("is the red circle small or big?", "size", "colour and shape"),
                             ("what colour is the top-left object?", "colour", "cell"),
                             ("what shape is the big red object?", "shape", "size and colour")):
        assert named_by(data.Question(text, "", kind), names) == name

    shutil.copy(trained / "joint" / "checkpoint.pt", tmp_path)
    assert "| shape, last token, held-out pairs |" in run("readout.py", tmp_path)
    found = json.loads((tmp_path / "readout.json").read_text())
    for task in ("und", "gen"):
        for fields in found["tokens"][task].values():
            assert len(fields["cell"]["trained"]) == 4 and fields["cell"]["trained"][0] > .95
    draw_means({tmp_path / "joint-seed1": found, tmp_path / "joint-seed2": found}, tmp_path / "all")
    means = json.loads((tmp_path / "all.json").read_text())["gen"]["joint"]
    assert means["seeds"] == 2 and means["known pairs"]["standard_deviation"] == 4 * [0]
    assert means["known pairs"]["mean"] == found["tokens"]["gen"]["last token"]["shape"]["trained"]
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    torch.save({**checkpoint, "options": {**checkpoint["options"], "data": "cats"}},
               tmp_path / "checkpoint.pt")
    printed = run("readout.py", tmp_path, code=2)
    assert printed.count("error: ") == 1 and "cats" in printed


def test_photos(tmp_path, class_folders, monkeypatch):
    import photos
    for name, smaller in (("RESULTS", tmp_path), ("DRAWN", 10), ("FEW", 7)):
        monkeypatch.setattr(photos, name, smaller)
    args = (class_folders, "--preset", "tiny", "--device", "cpu", "--seeds", 1, "--rows", "u-few",
            "joint", "--out", tmp_path / "out", "--steps")
    assert run("photos.py", *args, 30).count("GFLOP a step") == 2
    assert "GFLOP a step" not in run("photos.py", *args, 30)            # nothing is trained twice
    assert "with steps 30: expected 31" in run("photos.py", *args, 31, code=2)
    stored = json.loads((tmp_path / "photos-tiny.json").read_text())
    assert stored["real"]["accuracy"] > .95 and stored["names"] == ["dark", "light"]
    assert set(stored["runs"]["u-few"]["1"]["photos"]) == {"named"}
    assert set(stored["runs"]["joint"]["1"]["photos"]) == {"named", "drawn_right", "frechet"}
    assert Image.open(tmp_path / "photos-tiny-samples.png").height > 400

    dataset, names = photos.read_classes(class_folders, "tiny")
    few = photos.FewLabels(dataset).split("und", "train", 200)
    assert sorted(caption.text for caption in few.captions) == 7 * ["dark"] + 7 * ["light"]
    assert few.questions[0][0].answer == few.captions[0].text
    model, tokenizer, _ = load_run(tmp_path / "out" / "joint-seed1", torch.device("cpu"))
    plan, question = make_plan("dense", 3), few.questions[0][0].text
    together = photos.name_likelihoods(model, tokenizer, plan, few.pixels, question, names)
    codes = tokenizer.encode(few.pixels)
    for k, name in enumerate(names):
        batch = understanding(tokenizer, codes, [[(question, name)]] * len(codes))
        assert torch.allclose(together[:, k], log_likelihoods(model, batch, plan), atol=1e-4)


def test_frechet_distance_of_features():
    """Shifted by 2 in each of 5 numbers: 20. Twice as wide: the trace of the covariance."""
    from photos import frechet
    a = torch.randn(300, 5, dtype=torch.float64)
    assert abs(frechet(a, a + 2) - 20) < 1e-6
    a -= a.mean(0)
    assert abs(frechet(a, 2 * a) - a.T.cov().trace()) < 1e-6


# ---------------------------------------------------------------------- bad options

@pytest.mark.parametrize("args, complaint", [
    (("train.py", "--und-plan", "fast"), "expected one of dense"),
    (("train.py", "--gen-plan", "himix"), "--gen-plan himix"),
    (("train.py", "--gen-plan", "hmgen", "--shallow", "9", "--preset", "tiny"), "expected 0 to 1"),
    (("train.py", "--objective", "und", "--gen-plan", "hmgen"), "no such task"),
    (("train.py", "--practice", "--data", "somewhere"), "same pictures"),
    (("train.py", "--steps", "-1"), "--steps"),
    (("train.py", "--batch-size", "0"), "--batch-size"),
    (("train.py", "--objective", "und", "--projections", "task"), "--projections task"),
    (("train.py", "--seed", "-1"), "--seed -1"),
    (("train.py", "--seed", str(2 ** 70)), "--seed"),
    (("train.py", "--lr", "nan"), "--lr nan"),
    (("train.py", "--save-every", "-1"), "--save-every -1"),
    (("train.py", "--parts", "3"), "divisor"),
    (("train.py", "--preset", "huge"), "invalid choice"),
    (("prune.py", "--out", "masks.jpg"), "ends in .png"),
    (("tokenizer.py", "--steps", "0"), "--steps 0"),
    (("eval.py", "x", "--n", "0"), "--n"),
    (("probe.py", "x", "--n", "0"), "--n"),
    (("train.py", "--data", "nowhere"), "nowhere"),
    (("train.py", "--device", "cuda"), "--device cuda"),
    (("train.py", "--resume", "--out", "nowhere"), "nowhere"),
    (("eval.py", "nowhere"), "nowhere"),
    (("probe.py", "nowhere"), "nowhere"),
    (("readout.py", "nowhere"), "nowhere"),
    (("photos.py", "nowhere"), "nowhere"),
    (("table.py", "nowhere", "--seeds", "0", "--preset", "tiny"), "nowhere")])
def test_bad_options_are_one_line_and_status_2(args, complaint, tmp_path):
    if args[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    printed = run(*args, code=2, folder=tmp_path)
    (line,) = [line for line in printed.splitlines() if "error: " in line]
    assert complaint in line and "Traceback" not in printed


def test_a_script_is_a_script(tmp_path):
    """The one test that starts a script as the README does."""
    done = subprocess.run([sys.executable, ROOT / "eval.py", "nowhere"], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
