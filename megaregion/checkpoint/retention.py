"""Which checkpoints a run keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megaregion.checkpoint.format import MANIFEST, UNFINISHED, finished_folders, step_folders


@dataclass(frozen=True)
class Retention:
    """The rule; a checkpoint stays if any part of it says so."""

    last: int
    """Newest checkpoints that stay."""
    every: int = 0
    """Steps that are multiples of this stay for ever; 0 for none."""
    best: int = 0
    """Checkpoints with the lowest mean loss that stay; 0 for none."""

    def kept(self, losses: dict[int, float | None]) -> set[int]:
        """Steps that stay.

        Args:
            losses: Mean loss since the previous save by step; None where it is not known.
        """
        steps = sorted(losses, reverse=True)
        known = [(loss, -step) for step, loss in losses.items() if loss is not None]
        kept = set(steps[: self.last])
        kept |= {step for step in steps if self.every and step % self.every == 0}
        return kept | {-step for _, step in sorted(known)[: self.best]}


def retire(checkpoints: Path, rule: Retention) -> None:
    """Delete checkpoints that the rule lets go, and unfinished ones that are no newer than the newest."""
    finished = {int(folder.name.removeprefix("step-")): folder for folder in finished_folders(checkpoints)}
    if not finished:
        return
    kept = rule.kept({step: _loss(folder) if rule.best else None for step, folder in finished.items()})
    for step, folder in finished.items():
        if step not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    newest = finished[max(finished)].name
    unfinished = [f for f in checkpoints.glob(f"step-*{UNFINISHED}*") if f.is_dir()]
    abandoned = [f for f in step_folders(checkpoints) if not (f / MANIFEST).exists()]
    for folder in (*unfinished, *abandoned):
        if folder.name.split(".")[0] <= newest:
            shutil.rmtree(folder, ignore_errors=True)


def _loss(folder: Path) -> float | None:
    try:
        loss = json.loads((folder / MANIFEST).read_text()).get("loss")
    except (OSError, ValueError, AttributeError):
        return None
    return float(loss) if isinstance(loss, int | float) else None
