"""A small folder as tools/curate.py leaves it: shards, and the stages that the atlas reads."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megaregion.atlas.source import Sample
from megaregion.atlas.synthetic import SyntheticSource
from megaregion.curation.stages.text import read_corpus, train_tokenizer
from megaregion.data.info import load_tokenizer, token_set
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.writer import ShardWriter, write_dataset

CLUSTERS, SAMPLES, PIECE = 70, 40, 16
WORDS = ("Hotel", "EXIT", "<img src=nothing>", "café")
DAMAGED = 9
"""Sample whose image cannot be decoded."""


class DeadlySource(SyntheticSource):
    """Ends the process that reads its samples."""

    def read(self, number: int) -> Sample:
        os._exit(9)


def curated_folder(folder: Path) -> Path:
    """Write OUT/shards and OUT/stages with random labels; the last clusters stay empty."""
    rng = np.random.default_rng(4)
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    model.write_bytes(train_tokenizer(set(WORDS), read_corpus(""), 400))
    tokenizer = load_tokenizer(model)
    centers = rng.standard_normal((CLUSTERS, 24)).astype(np.float32)
    np.save(folder / "centers.npy", centers / np.linalg.norm(centers, axis=1, keepdims=True))
    entries, lines, cosines = [], [], []
    for shard in range(2):
        with ShardWriter(folder / "shards", f"shard-{shard:05d}") as writer:
            for number in range(shard * SAMPLES // 2, (shard + 1) * SAMPLES // 2):
                size = (200, 150) if number % 2 else (120, 180)
                image = Image.new("RGB", size, tuple(rng.integers(90, 255, 3).tolist()))
                regions = _draw(image, rng)
                word = WORDS[number % len(WORDS)]
                text = RegionRecord("text", (4, 4, 70, 20), tokens=token_set(tokenizer, word), text=word)
                jpeg = _encode(image)
                jpeg = jpeg[: len(jpeg) // 3] if number == DAMAGED else jpeg
                writer.add(f"sample{number:04d}", jpeg, SampleRecord(*size, (*regions, text)))
                boxes = [{"box": list(region.box), "score": region.score} for region in regions]
                lines.append(
                    {"key": f"sample{number:04d}", "width": size[0], "height": size[1], "regions": boxes}
                )
                cosines.append(rng.random(len(regions)).astype(np.float32))
        entries.append(writer.entry)
    # Images without a region are in the stages, but in no shard.
    lines.insert(5, {"key": "nobody", "width": 64, "height": 64, "regions": []})
    cosines.insert(5, np.zeros(0, dtype=np.float32))
    for piece in range(-(-len(lines) // PIECE)):
        part = slice(piece * PIECE, (piece + 1) * PIECE)
        embed, assign = (folder / "stages" / stage / f"{piece:05d}" for stage in ("embed", "assign"))
        embed.mkdir(parents=True)
        assign.mkdir(parents=True)
        (embed / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[part]))
        np.save(assign / "cosines.npy", np.concatenate(cosines[part]))
    write_dataset(folder / "shards", entries, CLUSTERS, 400, folder / "centers.npy", model)
    return folder


def _draw(image: Image.Image, rng: np.random.Generator) -> list[RegionRecord]:
    draw, regions = ImageDraw.Draw(image), []
    for _ in range(int(rng.integers(3, 9))):
        x, y = (int(rng.integers(0, side - 40)) for side in image.size)
        box = (float(x), float(y), float(x + rng.integers(20, 40)), float(y + rng.integers(20, 40)))
        label = int((CLUSTERS - 4) * rng.random() ** 3)
        draw.ellipse(box, fill=(label * 3 % 256, label * 37 % 256, label * 91 % 256))
        regions.append(RegionRecord("object", box, label=label, score=0.7))
    return regions


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
