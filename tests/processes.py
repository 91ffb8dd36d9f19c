"""Scripts in processes of their own, forked from a server that imports torch once for all tests."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["train", "evaluate", "matplotlib.backends.backend_agg", "tests.test_distributed"]


def start_server() -> None:
    """Start what all processes are forked from, unless it runs: it imports from this folder."""
    before = Path.cwd()
    os.chdir(ROOT)
    CONTEXT.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    os.chdir(before)


def run_main(
    script: str, words: list[str], environment: dict, folder: Path, log: Path, before: Callable
) -> None:
    """What a process does: `before`, then the script's main; it prints to `log`."""
    os.setsid()  # a signal to its group reaches its data workers, too
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *words]
    before()
    code = 0
    try:
        importlib.import_module(script).main()
    except SystemExit as left:  # its traceback would keep data workers until they are joined
        code = left.code
    sys.exit(code)


class Run:
    """One script in `world` processes, which find each other as torchrun's do."""

    def __init__(
        self, script: str, *words: object, log: Path, world: int = 1, folder: Path = ROOT,
        before: Callable = dict,
    ) -> None:  # fmt: skip
        start_server()
        self.log = log
        environment = [{}]
        if world > 1:
            # The store is this process's, as it is torchrun's: no port has to be guessed.
            self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            environment = [{
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            } for rank in range(world)]  # fmt: skip
        self.processes = [
            CONTEXT.Process(
                target=run_main, args=(script, list(map(str, words)), names, folder, log, before)
            ) for names in environment
        ]  # fmt: skip
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        """Whether any of them is."""
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int, ranks: slice = slice(None)) -> None:
        """Send a signal to processes and to all that they have started."""
        for process in self.processes[ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def wait(self, seconds: float = 120) -> bool:
        """Whether they ended within some seconds; as with torchrun, one that fails ends the others.
        """
        until = time.monotonic() + seconds
        while self.running() and time.monotonic() < until:
            left = [process.sentinel for process in self.processes if process.is_alive()]
            connection.wait(left, until - time.monotonic())
            if any(process.exitcode for process in self.processes) and self.running():
                connection.wait(left, 1)
                self.signal(signal.SIGTERM)
                until = min(until, time.monotonic() + 10)
        return not self.running()

    def finish(self, seconds: float = 120) -> tuple[int, str]:
        """(exit code, all that was printed), once they have ended; the code of the first failure.
        """
        if not self.wait(seconds):
            self.signal(signal.SIGKILL)
            self.wait()
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), 0), self.log.read_text()
