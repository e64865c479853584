"""Scores of both tasks, the table of many runs beside the paper's, and answers and pictures on demand.

    python eval.py out/joint                                     scores a run: eval.json and samples.png in its folder
    python eval.py out/joint --gen-plan hmgen                    ... with a plan it was not trained with (cf. fig. 5)
    python eval.py out/joint --ask picture.png "what colour is the circle?"
    python eval.py out/joint --draw "top left a big red circle" --n 8
    python eval.py --table out/table3                            the runs in that folder beside the paper's table 3
"""
import argparse
import json
import math
import platform
import statistics
import time
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import data as data_sets                                            # before torch: it sets an environment variable
from data import CAPTIONS, KINDS, command, contact_sheet, fail, strip_chart

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from model import aimed, answer, draw, generation, load, plans_for, sequences, understanding
from prune import FULL, SIZES, flops, make_plan, paper_cost
from tokenizer import pick_device, write

# How many validation pictures, by preset: with questions, with captions; of the transfer splits as many.
SAMPLES = {"tiny": {"und": 40, "gen": 20}, "cpu": {"und": 1000, "gen": 400}, "gpu": {"und": 2000, "gen": 1000}}


def sampling_for(data):
    """Guidance, temperature and top-k of drawing unless told otherwise: see results/README.md, what was tried. A folder's
    few pictures are known by heart, under the empty caption too: guidance leads astray there."""
    return (1.5, .7, None) if data == "shapes" else (1., .1, None)


# ------------------------------------------------------------------------------------------------ understanding

@torch.no_grad()
def answered(model, tokenizer, split, rows, plan, size=64):
    """Which questions of a split the model answers right, word for word, when it decodes greedily. rows: its sequences.

    Answers are scored by teacher forcing: greedy decoding gives the right answer just when every one of its tokens,
    the end included, is the likeliest after the right ones before it. Returns [(Question, right, what it said)] and the
    mean loss (nats) of an answer token.
    """
    results, loss, outputs = [], 0., 0
    for i in tqdm(range(0, len(rows.tokens), size), desc="answering", leave=False):
        asked, some = split.questions[i:i + size], rows.rows(slice(i, i + size))
        logits, _ = model(some, plan)
        targets, turns, output = (x[:, aimed(some)] for x in (some.targets, some.turns, some.weights == 1))
        loss += F.cross_entropy(logits[output].float(), targets[output], reduction="sum").item()
        outputs += output.sum().item()
        for questions, *columns in zip(asked, *(x.tolist() for x in (turns, output, logits.argmax(-1), targets))):
            words = defaultdict(lambda: ([], []))
            for turn, is_output, guess, target in zip(*columns):
                if is_output:
                    words[turn][0].append(guess)
                    words[turn][1].append(target)
            results += [(questions[turn - 1], guess == target, tokenizer.string(guess).strip())
                        for turn, (guess, target) in words.items()]
    return results, loss / outputs


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def understanding_scores(results, loss):
    """`chance` is what one gets who knows the most frequent answer to each type of question, and no more."""
    by_type, chances = {}, 0
    for kind in KINDS + ("question",):
        some = [(q, right) for q, right, _ in results if q.kind == kind]
        if some:
            most = Counter(q.answer for q, _ in some).most_common(1)[0][1]
            chances += most
            by_type[kind] = {"accuracy": share(r for _, r in some), "chance": most / len(some), "n": len(some)}
    scores = {"accuracy": share(right for _, right, _ in results), "chance": chances / len(results),
              "by_type": by_type, "loss": loss}
    yes_no = [(q.answer == "yes", said.startswith("yes")) for q, _, said in results if q.kind == "existence"]
    if yes_no:                                                          # as POPE does it (Li et al. 2023)
        hits = sum(true and said for true, said in yes_no)
        precision, recall = hits / max(1, sum(s for _, s in yes_no)), hits / max(1, sum(t for t, _ in yes_no))
        scores["pope"] = {"accuracy": share(t == s for t, s in yes_no), "precision": precision, "recall": recall,
                          "f1": 2 * precision * recall / max(1e-9, precision + recall)}
    return scores


# ------------------------------------------------------------------------------------------------ generation

def frechet(a, b):
    """Frechet distance of two sets of pictures (N, H, W, 3) uint8: |mean - mean|^2 + tr(A + B - 2 sqrt(AB)), where a
    picture is 96 numbers: mean and standard deviation, over 255, of each colour in each of 4x4 equal squares. No
    network takes part, so anyone can compute it; it is not comparable with distances in Inception's features."""
    def moments(pixels):
        s = pixels.shape[1] // 4
        squares = pixels.reshape(len(pixels), 4, s, 4, s, 3) / 255
        features = np.concatenate([squares.mean((2, 4)), squares.std((2, 4))], -1).reshape(len(pixels), -1)
        return features.mean(0), np.cov(features.T)

    (m, x), (n, y) = moments(a), moments(b)
    values, vectors = np.linalg.eigh(x)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ y @ root).clip(0)).sum()
    return float(((m - n) ** 2).sum() + np.trace(x) + np.trace(y) - 2 * cross)


def drawn(model, tokenizer, captions, plan, guidance, temperature, top_k, batch=200):
    """Captions -> pictures (N, H, W, 3) uint8."""
    return np.concatenate([tokenizer.decode(draw(model, tokenizer, captions[i:i + batch], plan, guidance, temperature,
                                                 top_k, seed=i))
                           for i in tqdm(range(0, len(captions), batch), desc="drawing", leave=False)])


def fulfilment(dataset, split, pixels):
    """What the checker says of pictures beside their captions: object and image accuracy, also by kind of caption; and
    which pictures are wrong."""
    rows = [(caption.kind, len(scene), *dataset.fulfilled(caption, scene, seen))
            for caption, scene, seen in zip(split.captions, split.scenes, dataset.read(pixels))]

    def rates(rows):
        return {"object_accuracy": sum(found for _, _, found, _ in rows) / sum(n for _, n, _, _ in rows),
                "image_accuracy": share(right for *_, right in rows), "n": len(rows)}

    kinds = [kind for kind in CAPTIONS if any(row[0] == kind for row in rows)]
    return ({**rates(rows), "by_type": {kind: rates([row for row in rows if row[0] == kind]) for kind in kinds}},
            [i for i, (*_, right) in enumerate(rows) if not right])


@torch.no_grad()
def generation_loss(model, rows, plan, size=64):
    """Mean loss (nats) of an image token after its caption."""
    parts = [rows.rows(slice(i, i + size)) for i in range(0, len(rows.tokens), size)]
    return sum(model(part, plan)[1].item() * len(part.tokens) for part in parts) / len(rows.tokens)


# ------------------------------------------------------------------------------------------------ matching

@torch.no_grad()
def matching(model, tokenizer, split, plans, group=10):
    """Pictures and captions (or answers) matched among ten by likelihood, where no checker exists.

    und: log p(answer | picture, question), the picture's first question. gen: log p(picture | caption) - log p(picture
    | no caption). A pick whose text is the right text counts as right. Returns {task: {"caption", "image", "chance"}}:
    how often the right text is picked for a picture, the right picture for a text, and how often a blind pick is right.
    """
    codes, c, device = tokenizer.encode(split.pixels), model.config, model.embed.weight.device
    hits = defaultdict(list)

    def likelihoods(rows, plan):
        logits, _ = model(rows.to(device), plan)
        each = F.cross_entropy(logits.float().transpose(1, 2), rows.targets[:, aimed(rows)].to(device), ignore_index=-1,
                               reduction="none")
        return -(each * (rows.weights[:, aimed(rows)] == 1).to(device)).sum(1).cpu()

    for i in tqdm(range(0, len(codes) - group + 1, group), desc="matching", leave=False):
        some, texts = codes[i:i + group], [x.text for x in split.captions[i:i + group]]
        first = [q[0] for q in split.questions[i:i + group]]
        every = some.repeat_interleave(group, 0)                        # row a * group + b: picture a, text b
        if "und" in plans:
            asked = [[(a.text, b.answer)] for a in first for b in first]
            length = max(sum(len(tokenizer.ids(t)) for t in turn) + 1 for (turn,) in asked)
            table = likelihoods(understanding(tokenizer, every, asked, length), plans["und"]).view(group, group)
            match(hits, "und", table, [q.answer for q in first])
        if "gen" in plans:
            table = likelihoods(generation(tokenizer, every, texts * group, c.gen.before), plans["gen"])
            alone = likelihoods(generation(tokenizer, some, [""] * group, c.gen.before), plans["gen"])
            match(hits, "gen", table.view(group, group) - alone[:, None], texts)
    return {task: {what: share(hits[task, what]) for what in ("caption", "image", "chance")} for task in plans}


def match(hits, task, table, texts):
    for i, (text, image) in enumerate(zip(table.argmax(1).tolist(), table.argmax(0).tolist())):
        hits[task, "caption"].append(texts[text] == texts[i])
        hits[task, "image"].append(texts[image] == texts[i])
        hits[task, "chance"].append(texts.count(texts[i]) / len(texts))


# ------------------------------------------------------------------------------------------------ cost

def timed(work, device, repeats):
    """{name: function} -> {name: seconds of each repeat}, interleaved, so that what else the machine does hits all alike.
    One more round, before these, warms up."""
    seconds = {name: [] for name in work}
    for _, (name, function) in tqdm(list(product(range(1 + repeats), work.items())), desc="timing", leave=False):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds[name].append(time.perf_counter() - start)
    return {name: some[1:] for name, some in seconds.items()}


def speed(seconds, tokens):
    """Of a step's repeats, as timed gives them: the median and the range in ms, and tokens a second."""
    middle = statistics.median(seconds)
    return {"ms": 1e3 * middle, "ms_range": [1e3 * min(seconds), 1e3 * max(seconds)], "tokens_per_s": tokens / middle}


SPEED = ("ms (least, most)", "tokens/s")        # titles of what speed_cells gives


def speed_cells(x):
    """What speed found, as cells of a table."""
    return f"{x['ms']:.1f} ({x['ms_range'][0]:.1f}, {x['ms_range'][1]:.1f})", f"{x['tokens_per_s']:.0f}"


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def cost(model, batches, plans):
    """What forward and backward cost under the plans: FLOPs as counted, and the time of uncompiled code beside that of the
    dense plan, medians of five. batches, plans: {task: ...}."""
    c, device = model.config, model.embed.weight.device
    dense = dict.fromkeys(plans, (FULL,) * c.layers)

    def summed(count, plans):
        return sum(len(batches[task].tokens) * count(c, task, plan) for task, plan in plans.items())

    def work(plans):
        for task, plan in plans.items():
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                _, loss = model(batches[task], plan)
            loss.backward()

    seconds = timed({"plan": lambda: work(plans), "dense": lambda: work(dense)}, device, 5)
    model.zero_grad()
    ms = {name: 1e3 * statistics.median(some) for name, some in seconds.items()}
    return {"flops_per_step": summed(flops, plans), "flops_ratio": summed(flops, plans) / summed(flops, dense),
            "paper_flops_ratio": summed(paper_cost, plans) / summed(paper_cost, dense),
            "step_ms": ms["plan"], "step_ratio": 1. if plans == dense else ms["plan"] / ms["dense"]}


def hardware(device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        name = dict(map(str.strip, line.split(":", 1)) for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if ":" in line).get("model name", name)
    return f"{name}, {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}"


# ------------------------------------------------------------------------------------------------ all of it

def evaluate(model, tokenizer, found, dataset, plans, folder, sampling, suffix=""):
    """Scores a run under plans {task: plan} on validation data that its seed draws, writes eval.json and samples.png into its
    folder, returns the scores.

    found: its checkpoint, or of it the "options" and the "step"; sampling: (guidance, temperature, top_k).
    """
    start, device, options = time.time(), model.embed.weight.device, found["options"]
    samples, c = SAMPLES[options["preset"]], model.config
    model.eval()
    scores = {"config": {**options, **dict(zip(("guidance", "temperature", "top_k"), sampling)), "step": found["step"],
                         "parameters": sum(p.numel() for p in model.parameters()),
                         "examples": found["step"] * options["batch_size"]}, "n": {}}
    folder, shown, texts, framed = Path(folder), [], [], []
    splits = {task: dataset.split(task, "val", samples[task], options["seed"]) for task in plans}
    rows = {task: sequences(task, tokenizer, split, c).to(device) for task, split in splits.items()}
    is_shapes = splits[next(iter(plans))].scenes is not None
    if "und" in plans:
        results, loss = answered(model, tokenizer, splits["und"], rows["und"], plans["und"])
        scores["und"] = understanding_scores(results, loss)
        scores["n"]["und"] = len(results)
        if is_shapes:
            split = dataset.split("und", "transfer", samples["und"], options["seed"])
            transfer, loss = answered(model, tokenizer, split, sequences("und", tokenizer, split, c).to(device), plans["und"])
            others = understanding_scores(transfer, loss)
            scores["und"] |= {"transfer_accuracy": others["accuracy"], "transfer_chance": others["chance"]}
            scores["n"]["und_transfer"] = len(transfer)
        shown, texts = [*splits["und"].pixels[:18]], question_lines(splits["und"], results)
    if "gen" in plans:
        split = splits["gen"]
        pixels = drawn(model, tokenizer, [x.text for x in split.captions], plans["gen"], *sampling)
        again = tokenizer.decode(tokenizer.encode(split.pixels))
        ceiling = {"frechet": frechet(again, split.pixels)}
        scores["gen"] = {"frechet": frechet(pixels, split.pixels), "ceiling": ceiling,
                         "loss": generation_loss(model, rows["gen"], plans["gen"])}
        scores["n"]["gen"], wrong = len(pixels), []
        if is_shapes:
            rates, wrong = fulfilment(dataset, split, pixels)
            scores["gen"] |= rates
            ceiling |= fulfilment(dataset, split, again)[0]
            transfer = dataset.split("gen", "transfer", samples["gen"], options["seed"])
            held = [tuple(t for t in scene if t.pair in dataset.held_out["gen"]) for scene in transfer.scenes]
            others = drawn(model, tokenizer, [x.text for x in transfer.captions], plans["gen"], *sampling)
            rates, _ = fulfilment(dataset, transfer._replace(scenes=held), others)
            scores["gen"]["transfer_object_accuracy"] = rates["object_accuracy"]
            scores["n"]["gen_transfer"] = len(others)
        framed = [len(texts) + i for i in wrong if i < 18]
        shown, texts = [*shown, *pixels[:18]], texts + [x.text for x in split.captions[:18]]
    if not is_shapes:
        for task, rates in matching(model, tokenizer, splits[next(iter(plans))], plans).items():
            scores[task] |= {"matching": rates, "bits_per_token": scores[task]["loss"] / np.log(2)}
        if "gen" in plans:          # words that it has seen, too: names do not tell what an unseen picture looks like
            seen = dataset.split("gen", "train", 18, options["seed"])
            pixels = drawn(model, tokenizer, [x.text for x in seen.captions], plans["gen"], *sampling)
            shown, texts = [*shown, *pixels], texts + [f"{x.text} (trained on)" for x in seen.captions]
    some = min(64, options["batch_size"])                               # sequences of a step, which may not fit as a whole
    index = torch.arange(some, device=device)
    scores["cost"] = cost(model, {task: batch.rows(index % len(batch.tokens)) for task, batch in rows.items()}, plans)
    scores["cost"] |= {key: scores["cost"][key] * options["batch_size"] / some for key in ("flops_per_step", "step_ms")}
    scores |= {"seconds": time.time() - start, "hardware": hardware(device)}
    contact_sheet(shown, texts, folder / f"samples{suffix}.png", wrong=framed)
    write(folder / f"eval{suffix}.json", json.dumps(scores, indent=1))  # last: where it is, all is
    return scores


def question_lines(split, results, n=18):
    """For each of the first n pictures, questions with what the model said."""
    own = {id(q): f"{q.text} {said}" + ("" if right else f" (no: {q.answer})") for q, right, said in results}
    return ["\n".join(own[id(q)] for q in asked[:4] if id(q) in own) for asked in split.questions[:n]]


def summary(scores):
    """The scores in a few lines, for a terminal."""
    def percent(x):
        return "    –" if x is None else f"{100 * x:5.1f}"

    lines = []
    if "und" in scores:
        u = scores["und"]
        lines.append(f"understanding  {percent(u['accuracy'])} % right (chance {percent(u['chance'])}), transfer "
                     f"{percent(u.get('transfer_accuracy'))}, loss {u['loss']:.3f}, n = {scores['n']['und']}")
        lines += [f"   {kind:18}{percent(r['accuracy'])} (most frequent answer {percent(r['chance'])})"
                  for kind, r in u["by_type"].items()]
    if "gen" in scores:
        g = scores["gen"]
        lines.append(f"generation     {percent(g.get('image_accuracy'))} % of images, "
                     f"{percent(g.get('object_accuracy'))} % of objects right, transfer "
                     f"{percent(g.get('transfer_object_accuracy'))}, Frechet {g['frechet']:.3f} "
                     f"(reconstructions {g['ceiling']['frechet']:.3f}), loss {g['loss']:.3f}, n = {scores['n']['gen']}")
        lines += [f"   {kind:18}{percent(r['image_accuracy'])} (reconstructions "
                  f"{percent(g['ceiling']['by_type'][kind]['image_accuracy'])})"
                  for kind, r in g.get("by_type", {}).items()]
    for task in ("und", "gen"):
        if "matching" in scores.get(task, {}):
            rates = scores[task]["matching"]
            lines.append(f"matching among ten by {task}: the caption of an image {percent(rates['caption'])} %, the image "
                         f"of a caption {percent(rates['image'])} % (chance "
                         f"{percent(rates['chance'])}); {scores[task]['bits_per_token']:.2f} bits/token")
    k = scores["cost"]
    lines.append(f"cost           {k['flops_per_step'] / 1e9:.1f} GFLOP a step = {k['flops_ratio']:.2f} of dense (the paper's "
                 f"formula: {k['paper_flops_ratio']:.2f}), {k['step_ms']:.0f} ms = {k['step_ratio']:.2f} of dense")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the table

# The paper's tables 2 (HMGen) and 3: GQA, POPE F1, MJHQ FID and FLOPs.
PAPER = {"u-dense": (52.86, 79.40, None, "1"), "g-dense": (None, None, 17.45, "1"), "joint-dense": (56.00, 82.30, 15.78, "1"),
         "u-himix": (49.92, 78.75, None, "0.24"), "g-hmgen": (None, None, 12.55, "0.75"), "g-hmgen-15": (None, None, 12.16, "0.85"),
         "joint-share-all": (33.00, 67.59, 12.53, "0.56"), "joint-share-partial": (47.05, 76.58, 14.54, "0.55")}


def table_rows(options):
    """{name: (title, how its options differ from `options`)}, first the rows of the paper, then controls that it lacks."""
    size, both = SIZES[options["preset"]], dict(und_plan="himix", gen_plan="hmgen")
    u, g = dict(objective="und"), dict(objective="gen")
    himix_cost = flops(size, "und", make_plan("himix", size.layers)) / flops(size, "und", make_plan("dense", size.layers))
    rows = {"u-dense": ("U only, dense", u),
            "g-dense": ("G only, dense", g),
            "joint-dense": ("joint, dense", {}),
            "u-himix": ("U only, HiMix, own projections", dict(u, und_plan="himix", projections="image")),
            "g-hmgen": ("G only, HMGen, own projections", dict(g, gen_plan="hmgen", projections="image")),
            "g-hmgen-15": ("G only, HMGen, own projections, K/L near .15",
                           dict(g, gen_plan="hmgen", projections="image", shallow=round(.15 * size.layers))),
            "joint-share-all": ("joint, HiMix + HMGen, share all", both),
            "joint-share-partial": ("joint, HiMix + HMGen, share partial", dict(both, projections="task")),
            "joint-hmgen-both": ("joint, HMGen in both tasks", dict(und_plan="hmgen", gen_plan="hmgen")),
            "joint-skip-both": ("joint, both tasks skip the middle layers", dict(und_plan="skip", gen_plan="skip")),
            "joint-skip-image": ("joint, both tasks skip the middle layers, own projections",
                                 dict(und_plan="skip", gen_plan="skip", projections="image")),
            "joint-sparse-both": ("joint, every second image token skips the middle", dict(und_plan="sparse", gen_plan="sparse")),
            "joint-early": ("joint, image tokens updated in early layers only + HMGen", dict(und_plan="early", gen_plan="hmgen"))}
    # With HiMix that loss is nearly empty: image tokens, never updated, predict the next from themselves alone.
    rows |= {f"{name}-eq1": (f"{rows[name][0]}, loss on image tokens", dict(rows[name][1], image_loss=True))
             for name in ("u-dense", "joint-dense", "joint-share-all", "joint-skip-image")}
    rows |= {"u-hmgen": ("U only, HMGen", dict(u, und_plan="hmgen")),
            "u-skip": ("U only, image tokens skip the middle layers", dict(u, und_plan="skip")),
            "u-skip-image": ("U only, image tokens skip the middle layers, own projections",
                             dict(u, und_plan="skip", projections="image")),
            "u-early": ("U only, image tokens updated in early layers only", dict(u, und_plan="early")),
            "joint-himix-only": ("joint, HiMix, generation dense", dict(und_plan="himix")),
            "joint-hmgen-only": ("joint, understanding dense, HMGen", dict(gen_plan="hmgen")),
            "joint-dense-task": ("joint, dense, projections of each task", dict(projections="task")),
            "joint-dense-image": ("joint, dense, own projections", dict(projections="image")),
            "u-himix-shared": ("U only, HiMix, shared projections", dict(u, und_plan="himix")),
            "u-dense-short": ("U only, dense, as many FLOPs as HiMix", dict(u, steps=round(himix_cost * options["steps"]))),
            "u-dense-long": ("U only, dense, twice the steps", dict(u, steps=2 * options["steps"])),
            "u-dense-image": ("U only, dense, own projections", dict(u, projections="image")),
            "g-dense-image": ("G only, dense, own projections", dict(g, projections="image")),
            "g-naive": ("G only, naive control in the middle", dict(g, gen_plan="naive", shallow=1)),
            "g-naive-all": ("G only, naive control in every layer", dict(g, gen_plan="naive-all"))}
    if rows["g-hmgen-15"][1]["shallow"] in (0, options["shallow"]):     # too few layers for two ratios
        del rows["g-hmgen-15"]
    return rows


# What is tried with trained runs: plans that they were not trained with (cf. fig. 5).
LATER = {"u-dense": ("HiMix at inference only", dict(und_plan="himix")),
         "g-dense": ("HMGen at inference only", dict(gen_plan="hmgen"))}


def image_share(task, layer, *queries):
    """Where the share of attention stands that image tokens get in a layer; in generation they are the output."""
    return "attention", task, *queries, "image" if task == "und" else "output", layer


# The table's parts: columns as (title, where in eval.json, times what, digits), and which of PAPER's figures stand beside them.
PARTS = {"All in one": ([("questions right, %", ("und", "accuracy"), 100, 1),
                         ("... about new pairs, %", ("und", "transfer_accuracy"), 100, 1),
                         ("images right, %", ("gen", "image_accuracy"), 100, 1),
                         ("FLOPs of a step, of dense", ("cost", "flops_ratio"), 1, 2),
                         ("time of a step, of dense", ("cost", "step_ratio"), 1, 2)],
                        {"paper: GQA": 0, "paper: MJHQ FID (less is better)": 2, "paper: FLOPs": 3}),
         "Understanding": ([("questions right, %", ("und", "accuracy"), 100, 1), ("chance", ("und", "chance"), 100, 1),
                            ("POPE F1, %", ("und", "pope", "f1"), 100, 1), ("transfer, %", ("und", "transfer_accuracy"), 100, 1),
                            ("loss", ("und", "loss"), 1, 3)], {"paper: GQA": 0, "paper: POPE F1": 1}),
         "Generation": ([("images right, %", ("gen", "image_accuracy"), 100, 1),
                         ("objects right, %", ("gen", "object_accuracy"), 100, 1),
                         ("transfer, %", ("gen", "transfer_object_accuracy"), 100, 1),
                         ("Fréchet (less is better)", ("gen", "frechet"), 1, 3), ("loss", ("gen", "loss"), 1, 3)],
                        {"paper: MJHQ FID (less is better)": 2}),
         "Cost of a step, relative to dense": ([("exact FLOPs", ("cost", "flops_ratio"), 1, 2),
                                                ("paper's formula", ("cost", "paper_flops_ratio"), 1, 2),
                                                ("time", ("cost", "step_ratio"), 1, 2),
                                                ("parameters, M", ("config", "parameters"), 1e-6, 2),
                                                ("examples of each task", ("config", "examples"), 1, 0)], {"paper: FLOPs": 3}),
         "Attention that image tokens get, % (first layer, last layer)":
             ([(f"{task}, {which} queries, {where}", image_share(task, layer, *path), 100, 0) for task in ("und", "gen")
               for which, path in (("all", ()), ("output", ("output_queries",))) for where, layer in (("first", 0), ("last", -1))], {}),
         "Questions right by kind, %": ([(kind, ("und", "by_type", kind, "accuracy"), 100, 1) for kind in KINDS], {}),
         "Images right by kind of caption, %": ([(kind, ("gen", "by_type", kind, "image_accuracy"), 100, 1) for kind in CAPTIONS], {})}

# The paper's claims, each as a difference that it says is above a margin: name, a row and where in its scores, another row and where,
# margin. 3 points are what HiMix costs in the paper (GQA 52.86 -> 49.92), which calls that kept. New pairs, of colour and shape:
# this task was never trained on them, the other was.
UND, GEN = ("und", "accuracy"), ("gen", "image_accuracy")
ACCURACIES = {"understanding": UND, "understanding of new pairs": ("und", "transfer_accuracy"),
              "generation": GEN, "generation of new pairs": ("gen", "transfer_object_accuracy")}
CLAIMS = [("understanding attends to the image less in the last layer than in the first",
           "joint-dense", image_share("und", 0), "joint-dense", image_share("und", -1), 0),
          ("generation attends to the image more in the last layer than in the first",
           "joint-dense", image_share("gen", -1), "joint-dense", image_share("gen", 0), 0),
          ("HiMix alone keeps understanding", "u-himix", UND, "u-dense", UND, -3),
          ("HMGen alone keeps generation", "g-hmgen", GEN, "g-dense", GEN, -3)]
CLAIMS += [(f"{claim} {what}", a, path, b, path, margin) for claim, a, b, margin in (   # where a row has such scores
    ("joint training helps", "joint-dense", "u-dense", 0),
    ("joint training helps", "joint-dense", "g-dense", 0),
    ("HiMix + HMGen, share all, lose", "joint-dense", "joint-share-all", 0),
    ("share partial wins back", "joint-share-partial", "joint-share-all", 0),
    # beyond the paper: both tasks skip the same layers
    ("skip in both tasks keeps more than share all of", "joint-skip-both", "joint-share-all", 0),
    ("skip in both tasks, own projections, keeps more than share partial of", "joint-skip-image", "joint-share-partial", 0),
    ("skip in both tasks keeps", "joint-skip-both", "joint-dense", -3),
    ("skip in both tasks, own projections, keeps", "joint-skip-image", "joint-dense", -3),
    # what joint training gives beside more training alone, and where both runs are reduced alike
    ("beside twice the steps alone: joint training helps", "joint-dense", "u-dense-long", 0),
    ("HiMix + HMGen, share all: joint training helps", "joint-share-all", "u-himix-shared", 0),
    ("HMGen in both tasks: joint training helps", "joint-hmgen-both", "u-hmgen", 0),
    ("skip in both tasks: joint training helps", "joint-skip-both", "u-skip", 0),
    ("skip in both tasks, own projections: joint training helps", "joint-skip-image", "u-skip-image", 0),
    # where understanding predicts its image tokens, too, as eq. 1 has it
    ("loss on image tokens: understanding alone gains", "u-dense-eq1", "u-dense", 0),
    ("loss on image tokens: joint training gains", "joint-dense-eq1", "joint-dense", 0),
    ("loss on image tokens: joint training helps", "joint-dense-eq1", "u-dense-eq1", 0),
    ("loss on image tokens: joint training helps", "joint-dense-eq1", "g-dense", 0),
    ("loss on image tokens: HiMix + HMGen, share all, keep", "joint-share-all-eq1", "joint-dense-eq1", -3),
    ("loss on image tokens: skip in both tasks, own projections, keeps", "joint-skip-image-eq1", "joint-dense-eq1", -3))
    for what, path in ACCURACIES.items()]
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)          # Student's t, 97.5 %, 1 to 9 degrees of freedom


def value(scores, path):
    try:
        for key in path:
            scores = scores[key]
        return scores
    except (KeyError, TypeError, IndexError):                           # a run has the scores of its own tasks only
        return None


def values(runs, path, scale=100):
    """One figure of every seed that has it, times scale."""
    return [scale * x for x in (value(run, path) for run in runs.values()) if x is not None]


def cell(runs, path, scale, digits):
    """Mean ± standard deviation over seeds of one figure."""
    some = values(runs, path, scale)
    if not some:
        return "–"
    spread = f" ± {statistics.stdev(some):.{digits}f}" if len(set(some)) > 1 else ""
    return f"{statistics.mean(some):.{digits}f}{spread}"


def markdown(titles, rows, align=None):
    """A table in Markdown. align: "l" or "r" for each column, by default the first to the left and the others to the right."""
    rule = "".join({"l": "---|", "r": "---:|"}[side] for side in align or "l" + "r" * (len(titles) - 1))
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + rule, *("| " + " | ".join(row) + " |" for row in rows)])


def claims(found):
    """What the rows say of CLAIMS: [(claim, difference in points over seeds, half of its 95 % interval, seeds, answer)].
    Runs of one seed share data and order: differences are taken seed by seed."""
    answers = []
    for claim, a, path, b, other, margin in CLAIMS:
        pairs = [(value(one, path), value(found.get(b, {}).get(seed), other)) for seed, one in found.get(a, {}).items()]
        differences = [100 * (x - y) for x, y in pairs if x is not None and y is not None]
        if len(differences) > 1:
            mean, n = statistics.mean(differences), len(differences)
            half = T975[min(n - 1, len(T975)) - 1] * statistics.stdev(differences) / n ** .5
            answer = "holds" if mean - half > margin else "does not hold" if mean + half < margin else "not decided here"
            answers.append((claim + (f" (less than {-margin} points lost)" if margin else ""), mean, half, n, answer))
    return answers


def read_runs(folder):
    """The scores in a folder of runs: {row: {seed: scores}}, and {row: (folder of one of its runs, its configuration)}."""
    found, where = defaultdict(dict), {}
    for file in sorted(Path(folder).glob("*-seed*/eval*.json")):
        name, seed = file.parent.name.rsplit("-seed", 1)
        name += file.stem.removeprefix("eval")
        try:
            found[name][seed] = scores = json.loads(file.read_text())
            where.setdefault(name, (file.parent, scores["config"]))
            if file.name == "eval.json" and (probed := file.with_name("attention.json")).exists():
                scores["attention"] = json.loads(probed.read_text())
        except (ValueError, KeyError, TypeError):
            fail(f"{file}: expected the scores of a run, as eval.py writes them")
    if not found:
        fail(f"{folder}: no finished run in it (expected folders NAME-seedN with an eval.json)")
    return found, where


def table(folder, device):
    """The runs in a folder beside the paper's: prints Markdown, and writes it, all scores, a picture of the accuracies and
    pictures that the runs draw under the same captions to results/."""
    found, where = read_runs(folder)
    every = [scores for some in found.values() for scores in some.values()]
    options = {**every[0]["config"], "und_plan": "dense", "gen_plan": "dense"}
    titles = {name: title for name, (title, _) in table_rows(options).items()}
    for name, (title, changed) in LATER.items():
        titles[name + suffix(options, changed)] = f"{titles[name]}, {title}"
    titles |= {name: name for name in sorted(set(found) - set(titles))}
    names = [name for name in titles if name in found]

    parts = []
    for part, (columns, beside) in PARTS.items():
        rows = {name: [cell(found[name], *column[1:]) for column in columns] for name in names}
        rows = {name: cells for name, cells in rows.items() if set(cells) != {"–"}}
        if rows:
            parts.append(f"{part}\n\n" + markdown(
                ["run", "seeds", *(title for title, *_ in columns), *beside],
                [[titles[name], ", ".join(found[name]), *cells, *(str(PAPER.get(name, (None,) * 4)[i] or "–") for i in beside.values())]
                 for name, cells in rows.items()]))
    answers = claims(found)
    if answers:
        parts.append("Claims\n\n" + markdown(
            ["claim", "difference in points, 95 % interval over seeds", "seeds", ""],
            [[claim, f"{mean:+.1f} ± {half:.1f}", str(n), answer] for claim, mean, half, n, answer in answers], "lrrl"))
    n = defaultdict(set)
    for scores in every:
        for key, count in scores["n"].items():
            n[key].add(count)
    n = ", ".join(f"{key} {min(some)}" + (f" to {max(some)}" if len(some) > 1 else "") for key, some in n.items())
    machines = " / ".join(sorted({scores["hardware"] for scores in every}))
    parts.append(f"Mean ± standard deviation over seeds; n of each run: {n}; {machines}; preset {options['preset']}, "
                 f"{options['steps']} steps of {options['batch_size']} pictures of each task.")
    text, path = "\n\n".join(parts), f"results/{Path(folder).resolve().name}-{options['preset']}"
    write(f"{path}.md", text + "\n")
    write(f"{path}.json", json.dumps({"titles": {name: titles[name] for name in names}, "runs": found}))
    most = max(map(len, found.values()))        # the picture: rows that have all seeds, under the plans they were trained with
    shown = [name for name in names if len(found[name]) == most and where[name][0].name.startswith(f"{name}-seed")]
    shares = {f"{what}, %": {titles[name]: some for name in shown if (some := values(found[name], key))}
              for what, key in ACCURACIES.items()}
    if any(shares.values()):
        strip_chart([titles[name] for name in shown], shares).save(f"{path}.png")

    pixels, texts = [], []                                              # a row of pictures for each run (cf. fig. 5)
    artists = [name for name in names if where[name][1]["objective"] != "und"]
    if artists:
        split = data_sets.load(options["data"], options["preset"]).split("gen", "val", 6, questions=0)
        captions = [x.text for x in split.captions]
        for name in artists:
            run, config = where[name]
            model, tokenizer, _, plans, _ = opened(run, device, {k: config[k] for k in ("und_plan", "gen_plan", "shallow")})
            pixels += [*drawn(model, tokenizer, captions, plans["gen"], *(config[k] for k in ("guidance", "temperature", "top_k")))]
            texts += [f"{titles[name]}:\n{caption}" for caption in captions]
        contact_sheet(pixels, texts, f"{path}-samples.png")
    print(f"{text}\n\n{path}.md, .json, .png, -samples.png")


def suffix(options, changed):
    """Of the files with scores under other plans than a run was trained with."""
    return "-{und_plan}-{gen_plan}{shallow}".format(**{**options, **changed}) if changed else ""


def opened(folder, device, changed):
    """A trained run under other plans: `changed` has new values of und_plan, gen_plan, shallow. Returns the model, its
    tokenizer, its checkpoint with those options, {task: plan} and what the names of its files end with."""
    model, tokenizer, found = load(folder, device)
    changed = {key: value for key, value in changed.items() if value != found["options"][key]}
    options = {**found["options"], **changed}
    for task in ("und", "gen"):
        if options["objective"] not in (task, "joint") and f"{task}_plan" in changed:
            fail(f"--{task}-plan: {folder} was not trained for that task")
    plans = plans_for(options, model.config.layers, "shallow" in changed)
    return model, tokenizer, {**found, "options": options}, plans, suffix(found["options"], changed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a trained run")
    parser.add_argument("--und-plan", help="default: the one it was trained with")
    parser.add_argument("--gen-plan")
    parser.add_argument("--shallow", type=int, metavar="K", help="of hmgen and other plans that touch only some layers")
    parser.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"))
    parser.add_argument("--draw", metavar="CAPTION")
    parser.add_argument("--n", type=int, default=8, help="how many pictures --draw draws")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1: none")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest codes only")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--table", type=Path, metavar="DIR", help="the table of all runs in DIR")
    args = parser.parse_args()
    if (args.run is None) == (args.table is None):
        fail("expected the folder of a run, or --table and a folder of runs")
    for name, least in (("n", 1), ("top_k", 1), ("temperature", 1e-6), ("guidance", 0)):
        number = getattr(args, name)
        if number is not None and not least <= number < math.inf:
            fail(f"--{name.replace('_', '-')} {number}: expected at least {least:g}")
    given = {key for key, value in vars(args).items() if value not in (None, parser.get_default(key))}
    used = ({"table", "device"} if args.table else {"run", "device", "und_plan", "shallow", "ask"} if args.ask else
            {"run", "device", "gen_plan", "shallow", "draw", "n", "guidance", "temperature", "top_k"} if args.draw is not None else
            {"run", "device", "und_plan", "gen_plan", "shallow", "guidance", "temperature", "top_k"})
    if given - used:
        fail(f"--{min(given - used).replace('_', '-')} does not belong there: expected only "
             + ", ".join(f"--{key.replace('_', '-')}" for key in sorted(used - {"run"})))
    if args.table:
        table(args.table, pick_device(args.device))
        return

    changed = {key: getattr(args, key) for key in ("und_plan", "gen_plan", "shallow") if getattr(args, key) is not None}
    model, tokenizer, found, plans, end = opened(args.run, pick_device(args.device), changed)
    options = found["options"]
    usual = sampling_for(options["data"])
    sampling = tuple(own if given is None else given
                     for own, given in zip(usual, (args.guidance, args.temperature, args.top_k)))
    try:
        if args.ask:
            if "und" not in plans:
                fail(f"--ask: {args.run} was trained to generate only")
            pixels = data_sets.open_picture(Path(args.ask[0]), tokenizer.vq.config.image_size, "--ask")
            print(answer(model, tokenizer, tokenizer.encode(pixels[None])[0], args.ask[1], plans["und"]))
        elif args.draw is not None:
            if "gen" not in plans:
                fail(f"--draw: {args.run} was trained to understand only")
            pixels = drawn(model, tokenizer, [args.draw] * args.n, plans["gen"], *sampling)
            contact_sheet(pixels, [""] * args.n, args.run / "draw.png", columns=min(args.n, 6))
            Image.fromarray(pixels[0]).save(args.run / "draw-0.png")
            print(f"{args.run}/draw.png: {args.n} pictures of {args.draw!r}, draw-0.png: the first of them in its own size")
        else:
            dataset = data_sets.load(options["data"], options["preset"])
            if sampling != usual:
                end += "-g{:g}-t{:g}-k{}".format(*sampling)
            scores = evaluate(model, tokenizer, found, dataset, plans, args.run, sampling, end)
            print(summary(scores))
            print(f"{args.run}/eval{end}.json, samples{end}.png")
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    command(main)
