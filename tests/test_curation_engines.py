"""Engines in batches: nothing depends on what shares a batch, on who decodes, or on which model it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from curation_scenes import (
    contents,
    propose,
    run,
    save_tiny_clip,
    save_tiny_sam,
    scene,
    settings_from,
    workers_of,
)
from numpy.typing import NDArray

from megaregion.curation import workers as crew
from megaregion.curation.engines import load_embedder, ocr
from megaregion.curation.engines import pretrained as room
from megaregion.curation.engines.pretrained import PretrainedEmbedder, load_encoder
from megaregion.curation.engines.sam import SamProposer, encode_masks, load_sam
from megaregion.curation.picture import Pixels, crop
from megaregion.curation.pipeline import curate, open_job
from megaregion.curation.stages.regions import Embed
from megaregion.curation.stages.stage import Job, Output
from megaregion.curation.stages.text import Ocr
from megaregion.data.sample import decode_mask, encode_mask
from megaregion.errors import UserError

SIZE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = {**SIZE, "image_size": 32, "patch_size": 8}
FEW = {"clusters": 4, "vocab": 384, "piece_images": 4, "crop_side": 96}


def crops() -> list[Pixels]:
    return [crop(np.asarray(scene(n)), (10.0, 60.0, 40.0 + 3 * n, 140.0)) for n in range(20)]


def save(folder: Path, model: Any, **processor: Any) -> Path:
    model.save_pretrained(folder)
    told = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def encoder(kind: str) -> Any:
    import transformers as hub

    words = {**SIZE, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tiles = {**SIZE, "num_patches": 16, "patch_size": 8}
    torch.manual_seed(0)
    makers: dict[str, Callable[[], Any]] = {
        "clip": lambda: hub.CLIPModel(hub.CLIPConfig(vision_config=SEEN, text_config=words)),
        "siglip": lambda: hub.SiglipModel(hub.SiglipConfig(vision_config=SEEN, text_config=words)),
        "siglip2": lambda: hub.Siglip2Model(hub.Siglip2Config(vision_config=tiles, text_config=words)),
        "dinov2": lambda: hub.Dinov2Model(hub.Dinov2Config(**SEEN)),
        "dinov3": lambda: hub.DINOv3ViTModel(hub.DINOv3ViTConfig(**SEEN)),
        "mlcd": lambda: hub.MLCDVisionModel(hub.MLCDVisionConfig(**SEEN)),
    }
    return makers[kind]()


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "dinov3", "mlcd"])
def test_an_embedding_of_any_encoder_is_the_same_to_the_byte_whatever_shares_its_batch(
    kind: str, tmp_path: Path
) -> None:
    embedder = load_embedder("hf", save(tmp_path, encoder(kind)))
    together = embedder.embed(crops())
    assert together.shape == (20, embedder.dim)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert len(np.unique(together.round(4), axis=0)) == 20
    alone = np.concatenate([embedder.embed([one]) for one in crops()])
    backwards = embedder.embed(crops()[::-1])[::-1]
    assert np.array_equal(together, alone)
    assert np.array_equal(together, backwards)


def test_images_without_crops_keep_their_place_in_a_stream(tmp_path: Path) -> None:
    embedder = load_encoder(save_tiny_clip(tmp_path), clip=True)
    own = crops()
    parts = [[], own[:3], [], [], own[3:20], []]
    found = list(embedder.stream(enumerate(parts)))
    assert [number for number, _ in found] == list(range(6))
    assert [len(vectors) for _, vectors in found] == [0, 3, 0, 0, 17, 0]
    assert np.array_equal(np.concatenate([vectors for _, vectors in found]), embedder.embed(own))


def test_the_code_of_a_folder_is_never_run_and_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    import transformers as hub

    folder = save(tmp_path / "own", encoder("mlcd"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_megaregion.RegionVisionModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_megaregion.py").write_text("raise SystemExit('this code was run')")
    assert load_embedder("hf", folder).dim == 24
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing or has no image_mean"):
        load_embedder("hf", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no vision encoder that can be loaded"):
        load_embedder("hf", tmp_path / "empty")
    words = {**SIZE, "vocab_size": 50}
    text = save(tmp_path / "text", hub.BertModel(hub.BertConfig(**words)))
    with pytest.raises(UserError, match="BertModel, which is no vision encoder"):
        load_embedder("hf", text)
    with pytest.raises(UserError, match="--embedder hf needs --encoder FOLDER"):
        settings_from({"embedder": "hf"})


def test_bf16_embeddings_are_those_of_fp32_within_its_precision(tmp_path: Path) -> None:
    model, where = encoder("clip").vision_model.eval(), torch.device("cpu")
    exact = PretrainedEmbedder(model, where, room.CLIP_STATISTICS, 32).embed(crops())
    rounded = PretrainedEmbedder(model.bfloat16(), where, room.CLIP_STATISTICS, 32).embed(crops())
    assert ((exact * rounded).sum(axis=1) > 0.999).all()


def test_a_batch_takes_half_of_the_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, asked = torch.device("cuda"), list[int]()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + asked[-1] * 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 8000))
    assert room.fitting_rows(asked.append, gpu, 512) == 128
    assert room.fitting_rows(asked.append, gpu, 64) == 64
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 8000))
    assert room.fitting_rows(asked.append, gpu, 64) == 1


# SAM


def save_tiny_sam2(folder: Path) -> Path:
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
        "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "global_attention_blocks": [3],
        "window_size_per_stage": [4, 2, 2, 2], "window_positional_embedding_background_size": [4, 4],
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    masks = {
        "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "iou_head_depth": 2, "iou_head_hidden_dim": 16,
    }  # fmt: skip
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    model = Sam2Model(config)
    with torch.no_grad():
        for weights in model.mask_decoder.parameters():
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=0.7)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [save_tiny_sam, save_tiny_sam2, partial(save_tiny_sam, hq=True)])
def test_masks_of_any_sam_are_the_same_to_the_byte_whatever_shares_their_batch(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    proposer = load_sam(make(tmp_path), grid=3, min_iou=-np.inf, min_stability=0.0)
    images = [np.asarray(scene(n, 100))[: 40 + 20 * n] for n in range(3)]
    alone = [propose(proposer, image) for image in images]
    assert all(alone)
    proposer.batches.rows = 2
    views = [(0, proposer.view(images[0])), (1, None), *((n, proposer.view(images[n - 1])) for n in (2, 3))]
    together = dict(proposer.stream(views))
    assert together == {0: alone[0], 1: [], 2: alone[1], 3: alone[2]}
    for image, found in zip(images, alone, strict=True):
        assert {region.mask.size for region in found if region.mask} == {image.shape[:2]}


@pytest.mark.parametrize("make", [save_tiny_sam, save_tiny_sam2, partial(save_tiny_sam, hq=True)])
def test_bf16_masks_are_those_of_fp32_but_for_their_edges(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskGeneration

    image = np.asarray(scene(1, 100))
    exact, rounded = (
        SamProposer(
            AutoModelForMaskGeneration.from_pretrained(make(tmp_path), dtype=kind).eval(),
            torch.device("cpu"), 3, min_iou=-np.inf, min_stability=0.0,
        ).masks(torch.from_numpy(image.copy()).resize_(64, 64, 3)[None], torch.full((1, 2), 64.0))[1][0]
        for kind in (torch.float32, torch.bfloat16)
    )  # fmt: skip
    assert rounded.dtype == torch.bfloat16
    assert ((exact > 0) == (rounded > 0)).float().mean() > 0.9


def test_runs_that_a_device_finds_are_those_of_the_mask() -> None:
    rng = np.random.Generator(np.random.Philox(key=5))
    masks: NDArray[np.bool_] = rng.random((9, 13, 7)) < 0.4
    masks[0], masks[1] = False, True
    masks[2] = False
    masks[2, 3:5, 2:6] = True
    found = encode_masks(torch.from_numpy(masks))
    assert found[0] is None
    assert found[2] is not None
    assert found[2][0] == (2.0, 3.0, 6.0, 5.0)
    for mask, own in zip(masks[1:], found[1:], strict=True):
        assert own is not None
        assert own[1] == encode_mask(mask)
        assert np.array_equal(decode_mask(own[1]), mask)


# Who decodes, and where networks run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Images, CLIP's weights, and a run up to embed in this process."""
    images, clip, out = (tmp_path_factory.mktemp(name) for name in ("images", "clip", "out"))
    for number in range(1, 8):
        scene(number).save(images / f"scene-{number}.jpg", quality=92)
    (images / "scene-8.jpg").write_bytes(b"no image")
    save_tiny_clip(clip)
    for stage in ("propose", "ocr", "embed"):
        run(images, out, stage, **FEW, ocr="none", embedder="clip", clip=str(clip))
    return images, clip, out


def embedded(out: Path) -> dict[str, bytes]:
    return {
        name: content
        for name, content in contents(out / "stages" / "embed").items()
        if name.endswith((".npy", ".jsonl"))
    }


def test_where_nobody_reads_no_image_is_decoded_for_words(
    place: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _, out = place
    job = open_job(images, out, settings_from({**FEW, "ocr": "none"}))
    monkeypatch.setattr(Job, "read", None)
    ticks = list[int]()
    output = Output(tmp_path / "00001", lambda: ticks.append(1))
    output.folder.mkdir()
    Ocr(job).work(1, output)
    assert len(ticks) == 4
    assert output.files[0].read_bytes() == (out / "stages" / "ocr" / "00001" / "words.jsonl").read_bytes()


def test_decoders_ahead_of_a_network_change_no_byte_and_count_bad_images(
    place: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    images, clip, out = place
    settings = settings_from({**FEW, "ocr": "none", "embedder": "clip", "clip": str(clip)})
    job = replace(open_job(images, out, settings), decoders=2)
    stage = Embed(job)
    for number in (0, 1):
        ticks = list[int]()
        output = Output(tmp_path / f"{number:05d}", lambda: ticks.append(1))  # noqa: B023 - called at once
        output.folder.mkdir()
        stage.work(number, output)
        assert len(ticks) == stage.count(number) == 4
        assert output.bad == ({"scene-8.jpg": "not an image"} if number else {})
        for path in output.files:
            assert (
                path.read_bytes() == (out / "stages" / "embed" / output.folder.name / path.name).read_bytes()
            )
    (images / "scene-2.jpg").rename(tmp_path / "moved.jpg")
    try:
        with pytest.raises(UserError, match=r"scene-2\.jpg"):
            stage.work(0, output)
    finally:
        (tmp_path / "moved.jpg").rename(images / "scene-2.jpg")


def test_each_gpu_gets_one_worker_and_workers_of_other_stages_end(
    place: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _, out = place
    monkeypatch.setattr(crew, "gpus", lambda: ["3", "7"])
    workers = crew.Workers(open_job(images, out, settings_from(FEW)), 3)
    assert len(workers._crew([], 2)) == 2
    others = [process for process, _ in workers._processes.values()]
    try:
        assert len(workers._crew(["3", "7"], 9)) == 2
        assert not any(process.is_alive() for process in others)
        seen = [Path(f"/proc/{process.pid}/environ") for process, _ in workers._processes.values()]
        assert [
            f"{crew.VISIBLE}={gpu}".encode() in path.read_bytes()
            for path, gpu in zip(seen, "37", strict=True)
        ]
        assert len(workers._crew(["3", "7"], 1)) == 2
    finally:
        workers.close()


@pytest.mark.drill
def test_a_worker_whose_decoder_dies_is_replaced_on_its_gpu(
    place: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, clip, whole = place
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.rmtree(out / "stages" / "embed")
    monkeypatch.setattr(crew, "gpus", lambda: ["0"])
    started, start = list[tuple[int, str]](), crew.Workers._start

    def watched(self: crew.Workers, gpu: str = "") -> Any:
        pipe = start(self, gpu)
        started.append((self._processes[pipe][0].pid or 0, gpu))
        return pipe

    @contextmanager
    def deadly(stage: str, images: int) -> Iterator[Callable[[], None]]:
        killed = list[int]()

        def tick() -> None:
            if not killed:
                killed.append(workers_of(started[0][0])[0])
                os.kill(killed[0], signal.SIGKILL)

        yield tick

    monkeypatch.setattr(crew.Workers, "_start", watched)
    settings = settings_from({**FEW, "ocr": "none", "embedder": "clip", "clip": str(clip)})
    curate(images, out, settings, deadly, "embed", workers=1)
    assert [gpu for _, gpu in started] == ["0", "0"]
    assert embedded(out) == embedded(whole)


def test_ocr_runs_on_a_gpu_where_onnx_runtime_and_torch_both_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    offered = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not ocr.offers_gpu()
    offered.insert(0, "CUDAExecutionProvider")
    assert ocr.offers_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not ocr.offers_gpu()
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ocr, "offers_gpu", lambda: True)
    monkeypatch.setitem(
        sys.modules, "rapidocr", SimpleNamespace(RapidOCR=lambda params: asked.update(params))
    )
    ocr.RapidReader(384)
    assert asked["EngineConfig.onnxruntime.use_cuda"] is True
