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
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

from table import ROOT
from common import hardware, mixed_precision, pick_device, run_script, script_parser

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import (bench_config, bench_step, clean_up, memory_of, random_batch, synchronize,
                   time_each)
from data import PRESETS
from model import Model
from prune import make_plan
from tokenizer import default_preset
from train import cuda_graph, forward_backward, parse_options, train

# Steps that are looked at: task, plan, projections.
CASES = [("und", "dense", "shared"), ("und", "himix", "shared"), ("und", "freeze", "shared"),
         ("gen", "dense", "shared"), ("gen", "hmgen", "shared"), ("und", "himix", "task")]
RUN_STEPS = 1500        # of the runs at the end


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


def milliseconds(function, device, repeats=15):
    return 1e3 * statistics.median(time_each({"": function}, device, repeats)[""])


# ---------------------------------------------------------------------- the parts

def versions(preset, device, out):
    emit(torch=torch.__version__, cuda=torch.version.cuda, hardware=hardware(device), preset=preset)
    if device.type == "cuda":
        emit(capability=torch.cuda.get_device_capability(), free_and_all=torch.cuda.mem_get_info(),
             architectures=torch.cuda.get_arch_list())


def resume(preset, device, out):
    """Is a run with --parts 2 that is stopped and resumed the unbroken one, as CUDA graphs? And do
    both have the losses of steps that are launched one by one?"""
    def run(name, *arguments):
        with redirect_stdout(sys.stderr):                   # stdout is for JSON
            train(*parse_options(["--device", device.type, *map(str, arguments)]))
        rows = [json.loads(line) for line in (out / name / "log.jsonl").open()]
        emit(run=name, first_loss=rows[0]["loss"], last_loss=rows[-1]["loss"])

    def stop(log):
        while not log.exists() or log.read_text().count("\n") < 3:
            time.sleep(.01)
        os.kill(os.getpid(), signal.SIGTERM)                # train.py saves at this

    new = "--preset", "tiny", "--steps", 300, "--parts", 2, "--tokenizer", out / "tiny.pt"
    for name, *more in (("launched", "--no-compile"), ("unbroken",)):
        with emit_errors(run=name):
            run(name, *new, "--out", out / name, *more)
    threading.Thread(target=stop, args=[out / "stopped" / "log.jsonl"], daemon=True).start()
    try:
        run("stopped", *new, "--out", out / "stopped")
    except SystemExit as end:
        emit(run="stopped", status=end.code)
    with emit_errors(run="resumed"):
        run("stopped", "--resume", out / "stopped")
        models = [torch.load(out / name / "checkpoint.pt")["model"]
                  for name in ("unbroken", "stopped")]
        emit(largest_difference=max((models[0][name] - models[1][name]).abs().max().item()
                                    for name in models[0]))


def right(preset, device, out):
    """Is what a GPU does for speed also right? Losses and gradient norms of one step in float32, in
    mixed precision, in two parts, compiled, and as a CUDA graph."""
    rows = PRESETS[preset].batch_size
    for task, name, projections in CASES:
        clean_up()
        c, found = bench_config(preset, None, projections), {}
        torch.manual_seed(0)
        model, index = Model(c).to(device), torch.arange(rows, device=device)[None]
        for p in model.parameters():
            p.data.add_(.02 * torch.randn_like(p))          # zeros would hide mistakes
        examples = {task: random_batch(task, c, rows).to(device)}
        plans = {task: make_plan(name, c.layers)}
        for how in ("float32", "mixed", "two parts", "compiled", "graph"):
            passes = partial(forward_backward, model, plans, examples, 2 if how[:3] == "two" else 1)
            exact = torch.autocast(device.type, enabled=False)
            torch.set_float32_matmul_precision("highest" if how == "float32" else "high")
            if how == "compiled":
                for block in model.blocks:
                    block.compile(dynamic=False)
            with emit_errors(task=task, plan=name, projections=projections, how=how):
                if how == "graph" and device.type == "cuda":
                    passes = cuda_graph(passes, model, index)
                with exact if how == "float32" else nullcontext():
                    loss = passes(index)[task].item()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                found[how] = loss, torch.nn.utils.get_total_norm(gradients).item()
            model.zero_grad()
        emit(task=task, plan=name, projections=projections, loss_and_gradient_norm=found)


def profile(preset, device, out):
    """The 25 kernels that take longest in a step, and sums by kind, ms."""
    kinds = {"matmul": ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::bmm"),
             "attention": ("flash", "fmha", "sdpa", "attention"), "compiled": ("triton",),
             "copies": ("memcpy", "memset", "copy")}
    cuda = device.type == "cuda"
    for task, name, projections in CASES[:2]:
        clean_up()
        c = bench_config(preset, None, projections)
        step = bench_step(task, make_plan(name, c.layers), c, PRESETS[preset].batch_size, device,
                          compiled=cuda)
        for _ in range(3):
            step()
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as found:
            step()
            synchronize(device)
        times, calls, sums = Counter(), Counter(), Counter()
        for event in found.key_averages():
            ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
            kind = next((kind for kind, words in kinds.items()
                         if any(word in event.key.lower() for word in words)), "other")
            times[event.key] += ms
            calls[event.key] += event.count
            sums[kind] += ms
        emit(task=task, plan=name, all_ms=sum(times.values()), by_kind=sums)
        for kernel, ms in times.most_common(25):
            emit(task=task, plan=name, kernel=kernel[:150], ms=ms, calls=calls[kernel])


def attention(preset, device, out):
    """Attention alone, forward and backward, ms: with the mask, and causal without one."""
    c = bench_config(preset)
    n, rows = sum(c.layout("und")), PRESETS[preset].batch_size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(rows, c.heads, n, c.width // c.heads, device=device, dtype=dtype,
                           requires_grad=True) for _ in range(3))
    mask = torch.ones(rows, 1, n, n, dtype=torch.bool, device=device).tril()
    for name, backend, how in (("cuDNN, mask", SDPBackend.CUDNN_ATTENTION, {"attn_mask": mask}),
                               ("efficient, mask", SDPBackend.EFFICIENT_ATTENTION,
                                {"attn_mask": mask}),
                               ("flash, causal", SDPBackend.FLASH_ATTENTION, {"is_causal": True})):
        with emit_errors(attention=name), sdpa_kernel(backend):
            def passes():
                F.scaled_dot_product_attention(q, k, v, **how).sum().backward()
            emit(attention=name, ms=milliseconds(passes, device))


def steps(preset, device, out):
    """Training steps as train.py takes them: CUDA graphs, one at a time."""
    rows, compiled = PRESETS[preset].batch_size, device.type == "cuda"
    every = [(*case, rows, {}) for case in CASES]
    every += [("und", "dense", "shared", rows, {"muon": False}),
              ("und", "dense", "shared", rows, {"usual": True})]
    every += [("und", name, "shared", 2 * rows, {}) for name in ("dense", "himix")]
    for task, name, projections, n, how in every:
        clean_up()
        what = dict(task=task, plan=name, projections=projections, rows=n, **how)
        with emit_errors(**what):
            c = bench_config(preset, None, projections)
            plan, dense = make_plan(name, c.layers), make_plan("dense", c.layers)
            given = task, plan, c, n, device, compiled
            ms = milliseconds(bench_step(*given, **how), device)
            launched = bench_step(*given, **how, graph=False)
            emit(**what, ms=ms, launched_ms=milliseconds(launched, device),
                 memory_mb=memory_of(launched, device),
                 tflop_per_s=None if "usual" in how else n * c.flops(task, plan) / ms / 1e9,
                 flops_ratio=c.flops(task, plan) / c.flops(task, dense))


def runs(preset, device, out):
    """Understanding alone, then jointly, as far as there is time: what is there to gain?"""
    for objective in ("und", "joint"):
        began, folder = time.time(), out / objective
        with emit_errors(objective=objective):
            with redirect_stdout(sys.stderr):
                train(*parse_options([
                    "--preset", preset, "--device", device.type, "--objective", objective,
                    "--steps", str(min(RUN_STEPS, PRESETS[preset].steps)), "--seed", "1",
                    "--tokenizer", str(out / f"{preset}.pt"), "--out", str(folder)]))
            emit(objective=objective, seconds=time.time() - began,
                 **json.loads((folder / "eval.json").read_text()))


# In this order, with seconds that each may take; the last has what is left.
PARTS = {versions: 30, resume: 90, right: 110, profile: 70, attention: 40, steps: 150, runs: 600}


# ---------------------------------------------------------------------- the visit

def run_part(name, seconds, arguments, out):
    """A part in a process of its own, whose results are printed and kept as they come."""
    print(f"=== {name}, at most {seconds:.0f} s", flush=True)
    command = [sys.executable, __file__, *arguments, "--part", name, "--out", out]
    with (out / f"{name}.log").open("w") as log, (out / f"{name}.jsonl").open("w") as results, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                             cwd=ROOT) as process:
        # train.py saves at the first, which it may need some time for.
        timers = [threading.Timer(seconds, process.terminate),
                  threading.Timer(seconds + 20, process.kill)]
        for timer in timers:
            timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            print(line, end="", flush=True, file=results)
        status = process.wait()
        for timer in timers:
            timer.cancel()
    print(f"=== {name}: exit status {status}", flush=True)


def main():
    began = time.time()
    names = {part.__name__: part for part in PARTS}
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="PART",
                        help=f"some of: {', '.join(names)}")
    parser.add_argument("--part", choices=names, help="that part, in this process")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    args = parser.parse_args()
    device, out = pick_device(args.device), args.out.resolve()
    preset = args.preset or default_preset(device)
    if args.part:
        return names[args.part](preset, device, out)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        left = 60 * args.minutes - (time.time() - began) - 5
        if left > 5:
            run_part(name, min(left, PARTS[names[name]]),
                     ["--preset", preset, "--device", device.type], out)
    print(f"\n{out}/*.jsonl and .log")


if __name__ == "__main__":
    run_script(main)
