"""What the README shows: a trained model to try, an animation of it at work, the masks.

    python study/front.py out/joint-cpu --trained   study/trained/checkpoint.pt: that run in half
                                                    precision, without its optimizers
    python eval.py study/trained                    its scores, study/trained/eval.json
    python study/front.py study/trained             study/results/drawing.gif, masks.png

The animation draws the first validation caption of each kind but "scene", token by token in the
order of generation, and then asks the same model a question about each picture. Nothing is chosen;
what is wrong is red.
"""
import random
import textwrap
from pathlib import Path

from table import RESULTS, ROOT, open_run
from common import (DARK, GREY, RED, font_for, pick_device, read_checkpoint, run_script,
                    save_checkpoint, save_picture, script_parser)

import numpy as np
from PIL import Image, ImageDraw

from eval import answer, draw
from prune import FREEZE, FULL, HIMIX, NAIVE, SHALLOW, Layout, letters_of
from shapes import QUESTIONS

SIZE, GAP, TOP, BOTTOM = 150, 16, 56, 44        # pixels; TOP and BOTTOM are for text
FRAME_MS, LAST_MS = 80, 5000


def shrink(run, folder):
    """A run that can be asked, drawn with and probed, for a third of the bytes."""
    checkpoint = read_checkpoint(run / "checkpoint.pt", "run")
    del checkpoint["optimizers"]
    checkpoint["model"] = {name: weight.half() for name, weight in checkpoint["model"].items()}
    save_checkpoint(checkpoint, folder / "checkpoint.pt")


def frame(pictures, captions, lines, tokens, side):
    """All pictures with their first `tokens` image tokens, the others grey, under their captions;
    where all are there, questions and answers. captions, lines: [(text, is it right?)]."""
    sheet = Image.new("RGB", (GAP + len(pictures) * (SIZE + GAP), TOP + SIZE + BOTTOM), "white")
    draw = ImageDraw.Draw(sheet)
    patch, complete = pictures.shape[1] // side, tokens == side * side
    hidden = np.arange(side * side).reshape(side, side) >= tokens
    hidden = hidden.repeat(patch, 0).repeat(patch, 1)[..., None]

    def write(x, y, text, right):
        draw.text((x, y), textwrap.fill(text, 24), DARK if right else RED, font_for(""))

    for i, picture in enumerate(np.where(hidden, np.uint8(225), pictures)):
        x = GAP + i * (SIZE + GAP)
        write(x, 6, captions[i][0], captions[i][1] or not complete)
        sheet.paste(Image.fromarray(picture).resize((SIZE, SIZE), Image.NEAREST), (x, TOP))
        draw.rectangle((x - 1, TOP - 1, x + SIZE, TOP + SIZE), outline=GREY)
        if complete:
            write(x, TOP + SIZE + 6, *lines[i])
    return sheet


def animate(run, device, path):
    model, tokenizer, _, world, plans = open_run(run, device)
    side, rng = model.config.side, random.Random(0)
    split = world.split("gen", "val", 100, questions=0)
    kinds = [caption.kind for caption in split.captions]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind != "scene"]
    split = split._replace(captions=[split.captions[i] for i in first],
                           scenes=[split.scenes[i] for i in first])
    texts = [caption.text for caption in split.captions]
    pictures = draw(model, tokenizer, texts, plans["gen"], *world.sampling)
    captions = [(text, right) for text, (*_, right) in zip(texts, world.check(split, pictures))]
    lines = []
    for n, seen in enumerate(world.read(pictures)):
        question = None
        while question is None:
            question = world.question(rng, seen, rng.choice(list(QUESTIONS)))
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


def draw_masks(path, cell=10):
    """Fig. 4: what tokens see in each kind of layer, understanding above, generation below."""
    colours = {"t": (70, 120, 185), "i": (235, 150, 40), "e": (90, 170, 90), "-": (225, 225, 225)}
    legend = {"t": "text key", "i": "image key: hidden state", "e": "image key: input embedding",
              "-": "token skips the layer (white: not seen; rows: queries, columns: keys)"}
    rules = {"full layer": FULL, "HiMix": HIMIX, "shallow layer of HMGen": SHALLOW,
             "naive control": NAIVE, "freeze (not the paper's)": FREEZE}
    sheet = Image.new("RGB", (20 + 210 * len(rules), 450), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (letter, layout) in enumerate((("U", Layout(2, 9, 6)), ("G", Layout(6, 9, 0)))):
        for column, (title, rule) in enumerate(rules.items()):
            if letter == "G" and rule == HIMIX:             # never updated in any layer
                continue
            x, y = 20 + 210 * column, 24 + 210 * row
            draw.text((x, y - 18), f"{letter}: {title}", DARK, font_for("", 13))
            for i, line in enumerate(letters_of(rule, layout)):
                for j, seen in enumerate(line):
                    corner = x + cell * j, y + cell * i
                    end = corner[0] + cell - 2, corner[1] + cell - 2
                    draw.rectangle((corner, end), fill=colours.get(seen, "white"))
    x = 20
    for seen, words in legend.items():
        draw.rectangle((x, 424, x + 12, 436), fill=colours[seen])
        draw.text((x + 18, 422), words, DARK, font_for("", 13))
        x += 40 + font_for("", 13).getlength(words)
    save_picture(sheet, path)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--trained", action="store_true", help="make study/trained of the run")
    args = parser.parse_args()
    if args.trained:
        return shrink(args.run, ROOT / "study" / "trained")
    animate(args.run, pick_device(args.device), RESULTS / "drawing.gif")
    draw_masks(RESULTS / "masks.png")


if __name__ == "__main__":
    run_script(main)
