"""The OCR engines, through ONNX Runtime: rapidocr, and paddleocr, which the paper used.

rapidocr's models come inside its package. paddleocr would ask a model hub; here nothing does: PADDLE/det and
PADDLE/rec each hold `inference.onnx` and `inference.yml`, whose Global.model_name says which model it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from megaregion.curation.picture import Pixels, Word
from megaregion.errors import UserError

CUDA = "CUDAExecutionProvider"


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
        threads = "EngineConfig.onnxruntime"
        self._engine: Any = RapidOCR(
            params={
                # Confidence is judged later, so that another limit costs no new reading.
                "Global.text_score": 0.0,
                # Text upside down is rare, and asking costs a network pass per line.
                "Global.use_cls": False,
                "Global.log_level": "critical",
                "Det.limit_side_len": side,
                "Det.limit_type": "max",
                f"{threads}.intra_op_num_threads": 1,
                f"{threads}.inter_op_num_threads": 1,
                f"{threads}.use_cuda": offers_gpu(),
            }
        )
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, see :class:`megaregion.curation.engines.Reader`."""
        result = self._engine(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if result.boxes is None or result.txts is None:
            return []
        return to_words(result.boxes, result.txts, result.scores, image)


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
    polygons: Iterable[Any], texts: Iterable[str], scores: Iterable[float], image: Pixels
) -> list[Word]:
    """An engine's lines in one form, from the corners of each in pixels, [4, 2], its text and confidence.

    Blank lines are left out; boxes are clipped to the image, and dropped where nothing is left.
    """
    height, width = image.shape[:2]
    words = []
    for polygon, text, score in zip(polygons, texts, scores, strict=True):
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        x0, y0 = np.clip(corners.min(axis=0), 0, (width, height)).tolist()
        x1, y1 = np.clip(corners.max(axis=0), 0, (width, height)).tolist()
        if text.strip() and x1 > x0 and y1 > y0 and np.isfinite(score):
            words.append(Word(text.strip(), (x0, y0, x1, y1), float(score)))
    return words


def _model_name(folder: Path) -> str:
    model, settings = folder / "inference.onnx", folder / "inference.yml"
    for path in (model, settings):
        if not path.is_file():
            raise UserError(f"{path} does not exist; --paddle needs det and rec, each with an exported model")
    try:
        return str(yaml.safe_load(settings.read_text(encoding="utf-8"))["Global"]["model_name"])
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{settings} has no Global.model_name; export the model again") from None
