"""Tiny scenes with truth, their shards, and a run that was trained on them: all in the real formats."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFont

from megaregion.checkpoint.format import Piece, publish, write_pieces
from megaregion.config import EvaluateConfig, HeadsConfig, ModelConfig, RunConfig, TrainConfig
from megaregion.data.info import load_tokenizer, token_set
from megaregion.data.sample import RegionRecord, SampleRecord, encode_mask
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.models import RegionEncoder, initialise

SIZE = 96
CLASSES = {"disc": (200, 40, 40), "block": (40, 160, 60), "wedge": (50, 70, 210)}
WORDS = ("EXIT", "OPEN", "STOP", "CAFE", "TAXI", "BUS", "HOTEL", "BANK")

MODEL = ModelConfig(image_size=48, patch_size=8, width=32, depth=2, heads=4, mlp_width=64, region_layers=1)
RUN = RunConfig(
    name="toy",
    model=MODEL,
    head=HeadsConfig(embedding_dim=16),
    train=TrainConfig(steps=40, global_batch=8, micro_batch=8, precision="fp32"),
)


def write_scenes(folder: Path, train: int = 12, held_out: int = 4) -> Path:
    """Scenes of three plain classes and a word each, for train, val and test."""
    for number, (split, count) in enumerate((("train", train), ("val", held_out), ("test", held_out))):
        (folder / split / "images").mkdir(parents=True)
        rng = np.random.default_rng(number)
        lines = []
        for index in range(count):
            image, line = _scene(rng, f"{split}{index:03d}")
            image.save(folder / split / "images" / f"{line['key']}.jpg", quality=90)
            lines.append(json.dumps(line))
        (folder / split / "truth.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_shards(folder: Path, scenes: Path, text: bool = True) -> Path:
    """The training scenes as curation would pack them, with a real tokenizer."""
    folder.mkdir(parents=True)
    model = folder / "tokenizer.model"
    if text:
        model.write_bytes(_train_tokenizer())
        processor = load_tokenizer(model)
    names = list(CLASSES)
    with ShardWriter(folder, "shard-00000") as writer:
        for line in map(json.loads, (scenes / "train" / "truth.jsonl").read_text().splitlines()):
            regions = [
                RegionRecord("object", tuple(item["box"]), label=names.index(item["class"]))
                for item in line["objects"]
            ]
            regions += [
                RegionRecord("text", tuple(i["box"]), tokens=token_set(processor, i["text"]), text=i["text"])
                for i in (line["words"] if text else ())
            ]
            jpeg = (scenes / "train" / "images" / f"{line['key']}.jpg").read_bytes()
            writer.add(line["key"], jpeg, SampleRecord(line["width"], line["height"], tuple(regions)))
    classes = processor.get_piece_size() if text else 0
    write_dataset(folder, [writer.entry], len(names), classes, tokenizer=model if text else None)
    return folder


def write_run(
    folder: Path, dataset: Path, text_classes: int, step: int = 40, evaluate: EvaluateConfig | None = None
) -> RunConfig:
    """A run folder with metrics and one checkpoint, its weights moved a little off their start."""
    data = dataclasses.replace(RUN.data, path=str(dataset))
    config = dataclasses.replace(RUN, data=data, evaluate=evaluate or RUN.evaluate)
    model = RegionEncoder(config.model, config.head.embedding_dim)
    initialise(model, config.seed)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"body.weight.{name}": value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    if text_classes:
        shape = (text_classes, config.head.embedding_dim)
        tensors["head.text.weight"] = torch.randn(shape, generator=generator)
    tensors["head.object.weight"] = torch.randn(
        (len(CLASSES), config.head.embedding_dim), generator=generator
    )
    unfinished = folder / "unfinished"
    unfinished.mkdir(parents=True)
    write_pieces(
        unfinished,
        0,
        [Piece(name, tuple(value.shape), (0,) * value.dim(), value) for name, value in tensors.items()],
    )
    (folder / "checkpoints").mkdir()
    facts = {"step": step, "position": step * 8, "config": dataclasses.asdict(config), "dataset": {}}
    publish(unfinished, folder / "checkpoints" / f"step-{step:08d}", facts)
    lines = [
        {"step": s, "loss": 9 / s, "loss_object": 5 / s, "loss_text": 4 / s if s % 3 else None}
        | {"lr": 1e-3 * s, "images_per_second": 100.0 + s, "grad_norm": 1.0, "time": 1e9 + s}
        for s in range(1, step + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def _scene(rng: np.random.Generator, key: str) -> tuple[Image.Image, dict[str, object]]:
    noise = rng.integers(90, 170, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    objects = []
    for x0, y0 in ((4, 4), (52, 6)):
        name = list(CLASSES)[rng.integers(len(CLASSES))]
        box = (x0, y0, x0 + int(rng.integers(28, 40)), y0 + int(rng.integers(28, 40)))
        _draw(draw, name, box)
        shape = Image.new("RGB", image.size)
        _draw(ImageDraw.Draw(shape), name, box)
        mask = encode_mask(np.asarray(shape).any(axis=-1))
        rle = {"size": list(mask.size), "counts": list(mask.counts)}
        objects.append({"class": name, "instance": f"{name}-1", "box": box, "mask": rle, "visible": 1.0})
    word = WORDS[rng.integers(len(WORDS))]
    font = ImageFont.load_default(22)
    draw.text((10, 62), word, fill=(250, 250, 240), font=font)
    box = [round(edge) for edge in draw.textbbox((10, 62), word, font=font)]
    words = [{"text": word, "box": box, "height": 20.0, "angle": 0.0}]
    return image, {"key": key, "width": SIZE, "height": SIZE, "objects": objects, "words": words}


def _draw(draw: ImageDraw.ImageDraw, name: str, box: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = box
    if name == "disc":
        draw.ellipse(box, fill=CLASSES[name])
    elif name == "block":
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=CLASSES[name])
    else:
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=CLASSES[name])


def _train_tokenizer() -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{a} {b}" for a in WORDS for b in WORDS] * 4),
        model_writer=stream,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return stream.getvalue()
