"""When does training both tasks together help? Some runs under several conditions, one thing changed at a time:

    python results/regimes.py out/regimes [NAME ...]            trains what is missing; goes on where it stopped

Understanding alone, generation alone and both, dense, with half the steps of the table; as it is and at twice the depth,
both are also reduced. A condition is a `patch` of the constant, the data set or the model that it is about. Writes
results/FOLDER-PRESET.md, .json and .png.
"""
import argparse
import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from data import command, fail, strip_chart

import torch
from tqdm import trange

import eval as evaluation
import probe
import train
from model import Model, load, understanding
from prune import FULL, SIZES
from tokenizer import pick_device, write


RUNS = {"und": dict(objective="und"), "gen": dict(objective="gen"), "joint": {},
        "reduced": dict(und_plan="himix", gen_plan="hmgen"), "skip": dict(und_plan="skip", gen_plan="skip")}
JOINT = {"joint": "joint, dense", "reduced": "HiMix + HMGen", "skip": "both tasks skip the middle layers"}


def read_first(options, device):
    """A patch after which a Model has read text alone, half as long as training will take: captions, and questions with their
    answers, of other scenes, none with a held-out pair, under pictures that are one and the same code all over. The paper's
    backbone is a language model."""
    def build(c, codebook):
        if (Path(options["out"]) / "checkpoint.pt").exists():           # its weights, which are loaded next, have read
            return Model(c, codebook)
        dataset, preset = data.load("shapes", options["preset"]), train.PRESETS[options["preset"]]
        with patch.dict(dataset.held_out, und=dataset.held_out["und"] | dataset.held_out["gen"]):
            split = dataset.split("und", "train", preset.scenes["und"], options["seed"] + 1000)
        tokenizer = train.get_tokenizer(options, dataset, device, True)
        blank = torch.zeros(len(split.pixels), c.side ** 2, dtype=torch.long)
        turns = [[(caption.text, ""), *((q.text, q.answer) for q in some)] for caption, some in zip(split.captions, split.questions)]
        texts = understanding(tokenizer, blank, turns, c.und.after).to(device)
        model = Model(c, codebook).to(device).train()
        codes = model.embed.weight[c.first_code:].clone()
        optimizers, steps = train.optimizers_of(model, preset.lr, preset.lr_rest), options["steps"] // 2
        for step in trange(steps, desc="reading", leave=False):
            for optimizer, lr in zip(optimizers, (preset.lr, preset.lr_rest)):
                optimizer.param_groups[0]["lr"] = lr * train.learning_rate(step, steps)
            rows = texts.rows(torch.randint(len(blank), (options["batch_size"],)).to(device))
            train.training_step(model, {"und": [(rows, 1.)]}, {"und": (FULL,) * c.layers}, optimizers)
        model.embed.weight.data[c.first_code:] = codes                  # it has seen no picture
        return model.cpu()
    return patch.object(train, "Model", build)


def backwards(caption):
    def other(*args, **kwargs):
        told = caption(*args, **kwargs)
        return told._replace(text=" ".join(word[::-1] for word in told.text.split()))
    return other


def unshown(split):
    """Shapes.split whose training pictures to generate lack understanding's held-out pairs, too."""
    def other(self, task, part, *args, **kwargs):
        both = self.held_out["und"] | self.held_out["gen"]
        with patch.dict(self.held_out, {"gen": both} if (task, part) == ("gen", "train") else {}):
            return split(self, task, part, *args, **kwargs)
    return other


def conditions(options, device):
    """{name: (what is different, patch, the RUNS for which it is)}; of the others, base has the runs."""
    preset = options["preset"]
    scenes, size, world = train.PRESETS[preset].scenes, SIZES[preset], data.WORLDS[preset]
    every, und, gen = ("und", "joint", "gen"), ("und", "joint"), ("gen", "joint")
    few = {task: n // 20 for task, n in scenes.items()}

    def fewer(task):
        return patch.object(train.PRESETS[preset], "scenes", scenes | {task: few[task]})

    return {"base": ("as it is", nullcontext(), tuple(RUNS)),
            "few-und": (f"{few['und']} pictures to understand, not {scenes['und']}", fewer("und"), und),
            "few-gen": (f"{few['gen']} pictures to generate, not {scenes['gen']}", fewer("gen"), gen),
            "words": ("captions spelled backwards: no word shared but a",
                      patch.object(data.Shapes, "caption", backwards(data.Shapes.caption)), every),
            "unshown": ("pairs that understanding lacks kept from generation, too",
                        patch.object(data.Shapes, "split", unshown(data.Shapes.split)), ("joint",)),
            "eq1": ("loss on image tokens in understanding, too", patch.dict(train.DEFAULTS, image_loss=True), und),
            "read": ("text alone read first", read_first(options, device), every),
            "jitter": (f"objects up to {world.jitter + 1} pixels off their places, not {world.jitter}",
                       patch.dict(data.WORLDS, {preset: replace(world, jitter=world.jitter + 1)}), every),
            "narrow": (f"width {size.width // 2}, not {size.width}",
                       patch.dict(SIZES, {preset: replace(size, width=size.width // 2)}), every),
            "deep": (f"{2 * size.layers} layers, not {size.layers}",
                     patch.dict(SIZES, {preset: replace(size, layers=2 * size.layers)}), tuple(RUNS))}


def train_one(folder, name, run, options, device):
    out = folder / f"{name}-{run}-seed{options['seed']}"
    given = {**options, **RUNS[run], "out": str(out), "tokenizer": str(folder / f"tokenizer-{name}.pt")}
    # The identity keeps train.py from going on with such a run, since it would do so without the patch.
    with (train.claimed(out) as ours, conditions(train.completed(given, device), device)[name][1],
          patch.object(data.Shapes, "identity", f"shapes {name}")):
        options = train.completed(given, device)                        # now for as many layers as the patch says
        train.check(options)
        found = train.begun(options)
        if not ours or (out / "attention.json").exists():
            return
        print(f"\n{out}")
        train.run(options, found, device)
        model, tokenizer, _ = load(out, device)
        write(out / "attention.json", json.dumps(probe.probe(model, tokenizer, options, 256)[0]))


def table(folder, every, preset):
    """What all finished runs say: Markdown with a row for each condition, and a picture."""
    found = defaultdict(lambda: defaultdict(dict))                      # [condition][run][seed]
    for file in sorted(folder.glob("*-seed*/attention.json")):
        name, run, seed = file.parent.name.rsplit("-", 2)
        scores = json.loads((file.parent / "eval.json").read_text())
        found[name][run][seed] = scores | {"attention": json.loads(file.read_text())}
    names, columns = [name for name in every if name in found], evaluation.ACCURACIES
    titles = {name: every[name][0] for name in names}

    def runs(name, how, task):
        """A condition's runs, by seed; "alone" is the run of that task."""
        run = task if how == "alone" else how
        return found[name if run in every[name][2] else "base"][run]

    def accuracies(name, *hows):
        return [" → ".join(evaluation.cell(runs(name, how, path[0]), path, 100, 1) for how in hows) for path in columns.values()]

    pairs = [(name, how, runs(name, how, "und")) for name in names for how in ("alone", "joint")]
    reduced = [name for name in names if "reduced" in found[name]]
    parts = [evaluation.markdown(["condition", *(f"{what}, %: alone → joint" for what in columns)],
                                 [[titles[name], *accuracies(name, "alone", "joint")] for name in names]),
             "Questions right by kind, %",
             evaluation.markdown(["condition", "", *data.KINDS],
                                 [[titles[name], how, *(evaluation.cell(some, ("und", "by_type", kind, "accuracy"), 100, 1)
                                                       for kind in data.KINDS)] for name, how, some in pairs],
                                 "ll" + "r" * len(data.KINDS)),
             "Share of attention that understanding pays to image tokens, layer by layer (seed 0)",
             evaluation.markdown(["condition", "", "all queries", "output queries"],
                                 [[titles[name], how, *(" → ".join(f"{x:.2f}" for x in of["image"])
                                                       for of in (shares, shares["output_queries"]))]
                                  for name, how, some in pairs if (shares := evaluation.value(some, ("seed0", "attention", "und")))],
                                 "llll")]
    if reduced:
        parts[1:1] = ["Trained jointly: " + " → ".join(JOINT.values()),
                      evaluation.markdown(["condition", *(f"{what}, %" for what in columns)],
                                          [[titles[name], *accuracies(name, *JOINT)] for name in reduced])]
    rows = [(f"{titles[name]}: {title}", name, how) for name in names
            for how, title in {"alone": "alone", **(JOINT if name in reduced else {"joint": "joint"})}.items()]
    dots = {what: {title: some for title, name, how in rows
                   if (some := evaluation.values(runs(name, how, path[0]), path))}
            for what, path in columns.items()}
    text = "\n\n".join(parts)
    path = f"results/{folder.resolve().name}-{preset}"
    write(f"{path}.md", text + "\n")
    write(f"{path}.json", json.dumps({"titles": titles, "runs": found}))
    strip_chart([title for title, *_ in rows], dots).save(f"{path}.png")
    print(f"{text}\n\n{path}.md, .json, .png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="conditions (default: all)")
    parser.add_argument("--preset", default="cpu", choices=train.PRESETS)
    parser.add_argument("--steps", type=int, help="default: half of the preset's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    device = pick_device(args.device)
    given = {"preset": args.preset, "steps": train.PRESETS[args.preset].steps // 2 if args.steps is None else args.steps}
    every = conditions(train.completed(given, device), device)
    for name in args.names:
        if name not in every:
            fail(f"{name}: expected some of {', '.join(every)}")
    if args.seeds < 1:
        fail(f"--seeds {args.seeds}: expected at least 1")
    for seed in range(args.seeds):
        for name in args.names or every:
            for run in every[name][2]:
                train_one(args.folder, name, run, {**given, "seed": seed}, device)
    table(args.folder, every, args.preset)


if __name__ == "__main__":
    command(main)
