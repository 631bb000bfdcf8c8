"""A toy run on the pretend cluster: submitting it, watching it, and comparing it with an undisturbed one.

A run that was stopped, killed or moved must end with the same state as one that nothing happened to, bit for
bit where the ranks are as many as before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from launch import free_port, repository, tool
from pretend_cluster import PretendCluster
from toy import toy_dataset

from megaregion.checkpoint.reader import CheckpointReader, find_checkpoint

NODES, STEPS = 8, 30

TOY = [
    "--model.image_size=32", "--model.patch_size=8", "--model.width=32", "--model.depth=2", "--model.heads=4",
    "--model.mlp_width=64", "--model.region_layers=1", "--data.workers=0", "--data.regions_per_image=3",
    "--head.embedding_dim=16", "--head.draw_images=8", "--head.init=random", "--train.global_batch=48",
    "--train.micro_batch=6", "--train.precision=fp32", "--train.log_every=1", "--optimizer.warmup_steps=0",
    "--checkpoint.every=5", f"--train.steps={STEPS}",
    "--machines.slow_factor=0",  # Eight ranks fight for two cores here.
]  # fmt: skip


class Drill:
    """The cluster, a dataset, and runs of one toy model."""

    def __init__(self, cluster: PretendCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.dataset = toy_dataset(folder / "shards", samples=64)

    def submit(
        self,
        name: str,
        *settings: str,
        nodes: int | str = NODES,
        per_node: int = 1,
        cpus: int = 1,
        **environment: str,
    ) -> str:
        """Submit the script that users submit; returns the job's number."""
        return self.cluster.submit(
            f"--nodes={nodes}", f"--gpus-per-node={per_node}", f"--cpus-per-task={cpus}",
            f"--output={self.folder}/{name}.log",
            repository() / "slurm" / "pretrain_8gpu.sh",
            *TOY, f"--data.path={self.dataset}", *settings,
            environment={
                "MEGAREGION_HOME": str(repository()),
                "MEGAREGION_PYTHON": sys.executable,
                "MEGAREGION_RUNS": str(self.folder),
                "MEGAREGION_NAME": name,
                "PYTHONPATH": str(repository()),
                **environment,
            },
            cwd=self.folder,
        )  # fmt: skip

    def torchrun(
        self, name: str, ranks: int, *settings: str, seconds: float = 600, **environment: str
    ) -> None:
        """The same training without SLURM, undisturbed to its end."""
        flags = [*TOY, f"--data.path={self.dataset}", f"--output={self.folder}", f"--name={name}", *settings]
        done = tool(
            "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}",
            "tools/pretrain.py", "--config", "configs/vit_b16_8gpu.yaml", *flags,
            environment={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    def steps(self, name: str) -> list[int]:
        """Steps that the run has logged, in order."""
        return [int(record["step"]) for record in self.records(name)]

    def records(self, name: str) -> list[dict[str, float]]:
        """What the run has logged."""
        file = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def losses(self, name: str) -> dict[int, float]:
        """Last loss that was logged for each step."""
        return {int(record["step"]): record["loss"] for record in self.records(name)}

    def nodes_used(self, name: str) -> list[int]:
        """Nodes of each start of the run, as the batch script says."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return [int(line.split(" nodes x ")[0].split()[-3]) for line in lines if " nodes x " in line]

    def wait_for_step(self, name: str, job: str, step: int, seconds: float = 240) -> None:
        """Wait until the run has logged a step, requeued in between or not."""

        def reached() -> bool:
            self.cluster.hurry(job)
            return step in self.steps(name) or self.cluster.has_ended(job)

        try:
            self.cluster.until(reached, seconds, f"step {step} of {name}")
            if step not in self.steps(name):
                raise TimeoutError(f"job {job} ended before step {step} of {name}")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log(name)}") from None

    def ask_to_stop(self, job: str) -> None:
        """What SLURM does before a time limit, at once."""
        self.cluster.command("scancel", "--batch", "--signal=USR1", job)

    def finish(self, name: str, job: str, seconds: float = 300) -> str:
        """Wait for the end of a job; says what it logged if it fails to end."""
        try:
            return self.cluster.finish(job, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log(name)}") from None

    def log(self, name: str) -> str:
        """What the batch script and the first rank printed."""
        controller = self.cluster.base / "log" / "slurmctld.log"
        files = [
            controller,
            self.folder / f"{name}.log",
            *sorted((self.folder / name / "logs").glob("*/rank-0.out")),
        ]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Every tensor of the run's last checkpoint."""
        reader = CheckpointReader(find_checkpoint(self.folder / name))
        reader.verify()
        return {tensor: reader.read(tensor) for tensor in reader.names()}

    def is_trained(self, name: str, steps: int = STEPS) -> bool:
        """Whether the run reached its last step and says so."""
        reader = CheckpointReader(find_checkpoint(self.folder / name))
        return reader.step == steps and (self.folder / name / "DONE").exists()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two states are one, bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different
