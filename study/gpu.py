"""One visit to a GPU: all that is to be measured there, in order of worth, within a time limit.

    python study/gpu.py --minutes 28                        everything, into out/gpu/
    python study/gpu.py --minutes 9 --only kernels train    some of it
    python study/gpu.py --minutes 5 --preset tiny --device cpu      a rehearsal without a GPU

Each part is a command of its own with a log, and leaves its results as soon as it has them, so that
a visit that is cut short keeps what it had. A part that fails, or runs out of time, does not keep
the others from being done. report.json says how each ended.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import hardware, pick_device, run_script, script_parser, time_each, write_file

import torch

import model as model_module
from bench import bench_config, random_batch
from data import PRESETS
from model import Model
from prune import make_plan
from table import RESULTS
from tokenizer import default_preset


PARTS = ("kernels", "train", "tests", "bench", "compare", "quality", "table")   # by their worth


def commands(preset, device, out):
    """{part of PARTS: (command, results to bring back)}."""
    shared = ["--preset", preset, "--device", device]
    tokenizer = ["--tokenizer", out / "tokenizer.pt"]
    compiling = ["--compile"] if device == "cuda" else []
    run = out / "joint"
    resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
    table_rows = ["u", "g", "share-all", "share-partial", "u-himix", "g-hmgen", "joint"]
    if preset == "tiny":
        table_rows = ["u"]
    return {
        "kernels": ([__file__, "--kernels", *shared, "--out", out], []),
        "train": (["train.py", *shared, *tokenizer, "--out", run, *resume],
                  [run / name for name in ("eval.json", "log.jsonl", "samples.png", "loss.png")]),
        "tests": (["-m", "pytest", "-q", "-x", "tests/test_model.py"], []),
        "bench": (["study/bench.py", *shared, *compiling], [RESULTS / f"bench-{preset}.json",
                                                           RESULTS / f"bench-{preset}.png"]),
        "compare": (["study/compare.py", *shared, *compiling],
                    [RESULTS / f"compare-{preset}.json"]),
        "quality": (["study/compare.py", "--train", "--seeds", "1", "--usual-lr", ".003",
                     *shared, *tokenizer, *compiling, "--results", out / "quality"],
                    []),                                    # they lie in `out` already
        "table": (["study/table.py", out / "table", *shared, *tokenizer, "--rows", *table_rows],
                  [RESULTS / f"table-{preset}{end}" for end in (".md", ".json", ".png")]),
    }


def kernels(preset, device, out):
    """Is what a GPU does for speed also right, and is it faster? FlexAttention beside the mask, the
    compiled step beside the plain one, at the preset's size: losses and milliseconds."""
    c, n = bench_config(preset), PRESETS[preset].batch_size
    torch.manual_seed(0)
    model, result = Model(c).to(device), {"hardware": hardware(device), "preset": preset}
    for p in model.parameters():
        p.data.add_(.02 * torch.randn_like(p))              # zeros would hide mistakes

    def make_step(forward, uses_flex, batch):
        def step():
            model_module.uses_flex_attention = lambda x: uses_flex
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                _, loss = forward(batch, make_plan("dense", c.layers))
            loss.backward()
            return loss.item()
        return step

    for task in ("und", "gen"):
        batch = random_batch(task, c, n).to(device)
        kinds = {"plain": make_step(model, False, batch),
                 "compiled": make_step(torch.compile(model, dynamic=False), False, batch)}
        if device.type != "cpu":                            # where FlexAttention has no backward
            flex = make_step(torch.compile(model, dynamic=False), True, batch)
            kinds["compiled, FlexAttention"] = flex
        losses, steps = {}, {}
        for name, step in kinds.items():
            torch._dynamo.reset()
            try:
                losses[name] = step()
                steps[name] = step
            except Exception as error:                      # the others are still worth knowing
                losses[name] = f"{type(error).__name__}: {str(error)[:300]}"
        ms = {}
        for name, step in steps.items():
            torch._dynamo.reset()
            ms[name] = 1e3 * statistics.median(time_each({name: step}, device, 10)[name])
        result[task] = {"loss": losses, "ms": ms}
        write_file(out / "kernels.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def visit(minutes, only, preset, device, out):
    """Runs the parts one after the other, as long as there is time."""
    end, report = time.time() + 60 * minutes, {"hardware": hardware(device)}
    every = commands(preset, device.type, out)
    for name in PARTS:
        command, results = every[name]
        left = end - time.time()
        if only and name not in only:
            continue
        if left < 5:
            report[name] = {"ended": "no time left"}
            continue
        print(f"\n=== {name}, {left:.0f} s left", flush=True)
        began = time.time()
        with (out / f"{name}.log").open("w") as log:
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=log,
                                       stderr=subprocess.STDOUT,
                                       env={**os.environ, "PYTHONUNBUFFERED": "1"})
            try:
                ended = f"exit status {process.wait(left)}"
            except subprocess.TimeoutExpired:
                process.terminate()                         # train.py saves at this
                process.wait()
                ended = "time ran out"
        for file in results:
            if file.exists() and file.stat().st_mtime > began - 2:      # not an earlier result
                shutil.copy(file, out / file.name)
        report[name] = {"ended": ended, "seconds": time.time() - began}
        write_file(out / "report.json", json.dumps(report, indent=1))
        lines = (out / f"{name}.log").read_text(errors="replace").replace("\r", "\n").splitlines()
        print("\n".join(lines[-15:]) + f"\n=== {name}: {ended} after {time.time() - began:.0f} s")


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"some of: {' '.join(PARTS)}")
    parser.add_argument("--kernels", action="store_true", help="only that part, in this process")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args()
    device = pick_device(args.device)
    preset = args.preset or default_preset(device)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.kernels:
        kernels(preset, device, args.out)
    else:
        visit(args.minutes, args.only, preset, device, args.out.resolve())


if __name__ == "__main__":
    run_script(main)
