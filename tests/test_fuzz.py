"""Whatever a file from outside holds, it is read or refused in a line: no traceback, no hang, no memory gone.

`make test` tries a few inputs that are always the same, `make drills` many that are always others: as many of
each kind as MEGAREGION_FUZZ says.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_runs import write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_columnar import row, save, table
from test_evaluation_file import WHOLE
from toy import toy_dataset

from benchmark.memory import PeakMemory
from megaregion.atlas.build import _is_done
from megaregion.checkpoint.fence import read_claim
from megaregion.checkpoint.pretrained import open_pretrained
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, find_checkpoint, run_config
from megaregion.config import ModelConfig, RunConfig
from megaregion.curation.inputs.annotations import read_annotations
from megaregion.curation.inputs.columnar import Columnar, count_rows
from megaregion.curation.inputs.source import Source
from megaregion.curation.inputs.tars import scan_tar
from megaregion.curation.picture import BadImage, Picture
from megaregion.curation.pipeline import recorded_run
from megaregion.curation.stages.stage import Piece, Store
from megaregion.data.sample import BadSample, clip_regions, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.evaluation.runs import Run, state_table, write_runs
from megaregion.evaluation.scenes import read_scenes
from megaregion.export import export_checkpoint
from megaregion.files import read_records
from megaregion.schemas.evaluation import read_evaluation, write_evaluation
from megaregion.schemas.run import read_events, step_times
from megaregion.settings import check, read_settings, read_yaml, to_yaml

REFUSALS = (UserError, BadSample, BadImage, DamagedCheckpoint)
"""The errors of this project that say what is wrong with a file."""
SECONDS, BYTES = 5, 10**9
FEW, MANY = 60, int(os.environ.get("MEGAREGION_FUZZ", "3000"))
"""Inputs of each kind of file."""

Parse = Callable[[bytes], object]

HOSTILE = st.sampled_from([
    None, True, -1, 0, 1, 2.5, 10**9, 2**31, 10**23, 10**400, math.nan, math.inf, -math.inf, "", "x", "5",
    "../evil", "a/b", "\0", "load", "float32", "x" * 5000, [], [[]], {}, {"a": 1}, [1, 2], [-1, -1], [None],
    [10**12, 10**12], ["a"] * 3, [10**400],
]).map(copy.deepcopy)  # fmt: skip
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b'{"a":' * 400 + b"1" + b"}" * 400]


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """JSON with one to three of its values replaced, left out or doubled, at any depth."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(content, dict | list) or not content:
            return draw(HOSTILE)
        holder, deeper = content, True
        while deeper:
            key = draw(st.sampled_from(sorted(holder))) if isinstance(holder, dict) else _place(draw, holder)
            deeper = (
                isinstance(holder[key], dict | list) and bool(holder[key]) and draw(st.integers(0, 3)) > 0
            )
            holder, key = (holder[key], key) if deeper else (holder, key)
        match draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"])):
            case "replace":
                holder[key] = draw(HOSTILE)
            case "delete":
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[draw(st.sampled_from(["new", "", "\0", "../x", "step"]))] = copy.deepcopy(
                    draw(HOSTILE)
                )
            case _:
                holder.append(draw(HOSTILE))
    return content


def _place(draw: st.DrawFn, holder: list[Any]) -> int:
    return draw(st.integers(0, len(holder) - 1))


def cut_or_flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of which some are others, or the last are missing."""
    flips = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=8)

    def apply(change: tuple[list[tuple[int, int]], int]) -> bytes:
        found = bytearray(content)
        for place, byte in change[0]:
            found[place] = byte
        return bytes(found[: change[1]])

    ends = st.one_of(st.just(len(content)), st.integers(0, len(content)))
    return st.tuples(flips, ends).map(apply)


def json_like(content: Any, lines: bool = False) -> st.SearchStrategy[bytes]:
    """A JSON file, or one of such lines, that is damaged in any way."""
    text = json.dumps(content).encode()
    # Without spaces, so that a changed header fits in the place of the old one.
    whole = changed(content).map(lambda one: json.dumps(one, separators=(",", ":")).encode())
    found = st.one_of(
        whole, whole, whole, cut_or_flipped(text), st.sampled_from(DEEP), st.binary(max_size=40)
    )
    return st.lists(found, max_size=3).map(lambda several: b"\n".join([*several, text])) if lines else found


@dataclasses.dataclass(frozen=True)
class Target:
    """What reads a file from outside, and what such a file may hold."""

    inputs: st.SearchStrategy[bytes]
    parse: Parse


def record_target(folder: Path) -> Target:
    mask = {"size": [8, 8], "counts": [10, 20, 34]}
    regions = [
        {"kind": "object", "box": [1, 1, 5, 5], "label": 3, "score": 0.5, "mask": mask},
        {"kind": "text", "box": [0, 0, 8, 8], "text": "a", "tokens": [1, 2], "score": 1.0},
    ]
    content = {"width": 8, "height": 8, "regions": regions}
    return Target(json_like(content), lambda found: clip_regions(parse_sample(found)))


def annotation_target(folder: Path) -> Target:
    picture = Picture(np.zeros((8, 8, 3), np.uint8), None)
    rows = [
        {"segmentation": {"size": [8, 8], "counts": [10, 20, 34]}, "predicted_iou": 0.9},
        {"segmentation": {"size": [8, 8], "counts": ":d0R1"}},
        {"bbox": [1, 1, 5, 5], "segmentation": []},
    ]
    content = {"image": {"width": 8, "height": 8}, "annotations": rows}
    return Target(json_like(content), lambda found: read_annotations(found, picture))


def file_target(path: Path, inputs: st.SearchStrategy[bytes], read: Callable[[], object]) -> Target:
    """A reader of a file that is written anew for each input."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def parse(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return Target(inputs, parse)


def dataset_target(folder: Path, name: str = "dataset.json") -> Target:
    toy_dataset(folder, samples=4, shards=2)

    def read() -> None:
        dataset = ShardedDataset(str(folder), check_labels=False)
        for number in range(min(4, len(dataset))):
            dataset.read(number)
        dataset.close()

    content = (folder / name).read_bytes()
    inputs = json_like(json.loads(content)) if name.endswith(".json") else cut_or_flipped(content)
    return file_target(folder / name, inputs, read)


def index_target(folder: Path) -> Target:
    return dataset_target(folder, "shard-00000.index.npy")


def shard_target(folder: Path) -> Target:
    return dataset_target(folder, "shard-00000.tar")


def tar_target(folder: Path) -> Target:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "a.json", "ü" * 60 + ".jpg"):
            member = tarfile.TarInfo(name)
            member.size = 600
            tar.addfile(member, io.BytesIO(b"x" * 600))
    content = buffer.getvalue()

    def sealed(damaged: bytes) -> bytes:
        """With checksums that fit, so that what headers say is believed."""
        found = bytearray(damaged)
        for start in range(0, len(found) - 511, 512):
            if found[start + 257 : start + 262] == b"ustar":
                found[start + 148 : start + 156] = b" " * 8
                found[start + 148 : start + 156] = b"%06o\0 " % sum(found[start : start + 512])
        return bytes(found)

    sizes = st.sampled_from([b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0", b"-0000000001\0"])
    numbers = st.integers(0, len(content) // 512 - 1)
    huge = st.tuples(numbers, sizes).map(
        lambda one: content[: one[0] * 512 + 124] + one[1] + content[one[0] * 512 + 136 :]
    )
    long_names = tarfile.TarInfo("././@LongLink")
    long_names.type, long_names.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (long_names.tobuf() + b"a".ljust(512, b"\0")) * 2000
    inputs = st.one_of(
        cut_or_flipped(content), cut_or_flipped(content).map(sealed), huge.map(sealed), st.just(chain)
    )
    return file_target(folder / "x.tar", inputs, lambda: scan_tar(folder / "x.tar"))


def columnar_target(folder: Path, ending: str = ".parquet") -> Target:
    path = folder / f"x{ending}"
    content = save(path, table([row(n) for n in range(3)])).read_bytes()

    def read() -> None:
        found = count_rows(path, "")
        file = Columnar(path, found["column"]) if found["images"] else None
        for number in range(min(found["images"], 10)):
            for part in (file.image, file.annotation, file.caption) if file else ():
                with suppress(BadImage):
                    part(number)

    return file_target(path, cut_or_flipped(content), read)


def arrow_target(folder: Path) -> Target:
    return columnar_target(folder, ".arrow")


TINY = ModelConfig(image_size=16, patch_size=8, width=8, depth=1, heads=2, mlp_width=8, region_layers=1)


def manifest_target(folder: Path) -> Target:
    write_run(folder, config=TINY)
    path = find_checkpoint(folder) / "manifest.json"
    content = json.loads(path.read_bytes())
    # Without its seal a manifest is an old one, and what it says is believed.
    del content["seal"]

    def read() -> None:
        reader = CheckpointReader(path.parent)
        run_config(reader)
        for name in reader.names():
            reader.read(name)

    return file_target(path, json_like(content), read)


def tensors_target(folder: Path) -> Target:
    write_run(folder, config=TINY)
    path = find_checkpoint(folder) / "rank-00000.safetensors"

    def read() -> None:
        reader = CheckpointReader(path.parent)
        for name in reader.names():
            reader.read(name)

    return file_target(path, safetensors_like(path.read_bytes()), read)


def safetensors_like(content: bytes) -> st.SearchStrategy[bytes]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def same_length(text: bytes) -> bytes:
        """A header of the old length, so that the file keeps its size."""
        return content[:8] + text[:length].ljust(length) + content[8 + length :]

    lengths = st.sampled_from([0, 1, length - 1, 10**6, 2**40, 2**63, 2**64 - 1])
    return st.one_of(
        json_like(header).map(same_length),
        lengths.map(lambda size: size.to_bytes(8, "little") + content[8:]),
        cut_or_flipped(content),
    )


def huggingface_target(folder: Path, name: str = "config.json") -> Target:
    write_run(folder / "run", config=TINY)
    export_checkpoint(folder / "run", folder / "hf")
    (folder / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    path = folder / "hf" / name

    def read() -> None:
        found = open_pretrained(folder / "hf")
        for parameter in found.source.names()[:5]:
            found.read(parameter)

    content = path.read_bytes()
    inputs = safetensors_like(content) if name.endswith("tensors") else json_like(json.loads(content))
    return file_target(path, inputs, read)


def settings_target(folder: Path) -> Target:
    text = to_yaml(RunConfig()).encode()
    words = st.sampled_from(
        ["&a", "*a", "<<", "- ", "? ", ": ", "!!python/name:os.system", "{", "[", "'", "\t"]
    )
    inserted = st.tuples(st.integers(0, len(text)), words).map(
        lambda one: text[: one[0]] + one[1].encode() + text[one[0] :]
    )
    plain = changed(json.loads(json.dumps(dataclasses.asdict(RunConfig()))))
    inputs = st.one_of(cut_or_flipped(text), inserted, plain.map(lambda one: json.dumps(one).encode()))

    def read() -> None:
        check(read_settings(RunConfig(), read_yaml(folder / "run.yaml")))

    deep = st.sampled_from(
        [*DEEP, b"- " * 49_000, b"? " * 49_000, b"[{" * 400, b"&a " * 30_000, b"!a " * 30_000]
    )
    return file_target(folder / "run.yaml", st.one_of(inputs, inputs, deep), read)


def evaluation_target(folder: Path) -> Target:
    path = folder / "evaluation.json"
    write_evaluation(path, WHOLE)
    return file_target(path, json_like(json.loads(path.read_bytes())), lambda: read_evaluation(path))


def piece_target(folder: Path) -> Target:
    store, piece = Store(folder), Piece("propose", 0)
    content = {"key": "k", "files": {"x": [1, "y"]}, "counts": {}, "bad": {}, "seconds": 1.0, "version": 1}
    return file_target(store.folder(piece) / "manifest.json", json_like(content), lambda: store.read(piece))


def inputs_target(folder: Path) -> Target:
    content = {
        "version": 2, "folder": str(folder.resolve()), "digest": "d", "duplicates": 0, "others": 0,
        "outputs": 0, "formats": {".heic": 2}, "bad": {"x.tar": "damaged"},
    }  # fmt: skip
    return file_target(folder / "inputs.json", json_like(content), lambda: Source(folder, folder, 5).left_out)


def run_target(folder: Path) -> Target:
    from megaregion.curation.settings import CurationSettings

    content = {"images": "x", "settings": dataclasses.asdict(CurationSettings())}
    return file_target(folder / "run.json", json_like(content), lambda: recorded_run(folder))


def claim_target(folder: Path) -> Target:
    content = {"token": "a", "host": "b", "time": 1.0, "published": {"step-1": "x"}}
    return file_target(folder / "000001.json", json_like(content), lambda: read_claim(folder, 1))


def atlas_target(folder: Path) -> Target:
    return file_target(folder / "atlas.json", json_like({"a": 1}), lambda: _is_done(folder, {"a": 1}))


def lines_target(folder: Path) -> Target:
    content = {"step": 1, "time": 2.0, "loss": 3.0, "event": "start", "slow": [{"rank": 1}]}

    def read() -> None:
        read_events(folder)
        step_times(folder)
        read_records(folder / "metrics.jsonl")
        state_table([Run(folder).read()])
        write_runs([Run(folder).read()], folder / "page.html")

    def parse(found: bytes) -> None:
        for name in ("events.jsonl", "metrics.jsonl"):
            (folder / name).write_bytes(found)
        read()

    return Target(json_like(content, lines=True), parse)


def scenes_target(folder: Path) -> Target:
    mask = {"size": [8, 8], "counts": [10, 20, 34]}
    content = {
        "image": "a.png", "width": 8, "height": 8, "words": [{"text": "a", "box": [0, 0, 4, 4]}],
        "objects": [{"name": "cat", "instance": 1, "box": [0, 0, 4, 4], "mask": mask}],
    }  # fmt: skip
    return file_target(folder / "truth.jsonl", json_like(content, lines=True), lambda: read_scenes(folder))


def normalisation_target(folder: Path) -> Target:
    return huggingface_target(folder, "preprocessor_config.json")


def weights_target(folder: Path) -> Target:
    return huggingface_target(folder, "model.safetensors")


def weight_map_target(folder: Path) -> Target:
    return huggingface_target(folder, "model.safetensors.index.json")


TARGETS = (
    record_target, annotation_target, dataset_target, index_target, shard_target, tar_target, columnar_target,
    arrow_target, manifest_target,
    tensors_target, huggingface_target, normalisation_target, weights_target, weight_map_target,
    settings_target, evaluation_target, piece_target, inputs_target, run_target, claim_target, atlas_target,
    lines_target, scenes_target,
)  # fmt: skip


class HangError(BaseException):
    """No reader may take it for a damaged file, nor hypothesis look for a smaller input."""


@contextmanager
def ended_when_it_hangs(content: bytes) -> Iterator[None]:
    """The deadline judges what has returned; what does not return is interrupted here."""

    def interrupt(*_: object) -> None:
        raise HangError(f"{3 * SECONDS} s on {len(content)} bytes: {content[:2000]!r}")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_input_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SECONDS", 0.1)
    with pytest.raises(HangError, match=r"0\.3.* s on 4 bytes: b'name'"), ended_when_it_hangs(b"name"):
        time.sleep(60)


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.drill)])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__.removesuffix("_target"))
def test_a_hostile_file_is_read_or_refused_in_a_line(
    target: Callable[[Path], Target], examples: int, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    of = target(tmp_path)
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.now()

    @settings(
        max_examples=examples, derandomize=examples == FEW, deadline=SECONDS * 1000, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(of.inputs)
    def one(content: bytes) -> None:
        said = ""
        try:
            with ended_when_it_hangs(content):
                of.parse(content)
        except REFUSALS as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000

    one()
    assert memory.peak() - before < BYTES
