"""Train one transformer to understand pictures, to draw them, or both.

    python train.py                                         everything: tokenizer, joint dense model, scores, pictures
    python train.py --objective und --und-plan himix --projections image         one task alone, accelerated
    python train.py --und-plan himix --gen-plan hmgen --projections task         both accelerated, "share partial"
    python train.py --data PATH                             a folder of your own captioned images
    python train.py --resume --out out/joint                goes on where that run stopped
    python train.py --table out/table3 --seeds 3            the paper's table 3, then controls; goes on where it stopped
    torchrun --nproc_per_node=8 train.py                    on several GPUs

Finds the device and the size that fits it; on 2 CPU cores it takes ten minutes. `out/joint/` then holds checkpoint.pt,
log.jsonl, loss.png, eval.json and samples.png.
"""
import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data as data_sets
import eval as evaluation
from data import fail, line_chart
from model import Config, Model, load, plans_for, sequences
from prune import PLANS, SIZES, Layout, flops
from tokenizer import Tokenizer, defaults, pick_device, read, save, score_tokenizer, train_tokenizer


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
    shallow: int                # HMGen's K: a quarter of the layers or nearly, as the paper's K = 5 (0.75 of the FLOPs)


PRESETS = {"tiny": Preset(steps=100, batch_size=8, scenes={"und": 300, "gen": 300}, heads=2, lr=.02, lr_rest=1e-2,
                          text=40, shallow=1),
           "cpu": Preset(steps=1600, batch_size=16, scenes={"und": 8000, "gen": 20_000}, heads=4, lr=.02, lr_rest=1e-2,
                         text=80, shallow=1),
           "gpu": Preset(steps=6000, batch_size=64, scenes={"und": 40_000, "gen": 60_000}, heads=6, lr=.02, lr_rest=1e-2,
                         text=192, shallow=3)}
WARM_UP, DECAY = 50, .6         # steps of rising rate; the share of training, its end, over which it falls to nothing
LOSS_WEIGHT = {"und": 1., "gen": 2.}            # of the tasks in the gradient; logged losses are without it
CLIP = 1.                       # largest norm of the gradient of AdamW's part (Muon's step has the same size anyway)
CAPTION_DROPOUT = .1            # of captions are left empty in training, which classifier-free guidance needs
LOG_EVERY = 10                  # steps

# Dense bf16 matmul peaks (FLOP/s) from the vendor's data sheets, by how a device's name begins; others print no MFU.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100": 312e12,
         "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}

DEFAULTS = dict(objective="joint", und_plan="dense", gen_plan="dense", projections="shared", data="shapes", seed=0,
                accumulate=1, save_every=200)
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


def shared_step(parameters):
    """torchrun: the sum over all processes of every gradient (each process has weighted its own by its share)."""
    if dist.is_initialized():
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)


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
    if (found["data"], found["preset"]) != (dataset.identity, options["preset"]):
        fail(f"{path} was trained on {found['data']} with preset {found['preset']}; expected {dataset.identity} with preset "
             f"{options['preset']}: give another --tokenizer PATH (it is trained if there is no such file)")
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
    seen = [*splits.values(), *(dataset.split(t, part, evaluation.SAMPLES[options["preset"]][t]) for t in tasks
                                for part in (("val", "transfer") if dataset.name == "shapes" else ("val",)))]
    try:
        after, before = text_lengths(tokenizer, seen, preset.text)
        vq = tokenizer.vq
        c = Config(tokenizer.vocab, size.layers, size.width, Layout(2, vq.side ** 2, after), Layout(before, vq.side ** 2, 0),
                   hidden=size.hidden, heads=preset.heads, side=vq.side, first_code=tokenizer.first_code,
                   projections=options["projections"])
        # All sequences of a task are one Batch that stays on the device: a step only picks rows.
        sets = {task: sequences(task, tokenizer, without_some_captions(split, seed), c).to(device)
                for task, split in splits.items()}
    except ValueError as error:
        fail(f"--data {options['data']}: {error}")
    torch.manual_seed(seed)
    model = Model(c, vq.codebook.cpu()).to(device)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    lr_rest = preset.lr_rest * options["lr"] / preset.lr
    optimizers = [Muon(matrices, options["lr"]),
                  torch.optim.AdamW(rest, lr_rest, betas=(.9, .99), weight_decay=0, fused=True)]
    highest = [o.param_groups[0]["lr"] for o in optimizers]

    start = 0
    if resume:
        model.load_state_dict(resume["model"])
        for optimizer, state in zip(optimizers, resume["optimizers"]):
            optimizer.load_state_dict(state)
        start = resume["step"]
    if first:
        out.mkdir(parents=True, exist_ok=True)
        log = out / "log.jsonl"                                         # what came after the checkpoint comes again
        lines = log.read_text().splitlines() if resume and log.exists() else []
        log.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))

    def checkpoint(step):
        if first:
            save({"kind": "run", "options": options, "config": asdict(c) | {"und": list(c.und), "gen": list(c.gen)},
                  "tokenizer": tokenizer.state(), "model": model.state_dict(),
                  "optimizers": [o.state_dict() for o in optimizers], "step": step, "identity": dataset.identity},
                 out / "checkpoint.pt")

    # ---- training
    model.train()
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
    logged, clock = start, time.perf_counter()
    try:
        for step in range(start, steps):
            for optimizer, lr in zip(optimizers, highest):
                optimizer.param_groups[0]["lr"] = lr * learning_rate(step, steps)
            losses = {}
            for task in tasks:
                # The step alone says which rows it takes: nothing about data has to be saved for a resumed run.
                luck = torch.Generator().manual_seed(2 * (seed * 10 ** 9 + step) + (task == "gen"))
                index = torch.randint(len(sets[task].tokens), (options["batch_size"],), generator=luck).to(device)
                outputs = (sets[task].weights[index] == 1).sum()        # of the whole step, over all processes
                for part in index[rank::world].chunk(options["accumulate"]):
                    batch = sets[task].rows(part)
                    with torch.autocast(device.type, torch.bfloat16) if on_gpu else nullcontext():
                        _, loss = forward(batch, plans[task])
                    loss = loss * (batch.weights == 1).sum() / outputs
                    (LOSS_WEIGHT[task] * loss).backward()
                    losses[task] = losses.get(task, 0) + loss.detach()
            shared_step(model.parameters())
            torch.nn.utils.clip_grad_norm_(rest, CLIP)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.update()

            last = step == steps - 1
            if (step + 1) % LOG_EVERY == 0 or last:
                values = torch.stack(list(losses.values()))
                if dist.is_initialized():
                    dist.all_reduce(values)
                values = dict(zip(tasks, values.tolist()))              # waits for the device
                if not math.isfinite(sum(values.values())):
                    kept = out / "checkpoint.pt"
                    fail(f"the loss is not finite at step {step + 1} ({values}); the last checkpoint "
                         + (f"is {kept}" if kept.exists() else "was not written yet"))
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
                if (step + 1) % options["save_every"] == 0 or last:
                    checkpoint(step + 1)
                clock = time.perf_counter()
    except KeyboardInterrupt:
        bar.close()
        print(f"\nstopped; python train.py --resume --out {out} goes on from the last checkpoint"
              if (out / "checkpoint.pt").exists() else "\nstopped before the first checkpoint", file=sys.stderr)
        raise SystemExit(130)
    bar.close()
    if not first:
        return

    # ---- scores and pictures
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    line_chart({name: [(r["step"], r[key]) for r in rows] for key, name in
                (("loss_und", "understanding"), ("loss_gen", "generation")) if rows[0][key] is not None},
               "training loss (nats per output token)", "step").save(out / "loss.png")
    found = {"options": options, "step": steps}
    print(evaluation.summary(evaluation.evaluate(model, tokenizer, found, dataset, plans, out,
                                              evaluation.sampling_for(options["data"]))))
    print(f"{time.time() - began:.0f} s in all, a training step {statistics.median(r['step_ms'] for r in rows):.0f} ms "
          f"(median), peak memory {peak_memory(device) or math.nan:.0f} MB\n"
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
    for key in ("steps", "batch_size", "lr", "shallow"):
        options.setdefault(key, getattr(preset, key))
    options.setdefault("compile", device.type == "cuda" and find_spec("triton") is not None)
    options.setdefault("tokenizer", tokenizer)
    options.setdefault("out", tokenizer.replace("tokenizer", options["objective"]).removesuffix(".pt"))
    return options


def same_run(options, stored, out):
    """Refuse to mix runs: whatever decides what is learned has to be what it was."""
    for key in options.keys() - HOW:
        if options[key] != stored.get(key):
            fail(f"--{key.replace('_', '-')} {options[key]}: the run in {out} has {stored.get(key)}")


def check(options):
    """Refuse options that make no sense, before any work begins."""
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


def run_table(folder, seeds, given, device):
    """Every row of eval.table_rows, first the paper's with all seeds, then the controls; what is finished is left alone,
    what was begun goes on."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    rows = evaluation.table_rows(completed(given, device))
    for seed, name in sorted(product(range(seeds), rows), key=lambda pair: pair[1] not in evaluation.PAPER):
        out = folder / f"{name}-seed{seed}"
        options = completed({**given, **rows[name][1], "seed": seed, "out": str(out)}, device)
        check(options)
        found = load(out, "cpu")[2] if (out / "checkpoint.pt").exists() else None
        if found:
            same_run(options, found["options"], out)
        if not found or found["step"] < options["steps"] or not (out / "eval.json").exists():
            if first:
                print(f"\n{out}")
            run(options, found, device)
        if first and name in evaluation.LATER:
            model, tokenizer, found, plans, end = evaluation.opened(out, device, evaluation.LATER[name][1])
            if not (out / f"eval{end}.json").exists():
                evaluation.evaluate(model, tokenizer, found, data_sets.load(options["data"], options["preset"]), plans, out,
                                    evaluation.sampling_for(options["data"]), end)
        if dist.is_initialized():
            dist.barrier()
    if first:
        print(evaluation.table(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--objective", choices=("joint", "und", "gen"), help="which tasks are trained (default: joint)")
    parser.add_argument("--und-plan", help=f"what image tokens do when understanding: {', '.join(PLANS)} (default: dense)")
    parser.add_argument("--gen-plan", help="the same when generating; himix is impossible there (default: dense)")
    parser.add_argument("--projections", choices=("shared", "image", "task"), help="Q, K, V of image tokens: those of text, "
                        "their own, or their own for each task (default: shared)")
    parser.add_argument("--shallow", type=int, metavar="K", help="how many layers hmgen skips (default: a quarter of them)")
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
    parser.add_argument("--table", type=Path, metavar="DIR", help="train all rows of the paper's table 3 into DIR")
    parser.add_argument("--seeds", type=int, help="of --table (default: 1)")
    given = vars(parser.parse_args())
    device, resume = given.pop("device"), given.pop("resume")
    folder, seeds = given.pop("table", None), given.pop("seeds", None)

    if "RANK" in os.environ:                                            # started by torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() and device in ("auto", "cuda") else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(device)
    if seeds is not None and seeds < 1:
        fail(f"--seeds {seeds}: expected at least 1")
    if folder is not None:
        own = {"out", "seed", "objective", "und_plan", "gen_plan", "projections"} & given.keys()
        if resume or own:
            fail(f"--table says itself what its rows are, and goes on by itself: expected no "
                 f"--{min(own, default='resume').replace('_', '-')} beside it")
        run_table(folder, seeds or 1, given, device)
    elif seeds is not None:
        fail("--seeds: expected only beside --table")
    elif resume:
        options = completed(given, device)
        found = load(options["out"], "cpu")[2]
        same_run(given, found["options"], options["out"])
        options = {**found["options"], **{key: options[key] for key in given.keys() & HOW | {"out", "compile"}}}
        check(options)
        run(options, found, device)
    else:
        options = completed(given, device)
        check(options)
        if (Path(options["out"]) / "checkpoint.pt").exists():
            fail(f"{options['out']} holds a run already: --resume goes on with it, --out PATH begins another")
        run(options, None, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
