"""Exact k-means: the nearest of all centers, its passes, kills, ranks, and embeddings that are odd."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch

from benchmark.kmeans import gaussian_features
from megaregion.curation import kmeans
from megaregion.curation.embeddings import Embeddings, evenly, rows_in, unit
from megaregion.curation.kmeans import (
    Pass,
    add_up,
    assign,
    find_centers,
    first_guess,
    nearest,
    passes,
    share_out,
)
from megaregion.curation.settings import ClusterSettings
from megaregion.errors import UserError
from megaregion.parallel import topology

PLAN = ClusterSettings(clusters=40, cluster_iterations=16, cluster_seed=3, first_level=5)


def features(count: int = 1200, channels: int = 24, spread: float = 1.2) -> np.ndarray:
    return gaussian_features(count, channels, 40, spread).astype(np.float16)


def cluster(embeddings: Embeddings, settings: ClusterSettings) -> torch.Tensor:
    *_, last = passes(embeddings, settings)
    return last.centers


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)


def exact(vectors: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    return (vectors.double() @ centers.double().T).argmax(1)


def inertia(vectors: torch.Tensor, centers: torch.Tensor) -> float:
    return float((2 - 2 * nearest(vectors, centers).best).sum())


# The nearest of all centers


@pytest.mark.parametrize("tile", [(3, 5), (1024, 2048)])
@pytest.mark.parametrize(
    "precisions", [(torch.float32, torch.float64), (torch.float16, torch.float32, torch.float64)]
)
def test_the_nearest_center_is_that_of_all_scores_whatever_the_tiles_and_the_precision(
    tile: tuple[int, int], precisions: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kmeans.TILE, "cpu", tile)
    monkeypatch.setitem(kmeans.LADDER, "cpu", precisions)
    vectors, centers = (
        tensor(gaussian_features(300, 16, 60, 2.0)),
        tensor(gaussian_features(97, 16, 60, 2.0, 1)),
    )
    scores = vectors.double() @ centers.double().T
    found = nearest(vectors, centers)
    assert torch.equal(found.labels, scores.argmax(1))
    assert torch.allclose(found.best.double(), scores.amax(1), atol=1e-6), "whatever the first precision"
    second = scores.topk(2).values[:, 1]
    assert (found.other >= second).all()
    assert (found.other - second).max() < 3 * kmeans.ROUNDING[precisions[0]]
    assert torch.equal(nearest(vectors, centers, but=found.labels).labels, scores.topk(2).indices[:, 1])


@pytest.mark.parametrize(("group", "tile"), [(4, (32, 64)), (64, (1024, 2048))])
@pytest.mark.parametrize("out", [0, 1, 3])
def test_products_of_8_bits_leave_out_no_center_that_is_looked_for(
    out: int, group: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(group)
    # Few channels are large, as those of a network, so 8 bits are few for the others.
    sizes = rng.pareto(1.5, 24).astype(np.float32)
    vectors, centers = (tensor(unit(gaussian_features(n, 24, 60, 2.0, n) * sizes)) for n in (500, 1037))
    centers[700], centers[3] = centers[20], 0
    vectors[0] = centers[20]
    but = tensor(rng.integers(0, len(centers), (len(vectors), out))) if out else None
    plain = kmeans.scan(vectors, centers, but)
    pieces: list[int] = []
    scored = kmeans._beaten
    monkeypatch.setattr(kmeans, "multiplies_bytes", lambda: True)
    monkeypatch.setattr(
        kmeans, "_beaten", lambda now, scores, numbers: (
            pieces.append(scores.numel()) or scored(now, scores, numbers)
        ),
    )  # fmt: skip
    for name, value in (("MANY", 100), ("BLOCK", 300), ("GROUP", group)):
        monkeypatch.setattr(kmeans, name, value)
    monkeypatch.setitem(kmeans.TILE, "cpu", tile)
    coded = kmeans.scan(vectors, centers, but)
    assert sum(pieces) < (0.4 if group == 4 else 0.8) * len(vectors) * len(centers), "most are left out"
    sure = plain.best - plain.other > kmeans.SLACK
    assert torch.equal(coded.labels[sure], plain.labels[sure])
    for found, exact in zip(coded[1:], plain[1:], strict=True):
        torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    scores, labels = vectors.double() @ centers.double().T, nearest(vectors, centers, but).labels
    if but is not None:
        scores.scatter_(1, but, -torch.inf)
    assert (scores.gather(1, labels[:, None])[:, 0] >= scores.amax(1) - 1e-9).all()
    assert out or labels[0] == 20, "of equally near centers the first"


@pytest.mark.parametrize("tile", [(3, 5), (1024, 2048)])
def test_of_equally_near_centers_the_first_is_chosen(
    tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kmeans.TILE, "cpu", tile)
    # Cosines of such unit vectors are multiples of 1/16, exact in whatever order one adds: many are equal.
    vectors, centers = (
        np.random.default_rng(n).choice([-0.25, 0.25], (n, 16)).astype(np.float32) for n in (40, 23)
    )
    cosines = vectors @ centers.T
    best = cosines.max(axis=1, keepdims=True)
    assert ((cosines == best).sum(axis=1) > 1).any(), "some vectors have several nearest centers"
    labels = nearest(tensor(vectors), tensor(centers)).labels
    assert np.array_equal(labels.numpy(), (cosines == best).argmax(axis=1))
    twice = unit(np.random.default_rng(0).standard_normal((7, 100), dtype=np.float32))
    assert (nearest(tensor(twice), tensor(np.tile(twice, (9, 1)))).labels == torch.arange(7)).all()


on_linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="triton has wheels for Linux only"
)
INTERPRETED = """
import torch
from megaregion.curation.kmeans import scan
from megaregion.curation.nearest_kernel import scan_all

def compare(n, k, channels, outs):
    generator = torch.Generator().manual_seed(n)
    vectors, centers = (
        torch.nn.functional.normalize(torch.randn(rows, channels, generator=generator)).half()
        for rows in (n, k)
    )
    centers[k // 2] = centers[0]
    vectors[0] = centers[0]
    but = torch.stack([torch.randperm(k, generator=generator)[:outs] for _ in range(n)]) if outs else None
    if outs:
        but[0] = k + 7
    found, right = scan_all(vectors, centers, but), scan(vectors.double(), centers.double(), but)
    for mine, exact in zip(found[1:], right[1:]):
        torch.testing.assert_close(mine.double(), exact, atol=1e-3, rtol=0)
    sure = right.best - right.other > 2e-3
    assert sure.any() or k < 3
    assert torch.equal(found[0][sure], right.labels[sure])
    assert k == 1 or found[0][0] == 0, "of equally near centers the first"
    if outs:
        assert not (found[0][:, None] == but).any()

compare(5, 300, 24, 0)
compare(130, 140, 70, 3)
compare(3, 1, 16, 0)
"""


@on_linux
def test_the_kernel_that_writes_no_score_finds_the_nearest_of_all(tmp_path: Path) -> None:
    """In a process of its own, since Triton decides at import whether to interpret."""
    script = tmp_path / "compare.py"
    script.write_text(INTERPRETED)
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@on_linux
@pytest.mark.parametrize(("arch", "room"), [(80, 163), (90, 227), (100, 227)])
def test_the_kernel_compiles_for_gpus_without_spills(arch: int, room: int, tmp_path: Path) -> None:
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megaregion.curation import nearest_kernel as kernel

    constants = {"ROWS": kernel.tile_rows(arch // 10), "CENTERS": kernel.CENTERS, "DEPTH": kernel.DEPTH}
    types = dict.fromkeys(kernel.scan_tiles.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"vectors": "*fp16", "centers": "*fp16", "but": "*i64", "labels": "*i64"}
    types |= {"best": "*fp32", "second": "*fp32"}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.scan_tiles.arg_names)
        if types[name].startswith("*") or name == "channels"
    }
    source = ASTSource(fn=kernel.scan_tiles, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": kernel.WARPS, "num_stages": kernel.STAGES}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    (tmp_path / "kernel.cubin").write_bytes(found.asm["cubin"])
    command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-res-usage", tmp_path / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    print(f"sm_{arch}: {registers} registers, {found.metadata.shared} bytes shared")
    assert int(stack) == 0, "what does not fit the registers is spilled there"
    assert found.metadata.shared <= room * 1024


def test_one_center_is_everybodys_and_no_vector_has_none() -> None:
    vectors = tensor(gaussian_features(5, 8, 3, 0.5))
    found = nearest(vectors, vectors[:1])
    assert found.labels.tolist() == [0] * 5
    assert (found.other == -torch.inf).all()
    assert nearest(vectors[:0], vectors).labels.shape == (0,)


# A pass


@pytest.mark.parametrize("step", [0.0, 0.003, 0.03, 0.3])
def test_what_bounds_leave_out_changes_no_label(step: float) -> None:
    vectors = tensor(gaussian_features(2000, 32, 100, 0.7))
    centers = tensor(find_centers(vectors.numpy(), 100, 3, 0)[0])
    known, scores = assign(vectors, centers, None, torch.zeros(100))
    assert scores == 2000 * 100
    rng = np.random.default_rng(1)
    least = scores
    for _ in range(4):
        shift = (
            rng.standard_normal(centers.shape, dtype=np.float32)
            * step
            * rng.random((100, 1), dtype=np.float32) ** 3
        )
        new = centers + tensor(shift)
        new[rng.integers(100, size=3)] = vectors[rng.integers(2000, size=3)]
        new = torch.nn.functional.normalize(new)
        known, scores = assign(vectors, new, known, (new - centers).norm(dim=1))
        centers = new
        least = min(least, scores)
        assert torch.equal(known.labels, exact(vectors, centers))
        ranked = (vectors @ centers.T).scatter(1, known.labels[:, None], -2)
        assert (known.other >= ranked.amax(1) - 1e-6).all()
    assert least < (0.1 if step < 0.01 else 0.9) * 2000 * 100


def test_sums_of_segments_are_those_of_the_rows_and_do_not_overflow_16_bits() -> None:
    vectors = tensor(features().astype(np.float32))
    labels = torch.arange(len(vectors)) * 7 % 50
    sums, sorted_sums = torch.zeros(60, 24), torch.zeros(60, 24)
    add_up(sums, vectors, labels)
    kmeans._add_segments(sorted_sums, vectors, labels)
    right = torch.stack([vectors[labels == label].double().sum(0) for label in range(60)])
    assert torch.allclose(sums.double(), right, atol=1e-4)
    assert torch.allclose(sorted_sums.double(), right, atol=1e-4)
    # 80,000 rows along one axis: 16-bit numbers end at 65,504.
    rows = np.zeros((80_010, 4), dtype=np.float16)
    rows[:80_000, 0] = rows[80_000:, 1] = 1
    centers = cluster(Embeddings([rows], 512), ClusterSettings(2, 4, 0))
    assert sorted(centers.round().tolist()) == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_each_pass_is_nearer_and_ends_below_flat_k_means_with_faiss() -> None:
    vectors = gaussian_features(4000, 64, 400, 1.0)
    embeddings = Embeddings([vectors], 512)
    plan = ClusterSettings(400, 20, 0, first_level=20)
    guess, told = first_guess(embeddings, plan), list(passes(embeddings, plan))
    centers = told[-1].centers
    flat = inertia(tensor(vectors), tensor(find_centers(vectors, 400, 25, 0)[0]))
    assert inertia(tensor(vectors), centers) < 0.97 * flat
    assert inertia(tensor(vectors), guess) > 1.1 * flat
    assert (np.diff([each.cosine for each in told]) > -1e-6).all()
    assert told[0].exchanged > 20
    assert told[0].scored == 1
    assert sum(each.scored for each in told) < 0.6 * len(told)
    assert torch.allclose(centers.norm(dim=1), torch.ones(400), atol=1e-5)


def test_an_empty_center_takes_half_of_the_cluster_that_gains_most() -> None:
    rng = np.random.default_rng(0)
    means = np.eye(4, 8, dtype=np.float32)
    rows = unit(np.repeat(means, 30, axis=0) + 0.05 * rng.standard_normal((120, 8), dtype=np.float32))
    embeddings = Embeddings([rows], 512)
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 30)
    sums = torch.zeros(4, 8)
    add_up(sums, tensor(rows), labels)
    centers = torch.nn.functional.normalize(sums)
    centers[3, 7] = 1
    known = [kmeans.Nearest(labels, labels, labels)]
    taken = kmeans.exchange(embeddings, centers, sums, torch.bincount(labels, minlength=4), known, 0)
    assert taken == 1
    assert sorted((centers @ tensor(means).T).argmax(1).tolist()) == [0, 1, 2, 3]


# Bytes


def test_threads_change_no_bit_and_the_seed_does() -> None:
    embeddings = Embeddings([features()], 512)
    one = cluster(embeddings, PLAN)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        three = cluster(Embeddings([features()], 512), PLAN)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)
    assert not torch.equal(one, cluster(embeddings, ClusterSettings(40, 16, 4, 5)))


def test_a_kill_after_any_pass_costs_that_pass_and_no_bit(tmp_path: Path) -> None:
    embeddings, path = Embeddings([features()], 512), tmp_path / "pass.npz"
    whole = list(passes(embeddings, PLAN))
    assert len(whole) > 4
    assert whole[-1].settled
    for kept in (whole[0], whole[2], whole[-1]):
        kept.save(path, "key")
        rest = list(passes(embeddings, PLAN, Pass.load(path, "key")))
        assert [each.number for each in rest] == [each.number for each in whole[kept.number :]]
        for one, other in zip(rest, whole[kept.number :], strict=True):
            assert torch.equal(one.centers, other.centers)
            assert one[:3] == other[:3]
    assert Pass.load(path, "another") is None, "what another key left is not believed"
    path.write_bytes(b"half")
    assert Pass.load(path, "key") is None


def _cluster_on_ranks(out: str) -> None:
    place = topology.join(1)
    for name, rows in (("plain", features()), ("odd", odd_rows())):
        embeddings = Embeddings([rows[:500], rows[500:]], 512)
        centers = cluster(embeddings, PLAN)
        np.save(f"{out}/{name}-{place.world_size}-{place.rank}.npy", centers.numpy())
        guess = first_guess(embeddings, PLAN)
        np.save(f"{out}/{name}-guess-{place.world_size}-{place.rank}.npy", guess.numpy())
    topology.leave()


def test_two_ranks_find_the_centers_of_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        launch(_cluster_on_ranks, ranks, str(tmp_path))
    for name in ("plain", "odd", "plain-guess", "odd-guess"):
        one, first, second = (np.load(tmp_path / f"{name}-{place}.npy") for place in ("1-0", "2-0", "2-1"))
        assert np.array_equal(first, second)
        assert np.abs(one - first).max() < 1e-6


# Odd embeddings


def odd_rows() -> np.ndarray:
    rows = features()
    rows[[5, 600]] = 0
    rows[7, 2], rows[611, 0] = np.nan, np.inf
    rows[100:400] = rows[100]
    return rows


def test_rows_that_are_zero_or_not_finite_are_left_out_and_counted() -> None:
    rows = odd_rows()
    embeddings = Embeddings([rows[:3], rows[3:3], rows[3:]], 512)
    assert (embeddings.total, embeddings.usable, embeddings.broken) == (1200, 1196, 2)
    clean = np.delete(rows, [5, 7, 600, 611], axis=0)
    assert torch.equal(torch.cat(list(embeddings)), torch.cat(list(Embeddings([clean], 512))))
    centers = cluster(embeddings, PLAN)
    assert torch.isfinite(centers).all()
    assert torch.allclose(centers.norm(dim=1), torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("kinds", [1, 3, 39])
def test_fewer_different_rows_than_centers_give_unit_centers_and_every_row_its_own(kinds: int) -> None:
    rows = np.repeat(features(kinds), 50, axis=0)
    centers = cluster(Embeddings([rows], 512), ClusterSettings(kinds + 1, 6, 0, 2))
    assert torch.allclose(centers.norm(dim=1), torch.ones(kinds + 1), atol=1e-5)
    found = nearest(tensor(unit(rows.astype(np.float32))), centers)
    assert found.best.min() > 1 - 1e-5
    assert len(found.labels.unique()) == kinds


def test_more_centers_than_embeddings_are_refused() -> None:
    rows = features(50)
    rows[:20] = 0
    assert len(cluster(Embeddings([rows], 512), ClusterSettings(30, 2, 0, 4))) == 30
    with pytest.raises(UserError, match="--clusters must be at most the 30 regions"):
        cluster(Embeddings([rows], 512), ClusterSettings(31, 2, 0, 4))
    with pytest.raises(UserError, match="no image has a region that can be embedded"):
        cluster(Embeddings([rows[:20]], 512), ClusterSettings(1, 2, 0))


def test_where_most_of_a_sample_has_no_embedding_all_rows_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megaregion.curation.kmeans.CENTER_SAMPLE", 1)
    rows = features()
    rows[::2] = 0
    assert len(first_guess(Embeddings([rows], 512), PLAN).unique(dim=0)) == 40


def test_centers_do_not_depend_on_what_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read in chunks that run on over their ends; where all fit, they stay."""
    rows = features()
    files: list[Any] = []
    for number, part in enumerate(np.split(rows, [300, 300, 1000])):
        np.save(tmp_path / f"{number}.npy", part)
        files.append(tmp_path / f"{number}.npy")
    monkeypatch.setattr("megaregion.curation.embeddings.rows_in", lambda memory, channels: 170)
    kept, read = Embeddings(files, 512), Embeddings(files, 0)
    assert [len(chunk) for chunk in kept] == [len(chunk) for chunk in read] == [170] * 7 + [10]
    assert torch.equal(cluster(kept, PLAN), cluster(read, PLAN))


# Sizes


def test_centers_are_shared_out_by_size_and_never_beyond_it() -> None:
    assert share_out(np.array([100, 50, 50, 0]), 8).tolist() == [4, 2, 2, 0]
    assert share_out(np.array([1, 1, 998]), 10).tolist() == [0, 0, 10]
    assert share_out(np.array([3, 2, 0, 7]), 12).tolist() == [3, 2, 0, 7]
    sizes = np.random.Generator(np.random.Philox(key=1)).integers(0, 90, 300)
    shares = share_out(sizes, 1000)
    assert shares.sum() == 1000
    assert (shares <= sizes).all()
    assert (np.abs(shares - sizes * 1000 / sizes.sum()) < 1).all()
    with pytest.raises(UserError, match="--clusters must be at most the 5 regions"):
        share_out(np.array([3, 2]), 6)


def test_evenly_spaced_rows_are_different_and_reach_across() -> None:
    assert evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(0, 5).tolist() == []
    assert rows_in(12, 2**20) == 1
