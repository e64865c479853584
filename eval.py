"""Scores of one run for both tasks; answers and pictures on demand.

    python eval.py out/joint                    scores a run: eval.json, samples.png in its folder
    python eval.py out/joint --gen-plan hmgen   ... with a plan it was not trained with (fig. 5)
    python eval.py out/joint --ask picture.png "what colour is the circle?"
    python eval.py out/joint --draw "top-left a big yellow circle" --n 8
"""
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from common import (build_network, contact_sheet, fail, hardware, open_picture, pick_device,
                    read_checkpoint, refuse_errors, memory_bytes, run_script, script_parser,
                    write_file)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from data import CAPTION_FIELDS, PRESETS, QUESTION_KINDS, Question
from model import Config, Model, generation, sequences, understanding
from prune import can_generate, make_plan, paper_cost, predicting
from tokenizer import FIRST_CODE, Tokenizer

BATCH = 64                                          # sequences that are scored at a time
SHOWN = 18          # pictures of each task in samples.png; of a folder's training pictures, too


# ---------------------------------------------------------------------- answering and drawing

@torch.no_grad()
def answer(model, tokenizer, codes, question, plan, longest=24):
    """One picture's codes (M,) and a question -> the answer, a string: the likeliest text token,
    again and again, up to the end token or `longest` tokens. ValueError for too long a question."""
    c, device = model.config, model.device
    n, first = len(tokenizer.ids(question)), 2 + c.side ** 2
    if not 0 < n < c.und_text:
        raise ValueError(f"a question has {n} tokens, the model takes 1 to {c.und_text - 1}: "
                         f"{question[:60]!r}")
    length, start = min(n + longest, c.und_text), first + n
    batch = understanding(tokenizer, codes[None], [[(question, "")]], length)
    batch.segment_ids[:, first:] = 1                # what is to come belongs to the question
    batch.position_ids[:, first:] = first + torch.arange(length)[:, None]
    tokens = model.generate(batch.to(device), plan, start,
                            lambda logits: logits[:, :c.first_code].argmax(-1))
    ids = tokens[0, start:].tolist()
    if tokenizer.eos in ids:
        ids = ids[:ids.index(tokenizer.eos)]
    return tokenizer.string(ids).strip()


# (guidance, temperature) of drawing: see study/README.md, what was tried. A folder's few pictures
# are known by heart, with an empty caption, too: guidance leads astray there.
SAMPLING = {"shapes": (1.5, .7), "folder": (1., .1)}


@torch.no_grad()
def draw(model, tokenizer, captions, plan, guidance=1., temperature=1., seed=0):
    """Captions -> sampled codes (B, M).

    guidance: classifier-free (Ho & Salimans 2022): logits of no caption + guidance * (those of the
    caption - those of no caption). 1 draws from the model's own distribution; more follows the
    caption more closely, for twice the cost. ValueError for a caption that is too long.
    """
    c, device = model.config, model.device
    generator = torch.Generator(device).manual_seed(seed)
    n = len(captions)
    texts = list(captions) + ([""] * n if guidance != 1 else [])
    codes = torch.zeros(len(texts), c.side ** 2, dtype=torch.long)
    batch = generation(tokenizer, codes, texts, c.gen_text).to(device)

    def choose(logits):
        logits = logits[:, c.first_code:].float()
        if guidance != 1:
            with_caption, without = logits.chunk(2)
            logits = without + guidance * (with_caption - without)
        probabilities = (logits / temperature).softmax(-1)
        code = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return c.first_code + code.repeat(len(texts) // n)

    tokens = model.generate(batch, plan, c.gen_text, choose)
    return tokens[:n, c.gen_text:] - c.first_code


def draw_pictures(model, tokenizer, texts, plan, source, sampling=None, batch=None):
    """Captions (strings) -> pictures (N, H, W, 3) uint8. source: --data, which decides SAMPLING,
    unless `sampling` is given. batch: how many are drawn at a time, by default up to 200."""
    c = model.config
    sampling = sampling or SAMPLING["shapes" if source == "shapes" else "folder"]
    # Keys and values of all tokens, with caption and without, in a quarter of the memory.
    cache = 2 * 2 * 4 * c.layers * c.width * sum(c.layout("gen"))           # bytes a picture
    batch = batch or max(1, min(200, memory_bytes(model.device) // 4 // cache))
    pictures = []
    for i in tqdm(range(0, len(texts), batch), desc="drawing", leave=False):
        codes = draw(model, tokenizer, texts[i:i + batch], plan, *sampling, seed=i)
        pictures.append(tokenizer.decode(codes))
    return np.concatenate(pictures)


# ---------------------------------------------------------------------- understanding

class Answered(NamedTuple):
    question: Question
    said: str               # by the model; after its first wrong token, as if that were right
    right: bool


@torch.no_grad()
def answer_all(model, tokenizer, split, batch, plan):
    """Answers all questions of a split. batch: its sequences, on the device.

    Greedy decoding gives the right answer, word for word, just when each of the answer's tokens,
    the end included, is the likeliest text token after the right ones before it: one forward pass
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
        likeliest = logits[..., :model.config.first_code].argmax(-1)        # as `answer` decodes
        segments, targets, is_output, likeliest = (
            x.cpu() for x in (rows.segment_ids[:, span], targets, is_output, likeliest))
        for row, questions in enumerate(split.questions[i:i + BATCH]):
            answers.append([])
            for number, question in enumerate(questions, 1):
                tokens = is_output[row] & (segments[row] == number)     # of this answer
                if tokens.any():                                # else it did not fit
                    said = likeliest[row, tokens]
                    right = torch.equal(said, targets[row, tokens])
                    said = tokenizer.string(said.tolist()).strip()
                    answers[-1].append(Answered(question, said, right))
    return answers, loss / batch.is_output.sum().item()


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def understanding_scores(answers):
    """Accuracy, also by kind of question. `chance`: the accuracy of who knows the most frequent
    answer to each kind of question and no more. `pope`: of yes/no questions (Li et al. 2023)."""
    answers = [a for of_picture in answers for a in of_picture]
    by_type, guessed = {}, 0
    for kind in (*QUESTION_KINDS, "question"):
        of_kind = [a for a in answers if a.question.kind == kind]
        if of_kind:
            (_, most), = Counter(a.question.answer for a in of_kind).most_common(1)
            guessed += most
            by_type[kind] = {"accuracy": mean(a.right for a in of_kind),
                             "chance": most / len(of_kind), "n": len(of_kind)}
    scores = {"n": len(answers), "accuracy": mean(a.right for a in answers),
              "chance": guessed / len(answers), "by_type": by_type}
    existence = [a for a in answers if a.question.kind == "existence"]
    if existence:
        yes = sum(a.question.answer == "yes" for a in existence)
        said_yes = sum(a.said == "yes" for a in existence)
        hits = sum(a.said == a.question.answer == "yes" for a in existence)
        scores["pope"] = {"accuracy": mean(a.right for a in existence),
                          "precision": hits / max(1, said_yes), "recall": hits / max(1, yes),
                          "f1": 2 * hits / max(1, said_yes + yes)}
    return scores


# ---------------------------------------------------------------------- generation

def check_pictures(dataset, split, pixels):
    """What the checker says of pictures beside their captions: object and image accuracy, also by
    kind of caption; and which pictures are wrong (a list of indices)."""
    by_kind, wrong = defaultdict(list), []
    for i, seen in enumerate(dataset.read(pixels)):
        caption, scene = split.captions[i], split.scenes[i]
        objects, right = dataset.fulfilled(caption, scene, seen)
        by_kind[caption.kind].append((objects, len(scene), right))
        if not right:
            wrong.append(i)

    def rates(checked):
        objects, stated, right = zip(*checked)
        return {"object_accuracy": sum(objects) / sum(stated), "image_accuracy": mean(right),
                "n": len(checked)}

    by_type = {kind: rates(by_kind[kind]) for kind in CAPTION_FIELDS if kind in by_kind}
    everything = [row for checked in by_kind.values() for row in checked]
    return {**rates(everything), "by_type": by_type}, wrong


def colour_features(pixels):
    """(N, H, W, 3) uint8 -> (N, 96): mean and standard deviation, over 255, of each colour in each
    of 4 x 4 squares. Distances are not comparable with those in the features of a network."""
    s = pixels.shape[1] // 4
    squares = pixels.reshape(len(pixels), 4, s, 4, s, 3) / 255
    features = np.concatenate([squares.mean((2, 4)), squares.std((2, 4))], -1)
    return features.reshape(len(pixels), -1)


def frechet(a, b):
    """Frechet distance of two sets of features, arrays (N, d): |mean - mean|^2 + tr(A + B -
    2 sqrt(AB)) of their means and covariances A, B."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


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

def validation_splits(dataset, tasks, preset, seed):
    """{task: {"val": Split, and in the shapes world "transfer": Split}}: what a run is scored on.
    preset: one of data.PRESETS."""
    splits = {}
    for task in tasks:
        n = {"und": preset.und_val, "gen": preset.gen_val}[task]
        splits[task] = {"val": dataset.split(task, "val", n, seed)}
        if splits[task]["val"].scenes:
            held_out = n if task == "und" else n // 2
            splits[task]["transfer"] = dataset.split(task, "transfer", held_out, seed)
    return splits


def score_understanding(model, tokenizer, plan, splits):
    """Scores on validation pictures, and what to show of them."""
    def score(split):
        batch = sequences("und", tokenizer, split, model.config).to(model.device)
        answers, loss = answer_all(model, tokenizer, split, batch, plan)
        return answers, {**understanding_scores(answers), "loss": loss}

    answers, scores = score(splits["val"])
    shown = []                                              # (picture, text, is it wrong?)
    for picture, of_picture in zip(splits["val"].pixels[:SHOWN], answers):
        lines = []
        for a in of_picture[:4]:
            comment = "" if a.right else f" (no: {a.question.answer})"
            lines.append(f"{a.question.text} {a.said}{comment}")
        shown.append((picture, "\n".join(lines), False))
    if "transfer" in splits:
        _, held_out = score(splits["transfer"])
        scores |= {f"transfer_{name}": held_out[name] for name in ("accuracy", "chance", "n")}
    return scores, shown


def score_generation(model, tokenizer, plan, splits, dataset, seed):
    """Scores on validation captions, and what to show of them."""
    def draw_split(split):
        texts = [caption.text for caption in split.captions]
        return draw_pictures(model, tokenizer, texts, plan, dataset.identity)

    split = splits["val"]
    batch = sequences("gen", tokenizer, split, model.config).to(model.device)
    drawn, decoded = draw_split(split), tokenizer.decode(tokenizer.encode(split.pixels))
    real = colour_features(split.pixels)
    scores = {"n": len(drawn), "loss": generation_loss(model, batch, plan),
              "frechet": frechet(colour_features(drawn), real),
              "ceiling": {"frechet": frechet(colour_features(decoded), real)}}
    wrong = []
    if "transfer" in splits:
        rates, wrong = check_pictures(dataset, split, drawn)
        scores |= rates
        scores["ceiling"] |= check_pictures(dataset, split, decoded)[0]
        held_out = splits["transfer"]
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


def evaluate(model, tokenizer, options, step, dataset, plans, validation=None):
    """All scores of a run under the plans {task: plan}, on validation pictures that its seed draws.

    options: of train.py. step: how far it was trained. validation: validation_splits, where they
    are there already. Returns what eval.json holds, and what to show: [(picture, text, is it
    wrong?)].
    """
    start, preset, seed = time.time(), PRESETS[options["preset"]], options["seed"]
    validation = validation or validation_splits(dataset, plans, preset, seed)
    model.eval()
    config = {**options, "step": step, "examples": step * options["batch_size"],
              "parameters": sum(p.numel() for p in model.parameters())}
    scores, shown = {"config": config}, []
    for task, plan in plans.items():
        if task == "und":
            result = score_understanding(model, tokenizer, plan, validation["und"])
        else:
            result = score_generation(model, tokenizer, plan, validation["gen"], dataset, seed)
        scores[task], new = result
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
    # The scores come last: where they are, all is.
    write_file(Path(folder) / f"eval{suffix}.json", json.dumps(scores, indent=1))


# ---------------------------------------------------------------------- trained runs

def plans_of(tasks, options, layers):
    """{task: plan} of a run with these options. ValueError for a plan that cannot work."""
    plans = {task: make_plan(options[f"{task}_plan"], layers, options["shallow"])
             for task in tasks}
    if "gen" in plans and not can_generate(plans["gen"]):
        raise ValueError(f"--gen-plan {options['gen_plan']}: image tokens that are never updated "
                         "cannot predict the next one; expected another plan")
    return plans


def load_run(folder, device):
    """A trained run, by its folder: the model, its tokenizer, the whole checkpoint (train.py says
    what it holds). The file may be anyone's: what does not fit is refused in one line."""
    path = Path(folder) / "checkpoint.pt"
    checkpoint = read_checkpoint(path, "run")
    with refuse_errors(f"{path}: its parts do not fit together"):
        tokenizer = Tokenizer.from_state(checkpoint["tokenizer"])
        c, options = Config(**checkpoint["config"]), checkpoint["options"]
        tasks = checkpoint["tasks"]
        for name, value in {**vars(c), "step": checkpoint["step"] + 1,
                            "batch_size": options["batch_size"]}.items():
            if type(value) is int and not 1 <= value < 10 ** 6:
                raise ValueError(f"{name} {value}")
        if (c.vocab, c.side, c.first_code) != (tokenizer.vocab, tokenizer.vq.side, FIRST_CODE):
            raise ValueError("the model has another vocabulary than the tokenizer")
        if tasks not in (["und", "gen"], ["und"], ["gen"]) or options["preset"] not in PRESETS:
            raise ValueError(f"tasks {tasks!r}, preset {options['preset']!r}")
        plans_of(tasks, options, c.layers)
        model = build_network(lambda: Model(c), checkpoint["model"])
    tokenizer.vq.to(device)
    return model.to(device).eval(), tokenizer, checkpoint


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--und-plan", help="default: the one it was trained with")
    parser.add_argument("--gen-plan")
    parser.add_argument("--shallow", type=int, metavar="K", help="of plans that touch some layers")
    parser.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"))
    parser.add_argument("--draw", metavar="CAPTION")
    parser.add_argument("--n", type=int, default=8, help="how many pictures --draw draws")
    args = parser.parse_args()
    if args.n < 1:
        fail(f"--n {args.n}: expected at least 1")
    device = pick_device(args.device)
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
    try:
        plans = plans_of(tasks, options, model.config.layers)
        if args.ask:
            pixels = open_picture(Path(args.ask[0]), tokenizer.vq.image_size, "--ask")
            codes = tokenizer.encode(pixels[None])[0]
            print(answer(model, tokenizer, codes, args.ask[1], plans["und"]))
        elif args.draw is not None:
            texts = [args.draw] * args.n
            pixels = draw_pictures(model, tokenizer, texts, plans["gen"], options["data"])
            contact_sheet(pixels, [""] * args.n, args.run / "draw.png", columns=min(args.n, 6))
            Image.fromarray(pixels[0]).save(args.run / "draw-0.png")
            print(f"{args.run}/draw.png: {args.n} pictures of {args.draw!r}; draw-0.png: the first")
        else:
            dataset = data.load(options["data"], options["preset"])
            scores, shown = evaluate(model, tokenizer, options, checkpoint["step"], dataset, plans)
            save_scores(scores, shown, args.run, suffix)
            print(f"{summary(scores)}\n{args.run}/eval{suffix}.json, samples{suffix}.png")
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    run_script(main)
