"""What image tokens know, layer by layer: can an object's shape, colour, size and cell be read from
the tokens that show it? And how well does understanding find objects by each of these?

    python study/readout.py out/joint out/u         readout.json in each run's folder, tables
    python study/readout.py study/results/synergy/{u,joint}-seed* --chart readout-cpu
        also study/results/readout-cpu.json and .png: means over the seeds of each row

A readout is ridge regression from hidden states to one-hot labels, fitted on some validation
pictures and tested on others, and on objects of pairs that understanding never trains on. Only the
shapes world says what a patch shows.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import (fail, hardware, line_chart, pick_device, run_script, save_picture,
                    script_parser, write_file)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from data import BACKGROUND, COLOUR_NAMES, NAMED_BY, PATCH, PRESETS, SHAPES, SIZE_NAMES, Thing
from eval import BATCH, answer_all
from model import Model, generation, load_run, sequences, understanding
from prune import plans_of
from table import RESULTS, markdown

PICTURES = 900          # two thirds of them to fit on, one third to test on
RIDGE = .01             # the penalty, as a share of what each standardised feature weighs
FIELDS = Thing._fields[:4]                                  # size, colour, shape, cell
ASKS_FOR = {"colour": "colour", "shape": "shape", "size": "size", "place": "cell"}  # kind: field


# ---------------------------------------------------------------------- what tokens show

def distinct_scenes(dataset, part, n, seed):
    """Up to n scenes of understanding's "val" or "transfer", no two of which look alike (but for
    where in its cell an object lies). Pictures with one object come again and again, and a readout
    that was fitted on one of them would know the others."""
    found = {}                                              # look -> its first scene
    for scene in dataset.split("und", part, 2 * n, seed, questions=0).scenes:
        found.setdefault(tuple(thing[:4] for thing in scene), scene)
    return list(found.values())[:n]


def token_labels(dataset, scenes):
    """What image tokens show. Returns labels (B, M, 4), the FIELDS of the object that a token's
    patch has most of, -1 for background alone; and is_last (B, M) bool, the last token of each
    object in raster order: as attention is causal, the only one that has seen all of it."""
    side = dataset.image_size // PATCH
    labels = torch.full((len(scenes), side ** 2, len(FIELDS)), -1)
    is_last = torch.zeros(len(scenes), side ** 2, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        alone = dataset.render([(thing,) for thing in scene])           # (objects, H, W, 3)
        is_ink = (alone != BACKGROUND).any(-1)                          # (objects, H, W)
        ink = is_ink.reshape(len(scene), side, PATCH, side, PATCH).sum((2, 4))
        ink = ink.reshape(len(scene), -1)                               # (objects, M), in pixels
        owner = np.where(ink.any(0), ink.argmax(0), -1)                 # (M,) an object, or -1
        for number, thing in enumerate(scene):
            tokens = np.flatnonzero(owner == number)
            labels[row, tokens] = torch.tensor(thing[:4])
            is_last[row, tokens[-1]] = True
    return labels, is_last


# ---------------------------------------------------------------------- the readout

@torch.no_grad()
def hidden_states(model, batch, plan, chosen):
    """The states of the image tokens that `chosen` (B, M) picks, after as many layers as `plan` has
    (the model's, or the first rules of it): (tokens, d), float64, on the CPU."""
    before, m, _ = batch.layout
    states = []
    for i in range(0, len(batch.tokens), BATCH):
        x = model.gathered(batch.rows(slice(i, i + BATCH)), plan)[:, before:before + m]
        states.append(x.cpu()[chosen[i:i + BATCH]])
    return torch.cat(states).double()


def readout(states, labels, to_fit, to_test):
    """The share of test tokens whose label is read right, {field: accuracy}.

    states: (tokens, d). labels: (tokens, 4). to_fit, to_test: (tokens,) bool. A class's score is
    linear. Features are centred, so its constant is the class's share.
    """
    center, scale = states[to_fit].mean(0), states[to_fit].std(0).clamp(min=1e-9)
    states = (states - center) / scale
    fitted, tested = states[to_fit], states[to_test]
    penalty = RIDGE * len(fitted) * torch.eye(states.size(1), dtype=states.dtype)
    factor = torch.linalg.cholesky(fitted.T @ fitted + penalty)
    accuracy = {}
    for field, label in zip(FIELDS, labels.T):
        one_hot = F.one_hot(label)[to_fit].double()                     # (fitted, classes)
        share = one_hot.mean(0)
        weights = torch.cholesky_solve(fitted.T @ (one_hot - share), factor)    # (d, classes)
        guess = (tested @ weights + share).argmax(1)
        accuracy[field] = (guess == label[to_test]).double().mean().item()
    return accuracy


def read_tokens(model, untrained, tokenizer, dataset, plans, seed):
    """What is read from image tokens while the model looks at them (plans["und"]) and while it
    draws them (plans["gen"]): {task: {tokens: {field: {"trained": [the embedding, then after each
    layer], "untrained", "chance" and "tested", the number of tokens}}}}; and how many pictures were
    fitted on and tested.

    Before training every layer is the identity, so "untrained" is one number. "chance" is the
    accuracy of always saying the most frequent class of the tokens to fit on.
    """
    known = distinct_scenes(dataset, "val", PICTURES, seed)
    scenes = known + distinct_scenes(dataset, "transfer", PICTURES // 2, seed)
    labels, is_last = token_labels(dataset, scenes)
    pairs = torch.tensor(sorted(dataset.held_out["und"]))               # (pairs, 2)
    is_held_out = (labels[..., None, 1:3] == pairs).all(-1).any(-1)     # (B, M)
    number = torch.arange(len(scenes))
    # Every third known picture is tested on: looks that come often come first.
    to_fit = (number < len(known)) & (number % 3 != 0)                  # (B,)
    to_test = (number < len(known)) & (number % 3 == 0)
    pictures = {"fitted": int(to_fit.sum()), "tested": int(to_test.sum()),
                "held_out": len(scenes) - len(known)}
    to_fit, to_test = (mask[:, None].expand_as(is_last) for mask in (to_fit, to_test))
    # The tokens to fit on, and those to test, of each readout: (B, M).
    groups = {"all tokens": (to_fit, to_test),
              "last token": (to_fit & is_last, to_test & is_last),
              "last token, held-out pairs": (to_fit & is_last, is_held_out & is_last)}
    shown = labels[..., 0] >= 0                             # (B, M), the tokens that show something
    labels = labels[shown]                                  # (tokens, 4)
    groups = {name: (fit[shown], test[shown]) for name, (fit, test) in groups.items()}

    # Questions come after the image, so its tokens do not see them; nor is there a caption.
    codes = tokenizer.encode(dataset.render(scenes))
    batches = {"und": understanding(tokenizer, codes, [[]] * len(scenes)),
               "gen": generation(tokenizer, codes, [""] * len(scenes))}
    found = {}
    for task, plan in plans.items():
        batch = batches[task].to(model.device)

        def read(network, first_layers):
            states = hidden_states(network, batch, first_layers, shown)
            return {name: readout(states, labels, *masks) for name, masks in groups.items()}

        by_layer = [read(model, plan[:layers]) for layers in range(len(plan) + 1)]
        before_training = read(untrained, plan)
        found[task] = {}
        for name, (fit, test) in groups.items():
            chance = (labels[test] == labels[fit].mode(0).values).double().mean(0).tolist()
            found[task][name] = {
                field: {"trained": [accuracy[name][field] for accuracy in by_layer],
                        "untrained": before_training[name][field],
                        "chance": of_most_frequent, "tested": int(test.sum())}
                for field, of_most_frequent in zip(FIELDS, chance)}
    return found, pictures


# ---------------------------------------------------------------------- questions

def named_by(question, names):
    """The fields by which a question of a kind in NAMED_BY names its object, as its words tell.
    names: {field: words}."""
    words = question.text.rstrip("?").split()
    # "is the red circle small or big?" has words for sizes, but names nothing by its size.
    usable = set().union(*NAMED_BY[question.kind])
    return " and ".join(field for field in FIELDS
                        if field in usable and not set(words).isdisjoint(names[field]))


def questions_by_name(model, tokenizer, dataset, plan, n, seed):
    """{kind: {how the object is named: {"accuracy", "any_object", "n"}}}, for questions about
    pictures with several objects: where there is only one, none has to be found.

    "any_object": the accuracy of who answers with what is true of one of the objects, at random.
    """
    names = {"size": SIZE_NAMES, "colour": COLOUR_NAMES, "shape": SHAPES,
             "cell": dataset.cell_names}
    split = dataset.split("und", "val", n, seed)
    batch = sequences("und", tokenizer, split, model.config.und_text).to(model.device)
    answers, _ = answer_all(model, tokenizer, split, batch, plan)
    groups = defaultdict(list)                  # (kind, named by) -> [(right, share of objects)]
    for scene, of_picture in zip(split.scenes, answers):
        for question, _, right in of_picture:
            if len(scene) > 1 and question.kind in ASKS_FOR:
                field = ASKS_FOR[question.kind]
                fitting = fmean(names[field][getattr(thing, field)] == question.answer
                                for thing in scene)
                groups[question.kind, named_by(question, names)].append((right, fitting))
    found = {kind: {} for kind in ASKS_FOR}
    for kind, name in sorted(groups):
        right, fitting = zip(*groups[kind, name])
        found[kind][name] = {"accuracy": fmean(right), "any_object": fmean(fitting),
                             "n": len(right)}
    return found


# ---------------------------------------------------------------------- one run

def study(folder, device):
    """All of one run, as readout.json has it."""
    model, tokenizer, checkpoint = load_run(folder, device)
    options, seed = checkpoint["options"], checkpoint["options"]["seed"]
    if options["data"] != "shapes":
        fail(f"{folder} was trained on {options['data']}: expected the shapes world, which alone "
             "says what an image token shows")
    plans = plans_of(checkpoint["tasks"], options, model.config.layers)
    torch.manual_seed(seed)                                 # as train.py begins
    untrained = Model(model.config, tokenizer.vq.codebook.cpu()).to(device).eval()
    dataset = data.load("shapes", options["preset"])
    tokens, pictures = read_tokens(model, untrained, tokenizer, dataset, plans, seed)
    questions = {}
    if "und" in plans:
        questions = questions_by_name(model, tokenizer, dataset, plans["und"],
                                      PRESETS[options["preset"]].und_val, seed)
    return {"tokens": tokens, "pictures": pictures, "questions": questions,
            "config": {**options, "step": checkpoint["step"], "ridge": RIDGE},
            "hardware": hardware(device)}


def percent(share):
    return f"{100 * share:.1f}"


def token_table(tokens):
    """read_tokens' shares, as a table in Markdown."""
    rows = []
    for task, groups in tokens.items():
        for field in ("shape", "colour", "size", "cell"):
            for name, fields in groups.items():
                scores = fields[field]
                shares = *scores["trained"], scores["untrained"], scores["chance"]
                rows.append((task, f"{field}, {name}", *map(percent, shares)))
    layers = [f"layer {i}" for i in range(1, len(rows[0]) - 4)]
    return markdown(["task", "read, %", "embedding", *layers, "untrained", "chance"], rows, 2)


def tables(found):
    """What was found of one run, as two tables in Markdown."""
    rows = [(kind, name, scores["n"], percent(scores["accuracy"]), percent(scores["any_object"]))
            for kind, names in found["questions"].items() for name, scores in names.items()]
    asked = markdown(["question", "object named by", "n", "right, %", "any object, %"], rows, 2)
    return f"{token_table(found['tokens'])}\n\n{asked}"


# ---------------------------------------------------------------------- several runs

def draw_means(runs, path):
    """How well shapes are read from the last token of an object, of known and of held-out pairs:
    means over the seeds of each row, in a JSON and a chart. runs: {folder: what `study` found}."""
    rows = defaultdict(lambda: defaultdict(list))           # task -> row -> its runs
    for folder, found in runs.items():
        for task, tokens in found["tokens"].items():
            rows[task][folder.name.rsplit("-seed", 1)[0]].append(tokens)
    groups = {"last token": "known pairs", "last token, held-out pairs": "held-out pairs"}
    contents, sheet = {}, Image.new("RGB", (960, 360 * len(rows)))
    for y, (task, of_task) in enumerate(rows.items()):
        for x, (group, title) in enumerate(groups.items()):
            lines = {}
            for row, of_row in of_task.items():
                layers = list(zip(*(tokens[group]["shape"]["trained"] for tokens in of_row)))
                means = list(map(fmean, layers))
                deviations = list(map(stdev, layers)) if len(of_row) > 1 else None
                contents.setdefault(task, {}).setdefault(row, {"seeds": len(of_row)})[title] = {
                    "mean": means, "standard_deviation": deviations}
                lines[row] = list(enumerate(means))
            verb = "looking" if task == "und" else "drawing"
            title = f"{verb}: shape read from an object's last token, {title}"
            sheet.paste(line_chart(lines, title, "layer", 1., (480, 360)), (480 * x, 360 * y))
    write_file(path.with_suffix(".json"), json.dumps(contents, indent=1))
    save_picture(sheet, path.with_suffix(".png"))
    print(f"\n{path}.json, {path}.png")


def main():
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of trained runs")
    parser.add_argument("--chart", metavar="NAME", help="study/results/NAME.json and .png")
    args = parser.parse_args()
    device, runs = pick_device(args.device), {}
    for folder in args.runs:
        found = runs[folder] = study(folder, device)
        write_file(folder / "readout.json", json.dumps(found, indent=1))
        n = found["pictures"]
        print(f"\n{folder}: fitted on {n['fitted']} pictures, tested on {n['tested']} others, "
              f"and on {n['held_out']} with held-out pairs\n\n{tables(found)}")
    if args.chart:
        draw_means(runs, RESULTS / args.chart)


if __name__ == "__main__":
    run_script(main)
