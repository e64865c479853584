"""What every plan saves: the time of a training step beside its FLOPs, on random tokens.

    python study/bench.py [--preset gpu] [--compile]        study/results/bench-PRESET.json and .png

Nothing is learned, so a step costs what it costs in training. Steps take turns, so that what else
the machine does hits all alike; times are medians.
"""
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import (cuda_graph, hardware, line_chart, mixed_precision, pick_device, run_script,
                    save_picture, script_parser, write_file)

import torch

from data import PATCH, PRESETS
from model import PROJECTIONS, Batch, Config, Model
from prune import PLANS, can_generate, make_plan, paper_cost, usual_shallow
from table import RESULTS, markdown
from tokenizer import FIRST_CODE, default_preset
from train import apply_gradients, optimizers_of


def synchronize(device):
    """Wait until the device has done all that it was given: before a clock is read."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_each(work, device, repeats):
    """{name: function} -> {name: [seconds]}. One round warms up; then the functions take turns, so
    that what else the machine does hits all alike."""
    seconds = {name: [] for name in work}
    for i in range(1 + repeats):
        for name, function in work.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: of_name[1:] for name, of_name in seconds.items()}


def timing(seconds, tokens):
    """What a table has of a step's times."""
    ms = [1e3 * x for x in seconds]
    return {"ms": statistics.median(ms), "ms_range": [min(ms), max(ms)],
            "tokens_per_s": tokens / statistics.median(seconds)}


def ms_cell(row):
    return "{:.0f} ({:.0f}, {:.0f})".format(row["ms"], *row["ms_range"])


def bench_config(preset, side=None, projections="shared"):
    """The Config of a preset. Text tokens are as many as it may have at most, before the image two
    fifths of that: a run measures its own."""
    p = PRESETS[preset]
    return Config(FIRST_CODE + p.codes, p.layers, p.width, p.heads, side or p.image_size // PATCH,
                  p.max_text, p.max_text * 2 // 5, projections)


def random_batch(task, c, rows):
    """A Batch of random tokens without padding: one stream, a target at each position."""
    before, m, after = layout = c.layout(task)
    tokens = torch.randint(FIRST_CODE, (rows, sum(layout)))
    tokens[:, before:before + m] = torch.randint(FIRST_CODE, c.vocab, (rows, m))
    position_ids = torch.arange(sum(layout))[:, None].expand(rows, -1, 2)
    everywhere = torch.ones(tokens.shape)
    return Batch(task, layout, False, tokens, position_ids, torch.zeros_like(tokens),
                 tokens.roll(-1, 1), everywhere, everywhere.bool())


def bench_step(task, plan, c, rows, device, compiled, muon=True, graph=True):
    """A function that takes one training step on random tokens, as train.py does. Without `muon`,
    AdamW updates the matrices, too. graph: on CUDA, a compiled step is a CUDA graph."""
    torch.manual_seed(0)
    model = Model(c).to(device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    batch, optimizers = random_batch(task, c, rows).to(device), optimizers_of(model, 1e-3)
    if not muon:
        matrices = optimizers[0].param_groups[0]["params"]
        optimizers = torch.optim.AdamW(matrices, 1e-3, fused=True), optimizers[1]

    def forward_backward():
        with mixed_precision(device):
            _, loss = model(batch, plan)
        loss.backward()

    if compiled and graph and device.type == "cuda":
        forward_backward = cuda_graph(forward_backward, model)

    def step():
        forward_backward()
        apply_gradients(optimizers)

    return step


def memory_of(step, device):
    """MB that a step takes at its peak on CUDA, beside what is there anyway; elsewhere what its
    forward pass keeps for the backward pass, weights included. Not for a CUDA graph: it allocates
    nothing."""
    step()                                                  # the optimizers' memory is there now
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    return sum(kept.values()) / 2 ** 20


def time_steps(cases, shallow, device, compiled, matmul_rate, repeats):
    """Time and memory of training steps beside the dense one of the same task and Config. cases:
    [(task, plan name, Config, sequences)]."""
    rows, steps = [], {}
    for i, (task, name, c, n) in enumerate(cases):
        plan, dense = make_plan(name, c.layers, shallow), make_plan("dense", c.layers)
        steps[i] = bench_step(task, plan, c, n, device, compiled)
        layout = c.layout(task)
        rows.append({
            "task": task, "plan": name, "projections": c.projections, "image_tokens": c.side ** 2,
            "batch_size": n, "flops": n * c.flops(task, plan),
            "flops_ratio": c.flops(task, plan) / c.flops(task, dense),
            "paper_ratio": paper_cost(plan, layout, c.width) / paper_cost(dense, layout, c.width),
            "memory_mb": memory_of(
                bench_step(task, plan, c, n, device, compiled, graph=False), device)})
    seconds = time_each(steps, device, repeats)
    for i, row in enumerate(rows):
        task, _, c, n = cases[i]
        row |= timing(seconds[i], n * sum(c.layout(task)))
        row["of_matmul_rate"] = 1e3 * row["flops"] / row["ms"] / matmul_rate
        key = row["task"], row["projections"], row["image_tokens"]
        dense = next(x for x in rows[:i + 1] if x["plan"] == "dense"
                     and (x["task"], x["projections"], x["image_tokens"]) == key)
        row["time_ratio"] = row["ms"] / dense["ms"]
    return rows


@torch.no_grad()
def time_drawing(name, c, shallow, device, rows=8):
    """Images a second that are drawn with and without the KV cache, and the share of codes that
    come out the same."""
    torch.manual_seed(0)
    model, plan = Model(c).to(device).eval(), make_plan(name, c.layers, shallow)
    batch, start, codes = random_batch("gen", c, rows).to(device), c.gen_text, {}
    for p in model.parameters():
        p.add_(.1 * torch.randn_like(p))        # a new model gives all codes the same chance

    def cached():
        tokens = model.generate(batch, plan, start, lambda logits: logits.argmax(-1))
        codes["cached"] = tokens.clone()

    def uncached():
        """The readable twin of `generate`: for each token, all before it once more."""
        for stop in range(start, batch.tokens.size(1)):
            so_far = batch.layout._replace(image=stop - start)
            part = Batch("gen", so_far, False, *(x[:, :stop] for x in batch[3:]))
            logits = model.head(model.norm(model.gathered(part, plan)[:, -1]))
            batch.tokens[:, stop] = logits.argmax(-1)
        codes["uncached"] = batch.tokens.clone()

    seconds = time_each({"cached": cached, "uncached": uncached}, device, 3)
    same = (codes["cached"] == codes["uncached"])[:, start:].float().mean().item()
    row = {"plan": name, "image_tokens": c.side ** 2, "batch_size": rows, "same_codes": same}
    for how, times in seconds.items():
        row[f"{how}_images_per_s"] = rows / statistics.median(times)
    return row


def bench(preset, batch_size, shallow, device, compiled, repeats=7, sides=(8, 16, 32)):
    """All that is measured, as bench-PRESET.json has it. sides: of images, in tokens; drawing is
    measured with the second."""
    edge, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, edge, edge, device=device, dtype=dtype)
    seconds = time_each({"matmul": lambda: a @ b}, device, 10)["matmul"]
    rate = 2 * edge ** 3 / statistics.median(seconds)
    every = [(task, name, bench_config(preset, None, projections), batch_size)
             for projections in PROJECTIONS for task in ("und", "gen") for name in PLANS
             if task == "und" or can_generate(make_plan(name, 4))]
    sizes = [(task, name, bench_config(preset, side), batch_size) for side in sides
             for task, name in (("und", "dense"), ("und", "himix"), ("gen", "dense"),
                                ("gen", "hmgen"))]
    return {"hardware": hardware(device), "preset": preset, "batch_size": batch_size,
            "shallow": shallow, "compile": compiled, "matmul_flops_per_s": rate,
            "steps": time_steps(every, shallow, device, compiled, rate, repeats),
            "image_tokens": time_steps(sizes, shallow, device, compiled, rate, repeats),
            "drawing": [time_drawing(name, bench_config(preset, sides[1]), shallow, device)
                        for name in ("dense", "hmgen")]}


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--batch-size", type=int, help="sequences in a step")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = pick_device(args.device)
    preset = args.preset or default_preset(device)
    n = args.batch_size or PRESETS[preset].batch_size
    torch._dynamo.config.recompile_limit = 1000             # the code of every row stays
    result = bench(preset, n, usual_shallow(PRESETS[preset].layers), device, args.compile)
    path = RESULTS / f"bench-{preset}.json"
    write_file(path, json.dumps(result, indent=1))
    lines = {}
    for x in result["image_tokens"]:
        line = lines.setdefault(f"{x['task']} {x['plan']}", [])
        line.append((x["image_tokens"], x["ms"] / n))
    title = "ms a picture in a training step"
    most = max(ms for line in lines.values() for _, ms in line)
    save_picture(line_chart(lines, title, "image tokens", top_y=most), path.with_suffix(".png"))
    print(f"{result['hardware']}; preset {preset}, {n} sequences a step, K = {result['shallow']}; "
          f"matmuls alone {result['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s")
    for key in ("steps", "image_tokens"):
        print("\n" + markdown(
            ["task", "plan", "projections", "image tokens", "ms (least, most)", "tokens/s",
             "memory, MB", "time", "FLOPs", "time / FLOPs", "paper's FLOPs", "of the matmul rate"],
            [[x["task"], x["plan"], x["projections"], x["image_tokens"],
              ms_cell(x), f"{x['tokens_per_s']:.0f}",
              f"{x['memory_mb']:.0f}", f"{x['time_ratio']:.2f}", f"{x['flops_ratio']:.2f}",
              f"{x['time_ratio'] / x['flops_ratio']:.2f}", f"{x['paper_ratio']:.2f}",
              f"{x['of_matmul_rate']:.2f}"] for x in result[key]], 3))
    for x in result["drawing"]:
        print("\ndrawing, {plan}, {image_tokens} image tokens, batch {batch_size}: "
              "{cached_images_per_s:.2f} images/s with the KV cache, {uncached_images_per_s:.2f} "
              "without; {same_codes:.0%} of codes the same".format(**x))
    print(f"\n{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
