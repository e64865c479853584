"""One visit to a GPU: what is to be measured there, in order of worth, in one command.

    python study/gpu.py --minutes 9 --out DIR       everything
    python study/gpu.py --only right steps          some of it
    python study/gpu.py --minutes 5 --preset tiny --device cpu      a rehearsal without a GPU

Each part is a process of its own with a limit of its own, and prints a line of JSON for each
result at once: DIR/PART.jsonl has them, also if the part is cut short, DIR/PART.log what went
wrong. A part that fails does not keep the others from being done.
"""
import json
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from table import ROOT
from common import hardware, pick_device, run_script, script_parser

import torch

from bench import bench_config, bench_step, clean_up, random_batch, time_each
from data import PRESETS, usual_preset
from model import Model
from prune import make_plan
from train import TASK_WEIGHT, cuda_graph, forward_backward

# Steps that are looked at: task, plan, projections.
CASES = [("und", "dense", "shared"), ("und", "himix", "shared"), ("und", "freeze", "shared"),
         ("gen", "dense", "shared"), ("gen", "hmgen", "shared"), ("und", "himix", "task")]


def emit(**result):
    """One result, as a line of JSON."""
    print(json.dumps(result), flush=True)


@contextmanager
def emit_errors(**what):
    """A failure is a result, too, and the next measurement is still worth making."""
    try:
        yield
    except (Exception, SystemExit):             # common.fail raises the latter
        emit(**what, error=traceback.format_exc()[-1500:])


def milliseconds(function, device):
    return 1e3 * time_each({"": function}, device, 15)[""]


# ---------------------------------------------------------------------- the parts

def versions(preset, device):
    emit(torch=torch.__version__, cuda=torch.version.cuda, hardware=hardware(device), preset=preset)
    if device.type == "cuda":
        emit(free_and_all_memory=torch.cuda.mem_get_info(), built_for=torch.cuda.get_arch_list())


def right(preset, device):
    """Is what a GPU does for speed also right? Losses and gradient norms of one step in float32, in
    mixed precision, in two parts, compiled, and as a CUDA graph."""
    rows, cuda = PRESETS[preset].batch_size, device.type == "cuda"
    for task, name, projections in CASES:
        clean_up()
        c, found = bench_config(preset, None, projections), {}
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
            with emit_errors(task=task, plan=name, projections=projections, how=how):
                if how == "graph":
                    passes = cuda_graph(passes, model, index)
                loss = (in_float32 if how == "float32" else passes)(index)[task].item()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                found[how] = loss, torch.nn.utils.get_total_norm(gradients).item()
            model.zero_grad()
        emit(task=task, plan=name, projections=projections, loss_and_gradient_norm=found)


def steps(preset, device):
    """Training steps as train.py takes them: CUDA graphs, one at a time."""
    rows, compiled = PRESETS[preset].batch_size, device.type == "cuda"
    every = [(case, rows, {}) for case in CASES]
    every += [(CASES[0], rows, {"muon": False}), (CASES[0], rows, {"usual": True})]
    every += [(case, 2 * rows, {}) for case in CASES[:2]]
    for (task, name, projections), n, how in every:
        clean_up()
        what = dict(task=task, plan=name, projections=projections, rows=n, **how)
        with emit_errors(**what):
            c = bench_config(preset, None, projections)
            plan, dense = make_plan(name, c.layers), make_plan("dense", c.layers)
            given = task, plan, c, n, device, compiled
            ms = milliseconds(bench_step(*given, **how), device)
            launched_ms = milliseconds(bench_step(*given, **how, graph=False), device)
            emit(**what, ms=ms, launched_ms=launched_ms,
                 memory_mb=torch.cuda.max_memory_allocated() / 2 ** 20,
                 tflop_per_s=n * c.flops(task, plan) / ms / 1e9,    # of a GPT: as if it were ours
                 flops_ratio=c.flops(task, plan) / c.flops(task, dense))


# In this order, with seconds that each may take at most.
PARTS = {versions: 30, right: 150, steps: 200}


# ---------------------------------------------------------------------- the visit

def run_part(name, seconds, arguments, out):
    """A part in a process of its own, whose results are kept as they come, and printed."""
    command = [sys.executable, __file__, *arguments, "--part", name]
    with (out / f"{name}.log").open("w") as log, (out / f"{name}.jsonl").open("w") as results:
        try:
            status = subprocess.run(command, stdout=results, stderr=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
    print(f"=== {name}: {status}\n{(out / f'{name}.jsonl').read_text()}", flush=True)


def main():
    began, names = time.time(), {part.__name__: part for part in PARTS}
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="PART",
                        help=f"some of: {', '.join(names)}")
    parser.add_argument("--part", choices=names, help="that part, in this process")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    args = parser.parse_args()
    device, out = pick_device(args.device), args.out.resolve()
    preset = args.preset or usual_preset(device)
    if args.part:
        return names[args.part](preset, device)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        left = 60 * args.minutes - (time.time() - began)
        if left > 5:
            run_part(name, min(left, PARTS[names[name]]),
                     ["--preset", preset, "--device", device.type], out)


if __name__ == "__main__":
    run_script(main)
