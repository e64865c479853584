"""Scores of one run for both tasks; answers and pictures on demand.

    python eval.py out/joint                    scores a run: eval.json, samples.png in its folder
    python eval.py out/joint --gen-plan hmgen   ... with a plan it was not trained with (fig. 5)
    python eval.py out/joint --ask picture.png "what colour is the circle?"
    python eval.py out/joint --draw "top left a big red circle" --n 8
"""
import argparse
import json
import math
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from common import (build_network, check_whole_numbers, contact_sheet, fail, frechet, hardware,
                    open_picture, pick_device, read_checkpoint, refuse_errors, run_script,
                    time_each, write_file)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from data import CAPTION_FIELDS, PRESETS, QUESTION_KINDS, Question
from model import PROJECTIONS, Config, Model, generation, sequences, understanding
from prune import make_plan, paper_cost, predicting
from tokenizer import Tokenizer

BATCH = 64                                          # sequences that are scored at a time
SHOWN = 18                                          # pictures of each task in samples.png


# ---------------------------------------------------------------------------- answering and drawing

@torch.no_grad()
def answer(model, tokenizer, codes, question, plan, longest=24):
    """One picture's codes (M,) and a question -> the answer, a string: the likeliest text token,
    again and again, up to the end token or `longest` tokens. ValueError for too long a question."""
    c, device = model.config, model.row.device
    n, first = len(tokenizer.ids(question)), 2 + c.side ** 2
    if not 0 < n < c.und_text:
        raise ValueError(f"a question has {n} tokens, the model takes 1 to {c.und_text - 1}: "
                         f"{question[:60]!r}")
    length, start = min(n + longest, c.und_text), first + n
    batch = understanding(tokenizer, codes[None], [[(question, "")]], length)
    batch.segment_ids[:, first:] = 1                # what is to come belongs to the question
    batch.position_ids[:, first:] = first + torch.arange(length)
    tokens = model.generate(batch.to(device), plan, start,
                            lambda logits: logits[:, :c.first_code].argmax(-1))
    ids = tokens[0, start:].tolist()
    if tokenizer.eos in ids:
        ids = ids[:ids.index(tokenizer.eos)]
    return tokenizer.string(ids).strip()


def default_sampling(source):
    """(guidance, temperature) of drawing: see study/README.md, what was tried. A folder's
    few pictures are known by heart, with an empty caption, too: guidance leads astray there."""
    return (1.5, .7) if source == "shapes" else (1., .1)


@torch.no_grad()
def draw(model, tokenizer, captions, plan, guidance=1., temperature=1., seed=0):
    """Captions -> sampled codes (B, M).

    guidance: classifier-free (Ho & Salimans 2022): logits of no caption + guidance * (those of the
    caption - those of no caption). 1 draws from the model's own distribution; more follows the
    caption more closely, for twice the cost. ValueError for a caption that is too
    long.
    """
    c, device = model.config, model.row.device
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


def draw_pictures(model, tokenizer, captions, plan, sampling, batch=200):
    """Captions (strings) -> pictures (N, H, W, 3) uint8."""
    pictures = []
    for i in tqdm(range(0, len(captions), batch), desc="drawing", leave=False):
        codes = draw(model, tokenizer, captions[i:i + batch], plan, *sampling, seed=i)
        pictures.append(tokenizer.decode(codes))
    return np.concatenate(pictures)


# ---------------------------------------------------------------------------- understanding

class Answered(NamedTuple):
    question: Question
    said: str               # by the model
    right: bool


@torch.no_grad()
def answer_all(model, tokenizer, split, batch, plan):
    """Answers all questions of a split. batch: its sequences, on the device.

    Greedy decoding gives the right answer, word for word, just when each of the answer's tokens,
    the end included, is the likeliest one after the right ones before it: one forward pass tells.
    Returns [Answered], and the mean loss (nats) of an output token. """
    answers, loss, outputs = [], 0., 0
    for i in tqdm(range(0, len(batch.tokens), BATCH), desc="answering", leave=False):
        rows = batch.rows(slice(i, i + BATCH))
        logits, _ = model(rows, plan)
        span = predicting(rows.layout, rows.image_loss)
        is_output, targets = rows.is_output[:, span], rows.targets[:, span]
        output_logits = logits[is_output].float()
        loss += F.cross_entropy(output_logits, targets[is_output], reduction="sum").item()
        outputs += is_output.sum().item()
        # Of each output token: which picture and question it belongs to, target and prediction.
        picture, position = is_output.nonzero(as_tuple=True)
        number = rows.segment_ids[:, span][picture, position]
        columns = [picture, number, targets[is_output], output_logits.argmax(-1)]
        words = defaultdict(list)
        for picture, number, target, prediction in torch.stack(columns, 1).tolist():
            words[picture, number].append((target, prediction))
        for (picture, number), pairs in words.items():
            right = all(target == prediction for target, prediction in pairs)
            said = tokenizer.string([prediction for _, prediction in pairs]).strip()
            question = split.questions[i + picture][number - 1]
            answers.append(Answered(question, said, right))
    return answers, loss / outputs


def mean(flags):
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def understanding_scores(answers):
    """Accuracy, also by kind of question. `chance`: the accuracy of who knows the most frequent
    answer to each kind of question and no more. `pope`: of yes/no questions (Li et al. 2023)."""
    by_type, guessed = {}, 0
    for kind in (*QUESTION_KINDS, "question"):
        of_kind = [a for a in answers if a.question.kind == kind]
        if of_kind:
            counts = Counter(a.question.answer for a in of_kind)
            most = counts.most_common(1)[0][1]
            guessed += most
            by_type[kind] = {"accuracy": mean(a.right for a in of_kind),
                             "chance": most / len(of_kind), "n": len(of_kind)}
    scores = {"accuracy": mean(a.right for a in answers), "chance": guessed / len(answers),
              "by_type": by_type}
    yes_no = [(a.question.answer == "yes", a.said.startswith("yes")) for a in answers
              if a.question.kind == "existence"]
    if yes_no:
        hits = sum(true and said for true, said in yes_no)
        precision = hits / max(1, sum(said for _, said in yes_no))
        recall = hits / max(1, sum(true for true, _ in yes_no))
        f1 = 2 * precision * recall / max(1e-9, precision + recall)
        scores["pope"] = {"accuracy": mean(true == said for true, said in yes_no),
                          "precision": precision, "recall": recall, "f1": f1}
    return scores


# ---------------------------------------------------------------------------- generation

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

    everything = [row for checked in by_kind.values() for row in checked]
    by_type = {kind: rates(by_kind[kind]) for kind in CAPTION_FIELDS if kind in by_kind}
    return {**rates(everything), "by_type": by_type}, wrong


@torch.no_grad()
def generation_loss(model, batch, plan):
    """Mean loss (nats) of an image token after its caption."""
    total = 0.
    for i in range(0, len(batch.tokens), BATCH):
        rows = batch.rows(slice(i, i + BATCH))
        total += model(rows, plan)[1].item() * len(rows.tokens)
    return total / len(batch.tokens)


# ---------------------------------------------------------------------------- by likelihood

@torch.no_grad()
def log_likelihoods(model, batch, plan):
    """(B,): log p(output tokens | all before them) of each sequence."""
    batch = batch.to(model.row.device)
    logits, _ = model(batch, plan)
    span = predicting(batch.layout, batch.image_loss)
    targets, is_output = batch.targets[:, span], batch.is_output[:, span]
    loss = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-1,
                           reduction="none")                        # (B, positions)
    return -(loss * is_output).sum(1).cpu()


def matching(model, tokenizer, split, plans, group=10):
    """Pictures and texts matched among ten, where no checker exists. How often the right text is
    picked for a picture ("caption"), the right picture for a text ("image"), by a blind guess
    ("chance").

    und: log p(answer | picture, first question). gen: log p(picture | caption) - log p(picture | no
    caption). A pick whose text is the right text counts as right.
    """
    hits = {task: defaultdict(list) for task in plans}
    codes, length = tokenizer.encode(split.pixels), model.config.gen_text
    for i in tqdm(range(0, len(codes) - group + 1, group), desc="matching", leave=False):
        pictures = codes[i:i + group]
        each = pictures.repeat_interleave(group, 0)         # row a * group + b: picture a, text b
        tables = {}
        if "und" in plans:
            first = [questions[0] for questions in split.questions[i:i + group]]
            pairs = [[(a.text, b.answer)] for a in first for b in first]
            batch = understanding(tokenizer, each, pairs, model.config.und_text)
            table = log_likelihoods(model, batch, plans["und"]).view(group, group)
            tables["und"] = table, [question.answer for question in first]
        if "gen" in plans:
            texts = [caption.text for caption in split.captions[i:i + group]]
            batch = generation(tokenizer, each, texts * group, length)
            table = log_likelihoods(model, batch, plans["gen"]).view(group, group)
            batch = generation(tokenizer, pictures, [""] * group, length)
            tables["gen"] = table - log_likelihoods(model, batch, plans["gen"])[:, None], texts
        for task, (table, texts) in tables.items():
            for k in range(group):
                hits[task]["caption"].append(texts[table[k].argmax()] == texts[k])
                hits[task]["image"].append(texts[table[:, k].argmax()] == texts[k])
                hits[task]["chance"].append(texts.count(texts[k]) / group)
    return {task: {what: mean(flags) for what, flags in of_task.items()}
            for task, of_task in hits.items()}


# ---------------------------------------------------------------------------- cost

def cost(model, batches, plans):
    """What forward and backward of these batches cost under the plans: FLOPs as counted, and the
    time of uncompiled code, beside the dense plan's. batches, plans: {task: ...}."""
    c, device = model.config, model.row.device
    dense = {task: make_plan("dense", c.layers) for task in plans}

    def exact(plans):
        return sum(len(batches[task].tokens) * c.flops(task, plan) for task, plan in plans.items())

    def by_paper(plans):
        return sum(len(batches[task].tokens) * paper_cost(plan, c.layout(task), c.width)
                   for task, plan in plans.items())

    def work(plans):
        for task, plan in plans.items():
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                _, loss = model(batches[task], plan)
            loss.backward()

    seconds = time_each({"plan": lambda: work(plans), "dense": lambda: work(dense)}, device, 5)
    model.zero_grad()
    ms = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
    return {"flops_per_step": exact(plans), "flops_ratio": exact(plans) / exact(dense),
            "paper_flops_ratio": by_paper(plans) / by_paper(dense), "step_ms": ms["plan"],
            "step_ratio": 1. if plans == dense else ms["plan"] / ms["dense"]}


# ---------------------------------------------------------------------------- all of it

class Shown(NamedTuple):
    """For samples.png: pictures, the text under each, and the indices of wrong ones."""
    pictures: list
    texts: list
    wrong: list


def score_understanding(model, tokenizer, dataset, plan, n, seed):
    """Scores of understanding on n validation pictures, how many questions these are, what to show,
    and the pictures' sequences."""
    def score(split):
        batch = sequences("und", tokenizer, split, model.config).to(model.row.device)
        answers, loss = answer_all(model, tokenizer, split, batch, plan)
        return answers, {**understanding_scores(answers), "loss": loss}, batch

    split = dataset.split("und", "val", n, seed)
    answers, scores, batch = score(split)
    counts = {"und": len(answers)}
    shown = Shown(list(split.pixels[:SHOWN]), question_lines(split, answers), [])
    if split.scenes:
        held_out, others, _ = score(dataset.split("und", "transfer", n, seed))
        scores["transfer_accuracy"] = others["accuracy"]
        scores["transfer_chance"] = others["chance"]
        counts["und_transfer"] = len(held_out)
    return scores, counts, shown, batch


def score_generation(model, tokenizer, dataset, plan, n, seed, sampling):
    """The same of generation, on n validation captions."""
    def draw_split(split):
        captions = [caption.text for caption in split.captions]
        return draw_pictures(model, tokenizer, captions, plan, sampling)

    split = dataset.split("gen", "val", n, seed)
    batch = sequences("gen", tokenizer, split, model.config).to(model.row.device)
    drawn, reconstructed = draw_split(split), tokenizer.decode(tokenizer.encode(split.pixels))
    ceiling = {"frechet": frechet(reconstructed, split.pixels)}
    scores = {"frechet": frechet(drawn, split.pixels), "ceiling": ceiling,
              "loss": generation_loss(model, batch, plan)}
    counts = {"gen": len(drawn)}
    shown = Shown(list(drawn[:SHOWN]), [caption.text for caption in split.captions[:SHOWN]], [])
    if split.scenes:
        rates, wrong = check_pictures(dataset, split, drawn)
        scores |= rates
        ceiling |= check_pictures(dataset, split, reconstructed)[0]
        shown.wrong.extend(i for i in wrong if i < SHOWN)
        held_out = dataset.split("gen", "transfer", n, seed)
        scenes = [[thing for thing in scene if thing.pair in dataset.held_out["gen"]]
                  for scene in held_out.scenes]             # only objects of held-out pairs count
        rates, _ = check_pictures(dataset, held_out._replace(scenes=scenes), draw_split(held_out))
        scores["transfer_object_accuracy"] = rates["object_accuracy"]
        counts["gen_transfer"] = len(scenes)
    else:       # also what it was trained on: a new name does not tell how the thing looks
        seen = dataset.split("gen", "train", SHOWN, seed)
        shown.pictures.extend(draw_split(seen))
        shown.texts.extend(f"{caption.text} (trained on)" for caption in seen.captions)
    return scores, counts, shown, batch


def evaluate(model, tokenizer, checkpoint, dataset, plans, sampling):
    """All scores of a run under the plans {task: plan}, on validation pictures that its seed draws.

    checkpoint: of train.py; only "options" and "step" are needed. sampling: (guidance,
    temperature). Returns what eval.json holds, and a Shown.
    """
    start, device, options = time.time(), model.row.device, checkpoint["options"]
    preset, seed = PRESETS[options["preset"]], options["seed"]
    model.eval()
    config = {**options, "guidance": sampling[0], "temperature": sampling[1],
              "step": checkpoint["step"], "parameters": sum(p.numel() for p in model.parameters()),
              "examples": checkpoint["step"] * options["batch_size"]}
    scores, shown, batches = {"config": config, "n": {}}, Shown([], [], []), {}
    for task, plan in plans.items():
        if task == "und":
            of_task = score_understanding(model, tokenizer, dataset, plan, preset.und_val, seed)
        else:
            of_task = score_generation(model, tokenizer, dataset, plan, preset.gen_val, seed,
                                       sampling)
        scores[task], counts, new, batches[task] = of_task
        scores["n"] |= counts
        shown.wrong.extend(len(shown.pictures) + i for i in new.wrong)
        shown.pictures.extend(new.pictures)
        shown.texts.extend(new.texts)
    if options["data"] != "shapes":
        split = dataset.split("und", "val", preset.und_val, seed)
        for task, rates in matching(model, tokenizer, split, plans).items():
            bits = scores[task]["loss"] / math.log(2)
            scores[task] |= {"matching": rates, "bits_per_token": bits}

    n = min(BATCH, options["batch_size"])               # of a step, which may not fit as a whole
    rows = {task: batch.rows(torch.arange(n, device=device) % len(batch.tokens))
            for task, batch in batches.items()}
    scores["cost"] = cost(model, rows, plans)
    for key in ("flops_per_step", "step_ms"):
        scores["cost"][key] *= options["batch_size"] / n
    scores |= {"seconds": time.time() - start, "hardware": hardware(device)}
    return scores, shown


def question_lines(split, answers):
    """For each picture shown, its first questions with what the model said."""
    lines = {}
    for a in answers:
        lines[id(a.question)] = f"{a.question.text} {a.said}"
        if not a.right:
            lines[id(a.question)] += f" (no: {a.question.answer})"
    return ["\n".join(lines[id(q)] for q in questions[:4] if id(q) in lines)
            for questions in split.questions[:SHOWN]]


def summary(scores):
    """The scores in a few lines, for a terminal."""
    def percent(x):
        return "–" if x is None else f"{100 * x:.1f} %"

    lines = []
    if "und" in scores:
        u = scores["und"]
        lines.append(f"understanding: {percent(u['accuracy'])} of {scores['n']['und']} questions "
                     f"right (chance {percent(u['chance'])}), of held-out pairs "
                     f"{percent(u.get('transfer_accuracy'))}")
        lines += [f"   {kind:18}{percent(r['accuracy'])} (chance {percent(r['chance'])})"
                  for kind, r in u["by_type"].items()]
    if "gen" in scores:
        g = scores["gen"]
        lines.append(f"generation: {percent(g.get('image_accuracy'))} of {scores['n']['gen']} "
                     "images right, objects of held-out pairs "
                     f"{percent(g.get('transfer_object_accuracy'))}, Frechet {g['frechet']:.3f} "
                     f"(reconstructions {g['ceiling']['frechet']:.3f})")
        lines += [f"   {kind:18}{percent(r['image_accuracy'])}"
                  for kind, r in g.get("by_type", {}).items()]
    for task in ("und", "gen"):
        if "matching" in scores.get(task, {}):
            rates = scores[task]["matching"]
            lines.append(f"{task}: of ten, the text of an image {percent(rates['caption'])}, the "
                         f"image of a text {percent(rates['image'])} "
                         f"(chance {percent(rates['chance'])})")
    k = scores["cost"]
    lines.append(f"cost: {k['flops_per_step'] / 1e9:.1f} GFLOP a step = {k['flops_ratio']:.2f} of "
                 f"dense (by the paper's formula {k['paper_flops_ratio']:.2f}), time "
                 f"{k['step_ratio']:.2f}")
    return "\n".join(lines)


def save_scores(scores, shown, folder, suffix=""):
    """Writes eval.json and samples.png, the names with a suffix, into a run's folder."""
    path = Path(folder) / f"samples{suffix}.png"
    contact_sheet(shown.pictures, shown.texts, path, wrong=shown.wrong)
    # The scores come last: where they are, all is.
    write_file(Path(folder) / f"eval{suffix}.json", json.dumps(scores, indent=1))


# ---------------------------------------------------------------------------- trained runs

def load_run(folder, device):
    """A trained run, by its folder: the model, its tokenizer, the whole checkpoint (train.py says
    what it holds). The file may be anyone's: what does not fit is refused in one line."""
    path = Path(folder) / "checkpoint.pt"
    checkpoint = read_checkpoint(path, "run")
    with refuse_errors(f"{path}: its parts do not fit together"):
        check_checkpoint(checkpoint)
        tokenizer = Tokenizer.from_state(checkpoint["tokenizer"])
        c = Config(**checkpoint["config"])
        check_config(c)
        fits = c.vocab, c.side, c.first_code
        if fits != (tokenizer.vocab, tokenizer.vq.side, tokenizer.first_code):
            raise ValueError("the model has another vocabulary than the tokenizer")
        plans_of(checkpoint["tasks"], checkpoint["options"], c.layers)
        model = build_network(Model, c, checkpoint["model"])
    tokenizer.vq.to(device)
    return model.to(device).eval(), tokenizer, checkpoint


def plans_of(tasks, options, layers):
    """{task: plan} of a run with these options. ValueError for a plan that cannot work."""
    return {task: make_plan(options[f"{task}_plan"], layers, options["shallow"]) for task in tasks}


OPTION_TYPES = dict(objective=str, und_plan=str, gen_plan=str, projections=str, image_loss=bool,
                    data=str, preset=str, seed=int, steps=int, batch_size=int, save_every=int,
                    shallow=int, lr=float, compile=bool, tokenizer=str, out=str)


def check_checkpoint(checkpoint):
    """ValueError unless options, tasks and step are such as train.py writes."""
    options, step, tasks = checkpoint["options"], checkpoint["step"], checkpoint["tasks"]
    for name, kind in OPTION_TYPES.items():
        if type(options[name]) is not kind:
            raise ValueError(f"option {name} is {options[name]!r}")
    if options["preset"] not in PRESETS or type(checkpoint["identity"]) is not str:
        raise ValueError(f"preset {options['preset']!r}, identity {checkpoint['identity']!r}")
    if tasks not in (["und", "gen"], ["und"], ["gen"]):
        raise ValueError(f"tasks {tasks!r}")
    if type(step) is not int or not 0 <= step <= options["steps"]:
        raise ValueError(f"step {step!r}")
    if not 0 <= options["seed"] < 2 ** 32 or min(options["batch_size"], options["save_every"]) < 1:
        raise ValueError(f"options {options}")


def check_config(c):
    """ValueError for a configuration that no model can be built from."""
    check_whole_numbers(c, vocab=2 ** 20, layers=1000, width=65536, heads=1024, side=256,
                        first_code=2 ** 20, und_text=2 ** 16, gen_text=2 ** 16)
    if c.width % (2 * c.heads):
        raise ValueError(f"width {c.width} has to be a multiple of twice the {c.heads} heads")
    if c.projections not in PROJECTIONS or type(c.image_loss) is not bool:
        raise ValueError(f"projections {c.projections!r}, image_loss {c.image_loss!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--und-plan", help="default: the one it was trained with")
    parser.add_argument("--gen-plan")
    parser.add_argument("--shallow", type=int, metavar="K", help="of plans that touch some layers")
    parser.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"))
    parser.add_argument("--draw", metavar="CAPTION")
    parser.add_argument("--n", type=int, default=8, help="how many pictures --draw draws")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1: none")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    check_arguments(args, parser)
    device = pick_device(args.device)
    model, tokenizer, checkpoint = load_run(args.run, device)
    options, tasks = checkpoint["options"], checkpoint["tasks"]
    suffix = ""
    changed = [key for key in ("und_plan", "gen_plan", "shallow")
               if getattr(args, key) not in (None, options[key])]
    for key in changed:
        options[key] = getattr(args, key)
    if changed:
        suffix = "-{und_plan}-{gen_plan}{shallow}".format(**options)
    sampling = default_sampling(options["data"])
    if args.guidance is not None or args.temperature is not None:
        guidance = sampling[0] if args.guidance is None else args.guidance
        temperature = sampling[1] if args.temperature is None else args.temperature
        sampling = guidance, temperature
        suffix += f"-g{guidance:g}-t{temperature:g}"

    for task, asked in (("und", args.ask or args.und_plan), ("gen", args.draw or args.gen_plan)):
        if asked and task not in tasks:
            fail(f"{args.run} was not trained for that task: expected no such option")
    if options["gen_plan"] == "himix":
        fail("--gen-plan himix: image tokens that are never updated cannot predict the next one")
    try:
        plans = plans_of(tasks, options, model.config.layers)
        if args.ask:
            pixels = open_picture(Path(args.ask[0]), tokenizer.vq.config.image_size, "--ask")
            codes = tokenizer.encode(pixels[None])[0]
            print(answer(model, tokenizer, codes, args.ask[1], plans["und"]))
        elif args.draw is not None:
            pixels = draw_pictures(model, tokenizer, [args.draw] * args.n, plans["gen"], sampling)
            contact_sheet(pixels, [""] * args.n, args.run / "draw.png", columns=min(args.n, 6))
            Image.fromarray(pixels[0]).save(args.run / "draw-0.png")
            print(f"{args.run}/draw.png: {args.n} pictures of {args.draw!r}; draw-0.png: the first")
        else:
            dataset = data.load(options["data"], options["preset"])
            scores, shown = evaluate(model, tokenizer, checkpoint, dataset, plans, sampling)
            save_scores(scores, shown, args.run, suffix)
            print(f"{summary(scores)}\n{args.run}/eval{suffix}.json, samples{suffix}.png")
    except ValueError as error:
        fail(str(error))


def check_arguments(args, parser):
    """Refuses numbers out of range, and options that do not belong together."""
    for name, least in (("n", 1), ("temperature", 1e-6), ("guidance", 0)):
        number = getattr(args, name)
        if number is not None and not least <= number < math.inf:
            fail(f"--{name} {number}: expected at least {least:g}")
    given = {key for key, value in vars(args).items()
             if value not in (None, parser.get_default(key))}
    sampling = {"guidance", "temperature"}
    allowed = {"und_plan", "gen_plan", "shallow"} | sampling
    if args.ask:
        allowed = {"ask", "und_plan", "shallow"}
    elif args.draw is not None:
        allowed = {"draw", "n", "gen_plan", "shallow"} | sampling
    wrong = given - allowed - {"run", "device"}
    if wrong:
        fail(f"--{min(wrong).replace('_', '-')} does not belong there: expected only "
             + ", ".join(f"--{key.replace('_', '-')}" for key in sorted(allowed)))


if __name__ == "__main__":
    run_script(main)
