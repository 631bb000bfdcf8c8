"""Starts functions on gloo ranks as torchrun would, and tools as `python` would, with torch imported already.

Both are forks of one process that has imported what they all need and has done nothing else.
"""

from __future__ import annotations

import gc
import inspect
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.multiprocessing

from megaregion.command_line import end_process

FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megaregion.training.trainer", "torch._dynamo", "deepspeed", "tests.preloaded"])


def launch(function: Callable[..., None], ranks: int, *arguments: Any, timeout: float = 900) -> None:
    """Run function(*arguments) on every rank of a fresh process group; fails if a rank fails or hangs."""
    port = free_port()
    failures = FORKS.SimpleQueue()
    processes = [
        FORKS.Process(target=_start, args=(function, rank, ranks, port, failures, arguments), daemon=False)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    messages = []
    while not failures.empty():
        messages.append(failures.get())
    codes = [process.exitcode for process in processes]
    assert not messages, "\n".join(messages)
    assert not hung, f"ranks {hung} did not end within {timeout} s"
    assert not any(codes), f"exit codes {codes}"


def tool(
    *command: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 900,
    warns: bool = False,
    forks: bool = False,
) -> subprocess.CompletedProcess[str]:
    """What `python -W ignore tools/NAME.py ...` says and how it ends.

    Args:
        command: The tool's path below ``cwd``, or `-m torch.distributed.run`, and its arguments.
        cwd: Where it runs, if not in the repository.
        environment: Its environment, if not this process's.
        timeout: Seconds after which it is killed, and the test fails.
        warns: Whether it shows Python's warnings, as `python` alone would.
        forks: Whether the Python commands that it starts are forks as well.
    """
    return Tool(*command, cwd=cwd, environment=environment, warns=warns, forks=forks).wait(timeout)


class Tool:
    """A tool that runs; arguments are those of :func:`tool`."""

    def __init__(
        self,
        *command: object,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        warns: bool = False,
        forks: bool = False,
    ) -> None:
        self._words = [str(word) for word in command]
        self._place = tempfile.TemporaryDirectory()
        self._streams = [Path(self._place.name) / name for name in ("stdout", "stderr")]
        self._process = FORKS.Process(
            target=_run_tool,
            args=(
                self._words, str(cwd or repository()), dict(environment or os.environ), self._streams, warns,
                forks,
            ),
            daemon=False,
        )  # fmt: skip
        self._process.start()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait_for(self, line: str, timeout: float = 300) -> None:
        """Wait until it has printed a line that begins so."""
        end = time.monotonic() + timeout
        while f"\n{line}" not in "\n" + self._said()[0]:
            assert self._process.is_alive(), self._said()
            assert time.monotonic() < end, self._said()
            time.sleep(0.02)

    def wait(self, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Wait for its end, not for ever."""
        self._process.join(timeout)
        hung = self._process.is_alive()
        self._process.kill()
        self._process.join()
        out, err = self._said()
        self._place.cleanup()
        assert not hung, f"{self._words} did not end within {timeout} s\n{out[-2000:]}\n{err[-3000:]}"
        return subprocess.CompletedProcess(self._words, self._process.exitcode, out, err)

    def _said(self) -> list[str]:
        return [stream.read_text() if stream.exists() else "" for stream in self._streams]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    function: Callable[..., None], rank: int, ranks: int, port: int, failures: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    gc.freeze()  # What has been imported need not be looked through: DeepSpeed collects at every start.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        failures.put(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        os._exit(1)
    end_process(0)  # As tools/pretrain.py ends.


def _run_tool(
    words: list[str], cwd: str, environment: dict[str, str], streams: list[Path], warns: bool, forks: bool
) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    gc.freeze()
    warnings.simplefilter("default" if warns else "ignore")
    torch.set_num_threads(1)
    if forks:
        subprocess.Popen = _Python
    _be_python(words)


def _be_python(words: list[str]) -> NoReturn:
    """Run as `python WORDS` would, and end."""
    code: Any = 0
    sys.path[1:1] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    try:
        if words[0] == "-m":
            from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

            subprocess_handler.Popen = _Python
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(words[1], {"__name__": "__main__"})
        else:
            script = Path.cwd() / words[0]
            sys.argv, sys.path[0] = words, str(script.parent)
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    end_process(int(code))


POPEN = subprocess.Popen


class _Python(subprocess.Popen):
    """A Popen that forks this process where `python ...` is asked for, so that nothing is imported again.

    torch.distributed.run starts its ranks so, and a tool that `forks` all Python commands.
    """

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        if args[0] != sys.executable:
            super()._execute_child(args, *rest)
            return
        names = list(inspect.signature(POPEN._execute_child).parameters)[2:]
        given = dict(zip(names, rest, strict=True))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _be_child([str(word) for word in args[1:]], given)
            finally:
                os._exit(1)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*map(given.get, ends))


def _be_child(words: list[str], given: dict[str, Any]) -> NoReturn:
    """Be the Python that a fork was asked for; `given` are the arguments of Popen's own private method."""
    for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if given[name] not in (-1, number):
            os.dup2(given[name], number)
    for name in ("p2cwrite", "c2pread", "errread"):
        if given[name] != -1:
            os.close(given[name])
    if given["start_new_session"]:
        os.setsid()
    if given["cwd"]:
        os.chdir(given["cwd"])
    if given["env"] is not None:
        os.environ.clear()
        os.environ.update(given["env"])
    if os.environ.get("MASTER_ADDR") == "localhost":
        # Names are looked up under a lock of libc, which another thread may have held when this one forked.
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    subprocess.Popen = POPEN
    # What the parent tidies up at its end is none of its child's.
    weakref.finalize._registry.clear()
    multiprocessing.util._finalizer_registry.clear()
    multiprocessing.process._children.clear()
    multiprocessing.util._run_after_forkers()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while words[0] in ("-u", "-W"):
        words = words[2 if words[0] == "-W" else 1 :]
    _be_python(words)


def repository() -> Path:
    return Path(__file__).resolve().parents[1]
