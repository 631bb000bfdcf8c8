"""A linear multiplies by whichever library is fastest, and gives what nn.Linear gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megaregion import processor
from megaregion.heads.tiles import Products
from megaregion.models.layers import Linear
from megaregion.processor import is_narrow, onednn_is_faster, outer_sum, product


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways run on any processor, whichever is faster there."""
    monkeypatch.setattr(processor, "onednn_is_faster", lambda: request.param)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("rows", [0, 1, 7, 400])
def test_a_product_is_exact_in_any_memory_layout(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(24, rows, generator=generator).T
    weight, bias = torch.randn(24, 40, generator=generator).T, torch.randn(40, generator=generator)
    exact = inputs.double() @ weight.double().T
    for found, wanted in (
        (product(inputs, weight), exact),
        (product(inputs, weight, bias), exact + bias),
        (product(inputs.contiguous(), weight.contiguous()), exact),
    ):
        assert found.is_contiguous()
        assert not found._is_view()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("rows", [0, 1, 7, 400])
@pytest.mark.parametrize("width", [24, 40, 96])
def test_a_sum_of_outer_products_is_exact_in_any_memory_layout(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(40, rows, generator=generator).T
    right = torch.randn(rows, width, generator=generator)
    exact = left.double().T @ right.double()
    for found in (outer_sum(left, right), outer_sum(left.contiguous(), right)):
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("units", [True, False])
def test_mixed_rounds_on_gpus_and_where_a_processor_has_units_for_it(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: units)
    assert is_narrow("mixed", torch.device("cpu")) == units
    assert is_narrow("mixed", torch.device("cuda"))
    assert not any(is_narrow(other, torch.device("cuda")) for other in ("fp32", "bf16"))


def test_narrow_products_are_those_of_rounded_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(24, rows, generator=generator).T for rows in (400, 40))
    bias = torch.randn(40, generator=generator)
    left, right, added = (one.bfloat16().double() for one in (inputs, weight, bias))
    for found, exact in (
        (product(inputs, weight, narrow=True), left @ right.T),
        (product(inputs, weight, bias, narrow=True), left @ right.T + added),
        (outer_sum(inputs, inputs[:, :7], narrow=True), left.T @ left[:, :7]),
    ):
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


def test_a_narrow_linear_has_the_gradients_of_rounded_operands() -> None:
    torch.manual_seed(0)
    narrow, plain, tokens = Linear(24, 40), nn.Linear(24, 40).bfloat16(), torch.randn(50, 24)
    narrow.narrow = True
    plain.load_state_dict(narrow.state_dict())
    ours, theirs = tokens.clone().requires_grad_(), tokens.bfloat16().requires_grad_()
    narrow(ours).square().sum().backward()
    plain(theirs).float().square().sum().backward()
    assert narrow(ours).dtype == ours.dtype == torch.float32
    for found, wanted in zip((ours, *narrow.parameters()), (theirs, *plain.parameters()), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad.float(), rtol=0.02, atol=0.2)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16])
def test_the_heads_products_are_those_of_their_operands(operand: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, rows = (torch.randn(shape, generator=generator) for shape in ((40, 7), (7, 24)))
    centers = torch.randn(40, 24, generator=generator)
    own = Products(operand)
    narrow = [own.narrow(matrix) for matrix in (scores, rows, centers)]
    wide = [matrix.double() for matrix in narrow]
    out = torch.full((40, 7), float("nan"))
    own.multiply(narrow[2], narrow[1].T, out)
    torch.testing.assert_close(out.double(), wide[2] @ wide[1].T, rtol=1e-5, atol=1e-5)
    of_rows, of_centers = torch.ones(7, 24), torch.ones(40, 24)
    own.add(of_rows, narrow[0].T, narrow[2])
    own.add(of_centers, narrow[0], narrow[1], 0.5)
    torch.testing.assert_close(of_rows.double(), 1 + wide[0].T @ wide[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_centers.double(), 1 + 0.5 * wide[0] @ wide[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 0, 24), (24,), (9, 24)])
def test_a_linear_and_its_gradients_are_those_of_torch(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias, dtype=dtype)
    ours = Linear(24, 40, bias=bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    inputs, residual = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 40, dtype=dtype)

    def run(linear: nn.Linear) -> list[Tensor]:
        leaf = inputs.clone().requires_grad_()
        # As blocks do: into what the linear has just written.
        out = linear(leaf).add_(residual)
        (out * out).sum().backward()
        gradients = [parameter.grad for parameter in linear.parameters()]
        return [out, *(tensor for tensor in (leaf.grad, *gradients) if tensor is not None)]

    for found, wanted in zip(run(ours), run(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("maker", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_onednn_multiplies_where_mkl_leaves_units_alone(
    maker: str | None, capability: str, faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "cpuinfo"
    if maker is not None:
        told.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: one\n")
    monkeypatch.setattr(processor, "PROCESSOR", told)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() == faster
    finally:
        onednn_is_faster.cache_clear()
