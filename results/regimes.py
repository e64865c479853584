"""When does training both tasks together help? Three runs under several conditions, one thing changed at a time:

    python results/regimes.py out/regimes [NAME ...]            trains what is missing; goes on where it stopped

Understanding alone, generation alone and both, all dense, with half the steps of the table. A condition is a `patch` of the
constant, the data set or the model that it is about. Writes results/regimes-PRESET.md, .json and .png.
"""
import argparse
import json
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from data import command, fail, strip_chart

import torch
import torch.nn.functional as F
from tqdm import trange

import eval as evaluation
import probe
import train
from model import INSTRUCTION_WEIGHT, Model, load, understanding
from prune import FULL, SIZES
from tokenizer import pick_device, write

COLUMNS = {"questions right, %": ("und", "accuracy"), "... of pairs only generated, %": ("und", "transfer_accuracy"),
           "images right, %": ("gen", "image_accuracy"), "objects right of pairs only understood, %": ("gen", "transfer_object_accuracy")}


class Eq1(Model):
    """Understanding foretells its image tokens, too: the paper's eq. 1. They count as much as an instruction token."""

    def forward(self, batch, plan):
        if batch.task == "gen" or not self.training:
            return super().forward(batch, plan)
        text, image = self.hidden(batch, plan)
        before, m, _ = batch.layout
        logits, loss = self.loss(text[:, before:], batch)
        foretelling = torch.cat([text[:, before - 1:before], image[:, :-1]], 1)
        each = F.cross_entropy(self.head(self.norm(foretelling)).flatten(0, 1), batch.tokens[:, before:before + m].flatten(),
                               reduction="sum")
        return logits, loss + INSTRUCTION_WEIGHT * each / (batch.weights == 1).sum()


def read_first(options, dataset, tokenizer, device):
    """A function that builds a Model and has it read text alone, half as long as training will take: captions, and questions
    with their answers, under pictures that are one and the same code all over. The paper's backbone is a language model."""
    def build(c, codebook):
        preset = train.PRESETS[options["preset"]]
        model = Model(c, codebook).to(device).train()
        split = dataset.split("und", "train", preset.scenes["und"], options["seed"])
        blank = torch.zeros(len(split.pixels), c.side ** 2, dtype=torch.long)
        turns = [[(caption.text, ""), *((q.text, q.answer) for q in some)] for caption, some in zip(split.captions, split.questions)]
        texts = understanding(tokenizer, blank, turns, c.und.after).to(device)
        optimizers, steps = train.optimizers_of(model, preset.lr, preset.lr_rest), options["steps"] // 2
        for step in trange(steps, desc="reading", leave=False):
            for optimizer, lr in zip(optimizers, (preset.lr, preset.lr_rest)):
                optimizer.param_groups[0]["lr"] = lr * train.learning_rate(step, steps)
            index = torch.randint(len(blank), (options["batch_size"],)).to(device)
            train.training_step(model, {"und": [(texts.rows(index), 1.)]}, {"und": (FULL,) * c.layers}, optimizers)
        return model.cpu()
    return build


def caption_backwards(caption):
    def other(*args, **kwargs):
        told = caption(*args, **kwargs)
        return told._replace(text=" ".join(word[::-1] for word in told.text.split()))
    return other


def conditions(preset):
    """{name: (what is different, patches, whether it needs a tokenizer of its own)}"""
    scenes, size, world = train.PRESETS[preset].scenes, SIZES[preset], data.WORLDS[preset]

    def fewer(**changed):
        return [patch.object(train.PRESETS[preset], "scenes", scenes | changed)]

    few, cell = {task: n // 20 for task, n in scenes.items()}, world.image_size // world.grid
    return {"base": ("as it is", [], False),
            "few-und": (f"{few['und']} pictures to understand, not {scenes['und']}", fewer(und=few["und"]), False),
            "few-gen": (f"{few['gen']} pictures to generate, not {scenes['gen']}", fewer(gen=few["gen"]), False),
            "words": ("captions spelled backwards: no words shared",
                      [patch.object(data.Shapes, "caption", caption_backwards(data.Shapes.caption))], True),
            "eq1": ("image tokens foretold in understanding, too", [patch.object(train, "Model", Eq1)], False),
            "read": ("text alone read first", "read", False),
            "jitter": ("objects lie anywhere in their cells",
                       [patch.dict(data.WORLDS, {preset: replace(world, jitter=(cell - round(.75 * cell)) // 2)})], True),
            "deep": (f"{2 * size.layers} layers, not {size.layers}",
                     [patch.dict(SIZES, {preset: replace(size, layers=2 * size.layers)})], False),
            "shallow": (f"{size.layers // 2} layers, not {size.layers}",
                        [patch.dict(SIZES, {preset: replace(size, layers=size.layers // 2)})], False)}


def train_one(folder, name, objective, seed, patches, own_tokenizer, given, device):
    out = folder / f"{name}-{objective}-seed{seed}"
    options = train.completed({**given, "objective": objective, "seed": seed, "out": str(out),
                               "tokenizer": str(folder / f"tokenizer{f'-{name}' * own_tokenizer}.pt")}, device)
    if (out / "attention.json").exists():
        return
    print(f"\n{out}")
    with ExitStack() as stack:
        for one in patches if patches != "read" else []:
            stack.enter_context(one)
        if patches == "read":
            dataset = data.load("shapes", options["preset"])
            tokenizer = train.get_tokenizer(options, dataset, device, True)
            stack.enter_context(patch.object(train, "Model", read_first(options, dataset, tokenizer, device)))
        train.run(options, load(out, "cpu")[2] if (out / "checkpoint.pt").exists() else None, device)
        model, tokenizer, _ = load(out, device)
        write(out / "attention.json", json.dumps(probe.probe(model, tokenizer, options, 256)[0]))


def table(folder, every, preset):
    """What all finished runs say: Markdown with a row for each condition, and a picture."""
    found = defaultdict(lambda: defaultdict(dict))                      # [condition][objective][seed]
    for file in sorted(folder.glob("*-seed*/attention.json")):
        name, objective, seed = file.parent.name.rsplit("-", 2)
        scores = json.loads((file.parent / "eval.json").read_text())
        found[name][objective][seed] = scores | {"attention": json.loads(file.read_text())}
    names = [name for name in every if name in found]
    titles = {name: every[name][0] for name in names}
    lines = ["| condition | " + " | ".join(f"{what}: alone → joint" for what in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {titles[name]} | " + " | ".join(" → ".join(evaluation.cell(found[name][objective], path, 100, 1)
                                                            for objective in (path[0], "joint")) for path in COLUMNS.values()) + " |"
              for name in names]
    lines += ["", "Questions right by kind, %", "", "| condition | | " + " | ".join(data.KINDS) + " |", "|---|---|" + "---:|" * len(data.KINDS)]
    runs = [(name, how, found[name][objective]) for name in names for objective, how in (("und", "alone"), ("joint", "joint"))]
    lines += [f"| {titles[name]} | {how} | " + " | ".join(evaluation.cell(some, ("und", "by_type", kind, "accuracy"), 100, 1)
                                                        for kind in data.KINDS) + " |" for name, how, some in runs]
    lines += ["", "Share of attention that understanding pays to image tokens, layer by layer (seed 0)", "",
              "| condition | | all queries | output queries |", "|---|---|---|---|"]
    for name, how, some in runs:
        if "seed0" in some:
            shares = some["seed0"]["attention"]["und"]
            lines.append(f"| {titles[name]} | {how} | " + " | ".join(" → ".join(f"{x:.2f}" for x in of["image"])
                                                                   for of in (shares, shares["output_queries"])) + " |")
    dots = {what: {f"{titles[name]}: {how}": [100 * evaluation.value(one, path) for one in found[name][objective].values()]
                   for name in names for objective, how in ((path[0], "alone"), ("joint", "joint")) if found[name][objective]}
            for what, path in COLUMNS.items()}
    path = f"results/regimes-{preset}"
    write(f"{path}.md", "\n".join(lines) + "\n")
    write(f"{path}.json", json.dumps({"titles": titles, "runs": found}))
    strip_chart([f"{titles[name]}: {how}" for name in names for how in ("alone", "joint")],
                {what: rows for what, rows in dots.items() if rows}).save(f"{path}.png")
    print("\n".join(lines) + f"\n\n{path}.md, .json, .png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="conditions (default: all)")
    parser.add_argument("--preset", default="cpu", choices=train.PRESETS)
    parser.add_argument("--steps", type=int, help="default: half of the preset's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    every, device = conditions(args.preset), pick_device(args.device)
    for name in args.names:
        if name not in every:
            fail(f"{name}: expected some of {', '.join(every)}")
    given = {"preset": args.preset, "steps": args.steps or train.PRESETS[args.preset].steps // 2}
    for seed in range(args.seeds):
        for name in args.names or every:
            for objective in ("und", "joint", "gen"):
                train_one(args.folder, name, objective, seed, *every[name][1:], given, device)
    table(args.folder, every, args.preset)


if __name__ == "__main__":
    command(main)
