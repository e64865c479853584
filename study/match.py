"""Pictures and texts matched among ten, for folders of images, where no checker exists.

    python study/match.py out/RUN           prints how often the right one is picked
"""
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from table import open_run                  # first: it makes the files of the folder above known
from common import pick_device, run_script, script_parser

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import generation, understanding
from prune import predicting

PICTURES, GROUP = 1000, 10


@torch.no_grad()
def log_likelihoods(model, batch, plan):
    """(B,): log p(output tokens | all before them) of each sequence, on the CPU."""
    batch = batch.to(model.device)
    logits, _ = model(batch, plan)
    span = predicting(batch.layout, batch.image_loss)
    losses = F.cross_entropy(logits.float().transpose(1, 2), batch.targets[:, span],
                             ignore_index=-1, reduction="none")     # (B, n)
    return -(losses * batch.is_output[:, span]).sum(1).cpu()


def matching(model, tokenizer, split, task, plan):
    """How often, among ten, the right text is picked for a picture ("text"), a picture with the
    right text for a text ("picture"), either by a blind guess ("chance"). "n": how many pictures.

    und: by log p(answer | picture, question), with the first question of what is given. So an
    answer that fits only this question can be picked without looking; a picture cannot. gen: by
    log p(picture | caption) minus log p(picture | no caption)."""
    hits = defaultdict(list)
    codes = tokenizer.encode(split.pixels)
    for i in tqdm(range(0, len(codes) - GROUP + 1, GROUP), desc="matching", leave=False):
        pictures = codes[i:i + GROUP]
        each = pictures.repeat_interleave(GROUP, 0)         # row a * GROUP + b: picture a, text b
        if task == "und":
            asked = [questions[0] for questions in split.questions[i:i + GROUP]]
            texts = [question.answer for question in asked]
            of_picture = [[(question.text, answer)] for question in asked for answer in texts]
            of_text = [[(question.text, question.answer)] for question in asked] * GROUP
            by_picture, by_text = (
                log_likelihoods(model, understanding(tokenizer, each, pairs), plan)
                for pairs in (of_picture, of_text))
        else:
            texts = [caption.text for caption in split.captions[i:i + GROUP]]
            by_picture = log_likelihoods(model, generation(tokenizer, each, texts * GROUP), plan)
            without = log_likelihoods(model, generation(tokenizer, pictures, [""] * GROUP), plan)
            by_text = by_picture = by_picture - without.repeat_interleave(GROUP)
        by_picture, by_text = by_picture.view(GROUP, GROUP), by_text.view(GROUP, GROUP)
        for k, text in enumerate(texts):
            hits["text"].append(texts[by_picture[k].argmax()] == text)
            hits["picture"].append(texts[by_text[:, k].argmax()] == text)
            hits["chance"].append(texts.count(text) / GROUP)
    return {what: fmean(flags) for what, flags in hits.items()} | {"n": len(hits["text"])}


def main():
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--data", help="where the run's images are now, if they have been moved")
    args = parser.parse_args()
    device = pick_device(args.device)
    model, tokenizer, checkpoint, dataset, plans = open_run(args.run, device, args.data)
    split = dataset.split("und", "val", PICTURES, checkpoint["options"]["seed"])
    for task, plan in plans.items():
        rates = matching(model, tokenizer, split, task, plan)
        print(f"{task}: of ten, the text of an image {rates['text']:.1%}, the image of a text "
              f"{rates['picture']:.1%} (chance {rates['chance']:.1%}; {rates['n']} images)")


if __name__ == "__main__":
    run_script(main)
