"""Runs on a page, side by side and while they train: curves, events, state, measures, maps, settings.

All of it is read from files that training and evaluation write, each time only what is new. No process of a
run is asked, so a run is watched from any machine that sees its folder.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from megaregion.errors import UserError, say
from megaregion.evaluation.page import (
    Curve,
    History,
    Line,
    Mark,
    clock_time,
    column_starts,
    duration,
    line_chart,
    plain,
    running_mean,
    thinned,
    write_page,
)
from megaregion.schemas.evaluation import EVALUATION, SUMMARY, Table, aligned, joined_tables, read_evaluation
from megaregion.schemas.run import DONE, EVALUATIONS, EVENTS, GUARD, LOG, METRICS
from megaregion.settings import dotted, read_yaml, words

BLOCK = 2**25
"""Bytes that are read and parsed at once."""
BULKY = re.compile(rb', "time_by_rank": \[[^\]]*\]')
"""Times of each rank: nine tenths of a line of a large run, and not shown."""
PHASES = ("data", "forward", "head", "backward", "communication", "optimizer", "save")
"""Parts of a step, as training names their times."""
QUIET_SECONDS, QUIET_LINES = 60.0, 5.0
"""A run that says nothing for so long, and for so many times its usual pause, is called stalled."""
LOCATION = ("name", "output")
"""Settings that only say where a run lies."""
ROWS, MOST_FRAMES, TAIL = 40, 8, 12
"""Events, frames and lines of the log that are shown."""
STYLES = 8
"""Colours of runs; more runs share them."""
MAP_SIDE = 300
"""Longest side of a map in the page, in pixels."""
STATES = {"start": "starting", "ready": "running", "stop": "stopped", "end": "stopped"}
"""What a run does after an event."""
TOLD = {
    "start": "started on {ranks} ranks",
    "resumed": "resumed from step {step}",
    "refused": "step {step} refused: {reason}",
    "slow": "slow at step {step}",
    "stop": "stopped by {reason} after step {step}",
    "end": "ended after step {step}",
}
"""Events that are shown, in words; others happen all the time."""
percent = "{:.1%}".format
FACTS = {
    "loss": ("loss", plain), "loss_object": ("loss of objects", plain), "loss_text": ("loss of text", plain),
    "loss_distill": ("distance from the teacher", plain), "grad_norm": ("gradient norm", plain),
    "images_per_second": ("images/s", plain), "mfu": ("MFU", percent), "memory": ("memory, GB", plain),
}  # fmt: skip
"""Metrics whose last value is told, by name."""


# ---- reading ---------------------------------------------------------------------------------------


class Tail:
    """A file of one record a line that grows; what is half written is left for the next look."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._inode = path, 0, 0

    def records(self) -> Iterator[tuple[list[dict[str, Any]], int, bool]]:
        """New records, many at once, lines that hold none, and whether the file began anew."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            state = self._path.stat()
            anew = self._at > 0 and (state.st_size < self._at or state.st_ino != self._inode)
            self._at, self._inode = 0 if anew else self._at, state.st_ino
            stream.seek(self._at)
            while block := stream.read(BLOCK):
                block += stream.readline()
                block = block[: block.rfind(b"\n") + 1]
                self._at += len(block)
                lines = [line for line in BULKY.sub(b"", block).splitlines() if line.strip()]
                found = [record for record in _parse(lines) if isinstance(record, dict)]
                yield found, len(lines) - len(found), anew


def _parse(lines: Sequence[bytes]) -> list[Any]:
    with suppress(ValueError, RecursionError):
        return list(json.loads(b"[" + b",".join(lines) + b"]"))
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found


class Run:
    """One run, as far as its files have been read."""

    def __init__(self, folder: Path, name: str = "") -> None:
        """Read nothing yet; its name is its own among those that are shown."""
        self.folder, self.name = folder, name or folder.name
        self._forget()

    def _forget(self) -> None:
        self.metrics, self.evaluations = History(), History()
        self.events: list[dict[str, Any]] = []
        """Records of events.jsonl and guard.jsonl, and lines that name slow ranks."""
        self.broken = 0
        """Lines that could not be read."""
        self.settings: dict[str, str] = {}
        """All settings, by dotted name."""
        self.tables: dict[str, Table] = {}
        """The measures by key, without the summary; none where the run was not evaluated."""
        self._tails = {name: Tail(self.folder / name) for name in (METRICS, EVALUATIONS, EVENTS, GUARD)}

    def read(self) -> Run:
        """Read what was written since the last time; where a file began anew, all.

        Raises:
            UserError: config.yaml or evaluation.json is damaged, or is being written.
        """
        for name, tail in self._tails.items():
            for records, broken, anew in tail.records():
                if anew:
                    self._forget()
                    return self.read()
                self._take(name, records, broken)
        if (file := self.folder / "config.yaml").exists():
            self.settings = {key: words(value) for key, value in dotted(read_yaml(file)).items()}
        if (file := self.folder / EVALUATION).exists():
            found = read_evaluation(file).tables
            self.tables = {table.key: table for table in found if table.key != SUMMARY}
        return self

    def _take(self, name: str, records: list[dict[str, Any]], broken: int) -> None:
        self.broken += broken
        if name in (EVENTS, GUARD):
            found = [{**r, "event": "refused"} if name == GUARD else r for r in records]
            self.events += [record for record in found if isinstance(record.get("event"), str)]
            return
        self.broken += (self.metrics if name == METRICS else self.evaluations).add(records)
        slow = [r for r in records if r.get("slow")][-ROWS:]
        self.events += [{"event": "slow", **{k: r.get(k) for k in ("time", "step", "slow")}} for r in slow]

    def count(self, event: str) -> int:
        """How often an event happened."""
        return sum(record.get("event") == event for record in self.events)

    @property
    def step(self) -> int:
        """The step that it ended after, or else the last that it logged; 0 before the first."""
        for event in self.events[-1:]:
            if event["event"] in ("stop", "end") and type(event.get("step")) is int:
                return int(event["step"])
        return int(self.metrics.steps[-1]) if len(self.metrics.steps) else 0

    def whole(self, key: str) -> int:
        """A setting that is a whole number; 0 where it is not there."""
        text = self.settings.get(key, "")
        return int(text) if text.isdecimal() and len(text) < 19 else 0

    @property
    def pace(self) -> float:
        """Seconds a step, by the pauses between the last fifty lines; 0 where there are none."""
        steps, times = (each[-51:] for each in self.metrics.curve("time"))
        pauses = np.diff(times) / np.diff(steps)
        pauses = pauses[pauses > 0]
        return float(np.median(pauses)) if len(pauses) else 0.0

    def marks(self) -> list[Mark]:
        """Where curves are marked: restarts, returns of the guard to a checkpoint, steps that it refused."""
        marks, starts, fresh = [], 0, False
        for event in self.events:
            kind, step = event.get("event"), event.get("step")
            starts, fresh = starts + (kind == "start"), fresh or kind == "start"
            if type(step) is not int:
                continue
            if kind == "refused":
                marks.append(Mark(step, kind, told(event)))
            elif kind == "resumed" and not fresh:
                marks.append(Mark(step, "back", f"went back to step {step}"))
            elif kind == "ready" and fresh:
                fresh = False
                marks += [Mark(step, "restart", f"start {starts}, from step {step}")] * (starts > 1)
        return marks

    def status(self, now: float) -> tuple[str, str]:
        """What it does at a time, in seconds since 1970, in a word and in a few."""
        last = next((e for e in reversed(self.events) if e.get("event") in STATES), {"event": "ready"})
        files = [self.folder / name for name in (METRICS, EVENTS, GUARD, LOG)]
        written = [file.stat().st_mtime for file in files if file.exists()]
        if not written:
            return "absent", f"waiting for {self.folder}"
        silence, pause = max(0.0, now - max(written)), self.pace * max(1, self.whole("train.log_every"))
        if (self.folder / DONE).exists():
            return "finished", f"after {self.step:,} steps"
        if last["event"] in ("stop", "end"):
            return "stopped", told(last)
        # A start imports, connects and loads before it says anything.
        training = last["event"] == "ready" and pause > 0
        if silence > (max(QUIET_SECONDS, QUIET_LINES * pause) if training else 10 * QUIET_SECONDS):
            return "stalled", f"silent for {duration(silence)}: dead or hanging"
        return STATES[last["event"]], f"last sign {duration(silence)} ago"

    def facts(self, now: float) -> dict[str, str]:
        """What it is at, by name."""
        steps, found = self.whole("train.steps"), {}
        found["step"] = f"{self.step:,}" + (f" of {steps:,}" if steps else "")
        if steps > self.step and self.pace:
            found["time left"] = duration((steps - self.step) * self.pace)
        for name, (title, form) in FACTS.items():
            if len(values := self.metrics.curve(name)[1]):
                found[title] = form(float(values[-1]))
        if self.pace:
            found["a step"] = f"{plain(self.pace)} s"
        found["restarts"] = f"{max(0, self.count('start') - 1)}"
        found["steps refused"] = f"{self.count('refused')}"
        saved = [e for e in self.events if e.get("event") == "saved" and type(e.get("step")) is int]
        if saved:
            found["last checkpoint"] = f"{saved[-1]['step']:,}"
            found["saved"] = f"{duration(now - _time(saved[-1]))} ago"
        return found

    def log(self) -> list[str]:
        """The last lines of rank 0's log."""
        with suppress(OSError), (self.folder / LOG).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - 2**13))
            return stream.read().decode(errors="replace").splitlines()[-TAIL:]
        return []


def told(event: Mapping[str, Any]) -> str:
    """An event in words; empty for one that is not shown."""
    kind = event["event"]
    text = TOLD.get(kind, "").format_map(defaultdict(str, event))
    with suppress(TypeError, ValueError, KeyError, AttributeError):  # Of a damaged file.
        if kind == "resumed":
            changed = (event.get("changed") or {}).items()
            text += "".join(f"; {key} {old} → {new}" for key, (old, new) in changed)
        if kind == "slow":
            ranks = [f", rank {one['rank']} on {one['host']} x{one['ratio']}" for one in event["slow"][:3]]
            text += "".join(ranks)
        if kind == "refused":
            names = event.get("not_finite") or event.get("keys") or []
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            text += f"; samples {', '.join(map(str, names[:3]))}{more}"
    return text


def _time(event: Mapping[str, Any]) -> float:
    found = event.get("time")
    return found if type(found) is float and 0 < found < 1e11 else 0.0


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs that nothing was read of yet, each named by the end of its path that tells it from the others.

    Raises:
        UserError: A folder is named twice.
    """
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("a run is named twice; name each run once")

    def name(own: Sequence[str]) -> str:
        ends = (own[-depth:] for depth in range(1, len(own) + 1))
        return "/".join(next(e for e in ends if sum(other[-len(e) :] == e for other in paths) == 1))

    return [Run(folder, name(own)) for folder, own in zip(folders, paths, strict=True)]


# ---- charts ----------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """Metrics that share a frame where one run is drawn."""

    title: str
    metrics: Mapping[str, tuple[str, str]]
    """What each is called, and its style, by its name."""
    form: Callable[[float], str] = plain
    noisy: bool = True
    """Whether a running mean is drawn over what was logged."""
    looks: bool = False
    """Whether they are those of evaluations beside training."""


def _heads(form: str) -> dict[str, tuple[str, str]]:
    return {form.format(kind): (name, kind) for kind, name in (("object", "objects"), ("text", "text"))}


PANELS = (
    Panel("Loss", {"loss": ("loss", "neutral")}),
    Panel("Loss of each head", _heads("loss_{}")),
    Panel("Distance from the teacher", {"loss_distill": ("1 - cosine", "neutral")}),
    Panel("Gradient norm", {"grad_norm": ("gradient norm", "neutral")}),
    Panel("Learning rate", {"lr": ("learning rate", "neutral")}, noisy=False),
    Panel("Images per second", {"images_per_second": ("images per second", "neutral")}),
    Panel("Model FLOPs utilisation", {"mfu": ("utilisation", "neutral")}, percent),
    Panel("Accuracy of each head", _heads("{}/accuracy"), percent),
    Panel("Idle classes", _heads("{}/idle_share"), percent, noisy=False),
    Panel("Memory of the fullest rank, GB", {"memory": ("memory", "neutral")}, noisy=False),
)


class Drawn(NamedTuple):
    """A chart with what tells its lines apart."""

    title: str
    chart: Markup
    legend: Sequence[tuple[str, str, str]]
    """Name, style and last value of each line; empty where there is one."""
    note: str = ""


def style(place: int) -> str:
    """The style of a run by its place among those that are shown."""
    return f"run{place % STYLES}"


def charts(runs: Sequence[Run]) -> list[Drawn]:
    """Charts of one run, a head a line, or of several, a run a line; what nobody logged is left out."""
    names = dict.fromkeys(name for run in runs for name in run.evaluations.columns if "/" in name)
    looks = {name: (name.replace("/", ", "), style(place)) for place, name in enumerate(names)}
    panels = [*PANELS, Panel("While training", looks, percent, noisy=False, looks=True)]
    if len(runs) > 1:
        panels = [
            panel._replace(title=panel.title + f": {own[0]}" * (len(panel.metrics) > 1), metrics={name: own})
            for panel in panels
            for name, own in panel.metrics.items()
        ]
    found = [drawn for panel in panels if (drawn := _draw(panel, runs))]
    if len(runs) == 1 and (split := _split(runs[0])):
        found.insert(min(6, len(found)), split)
    return found


def _draw(panel: Panel, runs: Sequence[Run]) -> Drawn | None:
    lines, legend, bad = [], [], 0
    for place, run in enumerate(runs):
        history = run.evaluations if panel.looks else run.metrics
        for name, own in panel.metrics.items():
            steps, values = history.curve(name)
            bad += history.not_finite[name]
            if len(steps):
                called, colour = own if len(runs) == 1 else (run.name, style(place))
                raw = thinned(steps, values)
                mean = thinned(steps, running_mean(values)) if panel.noisy else raw
                lines.append(Line(mean, colour, called, raw if panel.noisy else None))
                legend.append((called, colour, panel.form(float(values[-1]))))
    if not lines:
        return None
    if len(lines) == len(runs) == 1:
        lines, legend = [replace(lines[0], name="")], []
    marks = runs[0].marks() if len(runs) == 1 else ()
    chart = line_chart(lines, f"{panel.title} over the steps", panel.form, marks)
    return Drawn(panel.title, chart, legend, f"{bad:,} not finite" if bad else "")


def _split(run: Run) -> Drawn | None:
    """Where a step's time goes, as shares upon each other."""
    missing = np.full(len(run.metrics.steps), np.nan)
    table = np.nan_to_num(np.stack([run.metrics.columns.get(f"time/{phase}", missing) for phase in PHASES]))
    there = table.sum(0) > 0
    if not there.any():
        return None
    steps, means = run.metrics.steps[there], np.stack([running_mean(row) for row in table[:, there]])
    ends = np.append(column_starts(steps)[1:] - 1, len(steps) - 1)
    shares = means[:, ends] / means[:, ends].sum(0)
    tops, places = np.minimum(np.cumsum(shares, 0), 1.0), tuple(steps[ends].tolist())
    drawn = zip(PHASES, tops, strict=True)
    lines = [Line(Curve(places, tuple(top.tolist())), phase, phase, area=True) for phase, top in drawn]
    legend = [
        (phase, phase, percent(float(share))) for phase, share in zip(PHASES, shares[:, -1], strict=True)
    ]
    title = "Where a step's time goes"
    chart = line_chart(lines[::-1], f"{title}, over the steps", "{:.0%}".format, run.marks())
    return Drawn(title, chart, legend)


# ---- the page --------------------------------------------------------------------------------------


def tables(runs: Sequence[Run]) -> list[Table]:
    """A table for each measure with a row for each run."""
    return joined_tables({run.name: run.tables for run in runs})


def _frames(runs: Sequence[Run]) -> dict[str, list[Image.Image | None]]:
    """Frames that most runs have painted: the frame, then each run's map of it; None where it has none."""
    ending = ".map.jpg"
    have = [
        {file.name.removesuffix(ending): file for file in (run.folder / "pictures").glob(f"*{ending}")}
        for run in runs
    ]
    counts = Counter(name for own in have for name in own)
    frames = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name))[:MOST_FRAMES]:
        maps = [own.get(name) for own in have]
        first = next(file for file in maps if file)
        files = [first.with_name(f"{name}.frame.jpg"), *maps]
        frames[name] = [_picture(file) if file else None for file in files]
    return frames


def _picture(file: Path) -> Image.Image:
    try:
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read ({error}); evaluate the run again") from None


def _happenings(runs: Sequence[Run]) -> list[tuple[float, str, str, str]]:
    """Time, run, kind and text of the newest events, the newest first."""
    found = [(_time(event), run.name, event["event"], told(event)) for run in runs for event in run.events]
    return [one for one in sorted(found, reverse=True) if one[3]][:ROWS]


def write_runs(runs: Sequence[Run], path: Path, reload: float | None = None) -> None:
    """Write the page, which a browser loads again after so many seconds, if any.

    Raises:
        UserError: A picture cannot be read.
    """
    now = time.time()
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in LOCATION)
    write_page(
        path,
        "runs.html",
        title=" · ".join(run.name for run in runs),
        runs=runs,
        now=now,
        styles={run.name: style(place) for place, run in enumerate(runs)},
        tables=tables(runs),
        charts=charts(runs),
        happenings=_happenings(runs),
        frames=_frames(runs),
        settings=[key for key in keys if len({run.settings.get(key) for run in runs}) > 1],
        reload=reload,
        MAP_SIDE=MAP_SIDE,
    )


def state_table(runs: Sequence[Run]) -> str:
    """What every run is at, for the terminal: a run a column."""
    now = time.time()
    each = [{"state": run.status(now)[0], **run.facts(now)} for run in runs]
    names = dict.fromkeys(name for found in each for name in found)
    rows = [["", *(run.name for run in runs)]]
    return aligned([*rows, *([name, *(found.get(name, "-") for found in each)] for name in names)])


def follow(runs: Sequence[Run], path: Path, every: float) -> None:
    """Write the page again and again, and say what changes, until all runs are finished."""
    said: dict[str, str] = {}
    while True:
        states = []
        try:
            for run in runs:
                run.read()
            states = [run.status(time.time()) for run in runs]
            if path.parent.is_dir():  # That of a run comes with the run.
                write_runs(runs, path, every)
        except (UserError, OSError) as error:
            if not said:
                raise
            say(f"{error}; the page stays as it was")  # What is being written now is whole at the next look.
        for run, (word, why) in zip(runs, states, strict=bool(states)):
            if said.get(run.name) != word:
                print(f"{clock_time(time.time())}  {run.name}: {word}, {why}; step {run.step:,}")
                said[run.name] = word
        if states and all(word == "finished" for word, _ in states):
            write_runs(runs, path)
            return
        time.sleep(every)
