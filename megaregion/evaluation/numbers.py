"""The page's numbers: headline tiles, the table of encoders, and the accuracy of each class."""

from __future__ import annotations

from collections import Counter
from html import escape

from megaregion.evaluation import charts
from megaregion.evaluation.measure import Row, majority_share
from megaregion.evaluation.study import Study

MOST_CLASSES = 40
"""Classes that the chart has room for; the most frequent ones are shown."""


def tiles(study: Study) -> str:
    """The four numbers to read first."""
    trained = study.judgement("trained").row
    objects = study.queries.objects
    low, high = trained.region_knn_interval
    shown = [
        _tile(
            "region 5-NN on unseen objects",
            _percent(trained.region_knn),
            f"{100 * low:.0f} to {high:.0%} over other cut-outs; {len(objects):,} objects, "
            f"{len(set(objects.names))} classes",
        )
    ]
    for name, told in (("untrained", "the untrained network"), ("pixels", "raw pixels")):
        row = study.judgement(name).row
        under = (
            f"which reach {row.region_knn:.1%}" if name == "pixels" else f"which reaches {row.region_knn:.1%}"
        )
        shown.append(_tile(f"against {told}", _points(trained.region_knn - row.region_knn), under))
    if trained.ocr_recall_at_5 is not None and trained.ocr_prior is not None:
        shown.append(
            _tile(
                "OCR recall@5 on unseen words",
                _percent(trained.ocr_recall_at_5),
                f"{_points(trained.ocr_recall_at_5 - trained.ocr_prior, 'span')} against the prior of "
                f"{trained.ocr_prior:.1%}",
            )
        )
    return "".join(shown)


def result_table(study: Study) -> str:
    """Every encoder's row, train beside test, and the priors."""
    split = escape(study.config.split)
    head = (
        '<thead><tr><th></th><th class="group" colspan="2">Region 5-NN</th><th class="group" colspan="2">OCR '
        'recall@5, text head</th><th class="group" colspan="2">OCR recall@5, 5-NN</th></tr>'
        f"<tr><th>encoder</th>{f'<th>{split}</th><th>train</th>' * 3}</tr></thead>"
    )
    rows = "".join(_table_row(study, judgement.row) for judgement in study.judgements)
    prior = (
        '<tr class="prior"><td><div class="who">prior</div><div class="what">always the most frequent</div>'
        "</td>"
        f"{_share(majority_share(study.gallery.objects, study.queries.objects))}{_share(None, True)}"
        f"{(_share(study.judgements[0].row.ocr_prior) + _share(None, True)) * 2}</tr>"
    )
    return f'<table class="results">{head}<tbody>{rows}{prior}</tbody></table>'


def class_chart(study: Study) -> str:
    """Accuracy of each class by every encoder, best class of the trained encoder first."""
    true = study.queries.objects.names
    counts = Counter(true)
    shares: dict[str, dict[str, float]] = {name: {} for name, _ in counts.most_common(MOST_CLASSES)}
    for judgement in study.judgements:
        right = Counter(t for t, p in zip(true, judgement.predicted, strict=True) if t == p)
        for name, by_encoder in shares.items():
            by_encoder[judgement.row.encoder] = right[name] / counts[name]
    order = sorted(shares, key=lambda name: (-shares[name]["trained"], name))
    rows = [(f"{name} ({counts[name]})", shares[name]) for name in order]
    names = [escape(judgement.row.encoder) for judgement in study.judgements]
    legend = "".join(f'<span class="{name}">{name}</span>' for name in names)
    return f'<div class="legend">{legend}</div>{charts.dot_chart(rows, "Region 5-NN accuracy of each class")}'


def _table_row(study: Study, row: Row) -> str:
    told = {
        "trained": f"after step {study.run.step:,}",
        "untrained": "the same network before step 1",
        "pixels": f"crops at 32 x 32, {row.variant}",
        "curation": "pretrained; it made the object labels",
    }.get(row.encoder, "")
    cells = (
        _share(row.region_knn),
        _share(row.region_knn_train, True),
        _share(row.ocr_recall_at_5),
        _share(row.ocr_train_recall_at_5, True),
        _share(row.ocr_knn_recall_at_5),
        _share(row.ocr_knn_train_recall_at_5, True),
    )
    name = escape(row.encoder)
    return (
        f'<tr class="{name}"><td><div class="who">{name}</div><div class="what">{escape(told)}</div></td>'
        f"{''.join(cells)}</tr>"
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
