"""What runs beside the loop: a watchdog that ends a run which stands still, and looks at what it has saved.

The watchdog is a thread of every rank that looks at its clock. Where one has stood still too long, all ranks
tell each other where they stand by the launcher's store, log the stacks of all threads and end with exit code
87. The culprit has made the least progress, and of equals its main thread does not wait in a collective.

Evaluations are processes that rank 0 starts for saved checkpoints, and no rank waits for them. They are
started as a command, so that training knows nothing of how a network is evaluated.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megaregion.config import RunConfig
from megaregion.errors import WATCHDOG_EXIT, UserError
from megaregion.parallel.topology import Topology, host_name, own_store
from megaregion.schemas.evaluation import SUMMARY, read_evaluation
from megaregion.schemas.run import evaluation_file, read_evaluations
from megaregion.training.clock import Clock
from megaregion.training.metrics import LOG, Shown, Trackers

PATIENT_PHASES = {"start": 3.0, "save": 3.0, "load": 3.0}
"""How many times longer a phase may last: start-up builds a model, saves and loads move it."""
GATHER_SECONDS = 5.0
"""Time that the ranks are given to say where they stand; who is silent by then is frozen or gone."""
LAST_RESORT_SECONDS = 30.0
"""After so long the process ends even if the report itself got stuck (on the log's file system, say)."""

_COLLECTIVE_FILES = re.compile(r"torch/distributed/(?!elastic)|deepspeed/comm/")
_WRAPPERS = ("wrapper", "log_wrapper")
"""Functions of these files that only call the collective."""
_WAITING_LINE = re.compile(r"\b(wait|item|tolist|to|cpu|synchronize|bool|float|int|tensor)\(")
"""Numbers that come from a device, or go there, are waited for by the host."""
_HOUSE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Standing:
    """Where one rank stands while the run does not move."""

    rank: int
    host: str
    turns: int
    """Spans begun so far; all ranks begin the same ones."""
    step: int
    phase: str
    seconds: float
    """How long it has stood there."""
    collective: str
    """The collective, or the wait for one or for the device, that its main thread is in; empty if it is in
    none. Judged by its Python stack."""
    where: str
    """The innermost line of its main thread, in this house if there is one."""


class Watchdog:
    """Watches one rank's clock from a thread of its own."""

    def __init__(self, clock: Clock, topology: Topology, logs: Path, seconds: float) -> None:
        """Prepare to end a run that stands still for some seconds (0: never); the logs' folder exists."""
        self._clock, self._rank, self._world_size = clock, topology.rank, topology.world_size
        self._logs, self._seconds = logs, seconds
        self._host = host_name()
        self._interval = min(5.0, max(0.1, seconds / 10))
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Begin to watch; returns itself."""
        if self._seconds:
            # Opened now: when storage hangs, opening a file would hang too.
            self._stacks = log_file(self._logs, self._rank).open("a")
            self._store = own_store("watchdog")
            self._store.set(f"host-{self._rank}", self._host)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop watching; call it before the process group is left."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()

    def keep_verdict(self) -> None:
        """Called when the main thread fails: if the run is being ended here, that failure is a consequence.

        The first rank to end tears the others' connections, and an error of a collective must not take
        the place of the watchdog's exit code.
        """
        if self._ending.is_set():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            allowed = self._seconds * PATIENT_PHASES.get(self._clock.phase, 1.0)
            # A main thread that keeps the interpreter to itself would silence this one, not faulthandler's.
            faulthandler.dump_traceback_later(4 * allowed + 60, file=self._stacks, exit=True)
            if time.monotonic() - self._clock.since > allowed or self._another_calls():
                self._end_the_run()

    def _another_calls(self) -> bool:
        try:
            return bool(self._store.check(["stalled"]))
        except RuntimeError:  # The store's rank is gone; our own clock still runs.
            return False

    def _end_the_run(self) -> None:
        self._ending.set()
        last_resort = threading.Timer(GATHER_SECONDS + LAST_RESORT_SECONDS, os._exit, [WATCHDOG_EXIT])
        last_resort.daemon = True
        last_resort.start()
        faulthandler.cancel_dump_traceback_later()
        standings, silent = self._gather()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        line = f"watchdog: {verdict(standings, silent)}"
        LOG.critical("%s", line)
        if self._rank == min(standing.rank for standing in standings):
            # Also where no log is read: the launcher's own output.
            print(f"megaregion: {line}", file=sys.stderr, flush=True)
        # Whoever ends first tears the others' connections, and the store ends with rank 0: let all read.
        time.sleep(2 * self._interval + (1.0 if self._rank == 0 else 0.5))
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(WATCHDOG_EXIT)

    def _gather(self) -> tuple[list[Standing], dict[int, str]]:
        """What the ranks say of themselves, and the hosts of those that say nothing."""
        own = self._own_standing()
        told, hosts = {self._rank: own}, {}
        try:
            self._store.set(f"standing-{self._rank}", json.dumps(asdict(own)))
            self._store.set("stalled", str(self._rank))
            until = time.monotonic() + GATHER_SECONDS
            while (silent := set(range(self._world_size)) - set(told)) and time.monotonic() < until:
                for rank in silent:
                    if self._store.check([f"standing-{rank}"]):
                        told[rank] = Standing(**json.loads(self._store.get(f"standing-{rank}")))
                time.sleep(0.05)
            for rank in silent:
                known = self._store.check([f"host-{rank}"])
                hosts[rank] = self._store.get(f"host-{rank}").decode() if known else "unknown host"
        except RuntimeError as error:
            LOG.error("watchdog: the other ranks could not be asked: %s", error)
        return [told[rank] for rank in sorted(told)], dict(sorted(hosts.items()))

    def _own_standing(self) -> Standing:
        frame, clock = sys._current_frames().get(self._main or 0), self._clock
        return Standing(
            self._rank, self._host, clock.turns, clock.step, clock.phase, time.monotonic() - clock.since,
            collective_of(frame), _line_of(frame),
        )  # fmt: skip


def log_file(logs: Path, rank: int) -> Path:
    """The log of a rank, where its stacks go too."""
    return logs / f"rank-{rank:02d}.log"


def collective_of(frame: FrameType | None) -> str:
    """The function in which a thread waits for ranks or a device, as all_reduce or wait; empty if in none."""
    name = ""
    if frame is not None:
        waits = _WAITING_LINE.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
        name = waits[1] if waits else ""
    while frame is not None:
        if _COLLECTIVE_FILES.search(frame.f_code.co_filename) and frame.f_code.co_name not in _WRAPPERS:
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def _line_of(frame: FrameType | None) -> str:
    inner = frame
    while frame is not None and not frame.f_code.co_filename.startswith(_HOUSE):
        frame = frame.f_back
    if (frame := frame or inner) is None:
        return "no Python frame"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def verdict(standings: Sequence[Standing], silent: dict[int, str]) -> str:
    """Name the ranks that hold the run up, in one line: of those that answered, or the silent with hosts.

    It says in which step, phase and collective they are, since when, and who waits for them where.
    """
    logs = f"stacks of each rank in logs/{log_file(Path(), standings[0].rank).name} and its like"
    if silent:
        named = ", ".join(f"rank {rank} on {host}" for rank, host in silent.items())
        return (
            f"{named} gave no sign of life (frozen, or its host is gone) while {_groups(standings)}; {logs}"
        )
    least = min(standing.turns for standing in standings)
    behind = [standing for standing in standings if standing.turns == least]
    stalled = [standing for standing in behind if not standing.collective] or behind
    if len(stalled) == len(standings) > 1 and all(standing.collective for standing in stalled):
        alike = len({standing.collective for standing in stalled}) == 1
        reason = "the network between them stands still" if alike else "they are in different collectives"
        return f"all {len(standings)} ranks wait for each other: {_groups(standings)}; {reason}; {logs}"
    described = [
        f"rank {one.rank} on {one.host} stands still in step {one.step}, phase {one.phase}, for "
        f"{one.seconds:.0f} s and "
        f"{f'waits in {one.collective}' if one.collective else 'is not in a collective'} ({one.where})"
        for one in stalled
    ]
    others = [standing for standing in standings if standing not in stalled]
    return "; ".join([*described, *([f"meanwhile {_groups(others)}"] if others else []), logs])


def _groups(standings: Sequence[Standing]) -> str:
    """Ranks that stand at the same place told together, with the longest of their times."""
    places: dict[tuple[object, ...], list[Standing]] = {}
    for one in standings:
        places.setdefault((one.step, one.phase, one.collective, one.where), []).append(one)
    return ", ".join(
        f"{'ranks' if len(there) > 1 else 'rank'} {_numbers([one.rank for one in there])} "
        f"{'waited' if collective else 'stood'} {max(one.seconds for one in there):.0f} s in step {step}, "
        f"phase {phase}, {f'{collective} ' if collective else ''}({where})"
        for (step, phase, collective, where), there in places.items()
    )


def _numbers(ranks: Sequence[int]) -> str:
    """Rising ranks, as 0-3, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ---- evaluations -----------------------------------------------------------------------------------

COMMAND = "megaregion.evaluation.background"
"""The module that evaluates; takes the run's folder and a step."""
LAST_SECONDS = 1800.0
"""Time that the end of a run waits for the last evaluation."""
PRIORITY = 19
"""The lowest of a process."""
SHOWN = {"region/knn": "region 5-NN", "region/linear": "linear probe", "ocr/head_recall": "OCR tokens"}
"""Results in the log line, and what they are called there."""


class BackgroundEvaluation:
    """Starts evaluations, one at a time, and says what came of them; one that fails costs the run nothing.

    While one is under way, only the newest later checkpoint is remembered, and evaluated next.

    Raises:
        UserError: evaluate.scenes lacks the gallery or the split.
    """

    def __init__(self, config: RunConfig) -> None:
        self._settings = config.evaluate
        self._folder = Path(config.output) / config.name
        self._trackers: Trackers | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0
        self._next: int | None = None
        for split in ("train", self._settings.split) if self._settings.every else ():
            truth = Path(self._settings.scenes) / split / "truth.jsonl"
            if not truth.is_file():
                raise UserError(
                    f"{truth} does not exist, which evaluate.every {self._settings.every} needs; name "
                    f"another scene set with evaluate.scenes, or make one with tools/make_scenes.py --{split}"
                )

    def begin(self, step: int, trackers: Trackers) -> None:
        """Evaluate the checkpoint that a run goes on from, unless that was done before it stopped.

        What evaluations find is shown in the trackers.
        """
        self._trackers = trackers
        if step and step not in read_evaluations(self._folder):
            self.after_save(step)

    def after_save(self, step: int) -> None:
        """Evaluate this step's checkpoint, now or after the one that is under way; returns at once."""
        if self._settings.every and step % self._settings.every == 0:
            self._next = step
        self._go_on()

    def finish(self) -> None:
        """Let the evaluations that were asked for end."""
        deadline = time.monotonic() + LAST_SECONDS
        if self._process is not None:
            LOG.debug("evaluating")
        while self._process is not None or self._next is not None:
            self._go_on()
            if time.monotonic() > deadline:
                LOG.warning("the evaluation of step %d takes too long and is given up", self._step)
                self.stop()
            time.sleep(0.2)

    def stop(self) -> None:
        """End the evaluation that is under way."""
        self._next = None
        self._go_on()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _go_on(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._tell(self._process.returncode)
            self._process = None
        if self._process is None and self._next is not None:
            self._step, self._next = self._next, None
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # It is no rank of the run.
        ranked = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        ours = {key: text for key, text in os.environ.items() if key not in ranked}
        # A GPU's memory belongs to training.
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(self._settings.threads)}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", COMMAND, str(self._folder), str(self._step)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env={**ours, **alone},
            )  # fmt: skip
        # It runs on rank 0's cores, and takes what that and its loader leave.
        os.setpriority(os.PRIO_PROCESS, process.pid, PRIORITY)
        return process

    def _tell(self, code: int) -> None:
        found = read_evaluations(self._folder).get(self._step)
        if code or found is None:
            LOG.warning("the evaluation of step %d failed, see %s", self._step, self._log)
            return
        if self._trackers:
            tables = read_evaluation(evaluation_file(self._folder, self._step)).tables
            self._trackers.show(Shown(self._step, {}, [own for own in tables if own.key != SUMMARY]))
        shown = "  ".join(f"{name} {found[key]:.1%}" for key, name in SHOWN.items() if key in found)
        LOG.info("step %6d was evaluated in %.0f s beside training: %s", self._step, found["seconds"], shown)

    @property
    def _log(self) -> Path:
        return self._folder / "logs" / f"evaluation-{self._step:08d}.log"
