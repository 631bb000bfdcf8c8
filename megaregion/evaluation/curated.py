"""Where the training data came from: curation's own summary as a picture, if it lies beside the shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"
"""Written by tools/curate.py into the folder that holds the shards' folder."""

DROPPED = "dropped: "
"""How curation's counts of refused proposals begin."""


def curation_card(dataset: Path) -> str:
    """Show what curation found, kept and dropped.

    Args:
        dataset: Folder of the shards.

    Returns:
        A card; "" when there is no summary, as for shards that came from elsewhere.
    """
    summary = _read(dataset)
    counts: Mapping[str, int] = summary.get("counts") or {}
    proposals = {"kept": counts.get("kept", 0)}
    proposals |= {k.removeprefix(DROPPED): n for k, n in counts.items() if k.startswith(DROPPED)}
    words = {
        "kept": counts.get("text regions", 0),
        "below confidence": counts.get("words below confidence", 0),
        "without a token": counts.get("words without token", 0),
    }
    bars = _bar("Object proposals", proposals) + _bar("Words found", words)
    if not bars:
        return ""
    return f'<div class="card"><h3>Curation</h3>{bars}<p class="note">{_clusters(summary)}</p></div>'


def _read(dataset: Path) -> Mapping[str, Any]:
    for folder in (dataset, dataset.resolve().parent):
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict):
            return summary
    return {}


def _bar(title: str, parts: Mapping[str, int]) -> str:
    """One bar of parts: the kept part in colour and first, the dropped ones behind it, largest first."""
    total = sum(parts.values())
    if not total:
        return ""
    dropped = sorted((item for item in parts.items() if item[0] != "kept" and item[1]), key=lambda i: -i[1])
    shown = [("kept", parts["kept"]), *dropped]
    pieces = "".join(
        f'<i class="{"kept" if name == "kept" else "dropped"}" style="width:{number / total:.2%}" '
        f'title="{escape(name)}: {number:,}"></i>'
        for name, number in shown
    )
    told = " · ".join(f"<b>{number:,}</b> {escape(name)}" for name, number in shown)
    return (
        f'<div class="funnel"><div class="label"><b>{title}</b> {total:,}</div>'
        f'<div class="stack">{pieces}</div><div class="note">{told}</div></div>'
    )


def _clusters(summary: Mapping[str, Any]) -> str:
    sizes = summary.get("clusters")
    if not sizes:
        return ""
    return (
        f"{sizes['clusters']:,} clusters: {sizes['smallest']:,} regions in the smallest, "
        f"{sizes['median']:g} in the median, {sizes['largest']:,} in the largest; {sizes['empty']:,} empty."
    )
