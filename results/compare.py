"""Is our training step as fast as what one would take instead? On the same shape, batch, sequence length and precision:

    pip install transformers && python results/compare.py [--preset gpu --device cuda --compile]

ours, ours with AdamW alone, a GPT written the usual way (nanoGPT's structure: LayerNorm, one QKV product, GELU, learned
positions, tied head, logits and loss at every position, AdamW) and `transformers`' Llama (SwiGLU as wide as needed for as
many weights, AdamW). Ours has its mask of packed questions, QK norm and rotary positions, and computes logits only where
there may be a target. Medians of interleaved repeats. Writes results/compare-DEVICE.json.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import command, fail

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from eval import SPEED, hardware, markdown, speed, speed_cells, timed
from prune import SIZES, make_plan
from tokenizer import pick_device, write
from train import PRESETS, bench_config, bench_step


class GPTBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab, layers, d, heads, length):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(GPTBlock(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[:ids.size(1)]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Llama(nn.Module):
    def __init__(self, vocab, layers, d, heads, length):
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=d, intermediate_size=8 * d // 3, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=length, use_cache=False, attn_implementation="sdpa"))

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


def usual_step(model, ids, compiled):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", choices=SIZES)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if args.repeats < 1:
        fail(f"--repeats {args.repeats}: expected at least 1")
    device, size, preset = pick_device(args.device), SIZES[args.preset], PRESETS[args.preset]
    rows, versions = [], f"transformers {transformers.__version__}"
    for task in ("und", "gen"):
        length, batch = sum(getattr(size, task)), preset.batch_size
        ids = torch.randint(size.vocab, (batch, length), device=device)
        shape = (size.vocab, size.layers, size.width, preset.heads, length)
        plan, c = make_plan("dense", size.layers), bench_config(args.preset)
        steps = {"ours": bench_step(task, plan, c, batch, device, args.compile),
                 "ours, AdamW alone": bench_step(task, plan, c, batch, device, args.compile, muon=False),
                 "GPT, usual": usual_step(GPT(*shape).to(device), ids, args.compile),
                 "Llama, transformers": usual_step(Llama(*shape).to(device), ids, args.compile)}
        for name, seconds in timed(steps, device, args.repeats).items():
            rows.append({"task": task, "step": name, "length": length, "batch_size": batch, **speed(seconds, batch * length)})
    result = {"hardware": hardware(device), "versions": versions, "preset": args.preset, "compile": args.compile,
              "repeats": args.repeats, "rows": rows}
    write(Path(__file__).with_name(f"compare-{device.type}.json"), json.dumps(result, indent=1))
    print(f"{result['hardware']}, {versions}, preset {args.preset}\n\n" + markdown(
        ["task", "step", "tokens a sequence", "batch", *SPEED],
        [[x["task"], x["step"], str(x["length"]), str(x["batch_size"]), *speed_cells(x)] for x in rows], "llrrrr"))


if __name__ == "__main__":
    command(main)
