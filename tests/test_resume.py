"""Going on with other settings: what the weights mean stays, all else is said, no setting is undecided."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from toy import toy_config, toy_dataset, toy_vision

from megaregion.config import RunConfig, StageConfig
from megaregion.data.info import DatasetInfo, ShardEntry
from megaregion.errors import UserError
from megaregion.settings import sections
from megaregion.training.state import FIXED, changes, facts

SETTINGS = {one.key for section in sections(RunConfig()) for one in section.settings}
DATASET = DatasetInfo(4, 9, 9, 5, 6, "a", "b", (ShardEntry("one", 2, 9, "c"), ShardEntry("two", 2, 9, "d")))

_HEAD = ("loss", "margin", "margin_kind", "scale", "sample_rate", "min_negatives", "weight", "near_classes")

FREE = {
    # The seed orders samples, crops and negatives from here on; those of the steps before keep theirs.
    "": ("name", "output", "seed", "init", "stages"),
    "model": ("image_size", "drop_path", "first_weights"),
    # The labels must stay: see check_fits.
    "data": (
        "path", "cache", "cache_bytes", "regions_per_image", "max_text_tokens", "max_object_labels",
        "object_labels", "crop_scale", "crop_ratio", "flip", "color_jitter", "min_visible", "patch_coverage",
        "packing", "workers", "prefetch", "window_shards", "max_bad_share", "read_retries", "read_pause",
    ),
    "head": (
        "chunk_bytes", "draw_images", "backend", "init", "hierarchical", "census_every", "idle_steps",
    ),
    "head.object": _HEAD,
    "head.text": _HEAD,
    # A teacher's width is that of a weight: see check_fits.
    "distill": ("teacher", "weight"),
    "optimizer": (
        "lr", "min_lr_ratio", "warmup_steps", "weight_decay", "head_weight_decay", "head_moments", "beta1",
        "beta2", "eps", "clip_norm", "layer_decay", "ema_decay",
    ),
    "parallel": ("tensor", "sequence", "zero_stage"),
    "train": (
        "steps", "global_batch", "micro_batch", "precision", "recompute", "activation_gib", "fp8", "compile",
        "grad_precision", "deterministic", "log_every", "slow_factor", "watchdog_seconds",
    ),
    "checkpoint": ("every", "asynchronous", "local", "keep_last", "keep_every", "keep_best"),
    "guard": ("enabled", "window", "spike", "rollback_after", "max_rollbacks", "captures"),
    "evaluate": ("every", "scenes", "split", "limit", "threads"),
    "metrics": ("loggers", "project"),
    "machines": ("slow_factor", "inside_gbytes", "across_gbytes", "clock_skew", "free_checkpoints"),
}  # fmt: skip
"""Settings by section that a resume may change."""


def keys(kind: dict[str, tuple[str, ...]]) -> list[str]:
    return [f"{section}.{name}".removeprefix(".") for section, names in kind.items() for name in names]


def test_every_setting_is_of_exactly_one_kind() -> None:
    decided = keys(FIXED) + keys(FREE)
    assert len(decided) == len(set(decided))
    assert set(decided) == SETTINGS


def facts_of(config: RunConfig, position: int = 0) -> dict[str, Any]:
    return facts(config, position, DATASET, 1, 2)


def test_what_differs_is_found_by_its_key_and_what_an_old_manifest_lacks_is_not() -> None:
    old, new = facts_of(RunConfig()), facts_of(RunConfig(seed=4, name="other"))
    new["ranks"]["data"], new["dataset"]["shards"] = 4, 1
    del old["config"]["optimizer"]["lr"]
    assert changes(json.loads(json.dumps(old)), new) == {
        "seed": (0, 4), "name": ("run", "other"), "ranks.data": (2, 4), "dataset.shards": (2, 1),
    }  # fmt: skip
    assert changes({}, new) == {}


def test_the_image_size_of_a_stage_is_no_change() -> None:
    staged = dataclasses.replace(RunConfig(), stages=(StageConfig(448, 4096),))
    assert facts_of(staged, 8192)["config"]["model"]["image_size"] == 448
    assert not changes(facts_of(staged, 8192), facts_of(staged, 8192))
    assert changes(facts_of(RunConfig(), 8192), facts_of(staged, 8192)).keys() == {
        "model.image_size",
        "stages",
    }


OTHER_MODELS = {
    "model__depth": 2, "model__activation": "quick_gelu", "model__norm_eps": 1e-4, "model__rope_theta": 500.0,
    "model__heads": 2, "model__patch_size": 16, "model__registers": 2,
}  # fmt: skip
OTHER_RUNS = {
    "model__region_layers": 1, "model__region_weights": "separate", "model__region_start": "learned",
    "head__embedding_dim": 8, "data__std": (0.5, 0.5, 0.5),
}  # fmt: skip
"""What --init takes, and resuming does not."""
FREE_CHANGES = {"seed": 7, "data__window_shards": 3, "head__object__loss": "softmax", "train__steps": 3}


def _go_on(shards: str, output: str) -> None:
    from test_training import train

    from megaregion.training.metrics import open_log

    data, runs = Path(shards), Path(output)
    open_log(runs / "run" / "logs", 0)
    train(toy_config(data, runs, "run", train__steps=2))
    checkpoints = runs / "run" / "checkpoints"
    for key, value in [*OTHER_MODELS.items(), ("model__depth", 4), *OTHER_RUNS.items()]:
        with pytest.raises(UserError) as told:
            train(toy_config(data, runs, "other", train__steps=3, **{key: value}), checkpoints)
        with (runs / "refused").open("a") as file:
            file.write(f"{key} {told.value}\n")
    with pytest.raises(UserError, match=r"do not go on with model\.depth 3 -> 4"):
        train(toy_config(data, runs, "run", model__depth=4), checkpoints)
    shutil.copytree(checkpoints / "fence", runs / "fence-after-refusal")
    train(toy_config(data, runs, "run", **FREE_CHANGES), checkpoints)
    train(toy_config(data, runs, "run", **FREE_CHANGES | {"train__steps": 1}), checkpoints)
    _with_teachers(data, runs)


def _with_teachers(data: Path, runs: Path) -> None:
    from test_training import train

    teachers = [str(toy_vision("Dinov2", runs / name, width=width)) for name, width in TEACHERS.items()]

    def go_on(teacher: str, **changes: object) -> None:
        train(toy_config(data, runs, "taught", distill__teacher=teacher, **changes), checkpoints)

    train(toy_config(data, runs, "taught", train__steps=2, distill__teacher=teachers[0]))
    checkpoints = runs / "taught" / "checkpoints"
    for teacher in ("", teachers[2]):
        with pytest.raises(UserError) as told:
            go_on(teacher)
        with (runs / "untaught").open("a") as file:
            file.write(f"{told.value}\n")
    go_on(teachers[1], distill__weight=0.5)


TEACHERS = {"first": 32, "second": 32, "wider": 64}
"""Widths of teachers by name."""


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    launch(_go_on, 1, str(toy_dataset(output / "shards")), str(output))
    return output


def test_a_start_that_is_refused_takes_no_run_away_from_its_owner(gone_on: Path) -> None:
    assert [file.name for file in (gone_on / "fence-after-refusal").iterdir()] == ["000001.json"]


def test_another_model_is_refused_with_key_old_new_and_the_way_out(gone_on: Path) -> None:
    lines = (gone_on / "refused").read_text().splitlines()
    assert len(lines) == len(OTHER_MODELS) + 1 + len(OTHER_RUNS)
    for line in lines:
        key, _, told = line.partition(" ")
        name = key.replace("__", ".")
        assert re.search(
            f"do not go on with {re.escape(name)} .* -> .*; take the old value, or .*--init", told
        )
        assert (f"which asks for the same {name}" in told) == (key in OTHER_MODELS), told
    assert "model.depth 3 -> 2;" in lines[0]


def test_free_changes_are_said_in_a_line_and_noted(gone_on: Path) -> None:
    log = (gone_on / "run" / "logs" / "rank-00.log").read_text()
    told = "seed 3 -> 7, data.window_shards 2 -> 3, head.object.loss separated -> softmax, train.steps 2 -> 3"
    assert f"this start has other settings: {told}\n" in log
    events = [json.loads(line) for line in (gone_on / "run" / "events.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["event"] == "resumed")
    assert first["changed"] == {
        "seed": [3, 7], "data.window_shards": [2, 3], "head.object.loss": ["separated", "softmax"],
        "train.steps": [2, 3],
    }  # fmt: skip


def test_another_teacher_goes_on_if_it_is_as_wide_and_none_is_dropped_unsaid(gone_on: Path) -> None:
    none, wider = (gone_on / "untaught").read_text().splitlines()
    assert "to_teacher.weight has shape none by the settings and [32, 32] in " in none
    assert "to_teacher.weight has shape [64, 32] by the settings and [32, 32] in " in wider
    assert wider.endswith("use the model settings and the distill.teacher of that run (its config.yaml)")
    log = (gone_on / "run" / "logs" / "rank-00.log").read_text()
    first, second = (gone_on / name for name in ("first", "second"))
    assert f"distill.teacher {first} -> {second}, distill.weight 1.0 -> 0.5" in log
    assert f"patches learn from {second}: 32 wide, at 32 px\n" in log
    assert re.search(r"  text .*  distill  [01]\.\d{3}  lr ", log)
    lines = (gone_on / "taught" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [record["step"] for record in told] == [1, 2, 3]
    weights = (1.0, 1.0, 0.5)
    for record, weight in zip(told, weights, strict=True):
        assert 0 < record["loss_distill"] < 2
        assert record["loss"] > weight * record["loss_distill"]


def test_a_resume_beyond_its_end_says_so_and_takes_no_step(gone_on: Path) -> None:
    log = (gone_on / "run" / "logs" / "rank-00.log").read_text()
    assert "train.steps 1 lies below step 3 of" in log
    lines = (gone_on / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
