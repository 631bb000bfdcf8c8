"""The page's numbers: headline tiles, the table of encoders, and the accuracy of each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape

from megaregion.evaluation import charts
from megaregion.evaluation.study import Study

MOST_CLASSES = 40
"""Classes that the chart has room for; the most frequent ones are shown."""


def tiles(study: Study) -> str:
    """The four numbers to read first."""
    summary, objects = study.summary, study.queries.objects
    trained = summary.estimate("trained", "region_knn")
    assert trained is not None
    shown = [
        _tile(
            "region 5-NN on unseen objects",
            _percent(trained.mean),
            f"{100 * trained.low:.0f} to {trained.high:.0%} over other cut-outs; {len(objects):,} objects, "
            f"{len(set(objects.names))} classes",
        )
    ]
    for name, told in (("untrained", "the untrained network"), ("pixels", "raw pixels")):
        other = summary.estimate(name, "region_knn")
        assert other is not None
        under = f"which {'reach' if name == 'pixels' else 'reaches'} {other.mean:.1%}"
        shown.append(_tile(f"against {told}", _points(trained.mean - other.mean), under))
    read, prior = summary.estimate("trained", "ocr_recall_at_5"), summary.columns[2].chance
    if read is not None and prior is not None:
        shown.append(
            _tile(
                "OCR recall@5 on unseen words",
                _percent(read.mean),
                f"{_points(read.mean - prior, 'span')} against the prior of {prior:.1%}",
            )
        )
    return "".join(shown)


def result_table(study: Study) -> str:
    """Every encoder's row, train beside test, and the priors."""
    summary = study.summary
    groups = list(dict.fromkeys(column.group for column in summary.columns))
    head = "".join(f'<th class="group" colspan="2">{escape(group)}</th>' for group in groups)
    titles = "".join(f"<th>{escape(column.title)}</th>" for column in summary.columns)
    rows = []
    for name, cells in summary.rows.items():
        shares = (None if cell is None else cell.mean for cell in cells)
        rows.append(_table_row(name, name, summary.notes.get(name, ""), shares))
    rows.append(
        _table_row(
            "prior", "prior", "always the most frequent", (column.chance for column in summary.columns)
        )
    )
    return (
        f'<table class="results"><thead><tr><th></th>{head}</tr><tr><th>encoder</th>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def class_chart(study: Study) -> str:
    """Accuracy of each class by every encoder, best class of the trained encoder first."""
    true = study.queries.objects.names
    counts = Counter(true)
    shares: dict[str, dict[str, float]] = {name: {} for name, _ in counts.most_common(MOST_CLASSES)}
    for encoder, answers in study.answers.items():
        right = Counter(t for t, p in zip(true, answers.named, strict=True) if t == p)
        for name, by_encoder in shares.items():
            by_encoder[encoder] = right[name] / counts[name]
    order = sorted(shares, key=lambda name: (-shares[name]["trained"], name))
    rows = [(f"{name} ({counts[name]})", shares[name]) for name in order]
    names = [escape(name) for name in study.answers]
    legend = "".join(f'<span class="{name}">{name}</span>' for name in names)
    return f'<div class="legend">{legend}</div>{charts.dot_chart(rows, "Region 5-NN accuracy of each class")}'


def _table_row(style: str, name: str, told: str, shares: Iterable[float | None]) -> str:
    cells = "".join(_share(share, place % 2 == 1) for place, share in enumerate(shares))
    return (
        f'<tr class="{escape(style)}"><td><div class="who">{escape(name)}</div>'
        f'<div class="what">{escape(told)}</div></td>{cells}</tr>'
    )


def _tile(label: str, value: str, under: str) -> str:
    return (
        f'<div class="card tile"><div class="label">{label}</div><div class="value">{value}</div>'
        f'<div class="under">{under}</div></div>'
    )


def _share(share: float | None, train: bool = False) -> str:
    style = "share train" if train else "share"
    if share is None:
        return f'<td class="{style} none">&ndash;</td>'
    return f'<td class="{style}">{share:.1%}<div class="bar"><i style="--share:{share:.1%}"></i></div></td>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}<small> %</small>"


def _points(difference: float, tag: str = "") -> str:
    style = "good" if difference > 0 else "bad" if difference < 0 else "even"
    value = f"{'+' if difference >= 0 else '&minus;'}{abs(100 * difference):.1f}"
    unit = " points" if tag else "<small> points</small>"
    return f'<span class="{style}">{value}</span>{unit}'
