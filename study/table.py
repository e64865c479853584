"""Many runs: the paper's rows and their controls. Trains what is missing, then makes the table.

    python study/table.py out/table --seeds 3                   every row, seeds 1 to 3
    python study/table.py out/table --seeds 8 --rows u joint    some rows
    python study/table.py out/table --seeds 0       no training: the table of what is there
    python study/table.py out/slow --rows u --first 10 --lr .005    options of train.py for all rows

It continues where it stopped, and may run in several processes, one per core
(OMP_NUM_THREADS=1): each takes rows that no other has. Seeds count from 1: settings are chosen on
0 and 10 to 12 (captions, steps, temperature on 2, too). To resume a run, start this again: train.py
knows nothing of rows' own worlds and sizes. Writes study/results/FOLDER-PRESET.md from eval.json.
"""
import json
import math
import random
import sys
from collections import defaultdict
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

try:
    import fcntl
except ImportError:                         # Windows: one process, then
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (fail, line_chart, pick_device, run_script, save_picture, script_parser,
                    write_file)

import numpy as np
import torch

import conflict
import data
from data import PRESETS, usual_preset
from eval import evaluate
from model import load_run
from prune import FREEZE, FULL, HIMIX, PLANS, SHALLOW, plans_of
from shapes import Shapes
from tokenizer import get_tokenizer
from train import parse_options, train

RESULTS = ROOT / "study" / "results"

# Each row: its title, and the options of train.py by which it differs from joint dense training.
ROWS = {
    # the paper's, and one with all weights shared
    "u": ("understanding only", "--objective und"),
    "g": ("generation only", "--objective gen"),
    "joint": ("joint", ""),
    "u-himix": ("understanding only, HiMix",
                "--objective und --und-plan himix --projections image"),
    "g-hmgen": ("generation only, HMGen", "--objective gen --gen-plan hmgen --projections image"),
    "share-weights": ("joint, HiMix + HMGen, all weights shared",
                      "--und-plan himix --gen-plan hmgen"),
    # What is most likely the paper's share all: sec. 6.2 splits *the image projections* by task.
    "share-image": ("joint, HiMix + HMGen, one set of image projections",
                    "--und-plan himix --gen-plan hmgen --projections image"),
    "share-partial": ("joint, HiMix + HMGen, share partial",
                      "--und-plan himix --gen-plan hmgen --projections task"),
    "g-naive": ("generation only, naive control in the middle", "--objective gen --gen-plan naive"),
    # controls
    "u-long": ("understanding only, as many FLOPs as joint", "--objective und"),
    "joint-unexposed": ("joint, held-out pairs withheld from generation, too",
                        "--data unexposed"),
    "joint-shuffled": ("joint, captions shuffled", "--data shuffled"),
    "u-image-loss": ("understanding only, predicts its pictures, too",
                     "--objective und --image-loss"),
    "joint-image-loss": ("joint, understanding predicts its pictures, too", "--image-loss"),
    "share-weights-practice": ("joint, HiMix + HMGen, all weights shared, with practice",
                               "--und-plan himix --gen-plan hmgen --practice"),
    "joint-practice": ("joint, with practice", "--practice"),
    "g-practice": ("generation only, with practice", "--objective gen --practice"),
    "u-image": ("understanding only, own projections", "--objective und --projections image"),
    "g-image": ("generation only, own projections", "--objective gen --projections image"),
    "deep": ("joint, twelve narrow layers", ""),
    "deep-leave-10": ("joint, twelve narrow layers, image leaves understanding after 10",
                      "--und-plan leave-10"),
    # beyond the paper
    "u-freeze": ("understanding only, freeze", "--objective und --und-plan freeze"),
    "freeze-hmgen": ("joint, freeze + HMGen", "--und-plan freeze --gen-plan hmgen"),
    "freeze-hmgen-practice": ("joint, freeze + HMGen, with practice",
                              "--und-plan freeze --gen-plan hmgen --practice"),
}
# The row that others of this objective are compared with.
DENSE = {"und": "u", "gen": "g", "joint": "joint"}
# Trained rows that are scored once more under a plan they were not trained with (cf. fig. 5).
AT_INFERENCE = {"u": ("HiMix at inference only", {"und_plan": "himix"}),
                "g": ("HMGen at inference only", {"gen_plan": "hmgen"})}
# Where numbers stand in eval.json, and the table's columns: title, number, factor, digits.
QUESTIONS, HELD_OUT = ("und", "accuracy"), ("und", "held_out_accuracy")
IMAGES, UNSEEN = ("gen", "image_accuracy"), ("gen", "unseen_object_accuracy")
COLUMNS = [("questions right, %", QUESTIONS, 100, 1), ("held-out pairs, %", HELD_OUT, 100, 1),
           ("images right, %", IMAGES, 100, 1), ("unseen objects, %", UNSEEN, 100, 1),
           ("FLOPs", ("cost", "flops_ratio"), 1, 2)]

# The claims that the study decides, written down before their runs, in study/results/CLAIMED:
# (claim, score, points, rows). A claim holds if the first row scores more than the second minus
# these points. With four rows, it holds if the first pair differs by more than the second.
CLAIMED = "band"
SEEDS = 8       # of a claim, neither more nor fewer: else one could stop at a lucky moment
CLAIMS = [
    ("joint training helps with held-out pairs", HELD_OUT, 0, ["joint", "u"]),
    ("... for equal FLOPs, too", HELD_OUT, 0, ["joint", "u-long"]),
    ("... if generation lacks the held-out pairs, too", HELD_OUT, 0, ["joint-unexposed", "u"]),
    ("joint training keeps images, within 2 points", IMAGES, 2, ["joint", "g"]),
    ("HiMix alone keeps held-out pairs, within 5 points", HELD_OUT, 5, ["u-himix", "u"]),
    ("HMGen alone keeps images, within 2 points", IMAGES, 2, ["g-hmgen", "g"]),
    ("joint training adds more held-out pairs without reduction than with it (one set of image "
     "projections)", HELD_OUT, 0, ["joint", "u", "share-image", "u-himix"]),
    ("joint training adds more held-out pairs without reduction than with it (share partial)",
     HELD_OUT, 0, ["joint", "u", "share-partial", "u-himix"]),
    ("share partial has fewer questions right than HiMix alone", QUESTIONS, 0,
     ["u-himix", "share-partial"]),
    ("freeze + HMGen with practice has more held-out pairs than HiMix + HMGen (one set of image "
     "projections)", HELD_OUT, 0, ["freeze-hmgen-practice", "share-image"]),
]
# Differences that the table shows beside those of the claims: {row: other rows}.
COMPARED = {
    "joint": "u g u-image-loss", "u-himix": "u u-image", "g-hmgen": "g g-image", "g-naive": "g",
    "share-weights": "joint u-himix g-hmgen", "share-image": "joint u-himix g-hmgen",
    "share-partial": "joint u-himix g-hmgen share-weights share-image",
    "joint-unexposed": "joint u", "deep-leave-10": "deep", "u-long": "u joint", "u-image": "u",
    "u-image-loss": "u", "joint-image-loss": "joint u-image-loss", "joint-shuffled": "u joint",
    "g-practice": "g", "joint-practice": "joint u g-practice",
    "share-weights-practice": "share-weights", "u-freeze": "u u-himix",
    "freeze-hmgen-practice": "joint joint-practice share-weights share-weights-practice "
                             "share-image u u-freeze"}


# ---------------------------------------------------------------------- what some rows have alone

class Unexposed(Shapes):
    """Generation lacks understanding's held-out pairs in training, too: nothing but the image
    tokenizer, which all rows of a seed share, sees them. (Nor has it as many pairs as before.)"""

    def split(self, task, part, *more, **named):
        usual = self.held_out["gen"]
        if (task, part) == ("gen", "train"):
            self.held_out["gen"] = usual | self.held_out["und"]
        split = super().split(task, part, *more, **named)
        self.held_out["gen"] = usual
        return split


class Shuffled(Shapes):
    """Generation's training captions stand beside the wrong pictures."""

    def split(self, task, part, n, seed=0, questions=10):
        split = super().split(task, part, n, seed, questions)
        if (task, part) == ("gen", "train"):
            random.Random(f"{seed} shuffled").shuffle(split.captions)
        return split


WORLDS = {"shuffled": Shuffled, "unexposed": Unexposed}
# Steps, as a multiple of the others': a joint step of the cpu preset costs .94 + .52 GFLOP a
# picture, one of understanding .94.
STEPS = {"u-long": 1.56}
TWELVE = {"layers": 12, "width": 96, "heads": 3}           # other sizes than the cpu preset's
SIZES = {"deep": TWELVE, "deep-leave-10": TWELVE}
# Plans of this table's own. Image tokens leave after layer 10:
PLANS["leave-10"] = lambda layers, k: ((FULL,) * 10 + (SHALLOW,) * layers)[:layers]
# HiMix, but text reads the image as it is after layer n (0 is HiMix's plan, 1 freeze, 12 dense).
LOOK = 0, 1, 2, 4, 8, 12
for n in LOOK:
    PLANS[f"look-{n}"] = lambda layers, k, n=n: (
        (FULL,) * n + (FREEZE if n else HIMIX,) * layers)[:layers]
    for task, objective in (("u", "--objective und"), ("joint", "")):
        ROWS[f"{task}-look-{n}"] = (f"{task}, twelve narrow layers, HiMix after layer {n}",
                                    f"{objective} --und-plan look-{n}")
        SIZES[f"{task}-look-{n}"] = TWELVE
    COMPARED[f"joint-look-{n}"] = f"u-look-{n}"


# ---------------------------------------------------------------------- training

def load(source, preset, usual=data.load):
    """data.load with WORLDS, too. So train.py alone refuses to resume a run in one of them."""
    return WORLDS[source](preset) if source in WORLDS else usual(source, preset)


data.load = load


@contextmanager
def lock(path, wait=False):
    """Whether this process alone has the lock of a path, a file beside it. The system releases it
    when a process ends, in whatever way."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True


def open_run(folder, device, source=None):
    """A trained run: model, tokenizer, checkpoint, its data set (source: where that is now, if it
    has been moved), its plans. Writes its sizes into its preset, where data sets look."""
    model, tokenizer, checkpoint = load_run(folder, device)
    options = checkpoint["options"]
    made_with = {row: size for row, size in checkpoint["made_with"].items() if row != "data"}
    vars(PRESETS[options["preset"]]).update(made_with)
    plans = plans_of(checkpoint["tasks"], options, model.config.layers)
    return model, tokenizer, checkpoint, data.load_of_run(checkpoint, source), plans


def train_run(out, steps, arguments):
    """Trains and scores one run, if it has no scores yet. arguments(): options of train.py. A
    finished run of another length is refused: it would stand in one table with the others."""
    scores = out / "eval.json"
    config = json.loads(scores.read_text())["config"] if scores.exists() else {}
    if not scores.exists() or config["step"] != config["steps"]:        # or scored half-way
        print(f"\n{out}", flush=True)
        torch.compiler.reset()                              # else the code of every run stays
        where = "--resume" if (out / "checkpoint.pt").exists() else "--out"
        train(*parse_options([*map(str, arguments()), "--steps", str(steps), where, str(out)]))
    elif config["steps"] != steps:
        fail(f"{out} was trained for {config['steps']} steps: expected {steps}")


def train_rows(folder, rows, args, preset, arguments, score):
    """Trains and scores what is missing of `rows` in a folder, each with its own sizes and world.
    arguments(seed): of train.py, for all. score(run, row): further scores."""
    usual_sizes, steps = dict(vars(PRESETS[preset])), args.steps or PRESETS[preset].steps
    for seed, name in product(range(args.first, args.first + args.seeds), args.rows):
        out = folder / f"{name}-seed{seed}"
        vars(PRESETS[preset]).update(usual_sizes | SIZES.get(name, {}))
        with lock(out) as is_mine:
            if is_mine:
                with conflict.measured(out, name if rows is ROWS else None, seed, steps):
                    train_run(out, round(STEPS.get(name, 1) * steps), lambda: [
                        "--preset", preset, "--seed", seed, *rows[name][1].split(),
                        *arguments(seed)])
                score(out, name)


# ---------------------------------------------------------------------- numbers of many runs

def value(scores, path):
    """One number of eval.json, or None: a run has the scores of its own tasks only."""
    for key in path:
        scores = (scores or {}).get(key)
    return scores


def numbers(runs, path, factor):
    return [factor * x for x in (value(run, path) for run in runs.values()) if x is not None]


def mean_std(values, digits, sign=""):
    """Mean ± standard deviation, with a sign if it is "+"; the mean alone where all values are the
    same; "–" where there are none."""
    if not values:
        return "–"
    spread = f" ± {stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{fmean(values):{sign}.{digits}f}{spread}"


def cell(runs, path, factor, digits):
    return mean_std(numbers(runs, path, factor), digits)


def markdown(titles, rows, left=1):
    """A table in Markdown, its first `left` columns to the left, the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (titles, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def read_runs(folder, rows=tuple(ROWS)):
    """{row: {seed: scores}} of the finished runs in a folder; scores under another plan as a row of
    their own, "ROW-inference", without a cost of training. FLOPs are those of all steps, beside
    those of the dense row, because rows differ in steps and in the length of sequences."""
    found = defaultdict(dict)
    for file in sorted(folder.glob("*-seed*/eval*.json")):
        name, seed = file.parent.name.rsplit("-seed", 1)
        if name in rows:
            scores = json.loads(file.read_text())
            found[name + file.stem.removeprefix("eval")][int(seed)] = scores
        else:
            print(f"left out, because no such row is known: {file.parent}")
    every = [scores["config"] for runs in found.values() for scores in runs.values()]
    worlds = {config.get("identity") for config in every}
    if len(worlds) > 1:
        fail(f"{folder}: expected runs on the same data, not on {worlds}")

    def flops(scores):
        return scores["cost"]["flops_per_step"] * scores["config"]["steps"]

    for name, runs in found.items():
        for seed, scores in runs.items():
            dense = found.get(DENSE[scores["config"]["objective"]], {})
            if name.endswith("-inference"):
                del scores["cost"]                          # of steps that nobody took
            elif dense and "layers" not in SIZES.get(name, {}):
                dense = dense.get(seed) or next(iter(dense.values()))       # of another seed
                scores["cost"]["flops_ratio"] = flops(scores) / flops(dense)
    return found


# ---------------------------------------------------------------------- claims

def differences_of(found, path, row, other_row, *two_more, factor=100):
    """Row minus other row, in points (times `factor`), seed by seed: runs of one seed share data
    and order. Only the first SEEDS that all have. Four rows: minus the difference of the last
    two."""
    rows = [found.get(name, {}) for name in (row, other_row, *two_more)]
    seeds = sorted(set.intersection(*map(set, rows)))[:SEEDS]
    values = [[value(runs[seed], path) for runs in rows] for seed in seeds]
    return [factor * sum(sign * x for sign, x in zip((1, -1, -1, 1), of_seed))
            for of_seed in values if None not in of_seed]


def p_value(differences, points):
    """One-sided p of a claim: small if it holds, nearly 1 if it does not. It is P(T > t) of
    Student's t, integrated over an angle whose density is a power of its cosine."""
    n, deviation = len(differences), max(stdev(differences), 1e-9)
    t = (fmean(differences) + points) / deviation * n ** .5
    angle = np.linspace(math.atan(t / (n - 1) ** .5), math.pi / 2, 20_001)
    log_scale = math.lgamma(n / 2) - math.lgamma((n - 1) / 2) - .5 * math.log(math.pi)
    density = math.exp(log_scale) * np.cos(angle) ** (n - 2)
    return float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(angle)))


def answer_claims(found):
    """[[claim, mean difference in points, its standard deviation, seeds, p, answer]] of the claims
    that have two seeds. p is two-sided and corrected by Holm over all CLAIMS; a claim with fewer
    than SEEDS counts last there, and has neither p nor answer."""
    answers = []
    for claim, path, points, rows in CLAIMS:
        differences = differences_of(found, path, *rows)
        n = len(differences)
        if n < 2:
            continue
        p, answer = None, f"{n} of {SEEDS} seeds"
        if n == SEEDS:
            p = p_value(differences, points)
            p, answer = 2 * min(p, 1 - p), "holds" if p < .5 else "does not hold"
        answers.append([claim, fmean(differences), stdev(differences), n, p, answer])
    least, with_p = 0., [answer for answer in answers if answer[4] is not None]
    for i, answer in enumerate(sorted(with_p, key=lambda answer: answer[4])):
        least = answer[4] = max(least, min(1., (len(CLAIMS) - i) * answer[4]))
        if answer[4] > .05:
            answer[5] = "undecided"
    return answers


# ---------------------------------------------------------------------- the table

def kinds_table(titles, found, task, accuracy):
    """What is right of each kind of question ("und") or of caption ("gen")."""
    every = [scores.get(task, {}) for runs in found.values() for scores in runs.values()]
    kinds = dict.fromkeys(kind for scores in every for kind in scores.get("by_type", {}))
    rows = [[title, *(cell(found[name], (task, "by_type", kind, accuracy), 100, 1)
                      for kind in kinds)] for name, title in titles.items()]
    rows = [row for row in rows if set(row[1:]) - {"–"}]
    return markdown([f"right by kind, {task}, %", *kinds], rows)


def runs_rows(titles, found, columns):
    """A row for each row of runs: its title, its seeds, its scores."""
    return [[title, ", ".join(map(str, sorted(found[name]))),
             *(cell(found[name], *column[1:]) for column in columns)]
            for name, title in titles.items()]


def differences_table(found, compared, columns):
    """One row less another, {one: "others"}, in each column where both have numbers."""
    rows = []
    for one, other in [(one, other) for one in compared for other in compared[one].split()]:
        each = [differences_of(found, path, one, other, factor=factor)
                for _, path, factor, _ in columns]
        if any(len(differences) > 1 for differences in each):
            cells = [mean_std(x, digits, "+") for x, (*_, digits) in zip(each, columns)]
            rows.append([f"{one} minus {other}", max(map(len, each)), *cells])
    return rows and markdown(["difference", "seeds", *(column[0] for column in columns)], rows)


def make_table(folder):
    """Writes and prints the table of all finished runs in a folder."""
    found = read_runs(folder)
    if not found:
        fail(f"{folder}: no finished run in it (expected folders ROW-seedN with an eval.json)")
    titles = {name: title for name, (title, _) in ROWS.items()}
    titles |= {f"{name}-inference": f"{titles[name]}, {title}"
               for name, (title, _) in AT_INFERENCE.items()}
    titles = {name: title for name, title in titles.items() if name in found}
    answers = answer_claims(found) if folder.resolve().name == CLAIMED else []
    claims = [(claim, f"{mean:+.1f} ± {std:.1f}", n, "–" if p is None else f"{p:.2g}", answer)
              for claim, mean, std, n, p, answer in answers]
    every = [scores for runs in found.values() for scores in runs.values()]
    machines = " / ".join(sorted({scores["hardware"] for scores in every}))
    config = every[0]["config"]
    steps = sorted({scores["config"]["steps"] for scores in every})
    parts = [
        markdown(["run", "seeds", *(column[0] for column in COLUMNS)],
                 runs_rows(titles, found, COLUMNS)),
        kinds_table(titles, found, "und", "accuracy"),
        kinds_table(titles, found, "gen", "image_accuracy"),
        differences_table(found, COMPARED, COLUMNS[:4]),
        claims and markdown(["claim", "points", "seeds", "p, corrected", ""], claims),
        f"Mean ± standard deviation over seeds; preset {config['preset']}, "
        f"{' or '.join(map(str, steps))} steps of {config['batch_size']} pictures of each task; "
        f"{machines}."]
    path = RESULTS / f"{folder.resolve().name}-{config['preset']}.md"
    write_tables(parts, path)
    draw_look(found, path.with_suffix(".png"))


def draw_look(found, path):
    """Where joint training helps, a chart: held-out pairs right if text reads the image as it is
    after layer n, alone and jointly, against the FLOPs of joint training."""
    known = [n for n in LOOK if {f"u-look-{n}", f"joint-look-{n}"} <= {*found}]
    if len(known) > 1:
        joint, alone = ([found[f"{task}-look-{n}"] for n in known] for task in ("joint", "u"))
        seeds = set.intersection(*map(set, joint + alone))              # that all rows have
        flops, *right = ([fmean(value(runs[seed], score) for seed in seeds) for runs in rows]
                         for rows, score in ((joint, COLUMNS[-1][1]), (joint, HELD_OUT),
                                             (alone, HELD_OUT)))
        grid = np.linspace(flops[0], flops[-1], 200)
        lines = {title: np.interp(grid, flops, heights)
                 for title, heights in zip(("joint", "understanding only"), right)}
        title = (f"held-out pairs right, by FLOPs of joint training: {flops[0]:.2f} (image read "
                 f"after layer {known[0]}) to {flops[-1]:.2f} (layer {known[-1]})")
        save_picture(line_chart(lines, title, 0, 1, (700, 400)), path)


def write_tables(parts, path):
    text = "\n\n".join(filter(None, parts))
    write_file(path, text + "\n")
    print(f"{text}\n\n{path}")


def rows_parser(doc, rows, seeds):
    """For the options of a script that trains rows with seeds 1, 2, ..."""
    parser = script_parser(doc)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many (default: {seeds})")
    parser.add_argument("--first", type=int, default=1, help="first seed (default: 1)")
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW",
                        help=f"some of: {', '.join(rows)}")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    return parser


def main():
    parser = rows_parser(__doc__, ROWS, seeds=1)
    parser.add_argument("--und-colours", type=int, help="default: the preset's (data.COLUMNS)")
    args, more = parser.parse_known_args()
    if more and not args.seeds:
        fail(f"{' '.join(more)}: expected no options of train.py, because nothing is trained")
    device = pick_device(args.device)
    preset = args.preset or usual_preset(device)
    if args.und_colours is not None:
        PRESETS[preset].und_colours = args.und_colours
    data.check_preset(preset)

    def arguments(seed):
        path = args.folder.resolve() / f"tokenizer-seed{seed}.pt"
        with lock(path, wait=True):                         # one for all rows
            get_tokenizer(path, Shapes(preset), preset, device, seed)
        return ["--device", device.type, "--tokenizer", path, *more]

    def score_at_inference(out, name):
        if name in AT_INFERENCE and not (out / "eval-inference.json").exists():
            model, tokenizer, checkpoint, dataset, _ = open_run(out, device)
            options = checkpoint["options"] | AT_INFERENCE[name][1]
            plans = plans_of(checkpoint["tasks"], options, model.config.layers)
            evaluate(model, tokenizer, options, checkpoint["step"], dataset, plans, out,
                     "-inference")

    train_rows(args.folder, ROWS, args, preset, arguments, score_at_inference)
    make_table(args.folder)


if __name__ == "__main__":
    run_script(main)
