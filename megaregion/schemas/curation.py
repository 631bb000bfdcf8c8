"""summary.json: what a curation run found, kept and dropped, in the run's folder beside shards/."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megaregion.schemas.evaluation import aligned

SUMMARY = "summary.json"

DROPPED = "dropped: "
"""How the name of a count of object proposals begins that were dropped; the reason follows."""

REASONS = (
    "too small", "too large", "too elongated", "duplicate", "text", "background", "beyond the limit",
    "not embedded", "bad annotation", "outside the image", "no area", "crowd", "of an image of another size",
)  # fmt: skip
LATER = ("near-duplicate", "drawn out", "over the cap", "of a damaged image")
"""Why kept ones are not packed."""

DUPLICATE, OTHER, HIDDEN, OUTPUT = "duplicate", "other file", "hidden file", "own output"
BESIDE, ANNOTATION, TAR, FORMAT = "file of an image", "annotation file", "tar", "other format "
BROKEN, LINK, UNREADABLE = "damaged tar", "link not followed", "not readable"
TABLE, BROKEN_TABLE = "Parquet or Arrow file", "unusable Parquet or Arrow file"
"""Kinds of files and members that are no image of a run; FORMAT is followed by an ending."""
SEVERAL = "first of several frames"
"""Name of the count of images whose file holds more frames or pages."""
EXAMPLES = 3
"""Names that are kept of each kind."""

ANNOTATED, ANNOTATED_REGIONS = "images with annotations", "annotated regions"
ALL_UNUSABLE, NO_JSON = "images whose annotations are all unusable", "annotation files that cannot be read"
BOXED, POSES = "boxes in place of masks", "keypoints not used"
"""Names of counts of images and of rows; BOXED are used although their mask is not."""
NAMED = 10
"""Unusable images that the table names."""


class Kinds(dict[str, tuple[int, list[str]]]):
    """How many files or members of each kind there are, and the names of the first ones."""

    def add(self, kind: str, *names: str, count: int = 1) -> None:
        """Count so many of a kind, of which these are the first."""
        before, examples = self.get(kind, (0, []))
        self[kind] = before + count, [*examples, *names][:EXAMPLES]

    def count(self, kind: str) -> int:
        """How many there are of a kind."""
        return self.get(kind, (0, []))[0]

    @property
    def formats(self) -> dict[str, int]:
        """Images in formats that are not read, by ending."""
        found = {kind.removeprefix(FORMAT): n for kind, (n, _) in self.items() if kind.startswith(FORMAT)}
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class ClusterSizes:
    """Regions per object class."""

    clusters: int
    smallest: int
    median: float
    largest: int
    empty: int


@dataclass(frozen=True)
class Summary:
    """The outcome of a run; stages that are not done leave their counts at 0."""

    files: int
    """Image files that were found, duplicates included."""
    duplicates: int
    """Files left out because another one has the same content."""
    others: int
    """Files that are no images by their ending, and members of tars that belong to no image."""
    bad: dict[str, str]
    """Images that cannot be used and damaged tars, by path, and why; the first thousand of them."""
    unusable: dict[str, int]
    """Images that cannot be used, all of them, by reason."""
    counts: dict[str, int]
    """Everything that stages counted, by name."""
    clusters: ClusterSizes | None
    seconds: dict[str, float] = field(default_factory=dict)
    """Work of each stage that is done, summed over its pieces."""
    formats: dict[str, int] = field(default_factory=dict)
    """Images in formats that are not read, by ending."""
    damaged: int = 0
    """Damaged tars and annotations, links that are not followed, files that may not be read: all of them."""
    outputs: int = 0
    """Shards, and folders of runs and of an atlas, that megaregion wrote; none of them is input."""
    left_out: dict[str, int] = field(default_factory=dict)
    """All files and members that are no image of the run, by kind; with the images they are all that is
    there, where a folder of own output counts as one."""

    annotations: dict[str, Any] = field(default_factory=dict)
    """Annotation files by path: format, images, those of them that are here, rows; what else was counted."""

    def table(self) -> str:
        """The numbers as aligned lines."""
        count = Counter(self.counts)
        formats = ", ".join(f"{ending} {number}" for ending, number in self.formats.items())
        sometimes = [
            ("  with annotations", count[ANNOTATED], "kept, nothing proposed"),
            ("  all unusable", count[ALL_UNUSABLE], "annotations, so that objects were proposed"),
            ("  unreadable", count[NO_JSON], "annotation files beside images"),
            *self._annotation_rows(),
            ("  other formats", sum(self.formats.values()), f"{formats}; convert them to JPEG or PNG"),
            *self._damaged_rows(),
            ("  own output", self.outputs, "shards and runs of megaregion, never taken for input"),
            ("  hidden files", self.left_out.get(HIDDEN, 0), "their names begin with a dot"),
            ("  files of images", self.left_out.get(BESIDE, 0), "captions, annotations"),
            ("  several frames", count[SEVERAL], "the first one counts"),
        ]
        rows = [
            ("images", self.files - sum(self.unusable.values()) - self.duplicates, "usable"),
            *((f"  {why}", number, "") for why, number in sorted(self.unusable.items())),
            ("  duplicate files", self.duplicates, ""),
            *(row for row in sometimes if row[1]),
            ("  other files", self.others, "not images by their ending"),
            ("  without a region", count["images without region"], "not packed"),
            ("  packed", count["images packed"], f"in {count['shards']} shards"),
            ("object proposals", count["proposed"], ""),
            *((f"  {why}", count[DROPPED + why], "dropped") for why in REASONS),
            ("  kept", count["kept"], self._per_image("kept")),
            *((f"    {why}", count[DROPPED + why], "not packed") for why in LATER if count[DROPPED + why]),
            ("    packed", count["object regions"], self._per_image("object regions")),
            *self._cluster_rows(),
            ("words", count["words found"], ""),
            ("  below confidence", count["words below confidence"], "dropped"),
            ("  without a token", count["words without token"], "dropped"),
            ("  of damaged images", count["words of damaged images"], "dropped"),
            ("  kept", count["text regions"], self._per_image("text regions")),
            ("  different", count["different words"], ""),
            ("tokens", count["tokens"], ""),
        ]
        lines = aligned([(name, str(value), note) for name, value, note in rows], left=(0, 2))
        named = [f"unusable: {path} ({why})" for path, why in sorted(self.bad.items())]
        # A path may hold bytes that are no text.
        named = [line.encode(errors="replace").decode() for line in named]
        if len(named) > NAMED:
            named[NAMED:] = [f"unusable: {len(named) - NAMED} more, named in {SUMMARY}"]
        return "\n".join([lines, *named])

    def _annotation_rows(self) -> list[tuple[str, int, str]]:
        files = dict(self.annotations.get("files", {}))
        rows = [
            (
                f"  {file['format']}",
                file["here"],
                f"of {file['images']} images, {file['rows']} rows, in {path}",
            )
            for path, file in files.items()
        ]
        others = [(f"  {why}", n, "") for why, n in self.annotations.items() if why != "files"]
        count = Counter(self.counts)
        told = [
            (f"  {BOXED}", count[BOXED], "their masks or polygons are unusable"),
            (f"  {POSES}", count[POSES], "regions that have them"),
        ]
        return [*rows, *others, *told]

    def _damaged_rows(self) -> list[tuple[str, int, str]]:
        told = {
            BROKEN: "what could be read of them counts above",
            BROKEN_TABLE: "named below",
            LINK: "to a folder, or to nothing",
            UNREADABLE: "files and folders that may not be read",
        }
        rows = [(f"  {kind}", self.left_out.get(kind, 0), why) for kind, why in told.items()]
        rest = self.damaged - sum(count for _, count, _ in rows)
        return [*rows, ("  damaged annotations", rest, "nothing of these files is used")]

    def _per_image(self, name: str) -> str:
        images = self.counts.get("images used", 0)
        return f"{self.counts.get(name, 0) / images:.1f} an image" if images else ""

    def _cluster_rows(self) -> list[tuple[str, int, str]]:
        if self.clusters is None:
            return []
        sizes = self.clusters
        note = f"kept regions each: {sizes.smallest} min, {sizes.median:g} median, {sizes.largest} max"
        return [("clusters", sizes.clusters, note), ("  empty", sizes.empty, "")]
