"""A remote dataset gives the same batches as a local one, through a cache that keeps its bound."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.implementations.memory
import pytest
import torch
from toy import toy_config, toy_dataset

from megaregion.config import DataConfig
from megaregion.data.loader import RegionLoader
from megaregion.data.order import SampleOrder
from megaregion.data.remote import Cache, Mirror, Prefetcher, index_bytes
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.errors import UserError

SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("remote") / "a folder", samples=40, shards=8)


def settings(cache: Path, **changes: object) -> DataConfig:
    config = toy_config(cache, cache).data
    return dataclasses.replace(
        config, cache=str(cache), read_pause=0.01, **{"window_shards": 2, "max_bad_share": 1.0, **changes}
    )


def loader(path: str | Path, data: DataConfig) -> RegionLoader:
    dataset = ShardedDataset(path, settings=data)
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    return RegionLoader(dataset, order, Transform(data, toy_config(Path(), Path()).model, SEED), data)


def shard_bytes(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*.tar")) + index_bytes(5)


def held(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*/*") if not path.name.endswith(".lock")]


def in_memory(folder: Path, name: str) -> str:
    """The dataset in fsspec's memory, which forked workers share."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/{name}/{path.name}", path.read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("kind", ["file", "memory", "pipe"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_local_folder(folder: Path, tmp_path: Path, kind: str, workers: int) -> None:
    urls = {
        "file": f"file://{folder}",
        "memory": in_memory(folder, "same"),
        "pipe": f"pipe:cat '{folder}'/{{}}",
    }
    positions = [range(p, p + 8) for p in range(0, 48, 8)]
    # No room for two windows: shards go while others come.
    bound = 2 * shard_bytes(folder) + 20_000
    data = settings(tmp_path, workers=workers, cache_bytes=bound)
    near, far = loader(folder, data), loader(urls[kind], data)
    for ours, theirs in zip(far.batches(positions), near.batches(positions), strict=True):
        assert (ours.keys, ours.found.bad_reasons) == (theirs.keys, [])
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.visible, theirs.visible)
    far.close()
    near.close()
    assert sum(path.stat().st_size for path in held(tmp_path)) <= bound
    # A worker that was stopped in the middle of a file leaves its part, which the next that needs room takes.
    assert workers or not list(tmp_path.glob("*/*.partial"))


def test_only_what_is_read_is_brought_and_the_next_window_with_it(folder: Path, tmp_path: Path) -> None:
    data = settings(tmp_path)
    dataset = ShardedDataset(f"file://{folder}", settings=data)
    assert not list(tmp_path.glob("*/*.tar"))
    order = SampleOrder(dataset.info.shard_sizes, SEED, 2)
    assert dataset.mirror is not None
    prefetcher = Prefetcher(dataset.mirror, order)
    prefetcher.reached(0)
    prefetcher.join()
    here, following = order.windows(0)
    names = {f"{dataset.info.shards[number].name}.tar" for number in (*here, *following)}
    assert {path.name for path in tmp_path.glob("*/*.tar")} == names
    assert {dataset.shard_of(order.sample(p)) for p in range(10)} == set(here)
    assert {dataset.shard_of(order.sample(p)) for p in range(10, 20)} == set(following)
    assert order.windows(39)[1] == order.windows(40)[0], "the next epoch's first window"


def bring_and_log(path: Path, cache: Path, log: Path) -> None:
    def pieces() -> Iterator[bytes]:
        with log.open("a") as file:
            file.write("brought\n")
        yield bytes(1000)

    Cache(cache, 10_000).fetch(path, pieces(), 1000, None)


def test_processes_that_want_one_file_bring_it_once(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "set" / "a.tar", tmp_path, tmp_path / "log")
    processes = [context.Process(target=bring_and_log, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "log").read_text() == "brought\n"
    assert (tmp_path / "set" / "a.tar").stat().st_size == 1000


def test_what_was_used_longest_ago_and_what_was_abandoned_makes_room(tmp_path: Path) -> None:
    cache, folder = Cache(tmp_path, 3_500), tmp_path / "set"
    folder.mkdir()
    (folder / ".killed.tar.partial").write_bytes(bytes(3_000))
    (folder / "centers.npy").write_bytes(bytes(400))

    def bring(name: str) -> None:
        cache.fetch(folder / name, iter([bytes(500), bytes(500)]), 1000, None)

    for name in ("a.tar", "b.tar", "c.tar", "a.tar", "d.tar"):
        bring(name)
    assert {path.name for path in held(tmp_path)} == {"centers.npy", "a.tar", "c.tar", "d.tar"}
    with pytest.raises(OSError, match=r"no room for 3,200 bytes more: 400 of data\.cache_bytes 3,500"):
        cache.fetch(folder / "large.tar", iter([]), 3_200, None)


def test_a_shard_that_arrives_short_or_changed_is_refused_and_told(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("shard-00000.tar", "shard-00001.tar"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-512] if name.endswith("0.tar") else b"?" + content[1:])
    data = settings(tmp_path / "cache", read_retries=1)
    (batch,) = loader(f"file://{copy}", data).batches([range(40)])
    told = "\n".join(batch.found.bad_reasons)
    assert "shard-00000 is skipped after 2 tries" in told
    assert "shard-00000.tar cannot be had: " in told
    assert "bytes arrived" in told
    assert "shard-00001.tar cannot be had: what arrived is another file" in told
    assert batch.found.lost >= 10
    assert not list(tmp_path.glob("cache/*/shard-0000[01].tar"))


def test_a_dataset_that_is_packed_anew_does_not_mix_with_the_old(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = Mirror(f"file://{copy}", settings(tmp_path / "cache"))
    content = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(content | {"shards": content["shards"][::-1]}))
    assert Mirror(f"file://{copy}", settings(tmp_path / "cache")).folder != first.folder


@pytest.mark.parametrize(
    ("url", "changes", "text"),
    [
        ("nowhere://x/y", {}, r"data\.path nowhere://x/y cannot be used \(.*nowhere.*name a folder, s3://"),
        ("memory://absent", {}, r"memory://absent/dataset\.json does not exist"),
        ("pipe:cat /data", {}, r"pipe:cat /data must have \{\} in place of the file's name"),
        (
            "pipe:echo no such bucket >&2; false {}",
            {},
            r"cannot be read \(the command ended .* 1: no such bucket",
        ),
        ("HERE", {"cache_bytes": 9_999}, r"data\.cache_bytes must hold .* data\.window_shards 2, got 9,999"),
        ("HERE", {"cache": "/proc/none"}, r"data\.cache /proc/none cannot be written"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(
    folder: Path, tmp_path: Path, url: str, changes: dict[str, object], text: str
) -> None:
    data = dataclasses.replace(settings(tmp_path), **changes)
    with pytest.raises(UserError, match=text) as caught:
        ShardedDataset(f"file://{folder}" if url == "HERE" else url, settings=data)
    assert "\n" not in str(caught.value)


class Locked(fsspec.implementations.memory.MemoryFileSystem):
    """A storage that answers as s3fs does when nobody has said who asks."""

    def open(self, *_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")


class NoCredentialsError(Exception):
    pass


def test_missing_credentials_and_a_missing_package_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Locked(), url))
    with pytest.raises(UserError, match=r"s3://b/s/dataset\.json may not be read .*credentials.*AWS_PROFILE"):
        ShardedDataset("s3://b/s", settings=settings(tmp_path))

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"data\.path s3://b/s needs a package .* Install s3fs to access S3"):
        ShardedDataset("s3://b/s", settings=settings(tmp_path))
