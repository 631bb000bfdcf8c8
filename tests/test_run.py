"""One run as its user meets it: the command line, signals, full disks, and mistakes that cost nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from launch import Tool, launch, repository, tool
from toy import toy_config, toy_dataset

from megaregion.checkpoint.reader import config_from_dict, find_checkpoint
from megaregion.config import RunConfig
from megaregion.errors import EARLY_EXIT, REQUEUE_EXIT, USER_ERROR_EXIT

SMALL = [
    "--model.image_size=32", "--model.patch_size=8", "--model.width=32", "--model.depth=2", "--model.heads=4",
    "--model.mlp_width=64", "--model.region_layers=1", "--data.workers=0", "--data.regions_per_image=3",
    "--head.embedding_dim=16", "--head.draw_images=1", "--train.global_batch=4", "--train.micro_batch=2",
    "--train.precision=fp32", "--optimizer.warmup_steps=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("shards"))


def command(dataset: Path, output: Path, *extra: str) -> list[str]:
    flags = [*SMALL, f"--data.path={dataset}", f"--output={output}", "--name=run", *extra]
    return [sys.executable, "-W", "ignore", "tools/pretrain.py", *flags]


def pretrain(dataset: Path, output: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return tool(*command(dataset, output, *extra)[3:])


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_settings_metrics_logs_and_checkpoints(dataset: Path, tmp_path: Path) -> None:
    done = pretrain(dataset, tmp_path, "--train.steps=3", "--checkpoint.every=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3]
    assert {"loss", "loss_object", "loss_text", "lr", "grad_norm", "images_per_second"} <= set(
        metrics(tmp_path)[0]
    )
    assert "step      3/3" in done.stdout
    config = config_from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert isinstance(config, RunConfig)
    assert config.train.steps == 3
    # One fp32 copy of the model has nobody to share its state with.
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 0
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == [
        "fence", "latest", "step-00000002", "step-00000003",
    ]  # fmt: skip
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "logs" / "rank-00.log").read_text()

    again = pretrain(dataset, tmp_path, "--train.steps=3")
    assert again.returncode == USER_ERROR_EXIT
    assert "holds checkpoints; use --resume auto" in again.stderr

    before = (run / "config.yaml").read_bytes()
    refused = pretrain(dataset, tmp_path, "--train.steps=3", "--resume=auto", "--model.depth=3")
    assert refused.returncode == USER_ERROR_EXIT, refused.stderr
    assert (run / "config.yaml").read_bytes() == before, "a refused start changed what the run says of itself"

    finished = pretrain(dataset, tmp_path, "--train.steps=3", "--resume=auto")
    assert finished.returncode == 0
    assert len(metrics(tmp_path)) == 3, "a finished run took another step"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_exits_85_and_the_next_start_loses_no_step(
    number: signal.Signals, dataset: Path, tmp_path: Path
) -> None:
    started = Tool(*command(dataset, tmp_path, "--train.steps=100000", "--resume=auto")[3:])
    started.wait_for("step ")
    started.signal(number)
    stopped = started.wait()
    assert stopped.returncode == REQUEUE_EXIT, stopped
    steps = [int(record["step"]) for record in metrics(tmp_path)]
    assert json.loads((find_checkpoint(tmp_path / "run") / "manifest.json").read_text())["step"] == steps[-1]
    resumed = pretrain(dataset, tmp_path, f"--train.steps={steps[-1] + 2}", "--resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert [int(record["step"]) for record in metrics(tmp_path)] == list(range(1, steps[-1] + 3))
    report = tool("tools/pretrain.py", "report", tmp_path / "run", "--json")
    spent = json.loads(report.stdout)
    assert (spent["starts"], spent["lost"]) == (2, 0)
    assert min(spent[name] for name in ("training", "saving", "starting", "restarting")) > 0


def torchrun(dataset: Path, output: Path, *flags: str) -> Tool:
    """Two ranks as the README starts them, without a port."""
    script = command(dataset, output, "--train.steps=2", "--head.draw_images=2", *flags)[3:]
    return Tool("-m", "torch.distributed.run", "--nproc-per-node=2", *script)


def test_torchrun_starts_two_jobs_of_two_ranks_on_one_host_and_says_a_mistake_once(
    dataset: Path, tmp_path: Path
) -> None:
    jobs = {
        "good": torchrun(dataset, tmp_path / "good", "--parallel.tensor=2"),
        "other": torchrun(dataset, tmp_path / "other", "--parallel.tensor=2"),
        "mistaken": torchrun(dataset, tmp_path / "mistaken", "--train.global_batch=5"),
    }
    ended = {name: job.wait() for name, job in jobs.items()}
    for name in ("good", "other"):
        assert ended[name].returncode == 0, ended[name].stderr
        assert "2 ranks: tensor 2 x data 1" in ended[name].stdout
        assert len(metrics(tmp_path / name)) == 2
    err = ended["mistaken"].stderr
    assert ended["mistaken"].returncode != 0
    lines = [line for line in err.splitlines() if "train.global_batch" in line]
    assert lines == [line for line in lines if line.startswith("megaregion: ")][:1], err
    assert err.index(lines[0]) < err.index("ChildFailedError"), "the launcher's page came first"


def test_what_ranks_of_a_host_say_alike_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaregion.errors import is_said

    assert [is_said("a"), is_said("a")] == [False, False], "one process alone"
    for rank, expected in ((0, [False, False]), (1, [True, False]), (2, [True, True])):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert [is_said("a"), is_said(f"b{min(rank, 1)}")] == expected
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/nowhere/0/error.json")
    assert not is_said("a")


def test_an_interruption_while_modules_are_imported_is_one_line() -> None:
    # What runs in the background of a shell begins with Ctrl-C ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import megaregion.command_line, os, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository(), capture_output=True, text=True, check=False
    )
    assert done.stderr == "megaregion: interrupted\n"
    assert done.returncode in (-signal.SIGINT, 130)


HEAVY = ("torch", "scipy", "transformers", "deepspeed", "faiss")
IMPORTS = """
import runpy, sys
heavy = sys.argv[1].split(",")
class Watch:
    def find_spec(self, name, path, target=None):
        if name in heavy:
            print("heavy:", name)
sys.meta_path.insert(0, Watch())
sys.argv, sys.path[0] = sys.argv[2:], "tools"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("tool", sorted((repository() / "tools").glob("*.py")), ids=lambda file: file.stem)
def test_a_tool_imports_nothing_heavy_before_it_can_tell_a_mistake_or_its_help(tool: Path) -> None:
    for flag, code in (("--help", 0), ("--no-such-flag", USER_ERROR_EXIT)):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, ",".join(HEAVY), str(tool), flag],
            cwd=repository(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "heavy" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.path=missing"], "missing/dataset.json does not exist"),
        (["--parallel.tensor=2"], "parallel.tensor must divide the number of ranks 1, got 2"),
        (["--resume=yes"], "--resume must be auto or none, got yes"),
        (["--train.global_batch=5", "--head.draw_images=2"], "head.draw_images must divide the 1 images"),
        (["--head.backend=triton"], "head.backend triton needs a GPU"),
        (["--init=missing"], "missing"),
        (["--checkpoint.local=/proc/x"], "checkpoint.local: /proc/x/run cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run_behind(
    flags: list[str], message: str, dataset: Path, tmp_path: Path
) -> None:
    done = pretrain(dataset, tmp_path, *flags)
    assert done.returncode == USER_ERROR_EXIT
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


# --- inside one process of one rank ------------------------------------------------------------------------


def _full_disk(dataset: str, output: str) -> None:
    from test_training import train

    config = toy_config(Path(dataset), Path(output), "full", train__steps=4, checkpoint__every=1)
    from megaregion.checkpoint import saver as saving

    real, limit = saving.write_pieces, resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramped(folder: Path, rank: int, pieces: object, staging: Path | None) -> None:
        """Steps 2 and 3 meet a real refusal of the operating system; step 4 has room again."""
        if int(folder.stem.removeprefix("step-")) in (2, 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        try:
            real(folder, rank, pieces, staging)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    saving.write_pieces = cramped
    train(config)


def test_a_full_disk_costs_no_checkpoint_and_does_not_end_the_run(dataset: Path, tmp_path: Path) -> None:
    launch(_full_disk, 1, str(dataset), str(tmp_path))
    saved = sorted(f.name for f in (tmp_path / "full" / "checkpoints").iterdir())
    assert saved == ["fence", "latest", "step-00000001", "step-00000004"]


def _another_dataset(dataset: str, output: str) -> None:
    from test_training import train

    from megaregion.checkpoint.format import seal
    from megaregion.errors import UserError

    first = toy_config(Path(dataset), Path(output), "first", train__steps=1)
    train(first)
    other = toy_dataset(Path(output) / "other", seed=1)
    second = toy_config(other, Path(output), "second", train__steps=2)
    with pytest.raises(UserError, match=r"centers_sha256 .* were trained with"):
        train(second, resume_from=Path(output) / "first" / "checkpoints")
    wider = toy_config(Path(dataset), Path(output), "wider", train__steps=2, model__mlp_width=128)
    checkpoints = Path(output) / "first" / "checkpoints"
    with pytest.raises(UserError, match=r"do not go on with model.mlp_width 64 -> 128;"):
        train(wider, resume_from=checkpoints)
    # An old checkpoint may lack settings; its tensors have shapes.
    manifest = checkpoints / "step-00000001" / "manifest.json"
    content = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "config"}
    manifest.write_text(json.dumps({**content, "seal": seal(content)}))
    with pytest.raises(
        UserError, match=r"mlp.fc1.weight has shape \[128, 32\] by the settings and \[64, 32\]"
    ):
        train(wider, resume_from=checkpoints)


def test_a_checkpoint_of_another_dataset_or_model_is_refused(dataset: Path, tmp_path: Path) -> None:
    launch(_another_dataset, 1, str(dataset), str(tmp_path))


def _corrupt_sample(dataset: str, output: str) -> None:
    from test_training import train

    shard = Path(dataset) / "shard-00000"
    offset, size, _, _ = np.load(f"{shard}.index.npy", allow_pickle=False)[0]
    with Path(f"{shard}.tar").open("r+b") as tar:
        tar.seek(int(offset) + 10)
        tar.write(b"\0" * int(size - 20))
    train(toy_config(Path(dataset), Path(output), "corrupt", train__steps=5, data__max_bad_share=1.0))


def test_a_sample_that_cannot_be_read_is_replaced_and_counted(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "shards")
    launch(_corrupt_sample, 1, str(dataset), str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "corrupt" / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["bad"] for record in records) == 2, "80 positions pass the 40 samples twice"


def _poisoned(dataset: str, output: str) -> None:
    import torch

    from megaregion.checks import batching
    from megaregion.errors import StopRequest, UserError
    from megaregion.parallel import topology
    from megaregion.training.metrics import open_log
    from megaregion.training.trainer import Trainer

    config = toy_config(Path(dataset), Path(output), "poisoned", train__micro_batch=16, head__draw_images=0)
    place = topology.join(1)
    open_log(Path(output) / "poisoned" / "logs", 0)
    trainer = Trainer(config, place, StopRequest())
    batch = next(trainer.loader.batches([range(16)]))
    before = {kind: head.weight.clone() for kind, head in trainer.heads.by_kind.items()}
    embeddings = torch.randn(16, 3, 16)
    embeddings[5, 2] = float("nan")
    labels = trainer.heads.send_labels(batch)
    with pytest.raises(UserError, match="are not finite"):
        trainer.heads.loss(embeddings, labels, batch.keys, step=0, micro_step=0, sizes=batching(config, 1))
    log = (Path(output) / "poisoned" / "logs" / "rank-00.log").read_text()
    assert f"features of sample {batch.keys[5]} are not finite" in log
    for kind, head in trainer.heads.by_kind.items():
        assert torch.equal(head.weight, before[kind])


def test_features_that_are_not_finite_name_their_sample_and_move_no_center(
    dataset: Path, tmp_path: Path
) -> None:
    launch(_poisoned, 1, str(dataset), str(tmp_path))


def test_a_run_can_be_told_to_take_kernels_of_a_fixed_order_alone(dataset: Path, tmp_path: Path) -> None:
    script = tmp_path / "fixed.py"
    script.write_text(
        "import sys; sys.path.insert(0, 'tools')\n"
        "import pretrain, torch\n"
        "assert pretrain.main() == 0\n"
        "print('fixed:', torch.are_deterministic_algorithms_enabled())"
    )
    losses = {}
    for wanted in ("true", "false"):
        flags = command(dataset, tmp_path / wanted, "--train.steps=2", f"--train.deterministic={wanted}")[4:]
        done = tool(script, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"fixed: {wanted == 'true'}"
        losses[wanted] = [record["loss"] for record in metrics(tmp_path / wanted)]
    assert losses["true"] == losses["false"], "on a processor the order is fixed anyway"


def test_a_stop_request_before_the_first_step_ends_the_start(dataset: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(dataset, tmp_path, "--train.steps=100000"),
        cwd=repository(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    usr1 = 1 << (signal.SIGUSR1 - 1)
    while process.poll() is None:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & usr1:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == EARLY_EXIT, output
    assert "nothing to save" in output
    assert not list(tmp_path.glob("run/checkpoints/step-*"))
