"""What image tokens know, layer by layer: can an object's shape, colour, size and cell be read from
the tokens that show it?

    python study/readout.py out/table/{u,joint}-seed*       tables
        --chart readout-cpu         and study/results/readout-cpu.json and .png: means over seeds

A readout is ridge regression from hidden states to one-hot labels, fitted on some validation
pictures and tested on others, and on objects of held-out pairs.
"""
import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from table import RESULTS, markdown, open_run
from common import (fail, line_chart, pick_device, run_script, save_picture, script_parser,
                    write_file)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from eval import BATCH
from model import generation, understanding
from shapes import BACKGROUND, Thing

PICTURES = 900          # two thirds of them to fit on, one third to test on
RIDGE = .01             # the penalty, as a share of what each standardised feature weighs
FIELDS = Thing._fields[:4]                                  # size, colour, shape, cell
PAIRS = {"last token": "known pairs", "last token, held-out pairs": "held-out pairs"}


def distinct_scenes(dataset, part, n, seed):
    """Up to n scenes of a part, no two of which look alike (but for where in its cell an object
    lies): a readout that was fitted on one of them would know the others."""
    found = {}                                              # look -> its first scene
    for scene in dataset.split("und", part, 2 * n, seed, questions=0).scenes:
        found.setdefault(tuple(thing[:4] for thing in scene), scene)
    return list(found.values())[:n]


def token_labels(dataset, scenes, side):
    """What image tokens show: labels (B, M, 4), the FIELDS of the object that a token's patch has
    most of, -1 for background alone; and is_last (B, M) bool, the last token of each object: as
    attention is causal, the only one that has seen all of it."""
    patch = dataset.image_size // side
    labels = torch.full((len(scenes), side ** 2, len(FIELDS)), -1)
    is_last = torch.zeros(len(scenes), side ** 2, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        alone = dataset.render([(thing,) for thing in scene])           # (objects, H, W, 3)
        is_ink = (alone != BACKGROUND).any(-1)                          # (objects, H, W)
        ink = is_ink.reshape(len(scene), side, patch, side, patch).sum((2, 4))
        ink = ink.reshape(len(scene), -1)                               # (objects, M), in pixels
        owner = np.where(ink.any(0), ink.argmax(0), -1)                 # (M,) an object, or -1
        for number, thing in enumerate(scene):
            tokens = np.flatnonzero(owner == number)
            labels[row, tokens] = torch.tensor(thing[:4])
            is_last[row, tokens[-1]] = True
    return labels, is_last


@torch.no_grad()
def hidden_states(model, batch, plan, chosen):
    """The states of the `chosen` (B, M) image tokens after the layers of `plan`, the first ones of
    the model's: (tokens, d), float64, on the CPU."""
    before, m, _ = batch.layout
    states = [model.gathered(batch.rows(slice(i, i + BATCH)), plan)[:, before:before + m].cpu()
              for i in range(0, len(batch.tokens), BATCH)]
    return torch.cat(states)[chosen].double()


def readout(states, labels, to_fit, to_test):
    """The share of test tokens whose label is read right, {field: accuracy}. states: (tokens, d).
    labels: (tokens, 4). to_fit, to_test: (tokens,) bool."""
    center, scale = states[to_fit].mean(0), states[to_fit].std(0).clamp(min=1e-9)
    states = (states - center) / scale
    fitted, tested = states[to_fit], states[to_test]
    penalty = RIDGE * len(fitted) * torch.eye(states.size(1), dtype=states.dtype)
    factor = torch.linalg.cholesky(fitted.T @ fitted + penalty)
    accuracy = {}
    for field, label in zip(FIELDS, labels.T):
        one_hot = F.one_hot(label)[to_fit].double()                     # (fitted, classes)
        share = one_hot.mean(0)                             # the constant, as features are centred
        weights = torch.cholesky_solve(fitted.T @ (one_hot - share), factor)    # (d, classes)
        guess = (tested @ weights + share).argmax(1)
        accuracy[field] = (guess == label[to_test]).double().mean().item()
    return accuracy


def study(folder, device):
    """What is read from a run's image tokens while it looks at them ("und") and while it draws them
    ("gen"): {task: {tokens: {field: [the embedding, then after each layer; a guess: the most
    frequent class of the tokens fitted]}}}."""
    model, tokenizer, checkpoint, dataset, plans = open_run(folder, device)
    seed = checkpoint["options"]["seed"]
    if not hasattr(dataset, "render"):
        fail(f"{folder}: expected a run of the shapes world, which says what an image token shows")
    known = distinct_scenes(dataset, "val", PICTURES, seed)
    scenes = known + distinct_scenes(dataset, "held_out", PICTURES // 2, seed)
    labels, is_last = token_labels(dataset, scenes, model.config.side)
    pairs = torch.tensor(sorted(dataset.held_out["und"]))               # (pairs, 2)
    is_held_out = (labels[..., None, 1:3] == pairs).all(-1).any(-1)     # (B, M)
    # Every third known picture is tested on: looks that come often come first.
    number = torch.arange(len(scenes))[:, None]
    to_fit, to_test = ((number < len(known)) & x for x in (number % 3 != 0, number % 3 == 0))
    print(f"\n{folder}: {to_fit.sum()} pictures to fit on, {to_test.sum()} to test on")    # (B, 1)
    shown = labels[..., 0] >= 0                             # (B, M), the tokens that show something
    labels = labels[shown]                                  # (tokens, 4)
    # Of each readout: which tokens, to fit on and to test.
    groups = {"all tokens": (shown, to_fit, to_test), "last token": (is_last, to_fit, to_test),
              "last token, held-out pairs": (is_last, to_fit, is_held_out)}
    # Questions come after the image, so its tokens do not see them; nor is there a caption.
    codes = tokenizer.encode(dataset.render(scenes))
    batches = {"und": understanding(tokenizer, codes, [[]] * len(scenes), length=0),
               "gen": generation(tokenizer, codes, [""] * len(scenes))}
    found = {}
    for task, plan in plans.items():
        batch, found[task] = batches[task].to(device), {}
        states = [hidden_states(model, batch, plan[:layers], shown)
                  for layers in range(len(plan) + 1)]
        for name, (tokens, *parts) in groups.items():
            fit, test = ((tokens & part)[shown] for part in parts)      # (tokens,) both
            read = [readout(of_layer, labels, fit, test) for of_layer in states]
            chance = (labels[test] == labels[fit].mode(0).values).double().mean(0).tolist()
            found[task][name] = {field: [*(of_layer[field] for of_layer in read), guess]
                                 for field, guess in zip(FIELDS, chance)}
    return found


def table_of(found):
    """The shares that are read right, as a table in Markdown."""
    rows = [(task, f"{field}, {name}", *(f"{100 * x:.1f}" for x in fields[field]))
            for task in found for name, fields in found[task].items() for field in FIELDS]
    layers = [f"layer {i}" for i in range(1, len(rows[0]) - 3)]
    return markdown(["task", "read, %", "embedding", *layers, "chance"], rows, 2)


def means_of(runs):
    """How well shapes are read from the last token of an object: {task: {row: {pairs: mean and
    standard deviation over the row's seeds}}}. runs: {folder: what `study` found}."""
    means = defaultdict(lambda: defaultdict(dict))
    rows = {folder.name.rsplit("-seed", 1)[0] for folder in runs}
    for row, task, (group, pairs) in product(sorted(rows), ("und", "gen"), PAIRS.items()):
        shares = [found[task][group]["shape"][:-1] for folder, found in runs.items()
                  if folder.name.rsplit("-seed", 1)[0] == row and task in found]
        if shares:
            means[task][row]["seeds"] = len(shares)
            means[task][row][pairs] = {
                "mean": list(map(fmean, zip(*shares))),
                "standard_deviation": [stdev(x) if len(x) > 1 else None for x in zip(*shares)]}
    return means


def draw_means(means, path):
    """A chart for each task and either kind of pairs."""
    sheet = Image.new("RGB", (480 * len(PAIRS), 360 * len(means)))
    for (x, pairs), (y, task) in product(enumerate(PAIRS.values()), enumerate(means)):
        # Rows of both tasks first: they have one colour in all charts.
        rows = sorted(means[task], key=lambda row: -sum(row in rows for rows in means.values()))
        lines = {row: means[task][row][pairs]["mean"] for row in rows}
        verb = "looking" if task == "und" else "drawing"
        title = f"{verb}, {pairs}: shape read right, from the embedding to the last layer"
        sheet.paste(line_chart(lines, title, 0, 1, (480, 360)), (480 * x, 360 * y))
    save_picture(sheet, path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of trained runs")
    parser.add_argument("--chart", metavar="NAME", help="study/results/NAME.json and .png")
    args = parser.parse_args()
    device, runs = pick_device(args.device), {}
    for folder in args.runs:
        runs[folder] = study(folder, device)
        print(f"\n{table_of(runs[folder])}")
    if args.chart:
        path, means = RESULTS / f"{args.chart}.json", means_of(runs)
        write_file(path, json.dumps(means, indent=1))
        draw_means(means, path.with_suffix(".png"))
        print(f"\n{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
