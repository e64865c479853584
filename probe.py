"""Where attention goes, layer by layer: figs. 2 and 3 for both tasks of a trained model.

    python probe.py out/joint-cpu                   attention.json, attention.png, heatmaps.png
    python probe.py out/joint-cpu --untrained       the same network before training, as a control

Fused attention returns no weights; `Model.reference` does. One question a picture, as in the paper.
"""
import json
from collections import Counter
from pathlib import Path

from common import (contact_sheet, line_chart, pick_device, positive, run_script, script_parser,
                    write_file)

import numpy as np
import torch

from data import load_of_run
from model import Model, load_run, sequences
from prune import masks, plans_of
from tokenizer import FIRST_CODE

TITLES = {"und": "understanding", "gen": "generation"}
SEGMENTS = ("system", "instruction", "output", "image")     # of a sequence (sec. 4.1)


def segments(batch):
    """(B, N, 4) bool: which of SEGMENTS a token belongs to. Padding belongs to none. The image
    of generation is its output, as in the paper's fig. 3. Understanding needs one question per
    picture: the first token of a second one would count as output of the first."""
    real = batch.segment_ids >= 0
    system = real & (real.cumsum(1) <= 2)                   # bos and the task's token
    output = torch.zeros_like(real)
    output[:, 1:] = batch.is_output[:, :-1] & real[:, 1:]   # what the token before had to predict
    image = (batch.tokens >= FIRST_CODE) & ~output
    instruction = real & ~system & ~image & ~output
    return torch.stack([system, instruction, output, image], 2)


@torch.no_grad()
def allocation(model, batch, plan, chunk=16):
    """Attention allocation by layer (sec. 4.1, eq. 2): alpha_S = the mean, over heads and queries,
    of the sum of A_ij over all keys j in segment S. Queries are the tokens that the layer updates,
    pooled over all sequences, without padding. (Eq. 2 as printed sums over queries; fig. 3 shows
    shares that sum to 1, so we read it as a mean.)

    Returns {segment: [share in each layer]} for all queries; the same for only those that predict
    output; and the attention of the first sequence, averaged over heads, (layers, N, N)."""
    is_query, _ = zip(*(masks(rule, batch.layout) for rule in plan))
    updated = torch.tensor(is_query, device=model.device)               # (layers, N)
    sums = torch.zeros(2, len(SEGMENTS), len(plan), device=model.device)
    counts = torch.zeros(2, 1, len(plan), device=model.device)
    for i in range(0, len(batch.tokens), chunk):
        rows = batch.rows(slice(i, i + chunk))
        _, _, weights = model.reference(rows, plan)
        attention = torch.stack([w.mean(1) for w in weights], 1)        # (B, layers, N, N)
        paid = attention @ segments(rows)[:, None].type_as(attention)     # (B, layers, N, segments)
        queries = updated & (rows.segment_ids >= 0)[:, None]            # (B, layers, N)
        for which, chosen in enumerate((queries, queries & rows.is_output[:, None])):
            sums[which] += torch.einsum("blns,bln->sl", paid, chosen.type_as(paid))
            counts[which] += chosen.sum((0, 2))
        if i == 0:
            first = attention[0] * updated[..., None]
    shares = (sums / counts.clamp(min=1)).tolist()
    return *(dict(zip(SEGMENTS, of_queries)) for of_queries in shares), first


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--untrained", action="store_true", help="the network before training")
    parser.add_argument("--n", type=positive(int), default=256, help="validation pictures")
    parser.add_argument("--data", help="where the run's images are now, if they have been moved")
    parser.add_argument("--out", type=Path, help="folder of the results (default: the run's)")
    args = parser.parse_args()
    device, out = pick_device(args.device), args.out or args.run
    model, tokenizer, checkpoint = load_run(args.run, device)
    options, suffix = checkpoint["options"], "-untrained" if args.untrained else ""
    if args.untrained:
        torch.manual_seed(options["seed"])
        model = Model(model.config, tokenizer.vq.codebook.cpu()).to(device).eval()
    dataset = load_of_run(checkpoint, args.data)
    found, charts, heatmaps, titles = {"n": {}, "config": options}, [], [], []
    for task, plan in plans_of(checkpoint["tasks"], options, model.config.layers).items():
        split = dataset.split(task, "val", args.n, options["seed"], questions=1)
        batch = sequences(task, tokenizer, split).to(device)
        of_all, of_output, attention = allocation(model, batch, plan)
        found["n"][task] = len(batch.tokens)
        found[task] = {**of_all, "output_queries": of_output}
        for kind, shares in (("all queries", of_all), ("queries that predict output", of_output)):
            title = f"{TITLES.get(task, task)}, layers 1 to {len(plan)}: {kind}"
            lines = {name: share for name, share in shares.items() if any(share)}
            print(title)
            for name, share in lines.items():
                print(f"  {name:12}" + " ".join(f"{x:5.2f}" for x in share))
            charts.append(np.array(line_chart(lines, title, 0, 1, (400, 400))))
        real, first = batch.segment_ids[0] >= 0, segments(batch.rows(slice(1)))[0].int()
        names = Counter(SEGMENTS[i] for i in first[real].argmax(1))         # in their order
        tokens = ", ".join(f"{name} {n}" for name, n in names.items())
        # Black and grey bands above the diagonal, where no attention is, show the keys' segments.
        bands = np.repeat(np.arange(len(names)) % 2 / 4, [*names.values()])[:, None]
        for layer in np.linspace(0, len(plan) - 1, 4).round().astype(int):
            level = attention[layer][real][:, real].cpu().clamp(min=1e-4).log10() / 4 + 1   # 0 to 1
            heat = torch.stack([level ** .5, level, level ** 2], 2)     # black, orange, white
            heat = np.where(np.tri(len(level))[..., None], heat.numpy(), bands)
            heatmaps.append(np.uint8(255 * heat))
            titles.append(f"{TITLES.get(task, task)}, layer {layer + 1}: {tokens} (1e-4 to 1)")
    write_file(out / f"attention{suffix}.json", json.dumps(found, indent=1))
    contact_sheet(charts, [""] * len(charts), out / f"attention{suffix}.png", 2, 400)   # fig. 3
    contact_sheet(heatmaps, titles, out / f"heatmaps{suffix}.png", 4, 260)              # fig. 2
    print(f"{out}/attention{suffix}.json, attention{suffix}.png, heatmaps{suffix}.png")


if __name__ == "__main__":
    run_script(main)
