"""In which layers is the image needed? The attention that it gets (figs. 2, 3), beside a causal
measure: what is still right if no token sees the image from a layer on.

    python study/depth.py RUN [RUN ...]             trained runs; study/results/depth.json and .png

The image is hidden at inference only, by the rule of the naive control: in these layers image
tokens are updated, but no token attends to them.
"""
import json
from pathlib import Path
from statistics import fmean

from table import RESULTS, markdown, mean_std, open_run
from common import (fail, hardware, line_chart, pick_device, run_script, save_picture,
                    script_parser, write_file)

from PIL import Image
from tqdm import tqdm

from eval import SCORES
from model import sequences
from probe import TITLES, allocation
from prune import NAIVE

SCORED = {"und": 200, "gen": 140}       # validation pictures with questions, captions to draw


def measure(folder, device):
    """One run: {task: {"attention": [image's share of the output queries' attention in each layer],
    "right": [accuracy if the image is hidden from layer 1 on, from 2 on, ..., nowhere]}}."""
    model, tokenizer, checkpoint, dataset, plans = open_run(folder, device)
    layers, seed, found = model.config.layers, checkpoint["options"]["seed"], {}
    if not hasattr(dataset, "check"):
        fail(f"{folder}: expected a run of the shapes world, whose pictures can be checked")
    for task, plan in plans.items():
        batch = sequences(task, tokenizer, dataset.split(task, "val", 256, seed, questions=1))
        _, of_output, _ = allocation(model, batch.to(device), plan)
        image = "image" if task == "und" else "output"      # generation's image is its output
        found[task] = {"attention": of_output[image], "right": []}
        accuracy = "accuracy" if task == "und" else "image_accuracy"
        for seen in tqdm(range(layers + 1), desc=f"{folder.name}, {TITLES[task]}", leave=False):
            hidden = plan[:seen] + (NAIVE,) * (layers - seen)
            scores, _ = SCORES[task](model, tokenizer, hidden, dataset, "val", SCORED[task], seed)
            found[task]["right"].append(scores[accuracy])
    return found


def table_of(found):
    """What was found, as a table in Markdown: means over runs, and their standard deviation."""
    rows = []
    for task in found[0]:
        attention, right = (zip(*(run[task][name] for run in found))
                            for name in ("attention", "right"))
        rows.append([f"{TITLES[task]}: attention of output queries to the image",
                     *(mean_std(values, 2) for values in attention), ""])
        rows.append([f"{TITLES[task]}: right, %, if it is hidden from here on",
                     *(mean_std([100 * x for x in values], 1) for values in right)])
    return markdown(["layer", *range(1, len(rows[0]) - 1), "nowhere"], rows)


def draw(found, path):
    """A chart for each task: both measures by layer, means over runs."""
    sheet = Image.new("RGB", (500 * len(found[0]), 360))
    for column, task in enumerate(found[0]):
        attention, right = (list(map(fmean, zip(*(run[task][name] for run in found))))
                            for name in ("attention", "right"))
        # What is right goes on to "hidden nowhere"; there, attention is drawn level.
        lines = {"attention": attention + attention[-1:], "right if hidden from here on": right}
        title = f"{TITLES[task]}: the image, from the first layer to the last, and nowhere"
        sheet.paste(line_chart(lines, title, 0, 1, (500, 360)), (500 * column, 0))
    save_picture(sheet, path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folders of runs with the same tasks and number of layers")
    parser.add_argument("--name", default="depth", help="of the results (default: depth)")
    args = parser.parse_args()
    device = pick_device(args.device)
    found = {str(folder): measure(folder, device) for folder in args.runs}
    path = RESULTS / f"{args.name}.json"
    write_file(path, json.dumps({"runs": found, "scored": SCORED, "hardware": hardware(device)}))
    runs = list(found.values())
    draw(runs, path.with_suffix(".png"))
    print(f"{table_of(runs)}\n\n{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
