"""What a GPU does, as far as a machine without one can show it."""
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval import answer, draw
from prune import make_plan
from test_model import TASK_PLANS, learn, random_batch, random_model, words
from train import apply_gradients, forward_backward, optimizers_of


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


def test_a_step_in_parts_has_the_same_gradients():
    """In float64, for sequences whose numbers of output tokens differ."""
    rng = random.Random(3)
    model = random_model(rng, layers=3)
    plans = {"und": make_plan("dense", 3), "gen": make_plan("hmgen", 3, 1)}
    examples = {task: random_batch(rng, task, model.config, rows=20) for task in plans}
    examples = {task: batch._replace(loss_weights=batch.loss_weights.double())
                for task, batch in examples.items()}
    index, found = torch.randint(20, (2, 8)), []
    for parts in (1, 2, 3, 8):
        model.zero_grad()
        losses = forward_backward(model, plans, examples, parts, index).values()
        found.append([*losses, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.allclose(a, b, 1e-10, 1e-10) for a, b in zip(found[0], found[-1]))


def test_bfloat16_is_close_to_float32():
    """Losses of both forwards, answers and drawings under autocast."""
    model, batches, plans, codes, names = learn()

    def results():
        losses = [forward(batches[task], plans[task])[1].item()
                  for task in batches for forward in (model, model.reference)]
        said = [answer(model, words, row, "99", plans["und"]) for row in codes[:5]]
        return losses, said, draw(model, words, names, plans["gen"], (1.5, .01))

    losses, said, drawn = results()
    with torch.autocast("cpu", torch.bfloat16):
        half_losses, half_said, half_drawn = results()
    assert max(abs(a - b) for a, b in zip(losses, half_losses)) < .02
    assert said == half_said and (drawn == half_drawn).all()


class OneDevice(TorchDispatchMode):
    """Refuses every operation on tensors of two devices."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim > 0}
        assert len(devices) < 2, f"{operation}: {devices}"
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
