"""One evaluation from end to end: scenes in, every encoder measured on the same regions.

The summary, which is always made, sets held-out regions, whose cut-outs no gallery holds, beside the
gallery's own against the gallery without their scene: the same cut-out stands in other training scenes and
stays in. A network that has merely memorised its cut-outs scores high there and low on the test; the gap is
the memorising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from megaregion.data.remote import is_remote
from megaregion.data.shards import Datasets, open_datasets
from megaregion.errors import UserError
from megaregion.evaluation.classifiers import NEIGHBOURS, Neighbours, ballots, nearest, vote
from megaregion.evaluation.encoders import (
    PIXELS,
    CropEncoder,
    Encoder,
    centred,
    centred_pixels,
    pixel_map,
    raw_pixels,
)
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
from megaregion.evaluation.measures.reading import judged, prior_share, reading_tables, word_recall
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
    check_labels,
    open_vocabulary,
    pick_scenes,
    read_scenes,
)
from megaregion.schemas.evaluation import MEASURES, SUMMARY, Estimate, Evaluation, Table, summary_columns

GALLERY_SPLIT = "train"


# ---- the measures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Everything that a measure may look at."""

    known: EncodedScenes
    """Training scenes, by every encoder."""
    asked: EncodedScenes
    """Held-out scenes, by every encoder."""
    encoders: Sequence[Encoder]
    vocabulary: Vocabulary | None
    """None without text."""
    seeds: int
    batches: Batches

    @cached_property
    def maps(self) -> tuple[MappedScenes, MappedScenes] | None:
        """Maps of training and held-out scenes, made when first asked for; None where scenes lack masks."""
        known = map_scenes(self.known, self.encoders, self.batches)
        asked = map_scenes(self.asked, self.encoders, self.batches) if known.scenes else known
        return (known, asked) if asked.scenes else None


TABLES: Mapping[str, Callable[[Evidence], Iterable[Table | None]]] = {
    "region": lambda own: (recognition_table(own.known, own.asked, own.seeds),),
    "retrieval": lambda own: (retrieval_table(own.asked),),
    "ocr": lambda own: reading_tables(own.known, own.asked, own.vocabulary, own.seeds),
    "correspondence": lambda own: (own.maps and correspondence_table(own.maps[1], own.seeds),),
    "segmentation": lambda own: (own.maps and segmentation_table(*own.maps, own.seeds),),
    "separation": lambda own: (own.maps and separation_table(*own.maps),),
}
"""The tables of each measure, the first under its name; None where the scenes do not allow one."""


# ---- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyConfig:
    """What to evaluate on, and how fast."""

    scenes: Path
    """Scene set with train/ and the evaluated split."""
    dataset: Path | str | None = None
    """Shards that the run was trained on, as its data.path names them, if they are elsewhere now."""
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
    datasets: Datasets
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
    run: TrainedRun, config: StudyConfig, others: Sequence[Encoder] = (), progress: Progress = quiet
) -> Study:
    """Measure the run's network, the same network untrained, raw pixels and other encoders.

    Raises:
        UserError: Scenes, dataset or checkpoint cannot be used; the text says which and why.
    """
    datasets = _open_datasets(run, config)
    vocabulary = open_vocabulary(datasets)
    drawn = pick_scenes(_scenes(config.scenes / GALLERY_SPLIT), config.limit, config.seed)
    gallery, queries = (
        Truth(scenes, tuple(vocabulary.tokens(w.name) if vocabulary else () for s in scenes for w in s.words))
        for scenes in (drawn, _scenes(config.scenes / config.split))
    )
    folder = read_image_folder(config.images) if config.images else None
    encoders = [*_own_encoders(run, config, vocabulary.size if vocabulary else 0), *others]
    batches = Batches(config.batch, config.workers, progress=progress)
    known = encode_scenes(gallery, encoders, batches, GALLERY_SPLIT)
    asked = encode_scenes(queries, encoders, batches, config.split)
    form, evidence = _better_pixels(Evidence(known, asked, encoders, vocabulary, config.seeds, batches))
    answers = {name: _answer(evidence, name) for name in asked.features}
    chosen = (make for name, make in TABLES.items() if name in config.measures)
    measured = [table for make in chosen for table in make(evidence)]
    if folder is not None:
        measured.append(image_table(folder, evidence.encoders, config.seeds, batches))
    return Study(
        config, run, gallery, queries, answers, datasets, vocabulary, batches.seconds,
        summary=_summary(evidence, answers, config.split, run.step, form),
        tables=tuple(table for table in measured if table is not None),
    )  # fmt: skip


def _open_datasets(run: TrainedRun, config: StudyConfig) -> Datasets:
    path = run.config.data.path if config.dataset is None else str(config.dataset)
    data = replace(run.config.data, path=path)
    if any(is_remote(each) for each, _ in data.datasets):
        raise UserError(f"evaluation needs shards on this machine, not {path}; name a copy with --dataset")
    datasets = open_datasets(data)
    check_labels(datasets.info, run.reader.manifest.get("dataset", {}), path)
    return datasets


def _scenes(folder: Path) -> list[Scene]:
    # A scene without a region gives no query and no gallery entry.
    scenes = [scene for scene in read_scenes(folder) if scene.regions]
    if not any(scene.objects for scene in scenes):
        raise UserError(
            f"{folder}/truth.jsonl names no object; make the scenes again with tools/make_scenes.py"
        )
    return scenes


def _own_encoders(run: TrainedRun, config: StudyConfig, tokens: int) -> list[Encoder]:
    """The run's network and its baselines; text heads name the first so many classes."""
    trained = run.trained(config.device, config.projected).reading(tokens)
    if not config.baselines:
        return [trained]
    untrained = run.untrained(config.device, config.projected).reading(tokens)
    see = partial(pixel_map, cells=run.config.model.grid)
    return [trained, untrained, CropEncoder(PIXELS, raw_pixels, see=see)]


def _better_pixels(raw: Evidence) -> tuple[str, Evidence]:
    """Which form of the pixel baseline names objects better, and the evidence with that form."""
    if PIXELS not in raw.asked.features:
        return "", raw

    def without_means(part: EncodedScenes) -> EncodedScenes:
        own = part.features[PIXELS]
        features = SceneFeatures(centred(own.objects), centred(own.words))
        return replace(part, features={**part.features, PIXELS: features})

    encoders = [
        replace(own, embed=centred_pixels) if isinstance(own, CropEncoder) and own.name == PIXELS else own
        for own in raw.encoders
    ]
    other = replace(raw, known=without_means(raw.known), asked=without_means(raw.asked), encoders=encoders)
    true = np.asarray(raw.asked.truth.objects.names)
    right = [np.mean(np.asarray(_answer(own, PIXELS).named) == true) for own in (raw, other)]
    return ("centred", other) if right[1] > right[0] else ("raw", raw)


def _answer(own: Evidence, encoder: str) -> Answers:
    known, asked = own.known.features[encoder], own.asked.features[encoder]
    neighbours = nearest(asked.objects, known.objects)
    read = None if asked.read is None else [tokens[:TOP] for tokens in asked.read]
    return Answers(neighbours, vote(neighbours, own.known.truth.objects.names), read)


# ---- the summary -----------------------------------------------------------------------------------


def _summary(evidence: Evidence, answers: Mapping[str, Answers], split: str, step: int, form: str) -> Table:
    """Every encoder on held-out regions beside training regions, with all of the gallery."""
    gallery, queries, vocabulary = evidence.known.truth, evidence.asked.truth, evidence.vocabulary
    told = (
        f"{len(queries.objects):,} objects and {len(queries.words):,} words of {len(queries.scenes):,} "
        f"{split} scenes against {len(gallery.objects):,} objects and {len(gallery.words):,} words of "
        f"{len(gallery.scenes):,} training scenes. Train: the gallery against itself without the own scene; "
        "the same cut-outs stand in other scenes."
    )
    notes = {
        "trained": f"after step {step:,}",
        "untrained": "the same network before step 1",
        PIXELS: f"crops at 32 x 32, {form}",
        "curation": "pretrained; it made the object labels",
    }
    if PIXELS in answers:
        told += f" {PIXELS.capitalize()}: the better of two forms ({notes[PIXELS]})."
    columns = summary_columns(
        split,
        majority_share(gallery.objects.names, queries.objects.names),
        prior_share(vocabulary.prior if vocabulary else (), queries, word_recall),
    )
    rows = {name: _summary_row(evidence, name, own.named) for name, own in answers.items()}
    shown = {name: notes[name] for name in rows if name in notes}
    return Table(SUMMARY, "Test beside train", told, columns, rows, "most frequent", shown)


def _summary_row(evidence: Evidence, encoder: str, named: Sequence[str]) -> dict[str, Estimate | None]:
    known, asked = evidence.known.features[encoder], evidence.asked.features[encoder]
    gallery, queries = evidence.known.truth, evidence.asked.truth
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
        "region_knn": _named_right(named, queries.objects),
        "region_knn_train": _named_right(within, gallery.objects),
        **{key: judged([own] if own else [], truth, word_recall) for key, (own, truth) in read.items()},
    }


def _named_right(named: Sequence[str], objects: RegionTable) -> Estimate | None:
    """Accuracy of the names given to objects, with the cut-outs as groups."""
    return share(np.asarray(named) == np.asarray(objects.names), objects.instances)
