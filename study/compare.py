"""Our training beside what one would take instead, of the same shape, batch and precision.

    pip install transformers && python study/compare.py [--preset gpu --compile]

Tokens a second: medians of steps that take turns. Ours; ours with AdamW alone; a GPT written the
usual way (nanoGPT's structure: LayerNorm, one QKV product, GELU, learned positions, tied head,
logits and loss at every position, AdamW); and transformers' Llama (SwiGLU as wide as needed for as
many weights, AdamW). Ours has its mask of packed questions, QK norm and rotary positions, and
computes logits only where a target may be. Compiled on CUDA, ours is a CUDA graph, as train.py has
it, and the others are launched kernel by kernel. Writes study/results/compare-PRESET.json.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "study"))
from common import hardware, mixed_precision, pick_device, run_script, script_parser, write_file

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench import bench_config, bench_step, ms_cell, time_each, timing
from data import PRESETS
from prune import make_plan
from table import RESULTS, markdown
from tokenizer import default_preset


class GPTBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab, layers, d, heads, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(GPTBlock(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Llama(nn.Module):
    def __init__(self, vocab, layers, d, heads, length):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=d, intermediate_size=8 * d // 3, use_cache=False,
            num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=length,
            attn_implementation="sdpa"))

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


def usual_step(model, ids, compiled):
    """A function that takes one training step with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with mixed_precision(ids.device):
            loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(preset, batch_size, repeats, compiled, device):
    """Times the steps, prints and writes tokens a second."""
    p, c, rows = PRESETS[preset], bench_config(preset), []
    batch = batch_size or p.batch_size
    for task in ("und", "gen"):
        length, plan = sum(c.layout(task)), make_plan("dense", p.layers)
        ids = torch.randint(c.vocab, (batch, length), device=device)
        shape = c.vocab, p.layers, p.width, p.heads, length
        steps = {"ours": bench_step(task, plan, c, batch, device, compiled),
                 "ours, AdamW alone": bench_step(task, plan, c, batch, device, compiled, False),
                 "GPT, usual": usual_step(GPT(*shape).to(device), ids, compiled)}
        try:
            steps["Llama, transformers"] = usual_step(Llama(*shape).to(device), ids, compiled)
        except ImportError:
            print("without transformers' Llama: pip install transformers")
        for name, seconds in time_each(steps, device, repeats).items():
            rows.append({"task": task, "step": name, "length": length, "batch_size": batch,
                         **timing(seconds, batch * length)})
    result = {"hardware": hardware(device), "preset": preset, "compile": compiled,
              "repeats": repeats, "rows": rows}
    path = RESULTS / f"compare-{preset}.json"
    write_file(path, json.dumps(result, indent=1))
    print(f"{result['hardware']}, preset {preset}\n\n" + markdown(
        ["task", "step", "tokens", "batch", "ms (least, most)", "tokens/s"],
        [[x["task"], x["step"], x["length"], x["batch_size"],
          ms_cell(x), f"{x['tokens_per_s']:.0f}"]
         for x in rows], 2) + f"\n\n{path}")


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=15, help="of timed steps (default: 15)")
    parser.add_argument("--compile", action="store_true", help="all of them")
    args = parser.parse_args()
    device = pick_device(args.device)
    compare(args.preset or default_preset(device), args.batch_size, args.repeats, args.compile,
            device)


if __name__ == "__main__":
    run_script(main)
