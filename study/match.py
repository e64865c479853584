"""Pictures and texts matched among ten, for folders of images, where no checker exists.

    python study/match.py out/RUN           prints how often the right one is picked
"""
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from table import open_run                  # first: it makes the files of the folder above known
from common import fail, pick_device, run_script, script_parser

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import generation, understanding
from prune import predicting


@torch.no_grad()
def output_losses(model, batch, plan):
    """The loss (nats) of each output token, 0 at other positions: (B, n), as prune.predicting
    names the positions, on the CPU."""
    batch = batch.to(model.device)
    logits, _ = model(batch, plan)
    span = predicting(batch.layout, batch.image_loss)
    losses = F.cross_entropy(logits.float().transpose(1, 2), batch.targets[:, span],
                             ignore_index=-1, reduction="none")     # (B, n)
    return (losses * batch.is_output[:, span]).cpu()


def log_likelihoods(model, batch, plan):
    """(B,): log p(output tokens | all before them) of each sequence."""
    return -output_losses(model, batch, plan).sum(1)


def matching(model, tokenizer, split, task, plan, group=10):
    """How often, among ten, the right text is picked for a picture ("text"), a picture with the
    right text for a text ("picture"), either by a blind guess ("chance").

    und: by log p(answer | picture, question), a text being the answer to a picture's first
    question. Asked is the question of what is given: so an answer that fits no other question is
    found without the picture, but a picture is not. gen: by log p(picture | caption) less log
    p(picture | no caption)."""
    hits = defaultdict(list)
    codes = tokenizer.encode(split.pixels)
    for i in tqdm(range(0, len(codes) - group + 1, group), desc="matching", leave=False):
        pictures = codes[i:i + group]
        each = pictures.repeat_interleave(group, 0)         # row a * group + b: picture a, text b
        if task == "und":
            asked = [questions[0] for questions in split.questions[i:i + group]]
            texts = [question.answer for question in asked]
            of_picture = [[(question.text, answer)] for question in asked for answer in texts]
            of_text = [[(question.text, question.answer)] for question in asked] * group
            by_picture, by_text = (
                log_likelihoods(model, understanding(tokenizer, each, pairs), plan)
                for pairs in (of_picture, of_text))
        else:
            texts = [caption.text for caption in split.captions[i:i + group]]
            batch = generation(tokenizer, each, texts * group)
            without = generation(tokenizer, pictures, [""] * group)
            by_picture = log_likelihoods(model, batch, plan)
            by_picture -= log_likelihoods(model, without, plan).repeat_interleave(group)
            by_text = by_picture
        by_picture, by_text = by_picture.view(group, group), by_text.view(group, group)
        for k, text in enumerate(texts):
            hits["text"].append(texts[by_picture[k].argmax()] == text)
            hits["picture"].append(texts[by_text[:, k].argmax()] == text)
            hits["chance"].append(texts.count(text) / group)
    return {what: fmean(flags) for what, flags in hits.items()}


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--n", type=int, default=1000, help="validation pictures")
    parser.add_argument("--data", help="where the run's images are now, if they have been moved")
    args = parser.parse_args()
    if args.n < 10:
        fail(f"--n {args.n}: expected at least 10, of which one is the right one")
    model, tokenizer, checkpoint, dataset, plans = open_run(args.run, pick_device(args.device),
                                                            args.data)
    split = dataset.split("und", "val", args.n, checkpoint["options"]["seed"])
    for task, plan in plans.items():
        rates = matching(model, tokenizer, split, task, plan)
        print(f"{task}: of ten, the text of an image {rates['text']:.1%}, the image of a text "
              f"{rates['picture']:.1%} (chance {rates['chance']:.1%})")


if __name__ == "__main__":
    run_script(main)
