"""A tiny dataset and a tiny run: real shards, real images, the same code path as 64 GPUs."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, usable_folders
from megaregion.command_line import Parser, run_settings
from megaregion.config import (
    CheckpointConfig,
    DataConfig,
    HeadConfig,
    HeadsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.writer import ShardWriter, write_dataset

OBJECT_CLASSES, TEXT_CLASSES = 37, 23


def toy_dataset(
    folder: Path, samples: int = 40, shards: int = 4, size: int = 48, seed: int = 0, labels: int = 1
) -> Path:
    """Write a dataset of noise images with objects, of up to so many labels, and text; returns its folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    centers = folder / "centers-source.npy"
    np.save(centers, rng.standard_normal((OBJECT_CLASSES, 12)).astype(np.float32))
    entries = []
    for shard in range(shards):
        with ShardWriter(folder, f"shard-{shard:05d}") as writer:
            for index in range(shard, samples, shards):
                writer.add(f"sample{index:04d}", _jpeg(rng, size), _record(rng, size, labels))
        entries.append(writer.entry)
    tokenizer = folder / "tokenizer-source.model"
    tokenizer.write_bytes(b"not a real tokenizer: training only hashes it")
    write_dataset(folder, entries, OBJECT_CLASSES, TEXT_CLASSES, centers, tokenizer)
    return folder


def settings_of(arguments: list[str]) -> RunConfig:
    """The settings of a training run's command line."""
    parser = Parser()
    parser.add_settings_files()
    parser.add_settings(RunConfig())
    return run_settings(parser.parse_args(arguments))


def toy_config(dataset: Path, output: Path, name: str = "toy", **changes: object) -> RunConfig:
    """A run of a few steps in fp32; changes are dotted with __, as train__steps=3."""
    config = RunConfig(
        name=name,
        output=str(output),
        seed=3,
        model=ModelConfig(
            image_size=32, patch_size=8, width=32, depth=3, heads=4, mlp_width=64, region_layers=2
        ),
        data=DataConfig(
            path=str(dataset), regions_per_image=3, workers=0, window_shards=2, max_text_tokens=4
        ),
        head=HeadsConfig(
            embedding_dim=16,
            draw_images=2,
            object=HeadConfig(sample_rate=0.5, min_negatives=4, scale=16.0),
            text=HeadConfig(sample_rate=1.0, scale=16.0),
        ),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=1, clip_norm=0.5, eps=1e-6),
        parallel=ParallelConfig(tensor=1, zero_stage=1),
        train=TrainConfig(steps=3, global_batch=16, micro_batch=2, precision="fp32"),
        checkpoint=CheckpointConfig(every=100, keep_last=9),
    )
    for key, value in changes.items():
        config = _replace(config, key.split("__"), value)
    return config


def toy_vision(kind: str, folder: Path, patch: int = 8, width: int = 32) -> Path:
    """A vision encoder of HuggingFace with random weights, and its processor; returns its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": patch}
    size |= {"num_patches": (32 // patch) ** 2} if kind == "Siglip2Vision" else {"image_size": 32}
    size |= {"mlp_ratio": 2} if kind.startswith("Dinov2") else {"intermediate_size": 64}
    # The hub's folders hold a text model, too.
    size = {"vision_config": size, "text_config": {**size, "vocab_size": 99}} if kind == "Siglip" else size
    config = getattr(transformers, f"{kind}Config")(**size)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    name = {"Dinov2": "Bit", "Siglip2Vision": "Siglip2"}.get(kind, "CLIP")
    processor = getattr(transformers, f"{name}ImageProcessor")
    processor(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder)
    return folder


def newest_whole(checkpoints: Path) -> CheckpointReader | None:
    """The newest checkpoint that may be used and whose files match their checksums."""
    for folder in usable_folders(checkpoints):
        try:
            reader = CheckpointReader(folder)
            reader.verify()
        except DamagedCheckpoint:
            continue
        return reader
    return None


def _replace(config: object, path: list[str], value: object) -> object:
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def _jpeg(rng: np.random.Generator, size: int) -> bytes:
    pixels = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(stream, "JPEG")
    return stream.getvalue()


def _record(rng: np.random.Generator, size: int, labels: int) -> SampleRecord:
    regions = []
    for index in range(int(rng.integers(1, 5))):
        x0, y0 = (float(v) for v in rng.uniform(0, size / 2, 2))
        width, height = (float(v) for v in rng.uniform(size / 4, size / 2, 2))
        box = (x0, y0, x0 + width, y0 + height)
        if index % 2:
            tokens = tuple(int(t) for t in rng.choice(TEXT_CLASSES, int(rng.integers(1, 4)), replace=False))
            regions.append(RegionRecord(kind="text", box=box, tokens=tokens, text="word", score=0.9))
        else:
            label = int(rng.integers(OBJECT_CLASSES))
            others = tuple((label + step) % OBJECT_CLASSES for step in range(1, labels - index))
            regions.append(RegionRecord(kind="object", box=box, label=label, score=0.8, others=others))
    return SampleRecord(size, size, tuple(regions))
