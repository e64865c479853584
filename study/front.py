"""What the README shows: the paper in ten seconds, and a trained model at work.

    python study/front.py                           study/results/ten-seconds.png
    python study/front.py study/trained             study/results/drawing.gif
    python study/front.py out/joint-cpu --trained   study/trained/checkpoint.pt: that run in half
                                                    precision, without its optimizers
    python eval.py study/trained                    its scores, study/trained/eval.json

The GIF draws the first validation caption of each kind but "scene", token by token, then asks the
same model a question about each picture. Nothing is chosen; green is right, red has a mistake.
"""
import random
from itertools import count
from pathlib import Path
from statistics import fmean, stdev

from table import HELD_OUT, RESULTS, ROOT, SEEDS, numbers, open_run, read_runs
from common import (DARK, GREY, LINE_COLOURS, contact_sheet, font_for, pick_device, read_checkpoint,
                    run_script, save_checkpoint, save_picture, script_parser)

import numpy as np
from PIL import Image, ImageDraw

from eval import answer, cost, draw
from model import Config
from prune import Layout, make_plan, masks
from shapes import QUESTIONS


def shrink(run, folder):
    """A run that can be asked, drawn with and probed, for a third of the bytes."""
    checkpoint = read_checkpoint(run / "checkpoint.pt", "run")
    del checkpoint["optimizers"]
    checkpoint["model"] = {name: weight.half() for name, weight in checkpoint["model"].items()}
    save_checkpoint(checkpoint, folder / "checkpoint.pt")


# ---------------------------------------------------------------------- drawing.gif

def animate(run, device, path):
    model, tokenizer, _, world, plans = open_run(run, device)
    side, rng = model.config.side, random.Random(0)
    split = world.split("gen", "val", 100, questions=0)
    kinds = [caption.kind for caption in split.captions]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind != "scene"]
    split = split._replace(captions=[split.captions[i] for i in first],
                           scenes=[split.scenes[i] for i in first])
    captions = [caption.text for caption in split.captions]
    pictures = draw(model, tokenizer, captions, plans["gen"], world.sampling)
    right = [is_right for *_, is_right in world.check(split, pictures)]
    drawn = [f"generation: {caption}" for caption in captions]
    asked = []
    for n, seen in enumerate(world.read(pictures)):
        question = None
        while question is None:
            question = world.question(rng, seen, rng.choice(list(QUESTIONS)))
        codes = tokenizer.encode(pictures[n:n + 1])[0]
        said = answer(model, tokenizer, codes, question.text, plans["und"])
        asked.append(f"{drawn[n]}\n\nunderstanding: {question.text} {said}")
        right[n] &= said == question.answer
    part, frames = path.with_suffix(".png"), []
    # Complete first: many viewers show one frame only.
    for tokens in (side * side, *range(0, side * side, 2)):
        hidden = np.arange(side * side).reshape(side, side) >= tokens
        hidden = np.kron(hidden, np.ones((pictures.shape[1] // side,) * 2, bool))[..., None]
        texts, marks = (drawn, ()) if frames else (asked, right)
        contact_sheet(np.where(hidden, np.uint8(225), pictures), texts, part, right=marks)
        sheet = Image.open(part)
        frames.append(Image.new("RGB", frames[0].size if frames else sheet.size, "white"))
        frames[-1].paste(sheet)
    part.unlink()
    palette = frames[0].quantize(128)                       # one for all: no colour flickers
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[5000] + [80] * (len(frames) - 1))      # milliseconds
    print(f"{path}: {asked}, right: {right}")


# ---------------------------------------------------------------------- ten-seconds.png

BLUE, ORANGE, GREEN, DARK_RED, PURPLE = LINE_COLOURS
TOKEN = 17                                                  # pixels of a square
LAYOUTS = {"und": Layout(2, 9, 5), "gen": Layout(6, 9, 0)}
# Of each grid: x, title, task, plan.
GRIDS = [(110, "dense", "und", "dense"), (250, "HiMix", "und", "himix"),
         (390, "freeze (not in the paper)", "und", "freeze"), (730, "dense", "gen", "dense"),
         (870, "HMGen", "gen", "hmgen")]
LEGEND = [("text: updated", BLUE, True, True), ("image: updated", ORANGE, True, True),
          ("image: only seen", ORANGE, False, True),
          ("image: only its input\nembedding is seen", GREEN, False, True),
          ("image: skips the layer", GREY, False, False)]
BARS = [("understanding only", "u", GREY), ("joint training", "joint", BLUE),
        ("understanding only, HiMix", "u-himix", GREY),
        ("joint, HiMix + HMGen (share all)", "share-image", DARK_RED),
        ("the same, image projections for each task (share partial)", "share-partial", ORANGE),
        ("understanding only, freeze", "u-freeze", GREY),
        ("joint, freeze + HMGen, with practice (ours)", "freeze-hmgen-practice", PURPLE)]


def draw_ten_seconds(found, path):
    """What tokens do in each layer, and what that does to held-out pairs. found: of read_runs."""
    sheet = Image.new("RGB", (1180, 690), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text, anchor="lm", size=14):
        draw.text((x, y), text, DARK, font_for("", size), anchor=anchor)

    def token(x, y, colour, is_query, is_key):
        """A square if it is updated, a ring if it is only seen, a dash if it is neither."""
        if is_query or is_key:
            inside = colour if is_query else "white"
            draw.rectangle((x, y, x + TOKEN, y + TOKEN - 1), inside, colour, 2)
            draw.rectangle((x + 6, y + 6, x + TOKEN - 6, y + TOKEN - 7), colour)
        else:
            draw.line((x, y + 8, x + TOKEN, y + 8), GREY, 2)

    config = Config(**read_checkpoint(ROOT / "study/trained/checkpoint.pt", "run")["config"])
    write(20, 20, "What each token (row) does in each of the 4 layers (column)", size=18)
    write(110, 54, "Understanding: picture and question in, answer out", size=16)
    write(730, 54, "Generation: caption in, picture out", size=16)
    for x, title, task, name in GRIDS:
        layout, plan = LAYOUTS[task], make_plan(name, config.layers)
        write(x, 80, title, size=16)
        write(x, 100, f"FLOPs {cost(config, {task: plan}, 1)['flops_ratio']:.2f}")
        for i, rule in enumerate(plan):
            left, image = x + 24 * i, GREEN if rule.keys == "embedding" else ORANGE
            colours = [BLUE] * layout.before + [image] * layout.image + [BLUE] * layout.after
            for y, *what in zip(count(116, TOKEN + 1), colours, *masks(rule, layout)):
                token(left, y, *what)
            write(left + 9, y + 28, str(i + 1), "mm")
    for x, part, first, tokens in ((101, "bos, task", 0, 2), (101, "image", 2, 9),
                                   (101, "question", 11, 5), (721, "caption", 0, 6),
                                   (721, "image", 6, 9)):
        y, end = (116 + (TOKEN + 1) * i for i in (first, first + tokens))
        draw.line((x, y, x, end - 3), GREY, 2)
        write(x - 8, (y + end) / 2, part, "rm")
    for y, (words, *what) in zip(count(116, 44), LEGEND):
        token(1000, y, *what)
        write(1026, y, words, "la")

    chance = fmean(numbers(found["u"], ("und", "held_out_chance"), 100))
    write(20, 436, "Held-out pairs: questions about combinations of colour and shape that only "
          f"generation has\nin training. % right (chance {chance:.0f}), mean of {SEEDS} seeds "
          "± standard deviation; line: the first row", "la", 18)
    write(440, 502, "FLOPs relative to dense, same tasks", "rm")
    for y, (title, row, colour) in zip(count(514, 24), BARS):
        right = numbers({seed: found[row][seed] for seed in range(1, SEEDS + 1)}, HELD_OUT, 100)
        mean, deviation = fmean(right), stdev(right)
        low, x, high = (460 + 6.4 * (mean + k * deviation) for k in (-1, 0, 1))
        alone = x if row == "u" else alone
        draw.rectangle((460, y, x, y + 17), colour)
        draw.line((low, y + 8, high, y + 8), "black", 1)
        write(high + 10, y + 9, f"{mean:.0f}")
        write(395, y + 9, title, "rm")
        of_dense = fmean(numbers(found[row], ("cost", "flops_ratio"), 1))
        write(440, y + 9, f"{of_dense:.2f}", "rm")
    draw.line((alone, 508, alone, 680), "black", 1)
    save_picture(sheet, path)
    print(path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a trained run")
    parser.add_argument("--trained", action="store_true", help="make study/trained of the run")
    args = parser.parse_args()
    if not args.run:
        draw_ten_seconds(read_runs(RESULTS / "band"), RESULTS / "ten-seconds.png")
    elif args.trained:
        shrink(args.run, ROOT / "study" / "trained")
    else:
        animate(args.run, pick_device(args.device), RESULTS / "drawing.gif")


if __name__ == "__main__":
    run_script(main)
