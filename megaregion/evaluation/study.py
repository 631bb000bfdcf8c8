"""One evaluation from end to end: scenes in, every encoder measured on the same regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megaregion.data.info import DatasetInfo
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.evaluation.classifiers import NEIGHBOURS
from megaregion.evaluation.encoders import PIXELS, CropEncoder, Encoder, pixel_encoders
from megaregion.evaluation.encoding import EncodedScenes, Progress, counter, encode_scenes
from megaregion.evaluation.measures import MEASURES, Evidence, measure
from megaregion.evaluation.measures.images import image_table, read_image_folder
from megaregion.evaluation.measures.summary import Answers, answer, summary_table
from megaregion.evaluation.network import TrainedRun
from megaregion.evaluation.scenes import Scene, Truth, pick_scenes, read_scenes
from megaregion.evaluation.vocabulary import Vocabulary, open_vocabulary
from megaregion.schemas.evaluation import Evaluation, Table

GALLERY_SPLIT = "train"


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
    measures: tuple[str, ...] = tuple(MEASURES)
    """Measures wanted beside the summary, by their names in MEASURES."""
    seeds: int = 5
    """Galleries, splits or pairs drawn behind every mean."""
    images: Path | None = None
    """Folder of images with one subfolder a class, for a table on whole images."""
    baselines: bool = True
    """Measure the untrained network and raw pixels too."""


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
    progress: Progress = lambda split, done, images: None,
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
    vocabulary = open_vocabulary(shards, run.reader.manifest.get("dataset") or {})
    scenes = pick_scenes(_scenes(config.scenes / GALLERY_SPLIT), config.limit, config.seed)
    gallery = _truth(scenes, vocabulary)
    queries = _truth(_scenes(config.scenes / config.split), vocabulary)
    folder = read_image_folder(config.images) if config.images else None
    encoders = [*_own_encoders(run, config), *others]
    seconds: dict[str, float] = {}

    def encoded(split: str, truth: Truth) -> EncodedScenes:
        count = counter(progress, split, len(truth.scenes))
        found = encode_scenes(truth.scenes, encoders, config.batch, config.workers, seconds, count)
        return EncodedScenes(truth, found)

    known, asked = encoded(GALLERY_SPLIT, gallery), encoded(config.split, queries)
    encoders, known, asked, form = _keep_better_pixels(encoders, known, asked)
    answers = {name: answer(known.features[name], own, gallery) for name, own in asked.features.items()}
    prior = vocabulary.prior if vocabulary else ()
    summary = summary_table(known, asked, answers, prior, config.split, _notes(run, form))
    evidence = Evidence(known, asked, encoders, prior, config.seeds, config.batch, seconds, progress)
    tables = measure(evidence, config.measures)
    if folder is not None:
        seen = [encoder for encoder in encoders if not encoder.name.endswith("/crops")]
        tables.append(image_table(folder, seen, config.seeds, config.batch, config.workers, progress))
    return Study(
        config, run, gallery, queries, answers, shards.info, vocabulary, seconds, summary, tuple(tables)
    )


def _own_encoders(run: TrainedRun, config: StudyConfig) -> list[Encoder]:
    trained = run.trained(config.device, config.projected)
    if not config.baselines:
        return [trained]
    untrained = run.untrained(config.device, config.projected)
    return [trained, untrained, *pixel_encoders(run.config.model.grid)]


def _keep_better_pixels(
    encoders: Sequence[Encoder], known: EncodedScenes, asked: EncodedScenes
) -> tuple[list[Encoder], EncodedScenes, EncodedScenes, str]:
    """Keep that form of the pixel baseline which names objects better, in its place, and say which it was."""
    forms = [
        each for each in encoders if isinstance(each, CropEncoder) and each.name.startswith(f"{PIXELS}/")
    ]
    if not forms:
        return list(encoders), known, asked, ""
    true = np.asarray(asked.truth.objects.names)

    def accuracy(form: Encoder) -> float:
        found = answer(known.features[form.name], asked.features[form.name], known.truth)
        return float(np.mean(np.asarray(found.named) == true))

    best = max(forms, key=accuracy)
    names = {each.name: each.name for each in encoders if each is best or each not in forms}
    names[best.name] = PIXELS
    known, asked = (
        replace(part, features={name: part.features[own] for own, name in names.items()})
        for part in (known, asked)
    )
    kept = [best.renamed(PIXELS) if each is best else each for each in encoders if each.name in names]
    return kept, known, asked, best.name.removeprefix(f"{PIXELS}/")


def _notes(run: TrainedRun, pixels: str) -> dict[str, str]:
    return {
        "trained": f"after step {run.step:,}",
        "untrained": "the same network before step 1",
        PIXELS: f"crops at 32 x 32, {pixels}",
        "curation": "pretrained; it made the object labels",
    }


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


def _truth(scenes: Sequence[Scene], vocabulary: Vocabulary | None) -> Truth:
    words = [word for scene in scenes for word in scene.words]
    return Truth(scenes, tuple(vocabulary.tokens(word.text) if vocabulary else () for word in words))
