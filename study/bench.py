"""What every plan saves: the time of a training step beside its FLOPs, on random tokens.

    python study/bench.py [--preset tiny]           study/results/bench-PRESET.json
    python study/gpu.py --only steps                compiled, and as CUDA graphs

Steps take turns, so that what else the machine does hits all alike; times are medians. Also: a GPT
written the usual way (nanoGPT's structure: LayerNorm, one QKV product, GELU, learned positions,
tied head, loss at every position, AdamW), and drawing with and without the KV cache.
"""
import gc
import json
import statistics
import time

from table import RESULTS, markdown
from common import has_bfloat16, hardware, pick_device, run_script, script_parser, write_file

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import PRESETS, usual_preset
from model import Batch, Config, Model
from prune import PLANS, can_generate, make_plan
from tokenizer import FIRST_CODE
from train import apply_gradients, cuda_graph, optimizers_of


def bench_config(preset, side=None):
    """The Config of a preset, with as many text tokens as it allows, and captions two fifths as
    long. (A run takes both lengths from its data.)"""
    p = PRESETS[preset]
    side = side or p.image_size // p.patch
    layouts = {"und": (2, side ** 2, p.max_text), "gen": (p.max_text * 2 // 5, side ** 2, 0)}
    return Config(FIRST_CODE + p.codes, p.layers, p.width, p.heads, side, layouts)


def random_batch(task, c, rows):
    """A Batch of random tokens without padding: one stream, a target at each position."""
    before, m, _ = layout = c.layout(task)
    tokens = torch.randint(FIRST_CODE, (rows, sum(layout)))
    tokens[:, before:before + m] = torch.randint(FIRST_CODE, c.vocab, (rows, m))
    position_ids = torch.arange(sum(layout))[:, None].expand(rows, -1, 2)
    everywhere = torch.ones_like(tokens)
    return Batch(task, layout, False, tokens, position_ids, 0 * tokens, tokens.roll(-1, 1),
                 everywhere.float(), everywhere.bool())


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


def bench_step(task, plan, c, rows, device, compiled=False, muon=True, graph=True, usual=False):
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

    nothing = torch.zeros(1, device=device)                 # a graph copies what changes

    def forward_backward(_):
        with torch.autocast("cuda", torch.bfloat16, enabled=has_bfloat16(device)):
            loss = model(batch.tokens) if usual else model(batch, plan)[1]
        loss.backward()

    if compiled and graph and device.type == "cuda":
        forward_backward = cuda_graph(forward_backward, model, nothing)

    def step():
        forward_backward(nothing)
        apply_gradients(optimizers)

    return step


def time_each(work, device, repeats):
    """{name: function} -> {name: median of seconds}. One round warms up; then they take turns."""
    def now():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()       # all that the device was given is done
        return time.perf_counter()

    seconds = {name: [] for name in work}
    for _ in range(1 + repeats):
        for name, function in work.items():
            start = now()
            function()
            seconds[name].append(now() - start)
    return {name: statistics.median(of_name[1:]) for name, of_name in seconds.items()}


def clean_up():
    """Frees compiled code, and graphs with all they hold, before the next steps."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_steps(c, names, rows, device, repeats, beside=()):
    """Training steps of both tasks under these plans. beside: {name: other options of bench_step},
    of dense steps to be timed, too."""
    found = []
    for task in ("und", "gen"):
        plans = {name: make_plan(name, c.layers) for name in names}
        plans = {name: plan for name, plan in plans.items() if task == "und" or can_generate(plan)}
        work = {name: bench_step(task, plan, c, rows, device) for name, plan in plans.items()}
        work |= {name: bench_step(task, plans["dense"], c, rows, device, **beside[name])
                 for name in beside}
        flops = {name: c.flops(task, plan) for name, plan in plans.items()}
        times = time_each(work, device, repeats)
        found += [{"task": task, "plan": name, "image_tokens": c.side ** 2, "ms": 1e3 * seconds,
                   "tokens_per_s": rows * sum(c.layout(task)) / seconds,
                   "time_ratio": seconds / times["dense"],
                   "flops_ratio": flops.get(name, flops["dense"]) / flops["dense"]}
                  for name, seconds in times.items()]
    return found


@torch.no_grad()
def time_drawing(name, c, device, rows=8):
    """Images a second that are drawn with and without the KV cache, and the share of codes that
    come out the same."""
    torch.manual_seed(0)
    model, plan = Model(c).to(device).eval(), make_plan(name, c.layers)
    batch, start = random_batch("gen", c, rows).to(device), c.layout("gen").before
    for p in model.parameters():
        p.add_(.1 * torch.randn_like(p))        # a new model gives all codes the same chance

    def cached():
        return model.generate(batch, plan, start, lambda logits: logits.argmax(-1)).clone()

    def uncached():
        """The readable twin of `generate`: for each token, all before it once more."""
        for stop in range(start, batch.tokens.size(1)):
            x = model.gathered(batch, plan, 0, stop)[:, -1]
            batch.tokens[:, stop] = model.head(model.norm(x)).argmax(-1)
        return batch.tokens

    seconds = time_each({"cached": cached, "uncached": uncached}, device, 3)
    same = (cached() == uncached())[:, start:].float().mean().item()
    return {"plan": name, "image_tokens": c.side ** 2, "batch_size": rows, "same_codes": same,
            **{f"{how}_images_per_s": rows / time for how, time in seconds.items()}}


def bench(preset, device, repeats, sides=(8, 16, 32)):
    """All that is measured, as bench-PRESET.json has it. sides: of images, in tokens; drawing is
    measured with the second."""
    given = PRESETS[preset].batch_size, device, repeats
    beside = {"dense, AdamW alone": {"muon": False}, "usual GPT": {"usual": True}}
    return {"hardware": hardware(device), "preset": preset, "batch_size": given[0],
            "steps": time_steps(bench_config(preset), PLANS, *given, beside),
            "image_tokens": [row for side in sides for row in time_steps(
                bench_config(preset, side), ("dense", "himix", "hmgen"), *given)],
            "drawing": [time_drawing(name, bench_config(preset, sides[1]), device)
                        for name in ("dense", "hmgen")]}


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--repeats", type=int, default=7, help="of timed steps (default: 7)")
    args = parser.parse_args()
    device = pick_device(args.device)
    found = bench(args.preset or usual_preset(device), device, args.repeats)
    path = RESULTS / f"bench-{found['preset']}.json"
    write_file(path, json.dumps(found, indent=1))
    print(f"{found['hardware']}; {found['batch_size']} sequences a step")
    for part in ("steps", "image_tokens", "drawing"):
        rows = [[f"{x:.2f}" if isinstance(x, float) else x for x in row.values()]
                for row in found[part]]
        print(f"\n{part}:\n{markdown(list(found[part][0]), rows)}")
    print(f"\n{path}")


if __name__ == "__main__":
    run_script(main)
