"""Pixels <-> codes and text <-> ids: a VQ image tokenizer, a byte-pair text tokenizer.

    python tokenizer.py                 trains both (half a minute on 2 CPU cores): out/tokenizer.pt
                                        and a picture of originals beside reconstructions
    python tokenizer.py --data PATH     the same for a folder of your own images

Ids of the one vocabulary: 0 to 255 bytes, from 256 merged text, 507 to 511 special tokens, from
512 image codes.
"""
import math
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from common import (check_output, contact_sheet, fail, has_bfloat16, pick_device, read_checkpoint,
                    run_script, save_checkpoint, script_parser)
from data import PATCH, PRESETS, load

import torch                            # after common.py, which sets an environment variable
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------- text

# A word takes the space before it along, and may have hyphens.
PATTERN = r" ?\p{L}+(?:-\p{L}+)*| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = ("<|bos|>", "<|eos|>", "<|und|>", "<|gen|>", "<|pad|>")
FIRST_CODE = 512                                        # ids below it are text and special tokens
MAX_TEXT_IDS = FIRST_CODE - len(SPECIAL)


def train_bpe(texts, size=MAX_TEXT_IDS):
    """Byte-pair encoding (Sennrich et al. 2016): {bytes: rank}, at most `size`, first 256 bytes.

    Again and again the most frequent pair of neighbours becomes one token.
    """
    ranks = {bytes([b]): b for b in range(256)}
    # Of texts without spaces each may be a word of its own: the beginnings of the most frequent
    # ones are enough.
    counts = Counter(word[:40] for text in texts for word in regex.findall(PATTERN, text))
    frequent = {word for word, _ in counts.most_common(2000)}
    words = [([bytes([b]) for b in word.encode()], n)
             for word, n in counts.items() if word in frequent]
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


# ---------------------------------------------------------------------- images

CODE_DIM = 8            # numbers in a code: few, so that no code is left unused
DECODER_BLOCKS = 2
VQ_LEARNING_RATE = 4e-3
COMMITMENT = 1 / 40     # weight of the commitment loss beside the squared error


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
    transformer learns much more slowly to predict it. The decoder sees the neighbourhood.
    """

    def __init__(self, image_size, width, codes):
        """image_size: pixels, height = width. width: channels. codes: size of the codebook."""
        super().__init__()
        self.config = {"image_size": image_size, "width": width, "codes": codes}
        self.image_size, self.side = image_size, image_size // PATCH
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, PATCH, stride=PATCH), Residual(width, 1), nn.SiLU(),
            nn.Conv2d(width, CODE_DIM, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_DIM, width, 3, padding=1),
            *[Residual(width, 3) for _ in range(DECODER_BLOCKS)], nn.SiLU(),
            nn.Conv2d(width, 3 * PATCH ** 2, 1), nn.PixelShuffle(PATCH))
        self.register_buffer("codebook", torch.zeros(codes, CODE_DIM))      # unit vectors
        # Moving averages over steps, for each code: the sum of its features, and their number.
        self.register_buffer("sums", torch.zeros(codes, CODE_DIM))
        self.register_buffer("counts", torch.zeros(codes))

    def features(self, images):
        """(B, 3, H, W) in -1..1 -> (B, side, side, CODE_DIM), unit vectors."""
        x = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return F.normalize(x.permute(0, 2, 3, 1), dim=-1)

    def nearest(self, z):
        """(..., CODE_DIM) unit vectors -> the codes of largest cosine, in one row."""
        return (z.flatten(0, -2) @ self.codebook.T).argmax(1)

    def forward(self, images):
        """Training: (B, 3, H, W) in -1..1 -> the reconstruction and the commitment loss."""
        z = self.features(images)
        if not self.counts.any():
            self.start_codebook(z)
        codes = self.nearest(z)
        quantized = self.codebook[codes].view_as(z)
        self.move_codebook(z.detach(), codes)
        commitment = (z - quantized).square().sum(-1).mean()
        # In value `quantized`, in gradient `z`: choosing a code has no gradient of its own.
        z = z + (quantized - z).detach()
        return self.decoder(z.permute(0, 3, 1, 2)), commitment

    @torch.no_grad()
    def start_codebook(self, z, rounds=10):
        """k-means on the features of the first batch."""
        z = z.flatten(0, -2)                            # (B * side * side, CODE_DIM)
        centres = z[torch.randperm(len(z), device=z.device)[:len(self.codebook)]]
        for _ in range(rounds):
            nearest = (z @ centres.T).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, z)
            centres = F.normalize(sums + 1e-6 * centres, dim=1)     # unused ones stay
        self.codebook.copy_(centres)
        self.sums.copy_(centres)
        self.counts.fill_(1)

    @torch.no_grad()
    def move_codebook(self, z, codes, decay=.95):
        """One step of the moving averages; z: features, codes: the nearest of each."""
        z = z.flatten(0, -2)                            # (B * side * side, CODE_DIM)
        counts = torch.bincount(codes, minlength=len(self.codebook)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, z)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        self.codebook.copy_(F.normalize(self.sums, dim=1))
        # A code that is hardly used moves to a feature, likelier one that is far from its code.
        even_share = len(z) / len(self.codebook)
        unused = self.counts < .03 * even_share
        if unused.any():
            error = (1 - (z * self.codebook[codes]).sum(1)).clamp(min=1e-6)
            new = z[torch.multinomial(error, int(unused.sum()), replacement=True)]
            self.codebook[unused] = new
            self.sums[unused] = new * .3 * even_share
            self.counts[unused] = .3 * even_share

    @torch.no_grad()
    def encode(self, pixels):
        """(B, H, W, 3) uint8 -> (B, side * side) codes, row by row."""
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.nearest(self.features(images)).view(len(pixels), -1)

    @torch.no_grad()
    def decode(self, codes):
        """(B, side * side) codes -> (B, H, W, 3) uint8."""
        z = self.codebook[codes].view(len(codes), self.side, self.side, -1)
        images = self.decoder(z.permute(0, 3, 1, 2)).clamp(-1, 1)   # (B, 3, H, W)
        return (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1)


# ---------------------------------------------------------------------- one vocabulary

class Tokenizer:
    """Text and images in one vocabulary. `text` is a tiktoken.Encoding, `vq` a VQ."""

    def __init__(self, ranks, vq):
        self.ranks, self.vq = ranks, vq.eval()
        special = {name: MAX_TEXT_IDS + i for i, name in enumerate(SPECIAL)}
        self.text = tiktoken.Encoding("text", pat_str=PATTERN, mergeable_ranks=ranks,
                                      special_tokens=special)
        self.bos, self.eos, self.und, self.gen, self.pad = special.values()
        self.vocab = FIRST_CODE + len(vq.codebook)

    def ids(self, text):
        """Text -> ids. What looks like a special token is text like any other, and what looks alike
        is the same text, however its accents are stored."""
        return self.text.encode_ordinary(unicodedata.normalize("NFC", text))

    def string(self, ids):
        """Ids -> text, special tokens left out."""
        return self.text.decode([i for i in ids if i < len(self.ranks)])

    def encode(self, pixels):
        """(N, H, W, 3) uint8 array -> (N, M) codes, from 0, on the CPU."""
        device, parts = self.vq.codebook.device, torch.as_tensor(pixels).split(256)
        return torch.cat([self.vq.encode(part.to(device)).cpu() for part in parts])

    def decode(self, codes):
        """(N, M) codes -> (N, H, W, 3) uint8 array."""
        device, parts = self.vq.codebook.device, codes.split(256)
        return torch.cat([self.vq.decode(part.to(device)).cpu() for part in parts]).numpy()

    def state(self):
        """All of it as plain tensors, numbers and strings, for a checkpoint."""
        return {"config": self.vq.config, "vq": self.vq.state_dict(),
                "ranks": [token.hex() for token in self.ranks]}

    @staticmethod
    def from_state(state):
        """From what `state` gave."""
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(state["ranks"])}
        vq = VQ(**state["config"])
        vq.load_state_dict(state["vq"])
        return Tokenizer(ranks, vq)


# ---------------------------------------------------------------------- training

def train_tokenizer(dataset, preset, device, steps=None):
    """Train the byte pairs on a data set's text and the VQ on its pictures; preset: a name.
    Returns a Tokenizer and its checkpoint."""
    p = PRESETS[preset]
    steps = steps or p.vq_steps
    torch.manual_seed(0)
    texts, pixels = [], []
    for task in ("und", "gen"):         # a folder gives the same pictures twice
        split = dataset.split(task, "train", p.vq_pictures // 2)
        pixels.append(split.pixels)
        texts += [caption.text for caption in split.captions]
        for questions in split.questions:
            for question in questions:
                texts += [question.text, question.answer]
    pixels = torch.tensor(np.concatenate(pixels))
    images = pixels.to(device).permute(0, 3, 1, 2)      # (N, 3, H, W) uint8

    vq = VQ(p.image_size, p.vq_width, p.codes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vq.parameters(), VQ_LEARNING_RATE, (.9, .99), weight_decay=0)
    progress = tqdm(range(steps), desc="tokenizer", unit="step")
    for step in progress:
        # Up during the first 100 steps, level, and in the second half down to zero.
        rate = VQ_LEARNING_RATE * min((step + 1) / 100, 1, 2 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(images), (p.vq_batch_size,)).to(device)
        batch = images[chosen].float() / 127.5 - 1
        reconstruction, commitment = vq(batch)
        error = (reconstruction - batch).square().mean()
        (error + COMMITMENT * commitment).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(psnr=f"{-10 * math.log10(error.item() / 4):.1f} dB")
    tokenizer = Tokenizer(train_bpe(texts), vq)
    checkpoint = {"kind": "tokenizer", "data": dataset.identity, "preset": preset}
    return tokenizer, checkpoint | tokenizer.state()


def load_tokenizer(path, dataset, preset):
    """The Tokenizer in a file; refused where it was trained on other data or for another size."""
    checkpoint = read_checkpoint(path, "tokenizer")
    trained_on = checkpoint.get("data"), checkpoint.get("preset")
    if trained_on != (dataset.identity, preset):
        fail(f"{path} was trained on {trained_on[0]} with preset {trained_on[1]}; expected "
             f"{dataset.identity} with preset {preset}: give another --tokenizer PATH (it is "
             "trained if there is no such file)")
    return Tokenizer.from_state(checkpoint)


def score_tokenizer(tokenizer, dataset, n=1000):
    """What is left of n validation pictures after encoding and decoding: PSNR (dB, over all
    pixels), and the share of the codebook in use. Returns scores, pictures, reconstructions."""
    pixels = dataset.split("gen", "val", n, questions=0).pixels
    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes)
    error = max(((pixels.astype(float) - decoded) ** 2).mean(), 1e-9)
    scores = {"n": len(pixels), "psnr": 10 * math.log10(255 ** 2 / error),
              "codes_used": len(codes.unique()) / len(tokenizer.vq.codebook)}
    return scores, pixels, decoded


def default_preset(device):
    """The size of everything that suits a device. Cards from before Ampere are slow at the larger
    one."""
    return "gpu" if has_bfloat16(device) else "cpu"


def default_path(name, data, preset, device, suffix=""):
    """Where something is written if no path is given: out/NAME, and in the name the preset and the
    folder of images, where these are not the default."""
    if preset != default_preset(device):
        name += f"-{preset}"
    if data != "shapes":
        name += f"-{Path(data).resolve().name}"
    return f"out/{name}{suffix}"


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of captioned images")
    parser.add_argument("--preset", choices=PRESETS, help="default: what fits the device")
    parser.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    parser.add_argument("--out", type=Path, help="default: out/tokenizer.pt")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        fail(f"--steps {args.steps}: expected at least 1")
    device = pick_device(args.device)
    preset = args.preset or default_preset(device)
    out = args.out or Path(default_path("tokenizer", args.data, preset, device, ".pt"))
    sheet = Path(f"{out}.png")
    check_output(out, "tokenizer")
    check_output(sheet, "picture")
    dataset = load(args.data, preset)
    tokenizer, checkpoint = train_tokenizer(dataset, preset, device, args.steps)
    save_checkpoint(checkpoint, out)
    scores, originals, reconstructions = score_tokenizer(tokenizer, dataset)
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    pictures = [picture for pair in zip(originals[:18], reconstructions[:18]) for picture in pair]
    texts = ["original", "reconstruction"] * (len(pictures) // 2)
    contact_sheet(pictures, texts, sheet)
    print(f"{out}, and {sheet}: originals beside reconstructions")


if __name__ == "__main__":
    run_script(main)
