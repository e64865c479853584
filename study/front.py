"""What the README shows: a trained model to try, and an animation of it at work.

    python study/front.py out/joint --trained       study/trained/checkpoint.pt: that run in half
                                                    precision, without its optimizers
    python eval.py study/trained                    its scores, study/trained/eval.json
    python study/front.py study/trained             study/results/drawing.gif

The animation draws the first validation caption of each kind but "scene", token by token in the
order of generation, and then asks the same model a question about each picture. Nothing is chosen;
what is wrong is red.
"""
import random
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (DARK, GREY, RED, pick_device, read_checkpoint, run_script, save_checkpoint,
                    script_parser)

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import CAPTION_FIELDS, QUESTION_KINDS, Shapes
from eval import answer, draw_pictures, sampling_of
from model import load_run
from prune import plans_of

SIZE, GAP, TOP, BOTTOM = 150, 16, 56, 44        # pixels; TOP and BOTTOM are for text
FRAME_MS, LAST_MS = 80, 5000


def shrink(run, folder):
    """A run that can be asked, drawn with and probed, for a third of the bytes."""
    checkpoint = read_checkpoint(run / "checkpoint.pt", "run")
    del checkpoint["optimizers"]
    checkpoint["model"] = {name: weight.half() for name, weight in checkpoint["model"].items()}
    save_checkpoint(checkpoint, folder / "checkpoint.pt")


def reveal(picture, tokens, side):
    """The first `tokens` of side * side image tokens of a picture; the others are grey."""
    patch = len(picture) // side
    hidden = np.arange(side * side).reshape(side, side) >= tokens
    hidden = hidden.repeat(patch, 0).repeat(patch, 1)
    return np.where(hidden[..., None], np.uint8(225), picture)


def frame(pictures, captions, lines, tokens, side):
    """All pictures with so many tokens, under their captions; where all are there, questions and
    answers. captions, lines: [(text, is it right?)]."""
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (GAP + len(pictures) * (SIZE + GAP), TOP + SIZE + BOTTOM), "white")
    draw = ImageDraw.Draw(sheet)
    complete = tokens == side * side

    def write(x, y, text, right):
        draw.text((x, y), textwrap.fill(text, 24), DARK if right else RED, font)

    for i, picture in enumerate(pictures):
        x = GAP + i * (SIZE + GAP)
        write(x, 6, captions[i][0], captions[i][1] or not complete)
        picture = Image.fromarray(reveal(picture, tokens, side))
        sheet.paste(picture.resize((SIZE, SIZE), Image.NEAREST), (x, TOP))
        draw.rectangle((x - 1, TOP - 1, x + SIZE, TOP + SIZE), outline=GREY)
        if complete:
            write(x, TOP + SIZE + 6, *lines[i])
    return sheet


def animate(run, device, path):
    model, tokenizer, checkpoint = load_run(run, device)
    options, side = checkpoint["options"], model.config.side
    plans = plans_of(["und", "gen"], options, model.config.layers)
    world, rng = Shapes(options["preset"]), random.Random(0)
    split = world.split("gen", "val", 100, questions=0)
    kinds = [caption.kind for caption in split.captions]
    first = [kinds.index(kind) for kind in CAPTION_FIELDS if kind != "scene"]
    texts = [split.captions[i].text for i in first]
    pictures = draw_pictures(model, tokenizer, texts, plans["gen"], sampling_of(options))
    captions, lines = [], []
    for n, (i, seen) in enumerate(zip(first, world.read(pictures))):
        _, right = world.fulfilled(split.captions[i], split.scenes[i], seen)
        captions.append((split.captions[i].text, right))
        question = None
        while question is None:
            question = world.question(rng, seen, rng.choice(QUESTION_KINDS))
        codes = tokenizer.encode(pictures[n:n + 1])[0]
        said = answer(model, tokenizer, codes, question.text, plans["und"])
        lines.append((f"{question.text} {said}", said == question.answer))
    steps = [*range(0, side * side, 2), side * side]
    frames = [frame(pictures, captions, lines, tokens, side) for tokens in steps]
    palette = frames[-1].quantize(128)                      # one for all: no colour flickers
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    # Complete first: many viewers show one frame only.
    frames[-1].save(path, save_all=True, append_images=frames[:-1], loop=0,
                    duration=[LAST_MS] + [FRAME_MS] * (len(frames) - 1))
    print(f"{path}: {captions}, {lines}")


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--trained", action="store_true", help="make study/trained of the run")
    args = parser.parse_args()
    if args.trained:
        shrink(args.run, ROOT / "study" / "trained")
    else:
        animate(args.run, pick_device(args.device), ROOT / "study" / "results" / "drawing.gif")


if __name__ == "__main__":
    run_script(main)
