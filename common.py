"""What every script needs and no reader has to know: errors in one line, files, devices, charts."""
import argparse
import io
import math
import os
import signal
import sys
import textwrap
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# PyTorch reads these when it is imported. Operators that Apple GPUs lack run on the CPU. Threads
# wait for each other only briefly before they sleep, which halves a step's time under other load.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
import torch                                                # noqa: E402


def fail(message):
    """Bad input: one line that says what was expected, exit status 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)        # leaves a progress bar intact
    raise SystemExit(2)


@contextmanager
def refuse_errors(message):
    """Reports any error in the block in one line. The block may read a file from anyone."""
    try:
        yield
    except Exception as error:                              # PyTorch and Pillow raise nearly all
        reason = (str(error) or "?").splitlines()[0][:200]
        fail(f"{message} ({type(error).__name__}: {reason})")


def run_script(main):
    """Run a script's main. Ctrl-C, a full GPU, and files that cannot be used end it in one line."""
    try:
        main()
    except KeyboardInterrupt:
        tqdm.write("stopped", file=sys.stderr)
        raise SystemExit(130)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: use --device cpu, or --parts 2 or more with train.py")
    except OSError as error:                                # no such file, a full disk, ...
        fail(error)


def script_parser(doc, device=True):
    """For a script's options. Its help begins with the docstring of the script."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.error = fail
    if device:
        parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


def positive(kind):
    """The type of an option: an int or a float, more than 0."""
    def number(text):
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"expected more than 0, not {text}")
        return kind(text)
    return number


@contextmanager
def noted_signals(bar):
    """Collects Ctrl-C and SIGTERM in a list inside the block, then restores their handlers."""
    signals, before = [], {}

    def note(number, frame):
        signals.append(number)
        bar.disable = True              # with `2>&1 | tee`, Ctrl-C ends tee, too: writing fails

    try:
        with suppress(ValueError):                          # outside of the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, note)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_file(path, content):
    """Write bytes or text atomically: `path` holds all of the old content or all of the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id, because two runs may want to write the same tokenizer.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())             # else a power cut may leave an empty file
        part.replace(path)
    except OSError as error:                    # a full disk
        part.unlink(missing_ok=True)
        fail(f"{path} cannot be written: {error.strerror}")


def save_checkpoint(contents, path):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_file(path, buffer.getvalue())


def read_checkpoint(path, kind):
    """Read a checkpoint of this project, whose "kind" is `kind`; refuse anything else. It may be
    untrusted: weights_only runs no code."""
    with refuse_errors(f"{path} is not a {kind} checkpoint of this project"):
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if contents["kind"] != kind:
            raise ValueError(f"its kind is {contents['kind']}")
    return contents


def pick_device(name):
    """--device -> torch.device; "auto" takes the best there is, and says which."""
    if name == "auto":
        gpus = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((gpu for gpu, module in gpus.items() if module.is_available()), "cpu")
        print(f"device: {name}, the best that PyTorch {torch.__version__} finds here")
    with refuse_errors(f"--device {name} cannot be used here"):
        torch.zeros(1, device=name)
    torch.set_float32_matmul_precision("high")              # TF32 where a GPU has it
    return torch.device(name)


def hardware(device):
    """What a result was measured on, in words."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    cpu = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, {cpu}, PyTorch {torch.__version__}"


def has_bfloat16(device):
    """Whether a GPU computes in bfloat16 itself: from Ampere (2020) on. Before, PyTorch emulates
    it, which is slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# ---------------------------------------------------------------------- pictures for people

RED, GREEN, GREY, DARK = (220, 30, 30), (50, 150, 80), (200, 200, 200), (60, 60, 60)
LINE_COLOURS = (40, 100, 190), (225, 120, 30), GREEN, (190, 50, 60), (150, 90, 190)


def font_for(text, size=12):
    """Pillow's own font, which is Latin; for other letters one of the system's, if there is one."""
    names = "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf"
    for name in () if text.isascii() else names:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def save_picture(image, path):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    write_file(path, buffer.getvalue())


def contact_sheet(pixels, texts, path, columns=6, size=160, right=()):
    """A PNG: (N, H, W, 3) uint8 pictures over N texts. right: N flags (green, red), or None."""
    font, gap = font_for("".join(texts)), 12
    texts = ["\n".join(textwrap.fill(line, size // 6) for line in text.split("\n"))
             for text in texts]
    height = size + 2 * gap + 16 * (1 + max(text.count("\n") for text in texts))    # of a row
    rows = math.ceil(len(texts) / columns)
    sheet = Image.new("RGB", (gap + columns * (size + gap), gap + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pixels, texts)):
        x, y = gap + i % columns * (size + gap), gap + i // columns * height
        sheet.paste(Image.fromarray(picture).resize((size, size), Image.NEAREST), (x, y))
        frame = {True: GREEN, False: RED}.get(right[i] if right else None, GREY)
        draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=frame, width=2)
        draw.text((x, y + size + 4), text, DARK, font)
    save_picture(sheet, path)


def line_chart(lines, title, low, high, size=(560, 360)):
    """{name: [y, ...]}, each from left to right, as an Image; the y axis goes from low to high."""
    font, left, top, right, bottom = font_for(""), 50, 50, size[0] - 24, size[1] - 20
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, 8), title, DARK, font)
    for y in np.linspace(low, high, 5):
        height = np.interp(y, (low, high), (bottom, top))               # in pixels
        draw.line([(left, height), (right, height)], fill=GREY)
        draw.text((left - 6, height), f"{y:.2g}", DARK, font, anchor="rm")
    x = left                                                # of the next name
    for colour, (name, line) in zip(cycle(LINE_COLOURS), lines.items()):
        heights = np.interp(line, (low, high), (bottom, top))
        draw.line([*zip(np.linspace(left, right, len(line)), heights)], fill=colour, width=2)
        draw.text((x, 34), name, colour, font, anchor="lm")
        x += 20 + font.getlength(name)
    return sheet
