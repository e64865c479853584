"""What every plan saves: the time of a training step beside its FLOPs, on random tokens.

    python study/bench.py [--preset gpu] [--compile]        study/results/bench-PRESET.json and .png

Nothing is learned, so a step costs what it costs in training. Each step takes turns with the dense
one, so that what else the machine does hits both alike; times are medians. Also: a GPT written the
usual way beside ours (nanoGPT's structure: LayerNorm, one QKV product, GELU, learned positions,
tied head, logits and loss at every position, AdamW), and drawing with and without the KV cache.
"""
import gc
import json
import statistics
import time

from table import RESULTS, markdown
from common import (has_bfloat16, hardware, line_chart, pick_device, run_script, save_picture,
                    script_parser, write_file)

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import PRESETS, usual_preset
from model import PROJECTIONS, Batch, Config, Model
from prune import PLANS, can_generate, make_plan, paper_cost
from tokenizer import FIRST_CODE
from train import apply_gradients, cuda_graph, optimizers_of


# ---------------------------------------------------------------------- what is timed

def bench_config(preset, side=None, projections="shared"):
    """The Config of a preset. Text tokens are as many as it may have at most, before the image two
    fifths of that: a run measures its own."""
    p = PRESETS[preset]
    side = side or p.image_size // p.patch
    layouts = {"und": (2, side ** 2, p.max_text), "gen": (p.max_text * 2 // 5, side ** 2, 0)}
    return Config(FIRST_CODE + p.codes, p.layers, p.width, p.heads, side, layouts, projections)


def random_batch(task, c, rows):
    """A Batch of random tokens without padding: one stream, a target at each position."""
    before, m, after = layout = c.layout(task)
    tokens = torch.randint(FIRST_CODE, (rows, sum(layout)))
    tokens[:, before:before + m] = torch.randint(FIRST_CODE, c.vocab, (rows, m))
    position_ids = torch.arange(sum(layout))[:, None].expand(rows, -1, 2)
    everywhere = torch.ones(tokens.shape)
    return Batch(task, layout, False, tokens, position_ids, torch.zeros_like(tokens),
                 tokens.roll(-1, 1), everywhere, everywhere.bool())


class GPTBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The usual GPT, as large as a Config's model."""

    def __init__(self, c, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab, c.width), nn.Embedding(length, c.width)
        self.blocks = nn.Sequential(*(GPTBlock(c.width, c.heads) for _ in range(c.layers)))
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def bench_step(task, plan, c, rows, device, compiled, muon=True, graph=True, usual=False):
    """A function that takes one training step on random tokens, as train.py does: compiled, on
    CUDA, as a CUDA graph. Without `muon`, AdamW updates the matrices, too. usual: of the usual GPT
    instead."""
    torch.manual_seed(0)
    batch = random_batch(task, c, rows).to(device)
    model = (GPT(c, sum(batch.layout)) if usual else Model(c)).to(device)
    optimizers = optimizers_of(model, 1e-3)
    if usual or not muon:
        matrices = optimizers[0].param_groups[0]["params"]
        optimizers = torch.optim.AdamW(matrices, 1e-3, fused=True), optimizers[1]
    if compiled:
        for module in [model] if usual else model.blocks:
            module.compile(dynamic=False)

    def forward_backward():
        with torch.autocast("cuda", torch.bfloat16, enabled=has_bfloat16(device)):
            loss = model(batch.tokens) if usual else model(batch, plan)[1]
        loss.backward()

    if compiled and graph and device.type == "cuda":
        forward_backward = cuda_graph(forward_backward, model)

    def step():
        forward_backward()
        apply_gradients(optimizers)

    return step


def synchronize(device):
    """Wait until the device has done all that it was given: before a clock is read."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_each(work, device, repeats):
    """{name: function} -> {name: [seconds]}. One round warms up; then the functions take turns."""
    seconds = {name: [] for name in work}
    for i in range(1 + repeats):
        for name, function in work.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: of_name[1:] for name, of_name in seconds.items()}


def clean_up():
    """Before the next steps: compiled code, and graphs with all that they hold, go."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------- what is measured

def time_step(task, name, c, rows, device, compiled, repeats):
    """A training step's time beside that of the dense one of the same task and Config."""
    clean_up()
    plans = {each: make_plan(each, c.layers) for each in ("dense", name)}
    seconds = time_each({each: bench_step(task, plan, c, rows, device, compiled)
                         for each, plan in plans.items()}, device, repeats)
    ms = {each: 1e3 * statistics.median(of_plan) for each, of_plan in seconds.items()}
    flops = {each: c.flops(task, plan) for each, plan in plans.items()}
    by_paper = {each: paper_cost(plan, c.layout(task), c.width) for each, plan in plans.items()}
    return {"task": task, "plan": name, "projections": c.projections, "image_tokens": c.side ** 2,
            "ms": ms[name], "tflop_per_s": rows * flops[name] / ms[name] / 1e9,
            "time_ratio": ms[name] / ms["dense"], "flops_ratio": flops[name] / flops["dense"],
            "paper_ratio": by_paper[name] / by_paper["dense"]}


def time_beside(task, c, rows, device, compiled, repeats):
    """Tokens a second of dense training, with AdamW alone, and of the usual GPT."""
    clean_up()
    given = task, make_plan("dense", c.layers), c, rows, device, compiled
    steps = {"ours": bench_step(*given), "ours, AdamW alone": bench_step(*given, muon=False),
             "usual GPT": bench_step(*given, usual=True)}
    tokens = rows * sum(c.layout(task))
    return {"task": task, **{name: tokens / statistics.median(seconds)
                             for name, seconds in time_each(steps, device, repeats).items()}}


@torch.no_grad()
def time_drawing(name, c, device, rows=8):
    """Images a second that are drawn with and without the KV cache, and the share of codes that
    come out the same."""
    torch.manual_seed(0)
    model, plan = Model(c).to(device).eval(), make_plan(name, c.layers)
    batch, start, codes = random_batch("gen", c, rows).to(device), c.layout("gen").before, {}
    for p in model.parameters():
        p.add_(.1 * torch.randn_like(p))        # a new model gives all codes the same chance

    def cached():
        tokens = model.generate(batch, plan, start, lambda logits: logits.argmax(-1))
        codes["cached"] = tokens.clone()

    def uncached():
        """The readable twin of `generate`: for each token, all before it once more."""
        for stop in range(start, batch.tokens.size(1)):
            x = model.gathered(batch, plan, 0, stop)[:, -1]
            batch.tokens[:, stop] = model.head(model.norm(x)).argmax(-1)
        codes["uncached"] = batch.tokens.clone()

    seconds = time_each({"cached": cached, "uncached": uncached}, device, 3)
    same = (codes["cached"] == codes["uncached"])[:, start:].float().mean().item()
    return {"plan": name, "image_tokens": c.side ** 2, "batch_size": rows, "same_codes": same,
            **{f"{how}_images_per_s": rows / statistics.median(times)
               for how, times in seconds.items()}}


def bench(preset, rows, device, compiled, repeats, sides=(8, 16, 32)):
    """All that is measured, as bench-PRESET.json has it. sides: of images, in tokens; drawing is
    measured with the second."""
    given = rows, device, compiled, repeats
    every = [(task, name, bench_config(preset, None, projections))
             for projections in PROJECTIONS for task in ("und", "gen") for name in PLANS
             if task == "und" or can_generate(make_plan(name, PRESETS[preset].layers))]
    methods = ("und", "dense"), ("und", "himix"), ("gen", "dense"), ("gen", "hmgen")
    sizes = [(*method, bench_config(preset, side)) for side in sides for method in methods]
    return {"hardware": hardware(device), "preset": preset, "batch_size": rows, "compile": compiled,
            "steps": [time_step(*case, *given) for case in every],
            "image_tokens": [time_step(*case, *given) for case in sizes],
            "beside": [time_beside(task, bench_config(preset), *given) for task in ("und", "gen")],
            "drawing": [time_drawing(name, bench_config(preset, sides[1]), device)
                        for name in ("dense", "hmgen")]}


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--batch-size", type=int, help="sequences in a step")
    parser.add_argument("--repeats", type=int, default=7, help="of timed steps (default: 7)")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = pick_device(args.device)
    preset = args.preset or usual_preset(device)
    rows = args.batch_size or PRESETS[preset].batch_size
    found = bench(preset, rows, device, args.compile, args.repeats)
    path = RESULTS / f"bench-{preset}.json"
    write_file(path, json.dumps(found, indent=1))
    lines = {}
    for x in found["image_tokens"]:
        line = lines.setdefault(f"{x['task']} {x['plan']}", [])
        line.append(x["ms"] / rows)
    most = max(ms for line in lines.values() for ms in line)
    sizes = ", ".join(str(x["image_tokens"]) for x in found["image_tokens"][::4])
    chart = line_chart(lines, "ms a picture in a training step", f"image tokens: {sizes}", most)
    save_picture(chart, path.with_suffix(".png"))
    print(f"{found['hardware']}; preset {preset}, {rows} sequences a step")
    for part in ("steps", "image_tokens", "beside", "drawing"):
        print(f"\n{part}:\n" + markdown(list(found[part][0]), [
            [f"{x:.2f}" if isinstance(x, float) else x for x in row.values()]
            for row in found[part]]))
    print(f"\n{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
