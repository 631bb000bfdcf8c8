"""Starts functions on gloo ranks as torchrun would, and tools as `python` would, with torch imported already.

Both are forks of one process that has imported what they all need and has done nothing else.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from megaregion.command_line import end_process

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megaregion.training.trainer", "torch._dynamo"])


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
) -> subprocess.CompletedProcess[str]:
    """What `python -W ignore tools/NAME.py ...` says and how it ends.

    Args:
        command: The tool's path below ``cwd``, and its arguments.
        cwd: Where it runs, if not in the repository.
        environment: Its environment, if not this process's.
        timeout: Seconds after which it is killed, and the test fails.
        warns: Whether it shows Python's warnings, as `python` alone would.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as place:
        streams = [Path(place) / name for name in ("stdout", "stderr")]
        process = FORKS.Process(
            target=_run_tool,
            args=(words, str(cwd or repository()), dict(environment or os.environ), streams, warns),
            daemon=False,
        )
        process.start()
        process.join(timeout)
        hung = process.is_alive()
        process.kill()
        process.join()
        out, err = (stream.read_text() for stream in streams)
    assert not hung, f"{words} did not end within {timeout} s\n{out[-2000:]}\n{err[-3000:]}"
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


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

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        failures.put(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        os._exit(1)
    end_process(0)  # As tools/pretrain.py ends.


def _run_tool(
    words: list[str], cwd: str, environment: dict[str, str], streams: list[Path], warns: bool
) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    warnings.simplefilter("default" if warns else "ignore")
    torch.set_num_threads(1)
    script = Path(cwd) / words[0]
    sys.argv, sys.path[0] = words, str(script.parent)
    code: Any = 0
    try:
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


def repository() -> Path:
    return Path(__file__).resolve().parents[1]
