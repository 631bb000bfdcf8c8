"""Counted operations: the formulas against torch's own counter on the real modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_reference import build_head, loss_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmark.measure import alone
from megaregion.config import HeadConfig, ModelConfig
from megaregion.models import RegionEncoder, initialise
from megaregion.models.costs import encoder_flops, head_flops
from megaregion.parallel import topology
from megaregion.parallel.muon import Fused, flops, orthogonalised, shared_out
from megaregion.parallel.tensor_parallel import Placement

SMALL = {"image_size": 64, "patch_size": 8, "width": 64, "depth": 3, "heads": 4, "mlp_width": 192}


def counter() -> FlopCounterMode:
    # Torch's counter knows neither oneDNN's products, which some processors use, nor sums into a product.
    unknown = {
        torch.ops.mkldnn._linear_pointwise: _linear,
        torch.ops.aten.mkldnn_linear_backward_weights: _outer_sum,
        torch.ops.aten.addmm_: _product_added,
    }
    return FlopCounterMode(display=False, custom_mapping=unknown)


def _linear(inputs: list[int], weight: list[int], *_: object, **__: object) -> int:
    rows = math.prod(inputs[:-1])
    return 2 * rows * weight[0] * weight[1]


def _outer_sum(left: list[int], right: list[int], *_: object, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def _product_added(out: list[int], left: list[int], right: list[int], **_: object) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize(
    ("weights", "registers", "taught"),
    [("shared", 0, 0), ("shared", 4, 0), ("separate", 0, 0), ("shared", 4, 48), ("separate", 0, 48)],
)
@pytest.mark.parametrize("region_layers", [1, 3])
def test_the_encoders_operations_are_those_that_torch_counts(
    weights: str, registers: int, taught: int, region_layers: int
) -> None:
    own: dict[str, Any] = {"region_layers": region_layers, "region_weights": weights, "registers": registers}
    model = ModelConfig(**SMALL, **own)
    encoder = RegionEncoder(model, 32, taught)
    initialise(encoder, 0)
    images, visible = torch.randn(2, 3, 64, 64), torch.ones(2, 5, 64, dtype=torch.bool)
    features = (torch.randn(2, 64, taught),) if taught else ()
    counted = encoder_flops(model, 5, 32, teacher_width=taught)
    # The fused attention of a processor is unknown to torch's counter; the plain one is made of products.
    with sdpa_kernel(SDPBackend.MATH), counter() as forward:
        found = encoder(images, visible, None, None, *features)
    assert forward.get_total_flops() == 2 * counted.forward
    with counter() as backward:
        sum(one.sum() for one in (found if taught else [found])).backward()
    assert backward.get_total_flops() == 2 * (counted.training - counted.forward)


def test_an_image_without_regions_goes_through_every_block() -> None:
    model = ModelConfig(**SMALL)  # type: ignore[arg-type]
    encoder = RegionEncoder(model, 32)
    initialise(encoder, 0)
    with sdpa_kernel(SDPBackend.MATH), counter() as forward:
        encoder.vit(torch.randn(2, 3, 48, 96))
    assert forward.get_total_flops() == 2 * encoder_flops(model, 0, 32, grid=(6, 12)).forward


@pytest.mark.parametrize(("size", "gflop"), [(224, 486), (336, 1145), (560, 3661)])
def test_a_vit_l_costs_what_the_notes_say(size: int, gflop: int) -> None:
    model = ModelConfig(image_size=size, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096)
    assert encoder_flops(model, 0, 1024).training / 1e9 == pytest.approx(gflop, abs=1)


@pytest.mark.parametrize(("chunk_bytes", "kept"), [(64 * 2**20, 1.0), (2**18, 0.0)])
def test_a_heads_operations_are_those_that_torch_counts(chunk_bytes: int, kept: float) -> None:
    rows, classes, dim = 512, 6144, 32
    place = alone(torch.device("cpu"))
    try:
        config = HeadConfig(sample_rate=1.0)
        head = build_head(config, classes, dim, place, chunk_bytes=chunk_bytes)
        features = torch.randn(rows, dim, requires_grad=True)
        labels = torch.randint(classes, (rows, 1))
        with counter() as counted:
            loss_of(head, features, labels, torch.ones(rows, dtype=torch.bool), step=0).sum.backward()
    finally:
        topology.leave()
    assert counted.get_total_flops() == head_flops(rows, classes, dim, kept)


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_muon_orthogonalises_as_torchs_does_in_the_operations_that_were_counted(
    shape: tuple[int, int],
) -> None:
    from torch.optim import _muon

    gradient = torch.randn(shape).bfloat16()
    with counter() as counted:
        found = orthogonalised(gradient)
    assert counted.get_total_flops() == flops(*shape)
    default = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), _muon.DEFAULT_NS_STEPS, _muon.EPS
    assert torch.equal(found, _muon._zeropower_via_newtonschulz(gradient, *default))


def test_the_owners_of_muons_matrices_have_about_as_much_to_do() -> None:
    shapes = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)] * 24
    weights = {
        str(number): (Fused(3 if shape[0] == 3072 else 1, 64), Placement(shape, (0, 0), shape))
        for number, shape in enumerate(shapes)
    }
    size = -(-sum(math.prod(shape) for shape in shapes) // 8)
    busy = [0] * 8
    for matrix in shared_out([(weights, size)], 1, 8).values():
        busy[matrix.owner] += matrix.fused.matrices * flops(*matrix.fused.shape(matrix.places[0].full_shape))
    assert max(busy) < 1.1 * sum(busy) / 8
