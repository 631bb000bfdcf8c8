"""The body under DeepSpeed ZeRO: backward, one norm over body and heads, update or drop.

    forward -> backward (gradients are reduced over the data ranks) -> norm -> update(lr) | drop

DeepSpeed owns everything between a loss and the updated body: bf16 copies and fp32 masters, reduction over
the data ranks (it averages, see heads/), partitioning by stage. The gradient norm is joined with that of
the heads, which live outside the engine, so that both are clipped by one coefficient. zero_stages.py says
where each ZeRO stage keeps what.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megaregion.checks import batching
from megaregion.config import RunConfig
from megaregion.parallel.muon import Fused, Muon, shared_out
from megaregion.parallel.tensor_parallel import Placement, uncompiled
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero_stages import STAGES
from megaregion.processor import is_narrow

REDUCE_BUCKET = 50_000_000
"""Elements of gradients that are reduced together; DeepSpeed's own 500 million hold all of a ViT-L, whose
reduction would then begin when the backward pass is over."""


def effective_stage(config: RunConfig, data_ranks: int) -> int:
    """The ZeRO stage that runs: a single copy of the model has nobody to share its state with.

    ZeRO would then only copy it: parameters into masters and back, gradients into buffers. In bf16 it stays,
    for it keeps the fp32 masters.
    """
    alone = data_ranks == 1 and not config.train.bf16
    return 0 if alone else config.parallel.zero_stage


def deepspeed_config(config: RunConfig, data_ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings for so many copies of the model, derived from ours; nobody writes them by hand."""
    sizes = batching(config, data_ranks)
    bf16 = config.train.bf16
    return {
        "train_batch_size": config.train.global_batch,
        # Those of the first resolution; the engine is told with each micro-step which is a step's last.
        "train_micro_batch_size_per_gpu": sizes.micro_batch,
        "gradient_accumulation_steps": sizes.micro_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "data_types": {"grad_accum_dtype": config.train.sum_precision},
        "communication_data_type": config.train.sum_precision,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16} if bf16 else {"enabled": False},
        "zero_optimization": {
            "stage": effective_stage(config, data_ranks),
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            # Small parameters stay whole in stage 3: gathering a layer norm costs more than keeping it.
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


class ZeroEngine:
    """The body, its optimizer and its gradients under one ZeRO stage."""

    def __init__(
        self,
        model: nn.Module,
        placements: Mapping[str, Placement],
        config: RunConfig,
        topology: Topology,
        decays: Callable[[str, nn.Parameter], bool],
        reducing: Callable[[], AbstractContextManager[None]] = nullcontext,
        rate: Callable[[str], float] = lambda name: 1.0,
        matrices: Callable[[str], tuple[int, int] | None] = lambda name: None,
    ) -> None:
        """Wrap the body, already cut by tensor parallelism.

        ``decays`` says whether a named parameter has weight decay, ``rate`` its factor of the learning rate,
        ``matrices`` how it holds matrices that Muon may move (:class:`Fused`); ``reducing`` is opened around
        what is left of the gradients' reduction behind a backward pass.
        """
        self.placements = dict(placements)
        self.stage = effective_stage(config, topology.data_size)
        self.settings = deepspeed_config(config, topology.data_size)
        """DeepSpeed's settings as passed to it."""
        self._clip_norm = config.optimizer.clip_norm
        self._topology = topology
        self._norm = torch.zeros((), device=topology.device)
        if config.train.bf16:
            model.to(torch.bfloat16)
        names = [name for name, _ in model.named_parameters() if config.optimizer.name == "muon"]
        self._muon = {name: Fused(*found) for name in names if (found := matrices(name)) is not None}
        groups = _groups(model, config, decays, rate, self._muon)
        self._engine, self._optimizer = _start(model, config, topology, groups, self.settings)
        self.module: nn.Module = self._engine.module
        """This rank's part of the body."""
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        """This rank's parameters of the body, by name."""
        self._decay, self._steps = config.optimizer.ema_decay, 0
        self._adapter = STAGES[self.stage](
            self._optimizer, self.parameters, self.placements, topology, self._decay > 0
        )
        self._adapter.make_moments(0)
        if self._muon:
            narrow = config.train.bf16 or is_narrow(config.train.precision, topology.device)
            self._start_muon(torch.bfloat16 if narrow else torch.float32)
        self._time_reduction(reducing)

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass of the body."""
        self._adapter.before_forward()
        return self._engine(*inputs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate gradients of a loss that is already divided by the whole global batch.

        After a step's ``last`` micro-step :meth:`norm` follows, then :meth:`update` or :meth:`drop`.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # Only counts: there DeepSpeed ends a micro-step.

    def norm(self, heads_norm_squared: Tensor) -> Tensor:
        """Global gradient norm over body and heads (these: squared), before clipping, 0-d; a collective."""
        norm = self._adapter.norm(heads_norm_squared)
        self._norm = torch.as_tensor(norm, dtype=torch.float32, device=self._topology.device)
        return self._norm

    def update(self, lr: float) -> None:
        """Clip by the last :meth:`norm`, which is finite, and move parameters and moments."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self._adapter.before_update(self.clip_coefficient(self._norm))
        self._engine.step()
        self._steps += 1
        if self._decay:
            self._adapter.average(1 - average_decay(self._decay, self._steps))

    def drop(self) -> None:
        """Forget the gradients; neither parameter nor moment changes."""
        self._adapter.refuse()
        self._engine.step()

    def clip_coefficient(self, norm: Tensor) -> Tensor:
        """Factor by which a gradient of this global norm is scaled, 0-d, at most 1."""
        if self._clip_norm == 0:
            return torch.ones_like(norm)
        return 1.0 / torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0)

    def pieces(self) -> Iterator[tuple[str, Placement, Tensor]]:
        """What this rank saves of the training state, one tensor at a time; a collective.

        The pieces of all ranks are the state, of ZeRO 1 and 2 their partitions, of 0 and 3 whole tensors in
        turn; any stage and any number of ranks can go on from them.

        Yields:
            Name ("weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME", with an average "ema.NAME"), place in the
            full tensor, fp32 value.
        """
        place, turns = self._topology, itertools.cycle(range(self._topology.data_size))
        for name, parameter in self.parameters.items():
            whole = self.placements[name]
            if whole.shape == whole.full_shape and place.tensor_rank > 0:
                continue  # The first tensor rank saves what tensor parallelism leaves whole.
            for key in ("weight", *self._adapter.kept(name in self._muon)):
                start, values = self._adapter.get(parameter, None if key == "weight" else key)
                if next(turns) == place.data_rank or not self._adapter.gives_whole:
                    for box, part in whole.boxes(start, values.flatten()):
                        yield f"{key}.{name}", box, part

    def load(self, read: Callable[[str, Placement], Tensor], step: int) -> None:
        """Put back what :meth:`pieces` gave, on any stage and any number of ranks; a collective.

        ``read`` returns the fp32 value of a named tensor at a place; ``step`` goes on AdamW's bias
        correction.
        """
        self._adapter.make_moments(step)
        self._steps = step
        for name, parameter in self.parameters.items():
            place = self.placements[name]
            self._adapter.set(parameter, read(f"weight.{name}", place).to(self._topology.device), None)
            for key in self._adapter.kept(name in self._muon):
                self._adapter.set(parameter, read(f"{key}.{name}", place).to(self._topology.device), key)

    def held(self) -> dict[str, list[Tensor]]:
        """What this rank holds between two micro-steps: weights, masters, moments and gradients."""
        parameters = list(self.parameters.values())
        own = {id(parameter) for parameter in parameters}
        return {
            # Whole ones, and the parts that ZeRO 3 leaves a rank.
            "weights": [
                *(parameter.data for parameter in parameters),
                *(parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")),
            ],
            "masters": [master for master in self._adapter.masters() if id(master) not in own],
            "moments": [
                value
                for state in self._adapter.adamw().state.values()
                for key, value in state.items()
                if key != "step"
            ],
            "gradients": self._adapter.gradients(),
        }

    def _start_muon(self, dtype: torch.dtype) -> None:
        """Let Muon move its matrices; without ZeRO each data rank has all that its tensor ranks have."""
        place, adamw = self._topology, self._adapter.adamw()
        held = [sum(one.numel() for one in group["params"]) for group in adamw.param_groups]
        weights = [
            {name: (self._muon[name], self.placements[name]) for name in group["muon"]}
            for group in adamw.param_groups
        ]
        groups = zip(weights, held, strict=True)
        matrices = shared_out(groups, place.tensor_size, place.data_size if self.stage else 1)
        muon = Muon(matrices, place.world_group if self.stage else place.tensor_group, dtype)
        adamw.register_step_pre_hook(muon.before_step)

    def _time_reduction(self, reducing: Callable[[], AbstractContextManager[None]]) -> None:
        reduce = self._engine.allreduce_gradients
        if self.stage == 0 and self._topology.data_size == 1:
            # DeepSpeed would copy all gradients into one buffer and back, for nobody: a tenth of a step.
            self._engine.allreduce_gradients = lambda *arguments, **named: None
            return

        def timed(*arguments: Any, **named: Any) -> None:
            with reducing():
                reduce(*arguments, **named)

        self._engine.allreduce_gradients = timed


def average_decay(decay: float, step: int) -> float:
    """Share of the moving average that this step leaves: less at first, when there is little to average."""
    return min(decay, (1 + step) / (10 + step))


def _groups(
    model: nn.Module,
    config: RunConfig,
    decays: Callable[[str, nn.Parameter], bool],
    rate: Callable[[str], float],
    muon: Container[str],
) -> list[dict[str, Any]]:
    """Groups of parameters: one for each optimizer, weight decay and learning rate."""
    groups: dict[tuple[bool, bool, float], dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        groups[name not in muon, not decays(name, parameter), -rate(name)][name] = parameter
    return [
        {
            "params": list(groups[adamw, spared, low].values()),
            "rate": -low,
            "weight_decay": 0.0 if spared else config.optimizer.weight_decay,
            "muon": [] if adamw else list(groups[adamw, spared, low]),
        }
        for adamw, spared, low in sorted(groups)
    ]


def _start(
    model: nn.Module,
    config: RunConfig,
    topology: Topology,
    groups: list[dict[str, Any]],
    settings: dict[str, Any],
) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer around the model."""
    _prepare_deepspeed(topology.device)
    import deepspeed

    optimizer = torch.optim.AdamW(
        groups,
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        fused=True,
    )
    plain = effective_stage(config, topology.data_size) == 0
    with uncompiled(), _one_optimizer_of_stages():
        engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={**settings, "gradient_clipping": 0.0} if plain else settings,
            mpu=_model_parallel_unit(topology),
            dist_init_required=False,
        )
    return engine, wrapped


@contextmanager
def _one_optimizer_of_stages() -> Iterator[None]:
    """Let stage 1 sum bf16's gradients in fp32 in the optimizer that it shares with stage 2.

    DeepSpeed would take another, which lacks parts that zero_stages.py uses.
    """
    from deepspeed.runtime import engine

    usual, engine.BFLOAT16 = engine.BFLOAT16, engine.ZERO_OPTIMIZATION
    try:
        yield
    finally:
        engine.BFLOAT16 = usual


def _prepare_deepspeed(device: torch.device) -> None:
    """Tell DeepSpeed which device it runs on, and keep it from compiling what is not needed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    # DeepSpeed insists on it; srun and plain python do not set it.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # It calls collectives by names that torch 2.13 warns about at every step of every rank.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    # Its autotuner, which nothing uses, imports MLflow where it is installed: a second of each rank's start.
    hidden: Any = sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    if hidden is None:
        del sys.modules["mlflow"]
    logger.setLevel("WARNING")
    if device.type == "cpu":
        # Its shared-memory all-reduce would be compiled for a minute at the first start.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)


def _model_parallel_unit(place: Topology) -> SimpleNamespace:
    """The interface that DeepSpeed asks for process groups; a missing answer only makes the loss wrong."""
    tensor = {"rank": place.tensor_rank, "world_size": place.tensor_size, "group": place.tensor_group}
    data = {"rank": place.data_rank, "world_size": place.data_size, "group": place.data_group}
    answers = {
        **{f"get_model_parallel_{key}": value for key, value in tensor.items()},
        **{f"get_tensor_model_parallel_{key}": value for key, value in tensor.items()},
        "get_tensor_model_parallel_src_rank": place.data_rank * place.tensor_size,
        **{f"get_data_parallel_{key}": value for key, value in data.items()},
    }
    return SimpleNamespace(**{name: partial(_itself, answer) for name, answer in answers.items()})


def _itself(value: Any) -> Any:
    return value
