"""Photographs instead of drawn shapes: what are joint training and token reduction worth there?

    python study/photos.py FOLDER                   every row, seeds 1 to 3, and the table
    python study/photos.py FOLDER --seeds 1 --rows u joint          some rows
    python study/photos.py FOLDER --seeds 0         no more runs: the table of what is there
    python study/photos.py FOLDER --preset tiny --steps 20 --out out/try    every stage in minutes

FOLDER holds one folder of pictures for each class (CIFAR-10: 10 of 5,000 pictures). Understanding
answers "what is this?" with a class, generation draws a picture of a class. No checker reads a
photograph: drawn ones are judged by a small network that is trained on real ones. Two rows let
understanding see a few labelled pictures only, and generation as many as in the other rows: there,
one would think, joint training has most to give.

Like study/table.py it goes on where it stopped, and several processes share the work. Go on with
a stopped run by starting this again, not with train.py, which knows nothing of few labels. Writes
study/results/photos-PRESET.md, .json and -samples.png.
"""
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import (contact_sheet, exclusive, fail, pick_device, read_checkpoint, run_script,
                    save_checkpoint, save_picture, script_parser, write_file)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import table
import train
from eval import BATCH, draw_pictures
from match import output_losses
from model import load_run, understanding
from prune import plans_of, predicting
from table import RESULTS, cell, differences_of, markdown, mean_std
from tokenizer import score_tokenizer

# eval.SAMPLING draws pictures of a folder nearly greedily: right for captions of one picture each.
# A class's name stands for thousands, and would give the same picture every time.
SAMPLING = GUIDANCE, TEMPERATURE = 1.5, 1.
DRAWN = 100             # pictures of each class
FEW = 100               # labelled pictures of each class that understanding sees in the rows "-few"

ROWS = {name: table.ROWS[name] for name in ("u", "g", "joint", "share-all", "share-partial",
                                            "freeze-hmgen")}
ROWS |= {"u-few": ("understanding only, few labels", table.ROWS["u"][1]),
         "joint-few": ("joint, few labels in understanding", table.ROWS["joint"][1])}

# The table's columns: title, where the number stands in a run's scores, factor, digits.
COLUMNS = [("named, %", ("photos", "named"), 100, 1),
           ("drawn right, %", ("photos", "drawn_right"), 100, 1),
           ("Fréchet distance ↓", ("photos", "frechet"), 1, 2),
           ("bits an image token ↓", ("gen", "bits_per_token"), 1, 3),
           ("FLOPs", ("cost", "flops_ratio"), 1, 2)]
# Differences that the table shows: (row, the row beside it, the column).
DIFFERENCES = [("joint", "u", COLUMNS[0]), ("joint-few", "u-few", COLUMNS[0]),
               ("joint", "g", COLUMNS[1]), ("joint", "g", COLUMNS[2]), ("joint", "g", COLUMNS[3]),
               ("share-all", "joint", COLUMNS[0]), ("share-all", "u", COLUMNS[0]),
               ("share-all", "joint", COLUMNS[1]), ("freeze-hmgen", "joint", COLUMNS[0]),
               ("freeze-hmgen", "u", COLUMNS[0]), ("freeze-hmgen", "g", COLUMNS[1])]


class FewLabels(data.Folder):
    """Understanding trains on FEW pictures of each class. All else is as in the folder."""

    def __init__(self, folder):
        vars(self).update(vars(folder))             # the pictures are not read again

    def split(self, task, part, n, seed=0, questions=10):
        split = super().split(task, part, n, seed, questions)
        if (task, part) != ("und", "train"):
            return split
        seen, kept = Counter(), []
        for i, caption in enumerate(split.captions):
            seen[caption.text] += 1
            if seen[caption.text] <= FEW:
                kept.append(i)
        return data.Split(split.pixels[kept], [split.captions[i] for i in kept],
                          [split.questions[i] for i in kept])


# ---------------------------------------------------------------------- the classifier

WIDTHS = (32, 64, 128, 128)     # channels of its layers; the last are the features
EPOCHS = 10
CLASSIFIER_BATCH = 128
CLASSIFIER_RATE = .01


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers, channels = [], 3
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def features(self, pixels):
        """(B, H, W, 3) uint8 -> (B, WIDTHS[-1]): what the head sees, and Fréchet distances."""
        return self.body(pixels.permute(0, 3, 1, 2) / 127.5 - 1)

    def forward(self, pixels):
        return self.head(self.features(pixels))     # (B, classes) logits

    @torch.no_grad()
    def judge(self, pixels):
        """(N, H, W, 3) uint8 array -> features, a float64 array (N, WIDTHS[-1]), and classes
        (N,)."""
        features, classes = [], []
        for part in torch.as_tensor(pixels).split(500):
            features.append(self.features(part.to(self.head.weight.device)))
            classes.append(self.head(features[-1]).argmax(1))
        return torch.cat(features).cpu().double().numpy(), torch.cat(classes).cpu()


def train_classifier(pixels, labels, classes, device):
    """A Classifier of real pictures (N, H, W, 3) uint8 with labels (N,)."""
    torch.manual_seed(0)
    pixels, labels = torch.as_tensor(pixels).to(device), labels.to(device)
    network = Classifier(classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=.05)
    steps = EPOCHS * -(-len(pixels) // CLASSIFIER_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_RATE, steps)
    for _ in tqdm(range(steps), desc="classifier", unit="step"):
        chosen = torch.randint(len(pixels), (CLASSIFIER_BATCH,), device=device)
        batch = pixels[chosen]
        half = CLASSIFIER_BATCH // 2
        batch = torch.cat([batch[:half], batch[half:].flip(2)])         # half of them mirrored
        F.cross_entropy(network(batch), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


def get_classifier(path, dataset, names, preset, device):
    """The Classifier in a file. Trained on the training pictures and saved there if there is
    none."""
    made_for = {"data": dataset.identity, "preset": preset, "classes": names}
    if not path.exists():
        split = dataset.split("gen", "train", len(dataset.pixels))
        network = train_classifier(split.pixels, labels_of(split, names), len(names), device)
        save_checkpoint({"kind": "classifier", **made_for, "network": network.state_dict()}, path)
    checkpoint = read_checkpoint(path, "classifier")
    for key, expected in made_for.items():
        if checkpoint.get(key) != expected:
            fail(f"{path} was made for {key} {checkpoint.get(key)}, not {expected}: give another "
                 "--out")
    network = Classifier(len(names))
    network.load_state_dict(checkpoint["network"])
    return network.to(device, memory_format=torch.channels_last).eval()


def labels_of(split, names):
    return torch.tensor([names.index(caption.text) for caption in split.captions])


# ---------------------------------------------------------------------- scores

class Standard(NamedTuple):
    """What all runs are measured by."""
    names: list                 # of the classes
    question: str               # that asks for them
    pixels: np.ndarray          # (N, H, W, 3) uint8, all validation pictures
    labels: torch.Tensor        # (N,) which of `names` they show
    classifier: Classifier
    reference: np.ndarray       # (n, d) features of the last n: Fréchet distances are to these


def prepare(out, dataset, names, options, device):
    """The tokenizer and the classifier that all runs share. One process trains them, others
    wait."""
    waiting = False
    while True:
        with exclusive(out) as alone:
            if alone:
                classifier = get_classifier(out / "classifier.pt", dataset, names,
                                            options["preset"], device)
                return train.get_tokenizer(options, dataset, device), classifier
        if not waiting:
            print(f"waiting for the process that prepares {out}", flush=True)
        waiting = True
        time.sleep(5)


def score_real(dataset, names, tokenizer, classifier):
    """The Standard; how real pictures score by it, as they are and after the tokenizer, which is
    the best that drawn ones can reach; and one of each class of both: {title: (classes, H, W, 3)}.
    """
    scores, pixels, decoded = score_tokenizer(tokenizer, dataset, len(dataset.pixels))
    split = dataset.split("gen", "val", len(dataset.pixels))            # the same pictures
    labels = labels_of(split, names)
    features, guesses = classifier.judge(pixels)
    decoded_features, decoded_guesses = classifier.judge(decoded)
    # The distance of few pictures comes out too large. So as many of them as a run draws, if there
    # are enough, are compared with the others.
    n = min(DRAWN * len(names), len(labels) // 2)
    standard = Standard(names, split.questions[0][0].text, pixels, labels, classifier, features[n:])
    scores |= {"compared": n, "reference": len(labels) - n, "identity": dataset.identity,
               "training_pictures": len(dataset.indices["train"]),
               "accuracy": accuracy(guesses, labels),
               "frechet": frechet(features[:n], standard.reference),
               "decoded_accuracy": accuracy(decoded_guesses, labels),
               "decoded_frechet": frechet(decoded_features[:n], standard.reference)}
    first = [labels.tolist().index(k) for k in range(len(names))]
    samples = {"real pictures": pixels[first], "real, through the tokenizer": decoded[first]}
    return standard, scores, samples


def frechet(a, b):
    """Fréchet distance of two sets of features, arrays (N, d): |mean - mean|^2 + tr(A + B -
    2 sqrt(AB)) of their means and covariances A, B."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def accuracy(guesses, labels):
    return (guesses == labels).double().mean().item()


def name_likelihoods(model, tokenizer, plan, pixels, question, names):
    """(N, names): log p(name and its end | picture, question).

    The question stands on a picture once with each name. Questions do not see each other, so this
    gives what study/match.py gets one by one, but the picture is computed once.
    """
    pairs = [(question, name) for name in names]
    parts = []
    for codes in tqdm(tokenizer.encode(pixels).split(BATCH), desc="naming", leave=False):
        batch = understanding(tokenizer, codes, [pairs] * len(codes))
        losses = output_losses(model, batch, plan)
        segments = batch.segment_ids[:, predicting(batch.layout)]
        of_names = [-(losses * (segments == k)).sum(1) for k in range(1, 1 + len(names))]
        parts.append(torch.stack(of_names, 1))
    return torch.cat(parts)


def score_run(folder, standard, device):
    """Writes what eval.json does not tell of a run: photos.json; and drawn.png, one picture of each
    class side by side."""
    model, tokenizer, checkpoint = load_run(folder, device)
    names, scores = standard.names, {}
    plans = plans_of(checkpoint["tasks"], checkpoint["options"], model.config.layers)
    if "und" in plans:
        likelihoods = name_likelihoods(model, tokenizer, plans["und"], standard.pixels,
                                      standard.question, names)
        scores["named"] = accuracy(likelihoods.argmax(1), standard.labels)
    if "gen" in plans:
        # The first picture of each class, the second of each, ...
        drawn = draw_pictures(model, tokenizer, names * DRAWN, plans["gen"], SAMPLING)
        features, guesses = standard.classifier.judge(drawn)
        scores["drawn_right"] = accuracy(guesses, torch.arange(len(names)).repeat(DRAWN))
        scores["frechet"] = frechet(features, standard.reference)
        one_of_each = np.concatenate(drawn[:len(names)], 1)
        save_picture(Image.fromarray(one_of_each), folder / "drawn.png")
    # The scores come last: where they are, all is.
    write_file(folder / "photos.json", json.dumps(scores))


# ---------------------------------------------------------------------- the table

def read_runs(out):
    """{row: {seed: scores}} of the finished runs: eval.json, and photos.json under "photos"."""
    found = defaultdict(dict)
    for file in sorted(out.glob("*-seed*/photos.json")):
        name, seed = file.parent.name.rsplit("-seed", 1)
        scores = json.loads(file.with_name("eval.json").read_text())
        found[name][int(seed)] = scores | {"photos": json.loads(file.read_text())}
    return found


def difference(found, row, other, column):
    """A row of the table of DIFFERENCES, or None without runs of both."""
    title, path, factor, digits = column
    differences = differences_of(found, path, row, other, factor=factor)
    if not differences:
        return None
    return f"{row} less {other}: {title}", mean_std(differences, digits, "+"), len(differences)


def make_table(out, real, names):
    """Prints the table of all finished runs, and writes it beside all their scores."""
    found = read_runs(out)
    if not found:
        fail(f"{out}: no finished run in it")
    rows = []
    for name in [name for name in ROWS if name in found]:
        cells = [cell(found[name], *column[1:]) for column in COLUMNS]
        rows.append([ROWS[name][0], ", ".join(map(str, sorted(found[name]))), *cells])
    for title, kind in (("real pictures", ""), ("real, through the tokenizer", "decoded_")):
        rows.append([title, "–", "–", f"{100 * real[kind + 'accuracy']:.1f}",
                     f"{real[kind + 'frechet']:.2f}", "–", "–"])
    chance = f"{100 / len(names):.1f}"
    rows.append(["chance", "–", chance, chance, "–", "–", "–"])
    parts = [markdown(["run", "seeds", *(column[0] for column in COLUMNS)], rows)]
    rows = [row for row in (difference(found, *each) for each in DIFFERENCES) if row]
    if rows:
        parts.append(markdown(["row less row", "difference", "seeds"], rows))
    every = [scores for runs in found.values() for scores in runs.values()]
    machines = " / ".join(sorted({scores["hardware"] for scores in every}))
    config = every[0]["config"]
    preset = data.PRESETS[config["preset"]]
    und, gen = (min(n, real["training_pictures"]) for n in (preset.und_scenes, preset.gen_scenes))
    parts.append(
        f"Mean ± standard deviation over seeds; preset {config['preset']}, {config['steps']} steps "
        f"of {config['batch_size']} pictures of each task; {machines}. Training pictures: {und} "
        f"for understanding ({FEW} of each class where labels are few), {gen} for generation.\n\n"
        f"*Named*: the likeliest of {len(names)} names, {real['n']} validation pictures. *Drawn "
        f"right*: a classifier, trained on {real['training_pictures']} real pictures, sees the "
        f"class in {DRAWN} drawn pictures of each (guidance {GUIDANCE}, temperature "
        f"{TEMPERATURE:g}). *Fréchet distance*: in its features, to "
        f"{real['reference']} validation pictures; of real pictures, {real['compared']} others. "
        f"The tokenizer keeps {real['psnr']:.1f} dB.")
    path = RESULTS / f"photos-{config['preset']}"
    write_file(f"{path}.md", "\n\n".join(parts) + "\n")
    titles = {name: title for name, (title, _) in ROWS.items()}
    write_file(f"{path}.json", json.dumps({"titles": titles, "names": names, "real": real,
                                           "runs": found}))
    print("\n\n".join(parts) + f"\n\n{path}.md, .json")
    return path


def show_samples(out, samples, names, path):
    """One picture of each class: a line for real ones, and for each row that draws, from its first
    seed whose pictures are there."""
    for name, (title, _) in ROWS.items():
        files = sorted(out.glob(f"{name}-seed*/drawn.png"))
        if files:
            samples[title] = np.split(np.array(Image.open(files[0])), len(names), axis=1)
    pictures = [picture for of_row in samples.values() for picture in of_row]
    texts = [f"{title}:\n{name}" for title in samples for name in names]
    contact_sheet(pictures, texts, path, columns=len(names), size=120)
    print(path)


# ---------------------------------------------------------------------- all runs

def read_classes(path, preset):
    """A folder with a folder for each class -> data.Folder and the sorted names of the classes."""
    if (path / "metadata.jsonl").exists():
        fail(f"{path} has a metadata.jsonl: expected nothing but a folder of pictures for each "
             "class")
    dataset = data.Folder(path, preset)
    names = sorted({caption.text for caption in dataset.captions})
    missing = sorted(set(names) - {dataset.captions[i].text for i in dataset.indices["val"]})
    if len(names) < 2 or missing:
        fail(f"{path} has {len(names)} classes, {len(missing)} of them without validation pictures "
             f"{missing[:1]}: expected at least two, of dozens of pictures each")
    return dataset, names


def main():
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="with a folder of pictures for each class")
    parser.add_argument("--seeds", type=int, default=3, help="train seeds 1 to SEEDS (default: 3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--preset", choices=data.PRESETS, help="default: what fits the device")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--out", type=Path, default=Path("out/photos"))
    args = parser.parse_args()
    device = pick_device(args.device)
    shared = {"data": str(args.folder), "tokenizer": str(args.out / "tokenizer.pt")}
    shared |= {key: getattr(args, key) for key in ("preset", "steps")
               if getattr(args, key) is not None}
    usual = train.complete(shared, device)
    train.check(usual)
    dataset, names = read_classes(args.folder, usual["preset"])
    tokenizer, classifier = prepare(args.out, dataset, names, usual, device)
    standard, real, samples = score_real(dataset, names, tokenizer, classifier)
    few_labels = FewLabels(dataset)
    for seed in range(1, args.seeds + 1):
        for name in args.rows:
            folder = args.out / f"{name}-seed{seed}"
            given = {**shared, **ROWS[name][1], "seed": seed, "out": str(folder)}
            options = train.complete(given, device)
            world = few_labels if name.endswith("-few") else dataset
            data.load = lambda source, preset: world        # every part of a run calls it
            torch.compiler.reset()                          # else the code of every row stays
            table.check_finished(folder, options)
            table.train_row(folder, options, None, device)
            with exclusive(folder) as alone:
                trained = (folder / "eval.json").exists()
                if alone and trained and not (folder / "photos.json").exists():
                    score_run(folder, standard, device)
    path = make_table(args.out, real, names)
    show_samples(args.out, samples, names, f"{path}-samples.png")


if __name__ == "__main__":
    run_script(main)
