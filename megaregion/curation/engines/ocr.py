"""The OCR engines, through ONNX Runtime: rapidocr, and paddleocr, which the paper used.

rapidocr's models come inside its package. paddleocr would ask a model hub; here nothing does: PADDLE/det and
PADDLE/rec each hold `inference.onnx` and `inference.yml`, whose Global.model_name says which model it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from megaregion.curation.picture import Pixels, Word
from megaregion.errors import UserError

CUDA = "CUDAExecutionProvider"
SURE = 0.98
"""A line that is read with this confidence is not read in other directions: upside down, "Hotel 24" gives H4
with 0.95, the right way 1.00."""
TALL = 1.5
"""From this ratio of its sides on, rapidocr takes a line for one that runs downwards."""
INK = 0.3
"""Share of a column's greatest contrast from which a row of pixels belongs to a character."""
SQUARE = 1.2
"""Greatest height of a character in a column, in widths of the column."""


def offers_gpu() -> bool:
    """Whether ONNX Runtime is built for CUDA, as onnxruntime-gpu is, and a GPU is there."""
    try:
        import onnxruntime
    except ImportError:
        return False
    if CUDA not in onnxruntime.get_available_providers():
        return False
    import torch

    return torch.cuda.is_available()


class _Line(NamedTuple):
    corners: NDArray[np.float32]
    """In pixels, clockwise from the upper left one of the line as rapidocr takes it, [4, 2]."""
    text: str
    score: float
    direction: str = ""
    """See :class:`megaregion.curation.picture.Word`."""


class RapidReader:
    """Reads with PP-OCR's small models on a GPU that ONNX Runtime offers, or on one CPU core.

    Raises UserError where rapidocr is not installed.

    Text is looked for at a longest side of ``side`` pixels; recognition sees the full image.
    """

    def __init__(self, side: int) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise UserError(
                "rapidocr is not installed; pip install rapidocr==3.10.0, or use --ocr none"
            ) from None
        threads, gpu = "EngineConfig.onnxruntime", offers_gpu()
        self._engine: Any = RapidOCR(
            params={
                # Confidence is judged later, so that another limit costs no new reading.
                "Global.text_score": 0.0,
                # Its network for lines upside down is less sure than reading them both ways, as _reread does.
                "Global.use_cls": False,
                "Global.log_level": "critical",
                "Det.limit_side_len": side,
                "Det.limit_type": "max",
                f"{threads}.intra_op_num_threads": 1,
                f"{threads}.inter_op_num_threads": 1,
                f"{threads}.use_cuda": gpu,
                # Else lines are padded to 320 x 48 px and to the longest of six: a third of a core's time for
                # words, and the same text.
                **({} if gpu else {"Rec.rec_img_shape": [3, 48, 96], "Rec.rec_batch_num": 1}),
            }
        )
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, see :class:`megaregion.curation.engines.Reader`."""
        pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        result = self._engine(pixels)
        if result.boxes is None or result.txts is None:
            return []
        lines = [_Line(*line) for line in zip(result.boxes, result.txts, result.scores, strict=True)]
        self._reread(pixels, lines)
        boxes, texts, scores, directions = zip(*lines, strict=True)
        return to_words(boxes, texts, scores, image, directions)

    def _reread(self, pixels: Pixels, lines: list[_Line]) -> None:
        """Read doubtful lines in the other directions, too, and keep what is surest."""
        asked, crops = list[tuple[int, str]](), list[Pixels]()
        for place, line in enumerate(lines):
            if _tall(line.corners):
                lines[place] = line._replace(direction="downwards")
            if line.score < SURE or _lone(lines[place]):
                turned = _turned(pixels, line.corners)
                asked += [(place, direction) for direction in turned]
                crops += turned.values()
        if not crops:
            return
        found = self._engine.recognize_txt(crops)
        for (place, direction), text, score in zip(asked, found.txts, found.scores, strict=True):
            if direction == "stacked" and _lone(lines[place]):
                # One character does not run at all: as it stands, it is no dash but an I.
                lines[place] = lines[place]._replace(text=text, score=score, direction="")
            elif score > lines[place].score:
                # Characters in a row stand further apart than those of a word.
                text = text.replace(" ", "") if direction == "stacked" else text
                lines[place] = lines[place]._replace(text=text, score=score, direction=direction)


class PaddleReader:
    """Reads with PP-OCR models through paddleocr, from a folder with the model folders det and rec.

    Raises UserError where paddleocr is not installed, or a model is missing.
    """

    def __init__(self, folder: Path) -> None:
        names = {part: _model_name(folder / part) for part in ("det", "rec")}
        # It must be set before the import, or paddleocr looks for a hub.
        os.environ["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] = "True"
        try:
            from paddleocr import PaddleOCR
        except ImportError:
            raise UserError(
                "paddleocr is not installed; pip install paddleocr==3.7.0 into an environment of its own (it "
                "brings another OpenCV), or use --ocr rapidocr"
            ) from None
        self._engine: Any = PaddleOCR(
            text_detection_model_name=names["det"],
            text_detection_model_dir=str(folder / "det"),
            text_recognition_model_name=names["rec"],
            text_recognition_model_dir=str(folder / "rec"),
            engine="onnxruntime",
            device="gpu:0" if offers_gpu() else "cpu",
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            text_rec_score_thresh=0.0,
        )

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, see :class:`megaregion.curation.engines.Reader`."""
        words: list[Word] = []
        for page in self._engine.predict(cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
            words += to_words(page["rec_polys"], page["rec_texts"], page["rec_scores"], image)
        return words


def to_words(
    polygons: Sequence[Any],
    texts: Sequence[str],
    scores: Sequence[float],
    image: Pixels,
    directions: Sequence[str] = (),
) -> list[Word]:
    """An engine's lines in one form, from the corners of each in pixels, [4, 2], its text and confidence.

    Blank lines are left out; boxes are clipped to the image, and dropped where nothing is left.
    """
    height, width = image.shape[:2]
    words = []
    directions = directions or [""] * len(texts)
    for polygon, text, score, direction in zip(polygons, texts, scores, directions, strict=True):
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        x0, y0 = np.clip(corners.min(axis=0), 0, (width, height)).tolist()
        x1, y1 = np.clip(corners.max(axis=0), 0, (width, height)).tolist()
        if text.strip() and x1 > x0 and y1 > y0 and np.isfinite(score):
            words.append(Word(text.strip(), (x0, y0, x1, y1), float(score), direction))
    return words


def _sides(corners: NDArray[np.float32]) -> tuple[int, int]:
    """Width and height of a line."""
    lengths = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
    return int(max(lengths[0], lengths[2], 1)), int(max(lengths[1], lengths[3], 1))


def _tall(corners: NDArray[np.float32]) -> bool:
    width, height = _sides(corners)
    return height >= TALL * width


def _lone(line: _Line) -> bool:
    return len(line.text.strip()) == 1 and _tall(line.corners)


def _turned(pixels: Pixels, corners: NDArray[np.float32]) -> dict[str, Pixels]:
    """A line as it is seen where it runs in the directions that rapidocr does not expect."""
    width, height = _sides(corners)
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    warp = cv2.getPerspectiveTransform(corners.astype(np.float32), target)
    crop: Any = cv2.warpPerspective(
        pixels, warp, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    if not _tall(corners):
        return {"upside down": crop[::-1, ::-1]}
    return {"upwards": np.rot90(crop, -1), "stacked": _in_a_row(crop)}


def _in_a_row(column: Pixels) -> Pixels:
    """The characters of a column beside each other; one alone stays as it is."""
    width = column.shape[1]
    contrast = np.ptp(column.astype(np.int16), axis=1).max(axis=1)
    inked = np.concatenate([[False], contrast > INK * contrast.max(initial=0), [False]])
    starts, stops = np.flatnonzero(np.diff(inked.astype(np.int8))).reshape(-1, 2).T
    pieces: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        # Many characters have gaps: what fits into a square is one of them.
        if pieces and stop - pieces[-1][0] <= SQUARE * width:
            pieces[-1] = pieces[-1][0], stop
        else:
            pieces.append((start, stop))
    if len(pieces) < 2:
        return column
    side = max(stop - start for start, stop in pieces)
    edge = cv2.BORDER_REPLICATE
    return np.concatenate(
        [
            cv2.copyMakeBorder(
                column[start:stop], (side - stop + start) // 2, (side - stop + start + 1) // 2, 0, 0, edge
            )
            for start, stop in pieces
        ],
        axis=1,
    )


def _model_name(folder: Path) -> str:
    model, settings = folder / "inference.onnx", folder / "inference.yml"
    for path in (model, settings):
        if not path.is_file():
            raise UserError(f"{path} does not exist; --paddle needs det and rec, each with an exported model")
    try:
        return str(yaml.safe_load(settings.read_text(encoding="utf-8"))["Global"]["model_name"])
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{settings} has no Global.model_name; export the model again") from None
