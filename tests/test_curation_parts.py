"""The parts of curation: proposals and their filters, embeddings, clusters, text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from curation_scenes import propose, save_tiny_clip, save_tiny_sam, scene
from launch import repository
from paddle_models import save_paddle_models
from PIL import Image, ImageDraw, ImageFont

from megaregion.curation.engines import Reader, load_embedder, load_reader
from megaregion.curation.engines.boxes import Objectness, SelectiveSearch, objectness
from megaregion.curation.kmeans import find_centers, nearest
from megaregion.curation.picture import Proposal, crop, iou
from megaregion.curation.report import script_of
from megaregion.curation.settings import EmbedSettings, OcrSettings, ProposeSettings
from megaregion.curation.stages.regions import choose, nms, rank
from megaregion.curation.stages.text import default_corpus, distinct_texts, train_tokenizer
from megaregion.data.info import load_tokenizer, token_set
from megaregion.data.sample import decode_mask
from megaregion.errors import UserError


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


# Proposals


def test_each_proposal_that_goes_is_counted_under_its_reason() -> None:
    pixels = np.asarray(scene(0))
    boxes = {
        "too small": (0, 0, 10, 10), "too large": (0, 0, 190, 180), "too elongated": (0, 0, 150, 30),
        "kept": (20, 70, 80, 130), "duplicate": (21, 71, 80, 130),
    }  # fmt: skip
    proposals = [Proposal(box, 1.0) for box in boxes.values()]
    ranked, dropped = rank(proposals, pixels.shape[:2], Objectness().maps(pixels), ProposeSettings())
    assert len(ranked) == 1
    assert dropped == {"too small": 1, "too large": 1, "too elongated": 1, "duplicate": 1}


def test_text_background_and_the_surplus_are_not_chosen() -> None:
    good = [Proposal((x, 0.0, x + 40.0, 40.0), 0.9) for x in (0.0, 50.0, 100.0)]
    word = Proposal((0.0, 100.0, 60.0, 120.0), 0.99)
    letter = Proposal((5.0, 102.0, 25.0, 118.0), 0.99)
    sky = Proposal((100.0, 100.0, 160.0, 160.0), 0.01)
    chosen, dropped = choose([word, letter, *good, sky], [(0, 98, 62, 121)], EmbedSettings(max_regions=2))
    assert chosen == good[:2]
    assert dropped == {"text": 2, "beyond the limit": 1, "background": 1}


def test_parts_come_after_other_whole_objects() -> None:
    boxes = np.array([[0, 0, 100, 100], [10, 10, 60, 90], [200, 0, 300, 100], [2, 2, 100, 100]], float)
    order = nms(boxes, np.array([5.0, 4.5, 4.0, 4.9]), limit=0.7, crowding=2.0)
    assert order.tolist() == [0, 2, 1]
    assert nms(boxes[:0], np.zeros(0), 0.5).tolist() == []


def test_a_box_around_an_object_is_more_object_like_than_background() -> None:
    judge = Objectness()
    wins = 0
    for number in range(6):
        pixels = np.asarray(scene(number))
        boxes = np.array([[15, 72, 75, 135], [70, 0, 130, 62.0]])
        scores = objectness(judge.maps(pixels), pixels.shape[:2], boxes)
        wins += bool(scores[0] > scores[1])
    assert wins >= 5


def test_selective_search_proposes_boxes_inside_the_image() -> None:
    pixels = np.asarray(scene(3, 200))[:150]
    boxes = np.array([proposal.box for proposal in SelectiveSearch((160, 96)).view(pixels)])
    assert len(boxes) > 5
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [200, 150]).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)


def test_sam_gives_boxes_that_frame_their_masks(sam: Path) -> None:
    from megaregion.curation.engines.sam import load_sam

    pixels = np.asarray(scene(2, 100))[:70]
    found = propose(load_sam(sam, grid=3, min_iou=-np.inf, min_stability=0.0), pixels)
    assert 0 < len(found) <= 27
    for proposal in found:
        assert proposal.mask is not None
        mask = decode_mask(proposal.mask)
        assert mask.shape == (70, 100)
        x0, y0, x1, y1 = map(int, proposal.box)
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
        assert all(edge.any() for edge in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]))
    assert propose(load_sam(sam, grid=2, min_iou=2.0), pixels) == []


def test_prompts_in_batches_of_any_size_give_the_same_masks(
    sam: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaregion.curation.engines import sam as room

    pixels = np.asarray(scene(4, 96))
    proposer = room.load_sam(sam, grid=4, min_iou=-np.inf, min_stability=0.5)
    found = propose(proposer, pixels)
    assert found
    for points in (1, 5):
        monkeypatch.setattr(room, "POINTS", points)
        again = propose(proposer, pixels)
        assert [region.box for region in again] == [region.box for region in found]
        assert [region.mask for region in again] == [region.mask for region in found]
        assert np.allclose([r.score for r in again], [r.score for r in found], atol=1e-5)


# Embeddings and clusters


@pytest.mark.parametrize("name", ["lite0", "clip"])
def test_an_embedding_has_unit_length_and_ignores_the_other_crops(name: str, clip: Path) -> None:
    embedder = load_embedder(name, clip if name == "clip" else None)
    crops = [crop(np.asarray(scene(n)), (10.0, 60.0, 80.0, 140.0)) for n in range(20)]
    together = embedder.embed(crops)
    assert together.shape == (20, embedder.dim)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(embedder.embed(crops[17:18]), together[17:18], atol=1e-5)
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_lite0_knows_equal_shapes_from_others() -> None:
    shapes = [crop(np.asarray(scene(n)), (10.0, 65.0, 85.0, 145.0)) for n in (1, 1, 2)]
    shapes[1] = np.ascontiguousarray(shapes[1][:, ::-1])
    same, other = (load_embedder("lite0").embed(shapes) @ load_embedder("lite0").embed(shapes[:1]).T)[1:, 0]
    assert same > other


def test_missing_weights_are_a_clear_mistake(tmp_path: Path, sam: Path) -> None:
    with pytest.raises(UserError, match="holds no CLIPVisionModel"):
        load_embedder("clip", tmp_path)
    with pytest.raises(UserError, match=r"lacks .* weights of CLIPVisionModel|holds no CLIPVisionModel"):
        load_embedder("clip", sam)
    with pytest.raises(UserError, match="must be lite0, hf or clip"):
        load_embedder("dino")


def test_k_means_finds_the_same_unit_centers_for_the_same_seed() -> None:
    rng = np.random.Generator(np.random.Philox(key=3))
    groups = rng.normal(size=(5, 32))
    vectors = np.repeat(groups, 40, axis=0) + rng.normal(0, 0.1, (200, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    centers, _ = find_centers(vectors, 5, iterations=20, seed=1)
    assert np.array_equal(centers, find_centers(vectors, 5, iterations=20, seed=1)[0])
    assert np.allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    labels, cosines, _ = nearest(torch.from_numpy(vectors), torch.from_numpy(centers))
    assert np.array_equal(labels, (vectors @ centers.T).argmax(axis=1))
    assert np.allclose(cosines, (vectors @ centers.T).max(axis=1), atol=1e-5)


# Text


def test_a_slanted_word_gets_the_upright_box_around_it() -> None:
    image = Image.new("RGB", (240, 160), (40, 60, 90))
    word = Image.new("RGBA", (150, 50))
    ImageDraw.Draw(word).text((5, 5), "Coffee", font=ImageFont.load_default(36), fill=(255, 255, 255, 255))
    slanted = word.rotate(14, expand=True)
    image.paste(slanted, (40, 40), slanted)
    (found,) = load_reader(OcrSettings()).read(np.asarray(image))
    assert found.text == "Coffee"
    assert found.score > 0.7
    inked = np.array([slanted.getchannel("A").getbbox()], float) + 40
    assert iou(np.array([found.box]), inked)[0, 0] > 0.5
    assert load_reader(OcrSettings()).read(np.zeros((80, 80, 3), np.uint8)) == []


def lettering(text: str, angle: float, stacked: bool = False) -> np.ndarray:
    """A word in DejaVu, turned against the clock, or its letters below each other."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 36)
    layer = Image.new("RGBA", (200, 300) if stacked else (int(font.getlength(text)) + 12, 50))
    draw = ImageDraw.Draw(layer)
    if stacked:
        for place, letter in enumerate(text):
            draw.text((100, 20 + 36 * place), letter, font=font, fill="white", anchor="mt")
    else:
        draw.text((6, 2), text, font=font, fill="white")
    turned = layer.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    image = Image.new("RGB", (320, 320), (40, 60, 90))
    image.paste(turned, ((320 - turned.width) // 2, (320 - turned.height) // 2), turned)
    return np.asarray(image)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader(OcrSettings())


@pytest.mark.parametrize("angle", [0, 20, 70, 90, 110, 160, 180, 200, 250, 270, 290, 340])
def test_a_word_is_read_right_however_it_is_turned(angle: int, reader: Reader) -> None:
    for text in ("Coffee", "EXIT", "Hotel 24"):
        (word,) = reader.read(lettering(text, angle))
        assert word.text == text
        assert word.score > 0.9
        if angle % 90 == 0:
            assert word.direction == ("", "upwards", "upside down", "downwards")[angle // 90]


def test_letters_in_a_column_and_one_tall_letter_are_read_as_they_stand(reader: Reader) -> None:
    (word,) = reader.read(lettering("HOTEL", 0, stacked=True))
    assert word.text == "HOTEL"
    assert word.direction in ("stacked", "downwards")
    single = Image.fromarray(lettering("I", 0)).crop((120, 120, 200, 200)).resize((320, 320))
    assert {word.text for word in reader.read(np.asarray(single))} <= {"I", "l"}, "it is no dash"


STROKES = {
    "中": [(1, 3, 9, 3), (1, 7, 9, 7), (1, 3, 1, 7), (9, 3, 9, 7), (5, 0, 5, 10)],
    "山": [(5, 0, 5, 9), (1, 4, 1, 9), (9, 4, 9, 9), (1, 9, 9, 9)],
    "王": [(1, 1, 9, 1), (1.5, 5, 8.5, 5), (0.5, 9, 9.5, 9), (5, 1, 5, 9)],
}
"""Chinese characters as lines on a grid of ten, so that no font is needed: x0, y0, x1, y1."""


def strokes(text: str, angle: float, stacked: bool = False) -> np.ndarray:
    """A Chinese word from stroke to stroke, in a row or a column, turned against the clock."""
    page = Image.new("RGB", (480, 480), "white")
    draw = ImageDraw.Draw(page)
    for place, letter in enumerate(text):
        begin = 240 - 76 * len(text) / 2 + 76 * place
        x, y = (208, begin) if stacked else (begin, 208)
        for x0, y0, x1, y1 in STROKES[letter]:
            ends = (x + 6.4 * x0, y + 6.4 * y0, x + 6.4 * x1, y + 6.4 * y1)
            draw.line(ends, fill="black", width=6)
    return np.asarray(page.rotate(angle, fillcolor="white", resample=Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("angle", "stacked", "direction"),
    [
        (0, False, ""), (10, False, ""), (-15, False, ""), (90, False, "upwards"),
        (180, False, "upside down"), (170, False, "upside down"), (270, False, "downwards"),
        (0, True, "downwards"), (8, True, "downwards"), (-8, True, "downwards"),
    ],
)  # fmt: skip
def test_a_chinese_word_is_read_right_in_a_row_and_a_column_however_it_is_turned(
    angle: int, stacked: bool, direction: str, reader: Reader
) -> None:
    (word,) = reader.read(strokes("中山王", angle, stacked))
    assert word.text == "中山王"
    assert word.score > 0.9
    assert word.direction in ({"stacked", direction} if stacked else {direction})
    assert script_of(word.text) == "cjk"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Exit", "latin"), ("\uff25\uff38\uff29\uff34", "latin"), ("出口", "cjk"), ("人々", "cjk"),
        ("トイレ", "katakana"), ("ありがとう", "hiragana"), ("출구", "hangul"), ("выход", "cyrillic"),
        ("مخرج", "arabic"), ("24-7", "digits and signs"), ("东京Tokyo市长", "latin"),
    ],
)  # fmt: skip
def test_a_text_counts_for_the_script_of_most_of_its_letters(text: str, script: str) -> None:
    assert script_of(text) == script


def test_paddleocr_reads_through_the_same_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = OcrSettings(ocr="paddleocr", paddle=str(tmp_path))
    with pytest.raises(UserError, match=r"inference\.onnx does not exist"):
        load_reader(settings)
    for part in ("det", "rec"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "inference.onnx").write_bytes(b"")
        (tmp_path / part / "inference.yml").write_text(f"Global:\n  model_name: tiny_{part}\n")
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(UserError, match="pip install paddleocr"):
        load_reader(settings)
    polygon = np.array([[10, 5], [60, 20], [55, 40], [5, 25]])
    page = {"rec_polys": [polygon, polygon], "rec_texts": ["SALE", " "], "rec_scores": [0.98, 0.9]}
    asked: dict[str, Any] = {}

    def engine(**options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(predict=lambda image: [page])

    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=engine))
    (word,) = load_reader(settings).read(np.zeros((50, 50, 3), np.uint8))
    assert (word.text, word.box, word.score) == ("SALE", (5.0, 5.0, 50.0, 40.0), 0.98)
    assert asked["text_detection_model_name"] == "tiny_det"
    assert asked["text_recognition_model_dir"] == str(tmp_path / "rec")
    assert asked["engine"] == "onnxruntime"


@pytest.mark.drill
def test_the_real_paddleocr_reads_from_local_folders(tmp_path: Path) -> None:
    python = os.environ.get("MEGAREGION_PADDLE_PYTHON")
    if python is None:
        pytest.skip("MEGAREGION_PADDLE_PYTHON names no Python with paddleocr, which needs another OpenCV")
    save_paddle_models(tmp_path)
    for number in (0, 1, 2):
        scene(number).save(tmp_path / f"{number}.png")
    script = (
        "import sys, numpy; from pathlib import Path; from PIL import Image\n"
        "from megaregion.curation.engines.ocr import PaddleReader\n"
        "reader = PaddleReader(Path(sys.argv[1]))\n"
        "for path in sys.argv[2:]:\n"
        "    print('READ', [word.text for word in reader.read(numpy.asarray(Image.open(path)))])"
    )
    images = [str(tmp_path / f"{number}.png") for number in (0, 1, 2)]
    done = subprocess.run(
        [python, "-c", script, str(tmp_path), *images],
        cwd=repository(), capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(repository())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    read = [line for line in done.stdout.splitlines() if line.startswith("READ")]
    assert read == ["READ ['EXIT']", "READ []", "READ ['Hotel']"]


def test_the_tokenizer_is_exact_in_size_and_a_function_of_its_text(tmp_path: Path) -> None:
    corpus = default_corpus()
    model = train_tokenizer(["EXIT", "鬱", "Straße", "$5"] * 3, corpus, 512)
    assert model == train_tokenizer(["$5", "Straße", "EXIT", "鬱"], corpus, 512)
    (tmp_path / "tokenizer.model").write_bytes(model)
    processor = load_tokenizer(tmp_path / "tokenizer.model")
    assert processor.get_piece_size() == 512
    pieces = [processor.id_to_piece(token) for token in token_set(processor, "$5")]
    assert pieces == ["$", "5"]
    # A syllable is one class wherever it stands, and a rare character falls into bytes.
    assert set(token_set(processor, "a station")) >= set(token_set(processor, "station"))
    assert len(token_set(processor, "鬱")) == 3
    assert token_set(processor, "  ") == ()


def test_distinct_texts_beyond_the_limit_are_an_even_sample_in_any_order() -> None:
    texts = [f"word {number}" for number in range(5000)]
    few, count = distinct_texts(texts * 2, 10_000)
    assert few == sorted(texts)
    assert count == 5000
    forward, count = distinct_texts(texts, 500)
    assert len(forward) == 500
    assert forward == distinct_texts(reversed(texts * 3), 500)[0]
    assert 4300 < count < 5700
    assert sum(int(text.split()[1]) < 2500 for text in forward) == pytest.approx(250, abs=45)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(UserError, match=r"--vocab 5000 does not fit 2 distinct words .*larger --corpus"):
        train_tokenizer(["hello world"], [], 5000)
