"""Pixels <-> codes and text <-> ids: a VQ image tokenizer, a byte-pair text tokenizer.

    python tokenizer.py [--data PATH]   trains both unless the file exists; saves pictures

Ids: bytes come first, merged text starts at 256, special tokens end at 511, image codes follow.
"""
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from common import (contact_sheet, pick_device, read_checkpoint, run_script, save_checkpoint,
                    script_parser)
from data import PRESETS, load, made_with, same_settings, usual_preset

import torch
import torch.nn as nn
import torch.nn.functional as F

# A word includes the space before it, and may have hyphens.
PATTERN = r" ?\p{L}+(?:-\p{L}+)*| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
FIRST_CODE = 512                                # ids below it are text and special tokens
# Counted down from there: a name that is appended moves no other.
NAMES = "<|pad|>", "<|gen|>", "<|und|>", "<|eos|>", "<|bos|>"
SPECIAL = {name: FIRST_CODE - 1 - i for i, name in enumerate(NAMES)}
MAX_TEXT_IDS = FIRST_CODE - max(16, len(NAMES))     # which leaves room for more
CODE_DIM = 8            # numbers in an image's code: few, so that no code is left unused
VOCABULARY = dict(SPECIAL, PATTERN=PATTERN, FIRST_CODE=FIRST_CODE, CODE_DIM=CODE_DIM)


def train_bpe(texts, size=MAX_TEXT_IDS):
    """Byte-pair encoding (Sennrich et al. 2016): {bytes: rank}, at most `size`, single bytes first.
    Again and again the most frequent pair of neighbours becomes one token."""
    ranks = {bytes([b]): b for b in range(256)}
    counts = Counter()
    for text, n in Counter(texts).items():              # most come again and again
        for word in regex.findall(PATTERN, text):
            counts[word] += n
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    while len(ranks) < size:
        pairs = Counter()
        for parts, n in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        if not pairs:
            break
        a, b = max(pairs, key=pairs.get)                # of equals, the one that was met first
        ranks.setdefault(a + b, len(ranks))             # other pairs may have given it before
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
    return ranks


VQ_LEARNING_RATE = 4e-3
COMMITMENT = 1 / 40     # weight of the commitment loss beside the squared error


def to_images(pixels):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class Residual(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.norm = nn.GroupNorm(8, width) if kernel > 1 else nn.Identity()
        self.mix = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):                               # (B, width, side, side), the same back
        return x + self.out(F.silu(self.mix(F.silu(self.norm(x)))))


class VQ(nn.Module):
    """Image tokenizer (van den Oord et al. 2017): pixels -> a grid of codes -> pixels.

    Codes are low-dimensional unit vectors compared by cosine (Yu et al. 2022). The codebook starts
    from k-means and follows the encoder by a moving average.

    The encoder sees one patch at a time, so that equal patches get equal codes. With 3x3
    convolutions reconstructions are as good, but a token carries 6 bits instead of 4, and the
    transformer learns much more slowly to predict it. The decoder sees the neighbourhood."""

    def __init__(self, image_size, patch, width, codes):
        """image_size, patch: pixels, height = width. width: channels. codes: of the codebook."""
        super().__init__()
        self.config = {"image_size": image_size, "patch": patch, "width": width, "codes": codes}
        self.image_size, self.side = image_size, image_size // patch
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, patch, stride=patch), Residual(width, 1), nn.SiLU(),
            nn.Conv2d(width, CODE_DIM, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_DIM, width, 3, padding=1),
            Residual(width, 3), Residual(width, 3), nn.SiLU(),
            nn.Conv2d(width, 3 * patch ** 2, 1), nn.PixelShuffle(patch))
        self.register_buffer("codebook", torch.zeros(codes, CODE_DIM))      # unit vectors
        # Moving averages over steps, for each code: the sum of its features, and their number.
        self.register_buffer("sums", torch.zeros(codes, CODE_DIM))
        self.register_buffer("counts", torch.zeros(codes))

    def features(self, pixels):
        """(B, H, W, 3) uint8 -> (B, side, side, CODE_DIM), unit vectors."""
        x = self.encoder(to_images(pixels).contiguous(memory_format=torch.channels_last))
        return F.normalize(x.permute(0, 2, 3, 1), dim=-1)

    def forward(self, pixels):
        """(B, H, W, 3) uint8 -> the loss of training: squared error and commitment."""
        z = self.features(pixels)
        flat = z.detach().flatten(0, 2)                 # (B * side * side, CODE_DIM)
        if not self.counts.any():
            self.start_codebook(flat)
        codes = (flat @ self.codebook.T).argmax(-1)     # those of largest cosine
        quantized = self.codebook[codes].view_as(z)
        self.move_codebook(flat, codes)
        commitment = (z - quantized).square().sum(-1).mean()
        # Straight-through: the value of `quantized`, the gradient of `z` (argmax has none).
        z = z + (quantized - z).detach()
        reconstruction = self.decoder(z.permute(0, 3, 1, 2))
        error = (reconstruction - to_images(pixels)).square().mean()
        return error + COMMITMENT * commitment

    def start_codebook(self, z, rounds=10):
        """k-means on the features of the first batch, (n, CODE_DIM)."""
        centres = z[torch.randperm(len(z), device=z.device)[:len(self.codebook)]]
        for _ in range(rounds):
            nearest = (z @ centres.T).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, z)
            centres = F.normalize(sums + 1e-6 * centres, dim=1)     # unused ones stay
        self.codebook.copy_(centres)
        self.sums.copy_(centres)
        self.counts.fill_(1)

    def move_codebook(self, z, codes, decay=.95):
        """One step of the moving averages; z: features, (n, CODE_DIM); codes: their nearest."""
        counts = torch.bincount(codes, minlength=len(self.codebook)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, z)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        self.codebook.copy_(F.normalize(self.sums, dim=1))
        # A rarely used code moves to a random feature, preferably one far from its code.
        even_share = len(z) / len(self.codebook)
        unused = self.counts < .03 * even_share
        if unused.any():
            error = (1 - (z * self.codebook[codes]).sum(1)).clamp(min=1e-6)
            new = z[torch.multinomial(error, int(unused.sum()), replacement=True)]
            self.codebook[unused] = new
            self.sums[unused] = new * .3 * even_share
            self.counts[unused] = .3 * even_share


class Tokenizer:
    """Text and images in one vocabulary. `text` is a tiktoken.Encoding, `vq` a VQ."""

    def __init__(self, ranks, vq):
        self.ranks, self.vq = ranks, vq.eval()
        self.text = tiktoken.Encoding("text", pat_str=PATTERN, mergeable_ranks=ranks,
                                      special_tokens=SPECIAL)
        for name, token_id in SPECIAL.items():          # self.bos, self.und, ...
            setattr(self, name.strip("<|>"), token_id)
        self.vocab = FIRST_CODE + len(vq.codebook)

    @cache                      # of few texts, but asked for often
    def ids(self, text):
        """Text -> ids. The name of a special token is text like any other. Texts that look alike
        get the same ids, however their accents are stored."""
        return self.text.encode_ordinary(unicodedata.normalize("NFC", text))

    def string(self, ids):
        """Ids -> text, special tokens left out."""
        return self.text.decode([i for i in ids if i < len(self.ranks)])

    @torch.no_grad()
    def encode(self, pixels):
        """(N, H, W, 3) uint8 array -> (N, M) codes from 0, row by row, on the CPU."""
        codes = []
        for part in torch.as_tensor(pixels).split(256):
            z = self.vq.features(part.to(self.vq.codebook.device))
            codes.append((z @ self.vq.codebook.T).argmax(-1).flatten(1).cpu())
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, codes):
        """(N, M) codes -> (N, H, W, 3) uint8 array."""
        pixels = []
        for part in codes.split(256):
            z = self.vq.codebook[part.to(self.vq.codebook.device)]          # (B, M, CODE_DIM)
            z = z.mT.unflatten(2, (self.vq.side, self.vq.side))
            images = self.vq.decoder(z).clamp(-1, 1)                        # (B, 3, H, W)
            pixels.append((images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(pixels).numpy()

    def state(self):
        """All of it as plain tensors, numbers and strings, for a checkpoint."""
        return {"config": self.vq.config, "vq": self.vq.state_dict(), "vocabulary": VOCABULARY,
                "ranks": [token.hex() for token in self.ranks]}

    @staticmethod
    def from_state(state, device="cpu"):
        """The inverse of `state`. Refused if its ids have changed their meaning."""
        had = state.get("vocabulary", {})
        now = {name: x for name, x in VOCABULARY.items() if name in had or name not in SPECIAL}
        same_settings(had, now, "the tokenizer of this checkpoint")
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(state["ranks"])}
        vq = VQ(**state["config"])
        vq.load_state_dict(state["vq"])
        return Tokenizer(ranks, vq.to(device))


def train_tokenizer(dataset, preset, device, seed=0):
    """A Tokenizer: byte pairs of a data set's texts, and a VQ of its pictures: see `VQ.forward`."""
    p = PRESETS[preset]
    torch.manual_seed(seed)
    splits = [dataset.split(task, "train", p.vq_pictures // 2, seed) for task in ("und", "gen")]
    pixels = torch.tensor(np.concatenate([split.pixels for split in splits])).to(device)
    texts = []
    for split in splits:
        texts += [caption.text for caption in split.captions]
        texts += [text for asked in split.questions for q in asked for text in (q.text, q.answer)]
    vq = VQ(dataset.image_size, p.patch, p.vq_width, p.codes)
    vq.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vq.parameters(), betas=(.9, .99), weight_decay=0, fused=True)
    for step in tqdm(range(p.vq_steps), desc="tokenizer", unit="step"):
        # Up during the first 100 steps, level, and in the second half down to zero.
        factor = min((step + 1) / 100, 1, 2 * (1 - step / p.vq_steps))
        optimizer.param_groups[0]["lr"] = VQ_LEARNING_RATE * factor
        chosen = torch.randint(len(pixels), (p.vq_batch_size,)).to(device)
        vq(pixels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Tokenizer(train_bpe(texts), vq)


def get_tokenizer(path, dataset, preset, device, seed=0):
    """The Tokenizer in a file, by default one named after data set and preset; trained first if
    there is none. Refuses one made with other data, data.COLUMNS or vocabulary."""
    now = made_with(dataset, preset, ("world", "tokenizer"))
    path = path or f"out/tokenizer-{dataset.identity.replace(' ', '-')}-{preset}.pt"
    if not Path(path).exists():
        state = train_tokenizer(dataset, preset, device, seed).state()
        save_checkpoint({"kind": "tokenizer", "made_with": now, **state}, path)
    checkpoint = read_checkpoint(path, "tokenizer")
    same_settings(checkpoint.get("made_with", {}), now, path)
    return Tokenizer.from_state(checkpoint, device)


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of captioned images")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--seed", type=int, default=0, help="of a new one's pictures and weights")
    parser.add_argument("--out", help="default: out/tokenizer-DATA-PRESET.pt")
    args = parser.parse_args()
    device = pick_device(args.device)
    preset = args.preset or usual_preset(device)
    dataset = load(args.data, preset)
    tokenizer = get_tokenizer(args.out, dataset, preset, device, args.seed)
    originals = dataset.split("gen", "val", 18, questions=0).pixels
    reconstructions = tokenizer.decode(tokenizer.encode(originals))
    pictures = [picture for pair in zip(originals, reconstructions) for picture in pair]
    picture = f"{args.out or 'out/tokenizer'}.png"
    contact_sheet(pictures, ["original", "reconstruction"] * len(originals), picture)
    print(f"{picture}: originals beside reconstructions")


if __name__ == "__main__":
    run_script(main)
