"""Starts a function on several gloo ranks, as torchrun would, and fails if any rank fails or hangs."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from megaregion.command_line import end_process


def launch(function: Callable[..., None], ranks: int, *arguments: Any, timeout: float = 900) -> None:
    """Run function(*arguments) on every rank of a fresh process group environment."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=_start, args=(function, rank, ranks, port, failures, arguments), daemon=False)
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
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        failures.put(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        os._exit(1)
    end_process(0)  # As tools/pretrain.py ends.


def repository() -> Path:
    return Path(__file__).resolve().parents[1]
