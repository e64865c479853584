"""Scores of one run for both tasks; answers and pictures on demand.

    python eval.py out/joint-cpu            scores a run: eval.json, samples.png in its folder
    python eval.py out/joint-cpu --gen-plan hmgen       with a plan it was not trained with (fig. 5)
    python eval.py out/joint-cpu --ask picture.png "what colour is the circle?"
    python eval.py out/joint-cpu --draw "top-left a big yellow circle" --n 8
"""
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from common import (contact_sheet, fail, hardware, pick_device, positive, run_script, save_picture,
                    script_parser, write_file)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import PRESETS, load_of_run, made_with, open_picture
from model import generation, load_run, sequences, understanding
from prune import PLANS, make_plan, paper_cost, plans_of, predicting
from tokenizer import FIRST_CODE

BATCH = 64          # sequences that are scored at a time
SHOWN = 18          # pictures of each task in samples.png


@torch.no_grad()
def answer(model, tokenizer, codes, question, plan):
    """One picture's codes (M,) and a question -> the answer, a string, by greedy decoding: up to
    the end token, or as many tokens as a training sequence has of text."""
    if codes.ndim != 1:
        raise ValueError(f"codes of one picture have shape (M,), not {tuple(codes.shape)}")
    first = 2 + len(codes)                          # the position after the image
    start = first + len(tokenizer.ids(question))
    stop = start + model.config.layout("und").after
    batch = understanding(tokenizer, codes[None], [[(question, "")]], stop - first)
    batch.segment_ids[:, first:] = 1                # what is to come belongs to the question
    batch.position_ids[:, first:] = torch.arange(first, stop)[:, None]
    tokens = model.generate(batch.to(model.device), plan, start,
                            lambda logits: logits[:, :FIRST_CODE].argmax(-1))
    ids = tokens[0, start:].tolist() + [tokenizer.eos]
    return tokenizer.string(ids[:ids.index(tokenizer.eos)]).strip()


@torch.no_grad()
def draw(model, tokenizer, captions, plan, sampling, seed=0, batch=None):
    """Captions (strings) -> sampled pictures (N, H, W, 3) uint8, `batch` at a time. sampling:
    (guidance, temperature), an attribute of the data set that checkpoints keep.

    Classifier-free guidance (Ho & Salimans 2022): logits without a caption + guidance * (logits
    with it - logits without). 1 is the model's own distribution; with more, pictures follow their
    captions more closely. For this, train.CAPTION_DROPOUT leaves captions empty in training."""
    guidance, temperature = sampling
    if isinstance(captions, str):
        raise TypeError("expected a list of captions, not one string")
    m, pictures = model.config.side ** 2, []
    # A GPU waits for Python at each token, whatever the batch size: use large ones if they fit.
    has_room = model.device.type == "cuda" and torch.cuda.mem_get_info()[0] > 20e9
    batch = batch or (350 if has_room else 100)
    # Drawn at once, so that a picture does not depend on how many others are drawn beside it.
    uniform = torch.rand(len(captions), m, generator=torch.Generator().manual_seed(seed))
    for i in tqdm(range(0, len(captions), batch), desc="drawing", leave=False):
        texts = list(captions[i:i + batch])
        n, random_of_token = len(texts), iter(uniform[i:i + batch].T.to(model.device))

        def choose(logits):
            with_caption, without = logits[:, FIRST_CODE:].float().chunk(2)
            logits = without + guidance * (with_caption - without)
            # The code at which the cumulative probability reaches a random number.
            cumulative = (logits / temperature).softmax(-1).cumsum(-1)[:, :-1]  # the last is 1
            code = (cumulative < next(random_of_token)[:, None]).sum(-1)
            return FIRST_CODE + code.repeat(2)

        codes = torch.zeros(2 * n, m, dtype=torch.long)             # to be filled
        batch_of_both = generation(tokenizer, codes, texts + [""] * n).to(model.device)
        start = batch_of_both.layout.before
        tokens = model.generate(batch_of_both, plan, start, choose)
        pictures.append(tokenizer.decode(tokens[:n, start:] - FIRST_CODE))
    return np.concatenate(pictures)


@torch.no_grad()
def answer_all(model, tokenizer, split, plan):
    """Answers all questions of a split.

    Greedy decoding gives exactly the right answer if and only if each of its tokens, the end
    included, is the likeliest text token after the right ones before it. So one forward pass is
    enough. Returns, for each picture, [(Question, the answer that these likeliest tokens spell, is
    it right?)], and the mean loss (nats) of an output token."""
    answers, loss = [], 0.
    batch = sequences("und", tokenizer, split).to(model.device)
    span = predicting(batch.layout, batch.image_loss)
    for i in tqdm(range(0, len(batch.tokens), BATCH), desc="answering", leave=False):
        rows = batch.rows(slice(i, i + BATCH))
        logits, _ = model(rows, plan)
        rows = rows.map(lambda x: x[:, span])
        logits_of_output, targets = logits[rows.is_output].float(), rows.targets[rows.is_output]
        loss += F.cross_entropy(logits_of_output, targets, reduction="sum").item()
        likeliest = logits[..., :FIRST_CODE].argmax(-1).cpu()           # as `answer` decodes
        rows = rows.to("cpu")
        for row, questions in enumerate(split.questions[i:i + BATCH]):
            answers.append([])
            for number, question in enumerate(questions, 1):
                tokens = rows.is_output[row] & (rows.segment_ids[row] == number)
                ids = likeliest[row, tokens]
                right = torch.equal(ids, rows.targets[row, tokens])
                answers[-1].append((question, tokenizer.string(ids.tolist()).strip(), right))
    return answers, loss / max(1, batch.is_output.sum().item())


def score_understanding(model, tokenizer, plan, dataset, part, n, seed):
    """Scores of the answers about n pictures of a part, and what to show of them. `chance`: the
    accuracy of always giving the most frequent answer to each kind of question."""
    split = dataset.split("und", part, n, seed)
    answers, loss = answer_all(model, tokenizer, split, plan)
    by_kind = defaultdict(list)                             # kind -> [(right answer, is it given?)]
    for of_picture in answers:
        for question, _, right in of_picture:
            by_kind[question.kind].append((question.answer, right))
    by_type, rights, guessed = {}, [], 0
    for kind, rows in by_kind.items():
        expected, right = zip(*rows)
        most = Counter(expected).most_common(1)[0][1]
        by_type[kind] = {"accuracy": fmean(right), "chance": most / len(rows), "n": len(rows)}
        rights += right
        guessed += most
    shown = []
    for picture, of_picture in zip(split.pixels[:SHOWN], answers):
        lines = [f"{question.text} {said}" + ("" if right else f" (no: {question.answer})")
                 for question, said, right in of_picture[:4]]
        shown.append((picture, "\n".join(lines), None))
    return {"n": len(rights), "accuracy": fmean(rights), "loss": loss,
            "chance": guessed / len(rights), "by_type": by_type}, shown


def rates(rows):
    """Averages of the rows that a data set's `check` returns."""
    asked, seen, right = zip(*rows)
    return {"object_accuracy": sum(seen) / sum(asked), "image_accuracy": fmean(right),
            "n": len(rows)}


@torch.no_grad()
def score_generation(model, tokenizer, plan, dataset, part, n, seed):
    """Scores of the pictures drawn for n captions of a part, and what to show of them. `loss`: the
    mean (nats) of an image token. `ceiling`: what real pictures score after the tokenizer."""
    split = dataset.split("gen", part, n, seed, questions=0)
    batch, loss = sequences("gen", tokenizer, split).to(model.device), 0.
    for i in range(0, len(batch.tokens), BATCH):
        rows = batch.rows(slice(i, i + BATCH))
        loss += model(rows, plan)[1].item() * len(rows.tokens)
    texts = [caption.text for caption in split.captions]
    drawn = draw(model, tokenizer, texts, plan, dataset.sampling)
    scores, right = {"n": len(texts), "loss": loss / len(texts)}, [None] * len(texts)
    if hasattr(dataset, "check"):                           # else nothing reads the pictures
        checked = dataset.check(split, drawn)
        by_kind = defaultdict(list)
        for caption, row in zip(split.captions, checked):
            by_kind[caption.kind].append(row)
        decoded = tokenizer.decode(tokenizer.encode(split.pixels))
        scores |= {**rates(checked), "ceiling": rates(dataset.check(split, decoded)),
                   "by_type": {kind: rates(rows) for kind, rows in by_kind.items()}}
        right = [is_right for *_, is_right in checked]
    return scores, list(zip(drawn, texts, right))[:SHOWN]


SCORES = {"und": score_understanding, "gen": score_generation}      # of each task


def cost(c, plans, batch_size):
    """FLOPs of a training step, forward and backward, and their ratio to dense, exact and by the
    paper's formula. plans: {task: plan}."""
    both = plans, dict.fromkeys(plans, make_plan("dense", c.layers))
    exact, of_dense = (sum(c.flops(task, plan) for task, plan in each.items()) for each in both)
    by_paper, of_dense_by_paper = (sum(paper_cost(plan, c.layout(task), c.width)
                                       for task, plan in each.items()) for each in both)
    return {"flops_per_step": batch_size * exact, "flops_ratio": exact / of_dense,
            "paper_flops_ratio": by_paper / of_dense_by_paper}


def evaluate(model, tokenizer, options, step, dataset, plans, folder, suffix=""):
    """Scores a run under the plans {task: plan}, on pictures chosen by its seed from each part that
    its data set names, but never on more than it was trained on. Prints the scores, and writes
    eval.json and samples.png into a folder. options: of train.py. step: how far it was trained."""
    start, preset, scores, shown = time.time(), PRESETS[options["preset"]], {}, []
    model.eval()
    for task, plan in plans.items():
        for part in dataset.parts[task]:
            n = preset.gen_val if task == "gen" else preset.und_val
            if task == "gen" and part != "val":
                n = -(-n // 2)
            n = max(1, min(n, step * options["batch_size"]))
            found, of_part = SCORES[task](model, tokenizer, plan, dataset, part, n, options["seed"])
            if part == "val":
                scores[task] = {**found, "bits_per_token": found["loss"] / math.log(2)}
                shown += of_part
            else:                                           # held_out_accuracy, ...
                scores[task] |= {f"{part}_{name}": value for name, value in found.items()
                                 if isinstance(value, (int, float))}
    scores["cost"] = cost(model.config, plans, options["batch_size"])
    for section, found in scores.items():
        numbers = [f"{name} {value:.4g}" for name, value in found.items()
                   if isinstance(value, (int, float))]
        print(f"{section}: {', '.join(numbers)}")
        for kind, of_kind in found.get("by_type", {}).items():
            right = of_kind["image_accuracy" if section == "gen" else "accuracy"]
            print(f"   {kind:20}{right:.1%} of {of_kind['n']}")
    config = {**options, "step": step, "examples": step * options["batch_size"],
              "identity": made_with(dataset, options["preset"], ())["data"],
              "sampling": dataset.sampling, "parameters": sum(map(torch.numel, model.parameters()))}
    scores |= {"config": config, "n": {task: scores[task]["n"] for task in plans},
               "seconds": time.time() - start, "hardware": hardware(model.device)}
    pictures, texts, right = zip(*shown)
    contact_sheet(pictures, texts, Path(folder) / f"samples{suffix}.png", right=right)
    # Last, because a run counts as finished where it has scores.
    write_file(Path(folder) / f"eval{suffix}.json", json.dumps(scores, indent=1))
    print(f"{folder}/eval{suffix}.json, samples{suffix}.png")
    return scores


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--data", help="where the run's images are now, if they have been moved")
    for task in SCORES:
        parser.add_argument(f"--{task}-plan", choices=PLANS, help="default: as it was trained")
    parser.add_argument("--shallow", type=int, metavar="K", help="of hmgen and naive")
    what = parser.add_mutually_exclusive_group()            # without both: scores
    what.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"))
    what.add_argument("--draw", metavar="CAPTION")
    parser.add_argument("--n", type=positive(int), default=8, help="how many pictures --draw draws")
    parser.add_argument("--seed", type=int, default=0, help="of what --draw draws")
    parser.add_argument("--out", type=Path, help="folder of the results (default: the run's)")
    args = parser.parse_args()
    device, out = pick_device(args.device), args.out or args.run
    model, tokenizer, checkpoint = load_run(args.run, device)
    given = {key: value for key, value in vars(args).items()
             if (key.endswith("_plan") or key == "shallow") and value is not None}
    options = checkpoint["options"] | given
    suffix = "".join(f"-{key[:3]}-{value}" for key, value in given.items())
    plans = plans_of(checkpoint["tasks"], options, model.config.layers)
    for task, *wanted in (("und", args.ask, args.und_plan), ("gen", args.draw, args.gen_plan)):
        if wanted != [None, None] and task not in plans:
            fail(f"{args.run} was trained for {' and '.join(checkpoint['tasks'])}, not for {task}")
    if args.ask:
        pixels = open_picture(args.ask[0], tokenizer.vq.image_size, "--ask")[None]
        print(answer(model, tokenizer, tokenizer.encode(pixels)[0], args.ask[1], plans["und"]))
    elif args.draw is not None:
        captions, sampling = [args.draw] * args.n, checkpoint["sampling"]
        pixels = draw(model, tokenizer, captions, plans["gen"], sampling, args.seed)
        contact_sheet(pixels, [""] * args.n, out / "draw.png")
        save_picture(Image.fromarray(pixels[0]), out / "draw-0.png")
        print(f"{out}/draw.png: {args.n} pictures of {args.draw!r}; draw-0.png: the first")
    else:
        dataset = load_of_run(checkpoint, args.data)
        evaluate(model, tokenizer, options, checkpoint["step"], dataset, plans, out, suffix)


if __name__ == "__main__":
    run_script(main)
