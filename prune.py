"""Explicit token-drop masks: a plan says for each layer what image tokens do in it.

    python prune.py                 prints what every plan costs, draws what tokens see (cf. fig. 4)
    python prune.py --preset gpu    the same for the larger model

A plan is data: one `Rule` for each layer. It knows nothing of weights. `model.py` carries a plan
out by computing everything and hiding what the plan drops (the reference, easy to read), or by
taking dropped tokens out of every matmul (fast, the default).
"""
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import check_output, fail, run_script, save_picture, script_parser
from data import PATCH, PRESETS
from tokenizer import FIRST_CODE


class Rule(NamedTuple):
    """What image tokens do in one layer. Text tokens always take part in full."""
    query: bool = True      # updated by attention and FFN; if not, passed on unchanged
    keys: str = "hidden"    # what queries see of them: their "hidden" state, their input
                            # "embedding" (code, row and column), or "none"


FULL = Rule()
HIMIX = Rule(query=False, keys="embedding")     # sec. 5.1: not updated, seen as embeddings
SHALLOW = Rule(query=False, keys="none")        # sec. 5.2: HMGen's shallow layers
NAIVE = Rule(query=True, keys="none")           # sec. 5.2: the control, updated but never seen
FROZEN = Rule(query=False, keys="hidden")       # seen as they are: ShortV (Yuan et al. 2025)

LETTERS = {FULL: "F", HIMIX: "h", SHALLOW: "s", NAIVE: "n", FROZEN: "f"}     # as printed


def alternating(rule, layers, k):
    """k layers in the middle have this rule and alternate with full ones; the first and the last
    layer are full (sec. 5.2). 1 of 4: F s F F; 2 of 6: F s F s F F; 3 of 12: F F F s F s F s F F
    F F. ValueError where k does not fit."""
    most = (layers - 1) // 2
    if not 0 <= k <= most:
        raise ValueError(f"--shallow {k}: expected 0 to {most}, so many of {layers} layers can "
                         "alternate with full ones")
    first = (layers - 2 * k + 1) // 2
    chosen = range(first, first + 2 * k, 2)
    return tuple(rule if layer in chosen else FULL for layer in range(layers))


# A plan is one Rule for each layer, made from the number of layers and HMGen's K.
PLANS = {
    "dense": lambda layers, k: (FULL,) * layers,
    "himix": lambda layers, k: (HIMIX,) * layers,
    "hmgen": lambda layers, k: alternating(SHALLOW, layers, k),
    "naive": lambda layers, k: alternating(NAIVE, layers, k),
    # Not in the paper: image tokens are updated in the first layer and frozen in all others.
    "freeze": lambda layers, k: (FULL,) + (FROZEN,) * (layers - 1),
}


def usual_shallow(layers):
    """HMGen's K where none is given: a quarter of the layers, the paper's higher K / L."""
    return max(1, layers // 4)


def make_plan(name, layers, shallow=None):
    """The plan of that name, with K = `shallow`. ValueError for an unknown name, and for a K that
    does not fit."""
    if name not in PLANS:
        raise ValueError(f"unknown plan {name!r}: expected one of {', '.join(PLANS)}")
    return PLANS[name](layers, usual_shallow(layers) if shallow is None else shallow)


def plans_of(tasks, options, layers):
    """{task: plan} of a run with train.py's options."""
    try:
        plans = {task: make_plan(options[f"{task}_plan"], layers, options["shallow"])
                 for task in tasks}
    except ValueError as error:
        fail(str(error))
    if "gen" in plans and not can_generate(plans["gen"]):
        fail(f"--gen-plan {options['gen_plan']}: image tokens that are never updated cannot "
             "predict the next one; expected another plan")
    return plans


def can_generate(plan):
    return any(rule.query for rule in plan)


class Layout(NamedTuple):
    """How many tokens of a sequence stand before, in and after its image."""
    before: int
    image: int
    after: int      # 0 in generation, where the image is the output


class Positions(NamedTuple):
    """The tokens of a sequence that are queries, or keys, in a layer."""
    index: torch.Tensor     # (n,) their positions, in order
    layout: Layout          # how many of them stand before, in and after the image


def positions(rule, layout, start=0, stop=None, device=None):
    """What takes part in a layer with this rule: (queries, keys), as Positions. Masks, FLOP counts
    and every forward of the model come from here. start, stop: only those there, for decoding."""
    stop = sum(layout) if stop is None else stop
    edges = 0, layout.before, layout.before + layout.image, sum(layout)
    spans = []                                  # positions before, in and after the image
    for first, end in zip(edges, edges[1:]):
        first, end = max(start, first), min(stop, end)
        spans.append(torch.arange(first, max(first, end), device=device))
    before, image, after = spans

    def with_image(takes_part):
        chosen = before, image if takes_part else image[:0], after
        return Positions(torch.cat(chosen), Layout(*map(len, chosen)))

    return with_image(rule.query), with_image(rule.keys != "none")


def predicting(layout, image_loss=False):
    """The slice of positions that may have a target: the only ones that logits are computed for.

    Generation: from the token before the image to the last but one of the image. Understanding:
    all after the image; with a loss on image tokens also the image and the token before it.
    """
    before, image, after = layout
    if after == 0:
        return slice(before - 1, before + image - 1)
    return slice(before - 1 if image_loss else before + image, before + image + after)


def mask(rule, layout):
    """(N, N) bool, [query, key]: what each query sees in a sequence without padding, with one
    question. A token that is no query has an empty row. (Of a Batch: Batch.attention_mask.)"""
    queries, keys = (tokens.index for tokens in positions(rule, layout))
    seen = torch.zeros(sum(layout), sum(layout), dtype=torch.bool)
    seen[queries[:, None], keys] = keys <= queries[:, None]
    return seen


# ---------------------------------------------------------------------- cost

# Width of the feed-forward network, as a multiple of the model's.
FFN = 4


def flops(plan, layout, width, vocab, image_loss=False):
    """Floating-point operations of forward and backward for one sequence: every matmul, of padding
    and of masked scores, too, because they are computed. The optimizer's are left out.

    In a layer with q queries and k keys, d = width, these are the multiply-adds:
        query and output projections    2 q d^2
        key and value projections       2 k d^2
        scores, and their use           2 q k d
        feed-forward network            2 FFN q d^2
    The head takes d * vocab for each position that logits are computed for. A multiply-add is two
    operations. The backward pass costs twice the forward pass: one product for the gradient of the
    input, one for that of the weights. Hence the factor 6.
    """
    d = width
    span = predicting(layout, image_loss)
    multiply_adds = (span.stop - span.start) * d * vocab
    for rule in plan:
        q, k = (sum(tokens.layout) for tokens in positions(rule, layout))
        multiply_adds += 2 * q * d * d + 2 * k * d * d + 2 * q * k * d + 2 * FFN * q * d * d
    return 6 * multiply_adds


def paper_cost(plan, layout, width):
    """The paper's formula (sec. 5): q k d + 8 q d^2, where 8 is 2 FFN. It leaves out the four
    projections, and counts q k d once, for the scores; their use takes as much again."""
    total = 0
    for rule in plan:
        q, k = (sum(tokens.layout) for tokens in positions(rule, layout))
        total += q * k * width + 2 * FFN * q * width ** 2
    return total


def print_costs(preset):
    """Prints what every plan costs, in GFLOP for a sequence and relative to dense."""
    p = PRESETS[preset]
    image = (p.image_size // PATCH) ** 2
    # As many questions as fit, and a caption of two fifths of that, which is longer than a run's.
    layouts = {"und": Layout(2, image, p.max_text), "gen": Layout(p.max_text * 2 // 5, image, 0)}
    vocab = FIRST_CODE + p.codes
    for task, layout in layouts.items():
        print(f"\n{task}: {layout.before} + {image} image + {layout.after} tokens, {p.layers} "
              f"layers, width {p.width}; forward and backward of one sequence\n"
              f"{'plan':12}{'layers':>{p.layers + 2}}{'GFLOP':>10}{'of dense':>10}{'by paper':>10}")
        dense = make_plan("dense", p.layers)
        dense_flops = flops(dense, layout, p.width, vocab)
        dense_cost = paper_cost(dense, layout, p.width)
        for name in PLANS:
            takes_k = make_plan(name, p.layers, 0) != make_plan(name, p.layers, 1)
            for shallow in range(1, (p.layers + 1) // 2 if takes_k else 2):
                plan = make_plan(name, p.layers, shallow)
                if task == "gen" and not can_generate(plan):
                    continue
                letters = "".join(LETTERS.get(rule, "?") for rule in plan)
                exact = flops(plan, layout, p.width, vocab)
                by_paper = paper_cost(plan, layout, p.width) / dense_cost
                title = f"{name} K={shallow}" if takes_k else name
                print(f"{title:12}{letters:>{p.layers + 2}}{exact / 1e9:10.3f}"
                      f"{exact / dense_flops:10.2f}{by_paper:10.2f}")
    print("\nlayers: F full, h HiMix, s shallow, n naive, f frozen. Text of a run may be shorter: "
          "its eval.json has its FLOPs.")


# ---------------------------------------------------------------------- the masks' picture

MASK_COLOURS = {"text": (70, 120, 190), "hidden": (240, 150, 40), "embedding": (90, 170, 90),
                "skipped": (225, 225, 225)}
LEGEND = {"text": "text key", "hidden": "image key: hidden state",
          "embedding": "image key: input embedding", "skipped": "token skips the layer"}


def draw_mask(rule, layout, cell):
    """The mask of one layer as an Image: queries downwards, keys to the right, `cell` pixels
    each."""
    seen, n = mask(rule, layout), sum(layout)
    colours = np.full((n, 3), MASK_COLOURS["text"], np.uint8)           # of each key
    if rule.keys != "none":
        colours[layout.before:layout.before + layout.image] = MASK_COLOURS[rule.keys]
    pixels = np.where(seen[:, :, None], colours, np.uint8(255))         # white: not seen
    pixels[~seen.any(1)] = MASK_COLOURS["skipped"]
    pixels = pixels.repeat(cell, 0).repeat(cell, 1)
    pixels[::cell], pixels[:, ::cell] = 255, 255            # lines between the cells
    return Image.fromarray(pixels)


def draw_plans(path, cell=10):
    """Fig. 4: what tokens see in each kind of layer, understanding above, generation below, as a
    PNG."""
    font = ImageFont.load_default(13)
    understanding, generation = Layout(2, 9, 6), Layout(6, 9, 0)
    columns = [("full layer", FULL), ("HiMix", HIMIX), ("shallow layer of HMGen", SHALLOW),
               ("naive control", NAIVE), ("frozen (not the paper's)", FROZEN)]
    step = 17 * cell + 40
    sheet = Image.new("RGB", (20 + step * len(columns), 2 * step + 30), "white")
    draw = ImageDraw.Draw(sheet)
    for row, layout in enumerate((understanding, generation)):
        for column, (title, rule) in enumerate(columns):
            if layout == generation and rule == HIMIX:      # never updated in any layer
                continue
            x, y = 20 + step * column, 24 + step * row
            draw.text((x, y - 18), f"{('U', 'G')[row]}: {title}", (40, 40, 40), font)
            sheet.paste(draw_mask(rule, layout, cell), (x, y))
    x, y = 20, sheet.height - 26
    for name, words in LEGEND.items():
        draw.rectangle((x, y, x + 12, y + 12), fill=MASK_COLOURS[name])
        draw.text((x + 18, y - 2), words, (40, 40, 40), font)
        x += 40 + font.getlength(words)
    draw.text((x, y - 2), "white: not seen; rows: queries, columns: keys", (40, 40, 40), font)
    save_picture(sheet, path)


def main():
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--out", default="out/masks.png")
    args = parser.parse_args()
    check_output(args.out, "picture")
    print_costs(args.preset)
    draw_plans(args.out)
    print(f"\n{args.out}: what tokens see in each kind of layer (fig. 4)")


if __name__ == "__main__":
    run_script(main)
