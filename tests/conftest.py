"""Scripts run in forked processes: as a user would run them, but without seconds of imports."""
import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "study")
torch.set_num_threads(1)                # more do not survive a fork, and nothing here needs them
os.environ["OMP_NUM_THREADS"] = "1"
tqdm.monitor_interval = 0               # no thread that may hold a lock at the moment of a fork


class Script:
    """A script at work in a process of its own. `wait` gives its exit status, then `output` has
    what it printed; the status is minus the signal that killed it."""

    def __init__(self, name, *args, folder):
        self.printed = tempfile.TemporaryFile("w+")
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                # As in a terminal, even if pytest runs in the background, where Ctrl-C is ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(self.printed.fileno(), 1)
                os.dup2(self.printed.fileno(), 2)
                os.chdir(folder)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", 1, closefd=False)
                faulthandler.dump_traceback_later(120, exit=True)       # what hangs, tells where
                sys.argv = [name, *map(str, args)]
                from common import run_script
                run_script(import_module(Path(name).stem).main)
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def wait(self):
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.printed.seek(0)
        self.output = self.printed.read()
        return self.status

    def runs(self):
        return os.waitpid(self.pid, os.WNOHANG) == (0, 0)

    def send(self, number):
        os.kill(self.pid, number)


def run(name, *args, folder=ROOT, code=0):
    """Runs a script to its end and returns what it printed; it has to exit with `code`."""
    script = Script(name, *args, folder=folder)
    assert script.wait() == code, script.output
    return script.output


def train_args(folder, name, *args):
    return ("--preset", "tiny", "--device", "cpu", "--tokenizer", folder / "tokenizer.pt", "--out",
            folder / name, *args)


def wait_for_log(script, run, lines):
    """Until a training process has logged so many lines."""
    log = run / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < lines:
        assert script.runs(), "the script ended too early"
        time.sleep(.01)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tokenizer and a joint run of 40 steps."""
    folder = tmp_path_factory.mktemp("out")
    run("tokenizer.py", "--preset", "tiny", "--out", folder / "tokenizer.pt", "--device", "cpu")
    run("train.py", *train_args(folder, "joint", "--steps", 40))
    return folder


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
