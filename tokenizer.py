"""Pixels <-> codes and text <-> ids: a convolutional VQ image tokenizer, a byte-pair text tokenizer, one vocabulary.

    python tokenizer.py                     trains both on the shapes world; writes out/tokenizer.pt and, beside it, a
                                            picture of originals and reconstructions (half a minute on 2 CPU cores)
    python tokenizer.py --data PATH         the same for a folder of your own images

Ids of the one vocabulary: 0 to 255 bytes, from 256 merged text, 507 to 511 special tokens, from 512 image codes.
"""
import argparse
import io
import math
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import data as data_sets                                            # before torch: it sets an environment variable
from data import fail

import regex
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ text

PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"        # a word takes the space before it along
SPECIAL = ("<|bos|>", "<|eos|>", "<|und|>", "<|gen|>", "<|pad|>")
FIRST_CODE = 512                                            # ids below it are text and special tokens


def train_bpe(texts, size=FIRST_CODE - len(SPECIAL)):
    """Byte-pair encoding (Sennrich et al. 2016): {bytes: rank}, at most `size` entries, the 256 bytes first.

    Again and again the pair of neighbours that is most frequent over all distinct words becomes one token.
    """
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs = Counter()
        for parts, n in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        if not pairs:
            break
        a, b = max(pairs, key=pairs.get)                                # of equals, the one that was met first
        ranks.setdefault(a + b, len(ranks))
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
    return ranks


# ------------------------------------------------------------------------------------------------ images

def check_sizes(config, **most):
    """ValueError unless these fields of a configuration, which may come from anyone's file, are whole numbers in range."""
    for name, limit in most.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{name} {value!r}: expected a whole number from 1 to {limit}")


def fitting(network, config, state):
    """network(config) with the weights `state`. Nothing of a size that a file only claims is built: an error where the
    weights do not have the shapes that the configuration asks for."""
    for name, x in state.items():
        if x.untyped_storage().nbytes() < x.numel() * x.element_size():
            raise ValueError(f"{name} claims more numbers than there are")
    with torch.device("meta"):
        network(config).load_state_dict(dict(state), assign=True)      # a copy: `assign` is noted in what it is given
    real = network(config)
    real.load_state_dict(state)
    return real


@dataclass
class Config:
    image_size: int = 32
    patch: int = 4              # pixels that a token covers, height = width
    width: int = 96             # channels
    blocks: int = 2             # residual blocks of the decoder
    codes: int = 256            # size of the codebook
    code_dim: int = 8           # numbers in a code: few, and normalised, so that no code is left unused

    def __post_init__(self):
        check_sizes(self, image_size=4096, patch=256, width=65536, blocks=100, codes=65536, code_dim=4096)
        if self.image_size % self.patch or self.width % 8:
            raise ValueError(f"image size {self.image_size} has to be a multiple of the patch, {self.patch}, and width {self.width} of 8")


# Training, beside the architecture: pictures, steps, pictures a step, learning rate.
PRESETS = {"tiny": (Config(image_size=16, width=32, blocks=1, codes=32, code_dim=4), 500, 150, 16, 4e-3),
           "cpu": (Config(), 6000, 1200, 16, 4e-3),
           "gpu": (Config(image_size=64, width=128, codes=512), 20_000, 3000, 128, 4e-3)}


class Residual(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.norm = nn.GroupNorm(8, width) if kernel > 1 else nn.Identity()
        self.mix = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        return x + self.out(F.silu(self.mix(F.silu(self.norm(x)))))


class VQ(nn.Module):
    """Image tokenizer (van den Oord et al. 2017): pixels -> a grid of codes -> pixels.

    Codes are low-dimensional unit vectors compared by cosine (Yu et al. 2022). The codebook starts from k-means and
    follows the encoder by a moving average; a code that is hardly used moves to where the error is large. The encoder
    sees one patch at a time, so that equal patches get equal codes: with 3x3 convolutions in it too, reconstructions
    are as good, but a token carries 6 bits instead of 4, and the transformer learns much more slowly to predict it.
    The decoder sees the neighbourhood.
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.side = c.image_size // c.patch
        self.encoder = nn.Sequential(nn.Conv2d(3, c.width, c.patch, stride=c.patch),
                                     Residual(c.width, 1), nn.SiLU(),
                                     nn.Conv2d(c.width, c.code_dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(c.code_dim, c.width, 3, padding=1),
                                     *(Residual(c.width, 3) for _ in range(c.blocks)), nn.SiLU(),
                                     nn.Conv2d(c.width, 3 * c.patch ** 2, 1), nn.PixelShuffle(c.patch))
        self.register_buffer("codebook", torch.zeros(c.codes, c.code_dim))      # unit vectors
        self.register_buffer("sums", torch.zeros(c.codes, c.code_dim))          # moving averages: of the features
        self.register_buffer("counts", torch.zeros(c.codes))                    # of a code, and of their number

    def features(self, images):
        """(B, 3, H, W) in -1..1 -> (B, side, side, code_dim), unit vectors."""
        return F.normalize(self.encoder(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1),
                           dim=-1)

    def nearest(self, z):
        return (z.flatten(0, -2) @ self.codebook.T).argmax(1)

    @torch.no_grad()
    def move_codebook(self, z, codes, decay=.95):
        z, n = z.flatten(0, -2), len(self.codebook)
        self.counts.lerp_(torch.bincount(codes, minlength=n).float(), 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, z), 1 - decay)
        self.codebook.copy_(F.normalize(self.sums, dim=1))
        share = len(z) / n
        dead = self.counts < .03 * share
        error = (1 - (z * self.codebook[codes]).sum(1)).clamp(min=1e-6)
        new = z[torch.multinomial(error, int(dead.sum()), replacement=True)] if dead.any() else z[:0]
        self.codebook[dead], self.sums[dead], self.counts[dead] = new, new * .3 * share, .3 * share

    @torch.no_grad()
    def start_codebook(self, z, rounds=10):
        z = z.flatten(0, -2)
        centres = z[torch.randperm(len(z), device=z.device)[:len(self.codebook)]]
        for _ in range(rounds):
            nearest = (z @ centres.T).argmax(1)
            centres = F.normalize(torch.zeros_like(centres).index_add_(0, nearest, z) + 1e-6 * centres, dim=1)
        self.codebook.copy_(centres)
        self.sums.copy_(centres), self.counts.fill_(1)

    def forward(self, images):
        """Training: (B, 3, H, W) in -1..1 -> the reconstruction and the commitment loss."""
        z = self.features(images)
        if not self.counts.any():
            self.start_codebook(z)
        codes = self.nearest(z)
        quantized = self.codebook[codes].view_as(z)
        self.move_codebook(z.detach(), codes)
        commitment = (z - quantized).square().sum(-1).mean()
        straight = z + (quantized - z).detach()                         # the gradient passes straight through
        return self.decoder(straight.permute(0, 3, 1, 2)), commitment

    @torch.no_grad()
    def encode(self, pixels):
        """(B, H, W, 3) uint8 -> (B, side * side) codes, row by row."""
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.nearest(self.features(images)).view(len(pixels), -1)

    @torch.no_grad()
    def decode(self, codes):
        """(B, side * side) codes -> (B, H, W, 3) uint8."""
        z = self.codebook[codes].view(len(codes), self.side, self.side, -1).permute(0, 3, 1, 2)
        return (self.decoder(z).clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1)


class Tokenizer:
    """Text and images in one vocabulary. `text` is a tiktoken.Encoding, `vq` a VQ."""

    def __init__(self, ranks, vq):
        self.ranks, self.vq, self.first_code = ranks, vq.eval(), FIRST_CODE
        special = {name: FIRST_CODE - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}
        self.text = tiktoken.Encoding("text", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.bos, self.eos, self.und, self.gen, self.pad = special.values()
        self.vocab = FIRST_CODE + vq.config.codes

    def ids(self, text):
        """Text -> ids. What looks like a special token is text like any other."""
        return self.text.encode_ordinary(text)

    def string(self, ids):
        """Ids -> text, special tokens left out."""
        return self.text.decode([i for i in ids if i < len(self.ranks)])

    def encode(self, pixels, batch=256):
        """(N, H, W, 3) uint8 array -> (N, M) codes, on the CPU."""
        device = self.vq.codebook.device
        return torch.cat([self.vq.encode(torch.as_tensor(pixels[i:i + batch]).to(device)).cpu()
                          for i in range(0, len(pixels), batch)])

    def decode(self, codes, batch=256):
        """(N, M) codes -> (N, H, W, 3) uint8 array."""
        device = self.vq.codebook.device
        return torch.cat([self.vq.decode(codes[i:i + batch].to(device)).cpu()
                          for i in range(0, len(codes), batch)]).numpy()

    def state(self):
        """All of it as plain tensors, numbers and strings, for a checkpoint."""
        return {"config": asdict(self.vq.config), "vq": self.vq.state_dict(),
                "ranks": [token.hex() for token in self.ranks]}

    @staticmethod
    def from_state(state):
        """From what `state` gave. ValueError, or another, where the parts do not fit together."""
        tokens = [bytes.fromhex(token) for token in state["ranks"]]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if tokens[:256] != [bytes([b]) for b in range(256)] or not len(ranks) == len(tokens) <= FIRST_CODE - len(SPECIAL):
            raise ValueError("its ranks are not those of byte pairs")
        return Tokenizer(ranks, fitting(VQ, Config(**state["config"]), state["vq"]))


# ------------------------------------------------------------------------------------------------ files and devices

def write(path, content):
    """Writes bytes or text so that, whatever happens meanwhile, `path` holds either what it held or all of the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")            # two runs may want to write the same tokenizer
    try:
        with part.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())                                     # else a power cut may leave an empty file
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk does not say for which file


def save(what, path):
    """Writes a checkpoint."""
    buffer = io.BytesIO()
    torch.save(what, buffer)
    write(path, buffer.getvalue())


def read(path, kind):
    """Read a checkpoint written by this project; anything else is refused in one line."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except Exception as error:      # whatever the bytes are, the unpickler's complaint is not the reader's problem
        fail(f"{path} is not a {kind} checkpoint of this project, or is damaged ({type(error).__name__})")
    if not isinstance(found, dict) or found.get("kind") != kind:
        fail(f"{path} is not a {kind} checkpoint of this project")
    return found


def check_seed(seed):
    if not 0 <= seed < 2 ** 32:
        fail(f"--seed {seed}: expected 0 to 2**32 - 1")


def pick_device(name):
    """The torch.device that --device names; "auto" takes the best there is. Says which and why, and what is too old."""
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        fail(f"PyTorch {torch.__version__} is too old: expected 2.11 or newer (pip install -r requirements.txt)")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in available if available[d])
        print(f"device: {name}, the best that PyTorch {torch.__version__} finds here")
    elif not available[name]:
        fail(f"--device {name}: PyTorch {torch.__version__} finds no such device here")
    torch.set_float32_matmul_precision("high")                          # TF32 where a GPU has it
    return torch.device(name)


# ------------------------------------------------------------------------------------------------ training

def defaults(device, data):
    """The preset that fits a device, and where the tokenizer of a data set lies unless one says otherwise."""
    name = "" if data == "shapes" else "-" + Path(data).resolve().name
    return "gpu" if device.type == "cuda" else "cpu", f"out/tokenizer{name}.pt"


def train_tokenizer(dataset, preset, device, seed=0, steps=None):
    """Train the byte pairs on the data's text and the VQ on its pictures (reconstruction error + commitment). Returns
    a Tokenizer and what save writes."""
    config, pictures, default_steps, batch_size, lr = PRESETS[preset]
    steps = steps or default_steps
    torch.manual_seed(seed)
    texts = []
    for task in ("und", "gen"):
        split = dataset.split(task, "train", 300 if preset == "tiny" else 3000, seed)
        texts += [c.text for c in split.captions] + [t for some in split.questions for q in some for t in q[:2]]
    pixels = torch.tensor(dataset.split(None, "train", pictures, seed, questions=0).pixels)
    images = pixels.to(device).permute(0, 3, 1, 2)

    vq = VQ(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=lr, betas=(.9, .99), weight_decay=0)
    with tqdm(total=steps, desc="tokenizer", unit="step") as bar:
        for step in range(steps):
            for group in optimizer.param_groups:                        # warm-up; the second half goes down to zero
                group["lr"] = lr * min((step + 1) / 100, 1, 2 * (1 - step / steps))
            batch = images[torch.randint(len(images), (batch_size,)).to(device)].float() / 127.5 - 1
            reconstruction, commitment = vq(batch)
            error = (reconstruction - batch).square().mean()
            (error + commitment / 40).backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(psnr=f"{-10 * math.log10(error.item() / 4):.1f} dB")
    tokenizer = Tokenizer(train_bpe(texts), vq)
    return tokenizer, {"kind": "tokenizer", "data": dataset.identity, "preset": preset, **tokenizer.state()}


def score_tokenizer(tokenizer, dataset, n=1000):
    """What is left of validation pictures after encoding and decoding: PSNR (dB, over all pixels), the share of the
    codebook in use, and in the shapes world the share of objects and of whole scenes that the checker still reads.
    Returns the scores, the pictures and their reconstructions."""
    split = dataset.split(None, "val", n, questions=0)
    codes = tokenizer.encode(split.pixels)
    again = tokenizer.decode(codes)
    error = ((split.pixels.astype(float) - again) ** 2).mean()
    scores = {"n": len(again), "psnr": 10 * math.log10(255 ** 2 / error),
              "codes_used": len(codes.unique()) / tokenizer.vq.config.codes}
    if split.scenes:
        told = [[{t[:4] for t in scene} for scene in scenes] for scenes in (split.scenes, dataset.read(again))]
        scores["objects"] = sum(len(a & b) for a, b in zip(*told)) / sum(map(len, told[0]))
        scores["scenes"] = sum(a == b for a, b in zip(*told)) / len(again)
    return scores, split.pixels, again


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of captioned images")
    parser.add_argument("--preset", choices=PRESETS, help="size of pictures and networks (default: what fits the device)")
    parser.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--out", type=Path, help="default: out/tokenizer.pt, with --data out/tokenizer-FOLDER.pt")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        fail(f"--steps {args.steps}: expected at least 1")
    check_seed(args.seed)
    start, device = time.time(), pick_device(args.device)
    preset, out = defaults(device, args.data)
    args.preset, args.out = args.preset or preset, args.out or Path(out)
    dataset = data_sets.load(args.data, args.preset)
    tokenizer, checkpoint = train_tokenizer(dataset, args.preset, device, args.seed, args.steps)
    save(checkpoint, args.out)
    scores, before, after = score_tokenizer(tokenizer, dataset)
    print(f"{time.time() - start:.0f} s, " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    pairs = [picture for pair in zip(before[:18], after[:18]) for picture in pair]
    data_sets.contact_sheet(pairs, ["original", "reconstruction"] * (len(pairs) // 2), args.out.with_suffix(".png"))
    print(f"{args.out}, and {args.out.with_suffix('.png')}: originals beside reconstructions")


if __name__ == "__main__":
    data_sets.command(main)
