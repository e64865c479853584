"""What a GPU does, as far as a machine without one can show it."""
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from eval import answer, draw
from model import Model, generation, understanding
from probe import allocation
from prune import PLANS, can_generate, make_plan
from test_model import CODES, FIRST_CODE, Config, random_batch, random_model, words
from train import apply_gradients, optimizers_of

TASK_PLANS = [(task, name) for task in ("und", "gen") for name in PLANS
              if task == "und" or can_generate(make_plan(name, 4))]


@pytest.mark.parametrize("task, name", TASK_PLANS)
def test_a_step_compiles_once_and_without_a_graph_break(task, name):
    rng = random.Random(f"{task} {name}")
    model, plan = random_model(rng, "task", layers=5), make_plan(name, 5, 1)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(3):
        batch = random_batch(rng, task, model.config)
        assert (compiled(batch, plan)[1] - model(batch, plan)[1]).abs() < 1e-10
    assert counter.frame_count == 1


@pytest.mark.parametrize("task, name", [("und", "himix"), ("gen", "route")])
def test_flex_attention_equals_the_mask(task, name, monkeypatch):
    """Forward only: on a CPU it has no backward."""
    rng = random.Random(f"{task} {name}")
    model, plan = random_model(rng, "task", layers=5).float(), make_plan(name, 5, 1)
    batch = random_batch(rng, task, model.config)
    with torch.no_grad():
        expected, _ = model(batch, plan)
        monkeypatch.setattr(model_module, "uses_flex_attention", lambda x: True)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        logits, _ = compiled(batch, plan)
    assert (logits - expected).abs().max() < 1e-4


def learn(steps=150, und="dense", gen="dense"):
    """A small float32 model that knows twenty pictures by heart."""
    torch.manual_seed(0)
    codes = torch.randint(CODES, (20, 9))
    names = [f"{i // 5} {i % 5}" for i in range(20)]
    questions = [[("99", str(100 + i))] for i in range(20)]
    batches = {"und": understanding(words, codes, questions, 4, image_loss=False),
               "gen": generation(words, codes, names, 4)}
    model = Model(Config(FIRST_CODE + CODES, 3, 64, 2, 3, FIRST_CODE, 4, 4), torch.randn(CODES, 4))
    plans = {"und": make_plan(und, 3), "gen": make_plan(gen, 3, 1)}
    optimizers = optimizers_of(model, .02)
    for _ in range(steps):
        for task in batches:
            model(batches[task], plans[task])[1].backward()
        apply_gradients(optimizers)
    return model, batches, plans, codes, names


def test_bfloat16_is_close_to_float32():
    """Losses of both forwards, answers, drawings and the probe under autocast."""
    model, batches, plans, codes, names = learn(und="himix", gen="hmgen")

    def results():
        losses = [model(batches[task], plans[task])[1].item() for task in batches]
        losses += [model.forward_masked(batches[t], plans[t])[1].item() for t in batches]
        said = [answer(model, words, row, "99", plans["und"]) for row in codes[:5]]
        drawn = draw(model, words, names, plans["gen"], temperature=.01)
        shares, _ = allocation(model, batches["und"], plans["und"])
        return losses, said, drawn, torch.tensor(shares["image"])

    losses, said, drawn, shares = results()
    with torch.autocast("cpu", torch.bfloat16):
        half_losses, half_said, half_drawn, half_shares = results()
    assert max(abs(a - b) for a, b in zip(losses, half_losses)) < .02
    assert said == half_said == [str(100 + i) for i in range(5)]
    assert torch.equal(drawn, half_drawn) and torch.equal(drawn, codes)
    assert (shares - half_shares).abs().max() < .02


class OneDevice(TorchDispatchMode):
    """Refuses every operation on tensors of two devices."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim > 0}
        assert len(devices) < 2, f"{operation}: {devices}"
        return operation(*args, **kwargs or {})


def test_no_operation_mixes_devices():
    """A step, decoding and both forwards on the meta device, which computes nothing."""
    rng = random.Random(0)
    model = random_model(rng, "task", layers=5).float()
    every = {task: random_batch(rng, task, model.config).to("meta") for task in ("und", "gen")}
    model.to("meta")
    muon, adamw = optimizers_of(model, .01)     # fused AdamW does not know the meta device
    optimizers = muon, torch.optim.SGD(adamw.param_groups[0]["params"], .1)
    with OneDevice():
        for task, name in TASK_PLANS:
            batch, plan = every[task], make_plan(name, 5, 1)
            model.forward_masked(batch, plan)
            _, loss = model(batch.rows(torch.arange(2, device="meta")), plan)
            assert loss.device.type == "meta"
            loss.backward()
            apply_gradients(optimizers)
            batch = batch._replace(image_order=None)
            model.generate(batch, plan, sum(batch.layout) - 3, lambda logits: logits.argmax(-1))
