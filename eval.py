"""Scores of one run for both tasks; answers and pictures on demand.

    python eval.py out/joint                    scores a run: eval.json, samples.png in its folder
    python eval.py out/joint --gen-plan hmgen   ... with a plan it was not trained with (fig. 5)
    python eval.py out/joint --ask picture.png "what colour is the circle?"
    python eval.py out/joint --draw "top-left a big yellow circle" --n 8
"""
import json
import math
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from common import (check_output, contact_sheet, fail, hardware, pick_device, run_script,
                    save_picture, script_parser, write_file)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import CAPTION_FIELDS, PRESETS, QUESTION_KINDS, Question, load_of_run, open_picture
from model import generation, load_run, sequences, understanding
from prune import make_plan, paper_cost, plans_of, predicting
from tokenizer import FIRST_CODE

BATCH = 64                                          # sequences that are scored at a time
SHOWN = 18          # pictures of each task in samples.png; of a folder's training pictures, too


# ---------------------------------------------------------------------- answering and drawing

@torch.no_grad()
def answer(model, tokenizer, codes, question, plan, longest=None):
    """One picture's codes (M,) and a question -> the answer, a string, by greedy decoding: up to
    the end token or `longest` tokens, by default as many as a training sequence has of text."""
    c, device = model.config, model.device
    first = 2 + c.side ** 2                         # the position after the image
    start = first + len(tokenizer.ids(question))
    stop = start + (longest or c.und_text)
    batch = understanding(tokenizer, codes[None], [[(question, "")]], stop - first)
    batch.segment_ids[:, first:] = 1                # what is to come belongs to the question
    batch.position_ids[:, first:] = torch.arange(first, stop)[:, None]
    tokens = model.generate(batch.to(device), plan, start,
                            lambda logits: logits[:, :FIRST_CODE].argmax(-1))
    ids = tokens[0, start:].tolist()
    if tokenizer.eos in ids:
        ids = ids[:ids.index(tokenizer.eos)]
    return tokenizer.string(ids).strip()


# (guidance, temperature) of drawing: see study/NOTES.md, what was tried. A folder's few pictures
# are known by heart, with an empty caption, too: guidance leads astray there.
SAMPLING = {"shapes": (1.5, .7), "folder": (1., .1)}


def sampling_of(options):
    return SAMPLING["shapes" if options["data"] == "shapes" else "folder"]


@torch.no_grad()
def draw(model, tokenizer, captions, plan, uniform, guidance=1., temperature=1.):
    """Captions -> sampled codes (B, M). uniform: (B, M) random numbers from 0 to 1, one a token.

    guidance: classifier-free (Ho & Salimans 2022): logits of no caption + guidance * (those of the
    caption - those of no caption). 1 draws from the model's own distribution; more follows the
    caption more closely, for twice the cost.
    """
    c, device = model.config, model.device
    n = len(captions)
    texts = list(captions) + ([""] * n if guidance != 1 else [])
    empty = torch.zeros(len(texts), c.side ** 2, dtype=torch.long)
    batch = generation(tokenizer, empty, texts).to(device)
    uniform_of_token = iter(uniform.T.to(device))                   # (n,) for each token in turn

    def choose(logits):
        logits = logits[:, FIRST_CODE:].float()
        if guidance != 1:
            with_caption, without = logits.chunk(2)
            logits = without + guidance * (with_caption - without)
        # The code at which the cumulative probability reaches a random number.
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        code = (cumulative < next(uniform_of_token)[:, None]).sum(-1)
        code = code.clamp(max=logits.size(-1) - 1)          # the last sum may be just below 1
        return FIRST_CODE + code.repeat(len(texts) // n)

    start = batch.layout.before
    tokens = model.generate(batch, plan, start, choose)
    return tokens[:n, start:] - FIRST_CODE


def draw_pictures(model, tokenizer, texts, plan, sampling, batch=100, seed=0):
    """Captions (strings) -> pictures (N, H, W, 3) uint8. sampling: of SAMPLING. batch: how many are
    drawn at a time; a hundred of the gpu preset's keep 3 GB of keys and values."""
    # Drawn at once, so that a picture does not depend on how many others are drawn beside it.
    uniform = torch.rand(len(texts), model.config.side ** 2,
                         generator=torch.Generator().manual_seed(seed))
    pictures = []
    for i in tqdm(range(0, len(texts), batch), desc="drawing", leave=False):
        rows = slice(i, i + batch)
        codes = draw(model, tokenizer, texts[rows], plan, uniform[rows], *sampling)
        pictures.append(tokenizer.decode(codes))
    return np.concatenate(pictures)


# ---------------------------------------------------------------------- understanding

class Answered(NamedTuple):
    question: Question
    text: str               # under teacher forcing: each token follows the right ones before it
    correct: bool           # all of it, as `answer` would give it


@torch.no_grad()
def answer_all(model, tokenizer, split, batch, plan):
    """Answers all questions of a split. batch: its sequences, on the device.

    Greedy decoding gives exactly the right answer if and only if each of its tokens, the end
    included, is the likeliest text token after the right ones before it, so one forward pass
    tells. Returns a list of Answered for each picture, and the mean loss (nats) of an output token.
    """
    answers, loss = [], 0.
    for i in tqdm(range(0, len(batch.tokens), BATCH), desc="answering", leave=False):
        rows = batch.rows(slice(i, i + BATCH))
        logits, _ = model(rows, plan)
        span = predicting(rows.layout, rows.image_loss)
        targets, is_output = rows.targets[:, span], rows.is_output[:, span]
        loss += F.cross_entropy(logits[is_output].float(), targets[is_output],
                                reduction="sum").item()
        likeliest = logits[..., :FIRST_CODE].argmax(-1)        # as `answer` decodes
        segments, targets, is_output, likeliest = (
            x.cpu() for x in (rows.segment_ids[:, span], targets, is_output, likeliest))
        for row, questions in enumerate(split.questions[i:i + BATCH]):
            answers.append([])
            for number, question in enumerate(questions, 1):
                tokens = is_output[row] & (segments[row] == number)     # of this answer
                if tokens.any():                                # else it did not fit
                    ids = likeliest[row, tokens]
                    correct = torch.equal(ids, targets[row, tokens])
                    text = tokenizer.string(ids.tolist()).strip()
                    answers[-1].append(Answered(question, text, correct))
    return answers, loss / batch.is_output.sum().item()


def understanding_scores(answers):
    """Accuracy, also by kind of question. `chance`: the accuracy of always giving the most frequent
    answer to each kind of question."""
    answers = [a for of_picture in answers for a in of_picture]
    by_type, guessed = {}, 0
    for kind in (*QUESTION_KINDS, "question"):
        of_kind = [a for a in answers if a.question.kind == kind]
        if of_kind:
            (_, most), = Counter(a.question.answer for a in of_kind).most_common(1)
            guessed += most
            by_type[kind] = {"accuracy": fmean(a.correct for a in of_kind),
                             "chance": most / len(of_kind), "n": len(of_kind)}
    return {"n": len(answers), "accuracy": fmean(a.correct for a in answers),
            "chance": guessed / len(answers), "by_type": by_type}


# ---------------------------------------------------------------------- generation

def check_pictures(dataset, split, pixels):
    """What the checker says of pictures beside their captions: object and image accuracy, also by
    kind of caption; and which pictures are wrong (a list of indices)."""
    rows = [(caption.kind, len(scene), *dataset.fulfilled(caption, scene, seen))
            for caption, scene, seen in zip(split.captions, split.scenes, dataset.read(pixels))]

    def rates(kinds):
        _, stated, found, right = zip(*(row for row in rows if row[0] in kinds))
        return {"object_accuracy": sum(found) / sum(stated), "image_accuracy": fmean(right),
                "n": len(right)}

    kinds = [kind for kind in CAPTION_FIELDS if kind in {row[0] for row in rows}]
    wrong = [i for i, row in enumerate(rows) if not row[-1]]
    return {**rates(kinds), "by_type": {kind: rates([kind]) for kind in kinds}}, wrong


@torch.no_grad()
def generation_loss(model, batch, plan):
    """Mean loss (nats) of an image token after its caption."""
    total = 0.
    for i in range(0, len(batch.tokens), BATCH):
        rows = batch.rows(slice(i, i + BATCH))
        total += model(rows, plan)[1].item() * len(rows.tokens)
    return total / len(batch.tokens)


# ---------------------------------------------------------------------- cost

def cost(c, plans, batch_size):
    """What a training step costs, forward and backward, by exact FLOPs and by the paper's formula,
    beside the dense plan's. plans: {task: plan}."""
    dense = make_plan("dense", c.layers)
    flops = sum(c.flops(task, plan) for task, plan in plans.items())
    dense_flops = sum(c.flops(task, dense) for task in plans)
    by_paper = sum(paper_cost(plan, c.layout(task), c.width) for task, plan in plans.items())
    dense_by_paper = sum(paper_cost(dense, c.layout(task), c.width) for task in plans)
    return {"flops_per_step": batch_size * flops, "flops_ratio": flops / dense_flops,
            "paper_flops_ratio": by_paper / dense_by_paper}


# ---------------------------------------------------------------------- all scores of a run

def score_understanding(model, tokenizer, dataset, plan, n, options):
    """Scores on n validation pictures, and what to show of them."""
    def score(part):
        split = dataset.split("und", part, n, options["seed"])
        batch = sequences("und", tokenizer, split, model.config.und_text).to(model.device)
        answers, loss = answer_all(model, tokenizer, split, batch, plan)
        return split, answers, {**understanding_scores(answers), "loss": loss}

    split, answers, scores = score("val")
    shown = []                                              # (picture, text, is it wrong?)
    for picture, of_picture in zip(split.pixels[:SHOWN], answers):
        lines = []
        for a in of_picture[:4]:
            comment = "" if a.correct else f" (no: {a.question.answer})"
            lines.append(f"{a.question.text} {a.text}{comment}")
        shown.append((picture, "\n".join(lines), False))
    if split.scenes:
        _, _, held_out = score("transfer")
        scores |= {f"transfer_{name}": held_out[name] for name in ("accuracy", "chance", "n")}
    return scores, shown


def score_generation(model, tokenizer, dataset, plan, n, options):
    """Scores on n validation captions, and what to show of them."""
    def draw_split(split):
        texts = [caption.text for caption in split.captions]
        return draw_pictures(model, tokenizer, texts, plan, sampling_of(options))

    seed = options["seed"]
    split = dataset.split("gen", "val", n, seed, questions=0)
    batch = sequences("gen", tokenizer, split).to(model.device)
    drawn, decoded = draw_split(split), tokenizer.decode(tokenizer.encode(split.pixels))
    scores = {"n": len(drawn), "loss": generation_loss(model, batch, plan), "ceiling": {}}
    wrong = []
    if split.scenes:
        rates, wrong = check_pictures(dataset, split, drawn)
        scores |= rates
        scores["ceiling"] |= check_pictures(dataset, split, decoded)[0]
        held_out = dataset.split("gen", "transfer", n // 2, seed, questions=0)
        scenes = [[thing for thing in scene if thing.pair in dataset.held_out["gen"]]
                  for scene in held_out.scenes]             # only objects of held-out pairs count
        held_out = held_out._replace(scenes=scenes)
        rates, _ = check_pictures(dataset, held_out, draw_split(held_out))
        scores |= {"transfer_object_accuracy": rates["object_accuracy"], "transfer_n": rates["n"]}
    shown = [(drawn[i], split.captions[i].text, i in wrong) for i in range(min(SHOWN, len(drawn)))]
    if not split.scenes:        # also what it was trained on: a new name does not tell how it looks
        known = dataset.split("gen", "train", SHOWN, seed)
        shown += [(picture, f"{caption.text} (trained on)", False)
                  for picture, caption in zip(draw_split(known), known.captions)]
    return scores, shown


def evaluate(model, tokenizer, options, step, dataset, plans):
    """All scores of a run under the plans {task: plan}, on validation pictures that its seed draws.

    options: of train.py. step: how far it was trained. Returns what eval.json holds, and what to
    show: [(picture, text, is it wrong?)].
    """
    start, preset = time.time(), PRESETS[options["preset"]]
    model.eval()
    config = {**options, "step": step, "examples": step * options["batch_size"],
              "parameters": sum(p.numel() for p in model.parameters())}
    scores, shown = {"config": config}, []
    for task, plan in plans.items():
        score, n = ((score_understanding, preset.und_val) if task == "und"
                    else (score_generation, preset.gen_val))
        scores[task], new = score(model, tokenizer, dataset, plan, n, options)
        scores[task]["bits_per_token"] = scores[task]["loss"] / math.log(2)
        shown += new
    scores["n"] = {task: scores[task]["n"] for task in plans}
    scores["cost"] = cost(model.config, plans, options["batch_size"])
    scores |= {"seconds": time.time() - start, "hardware": hardware(model.device)}
    return scores, shown


def summary(scores):
    """The scores in a few lines, for a terminal."""
    lines = []
    for part in ("und", "gen", "cost"):
        numbers = [f"{name} {value:.4g}" for name, value in scores.get(part, {}).items()
                   if isinstance(value, (int, float))]
        if numbers:
            lines.append(f"{part}: " + ", ".join(numbers))
        for kind, rates in scores.get(part, {}).get("by_type", {}).items():
            right = rates["accuracy" if part == "und" else "image_accuracy"]
            lines.append(f"   {kind:20}{right:.1%} of {rates['n']}")
    return "\n".join(lines)


def save_scores(scores, shown, folder, suffix=""):
    """Writes eval.json and samples.png, the names with a suffix, into a run's folder."""
    pictures, texts, flags = zip(*shown)
    wrong = [i for i, flag in enumerate(flags) if flag]
    contact_sheet(pictures, texts, Path(folder) / f"samples{suffix}.png", wrong=wrong)
    # Last, because a run counts as finished where it has scores.
    write_file(Path(folder) / f"eval{suffix}.json", json.dumps(scores, indent=1))


# ---------------------------------------------------------------------- the command line

def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--data", help="where the run's images are now, if they have been moved")
    parser.add_argument("--und-plan", help="default: the one it was trained with")
    parser.add_argument("--gen-plan")
    parser.add_argument("--shallow", type=int, metavar="K", help="of hmgen and naive")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"))
    instead.add_argument("--draw", metavar="CAPTION")
    parser.add_argument("--n", type=int, default=8, help="how many pictures --draw draws")
    parser.add_argument("--seed", type=int, default=0, help="of what --draw draws")
    parser.add_argument("--out", type=Path, help="folder of the results (default: the run's)")
    args = parser.parse_args()
    if args.n < 1:
        fail(f"--n {args.n}: expected at least 1")
    if not 0 <= args.seed < 2 ** 32:
        fail(f"--seed {args.seed}: expected 0 to {2 ** 32 - 1}")
    device, out = pick_device(args.device), args.out or args.run
    model, tokenizer, checkpoint = load_run(args.run, device)
    options, tasks, suffix = checkpoint["options"], checkpoint["tasks"], ""
    needs = {"und": (args.ask, args.und_plan), "gen": (args.draw, args.gen_plan)}
    for task, given in needs.items():
        if given != (None, None) and task not in tasks:
            fail(f"{args.run} was trained for {tasks[0]} alone")
    changed = {key: getattr(args, key) for key in ("und_plan", "gen_plan", "shallow")
               if getattr(args, key) not in (None, options[key])}
    if changed:
        options |= changed
        suffix = "-{und_plan}-{gen_plan}{shallow}".format(**options)
    plans = plans_of(tasks, options, model.config.layers)
    if args.ask:
        pixels = open_picture(Path(args.ask[0]), tokenizer.vq.image_size, "--ask")
        codes = tokenizer.encode(pixels[None])[0]
        print(answer(model, tokenizer, codes, args.ask[1], plans["und"]))
    elif args.draw is not None:
        check_output(out / "draw.png", "picture")
        check_output(out / "draw-0.png", "picture")
        texts = [args.draw] * args.n
        pixels = draw_pictures(model, tokenizer, texts, plans["gen"], sampling_of(options),
                               seed=args.seed)
        contact_sheet(pixels, [""] * args.n, out / "draw.png", columns=min(args.n, 6))
        save_picture(Image.fromarray(pixels[0]), out / "draw-0.png")
        print(f"{out}/draw.png: {args.n} pictures of {args.draw!r}; draw-0.png: the first")
    else:
        dataset = load_of_run(checkpoint, args.data)
        scores, shown = evaluate(model, tokenizer, options, checkpoint["step"], dataset, plans)
        print(summary(scores))
        save_scores(scores, shown, out, suffix)
        print(f"{out}/eval{suffix}.json, samples{suffix}.png")


if __name__ == "__main__":
    run_script(main)
