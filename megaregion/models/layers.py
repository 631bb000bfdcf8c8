"""What the encoder is made of: linears as each device does them fastest, patches, attention of packed images.

Shapes: I input width, O output width; B images of H x W pixels, P patches of each, D width; H heads, d head
width, N regions of an image, S tokens of all images of a sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megaregion.config import ModelConfig
from megaregion.errors import UserError
from megaregion.models.costs import CHANNELS
from megaregion.models.rotary import Packing
from megaregion.processor import outer_sum, product

LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with 8-bit matrix units (Ada, then Hopper)."""
TORCHAO = "torchao==0.18.0"
"""Not in requirements.txt: where it is installed, transformers loads all of it with every import."""
GRAPHS = 64
"""Most that a block's code may have."""
ELEMENTS = 264 * 1024
"""Of a row that programs take at once on a GPU: 2,048 for each multiprocessor of an H100."""
GRAIN = 16
"""Widths must be multiples of it."""

Result = TypeVar("Result")
AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""How a part without random numbers is made again in the backward pass."""


class Linear(nn.Linear):
    """``nn.Linear`` with the same parameters and the same result, up to rounding."""

    narrow = False
    """Whether it multiplies in bf16 (train.precision mixed)."""

    def forward(self, input: Tensor, apart: bool = False) -> Tensor:
        """Map tokens [..., I] to [..., O]; ``apart`` leaves the bias's gradient to others."""
        bias = self.bias.detach() if apart else self.bias
        compiling = torch.compiler.is_compiling()
        if compiling and self.narrow:
            rounded = None if bias is None else bias.bfloat16()
            return F.linear(input.bfloat16(), self.weight.bfloat16(), rounded).to(input.dtype)
        if compiling or (input.device.type != "cpu" and not self.narrow):
            return F.linear(input, self.weight, bias)
        outputs: Tensor = _Linear.apply(input, self.weight, bias, self.narrow)
        return outputs


def use_narrow(blocks: nn.Module) -> None:
    """Let every linear of the blocks multiply in bf16; all else stays as it is."""
    for module in blocks.modules():
        if isinstance(module, Linear):
            module.narrow = True


def apart(linear: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear gives, and its bias if the one reader is to sum its gradient beside its own work."""
    # A linear that ranks share, or of 8 bits, sees to its bias.
    return (linear(inputs, True), linear.bias) if type(linear) is Linear else (linear(inputs), None)


class _Linear(torch.autograd.Function):
    """Outputs [..., O] of inputs [..., I], on a processor or in bf16; inputs are kept as they came."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, narrow: bool) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.narrow = narrow
        # Shaped in place: a view could not be summed into afterwards.
        return product(_rows(inputs), weight, bias, narrow).resize_(*inputs.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = _rows(grad)
        return (
            product(rows, weight.T, narrow=ctx.narrow).view(inputs.shape) if of_inputs else None,
            outer_sum(rows, _rows(inputs), ctx.narrow) if of_weight else None,
            _column_sums(rows) if of_bias else None,
            None,
        )


def _column_sums(rows: Tensor) -> Tensor:
    # Six tenths of the time of torch's sum.
    return torch.mv(rows.T, rows.new_ones(len(rows)))


def _rows(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1])


class PatchEmbedding(nn.Module):
    """A linear map of each patch's pixels, without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, CHANNELS, self.patch, self.patch))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to patch tokens [B, P, D] in the weight's type."""
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        patches = images.to(self.weight.dtype).view(batch, channels, rows, self.patch, columns, self.patch)
        # Patches do not overlap: the convolution is one matrix product, which every backend does well.
        pixels = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return F.linear(pixels, self.weight.flatten(1))


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packing: Packing
) -> Tensor:
    """Let every image's queries read that image's tokens; returns the shape of the queries.

    On a GPU in half precision one kernel takes all image tokens (flash attention over their boundaries), and
    one takes all regions; elsewhere each image is a call of its own, which costs no operation that a mask
    would throw away.

    Args:
        query: Queries of the image tokens, [1, H, S, d]; with a mask those of regions, [images, H, N, d].
        key: Keys, [1, H, S, d].
        value: Values, [1, H, S, d].
        mask: What each region sees, [images, 1, N, columns], 0 or -inf; None for image tokens.
        packing: How the images share the sequence.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if mask is None:
            return _by_boundaries(query, key, value, packing)
        inputs = (query, key, value, mask, packing)
        # The columns are not worth their memory until the backward pass.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        read: Tensor = checkpoint(_by_columns, *inputs, **AGAIN) if again else _by_columns(*inputs)
        return read
    lengths = packing.lengths
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    if mask is None:
        own = zip(query.split(lengths, dim=2), keys, values, strict=True)
        return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in own], dim=2)
    parts = zip(query.split(1), keys, values, mask.split(1), lengths, strict=True)
    seen = [F.scaled_dot_product_attention(q, k, v, attn_mask=m[..., :n]) for q, k, v, m, n in parts]
    return torch.cat(seen)


def _by_boundaries(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The kernel wants [S, H, d].
    q, k, v = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    ends, longest = packing.boundaries, max(packing.lengths)
    read = varlen_attn(q, k, v, ends, ends, longest, longest)
    assert isinstance(read, Tensor)
    return read.transpose(0, 1)[None]


def _by_columns(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, packing: Packing) -> Tensor:
    def own(sequence: Tensor) -> Tensor:
        return packing.in_columns(sequence.squeeze(0).transpose(0, 1)).transpose(1, 2)

    return F.scaled_dot_product_attention(query, own(key), own(value), attn_mask=mask)


def norm_beside(x: Tensor, norm: nn.LayerNorm, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [R, D] as they are, and normed, as a pre-norm block wants both.

    On the way back one pass norms the gradient, adds that of the tokens as they are, and sums the gradient of
    a bias that was ``added`` to them (:func:`apart`); autograd and torch's norm take five.
    """
    passed, normed = _NormBeside.apply(x, norm.weight, norm.bias, added, norm.eps)
    return passed, normed


class _NormBeside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, mean, factor = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, factor, weight)
        ctx.set_materialize_grads(False)
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx: Any, passed: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, added = ctx.saved_tensors, ctx.needs_input_grad[3]
        if grad is None:
            return passed, None, None, passed.sum(0) if added and passed is not None else None, None
        grad, shares = _norm_back(grad, passed, *kept, added)
        of_weight, of_bias, of_added = shares.sum(0).to(kept[-1].dtype)
        return grad, of_weight, of_bias, of_added if added else None, None


def activated(hidden: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    """GELU of [R, M] or, if ``quick``, its sigmoid form; sums the gradient of a bias of :func:`apart` too."""
    active: Tensor = _Activated.apply(hidden, bias, quick)
    return active


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.quick = quick
        return hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back, shares = _active_back(grad, *ctx.saved_tensors, ctx.quick)
        return back, shares.sum(0).to(grad.dtype) if ctx.needs_input_grad[1] else None, None


# As operators of their own they stay whole in a compiled block.
@torch.library.custom_op("megaregion::active_back", mutates_args=())
def _active_back(grad: Tensor, hidden: Tensor, quick: bool) -> tuple[Tensor, Tensor]:
    if quick:
        gate = torch.sigmoid(1.702 * hidden)
        back = grad * gate * (1 + 1.702 * hidden * (1 - gate))
    else:
        back = torch.ops.aten.gelu_backward(grad, hidden)
    return back, _column_sums(back)[None]


@_active_back.register_fake
def _(grad: Tensor, hidden: Tensor, quick: bool) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), _no_shares(hidden, hidden.shape[1:])


@torch.library.custom_op("megaregion::norm_back", mutates_args=())
def _norm_back(
    grad: Tensor, passed: Tensor | None, x: Tensor, mean: Tensor, factor: Tensor, weight: Tensor, added: bool
) -> tuple[Tensor, Tensor]:
    # The bias is asked for its type alone.
    back, *shares = torch.ops.aten.native_layer_norm_backward(
        grad, x, weight.shape, mean, factor, weight, weight, [True] * 3
    )
    back = back if passed is None else back.add_(passed)
    return back, torch.stack((*shares, _column_sums(back) if added else shares[0]))[None]


@_norm_back.register_fake
def _(grad: Tensor, passed: Tensor | None, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _no_shares(x, (3, x.shape[1]))


def _no_shares(rows: Tensor, shape: Sequence[int]) -> Tensor:
    if not rows.is_cuda:
        return rows.new_empty(1, *shape)
    return rows.new_empty(programs(*rows.shape), *shape, dtype=torch.float32)


def programs(rows: int, width: int) -> int:
    """Programs of a GPU that share the rows; each has a share of what is summed over them."""
    return min(rows, max(1, ELEMENTS // width))


if find_spec("triton") is not None:

    @_active_back.register_kernel("cuda")
    def _(grad: Tensor, hidden: Tensor, quick: bool) -> tuple[Tensor, Tensor]:
        from megaregion.models.kernels import active_back

        return active_back(grad, hidden, quick, programs(*hidden.shape))

    @_norm_back.register_kernel("cuda")
    def _(grad: Tensor, passed: Tensor | None, x: Tensor, *kept: Any) -> tuple[Tensor, Tensor]:
        from megaregion.models.kernels import norm_back

        mean, factor, weight, _ = kept
        return norm_back(grad, passed, x, mean, factor, weight, programs(*x.shape))


def use_float8(blocks: nn.Module, device: torch.device) -> int:
    """Let every linear of the blocks multiply in 8 bits, by torchao, in place; returns how many do.

    Weights, masters and all else stay as they are, the same objects. Each operand is scaled as a whole by its
    largest value, for every product anew, so that it uses the range of e4m3 (gradients: e5m2). It pays where
    products are large: a ViT-bigG's, hardly a ViT-B's. A processor computes the same numbers slowly.

    Raises:
        UserError: torchao is not installed, the GPU has no 8-bit matrix units, or no linear has a width that
            suits them.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise UserError(
            f"train.fp8 needs a GPU of compute capability 8.9 or more, got {found[0]}.{found[1]} "
            f"({torch.cuda.get_device_name(device)}); use train.fp8 false"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(f"train.fp8 needs {TORCHAO.partition('==')[0]}: pip install {TORCHAO}") from None

    def suits(module: nn.Module, name: str) -> bool:
        sizes = (module.in_features, module.out_features) if isinstance(module, Linear) else (1,)
        return not any(size % GRAIN for size in sizes)

    count = sum(suits(module, name) for name, module in blocks.named_modules())
    if not count:
        raise UserError(
            f"train.fp8 needs model.width and model.mlp_width to be multiples of {GRAIN}; no linear is"
        )
    # A micro-step's tokens need not be a multiple of 16: the products over them are padded.
    settings = Float8LinearConfig(pad_inner_dim=True, emulate=device.type == "cpu")
    convert_to_float8_training(blocks, module_filter_fn=suits, config=settings)
    return count


def recomputed(
    made: Tensor, source: Tensor, make: Callable[[Tensor], Tensor]
) -> AbstractContextManager[object]:
    """While it is open, autograd keeps ``source`` in the place of ``made``.

    Args:
        made: A tensor that operations inside are about to save for the backward pass.
        source: What it was made from; kept anyway, or smaller.
        make: Makes it again, to the bit.
    """
    if torch.compiler.is_compiling():
        return nullcontext()  # Hooks would cut the graph: a compiled block goes by ``only_products_kept``.
    # The hooks live as long as the graph: they must not hold what they are to save.
    place, numbers, kept = made.data_ptr(), made.numel(), source.detach()

    def pack(saved: Tensor) -> Any:
        if saved.data_ptr() == place and saved.numel() == numbers:
            return saved.shape
        for see in _WATCHERS:
            see(saved)
        return saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make(kept).view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let torch.compile fuse what stands between the products of each block, in place."""
    import torch._dynamo

    # Warns that in-place operations are not allowed in a part that is made again; there are none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # All blocks share a code, and its graphs: each kind of block has one for a first size and one for others.
    # Torch's limit of 8 would let those of a run of several resolutions go on uncompiled.
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in blocks:
        block.compile()


def only_products_kept(run: Callable[..., Result], *inputs: Any) -> Result:
    """Run a part of a compiled block; its backward pass makes all again but products and attention."""
    result: Result = checkpoint(run, *inputs, use_reentrant=False, context_fn=_keep_products)
    return result


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_choose)


def _choose(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = operation.name()
    costly = any(part in name for part in ("mm", "scaled_dot_product", "split_and_turn", "linear"))
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


_WATCHERS: list[Callable[[Tensor], None]] = []


def run_and_count(parameters: Iterable[Tensor], forward: Callable[[], Result]) -> tuple[Result, int]:
    """What a forward pass gives, and the bytes that autograd keeps of it, parameters left out.

    Hooks alone would see nothing inside of :func:`recomputed`.
    """
    own, kept = list(parameters), dict[int, torch.UntypedStorage]()

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Asked each time: ZeRO 3 gathers a parameter to another place for every use.
        if all(storage._cdata != parameter.untyped_storage()._cdata for parameter in own):
            kept[storage._cdata] = storage

    def pack(saved: Tensor) -> Tensor:
        note(saved)
        return saved

    _WATCHERS.append(note)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            result = forward()
    finally:
        _WATCHERS.remove(note)
    return result, sum(storage.nbytes() for storage in kept.values())
