"""One visit to a GPU: what is to be measured there, in order of worth, in one command.

    python study/gpu.py --minutes 9.5 --out DIR     everything; DIR gets report.json, visit.tar.gz
    python study/gpu.py --only right fast           some of it
    python study/gpu.py --minutes 5 --preset tiny --device cpu      a rehearsal without a GPU

Each part is a process of its own with a limit of its own. What it finds goes to stdout as lines of
JSON and into the archive, which is packed anew after each part, so that a visit that is cut short
keeps what it had. A part that fails does not keep the others from being done. Checkpoints stay in
out/gpu.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

BEGAN = time.time()     # imports count: the first ones on a fresh machine take a minute
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import (cuda_graph, fail, hardware, mixed_precision, peak_flops, pick_device,
                    run_script, script_parser, write_file)

import torch

from bench import (bench_config, bench_step, memory_of, random_batch, time_drawing, time_each)
from compare import GPT, Llama, usual_step
from data import PRESETS
from model import Model
from prune import make_plan, usual_shallow
from table import RESULTS
from tokenizer import default_preset

# Seconds that a part may take. The default run has what is left, but for SCORING.
PARTS = {"versions": 30, "scripts": 120, "right": 110, "fast": 150, "train": None, "depth": 150,
         "table": None}
# Rows that are trained at once, because one does not fill a GPU: those not measured there yet.
TABLE = ["share-partial", "freeze-hmgen-practice", "joint-practice"]
SCORING = 70            # seconds kept to score a run that its limit has stopped
PATIENCE = 25           # seconds that a stopped process has to save and end
METHODS = [("und", "dense"), ("und", "himix"), ("gen", "dense"), ("gen", "hmgen")]
WORK = ROOT / "out" / "gpu"
SMALL = 2 ** 20         # bytes: larger files stay where they are


def emit(**result):
    """One result, as a line of JSON."""
    print(json.dumps(result), flush=True)


@contextmanager
def emit_errors(**what):
    """A failure is a result, too, and the next measurement is still worth making."""
    try:
        yield
    except Exception:
        emit(**what, error=traceback.format_exc()[-1500:])


# ---------------------------------------------------------------------- parts in this process

def versions(preset, device):
    emit(torch=torch.__version__, cuda=torch.version.cuda, hardware=hardware(device),
         preset=preset)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        emit(capability=torch.cuda.get_device_capability(), memory=properties.total_memory,
             architectures=torch.cuda.get_arch_list(), peak_flops=peak_flops(device))
        subprocess.run(["nvidia-smi"], check=False)


def right(preset, device):
    """Is what a GPU does for speed also right? Loss and gradient norm of one step in float32, in
    mixed precision, compiled, and as a CUDA graph; and cached beside uncached drawing."""
    c, rows = bench_config(preset), PRESETS[preset].batch_size
    for task, name in METHODS:
        batch, plan = random_batch(task, c, rows).to(device), make_plan(name, c.layers)
        torch.manual_seed(0)
        model, found = Model(c).to(device), {}
        for p in model.parameters():
            p.data.add_(.02 * torch.randn_like(p))          # zeros would hide mistakes

        def forward_backward():
            with nullcontext() if exact else mixed_precision(device):
                _, loss = model(batch, plan)
            loss.backward()
            return loss.detach()

        for precision in ("float32", "mixed", "compiled", "graph"):
            if precision == "compiled":
                for block in model.blocks:
                    block.compile(dynamic=False)
            exact = precision == "float32"
            torch.set_float32_matmul_precision("highest" if exact else "high")
            with emit_errors(task=task, plan=name, precision=precision):
                if precision == "graph" and device.type == "cuda":
                    forward_backward = cuda_graph(forward_backward, model)
                loss = forward_backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
                found[precision] = {"loss": loss.item(), "gradient_norm": norm.item()}
            model.zero_grad()
        emit(task=task, plan=name, **found)
    torch.set_float32_matmul_precision("highest")           # near ties would differ
    with emit_errors(drawing="hmgen"):
        emit(drawing=time_drawing("hmgen", c, usual_shallow(c.layers), device))


def fast(preset, device):
    """Milliseconds of compiled training steps, MFU, time over FLOPs, memory; others' steps."""
    compiled, peak = device.type == "cuda", peak_flops(device)
    size, c = PRESETS[preset], bench_config(preset)
    dense_ms, dense = {}, make_plan("dense", size.layers)
    torch._dynamo.config.recompile_limit = 1000             # the code of every step stays

    def milliseconds(step, repeats=15):
        (seconds,) = time_each({"": step}, device, repeats).values()
        return 1e3 * statistics.median(seconds)

    for how, settings in {"not compiled": dict(compiled=False),
                          "AdamW alone": dict(compiled=compiled, muon=False)}.items():
        with emit_errors(how=how):
            step = bench_step("und", dense, c, size.batch_size, device, **settings)
            emit(how=how, ms=milliseconds(step))
    for task, name in METHODS:
        with emit_errors(task=task, plan=name):
            plan = make_plan(name, c.layers)
            step = task, plan, c, size.batch_size, device, compiled
            launched_ms = milliseconds(bench_step(*step, graph=False))
            ms = milliseconds(bench_step(*step))
            dense_ms.setdefault(task, ms)
            flops = size.batch_size * c.flops(task, plan)
            emit(task=task, plan=name, batch=size.batch_size, ms=ms, launched_ms=launched_ms,
                 flops=flops, mfu=flops / ms * 1e3 / peak if peak else None,
                 time_ratio=ms / dense_ms[task],
                 flops_ratio=c.flops(task, plan) / c.flops(task, dense))
    for rows in (size.batch_size // 2, size.batch_size, 2 * size.batch_size):
        for name in ("dense", "himix"):
            with emit_errors(batch=rows, plan=name):
                step = "und", make_plan(name, c.layers), c, rows, device, compiled
                launched = bench_step(*step, graph=False)
                emit(batch=rows, plan=name, ms=milliseconds(bench_step(*step)),
                     memory_mb=memory_of(launched, device))
    length = sum(c.layout("und"))
    ids = torch.randint(c.vocab, (size.batch_size, length), device=device)
    for kind in (GPT, Llama):
        with emit_errors(beside=kind.__name__):
            other = kind(c.vocab, c.layers, c.width, c.heads, length).to(device)
            emit(beside=kind.__name__, ms=milliseconds(usual_step(other, ids, compiled)))


IN_PROCESS = {"versions": versions, "right": right, "fast": fast}


# ---------------------------------------------------------------------- parts by other scripts

def script_commands(device):
    """train.py, eval.py, probe.py and prune.py, with the smallest preset: a traceback in the first
    minute is worth more than any speed."""
    tiny = ["--preset", "tiny", "--device", device]
    run, here = WORK / "tiny", ["--device", device]
    # Uncompiled: other parts compile.
    train = ["train.py", *tiny, "--no-compile", "--tokenizer", WORK / "tiny.pt", "--out", run]
    return [train, ["train.py", *here, "--resume", "--out", run],
            ["eval.py", run, *here, "--gen-plan", "hmgen"],
            ["eval.py", run, *here, "--draw", "a red circle", "--n", 2],
            ["eval.py", run, *here, "--ask", run / "draw-0.png", "what colour is the circle?"],
            ["probe.py", run, *here, "--n", 16],
            ["prune.py", "--out", WORK / "masks.png"]]


def run_commands(commands, seconds, log, at_once=1):
    """So many at once, each at most until the seconds are over: [(command, how it ended, how long
    it took)]."""
    end = time.time() + seconds

    def run(command):
        began, command = time.time(), list(map(str, command))
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            how = f"exit status {process.wait(max(1, end - time.time()))}"
        except subprocess.TimeoutExpired:
            process.terminate()                             # train.py saves at this
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            how = "time ran out"
        return " ".join(command), how, round(time.time() - began, 1)

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(run, commands))


def commands_of(name, preset, device):
    """The commands of a part."""
    shared = ["--preset", preset, "--device", device]
    tokenizer, run = ["--tokenizer", WORK / "tokenizer.pt"], WORK / "joint"
    if name == "scripts":
        return script_commands(device)
    if name == "train":
        resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
        return [["train.py", *shared, *tokenizer, "--out", run, *resume]]
    if name == "depth":
        return [["study/depth.py", run, "--device", device, "--name", f"depth-{preset}"]]
    if name == "table":
        return [["study/table.py", WORK / "table", *shared, *tokenizer, "--rows", row]
                for row in TABLE]
    return [["study/gpu.py", *shared, "--part", name]]


def pack(out, report):
    """report.json, and everything small that the visit has left, in one archive."""
    write_file(out / "report.json", json.dumps(report, indent=1))
    with tarfile.open(out / "visit.tar.gz", "w:gz") as archive:
        archive.add(out / "report.json", "report.json")
        # Of the results those of this visit: the others came with the repository.
        for folder, since in ((WORK, 0), (RESULTS, BEGAN)):
            for file in sorted(folder.rglob("*")):
                wanted = file.suffix in (".json", ".jsonl", ".log", ".txt", ".md", ".png")
                if wanted and file.stat().st_size < SMALL and file.stat().st_mtime > since:
                    archive.add(file, file.relative_to(folder))


def visit(minutes, only, preset, device, out):
    end, report = BEGAN + 60 * minutes, {"hardware": hardware(device)}
    shutil.rmtree(WORK / "tiny", ignore_errors=True)        # of an earlier visit
    for name, limit in PARTS.items():
        left = end - time.time() - 5                        # to pack
        if name == "train":
            limit = left - SCORING - PATIENCE
        seconds = min(left, left if limit is None else limit)
        if only and name not in only:
            continue
        if seconds < 5:
            report[name] = "no time left"
            continue
        print(f"\n=== {name}, at most {seconds:.0f} s", flush=True)
        path = WORK / f"{name}.log"
        with path.open("w") as log:
            at_once = len(TABLE) if name == "table" else 1
            ended = run_commands(commands_of(name, preset, device.type), seconds, log, at_once)
            run = WORK / "joint"
            if name == "train" and (run / "checkpoint.pt").exists() \
                    and not (run / "eval.json").exists():
                score = ["eval.py", run, "--device", device.type]
                ended += run_commands([score], SCORING, log)
        report[name] = ended
        text = path.read_text(errors="replace").replace("\r", "\n")
        lines = [line for line in text.splitlines() if "it/s" not in line and "step/s" not in line]
        print("\n".join(lines[-40:]), flush=True)
        for command, how, took in ended:
            print(f"=== {command}: {how} after {took:.0f} s", flush=True)
        pack(out, report)
    print(f"\n{out}/report.json, {out}/visit.tar.gz")


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--part", choices=IN_PROCESS,
                        help="that part, in this process")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--out", type=Path, default=WORK / "results")
    args = parser.parse_args()
    if args.minutes <= 0:
        fail(f"--minutes {args.minutes}: expected more than 0")
    device = pick_device(args.device)
    preset = args.preset or default_preset(device)
    if args.part:
        IN_PROCESS[args.part](preset, device)
        return
    WORK.mkdir(parents=True, exist_ok=True)
    visit(args.minutes, args.only, preset, device, args.out.resolve())


if __name__ == "__main__":
    run_script(main)
