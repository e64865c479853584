"""Explicit token-drop masks: a plan says for each layer what image tokens do in it.

    python prune.py                 prints what tokens see (cf. fig. 4), and what every plan costs

A plan is data: one `Rule` for each layer. It knows nothing of weights. `model.py` carries a plan
out by computing everything and hiding what `masks` drop (the reference, easy to read), or by taking
dropped tokens out of every matmul (fast, the default).
"""
from typing import NamedTuple

from common import fail, run_script, script_parser
from data import PRESETS
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
FREEZE = Rule(query=False, keys="hidden")       # seen as they are: ShortV (Yuan et al. 2025)

# Printed plans have the first letter of each layer's name.
NAMES = {FULL: "Full", HIMIX: "himix", SHALLOW: "shallow", NAIVE: "naive", FREEZE: "freeze"}


def alternating(rule, layers, k):
    """k layers in the middle have this rule and alternate with full ones; the first and the last
    layer are full (sec. 5.2). 1 of 4: FsFF; 2 of 6: FsFsFF; 3 of 12: FFFsFsFsFFFF (F: full)."""
    most = (layers - 1) // 2
    if not 0 <= k <= most:
        fail(f"--shallow {k}: expected 0 to {most}, the most that can alternate in {layers} layers")
    first = (layers - 2 * k + 1) // 2
    chosen = range(first, first + 2 * k, 2)
    return tuple(rule if layer in chosen else FULL for layer in range(layers))


PLANS = {
    "dense": lambda layers, k: (FULL,) * layers,
    "himix": lambda layers, k: (HIMIX,) * layers,
    "hmgen": lambda layers, k: alternating(SHALLOW, layers, k),
    "naive": lambda layers, k: alternating(NAIVE, layers, k),
    "freeze": lambda layers, k: (FULL,) + (FREEZE,) * (layers - 1),     # not in the paper
}


def make_plan(name, layers, shallow=None):
    """The plan of that name. shallow: HMGen's K, by default a quarter of the layers (of one or two,
    none); the paper tries 3 and 5 of what are probably 20."""
    if name not in PLANS:                                   # of a run with a plan of its own
        fail(f"plan {name}: expected one of {', '.join(PLANS)}")
    usual = min(max(1, layers // 4), (layers - 1) // 2)
    return PLANS[name](layers, usual if shallow is None else shallow)


def can_generate(plan):
    """Image tokens that are never updated cannot predict the next one."""
    return any(rule.query for rule in plan)


def plans_of(tasks, options, layers):
    """{task: plan} of a run with train.py's options, a dictionary."""
    plans = {task: make_plan(options[f"{task}_plan"], layers, options["shallow"])
             for task in tasks}
    if "gen" in plans and not can_generate(plans["gen"]):
        fail(f"--gen-plan {options['gen_plan']}: expected a plan that updates image tokens")
    return plans


class Layout(NamedTuple):
    """How many tokens of a sequence stand before, in and after its image."""
    before: int
    image: int
    after: int      # 0 in generation, where the image is the output

    def window(self, start, stop):
        """The same from start to stop. In decoding, the tokens before are in a KV cache."""
        edges = 0, self.before, self.before + self.image, sum(self)
        edges = [min(max(edge, start), stop) for edge in edges]
        return Layout(*(end - begin for begin, end in zip(edges, edges[1:])))


def masks(rule, layout):
    """Token-drop masks of a layer: which tokens are queries, which are keys? Two lists of bools."""
    before, image, after = layout
    return ([True] * before + [rule.query] * image + [True] * after,
            [True] * before + [rule.keys != "none"] * image + [True] * after)


def predicting(layout, image_loss=False):
    """The slice of positions that may have a target: the only ones that logits are computed for.

    Generation: from the token before the image to the last but one of the image. Understanding:
    all after the image; with a loss on image tokens also the image and the token before it."""
    before, image, after = layout
    if after == 0:
        return slice(before - 1, before + image - 1)
    return slice(before - 1 if image_loss else before + image, before + image + after)


FFN = 4         # width of the feed-forward network, as a multiple of the model's


def flops(plan, layout, width, vocab, image_loss=False):
    """Floating-point operations of forward and backward for one sequence: every matmul, including
    padding and masked scores, and nothing else. PyTorch's counter agrees (test_flops_are_exact).

    In a layer with q queries and k keys, d = width, these are the multiply-adds:
        query and output projections    2 q d^2
        key and value projections       2 k d^2
        scores, weighted values         2 q k d
        feed-forward network            2 FFN q d^2
    The head takes d * vocab for each position that logits are computed for. A multiply-add is two
    operations. The backward pass costs twice the forward pass: one product for the gradient of the
    input, one for that of the weights. Hence the factor 6."""
    d, span = width, predicting(layout, image_loss)
    multiply_adds = (span.stop - span.start) * d * vocab
    for rule in plan:
        q, k = map(sum, masks(rule, layout))                # how many tokens are queries, keys
        multiply_adds += 2 * q * d * d + 2 * k * d * d + 2 * q * k * d + 2 * FFN * q * d * d
    return 6 * multiply_adds


def paper_cost(plan, layout, width):
    """The paper's formula (sec. 5): q k d + 8 q d^2, where 8 is 2 FFN. It leaves out the four
    projections and counts q k d once, for scores; weighted values take as much again."""
    sizes = (map(sum, masks(rule, layout)) for rule in plan)
    return sum(q * k * width + 2 * FFN * q * width ** 2 for q, k in sizes)


def letters_of(rule, layout):
    """What each token sees in a layer: a line for each query, a letter for each key."""
    image = {"hidden": "i", "embedding": "e", "none": " "}[rule.keys]
    letters = "t" * layout.before + image * layout.image + "t" * layout.after
    return [(letters[:i + 1] if is_query else "-" * sum(layout)).ljust(17)                 # causal
            for i, is_query in enumerate(masks(rule, layout)[0])]


def main():
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    p = PRESETS[parser.parse_args().preset]
    print("What a token (row) sees of others (columns): t text, i the hidden state of an image "
          "token, e its embedding;\n------ is not updated. Understanding, then generation.\n")
    for layout in (Layout(2, 6, 5), Layout(6, 7, 0)):
        print("".join(name.ljust(17) for name in NAMES.values()))
        for lines in zip(*(letters_of(rule, layout) for rule in NAMES)):
            print("".join(lines))

    image, vocab = (p.image_size // p.patch) ** 2, FIRST_CODE + p.codes
    layouts = {"und": Layout(2, image, p.max_text), "gen": Layout(p.max_text * 2 // 5, image, 0)}
    dense = make_plan("dense", p.layers)
    for task, layout in layouts.items():
        print(f"\n{task}, assumed sequence: {layout}, width {p.width}; forward and backward")
        print(f"{'plan':10}{'layers':14}{'GFLOP':>8}{'of dense':>10}{'by paper':>10}")
        for name in PLANS:
            plan = make_plan(name, p.layers)
            if task == "gen" and not can_generate(plan):
                continue
            rules = "".join(NAMES.get(rule, "?")[0] for rule in plan)
            exact = flops(plan, layout, p.width, vocab)
            of_dense = exact / flops(dense, layout, p.width, vocab)
            by_paper = paper_cost(plan, layout, p.width) / paper_cost(dense, layout, p.width)
            print(f"{name:10}{rules:14}{exact / 1e9:8.3f}{of_dense:10.2f}{by_paper:10.2f}")


if __name__ == "__main__":
    run_script(main)
