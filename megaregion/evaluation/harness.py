"""Scores of region encoders on annotated images: a table a measure, a row an encoder, intervals over images.

An encoder goes over the known images, then over the asked ones, and is measured before the next one begins.
So the features of one encoder are in memory at a time, 4 bytes a region and channel by boxes and as many by
masks, and two samples of fixed size: the patches of SAMPLED regions a part, and the features of PLACES cells.

Shapes: R regions, C feature width, P sampled patches of a region, h x w cells of a map, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.image import Crop
from megaregion.data.transforms import visibility
from megaregion.errors import UserError
from megaregion.evaluation.annotated import Annotated, open_scene
from megaregion.evaluation.classifiers import (
    NEIGHBOURS,
    Patches,
    Probe,
    choose_decay,
    fit_attentive,
    fit_probe,
    nearest,
    vote,
)
from megaregion.evaluation.encoders import BoxedImage, EncodesRegions, Floats
from megaregion.evaluation.encoding import Batches, resized
from megaregion.evaluation.measures import estimate, share
from megaregion.evaluation.measures.recognition import majority_share
from megaregion.evaluation.measures.retrieval import asking, recalled, retrieval_columns
from megaregion.evaluation.measures.segmentation import BACKGROUND, mean_iou, overlaps
from megaregion.evaluation.scenes import Scene, Truth, class_map, truth_map
from megaregion.schemas.evaluation import ANNOTATED, Column, Estimate, Table

SAMPLED = 10_000
"""Most regions of a part whose patches the attentive probe reads, evenly spaced."""
PATCHES = 16
"""Most patches of a region that it reads, evenly spaced."""
PLACES = 40_000
"""About as many cells of known images as the probe of places learns from, as many of each image."""
SIDE = 224
"""Rows and columns at which named places are compared with the truth."""
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
CLASSIFIERS = (("knn", f"{NEIGHBOURS}-NN"), ("linear", "linear"), ("attentive", "attentive"))

Sample = tuple[NDArray[np.float16], NDArray[np.bool_]]
"""Patches of one region, padded to [P, C], and which are real, [P]."""
Cells = dict[str, Estimate | None]
Verdicts = dict[tuple[str, str], tuple[NDArray[np.bool_], NDArray[np.int64]]]
"""By form and classifier, which regions are named right, and which regions these are."""


def score_regions(
    encoders: Sequence[EncodesRegions],
    data: Annotated,
    measures: Sequence[str] = ANNOTATED,
    batches: Batches | None = None,
) -> tuple[Table, ...]:
    """Measure encoders on annotated images.

    Args:
        encoders: With distinct names.
        data: What :func:`read_annotated` gives.
        measures: Some of ANNOTATED; segmentation needs masks and an encoder whose features come with maps.
        batches: How images are read; gathers the seconds.

    Returns:
        The tables that the data allows; none of objects without classes.

    Raises:
        UserError: An image cannot be read, or features are not finite.
    """
    found: list[Table] = []
    for encoder in encoders if data.named else ():
        tables = _Scores(encoder, data, batches or Batches()).tables(measures)
        known = {table.key: place for place, table in enumerate(found)}
        for table in tables:
            if table.key in known:
                first = found[known[table.key]]
                rows, notes = {**first.rows, **table.rows}, {**first.notes, **table.notes}
                found[known[table.key]] = replace(first, rows=rows, notes=notes)
            else:
                found.append(table)
    order = {f"{data.name}/{key}": place for place, key in enumerate(ANNOTATED)}
    return tuple(sorted(found, key=lambda table: order[table.key]))


# ---- one pass --------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """What a batch of images gives."""

    regions: list[Floats]
    """By boxes, and by masks where there are any, [R, C] each."""
    places: list[tuple[Floats, NDArray[np.int64]]]
    """Of each known image: features of some cells and their classes."""
    overlaps: list[NDArray[np.float32]]
    """Of each asked image: how its named places agree with the truth, [3 * K]."""


@dataclass(frozen=True)
class _Part:
    """What one encoder says of the known or of the asked images."""

    regions: list[Floats]
    patches: list[Patches | None]
    sampled: NDArray[np.int64]
    """Regions whose patches are kept."""
    places: list[tuple[Floats, NDArray[np.int64]]]
    overlaps: list[NDArray[np.float32]]


@dataclass(frozen=True)
class _Scores:
    """One encoder on annotated images."""

    encoder: EncodesRegions
    data: Annotated
    batches: Batches

    @property
    def forms(self) -> tuple[str, ...]:
        """How regions are given."""
        return ("boxes", "masks") if self.data.masks else ("boxes",)

    @property
    def classes(self) -> list[str]:
        """Names of places, the background first."""
        truths = self.data.known, self.data.asked
        return [BACKGROUND, *sorted({name for truth in truths for name in truth.objects.names})]

    def tables(self, measures: Sequence[str]) -> Iterator[Table]:
        """One row of each table that is wanted and possible."""
        wants_places = "segmentation" in measures and self.data.masks
        known = self._read(self.data.known, "train", None, wants_places)
        probe = self._fit_places(known.places) if known.places else None
        asked = self._read(self.data.asked, "test", probe, wants_places)
        if {"region", "frequency"} & set(measures):
            verdicts = self._verdicts(known, asked)
            if "region" in measures:
                yield self._region_table(verdicts)
            if "frequency" in measures and self.data.frequency:
                yield self._frequency_table(verdicts)
        if "retrieval" in measures:
            yield self._retrieval_table(asked)
        if asked.overlaps:
            yield self._places_table(asked.overlaps)

    def _read(self, truth: Truth, told: str, probe: Probe | None, wants_places: bool) -> _Part:
        """One pass over a part's images; without a probe, places are gathered to fit one."""
        total = len(truth.objects)
        sampled = np.unique(np.linspace(0, total - 1, min(total, SAMPLED)).round().astype(np.int64))
        starts = np.searchsorted(truth.objects.scene, np.arange(len(truth.scenes) + 1))
        quota = -(-PLACES // len(truth.scenes))
        kept: list[Patches] = []

        def digest(opened: list[tuple[int, BoxedImage]]) -> _Batch:
            seen = self.encoder.encode([image for _, image in opened])
            if not np.isfinite(seen.region).all():
                wrong = "gives features that are not finite; its weights are of no use"
                raise UserError(f"encoder {self.encoder.name} {wrong}")
            scenes = [truth.scenes[place] for place, _ in opened]
            batch = _Batch(self._by_form(seen.region, scenes), [], [])
            for (place, _), own in zip(opened, seen.maps or (), strict=False):
                scene = truth.scenes[place]
                first, last = np.searchsorted(sampled, starts[place : place + 2]).tolist()
                if not kept:  # Filled row by row: a list, then an array would take the memory twice.
                    kept.extend(_no_patches(len(sampled), own.shape[2]) for _ in self.forms)
                for form, part in zip(self.forms, kept, strict=True):
                    rows = (sampled[first:last] - starts[place]).tolist()
                    for row, found in enumerate(_patches(own, scene, rows, form == "masks"), first):
                        part.features[row], part.real[row] = found
                if wants_places and probe is None:
                    batch.places.append(self._some_places(own, scene, place, quota))
                elif wants_places and probe is not None:
                    batch.overlaps.append(self._compared(own, scene, probe))
            return batch

        opened = range(len(truth.scenes))
        name = self.encoder.name
        found = self.batches.ask(
            f"{name}, {told}", opened, lambda place: self._opened(truth.scenes[place], place), {name: digest}
        )[name]
        forms = range(len(found[0].regions))
        return _Part(
            [np.concatenate([batch.regions[form] for batch in found]) for form in forms],
            [*kept] or [None for _ in forms],
            sampled,
            [row for batch in found for row in batch.places],
            [row for batch in found for row in batch.overlaps],
        )

    def _opened(self, scene: Scene, place: int) -> tuple[int, BoxedImage]:
        """An image whose regions are asked for by their boxes, and once more by their masks."""
        boxes, masks = scene.boxes, [item.mask for item in scene.objects]
        if "masks" not in self.forms or not self.encoder.sees_masks:
            return place, BoxedImage(open_scene(scene), boxes)
        return place, BoxedImage(open_scene(scene), np.tile(boxes, (2, 1)), [*([None] * len(masks)), *masks])

    def _by_form(self, regions: Floats, scenes: Sequence[Scene]) -> list[Floats]:
        """Rows of a batch by boxes, then by masks if these were asked for."""
        counts = [len(scene.objects) for scene in scenes]
        forms = 2 if "masks" in self.forms and self.encoder.sees_masks else 1
        if len(regions) != forms * sum(counts):
            asked = forms * sum(counts)
            raise UserError(f"encoder {self.encoder.name} gives {len(regions)} features for {asked} regions")
        form = np.concatenate([np.repeat(np.arange(forms), count) for count in counts])
        return [regions[form == each] for each in range(forms)]

    # ---- regions ----

    def _verdicts(self, known: _Part, asked: _Part) -> Verdicts:
        """Name all asked regions."""
        gallery, queries = self.data.known.objects, self.data.asked.objects
        names, true = np.asarray(gallery.names), np.asarray(queries.names)
        found = {}
        for form, seen, features, *patches in zip(
            self.forms, known.regions, asked.regions, known.patches, asked.patches, strict=False
        ):
            every = np.arange(len(true))
            decay = choose_decay(seen, gallery.names, gallery.instances)
            by_vote = vote(nearest(features, seen), gallery.names)
            found[form, "knn"] = np.asarray(by_vote) == true, every
            by_probe = fit_probe(seen, gallery.names, decay).predict(features)
            found[form, "linear"] = np.asarray(by_probe) == true, every
            learned, read = patches
            if learned is not None and read is not None:
                fitted = fit_attentive(learned, names[known.sampled].tolist(), decay)
                found[form, "attentive"] = (
                    np.asarray(fitted.predict(read)) == true[asked.sampled],
                    asked.sampled,
                )
        return found

    def _region_table(self, verdicts: Verdicts) -> Table:
        gallery, queries = self.data.known.objects, self.data.asked.objects
        chance = majority_share(gallery.names, queries.names)
        images, cells = np.asarray(queries.instances), Cells()
        for form in self.forms:
            for key, _ in CLASSIFIERS:
                found = verdicts.get((form, key))
                cells[f"{form}_{key}"] = None if found is None else share(found[0], images[found[1]])
        columns = tuple(
            Column(f"{form}_{key}", title, chance, form) for form in self.forms for key, title in CLASSIFIERS
        )
        unknown = sum(name not in set(gallery.names) for name in queries.names)
        told = (
            f"{len(queries):,} regions of {len(self.data.asked.scenes):,} images in "
            f"{len(set(queries.names)):,} classes, named after {len(gallery):,} regions of "
            f"{len(self.data.known.scenes):,} other images. The attentive probe learns from, and is asked "
            f"about, at most {SAMPLED:,} regions and {PATCHES} patches of each."
        )
        if unknown:
            told += f" {unknown:,} regions are of classes that no known image shows: they count as wrong."
        if self.data.left_out:
            counts = ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.data.left_out.items()))
            told += f" Left out: {counts}."
        return self._table("region", "Naming regions", told, columns, cells, "most frequent class")

    def _frequency_table(self, verdicts: Verdicts) -> Table:
        queries = self.data.asked.objects
        groups = np.asarray([self.data.frequency.get(name, "") for name in queries.names])
        images, cells, columns = np.asarray(queries.instances), Cells(), list[Column]()
        for letter, word in FREQUENCIES.items():
            for key, title in CLASSIFIERS:
                found = verdicts.get(("boxes", key))
                cell = None
                if found is not None:
                    right, rows = found
                    own = groups[rows] == letter
                    cell = share(right[own], images[rows][own])
                cells[f"{word}_{key}"] = cell
                columns.append(Column(f"{word}_{key}", title, None, word))
        counts = ", ".join(
            f"{np.count_nonzero(groups == letter):,} {FREQUENCIES[letter]}" for letter in FREQUENCIES
        )
        told = f"The same regions by how many training images show their class: {counts}. By boxes."
        return self._table("frequency", "Naming rare and frequent classes", told, tuple(columns), cells, "")

    def _retrieval_table(self, asked: _Part) -> Table:
        objects = self.data.asked.objects
        kinds, cells, columns = {"class": objects.names}, Cells(), list[Column]()
        for form, features in zip_longest(self.forms, asked.regions):
            own = retrieval_columns(objects.scene, kinds)
            row = {} if features is None else recalled(features, objects, kinds)
            columns += [replace(column, key=f"{form}_{column.key}", group=form) for column in own]
            cells |= {f"{form}_{column.key}": row.get(column.key) for column in own}
        told = (
            f"{asking(objects.scene, objects.names).sum():,} regions ask for another one of their class "
            f"among all {len(objects):,} asked regions of other images: recall among the nearest 1, 5 and 10."
        )
        return self._table("retrieval", "Finding the like", told, tuple(columns), cells, "random order")

    # ---- places ----

    def _some_places(
        self, own: Floats, scene: Scene, place: int, quota: int
    ) -> tuple[Floats, NDArray[np.int64]]:
        """At most so many cells of a known image that its number draws, and their classes."""
        named = self._named(scene, own.shape[:2]).ravel()
        clear = np.flatnonzero(named >= 0)
        drawn = np.random.Generator(np.random.Philox(key=place)).permutation(clear)[:quota]
        return own.reshape(-1, own.shape[-1])[drawn], named[drawn].astype(np.int64)

    def _fit_places(self, places: Sequence[tuple[Floats, NDArray[np.int64]]]) -> Probe:
        names = np.asarray(self.classes)
        features = np.concatenate([rows for rows, _ in places])
        labels = names[np.concatenate([label for _, label in places])].tolist()
        images = [str(image) for image, (rows, _) in enumerate(places) for _ in rows]
        return fit_probe(features, labels, choose_decay(features, labels, images))

    def _compared(self, own: Floats, scene: Scene, probe: Probe) -> NDArray[np.float32]:
        scores = probe.scores(own.reshape(-1, own.shape[-1])).reshape(*own.shape[:2], -1)
        number = {name: place for place, name in enumerate(self.classes)}
        learned = np.asarray([number[name] for name in probe.classes])
        named = learned[resized(scores, SIDE).argmax(axis=-1)]
        return overlaps(named, self._named(scene, (SIDE, SIDE)), len(number)).astype(np.float32)

    def _named(self, scene: Scene, cells: tuple[int, ...]) -> NDArray[np.int16]:
        owner = truth_map(scene, (cells[0], cells[1]))
        assert owner is not None  # All objects have masks.
        return class_map(scene, owner, self.classes[1:])

    def _places_table(self, sums: Sequence[NDArray[np.float32]]) -> Table:
        parts = np.stack(sums)[None].astype(np.float64)
        true = parts[0].sum(axis=0).reshape(3, -1)[1]
        chance = float(true.max() / true.sum() / np.count_nonzero(true))
        cells: Cells = {
            "miou": estimate(parts, mean_iou),
            "object_miou": estimate(parts, lambda own: mean_iou(own, first=1)),
        }
        told = (
            f"A linear probe of patches names {SIDE} x {SIDE} places of {len(sums):,} images: intersection "
            f"over union, mean over the {np.count_nonzero(true):,} classes that occur. Crowds do not count."
        )
        columns = Column("miou", "mIoU", chance), Column("object_miou", "mIoU, objects only", None)
        name = self.encoder.name.removesuffix("/pooled")
        table = self._table(
            "segmentation", "Naming every place", told, columns, cells, "one class everywhere"
        )
        return replace(table, rows={name: cells})

    def _table(
        self, key: str, title: str, told: str, columns: tuple[Column, ...], cells: Cells, chance_is: str
    ) -> Table:
        data = self.data.name
        return Table(
            f"{data}/{key}", f"{title}, {data}", told, columns, {self.encoder.name: cells}, chance_is
        )


def _patches(own: Floats, scene: Scene, rows: Sequence[int], masks: bool) -> Iterator[Sample]:
    """Some of the patches [h, w, C] that each of these objects covers, padded, and which are real."""
    flat = own.reshape(-1, own.shape[-1])
    items = [scene.objects[row] for row in rows]
    seen = visibility(
        scene.boxes[list(rows)].astype(np.float64), [item.mask if masks else None for item in items],
        Crop(0, 0, scene.width, scene.height), own.shape[0], own.shape[1], 0.5,
    )  # fmt: skip
    for each in seen:
        covered = np.flatnonzero(each)
        chosen = covered[
            np.unique(np.linspace(0, len(covered) - 1, min(PATCHES, len(covered))).round().astype(int))
        ]
        padded = np.zeros((PATCHES, flat.shape[1]), np.float16)
        padded[: len(chosen)] = np.clip(flat[chosen], -65_000, 65_000)
        yield padded, np.arange(PATCHES) < len(chosen)


def _no_patches(rows: int, width: int) -> Patches:
    return Patches(np.zeros((rows, PATCHES, width), np.float16), np.zeros((rows, PATCHES), np.bool_))


# ---- other harnesses -------------------------------------------------------------------------------


class EncodesImages(Protocol):
    """What :func:`mteb_model` asks of an encoder."""

    @property
    def name(self) -> str:
        """Name of its results."""

    def images(self, images: list[Image.Image]) -> Floats:
        """Encode whole images, RGB, [B, C]."""


def mteb_model(encoder: EncodesImages, revision: str = "unknown") -> Any:
    """A model for ``mteb.evaluate(model, tasks)``, with cosine similarity and images as its one modality.

    Raises:
        UserError: mteb is not installed.
    """
    try:
        from mteb.models.abs_encoder import AbsEncoder
        from mteb.models.model_meta import ModelMeta
    except ImportError as error:
        raise UserError(f"mteb cannot be imported ({error}); install it: pip install mteb") from None

    class Model(AbsEncoder):  # type: ignore[misc]
        """Encodes the images of a task's batches; a task that gives text is refused."""

        mteb_model_meta = ModelMeta(
            loader=None, name=f"megaregion/{encoder.name.replace('/', '-')}", revision=revision,
            release_date=None, languages=None, n_parameters=None, memory_usage_mb=None, max_tokens=None,
            embed_dim=None, license=None, open_weights=None, public_training_code=None,
            public_training_data=None, framework=["PyTorch"], similarity_fn_name="cosine",
            use_instructions=False, training_datasets=None, modalities=["image"],
        )  # fmt: skip

        def encode(self, inputs: Any, **_: Any) -> Floats:
            """Embeddings of all batches, [N, C]."""
            parts = []
            for batch in inputs:
                if batch.get("image") is None:
                    raise UserError(
                        "this MTEB task asks for text; an image encoder takes tasks of images alone"
                    )
                parts.append(encoder.images([image.convert("RGB") for image in batch["image"]]))
            return np.concatenate(parts)

    return Model()
