"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from drill import NODES, TOY, Drill
from launch import free_port, repository
from pretend_cluster import pretend_cluster


@pytest.fixture(scope="session")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    with pretend_cluster() as cluster:
        yield Drill(cluster, folder)


@pytest.fixture(scope="session")
def undisturbed(drill: Drill) -> str:
    """A run that nothing happened to, started by torchrun on as many ranks; returns its name."""
    flags = [*TOY, f"--data.path={drill.dataset}", f"--output={drill.folder}", "--name=undisturbed"]
    script = ["--config", "configs/vit_b16_8gpu.yaml", *flags]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={NODES}", f"--master-port={free_port()}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "tools/pretrain.py", *script],
        cwd=repository(), capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return "undisturbed"
