"""What is to be measured on a GPU: is it right, and how fast is it?

    python study/gpu.py [--only right or steps]     a line of JSON for each result
    python study/gpu.py --preset tiny --device cpu  a rehearsal without a GPU
"""
import json
import traceback
from contextlib import contextmanager
from functools import partial

from bench import bench_config, bench_step, clean_up, random_batch, time_each
from common import hardware, pick_device, run_script, script_parser

import torch

from data import PRESETS, usual_preset
from model import Model
from prune import make_plan
from train import TASK_WEIGHT, cuda_graph, forward_backward

CASES = [("und", "dense"), ("und", "himix"), ("und", "freeze"), ("gen", "dense"), ("gen", "hmgen")]


def emit(**result):
    """One result, as a line of JSON."""
    print(json.dumps(result), flush=True)


@contextmanager
def emit_errors(**what):
    """A failure is a result, too, and the next measurement is still worth making."""
    try:
        yield
    except (Exception, SystemExit):                         # common.fail raises the latter
        emit(**what, error=traceback.format_exc()[-1500:])


def right(preset, device):
    """Is what a GPU does for speed also right? Losses and gradient norms of one step in float32, in
    mixed precision, in two parts, compiled, and as a CUDA graph."""
    rows, cuda = PRESETS[preset].batch_size, device.type == "cuda"
    for task, name in CASES:
        clean_up()
        c, found = bench_config(preset), {}
        torch.manual_seed(0)
        model, index = Model(c).to(device), torch.arange(rows, device=device)[None]
        for p in model.parameters():
            p.data.add_(.02 * torch.randn_like(p))          # zeros would hide mistakes
        examples = {task: random_batch(task, c, rows).to(device)}
        plans = {task: make_plan(name, c.layers)}

        def in_float32(index):
            loss = model(examples[task], plans[task])[1]
            (TASK_WEIGHT[task] * loss).backward()
            return {task: loss}

        for how in ("float32", "mixed", "two parts", *(("compiled", "graph") if cuda else ())):
            torch.set_float32_matmul_precision("highest" if how == "float32" else "high")
            passes = partial(forward_backward, model, plans, examples, 2 if "two" in how else 1)
            if how == "compiled":
                for block in model.blocks:
                    block.compile(dynamic=False)
            with emit_errors(task=task, plan=name, how=how):
                if how == "graph":
                    passes = cuda_graph(passes, model, index)
                loss = (in_float32 if how == "float32" else passes)(index)[task].item()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                found[how] = loss, torch.nn.utils.get_total_norm(gradients).item()
            model.zero_grad()
        emit(task=task, plan=name, loss_and_gradient_norm=found)


def steps(preset, device):
    """Training steps as train.py takes them, CUDA graphs, and kernel by kernel; one at a time."""
    c, rows, compiled = bench_config(preset), PRESETS[preset].batch_size, device.type == "cuda"
    every = [(case, rows, {}) for case in CASES]
    every += [(CASES[0], rows, {"muon": False}), (CASES[0], rows, {"usual": True})]
    every += [(case, 2 * rows, {}) for case in CASES[:2]]
    for (task, name), n, how in every:
        clean_up()
        what = dict(task=task, plan=name, rows=n, **how)
        with emit_errors(**what):
            plan, dense = make_plan(name, c.layers), make_plan("dense", c.layers)
            given = task, plan, c, n, device, compiled
            ms, launched_ms = (
                1e3 * time_each({"": bench_step(*given, **how, graph=graph)}, device, 15)[""]
                for graph in (True, False))
            emit(**what, ms=ms, launched_ms=launched_ms,
                 memory_mb=torch.cuda.max_memory_allocated() / 2 ** 20,
                 tflop_per_s=n * c.flops(task, plan) / ms / 1e9,    # of a GPT: as if it were ours
                 flops_ratio=c.flops(task, plan) / c.flops(task, dense))


def main():
    parts = {"right": right, "steps": steps}
    parser = script_parser(__doc__)
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    args = parser.parse_args()
    device = pick_device(args.device)
    preset = args.preset or usual_preset(device)
    emit(torch=torch.__version__, cuda=torch.version.cuda, hardware=hardware(device), preset=preset)
    for name in [args.only] if args.only else parts:
        parts[name](preset, device)


if __name__ == "__main__":
    run_script(main)
