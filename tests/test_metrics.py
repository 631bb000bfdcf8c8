"""What a run says of itself, where some of it cannot be written: a line, and the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import termios
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from launch import tool
from test_run import SMALL
from toy import toy_dataset

from megaregion.config import RunConfig
from megaregion.training.metrics import LOG, Metrics, Shown, Trackers, open_log


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    open_log(tmp_path / "run" / "logs", 0)
    yield tmp_path / "run"
    LOG.handlers.clear()


def test_a_tensorboard_that_cannot_be_written_is_said_once_and_metrics_go_on(run: Path) -> None:
    (run / "tensorboard").write_text("in the way")
    with closing(Trackers(RunConfig(), run)) as trackers:
        metrics = Metrics(run, True, 5, trackers)
        for step in range(1, 6):
            metrics.write(step, {"loss": 1.0})
            trackers.show(Shown(step, {"time/training": 0.5}))
        metrics.close()
    log = (run / "logs" / "rank-00.log").read_text()
    assert log.count("tensorboard fails (FileExistsError: ") == log.count(" fails ") == 1
    assert "tensorboard missed 10 of 10 records of this start" in log
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_thread_of_tensorboard_that_meets_a_full_disk_prints_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    class Full:
        def write(self, data: object) -> None:
            raise OSError(28, "No space left on device")

    def fail() -> None:
        raise OSError("mine")

    waiting: queue.Queue[bytes] = queue.Queue()
    waiting.put(b"x")
    for thread in (_AsyncWriterThread(waiting, Full(), 1), threading.Thread(target=fail)):
        thread.start()
        thread.join()
    told = capsys.readouterr().err
    assert "No space left" not in told
    assert "OSError: mine" in told


# ---- on a terminal ---------------------------------------------------------------------------------

IN_A_TERMINAL = """
import os, runpy, sys
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
os.dup2(terminal, 1)
sys.stdout = open(1, "w", closefd=False)
sys.argv[0] = "tools/pretrain.py"
runpy.run_path("tools/pretrain.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("terminal")
    data = toy_dataset(root / "shards", samples=12, shards=2)
    return [*SMALL, f"--data.path={data}", f"--output={root}", "--train.steps=4", "--checkpoint.every=2"]


def on_terminal(*words: str, term: str) -> str:
    """What a terminal of 100 columns gets from a run."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    got: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while text := os.read(master, 2**16):
                got.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    done = tool("-c", IN_A_TERMINAL, os.ttyname(slave), *words, environment={**os.environ, "TERM": term})
    os.close(slave)
    reader.join()
    os.close(master)
    assert done.returncode == 0, done.stderr
    return b"".join(got).decode()


def screen(text: str) -> list[str]:
    """The lines that stand on a terminal in the end."""
    lines = [""]
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif part[0] not in "\x1b\r":
            lines[-1] += part
    return [line for line in lines if line]


def test_a_run_on_a_terminal_is_one_line_that_is_drawn_over_below_all_others(flags: list[str]) -> None:
    drawn = on_terminal(*flags, "--name=live", term="xterm")
    lines = screen(drawn)
    (step,) = (line for line in lines if line.startswith("step "))
    assert step == lines[-1]
    assert re.fullmatch(r"step      4/4  loss +\d+\.\d+  img/s +\d+  mfu +\d+\.\d%  0:00:00 left", step)
    assert lines[0].startswith("1 ranks: tensor 1 x data 1")
    assert sum(line.startswith("saved ") for line in lines) == 2, "whole lines, above it"
    assert re.search(r"step      2/4 .* left  saving \.\.\.", drawn)
    assert "step      1/4" in drawn, "it stood there before"
    # The cursor is back as soon as it is hidden: a killed run leaves the terminal whole.
    assert drawn.count("\x1b[?25l\x1b[?25h") == drawn.count("\x1b[?25l") > 0


def test_and_plain_lines_with_a_dumb_terminal_and_in_a_pipe(flags: list[str]) -> None:
    dumb = on_terminal(*flags, "--name=dumb", term="dumb").replace("\r\n", "\n")
    piped = tool("tools/pretrain.py", *flags, "--name=pipe").stdout
    for text in (dumb, piped):
        assert "\x1b" not in text
        assert len(re.findall(r"^step +\d/4  loss .*  bad 0$", text, re.MULTILINE)) == 4
        assert "left" not in text
    figures = [re.sub(r"[\d.]+", "N", text).split() for text in (dumb.replace("/dumb", "/pipe"), piped)]
    assert figures[0] == figures[1]
