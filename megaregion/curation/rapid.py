"""rapidocr, the light OCR engine: its models come inside its package and run on ONNX Runtime."""

from __future__ import annotations

import logging
from typing import Any

import cv2

from megaregion.curation.picture import Pixels
from megaregion.curation.reader import Word, to_words
from megaregion.errors import UserError


class RapidReader:
    """Reads with PP-OCR's small models on one CPU core.

    Args:
        side: Longest side, in pixels, at which text is looked for; recognition sees the full image.

    Raises:
        UserError: rapidocr is not installed.
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
            }
        )
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, see :class:`megaregion.curation.reader.Reader`."""
        result = self._engine(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if result.boxes is None or result.txts is None:
            return []
        return to_words(result.boxes, result.txts, result.scores, image)
