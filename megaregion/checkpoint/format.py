"""How a run's checkpoints folder is laid out.

    checkpoints/step-00001200/manifest.json      counts, settings, hashes, tensors and their pieces
    checkpoints/step-00001200/rank-00000.safetensors ...
    checkpoints/step-00001300.unfinished-000002/ being written by incarnation 2, or never finished
    checkpoints/latest                           name of the newest complete folder, renamed into place last
    checkpoints/fence/000002.json                claim of incarnation 2, see fence.py

A folder without a manifest is one that was never finished.
"""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
DONE = "DONE"
"""Lies in the run's folder once the last step is taken: jobs that were chained to it leave at once."""
FENCE = "fence"
ENCODER = "body.weight."
"""Begins the names of the trained network's weights."""
BODY = ENCODER + "vit."
"""Begins the names of its transformer's weights."""
UNFINISHED = ".unfinished"
"""Begins the suffix of a folder that is being written."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after this many steps."""
    return checkpoints / f"step-{step:08d}"


def unfinished_folder(checkpoints: Path, step: int, incarnation: int) -> Path:
    """Folder that one incarnation writes a checkpoint into; never that of another incarnation."""
    return checkpoints / f"step-{step:08d}{UNFINISHED}-{incarnation:06d}"


def step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first, finished or not; none if the folder is missing."""
    return sorted((f for f in checkpoints.glob("step-*") if f.is_dir() and f.suffix == ""), reverse=True)


def finished_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders with a manifest, newest first."""
    return [folder for folder in step_folders(checkpoints) if (folder / MANIFEST).exists()]
