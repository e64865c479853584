"""What a GPU does, as far as a machine without one can show it."""
import copy
import json
import random
import tarfile
import time
from types import SimpleNamespace
from functools import partialmethod

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import gpu
import train
from conftest import run
from eval import answer, draw
from model import Block, Config, Model, generation, understanding
from probe import allocation
from prune import PLANS, can_generate, make_plan
from test_model import CODES, random_batch, random_model, words
from tokenizer import FIRST_CODE
from train import apply_gradients, compile_blocks, draw_order, get_batches, optimizers_of

TASK_PLANS = [(task, name) for task in ("und", "gen") for name in PLANS
              if task == "und" or can_generate(make_plan(name, 4))]


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


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(tmp_path, capsys, monkeypatch):
    """... but a mistake in the forward pass is not taken for the compiler's."""
    rng = random.Random(0)
    model, plans = random_model(rng, layers=3).float(), {"und": make_plan("dense", 3)}
    examples, log = {"und": random_batch(rng, "und", model.config)}, tmp_path / "error.txt"
    batch, index = examples["und"], torch.arange(len(examples["und"].tokens))[None]

    def no_compiler(graph, inputs):
        raise RuntimeError("no such card\nand much more")

    compile_in_vain = partialmethod(torch.nn.Module.compile, backend=no_compiler)
    monkeypatch.setattr(Block, "compile", compile_in_vain)
    torch._dynamo.reset()
    try:
        assert not compile_blocks(model, plans, examples, 1, index, log)
        assert model(batch, plans["und"])[1].isfinite()        # it goes on
        assert all(p.grad is None for p in model.parameters())
    finally:
        torch.compiler.set_stance("default")
    printed = capsys.readouterr().out
    assert "no such card" in printed and "much more" not in printed and str(log) in printed
    assert "Traceback" in log.read_text() and "much more" in log.read_text()

    def wrong(*args, **options):
        raise ValueError("a student's mistake")

    monkeypatch.setattr(Block, "forward", wrong)
    with pytest.raises(ValueError, match="mistake"):
        compile_blocks(model, plans, examples, 1, index, log)


def test_a_step_in_parts_has_the_same_gradients():
    """In float64, for sequences whose numbers of output tokens differ."""
    rng = random.Random(3)
    for task in ("und", "gen"):
        model, plan = random_model(rng, layers=3), make_plan("hmgen", 3, 1)
        examples = random_batch(rng, task, model.config, rows=20)
        examples = examples._replace(loss_weights=examples.loss_weights.double())
        options = {"seed": 0, "steps": 1, "batch_size": 8}
        ((index,),) = draw_order({task: examples}, options)
        expected = None
        for parts in (1, 2, 4):
            model.zero_grad()
            batches = list(get_batches(examples, index, parts))
            assert [len(batch.tokens) for batch, _ in batches] == parts * [8 // parts]
            outputs = sum(batch.is_output.sum().double() for batch, _ in batches)
            for batch, fraction in batches:
                exact = batch.is_output.sum() / outputs             # `fraction` is in float32
                assert abs(fraction - exact) < 1e-7
                (exact * model(batch, plan)[1]).backward()
            found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            expected = found if expected is None else expected
            assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_parts_fit_into_the_memory(monkeypatch):
    """The gpu preset on cards from 8 to 80 GB: fewer rows at a time, and always a divisor."""
    options = {"parts": None, "batch_size": 64, "compile": True, "objective": "joint"}
    c = Config(1024, 12, 512, 8, 16, 192, 48)
    found = []
    for gigabytes in (4, 8, 12, 24, 80):
        card = SimpleNamespace(total_memory=gigabytes * 2 ** 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        found.append(train.parts_that_fit(options, c, torch.device("cuda")))
    assert found == sorted(found, reverse=True) and found[-1] == 1 and found[0] > 4
    assert all(64 % parts == 0 for parts in found)


def learn(steps=150, und="dense", gen="dense"):
    """A small float32 model that knows twenty pictures by heart."""
    torch.manual_seed(0)
    codes = torch.randint(CODES, (20, 9))
    names = [f"{i // 5} {i % 5}" for i in range(20)]
    questions = [[("99", str(100 + i))] for i in range(20)]
    batches = {"und": understanding(words, codes, questions, 4),
               "gen": generation(words, codes, names, 4)}
    model = Model(Config(FIRST_CODE + CODES, 3, 64, 2, 3, 4, 4), torch.randn(CODES, 4))
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
    uniform = torch.rand(codes.shape)

    def results():
        losses = [model(batches[task], plans[task])[1].item() for task in batches]
        losses += [model.reference(batches[t], plans[t])[1].item() for t in batches]
        said = [answer(model, words, row, "99", plans["und"]) for row in codes[:5]]
        drawn = draw(model, words, names, plans["gen"], uniform, temperature=.01)
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
            model.reference(batch, plan)
            _, loss = model(batch.rows(torch.arange(2, device="meta")), plan)
            assert loss.device.type == "meta"
            loss.backward()
            apply_gradients(optimizers)
            model.generate(batch, plan, sum(batch.layout) - 3, lambda logits: logits.argmax(-1))


def test_a_visit_to_a_gpu_can_be_rehearsed(tmp_path, monkeypatch):
    """Each part leaves what it found in one archive, without checkpoints. A run that its limit has
    stopped is scored all the same."""
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.setattr(gpu, "SCORING", 60)
    long_run = ["train.py", "--preset", "tiny", "--device", "cpu", "--steps", 50_000, "--tokenizer",
                tmp_path / "tokenizer.pt", "--out", tmp_path / "joint"]
    versions = gpu.commands_of("versions", "tiny", "cpu")
    monkeypatch.setattr(gpu, "commands_of",
                        lambda name, *_: [long_run] if name == "train" else versions)
    monkeypatch.setattr(gpu, "BEGAN", time.time())
    run("tokenizer.py", "--preset", "tiny", "--device", "cpu", "--out", tmp_path / "tokenizer.pt")
    gpu.visit(120 / 60, ["versions", "train"], "tiny", torch.device("cpu"), tmp_path / "results")
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    assert [how for _, how, _ in report["versions"]] == ["exit status 0"]
    assert [how for _, how, _ in report["train"]] == ["time ran out", "exit status 0"]
    with tarfile.open(tmp_path / "results" / "visit.tar.gz") as archive:
        names = set(archive.getnames())
        found = archive.extractfile("versions.log").read().decode()
    assert {"report.json", "versions.log", "joint/eval.json", "joint/log.jsonl"} <= names
    assert not any(name.endswith(".pt") for name in names)
    assert json.loads(found.splitlines()[-1])["torch"] == torch.__version__


@pytest.mark.parametrize("capability, built_for, driver, complaint", [
    ((9, 0), ["sm_75", "sm_90"], None, None),
    ((8, 6), ["sm_75", "sm_80", "compute_80"], None, None),
    ((6, 1), ["sm_75", "sm_80"], None, "compute capability 6.1, expected 7.5"),
    (None, [], None, None),
    (None, [], "535.183.01", "CPU build" if torch.version.cuda is None else "driver"),
])
def test_a_gpu_that_cannot_be_used_is_told(capability, built_for, driver, complaint, monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(cuda, "get_arch_list", lambda: built_for)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(common.shutil, "which", lambda name: driver)
    found = common.why_no_gpu()
    assert (found is None) == (complaint is None) and (not complaint or complaint in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA graph without CUDA")
def test_a_cuda_graph_takes_the_same_steps():
    """Three steps on other sequences each, launched and replayed."""
    rng, device = random.Random(0), torch.device("cuda")
    first = random_model(rng, layers=3).float().to(device)
    examples = random_batch(rng, "und", first.config, rows=24)
    examples = examples._replace(loss_weights=examples.loss_weights.float()).to(device)
    weights = {}
    for how in ("launched", "replayed"):
        model = copy.deepcopy(first)
        optimizers, plan = optimizers_of(model, .01), make_plan("himix", 3, 1)

        def forward_backward(index):
            _, loss = model(examples.rows(index), plan)
            loss.backward()
            return loss.detach()

        if how == "replayed":
            first_index = torch.arange(8, device=device)
            forward_backward = common.cuda_graph(forward_backward, model, first_index)
        losses = []
        for index in torch.arange(24, device=device).view(3, 8):
            losses.append(forward_backward(index).item())
            apply_gradients(optimizers)
        weights[how] = torch.cat([p.flatten() for p in model.parameters()])
        assert len(set(losses)) == 3
    before = torch.cat([p.flatten() for p in first.parameters()])
    assert (weights["launched"] - before).abs().max() > .01
    assert torch.allclose(weights["launched"], weights["replayed"], atol=1e-4)
