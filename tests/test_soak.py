"""A soak: a long toy run on four ranks that meets a fault every 20 steps, drawn from a printed seed.

The seed repeats it: MEGAREGION_SOAK_SEED=7 MEGAREGION_SOAK_STEPS=500 pytest -m drill tests/test_soak.py -s
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from drill import Drill, assert_same
from islands import IslandCluster
from pretend_cluster import pretend_cluster

from megaregion.schemas.evaluation import aligned

pytestmark = pytest.mark.drill

EVERY, RANKS = 20, 4
KINDS = ("kill", "stop-and-continue", "full-disk", "slow-disk", "cut-network", "nan", "clock-jump")
BY_ITSELF = {
    # A rank brings these upon itself; the others come from outside.
    "slow-disk": "slow-save:rank={rank}:step={step}:seconds=3",
    "nan": "nan:rank={rank}:step={step}",
    "clock-jump": "clock-jump:rank={rank}:step={step}:seconds={jump}",
}
PAUSES = ("stop-and-continue", "slow-disk")
"""Faults of three seconds."""
HOUR, PATIENCE = 3600, 900
"""Seconds by which clocks jump, and that anything may take: the machine may be busy."""


@dataclass
class Strike:
    """One fault."""

    kind: str
    step: int
    rank: int
    jump: int

    def variable(self) -> str:
        """As MEGAREGION_FAULT has it; empty for what comes from outside."""
        return BY_ITSELF.get(self.kind, "").format(**vars(self))


def draw_strikes(seed: int, steps: int) -> list[Strike]:
    """Every kind about as often as all others, in an order of its own for each seed."""
    draw = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < steps // EVERY:
        kinds += draw.sample(KINDS, len(KINDS))
    places = range(EVERY, steps - EVERY // 2, EVERY)
    return [
        Strike(kind, step + draw.randrange(3), draw.randrange(RANKS), draw.choice([-HOUR, HOUR]))
        for step, kind in zip(places, kinds, strict=False)
    ]


def test_a_run_of_a_fault_every_twenty_steps_ends_as_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("MEGAREGION_SOAK_SEED", random.randrange(10**6)))
    steps = int(os.environ.get("MEGAREGION_SOAK_STEPS", "500"))
    strikes = draw_strikes(seed, steps)
    with capsys.disabled():
        print(f"\nsoak: seed {seed}, {steps} steps, {len(strikes)} faults")
    with pretend_cluster(IslandCluster) as cluster, _small_disk(tmp_path / "soak" / "checkpoints"):
        assert isinstance(cluster, IslandCluster)
        drill = Drill(cluster, tmp_path)
        flags = [f"--train.steps={steps}", "--train.global_batch=16", "--train.micro_batch=4"]
        flags += ["--checkpoint.keep_last=2"]
        job = drill.submit(
            "soak", *flags, nodes=1, per_node=RANKS,
            MEGAREGION_SETTLE="0", MEGAREGION_MAX_FAULTS="1000", MEGAREGION_FAULT=_variable(strikes),
        )  # fmt: skip
        for strike in strikes:
            _play(drill, cluster, job, strike)
            with capsys.disabled():
                print(f"{strike.step:5}  {strike.kind}", flush=True)
        assert drill.finish("soak", job, PATIENCE) == "COMPLETED", drill.log("soak")
        stood = [_standstill(drill, strike.step) for strike in strikes]
        rows = [(str(one.step), one.kind, f"{gap:.1f} s") for one, gap in zip(strikes, stood, strict=True)]
        with capsys.disabled():
            print(aligned([("step", "fault", "no new step for"), *rows], left=(1,)))
        struck = [gap > 2.5 for one, gap in zip(strikes, stood, strict=True) if one.kind in PAUSES]
        assert all(struck), "a fault did not strike"
        # Refused steps use up samples, so the undisturbed run meets the same NaN.
        nans = ",".join(strike.variable() for strike in strikes if strike.kind == "nan")
        drill.torchrun("quiet", RANKS, *flags, seconds=2 * PATIENCE, MEGAREGION_FAULT=nans)
        assert (drill.folder / "soak" / "DONE").exists()
        assert drill.losses("soak") == drill.losses("quiet")
        assert_same(drill.state("soak"), drill.state("quiet"))


def _variable(strikes: list[Strike]) -> str:
    """What ranks bring upon themselves, and a pace that can be watched.

    NaN and clocks strike in their step alone, a slow disk again at the first saves of every later start. How
    many starts there will be nobody knows: SLURM may fail to launch one.
    """
    return ",".join(["slow:rank=0:step=1:seconds=0.3", *filter(None, (one.variable() for one in strikes))])


def _play(drill: Drill, cluster: IslandCluster, job: str, strike: Strike) -> None:
    """Let one fault strike, and wait until the run goes on."""
    _wait(drill, cluster, job, lambda step: step >= strike.step)
    before = _newest(drill)
    from_outside: dict[str, Callable[[], None]] = {
        "kill": lambda: os.kill(cluster.ranks(job)[strike.rank], signal.SIGKILL),
        "stop-and-continue": lambda: _stop_and_continue(cluster.ranks(job)[strike.rank]),
        "full-disk": lambda: _fill(drill, cluster, job),
        "cut-network": lambda: _cut(drill, cluster, job),
    }
    if strike.kind in from_outside:
        from_outside[strike.kind]()
    _wait(drill, cluster, job, lambda step: step > before + 1)


def _wait(drill: Drill, cluster: IslandCluster, job: str, reached: Callable[[int], bool]) -> None:
    asked = time.monotonic()

    def now() -> bool:
        nonlocal asked
        if reached(_newest(drill)):
            return True
        # SLURM's commands take long where the machine is busy, and a fault must not come late.
        if time.monotonic() > asked + 2:
            cluster.hurry(job)
            assert not cluster.has_ended(job), drill.log("soak")
            asked = time.monotonic()
        return False

    try:
        cluster.until(now, PATIENCE, "the soak to go on")
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{drill.log('soak')}") from None


def _newest(drill: Drill) -> int:
    return max(drill.steps("soak"), default=0)


def _standstill(drill: Drill, step: int) -> float:
    """Longest time between two new steps, from a fault's step on, in seconds by the run's own clock."""
    newest, times = 0, []
    for record in drill.records("soak"):
        if record["step"] > newest:
            newest = int(record["step"])
            if step - 2 <= newest <= step + EVERY - 3:
                times.append(record["time"])
    # Clocks jump by whole hours, and no start takes half of one.
    return max(((late - early) % HOUR for early, late in itertools.pairwise(times)), default=0.0)


def _stop_and_continue(process: int) -> None:
    os.kill(process, signal.SIGSTOP)
    time.sleep(3)
    os.kill(process, signal.SIGCONT)


def _fill(drill: Drill, cluster: IslandCluster, job: str) -> None:
    """Leave no room on the checkpoints' disk until a save has failed."""
    ballast = drill.folder / "soak" / "checkpoints" / "ballast"
    failures = _failed_saves(drill)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        cluster.until(lambda: _failed_saves(drill) > failures, PATIENCE, "a save to fail")
    finally:
        ballast.unlink()


def _failed_saves(drill: Drill) -> int:
    logs = (drill.folder / "soak" / "logs").glob("*/rank-0.out")
    return sum(file.read_text().count("could not save") for file in logs)


def _cut(drill: Drill, cluster: IslandCluster, job: str) -> None:
    """Pull the cable of the job's node; put it back once the job runs elsewhere and its orphans are gone."""
    orphans = set(cluster.ranks(job).values())
    # They stand still until the job runs elsewhere, so that it goes on from the same state each time.
    # Not rank 0: srun's own process carries that number too.
    victim = cluster.ranks(job)[RANKS - 1]
    os.kill(victim, signal.SIGSTOP)
    node, before = cluster.job(job)["BatchHost"], _newest(drill)
    cluster.cut(node)
    claims = drill.folder / "soak" / "checkpoints" / "fence"
    owned = len(list(claims.glob("*.json")))
    _wait(drill, cluster, job, lambda _: len(list(claims.glob("*.json"))) > owned)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGCONT)
    _wait(drill, cluster, job, lambda step: step > before + 1)
    # Only then may the node come back: what was cut off must find the run owned by another.
    cluster.until(
        lambda: not any(Path(f"/proc/{one}").exists() for one in orphans), PATIENCE, "the orphans' end"
    )
    cluster.mend(node)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
