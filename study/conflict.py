"""Do the tasks' gradients conflict? The paper supposes something like it (sec. 6.3).

    python study/conflict.py study/results/band     table and chart of what table.py has measured

When table.py trains a row of MEASURED with one of SEEDS, `measured` writes gradients.json at POINTS
of training. It has, for each layer, the cosine of the gradients of L_und and L_gen with respect to
all its matrices, on the same SEQUENCES sequences of each task: once for all tokens, once for what
image tokens contribute. In a CUDA graph, nothing is measured.
"""
import json
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fail, line_chart, run_script, save_picture, script_parser, write_file

import torch
import torch.nn.functional as F
from PIL import Image

import train

MEASURED = "joint", "share-image", "share-partial", "freeze-hmgen-practice"
SEEDS = 1, 2, 3
POINTS = [(i + .5) / 10 for i in range(10)]         # in training, whose end is 1
SEQUENCES, AT_ONCE = 256, 64
PARTS = {"all": "all tokens", "image": "image tokens' part"}


@contextmanager
def image_part(linear, layout, part):
    """Adds to `part` what image tokens contribute to the gradient of a Linear's weight."""
    def before_backward(module, inputs, output):
        h = inputs[0].detach()                                          # (B, n, width)
        if h.size(1) == layout.image:                                   # its own projection
            span = slice(None)
        elif h.size(1) == sum(layout):
            span = slice(layout.before, layout.before + layout.image)
        else:                                                           # text alone
            span = slice(0)

        def add(gradient):                                              # (B, n, out)
            part.add_(gradient[:, span].flatten(0, 1).T @ h[:, span].flatten(0, 1))

        output.register_hook(add)

    handle = linear.register_forward_hook(before_backward)
    yield
    handle.remove()


def gradients(model, batch, plan):
    """{part: [of each layer, a vector]}: the gradient of a task's loss."""
    linears = [[module for module in block.modules() if isinstance(module, torch.nn.Linear)]
               for block in model.blocks]
    of_image = [[torch.zeros_like(linear.weight) for linear in layer] for layer in linears]
    with ExitStack() as stack:
        for layer, parts in zip(linears, of_image):
            for linear, part in zip(layer, parts):
                stack.enter_context(image_part(linear, batch.layout, part))
        for rows in torch.arange(len(batch.tokens)).split(AT_ONCE):
            model(batch.rows(rows), plan)[1].backward()
    of_all = [[torch.zeros_like(linear.weight) if linear.weight.grad is None else linear.weight.grad
               for linear in layer] for layer in linears]
    model.zero_grad()
    return {part: [torch.cat([x.flatten() for x in layer]) for layer in layers]
            for part, layers in (("all", of_all), ("image", of_image))}


@contextmanager
def measured(out, row, seed, steps):
    """Measures the run that is trained in the block, if MEASURED and SEEDS include it."""
    usual, path, points = train.forward_backward, out / "gradients.json", []
    if row in MEASURED and seed in SEEDS:
        points = [max(1, round(point * steps)) for point in POINTS]     # 0: of a CUDA graph

    def forward_backward(model, plans, examples, parts, index):
        step = index.storage_offset() // index.numel()          # a row of train.draw_order
        if step in points:
            of_task = [gradients(model, examples[task].rows(slice(SEQUENCES)), plan)
                       for task, plan in plans.items()]
            found = json.loads(path.read_text()) if path.exists() else {}
            found[step] = {part: [F.cosine_similarity(a, b, 0).item()
                                  for a, b in zip(*(each[part] for each in of_task))]
                           for part in PARTS}
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
    folder, lines, rows = parser.parse_args().folder, {part: {} for part in PARTS}, []
    for row in MEASURED:
        files = sorted(folder.glob(f"{row}-seed*/gradients.json"))
        runs = [list(json.loads(file.read_text()).values()) for file in files]
        for part, words in PARTS.items() if runs else ():
            lines[part][row] = [fmean(fmean(point[part]) for point in points)
                                for points in zip(*runs)]
            of_layer = [[fmean(point[part][layer] for point in run) for run in runs]
                        for layer in range(len(runs[0][0][part]))]
            rows.append([row, words, len(runs), *(mean_std(values, 2) for values in of_layer)])
    if not rows:
        fail(f"{folder}: no gradients.json in it, which table.py writes")
    sheet = Image.new("RGB", (520 * len(PARTS), 360), "white")
    for column, (part, words) in enumerate(PARTS.items()):
        title = f"cosine of gradients over training, mean of layers, seeds: {words}"
        sheet.paste(line_chart(lines[part], title, -.1, .1, (520, 360)), (520 * column, 0))
    path = RESULTS / "conflict.png"
    save_picture(sheet, path)
    layers = [f"layer {i}" for i in range(1, len(rows[0]) - 2)]
    print(f"{markdown(['run', 'gradient of', 'seeds', *layers], rows, 2)}\n\n{path}")


if __name__ == "__main__":
    run_script(main)
