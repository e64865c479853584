"""Where attention goes, layer by layer: the paper's figs. 2 and 3, for both tasks of a trained model.

    python probe.py out/joint               writes attention.json, attention.png and heatmaps.png into its folder
    python probe.py out/joint --untrained   the same network before training, as a control
    python probe.py out/table3/*-seed?      ... of each of several runs; eval.py --table takes it up

Fused attention returns no weights, so this goes through `Model.forward_masked`, which tests/ prove equal to the path that
training takes. One question stands on each picture, as in the paper's sequences.
"""
import argparse
import json
from pathlib import Path

import data as data_sets                                            # before torch: it sets an environment variable
from data import command, fail, line_chart

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from model import Model, load, plans_for, sequences
from prune import positions
from tokenizer import pick_device, write

SEGMENTS = ("system", "image", "instruction", "output")


def segments(batch):
    """{segment: (B, N) bool}. Padding is in none; the image of generation is its output, as in the paper's fig. 3."""
    before, m, _ = batch.layout
    order = torch.arange(sum(batch.layout), device=batch.tokens.device)
    real, image = batch.turns >= 0, (order >= before) & (order < before + m)
    system = real & (batch.places < 2) & (order < before)
    output = torch.zeros_like(real)                 # a token is output if the one before it had to predict it
    output[:, 1:] = (batch.weights == 1)[:, :-1]
    return {"system": system, "image": image & ~output, "instruction": real & ~system & ~image & ~output, "output": output}


@torch.no_grad()
def allocation(model, batch, plan, chunk=16):
    """Attention shares by layer (sec. 4.1): alpha_S = the mean, over heads and queries, of the attention that a query
    pays to segment S. Two dictionaries {segment: [per layer]}: over all queries, and over those alone that have
    to predict output (which is what the model is asked for). Also the attention of the first sequence, mean over heads.

    Tokens that a layer skips ask nothing in it and are not counted. In each layer the shares sum to 1.
    """
    totals, counts, first = torch.zeros(2, len(plan), len(SEGMENTS)), torch.zeros(2, len(plan), 1), None
    asks = torch.zeros(len(plan), sum(batch.layout), dtype=torch.bool, device=batch.tokens.device)
    for layer, rule in enumerate(plan):
        asks[layer, positions(rule, batch.layout)[0]] = True
    for i in range(0, len(batch.tokens), chunk):
        rows = batch.rows(slice(i, i + chunk))
        _, _, attention = model.forward_masked(rows, plan)
        keys = torch.stack([*segments(rows).values()], 2).type_as(attention[0])             # (B, N, segments)
        if first is None:
            first = [(a[0].mean(0) * own[:, None]).cpu() for a, own in zip(attention, asks)]
        for layer, (a, own) in enumerate(zip(attention, asks)):
            paid, own = a.mean(1) @ keys, own & (rows.turns >= 0)       # (B, N, segments), by query; (B, N)
            for k, queries in enumerate((own, own & (rows.weights == 1))):
                totals[k, layer] += paid[queries].sum(0).cpu()
                counts[k, layer] += queries.sum().cpu()
    return *(dict(zip(SEGMENTS, shares.T.tolist())) for shares in totals / counts.clamp(min=1)), first


def heatmaps(attention, batch, path, columns):
    """Fig. 2: attention of one sequence, queries downwards and keys to the right, on a logarithmic scale of colours
    from 0.0001 (dark) to 1 (light), at four layers from first to last. attention, batch: {task: ...}."""
    font, size, gap = ImageFont.load_default(13), 260, 24
    sheet = Image.new("RGB", (gap + columns * (size + gap), 2 * (size + 2 * gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    stops = np.array([(10, 8, 40), (90, 20, 110), (200, 60, 80), (250, 160, 60), (255, 250, 200)], float)
    for row, (task, layers) in enumerate(attention.items()):
        real = (batch[task].turns[0] >= 0).cpu()
        bounds = [(name, torch.nonzero(part[0].cpu()[real]).flatten()) for name, part in segments(batch[task]).items()]
        for column, layer in enumerate(np.linspace(0, len(layers) - 1, columns).round().astype(int)):
            a = layers[layer][real][:, real].numpy()
            level = (np.log10(a.clip(1e-4)) + 4) / 4 * (len(stops) - 1)
            low = level.astype(int).clip(0, len(stops) - 2)
            colours = stops[low] + (stops[low + 1] - stops[low]) * (level - low)[..., None]
            x, y = gap + column * (size + gap), gap + 20 + row * (size + 2 * gap)
            sheet.paste(Image.fromarray(colours.round().astype(np.uint8)).resize((size, size), Image.NEAREST), (x, y))
            name = {"und": "understanding", "gen": "generation"}[task]
            draw.text((x, y - 18), f"{name}, layer {layer + 1}", (30, 30, 30), font)
            for name, where in bounds:
                if len(where):
                    edge = x + size * where[0].item() / len(a)
                    draw.line([(edge, y + size), (edge, y + size + 6)], fill=(30, 30, 30))
                if len(where) > 5:                                      # else there is no room for its name
                    middle = x + size * (where[0].item() + where[-1].item() + 1) / 2 / len(a)
                    draw.text((middle, y + size + 4), name, (90, 90, 90), font, anchor="mt")
    sheet.save(path)


def probe(model, tokenizer, options, n):
    """The shares of both tasks on n validation pictures, and what the pictures of them need."""
    dataset, c = data_sets.load(options["data"], options["preset"]), model.config
    shares, attention, batches = {}, {}, {}
    for task, plan in plans_for(options, c.layers).items():
        split = dataset.split(task, "val", n, options["seed"], questions=1)
        batches[task] = sequences(task, tokenizer, split, c).to(model.embed.weight.device)
        every, output, attention[task] = allocation(model, batches[task], plan)
        shares[task] = every | {"output_queries": output}
    return shares, attention, batches


def report(run, suffix, model, tokenizer, options, n):
    """Probes a model, prints the shares and writes them and the pictures into the folder `run`."""
    shares, attention, batches = probe(model, tokenizer, options, n)
    counts = {task: len(batch.tokens) for task, batch in batches.items()}
    write(run / f"attention{suffix}.json", json.dumps(shares | {"n": counts, "config": options}, indent=1))
    for task, own in shares.items():
        print(f"{task}: share of attention by layer, over all queries | over those that predict output")
        for name in SEGMENTS:
            print(f"  {name:12}" + " ".join(f"{x:5.2f}" for x in own[name]) + "   |"
                  + " ".join(f"{x:5.2f}" for x in own["output_queries"][name]))
    charts = [({name: list(enumerate(own[name], 1)) for name in SEGMENTS}, title) for task, whole in shares.items()
              for own, title in ((whole, f"{task}: attention share, all queries"),
                                 (whole["output_queries"], f"{task}: attention share, output queries"))]
    sheet = Image.new("RGB", (920, 320 * len(shares)))
    for i, (lines, title) in enumerate(charts):
        sheet.paste(line_chart(lines, title, "layer", 1., (460, 320)), (460 * (i % 2), 320 * (i // 2)))
    sheet.save(run / f"attention{suffix}.png")
    heatmaps(attention, batches, run / f"heatmaps{suffix}.png", min(4, model.config.layers))
    print(f"{run}/attention{suffix}.json, attention{suffix}.png, heatmaps{suffix}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="run", nargs="+", type=Path, help="folder of a trained run")
    parser.add_argument("--untrained", action="store_true", help="probe the network as it was before training")
    parser.add_argument("--n", type=int, default=256, help="validation pictures")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    if args.n < 1:
        fail("--n: expected at least 1")
    device = pick_device(args.device)
    for run in args.runs:
        model, tokenizer, found = load(run, device)
        options, suffix = found["options"], ""
        if args.untrained:
            torch.manual_seed(options["seed"])
            model = Model(model.config, tokenizer.vq.codebook.cpu()).to(device).eval()
            suffix = "-untrained"
        report(run, suffix, model, tokenizer, options, args.n)


if __name__ == "__main__":
    command(main)
