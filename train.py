"""Train one transformer to understand pictures, to draw them, or both.

    python train.py                 everything: tokenizer, joint dense model, scores, pictures
    python train.py --objective und --und-plan himix --projections image    one task, accelerated
    python train.py --und-plan himix --gen-plan hmgen --projections task        share partial
    python train.py --data PATH     a folder of your own captioned images
    python train.py --resume --out out/joint        goes on where that run stopped
    python train.py --preset tiny   every stage in a minute; too short to learn anything

Finds the device and the size that fits it. `out/joint/` then holds checkpoint.pt, log.jsonl,
loss.png, eval.json and samples.png.
"""
import json
import math
import random
import shlex
import signal
import sys
import time
import traceback
import zlib
from argparse import SUPPRESS, BooleanOptionalAction
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from common import (cuda_graph, exclusive, fail, has_bfloat16, line_chart, mixed_precision,
                    peak_flops, peak_memory_mb, pick_device, read_checkpoint, run_script,
                    save_checkpoint, save_picture, script_parser, write_file)

import torch
from tqdm import tqdm

import data
from data import PRESETS
from eval import evaluate, save_scores, summary
from model import PROJECTIONS, TASK_WEIGHT, Config, Model, sequences
from prune import PLANS, plans_of, usual_shallow
from tokenizer import Tokenizer, default_path, default_preset, load_tokenizer, train_tokenizer

# The switch between joint and isolated training. A step takes one batch of each task.
OBJECTIVES = {"joint": ["und", "gen"], "und": ["und"], "gen": ["gen"]}

# How many steps, and how many pictures in a step, stand in data.PRESETS; the weights of the loss in
# model.py.
CAPTION_DROPOUT = .1    # of captions are empty in training, which classifier-free guidance needs
# What is trained                       by         with a learning rate of at most
# query, out, down                      Muon       LEARNING_RATE
# key_value; up (they are tall)         Muon       times the root of rows / columns: 1.4; 2
# embeddings, head, norms, positions    AdamW      times ADAMW_RATIO
LEARNING_RATE = .01     # see study/NOTES.md
ADAMW_RATIO = .5
WARM_UP = 50            # steps in which the learning rate rises
DECAY = .7              # the last part of training, in which it falls to nearly nothing
CLIP = 1.               # largest gradient norm of AdamW's part; Muon's steps have one size anyway
MOMENTUM = .95          # Muon's
BETAS = (.9, .99)       # AdamW's
LOG_EVERY = 10          # steps
SAVE_EVERY = 120        # seconds: a checkpoint of the gpu preset takes 2 of them
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)]                   # Windows has no SIGHUP


# ---------------------------------------------------------------------- one run

def train(options, device, resumed=None, go_on=None):
    """Trains and scores one run, or goes on with the checkpoint `resumed`. Everything is written
    into the folder options["out"]. go_on: which command goes on with a stopped run."""
    began, out, steps = time.time(), Path(options["out"]), options["steps"]
    go_on = go_on or f"python train.py --resume --out {shlex.quote(str(out))}"
    tasks = OBJECTIVES[options["objective"]]
    plans = plans_of(tasks, options, PRESETS[options["preset"]].layers)

    # Data: all sequences of a task are one Batch that stays on the device.
    dataset = (data.load_of_run(resumed, options["data"]) if resumed
               else data.load(options["data"], options["preset"]))
    tokenizer = get_tokenizer(options, dataset, device, resumed)
    examples = {task: training_sequences(task, options, dataset, tokenizer).to(device)
                for task in tasks}
    order = draw_order(examples, options)

    # The model and its optimizers.
    config = make_config(options, tokenizer, examples)
    torch.manual_seed(options["seed"])
    model = Model(config, tokenizer.vq.codebook.cpu()).to(device)
    optimizers = optimizers_of(model, options["lr"])
    start, rows = 0, []                                 # rows: of log.jsonl
    if resumed:
        start, rows = resumed["step"], resumed["log"]
        model.load_state_dict(resumed["model"])
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    parts = parts_that_fit(options, config, device)
    if options["compile"] and not compile_blocks(model, plans, examples, parts, order[0],
                                                 out / "compile-error.txt"):
        parts = parts_that_fit({**options, "compile": False}, config, device)
    run_passes = partial(forward_backward, model, plans, examples, parts)
    if options["compile"] and device.type == "cuda":
        # All that changes from step to step is which of the examples it takes.
        run_passes = cuda_graph(run_passes, model, order[0])

    progress = Progress(options, config, plans, start, rows, device)
    in_parts = f" in {parts} parts" if parts > 1 else ""
    progress.bar.write(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
                       f"{progress.tokens} tokens and {progress.flops / 1e9:.1f} GFLOP a "
                       f"step{in_parts}; before the first step {time.time() - began:.0f} s")
    # Ctrl-C and the like end the loop after a step, saved. What is ignored stays so (nohup).
    stop_signals = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    stop_requests = []
    for number in stop_signals:
        signal.signal(number, lambda number, _: stop_requests.append(number))
    saved = time.monotonic()
    model.train()
    for step in range(start, steps):
        for optimizer, highest in zip(optimizers, (options["lr"], ADAMW_RATIO * options["lr"])):
            optimizer.param_groups[0]["lr"] = highest * learning_rate_factor(step, steps)
        losses = run_passes(order[step])
        apply_gradients(optimizers)

        last_step = step == steps - 1
        progress.step(step, losses, optimizers[0].param_groups[0]["lr"], last_step)
        if stop_requests or last_step or time.monotonic() - saved >= options["save_every"]:
            save(out, options, dataset, tokenizer, model, optimizers, step, progress.rows)
            saved = time.monotonic()
        if stop_requests:
            progress.bar.close()
            print(f"stopped after step {step + 1} and saved; {go_on} goes on", file=sys.stderr)
            raise SystemExit(128 + stop_requests[0])
    progress.bar.close()
    for number in stop_signals:
        signal.signal(number, signal.default_int_handler)

    run_passes = None                                       # a CUDA graph holds memory
    lines = {task: [(row["step"], row[f"loss_{task}"]) for row in progress.rows] for task in tasks}
    chart = line_chart(lines, "training loss (eq. 1, see Model.loss)", "step")
    save_picture(chart, out / "loss.png")
    try:
        with torch.compiler.set_stance("force_eager"):      # its batches have other sizes
            scores, shown = evaluate(model, tokenizer, options, steps, dataset, plans)
        save_scores(scores, shown, out)
    except KeyboardInterrupt:
        print(f"trained, but not scored; {go_on} scores it", file=sys.stderr)
        raise SystemExit(130)
    print(f"{summary(scores)}\n{time.time() - began:.0f} s in all, peak memory "
          f"{peak_memory_mb(device) or math.nan:.0f} MB\nlook at {out}/samples.png, "
          f"{out}/eval.json, {out}/loss.png; then: python probe.py {out}")


def learning_rate_factor(step, steps):
    """What the highest learning rates are multiplied by: up to 1, level (in runs of 167 steps or
    more), linearly down to .02."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    if step < (1 - DECAY) * steps:
        return 1.
    return max(.02, (1 - step / steps) / DECAY)


def forward_backward(model, plans, examples, parts, index):
    """Forward and backward pass of a step: adds to the gradients and returns {task: loss}. plans,
    examples: {task: plan}, {task: Batch}. index: (tasks, batch_size), which of the examples, in the
    order of `plans`."""
    losses = dict.fromkeys(plans, 0.)
    for (task, plan), index_of_task in zip(plans.items(), index):
        for batch, fraction in get_batches(examples[task], index_of_task, parts):
            with mixed_precision(model.device):
                _, loss = model(batch, plan)
            loss = fraction * loss
            (TASK_WEIGHT[task] * loss).backward()
            losses[task] += loss.detach()
    return losses


def get_batches(examples, index, parts):
    """Those sequences of a task: as many Batches as there are parts, each with its fraction of all
    output tokens. index: (batch_size,)."""
    outputs = examples.is_output[index].sum()
    for part in index.chunk(parts):
        batch = examples.rows(part)
        yield batch, batch.is_output.sum() / outputs


# ---------------------------------------------------------------------- data

def get_tokenizer(options, dataset, device, resumed=None):
    """The run's own tokenizer where it is resumed, else the one that --tokenizer names. Trained and
    saved there if there is none."""
    path, preset = Path(options["tokenizer"]), options["preset"]
    if resumed:
        tokenizer = Tokenizer.from_state(resumed["tokenizer"])
    else:
        if not path.exists():
            save_checkpoint(train_tokenizer(dataset, preset, device)[1], path)
        tokenizer = load_tokenizer(path, dataset, preset)
    tokenizer.vq.to(device)
    return tokenizer


def training_sequences(task, options, dataset, tokenizer):
    """All that a task is trained on, as one Batch."""
    preset, seed = PRESETS[options["preset"]], options["seed"]
    if task == "und":
        split = dataset.split("und", "train", preset.und_scenes, seed, preset.questions)
    else:
        split = dataset.split("gen", "train", preset.gen_scenes, seed, questions=0)
        rng = random.Random(f"{seed} dropout")
        dropped = [i for i in range(len(split.captions)) if rng.random() < CAPTION_DROPOUT]
        for i in dropped:
            split.captions[i] = split.captions[i]._replace(text="")
        if options["practice"]:
            practice = dataset.split("und", "train", len(dropped), seed, questions=0)
            split.pixels[dropped] = practice.pixels
    batch = sequences(task, tokenizer, split, preset.max_text, options["image_loss"])
    if options["data"] != "shapes":
        there = dataset.indices["train"]
        asked = sum(len(dataset.questions[i]) for i in there)
        taken = f"{len(batch.tokens)} of {len(there)} training pictures"
        if task == "und":
            taken += f", {batch.segment_ids.amax(1).sum()} of {asked} questions on them"
        print(f"{task}: {taken}, as many as the preset takes")
    return batch


def draw_order(examples, options):
    """Which sequences each step takes, (steps, tasks, batch_size). Drawn beforehand: no step waits
    for it, and a resumed run needs nothing else to go on as if nothing had happened."""
    order, shape = [], (options["steps"], options["batch_size"])
    for task, batch in examples.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{options['seed']} {task}".encode()))
        order.append(torch.randint(len(batch.tokens), shape, generator=generator))
    return torch.stack(order, 1).to(batch.tokens.device)


def make_config(options, tokenizer, examples):
    preset = PRESETS[options["preset"]]
    return Config(vocab=tokenizer.vocab, layers=preset.layers, width=preset.width,
                  heads=preset.heads, side=tokenizer.vq.side,
                  und_text=examples["und"].layout.after if "und" in examples else 0,
                  gen_text=examples["gen"].layout.before if "gen" in examples else 0,
                  projections=options["projections"], image_loss=options["image_loss"])


# ---------------------------------------------------------------------- optimizers

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), for matrices: all singular values of a step
    are about equal.

    The same as torch.optim.Muon without weight decay, but for all matrices of one shape at once,
    and in float32: that one computes in bfloat16, one by one, which takes 20 times as long on a
    CPU.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                state = self.state[matrices[0]]             # the first stands for all of this shape
                gradient = torch.stack([p.grad for p in matrices])
                if "average" not in state:
                    state["average"] = torch.zeros_like(gradient)
                average = state["average"].lerp_(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(average, MOMENTUM))               # Nesterov
                # Muon's usual factor: tall matrices take larger steps.
                scale = group["lr"] * max(1, rows / columns) ** .5
                torch._foreach_add_(matrices, list(update.unbind()), alpha=-scale)


def orthogonal(x, steps=5):
    """(n, rows, columns) -> about the nearest orthogonal matrices, by Newton-Schulz: a quintic
    whose iteration drives every singular value towards 1."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimizers_of(model, lr):
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms and positions."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    adamw = torch.optim.AdamW(rest, ADAMW_RATIO * lr, BETAS, weight_decay=0, fused=True)
    return Muon(matrices, lr), adamw


def apply_gradients(optimizers):
    """One step of both optimizers, after which the gradients are gone."""
    others = [p for p in optimizers[1].param_groups[0]["params"] if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(others, CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- what surrounds the loop

class Progress:
    """What people see of a run: a bar, log.jsonl."""

    def __init__(self, options, config, plans, start, rows, device):
        self.path, self.device = Path(options["out"]) / "log.jsonl", device
        batch_size = options["batch_size"]
        self.tokens = batch_size * sum(sum(config.layout(task)) for task in plans)
        self.flops = batch_size * sum(config.flops(task, plan) for task, plan in plans.items())
        self.peak = peak_flops(device)
        # What came after the checkpoint comes again.
        self.rows = list(rows)
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.bar = tqdm(total=options["steps"], initial=start, desc=self.path.parent.name,
                        unit="step")
        self.logged_step, self.logged_at = start, time.perf_counter()

    def step(self, step, losses, lr, last_step):
        """losses: {task: a tensor}. lr: Muon's."""
        self.bar.update()
        if (step + 1) % LOG_EVERY and not last_step:
            return
        values = torch.stack(list(losses.values()))
        values = dict(zip(losses, values.tolist()))                     # waits for the device
        check_finite(values.values(), self.path.parent, step)
        now = time.perf_counter()
        seconds = (now - self.logged_at) / (step + 1 - self.logged_step)            # a step
        self.logged_step, self.logged_at = step + 1, now
        mfu = self.flops / seconds / self.peak if self.peak else None
        row = {"step": step + 1, "loss": sum(values.values()), "loss_und": values.get("und"),
               "loss_gen": values.get("gen"), "lr": lr, "tokens_per_s": self.tokens / seconds,
               "step_ms": 1e3 * seconds, "mfu": mfu, "peak_memory_mb": peak_memory_mb(self.device)}
        self.rows.append(row)
        with suppress(OSError), self.path.open("a") as log:             # a full disk stops no run
            log.write(json.dumps(row) + "\n")
        speed = f"loss {row['loss']:.3f}, {row['tokens_per_s'] / 1e3:.1f}k tokens/s"
        self.bar.set_postfix_str(speed + (f", MFU {mfu:.0%}" if mfu else ""))


def check_finite(values, out, step):
    if not all(map(math.isfinite, values)):
        fail(f"a loss or a weight is not finite at step {step + 1}: --resume goes on from the last "
             f"checkpoint in {out}, if there is one; or begin again with a lower --lr")


def save(out, options, dataset, tokenizer, model, optimizers, step, rows):
    check_finite([p.sum().item() for p in model.parameters()], out, step)
    save_checkpoint({"kind": "run", "options": options, "tasks": OBJECTIVES[options["objective"]],
                     "step": step + 1, "identity": dataset.identity,
                     "tokenizer": tokenizer.state(), "config": asdict(model.config),
                     "model": model.state_dict(), "log": rows,
                     "optimizers": [o.state_dict() for o in optimizers]}, out / "checkpoint.pt")


def parts_that_fit(options, config, device):
    """Into how many parts a step's sequences have to be split to fit into a GPU's memory. One part
    after the other leaves its gradients, so that a step learns the same, whatever this number."""
    rows = options["batch_size"]
    if options["parts"] or device.type != "cuda":
        return options["parts"] or 1
    # A backward pass needs so many bytes of each number in each layer's hidden states. Measured by
    # compiling for a card; 3 GB are for weights, optimizers and training sequences.
    bytes_each = 45 if options["compile"] else 70
    tokens = max(sum(config.layout(task)) for task in OBJECTIVES[options["objective"]])
    room = torch.cuda.get_device_properties(device).total_memory - 3e9
    fitting = room / (bytes_each * config.layers * tokens * config.width)       # rows
    return next(parts for parts in range(1, rows + 1)
                if rows % parts == 0 and (rows / parts <= fitting or parts == rows))


def compile_blocks(model, plans, examples, parts, index, log):
    """torch.compile for each block, in place: layers with one Rule share their code. Tried at once
    with the sequences `index`; what this machine cannot compile runs as it is. Returns whether it
    worked. log: a path for the compiler's complaint."""
    # Once uncompiled, on two pictures: a mistake of our own is not taken for the compiler's.
    forward_backward(model, plans, examples, 1, index[:, :2])
    # A run before this one, in the same process, may have failed to compile.
    torch.compiler.set_stance("default")
    for block in model.blocks:
        block.compile(dynamic=False)
    try:
        forward_backward(model, plans, examples, parts, index)
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                              # compilers raise nearly anything
        write_file(log, traceback.format_exc())
        lines = [line for line in str(error).splitlines() if line and "raised:" not in line]
        reason = lines[0][:300] if lines else type(error).__name__
        print(f"torch.compile failed here, going on without it: {reason} (more in {log})")
        torch.compiler.set_stance("force_eager")
        return False
    finally:
        model.zero_grad()


# ---------------------------------------------------------------------- options

def complete(given, device):
    """All options of a run: those given, for the others the defaults."""
    options = {"objective": "joint", "und_plan": "dense", "gen_plan": "dense",
               "projections": "shared", "image_loss": False, "practice": False, "data": "shapes",
               "seed": 0, "lr": LEARNING_RATE, "parts": None, "save_every": SAVE_EVERY,
               "compile": has_bfloat16(device) and find_spec("triton") is not None,
               "preset": default_preset(device), **given}
    preset = PRESETS[options["preset"]]
    # A default folder is named after objective, plans, projections, controls, preset and data,
    # where these are not the default: out/joint, out/und-himix, ...
    names = [options["objective"]]
    plans = [options[f"{task}_plan"] for task in OBJECTIVES[options["objective"]]]
    names += plans if set(plans) != {"dense"} else []
    names += [options["projections"]] if options["projections"] != "shared" else []
    names += ["image-loss"] if options["image_loss"] else []
    names += ["practice"] if options["practice"] else []
    usual = {"steps": preset.steps, "batch_size": preset.batch_size,
             "shallow": usual_shallow(preset.layers),
             "tokenizer": default_path("tokenizer", options["data"], options["preset"], device,
                                       ".pt"),
             "out": default_path("-".join(names), options["data"], options["preset"], device)}
    return usual | options


def check(options):
    """Refuses options that make no sense, before any work begins."""
    tasks, rows = OBJECTIVES[options["objective"]], options["batch_size"]
    for key, least, most in (("steps", 1, 10 ** 7), ("batch_size", 1, 10 ** 6), ("lr", 1e-9, 10),
                             ("save_every", 0, 10 ** 9), ("seed", 0, 2 ** 32 - 1)):
        if not least <= options[key] <= most:
            fail(f"--{key.replace('_', '-')} {options[key]}: expected {least} to {most}")
    if not options["out"]:                                  # an empty variable of a shell
        fail("--out is empty: expected a folder")
    if options["steps"] * rows > 10 ** 8:
        fail(f"--steps {options['steps']}: expected at most {10 ** 8 // rows} (10^8 pictures)")
    if options["parts"] is not None and (options["parts"] < 1 or rows % options["parts"]):
        fail(f"--parts {options['parts']}: expected a divisor of {rows}, the pictures of each task "
             "in a step")
    if options["projections"] == "task" and len(tasks) == 1:
        fail("--projections task: a run of one task has one kind of image tokens; expected image")
    for task in {"und", "gen"} - set(tasks):
        if options[f"{task}_plan"] != "dense":
            fail(f"--{task}-plan: there is no such task with --objective {options['objective']}")
    for key, task in (("image_loss", "und"), ("practice", "gen")):
        if options[key] and task not in tasks:
            fail(f"--{key.replace('_', '-')} is of no use with --objective {options['objective']}")
    if options["practice"] and options["data"] != "shapes":
        fail("--practice: both tasks see the same pictures of a folder; expected --data shapes")
    plans_of(tasks, options, PRESETS[options["preset"]].layers)


def resume(given, options):
    """The checkpoint in --out, and the options to go on with: what decides what is learned stays
    what it was."""
    out = options["out"]
    checkpoint = read_checkpoint(Path(out) / "checkpoint.pt", "run")
    if not {"optimizers", "log"} <= checkpoint.keys():      # study/trained, or an earlier version's
        fail(f"--out {out}: this checkpoint lacks what training needs; expected another run")
    kept = checkpoint["options"]
    for key in ("out", "compile", "save_every", "parts"):
        kept[key] = options[key]
    if "data" in given:                         # where it is now; load_of_run compares its content
        kept["data"] = given["data"]
    for key, value in given.items():
        if value != kept[key]:
            fail(f"--{key.replace('_', '-')} {value}: the run in {out} has {kept[key]}")
    return checkpoint, kept


def main():
    parser = script_parser(__doc__, argument_default=SUPPRESS)
    add = parser.add_argument
    add("--objective", choices=OBJECTIVES, help="which tasks are trained (default: joint)")
    add("--und-plan", help=f"what image tokens do when understanding: {', '.join(PLANS)}")
    add("--gen-plan", help="the same when generating; himix is impossible there (default: dense)")
    add("--projections", choices=PROJECTIONS, help="Q, K, V of image tokens: those of text, their "
        "own, or their own for each task (default: shared)")
    add("--shallow", type=int, metavar="K", help="so many layers are shallow in hmgen and naive "
        "(default: a quarter of all)")
    add("--image-loss", action="store_true", help="a control: understanding predicts the image "
        "that it looks at, too")
    add("--practice", action="store_true", help="generation's pictures without caption, a tenth of "
        "all, are understanding's")
    add("--preset", choices=PRESETS, help="size of everything (default: what fits the device)")
    add("--data", help="shapes, or a folder of captioned images (default: shapes)")
    add("--steps", type=int)
    add("--batch-size", type=int, help="pictures of each task in a step")
    add("--parts", type=int, metavar="N", help="take a step's pictures one Nth after the other: "
        "less memory, the same result (default: what the GPU's memory needs)")
    add("--lr", type=float, help="Muon's highest learning rate; AdamW's goes along")
    add("--seed", type=int, help="of data, weights and order (default: 0)")
    add("--save-every", type=float, metavar="SECONDS", help=f"default: {SAVE_EVERY}")
    add("--compile", action=BooleanOptionalAction,
        help="torch.compile; on CUDA also a CUDA graph (default: on GPUs with bfloat16)")
    add("--tokenizer", metavar="PATH", help="trained if there is no such file")
    add("--out", help="the run's folder (default: out/joint, out/und-himix, ...)")
    add("--resume", action="store_true", default=False, help="go on with the run in --out")
    given = vars(parser.parse_args())
    device, resuming = given.pop("device"), given.pop("resume")

    device = pick_device(device)
    options, checkpoint = complete(given, device), None
    if resuming:
        checkpoint, options = resume(given, options)
    check(options)
    out = Path(options["out"])
    if not resuming and (out / "checkpoint.pt").exists():
        fail(f"{out} holds a run already: --resume goes on with it, --out PATH begins another")
    if not resuming and (out / "eval.json").exists():
        fail(f"{out} holds the scores of a run without its checkpoint: expected another --out")
    with exclusive(out) as alone:
        if not alone:
            fail(f"another process is at work in {out}: expected another --out")
        # What is left of saves that were killed.
        for part in out.glob("checkpoint.pt.*.part"):
            part.unlink(missing_ok=True)
        train(options, device, checkpoint)


if __name__ == "__main__":
    run_script(main)
