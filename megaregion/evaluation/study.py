"""One evaluation from end to end: scenes in, every encoder measured on the same regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megaregion.data.info import DatasetInfo
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.evaluation.encoders import Encoder, pixel_encoders
from megaregion.evaluation.encoding import SceneFeatures, encode_scenes
from megaregion.evaluation.images import image_table, read_image_folder
from megaregion.evaluation.measure import Judgement, Truth, judge
from megaregion.evaluation.measures import MEASURES, Material, tables_of
from megaregion.evaluation.network import TrainedRun
from megaregion.evaluation.scenes import Scene, pick_scenes, read_scenes
from megaregion.evaluation.tables import Table
from megaregion.evaluation.vocabulary import Vocabulary, open_vocabulary

GALLERY_SPLIT = "train"
PIXELS = "pixels"

Progress = Callable[[str, int, int], None]
"""Called with a split's name, images done and images in all."""


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
    """Tables wanted, see measures.py."""
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
    judgements: tuple[Judgement, ...]
    """trained, untrained, pixels, then the other encoders."""
    data: DatasetInfo
    """What the run was trained on."""
    vocabulary: Vocabulary | None
    """None for a run without text."""
    seconds: dict[str, float]
    """Time by encoder; "read" is time spent waiting for images."""
    tables: tuple[Table, ...] = ()
    """The measures, with means over seeds and intervals."""

    def judgement(self, encoder: str) -> Judgement:
        """What was found of one encoder.

        Raises:
            KeyError: It was not evaluated.
        """
        found = {judgement.row.encoder: judgement for judgement in self.judgements}
        return found[encoder]


def conduct(
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
    known = pick_scenes(_scenes(config.scenes / GALLERY_SPLIT), config.limit, config.seed)
    asked = _scenes(config.scenes / config.split)
    gallery, queries = _truth(known, vocabulary), _truth(asked, vocabulary)
    folder = read_image_folder(config.images) if config.images else None
    encoders = [*_own_encoders(run, config), *others]
    seconds: dict[str, float] = {}
    parts: list[dict[str, SceneFeatures]] = []
    for name, scenes in ((GALLERY_SPLIT, known), (config.split, asked)):
        report = _counter(progress, name, len(scenes))
        parts.append(encode_scenes(scenes, encoders, config.batch, config.workers, seconds, report))
    centers = {"trained": run.text_centers(), "untrained": run.first_text_centers()} if vocabulary else {}
    prior = vocabulary.prior if vocabulary else ()
    judgements = _join_pixels(
        [
            judge(
                each.name,
                gallery,
                queries,
                (parts[0][each.name], parts[1][each.name]),
                prior,
                centers.get(each.name),
            )
            for each in encoders
        ]
    )
    shown = _shown_encoders(encoders, judgements)
    material = Material(gallery, queries, shown, parts[0], parts[1], centers, prior)
    tables = tables_of(material, config.measures, config.seeds, config.batch, seconds, progress)
    if folder is not None:
        seen = [encoder for encoder in shown.values() if not encoder.name.endswith("/crops")]
        table = image_table(folder, seen, config.seeds, config.batch, config.workers, progress)
        names = {encoder.name: name for name, encoder in shown.items()}
        tables.append(replace(table, rows={names[name]: row for name, row in table.rows.items()}))
    return Study(config, run, gallery, queries, judgements, shards.info, vocabulary, seconds, tuple(tables))


def _own_encoders(run: TrainedRun, config: StudyConfig) -> list[Encoder]:
    trained = run.trained(config.device, config.projected)
    if not config.baselines:
        return [trained]
    untrained = run.untrained(config.device, config.projected)
    return [trained, untrained, *pixel_encoders(run.config.model.grid)]


def _shown_encoders(encoders: Sequence[Encoder], judgements: Sequence[Judgement]) -> dict[str, Encoder]:
    """Encoders by the names of their rows: of the pixels, the better form."""
    own = {encoder.name: encoder for encoder in encoders}
    return {
        row.encoder: own[row.encoder if row.variant is None else f"{row.encoder}/{row.variant}"]
        for row in (judgement.row for judgement in judgements)
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


def _counter(progress: Progress, split: str, images: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(split, done, images)

    return count


def _join_pixels(judgements: Sequence[Judgement]) -> tuple[Judgement, ...]:
    """Keep the better form of the pixel baseline, in its place, and say which it was."""
    forms = [judgement for judgement in judgements if judgement.row.encoder.startswith(f"{PIXELS}/")]
    if not forms:
        return tuple(judgements)
    best = max(forms, key=lambda judgement: judgement.row.region_knn)
    row = replace(best.row, encoder=PIXELS, variant=best.row.encoder.removeprefix(f"{PIXELS}/"))
    joined = [replace(best, row=row) if judgement is best else judgement for judgement in judgements]
    return tuple(judgement for judgement in joined if judgement not in forms)
