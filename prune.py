"""Explicit token-drop masks: a plan says for each layer what image tokens do in it.

    python prune.py                 prints what every plan costs, draws its masks into out/masks.png (cf. fig. 4)
    python prune.py --preset gpu

A plan is data: one `Rule` a layer. It knows nothing of weights. `model.py` carries it out twice, once by computing
everything and hiding what the plan drops (the reference), once by cutting dropped tokens out of every matmul (fast).
"""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from data import command


class Rule(NamedTuple):
    """What image tokens do in one layer. Text tokens always take part in full."""
    query: bool = True      # they are updated by attention and FFN; otherwise their hidden state passes on unchanged
    keys: str = "hidden"    # what others see of them: their "hidden" state, their original "embedding", or "none"
    stride: int = 1         # every stride-th image token does this; the others are neither queries nor keys


FULL = Rule()
HIMIX = Rule(query=False, keys="embedding")     # sec. 5.1
SHALLOW = Rule(query=False, keys="none")        # sec. 5.2: HMGen's shallow layers
NAIVE = Rule(query=True, keys="none")           # sec. 5.2: the control that saves little and fails
SPARSE = Rule(stride=2)                         # not in the paper: half of the image tokens skip the layer
FROZEN = Rule(query=False)                      # not in the paper: as HiMix, but keys come from where updating stopped
EVERY = {"dense": FULL, "himix": HIMIX, "naive-all": NAIVE}     # plans with the same rule in every layer
SOME = {"hmgen": SHALLOW, "skip": SHALLOW, "naive": NAIVE, "sparse": SPARSE, "early": FROZEN}  # ... in some layers only
PLANS = (*EVERY, *SOME)


def make_plan(name, layers, shallow=1):
    """The plan of that name: `layers` Rules. `shallow` is HMGen's K: as many layers in the middle, alternating with full
    ones; its first and last layer are always full (sec. 5.2). "skip" takes the 2 K layers in the middle (with 2 K + 1 layers
    all but the first), "early" the last 2 K. ValueError where they do not fit."""
    if name in EVERY:
        return (EVERY[name],) * layers
    if name not in SOME:
        raise ValueError(f"unknown plan {name!r}: expected one of {', '.join(PLANS)}")
    if not 0 <= shallow <= (layers - 1) // 2:
        raise ValueError(f"{shallow} shallow layers do not fit into {layers}: expected 0 to {(layers - 1) // 2}, because "
                         "in HMGen they alternate with full ones and the first and last layer are full")
    first = (layers - 2 * shallow + 1) // 2
    begin = layers - 2 * shallow if name == "early" else first
    chosen = range(begin, begin + 2 * shallow, 1 if name in ("skip", "early") else 2)
    return tuple(SOME[name] if i in chosen else FULL for i in range(layers))


class Layout(NamedTuple):
    """How many tokens of a sequence stand before, in and after its image."""
    before: int
    image: int
    after: int


def positions(rule, layout):
    """The positions that are queries, and those that are keys, in a layer of this rule: two sorted lists."""
    before, image, _ = layout
    kept = range(before, before + image, rule.stride)
    text = [*range(before), *range(before + image, sum(layout))]
    return (sorted([*text, *(kept if rule.query else ())]),
            sorted([*text, *(kept if rule.keys != "none" else ())]))


def mask(rule, layout):
    """(N, N) bool, [query, key]: what each query sees. The row of a token that is no query is all False."""
    queries, keys = map(torch.tensor, positions(rule, layout))
    seen = torch.zeros(sum(layout), sum(layout), dtype=torch.bool)
    seen[queries[:, None], keys] = keys <= queries[:, None]
    return seen


# ------------------------------------------------------------------------------------------------ cost

@dataclass
class Size:
    """What the cost of a step depends on, besides the plan."""
    vocab: int
    layers: int
    width: int
    und: Layout             # [bos][und] image | questions and answers
    gen: Layout             # [bos][gen] caption | image
    hidden: int = 4         # width of the FFN, as a multiple of the model's
    image_loss: bool = False    # understanding predicts its image tokens, too (the paper's eq. 1)


def flops(size, task, plan):
    """Floating-point operations of forward and backward for one sequence: every matmul, two for each multiply-add.

    A layer with q queries and k keys (d = width, h = hidden): Q and output projections 2 q d^2, K and V projections
    2 k d^2, scores and their use 2 q k d, FFN 2 h q d^2 multiply-adds; the head d * vocab for every position that can
    have a target (with image_loss also understanding's image and the token before it). The backward pass costs twice the
    forward pass: one product for the input, one for the weights.
    """
    layout, d = getattr(size, task), size.width
    total = d * size.vocab * (layout.image if task == "gen" else layout.after + size.image_loss * (1 + layout.image))
    for rule in plan:
        q, k = map(len, positions(rule, layout))
        total += 2 * q * d * d + 2 * k * d * d + 2 * q * k * d + 2 * size.hidden * q * d * d
    return 6 * total


def paper_cost(size, task, plan):
    """The paper's formula (sec. 5): q k d for attention and 8 q d^2 for the FFN. It leaves out the projections."""
    pairs = (map(len, positions(rule, getattr(size, task))) for rule in plan)
    return sum(q * k * size.width + 8 * q * size.width ** 2 for q, k in pairs)


# The networks of the presets. How many text tokens stand where is what the shapes world needs; train.py looks for itself.
SIZES = {"tiny": Size(vocab=544, layers=3, width=32, und=Layout(2, 16, 40), gen=Layout(24, 16, 0)),
         "cpu": Size(vocab=768, layers=4, width=128, und=Layout(2, 64, 80), gen=Layout(32, 64, 0)),
         "gpu": Size(vocab=1024, layers=12, width=384, und=Layout(2, 256, 192), gen=Layout(64, 256, 0))}


# ------------------------------------------------------------------------------------------------ pictures

COLOURS = {"text": (70, 120, 190), "hidden": (240, 150, 40), "embedding": (90, 170, 90), "skipped": (225, 225, 225)}


def draw_mask(rule, layout, cell):
    """The mask of a layer as a picture: rows are queries, columns keys; colours tell what a key is, grey rows are
    tokens that skip the layer."""
    n = sum(layout)
    picture = Image.new("RGB", (n * cell, n * cell), "white")
    draw = ImageDraw.Draw(picture)
    for i, seen in enumerate(mask(rule, layout).tolist()):
        skips = not any(seen)
        for j in range(n):
            is_image = layout.before <= j < layout.before + layout.image
            name = "skipped" if skips else rule.keys if is_image else "text"
            if skips or seen[j]:
                draw.rectangle((j * cell, i * cell, (j + 1) * cell - 2, (i + 1) * cell - 2), fill=COLOURS[name])
    return picture


def draw_plans(path, cell=8):
    """Fig. 4: the masks of every kind of layer, small sequences of both tasks."""
    font = ImageFont.load_default(13)
    some = [(f"{', '.join(name for name in SOME if SOME[name] == rule)}: some layers", rule) for rule in dict.fromkeys(SOME.values())]
    rows = ((Layout(2, 9, 6), [("dense", FULL), ("himix: every layer", HIMIX), *some]),                 # understanding
            (Layout(6, 9, 0), [("dense; others' full layers", FULL), *some]))                          # generation
    step = 17 * cell + 50
    sheet = Image.new("RGB", (step * (len(some) + 2), 2 * (step + 20) + 30), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (layout, kinds) in enumerate(rows):
        for column, (title, rule) in enumerate(kinds):
            x, y = 20 + step * column, 24 + (step + 20) * row
            draw.text((x, y - 18), title, (40, 40, 40), font)
            sheet.paste(draw_mask(rule, layout, cell), (x, y))
    words = {"text": "text key", "hidden": "image key: hidden state", "embedding": "image key: original embedding",
             "skipped": "token skips the layer"}
    x, y = 20, sheet.height - 26
    for name, word in words.items():
        draw.rectangle((x, y, x + 12, y + 12), fill=COLOURS[name])
        draw.text((x + 18, y - 2), word, (40, 40, 40), font)
        x += 40 + font.getlength(word)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=SIZES)
    parser.add_argument("--out", default="out/masks.png")
    args = parser.parse_args()
    size = SIZES[args.preset]
    most = (size.layers - 1) // 2
    print(f"{size.layers} layers, width {size.width}; understanding {tuple(size.und)}, generation {tuple(size.gen)} tokens "
          "before, in and after the image\nforward + backward of one sequence, GFLOP, and as a ratio to dense: every matmul "
          "counted, and by the paper's formula\n")
    print(f"{'plan':12}{'layers':>{size.layers + 2}}  " + "".join(f"{t:>24}" for t in ("understanding", "generation")))
    dense = make_plan("dense", size.layers)

    def costs(task, plan):
        total = flops(size, task, plan)
        return (f"{total / 1e9:10.3f}{total / flops(size, task, dense):7.2f}"
                f"{paper_cost(size, task, plan) / paper_cost(size, task, dense):7.2f}")

    for name in PLANS:
        for shallow in range(1, most + 1) if name in SOME else [0]:
            plan = make_plan(name, size.layers, shallow)
            letters = "".join("F" if rule == FULL else name[0] for rule in plan)
            print(f"{name + (f' K={shallow}' if name in SOME else ''):12}{letters:>{size.layers + 2}}  {costs('und', plan)}"
                  + (costs("gen", plan) if name != "himix" else f"{'impossible':>24}"))
    draw_plans(args.out)
    print(f"\n{args.out}: what each kind of layer lets tokens see (fig. 4)")


if __name__ == "__main__":
    command(main)
