"""The unified model: one causal transformer over text and image tokens, for both tasks.

From top to bottom: the configuration, how sequences are built, the transformer block, the model.
The model has two forward passes. Tests check that they agree, gradients included:

`Model.reference`   computes everything and hides what the plan drops: read this one
`Model.gathered`    computes only the plan's queries and keys in each layer: fast, used in training
                    and, with a KV cache, by `Model.generate`
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import read_checkpoint
from data import same_settings
from prune import FFN, FULL, Layout, Rule, flops, masks, plans_of, predicting
from tokenizer import FIRST_CODE, Tokenizer


@dataclass
class Config:
    """All that a model is built from."""
    vocab: int
    layers: int
    width: int                      # d
    heads: int
    side: int                       # a picture has side x side image tokens
    layouts: dict                   # {task: a Layout as a plain tuple, for checkpoints}
    projections: str = "shared"
    image_loss: bool = False        # a control: understanding predicts its image tokens, too

    def layout(self, task):
        return Layout(*self.layouts[task])

    def flops(self, task, plan):
        """Of forward and backward for one sequence: see prune.flops."""
        loss = self.image_loss and task == "und"
        return flops(plan, self.layout(task), self.width, self.vocab, loss)


# ---------------------------------------------------------------------- sequences

class Batch(NamedTuple):
    """Sequences of one task, all equally long: those of a step, or all that the task is trained on,
    of which `rows` selects some. Position i of `targets`, `loss_weights` and `is_output` describes
    the token that should follow position i."""
    task: str                       # "und" or "gen"
    layout: Layout
    image_loss: bool                # image tokens of understanding have targets
    tokens: torch.Tensor            # (B, N)
    position_ids: torch.Tensor      # (B, N, 2) for the rotary embedding: row and column
    segment_ids: torch.Tensor       # (B, N) 0: seen by all that follow; k: question k; -1: padding
    targets: torch.Tensor           # (B, N) the token that should follow; -1: none is asked for
    loss_weights: torch.Tensor      # (B, N) float, of the targets
    is_output: torch.Tensor         # (B, N) bool: the target is output (an answer, a drawn image)

    def map(self, function):
        """The same with the function applied to each tensor: to all but the first three fields."""
        return Batch(*self[:3], *map(function, self[3:]))

    def rows(self, index):
        return self.map(lambda x: x[index])

    def to(self, device):
        return self.map(lambda x: x.to(device))

    def attention_mask(self, queries, keys):
        """(B, 1, q, k) bool: what the tokens at the positions `queries` see of those at `keys`.

        Causal. Several questions share one picture, which saves computing it again; they do not
        see each other, so that each is answered as if it were asked alone. Only padding sees
        padding, because a query without any key has no softmax."""
        asker, seen = self.segment_ids[:, queries, None], self.segment_ids[:, None, keys]
        causal = keys <= queries[:, None]
        return (causal & ((seen == 0) | (seen == asker)))[:, None]


def blank(task, layout, image_loss, rows, pad):
    """A Batch of padding in which only image tokens have positions yet: row and column, from 0. Its
    fields are still NumPy arrays, which are faster to fill in pieces."""
    shape, m = (rows, sum(layout)), layout.image
    position_ids = np.zeros((*shape, 2), np.int64)
    grid = np.stack(np.divmod(np.arange(m), math.isqrt(m)), 1)          # (m, 2)
    position_ids[:, layout.before:layout.before + m] = grid
    return Batch(task, layout, image_loss, tokens=np.full(shape, pad), position_ids=position_ids,
                 segment_ids=np.full(shape, -1), targets=np.full(shape, -1),
                 loss_weights=np.zeros(shape, np.float32), is_output=np.zeros(shape, bool))


# Each task predicts its own output (the sentence under eq. 1): answers, or the drawn image. We add
# question tokens and the ends of answers, with a small weight.
AUXILIARY_WEIGHT = .05


def understanding(tokenizer, codes, questions, length=None, image_loss=False, most=math.inf):
    """[bos] [und] image, then questions with answers, up to the first that does not fit into
    `length` tokens. codes: (B, M). questions: for each picture a list of (question, answer)
    strings. image_loss: also predict the image tokens. By default `length` is what the questions of
    the fullest picture need, at most `most`, but never less than the longest question needs.

    A picture of 4 tokens, two questions, a length of 8; `-` is a target of -1, w is .05:

        tokens         bos und i0 i1 i2 i3  what shape   ? ring  size   ? big  pad
        position_ids     0   1  2  2  3  3     6     7   8    9     6   7   8    0   (rows)
                         0   1  2  3  2  3     6     7   8    9     6   7   8    0   (columns)
        segment_ids      0   0  0  0  0  0     1     1   1    1     2   2   2   -1
        targets          -   -  -  -  -  - shape     ? ring eos     ? big eos    -
        loss_weights     0   0  0  0  0  0     w     w   1    w     w   1   w    0
        is_output        .   .  .  .  .  .     .     .   x    x     .   x   x    .

    The end of an answer, eos, is a target, not an input: nothing follows it. With image_loss, i0 to
    i3 are targets of weight w, too."""
    encoded = [[(tokenizer.ids(question), tokenizer.ids(answer)) for question, answer in pairs]
               for pairs in questions]
    if length is None:
        lengths = [[len(q) + len(a) for q, a in pairs] for pairs in encoded]
        longest = max((n for row in lengths for n in row), default=0)
        length = min(max(map(sum, lengths)), max(most, longest))
    rows, m = codes.shape
    first = 2 + m                                   # the position after the image
    batch = blank("und", Layout(2, m, length), image_loss, rows, tokenizer.pad)
    batch.tokens[:, :2] = tokenizer.bos, tokenizer.und
    batch.tokens[:, 2:first] = FIRST_CODE + codes
    batch.position_ids[:, 1] = 1
    batch.position_ids[:, 2:first] += 2
    batch.segment_ids[:, :first] = 0
    if image_loss:
        batch.targets[:, 1:first - 1] = FIRST_CODE + codes
        batch.loss_weights[:, 1:first - 1] = AUXILIARY_WEIGHT
    for row, pairs in enumerate(encoded):
        start = first
        for number, (question_ids, answer_ids) in enumerate(pairs, 1):
            ids = question_ids + answer_ids
            stop = start + len(ids)
            if stop > first + length:
                break
            batch.tokens[row, start:stop] = ids
            # Every question stands where it would if it came right after the image.
            batch.position_ids[row, start:stop] = np.arange(first, first + len(ids))[:, None]
            batch.segment_ids[row, start:stop] = number
            batch.targets[row, start:stop] = ids[1:] + [tokenizer.eos]
            asked = stop - 1 - len(answer_ids)      # the position before the answer's first token
            batch.is_output[row, asked:stop] = True
            batch.loss_weights[row, start:stop] = AUXILIARY_WEIGHT
            batch.loss_weights[row, asked:stop - 1] = 1
            start = stop
    return batch.map(torch.from_numpy)


def generation(tokenizer, codes, captions, length=None):
    """[bos] [gen] caption image. Everything before the image takes `length` tokens, by default as
    few as possible. Padding comes first, so that all images start at the same position.

    codes: (B, M), with any values if they are still to be sampled. With a length of 5:

        tokens         pad bos gen  a ring i0 i1 i2 i3
        position_ids     0   0   1  2    3  4  4  5  5   (rows)
                         0   0   1  2    3  4  5  4  5   (columns)
        segment_ids     -1   0   0  0    0  0  0  0  0
        targets          -   -   -  -   i0 i1 i2 i3  -
        loss_weights     0   0   0  0    1  1  1  1  0
        is_output        .   .   .  .    x  x  x  x  .
    """
    prefixes = [[tokenizer.bos, tokenizer.gen] + tokenizer.ids(caption) for caption in captions]
    length = length or max(map(len, prefixes))
    rows, m = codes.shape
    batch = blank("gen", Layout(length, m, 0), False, rows, tokenizer.pad)
    batch.tokens[:, length:] = batch.targets[:, length - 1:-1] = FIRST_CODE + codes
    batch.loss_weights[:, length - 1:-1] = 1
    batch.is_output[:, length - 1:-1] = True
    for row, prefix in enumerate(prefixes):
        start = length - len(prefix)
        batch.tokens[row, start:length] = prefix
        batch.position_ids[row, start:length] = np.arange(len(prefix))[:, None]
        batch.position_ids[row, length:] += len(prefix)
        batch.segment_ids[row, start:] = 0
    return batch.map(torch.from_numpy)


def sequences(task, tokenizer, split, most=math.inf, image_loss=False):
    """A whole data.Split as one Batch. most: text tokens on one picture, of all its questions."""
    codes = tokenizer.encode(split.pixels)
    if task == "gen":
        return generation(tokenizer, codes, [caption.text for caption in split.captions])
    pairs = [[(q.text, q.answer) for q in questions] for questions in split.questions]
    return understanding(tokenizer, codes, pairs, image_loss=image_loss, most=most)


# ---------------------------------------------------------------------- the block

# Not in the paper, but these let a million parameters learn this in minutes (study/NOTES.md
# has figures for some): QK norm, squared ReLU, rotary positions by row and column that start again
# for each question, strong row and column embeddings, image embeddings that start from the
# codebook, layers that start as the identity; and Muon, in train.py.

class LayerInputs(NamedTuple):
    """What all layers with one Rule have in common: made once, by `Model.layer_inputs`."""
    rule: Rule
    layout: Layout          # of the tokens that a layer is given
    query_rotary: tuple     # (cos, sin) of those that it updates, each (B, q, 1, Dh / 2)
    key_rotary: tuple       # (cos, sin) of those that they attend to, each (B, k, 1, Dh / 2)
    mask: torch.Tensor      # (B, 1 or H, q, k) bool: what queries see; k: with those of a cache


# The sets of Q, K, V weights that only image tokens use. All tokens share the output projection,
# QK norm and FFN. With HiMix, image tokens are no queries, so their query weights are not used.
PROJECTIONS = {"shared": lambda tasks: [],              # none: they use those of text
               "image": lambda tasks: ["image"],        # one set: probably "share all" (sec. 6.1)
               "task": lambda tasks: [*tasks]}          # one each: "share partial" (sec. 6.2)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021): turns each pair (x[i], x[i + Dh / 2]) by an
    angle. x: (B, n, H, Dh); cos, sin: (B, n, 1, Dh / 2).

    Even pairs turn by a token's row, odd pairs by its column, because what an image token needs is
    as often above it as to its left. (Qwen2-VL, Wang et al. 2024, turns blocks of pairs.)"""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Attention and FFN, pre-norm, with QK norm and squared ReLU (So et al. 2021)."""

    def __init__(self, c):
        super().__init__()
        d = c.width
        self.heads, self.projections = c.heads, c.projections
        self.attention_norm, self.ffn_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        sets = ["text", *PROJECTIONS[c.projections](tasks=c.layouts)]
        self.query = nn.ModuleDict({name: nn.Linear(d, d, bias=False) for name in sets})
        self.key_value = nn.ModuleDict({name: nn.Linear(d, 2 * d, bias=False) for name in sets})
        self.query_norm, self.key_norm = nn.RMSNorm(d // c.heads), nn.RMSNorm(d // c.heads)
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, FFN * d, bias=False), nn.Linear(FFN * d, d, bias=False)

    def forward(self, x, embedding, inputs, task, cache=None, attend=None):
        """One layer: x (B, N, d), the hidden states of all tokens -> the same after the layer.
        embedding: (B, N, d), what they were before the first layer.

        Non-query tokens skip the query projection and the FFN; non-key tokens skip the key and
        value projections. cache: a list of the keys and values of earlier tokens, each
        (B, H, n, Dh); those of x are appended. attend: replaces PyTorch's attention."""
        rule, layout = inputs.rule, inputs.layout
        before, image, after = x.split(layout, 1)
        updated = x if rule.query else torch.cat([before, after], 1)        # (B, q, d)
        if rule.keys == "hidden":                           # source of keys and values: (B, k, d)
            source = x
        elif rule.keys == "embedding":                      # HiMix (sec. 5.1)
            source = torch.cat([before, embedding.split(layout, 1)[1], after], 1)
        else:                           # the naive control; HMGen's shallow layers (sec. 5.2)
            source = torch.cat([before, after], 1) if rule.query else updated
        h = self.attention_norm(updated)
        h_source = h if source is updated else self.attention_norm(source)      # saves a norm
        q = self.project(self.query, h, layout, task)
        k, v = self.project(self.key_value, h_source, layout, task).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))    # (B, n, H, Dh)
        # The norms' weights are float32, and so are q and k from here on, under autocast, too.
        q = rotate(self.query_norm(q.type_as(self.query_norm.weight)), *inputs.query_rotary)
        k = rotate(self.key_norm(k.type_as(self.key_norm.weight)), *inputs.key_rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                    # (B, H, n, Dh)
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(parts, 2) for parts in zip(*cache))
        if q.size(2) == 0:      # decoding an image token that skips this layer: MPS needs a query
            return x
        attended = (attend or F.scaled_dot_product_attention)(q, k, v, inputs.mask)
        updated = updated + self.out(attended.transpose(1, 2).flatten(2))
        # In place, and no .square(): on a CPU that saves a quarter of the FFN's time.
        h = F.relu(self.up(self.ffn_norm(updated)), inplace=True)
        updated = updated + self.down(h * h)
        if rule.query:
            return updated
        before, after = updated.split([layout.before, layout.after], 1)
        return torch.cat([before, image, after], 1)         # the image is passed on

    def project(self, linears, h, layout, task):
        """(B, n, d) -> (B, n, out): text by its own weights, image tokens, if any, by theirs."""
        if self.projections == "shared" or h.size(1) < sum(layout):     # h lacks the image
            return linears["text"](h)
        image_linear = linears["image" if self.projections == "image" else task]
        before, image, after = h.split(layout, 1)
        parts = [linears["text"](before), image_linear(image), linears["text"](after)]
        return torch.cat(parts, 1)


# ---------------------------------------------------------------------- the model

class Model(nn.Module):
    def __init__(self, c, codebook=None):
        """codebook: (codes, code_dim): similar codes start with similar embeddings."""
        super().__init__()
        self.config = c
        self.token_embedding = nn.Embedding(c.vocab, c.width)
        # Twice the size of token embeddings. Otherwise late layers, in which a token knows which
        # shape it belongs to, can no longer read its place ("where is the circle?").
        self.row = nn.Parameter(2 * torch.randn(c.side, c.width))
        self.column = nn.Parameter(2 * torch.randn(c.side, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(p)       # layers start as the identity, all logits as 0
            elif name.startswith("blocks") and p.ndim == 2:
                nn.init.normal_(p, std=p.size(1) ** -.5)
        if codebook is not None:
            embedding = codebook @ torch.randn(codebook.size(1), c.width)
            codes = slice(FIRST_CODE, FIRST_CODE + len(codebook))
            self.token_embedding.weight.data[codes] = embedding / embedding.std()
        head_width = c.width // c.heads
        frequencies = 1e4 ** -(torch.arange(0, head_width, 2) / head_width)     # (Dh / 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        row_or_column = torch.arange(len(frequencies)) % 2                      # 0, 1, 0, 1, ...
        self.register_buffer("row_or_column", row_or_column, persistent=False)

    device = property(lambda self: self.head.weight.device)

    def embed(self, batch, start=0, stop=None):
        """(B, stop - start, d): each token's embedding; of image tokens, row and column, too."""
        before, _, after = batch.layout
        grid = (self.row[:, None] + self.column).flatten(0, 1)                  # (M, d)
        grid = F.pad(grid, (0, 0, before, after))                               # (N, d), 0 for text
        return self.token_embedding(batch.tokens[:, start:stop]) + grid[start:stop]

    def rotary(self, batch, index):
        """(cos, sin) of the rotary angles at the positions `index`, each (B, n, 1, Dh / 2)."""
        ids = batch.position_ids[:, index, None]                                # (B, n, 1, 2)
        angles = ids[..., self.row_or_column] * self.frequencies
        return angles.cos(), angles.sin()

    def layer_inputs(self, rule, batch, start=0, stop=None):
        """The LayerInputs of all layers with this Rule, for the tokens from start to stop. They
        also see the cached keys before start: when the image token at position 70 predicts the
        next, one query sees 71 keys. In a shallow layer of HMGen there is then no query."""
        stop = stop or sum(batch.layout)

        def positions(first, with_image):
            index = torch.arange(first, stop, device=batch.tokens.device)
            before, image, after = index.split(batch.layout.window(first, stop))
            return torch.cat([before, image, after] if with_image else [before, after])

        queries = positions(start, rule.query)
        keys = positions(start, rule.keys != "none")
        keys_and_cached = positions(0, rule.keys != "none")
        mask = batch.attention_mask(queries, keys_and_cached)
        if mask.device.type == "mps":   # before PyTorch 2.13, one mask for all heads is misread
            mask = mask.repeat(1, self.config.heads, 1, 1)
        return LayerInputs(rule, batch.layout.window(start, stop), self.rotary(batch, queries),
                           self.rotary(batch, keys), mask)

    def loss(self, x, batch):
        """The logits (B, n, vocab) of the positions that prune.predicting names, and the loss of
        eq. 1 with weights. x: (B, N, d), the last hidden states.

            loss = sum over the batch of weight * cross-entropy / number of its output tokens

        `understanding` and `generation` show targets, weights and outputs. A step minimises L_und +
        2 L_gen (train.TASK_WEIGHT); in several parts: train.forward_backward."""
        span = predicting(batch.layout, batch.image_loss)
        logits = self.head(self.norm(x[:, span]))
        targets, weights = batch.targets[:, span].flatten(), batch.loss_weights[:, span].flatten()
        each = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="none")
        return logits, (each * weights).sum() / batch.is_output.sum().clamp(min=1)

    def reference(self, batch, plan):
        """Every layer computes all tokens; masks hide what the plan drops.

        plan: one prune.Rule for each layer. Returns logits and loss, as `forward` does, and the
        attention weights of every layer, (B, H, N, N): also of tokens that are no queries."""
        all_weights = []

        def attend(q, k, v, mask):
            """softmax(q k^T / sqrt(Dh)) v"""
            scores = q @ k.mT / math.sqrt(q.size(-1))                           # (B, H, N, N)
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            all_weights.append(weights)
            return weights @ v

        full = self.layer_inputs(FULL, batch)
        x = embedding = self.embed(batch)                                       # (B, N, d)
        for block, rule in zip(self.blocks, plan):
            is_query, is_key = torch.tensor(masks(rule, batch.layout), device=x.device)     # (N,)
            # The block skips nothing; `mask` and `where` hide what the rule drops.
            of_all = FULL._replace(keys="embedding") if rule.keys == "embedding" else FULL
            inputs = full._replace(rule=of_all, mask=full.mask & is_key)
            updated = block(x, embedding, inputs, batch.task, attend=attend)
            x = torch.where(is_query[:, None], updated, x)
        return *self.loss(x, batch), all_weights

    def gathered(self, batch, plan, start=0, stop=None, caches=None):
        """The same layers, but each computes only its queries and keys. Returns the last hidden
        states of the tokens from start to stop (default: all), (B, N, d). caches: for each layer,
        keys and values of the tokens before start, without image tokens that its rule drops."""
        inputs_of = {rule: self.layer_inputs(rule, batch, start, stop) for rule in set(plan)}
        embedding = self.embed(batch, start, stop)
        x = embedding.clone()       # passing one tensor twice would compile another variant
        for block, rule, cache in zip(self.blocks, plan, caches or [None] * len(plan)):
            x = block(x, embedding, inputs_of[rule], batch.task, cache)
        return x

    def forward(self, batch, plan):
        """Logits (B, n, vocab) of the n positions that prune.predicting names, and the loss."""
        return self.loss(self.gathered(batch, plan), batch)

    @torch.no_grad()
    def generate(self, batch, plan, start, choose):
        """Fills in batch.tokens one by one, from position `start` on. Each layer reads only the new
        tokens and caches their keys and values (not of image tokens if its rule's keys are "none").
        choose: a function, logits (B, vocab) -> ids (B,). Returns batch.tokens."""
        caches, read = [[] for _ in plan], 0                # read: how many tokens have been read
        for write in range(start, sum(batch.layout)):
            x = self.gathered(batch, plan, read, write, caches)     # the prompt, then one by one
            batch.tokens[:, write] = choose(self.head(self.norm(x[:, -1])))
            read = write
        return batch.tokens


def load_run(folder, device):
    """A trained run, by its folder: the model, its tokenizer, the whole checkpoint."""
    checkpoint = read_checkpoint(Path(folder) / "checkpoint.pt", "run")
    tokenizer = Tokenizer.from_state(checkpoint["tokenizer"], device)
    model = Model(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    plans = plans_of(checkpoint["tasks"], checkpoint["options"], model.config.layers)
    same_settings({"plans": checkpoint.get("plans")}, {"plans": str(plans)}, "this run")
    return model.to(device).eval(), tokenizer, checkpoint
