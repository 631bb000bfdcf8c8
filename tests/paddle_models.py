"""Model folders for paddleocr, made of what rapidocr brings: PP-OCRv6's small models as ONNX.

python tests/paddle_models.py FOLDER        writes FOLDER/det and FOLDER/rec
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnxruntime
import rapidocr
import yaml


def save_paddle_models(folder: Path) -> Path:
    """Write det and rec, each with inference.onnx and the inference.yml that paddleocr's export writes."""
    models = Path(rapidocr.__file__).parent / "models"
    settings = {
        "det": {
            "Global": {"model_name": "PP-OCRv6_small_det"},
            "PreProcess": {
                "transform_ops": [
                    {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                    {"DetResizeForTest": {"resize_long": 960}},
                    {
                        "NormalizeImage": {
                            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                            "scale": "1./255.", "order": "hwc",
                        }
                    },
                    {"ToCHWImage": None},
                    {"KeepKeys": {"keep_keys": ["image", "shape", "polys", "ignore_tags"]}},
                ]
            },
            "PostProcess": {
                "name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "max_candidates": 1000,
                "unclip_ratio": 1.5,
            },
        },
        "rec": {
            "Global": {"model_name": "PP-OCRv6_small_rec"},
            "PreProcess": {
                "transform_ops": [
                    {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                    {"RecResizeImg": {"image_shape": [3, 48, 320]}},
                    {"KeepKeys": {"keep_keys": ["image", "label_ctc", "label_gtc", "length", "valid_ratio"]}},
                ]
            },
            "PostProcess": {"name": "CTCLabelDecode", "character_dict": []},
        },
    }  # fmt: skip
    for part, content in settings.items():
        [model] = models.glob(f"PP-OCRv6_{part}_small.onnx")
        if part == "rec":
            metadata = onnxruntime.InferenceSession(str(model)).get_modelmeta().custom_metadata_map
            content["PostProcess"]["character_dict"] = metadata["character"].splitlines()
        (folder / part).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model, folder / part / "inference.onnx")
        text = yaml.safe_dump(content, allow_unicode=True)
        (folder / part / "inference.yml").write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    save_paddle_models(Path(sys.argv[1]))
