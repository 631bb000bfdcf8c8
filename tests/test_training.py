"""The training run against a dense single process, on many topologies, in as few launches as possible."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from launch import launch
from toy import OBJECT_CLASSES, TEXT_CLASSES, toy_config, toy_dataset, toy_vision

from megaregion.checkpoint.reader import CheckpointReader
from megaregion.config import ParallelConfig, RunConfig, StageConfig

AVERAGED = {"optimizer__ema_decay": 0.3}
FULL = {"head__object__sample_rate": 1.0, "train__steps": 2, **AVERAGED}
"""Score every class, so that the dense reference needs no draw and AdamW moves every row."""

# As many micro-steps for any number of tensor ranks: each costs dozens of collectives.
TP2 = {"parallel__tensor": 2, "train__micro_batch": 4}
TP4 = {"parallel__tensor": 4, "train__micro_batch": 8}
ZERO3 = {"parallel__zero_stage": 3}
DROPPED = {"model__drop_path": 0.5}
REGISTERED = {"model__registers": 3}
LEARNED = {"model__region_start": "learned"}
TOKENS = {**REGISTERED, **LEARNED}
MUON = {"optimizer__name": "muon"}
TAUGHT = {"distill__teacher": "{0}/teacher", "distill__weight": 3.0}

TOPOLOGIES = {
    "tp1-zero0": {"parallel__zero_stage": 0, "train__micro_batch": 1},
    "tp1-zero1": {"parallel__zero_stage": 1},
    "tp1-zero2": {"parallel__zero_stage": 2},
    "tp1-zero3": ZERO3,
    "tp2-zero0": {**TP2, "parallel__zero_stage": 0},
    "tp2-zero1": {**TP2, "parallel__zero_stage": 1},
    "tp2-zero2": {**TP2, "parallel__zero_stage": 2},
    "tp2-zero3": {**TP2, **ZERO3},
    "tp4-zero1": {**TP4, "parallel__zero_stage": 1},
    "tp4-zero3": {**TP4, **ZERO3},
    # The tokens between the linears whole on every tensor rank.
    "tp2-zero0-whole-tokens": {**TP2, "parallel__zero_stage": 0, "parallel__sequence": False},
    "tp4-zero2-whole-tokens": {**TP4, "parallel__zero_stage": 2, "parallel__sequence": False},
}


def train(config: RunConfig, resume_from: Path | None = None) -> None:
    """One run in this process group, on the path of tools/pretrain.py."""
    from megaregion.errors import StopRequest
    from megaregion.parallel import topology
    from megaregion.training.trainer import Trainer

    place = topology.join(config.parallel.tensor)
    (Path(config.output) / config.name).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    trainer = Trainer(config, place, StopRequest())
    if resume_from is not None:
        assert trainer.state.resume(resume_from)
    assert trainer.run() == 0
    for group in (place.data_group, place.tensor_group):
        torch.distributed.destroy_process_group(group)


def losses(config: RunConfig) -> list[float]:
    lines = (Path(config.output) / config.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def checkpoint(config: RunConfig, step: int) -> CheckpointReader:
    return CheckpointReader(Path(config.output) / config.name / "checkpoints" / f"step-{step:08d}")


def differences(one: CheckpointReader, other: CheckpointReader, prefix: str = "") -> dict[str, float]:
    assert set(one.names()) == set(other.names())
    return {
        name: float((one.read(name) - other.read(name)).abs().max())
        for name in one.names()
        if name.startswith(prefix)
    }


# --- the dense reference: no engine, no shards, no chunks -------------------------------------------------


def alone(config: RunConfig) -> RunConfig:
    """The run without what says how ranks share it, and how they spare memory."""
    train = dataclasses.replace(
        config.train, micro_batch=1, recompute=False, activation_gib=0.0, compile=False
    )
    data = dataclasses.replace(config.data, workers=0)
    return dataclasses.replace(config, name="dense", parallel=ParallelConfig(), train=train, data=data)


@functools.cache
def dense_run(config: RunConfig, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process with plain autograd, torch's AdamW and torch's clipping."""
    import math

    import numpy as np

    from megaregion.data.batch import OBJECT, TEXT
    from megaregion.data.loader import RegionLoader
    from megaregion.data.shards import open_datasets, order_of
    from megaregion.data.transforms import Transform
    from megaregion.models.initialisation import initialise
    from megaregion.models.vit import RegionEncoder, decays, learning_rate_factor
    from megaregion.training.trainer import draw_kept, learning_rate

    dataset = open_datasets(config.data)
    order = order_of(dataset, config.data, config.seed)
    transform = Transform(config.data, config.model, config.seed, config.stages)
    loader = RegionLoader(dataset, order, transform, config.data)
    ask, width = dense_teacher(config) if config.distill.teacher else (None, 0)
    model = RegionEncoder(config.model, config.head.embedding_dim, width)
    initialise(model, config.seed)
    centers = {
        kind: torch.nn.Parameter(initial_centers(config, kind, classes))
        for kind, classes in (
            ("object", dataset.info.object_classes),
            ("text", dataset.info.text_classes),
        )
    }
    settings = config.optimizer
    by_muon = torch_muon(model, config) if settings.name == "muon" else None
    of_body = [
        {
            "params": [parameter],
            "weight_decay": settings.weight_decay if decays(name, parameter) else 0.0,
            "rate": learning_rate_factor(name, config.model, settings.layer_decay),
        }
        for name, parameter in model.named_parameters()
    ]
    of_heads = {"params": list(centers.values()), "weight_decay": settings.head_weight_decay, "rate": 1.0}
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [*of_body, of_heads],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    batch_size = config.train.global_batch
    positions = [list(range(s * batch_size, (s + 1) * batch_size)) for s in range(steps)]
    seen = []
    for step, batch in enumerate(loader.batches(positions)):
        kept = draw_kept(config, batch.positions, torch.device("cpu"))
        tokens = model.vit(batch.images, batch.visible, grids=batch.grids, kept=kept)
        embeddings = model.projection(model.vit.post_norm(tokens.regions))
        rows = torch.nn.functional.normalize(embeddings.flatten(0, 1), dim=-1)
        labels, kinds = batch.labels.flatten(0, 1), batch.kinds.flatten()
        total = torch.zeros(())
        for kind, code in (("object", OBJECT), ("text", TEXT)):
            head = getattr(config.head, kind)
            own, positive_ids = rows[kinds == code], labels[kinds == code]
            cosines = own @ torch.nn.functional.normalize(centers[kind], dim=-1).T
            positive = torch.zeros_like(cosines, dtype=torch.bool)
            for row, ids in enumerate(positive_ids.tolist()):
                positive[row, [i for i in ids if i >= 0]] = True
            up = (-head.scale * (cosines - head.margin)).masked_fill(~positive, -math.inf)
            down = (head.scale * cosines).masked_fill(positive, -math.inf)
            zero = torch.zeros(len(own), 1)
            per_row = torch.cat([zero, up], 1).logsumexp(1) + torch.cat([zero, down], 1).logsumexp(1)
            total = total + per_row.sum() / np.prod(kinds.shape)
        if ask is not None:
            own = model.to_teacher(model.vit.post_norm(tokens.image[:, config.model.leading :]))
            cosines = torch.nn.functional.cosine_similarity(own, ask(batch.pixels), dim=2)
            total = total + config.distill.weight * (1 - cosines).mean()
        optimizer.zero_grad()
        total.backward()
        parameters = [*model.parameters(), *centers.values()]
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            rate = group["rate"] * config.stage(step * batch_size).lr_scale
            group["lr"] = learning_rate(config, step) * rate
        if by_muon is not None:
            by_muon(learning_rate(config, step))
        optimizer.step()
        decay = min(settings.ema_decay, (2 + step) / (11 + step))
        for name, parameter in model.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * parameter.detach()
        seen.append(float(total.detach()))
    loader.close()
    weights = {f"body.weight.{n}": p.detach() for n, p in model.named_parameters()}
    weights.update({f"body.ema.{n}": average for n, average in averages.items()})
    weights.update({f"head.{kind}.weight": c.detach() for kind, c in centers.items()})
    return seen, weights


def dense_teacher(config: RunConfig) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """Features of patches, [B, P, C], of pixels 0 to 255, [B, 3, H, W], and their width."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(config.distill.teacher).eval()

    @torch.no_grad()
    def ask(pixels: torch.Tensor) -> torch.Tensor:
        return model((pixels / 255 - 0.4) / 0.3).last_hidden_state[:, 1:]

    return ask, model.config.hidden_size


def torch_muon(model: torch.nn.Module, config: RunConfig) -> Callable[[float], None]:
    """Moves the blocks' matrices by torch's Muon at a learning rate and leaves AdamW no gradient of them."""
    from megaregion.models.vit import learning_rate_factor

    blocks = {name: p for name, p in model.named_parameters() if "blocks." in name and p.dim() == 2}
    weights, groups, decay = list(blocks.values()), [], config.optimizer.layer_decay

    def parts(weight: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of a fused weight, whose rows are laid out by heads."""
        rows, width = weight.shape
        fused = rows == 3 * width
        return list(weight.view(config.model.heads, 3, -1, width).unbind(1)) if fused else [weight]

    for name, weight in blocks.items():
        matrices = [torch.nn.Parameter(p.detach().flatten(0, -2).clone()) for p in parts(weight)]
        groups.append({"params": matrices, "rate": learning_rate_factor(name, config.model, decay)})
    muon = torch.optim.Muon(
        groups, weight_decay=config.optimizer.weight_decay, adjust_lr_fn="match_rms_adamw"
    )

    def step(lr: float) -> None:
        gradients = [g for w in weights for g in parts(w.grad)]
        matrices = [matrix for group in groups for matrix in group["params"]]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient.reshape(matrix.shape)
        for group in muon.param_groups:
            group["lr"] = lr * group["rate"]
        # Runs in fp32 multiply in fp32.
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon.step()
        moved = iter(matrices)
        for weight in weights:
            for part in parts(weight.detach()):
                part.copy_(next(moved).detach().view_as(part))
            weight.grad = None

    return step


def initial_centers(config: RunConfig, kind: str, classes: int) -> torch.Tensor:
    from megaregion.heads.centers import random_centers

    return random_centers(config.seed, kind, range(classes), config.head.embedding_dim)


TWO_OF_FOUR = {"train__steps": 4, "checkpoint__every": 2, **AVERAGED}

# Each step has its own size of image and number of micro-steps.
STAGES = (StageConfig(48, 16, 0.5, micro_batch=1), StageConfig(24, 32, 0.1, micro_batch=4))

STAGES_TP2 = (StageConfig(48, 16, 0.5, micro_batch=2), StageConfig(24, 32, 0.1, micro_batch=8))
"""The same numbers of micro-steps on half as many data ranks."""

TWO = "{0}=2,{0}/second=1"
"""Paths and weights of two datasets, with the first one's folder left out."""

WIDE = {"model__width": 128, "model__mlp_width": 256}

VARIANTS = {
    # Each must equal the dense reference too.
    "separate-tp2": {**TP2, "model__region_weights": "separate", **DROPPED, **TAUGHT},
    # Linears that ZeRO 3 takes apart: of more than 10,000 numbers a rank.
    "wide-tp2-zero3": {**TP2, **ZERO3, **WIDE},
    "recompute-tp2-zero3": {**TP2, **ZERO3, "train__recompute": True, **DROPPED, **TAUGHT},
    # Sequences that the ranks do not divide.
    "native-tp4": {**TP4, "data__packing": "native", "data__crop_ratio": (0.3, 3.0), **DROPPED, **REGISTERED},
    "cheap-tp2": {**TP2, "train__activation_gib": 1e-4, **DROPPED, **TOKENS},
    "stages": {"stages": STAGES, "train__steps": 3, **DROPPED},
    "stages-zero2": {"stages": STAGES, "train__steps": 3, "parallel__zero_stage": 2, **TAUGHT, **LEARNED},
    "stages-tp2-zero3": {**TP2, **ZERO3, "stages": STAGES_TP2, "train__steps": 3},
    "within-memory": {"train__activation_gib": 1e-4},
    "layers": {"optimizer__layer_decay": 0.5},
    "layers-tp2-zero3": {**TP2, **ZERO3, "optimizer__layer_decay": 0.5, **TOKENS},
    "muon-zero0": {**MUON, "parallel__zero_stage": 0},
    "muon-layers-zero2": {**MUON, "parallel__zero_stage": 2, "optimizer__layer_decay": 0.5},
    "muon-tp2": {**MUON, **TP2, **LEARNED},
    # A teacher's images that the ranks do not divide.
    "muon-tp2-zero0": {**MUON, **TP2, "parallel__zero_stage": 0, **TAUGHT, "train__micro_batch": 1},
    "muon-tp4-separate": {**MUON, **TP4, "model__region_weights": "separate", **TAUGHT, **LEARNED},
    "workers": {"data__workers": 2, "train__micro_batch": 4},
    # Two spaces of object classes in one, and several positives of an object.
    "two-datasets": {"data__path": TWO, "data__max_object_labels": 6, "train__steps": 3},
    "two-datasets-drawn-tp2": {**TP2, "data__path": TWO, "data__object_labels": "drawn"},
}


SUMMED = {
    f"summed-{kind}-zero{stage}": {
        "parallel__zero_stage": stage, "train__precision": "bf16", "train__grad_precision": kind,
        "train__steps": 1, "train__micro_batch": 1, "optimizer__clip_norm": 0.0,
    }
    for stage in (1, 2, 3)
    for kind in ("fp32", "bf16")
}  # fmt: skip

NATIVE_STAGES = {
    "data__packing": "native",
    "data__crop_ratio": (0.3, 3.0),
    "stages": (StageConfig(48, 16, micro_batch=1), StageConfig(24, 48)),
    **DROPPED,
    **TOKENS,
}

WHOLE = {
    # Runs with sampled negatives and a checkpoint in the middle.
    "sampled-tp1": {},
    "sampled-tp2": TP2,
    "sampled-tp4": TP4,
    "sampled-zero3": ZERO3,
    "sampled-muon-tp2": {**MUON, **TP2, **TAUGHT},
    "bf16-muon": {**MUON, "train__precision": "bf16", **TAUGHT},
    "bf16-zero1": {"train__precision": "bf16", "optimizer__ema_decay": 0.0},
    "bf16-zero2": {"train__precision": "bf16", "parallel__zero_stage": 2},
    "bf16-zero3-tp2": {"train__precision": "bf16", **ZERO3, **TP2},
    "mixed": {"train__precision": "mixed"},
    "mixed-muon-tp2": {**MUON, **TP2, "train__precision": "mixed", **TAUGHT},
    "stages-native": NATIVE_STAGES,
    "sampled-two-datasets": {"data__path": TWO, **DROPPED, **TOKENS},
}

CONTINUED = {
    # The run that wrote step 2, and the topology that goes on.
    "same-zero1-tp2": ("sampled-tp2", TP2),
    "same-zero3": ("sampled-zero3", ZERO3),
    "same-stages-native": ("stages-native", NATIVE_STAGES),
    "same-muon": ("bf16-muon", WHOLE["bf16-muon"]),
    "muon-tp2-to-tp1-zero2": ("sampled-muon-tp2", {**MUON, "parallel__zero_stage": 2, **TAUGHT}),
    "same-bf16": ("bf16-zero2", WHOLE["bf16-zero2"]),
    "same-mixed": ("mixed-muon-tp2", WHOLE["mixed-muon-tp2"]),
    "begins-to-average": ("bf16-zero1", {"train__precision": "bf16"}),
    "tp2-zero1-to-tp1-zero3": ("sampled-tp2", ZERO3),
    "tp1-zero3-to-tp4-zero2": ("sampled-zero3", {**TP4, "parallel__zero_stage": 2}),
    "two-datasets-to-tp2": ("sampled-two-datasets", {**TP2, "data__path": TWO, **DROPPED, **TOKENS}),
    "tp4-zero1-to-tp2-zero0": ("sampled-tp4", {**TP2, "parallel__zero_stage": 0}),
}


COMPILED = {
    # A block that runs again, and cheap ones; tokens cut over the ranks, and whole on each.
    "compiled-tp2": {**TP2, "train__compile": True, "train__activation_gib": 8e-5, **DROPPED, **REGISTERED},
    "compiled-tp2-whole-tokens": {**TP2, "train__compile": True, "parallel__sequence": False, **LEARNED},
}


def run_of(data: Path, runs: Path, name: str, **changes: object) -> RunConfig:
    """A toy run by the name of its changes."""
    found = {
        **TOPOLOGIES,
        **VARIANTS,
        **COMPILED,
        **WHOLE,
        **{new: own for new, (_, own) in CONTINUED.items()},
    }[name]
    config = toy_config(data, runs, name, **{**changes, **found})
    path, teacher = (text.format(data) for text in (config.data.path, config.distill.teacher))
    distill = dataclasses.replace(config.distill, teacher=teacher)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path), distill=distill)


def _runs_on_four_ranks(dataset: str, output: str) -> None:
    data, runs = Path(dataset), Path(output)
    for name in {**TOPOLOGIES, **VARIANTS}:
        train(run_of(data, runs, name, **FULL))
    for name, changes in SUMMED.items():
        train(toy_config(data, runs, name, **changes))
    for name in WHOLE:
        train(run_of(data, runs, name, **TWO_OF_FOUR))
    for name, (whole, _) in CONTINUED.items():
        # Only the checkpoint in the middle is there for the second run.
        middle = runs / f"{name}-middle"
        if torch.distributed.get_rank() == 0:
            step = "step-00000002"
            shutil.copytree(runs / whole / "checkpoints" / step, middle / step)
        torch.distributed.barrier()
        train(run_of(data, runs, name, **TWO_OF_FOUR), resume_from=middle)
    if torch.distributed.get_rank() == 0:
        (runs / "modules").write_text("\n".join(sys.modules))
    compile_block = torch.nn.Module.compile
    # The partitioner of inductor, without its code for a device; fullgraph refuses to cut a block.
    torch.nn.Module.compile = functools.partialmethod(
        compile_block, backend="aot_eager_decomp_partition", fullgraph=True
    )
    for name in COMPILED:
        train(run_of(data, runs, name, **FULL))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_dataset(tmp_path_factory.mktemp("shards"))
    toy_dataset(folder / "second", samples=30, shards=3, seed=1, labels=4)
    toy_vision("Dinov2", folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def four_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    launch(_runs_on_four_ranks, 4, str(dataset), str(output))
    return output


@pytest.mark.parametrize("name", [*TOPOLOGIES, *VARIANTS, *COMPILED])
def test_every_topology_equals_one_dense_process(name: str, dataset: Path, four_ranks: Path) -> None:
    config = run_of(dataset, four_ranks, name, **FULL)
    expected_losses, expected = dense_run(alone(config), config.train.steps)
    assert losses(config) == pytest.approx(expected_losses, rel=1e-5)
    reader = checkpoint(config, config.train.steps)
    assert expected.keys() <= set(reader.names())
    for key, value in expected.items():
        assert (reader.read(key) - value).abs().max() < 1e-4, key


def test_a_run_on_two_datasets_counts_the_samples_of_each(dataset: Path, four_ranks: Path) -> None:
    lines = (four_ranks / "two-datasets" / "metrics.jsonl").read_text().splitlines()
    counts = [
        (record[f"samples/{dataset.name}"], record["samples/second"]) for record in map(json.loads, lines)
    ]
    assert [sum(pair) for pair in counts] == [16] * 3
    assert [first for first, _ in counts] == [10, 11, 11], "two thirds of 16, 32 and 48"
    reader = checkpoint(run_of(dataset, four_ranks, "two-datasets"), 3)
    assert reader.shape("head.object.weight")[0] == 2 * OBJECT_CLASSES
    assert reader.shape("head.text.weight")[0] == TEXT_CLASSES, "of the same tokenizer"


def test_sampled_negatives_are_the_same_for_any_number_of_ranks(dataset: Path, four_ranks: Path) -> None:
    runs = {name: losses(toy_config(dataset, four_ranks, name)) for name in WHOLE if "sampled" in name}
    assert runs["sampled-tp2"] == pytest.approx(runs["sampled-tp1"], rel=1e-5)
    assert runs["sampled-tp4"] == pytest.approx(runs["sampled-tp1"], rel=1e-5)
    full, _ = dense_run(toy_config(dataset, four_ranks, "dense"), 1)
    assert runs["sampled-tp1"][0] < full[0] - 1e-3, "no class was left out: the draw had no effect"


@pytest.mark.parametrize("name", [name for name, own in WHOLE.items() if "train__precision" in own])
def test_bf16_stays_close_to_fp32(name: str, dataset: Path, four_ranks: Path) -> None:
    exact = "sampled-muon-tp2" if "muon" in name else "sampled-tp1"
    expected = losses(toy_config(dataset, four_ranks, exact))
    assert losses(toy_config(dataset, four_ranks, name)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_bf16_add_up_in_fp32_unless_told_otherwise(
    stage: int, dataset: Path, four_ranks: Path
) -> None:
    def fits_bf16(kind: str) -> float:
        """Share of a step's gradients that bf16 can hold."""
        name = f"summed-{kind}-zero{stage}"
        config = toy_config(dataset, four_ranks, name, **SUMMED[name])
        moment = checkpoint(config, 1).read("body.exp_avg.vit.blocks.0.mlp.fc1.weight")
        gradient = moment[moment != 0] / (1 - config.optimizer.beta1)
        return float(((gradient.bfloat16() - gradient).abs() < 1e-5 * gradient.abs()).double().mean())

    assert fits_bf16("fp32") < 0.1
    assert fits_bf16("bf16") > 0.95


@pytest.mark.parametrize("name", [n for n in CONTINUED if n.startswith("same")])
def test_resume_on_the_same_topology_is_bit_identical(name: str, dataset: Path, four_ranks: Path) -> None:
    whole, continued = (toy_config(dataset, four_ranks, run) for run in (CONTINUED[name][0], name))
    assert losses(continued) == losses(whole)[2:]
    assert set(differences(checkpoint(whole, 4), checkpoint(continued, 4)).values()) == {0.0}


@pytest.mark.parametrize("name", [n for n in CONTINUED if "-to-tp" in n])
def test_resume_on_another_topology_agrees(name: str, dataset: Path, four_ranks: Path) -> None:
    whole, continued = (toy_config(dataset, four_ranks, run) for run in (CONTINUED[name][0], name))
    assert losses(continued) == pytest.approx(losses(whole)[2:], rel=1e-5)
    for kind in ("body.weight", "body.ema"):
        assert max(differences(checkpoint(whole, 4), checkpoint(continued, 4), kind).values()) < 1e-4


def test_an_average_begins_with_the_weights_that_a_run_goes_on_from(dataset: Path, four_ranks: Path) -> None:
    config = toy_config(dataset, four_ranks, "begins-to-average")
    ends, begins = (checkpoint(toy_config(dataset, four_ranks, "bf16-zero1"), step) for step in (4, 2))
    for name in (n for n in begins.names() if n.startswith("body.weight.")):
        average = checkpoint(config, 4).read(name.replace("weight", "ema", 1))
        moved = (ends.read(name) - begins.read(name)).abs().max()
        assert 0 < (average - ends.read(name)).abs().max() < moved, name


def test_exports_evaluations_and_init_take_the_average(
    dataset: Path, four_ranks: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from megaregion.checkpoint.pretrained import open_pretrained
    from megaregion.evaluation.network import open_run
    from megaregion.export.huggingface import export_checkpoint
    from megaregion.models import VisionTransformer

    config = toy_config(dataset, four_ranks, "muon-tp2-zero0", train__steps=2)
    run, reader = Path(config.output) / config.name, checkpoint(config, config.train.steps)
    average = reader.read("body.ema.vit.class_embedding")
    assert not torch.equal(average, reader.read("body.weight.vit.class_embedding"))
    export_checkpoint(run, tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["vision_model.embeddings.class_embedding"], average)
    assert torch.equal(open_run(run).trained().model.vit.class_embedding, average)
    began = VisionTransformer(config.model)
    open_pretrained(run).fill(began)
    assert torch.equal(began.class_embedding, average)
    # A teacher's linear is the run's own.
    assert reader.shape("body.ema.to_teacher.weight") == (32, 32)
    assert not [name for name in exported if "teacher" in name]


def test_no_rank_waits_for_torchs_compiler_to_be_imported(four_ranks: Path) -> None:
    modules = (four_ranks / "modules").read_text().splitlines()
    assert {"deepspeed", "megatron.core"} <= set(modules)
    assert "torch._inductor.compile_fx" not in modules


def test_a_checkpoint_holds_whole_tensors_whatever_wrote_it(dataset: Path, four_ranks: Path) -> None:
    one = checkpoint(toy_config(dataset, four_ranks, "tp1-zero1"), 2)
    for name in ("tp2-zero3", "tp4-zero1"):
        other = checkpoint(toy_config(dataset, four_ranks, name), 2)
        assert {n: one.shape(n) for n in one.names()} == {n: other.shape(n) for n in other.names()}
