"""All ways through the layers are one function, what a plan drops is free; at the end, for GPUs."""
import random
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data import Question, Split
from eval import answer, answer_all, draw
from model import AUXILIARY_WEIGHT, PROJECTIONS, Config, Model, generation, understanding
from probe import SEGMENTS, allocation
from prune import (FREEZE, FULL, HIMIX, NAIVE, PLANS, SHALLOW, Layout, Rule, can_generate, flops,
                   make_plan, paper_cost, predicting)
from tokenizer import FIRST_CODE
from train import apply_gradients, forward_backward, optimizers_of

CODES = 16
TASK_PLANS = [(task, name) for task in ("und", "gen") for name in PLANS
              if task == "und" or can_generate(make_plan(name, 5, 1))]


class Words:
    """Stands in for a tokenizer: words are the ids themselves, and a picture is its codes."""
    bos, eos, und, gen, pad = 507, 508, 509, 510, 511

    def ids(self, text):
        return [int(word) for word in text.split()]

    def string(self, ids):
        return " ".join(map(str, ids))

    def encode(self, codes):
        return codes

    def decode(self, codes):
        return codes.numpy()


words = Words()


def text(rng, low, high):
    return " ".join(str(rng.randrange(256)) for _ in range(rng.randint(low, high)))


def random_model(rng, projections="shared", layers=None, image_loss=False, side=None):
    """A float64 model, none of whose weights is special."""
    torch.manual_seed(rng.randrange(10 ** 6))
    layers, side = layers or rng.randint(1, 6), side or rng.randint(1, 4)
    m = side ** 2
    layouts = {"und": (2, m, rng.randint(14, 20)), "gen": (rng.randint(8, 12), m, 0)}
    c = Config(FIRST_CODE + CODES, layers, 32, 2, side, layouts, projections, image_loss)
    model = Model(c, torch.randn(CODES, 4)).double()
    for p in model.parameters():
        p.data.copy_(torch.randn_like(p) * (.3 if p.ndim == 2 else 1))
    return model


def random_batch(rng, task, c, rows=3):
    codes = torch.randint(CODES, (rows, c.side ** 2))
    if task == "gen":
        captions = [text(rng, 0, 6) for _ in codes]
        return generation(words, codes, captions, c.layout("gen").before)
    questions = [[(text(rng, 1, 5), text(rng, 1, 2))] * rng.randint(1, 4) for _ in codes]
    return understanding(words, codes, questions, c.layout("und").after, c.image_loss)


def random_plan(rng, layers):
    """Any rules at all, not only the named plans."""
    every = [Rule(*pair) for pair in product((True, False), ("hidden", "embedding", "none"))]
    return tuple(rng.choices(every, k=layers))


def every_plan(layers):
    return {make_plan(name, layers, k) for name in PLANS for k in range((layers + 1) // 2)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()}


@pytest.mark.parametrize("task", ["und", "gen"])
@pytest.mark.parametrize("projections", PROJECTIONS)
def test_gathered_equals_reference(task, projections):
    """In both, image tokens use their own projections, and only they do."""
    rng, used = random.Random(f"{task} {projections}"), set()
    for trial in range(6):
        model = random_model(rng, projections, image_loss=trial % 2 == 1)
        layers = model.config.layers
        batch = random_batch(rng, task, model.config)
        has_target = batch.targets[:, predicting(batch.layout, batch.image_loss)] >= 0
        for plan in every_plan(layers) | {random_plan(rng, layers) for _ in range(3)}:
            logits, loss = model(batch, plan)
            reference, reference_loss, _ = model.reference(batch, plan)
            assert (logits - reference)[has_target].abs().max() < 1e-10
            assert abs(loss - reference_loss) < 1e-10
            expected = gradients(model, reference_loss)
            for name, gradient in gradients(model, loss).items():
                assert (gradient - expected[name]).abs().max() < 1e-10, (plan, name)
                if ".key_value." in name and gradient.any():
                    used.add(name.split(".")[3])
    assert used == {"text", *PROJECTIONS[projections]([task])}


def test_himix_sees_embeddings_also_of_tokens_that_were_updated():
    model = random_model(random.Random(4), layers=2)
    batch = random_batch(random.Random(5), "und", model.config)
    plans = (NAIVE, HIMIX), (SHALLOW, FREEZE), (NAIVE, FREEZE)
    updated, never_updated, as_they_are = (model(batch, plan)[0] for plan in plans)
    assert (updated - never_updated).abs().max() < 1e-10 < (updated - as_they_are).abs().max()


def test_decoding_with_a_cache_equals_decoding_without(monkeypatch):
    """Codes drawn greedily, token after token; then one pass over all tells what each step saw.
    Attention is never asked for no queries: on Apple GPUs that fails."""
    usual, rng = F.scaled_dot_product_attention, random.Random(1)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, *rest: usual(q, *rest) if q.size(2) else 1 / 0)
    for _ in range(30):
        model, seen = random_model(rng, rng.choice(list(PROJECTIONS))), []
        plan = random_plan(rng, model.config.layers)
        batch = random_batch(rng, "gen", model.config)

        def choose(logits):
            seen.append(logits)
            return logits[:, FIRST_CODE:].argmax(-1) + FIRST_CODE

        drawn = model.generate(batch, plan, batch.layout.before, choose)
        with torch.no_grad():
            logits, _ = model(batch._replace(tokens=drawn), plan)
        assert (torch.stack(seen, 1) - logits).abs().max() < 1e-9


@pytest.mark.parametrize("task, name", TASK_PLANS)
def test_causality(task, name):
    """Changing token t changes no logits before t, and none of another question, but some that may
    see it. With segments as `understanding` builds them: three questions and padding."""
    rng = random.Random(2)
    model, plan = random_model(rng, "task", layers=5), make_plan(name, 5, 2)
    batch = generation(words, torch.randint(CODES, (1, model.config.side ** 2)), ["1 2 3"], 8)
    if task == "und":
        pairs = [("1 2 3", "4"), ("5 6", "7 8"), ("9", "10")]
        batch = understanding(words, batch.tokens[:, 8:] - FIRST_CODE, [pairs], 14)
    segments = batch.segment_ids[0]
    assert {*segments.tolist()} == ({-1, 0, 1, 2, 3} if task == "und" else {-1, 0})
    at = torch.arange(len(segments))[predicting(batch.layout)]          # of each row of logits
    logits, _ = model(batch, plan)
    for t, token in enumerate(batch.tokens[0].tolist()):
        tokens, base = batch.tokens.clone(), FIRST_CODE if token >= FIRST_CODE else 0
        tokens[:, t] = (token + 1) % CODES + base
        changed = (model(batch._replace(tokens=tokens), plan)[0] != logits).any(-1)[0]
        real, of_all = segments[at] >= 0, segments[t] == 0              # or of its own question
        sees = real & (at >= t) & (of_all | (segments[at] == segments[t])) & (segments[t] >= 0)
        assert not changed[real & ~sees].any(), t
        hidden = task == "und" and base and all(rule.keys == "none" for rule in plan)
        assert hidden or changed[sees].any() == sees.any(), t


def test_the_loss_is_that_of_eq_1():
    """Written out once more: each target's cross-entropy, by its weight, over the outputs. Image
    tokens have a target with --image-loss alone."""
    rng, w = random.Random(10), AUXILIARY_WEIGHT
    for image_loss in (False, True):
        model = random_model(rng, layers=3, image_loss=image_loss)
        m = model.config.side ** 2
        codes = torch.randint(CODES, (1, m))
        batch = understanding(words, codes, [[("1 2", "3"), ("4", "5 6")]], 14, image_loss)
        plan = make_plan("hmgen", 3, 1)
        log_p = model.head(model.norm(model.gathered(batch, plan)))[0].log_softmax(-1)
        # The image; 1 2 3 and 4 5 6: three answer tokens, two ends, one question token.
        targets = [(FIRST_CODE + code, w * image_loss) for code in codes[0].tolist()] + [
            (0, 0), (2, w), (3, 1), (words.eos, w), (5, 1), (6, 1), (words.eos, w)]
        total = sum(-weight * log_p[i, target] for i, (target, weight) in enumerate(targets, 1))
        assert abs(model(batch, plan)[1] - total / 5) < 1e-6            # weights are float32


def test_a_picture_depends_neither_on_padding_nor_on_those_drawn_beside_it():
    """... nor on their captions, which are of other lengths. The seed counts."""
    rng = random.Random(11)
    model, plan = random_model(rng, layers=3, side=3), make_plan("hmgen", 3, 1)
    captions = [text(rng, n, n) for n in (6, 0, 2, 5, 1, 3, 3)]
    alone, three, all_at_once, other_seed = (
        draw(model, words, captions, plan, (1.5, .7), seed, batch)
        for batch, seed in ((1, 0), (3, 0), (100, 0), (100, 1)))
    assert (alone == three).all() and (alone == all_at_once).all() and (alone != other_seed).any()
    unguided, no_caption = (draw(model, words, texts, plan, (guidance, .7))
                            for texts, guidance in ((captions, 0.), ([""] * 7, 1.)))
    assert (unguided == no_caption).all()
    codes = torch.randint(CODES, (1, 9))
    short, long = (model(generation(words, codes, ["1 2 3"], n), plan)[0] for n in (5, 9))
    assert (short - long).abs().max() < 1e-10
    with pytest.raises(TypeError, match="a list of captions, not one string"):
        draw(model, words, "1 2", plan, (1.5, .7))


def test_packed_questions_are_answered_as_if_asked_alone():
    """`answer` decodes with a cache what one pass over three questions finds likeliest."""
    rng = random.Random(5)
    for name in ("dense", "himix", "hmgen"):
        model, plan = random_model(rng, "image", layers=3), make_plan(name, 3, 1)
        codes = torch.randint(CODES, (model.config.side ** 2,))
        questions = [text(rng, 1, 3) for _ in range(3)]
        said = [answer(model, words, codes, question, plan) for question in questions]
        assert len({*said}) == 3 and all(said)
        batch = understanding(words, codes[None], [list(zip(questions, said))])
        likeliest = model(batch, plan)[0][0, :, :FIRST_CODE].argmax(-1)
        n = len(likeliest)                              # of questions and answers
        tokens = batch.is_output[0, -n:] & (batch.targets[0, -n:] != words.eos)
        assert torch.equal(likeliest[tokens], batch.targets[0, -n:][tokens])
        with pytest.raises(ValueError, match=r"shape \(M,\), not \(1, "):
            answer(model, words, codes[None], "1", plan)


@pytest.mark.parametrize("task", ["und", "gen"])
@pytest.mark.parametrize("projections", PROJECTIONS)
def test_flops_are_exact(task, projections):
    """The count equals what PyTorch's counter sees, forward and backward, to the last
    multiply-add: so dropped tokens enter no matmul."""
    rng = random.Random(6)
    for plan, image_loss in product({*every_plan(5), random_plan(rng, 5)}, (False, True)):
        model = random_model(rng, projections, 5, image_loss).float()
        batch = random_batch(rng, task, model.config)
        # On a CPU the counter does not know the fused kernel, only the matmuls of the plain one.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), \
                FlopCounterMode(display=False) as counter:
            model(batch, plan)[1].backward()
        assert counter.get_total_flops() == 3 * model.config.flops(task, plan), plan


def test_costs_by_hand():
    """T = 64 text, M = 256 image tokens, d = 512, one layer of HiMix beside one of dense."""
    for cost, ratio, vocab in ((paper_cost, .20, []), (flops, .32, [0])):
        himix, full = (cost([rule], Layout(2, 256, 62), 512, *vocab) for rule in (HIMIX, FULL))
        assert round(himix / full, 2) == ratio


def test_attention_allocation_is_that_of_eq_2():
    """Written out once more: a mean over updated tokens, by the segments of their keys."""
    codes, plan = torch.arange(4)[None], make_plan("himix", 3)
    model = random_model(random.Random(12), layers=3, side=2)
    for batch, letters in ((understanding(words, codes, [[("1 2", "3 4")]], 6), "ssiiiittoo.."),
                           (generation(words, codes, ["1 2"], 6), "..ssttoooo")):
        shares, _, _ = allocation(model, batch, plan)
        *_, weights = model.reference(batch, plan)
        image = range(batch.layout.before, batch.layout.before + 4)
        rows = [i for i, x in enumerate(letters) if x != "." and i not in image]
        for name, letter in zip(SEGMENTS, "stoi"):
            keys = [i for i, x in enumerate(letters) if x == letter]
            expected = [w[0].mean(0)[rows][:, keys].sum().item() / len(rows) for w in weights]
            assert np.allclose(shares[name], expected, atol=1e-6)


def test_shallow_layers_alternate_in_the_middle(error):
    for k, letters in ((0, "F"), (0, "FF"), (1, "FsF"), (1, "FsFF"), (2, "FsFsFF"),
                       (3, "FFFsFsFsFFFF")):
        plan = make_plan("hmgen", len(letters), k)
        assert "".join("s" if rule == SHALLOW else "F" for rule in plan) == letters
        assert k == 2 or plan == make_plan("hmgen", len(letters))       # a quarter by default
        for wrong in (-1, (len(letters) + 1) // 2):
            assert f"--shallow {wrong}: " in error(make_plan, "hmgen", len(letters), wrong)


def test_a_tiny_model_learns_both_tasks_and_knows_them_in_bfloat16():
    """Twenty pictures by heart: what is on them, and how to draw them."""
    torch.manual_seed(0)
    codes = torch.randint(CODES, (20, 9))
    questions = [[("99", str(100 + i))] for i in range(20)]
    names = [f"{i // 5} {i % 5}" for i in range(20)]
    batches = {"und": understanding(words, codes, questions, 4),
               "gen": generation(words, codes, names, 4)}
    layouts = {task: batch.layout for task, batch in batches.items()}
    model = Model(Config(FIRST_CODE + CODES, 3, 64, 2, 3, layouts, "task"))
    plans = {"und": make_plan("himix", 3), "gen": make_plan("hmgen", 3)}
    optimizers = optimizers_of(model, .02)
    for _ in range(100):
        for task in batches:
            model(batches[task], plans[task])[1].backward()
        apply_gradients(optimizers)
    for is_half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            for forward, task in product((model, model.reference), batches):
                assert forward(batches[task], plans[task])[1] < .1
            said = [answer(model, words, row, "99", plans["und"]) for row in codes[:5]]
            drawn = draw(model, words, names, plans["gen"], (1.5, .01))
            split = Split(codes, None, [[Question("99", str(100 + i % 19), "")] for i in range(20)])
            answers, _ = answer_all(model, words, split, plans["und"])
        assert [right for ((_, _, right),) in answers] == 19 * [True] + [False]
        assert said == ["100", "101", "102", "103", "104"] and (drawn == codes.numpy()).all()


@pytest.mark.parametrize("task, name", TASK_PLANS)
def test_blocks_compile_once_for_each_kind_of_layer(task, name):
    """Without a graph break, and the code of a layer serves all others of its kind."""
    rng = random.Random(f"{task} {name}")
    model, plan = random_model(rng, "task", layers=5), make_plan(name, 5, 1)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(3):
        batch = random_batch(rng, task, model.config)
        _, loss = model(batch, plan)
        with torch.compiler.set_stance("force_eager"):
            assert (loss - model(batch, plan)[1]).abs() < 1e-10
    assert counter.frame_count == len(set(plan))


def test_a_step_in_parts_has_the_gradients_of_both_tasks_losses():
    """In float64, for sequences whose numbers of output tokens differ."""
    rng, index = random.Random(3), torch.randint(20, (2, 8))
    model = random_model(rng, layers=3)
    plans = {"und": make_plan("dense", 3), "gen": make_plan("hmgen", 3, 1)}
    examples = {task: random_batch(rng, task, model.config, rows=20) for task in plans}
    for task, batch in examples.items():
        examples[task] = batch._replace(loss_weights=batch.loss_weights.double())
    und, gen = (model(examples[task].rows(i), plans[task])[1] for task, i in zip(plans, index))
    expected = gradients(model, und + 2 * gen)
    for parts in (1, 2, 3, 8):
        model.zero_grad()
        losses = forward_backward(model, plans, examples, parts, index)
        assert torch.allclose(losses["gen"], gen) and torch.allclose(losses["und"], und)
        for name, p in model.named_parameters():
            assert p.grad is None or torch.allclose(p.grad, expected[name], 1e-10, 1e-10), name


class OneDevice(TorchDispatchMode):     # refuses every operation on tensors of two devices
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert len({x.device.type for x in tensors if x.ndim > 0}) < 2, operation
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("task, name", TASK_PLANS)
def test_no_operation_mixes_devices(task, name):
    """A step, decoding and both forwards on the meta device, which computes nothing."""
    rng = random.Random(0)
    model, plan = random_model(rng, "task", layers=3).float(), make_plan(name, 3, 1)
    batch = random_batch(rng, task, model.config).to("meta")
    model.to("meta")
    index = torch.zeros(1, 4, dtype=torch.long, device="meta")
    with OneDevice():
        muon, adamw = optimizers_of(model, .01)         # fused, it does not know the meta device
        sgd = torch.optim.SGD(adamw.param_groups[0]["params"], .1)
        model.reference(batch, plan)
        (loss,) = forward_backward(model, {task: plan}, {task: batch}, 2, index).values()
        assert loss.device.type == "meta"
        apply_gradients((muon, sgd))
        model.generate(batch, plan, sum(batch.layout) - 3, lambda logits: logits.argmax(-1))
