"""Contact sheets of the page: regions with their neighbours, words with what was read, whole scenes.

What is shown is drawn at random by the study's seed, one object of each class where there is room;
nothing is picked by whether it looks good.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from megaregion.evaluation.pictures import Crops, scene_figure
from megaregion.evaluation.scenes import RegionTable
from megaregion.evaluation.study import Study

QUERIES = 12
WORDS = 12
SCENES = 4


def neighbour_sheet(study: Study, encoders: Sequence[str]) -> str:
    """Query objects, and beside each its nearest training objects by each of these encoders."""
    asked, known = Crops(study.queries.scenes), Crops(study.gallery.scenes)
    head = "".join(
        f'<div class="sheet-head">nearest by <b class="ink {escape(name)}">{escape(name)}</b></div>'
        for name in encoders
    )
    rows = [f'<div class="sheet-head">query</div>{head}']
    for query in _draw_objects(study.queries.objects, study.config.seed):
        true = study.queries.objects.names[query]
        rows.append(f'<div class="query">{_query_crop(study, asked, query)}</div>')
        for name in encoders:
            answers = study.answers[name]
            tiles = [
                _neighbour(known, study.gallery.objects, int(row), float(cosine), true)
                for row, cosine in zip(
                    answers.neighbours.index[query], answers.neighbours.similarity[query], strict=True
                )
                if row >= 0
            ]
            rows.append(f'<div class="neighbours">{"".join(tiles)}</div>')
    return f'<div class="sheet" style="--encoders:{len(encoders)}">{"".join(rows)}</div>'


def word_sheet(study: Study) -> str:
    """Held-out words, their gold tokens, and the five tokens that the text head named."""
    read = study.answers["trained"].read
    if study.vocabulary is None or read is None:
        return ""
    crops, words = Crops(study.queries.scenes), study.queries.words
    cards = []
    for word in _draw(len(words), WORDS, study.config.seed):
        gold = study.queries.tokens[word]
        cards.append(
            '<figure class="word-card">'
            f'<img src="{crops.uri(int(words.scene[word]), words.boxes[word])}" alt="a word of a scene">'
            f"<figcaption><b>{escape(words.names[word])}</b>"
            f'<div class="chips"><span>is</span>{_chips(study, gold, read[word], "gold")}</div>'
            f'<div class="chips"><span>read</span>{_chips(study, read[word], gold, "read")}</div>'
            "</figcaption></figure>"
        )
    return f'<div class="words">{"".join(cards)}</div>'


def scene_sheet(study: Study) -> str:
    """Whole held-out scenes with their true regions."""
    chosen = _draw(len(study.queries.scenes), SCENES, study.config.seed)
    return "".join(
        f'<figure class="scene-card">{scene_figure(study.queries.scenes[scene])}</figure>' for scene in chosen
    )


def _query_crop(study: Study, crops: Crops, query: int) -> str:
    objects = study.queries.objects
    name = escape(objects.names[query])
    uri = crops.uri(int(objects.scene[query]), objects.boxes[query])
    return f'<figure class="crop"><img src="{uri}" alt="{name}"><figcaption>{name}</figcaption></figure>'


def _neighbour(crops: Crops, objects: RegionTable, row: int, cosine: float, true: str) -> str:
    name = objects.names[row]
    verdict, mark = ("right", "✓") if name == true else ("wrong", "✗")
    return (
        f'<figure class="crop {verdict}" title="cosine {cosine:.2f}">'
        f'<img src="{crops.uri(int(objects.scene[row]), objects.boxes[row])}" alt="{escape(name)}">'
        f"<figcaption><i>{mark}</i> {escape(name)}</figcaption></figure>"
    )


def _chips(study: Study, tokens: Sequence[int], others: Sequence[int], kind: str) -> str:
    assert study.vocabulary is not None
    pieces = study.vocabulary.pieces(tuple(tokens))
    return "".join(
        f'<code class="chip {kind}{" hit" if token in others else ""}">{escape(piece)}</code>'
        for token, piece in zip(tokens, pieces, strict=True)
    )


def _draw_objects(objects: RegionTable, seed: int) -> list[int]:
    """One random object of each class, then further random ones, QUERIES at most."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(objects)).tolist()
    first = {objects.names[row]: row for row in reversed(order)}
    rest = [row for row in order if first[objects.names[row]] != row]
    chosen = [row for row in order if first[objects.names[row]] == row] + rest
    return sorted(chosen[:QUERIES], key=lambda row: objects.names[row])


def _draw(total: int, wanted: int, seed: int) -> list[int]:
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(total)[:wanted]
    return sorted(int(row) for row in chosen)
