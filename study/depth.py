"""In which layers is the image needed? The attention that it gets (figs. 2, 3), beside a causal
measure: what is still right if no token sees the image from a layer on.

    python study/depth.py RUN [RUN ...]             trained runs; study/results/depth.json and .png

table.py trains twelve narrow layers (--rows deep). Measured are 200 validation pictures and 140
captions of each run. The image is hidden at inference only, by the rule of the naive control: in
these layers image tokens are updated, but are no keys of any token.
"""
import json
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import (fail, hardware, line_chart, pick_device, read_checkpoint, run_script,
                    save_picture, script_parser, write_file)

from PIL import Image
from tqdm import tqdm

import data
import probe
from eval import (answer_all, check_pictures, draw_pictures, generation_loss, sampling_of,
                  understanding_scores)
from model import load_run, sequences
from probe import TITLES
from prune import NAIVE, plans_of
from table import RESULTS, markdown, mean_std

SCORED = {"und": 200, "gen": 140}       # validation pictures with questions, captions to draw


def measure(folder, device):
    """One run: {task: {"attention": [image's share of the output queries' attention in each layer],
    "right": [accuracy if the image is hidden from layer 1 on, from 2 on, ..., nowhere], and for
    generation "loss" of an image token, likewise}}."""
    model, tokenizer, checkpoint = load_run(folder, device)
    options, layers, found = checkpoint["options"], model.config.layers, {}
    if options["data"] != "shapes":
        fail(f"{folder} was trained on {options['data']}: expected the shapes world, whose "
             "pictures can be checked")
    shares, _, _ = probe.measure(model, tokenizer, checkpoint, n=256)
    dataset = data.load_of_run(checkpoint)
    for task, plan in plans_of(checkpoint["tasks"], options, layers).items():
        split = dataset.split(task, "val", SCORED[task], options["seed"])
        batch = sequences(task, tokenizer, split, model.config.und_text).to(device)
        image = "image" if task == "und" else "output"      # generation's image is its output
        found[task] = {"attention": shares[task]["output_queries"][image], "right": []}
        for seen in tqdm(range(layers + 1), desc=f"{folder.name}, {TITLES[task]}", leave=False):
            hidden = plan[:seen] + (NAIVE,) * (layers - seen)
            if task == "und":
                answers, _ = answer_all(model, tokenizer, split, batch, hidden)
                right = understanding_scores(answers)["accuracy"]
            else:
                texts = [caption.text for caption in split.captions]
                pictures = draw_pictures(model, tokenizer, texts, hidden, sampling_of(options))
                right = check_pictures(dataset, split, pictures)[0]["image_accuracy"]
                loss = generation_loss(model, batch, hidden)
                found[task].setdefault("loss", []).append(loss)
            found[task]["right"].append(right)
    return found


def table_of(found):
    """What was found, as a table in Markdown: means over runs, and their standard deviation."""
    def cells(runs, digits, factor=1.):
        return [mean_std([factor * x for x in values], digits) for values in zip(*runs)]

    rows = []
    for task in found[0]:
        runs = [run[task] for run in found]
        rows.append([f"{TITLES[task]}: attention of output queries to the image",
                     *cells([run["attention"] for run in runs], 2), ""])
        rows.append([f"{TITLES[task]}: right, %, if hidden from here on",
                     *cells([run["right"] for run in runs], 1, 100)])
        if "loss" in runs[0]:
            rows.append([f"{TITLES[task]}: loss of an image token, likewise",
                         *cells([run["loss"] for run in runs], 3)])
    layers = range(1, len(rows[0]) - 1)
    return markdown(["layer", *layers, "nowhere"], rows)


def draw(found, path):
    """A chart for each task: both measures by layer, means over runs."""
    sheet = Image.new("RGB", (500 * len(found[0]), 360))
    for column, task in enumerate(found[0]):
        lines = {}
        for name, title in (("attention", "attention"), ("right", "right if hidden from here on")):
            means = map(fmean, zip(*(run[task][name] for run in found)))
            lines[title] = list(enumerate(means, 1))
        title = f"{TITLES[task]}: the image, by layer"
        chart = line_chart(lines, title, "layer (last: nowhere)", 1., (500, 360))
        sheet.paste(chart, (500 * column, 0))
    save_picture(sheet, path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--name", default="depth", help="of the results (default: depth)")
    args = parser.parse_args()
    device = pick_device(args.device)
    checkpoints = [read_checkpoint(folder / "checkpoint.pt", "run") for folder in args.runs]
    if len({(tuple(c["tasks"]), c["config"]["layers"]) for c in checkpoints}) > 1:
        fail("expected runs of the same tasks, with the same number of layers")
    found = {str(folder): measure(folder, device) for folder in args.runs}
    path = RESULTS / f"{args.name}.json"
    write_file(path, json.dumps({"runs": found, "scored": SCORED, "hardware": hardware(device)}))
    runs = list(found.values())
    draw(runs, path.with_suffix(".png"))
    print(f"{table_of(runs)}\n\n{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
