"""The two forwards are one function, and what a plan drops costs nothing."""
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import INSTRUCTION_WEIGHT, Config, LayerCache, Model, aimed, answer, generation, understanding
from prune import FULL, HIMIX, PLANS, SHALLOW, Layout, Rule, flops, make_plan, paper_cost
from tokenizer import FIRST_CODE

CODES = 16


class Words:
    """Stands in for a tokenizer: words are the ids themselves."""
    bos, eos, und, gen, pad, first_code = 507, 508, 509, 510, 511, FIRST_CODE

    def ids(self, text):
        return [int(word) for word in text.split()]

    def string(self, ids):
        return " ".join(map(str, ids))


words = Words()


def text(rng, low, high):
    return " ".join(str(rng.randrange(256)) for _ in range(rng.randint(low, high)))


def network(rng, projections="shared", layers=None):
    """A random float64 model, none of whose weights is special."""
    torch.manual_seed(rng.randrange(10 ** 6))
    layers, side = layers or rng.randint(1, 6), rng.randint(1, 4)
    m = side * side
    c = Config(FIRST_CODE + CODES, layers, 32, Layout(2, m, rng.randint(14, 20)), Layout(rng.randint(8, 12), m, 0), hidden=2,
               heads=2, side=side, projections=projections)
    model = Model(c, torch.randn(CODES, 4)).double()
    for p in model.parameters():
        p.data.copy_(torch.randn_like(p) * (.3 if p.ndim == 2 else 1))
    return model


def random_batch(rng, task, c, rows=3, image_loss=None):
    codes = torch.randint(CODES, (rows, c.und.image))
    if task == "und":
        turns = [[(text(rng, 1, 5), text(rng, 1, 2)) for _ in range(rng.randint(1, 4))] for _ in range(rows)]
        return understanding(words, codes, turns, c.und.after, rng.random() < .5 if image_loss is None else image_loss)
    return generation(words, codes, [text(rng, 0, 6) for _ in range(rows)], c.gen.before)


def random_plan(rng, layers):
    """Any rules at all, not only the named plans."""
    return tuple(Rule(rng.random() < .5, rng.choice(["hidden", "embedding", "none"]), rng.randint(1, 3)) for _ in range(layers))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("task", ["und", "gen"])
@pytest.mark.parametrize("projections", ["shared", "image", "task"])
def test_gathered_equals_masked(task, projections):
    rng = random.Random(f"{task} {projections}")
    for trial in range(8):
        model = network(rng, projections)
        layers = model.config.layers
        named = [make_plan(name, layers, k) for name in PLANS for k in range((layers - 1) // 2 + 1)]
        batch = random_batch(rng, task, model.config)
        for plan in [*set(named), random_plan(rng, layers), random_plan(rng, layers)]:
            logits, loss = model(batch, plan)
            reference, reference_loss, attention = model.forward_masked(batch, plan)
            asked = batch.weights[:, aimed(batch)] > 0
            assert (logits - reference)[asked].abs().max() < 1e-10
            assert abs(loss - reference_loss) < 1e-10
            for (name, a), b in zip(gradients(model, loss).items(), gradients(model, reference_loss).values()):
                assert (a - b).abs().max() < 1e-10, (plan, name)
            rows = torch.stack(attention).nan_to_num().sum(-1)
            assert ((rows - 1).abs() < 1e-10).logical_or(rows == 0).all()


def test_cached_equals_uncached():
    """Reading a sequence in spans, at random cuts, through the KV cache gives the same hidden states as all at once."""
    rng = random.Random(1)
    for trial in range(40):
        model = network(rng, rng.choice(["shared", "image", "task"]))
        c = model.config
        for task in ("und", "gen"):
            batch, plan = random_batch(rng, task, c), random_plan(rng, c.layers)
            if trial % 2:
                plan = make_plan(rng.choice(PLANS), c.layers, rng.randint(0, (c.layers - 1) // 2))
            n = batch.tokens.size(1)
            with torch.no_grad():
                whole = model.hidden(batch, plan)
                cuts = sorted({0, n, *rng.sample(range(1, n), rng.randint(1, n - 1))})
                cache = [LayerCache(batch, rule, c.heads, model.embed.weight) for rule in plan]
                for start, stop in zip(cuts, cuts[1:]):
                    some, real = model.hidden(batch, plan, start, stop, cache), batch.turns[:, start:stop] >= 0
                    assert (whole[:, start:stop] - some)[real].abs().sum() < 1e-9


@pytest.mark.parametrize("task", ["und", "gen"])
def test_causality(task):
    """Changing token t changes no logits before t, under any plan, and some at or after t."""
    rng = random.Random(2)
    for plan_name in PLANS:
        if (task, plan_name) in (("gen", "himix"), ("und", "naive-all")):    # blind: nothing that follows sees the image
            continue
        model = network(rng, "task", layers=5)
        c, plan = model.config, make_plan(plan_name, 5, 2)
        batch = random_batch(rng, task, c, rows=1)
        batch = batch._replace(turns=batch.turns.clamp(0, 0))           # one stream: no padding, no separate questions
        with torch.no_grad():
            before, _ = model(batch, plan)
            first = aimed(batch).start
            for t in range(batch.tokens.size(1)):
                tokens = batch.tokens.clone()
                tokens[:, t] = (tokens[:, t] + 1) % CODES + (FIRST_CODE if tokens[0, t] >= FIRST_CODE else 0)
                changed = (model(batch._replace(tokens=tokens), plan)[0] - before).abs().amax(-1)[0]
                assert (changed[:max(0, t - first)] == 0).all(), (plan_name, t)
                assert changed[max(0, t - first):].sum() > 0 or t == batch.tokens.size(1) - 1 and task == "gen"


def test_image_loss_is_that_of_each_image_token_after_those_before_it():
    rng = random.Random(10)
    model = network(rng, layers=3)
    codes, turns = torch.randint(CODES, (2, model.config.und.image)), [[("1 2", "3")], [("4", "5"), ("6", "7")]]
    plan = make_plan("skip", 3, 1)
    plain, batch = (understanding(words, codes, turns, 14, image_loss) for image_loss in (False, True))
    logits = model.head(model.norm(model.hidden(batch, plan)[:, 1:1 + codes.size(1)]))
    cost = F.cross_entropy(logits.transpose(1, 2), codes + FIRST_CODE, reduction="sum")
    outputs = 6                                                         # three answers of a token and an end each
    assert abs(model(batch, plan)[1] - model(plain, plan)[1] - INSTRUCTION_WEIGHT * cost / outputs) < 1e-6             # weights are float32


def test_packed_questions_are_answered_as_if_asked_alone():
    rng = random.Random(3)
    for plan in (make_plan("dense", 4), make_plan("himix", 4), make_plan("hmgen", 4, 1)):
        model = network(rng, "image", layers=4)
        turns = [(text(rng, 2, 4), text(rng, 1, 1)) for _ in range(3)]
        codes = torch.randint(CODES, (1, model.config.und.image))
        together = understanding(words, codes, [turns], 20)
        logits, _ = model(together, plan)
        targets, start = together.targets[0, aimed(together)], 0
        for turn in turns:
            alone = understanding(words, codes, [[turn]], 7)
            n = sum(len(words.ids(t)) for t in turn) + 1
            assert (model(alone, plan)[0][0, :n] - logits[0, start:start + n]).abs().max() < 1e-10
            assert torch.equal(alone.targets[0, aimed(alone)][:n], targets[start:start + n])
            start += n


def test_padding_changes_nothing():
    rng = random.Random(4)
    model = network(rng, layers=3)
    codes, caption = torch.randint(CODES, (1, model.config.gen.image)), text(rng, 3, 3)
    plan = make_plan("hmgen", 3, 1)
    (short, _), (long, _) = (model(generation(words, codes, [caption], n), plan) for n in (5, 9))
    assert (short - long).abs().max() < 1e-10


def test_answer_is_the_likeliest_token_after_token():
    rng = random.Random(5)
    for plan_name in ("dense", "himix", "hmgen"):
        model = network(rng, layers=3)
        plan, question = make_plan(plan_name, 3, 1), text(rng, 3, 3)
        codes, said = torch.randint(CODES, (model.config.und.image,)), []
        for _ in range(6):                                              # without a cache, and one more token each time
            batch = understanding(words, codes[None], [[(question, " ".join(map(str, said)))]], 20)
            here = len(words.ids(question)) + len(said) - 1
            said.append(model(batch, plan)[0][0, here, :FIRST_CODE].argmax().item())
        cut = said.index(words.eos) if words.eos in said else len(said)
        assert answer(model, words, codes, question, plan, longest=6) == words.string(said[:cut])


@pytest.mark.parametrize("projections", ["shared", "image", "task"])
@pytest.mark.parametrize("task", ["und", "gen"])
def test_flops_are_exact(task, projections):
    """The count equals what PyTorch's counter sees, forward and backward, to the last multiply-add."""
    rng = random.Random(6)
    model = network(rng, projections, layers=5).float()
    for image_loss, name, k in product((False, True), PLANS, range(3)):
        model.config.image_loss = image_loss
        batch, plan = random_batch(rng, task, model.config, image_loss=image_loss), make_plan(name, 5, k)
        # On a CPU the counter does not know the fused kernel, only the matmuls of the plain one.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch, plan)[1].backward()
        assert counter.get_total_flops() == len(batch.tokens) * flops(model.config, task, plan), (name, k)


def test_flops_by_hand():
    """T = 64 text, M = 256 image tokens, d = 512, one layer: HiMix is 0.20 of dense by the paper's formula."""
    c = Config(1, 1, 512, Layout(2, 256, 62), Layout(64, 256, 0), side=16)
    assert paper_cost(c, "und", (FULL,)) == 320 * 320 * 512 + 8 * 320 * 512 ** 2
    assert round(paper_cost(c, "und", (HIMIX,)) / paper_cost(c, "und", (FULL,)), 2) == .20
    assert paper_cost(c, "gen", (SHALLOW,)) == 64 * 64 * 512 + 8 * 64 * 512 ** 2


def test_himix_never_updates_the_image():
    rng = random.Random(7)
    model = network(rng, "image", layers=4)
    batch = random_batch(rng, "und", model.config)
    before, m, _ = batch.layout
    image = model.hidden(batch, make_plan("himix", 4))[:, before:before + m]
    assert torch.equal(image, model.embedded(batch, before, before + m))


def test_shallow_layers_pass_the_image_on_bit_for_bit():
    rng = random.Random(8)
    model = network(rng, layers=3)
    batch = random_batch(rng, "gen", model.config)
    before, image = batch.layout.before, model.hidden(batch, (FULL, SHALLOW, SHALLOW))
    model.blocks = model.blocks[:1]
    assert torch.equal(image[:, before:], model.hidden(batch, (FULL,))[:, before:])


def test_own_projections_are_used_by_image_tokens_alone():
    """... in every layer where image tokens take part: HMGen's full layers, not its shallow one."""
    rng = random.Random(9)
    model = network(rng, "task", layers=3)
    for task, other in (("und", "gen"), ("gen", "und")):
        for name in ("dense", "hmgen"):
            plan = make_plan(name, 3, 1)
            grads = gradients(model, model(random_batch(rng, task, model.config), plan)[1])
            for i, rule in enumerate(plan):
                assert grads[f"blocks.{i}.q.{other}.weight"].abs().sum() == 0 == grads[f"blocks.{i}.kv.{other}.weight"].abs().sum()
                assert (grads[f"blocks.{i}.kv.{task}.weight"].abs().sum() > 0) == (rule.keys != "none")
                assert grads[f"blocks.{i}.kv.text.weight"].abs().sum() > 0


@pytest.mark.parametrize("layers, k, letters", [(3, 1, "FsF"), (4, 1, "FsFF"), (6, 2, "FsFsFF"), (12, 3, "FFFsFsFsFFFF")])
def test_shallow_layers_alternate_in_the_middle(layers, k, letters):
    assert "".join("s" if r == SHALLOW else "F" for r in make_plan("hmgen", layers, k)) == letters


def test_plans_that_do_not_fit_are_refused():
    for name, layers, k in (("hmgen", 4, 2), ("hmgen", 4, -1), ("fast", 4, 1)):
        with pytest.raises(ValueError, match="expected"):
            make_plan(name, layers, k)


def test_a_tiny_model_learns_both_tasks():
    """Twenty pictures by heart: what is on them, and how to draw them; dense and accelerated."""
    torch.manual_seed(0)
    codes = torch.randint(CODES, (20, 9))
    for und, gen, projections in (("dense", "dense", "shared"), ("himix", "hmgen", "task")):
        c = Config(FIRST_CODE + CODES, 3, 64, Layout(2, 9, 4), Layout(4, 9, 0), heads=2, side=3, projections=projections)
        model = Model(c, torch.randn(CODES, 4))
        names = [f"{i // 5} {i % 5}" for i in range(20)]
        batches = {"und": understanding(words, codes, [[("99", str(100 + i))] for i in range(20)], 4),
                   "gen": generation(words, codes, names, 4)}
        plans = {"und": make_plan(und, 3), "gen": make_plan(gen, 3, 1)}
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(150):
            loss = sum(model(batches[task], plans[task])[1] for task in batches)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < .1, (und, gen)
        assert answer(model, words, codes[3], "99", plans["und"]) == "103"
