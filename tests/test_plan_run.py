"""The planner: its sizes against the real modules, its choices against what they must mean."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from launch import repository, tool
from toy import settings_of, toy_vision

from megaregion.config import (
    DistillConfig,
    HeadsConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from megaregion.errors import UserError
from megaregion.models import foreign
from megaregion.models.layers import run_and_count
from megaregion.models.vit import RegionEncoder
from megaregion.parallel.zero import deepspeed_config
from megaregion.planning import memory, report
from megaregion.planning.dry_run import dry_run
from megaregion.planning.hardware import PRESETS, Hardware, load_hardware
from megaregion.planning.layout import Labels, body_parameters, lay_out
from megaregion.planning.memory import activation_bytes
from megaregion.planning.plan import (
    Plan,
    all_plans,
    best_plans,
    fullest,
    make_plan,
    stage_plans,
    weak_scaling,
)
from megaregion.planning.report import efficiency

MODEL = ModelConfig(image_size=64, patch_size=8, width=256, depth=6, heads=8, mlp_width=1024, region_layers=2)
LABELS = Labels(50_000, 5_000)
CONFIGS = [
    ("vit_b16_1gpu", "h100x8", 1), ("vit_b16_8gpu", "h100x8", 8), ("vit_l14_64gpu", "h100x64", 64),
    ("vit_bigg14_64gpu", "h100x64", 64),
]  # fmt: skip


def small(
    tensor: int = 1, stage: int = 1, precision: str = "bf16", recompute: bool = False, sequence: bool = True
) -> RunConfig:
    train = TrainConfig(global_batch=256, micro_batch=2, precision=precision, recompute=recompute)  # type: ignore[arg-type]
    parallel = ParallelConfig(tensor=tensor, sequence=sequence, zero_stage=stage)
    return RunConfig(model=MODEL, parallel=parallel, train=train, head=HeadsConfig(embedding_dim=128))


def config_plan(name: str, cluster: str, *flags: str) -> Plan:
    config = settings_of(["--config", f"{repository()}/configs/{name}.yaml", *flags])
    return make_plan(config, load_hardware(cluster), Labels())


@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_the_parameters_are_those_of_the_model(weights: str) -> None:
    start = "learned" if weights == "shared" else "class"
    model = dataclasses.replace(MODEL, region_weights=weights, registers=len(weights), region_start=start)
    with torch.device("meta"):
        encoder = RegionEncoder(model, 96)
    sizes = [parameter.numel() for parameter in encoder.parameters()]
    assert body_parameters(model, 96) == (sum(sizes), sum(size for size in sizes if size <= 10_000))


@pytest.mark.parametrize("weights", ["shared", "separate"])
@pytest.mark.parametrize("kept_mib", [0, 0.01, 4, 8, 11])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_activations_are_those_that_autograd_keeps(weights: str, kept_mib: float, precision: str) -> None:
    config = small(precision=precision)
    size = 0.5 if precision == "bf16" else 1
    train = dataclasses.replace(config.train, activation_gib=size * kept_mib / 1024)
    model = dataclasses.replace(MODEL, region_weights=weights, registers=3)
    config = dataclasses.replace(config, model=model, train=train)
    encoder = RegionEncoder(config.model, 128)
    layout = lay_out(config, 128, LABELS, "gpu")
    assert layout.micro_batch == 2
    encoder.vit.recompute = layout.recompute
    kinds = {0: {"keep"}, 0.01: {"full"}, 4: {"full", "cheap"}, 8: {"cheap"}, 11: {"cheap", "keep"}}
    assert set(layout.recompute) == kinds[kept_mib], layout.recompute
    encoder = encoder.bfloat16() if precision == "bf16" else encoder
    visible = torch.ones(2, 10, 64, dtype=torch.bool)
    out, counted = run_and_count(encoder.parameters(), lambda: encoder(torch.randn(2, 3, 64, 64), visible))
    planned = 2 * activation_bytes(layout, Hardware(device="processor"))
    assert out.requires_grad
    assert planned == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("tensor", "stage", "precision", "rank", "sequence"),
    [
        (1, 1, "bf16", 5, True), (1, 2, "bf16", 63, True), (1, 0, "fp32", 0, True), (2, 3, "fp32", 3, True),
        (8, 1, "bf16", 9, True), (8, 1, "bf16", 9, False), (4, 2, "fp32", 7, True),
    ],
)  # fmt: skip
def test_a_rank_of_64_that_is_really_built_holds_what_was_planned(
    tensor: int, stage: int, precision: str, rank: int, sequence: bool
) -> None:
    config = small(tensor, stage, precision, sequence=sequence)
    # Odd ranks keep an average of the weights, too.
    optimizer = dataclasses.replace(config.optimizer, ema_decay=0.99 * (rank % 2))
    config = dataclasses.replace(config, optimizer=optimizer)
    plan = make_plan(config, load_hardware("h100x64"), LABELS)
    built = dry_run(plan, rank)
    built.check()
    assert built.parameters == built.planned_parameters
    for kind in ("masters", "moments", "head", "activations"):
        assert abs(built.off(kind)) < 0.05, built.text()


@pytest.mark.parametrize(("gpus", "tensor"), [(64, 2), (4, 1), (1, 1)])
def test_a_dry_run_of_the_demo_whose_steps_have_one_pass_meets_its_plan(gpus: int, tensor: int) -> None:
    flags = ["--config", f"{repository()}/configs/demo.yaml", f"--parallel.tensor={tensor}"]
    plan = make_plan(settings_of(flags), load_hardware("h100x64").sized(gpus), Labels(50, 100))
    built = dry_run(plan, 0)
    assert sum(built.planned.values()) == pytest.approx(sum(built.counted.values()), rel=0.01), built.text()
    assert all(abs(built.off(kind)) < 0.01 for kind in built.counted), built.text()


def test_a_dry_run_refuses_a_rank_that_is_not_there_and_a_plan_that_is_off() -> None:
    plan = make_plan(small(), load_hardware("h100x64"), LABELS)
    with pytest.raises(UserError, match=r"--dry-run must name a rank in \[0, 63\], got 64"):
        dry_run(plan, 64)
    wrong = dataclasses.replace(plan.memory, at_rest={**plan.memory.at_rest, "moments": 2.0**30})
    built = dry_run(dataclasses.replace(plan, memory=wrong), 0)
    with pytest.raises(UserError, match=r"most by moments: planned 1\.00 GiB"):
        built.check()


@pytest.mark.parametrize(("name", "cluster", "gpus"), CONFIGS)
def test_every_config_fits_its_cluster_and_its_page_tells_the_plans_hours(
    name: str, cluster: str, gpus: int
) -> None:
    config = settings_of(["--config", f"{repository()}/configs/{name}.yaml"])
    plans = stage_plans(config, load_hardware(cluster).sized(gpus), Labels())
    page = (repository() / "configs" / f"{name}.yaml").read_text()
    assert all(plan.fits for plan in plans)
    assert f"{sum(plan.days for plan in plans) * 24:.0f} hours" in page
    assert f"tools/plan.py run --config configs/{name}.yaml --cluster {cluster}" in page


def test_the_head_of_vit_l14_takes_at_most_two_percent_of_its_planned_step() -> None:
    time = config_plan("vit_l14_64gpu", "h100x64").time
    assert 0 < time.phases["head"] / time.total <= 0.02


def test_a_run_of_several_resolutions_is_planned_one_by_one() -> None:
    stages = (StageConfig(128, 2560), StageConfig(192, 5120, micro_batch=1), StageConfig(256, 10240))
    config = dataclasses.replace(small(), stages=stages)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=30))
    plans = stage_plans(config, load_hardware("h100x64"), LABELS)
    assert [plan.layout.config.model.image_size for plan in plans] == [64, 128, 192], (
        "the last is never reached"
    )
    assert [plan.samples for plan in plans] == [2560, 2560, 2560]
    assert [plan.layout.micro_batch for plan in plans] == [2, 2, 1]
    alone = dataclasses.replace(config, model=dataclasses.replace(MODEL, image_size=128), stages=())
    assert plans[1].time == make_plan(alone, load_hardware("h100x64"), LABELS).time
    assert fullest(plans) is max(plans, key=lambda plan: plan.memory.peak)


def test_presets_are_complete_and_a_wrong_one_is_refused_with_the_way_out(tmp_path: Path) -> None:
    names = [file.stem for file in PRESETS.glob("*.yaml")]
    assert len(names) >= 4
    assert all(load_hardware(name).name == name for name in names)
    assert dataclasses.replace(load_hardware("h100x64"), gpus=128).nodes == 16
    with pytest.raises(UserError, match=r"--cluster h1000 is neither a preset .*h100x64"):
        load_hardware("h1000")
    file = tmp_path / "mine.yaml"
    for text, message in (
        ("memory_gb: 80", r"mine.yaml: unknown setting memory_gb; did you mean memory_gib\?"),
        ("matrix_tflops: fast", r"matrix_tflops must be a number in \(0, 1e6\], got fast"),
        ("gpus: 12", "--gpus must be a multiple of the 8 GPUs of a node, got 12"),
        ("[1, 2]", "must hold settings by name"),
        ("a: [", "is no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_hardware(str(file))


def test_what_memory_and_time_must_do_when_a_choice_changes() -> None:
    hardware = load_hardware("h100x64")
    plain = make_plan(small(), hardware, LABELS)
    recomputed = make_plan(small(recompute=True), hardware, LABELS)
    assert recomputed.memory.activations < plain.memory.activations / 4
    assert recomputed.time.phases["backward"] > plain.time.phases["backward"]
    scattered = make_plan(small(stage=3), hardware, LABELS)
    assert scattered.memory.at_rest["weights"] < plain.memory.at_rest["weights"]
    cut = make_plan(small(tensor=8), hardware, LABELS)
    assert next(one.seconds for one in cut.time.transfers if one.name == "activations") > 0
    assert cut.memory.at_rest["weights"] < plain.memory.at_rest["weights"] / 4
    slow = make_plan(small(), dataclasses.replace(hardware, across_gbytes=1.0), LABELS)
    assert slow.time.phases["communication"] > plain.time.phases["communication"]


def test_muon_keeps_one_moment_of_the_blocks_matrices_whose_parts_travel() -> None:
    config = small(tensor=2)
    plain = make_plan(config, load_hardware("h100x64"), LABELS)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))
    plan = make_plan(config, load_hardware("h100x64"), LABELS)
    sent = next(one.sent for one in plan.time.transfers if one.name == "muon's matrices")
    fewer = plain.memory.at_rest["moments"] - plan.memory.at_rest["moments"]
    assert fewer == sent == 4 * 6 * (4 * 256**2 + 2 * 256 * 1024) / 64, "there and back in bf16"
    assert plan.time.phases["optimizer"] > plain.time.phases["optimizer"]
    built = dry_run(plan, 5)
    built.check()
    assert abs(built.off("moments")) < 0.01, built.text()


@pytest.mark.parametrize(("tensor", "weights", "precision"), [(1, "shared", "bf16"), (2, "separate", "fp32")])
def test_a_teacher_adds_its_weights_its_forward_pass_and_what_its_loss_keeps(
    tensor: int, weights: str, precision: str, tmp_path: Path
) -> None:
    config = small(tensor, precision=precision)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, region_weights=weights))
    distill = DistillConfig(str(toy_vision("MLCDVision", tmp_path, patch=4, width=64)))
    plans = [
        make_plan(dataclasses.replace(config, distill=own), load_hardware("h100x64"), LABELS)
        for own in (DistillConfig(), distill)
    ]
    plain, taught = plans
    model = foreign.load(str(tmp_path)).model
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert taught.memory.kinds["teacher"] == 2 * sum(sizes)
    # Of 8 x 8 patches and a class token: the patches' linear, and linears and attention of two blocks.
    tokens, width = 65, 64
    assert taught.layout.teacher.flops == (
        2 * 64 * 48 * width + 2 * (tokens * (8 * width**2 + 4 * width * 64) + 4 * tokens**2 * width)
    )
    assert taught.time.phases["forward"] > plain.time.phases["forward"]
    assert taught.time.flops > plain.time.flops
    assert taught.layout.all_parameters == plain.layout.all_parameters + 257 * 64
    built = dry_run(taught, 5)
    built.check()
    assert abs(built.off("activations")) < 0.02, built.text()


def test_a_teacher_whose_settings_cannot_be_read_is_said_not_to_be_counted(tmp_path: Path) -> None:
    config = dataclasses.replace(small(), distill=DistillConfig(str(tmp_path / "none")))
    plan = make_plan(config, load_hardware("h100x64"), LABELS)
    assert f"teacher {tmp_path}/none: not counted, it cannot be read here" in report.text([plan], [], [])
    assert "teacher" not in plan.memory.kinds


def test_zero_3_gathers_by_the_pieces_that_deepspeed_gathers() -> None:
    used = DeepSpeedZeroConfig(**deepspeed_config(small(stage=3), 64)["zero_optimization"])
    assert used.prefetch_bucket_size == memory.PREFETCH_BUCKET
    assert used.max_live_parameters == memory.LIVE_PARAMETERS


def test_zero_3s_forward_pass_holds_the_greatest_piece_of_what_it_gathers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hardware = load_hardware("h100x64")
    size = make_plan(small(stage=3), hardware, LABELS).layout.parameters

    def beside(piece: int) -> float:
        monkeypatch.setattr(memory, "PREFETCH_BUCKET", piece)
        found = make_plan(small(stage=3), hardware, LABELS).memory
        resident = sum(found.kinds[kind] for kind in ("weights", "masters", "moments", "head", "buffers"))
        return found.moments["forward"] - resident - found.activations

    assert beside(2 * size) - beside(size) == 0, "a model that fits one piece is gathered whole"
    assert beside(size) - beside(size // 4) == pytest.approx(2 * (size - size // 4), abs=8)
    assert "forward" not in make_plan(small(stage=1), hardware, LABELS).memory.moments


def test_cutting_the_tokens_saves_memory_and_passes_over_it_and_sends_more() -> None:
    cut = config_plan("vit_bigg14_64gpu", "h100x64")
    whole = config_plan("vit_bigg14_64gpu", "h100x64", "--parallel.sequence=false")
    assert cut.memory.activations < 0.5 * whole.memory.activations
    assert cut.time.phases["forward"] < whole.time.phases["forward"]
    assert sum(one.sent for one in cut.time.transfers) > sum(one.sent for one in whole.time.transfers)


def test_the_best_choice_is_no_slower_than_any_legal_one_that_fits() -> None:
    plan = config_plan("vit_l14_64gpu", "h100x64")
    plans = all_plans(plan.layout.config, plan.hardware, Labels())
    best = best_plans(plans, 5)
    assert all(one.fits for one in best)
    assert best[0].time.total <= plan.time.total * 1.0001
    assert best[0].time.total == min(one.time.total for one in plans if one.fits)
    assert {one.layout.tensor for one in plans} == {1, 2, 4, 8}
    assert {one.layout.zero_stage for one in plans} == {1, 2, 3}


def test_where_nothing_fits_it_says_by_how_much_and_what_would() -> None:
    plan = config_plan("vit_bigg14_64gpu", "h100x64")
    tiny = dataclasses.replace(plan.hardware, memory_gib=5.0)
    with pytest.raises(
        UserError, match=r"needs [\d.]+ GiB a rank, [\d.]+ GiB over the 1.0 .* it would fit GPUs of"
    ):
        best_plans(all_plans(plan.layout.config, tiny, Labels()), 1)


def test_weak_scaling_keeps_a_ranks_images_and_loses_little_by_little() -> None:
    plans = weak_scaling(config_plan("vit_l14_64gpu", "h100x64"))
    assert [plan.hardware.gpus for plan in plans] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert {plan.layout.images for plan in plans} == {525}
    shares = [efficiency(plan, plans[0]) for plan in plans]
    assert shares[0] == 1
    assert shares[-1] < shares[3] < 1.02
    assert plans[-1].images_per_second > plans[0].images_per_second * 32


def test_the_command_prints_tables_or_json_and_ends_with_one_line_on_a_mistake(tmp_path: Path) -> None:
    def plan(*flags: str) -> subprocess.CompletedProcess[str]:
        return tool("tools/plan.py", "run", "--config", "configs/vit_l14_64gpu.yaml", *flags)

    told = json.loads(plan("--json", "--samples=1e9", "--scaling", "8", "64").stdout)
    assert told["plan"]["samples"] == 10**9
    assert sum(told["plan"]["memory"]["kinds"].values()) == pytest.approx(told["plan"]["memory"]["peak"])
    assert sum(told["plan"]["time"]["phases"].values()) == pytest.approx(told["plan"]["time"]["step"])
    assert [one["cluster"]["gpus"] for one in told["scaling"]] == [8, 64]
    demo = tool(
        "tools/plan.py", "run", "--config=configs/demo.yaml", "--gpus=4", "--gpus-per-node=4", "--json",
        "--choices=0", "--scaling", "--dry-run=3",
    )  # fmt: skip
    run = json.loads(demo.stdout)["dry_run"]
    assert run["rank"] == 3
    assert set(run["counted"]) == set(run["planned"]) > {"weights", "head", "activations", "gradients"}
    too_small = plan("--memory-gib=14", "--choices=1", "--scaling")
    assert too_small.returncode == 2
    assert "best of the legal choices" in too_small.stdout
    assert max(map(len, too_small.stdout.splitlines())) <= 120
    assert too_small.stderr.startswith("megaregion: vit_l14_64gpu needs")
    assert len(too_small.stderr.splitlines()) == 1
