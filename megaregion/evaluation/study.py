"""One evaluation from end to end: scenes in, every encoder measured on the same regions.

The summary, which is always made, sets two numbers side by side. Held out are regions of scenes never
trained on, whose cut-outs no gallery holds. Train are the gallery's regions against the gallery itself, each
without those of its own scene: the same cut-out stands in other training scenes and stays in. A network that
has merely memorised its cut-outs scores high there and low on the test; the gap is the memorising.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from megaregion.data.info import DatasetInfo
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.evaluation.classifiers import NEIGHBOURS, Neighbours, ballots, nearest, vote
from megaregion.evaluation.encoders import PIXELS, CropEncoder, Encoder, pixel_encoders
from megaregion.evaluation.encoding import (
    Batches,
    EncodedScenes,
    MappedScenes,
    Progress,
    SceneFeatures,
    encode_scenes,
    map_scenes,
    quiet,
)
from megaregion.evaluation.measures import share
from megaregion.evaluation.measures.correspondence import correspondence_table
from megaregion.evaluation.measures.images import image_table, read_image_folder
from megaregion.evaluation.measures.reading import (
    judged,
    prior_share,
    reading_table,
    word_recall,
)
from megaregion.evaluation.measures.recognition import majority_share, recognition_table
from megaregion.evaluation.measures.retrieval import retrieval_table
from megaregion.evaluation.measures.segmentation import segmentation_table
from megaregion.evaluation.measures.separation import separation_table
from megaregion.evaluation.network import TrainedRun
from megaregion.evaluation.scenes import (
    TOP,
    RegionTable,
    Scene,
    Tokens,
    Truth,
    Vocabulary,
    open_vocabulary,
    pick_scenes,
    read_scenes,
)
from megaregion.schemas.evaluation import MEASURES, SUMMARY, Estimate, Evaluation, Table, summary_columns

GALLERY_SPLIT = "train"

T = TypeVar("T")


# ---- the measures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Everything that a measure may look at."""

    known: EncodedScenes
    """Training scenes, by every encoder."""
    asked: EncodedScenes
    """Held-out scenes, by every encoder."""
    encoders: Sequence[Encoder]
    prior: Tokens
    """Most frequent tokens of the training shards; empty without text."""
    config: StudyConfig
    batches: Batches

    @cached_property
    def maps(self) -> tuple[MappedScenes, MappedScenes] | None:
        """Maps of training and held-out scenes, made when first asked for; None where scenes lack masks."""
        known = map_scenes(self.known.truth.scenes, self.encoders, self.batches)
        asked = map_scenes(self.asked.truth.scenes, self.encoders, self.batches) if known.scenes else known
        return (known, asked) if asked.scenes else None


def _retrieval(own: Evidence) -> Table:
    features = {name: seen.objects for name, seen in own.asked.features.items()}
    return retrieval_table(features, own.asked.truth.objects)


def _correspondence(own: Evidence) -> Table | None:
    if own.maps is None:
        return None
    asked = own.maps[1]
    return correspondence_table(own.asked.by_scene(asked.scenes), asked, own.config.seeds)


TABLES: Mapping[str, Callable[[Evidence], Table | None]] = {
    "region": lambda own: recognition_table(own.known, own.asked, own.config.seeds),
    "retrieval": _retrieval,
    "ocr": lambda own: reading_table(own.known, own.asked, own.prior, own.config.seeds),
    "correspondence": _correspondence,
    "segmentation": lambda own: own.maps and segmentation_table(*own.maps, own.config.seeds),
    "separation": lambda own: own.maps and separation_table(*own.maps),
}
"""The table of each measure; None where the scenes do not allow it."""


# ---- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyConfig:
    """What to evaluate on, and how fast."""

    scenes: Path
    """Scene set with train/ and the evaluated split."""
    dataset: Path
    """Shards that the run was trained on: their tokenizer and token counts."""
    split: str = "test"
    """Split whose regions are asked for; test is for final numbers, never for tuning."""
    limit: int = 4_000
    """Training objects in the gallery, drawn as whole scenes; 0 takes all."""
    batch: int = 32
    """Images that go through an encoder at once."""
    workers: int = 2
    """Threads that read images."""
    device: str = "cpu"
    """Where the network computes."""
    projected: bool = False
    """Compare regions by the heads' embeddings instead of the exported features."""
    seed: int = 0
    """Draws the gallery and the pictures."""
    measures: tuple[str, ...] = MEASURES
    """Measures wanted beside the summary, by name."""
    seeds: int = 5
    """Galleries, splits or pairs drawn behind every mean."""
    images: Path | None = None
    """Folder of images with one subfolder a class, for a table on whole images."""
    baselines: bool = True
    """Measure the untrained network and raw pixels too."""


@dataclass(frozen=True)
class Answers:
    """What one encoder answers about each held-out region."""

    neighbours: Neighbours
    """Of the held-out objects, rows of the gallery's objects."""
    named: list[str]
    """Class given to each held-out object by its neighbours."""
    read: list[Tokens] | None
    """The five tokens that the text head names for each held-out word; None without a text head."""


@dataclass(frozen=True)
class Study:
    """All that one evaluation found."""

    config: StudyConfig
    run: TrainedRun
    gallery: Truth
    """Training scenes whose regions are known."""
    queries: Truth
    """Held-out scenes whose regions are asked for."""
    answers: Mapping[str, Answers]
    """About each held-out region: trained, untrained, pixels, then the other encoders."""
    data: DatasetInfo
    """What the run was trained on."""
    vocabulary: Vocabulary | None
    """None for a run without text."""
    seconds: dict[str, float]
    """Time by encoder; "read" is time spent waiting for images."""
    summary: Table
    """Every encoder on held-out regions beside training regions."""
    tables: tuple[Table, ...]
    """The measures that were asked for."""

    @property
    def missing(self) -> list[str]:
        """Measures that were asked for and that the scenes do not allow: they lack masks or words."""
        made = {table.key for table in self.tables}
        return [name for name in self.config.measures if name not in made]

    def evaluation(self) -> Evaluation:
        """All numbers, as evaluation.json holds them."""
        return Evaluation(
            run=self.run.config.name,
            step=self.run.step,
            split=self.config.split,
            tables=(self.summary, *self.tables),
            test_regions=len(self.queries.objects),
            test_words=len(self.queries.words),
            gallery_regions=len(self.gallery.objects),
            gallery_words=len(self.gallery.words),
            gallery_scenes=len(self.gallery.scenes),
            classes=len(set(self.gallery.objects.names)),
            seeds=self.config.seeds,
            neighbours=NEIGHBOURS,
            seconds=self.seconds,
        )


def evaluate(
    run: TrainedRun,
    config: StudyConfig,
    others: Sequence[Encoder] = (),
    progress: Progress = quiet,
) -> Study:
    """Measure the run's network, the same network untrained, raw pixels and other encoders.

    Args:
        run: The checkpoint.
        config: What to evaluate on.
        others: Further encoders, e.g. the curation encoder.
        progress: Told of images as they are encoded.

    Raises:
        UserError: Scenes, dataset or checkpoint cannot be used; the text says which and why.
    """
    shards = ShardedDataset(config.dataset)
    vocabulary = open_vocabulary(shards, run.reader.manifest.get("dataset", {}))
    drawn = pick_scenes(_scenes(config.scenes / GALLERY_SPLIT), config.limit, config.seed)
    gallery, queries = (
        Truth(scenes, tuple(vocabulary.tokens(w.text) if vocabulary else () for s in scenes for w in s.words))
        for scenes in (drawn, _scenes(config.scenes / config.split))
    )
    folder = read_image_folder(config.images) if config.images else None
    encoders = [*_own_encoders(run, config), *others]
    batches = Batches(config.batch, config.workers, progress=progress)
    known, asked = (
        encode_scenes(truth, encoders, batches, split)
        for split, truth in ((GALLERY_SPLIT, gallery), (config.split, queries))
    )
    answers = {name: _answer(known.features[name], own, gallery) for name, own in asked.features.items()}
    form = _better_pixels(answers, queries)
    answers = _kept(answers, form)
    known, asked = (replace(part, features=_kept(part.features, form)) for part in (known, asked))
    encoders = [
        replace(own, name=name) if isinstance(own, CropEncoder) else own
        for name, own in _kept({each.name: each for each in encoders}, form).items()
    ]
    prior = vocabulary.prior if vocabulary else ()
    notes = {
        "trained": f"after step {run.step:,}",
        "untrained": "the same network before step 1",
        PIXELS: f"crops at 32 x 32, {form.removeprefix(f'{PIXELS}/')}",
        "curation": "pretrained; it made the object labels",
    }
    evidence = Evidence(known, asked, encoders, prior, config, batches)
    measured = [make(evidence) for name, make in TABLES.items() if name in config.measures]
    if folder is not None:
        seen = [encoder for encoder in encoders if not encoder.name.endswith("/crops")]
        measured.append(image_table(folder, seen, config.seeds, batches))
    return Study(
        config, run, gallery, queries, answers, shards.info, vocabulary, batches.seconds,
        summary=_summary(evidence, answers, notes),
        tables=tuple(table for table in measured if table is not None),
    )  # fmt: skip


def _scenes(folder: Path) -> list[Scene]:
    if not folder.is_dir():
        splits = sorted(path.parent.name for path in folder.parent.glob("*/truth.jsonl"))
        found = f"has only {', '.join(splits)}" if splits else "holds no scenes"
        raise UserError(f"{folder} does not exist, {folder.parent} {found}; see tools/make_scenes.py --help")
    # A scene without a region gives no query and no gallery entry.
    scenes = [scene for scene in read_scenes(folder) if scene.objects or scene.words]
    if not any(scene.objects for scene in scenes):
        raise UserError(
            f"{folder}/truth.jsonl names no object; make the scenes again with tools/make_scenes.py"
        )
    return scenes


def _own_encoders(run: TrainedRun, config: StudyConfig) -> list[Encoder]:
    trained = run.trained(config.device, config.projected)
    if not config.baselines:
        return [trained]
    untrained = run.untrained(config.device, config.projected)
    return [trained, untrained, *pixel_encoders(run.config.model.grid)]


def _answer(known: SceneFeatures, asked: SceneFeatures, gallery: Truth) -> Answers:
    neighbours = nearest(asked.objects, known.objects)
    read = None if asked.read is None else [tokens[:TOP] for tokens in asked.read]
    return Answers(neighbours, vote(neighbours, gallery.objects.names), read)


def _better_pixels(answers: Mapping[str, Answers], queries: Truth) -> str:
    """Name of the form of the pixel baseline that names objects better; none without a baseline."""
    true = np.asarray(queries.objects.names)
    forms = [name for name in answers if name.startswith(f"{PIXELS}/")]
    return max(forms, key=lambda name: np.mean(np.asarray(answers[name].named) == true), default="")


def _kept(by_encoder: Mapping[str, T], form: str) -> dict[str, T]:
    """The same with this form of the pixel baseline in the place of all of them."""
    return {
        PIXELS if name == form else name: own
        for name, own in by_encoder.items()
        if name == form or not name.startswith(f"{PIXELS}/")
    }


# ---- the summary -----------------------------------------------------------------------------------


def _summary(evidence: Evidence, answers: Mapping[str, Answers], notes: Mapping[str, str]) -> Table:
    """Every encoder on held-out regions beside training regions, with all of the gallery."""
    known, asked, split = evidence.known, evidence.asked, evidence.config.split
    gallery, queries = known.truth, asked.truth
    columns = summary_columns(
        split,
        majority_share(gallery.objects.names, queries.objects.names),
        prior_share(evidence.prior, queries, word_recall),
    )
    rows = {
        name: _summary_row(own, known.features[name], asked.features[name], gallery, queries)
        for name, own in answers.items()
    }
    told = (
        f"{len(queries.objects):,} objects and {len(queries.words):,} words of {len(queries.scenes):,} "
        f"{split} scenes against {len(gallery.objects):,} objects and {len(gallery.words):,} words of "
        f"{len(gallery.scenes):,} training scenes. Train: the gallery against itself without the own scene; "
        "the same cut-outs stand in other scenes."
    )
    if PIXELS in rows:
        told += f" {PIXELS.capitalize()}: the better of two forms ({notes[PIXELS]})."
    shown = {name: notes[name] for name in rows if name in notes}
    return Table(SUMMARY, "Test beside train", told, columns, rows, "most frequent", shown)


def _summary_row(
    answers: Answers, known: SceneFeatures, asked: SceneFeatures, gallery: Truth, queries: Truth
) -> dict[str, Estimate | None]:
    own, met = gallery.objects.scene, gallery.words.scene
    within = vote(nearest(known.objects, known.objects, own, own), gallery.objects.names)
    by_words = ballots(nearest(asked.words, known.words), gallery.tokens)
    words_within = ballots(nearest(known.words, known.words, met, met), gallery.tokens)
    read = {
        "ocr_recall_at_5": (asked.read, queries),
        "ocr_train_recall_at_5": (known.read, gallery),
        "ocr_knn_recall_at_5": (by_words, queries),
        "ocr_knn_train_recall_at_5": (words_within, gallery),
    }
    return {
        "region_knn": _named_right(answers.named, queries.objects),
        "region_knn_train": _named_right(within, gallery.objects),
        **{key: judged([own] if own else [], truth, word_recall) for key, (own, truth) in read.items()},
    }


def _named_right(named: Sequence[str], objects: RegionTable) -> Estimate | None:
    """Accuracy of the names given to objects, with the cut-outs as groups."""
    return share(np.asarray(named) == np.asarray(objects.names), objects.instances)
