"""Where attention goes, layer by layer: the paper's figs. 2 and 3, for both tasks of a trained
model.

    python probe.py out/joint               attention.json, attention.png, heatmaps.png
    python probe.py out/joint --untrained   the same network before training, as a control

Fused attention returns no weights. So this goes through `Model.reference`, which the tests
hold equal to the path of training. One question stands on each picture, as in the paper's
sequences.
"""
import json
from pathlib import Path

from common import (contact_sheet, fail, line_chart, pick_device, run_script, save_picture,
                    script_parser, write_file)

import numpy as np
import torch
from PIL import Image, ImageOps

from data import load_of_run
from model import Model, load_run, sequences
from prune import plans_of, positions

SEGMENTS = ("system", "image", "instruction", "output")
TITLES = {"und": "understanding", "gen": "generation"}


def segments(batch):
    """{segment: (B, N) bool}, which tokens belong to it. Padding belongs to none. The image of
    generation is its output, as in the paper's fig. 3. Of understanding one question a picture:
    the first token of a second one would count as output of the first."""
    real, image = batch.segment_ids >= 0, batch.is_image()
    system = real & (real.cumsum(1) <= 2)                   # bos and the task's token
    output = torch.zeros_like(real)
    # Output is what the token before it had to predict. The end of an answer is no token.
    output[:, 1:] = batch.is_output[:, :-1] & real[:, 1:]
    instruction = real & ~system & ~image & ~output
    return {"system": system, "image": image & ~output, "instruction": instruction,
            "output": output}


@torch.no_grad()
def allocation(model, batch, plan, chunk=16):
    """Attention allocation by layer (sec. 4.1, eq. 2): alpha_S = the mean, over heads and queries,
    of the sum of A_ij over all keys j in segment S. Queries are the tokens that the layer updates,
    pooled over all sequences, without padding. (Eq. 2 as printed sums over queries; fig. 3 shows
    shares that sum to 1, so we read it as a mean.)

    Returns two things: {segment: [per layer]}, with the same over those queries alone that predict
    output under "output_queries"; and the attention of the first sequence, a mean over heads,
    [(N, N) per layer].
    """
    n, layers = sum(batch.layout), len(plan)
    is_query = torch.zeros(layers, n, dtype=torch.bool, device=batch.tokens.device)
    for layer, rule in enumerate(plan):
        is_query[layer, positions(rule, batch.layout)[0].index] = True
    sums = torch.zeros(2, layers, len(SEGMENTS))            # of all queries, of output queries
    counts = torch.zeros(2, layers, 1)
    first = None
    for i in range(0, len(batch.tokens), chunk):
        rows = batch.rows(slice(i, i + chunk))
        _, _, attention = model.reference(rows, plan)
        if first is None:
            first = [(a[0].mean(0) * asks[:, None]).cpu() for a, asks in zip(attention, is_query)]
        keys = torch.stack(list(segments(rows).values()), 2)            # (B, N, segments)
        for layer, weights in enumerate(attention):
            paid = weights.mean(1) @ keys.type_as(weights)              # by each query: (B, N, S)
            queries = is_query[layer] & (rows.segment_ids >= 0)         # (B, N)
            for which, chosen in enumerate((queries, queries & rows.is_output)):
                sums[which, layer] += paid[chosen].sum(0).cpu()
                counts[which, layer] += chosen.sum().cpu()
    of_all, of_output = (sums / counts.clamp(min=1)).transpose(1, 2).tolist()
    shares = dict(zip(SEGMENTS, of_all), output_queries=dict(zip(SEGMENTS, of_output)))
    return shares, first


def measure(model, tokenizer, checkpoint, n, source=None):
    """`allocation` on n validation pictures of each task of a run: {task: shares}, {task: the
    attention of the first sequence}, {task: Batch}. source: see data.load_of_run."""
    options = checkpoint["options"]
    dataset = load_of_run(checkpoint, source)
    shares, attention, batches = {}, {}, {}
    for task, plan in plans_of(checkpoint["tasks"], options, model.config.layers).items():
        split = dataset.split(task, "val", n, options["seed"], questions=1)
        batches[task] = sequences(task, tokenizer, split).to(model.device)
        shares[task], attention[task] = allocation(model, batches[task], plan)
    return shares, attention, batches


def draw_heatmaps(attention, batches, path, columns=4):
    """Fig. 2: attention of one sequence, queries downwards and keys to the right, at several layers
    from first to last, from 0.0001 (dark) to 1 (light). attention, batches: {task: ...}."""
    columns = min(columns, *map(len, attention.values()))
    pictures, texts = [], []
    for task, layers in attention.items():
        real = (batches[task].segment_ids[0] >= 0).cpu()
        sizes = [f"{name} {int(members[0].sum())}"
                 for name, members in segments(batches[task]).items() if members[0].any()]
        for layer in np.linspace(0, len(layers) - 1, columns).round().astype(int):
            level = layers[layer][real][:, real].clamp(min=1e-4).log10() / 4 + 1        # 0 to 1
            grey = Image.fromarray((255 * level).byte().numpy())
            heat = ImageOps.colorize(grey, (10, 8, 40), (255, 250, 200), mid=(200, 60, 80))
            pictures.append(np.array(heat))
            texts.append(f"{TITLES[task]}, layer {layer + 1}\ntokens: {', '.join(sizes)}")
    contact_sheet(pictures, texts, path, columns, size=260)


def draw_shares(shares, path):
    """Fig. 3: the share of each segment by layer; a row for each task."""
    sheet = Image.new("RGB", (920, 320 * len(shares)))
    for row, (task, of_task) in enumerate(shares.items()):
        for column, (title, lines) in enumerate((("all queries", of_task),
                                                 ("output queries", of_task["output_queries"]))):
            points = {name: list(enumerate(lines[name], 1)) for name in SEGMENTS}
            title = f"{TITLES[task]}: attention share, {title}"
            chart = line_chart(points, title, "layer", 1., (460, 320))
            sheet.paste(chart, (460 * column, 320 * row))
    save_picture(sheet, path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--untrained", action="store_true", help="the network before training")
    parser.add_argument("--n", type=int, default=256, help="validation pictures")
    parser.add_argument("--data", help="where the run's images are now, if they have been moved")
    parser.add_argument("--out", type=Path, help="folder of the results (default: the run's)")
    args = parser.parse_args()
    if args.n < 1:
        fail(f"--n {args.n}: expected at least 1")
    device, out = pick_device(args.device), args.out or args.run
    model, tokenizer, checkpoint = load_run(args.run, device)
    options, suffix = checkpoint["options"], ""
    if args.untrained:
        torch.manual_seed(options["seed"])
        model = Model(model.config, tokenizer.vq.codebook.cpu()).to(device).eval()
        suffix = "-untrained"
    shares, attention, batches = measure(model, tokenizer, checkpoint, args.n, args.data)
    for task in shares:
        print(f"{TITLES[task]}: attention share by layer, all queries | those that predict output")
        for name in SEGMENTS:
            left, right = (" ".join(f"{x:5.2f}" for x in lines[name])
                           for lines in (shares[task], shares[task]["output_queries"]))
            print(f"  {name:12}{left}   |{right}")
    contents = {**shares, "n": {task: len(batch.tokens) for task, batch in batches.items()},
                "config": options}
    write_file(out / f"attention{suffix}.json", json.dumps(contents, indent=1))
    draw_shares(shares, out / f"attention{suffix}.png")
    draw_heatmaps(attention, batches, out / f"heatmaps{suffix}.png")
    print(f"{out}/attention{suffix}.json, attention{suffix}.png, heatmaps{suffix}.png")


if __name__ == "__main__":
    run_script(main)
