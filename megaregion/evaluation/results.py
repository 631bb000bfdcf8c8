"""What a study says in numbers: evaluation.json, and the table that a terminal shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaregion.evaluation.knn import NEIGHBOURS
from megaregion.evaluation.measure import majority_share
from megaregion.evaluation.published import markdown, table_json
from megaregion.evaluation.study import Study
from megaregion.files import write_text

DIGITS = 5
"""Decimals of a share in the JSON: finer than one region in ten thousand."""


def to_json(study: Study) -> dict[str, Any]:
    """All numbers of a study; shares lie in 0..1, null where an encoder cannot say."""
    return {
        "run": study.run.config.name,
        "step": study.run.step,
        "split": study.config.split,
        "neighbours": NEIGHBOURS,
        "rows": [_rounded(asdict(judgement.row)) for judgement in study.judgements],
        "region_prior": round(majority_share(study.gallery.objects, study.queries.objects), DIGITS),
        "test_regions": len(study.queries.objects),
        "test_words": len(study.queries.words),
        "gallery_regions": len(study.gallery.objects),
        "gallery_words": len(study.gallery.words),
        "gallery_scenes": len(study.gallery.scenes),
        "classes": len(set(study.gallery.objects.names)),
        "seconds": {name: round(value, 2) for name, value in study.seconds.items()},
        "seeds": study.config.seeds,
        "measures": [table_json(each) for each in study.tables],
    }


def write_json(study: Study, path: Path) -> None:
    """Write the numbers, so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(to_json(study), indent=1) + "\n")


def write_markdown(study: Study, path: Path) -> None:
    """Write the measures as a page of tables."""
    title = f"{study.run.config.name} after step {study.run.step:,}, {study.config.split} split"
    write_text(path, markdown(title, study.tables))


def table(study: Study) -> str:
    """The numbers as an aligned table: test beside train, the priors as the last line."""
    numbers = to_json(study)
    split = study.config.split
    header = [
        ["", "region 5-NN", "", "OCR recall@5", "", "the same, 5-NN", ""],
        ["encoder", split, "train", split, "train", split, "train"],
    ]
    body = [
        [
            row["encoder"],
            *(
                _percent(row[key])
                for key in (
                    "region_knn",
                    "region_knn_train",
                    "ocr_recall_at_5",
                    "ocr_train_recall_at_5",
                    "ocr_knn_recall_at_5",
                    "ocr_knn_train_recall_at_5",
                )
            ),
        ]
        for row in numbers["rows"]
    ]
    prior = [
        "most frequent",
        _percent(numbers["region_prior"]),
        "",
        _percent(numbers["rows"][0]["ocr_prior"]),
        "",
        "",
        "",
    ]
    return "\n".join([*_aligned(header, body, prior), "", _footnote(study)])


def _aligned(header: list[list[str]], body: list[list[str]], last: list[str]) -> list[str]:
    # A header over two columns may be as wide as both, so only the second header line counts.
    widths = [max(len(row[column]) for row in [header[1], *body, last]) for column in range(len(last))]
    widths = [widths[0], *(max(width, 7) for width in widths[1:])]
    groups = [f"{header[0][i]:>{widths[i] + widths[i + 1] + 2}}" for i in range(1, len(widths), 2)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [
        " " * widths[0] + "  " + "  ".join(groups),
        *(_line(row, widths) for row in header[1:]),
        rule,
        *(_line(row, widths) for row in body),
        rule,
        _line(last, widths),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = zip(cells[1:], widths[1:], strict=True)
    return f"{cells[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in pairs)


def _footnote(study: Study) -> str:
    queries, gallery = study.queries, study.gallery
    pixels = study.judgement("pixels").row.variant
    return (
        f"{len(queries.objects)} objects and {len(queries.words)} words of {len(queries.scenes)} "
        f"{study.config.split} scenes against {len(gallery.objects)} objects and "
        f"{len(gallery.words)} words of {len(gallery.scenes)} training scenes.\n"
        "train: the gallery against itself without the own scene; the same cut-outs stand in other scenes.\n"
        f"pixels: the better of raw and centred (here {pixels})."
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["region_knn_interval"]
    rounded = {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in row.items()}
    return rounded | {"region_knn_interval": [round(low, DIGITS), round(high, DIGITS)]}
