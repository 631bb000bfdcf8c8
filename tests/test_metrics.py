"""What a run says of itself, where some of it cannot be written: a line, and the run goes on."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaregion.training.metrics import LOG, Metrics, open_log


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    open_log(tmp_path / "run" / "logs", 0)
    yield tmp_path / "run"
    LOG.handlers.clear()


def test_a_tensorboard_that_cannot_be_written_is_said_once_and_metrics_go_on(run: Path) -> None:
    (run / "tensorboard").write_text("in the way")
    metrics = Metrics(run, True, 5)
    for step in range(1, 6):
        metrics.write(step, {"loss": 1.0})
        metrics.shares(step, {"training": 0.5})
    metrics.close()
    log = (run / "logs" / "rank-00.log").read_text()
    assert log.count(f"{run}/tensorboard cannot be written (") == 1
    assert log.count("cannot be written") == 1
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
