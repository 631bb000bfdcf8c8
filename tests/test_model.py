from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaregion.checkpoint.pretrained import mlcd_tensors
from megaregion.config import ModelConfig, RegionStart
from megaregion.errors import UserError
from megaregion.export.layouts import mlcd_config
from megaregion.models import RegionEncoder, VisionTransformer, decays, initialise, tensor_parallel_plan
from megaregion.models.costs import choose_recompute, kept_bytes
from megaregion.models.layers import _by_columns, compile_blocks, packed_attention, run_and_count
from megaregion.models.rotary import Rotation, pack, rotation, split_and_turn
from megaregion.models.vit import Attention, Block, _mask, learning_rate_factor

SMALL = ModelConfig(image_size=64, patch_size=16, width=64, depth=4, heads=4, mlp_width=128, region_layers=2)
SEPARATE = replace(SMALL, region_weights="separate")
REGISTERED = replace(SMALL, registers=3)
LEARNED = replace(REGISTERED, region_start="learned")
KINDS = pytest.mark.parametrize(
    "config", [SMALL, SEPARATE, REGISTERED, LEARNED], ids=["shared", "separate", "registers", "learned"]
)
BASE_SHAPED = ModelConfig(depth=2, region_layers=1)


def encoder(config: ModelConfig = SMALL, seed: int = 0) -> RegionEncoder:
    """An encoder whose norms and biases are off their start too, so that losing one shows."""
    model = RegionEncoder(config, embedding_dim=32)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_patches(batch: int, regions: int, patches: int) -> Tensor:
    visible = torch.rand(batch, regions, patches, generator=torch.Generator().manual_seed(3)) < 0.3
    visible[..., 0] = True
    return visible


def in_transformers(vit: VisionTransformer) -> nn.Module:
    from transformers import MLCDVisionConfig, MLCDVisionModel

    theirs = MLCDVisionModel(MLCDVisionConfig(**mlcd_config(vit.config, torch.float32))).eval()
    theirs.load_state_dict(
        {key: t for name, p in vit.named_parameters() for key, t in mlcd_tensors(name, p.data, vit.config)}
    )
    return theirs


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (48, 80)])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_all_features_equal_those_of_transformers(activation: str, size: tuple[int, int]) -> None:
    vit = encoder(replace(SMALL, activation=activation)).vit
    images = noise(2, 3, *size)
    with torch.no_grad():
        tokens, theirs = vit(images).image, in_transformers(vit)(pixel_values=images)
        pooled = vit.pool(tokens[:, 0])
    torch.testing.assert_close(tokens[:, 0], theirs.last_hidden_state[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], theirs.last_hidden_state[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (160, 96)])
def test_features_of_a_base_sized_width_equal_those_of_transformers(size: tuple[int, int]) -> None:
    vit = encoder(BASE_SHAPED).vit
    images = noise(1, 3, *size)
    with torch.no_grad():
        tokens, theirs = vit(images).image, in_transformers(vit)(pixel_values=images)
    torch.testing.assert_close(tokens, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit.pool(tokens[:, 0]), theirs.pooler_output, atol=1e-5, rtol=1e-5)


def test_gradients_of_every_weight_equal_those_of_transformers() -> None:
    vit = encoder().vit
    theirs = in_transformers(vit)
    images, direction = noise(2, 3, 48, 80), noise(2, 16, 64, seed=4)
    tokens = vit(images).image
    (tokens * direction).sum().add(vit.pool(tokens[:, 0]).square().sum()).backward()
    output = theirs(pixel_values=images)
    (output.last_hidden_state * direction).sum().add(output.pooler_output.square().sum()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in vit.named_parameters():
        for key, grad in mlcd_tensors(name, parameter.grad, vit.config):
            worst = (grad - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1e-3)
            assert worst < 2e-5, f"{key}: {worst:.1e}"


def test_gradients_through_the_fused_split_equal_finite_differences() -> None:
    table = rotation(torch.zeros(4), 2, 2, theta=100.0, images=2)

    def split(qkv: Tensor, class_angle: Tensor) -> tuple[Tensor, ...]:
        cos, sin = table.cos[:, :4].double(), table.sin.double()
        cos = torch.cat((class_angle.cos()[None], cos[1:]))
        sin = torch.cat((class_angle.sin()[None], sin[1:]))
        twice = torch.cat((cos, cos), dim=-1).detach()
        return split_and_turn(qkv, Rotation(class_angle, twice, sin.detach(), len(qkv)))

    qkv = noise(2, 5, 2, 3, 8).double().requires_grad_()
    class_angle = noise(4).double().requires_grad_()
    assert torch.autograd.gradcheck(split, (qkv, class_angle))


def test_a_rotary_table_first_made_for_inference_serves_training() -> None:
    vit = encoder().vit
    images = noise(1, 3, 16, 176)
    with torch.inference_mode():
        vit(images)
    vit(images).image.sum().backward()


@KINDS
@pytest.mark.parametrize("regions", [1, 10])
def test_patch_features_are_the_same_bits_with_and_without_regions(config: ModelConfig, regions: int) -> None:
    vit = encoder(config).vit
    images = noise(3, 3, 96, 64)
    without = vit(images)
    with_regions = vit(images, some_patches(3, regions, 24))
    assert without.regions is None
    assert torch.equal(without.image, with_regions.image)


@pytest.mark.parametrize("config", [SMALL, SEPARATE], ids=["shared", "separate"])
def test_a_region_block_passes_on_nothing_from_outside_the_region(config: ModelConfig) -> None:
    torch.manual_seed(0)
    block = Block(SMALL)
    angles = rotation(noise(8), 4, 4, theta=10_000.0, images=1)
    image = noise(17, 64).requires_grad_()
    inside = torch.zeros(17, dtype=torch.bool)
    inside[[6, 7, 10, 11]] = True
    mask = torch.zeros(1, 1, 1, 17).masked_fill(~inside, -torch.inf)
    own = noise(1, 64, seed=5)
    _, region = block(image, own, angles, mask)
    region.square().sum().backward()
    assert image.grad[~inside].abs().max() == 0
    assert image.grad[inside].abs().amin(-1).max() > 0

    perturbed = image.detach().clone()
    perturbed[~inside] += 10 * noise(13, 64, seed=6)
    assert torch.equal(block(perturbed, own, angles, mask)[1], region)
    perturbed[6] += 1
    assert not torch.equal(block(perturbed, own, angles, mask)[1], region)


def test_region_token_ignores_pixels_outside_its_patches() -> None:
    # With one block, nothing has mixed patches before the region reads them.
    vit = encoder(replace(SMALL, depth=1, region_layers=1)).vit
    images = noise(1, 3, 64, 64)
    visible = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    visible[..., 1:3, 1:3] = True
    outside = images.clone()
    outside[..., :16, :] += 5
    outside[..., 48:] -= 5
    inside = images.clone()
    inside[..., 20, 20] += 5
    with torch.no_grad():
        region = vit(images, visible.flatten(2)).regions
        assert torch.equal(vit(outside, visible.flatten(2)).regions, region)
        assert not torch.equal(vit(inside, visible.flatten(2)).regions, region)


def test_region_token_ignores_pixels_outside_its_patches_through_many_blocks() -> None:
    vit = encoder(replace(SMALL, region_layers=4)).vit
    for block in vit.blocks:
        # Keep patches from mixing among themselves: what is left is what regions read.
        block.register_forward_hook(lambda module, inputs, output: (inputs[0], output[1]))
    images, visible = noise(1, 3, 64, 64), torch.zeros(1, 2, 16, dtype=torch.bool)
    visible[:, 0, 15] = True
    visible[:, 1, :8] = True
    perturbed = images.clone()
    perturbed[..., 48:, 48:] += 5
    with torch.no_grad():
        before, after = vit(images, visible).regions, vit(perturbed, visible).regions
    assert not torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 1], after[:, 1])


def test_a_region_does_not_depend_on_the_other_regions() -> None:
    vit = encoder().vit
    images, visible = noise(2, 3, 64, 64), some_patches(2, 6, 16)
    with torch.no_grad():
        together = vit(images, visible).regions
        alone = torch.cat([vit(images, visible[:, i : i + 1]).regions for i in range(6)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_region_that_sees_nothing_stays_finite_and_disturbs_no_other() -> None:
    vit = encoder().vit
    images, visible = noise(1, 3, 64, 64), some_patches(1, 3, 16)
    blind = visible.clone()
    blind[:, 1] = False
    with torch.no_grad():
        regions, with_blind = vit(images, visible).regions, vit(images, blind).regions
    assert with_blind.isfinite().all()
    assert torch.equal(regions[:, [0, 2]], with_blind[:, [0, 2]])


def test_patches_read_registers_and_region_tokens_do_not() -> None:
    vit = encoder(replace(REGISTERED, depth=1, region_layers=1)).vit
    images, visible = noise(1, 3, 64, 64), some_patches(1, 3, 16)
    with torch.no_grad():
        before = vit(images, visible)
        vit.register_tokens += noise(3, 64, seed=8)
        after = vit(images, visible)
    assert before.image.shape == (1, 1 + 3 + 16, 64)
    assert (before.image != after.image).any(-1).all()
    assert torch.equal(before.regions, after.regions)


@pytest.mark.parametrize("start", ["class", "learned"])
def test_only_what_begins_as_the_class_token_knows_what_no_region_shows(
    start: RegionStart,
) -> None:
    vit = encoder(replace(SMALL, depth=1, region_layers=1, region_start=start)).vit
    images, visible = noise(2, 3, 64, 64), some_patches(2, 3, 16)
    with torch.no_grad():
        before = vit(images, visible).regions
        vit.class_embedding += noise(64, seed=8)
        after = vit(images, visible).regions
    assert torch.equal(before, after) == (start == "learned")


@pytest.mark.parametrize("config", [SMALL, LEARNED], ids=["class", "learned"])
@pytest.mark.parametrize("grids", [None, ((4, 4),)], ids=["stacked", "packed"])
def test_region_tokens_of_one_image_have_rows_of_their_own(
    config: ModelConfig, grids: tuple[tuple[int, int], ...] | None
) -> None:
    vit, began = encoder(config).vit, []
    vit.blocks[config.depth - config.region_layers].register_forward_pre_hook(
        lambda _, given: began.append(given[1])
    )
    image, sees = noise(1, 3, 64, 64), some_patches(1, 5, 16)
    vit(*((image, sees) if grids is None else (_cut_into_patches(image[0], 16), sees[0])), grids=grids)
    assert [tokens.is_contiguous() for tokens in began] == [True], "kernels of a GPU step from row to row"


def test_a_register_stands_nowhere_and_its_order_does_not_matter() -> None:
    vit = encoder(REGISTERED).vit
    images, visible = noise(2, 3, 64, 48), some_patches(2, 3, 12)
    with torch.no_grad():
        before = vit(images, visible)
        vit.register_tokens.copy_(vit.register_tokens.flip(0))
        after = vit(images, visible)
    torch.testing.assert_close(after.regions, before.regions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.image[:, 1:4].flip(1), before.image[:, 1:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.image[:, 4:], before.image[:, 4:], atol=1e-5, rtol=1e-5)


def test_skipping_the_image_after_its_last_reader_changes_no_region_and_no_gradient() -> None:
    model = encoder()
    images, visible = noise(2, 3, 64, 64), some_patches(2, 5, 16)
    embeddings = model(images, visible)
    embeddings.square().sum().backward()
    skipped = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    whole = model.projection(model.vit.pool(model.vit(images, visible).regions))
    whole.square().sum().backward()
    assert torch.equal(embeddings, whole)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, skipped[name]), name


@KINDS
def test_every_weight_learns_from_regions_alone(config: ModelConfig) -> None:
    model = encoder(config)
    model(noise(2, 3, 64, 64), some_patches(2, 5, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


class Weighed(nn.Module):
    """A branch times the factor of its only image."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.factor = branch, torch.ones(())

    def forward(self, *inputs: Any) -> Tensor:
        return self.branch(*inputs) * self.factor


def some_branches(images: int, blocks: int) -> Tensor:
    """Factors of which a third is 0, [images, 2 blocks]."""
    drawn = torch.rand(images, 2 * blocks, generator=torch.Generator().manual_seed(9))
    return torch.where(drawn < 1 / 3, 0.0, 1 + drawn)


@pytest.mark.parametrize("config", [SMALL, SEPARATE], ids=["shared", "separate"])
def test_a_dropped_branch_is_left_out_for_an_image_and_its_regions_stacked_or_packed(
    config: ModelConfig,
) -> None:
    model = encoder(config)
    names = [name for name, _ in model.named_parameters()]
    kept = some_branches(3, 4)
    images, visible = noise(3, 3, 64, 32), some_patches(3, 5, 8)
    patches = torch.cat([_cut_into_patches(image, 16) for image in images])
    ways = {
        "stacked": (images, visible, None, kept),
        "packed": (patches, visible.transpose(0, 1).flatten(1), ((4, 2),) * 3, kept),
    }
    found = {}
    for way, inputs in ways.items():
        embeddings = model(*inputs)
        found[way] = embeddings, torch.autograd.grad(embeddings.square().sum(), list(model.parameters()))
    branches = []
    for block in model.vit.blocks:
        for own in (block, block.region) if block.region is not None else (block,):
            own.attention.out, own.mlp = Weighed(own.attention.out), Weighed(own.mlp)
        branches += [[(own.attention.out, own.mlp) for own in (block, block.region) if own is not None]]
    alone = []
    for image, sees, factors in zip(images, visible, kept.view(3, 4, 2), strict=True):
        for pairs, (attention, mlp) in zip(branches, factors, strict=True):
            for one, other in pairs:
                one.factor, other.factor = attention, mlp
        alone.append(model(image[None], sees[None]))
        alone[-1].square().sum().backward()
    grads = {name.replace(".branch", ""): p.grad for name, p in model.named_parameters()}
    for embeddings, own in found.values():
        torch.testing.assert_close(embeddings, torch.cat(alone), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dict(zip(names, own, strict=True)), grads, atol=2e-4, rtol=1e-4)


def test_a_rate_drops_nothing_that_is_not_asked_for() -> None:
    images, visible = noise(2, 3, 64, 64), some_patches(2, 5, 16)
    usual, rated = (encoder(replace(SMALL, drop_path=rate))(images, visible) for rate in (0.0, 0.9))
    assert torch.equal(usual, rated)


@pytest.mark.parametrize("config", [SMALL, SEPARATE], ids=["shared", "separate"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_recomputing_gives_the_same_bits_of_loss_and_gradients(config: ModelConfig, activation: str) -> None:
    model = encoder(replace(config, activation=activation))
    images, visible = noise(2, 3, 64, 64), some_patches(2, 5, 16)
    kept = some_branches(2, 4) if activation == "gelu" else None
    calls = []
    model.vit.blocks[3].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for model.vit.recompute in (
        ("keep",) * 4,
        ("cheap",) * 4,
        ("full",) * 4,
        ("full", "cheap", "cheap", "keep"),
    ):
        model.zero_grad()
        calls.clear()
        loss = model(images, visible, kept=kept).square().sum()
        loss.backward()
        results.append((len(calls), loss, [parameter.grad for parameter in model.parameters()]))
    (once, loss, grads), *others = results
    assert [calls for calls, *_ in others] == [once, 2 * once, once]
    for _, same_loss, same_grads in others:
        assert torch.equal(loss, same_loss)
        assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


@pytest.mark.parametrize("dropped", [None, some_branches(2, 2)], ids=["all", "dropped"])
def test_a_compiled_block_is_one_graph_that_gives_the_same_and_keeps_no_more(dropped: Tensor | None) -> None:
    model = encoder(replace(SMALL, depth=2, region_layers=1))
    images, visible, kept = noise(2, 3, 64, 64), some_patches(2, 5, 16), {}

    def run() -> tuple[Tensor, dict[str, Tensor], int]:
        model.zero_grad()
        embeddings, size = run_and_count(model.parameters(), lambda: model(images, visible, None, dropped))
        embeddings.square().sum().backward()
        return embeddings, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size

    for level in ("keep", "cheap", "full"):
        blocks = model.vit.blocks
        model.vit.recompute = (level,) * 2
        expected, grads, eager = run()
        for block in blocks:
            # The partitioner of inductor, without its code for a device; fullgraph refuses to cut a block.
            block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        found, same, kept[level] = run()
        for block in blocks:
            block._compiled_call_impl = None
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(same, grads, atol=1e-4, rtol=1e-5)
        assert kept[level] <= eager
    assert kept["full"] < kept["cheap"] < kept["keep"]


def test_other_numbers_of_images_and_other_sizes_make_few_graphs_and_leave_no_block_uncompiled() -> None:
    model, counter = encoder(replace(SMALL, depth=2, region_layers=1)), CompileCounter()
    torch._dynamo.reset()
    compile_blocks(())
    for block in model.vit.blocks:
        # A block that goes on uncompiled, since there are too many graphs, is refused.
        block.compile(backend=counter, fullgraph=True)
    made = []
    for count, side in ((4, 64), (2, 64), (3, 96), (2, 128)):
        kept = some_branches(count, 2)
        model(noise(count, 3, side, side), some_patches(count, 5, (side // 16) ** 2), None, kept)
        made.append(counter.frame_count)
    for grids in (((2, 5), (4, 4)), ((3, 3), (2, 2)), ((1, 6), (5, 2))):
        patches = sum(rows * columns for rows, columns in grids)
        sees = some_patches(1, 5, patches)[0]
        model(noise(patches, 3, 16, 16), sees, grids, some_branches(len(grids), 2))
        made.append(counter.frame_count)
    assert made[2] == made[3], "another number of images, and another size"
    assert made[5] == made[6], "packed images"
    assert made[-1] <= 24


@KINDS
def test_images_packed_into_one_sequence_are_the_same_as_alone(config: ModelConfig) -> None:
    model = encoder(config)
    grids = ((2, 5), (4, 4), (6, 1), (4, 4))
    images = [noise(1, 3, 16 * rows, 16 * columns, seed=7 + rows) for rows, columns in grids]
    visible = [some_patches(1, 5, rows * columns) for rows, columns in grids]
    alone = torch.cat([model(image, sees) for image, sees in zip(images, visible, strict=True)])
    alone.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    patches = torch.cat([_cut_into_patches(image[0], 16) for image in images])
    packed = model(patches, torch.cat([sees[0] for sees in visible], dim=1), grids)
    packed.square().sum().backward()
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        worst = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert worst < 2e-5, f"{name}: {worst:.1e}"


def test_regions_of_packed_images_read_in_one_call_what_each_image_alone_gives_them() -> None:
    grids = ((2, 5), (4, 4), (6, 1), (4, 4))
    packing = pack(grids, torch.device("cpu"))
    tokens = len(packing.slots)
    visible = some_patches(1, 5, tokens - len(grids))[0]
    mask = _mask(visible, noise(1, tokens, 64), packing)
    found = []
    for read in (packed_attention, _by_columns):
        query, *own = (noise(*shape).requires_grad_() for shape in ((4, 2, 5, 8), *[(1, 2, tokens, 8)] * 2))
        out = read(query, *own, mask, packing)
        out.square().sum().backward()
        found.append((out, query.grad, *(tensor.grad for tensor in own)))
    torch.testing.assert_close(*found)


class _Device(TorchDispatchMode):
    """Notes what the meta device is asked for, and what comes to it from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()
        self.sent: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken, given = ({t.device.type for t in tree_leaves(x) if isinstance(t, Tensor)} for x in (args, out))
        self.asked.add(str(func))
        if "cpu" in taken and "meta" in given:
            self.sent.append(str(func))
        return out


GRIDS = [None, ((2, 5), (4, 4), (6, 1))]


def on_a_device(grids: tuple[tuple[int, int], ...] | None) -> Callable[[], Tensor]:
    """A pass as tensors of a GPU go through it: the meta device has none of a processor's shortcuts."""
    model = RegionEncoder(REGISTERED, 32).to("meta")
    shapes = ((2, 3, 64, 64), (2, 5, 16)) if grids is None else ((32, 3, 16, 16), (5, 32))
    images, visible = (torch.ones(shape, device="meta") for shape in shapes)
    return partial(model, images, visible.bool(), grids)


@pytest.mark.parametrize("grids", GRIDS, ids=["stacked", "packed"])
def test_a_pass_never_waits_for_the_host_to_send_indices(grids: tuple[tuple[int, int], ...] | None) -> None:
    embed = on_a_device(grids)
    with _Device() as device:
        embed().sum().backward()
    # Where several images share a sequence, their boundaries are sent once, without waiting.
    assert device.sent == ([] if grids is None else ["aten._to_copy.default"])
    # A list of indices becomes a tensor of the host, which is copied and waited for.
    assert "aten.index.Tensor" not in device.asked


@pytest.mark.parametrize("grids", GRIDS, ids=["stacked", "packed"])
def test_residual_sums_into_what_a_linear_wrote_copy_no_gradient(
    grids: tuple[tuple[int, int], ...] | None,
) -> None:
    waiting, seen = [on_a_device(grids)().grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "AddmmBackward0" in names
    assert "torch::autograd::CopySlices" not in names


def _cut_into_patches(image: Tensor, side: int) -> Tensor:
    rows, columns = image.shape[1] // side, image.shape[2] // side
    cut = image.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return cut.reshape(rows * columns, 3, side, side)


def test_grids_that_do_not_add_up_to_the_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="grids hold 6 patches, got 4"):
        encoder().vit(noise(4, 3, 16, 16), grids=((2, 3),))


def test_levels_keep_as_much_as_the_budget_lets_them() -> None:
    tokens, item = 1000, 4
    keep, cheap, full = (kept_bytes(SMALL, tokens, level, item) for level in ("keep", "cheap", "full"))
    assert full < cheap < keep

    def levels(budget: float) -> tuple[str, ...]:
        return choose_recompute(SMALL, tokens, item, budget)

    assert levels(0) == levels(4 * keep) == ("keep",) * 4
    assert levels(4 * keep - 1) == ("cheap", "keep", "keep", "keep")
    assert levels(4 * cheap) == ("cheap",) * 4
    assert levels(4 * cheap - 1) == ("full", "full", "cheap", "cheap")
    assert levels(1) == ("full",) * 4


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, second, other = (RegionEncoder(SMALL, 32) for _ in range(3))
    initialise(first, seed=7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    initialise(second, seed=7)
    initialise(other, seed=8)
    assert torch.equal(state, torch.get_rng_state())
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    for name, parameter in other.named_parameters():
        random = not (name.endswith("bias") or "norm" in name)
        assert torch.equal(parameter, weights[name]) != random, name
    assert not torch.equal(weights["vit.blocks.0.mlp.fc1.weight"], weights["vit.blocks.1.mlp.fc1.weight"])


def test_separate_region_weights_start_as_copies_and_add_nothing_else() -> None:
    model = RegionEncoder(SEPARATE, 32)
    initialise(model, seed=0)
    weights = dict(model.named_parameters())
    own = [name for name in weights if ".region." in name]
    assert {name.split(".")[2] for name in own} == {"2", "3"}
    assert len(own) == 2 * 12
    for name in own:
        assert torch.equal(weights[name], weights[name.replace(".region.", ".")]), name


@pytest.mark.parametrize("config", [SMALL, SEPARATE], ids=["shared", "separate"])
def test_the_plan_cuts_every_linear_of_every_block_and_nothing_else(config: ModelConfig) -> None:
    model = encoder(config)
    plan = tensor_parallel_plan(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(plan) == linears - {"projection"}
    assert all((plan[name] == "column") == name.endswith(("qkv", "fc1")) for name in plan)


def test_an_attention_cut_by_the_plan_needs_no_change_to_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    whole = Attention(SMALL)
    angles = rotation(noise(8), 4, 4, theta=10_000.0, images=2)
    tokens, regions = noise(2 * 17, 64), noise(2 * 3, 64, seed=5)

    def read(attention: Attention) -> tuple[Tensor, Tensor]:
        query, key, value = attention.project(tokens, angles)
        region = attention.project_regions(regions, angles, 3)
        image, own = attention.mix(query, key, value), attention.mix(region, key, value)
        return attention.out(image), attention.out(own)

    parts = []
    for rank in range(2):
        part = copy.deepcopy(whole)
        part.qkv.weight.data, part.qkv.bias.data = (
            tensor.data.chunk(2)[rank] for tensor in (whole.qkv.weight, whole.qkv.bias)
        )
        part.out.weight.data = whole.out.weight.data.chunk(2, dim=1)[rank]
        part.out.bias.data = whole.out.bias.data / 2
        parts.append(read(part))
    for expected, first, second in zip(read(whole), *parts, strict=True):
        torch.testing.assert_close(first + second, expected, atol=1e-5, rtol=1e-5)


def test_decay_spares_norms_biases_and_single_tokens() -> None:
    model = encoder(LEARNED)
    spared = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    kinds = {"bias", "class_pos_emb", "class_embedding", "register_tokens", "region_query"}
    assert all(name.rpartition(".")[2] in kinds or "norm" in name for name in spared)
    assert {f"vit.{own}" for own in (*kinds - {"bias"}, "pre_norm.weight")} <= spared
    assert "vit.patch_embedding.weight" not in spared
    assert "projection.weight" not in spared


def test_the_learning_rate_falls_from_each_block_to_the_one_below_it() -> None:
    config = replace(LEARNED, region_weights="separate")
    model = encoder(config)
    found = {name: learning_rate_factor(name, config, 0.5) for name, _ in model.named_parameters()}
    for number in range(4):
        of_block = {factor for name, factor in found.items() if f".blocks.{number}." in name}
        assert of_block == {0.5 ** (3 - number)}, "region tokens' own weights among them"
    above = {name for name, factor in found.items() if factor == 1 and ".blocks." not in name}
    assert above == {"projection.weight", "vit.post_norm.weight", "vit.post_norm.bias"}
    assert found.pop("vit.region_query") == 0.5**2, "two blocks are above where it begins"
    below = {factor for name, factor in found.items() if ".blocks." not in name and name not in above}
    assert below == {0.5**4}
    assert {learning_rate_factor(name, config, 1.0) for name in found} == {1.0}


def test_bf16_stays_near_fp32() -> None:
    model = encoder()
    images, visible = noise(2, 3, 64, 64), some_patches(2, 5, 16)
    exact = model(images, visible)
    model.to(torch.bfloat16)
    rounded = model(images, visible)
    assert rounded.dtype == torch.bfloat16
    rounded.sum().backward()
    assert torch.nn.functional.cosine_similarity(rounded.float(), exact, dim=-1).min() > 0.999


def test_an_image_the_patch_does_not_divide_is_refused_with_the_nearest_size() -> None:
    with pytest.raises(UserError, match=r"patch_size 16, got 70 x 64; use 64 x 64"):
        encoder().vit(noise(1, 3, 70, 64))


def test_a_mask_of_another_patch_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, regions, 16\], got \[1, 2, 12\]"):
        encoder().vit(noise(1, 3, 64, 64), torch.ones(1, 2, 12, dtype=torch.bool))
