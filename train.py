"""Train one transformer to understand pictures, to draw them, or both.

    python train.py                                         everything: tokenizer, joint dense model, scores, pictures
    python train.py --objective und --und-plan himix --projections image         one task alone, accelerated
    python train.py --und-plan himix --gen-plan hmgen --projections task         both accelerated, "share partial"
    python train.py --data PATH                             a folder of your own captioned images
    python train.py --resume --out out/joint                goes on where that run stopped
    python train.py --table out/table3 --seeds 3            the paper's table 3, then controls; goes on where it stopped;
                                                            started several times, each takes rows that no other has
    torchrun --nproc_per_node=8 train.py                    on several GPUs

Finds the device and the size that fits it; on 2 CPU cores it takes ten minutes. `out/joint/` then holds checkpoint.pt,
log.jsonl, loss.png, eval.json and samples.png.
"""
import argparse
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import data as data_sets                                            # before torch: it sets an environment variable
from data import command, fail, line_chart, refusing

import torch
import torch.distributed as dist
from tqdm import tqdm

import eval as evaluation
from model import PROJECTIONS, Batch, Config, Model, load, plans_for, sequences
from prune import PLANS, SIZES, Layout, flops, make_plan, paper_cost
from tokenizer import Tokenizer, check_seed, defaults, pick_device, read, save, score_tokenizer, train_tokenizer, write


@dataclass
class Preset:
    """What fits a device. The network's shape stands in prune.SIZES."""
    steps: int
    batch_size: int             # pictures of each task in a step
    scenes: dict                # training pictures of each task that are drawn: see results/README.md, what was tried
    heads: int
    lr: float                   # Muon's, of all matrices in the layers
    lr_rest: float              # AdamW's, of embeddings, head, norms and positions
    text: int                   # most text tokens that a sequence may have


PRESETS = {"tiny": Preset(steps=100, batch_size=8, scenes={"und": 300, "gen": 300}, heads=2, lr=.02, lr_rest=1e-2,
                          text=40),
           "cpu": Preset(steps=1600, batch_size=16, scenes={"und": 8000, "gen": 20_000}, heads=4, lr=.02, lr_rest=1e-2,
                         text=80),
           "gpu": Preset(steps=6000, batch_size=64, scenes={"und": 40_000, "gen": 60_000}, heads=6, lr=.02, lr_rest=1e-2,
                         text=192)}
WARM_UP, DECAY = 50, .6         # steps of rising rate; the share of training, its end, over which it falls to nothing
LOSS_WEIGHT = {"und": 1., "gen": 2.}            # of the tasks in the gradient; logged losses are without it
CLIP = 1.                       # largest norm of the gradient of AdamW's part (Muon's step has the same size anyway)
CAPTION_DROPOUT = .1            # of captions are left empty in training, which classifier-free guidance needs
LOG_EVERY = 10                  # steps

# Dense bf16 matmul peaks (FLOP/s) from the vendor's data sheets, by how a device's name begins; others print no MFU.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100": 312e12,
         "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}

DEFAULTS = dict(objective="joint", und_plan="dense", gen_plan="dense", projections="shared", image_loss=False, data="shapes",
                seed=0, accumulate=1, save_every=200)
HOW = {"out", "compile", "accumulate", "save_every"}    # options that do not decide what is learned


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), for matrices: all singular values of a step are about equal.

    The same as torch.optim.Muon, but in float32 and for all matrices of one shape at once: that one computes in
    bfloat16, one by one, which takes 20 times as long on a CPU (1.6 s instead of 0.07 s a step of the CPU preset).
    """

    def __init__(self, parameters, lr, momentum=.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), some in shapes.items():
                state = self.state[some[0]]                             # the first stands for all of this shape
                g = torch.stack([p.grad for p in some])
                average = state.setdefault("average", torch.zeros_like(g))
                average.lerp_(g, 1 - group["momentum"])
                x = g.lerp(average, group["momentum"])                  # Nesterov
                x = x.mT if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):                                      # Newton-Schulz, a quintic
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                x = x.mT if rows > columns else x
                torch._foreach_add_(some, list(x.unbind()), alpha=-group["lr"] * max(1, rows / columns) ** .5)


def without_some_captions(split, seed):
    luck = random.Random(f"{seed} dropout")
    return split._replace(captions=[x._replace(text="") if luck.random() < CAPTION_DROPOUT else x for x in split.captions])


def text_lengths(tokenizer, splits, limit):
    """How many text tokens the sequences of this data need: (questions and answers, caption with its two tokens). What
    is longer than the limit is refused, except that of several questions on a picture some may be left out."""
    asked = max(sum(len(tokenizer.ids(t)) for q in some for t in q[:2]) + len(some)
                for split in splits for some in split.questions)
    texts = [(x.text,) for split in splits for x in split.captions]
    texts += [q[:2] for split in splits for some in split.questions for q in some]
    longest = max(texts, key=lambda some: sum(len(tokenizer.ids(t)) for t in some))
    n = sum(len(tokenizer.ids(t)) for t in longest)
    if n > limit - 2:
        fail(f"a caption, or a question with its answer, has {n} tokens, expected at most {limit - 2}: "
             f"{' '.join(longest)[:60]!r} ...")
    return min(asked, limit), 2 + max(len(tokenizer.ids(x.text)) for split in splits for x in split.captions)


def optimizers_of(model, lr, lr_rest):
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return Muon(matrices, lr), torch.optim.AdamW(rest, lr_rest, betas=(.9, .99), weight_decay=0, fused=True)


def training_step(forward, parts, plans, optimizers):
    """Forward, backward and update. parts: {task: [(Batch, its share of the step)]}. Returns {task: loss} of this process."""
    losses = {}
    for task, some in parts.items():
        for batch, share in some:
            with torch.autocast("cuda", torch.bfloat16, enabled=batch.tokens.is_cuda):
                _, loss = forward(batch, plans[task])
            loss = share * loss
            (LOSS_WEIGHT[task] * loss).backward()
            losses[task] = losses.get(task, 0) + loss.detach()
    muon, adamw = ([p for group in o.param_groups for p in group["params"] if p.grad is not None] for o in optimizers)
    if dist.is_initialized():                                           # torchrun: every process has weighted its own part
        for p in muon + adamw:
            dist.all_reduce(p.grad)
    torch.nn.utils.clip_grad_norm_(adamw, CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return losses


def get_tokenizer(options, dataset, device, first):
    """The tokenizer that --tokenizer names, trained and saved there if there is none."""
    path = Path(options["tokenizer"])
    if first and not path.exists():
        tokenizer, checkpoint = train_tokenizer(dataset, options["preset"], device)
        save(checkpoint, path)
        scores, _, _ = score_tokenizer(tokenizer, dataset)
        print(f"{path}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    if dist.is_initialized():
        dist.barrier()
    found = read(path, "tokenizer")
    own, expected = (found.get("data"), found.get("preset")), (dataset.identity, options["preset"])
    if own != expected:
        fail(f"{path} was trained on {own[0]} with preset {own[1]}; expected {expected[0]} with preset {expected[1]}: give another "
             "--tokenizer PATH (it is trained if there is no such file)")
    with refusing(f"{path}: its parts do not fit together"):
        return Tokenizer.from_state(found)


def learning_rate(step, steps):
    """As a share of the highest: up, level, and down to nearly nothing."""
    return min((step + 1) / WARM_UP, 1, max(.02, (1 - step / steps) / DECAY))


def run(options, resume, device):
    """Train and score one run, or go on with the checkpoint `resume`. Everything is written into options["out"]."""
    began, out = time.time(), Path(options["out"])
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = rank == 0
    preset, steps, seed = PRESETS[options["preset"]], options["steps"], options["seed"]
    size = SIZES[options["preset"]]
    plans = plans_for(options, size.layers)
    tasks = list(plans)

    # ---- data and model
    dataset = data_sets.load(options["data"], options["preset"])
    tokenizer = Tokenizer.from_state(resume["tokenizer"]) if resume else get_tokenizer(options, dataset, device, first)
    if resume and resume["identity"] != dataset.identity:
        fail(f"--data {options['data']}: the run to resume was trained on {resume['identity']}, this is {dataset.identity}")
    tokenizer.vq.to(device)
    splits = {t: dataset.split(t, "train", preset.scenes[t], seed, questions=10 if t == "und" else 0) for t in tasks}
    seen = [*splits.values(), *(dataset.split(t, part, evaluation.SAMPLES[options["preset"]][t], seed) for t in tasks
                                for part in (("val", "transfer") if splits[tasks[0]].scenes is not None else ("val",)))]
    try:
        after, before = text_lengths(tokenizer, seen, preset.text)
        vq = tokenizer.vq
        c = Config(tokenizer.vocab, size.layers, size.width, Layout(2, vq.side ** 2, after), Layout(before, vq.side ** 2, 0),
                   hidden=size.hidden, heads=preset.heads, side=vq.side, first_code=tokenizer.first_code,
                   projections=options["projections"], image_loss=options["image_loss"])
        # All sequences of a task are one Batch that stays on the device: a step only picks rows.
        sets = {task: sequences(task, tokenizer, without_some_captions(split, seed), c).to(device)
                for task, split in splits.items()}
    except ValueError as error:
        fail(f"--data {options['data']}: {error}")
    torch.manual_seed(seed)
    model = Model(c, vq.codebook.cpu()).to(device)
    optimizers = optimizers_of(model, options["lr"], preset.lr_rest * options["lr"] / preset.lr)
    highest = [o.param_groups[0]["lr"] for o in optimizers]

    start = 0
    if resume:
        with refusing(f"{out}/checkpoint.pt does not fit these options and data"):
            model.load_state_dict(resume["model"])
            for optimizer, state in zip(optimizers, resume["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        start = resume["step"]
    log = out / "log.jsonl"
    if first:                                                           # what came after the checkpoint comes again
        lines = log.read_text().splitlines(True) if resume and log.exists() else []
        if start < steps:
            (out / "attention.json").unlink(missing_ok=True)            # probe.py's, of a model that is no more
        write(log, "".join(lines[:start // LOG_EVERY + (start == steps and start % LOG_EVERY > 0)]))

    def checkpoint(step):
        if not all(p.isfinite().all() for p in model.parameters()):
            broken(step, "some weights are")
        if first:
            save({"kind": "run", "options": options, "config": asdict(c) | {"und": list(c.und), "gen": list(c.gen)},
                  "tokenizer": tokenizer.state(), "model": model.state_dict(),
                  "optimizers": [o.state_dict() for o in optimizers], "step": step, "identity": dataset.identity},
                 out / "checkpoint.pt")

    def broken(step, what):
        kept = out / "checkpoint.pt"
        fail(f"{what} not finite at step {step}; the last good checkpoint "
             + (f"is {kept}: --resume with it, or begin again with a lower --lr" if kept.exists() else "was not written yet"))

    # ---- training
    model.train()
    stop = []                                                           # by Ctrl-C or SIGTERM: at the end of a step, saved

    def on_signal(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    signals = (signal.SIGINT, signal.SIGTERM) if world == 1 else ()     # torchrun ends its processes itself
    handlers = {number: signal.signal(number, on_signal) for number in signals}
    on_gpu = device.type == "cuda"
    if options["compile"]:
        torch._dynamo.reset()                                           # of a table, the last run's code
    forward = torch.compile(model, dynamic=False) if options["compile"] else model
    tokens = options["batch_size"] * sum(sum(s.layout) for s in sets.values())
    operations = options["batch_size"] * sum(flops(c, task, plans[task]) for task in tasks)
    peak = next((p for name, p in PEAKS.items() if on_gpu and torch.cuda.get_device_name().startswith(name)), None)
    if first:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {tokens} tokens and "
              f"{operations / 1e9:.0f} GFLOP a step; data and tokenizer took {time.time() - began:.0f} s")
    bar = tqdm(total=steps, initial=start, desc=out.name, unit="step", disable=not first)
    logged, clock, loop_began = start, time.perf_counter(), time.time()
    for step in range(start, steps):
        for optimizer, lr in zip(optimizers, highest):
            optimizer.param_groups[0]["lr"] = lr * learning_rate(step, steps)
        parts = {}
        for task in tasks:
            # The step alone says which rows it takes: nothing about data has to be saved for a resumed run.
            luck = torch.Generator().manual_seed(2 * (seed * 10 ** 9 + step) + (task == "gen"))
            index = torch.randint(len(sets[task].tokens), (options["batch_size"],), generator=luck).to(device)
            outputs = (sets[task].weights[index] == 1).sum()            # of the whole step, over all processes
            batches = [sets[task].rows(part) for part in index[rank::world].chunk(options["accumulate"])]
            parts[task] = [(batch, (batch.weights == 1).sum() / outputs) for batch in batches]
        losses = training_step(forward, parts, plans, optimizers)
        bar.update()

        last = step == steps - 1
        if (step + 1) % LOG_EVERY == 0 or last:
            values = torch.stack(list(losses.values()))
            if dist.is_initialized():
                dist.all_reduce(values)
            values = dict(zip(tasks, values.tolist()))                  # waits for the device
            if not math.isfinite(sum(values.values())):
                broken(step + 1, f"the loss {values} is")
            seconds, logged = (time.perf_counter() - clock) / (step + 1 - logged), step + 1
            row = {"step": step + 1, "loss": sum(values.values()), "loss_und": values.get("und"),
                   "loss_gen": values.get("gen"), "lr": optimizers[0].param_groups[0]["lr"],
                   "tokens_per_s": tokens / seconds, "step_ms": 1e3 * seconds,
                   "mfu": operations / seconds / peak / world if peak else None,
                   "peak_memory_mb": peak_memory(device)}
            if first:
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s'] / 1e3:.1f}k tokens/s"
                                    + (f", MFU {100 * row['mfu']:.0f} %" if peak else ""))
        if stop or last or (step + 1) % options["save_every"] == 0:
            checkpoint(step + 1)
        if logged == step + 1:                                          # saving is no part of a step's time
            clock = time.perf_counter()
        if stop:
            bar.close()
            print(f"stopped after step {step + 1} and saved; python train.py --resume --out {out} goes on", file=sys.stderr)
            raise SystemExit(128 + stop[0])
    bar.close()
    training = time.time() - loop_began
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if not first:
        return

    # ---- scores and pictures
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    if rows:                                                            # the checkpoint may have come without its log
        line_chart({name: [(r["step"], r[key]) for r in rows] for key, name in
                    (("loss_und", "understanding"), ("loss_gen", "generation")) if rows[0][key] is not None},
                   "training loss (nats per output token, instructions added)", "step").save(out / "loss.png")
    found = {"options": options, "step": steps}
    print(evaluation.summary(evaluation.evaluate(model, tokenizer, found, dataset, plans, out,
                                              evaluation.sampling_for(options["data"]))))
    print(f"{time.time() - began:.0f} s in all, {training / (time.time() - began):.0%} of them in training steps; a step "
          f"{statistics.median([r['step_ms'] for r in rows] or [math.nan]):.0f} ms (median), "
          f"peak memory {peak_memory(device) or math.nan:.0f} MB\n"
          f"look at {out}/samples.png, {out}/eval.json, {out}/loss.png; then: python probe.py {out}")


def peak_memory(device):
    """MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:                                                 # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def completed(given, device):
    """The options of a run: those given, and for the others what the device and the objective suggest."""
    options = {**DEFAULTS, **given}
    preset, tokenizer = defaults(device, options["data"])
    preset = PRESETS[options.setdefault("preset", preset)]
    for key in ("steps", "batch_size", "lr"):
        options.setdefault(key, getattr(preset, key))
    options.setdefault("shallow", max(1, SIZES[options["preset"]].layers // 4))         # the paper's K = 5 costs .75 of dense
    options.setdefault("compile", device.type == "cuda" and find_spec("triton") is not None)
    options.setdefault("tokenizer", tokenizer)
    options.setdefault("out", tokenizer.replace("tokenizer", options["objective"], 1).removesuffix(".pt"))
    return options


def same_run(options, stored, out):
    """Refuse to mix runs: whatever decides what is learned has to be what it was."""
    for key in options.keys() - HOW:
        if options[key] != stored.get(key):
            fail(f"--{key.replace('_', '-')} {options[key]}: the run in {out} has {stored.get(key)}")


def begun(options):
    """The checkpoint of the run with these options, or None."""
    if not (Path(options["out"]) / "checkpoint.pt").exists():
        return None
    found = load(options["out"], "cpu")[2]
    same_run(options, found["options"], options["out"])
    return found


def check(options, given=()):
    """Refuse options that make no sense, before any work begins."""
    if options["projections"] == "task" and options["objective"] != "joint":
        fail("--projections task: a run of one task has one kind of image tokens; expected image")
    if options["image_loss"] and options["objective"] == "gen":
        fail("--image-loss: generation has no other loss anyway; expected beside understanding")
    check_seed(options["seed"])
    for key in ("steps", "batch_size", "accumulate"):
        if options[key] < 1:
            fail(f"--{key.replace('_', '-')} {options[key]}: expected at least 1")
    if options["save_every"] < 1 or options["save_every"] % LOG_EVERY:
        fail(f"--save-every {options['save_every']}: expected a multiple of {LOG_EVERY}")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if options["batch_size"] % (options["accumulate"] * world):
        fail(f"--batch-size {options['batch_size']}: expected a multiple of --accumulate times the number of processes, "
             f"{options['accumulate'] * world}")
    if not 0 < options["lr"] < 10:
        fail(f"--lr {options['lr']}: expected a number between 0 and 10")
    for task, other in (("und", "gen"), ("gen", "und")):
        if options["objective"] == task and options[f"{other}_plan"] != "dense":
            fail(f"--{other}-plan {options[f'{other}_plan']}: there is no such task with --objective {task}")
    plans_for(options, SIZES[options["preset"]].layers, "shallow" in given)


@contextmanager
def claimed(folder, wait=False):
    """Holds a folder for this process, and yields whether it could: else another has it (wait: until it is free). However
    the process ends, the lock ends with it. Under torchrun, and where there are no such locks, it always could."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized() or os.name == "nt":                        # Windows has none
        yield True
        return
    import fcntl
    handle, ours = os.open(folder, os.O_RDONLY), True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        ours = False
    except OSError:                                                     # nor have some network file systems
        pass
    try:
        yield ours
    finally:
        if ours and not wait:
            with suppress(OSError):
                folder.rmdir()                                          # if nothing came of it
        os.close(handle)


def run_row(name, out, options, device, first):
    """What a row of the table lacks: its training, its scores, those under another plan at inference."""
    found = begun(options)
    if not found or found["step"] < options["steps"] or not (out / "eval.json").exists():
        if first:
            print(f"\n{out}")
        run(options, found, device)
    if first and name in evaluation.LATER:
        changed = evaluation.LATER[name][1]
        if not (out / f"eval{evaluation.suffix(options, changed)}.json").exists():
            model, tokenizer, found, plans, end = evaluation.opened(out, device, changed)
            evaluation.evaluate(model, tokenizer, found, data_sets.load(options["data"], options["preset"]), plans, out,
                                evaluation.sampling_for(options["data"]), end)


def run_table(folder, seeds, given, device):
    """Every row of eval.table_rows, first the paper's with all seeds, then the controls; what is finished, or what another
    process is at, is left alone, what was begun goes on. Seeds are counted from 1: settings were chosen on seed 0."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    usual, todo = completed(given, device), []
    rows = evaluation.table_rows(usual)
    for seed, name in sorted(product(range(1, seeds + 1), rows), key=lambda pair: pair[1] not in evaluation.PAPER):
        out = folder / f"{name}-seed{seed}"
        todo.append((name, out, completed({**given, **rows[name][1], "seed": seed, "out": str(out)}, device)))
        check({**todo[-1][-1], **evaluation.LATER.get(name, (None, {}))[1]})
    with claimed(folder, wait=True):                                    # the first of several processes trains the tokenizer
        get_tokenizer(usual, data_sets.load(usual["data"], usual["preset"]), device, first)
    for name, out, options in todo:
        with claimed(out) as ours:
            if ours:
                run_row(name, out, options, device, first)
            else:
                print(f"\n{out}: another process is at it")
        if dist.is_initialized():
            dist.barrier()
    if first:
        evaluation.table(folder, device)


# ------------------------------------------------------------------------------------------------ speed

def bench_config(preset, side=None, projections="shared"):
    size, heads = SIZES[preset], PRESETS[preset].heads
    side = side or math.isqrt(size.und.image)
    return Config(size.vocab, size.layers, size.width, size.und._replace(image=side ** 2), size.gen._replace(image=side ** 2),
                  hidden=size.hidden, heads=heads, side=side, first_code=size.vocab // 2, projections=projections)


def noise(task, c, rows):
    """A Batch of random tokens: one stream without padding, each of its positions with a target."""
    before, m, after = layout = getattr(c, task)
    tokens = torch.randint(c.first_code, (rows, before + m + after))
    tokens[:, before:before + m] += c.first_code
    return Batch(task, layout, task == "gen", tokens, torch.arange(sum(layout)).expand(rows, -1), torch.zeros_like(tokens),
                 tokens.roll(-1, 1), torch.ones(tokens.shape))


def bench_step(task, plan, c, rows, device, compiled, muon=True):
    """A function that takes one training step on random tokens. muon: else AdamW updates the matrices too."""
    torch.manual_seed(0)
    model = Model(c).to(device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    batch, optimizers = noise(task, c, rows).to(device), optimizers_of(model, 1e-3, 1e-3)
    if not muon:
        optimizers = torch.optim.AdamW(optimizers[0].param_groups[0]["params"], 1e-3, fused=True), optimizers[1]
    return lambda: training_step(forward, {task: [(batch, 1.)]}, {task: plan}, optimizers)


def memory_of(step, device):
    """MB that a step takes at its peak on CUDA, beside what is there anyway; elsewhere what its forward pass keeps for the
    backward pass, weights included."""
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


def time_steps(rows, shallow, device, compiled, matmul_rate, repeats=7):
    """Time and memory of training steps, each (task, plan name, Config, sequences), beside the dense one of the same
    task and Config."""
    found, steps = [], {}
    for i, (task, name, c, n) in enumerate(rows):
        plan, dense = make_plan(name, c.layers, shallow), make_plan("dense", c.layers)
        steps[i] = bench_step(task, plan, c, n, device, compiled)
        found.append({"task": task, "plan": name, "projections": c.projections, "image_tokens": c.side ** 2, "batch_size": n,
                      "flops": n * flops(c, task, plan), "flops_ratio": flops(c, task, plan) / flops(c, task, dense),
                      "paper_flops_ratio": paper_cost(c, task, plan) / paper_cost(c, task, dense)})
    seconds = evaluation.timed(steps, device, repeats)
    for i, (row, (task, _, c, n)) in enumerate(zip(found, rows)):
        row |= evaluation.speed(seconds[i], n * sum(getattr(c, task)))
        row |= {"of_matmul_rate": 1e3 * row["flops"] / row["ms"] / matmul_rate, "memory_mb": memory_of(steps[i], device)}
    for row, (task, _, c, _) in zip(found, rows):
        dense = next(x for x, (t, name, other, _) in zip(found, rows) if (t, name, other) == (task, "dense", c))
        row["time_ratio"] = row["ms"] / dense["ms"]
    return found


@torch.no_grad()
def time_drawing(name, c, shallow, device, rows=8):
    """Images a second that are drawn with and without the KV cache, and the share of codes that come out the same."""
    torch.manual_seed(0)
    model, plan, batch, codes = Model(c).to(device).eval(), make_plan(name, c.layers, shallow), noise("gen", c, rows).to(device), {}
    for p in model.parameters():
        p.add_(.1 * torch.randn_like(p))                                # a new model gives no code a better chance than others

    def cached():
        codes["cached"] = model.generate(batch, plan, c.gen.before, lambda logits: logits.argmax(-1)).clone()

    def uncached():
        """The readable twin of `generate`: for each token, all before it once more."""
        for stop in range(c.gen.before, sum(c.gen)):
            so_far = Batch("gen", c.gen._replace(image=stop - c.gen.before), True, *(x[:, :stop] for x in batch[3:]))
            batch.tokens[:, stop] = model.next_logits(so_far, plan, 0, stop, None).argmax(-1)
        codes["uncached"] = batch.tokens.clone()

    seconds = evaluation.timed({"cached": cached, "uncached": uncached}, device, 3)
    return {"plan": name, "image_tokens": c.gen.image, "batch_size": rows,
            "same_codes": (codes["cached"] == codes["uncached"])[:, c.gen.before:].float().mean().item(),
            **{f"{how}_images_per_s": rows / statistics.median(some) for how, some in seconds.items()}}


def bench(options, device):
    """What the plans save, measured on random tokens: nothing is learned. Writes results/bench-DEVICE.json and .png."""
    preset, n, shallow, compiled = (options[key] for key in ("preset", "batch_size", "shallow", "compile"))
    if compiled:
        torch._dynamo.config.recompile_limit = 1000                     # the code of every row stays
    edge = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, edge, edge, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    rate = 2 * edge ** 3 / statistics.median(evaluation.timed({"": lambda: a @ b}, device, 10)[""])
    kinds = [(task, name) for task in ("und", "gen") for name in PLANS if (task, name) != ("gen", "himix")]
    own = [bench_config(preset, None, projections) for projections in PROJECTIONS]
    pictures = [bench_config(preset, side) for side in (8, 16, 32)]
    few = [("und", "dense"), ("und", "himix"), ("gen", "dense"), ("gen", "hmgen")]
    result = {"hardware": evaluation.hardware(device), "preset": preset, "batch_size": n, "shallow": shallow, "compile": compiled,
              "matmul_flops_per_s": rate,
              "steps": time_steps([(*kind, c, n) for c in own for kind in kinds], shallow, device, compiled, rate),
              "image_tokens": time_steps([(*kind, c, n) for c in pictures for kind in few], shallow, device, compiled, rate, 5),
              "drawing": [time_drawing(name, pictures[1], shallow, device) for name in ("dense", "hmgen")]}
    path = Path("results") / f"bench-{device.type}.json"
    write(path, json.dumps(result, indent=1))
    line_chart({f"{task} {name}": [(x["image_tokens"], x["ms"] / n) for x in result["image_tokens"] if (x["task"], x["plan"]) ==
                                   (task, name)] for task, name in few},
               "ms a picture in a training step", "image tokens").save(path.with_suffix(".png"))
    print(f"{result['hardware']}; preset {preset}, {n} sequences a step, K = {shallow}; matmuls alone {rate / 1e12:.3g} TFLOP/s")
    for title, key in (("plans and projections", "steps"), ("more and fewer image tokens", "image_tokens")):
        print(f"\n{title}\n\n" + evaluation.markdown(
            ["task", "plan", "projections", "image tokens", *evaluation.SPEED, "memory, MB", "time", "FLOPs", "time / FLOPs",
             "paper's FLOPs", "of the matmul rate"],
            [[x["task"], x["plan"], x["projections"], str(x["image_tokens"]), *evaluation.speed_cells(x), f"{x['memory_mb']:.0f}",
              *(f"{ratio:.2f}" for ratio in (x["time_ratio"], x["flops_ratio"], x["time_ratio"] / x["flops_ratio"],
                                             x["paper_flops_ratio"], x["of_matmul_rate"]))] for x in result[key]], "lll" + "r" * 9))
    for x in result["drawing"]:
        print("\ndrawing, {plan}, {image_tokens} image tokens, batch {batch_size}: {cached_images_per_s:.2f} images/s with the KV "
              "cache, {uncached_images_per_s:.2f} without; {same_codes:.0%} of codes the same".format(**x))
    print(f"\n{path}, {path.with_suffix('.png')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--objective", choices=("joint", "und", "gen"), help="which tasks are trained (default: joint)")
    parser.add_argument("--und-plan", help=f"what image tokens do when understanding: {', '.join(PLANS)} (default: dense)")
    parser.add_argument("--gen-plan", help="the same when generating; himix is impossible there (default: dense)")
    parser.add_argument("--projections", choices=PROJECTIONS, help="Q, K, V of image tokens: those of text, "
                        "their own, or their own for each task (default: shared)")
    parser.add_argument("--image-loss", action="store_true", help="understanding predicts its image tokens, too (the paper's eq. 1)")
    parser.add_argument("--shallow", type=int, metavar="K", help="how many layers hmgen, naive and sparse touch; "
                        "skip and early: 2 K (default: about a quarter of all)")
    parser.add_argument("--preset", choices=PRESETS, help="size of everything (default: what fits the device)")
    parser.add_argument("--data", help="shapes, or a folder of captioned images (default: shapes)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, help="pictures of each task in a step, over all processes")
    parser.add_argument("--accumulate", type=int, metavar="N", help="compute a step in N parts, which takes less memory")
    parser.add_argument("--lr", type=float, help="Muon's highest learning rate; AdamW's goes along (default: the preset's)")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help=f"a multiple of {LOG_EVERY} (default: 200)")
    parser.add_argument("--seed", type=int, help="of data, weights and order (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    parser.add_argument("--tokenizer", metavar="PATH", help="trained if there is no such file (default: out/tokenizer.pt)")
    parser.add_argument("--out", help="the run's folder (default: out/OBJECTIVE)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    parser.add_argument("--table", type=Path, metavar="DIR", help="train the paper's table 3 and controls into DIR")
    parser.add_argument("--seeds", type=int, help="of --table: so many, from 1 on (default: 1)")
    parser.add_argument("--bench", action="store_true", default=False, help="time every plan instead of training")
    given = vars(parser.parse_args())
    device, resume, benchmark = given.pop("device"), given.pop("resume"), given.pop("bench")
    folder, seeds = given.pop("table", None), given.pop("seeds", None)

    if "RANK" in os.environ:                                            # started by torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() and device in ("auto", "cuda") else "gloo")
        if dist.get_backend() == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(device)
    if seeds is not None and seeds < 1:
        fail(f"--seeds {seeds}: expected at least 1")
    if benchmark:
        other = given.keys() - {"preset", "batch_size", "shallow", "compile"} | {
            name for name, value in (("resume", resume), ("table", folder), ("seeds", seeds)) if value}
        if other or dist.is_initialized():
            fail(f"--bench times all plans, in one process: expected no --{min(other, default='torchrun').replace('_', '-')} beside it")
        options = completed(given, device)
        check({**options, "gen_plan": "hmgen"})
        bench(options, device)
    elif folder is not None:
        own = {"out", "seed", "objective", "und_plan", "gen_plan", "projections", "image_loss"} & given.keys()
        if resume or own:
            fail(f"--table says itself what its rows are, and goes on by itself: expected no "
                 f"--{min(own, default='resume').replace('_', '-')} beside it")
        run_table(folder, seeds or 1, given, device)
    elif seeds is not None:
        fail("--seeds: expected only beside --table")
    else:
        options, found = completed(given, device), None
        if resume:
            found = load(options["out"], "cpu")[2]
            same_run(given, found["options"], options["out"])
            options = {**found["options"], **{key: options[key] for key in given.keys() & HOW | {"out", "compile"}}}
        check(options, given)
        if not resume and (Path(options["out"]) / "checkpoint.pt").exists():
            fail(f"{options['out']} holds a run already: --resume goes on with it, --out PATH begins another")
        with claimed(options["out"]) as ours:
            if not ours:
                fail(f"--out {options['out']}: another process is at work there; expected a folder of its own")
            run(options, found, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
