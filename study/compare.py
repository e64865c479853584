"""Our training beside what one would take instead, of the same shape, batch and precision.

    pip install transformers && python study/compare.py [--preset gpu --compile]    tokens a second
    python study/compare.py --train [--seeds 1 2 3] [--only ours]                   time to quality

Tokens a second: medians of steps that take turns. Ours; ours with AdamW alone; a GPT written the
usual way (nanoGPT's structure: LayerNorm, one QKV product, GELU, learned positions, tied head,
logits and loss at every position, AdamW); and transformers' Llama (SwiGLU as wide as needed for as
many weights, AdamW). Ours has its mask of packed questions, QK norm and rotary positions, and
computes logits only where a target may be. Compiled on CUDA, ours is a CUDA graph, as train.py has
it, and the others are launched kernel by kernel. Writes study/results/compare-PRESET.json.

Time to quality: ours, as train.py trains it, and the usual GPT on the same sequences, in the same
order: both have the packed questions and their mask, the weights of the loss, and logits only where
a target may be. What differs is the architecture, the initial weights, the optimizer and the
schedule. Counted are the seconds and the steps until so many validation questions and pictures are
right; the clock stands still while they are scored. Writes a file for each run into
study/results/quality-PRESET/ when it ends, and quality-PRESET.png. It goes on where it stopped; two
processes may share the work by --only (seconds are comparable when both were equally disturbed).
"""
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import (cuda_graph, fail, hardware, line_chart, mixed_precision, pick_device,
                    run_script, save_picture, script_parser, write_file)

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import train
from bench import bench_config, bench_step, ms_cell, synchronize, time_each, timing
from data import PRESETS
from eval import SAMPLING, answer_all, check_pictures, draw_pictures, understanding_scores
from model import Config, Model, attention, sequences
from prune import make_plan
from table import RESULTS, cell, markdown
from tokenizer import Tokenizer, default_preset

THRESHOLDS = {"und": .85, "gen": .9}    # the quality: questions, and pictures, that are right
SCORED = {"und": 200, "gen": 210}       # validation pictures with questions, captions to draw
SCORE_EVERY = 100                       # steps
TITLES = {"ours": "ours", "usual": "GPT, usual"}


# ---------------------------------------------------------------------- tokens a second

class GPTBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        q, k, v = self.heads_of(x)
        return self.update(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def heads_of(self, x):
        """(B, n, d) -> queries, keys and values, each (B, H, n, Dh)."""
        qkv = self.qkv(self.norm1(x)).chunk(3, -1)
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv]

    def update(self, x, attended):
        """x (B, n, d) after the layer. attended: (B, H, n, Dh)."""
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab, layers, d, heads, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(GPTBlock(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Llama(nn.Module):
    def __init__(self, vocab, layers, d, heads, length):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=d, intermediate_size=8 * d // 3, use_cache=False,
            num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=length,
            attn_implementation="sdpa"))

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


def usual_step(model, ids, compiled):
    """A function that takes one training step with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with mixed_precision(ids.device):
            loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_speed(preset, batch_size, repeats, compiled, device):
    """Times the steps, prints and writes tokens a second."""
    p, c, rows = PRESETS[preset], bench_config(preset), []
    batch = batch_size or p.batch_size
    for task in ("und", "gen"):
        length, plan = sum(c.layout(task)), make_plan("dense", p.layers)
        ids = torch.randint(c.vocab, (batch, length), device=device)
        shape = c.vocab, p.layers, p.width, p.heads, length
        steps = {"ours": bench_step(task, plan, c, batch, device, compiled),
                 "ours, AdamW alone": bench_step(task, plan, c, batch, device, compiled, False),
                 "GPT, usual": usual_step(GPT(*shape).to(device), ids, compiled)}
        try:
            steps["Llama, transformers"] = usual_step(Llama(*shape).to(device), ids, compiled)
        except ImportError:
            print("without transformers' Llama: pip install transformers")
        for name, seconds in time_each(steps, device, repeats).items():
            rows.append({"task": task, "step": name, "length": length, "batch_size": batch,
                         **timing(seconds, batch * length)})
    result = {"hardware": hardware(device), "preset": preset, "compile": compiled,
              "repeats": repeats, "rows": rows}
    path = RESULTS / f"compare-{preset}.json"
    write_file(path, json.dumps(result, indent=1))
    print(f"{result['hardware']}, preset {preset}\n\n" + markdown(
        ["task", "step", "tokens", "batch", "ms (least, most)", "tokens/s"],
        [[x["task"], x["step"], x["length"], x["batch_size"],
          ms_cell(x), f"{x['tokens_per_s']:.0f}"]
         for x in rows], 2) + f"\n\n{path}")


# ---------------------------------------------------------------------- the usual GPT, trainable

class UsualBlock(GPTBlock):
    """The same layer, to be called as model.Block is. In a dense plan, the only one that it knows,
    all tokens are queries and keys."""

    def forward(self, x, embedding, inputs, task, fused=True, cache=None):
        q, k, v = self.heads_of(x)
        if cache:
            all_k, all_v, first = cache
            index = first + inputs.keys.index
            all_k[:, :, index], all_v[:, :, index] = k, v
            k, v = all_k, all_v
        attended, weights = attention(q, k, v, inputs.mask, fused)
        return self.update(x, attended), weights


class UsualGPT(Model):
    """The usual GPT in place of our Model: the same sequences, loss and decoding, dense plans
    only."""

    def __init__(self, c):
        nn.Module.__init__(self)                            # none of our Model's weights
        self.config = c
        length = max(sum(c.layout(task)) for task in ("und", "gen"))
        self.token_embedding = nn.Embedding(c.vocab, c.width)
        self.position_embedding = nn.Embedding(length, c.width)
        self.blocks = nn.ModuleList(UsualBlock(c.width, c.heads) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.vocab, bias=False)
        self.head.weight = self.token_embedding.weight
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=.02 / math.sqrt(2 * c.layers))       # what layers add to x
            elif p.ndim == 2:
                nn.init.normal_(p, std=.02)

    def embed(self, batch, start=0, stop=None):
        """(B, stop - start, d): of each token its embedding and that of its position, which is, for
        text, position_ids: all questions on a picture stand right after it. An image stands where
        it does in training, whatever the captions in a batch take."""
        index = torch.arange(batch.tokens.size(1), device=batch.tokens.device)      # (N,)
        index += self.config.layout(batch.task).before - batch.layout.before
        places = torch.where(batch.is_image(), index, batch.position_ids[..., 0])   # (B, N)
        return (self.token_embedding(batch.tokens[:, start:stop])
                + self.position_embedding(places[:, start:stop]))

    def rotary(self, batch, index):
        """None: positions are in the embeddings."""


def usual_optimizer(model, lr):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": .1}, {"params": others, "weight_decay": 0.}]
    return torch.optim.AdamW(groups, lr, betas=(.9, .95), fused=True)


def usual_learning_rate(step, steps):
    """As a share of the highest: it rises as ours does, then half a cosine leads down to a
    tenth."""
    if step < train.WARM_UP:
        return (step + 1) / train.WARM_UP
    progress = (step - train.WARM_UP) / max(1, steps - train.WARM_UP)
    return .1 + .9 * (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------------- time to quality

class Material(NamedTuple):
    """What both models of a seed are trained and scored on."""
    dataset: data.Shapes
    tokenizer: Tokenizer
    config: Config
    examples: dict          # {task: Batch} all training sequences
    validation: dict        # {task: (data.Split, Batch)} what is scored


def prepare(options, device):
    """The Material of train.py's run with these options; of its validation a first part."""
    preset = PRESETS[options["preset"]]
    dataset = data.load(options["data"], options["preset"])
    tokenizer = train.get_tokenizer(options, dataset, device)
    examples = {task: train.training_sequences(task, options, dataset, tokenizer).to(device)
                for task in SCORED}
    c, validation = train.make_config(options, tokenizer, examples), {}
    for task, of_all in (("und", preset.und_val), ("gen", preset.gen_val)):
        split = dataset.split(task, "val", min(SCORED[task], of_all), options["seed"])
        batch = sequences(task, tokenizer, split, c.und_text).to(device)
        validation[task] = split, batch
    return Material(dataset, tokenizer, c, examples, validation)


def score(model, material, plan):
    """{task: scores}, as eval.json has them, on its part of the validation split."""
    dataset, tokenizer, _, _, validation = material
    answers, _ = answer_all(model, tokenizer, *validation["und"], plan)
    split, _ = validation["gen"]
    texts = [caption.text for caption in split.captions]
    pictures = draw_pictures(model, tokenizer, texts, plan, SAMPLING["shapes"])
    rates, _ = check_pictures(dataset, split, pictures)
    return {"und": understanding_scores(answers), "gen": rates}


def options_of(kind, seed, args, device):
    """Of a run, as train.py has them. The usual GPT may take twice as many steps, and has a
    learning rate of its own."""
    given = {"preset": args.preset or default_preset(device), "seed": seed,
             "batch_size": args.batch_size, "tokenizer": args.tokenizer,
             "compile": args.compile or None}
    options = train.complete({k: v for k, v in given.items() if v is not None}, device)
    if kind == "usual":
        options |= {"lr": args.usual_lr, "steps": 2 * options["steps"]}
    train.check(options)
    return options


def settings_of(options):
    """What a result depends on: results are comparable where these are the same."""
    kept = ("preset", "seed", "steps", "batch_size", "lr", "compile", "image_loss")
    return {**{key: options[key] for key in kept}, "thresholds": THRESHOLDS, "scored": SCORED,
            "score_every": SCORE_EVERY}


def train_until_good(kind, options, material, log, device):
    """Trains one model until both tasks have reached their thresholds, or to its last step. The
    schedule is always that of all its steps. Returns what its file holds. log: a path for the
    compiler's complaint."""
    c, steps = material.config, options["steps"]
    plan = make_plan("dense", c.layers)
    torch.manual_seed(options["seed"])
    if kind == "ours":
        model = Model(c, material.tokenizer.vq.codebook.cpu()).to(device)
        optimizers = train.optimizers_of(model, options["lr"])
        learning_rate = train.learning_rate_factor
    else:
        model = UsualGPT(c).to(device)
        optimizers = [usual_optimizer(model, options["lr"])]
        learning_rate = usual_learning_rate
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    highest = [group["lr"] for group in groups]
    # Of the same seed, so the shorter run takes the same rows as the longer one's beginning.
    order = train.draw_order(material.examples, options)
    parts = train.parts_that_fit(options, c, device)
    work = model, dict.fromkeys(material.examples, plan), material.examples, parts
    if options["compile"]:                                  # before the clock starts
        torch.compiler.reset()                              # else the code of every run stays
        train.compile_blocks(*work, order[0], log)
    run_passes = partial(train.forward_backward, *work)
    if options["compile"] and device.type == "cuda":
        run_passes = cuda_graph(run_passes, model, order[0])

    curve, reached, seconds = [], dict.fromkeys(THRESHOLDS), 0.
    bar = tqdm(total=steps, desc=f"{kind}, seed {options['seed']}", unit="step")
    synchronize(device)
    clock = time.perf_counter()
    for step in range(steps):
        for group, lr in zip(groups, highest):
            group["lr"] = lr * learning_rate(step, steps)
        losses = run_passes(order[step])
        if kind == "ours":
            train.apply_gradients(optimizers)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizers[0].step()
            optimizers[0].zero_grad()
        bar.update()
        if (step + 1) % SCORE_EVERY == 0 or step == steps - 1:
            synchronize(device)
            seconds += time.perf_counter() - clock
            total = sum(losses.values()).item()
            if not math.isfinite(total):
                fail(f"{kind}, seed {options['seed']}: the loss is not finite at step {step + 1}")
            with torch.compiler.set_stance("force_eager"):              # batches of other sizes
                scores = score(model, material, plan)
            row = {"step": step + 1, "seconds": seconds, "loss": total,
                   "und": scores["und"]["accuracy"], "gen": scores["gen"]["image_accuracy"]}
            curve.append(row)
            for task, threshold in THRESHOLDS.items():
                if reached[task] is None and row[task] >= threshold:
                    reached[task] = {"step": step + 1, "seconds": seconds}
            bar.set_postfix_str("loss {loss:.3f}, questions {und:.1%}, images {gen:.1%}".format(
                **row))
            if all(reached.values()):
                break
            clock = time.perf_counter()
    bar.close()
    return {"kind": kind, "settings": settings_of(options), "hardware": hardware(device),
            "parameters": sum(p.numel() for p in model.parameters()),
            "n": {task: scores[task]["n"] for task in THRESHOLDS}, "reached": reached,
            "ms_per_step": 1e3 * row["seconds"] / row["step"], "end": row, "curve": curve}


def compare_quality(args, device):
    """Trains what is missing, then prints the table of all that is there."""
    preset = args.preset or default_preset(device)
    folder = args.results or RESULTS / f"quality-{preset}"
    missing = {}                                            # {seed: [(kind, options, path)]}
    for seed in args.seeds:                     # what is wrong is told before anything is trained
        for kind in [args.only] if args.only else TITLES:
            options = options_of(kind, seed, args, device)
            path = folder / f"{kind}-seed{seed}.json"
            if path.exists():
                check_settings(path, settings_of(options))
            else:
                missing.setdefault(seed, []).append((kind, options, path))
    for runs in missing.values():
        material = prepare(runs[0][1], device)              # the same for both models
        for kind, options, path in runs:
            log = path.with_suffix(".compile-error.txt")
            result = train_until_good(kind, options, material, log, device)
            write_file(path, json.dumps(result, indent=1))
    quality_table(folder)


def check_settings(path, settings):
    """Refuses a result of other settings: it would be taken for one of these."""
    stored = json.loads(path.read_text())["settings"]
    for key, value in settings.items():
        if stored.get(key) != value:
            fail(f"{path} has {key} {stored.get(key)}, now it is {value}: give that, or another "
                 "--results, or move the file away")


def quality_table(folder):
    """Prints the table of all results in a folder; draws the first seed that both models have."""
    found = {kind: {} for kind in TITLES}                   # {kind: {seed: result}}
    for path in folder.glob("*-seed*.json"):
        result = json.loads(path.read_text())
        found[result["kind"]][result["settings"]["seed"]] = result
    rows, rates, every = [], [], []
    for kind, runs in found.items():
        rows += [[TITLES[kind], seed, *cells_of({seed: runs[seed]})] for seed in sorted(runs)]
        used = sorted({run["settings"]["lr"] for run in runs.values()})
        rates += [f"{TITLES[kind]} {', '.join(map(str, used))}"] if used else []
        every += runs.values()
    rows += [[TITLES[kind], "mean ± std", *cells_of(runs)] for kind, runs in found.items()
             if len(runs) > 1]
    settings, n = every[0]["settings"], every[0]["n"]
    goals = {task: f"{share:.0%}" for task, share in settings["thresholds"].items()}
    print("\n" + markdown(
        ["", "seed", f"{goals['und']} of questions: seconds", "steps",
         f"{goals['gen']} of images: seconds", "steps", "questions right at the end, %",
         "images, %", "ms a step", "M parameters"], rows))
    print(f"\nPreset {settings['preset']}, {settings['batch_size']} pictures of each task in a "
          f"step. Highest learning rate: {'; '.join(rates)}. Scored every "
          f"{settings['score_every']} steps on about {n['und']} questions and {n['gen']} captions. "
          + " / ".join(sorted({run["hardware"] for run in every})) + f"\n\n{folder}/")
    draw_quality(found, f"{folder}.png")


def cells_of(runs):
    """What the table says of one run, or of several: mean ± standard deviation. runs: {seed:
    result}."""
    cells = []
    for task in THRESHOLDS:
        missed = [run["settings"]["steps"] for run in runs.values() if run["reached"][task] is None]
        if missed:                      # a mean of the others would be that of the luckier ones
            of_several = f" by {len(missed)} of {len(runs)}" if len(runs) > 1 else ""
            cells += ["–", f"not reached in {missed[0]} steps{of_several}"]
        else:
            cells += [cell(runs, ("reached", task, key), 1, 0) for key in ("seconds", "step")]
    return cells + [cell(runs, ("end", "und"), 100, 1), cell(runs, ("end", "gen"), 100, 1),
                    cell(runs, ("ms_per_step",), 1, 0), cell(runs, ("parameters",), 1e-6, 2)]


def draw_quality(found, path):
    """Both scores of both models against seconds of training."""
    both = sorted(found["ours"].keys() & found["usual"].keys())
    if not both:
        return
    lines = {}
    for kind, runs in found.items():
        for task in THRESHOLDS:
            points = [(row["seconds"], 100 * row[task]) for row in runs[both[0]]["curve"]]
            lines[f"{kind}, {task}"] = [(0, 0), *points]    # without training nothing is right
    title = f"questions (und) and images (gen) that are right, %, seed {both[0]}"
    save_picture(line_chart(lines, title, "seconds of training", top_y=100), path)
    print(path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=15, help="of timed steps (default: 15)")
    parser.add_argument("--compile", action="store_true",
                        help="(--train: default on GPUs with bfloat16)")
    parser.add_argument("--train", action="store_true", help="time to quality; the options below "
                        "are for it alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N",
                        help="default: 1 2 3")
    parser.add_argument("--only", choices=TITLES, help="train one of the two models")
    parser.add_argument("--usual-lr", type=float, default=1e-3, metavar="LR",
                        help="the usual GPT's highest learning rate (default: 1e-3)")
    parser.add_argument("--tokenizer", metavar="PATH", help="trained if there is no such file")
    parser.add_argument("--results", type=Path, metavar="FOLDER",
                        help="default: study/results/quality-PRESET")
    args = parser.parse_args()
    if not 1e-9 <= args.usual_lr <= 10:
        fail(f"--usual-lr {args.usual_lr}: expected 1e-09 to 10")
    device = pick_device(args.device)
    if args.train:
        compare_quality(args, device)
    else:
        compare_speed(args.preset or default_preset(device), args.batch_size, args.repeats,
                      args.compile, device)


if __name__ == "__main__":
    run_script(main)
