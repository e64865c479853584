"""Train one transformer to understand pictures, to draw them, or both.

    python train.py                 everything: tokenizer, joint dense model, scores, pictures
    python train.py --objective und --und-plan himix --projections image    one task, accelerated
    python train.py --und-plan himix --gen-plan hmgen --projections task        share partial
    python train.py --data PATH     a folder of your own captioned images
    python train.py --resume out/joint-cpu          continues a stopped run
    python train.py --preset tiny   every stage in a minute; too short to learn anything

Leaves checkpoint.pt, log.jsonl, loss.png, eval.json and samples.png in the run's folder.
"""
import json
import math
import random
import sys
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

from common import (fail, has_bfloat16, line_chart, noted_signals, pick_device, positive,
                    read_checkpoint, run_script, save_checkpoint, save_picture, script_parser)

import torch
from tqdm import tqdm

import data
from data import PRESETS, usual_preset
from eval import evaluate
from model import PROJECTIONS, Config, Model, sequences
from prune import PLANS, plans_of
from tokenizer import Tokenizer, get_tokenizer

# Weight of each task's loss, even if the task is trained alone. Logged losses are unweighted.
TASK_WEIGHT = {"und": 1., "gen": 2.}
# The switch between joint and isolated training. A step takes one batch of each task.
OBJECTIVES = {"joint": [*TASK_WEIGHT], **{task: [task] for task in TASK_WEIGHT}}
WARM_UP = 50            # steps in which the learning rate rises
DECAY = .7              # share of training, at its end, in which it falls to nearly nothing
LOG_EVERY = 10          # steps, after which a run logs, saves if that is due, and stops if asked


def train(options, device, checkpoint=None):
    """Trains and scores one run, from its beginning or from a checkpoint: see `parse_options`.

    `save` writes weights, optimizers, tokenizer, options and log. Resuming compares options (see
    `parse_options`), data, preset, sizes and plans. Pictures, weights, empty captions and order
    depend on the seed alone, so a resumed run equals an unbroken one, on CPUs exactly."""
    out, steps, p = Path(options.out), options.steps, PRESETS[options.preset]
    plans = plans_of(OBJECTIVES[options.objective], vars(options), p.layers)
    out.mkdir(parents=True, exist_ok=True)
    if not checkpoint and any(out.iterdir()):
        fail(f"{out} is not empty: --resume continues that run, --out PATH starts a new one")

    # Data: all sequences of a task are one Batch that stays on the device.
    if checkpoint:
        dataset = data.load_of_run(checkpoint, options.data)
        tokenizer = Tokenizer.from_state(checkpoint["tokenizer"], device)
    else:
        dataset = data.load(options.data, options.preset)
        tokenizer = get_tokenizer(options.tokenizer, dataset, options.preset, device)
    examples = {task: training_sequences(task, options, dataset, tokenizer).to(device)
                for task in plans}
    order = draw_order(examples, options)
    made_with = data.made_with(dataset, options.preset)

    # The model and its optimizers.
    layouts = {task: tuple(batch.layout) for task, batch in examples.items()}
    config = Config(tokenizer.vocab, p.layers, p.width, p.heads, tokenizer.vq.side, layouts,
                    options.projections, options.image_loss)
    torch.manual_seed(options.seed)
    model = Model(config, tokenizer.vq.codebook.cpu()).to(device)
    muon, adamw = optimizers = optimizers_of(model, options.lr)
    start, rows = 0, []                                     # rows: of log.jsonl
    if checkpoint:
        had = checkpoint["config"] | {"plans": checkpoint["plans"]}
        data.same_settings(had, asdict(config) | {"plans": str(plans)}, "this run")
        start, rows = checkpoint["step"], checkpoint["log"]
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    # A step's forward and backward passes. On GPUs since Ampere, a CUDA graph of compiled blocks:
    # from step to step, only the choice of examples changes.
    run_passes = partial(forward_backward, model, plans, examples, options.parts)
    if options.compile and has_bfloat16(device) and start < steps:
        torch._dynamo.config.suppress_errors = True         # what cannot be compiled runs as it is
        for block in model.blocks:
            block.compile(dynamic=False)
        run_passes = cuda_graph(run_passes, model, order[0])

    tokens = options.batch_size * sum(sum(config.layout(task)) for task in plans)
    flops = options.batch_size * sum(config.flops(task, plan) for task, plan in plans.items())
    print(f"{sum(x.numel() for x in model.parameters()) / 1e6:.2f} M parameters, {tokens} tokens "
          f"and {flops / 1e9:.1f} GFLOP a step")

    def save(step):     # at the start, after each --save-every seconds, when stopped, at the end
        contents = {"kind": "run", "options": vars(options), "tasks": list(plans), "step": step,
                    "made_with": made_with, "config": asdict(config), "plans": str(plans),
                    "tokenizer": tokenizer.state(), "sampling": dataset.sampling, "log": rows,
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        save_checkpoint(contents, out / "checkpoint.pt")

    # A new run's log must not exist yet ("x"): if two runs start in one folder, one ends here.
    log = (out / "log.jsonl").open("w" if checkpoint else "x", buffering=1)
    for row in rows:                                        # rows after the checkpoint are dropped
        print(json.dumps(row), file=log)
    save(start)
    saved_at = logged_at = time.monotonic()
    model.train()
    bar = tqdm(range(start, steps), desc=out.name, unit="step", initial=start, total=steps)
    with noted_signals(bar) as signals:
        for step in bar:
            # The rate rises, is level, and falls linearly to .02 of the highest.
            factor = min((step + 1) / WARM_UP, 1., max(.02, (1 - step / steps) / DECAY))
            lr = options.lr * factor
            muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = lr, ADAMW_RATIO * lr
            losses = run_passes(order[step])
            apply_gradients(optimizers)
            done = step + 1
            if done % LOG_EVERY and done < steps:
                continue
            if not all(x.isfinite().all() for x in model.parameters()):
                fail(f"weights are not finite at step {done}: start again with a lower --lr and "
                     f"another --out; {out} keeps the last good checkpoint, for eval.py")
            now = time.monotonic()
            rate = (done - (rows[-1]["step"] if rows else 0)) / (now - logged_at)   # steps a second
            losses = {f"loss_{task}": loss.item() for task, loss in losses.items()}
            rows.append({"step": done, "loss": sum(losses.values()), **losses, "lr": lr,
                         "tokens_per_s": tokens * rate, "tflop_per_s": flops * rate / 1e12,
                         "gpu_memory_mb": torch.cuda.max_memory_allocated() / 2 ** 20})
            print(json.dumps(rows[-1]), file=log)
            bar.set_postfix_str(f"loss {rows[-1]['loss']:.3f}, {tokens * rate / 1e3:.1f}k tokens/s")
            if signals or done == steps or now - saved_at >= options.save_every:
                save(done)
                saved_at = now
            if signals:
                tqdm.write(f"stopped at step {done}: python train.py --resume {out} continues",
                           file=sys.stderr)
                raise SystemExit(128 + signals[0])
            logged_at = time.monotonic()                    # not when it began to save

    run_passes = None                                       # a CUDA graph holds memory
    print(f"trained and saved; scoring it, as python eval.py {out} does")
    lines = {task: [math.log10(row[f"loss_{task}"] + 1e-4) for row in rows] for task in plans}
    title = f"log10 of the loss (eq. 1) over {steps} steps"
    save_picture(line_chart(lines, title, -3, 1), out / "loss.png")
    with torch.compiler.set_stance("force_eager"):          # batches of other sizes
        evaluate(model, tokenizer, vars(options), steps, dataset, plans, out)
    print(f"look at them, and at {out}/loss.png; then: python probe.py {out}")


def forward_backward(model, plans, examples, parts, index):
    """Forward and backward pass of a step: adds to the gradients and returns {task: loss}. plans,
    examples: {task: plan}, {task: Batch}. index: (tasks, batch_size), which of the examples, in the
    order of `plans`. Parts save memory; weighted by their outputs, they give the same gradients.

    In a CUDA graph, this Python runs once: a rate, a random number or a step count in it would
    never change, and no tensor's value may be read (print, .item(), if)."""
    losses = dict.fromkeys(plans, 0.)
    for (task, plan), chosen in zip(plans.items(), index):
        outputs = examples[task].is_output[chosen].sum().clamp(1)
        for part in chosen.chunk(parts):
            batch = examples[task].rows(part)
            # Matmuls in bfloat16 where the GPU has it, else all in float32.
            with torch.autocast("cuda", torch.bfloat16, enabled=has_bfloat16(model.device)):
                _, loss = model(batch, plan)
            share = batch.is_output.sum().clamp(1).type_as(loss) / outputs      # of the outputs
            (TASK_WEIGHT[task] * share * loss).backward()
            losses[task] += share * loss.detach()
    return losses


def cuda_graph(function, model, index):
    """Captures in one CUDA graph a function of `index` that leaves gradients in `model`. A GPU then
    gets all kernels at once, instead of waiting for Python to launch them one by one; otherwise,
    dropped tokens save no time. Returns a function to call instead. Each call overwrites the last
    result; only the content of `index` changes: see `forward_backward`."""
    index = index.clone()               # where each replay reads it
    torch.cuda.empty_cache()            # a graph has a pool of its own: nothing is held twice
    # Warm up on the stream that will be recorded, because what happens only once, like the choice
    # of kernels, must not become part of the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(index)
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(stream)
    # No parameter has a gradient now, so that the first backward pass of each replay writes
    # gradients and does not add to those of the replay before.
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = function(index)
    except Exception as error:
        reason = error.__context__ or error             # the end of a recording fails, too
        fail("this step cannot become a CUDA graph: --no-compile runs without one, --parts 2 needs "
             f"less memory ({type(reason).__name__}: {str(reason).splitlines()[0]})")
    gradients = [p.grad for p in model.parameters()]        # where every replay writes them
    model.zero_grad()

    def replay(new):
        index.copy_(new)
        graph.replay()
        for p, gradient in zip(model.parameters(), gradients):
            p.grad = gradient                               # optimizers' zero_grad forgets it
        return result

    replay.function = function      # whose tensors the graph reads: they must stay where they are
    return replay


CAPTION_DROPOUT = .1    # share of captions emptied in training, for classifier-free guidance


def training_sequences(task, options, dataset, tokenizer):
    """All that a task is trained on, as one Batch."""
    p, seed = PRESETS[options.preset], options.seed
    if task == "und":
        split = dataset.split("und", "train", p.und_scenes, seed, p.questions)
        return sequences(task, tokenizer, split, p.max_text, options.image_loss)
    split = dataset.split("gen", "train", p.gen_scenes, seed, questions=0)
    rng = random.Random(f"{seed} dropout")
    dropped = [i for i in range(len(split.captions)) if rng.random() < CAPTION_DROPOUT]
    for i in dropped:
        split.captions[i] = split.captions[i]._replace(text="")
    if options.practice:        # what has no caption now shows pictures of understanding
        practice = dataset.split("und", "train", len(dropped), seed, questions=0)
        split.pixels[dropped[:len(practice.pixels)]] = practice.pixels
    return sequences(task, tokenizer, split)


def draw_order(examples, options):
    """Which sequences each step takes, (steps, tasks, batch_size). Drawn beforehand: no step waits
    for it, and a resumed run needs nothing else to continue as if nothing had happened."""
    order, shape = [], (options.steps, options.batch_size)
    for task, batch in examples.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{options.seed} {task}".encode()))
        order.append(torch.randint(len(batch.tokens), shape, generator=generator))
    return torch.stack(order, 1).to(batch.tokens.device)


# ---------------------------------------------------------------------- optimizers

# What is trained                       by         with a learning rate of at most
# query, out, down                      Muon       --lr
# key_value; up (they are tall)         Muon       times the root of rows / columns: 1.4; 2
# embeddings, head, norms, positions    AdamW      times ADAMW_RATIO
ADAMW_RATIO = .5
CLIP = 1.               # largest gradient norm of AdamW's part; Muon's steps have one size anyway
MOMENTUM = .95          # Muon's
BETAS = (.9, .99)       # AdamW's


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), for matrices: all singular values of a step
    are about equal. It does what torch.optim.Muon does, but for all matrices of one shape at once,
    and on a CPU in float32: one by one in bfloat16 takes 20 times as long there."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        by_shape = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for (rows, columns), matrices in by_shape.items():
            state = self.state[matrices[0]]                 # the first stands for all of this shape
            gradient = torch.stack([p.grad for p in matrices])
            if "average" not in state:
                state["average"] = torch.zeros_like(gradient)
            average = state["average"].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(average, MOMENTUM))                   # Nesterov
            scale = group["lr"] * max(1, rows / columns) ** .5      # as usual: tall ones take more
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-scale)


def orthogonal(x, steps=5):
    """(n, rows, columns) -> about the nearest orthogonal matrices, by Newton-Schulz: a quintic
    whose iteration drives every singular value towards 1. Coefficients: Jordan et al."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x, usual = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7), x.dtype
    x = x.bfloat16() if has_bfloat16(x.device) else x
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).to(usual)


def optimizers_of(model, lr):
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms and positions."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    theirs = set(matrices)
    rest = [p for p in model.parameters() if p not in theirs]
    adamw = torch.optim.AdamW(rest, ADAMW_RATIO * lr, BETAS, weight_decay=0, fused=True)
    return Muon(matrices, {"lr": lr}), adamw


def apply_gradients(optimizers):
    """One step of both optimizers, after which the gradients are gone."""
    torch.nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- options

def parse_options(arguments=None):
    """A run's options, its device, and the checkpoint that it continues. Options that are not
    given come from the resumed run, else from the preset or the defaults below."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--objective", default="joint", choices=OBJECTIVES, help="which tasks are trained")
    for task in TASK_WEIGHT:
        add(f"--{task}-plan", default="dense", choices=PLANS, help="what image tokens do there")
    add("--projections", default="shared", choices=PROJECTIONS, help="image tokens' own Q, K, V")
    add("--shallow", type=int, metavar="K", help="K of hmgen and naive (default: layers / 4)")
    add("--image-loss", action="store_true", help="a control: understanding predicts its images")
    add("--practice", action="store_true", help="uncaptioned examples use understanding's pictures")
    add("--preset", choices=PRESETS, help="size of everything (default: what fits the device)")
    add("--data", default="shapes", help="shapes, or a folder of captioned images")
    add("--steps", type=positive(int))
    add("--batch-size", type=positive(int), help="pictures of each task in a step")
    add("--parts", type=positive(int), default=1, help="split each step to use less memory")
    add("--lr", type=positive(float), default=.01, help="Muon's peak; AdamW's follows it")
    add("--seed", type=int, default=0, help="seed of the data, weights and order")
    add("--save-every", type=float, default=120, metavar="SECONDS")
    add("--no-compile", dest="compile", action="store_false", help="no torch.compile, no graph")
    add("--tokenizer", metavar="PATH", help="trained if the file does not exist")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", help="the run's folder (default: out/joint-cpu, out/und-tiny, ...)")
    where.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    given = parser.parse_args(arguments)        # which run or preset has the usual values?
    device, checkpoint = pick_device(given.device), None
    if given.resume is not None:
        checkpoint = read_checkpoint(Path(given.resume, "checkpoint.pt"), "run")
        if "optimizers" not in checkpoint:
            fail(f"--resume {given.resume}: it has no optimizer state to continue from")
        usual = vars(parser.parse_args([])) | checkpoint["options"] | {"out": given.resume}
    else:
        name = given.preset or usual_preset(device)
        p = PRESETS[name]
        usual = {"preset": name, "steps": p.steps, "batch_size": p.batch_size,
                 "out": f"out/{given.objective}-{name}"}
    parser.set_defaults(**usual)
    options = parser.parse_args(arguments)      # once more, with these as defaults
    del options.device, options.resume
    may_change = "out", "data", "parts", "compile", "save_every"    # load_of_run compares the data
    for key, value in vars(options).items():
        if checkpoint and key not in may_change and value != usual[key]:
            fail(f"--{key.replace('_', '-')} {value}: the run in {given.resume} has {usual[key]}")
    return options, device, checkpoint


def main():
    train(*parse_options())


if __name__ == "__main__":
    run_script(main)
