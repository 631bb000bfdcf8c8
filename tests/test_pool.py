"""Memory that batches travel in is used again, and never while a tensor still lies in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy import toy_dataset

from megaregion.config import DataConfig, ModelConfig
from megaregion.data.batch import GROWTH, Lease, Pool
from megaregion.data.loader import RegionLoader
from megaregion.data.order import SampleOrder
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Transform


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(workers=2, pieces=2)
    yield made
    made.close()


def taken(pool: Pool, worker: int, size: int = 8) -> Lease:
    found = pool.take(worker, size)
    assert found is not None
    return found[0]


def lies_in_a_pool(tensor: torch.Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return "memfd:batch" in line
    return False


def test_a_piece_is_free_when_the_last_view_of_it_is_gone(pool: Pool) -> None:
    lease = taken(pool, 1)
    memory = lease.open()
    view = memory[2:4].view(torch.int16)
    del memory
    assert taken(pool, 1).piece != lease.piece
    assert pool.take(1, 8) is None
    del view
    assert taken(pool, 1).piece == lease.piece


def test_workers_share_no_piece(pool: Pool) -> None:
    pieces = {taken(pool, worker).piece for worker in (0, 0, 1, 1)}
    assert len(pieces) == 4
    assert pool.take(0, 8) is None


def test_what_one_process_writes_another_reads_though_the_piece_has_grown(pool: Pool) -> None:
    for size in (3, GROWTH + 1, 10 * GROWTH):
        child = os.fork()
        if not child:
            lease, memory = pool.take(0, size) or (None, torch.empty(0))
            memory.numpy().fill(7)  # torch's threads are the parent's
            os._exit(0 if lease == Lease(pool.number, 0, size) else 1)
        assert os.waitpid(child, 0)[1] == 0
        memory = Lease(pool.number, 0, size).open()
        assert memory.shape == (size,)
        assert (memory == 7).all()
        del memory


def test_what_is_open_stays_readable_after_the_pool_is_closed() -> None:
    pool = Pool(workers=1, pieces=1)
    lease = taken(pool, 0)
    memory = lease.open()
    memory.fill_(5)
    pool.close()
    del pool
    assert memory.tolist() == [5] * 8


def test_no_file_stays_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    pool = Pool(workers=2, pieces=3)
    lease = taken(pool, 0)
    lease.open().fill_(1)
    pool.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_what_is_kept_of_a_batch_is_not_written_over(tmp_path: Path) -> None:
    dataset = ShardedDataset(toy_dataset(tmp_path, samples=40, shards=4))
    model = ModelConfig(image_size=32, patch_size=8)

    def pixels(workers: int) -> list[torch.Tensor]:
        data = DataConfig(path=str(tmp_path), workers=workers, prefetch=1)
        order = SampleOrder(dataset.info.shard_sizes, 0, 2)
        loader = RegionLoader(dataset, order, Transform(data, model, 0), data)
        kept, own = [], 0
        for step, batch in enumerate(loader.batches(range(4 * s, 4 * s + 4) for s in range(24))):
            own += not lies_in_a_pool(batch.pixels)
            # For a while all is kept, more than the pool has, and then one row of every fourth batch.
            if step < 10 or step % 4 == 0:
                kept.append(batch.pixels if step < 10 else batch.pixels[1])
            if step == 10:
                kept[:] = [tensor[1] for tensor in kept[::2]]
        loader.close()
        assert (0 < own < 24) if workers else own == 24
        return kept

    alone = pixels(0)
    for workers in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(pixels(workers), alone, strict=True))
