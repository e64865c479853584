"""Scripts run in forked processes: as a user would run them, but without seconds of imports."""
import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
from importlib import import_module
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "study")
torch.set_num_threads(1)                # more do not survive a fork, and nothing here needs them
os.environ["OMP_NUM_THREADS"] = "1"
tqdm.monitor_interval = 0               # no thread that may hold a lock at the moment of a fork
tqdm.set_lock(threading.RLock())        # the usual one is shared: who is killed keeps it


class Script(ForkProcess):
    """A script at work in a process of its own. `wait` gives its exit status, which is minus the
    signal that killed it; then `output` has what it printed."""

    def __init__(self, name, *args, folder=ROOT):
        super().__init__()
        self.command, self.folder = [name, *map(str, args)], folder
        self.printed = tempfile.TemporaryFile("w+")
        self.start()

    def run(self):                                              # in the new process
        # As in a terminal, even if pytest runs in the background, where Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (1, 2):
            os.dup2(self.printed.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(i, "w", 1, closefd=False) for i in (1, 2))
        faulthandler.dump_traceback_later(120, exit=True)       # what hangs, tells where
        os.chdir(self.folder)
        sys.argv = self.command
        import_module("common").run_script(import_module(Path(self.command[0]).stem).main)

    def wait(self):
        self.join()
        self.printed.seek(0)
        self.output = self.printed.read()
        return self.exitcode


def run(name, *args, folder=ROOT, code=0):
    """Runs a script to its end and returns what it printed; it has to exit with `code`."""
    script = Script(name, *args, folder=folder)
    assert script.wait() == code, script.output
    return script.output


def train_args(folder, name, *args):
    return ("--preset", "tiny", "--device", "cpu", "--tokenizer", folder / "tokenizer.pt", "--out",
            folder / name, *args)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tokenizer and a joint run of 40 steps."""
    folder = tmp_path_factory.mktemp("out")
    run("tokenizer.py", "--preset", "tiny", "--out", folder / "tokenizer.pt", "--device", "cpu")
    run("train.py", *train_args(folder, "joint", "--steps", 40))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """A preset so small that a run takes a second."""
    for row, value in dict(vq_steps=2, vq_pictures=40, und_scenes=20, gen_scenes=20).items():
        monkeypatch.setattr(import_module("data").PRESETS["tiny"], row, value)


@pytest.fixture
def error(capsys):
    """A function: what another one complains of, which has to be one line, with exit status 2."""
    def complaint(function, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            function(*args)
        lines = re.split(r"[\r\n\x1b]+", capsys.readouterr().err)
        (line,) = [line for line in lines if not re.search(r"^\W*$|%\||it/s|^\[A$", line)]
        assert line.removeprefix("[A").startswith("error: ")
        return line
    return complaint
