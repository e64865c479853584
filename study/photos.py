"""Photographs instead of drawn shapes: what are joint training and token reduction worth there?

    python study/photos.py FOLDER                   every row, seeds 1 to 3, and the table
    python study/photos.py FOLDER --preset tiny --steps 20 --out out/try    every stage in minutes

FOLDER holds one folder of pictures for each class (CIFAR-10: 10 of 5,000 pictures). Understanding
answers "what is this?" with a class, generation draws a picture of a class. No checker reads a
photograph: drawn ones are judged by a small network that is trained on real ones. In two rows
understanding sees few labelled pictures: there, one would think, joint training has most to give.
It trains rows as table.py does. Writes study/results/photos-PRESET.md and .json (real pictures).
"""
import json
from pathlib import Path

import table
from table import (RESULTS, SIZES, differences_table, lock, markdown, open_run, read_runs,
                   rows_parser, runs_rows, train_rows, write_tables)
from common import fail, pick_device, read_checkpoint, run_script, save_checkpoint, write_file

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import usual_preset
from eval import BATCH, draw
from match import log_likelihoods
from model import understanding
from tokenizer import get_tokenizer

# A folder's own sampling draws nearly greedily: right for captions of one picture each. A class's
# name stands for thousands, and would give the same picture every time.
SAMPLING = 1.5, 1.
DRAWN = 100             # pictures of each class

ROWS = {name: table.ROWS[name] for name in ("u", "u-himix", "g", "joint", "share-weights",
                                            "share-partial", "freeze-hmgen")}
ROWS |= {"u-few": ("understanding only, few labels", "--objective und"),
         "joint-few": ("joint, few labels in understanding", "")}
SIZES |= {"u-few": {"und_scenes": 1000}, "joint-few": {"und_scenes": 1000}}
# The table's columns: title, where the number stands in a run's scores, factor, digits.
COLUMNS = [("named, %", ("photos", "named"), 100, 1),
           ("drawn right, %", ("photos", "drawn_right"), 100, 1),
           ("Fréchet distance ↓", ("photos", "frechet"), 1, 2),
           ("FLOPs", ("cost", "flops_ratio"), 1, 2)]
# Differences that the table shows: {row: other rows}.
COMPARED = {"joint": "u g", "joint-few": "u-few", "u-himix": "u", "share-weights": "joint u",
            "share-partial": "joint u-himix", "freeze-hmgen": "joint u g"}


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers = []
        for before, width in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, pixels):
        """(B, H, W, 3) uint8 -> features (B, width), for Fréchet distances, and logits."""
        features = self.body(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
        return features, self.head(features)

    @torch.no_grad()
    def judge(self, pixels):
        """(N, H, W, 3) uint8 array -> features, a float64 array (N, width), and classes (N,)."""
        parts = [self(part.to(self.head.weight.device)) for part in torch.tensor(pixels).split(500)]
        features, logits = (torch.cat(x).cpu() for x in zip(*parts))
        return features.double().numpy(), logits.argmax(1)


def labels_of(split, names):
    return torch.tensor([names.index(caption.text) for caption in split.captions])


def train_classifier(split, names, device, epochs=10, batch_size=128):
    torch.manual_seed(0)
    pixels, labels = torch.as_tensor(split.pixels).to(device), labels_of(split, names).to(device)
    network = Classifier(len(names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=.05)
    steps = epochs * -(-len(pixels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, .01, steps)
    for _ in tqdm(range(steps), desc="classifier", unit="step"):
        chosen = torch.randint(len(pixels), (batch_size,), device=device)
        plain, mirrored = pixels[chosen].chunk(2)
        _, logits = network(torch.cat([plain, mirrored.flip(2)]))
        F.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network


def get_classifier(path, dataset, names, device):
    """The Classifier in a file; trained on all training pictures if there is none."""
    if not path.exists():
        split = dataset.split("gen", "train", len(dataset.pixels))
        network = train_classifier(split, names, device)
        save_checkpoint({"kind": "classifier", "network": network.state_dict()}, path)
    network = Classifier(len(names))
    network.load_state_dict(read_checkpoint(path, "classifier")["network"])
    return network.to(device, memory_format=torch.channels_last).eval()


def frechet(a, b):
    """Fréchet distance of two sets of features, arrays (N, d): |mean - mean|^2 + tr(A + B -
    2 sqrt(AB)) of their means and covariances A, B."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def score_real(split, names, tokenizer, classifier):
    """How real pictures score, as they are and after the tokenizer, the best that drawn ones can
    reach; and the features that Fréchet distances are measured to."""
    labels = labels_of(split, names)
    # The distance of few pictures comes out too large. So as many of them as a run draws, if there
    # are enough, are compared with the others.
    n, scores = min(DRAWN * len(names), len(labels) // 2), {"n": len(labels)}
    reference = classifier.judge(split.pixels)[0][n:]
    for kind, pixels in (("", split.pixels),
                         ("decoded_", tokenizer.decode(tokenizer.encode(split.pixels)))):
        features, guesses = classifier.judge(pixels)
        scores[f"{kind}accuracy"] = (guesses == labels).double().mean().item()
        scores[f"{kind}frechet"] = frechet(features[:n], reference)
    return scores, reference


def name_likelihoods(model, tokenizer, plan, split, names):
    """(N, names): log p(name and its end | picture, question)."""
    found = []
    for codes in tqdm(tokenizer.encode(split.pixels).split(BATCH), desc="naming", leave=False):
        pairs = [[(split.questions[0][0].text, name)] for _ in codes for name in names]
        batch = understanding(tokenizer, codes.repeat_interleave(len(names), 0), pairs)
        found.append(log_likelihoods(model, batch, plan).view(-1, len(names)))
    return torch.cat(found)


def score_run(folder, split, names, classifier, reference, device):
    """Writes photos.json, the scores that eval.json lacks, unless it exists."""
    if (folder / "photos.json").exists():
        return
    (model, tokenizer, _, _, plans), scores = open_run(folder, device), {}
    if "und" in plans:
        likelihoods = name_likelihoods(model, tokenizer, plans["und"], split, names)
        right = likelihoods.argmax(1) == labels_of(split, names)
        scores["named"] = right.double().mean().item()
    if "gen" in plans:
        pixels = draw(model, tokenizer, names * DRAWN, plans["gen"], SAMPLING)
        features, guesses = classifier.judge(pixels)
        right = guesses == torch.arange(len(names)).repeat(DRAWN)
        scores |= {"drawn_right": right.double().mean().item(),
                   "frechet": frechet(features, reference)}
    write_file(folder / "photos.json", json.dumps(scores))


def make_table(out, real, names, preset):
    found = read_runs(out, ROWS)
    for file in out.glob("*-seed*/photos.json"):
        name, seed = file.parent.name.rsplit("-seed", 1)
        found[name][int(seed)]["photos"] = json.loads(file.read_text())
    titles = {name: title for name, (title, _) in ROWS.items() if name in found}
    rows = runs_rows(titles, found, COLUMNS)
    for title, kind in (("real pictures", ""), ("real, through the tokenizer", "decoded_")):
        rows.append([title, "–", "–", f"{100 * real[kind + 'accuracy']:.1f}",
                     f"{real[kind + 'frechet']:.2f}", "–"])
    rows.append(["chance", "–", *[f"{100 / len(names):.1f}"] * 2, "–", "–"])
    path = RESULTS / f"photos-{preset}.json"
    write_file(path, json.dumps({"names": names, "real": real}))
    write_tables([markdown(["run", "seeds", *(column[0] for column in COLUMNS)], rows),
                  differences_table(found, COMPARED, COLUMNS[:3])], path.with_suffix(".md"))


def main():
    parser = rows_parser(__doc__, ROWS, seeds=3)
    parser.add_argument("--out", type=Path, default=Path("out/photos"))
    args = parser.parse_args()
    device, out = pick_device(args.device), args.out
    preset = args.preset or usual_preset(device)
    dataset = data.load(str(args.folder), preset)
    data.load = lambda source, preset: dataset              # the pictures are not read again
    names = sorted({caption.text for caption in dataset.captions})
    split = dataset.split("gen", "val", len(dataset.pixels))            # all validation pictures
    if len(names) < 2 or {caption.text for caption in split.captions} != set(names):
        fail(f"{args.folder}: expected two classes at least, of dozens of pictures each")
    with lock(out / "prepare", wait=True):                  # one of both for all runs
        tokenizer = get_tokenizer(out / "tokenizer.pt", dataset, preset, device)
        classifier = get_classifier(out / "classifier.pt", dataset, names, device)
    real, reference = score_real(split, names, tokenizer, classifier)
    arguments = "--device", device.type, "--data", args.folder, "--tokenizer", out / "tokenizer.pt"
    train_rows(out, ROWS, args, preset, lambda seed: arguments,
               lambda run, row: score_run(run, split, names, classifier, reference, device))
    make_table(out, real, names, preset)


if __name__ == "__main__":
    run_script(main)
