"""Many runs: the paper's rows and their controls. Trains what is missing, then makes the table.

    python study/table.py out/table --seeds 3                   every row, seeds 1 to 3
    python study/table.py out/table --seeds 8 --rows u joint    some rows
    python study/table.py out/table --seeds 0       no training: the table of what is there

It goes on where it stopped, and may be started several times, best one process a core
(OMP_NUM_THREADS=1): each takes rows that no other has. Settings are chosen on seeds 0 and 10 to 12,
so seeds count from 1. Go on with a stopped run by starting this again, not with train.py: some rows
have a world of their own. Writes study/results/NAME-PRESET.md, .json, .png, -flops.png and
-samples.png; NAME is the folder's. Of the folder itself git keeps the scores: they are all that a
table needs.
"""
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (contact_sheet, exclusive, fail, pick_device, run_script, save_picture,
                    script_parser, write_file)

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import train
from eval import draw_pictures, evaluate, sampling_of, save_scores
from model import load_run
from prune import FULL, PLANS, SHALLOW, plans_of

RESULTS = ROOT / "study" / "results"

# Each row: its title, and how its options differ from those of joint dense training.
BOTH = dict(und_plan="himix", gen_plan="hmgen")
ROWS = {
    # the paper's
    "u": ("understanding only", dict(objective="und")),
    "g": ("generation only", dict(objective="gen")),
    "joint": ("joint", {}),
    "u-himix": ("understanding only, HiMix",
                dict(objective="und", und_plan="himix", projections="image")),
    "g-hmgen": ("generation only, HMGen",
                dict(objective="gen", gen_plan="hmgen", projections="image")),
    "share-all": ("joint, HiMix + HMGen, share all", BOTH),
    "share-partial": ("joint, HiMix + HMGen, share partial", dict(BOTH, projections="task")),
    "g-naive": ("generation only, naive control in the middle",
                dict(objective="gen", gen_plan="naive")),
    "g-deep": ("generation only, 7 layers, own projections",
               dict(objective="gen", projections="image")),
    "g-deep-hmgen": ("generation only, 7 layers, HMGen in one",     # the paper's lower K / L
                     dict(objective="gen", gen_plan="hmgen", projections="image", shallow=1)),
    # controls
    "u-describe": ("understanding only, describes its pictures", dict(objective="und")),
    "u-long": ("understanding only, as many FLOPs as joint", dict(objective="und")),
    "joint-shuffled": ("joint, captions shuffled", {}),
    "u-image-loss": ("understanding only, predicts its pictures, too",
                     dict(objective="und", image_loss=True)),
    "joint-image-loss": ("joint, understanding predicts its pictures, too", dict(image_loss=True)),
    "share-all-practice": ("joint, HiMix + HMGen, share all, with practice",
                           dict(BOTH, practice=True)),
    "joint-practice": ("joint, with practice", dict(practice=True)),
    "g-practice": ("generation only, with practice", dict(objective="gen", practice=True)),
    "u-image": ("understanding only, own projections", dict(objective="und", projections="image")),
    "g-image": ("generation only, own projections", dict(objective="gen", projections="image")),
    # the first claim, at depth
    "deep": ("joint, twelve narrow layers", {}),
    "deep-leave-10": ("joint, twelve narrow layers, image leaves understanding after 10",
                      dict(und_plan="leave-10")),
    # beyond the paper
    "u-freeze": ("understanding only, frozen after the first layer",
                 dict(objective="und", und_plan="freeze")),
    "freeze-hmgen": ("joint, frozen after the first layer + HMGen",
                     dict(und_plan="freeze", gen_plan="hmgen")),
    "freeze-hmgen-practice": ("joint, frozen after the first layer + HMGen, with practice",
                              dict(und_plan="freeze", gen_plan="hmgen", practice=True)),
}
# The row that others of this objective are compared with.
DENSE = {"und": "u", "gen": "g", "joint": "joint"}
# Trained rows that are scored once more under a plan they were not trained with (cf. fig. 5).
AT_INFERENCE = {"u": ("HiMix at inference only", dict(und_plan="himix")),
                "g": ("HMGen at inference only", dict(gen_plan="hmgen"))}
# The paper's table 3: GQA, MJHQ FID (less is better) and FLOPs.
PAPER = {"u": ("52.86", "–", "1"), "g": ("–", "17.45", "1"), "joint": ("56.00", "15.78", "1"),
         "u-himix": ("49.92", "–", "0.24"), "g-hmgen": ("–", "12.16", "0.85"),
         "share-all": ("33.00", "12.53", "0.56"), "share-partial": ("47.05", "14.54", "0.55")}

# The table's columns: title, where the number stands in eval.json, factor, digits.
COLUMNS = [("questions right, %", ("und", "accuracy"), 100, 1),
           ("held-out pairs, %", ("und", "transfer_accuracy"), 100, 1),
           ("images right, %", ("gen", "image_accuracy"), 100, 1),
           ("unseen objects, %", ("gen", "transfer_object_accuracy"), 100, 1),
           ("FLOPs", ("cost", "flops_ratio"), 1, 2)]
# The first columns in the table's picture: a colour, and where the axis begins.
PANELS = (("royalblue", 80), ("darkorange", 40), ("seagreen", 60), ("firebrick", 0))

# The claims that the study decides, written down before all but six of their runs (study/README.md
# names those): (claim, score, points, rows). A claim holds if the first row has more of the score
# than the second, less so many points. Of four rows: if the first pair differs by more than the
# second one, a difference of differences.
SEEDS = 8       # of a claim, neither more nor fewer: else one could stop at a lucky moment
QUESTIONS, HELD_OUT = ("und", "accuracy"), ("und", "transfer_accuracy")
IMAGES, UNSEEN = ("gen", "image_accuracy"), ("gen", "transfer_object_accuracy")
CLAIMS = [
    ("joint training helps with held-out pairs", HELD_OUT, 0, ["joint", "u"]),
    ("joint training helps with questions", QUESTIONS, 0, ["joint", "u"]),
    ("joint training keeps images, within 2 points", IMAGES, 2, ["joint", "g"]),
    ("HiMix alone keeps held-out pairs, within 5 points", HELD_OUT, 5, ["u-himix", "u"]),
    ("HMGen alone keeps images, within 2 points", IMAGES, 2, ["g-hmgen", "g"]),
    ("joint training adds more held-out pairs without reduction than with it (share all)", HELD_OUT,
     0, ["joint", "u", "share-all", "u-himix"]),
    ("joint training adds more held-out pairs without reduction than with it (share partial)",
     HELD_OUT, 0, ["joint", "u", "share-partial", "u-himix"]),
    ("share all loses held-out pairs", HELD_OUT, 0, ["joint", "share-all"]),
    ("freezing + HMGen with practice has more held-out pairs than share all", HELD_OUT, 0,
     ["freeze-hmgen-practice", "share-all"]),
    ("generation alone gains unseen objects by practice", UNSEEN, 0, ["g-practice", "g"]),
]


# Differences that the table shows beside those of the claims: {row: other rows}.
COMPARED = {
    "joint": ["u", "g", "u-image-loss"],
    "u-himix": ["u", "u-image"],
    "g-hmgen": ["g", "g-image"],
    "g-naive": ["g"],
    "share-all": ["joint", "u-himix", "g-hmgen"],
    "share-partial": ["joint", "u-himix", "g-hmgen", "share-all"],
    "deep-leave-10": ["deep"],
    "u-long": ["u", "joint"],
    "u-describe": ["u"],
    "u-image": ["u"],
    "u-image-loss": ["u"],
    "joint-image-loss": ["joint", "u-image-loss"],
    "joint-shuffled": ["u", "joint"],
    "g-practice": ["g"],
    "joint-practice": ["joint", "u", "g-practice"],
    "share-all-practice": ["share-all"],
    "u-freeze": ["u", "u-himix"],
    "freeze-hmgen-practice": ["joint", "joint-practice", "share-all", "share-all-practice",
                              "u", "u-freeze"],
}


class Described(data.Shapes):
    """Understanding's first question on each training picture asks for all that is in it."""

    def split(self, task, part, n, seed=0, questions=10):
        split = super().split(task, part, n, seed, questions)
        if (task, part) == ("und", "train"):
            for scene, asked in zip(split.scenes, split.questions):
                caption = self.caption(FirstChoice(), scene, "scene").text
                asked.insert(0, data.Question("describe it", caption, "question"))
        return split


class Shuffled(data.Shapes):
    """Generation's training captions stand beside the wrong pictures."""

    def split(self, task, part, n, seed=0, questions=10):
        split = super().split(task, part, n, seed, questions)
        if (task, part) == ("gen", "train"):
            random.Random(f"{seed} shuffled").shuffle(split.captions)
        return split


class FirstChoice(random.Random):
    def choice(self, options):
        return options[0]


WORLDS = {"u-describe": Described, "joint-shuffled": Shuffled}
# Steps, as a multiple of the others': a joint step costs .94 + .52 GFLOP a picture, one of
# understanding .94.
STEPS = {"u-long": 1.56}
# Text tokens beside the most of the preset: a description takes no question's place.
ROOM = {"u-describe": 25}
# Sizes, where they are not the preset's.
SIZE_KEYS = "layers", "width", "heads", "max_text"
SEVEN, TWELVE = {"layers": 7}, {"layers": 12, "width": 96, "heads": 3}
SIZES = {"g-deep": SEVEN, "g-deep-hmgen": SEVEN,
         "deep": TWELVE, "deep-leave-10": TWELVE}


# ---------------------------------------------------------------------- training

def check_finished(out, options):
    """Refuses a finished run of another size or objective: it would stand in one table with the
    others."""
    if (out / "eval.json").exists():
        config = json.loads((out / "eval.json").read_text())["config"]
        for key in ("preset", "steps", "batch_size", "image_loss", *SIZE_KEYS):
            if key in config and config[key] != options.get(key):
                fail(f"{out} was trained with {key} {config[key]}: expected {options.get(key)}, "
                     "or give another folder")


def train_row(out, options, at_inference, device):
    """What one run lacks: its training, its scores, its scores under another plan. Finished parts
    are left alone, and so is a run that another process is at."""
    with exclusive(out) as alone:
        if not alone:
            return
        if not (out / "eval.json").exists():
            print(f"\n{out}", flush=True)
            checkpoint = None
            if (out / "checkpoint.pt").exists():
                checkpoint, options = train.resume(options, options)    # all must be as it was
            train.check(options)
            train.train(options, device, checkpoint, go_on="the same command")
        if at_inference and not (out / "eval-inference.json").exists():
            model, tokenizer, checkpoint = load_run(out, device)
            changed = {**options, **at_inference}
            plans = plans_of(checkpoint["tasks"], changed, model.config.layers)
            dataset = data.load(options["data"], options["preset"])
            scores, shown = evaluate(model, tokenizer, changed, checkpoint["step"], dataset, plans)
            save_scores(scores, shown, out, "-inference")


# ---------------------------------------------------------------------- the table

def value(scores, path):
    """One number of eval.json, or None: a run has the scores of its own tasks only."""
    for key in path:
        scores = scores.get(key) if isinstance(scores, dict) else None
    return scores


def numbers(runs, path, factor):
    """One number of each run that has it."""
    return [factor * x for x in (value(run, path) for run in runs.values()) if x is not None]


def mean_std(values, digits, sign=""):
    """Mean ± standard deviation, with a sign if it is "+"; the mean alone where all values are the
    same."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def cell(runs, path, factor, digits):
    """Mean ± standard deviation over seeds of one number; "–" where there is none."""
    found = numbers(runs, path, factor)
    return mean_std(found, digits) if found else "–"


def markdown(titles, rows, left=1):
    """A table in Markdown, its first `left` columns to the left, the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (titles, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def t_tail(t, freedom):
    """P(T > t) of Student's t, by integrating its density."""
    angle = np.linspace(math.atan(t / freedom ** .5), math.pi / 2, 20_001)
    # The angle whose tangent is T / sqrt(freedom) has a density that is a power of its cosine.
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - .5 * math.log(math.pi)
    density = math.exp(log_scale) * np.cos(angle) ** (freedom - 1)
    return float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(angle)))


def differences_of(found, path, row, other_row, *two_more, factor=100):
    """Row less other row, in points (times `factor`), of one seed after the other: runs of one
    seed share data and order. Of the first SEEDS that all have. Four rows: less the difference of
    the last two."""
    rows = [found.get(name, {}) for name in (row, other_row, *two_more)]
    differences = []
    for seed in sorted(set.intersection(*(set(runs) for runs in rows)))[:SEEDS]:
        values = [value(runs[seed], path) for runs in rows]
        if None not in values:
            signs = (1, -1, -1, 1)
            differences.append(factor * sum(sign * x for sign, x in zip(signs, values)))
    return differences


def p_values(differences, points):
    """One-sided p of a claim (small: it holds), and of its opposite (small: it does not hold)."""
    n, mean = len(differences), statistics.mean(differences)
    error = max(statistics.stdev(differences), 1e-9) / n ** .5
    holds = t_tail((mean + points) / error, n - 1)
    return holds, 1 - holds


def spread(differences):
    """Mean ± standard deviation, with signs; "–" of fewer than two."""
    return mean_std(differences, 1, "+") if len(differences) > 1 else "–"


def answer_claims(found):
    """[[claim, mean difference in points, its standard deviation, seeds, p, answer]] of the claims
    that have two seeds. p is two-sided and corrected by Holm over all CLAIMS; a claim that has not
    all SEEDS yet counts there as the last, and has neither p nor answer."""
    answers = []
    for claim, path, points, rows in CLAIMS:
        differences = differences_of(found, path, *rows)
        n = len(differences)
        if n < 2:
            continue
        p, answer = None, f"{n} of {SEEDS} seeds"
        if n == SEEDS:
            holds, fails = p_values(differences, points)
            p = min(1., 2 * min(holds, fails))
            answer = "holds" if holds < fails else "does not hold"
        answers.append([claim, statistics.mean(differences), statistics.stdev(differences), n, p,
                        answer])
    least = 0.
    with_p = [answer for answer in answers if answer[4] is not None]
    for i, answer in enumerate(sorted(with_p, key=lambda answer: answer[4])):
        least = answer[4] = max(least, min(1., (len(CLAIMS) - i) * answer[4]))
        if answer[4] > .05:
            answer[5] = "undecided"
    return answers


def read_runs(folder):
    """{row: {seed: scores}} of the finished runs in a folder, of ROWS alone; scores under another
    plan as a row of their own, "ROW-inference", without a cost of training."""
    found, unknown = defaultdict(dict), set()
    for file in sorted(folder.glob("*-seed*/eval*.json")):
        name, seed = file.parent.name.rsplit("-seed", 1)
        if name not in ROWS:
            unknown.add(name)
            continue
        name += file.stem.removeprefix("eval")
        found[name][int(seed)] = json.loads(file.read_text())
    if unknown:
        print(f"left out, because no such rows are known: {', '.join(sorted(unknown))}")
    for name, runs in found.items():
        for seed, scores in runs.items():
            if name.endswith("-inference"):
                del scores["cost"]                          # of steps that nobody took
                continue
            dense = found.get(DENSE[scores["config"]["objective"]], {})
            if dense and name not in SIZES:                 # of another seed, if need be
                dense = dense.get(seed) or next(iter(dense.values()))
                scores["cost"]["flops_ratio"] = training_flops(scores) / training_flops(dense)
    return found


def training_flops(scores):
    """Of all steps. Rows differ in their number, and in the length of their sequences."""
    return scores["cost"]["flops_per_step"] * scores["config"]["steps"]


def make_table(folder):
    """Prints the table of all finished runs in a folder, and writes it beside all their scores."""
    found = read_runs(folder)
    if not found:
        fail(f"{folder}: no finished run in it (expected folders ROW-seedN with an eval.json)")
    titles = {name: title for name, (title, _) in ROWS.items()}
    for name, (title, _) in AT_INFERENCE.items():
        titles[f"{name}-inference"] = f"{titles[name]}, {title}"
    rows = []
    for name in [name for name in titles if name in found]:
        seeds = ", ".join(map(str, sorted(found[name])))
        cells = [cell(found[name], *column[1:]) for column in COLUMNS]
        rows.append([titles[name], seeds, *cells, *PAPER.get(name, ("–",) * 3)])
    parts = [markdown(["run", "seeds", *(column[0] for column in COLUMNS), "paper: GQA",
                       "paper: FID ↓", "paper: FLOPs"], rows)]
    for task, kinds, accuracy in (("und", data.QUESTION_KINDS, "accuracy"),
                                  ("gen", data.CAPTION_FIELDS, "image_accuracy")):
        rows = []
        for name in [name for name in titles if name in found]:
            cells = [cell(found[name], (task, "by_type", kind, accuracy), 100, 1) for kind in kinds]
            if set(cells) != {"–"}:
                rows.append([titles[name], *cells])
        parts.append(markdown([f"right by kind, {task}, %", *kinds], rows))
    rows = []
    for one, others in COMPARED.items():
        for other in others:
            each = [differences_of(found, path, one, other) for _, path, *_ in COLUMNS[:4]]
            if any(len(differences) > 1 for differences in each):
                rows.append([f"{one} less {other}", max(map(len, each)), *map(spread, each)])
    if rows:
        parts.append(markdown(["points", "seeds", *(column[0] for column in COLUMNS[:4])], rows))
    answers = []
    for claim, mean, deviation, n, p, answer in answer_claims(found):
        p = "–" if p is None else f"{p:.1g}"
        answers.append([claim, f"{mean:+.1f} ± {deviation:.1f}", n, p, answer])
    if answers:
        parts.append(markdown(["claim", "points", "seeds", "p, corrected", ""], answers))
    every = [scores for runs in found.values() for scores in runs.values()]
    machines = " / ".join(sorted({scores["hardware"] for scores in every}))
    config = every[0]["config"]
    steps = sorted({scores["config"]["steps"] for scores in every})
    parts.append(f"Mean ± standard deviation over seeds; preset {config['preset']}, "
                 f"{' or '.join(map(str, steps))} steps of {config['batch_size']} pictures of each "
                 f"task; {machines}.")
    path = RESULTS / f"{folder.resolve().name}-{config['preset']}"
    write_file(f"{path}.md", "\n\n".join(parts) + "\n")
    write_file(f"{path}.json", json.dumps({"titles": titles, "runs": found}))
    draw_rows(titles, found, f"{path}.png")
    draw_tradeoff(titles, found, f"{path}-flops.png")
    print("\n\n".join(parts) + f"\n\n{path}.md, .json, .png, -flops.png")


def rows_drawn(found):
    """Names of the rows in pictures. Not those at inference only, which are far below; and two dots
    beside eight would look more certain than they are."""
    most = max(map(len, found.values()))
    return [name for name in ROWS if 2 * len(found.get(name, ())) >= most]


def draw_rows(titles, found, path):
    """The table as a picture: a line for each row, a dot for each seed, a tick at their mean. A
    seed before the axis is an open dot at its edge; where the mean is there, it alone is told."""
    font, line, top, left, width, gap = ImageFont.load_default(24), 44, 120, 720, 290, 90
    names = rows_drawn(found)
    size = left + len(PANELS) * (width + gap), top + line * len(names)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left - 40, 64), "FLOPs", "black", font, anchor="rm")
    for row, name in enumerate(names):
        y = top + line * row
        flops = statistics.mean(numbers(found[name], ("cost", "flops_ratio"), 1))
        draw.text((left - 130, y), titles[name], "black", font, anchor="rm")
        draw.text((left - 40, y), f"{flops:.2f}", "black", font, anchor="rm")
    for panel, ((title, score, factor, _), (colour, lowest)) in enumerate(zip(COLUMNS, PANELS)):
        x0 = left + panel * (width + gap)
        draw.text((x0, 24), title, "black", font, anchor="lm")

        def at(percent):
            return x0 + (max(percent, lowest) - lowest) / (100 - lowest) * width

        for percent in np.linspace(lowest, 100, 3):
            draw.text((at(percent), 64), f"{percent:.0f}", "grey", font, anchor="mm")
            draw.line((at(percent), 88, at(percent), sheet.height), fill="lightgrey", width=2)
        for row, name in enumerate(names):
            y, points = top + line * row, numbers(found[name], score, factor)
            mean = statistics.mean(points) if points else None
            if points and mean < lowest:
                draw.text((x0, y), f"mean {mean:.0f}", colour, font, anchor="lm")
                continue
            for i, x in enumerate(points):
                dot = at(x), y + 3 * (i - len(points) / 2)      # seeds do not hide each other
                fill = colour if x >= lowest else "white"
                draw.circle(dot, 7, fill=fill, outline=colour)
            if points:
                draw.line((at(mean), y - 17, at(mean), y + 17), fill="black", width=3)
    save_picture(sheet, path)


def draw_tradeoff(titles, found, path):
    """Quality against FLOPs: for each joint row its mean, and a line of one standard deviation to
    both sides; what a task has alone, without reduction, as a level line. FLOPs are all of
    training, relative to dense joint training."""
    font, big = ImageFont.load_default(22), ImageFont.load_default(26)
    width, height, top, left, gap = 620, 480, 100, 90, 130
    names = [name for name in rows_drawn(found) if "objective" not in ROWS[name][1]]
    colours = dict(zip(names, cycle(("black", "firebrick", "darkorange", "royalblue", "seagreen",
                                     "purple", "grey"))))
    sheet = Image.new("RGB", (2 * (left + width) + gap, top + height + 140 + 34 * len(names)),
                      "white")
    draw = ImageDraw.Draw(sheet)
    for panel, (alone, (title, score, factor, _)) in enumerate((("u", COLUMNS[1]),
                                                                ("g", COLUMNS[3]))):
        x0 = left + panel * (left + width + gap // 2)
        lowest = 40 if alone == "u" else 0

        def at(flops, percent):
            y = top + height * (100 - percent) / (100 - lowest)
            return x0 + width * (flops - .6) / .45, y

        draw.text((x0, 40), title, "black", big, anchor="lm")
        for percent in range(lowest, 101, 20):
            draw.line((at(.6, percent), at(1.05, percent)), fill="lightgrey", width=2)
            draw.text((x0 - 14, at(.6, percent)[1]), str(percent), "grey", font, anchor="rm")
        for flops in (.6, .7, .8, .9, 1.):
            draw.text((at(flops, lowest)[0], top + height + 24), f"{flops:.1f}", "grey", font,
                      anchor="mm")
        draw.text((x0 + width / 2, top + height + 58),
                  "FLOPs of training, dense joint = 1; bars: ± one standard deviation",
                  "grey", font, anchor="mm")
        draw.text((x0 + width / 2, top + height + 88),
                  "(points are moved sideways by .012 at most)", "grey", font, anchor="mm")
        if alone in found:
            mean = statistics.mean(numbers(found[alone], score, factor))
            draw.line((at(.6, mean), at(1.05, mean)), fill="grey", width=3)
            x, y = at(.86, mean)
            draw.text((x, y - 14), f"{titles[alone]}, dense", "grey", font, anchor="mm")
        for name in names:
            points = numbers(found[name], score, factor)
            if not points:
                continue
            mean, side = statistics.mean(points), names.index(name) % 4 - 1.5
            deviation = statistics.stdev(points) if len(points) > 1 else 0.
            flops = statistics.mean(numbers(found[name], ("cost", "flops_ratio"), 1))
            # Rows with as many FLOPs stand beside each other.
            flops += .008 * side
            least, most = max(lowest, mean - deviation), min(100, mean + deviation)
            draw.line((at(flops, least), at(flops, most)),
                      fill=colours[name], width=4)
            draw.circle(at(flops, mean), 9, fill=colours[name])
    for row, name in enumerate(names):
        y = top + height + 130 + 34 * row
        draw.circle((left + 10, y), 9, fill=colours[name])
        draw.text((left + 32, y), titles[name], "black", font, anchor="lm")
    save_picture(sheet, path)


def draw_samples(folder, device):
    """Pictures that each row draws under the same seven captions, one of each kind: a line for each
    row, from its first seed that has a checkpoint."""
    pictures, texts = [], []
    for name, (title, changes) in ROWS.items():
        trained = [out for out in sorted(folder.glob(f"{name}-seed*"))
                   if (out / "eval.json").exists() and (out / "checkpoint.pt").exists()]
        if trained and changes.get("objective") != "und":
            model, tokenizer, checkpoint = load_run(trained[0], device)
            options = checkpoint["options"]
            dataset = data.load(options["data"], options["preset"])
            captions = [c.text for c in dataset.split("gen", "val", 7, questions=0).captions]
            plan = plans_of(["gen"], options, model.config.layers)["gen"]
            pictures.append(draw_pictures(model, tokenizer, captions, plan, sampling_of(options)))
            texts += [f"{title}:\n{caption}" for caption in captions]
    if pictures:
        path = RESULTS / f"{folder.resolve().name}-{options['preset']}-samples.png"
        contact_sheet(np.concatenate(pictures), texts, path, columns=7)
        print(path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="train seeds 1 to SEEDS (default: 1)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--preset", choices=data.PRESETS, help="default: what fits the device")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--tokenizer", help="default: out/tokenizer.pt")
    args = parser.parse_args()
    device = pick_device(args.device)
    # A plan of this table's own: image tokens leave after layer 10.
    PLANS["leave-10"] = lambda layers, k: ((FULL,) * 10 + (SHALLOW,) * layers)[:layers]
    shared = {key: getattr(args, key) for key in ("preset", "steps", "tokenizer")
              if getattr(args, key) is not None}
    usual = train.complete(shared, device)
    sizes = data.PRESETS[usual["preset"]]
    usual_sizes = {key: getattr(sizes, key) for key in SIZE_KEYS}
    if args.seeds > 0:
        train.get_tokenizer(usual, data.load("shapes", usual["preset"]), device)
    for seed in range(1, args.seeds + 1):
        for name in args.rows:
            out = args.folder / f"{name}-seed{seed}"
            of_row = {**usual_sizes, **SIZES.get(name, {})}
            of_row["max_text"] += ROOM.get(name, 0)
            for key, size in of_row.items():
                setattr(sizes, key, size)       # in the preset: every part of a run looks there
            given = {**shared, **ROWS[name][1], "seed": seed, "out": str(out)}
            options = train.complete(given, device)
            options["steps"] = round(STEPS.get(name, 1) * options["steps"])
            options |= of_row                   # for check_finished: eval.json keeps all options
            check_finished(out, options)
            world = WORLDS.get(name, data.Shapes)
            data.load = lambda source, preset: world(preset)        # every part of a run calls it
            torch.compiler.reset()                          # else the code of every row stays
            train_row(out, options, AT_INFERENCE.get(name, ("", {}))[1], device)
    make_table(args.folder)
    draw_samples(args.folder, device)


if __name__ == "__main__":
    run_script(main)
