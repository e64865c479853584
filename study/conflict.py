"""Do the tasks' gradients conflict? The paper supposes something like it (sec. 6.3).

    python study/conflict.py study/results/band     table and chart of what table.py has measured

When table.py trains a row of MEASURED with one of SEEDS, `measured` writes gradients.json at POINTS
of training: for each layer, the cosine of the gradients of L_und and L_gen with respect to all its
matrices, each on SEQUENCES sequences; for all tokens, and for what image tokens contribute. Beside
it stands the cosine of two gradients of one task: noise alone would hold both cosines below 1.
In a CUDA graph, nothing is measured.
"""
import json
import sys
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fail, line_chart, run_script, save_picture, script_parser, write_file

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import train

MEASURED = "joint", "share-image", "share-partial", "freeze-hmgen-practice"
SEEDS = 1, 2, 3
POINTS = [(i + .5) / 10 for i in range(10)]         # in training, whose end is 1
SEQUENCES, AT_ONCE = 256, 64
PARTS = {"all": "all tokens", "image": "image tokens' part"}
PAIRS = {"between": "both tasks", "und": "understanding, twice", "gen": "generation, twice"}


@contextmanager
def image_part(linear, name, layout, part):
    """Adds to `part` what image tokens contribute to the gradient of a Linear's weight."""
    def before_backward(module, inputs, output):
        h = inputs[0].detach()                                          # (B, n, width)
        span = slice(0)                                                 # text alone
        if name.endswith((".image", ".und", ".gen")):                   # image tokens' projection
            span = slice(None)
        elif h.size(1) == sum(layout):
            span = slice(layout.before, layout.before + layout.image)

        def add(gradient):                                              # (B, n, out)
            part.add_(gradient[:, span].flatten(0, 1).T @ h[:, span].flatten(0, 1))

        output.register_hook(add)

    handle = linear.register_forward_hook(before_backward)
    yield
    handle.remove()


def gradients(model, batch, plan):
    """{part: [of each layer, a vector]}: the gradient of a task's loss."""
    linears = [{name: module for name, module in block.named_modules()
                if isinstance(module, torch.nn.Linear)} for block in model.blocks]
    of_image = [[torch.zeros_like(linear.weight) for linear in layer.values()] for layer in linears]
    with ExitStack() as stack:
        for layer, parts in zip(linears, of_image):
            for (name, linear), part in zip(layer.items(), parts):
                stack.enter_context(image_part(linear, name, batch.layout, part))
        for rows in torch.arange(len(batch.tokens)).split(AT_ONCE):
            model(batch.rows(rows), plan)[1].backward()
    of_all = [[torch.zeros_like(linear.weight) if linear.weight.grad is None else linear.weight.grad
               for linear in layer.values()] for layer in linears]
    model.zero_grad()
    return {part: [torch.cat([x.flatten() for x in layer]) for layer in layers]
            for part, layers in (("all", of_all), ("image", of_image))}


def cosines(model, plans, examples):
    """{part: {pair: [of each layer]}}: cosines of gradients; of both tasks, the mean of four."""
    n = min(SEQUENCES, *(len(batch.tokens) // 2 for batch in examples.values()))
    of_task = {task: [gradients(model, examples[task].rows(slice(start, start + n)), plan)
                      for start in (0, n)] for task, plan in plans.items()}
    pairs = {"between": [*product(*of_task.values())]} | {t: [x] for t, x in of_task.items()}
    found = {part: {} for part in PARTS}
    for part, pair in product(PARTS, PAIRS):
        of_layers = [[F.cosine_similarity(a, b, 0).item() for a, b in zip(one[part], other[part])]
                     for one, other in pairs[pair]]
        found[part][pair] = np.mean(of_layers, 0).tolist()
    return found


@contextmanager
def measured(out, row, seed, steps):
    """Measures the run that is trained in the block, if MEASURED and SEEDS include it."""
    usual, path, points = train.forward_backward, out / "gradients.json", []
    if row in MEASURED and seed in SEEDS:
        points = [max(1, round(point * steps)) for point in POINTS]     # 0: of a CUDA graph

    def forward_backward(model, plans, examples, parts, index):
        step = index.storage_offset() // index.numel()          # a row of train.draw_order
        if step in points:
            found = json.loads(path.read_text()) if path.exists() else {}
            found[step] = cosines(model, plans, examples)
            write_file(path, json.dumps(found))
        return usual(model, plans, examples, parts, index)

    train.forward_backward = forward_backward
    try:
        yield
    finally:
        train.forward_backward = usual


def main():
    from table import RESULTS, markdown, mean_std
    parser = script_parser(__doc__, device=False)
    parser.add_argument("folder", type=Path)
    folder, charts, rows = parser.parse_args().folder, [], []
    for row in MEASURED:
        files = sorted(folder.glob(f"{row}-seed*/gradients.json"))
        every = [list(json.loads(file.read_text()).values()) for file in files]
        lines = {}
        for part, pair in product(PARTS, PAIRS):            # runs of older code have no twice
            runs = [run for run in every if len(run) == len(POINTS) and pair in run[0][part]]
            if not runs:
                continue
            found = np.array([[point[part][pair] for point in run] for run in runs])
            if part == "all":
                lines[PAIRS[pair]] = found.mean((0, 2))         # of seeds and layers
            of_layer = [mean_std(list(values), 2) for values in found.mean(1).T]
            rows.append([row, PARTS[part], PAIRS[pair], len(runs), *of_layer])
        if lines:
            title = f"{row}: cosine of gradients over training"
            charts.append(np.asarray(line_chart(lines, title, -.2, 1, (400, 300))))
    if not rows:
        fail(f"{folder}: no gradients.json in it, which table.py writes")
    path = RESULTS / "conflict.png"
    save_picture(Image.fromarray(np.hstack(charts)), path)
    layers = [f"layer {i}" for i in range(1, len(rows[0]) - 3)]
    print(f"{markdown(['run', 'gradient of', 'on', 'seeds', *layers], rows, 3)}\n\n{path}")


if __name__ == "__main__":
    run_script(main)
