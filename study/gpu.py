"""One visit to a GPU: what is to be measured there, in order of worth, in one command.

    python study/gpu.py --minutes 9 --out DIR       everything
    python study/gpu.py --only right steps          some of it
    python study/gpu.py --minutes 5 --preset tiny --device cpu      a rehearsal without a GPU

Each part is a process of its own with a limit of its own, and prints a line of JSON for each
result at once: DIR/PART.jsonl has them, also if the part is cut short, DIR/PART.log what went
wrong. A part that fails does not keep the others from being done.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from threading import Thread, Timer

from table import ROOT
from common import hardware, pick_device, run_script, script_parser

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import bench_config, bench_step, clean_up, random_batch, synchronize, time_each
from data import PRESETS, usual_preset
from model import Model
from prune import make_plan
from train import TASK_WEIGHT, cuda_graph, forward_backward, parse_options, train

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
    except (Exception, SystemExit):
        emit(**what, error=traceback.format_exc()[-1500:])


def milliseconds(function, device):
    return 1e3 * statistics.median(time_each({"": function}, device, 15)[""])


def train_here(*arguments):
    """As train.py does; stdout is for JSON."""
    with redirect_stdout(sys.stderr):
        train(*parse_options(list(map(str, arguments))))


# ---------------------------------------------------------------------- the parts

def versions(preset, device, out):
    emit(torch=torch.__version__, cuda=torch.version.cuda, hardware=hardware(device), preset=preset)
    if device.type == "cuda":
        emit(free_and_all_memory=torch.cuda.mem_get_info(), built_for=torch.cuda.get_arch_list())


def resume(preset, device, out):
    """Is a run with --parts 2 that is stopped and resumed the unbroken one, as CUDA graphs? And has
    it the losses of one whose steps are launched kernel by kernel?"""
    def stop(log):
        while not log.exists() or log.read_text().count("\n") < 3:
            time.sleep(.01)
        os.kill(os.getpid(), signal.SIGTERM)                # train.py saves at this, and ends

    ends = {}
    for name, *more in (("launched", "--out", "--no-compile"), ("unbroken", "--out"),
                        ("stopped", "--out"), ("stopped", "--resume")):
        if (name, *more) == ("stopped", "--out"):
            Thread(target=stop, args=[out / name / "log.jsonl"], daemon=True).start()
        with emit_errors(run=name):                         # one is to be stopped
            train_here("--device", device.type, "--preset", "tiny", "--parts", 2, "--tokenizer",
                       out / "tiny.pt", more[0], out / name, *more[1:])
            ends[name] = torch.load(out / name / "checkpoint.pt")
            emit(run=name, losses=[row["loss"] for row in ends[name]["log"]])
    emit(largest_difference=max(
        (weight - ends["stopped"]["model"][name]).abs().max().item()
        for name, weight in ends["unbroken"]["model"].items()))


def right(preset, device, out):
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


KINDS = {"matmul": ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::bmm"),
         "attention": ("flash", "fmha", "sdpa", "attention"), "compiled": ("triton",),
         "copies": ("memcpy", "memset", "copy")}            # kind: parts of kernels' names


def profile(preset, device, out):
    """The 25 kernels that take longest in a step, and sums by kind, ms."""
    cuda, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    c, rows = bench_config(preset), PRESETS[preset].batch_size
    for task, name, _ in CASES[:2]:
        clean_up()
        step = bench_step(task, make_plan(name, c.layers), c, rows, device, compiled=cuda)
        for _ in range(3):
            step()
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as found:
            step()
            synchronize(device)
        times, sums = Counter(), Counter()
        for event in found.key_averages():
            ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
            kind = next((kind for kind, words in KINDS.items()
                         if any(word in event.key.lower() for word in words)), "other")
            times[f"{event.count} x {event.key[:150]}"] += ms
            sums[kind] += ms
        emit(task=task, plan=name, all_ms=sum(times.values()), by_kind=sums)
        for kernel, ms in times.most_common(25):
            emit(task=task, plan=name, kernel=kernel, ms=ms)


def attention(preset, device, out):
    """Attention alone, forward and backward, ms: with the mask, and causal without one."""
    c, rows = bench_config(preset), PRESETS[preset].batch_size
    shape = rows, c.heads, sum(c.layout("und")), c.width // c.heads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype).requires_grad_()
    mask = torch.ones(rows, 1, shape[2], shape[2], dtype=torch.bool, device=device).tril()
    for backend, how in (("CUDNN_ATTENTION", {"attn_mask": mask}),
                         ("EFFICIENT_ATTENTION", {"attn_mask": mask}),
                         ("FLASH_ATTENTION", {"is_causal": True})):
        def passes():
            F.scaled_dot_product_attention(q, k, v, **how).sum().backward(retain_graph=True)

        with emit_errors(attention=backend), sdpa_kernel(getattr(SDPBackend, backend)):
            emit(attention=backend, **dict.fromkeys(how, True), ms=milliseconds(passes, device))


def steps(preset, device, out):
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


def runs(preset, device, out):
    """Understanding alone, then jointly, as far as there is time: what is there to gain?"""
    for objective in ("und", "joint"):
        with emit_errors(objective=objective):
            train_here("--preset", preset, "--device", device.type, "--objective", objective,
                       "--steps", PRESETS[preset].steps // 2, "--seed", 1, "--tokenizer",
                       out / f"{preset}.pt", "--out", out / objective)
            emit(**json.loads((out / objective / "eval.json").read_text()))


# In this order, with seconds that each may take at most.
PARTS = {versions: 30, resume: 90, right: 110, profile: 70, attention: 40, steps: 150, runs: 600}


# ---------------------------------------------------------------------- the visit

def run_part(name, seconds, arguments, out):
    """A part in a process of its own, whose results are printed and kept as they come."""
    print(f"=== {name}, at most {seconds:.0f} s", flush=True)
    command = [sys.executable, __file__, *arguments, "--part", name, "--out", out]
    with (out / f"{name}.log").open("w") as log, (out / f"{name}.jsonl").open("w") as results, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        # train.py saves at the first, for which it may need some time.
        timers = Timer(seconds, process.terminate), Timer(seconds + 20, process.kill)
        for timer in timers:
            timer.start()
        for line in process.stdout:
            for file in (sys.stdout, results):
                print(line, end="", flush=True, file=file)
        status = process.wait()
        for timer in timers:
            timer.cancel()
    print(f"=== {name}: exit status {status}", flush=True)


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
        return names[args.part](preset, device, out)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        left = 60 * args.minutes - (time.time() - began)
        if left > 5:
            run_part(name, min(left, PARTS[names[name]]),
                     ["--preset", preset, "--device", device.type], out)


if __name__ == "__main__":
    run_script(main)
