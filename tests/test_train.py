"""What a run is trained on, and where it is written to."""
from itertools import product

import pytest
import torch

import tokenizer as tok
import train
from data import PRESETS, Shapes
from tokenizer import FIRST_CODE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def material():
    """A world and a tokenizer that tells its pictures apart."""
    world = Shapes("tiny")
    return world, tok.train_tokenizer(world, "tiny", CPU, steps=10)[0]


def training_sequences(material, task, **given):
    options = train.complete({"preset": "tiny", "seed": 3, **given}, CPU)
    return train.training_sequences(task, options, *material)


def test_by_default_each_task_predicts_its_own_output(material):
    """Understanding its text alone, generation its image alone; --image-loss changes the first."""
    for given in ({}, {"objective": "und"}, {"image_loss": True}):
        batch = training_sequences(material, "und", **given)
        before, m, _ = batch.layout
        images, text = batch.targets[:, :before + m], batch.targets[:, before + m:]
        if given == {"image_loss": True}:
            assert torch.equal(images[:, before - 1:-1], batch.tokens[:, before:before + m])
        else:
            assert (images == -1).all()
        assert text.max() < FIRST_CODE and (text >= 0).any(1).all()
    batch = training_sequences(material, "gen")
    assert (batch.targets[batch.targets >= 0] >= FIRST_CODE).all()
    assert torch.equal(batch.targets >= 0, batch.is_output)


def test_practice_shows_understandings_pictures_where_there_is_no_caption(material):
    """... and only there; without it all pictures are generation's own."""
    world, tokenizer = material
    size = PRESETS["tiny"]
    own, others = (tokenizer.encode(world.split(task, "train", n, 3, questions=0).pixels)
                   for task, n in (("gen", size.gen_scenes), ("und", size.und_scenes)))
    plain, practice = (training_sequences(material, "gen", practice=on) for on in (False, True))
    before = plain.layout.before
    no_caption = plain.tokens[:, before - 1] == tokenizer.gen           # (N,)
    assert .05 < no_caption.double().mean() < .2
    assert torch.equal(plain.tokens[:, :before], practice.tokens[:, :before])
    assert torch.equal(plain.tokens[:, before:], FIRST_CODE + own)
    assert torch.equal(practice.tokens[~no_caption, before:], FIRST_CODE + own[~no_caption])
    assert torch.equal(practice.tokens[no_caption, before:],
                       FIRST_CODE + others[:no_caption.sum()])
    changed = (practice.tokens != plain.tokens).any(1)
    assert changed.sum() > no_caption.sum() / 2 and not changed[~no_caption].any()


def test_default_paths_name_what_differs():
    """So that `train.py --preset tiny` and `train.py` both work, one after the other."""
    def paths(**given):
        options = train.complete(given, CPU)
        return options["out"], options["tokenizer"]

    assert paths() == ("out/joint", "out/tokenizer.pt")
    assert paths(preset="tiny") == ("out/joint-tiny", "out/tokenizer-tiny.pt")
    assert paths(objective="und", und_plan="himix", projections="image")[0] == "out/und-himix-image"
    assert paths(data="some/cats") == ("out/joint-cats", "out/tokenizer-cats.pt")
    values = {"projections": ("shared", "image", "task"),
              "gen_plan": ("dense", "hmgen"), "und_plan": ("dense", "hmgen"),
              "image_loss": (False, True), "practice": (False, True), "preset": PRESETS,
              "data": ("shapes", "cats")}
    every = [dict(zip(values, chosen)) for chosen in product(*values.values())]
    assert len({paths(**given)[0] for given in every}) == len(every)
    tokenizers = {paths(**given)[1] for given in every}             # one for each preset and data
    assert len(tokenizers) == len(PRESETS) * 2
