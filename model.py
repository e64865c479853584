"""The unified model: one causal transformer over text tokens and image tokens, for understanding and generation.

From top to bottom: how sequences are built, the transformer, its KV cache, answering and drawing, checkpoints.
`Model.forward` never computes what a plan drops; `Model.forward_masked` computes everything, hides what the plan drops
and returns the attention weights. tests/ hold the two equal: logits, loss and every gradient.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import fail, refusing
from prune import PLANS, SIZES, SOME, Layout, Size, make_plan, positions
from tokenizer import Tokenizer, check_sizes, fitting, read

INSTRUCTION_WEIGHT = .2     # of a question's token in the loss, where an output token has 1. The paper's eq. 1 counts both
                            # alike, but here three targets in four would be a question's. Captions do not count;
                            # images that are only looked at do with image_loss, each token as much as one of a question

PROJECTIONS = {"shared": ["text"], "image": ["text", "image"], "task": ["text", "und", "gen"]}      # and whose they are


@dataclass
class Config(Size):
    """All that the model is built from. `Size` has the part that costs depend on."""
    heads: int = 4
    side: int = 8                   # a picture has side x side image tokens
    first_code: int = 512           # image code c has the id first_code + c
    projections: str = "shared"     # Q, K, V of image tokens: "shared" with text, own ones ("image"), or own ones for
                                    # each task ("task", the paper's share partial, sec. 6.2)

    def __post_init__(self):
        """ValueError for what no model can be built from: a configuration may come from anyone's file."""
        check_sizes(self, vocab=2 ** 20, layers=1000, width=65536, hidden=64, heads=1024, side=256, first_code=2 ** 20)
        self.und, self.gen = Layout(*self.und), Layout(*self.gen)
        if not all(type(n) is int and 0 <= n <= 2 ** 16 for n in self.und + self.gen):
            raise ValueError(f"layouts {self.und}, {self.gen}: expected whole numbers")
        if self.und.image != self.side ** 2 or self.gen.image != self.side ** 2:
            raise ValueError(f"{self.side}x{self.side} image tokens do not fit layouts {self.und}, {self.gen}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} has to be a multiple of twice the number of heads, {self.heads}")
        if self.projections not in PROJECTIONS or type(self.image_loss) is not bool:
            raise ValueError(f"projections {self.projections!r}, image_loss {self.image_loss!r}: expected one of "
                             f"{', '.join(PROJECTIONS)}, and True or False")


class Batch(NamedTuple):
    """Sequences of one task, all of one length N. A whole training set is one too: `rows` takes a step's part of it."""
    task: str                       # "und" or "gen"
    layout: Layout
    image_loss: bool                # image tokens are targets, too: always in generation
    tokens: torch.Tensor            # (B, N)
    places: torch.Tensor            # (B, N) rotary positions
    turns: torch.Tensor             # (B, N) 0: seen by all that follow; t > 0: seen within question t; -1: padding
    targets: torch.Tensor           # (B, N) the token that should follow, -1 where none is asked for
    weights: torch.Tensor           # (B, N) of a target in the loss: 1 where it is output, else INSTRUCTION_WEIGHT

    def rows(self, index):
        return self._make((*self[:3], *(x[index] for x in self[3:])))

    def to(self, device):
        return self._make((*self[:3], *(x.to(device, non_blocking=True) for x in self[3:])))

    def visible(self, start, stop):
        """(B, 1, stop - start, N) bool: which of all keys the queries from start to stop see. Causal; questions on one
        picture are apart from each other, so that they share its cost but are answered as if asked alone; no real
        token sees padding (padding sees padding, since a row without any key has no softmax)."""
        query, key = self.turns[:, start:stop, None], self.turns[:, None]
        order = torch.arange(key.size(2), device=key.device)
        return ((order <= order[start:stop, None]) & ((key == 0) | (key == query)))[:, None]


def understanding(tokenizer, codes, asked, length, image_loss=False):
    """[bos][und] image, then as many (question, answer) pairs as fit into `length` tokens.

    codes: (B, M); asked: for each picture a list of (question, answer) strings; image_loss: predict the image tokens, too
    (the paper's eq. 1). ValueError where not even one fits.
    """
    rows, before = [], 2 + codes.size(1)
    for image, pairs in zip((codes + tokenizer.first_code).tolist(), asked):
        tokens, places, turns = [tokenizer.bos, tokenizer.und, *image], [*range(before)], [0] * before
        targets = [-1, *image, -1] if image_loss else [-1] * before
        weights = [INSTRUCTION_WEIGHT * (target >= 0) for target in targets]
        for turn, (question, answer) in enumerate(pairs, 1):
            question, answer = tokenizer.ids(question), tokenizer.ids(answer) + [tokenizer.eos]
            n = len(question) + len(answer)
            if len(tokens) + n > before + length:
                if turn == 1:
                    raise ValueError(f"a question and its answer have {n} tokens, the model takes {length}")
                break
            tokens += question + answer
            places += range(before, before + n)             # every question stands as if it came right after the image
            turns += [turn] * n
            targets += question[1:] + answer + [-1]
            weights += [INSTRUCTION_WEIGHT] * (len(question) - 1) + [1.] * len(answer) + [0.]
        rest = before + length - len(tokens)
        rows.append((tokens + [tokenizer.pad] * rest, places + [0] * rest, turns + [-1] * rest,
                     targets + [-1] * rest, weights + [0.] * rest))
    *whole, weights = (torch.from_numpy(np.array(x)) for x in zip(*rows))       # torch.tensor is slow on nested lists
    return Batch("und", Layout(2, before - 2, length), image_loss, *whole, weights.float())


def generation(tokenizer, codes, captions, length):
    """[bos][gen] caption image, where the text part is `length` tokens long: padding, if any, comes before it.

    codes: (B, M), of any value where they are still to be sampled. ValueError for a caption that does not fit.
    """
    rows, m = [], codes.size(1)
    for caption in captions:
        text = [tokenizer.bos, tokenizer.gen, *tokenizer.ids(caption)]
        rest, n = length - len(text), len(text) + m
        if rest < 0:
            raise ValueError(f"a caption has {len(text) - 2} tokens, the model takes {length - 2}: {caption[:60]!r}")
        rows.append(([tokenizer.pad] * rest + text, [0] * rest + [*range(n)], [-1] * rest + [0] * n))
    tokens, places, numbers = (torch.from_numpy(np.array(x)) for x in zip(*rows))
    image = codes + tokenizer.first_code
    none = torch.full((len(codes), length), -1)
    targets = torch.cat([none[:, 1:], image, none[:, :1]], 1)
    return Batch("gen", Layout(length, m, 0), True, torch.cat([tokens, image], 1), places, numbers, targets,
                 (targets >= 0).float())


def sequences(task, tokenizer, split, c):
    """All pictures of a data.Split as one Batch of a task. ValueError where a text does not fit."""
    codes = tokenizer.encode(split.pixels)
    if task == "und":
        turns = [[(q.text, q.answer) for q in questions] for questions in split.questions]
        return understanding(tokenizer, codes, turns, c.und.after, c.image_loss)
    return generation(tokenizer, codes, [caption.text for caption in split.captions], c.gen.before)


def aimed(batch):
    """The slice of positions that may have a target: the only ones that logits are computed for."""
    before, m, _ = batch.layout
    return slice(before - 1 if batch.image_loss else before + m, before + m - 1 if batch.task == "gen" else None)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021): turns each (x[i], x[i + Dh / 2]) by an angle. x: (B, H, n, Dh);
    cos, sin: (B, 1, n, Dh), the first half of sin negative."""
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


class Block(nn.Module):
    """Attention and FFN, pre-norm, with QK norm and squared ReLU (So et al. 2021)."""

    def __init__(self, c):
        super().__init__()
        d, self.heads, self.projections = c.width, c.heads, c.projections
        owners = PROJECTIONS[c.projections]
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q = nn.ModuleDict({name: nn.Linear(d, d, bias=False) for name in owners})
        self.kv = nn.ModuleDict({name: nn.Linear(d, 2 * d, bias=False) for name in owners})
        self.norm_q, self.norm_k = nn.RMSNorm(d // c.heads), nn.RMSNorm(d // c.heads)
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, c.hidden * d, bias=False), nn.Linear(c.hidden * d, d, bias=False)

    def owner(self, task):
        """Whose projections image tokens use."""
        return {"shared": "text", "image": "image", "task": task}[self.projections]

    def project(self, linears, x, t, task):
        """Q or K and V of t text tokens and the image tokens behind them, each by their own weights: (B, n, out)."""
        if self.projections == "shared":
            return linears["text"](x)
        return torch.cat([linears["text"](x[:, :t]), linears[self.owner(task)](x[:, t:])], 1)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (B, n, d) -> (B, H, n, Dh)

    def rotated_query(self, q, rope):
        q = self.split_heads(q).type_as(self.norm_q.weight)             # autocast hands over bfloat16; norms stay exact
        return rotate(self.norm_q(q), *rope)

    def rotated_key_value(self, kv, rope):
        k, v = map(self.split_heads, kv.chunk(2, dim=-1))
        return rotate(self.norm_k(k.type_as(self.norm_k.weight)), *rope), v

    def update(self, x, attended):
        """Residual stream (B, n, d) and outputs of the heads (B, H, n, Dh) -> residual stream after this layer."""
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        up = F.relu(self.up(self.norm2(x)), inplace=True)
        return x + self.down(up * up)                                   # in place, and no .square(): a quarter of the FFN's time


def text_first(x, layout, dim):
    """Text before the image, image, text after it -> all text, image."""
    before, image, after = x.split(layout, dim)
    return torch.cat([before, after, image], dim)


def cut(x, t, chosen, dim):
    """Along `dim`, the first t tokens (all text) and those image tokens behind them that the slice `chosen` names."""
    image = x.narrow(dim, t, x.size(dim) - t)
    kept = image[(slice(None),) * dim + (chosen,)]
    return x if kept.size(dim) == image.size(dim) else torch.cat([x.narrow(dim, 0, t), kept], dim)


class LayerCache:
    """Keys and values of one layer: room for all text tokens and behind them for the image tokens that its rule shows.
    What is not there yet lies in the future, where the causal mask hides it: shapes never change."""

    def __init__(self, batch, rule, heads, like):
        before, m, after = batch.layout
        self.text = before + after
        image = len(range(0, m, rule.stride)) if rule.keys != "none" else 0
        self.k, self.v = (like.new_zeros(len(batch.tokens), heads, self.text + image, like.size(1) // heads)
                          for _ in range(2))

    def extended(self, k, v, t, text_done, image_done):
        """Takes in the new keys and values, t of text and the rest of the image, and returns all."""
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer[:, :, text_done:text_done + t] = new[:, :, :t]
            image = self.text + image_done
            buffer[:, :, image:image + new.size(2) - t] = new[:, :, t:]
        return self.k, self.v


class Model(nn.Module):
    def __init__(self, c, codebook=None):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.width)
        self.row, self.column = (nn.Parameter(.02 * torch.randn(c.side, c.width)) for _ in range(2))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm, self.head = nn.RMSNorm(c.width), nn.Linear(c.width, c.vocab, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(p)                                       # every layer starts as the identity
            elif name.startswith("blocks") and p.ndim == 2:
                nn.init.normal_(p, std=p.size(1) ** -.5)
        if codebook is not None:                                        # similar codes start with similar embeddings
            image = codebook @ torch.randn(codebook.size(1), c.width)
            self.embed.weight.data[c.first_code:c.first_code + len(codebook)] = image / image.std()
        angles = torch.arange(sum(c.und) + sum(c.gen))[:, None] * 1e4 ** -torch.arange(0, 1, 2 * c.heads / c.width)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], 1), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], 1), persistent=False)

    def embedded(self, batch, start, stop):
        """Token embeddings; image tokens also tell their row and column. (B, stop - start, d)"""
        x = self.embed(batch.tokens[:, start:stop])
        before, m, _ = batch.layout
        grid = F.pad((self.row[:, None] + self.column).flatten(0, 1), (0, 0, before, sum(batch.layout) - before - m))
        return x + grid[start:stop]

    def rope(self, batch, start, stop):
        places = batch.places[:, start:stop]
        return self.cos[places][:, None], self.sin[places][:, None]     # (B, 1, n, Dh)

    def hidden(self, batch, plan, start=0, stop=None, cache=None):
        """Final states of the tokens from start to stop, (B, stop - start, d). What the plan drops enters no matmul.
        `cache`, a LayerCache for each layer, has the keys and values of the tokens before start and takes in those of
        the new ones; without one, start is 0 and stop the end.

        Inside, text comes first and the image last, so that each is one slice; attention minds only the mask.
        """
        before, m, after = batch.layout
        stop = stop or before + m + after
        new = [max(0, min(stop, b) - max(start, a)) for a, b in
               ((0, before), (before, before + m), (before + m, before + m + after))]
        t, passed = new[0] + new[2], max(0, min(start - before, m))     # new text tokens; image tokens before start
        x = text_first(self.embedded(batch, start, stop), new, 1)
        rope = [text_first(r, new, 2) for r in self.rope(batch, start, stop)]
        visible = text_first(text_first(batch.visible(start, stop), new, 2), batch.layout, 3)

        # What a layer of each rule works on: which new image tokens are queries and which keys (as slices of them: every
        # stride-th, counted from the image's first), the rotations of both, and (B, 1, queries, keys) what a query sees.
        views = {}
        for rule in set(plan):
            kept, none = slice(-passed % rule.stride, new[1], rule.stride), slice(0, 0, 1)
            query, key = kept if rule.query else none, kept if rule.keys != "none" else none
            every_key = slice(0, m, rule.stride) if rule.keys != "none" else none
            views[rule] = (query, key, [cut(r, t, query, 2) for r in rope], [cut(r, t, key, 2) for r in rope],
                           cut(cut(visible, t, query, 2), before + after, every_key, 3))

        image = original = x[:, t:]
        taking_part = slice(0, new[1], 1)                               # the image tokens that x holds behind the text
        for i, (block, rule) in enumerate(zip(self.blocks, plan)):
            query, key, rope_q, rope_k, allowed = views[rule]
            if query != taking_part:
                image = image.slice_scatter(x[:, t:], 1, taking_part.start, taking_part.stop, taking_part.step)
                x, taking_part = torch.cat([x[:, :t], image[:, query]], 1), query
            h = kv = block.norm1(x)
            if not rule.query or rule.keys != "hidden":
                source = original if rule.keys == "embedding" else image
                kv = torch.cat([h[:, :t], block.norm1(source[:, key])], 1)
            q = block.rotated_query(block.project(block.q, h, t, batch.task), rope_q)
            k, v = block.rotated_key_value(block.project(block.kv, kv, t, batch.task), rope_k)
            if cache is not None:
                k, v = cache[i].extended(k, v, t, start - passed, len(range(0, passed, rule.stride)))
            x = block.update(x, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        image = image.slice_scatter(x[:, t:], 1, taking_part.start, taking_part.stop, taking_part.step)
        return torch.cat([x[:, :new[0]], image, x[:, new[0]:t]], 1)     # in the order of the sequence again

    def forward(self, batch, plan):
        """Logits (B, n, vocab) of the n positions that `aimed` names, and the loss."""
        return self.loss(self.hidden(batch, plan), batch)

    def loss(self, x, batch):
        """Logits, and the mean cross-entropy of output tokens, to which other targets add by their weight."""
        x, targets, weights = (y[:, aimed(batch)] for y in (x, batch.targets, batch.weights))
        logits = self.head(self.norm(x))
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return logits, (each * weights.flatten()).sum() / (weights == 1).sum()

    def forward_masked(self, batch, plan):
        """The readable twin of `forward`: everything is computed, and what the plan drops is hidden. Also returns the
        attention weights of every layer, (B, H, N, N), which no fused kernel gives."""
        before, m, _ = batch.layout
        n = before + m + batch.layout.after
        x = original = self.embedded(batch, 0, n)
        rope, visible = self.rope(batch, 0, n), batch.visible(0, n)
        order = torch.arange(n, device=x.device)
        is_image = ((order >= before) & (order < before + m))[:, None]
        attention = []
        for block, rule in zip(self.blocks, plan):
            queries, keys = (torch.isin(order, torch.tensor(p, device=x.device)) for p in positions(rule, batch.layout))
            own = block.owner(batch.task)
            h = block.norm1(x)
            source = block.norm1(torch.where(is_image, original, x)) if rule.keys == "embedding" else h
            q = torch.where(is_image, block.q[own](h), block.q["text"](h))
            kv = torch.where(is_image, block.kv[own](source), block.kv["text"](source))
            q, (k, v) = block.rotated_query(q, rope), block.rotated_key_value(kv, rope)
            scores = q @ k.mT / math.sqrt(q.size(-1))
            attention.append(scores.masked_fill(~(visible & keys), -math.inf).softmax(-1))
            x = torch.where(queries[:, None], block.update(x, attention[-1] @ v), x)
        return *self.loss(x, batch), attention

    def next_logits(self, batch, plan, start, stop, cache):
        """Logits (B, vocab) for the token at `stop`, after reading the tokens from start on into the cache."""
        return self.head(self.norm(self.hidden(batch, plan, start, stop, cache)[:, -1]))

    @torch.no_grad()
    def generate(self, batch, plan, start, choose):
        """Fills in batch.tokens from `start` on, one after the other: choose(logits (B, vocab)) -> ids (B,)."""
        cache = [LayerCache(batch, rule, self.config.heads, self.embed.weight) for rule in plan]
        read = 0
        for i in range(start, batch.tokens.size(1)):
            batch.tokens[:, i] = choose(self.next_logits(batch, plan, read, i, cache))
            read = i
        return batch.tokens


# ------------------------------------------------------------------------------------------------ drawing, answering

@torch.no_grad()
def draw(model, tokenizer, captions, plan, guidance=1., temperature=1., top_k=None, seed=0):
    """Captions -> sampled codes (B, M).

    guidance: classifier-free (Ho & Salimans 2022): logits of the empty caption + guidance * (caption - empty caption);
    1 draws from the model's own distribution, more follows the caption more closely, for twice the cost. top_k: only
    the k likeliest codes. ValueError for a caption that is too long.
    """
    c, device = model.config, model.embed.weight.device
    random = torch.Generator(device).manual_seed(seed)
    rows = list(captions) + [""] * (len(captions) if guidance != 1 else 0)
    batch = generation(tokenizer, torch.zeros(len(rows), c.gen.image, dtype=torch.long), rows, c.gen.before).to(device)

    def choose(logits):
        logits = logits[:, c.first_code:].float()
        if guidance != 1:
            told, empty = logits.chunk(2)
            logits = empty + guidance * (told - empty)
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(1))).values[:, -1:], -math.inf)
        code = c.first_code + torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[:, 0]
        return code.repeat(len(rows) // len(captions))

    return model.generate(batch, plan, c.gen.before, choose)[:len(captions), c.gen.before:] - c.first_code


@torch.no_grad()
def answer(model, tokenizer, codes, question, plan, longest=24):
    """One picture's codes (M,) and a question -> the answer: the likeliest text token, again and again, up to the end
    token or `longest` tokens. ValueError for a question that is too long."""
    c, device = model.config, model.embed.weight.device
    n, first = len(tokenizer.ids(question)), 2 + c.und.image
    if not 0 < n < c.und.after:
        raise ValueError(f"a question has {n} tokens, the model takes 1 to {c.und.after - 1}: {question[:60]!r}")
    length, start = min(n + longest, c.und.after), first + n
    batch = understanding(tokenizer, codes[None], [[(question, "")]], length)
    batch.turns[:, first:] = 1                                          # what is still to come belongs to the question
    batch.places[:, first:] = first + torch.arange(length)
    out = model.generate(batch.to(device), plan, start, lambda logits: logits[:, :c.first_code].argmax(-1))
    words = out[0, start:].tolist()
    return tokenizer.string(words[:words.index(tokenizer.eos)] if tokenizer.eos in words else words).strip()


# ------------------------------------------------------------------------------------------------ checkpoints

OPTIONS = dict(objective=str, und_plan=str, gen_plan=str, projections=str, image_loss=bool, data=str, preset=str, seed=int, steps=int,
               batch_size=int, accumulate=int, save_every=int, shallow=int, lr=float, compile=bool, tokenizer=str, out=str)      # of a run


def load(folder, device):
    """A trained run, by its folder: the model, its tokenizer, and the whole checkpoint (options, step, ...)."""
    path = Path(folder) / "checkpoint.pt"
    found = read(path, "run")
    with refusing(f"{path}: its parts do not fit together"):
        for key, kind in OPTIONS.items():
            if type(found["options"][key]) is not kind:
                raise ValueError(f"option {key} is {found['options'][key]!r}")
        tokenizer, c = Tokenizer.from_state(found["tokenizer"]), Config(**found["config"])
        if (c.vocab, c.side, c.first_code) != (tokenizer.vocab, tokenizer.vq.side, tokenizer.first_code):
            raise ValueError("the model has another vocabulary than the tokenizer")
        options, step = found["options"], found["step"]
        if (options["preset"] not in SIZES or options["objective"] not in ("und", "gen", "joint") or type(found["identity"]) is not str
                or type(step) is not int or not 0 <= step <= options["steps"] or not 0 <= options["seed"] < 2 ** 32
                or min(options["batch_size"], options["accumulate"], options["save_every"]) < 1):
            raise ValueError(f"options {options}, step {step}")
        model = fitting(Model, c, found["model"])
    tokenizer.vq.to(device)
    return model.to(device).eval(), tokenizer, found


def plans_for(options, layers, told_shallow=False):
    """{task: plan} of the tasks that a run has; a plan that cannot work for its task is refused in one line, and so is
    --shallow where no plan has such layers."""
    if told_shallow and not {options["und_plan"], options["gen_plan"]} & SOME.keys():
        fail(f"--shallow {options['shallow']}: expected beside a plan that has such layers, one of {', '.join(SOME)}")
    plans = {}
    for task in ("und", "gen"):
        name = options[f"{task}_plan"]
        if options["objective"] not in (task, "joint"):
            continue
        if task == "gen" and name == "himix":
            fail("--gen-plan himix: image tokens that are never updated cannot tell their own successors apart; expected "
                 f"one of {', '.join(p for p in PLANS if p != 'himix')}")
        try:
            plans[task] = make_plan(name, layers, options["shallow"])
        except ValueError as error:
            fail(f"--{task}-plan {name}: {error}")
    return plans
