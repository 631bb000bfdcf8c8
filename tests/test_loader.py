"""Batches are the same for any ranks and workers; bad samples and dead workers are named."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import OBJECT_CLASSES, toy_config, toy_dataset

from megaregion.config import DataConfig
from megaregion.data.batch import Batch
from megaregion.data.loader import LostShard, RegionLoader, RetryingReader
from megaregion.data.order import SampleOrder, step_positions
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.errors import UserError

SEED = 3
TENSORS = ("positions", "pixels", "images", "visible", "kinds", "labels")


def make_loader(folder: Path, workers: int = 0, **changes: object) -> RegionLoader:
    config = toy_config(folder, folder)
    data: DataConfig = dataclasses.replace(config.data, workers=workers, **changes)
    dataset = ShardedDataset(folder)
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    return RegionLoader(dataset, order, Transform(data, config.model, SEED), data)


def take(
    folder: Path, positions: Sequence[Sequence[int]], workers: int = 0, **changes: object
) -> list[Batch]:
    loader = make_loader(folder, workers, **changes)
    batches = list(loader.batches(positions))
    loader.close()
    return batches


def assert_equal(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        assert (a.found.bad_keys, a.found.bad_reasons, a.found.empty) == (
            b.found.bad_keys,
            b.found.bad_reasons,
            b.found.empty,
        )
        for name in TENSORS:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def children() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("loader"), samples=40, shards=4)


def jpeg(width: int = 48, height: int = 48) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write(folder: Path, samples: dict[str, tuple[bytes, SampleRecord]], classes: int = 9) -> Path:
    with ShardWriter(folder, "shard-00000") as writer:
        for key, (image, record) in samples.items():
            writer.add(key, image, record)
    entry = writer.entry._replace(max_label=-1)
    write_dataset(folder, [entry], classes, 0)
    return folder


def one_object(box: tuple[float, float, float, float] = (0, 0, 48, 48), label: int = 1) -> SampleRecord:
    return SampleRecord(48, 48, (RegionRecord("object", box, label),))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples, five of them bad in different ways."""
    samples = {f"good{n:02d}": (jpeg(), one_object()) for n in range(35)}
    samples["truncated"] = (jpeg()[:-20], one_object())
    samples["text-file"] = (b"this is no image", one_object())
    samples["other-size"] = (jpeg(40, 48), one_object())
    samples["box-outside"] = (jpeg(), one_object((48, 0, 60, 9)))
    samples["large"] = (huge_header(), one_object())
    return write(tmp_path_factory.mktemp("damaged"), samples)


def huge_header() -> bytes:
    """A JPEG whose header says 65,000 x 65,000 pixels."""
    content = bytearray(jpeg())
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = (65_000).to_bytes(2, "big") * 2
    return bytes(content)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_batches_are_the_same_for_any_number_of_workers(folder: Path) -> None:
    positions = [range(p, p + 4) for p in range(0, 44, 4)] + [[10**12, 5], [7]]
    alone = take(folder, positions)
    assert [batch.positions.tolist() for batch in alone] == [list(p) for p in positions]
    for workers in (1, 3):
        assert_equal(take(folder, positions, workers), alone)


@pytest.mark.parametrize("ranks", [2, 4])
def test_batches_are_the_same_for_any_number_of_ranks(folder: Path, ranks: int) -> None:
    whole = take(folder, [step_positions(step, 16, 0, 1, 0, 1) for step in range(3)])
    parts = [take(folder, [step_positions(s, 16, 0, 1, r, ranks) for s in range(3)]) for r in range(ranks)]
    for step, batch in enumerate(whole):
        assert batch.keys == [key for part in parts for key in part[step].keys]
        for name in TENSORS:
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(getattr(batch, name), joined), name


def test_shapes_are_those_of_the_config(folder: Path) -> None:
    (batch,) = take(folder, [range(5)])
    assert batch.images.shape == (5, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.visible.shape == (5, 3, 16)
    assert batch.visible.any(dim=-1).all()
    assert batch.labels.shape == (5, 3, 4)
    objects = batch.labels[batch.kinds == 0]
    assert (objects[:, 0] >= 0).all()
    assert (objects[:, 1:] == -1).all()
    assert int(objects.max()) < OBJECT_CLASSES


class Stream:
    """Notes what a GPU's queues are told."""

    said: ClassVar[list[object]] = []

    def __init__(self, name: object) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.said.append(f"{self.name} takes")

    def __exit__(self, *_: object) -> None:
        self.said.append(f"{self.name} took")


def test_a_batch_goes_to_a_gpu_by_a_queue_of_its_own_for_which_what_is_computed_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = take(folder, [range(5)])
    computes = Stream("computing")
    monkeypatch.setattr("megaregion.data.batch._copying", lambda device: Stream("copying"))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: computes)
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda own, stream: kept.append(stream))
    with FakeTensorMode() as fake:
        assert batch._each(fake.from_tensor).to("cuda:0").pixels.is_cuda
    assert Stream.said == ["copying takes", "copying took", "computing waits for copying"]
    assert kept == [computes] * 5, "their memory is given back before they were read"


def test_global_random_state_is_neither_read_nor_changed(folder: Path) -> None:
    def state() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    for workers in (0, 1):
        before = state()
        first = take(folder, [range(4)], workers)
        assert state() == before
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        assert_equal(take(folder, [range(4)], workers), first)


def test_endless_positions_are_read_only_as_far_as_workers_prefetch(folder: Path) -> None:
    asked = []

    def positions() -> Iterator[list[int]]:
        for step in itertools.count():
            asked.append(step)
            yield [2 * step, 2 * step + 1]

    loader = make_loader(folder, workers=2, prefetch=2)
    stream = loader.batches(positions())
    next(stream)
    assert len(asked) <= 1 + 2 * 2
    loader.close()


def test_closing_stops_the_workers(folder: Path) -> None:
    before = children()
    loader = make_loader(folder, workers=2)
    stream = loader.batches([p] for p in itertools.count())
    next(stream)
    assert len(children() - before) == 2
    loader.close()
    assert children() == before
    assert next(stream, None) is None


def test_a_forgotten_stream_stops_its_workers(folder: Path) -> None:
    before = children()
    stream = make_loader(folder, workers=1).batches([p] for p in itertools.count())
    next(stream)
    del stream
    gc.collect()
    assert children() == before


def test_a_killed_worker_ends_with_an_error_that_names_it(folder: Path) -> None:
    before = children()
    loader = make_loader(folder, workers=2)
    stream = loader.batches([p] for p in itertools.count())
    next(stream)
    victim = max(children() - before)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(
        UserError, match=rf"worker \d \(pid {victim}, killed by SIGKILL\).* lower data\.workers \(2\)"
    ):
        for _ in stream:
            pass
    assert children() == before


def test_a_dead_worker_does_not_interrupt_the_program_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process that has had no loader of torch's yet.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = children()
    loader = make_loader(folder, workers=1)
    stream = loader.batches([p] for p in itertools.count())
    next(stream)
    os.kill(max(children() - before), signal.SIGKILL)
    time.sleep(0.3)  # here the run might be saving a checkpoint
    loader.close()


def test_a_worker_that_hangs_does_not_keep_the_run_from_ending(folder: Path) -> None:
    before = children()
    loader = make_loader(folder, workers=1)
    stream = loader.batches([p] for p in itertools.count())
    next(stream)
    (worker,) = children() - before
    os.kill(worker, signal.SIGSTOP)
    loader.close()
    assert children() == before


def test_workers_leave_the_signals_of_a_run_to_the_run(folder: Path) -> None:
    before = children()
    loader = make_loader(folder, workers=1)
    stream = loader.batches([p] for p in itertools.count())
    next(stream)
    (worker,) = children() - before
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker, number)
    assert [next(stream).positions.tolist() for _ in range(6)] == [[p] for p in range(1, 7)]
    loader.close()
    assert children() == before


def test_a_program_that_ends_without_closing_does_not_hang(folder: Path, tmp_path: Path) -> None:
    program = f"""
        import itertools
        from pathlib import Path
        from test_loader import make_loader
        stream = make_loader(Path({str(folder)!r}), workers=2).batches([p] for p in itertools.count())
        next(stream)
        try:
            raise ValueError("its traceback keeps the stream alive")
        except ValueError as error:
            raise SystemExit(5) from error
    """
    # A file and no pipe: a worker left over would keep a pipe open, and the test waiting.
    with (tmp_path / "stderr").open("wb") as stderr:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=stderr,
            timeout=60,
            check=False,
        )
    assert done.returncode == 5, (tmp_path / "stderr").read_text()


def test_training_reads_the_ramp_of_a_sixteen_bit_png_in_a_shard(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 48).astype(np.uint16)[None].repeat(48, 0)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "PNG")
    folder = write(tmp_path, {"ramp": (stream.getvalue(), one_object())})
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    [batch] = take(folder, [[0]], **whole)
    assert batch.found.bad == 0
    assert batch.pixels.dtype == torch.uint8
    row = batch.pixels[0].float().mean(dim=(0, 1))
    expected = torch.from_numpy(np.interp(np.linspace(0, 1, len(row)), [0, 1], [0, 255])).float()
    assert (row - expected).abs().max() < 3


def test_bad_samples_are_replaced_counted_and_named(damaged: Path) -> None:
    positions = [range(p, p + 8) for p in range(0, 40, 8)]
    batches = take(damaged, positions, max_bad_share=1.0)
    named = dict(
        zip(
            [k for b in batches for k in b.found.bad_keys],
            [r for b in batches for r in b.found.bad_reasons],
            strict=True,
        )
    )
    assert set(named) == {"truncated", "text-file", "other-size", "box-outside", "large"}
    assert "image cannot be decoded" in named["truncated"]
    assert "image cannot be opened" in named["text-file"]
    assert "image has 40 x 48 pixels, its record says 48 x 48" in named["other-size"]
    assert "no region with area inside" in named["box-outside"]
    assert "DecompressionBomb" in named["large"]
    assert sum(batch.found.bad for batch in batches) >= 5
    assert all(key.startswith("good") for batch in batches for key in batch.keys)
    assert [p for batch in batches for p in batch.positions.tolist()] == list(range(40))


def test_replacements_are_the_same_for_any_workers(damaged: Path) -> None:
    positions = [range(p, p + 8) for p in range(0, 40, 8)]
    alone = take(damaged, positions, max_bad_share=1.0)
    assert_equal(take(damaged, positions, workers=2, max_bad_share=1.0), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(damaged: Path, workers: int) -> None:
    loader = make_loader(damaged, workers, max_bad_share=0.01)
    stream = loader.batches([p] for p in itertools.count())
    with pytest.raises(UserError, match=r"11 of \d+ samples of .* more than data\.max_bad_share 0\.01 .*: "):
        for _ in stream:
            pass


def test_one_bad_sample_is_one_too_many_where_none_is_allowed(damaged: Path) -> None:
    with pytest.raises(UserError, match=r"1 of \d+ samples of .* could not be used"):
        take(damaged, [[p] for p in range(40)], max_bad_share=0.0)


def test_a_dataset_without_a_usable_sample_is_given_up(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"bad{n}": (b"no image", one_object()) for n in range(3)})
    with pytest.raises(
        UserError, match=r"no usable sample in 100 tries for position 5; bad samples: bad\d, "
    ):
        take(folder, [[5]], max_bad_share=1.0)


def test_an_image_without_a_region_in_its_crop_is_replaced_but_not_bad(tmp_path: Path) -> None:
    samples = {"corner": (jpeg(), one_object((0, 0, 2, 2))), "full": (jpeg(), one_object())}
    folder = write(tmp_path, samples)
    changes = {"crop_scale": (0.3, 0.3), "min_visible": 0.1, "max_bad_share": 0.0}
    batches = take(folder, [range(p, p + 10) for p in range(0, 50, 10)], **changes)
    assert sum(batch.found.empty for batch in batches) > 0
    assert sum(batch.found.bad for batch in batches) == 0
    assert sum(batch.keys.count("full") for batch in batches) > 25


def test_regions_outside_their_image_are_dropped_and_counted(tmp_path: Path) -> None:
    inside, outside = RegionRecord("object", (-9, 0, 48, 70), 1), RegionRecord("object", (50, 0, 60, 9), 2)
    folder = write(tmp_path, {"x": (jpeg(), SampleRecord(48, 48, (outside, inside, outside)))})
    (batch,) = take(folder, [range(3)])
    assert batch.found.dropped_regions == 6
    assert batch.found.bad == 0
    assert batch.labels[..., 0].unique().tolist() == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_outside_the_label_space_names_sample_region_and_value(tmp_path: Path, workers: int) -> None:
    regions = (*one_object(label=8).regions, *one_object(label=9).regions)
    folder = write(tmp_path, {"poster": (jpeg(), SampleRecord(48, 48, regions))}, classes=9)
    with pytest.raises(UserError) as caught:
        take(folder, [[0]], workers)
    assert str(caught.value).startswith(
        "sample 'poster', region 1: object label 9 is outside the label space of 9 classes"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_off_during_the_run_is_named(tmp_path: Path, workers: int) -> None:
    folder = write(tmp_path, {f"x{n}": (jpeg(), one_object()) for n in range(20)})
    loader = make_loader(folder, workers)
    os.truncate(folder / "shard-00000.tar", 4096)
    with pytest.raises(UserError, match=r"shard-00000\.tar ends early"):
        list(loader.batches([range(20)]))


def test_a_shard_that_comes_back_within_the_pauses_costs_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    expected = take(tmp_path / "shards", [range(40)])
    loader = make_loader(tmp_path / "shards", read_pause=0.2)
    shard, aside = tmp_path / "shards" / "shard-00002.tar", tmp_path / "aside"
    shard.rename(aside)
    threading.Timer(0.3, aside.rename, [shard]).start()
    assert_equal(list(loader.batches([range(40)])), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_stays_away_is_skipped_named_and_counted(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    (expected,) = take(tmp_path / "shards", [range(40)])
    loader = make_loader(tmp_path / "shards", workers, read_retries=2, read_pause=0.01, max_bad_share=1.0)
    (tmp_path / "shards" / "shard-00002.tar").unlink()
    (batch,) = loader.batches([range(40)])
    loader.close()
    assert batch.found.lost >= 10, "all ten samples of the shard, and what may have stood in for them"
    assert "shard-00002 is skipped after 3 tries" in batch.found.bad_reasons[0]
    assert set(batch.found.bad_reasons[1:]) == {"shard-00002 is skipped, it could not be read"}
    whole = [i for i, key in enumerate(expected.keys) if key in batch.keys and batch.keys[i] == key]
    assert len(whole) == 30
    assert torch.equal(batch.pixels[whole], expected.pixels[whole])


def test_ranks_that_share_a_model_end_the_run_rather_than_read_different_samples(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    dataset = ShardedDataset(tmp_path / "shards")
    config = toy_config(folder, folder)
    data = dataclasses.replace(config.data, workers=0, read_retries=0)
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    transform = Transform(data, config.model, SEED)
    loader = RegionLoader(dataset, order, transform, data, skips_lost=False)
    (tmp_path / "shards" / "shard-00002.tar").unlink()
    with pytest.raises(LostShard, match="shard-00002"):
        list(loader.batches([range(40)]))


def test_a_storage_that_is_gone_is_no_mistake_of_the_user(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    loader = make_loader(tmp_path / "shards", read_retries=0)
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    with pytest.raises(LostShard):
        list(loader.batches([range(40)]))


def test_a_lost_shard_is_tried_again_after_a_while(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    monkeypatch.setattr("megaregion.data.loader.RETRY_LOST_AFTER", 0.05)
    reader = RetryingReader(ShardedDataset(tmp_path / "shards"), retries=0, pause=0)
    shard, aside = tmp_path / "shards" / "shard-00000.tar", tmp_path / "aside"
    shard.rename(aside)
    with pytest.raises(LostShard, match="after 1 tries"):
        reader.read(0)
    aside.rename(shard)
    with pytest.raises(LostShard, match="is skipped, it"):
        reader.read(0)
    time.sleep(0.06)
    assert reader.read(0).key
