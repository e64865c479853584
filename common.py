"""What every script needs and no reader has to know: errors in one line, files, devices, charts."""
import argparse
import io
import math
import os
import platform
import re
import shutil
import sys
import textwrap
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm


def fail(message):
    """Bad input: one line that says what was expected, exit status 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)        # leaves a progress bar intact
    raise SystemExit(2)


if sys.version_info < (3, 10):
    fail(f"Python {sys.version.split()[0]} is too old: expected 3.10 or newer")
# Operators that Apple GPUs lack run on the CPU. PyTorch reads this when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
import torch                                                # noqa: E402


class Unbreakable(io.FileIO):
    """What is written for people never stops work: where nobody reads it, it is lost."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError:                                     # a closed pipe, a full disk
            return len(content)


def unbreakable(stream, descriptor):
    """stdout or stderr, such that no write fails. What a terminal cannot show becomes "?"."""
    if stream is None:                                      # it was closed from the beginning
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    encoding = stream.encoding if stream else "utf-8"
    raw = io.BufferedWriter(Unbreakable(descriptor, "wb", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors="replace", line_buffering=True)


def run_script(main):
    """Run a script's main; Ctrl-C and too little memory end it with one line."""
    sys.stdout, sys.stderr = unbreakable(sys.stdout, 1), unbreakable(sys.stderr, 2)
    try:
        main()
    except KeyboardInterrupt:
        tqdm.write("stopped", file=sys.stderr)
        raise SystemExit(130)
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "allocate memory" not in str(error):       # as on a CPU
            raise
        fail("out of memory: train.py takes more --parts or a smaller --batch-size; every script "
             "takes --device cpu")
    except OSError as error:                                # of a user's file or folder
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")


def script_parser(doc, device=True, **settings):
    """For a script's options. Its help begins with the docstring of the script."""
    # A shell puts the home folder in place of ~ in `--out ~/run`, but not in `--out=~/run`.
    home = os.path.expanduser("~")
    sys.argv[1:] = [re.sub(r"^(--[a-z-]+=)~(?=/)", rf"\1{home}", arg) for arg in sys.argv[1:]]
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
    if device:
        choices = ("auto", "cpu", "cuda", "mps")
        parser.add_argument("--device", default="auto", choices=choices)
    return parser


@contextmanager
def refuse_errors(message):
    """Around the reading of a file that may be anyone's: what goes wrong is told in one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or "?").splitlines()[0][:200]
        fail(f"{message} ({type(error).__name__}: {reason})")


# ---------------------------------------------------------------------- files and checkpoints

def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{path} cannot be a folder: {error.strerror}")


@contextmanager
def exclusive(folder):
    """Makes a folder, locks it for this process, and yields whether that worked: whether no other
    process is at work there. The lock ends with the process, however that ends. A folder that is
    still empty is removed."""
    make_folder(folder)
    try:
        import fcntl
    except ImportError:                                     # Windows has no such locks
        yield True
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    except OSError:
        print(f"{folder} has no locks: start no other process there")   # some network folders
        alone = True
    try:
        yield alone
    finally:
        if alone and not os.listdir(folder):
            os.rmdir(folder)
        os.close(lock)


def check_output(path, kind):
    """Refuses, before work begins, what cannot be written, or would replace a file that is not of
    this kind: "picture", or that of a checkpoint."""
    path = Path(path)
    if kind == "picture" and path.suffix != ".png":
        fail(f"--out {path}: expected a name that ends in .png")
    make_folder(path.parent)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"--out {path}: no file can be written there")
    if path.exists() and kind != "picture":
        read_checkpoint(path, kind)
    elif path.exists() and not is_ours(path):
        fail(f"--out {path}: there is a file that this project did not write; expected a new name")


def write_file(path, content):
    """Write bytes or text; whatever happens, `path` holds either all of the old or of the new."""
    path = Path(os.path.realpath(path))                     # of a link the file that it stands for
    make_folder(path.parent)
    # The process id, because two runs may want to write the same tokenizer.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())             # else a power cut may leave an empty file
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        fail(f"{path} cannot be written: {error.strerror}")


SOFTWARE = "unified-vlm"        # stands in our pictures, so that no other is ever overwritten


def is_ours(path):
    """Whether this project wrote a picture."""
    with suppress(Exception), Image.open(path) as image:
        return image.info.get("Software") == SOFTWARE
    return False


def save_picture(image, path):
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", SOFTWARE)
    image.save(buffer, "png", pnginfo=info)
    write_file(path, buffer.getvalue())


def save_checkpoint(contents, path):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_file(path, buffer.getvalue())


def read_checkpoint(path, kind):
    """Read a checkpoint of this project, whose "kind" is `kind`; refuse anything else. It may be
    anyone's: weights_only runs no code of it."""
    if not Path(path).is_file():
        fail(f"{path}: there is no such file; expected a {kind} checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        found = contents["kind"]
    except Exception as error:                              # PyTorch raises nearly anything
        found = f"something else ({type(error).__name__})"
    if found != kind:
        fail(f"{path} is not a {kind} checkpoint of this project; found: {found}")
    return contents


# ---------------------------------------------------------------------- the device

def pick_device(name):
    """--device -> torch.device; "auto" takes the best there is, and says which and why."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    if (int(major), int(minor)) < (2, 11):
        fail(f"PyTorch {torch.__version__} is too old: expected 2.11 (see requirements.txt)")
    problem = why_no_gpu() if name in ("auto", "cuda") else None
    available = {"cuda": torch.cuda.is_available() and not problem,
                 "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
        print(f"device: {name}, the best that PyTorch {torch.__version__} finds here"
              + (f". {problem}" if problem else ""))
    elif not available[name]:
        reason = problem if problem and name == "cuda" else "there is none that it can use"
        fail(f"--device {name}: PyTorch {torch.__version__} finds no such device here: {reason}")
    torch.set_float32_matmul_precision("high")              # TF32 where a GPU has it
    return torch.device(name)


def why_no_gpu():
    """One sentence where an NVIDIA GPU is there but PyTorch cannot use it; else None."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        numbers = re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))
        built_for = [divmod(int(number), 10) for number in numbers]         # sm_86 -> (8, 6)
        if not built_for or capability >= min(built_for):
            return None
        return (f"{torch.cuda.get_device_name()} is too old for it: compute capability "
                "{}.{}, expected {}.{}".format(*capability, *min(built_for)))
    if not shutil.which("nvidia-smi") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.version.cuda is None:
        return ("There is an NVIDIA driver, but this PyTorch is a CPU build: pytorch.org says how "
                "to install one for CUDA")
    return (f"The NVIDIA driver here may be too old for CUDA {torch.version.cuda} (CUDA 13 needs "
            "580): update it, or install a PyTorch for an older CUDA")


def has_bfloat16(device):
    """Whether a GPU computes in bfloat16 itself: from Ampere (2020) on. Before, PyTorch emulates
    it, which is slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(device):
    """Around a forward pass: matmuls in bfloat16 where the GPU has it, else all in float32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=has_bfloat16(device))


def cuda_graph(function, model, *inputs):
    """A function of tensors that leaves gradients in `model`, as one CUDA graph: a GPU gets all its
    kernels at once, instead of waiting for Python to launch hundreds of them one by one. Returns
    the same function of other tensors of the same shapes. Its result is overwritten by the next
    call."""
    inputs = [x.clone() for x in inputs]
    # What happens only once, like the choice of kernels, must not become part of the graph: warm
    # up, on a stream of its own, as PyTorch asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*inputs)
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(stream)
    # No parameter has a gradient now, so that the first backward pass of each replay writes
    # gradients and does not add to those of the replay before.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)
    gradients = [p.grad for p in model.parameters()]        # where every replay writes them
    model.zero_grad()

    def replay(*given):
        for x, new in zip(inputs, given):
            x.copy_(new)
        graph.replay()
        for p, gradient in zip(model.parameters(), gradients):
            p.grad = gradient                               # optimizers' zero_grad forgets it
        return result

    replay.function = function      # whose tensors the graph reads: they must stay where they are
    return replay


def hardware(device):
    """What a result was measured on, in words."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif device.type == "cpu" and Path("/proc/cpuinfo").exists():
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = match[1] if match else name
    return f"{name}, {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}"


def peak_memory_mb(device):
    """The most that was used so far: of the GPU, or of this process. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    status = Path("/proc/self/status")                      # only Linux has it
    high_water_mark = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    if high_water_mark:                     # ru_maxrss may be that of the process that started us
        return int(high_water_mark[1]) / 2 ** 10
    try:
        import resource
    except ImportError:
        return None
    units_per_mb = 2 ** 20 if sys.platform == "darwin" else 2 ** 10     # bytes there, else KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb


# Dense bf16 matmul peaks (FLOP/s) from the vendor's data sheets, by how a device's name begins.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
         "NVIDIA A100": 312e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
         "NVIDIA GeForce RTX 3090": 71e12}


def peak_flops(device):
    """FLOP/s that the device's data sheet promises. None for others: they print no MFU."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((peak for begin, peak in PEAKS.items() if name.startswith(begin)), None)


# ---------------------------------------------------------------------- pictures for people

RED, GREY, DARK = (220, 30, 30), (200, 200, 200), (60, 60, 60)
LINE_COLOURS = [(40, 100, 190), (225, 120, 30), (50, 150, 80), (190, 50, 60), (150, 90, 190)]


# Fonts of systems that have more characters than Pillow's own.
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf", "arial.ttf")


def font_for(text, size):
    """Pillow's own font, which looks alike everywhere, or one that may have the text's letters."""
    if text.isascii():
        return ImageFont.load_default(size)
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    print("no font was found here that has all letters of the texts: some will be boxes")
    return ImageFont.load_default(size)


def contact_sheet(pixels, texts, path, columns=6, size=160, wrong=()):
    """A PNG: (N, H, W, 3) uint8 pictures over their N texts, those in `wrong` framed in red."""
    font, gap = font_for("".join(texts), 12), 12
    texts = ["\n".join(textwrap.fill(line, size // 6) for line in text.split("\n"))
             for text in texts]
    height = size + 2 * gap + 16 * (1 + max(text.count("\n") for text in texts))    # of a row
    rows = math.ceil(len(texts) / columns)
    sheet = Image.new("RGB", (gap + columns * (size + gap), gap + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        x, y = gap + i % columns * (size + gap), gap + i // columns * height
        sheet.paste(Image.fromarray(pixels[i]).resize((size, size), Image.NEAREST), (x, y))
        frame, ink = (RED, RED) if i in wrong else (GREY, DARK)
        draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=frame, width=2)
        draw.text((x, y + size + 4), text, ink, font)
    save_picture(sheet, path)


def line_chart(lines, title, x_label, top_y=None, size=(560, 360)):
    """{name: [(x, y)]}, y >= 0, as an Image with a legend. The y axis goes from 0 to top_y; without
    top_y it is logarithmic."""
    font = ImageFont.load_default(12)
    left, top, right, bottom = 50, 50, size[0] - 24, size[1] - 40       # of the plot, in pixels
    points = np.array([point for line in lines.values() for point in line])
    xs, ys = points[:, 0], points[:, 1]
    ys = ys.clip(max(1e-9, 1e-4 * ys.max()))                # zeros have no logarithm
    low, high = (0, top_y) if top_y else (ys.min() / 1.5, ys.max() * 1.5)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def at(x, y):
        """Where a point lies, in pixels."""
        x = (x - xs.min()) / max(1e-9, np.ptp(xs))
        y = y / high if top_y else math.log(max(y, low) / low) / math.log(high / low)
        return left + x * (right - left), bottom - y * (bottom - top)

    for y in ticks(0, high) if top_y else log_ticks(low, high):
        draw.line([at(xs.min(), y), at(xs.max(), y)], fill=GREY)
        draw.text((left - 6, at(0, y)[1]), f"{y:.6g}", DARK, font, anchor="rm")
    for x in ticks(xs.min(), xs.max()):
        draw.text((at(x, high)[0], bottom + 6), f"{x:g}", DARK, font, anchor="mt")
    draw.text((left, 8), title, DARK, font)
    draw.text(((left + right) / 2, size[1] - 14), x_label, DARK, font, anchor="mm")
    x = left                                    # of the legend's next entry
    for colour, (name, line) in zip(cycle(LINE_COLOURS), lines.items()):
        draw.line([at(*point) for point in line], fill=colour, width=2)
        draw.line([(x, 34), (x + 16, 34)], fill=colour, width=3)
        draw.text((x + 22, 34), name, DARK, font, anchor="lm")
        x += 40 + font.getlength(name)
    return sheet


def ticks(low, high):
    """The multiples in low..high of 1, 2 or 5 times a power of ten: about six."""
    unit = 10 ** math.floor(math.log10((high - low) / 2 or 1))
    unit *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * unit) <= 6)
    return np.arange(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1) * unit


def log_ticks(low, high):
    """1, 2 and 5 times the powers of ten in low..high."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    marks = [k * 10. ** exponent for exponent in exponents for k in (1, 2, 5)]
    return [mark for mark in marks if low <= mark <= high]
