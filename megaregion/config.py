"""Every setting of a training run: one :class:`RunConfig`, of YAML files merged in order and dotted flags.

settings.py turns the fields into flags and refuses what is out of their bounds; checks.py judges what
must fit together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Literal

from megaregion.bounds import (
    COUNT,
    LARGE,
    Bytes,
    Count,
    FolderName,
    Images,
    OptionalPlace,
    Pixels,
    Place,
    PositiveInt,
    Real,
    Seconds,
    Seed,
    Share,
    Steps,
    Weighted,
    Whole,
    Workers,
    weighted,
)

Precision = Literal["fp32", "bf16"]
BodyPrecision = Literal["fp32", "bf16", "mixed"]
RegionWeights = Literal["shared", "separate"]
RegionStart = Literal["class", "learned"]
LossName = Literal["separated", "softmax"]
MarginName = Literal["cosface", "arcface", "none"]
HeadBackend = Literal["auto", "torch", "triton"]

CropShare = Annotated[float, Real(1e-4, 1, "SHARE")]
AspectRatio = Annotated[float, Real(0.01, 100)]
Mean = Annotated[float, Real(-10, 10, advice="pixels are on the 0..1 scale")]
Deviation = Annotated[float, Real(0, 10, above=True, advice="pixels are on the 0..1 scale")]
SampleRate = Annotated[float, Real(0, 1, "SHARE", above=True, advice="use 1.0 to score every class")]
Decay = Annotated[float, Real(0, 1000)]
StepsOrNone = Annotated[int, Whole(0, COUNT, "STEPS")]
SlowFactor = Annotated[float, Real(1, 10**6, above=True, zero="off")]
Bandwidth = Annotated[float, Real(0, 10**6, "GB/S")]


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer; the defaults are ViT-B/16."""

    image_size: Pixels = 224
    """Side of the square training crop, in pixels; a multiple of patch_size."""
    patch_size: Annotated[int, Whole(1, 1024, "PX")] = 16
    """Side of a patch, in pixels."""
    width: Annotated[int, Whole(1, 65_536)] = 768
    """Width D of a token."""
    depth: Annotated[int, Whole(1, 1000)] = 12
    """Number of transformer blocks."""
    heads: Annotated[int, Whole(1, 1024)] = 12
    """Attention heads of a block; divides width, and parallel.tensor divides it."""
    mlp_width: Annotated[int, Whole(1, 10**6)] = 3072
    """Hidden width of a block's MLP."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Non-linearity of the MLP, named as in transformers' hidden_act."""
    norm_eps: Annotated[float, Real(0, 1, above=True)] = 1e-5
    """Epsilon of every layer norm."""
    rope_theta: Annotated[float, Real(1, 10**9)] = 10_000.0
    """Base of the 2D rotary frequencies."""
    region_layers: Annotated[int, Whole(1, 1000)] = 4
    """Number of last blocks in which region tokens attend to their own patches."""
    region_weights: RegionWeights = "shared"
    """Whether region tokens pass through the blocks' own weights or through a copy of their own."""
    region_start: RegionStart = "class"
    """What region tokens begin as: a copy of the class token's state, or one learned query, with which no
    loss reads the class token."""
    registers: Annotated[int, Whole(0, 1024, "TOKENS")] = 0
    """Learned tokens behind the class token that take part in all attention of the image but that of region
    tokens: 4 keep large models from misusing patches as a notepad (Darcet et al., 2024). Exports need
    --regions then."""
    drop_path: Annotated[float, Real(0, 1, "SHARE", below=True)] = 0.0
    """Stochastic depth: share of images whose attention, and of those whose MLP, training leaves out of the
    last block, with their regions; it rises linearly from 0 in the first one. 0.1 to 0.4 where a model
    overfits; 0 costs nothing."""
    first_weights: Literal["random", "structured"] = "random"
    """Weights before training: random, or structured (whitened cosine filters on patches, attention to
    like and near tokens), which learns faster where a run is minutes long. The architecture is the same."""

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """Share of images whose residual branches each block drops in training."""
        return tuple(self.drop_path * block / max(1, self.depth - 1) for block in range(self.depth))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along one side of the training crop."""
        return self.image_size // self.patch_size

    @property
    def leading(self) -> int:
        """Tokens of an image in front of its patches: class token and registers."""
        return 1 + self.registers

    @property
    def tokens(self) -> int:
        """Tokens of a training crop."""
        return self.leading + self.grid**2


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are, and how an image becomes a training sample."""

    path: Annotated[str, Weighted()] = "data/shards"
    """Folder with dataset.json and its shards, as tools/curate.py writes it; or its URL (s3://, hf:// ...),
    or pipe:COMMAND with {} for the name of a file. Several with their weights: a=2,b=1, or in YAML
    [{path: a, weight: 2}, {path: b, weight: 1}]."""
    cache: OptionalPlace = ""
    """Folder for the shards of a remote dataset, on the host's own disk; empty for one in the user's home."""
    cache_bytes: Bytes = 256 * 10**9
    """Most bytes in the cache; with room for two windows of data.window_shards shards, the next one comes
    while the last is read."""
    regions_per_image: Annotated[int, Whole(1, 10_000)] = 10
    """Regions N that every image gives; fewer are resampled, more are subsampled."""
    max_text_tokens: Annotated[int, Whole(1, 10_000)] = 16
    """Most distinct tokens kept as positives of one text region."""
    max_object_labels: Annotated[int, Whole(1, 10_000)] = 1
    """Most clusters kept as positives of one object region, of those that the shards hold for it
    (tools/curate.py --labels-per-region)."""
    object_labels: Literal["nearest", "drawn"] = "nearest"
    """Which clusters of an object region are kept where the shards hold more: the nearest, or others drawn
    each time that the image comes."""
    crop_scale: tuple[CropShare, CropShare] = (0.5, 1.0)
    """Least and greatest share of the image's area in a random crop."""
    crop_ratio: tuple[AspectRatio, AspectRatio] = (0.75, 4 / 3)
    """Least and greatest aspect ratio (width / height) of a random crop."""
    flip: Share = 0.5
    """Probability of a horizontal flip; images with text are never flipped."""
    color_jitter: Share = 0.0
    """Strength of random brightness, contrast and saturation, as a share of 1."""
    min_visible: Share = 0.5
    """A region stays if at least this share of its box lies inside the crop."""
    patch_coverage: Share = 0.5
    """A patch belongs to a region that covers at least this share of it."""
    mean: tuple[Mean, Mean, Mean] = (0.48145466, 0.4578275, 0.40821073)
    """Mean subtracted from each of R, G, B on the 0..1 scale (CLIP's)."""
    std: tuple[Deviation, Deviation, Deviation] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation that divides each of R, G, B (CLIP's)."""
    packing: Literal["square", "native"] = "square"
    """square stretches every crop to image_size; native keeps its aspect ratio at no more patches than a
    square has, and the patches of a micro-batch's images share one sequence without padding (crop_ratio is
    then relative to the image's own)."""
    workers: Workers = 2
    """Processes of one rank that read and decode; 0 decodes in the training process."""
    prefetch: Annotated[int, Whole(1, 10_000, "BATCHES")] = 2
    """Batches that each worker prepares ahead."""
    window_shards: Annotated[int, Whole(1, 10**6, "SHARDS")] = 8
    """Shards whose samples are shuffled together."""
    max_bad_share: Share = 0.01
    """Share of unreadable samples above which the run stops."""
    read_retries: Annotated[int, Whole(0, 20)] = 5
    """Tries after a storage error before a shard is skipped; with parallel.tensor above 1 the run ends
    instead, for ranks that share a model must read the same."""
    read_pause: Annotated[float, Real(0, 3600, "SECONDS")] = 1.0
    """Seconds before the first of these tries; each later pause is twice as long."""

    @property
    def datasets(self) -> tuple[tuple[str, Fraction], ...]:
        """Path and weight of every dataset."""
        return tuple(weighted(self.path))

    @property
    def label_slots(self) -> int:
        """Positives for which a region has room."""
        return max(self.max_text_tokens, self.max_object_labels)


@dataclass(frozen=True)
class HeadConfig:
    """One classification head and the label kind it learns from."""

    loss: LossName = "separated"
    """separated: RICE's two-term loss; softmax: sampled softmax (UNICOM, PartialFC), the baseline."""
    margin: Annotated[float, Real(0, 1, below=True)] = 0.3
    """Margin m of a positive: cosine - m (cosface) or angle + m (arcface)."""
    margin_kind: MarginName = "cosface"
    """Where the margin acts."""
    scale: Annotated[float, Real(0, 10_000, above=True)] = 64.0
    """Factor s of the cosine similarities."""
    sample_rate: SampleRate = 0.1
    """Share of negative classes that enter the loss of one draw; 1.0 scores every class."""
    min_negatives: Count = 64
    """Random negatives that are always drawn (all of them when there are fewer classes)."""
    weight: Annotated[float, Real(0, 10**6)] = 1.0
    """Weight of this head's loss in the sum."""
    near_classes: Annotated[float, Real(0, 1, "COSINE")] = 0.0
    """Cosine of two of the dataset's centers above which one is no negative of a region of the other; 0
    turns it off. For objects alone; 0.75 spares near duplicates."""


@dataclass(frozen=True)
class HeadsConfig:
    """The heads for objects and for text, and what they share."""

    embedding_dim: Annotated[int, Whole(1, 65_536)] = 512
    """Width E of region embeddings and class centers."""
    chunk_bytes: Bytes = 256 * 2**20
    """Memory for one chunk of logits, in bytes; the full matrix never exists."""
    draw_images: Annotated[int, Whole(0, COUNT, "IMAGES")] = 0
    """Images that share one draw of negatives; divides the images of a micro-step over all ranks.
    0 takes the whole micro-step, so that the draw then depends on train.micro_batch and on the
    number of data-parallel ranks. Without a meaning where both heads' sample_rate is 1."""
    backend: HeadBackend = "auto"
    """How draws are scored: torch (one after the other), triton (all in a few kernels, on a GPU), or auto (a
    GPU tries both when training starts and takes the faster one that is right)."""
    init: Literal["random", "centers"] = "random"
    """Start of the object centers: random, or the dataset's k-means centers."""
    hierarchical: Literal["auto", "on", "off"] = "auto"
    """Whether features and their gradients cross the network node by node, so that each row enters a node
    once: auto does so on several nodes of equally many ranks, on refuses to start where that cannot be."""
    census_every: StepsOrNone = 1_000
    """Steps between looks for idle classes and near-duplicate centers; 0 never looks."""
    idle_steps: Steps = 10_000
    """Steps without a positive after which a class counts as idle."""
    object: HeadConfig = field(default_factory=HeadConfig)
    """Objects: one positive, the region's cluster, or several (data.max_object_labels)."""
    text: HeadConfig = field(default_factory=lambda: HeadConfig(sample_rate=1.0))
    """Text: several positives, the tokens of the region's words."""

    @property
    def by_kind(self) -> dict[str, HeadConfig]:
        """Settings of each kind of label's head, in the order of the heads."""
        return {"object": self.object, "text": self.text}


@dataclass(frozen=True)
class DistillConfig:
    """Patch features that learn from those of a frozen teacher, beside the heads' losses."""

    teacher: OptionalPlace = ""
    """Vision encoder whose features of each patch are learned: a folder of safetensors or a hub id that
    transformers' AutoModel loads (DINOv2, DINOv3, SigLIP, CLIP, MLCD, an export); empty for none."""
    weight: Annotated[float, Real(0, 10**6, above=True)] = 1.0
    """Weight of 1 - cosine, its mean over patches and images, beside the loss of the heads."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (or Muon) with warm-up and cosine decay, over body and heads alike."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon, which moves the blocks' matrices along their orthogonalised momentum and all else by
    AdamW. It keeps half the moments of a matrix, and scales its updates to the size of AdamW's
    (0.2 sqrt(longer side)), so that one lr and weight_decay serve both; ZeRO 0 to 2."""
    lr: Annotated[float, Real(0, 10, above=True)] = 1e-3
    """Peak learning rate."""
    min_lr_ratio: Share = 0.01
    """Learning rate at the last step, as a share of the peak."""
    warmup_steps: StepsOrNone = 2_000
    """Steps of linear warm-up from 0."""
    weight_decay: Decay = 0.2
    """Decoupled weight decay of matrices; biases, norms and single tokens have none."""
    head_weight_decay: Decay = 0.0
    """Decoupled weight decay of class centers (their norm does not matter to the loss)."""
    head_moments: Precision = "fp32"
    """Type of the class centers' AdamW moments; bf16 halves their memory."""
    beta1: Annotated[float, Real(0, 1, below=True)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Real(0, 1, below=True)] = 0.98
    """Decay of the second moment."""
    eps: Annotated[float, Real(0, 1, above=True)] = 1e-6
    """Term added to the root of the second moment."""
    clip_norm: Annotated[float, Real(0, 10**9)] = 1.0
    """Bound on the global gradient norm over body and heads together; 0 turns clipping off."""
    layer_decay: Annotated[float, Real(0, 1, above=True)] = 1.0
    """Factor of the learning rate from each block to the one below it, to spare the lower blocks of weights
    that --init took over; 1 moves all alike."""
    ema_decay: Annotated[float, Real(0, 1, below=True)] = 0.0
    """Share that a step leaves of the moving average of the body's weights. Exports, evaluations and --init
    then take the average, which is sharded as the moments are and lies in checkpoints; 0 keeps none."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks; all other ranks are data-parallel."""

    tensor: Annotated[int, Whole(1, 1024, "RANKS")] = 1
    """Ranks that share one copy of the model (tensor parallel)."""
    sequence: bool = True
    """Where tensor is above 1, cut the tokens between the linears over its ranks too: less memory for
    activations, norms not repeated on every rank; the same result."""
    zero_stage: Annotated[int, Whole(0, 3)] = 1
    """DeepSpeed ZeRO stage: 0 to 3; 0 only in fp32."""

    @property
    def tokens_cut(self) -> bool:
        """Whether the tokens between the linears are cut over tensor ranks."""
        return self.sequence and self.tensor > 1


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the run."""

    steps: Steps = 100_000
    """Optimizer steps."""
    global_batch: Images = 4096
    """Images of one optimizer step, over all ranks; stays the same when the ranks change."""
    micro_batch: Images = 64
    """Most images that one rank passes through the model at once; a rank's share of global_batch is cut
    into equal parts of at most as many."""
    precision: BodyPrecision = "bf16"
    """Type of the body's parameters, or mixed: fp32, and the blocks' linears multiply in bf16 on GPUs and on
    processors with units for it; masters, centers and losses are fp32 in any case."""
    grad_precision: Precision = "fp32"
    """Type in which the body's gradients add up over micro-steps and over the data ranks, and those of region
    embeddings over all ranks; bf16 halves their memory and traffic, and rounds every sum."""
    recompute: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    activation_gib: Annotated[float, Real(0, 10**6, "GIB")] = 0.0
    """Most memory for what the blocks keep of a micro-batch for the backward pass, in GiB: as many blocks as
    needed then recompute norms and GELU, and where that is not enough, everything; 0 sets no bound."""
    fp8: bool = False
    """Multiply in 8-bit floats in the blocks' linears, on GPUs from Ada and Hopper on (bf16, tensor 1)."""
    compile: bool = False
    """Compile each block with torch.compile; a start takes minutes longer, and on a CPU it does not pay."""
    deterministic: bool = False
    """Use only kernels whose sums have a fixed order, so that a run on GPUs and its resumes are equal bit for
    bit, as on processors without it; slower, and no better."""
    log_every: Steps = 1
    """Steps between log lines."""
    slow_factor: SlowFactor = 1.5
    """How many times the median one rank's own time (data, forward) may take before the log names it with its
    host; 0 turns the report off."""
    watchdog_seconds: Seconds = 1800.0
    """Stand-still of any rank, in seconds, after which the run ends with exit code 87 and names the rank;
    start-up, saving and loading may take three times as long; 0 turns the watchdog off."""

    @property
    def bf16(self) -> bool:
        """Whether the body is in bf16."""
        return self.precision == "bf16"

    @property
    def value_bytes(self) -> int:
        """Bytes of a parameter or an activation of the body."""
        return 2 if self.bf16 else 4

    @property
    def sum_precision(self) -> Precision:
        """Type of the body's summed gradients: in fp32 there is nothing to halve."""
        return self.grad_precision if self.bf16 else "fp32"

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element of the body's summed gradients."""
        return 2 if self.sum_precision == "bf16" else 4


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it keeps."""

    every: Steps = 1_000
    """Save after this many steps; a preempted run and the last step also save."""
    asynchronous: bool = True
    """Go on with training while a checkpoint is written, from a copy in host memory as large as this
    rank's share of it; false waits until it is written."""
    local: OptionalPlace = ""
    """Folder on every host's own disk where ranks write first, before they copy to the run's folder; empty
    writes to the run's folder at once."""
    keep_last: PositiveInt = 3
    """Newest checkpoints kept; older ones are deleted unless another rule keeps them."""
    keep_every: StepsOrNone = 0
    """Checkpoints at multiples of this many steps are never deleted; 0 for none."""
    keep_best: Count = 0
    """Checkpoints kept for their low loss, the mean of what was logged since the one before; 0 for none."""


@dataclass(frozen=True)
class GuardConfig:
    """Which steps are refused, and when the run goes back to its last checkpoint."""

    enabled: bool = True
    """Skip steps whose loss or gradient norm is not finite or whose loss is a spike; off, the first one that
    is not finite ends the run."""
    window: Annotated[int, Whole(1, 10**6, "STEPS")] = 128
    """Accepted steps whose losses set the bound; until there are as many, only finiteness is judged."""
    spike: Annotated[float, Real(0, 10**6)] = 10.0
    """Deviations above the window's median (by its median absolute deviation) at which a loss is a spike;
    0 judges finiteness alone."""
    rollback_after: Steps = 3
    """Refused steps in a row after which the run goes back to its last checkpoint."""
    max_rollbacks: Count = 3
    """Returns to a checkpoint after which the run ends."""
    captures: Count = 1
    """Steps that are not finite of which batch and state are kept for tools/replay.py, each as large
    as a checkpoint and a global batch of pixels; 0 keeps none."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The look at held-out scenes while a run trains, by a process of its own beside rank 0."""

    every: StepsOrNone = 0
    """Steps between looks, a multiple of checkpoint.every, for saved weights are looked at; 0 never looks."""
    scenes: OptionalPlace = ""
    """Scene set of tools/make_scenes.py, with train and the split that is asked about."""
    split: Literal["val", "test"] = "val"
    """Split that is asked about: val, or test for numbers that no setting was chosen by."""
    limit: Count = 500
    """Training objects in the gallery, drawn as whole scenes; 0 takes all."""
    threads: Annotated[int, Whole(1, 1024)] = 1
    """Processor threads that the look takes on rank 0's host, at the lowest priority."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where a run is shown beside its own metrics.jsonl; rank 0 alone shows it."""

    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Trackers that get settings, metrics, tables and pictures; one that fails never stops a run."""
    project: FolderName = "megaregion"
    """Project of W&B and trackio, experiment of MLflow."""


@dataclass(frozen=True)
class MachinesConfig:
    """What the machines must give before a start, with --preflight."""

    slow_factor: SlowFactor = 1.5
    """How many times the median one rank's matrix product may take; 0 judges none."""
    inside_gbytes: Bandwidth = 0.0
    """Least bus bandwidth of an all-reduce inside every host, in GB/s; 0 only measures it."""
    across_gbytes: Bandwidth = 0.0
    """Least bus bandwidth of an all-reduce over all ranks, in GB/s; 0 only measures it."""
    clock_skew: Seconds = 5.0
    """Seconds that a host's clock may be off the others'."""
    free_checkpoints: Annotated[int, Whole(0, 1000)] = 2
    """Checkpoints that must still fit on the disk."""


@dataclass(frozen=True)
class StageConfig:
    """Another resolution, from some image of the run on."""

    image_size: Pixels = 224
    """Side of the square training crop, in pixels; a multiple of model.patch_size."""
    from_image: Annotated[int, Whole(0, LARGE, "IMAGES")] = 0
    """Images seen before it begins; a multiple of train.global_batch."""
    lr_scale: Annotated[float, Real(0, 1000, above=True)] = 1.0
    """Factor of the learning rate that the schedule gives."""
    micro_batch: Annotated[int, Whole(0, COUNT, "IMAGES")] = 0
    """Most images that one rank passes through the model at once at this size; 0 keeps train.micro_batch."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    name: FolderName = "run"
    """Name of the run; its folder is output/name."""
    output: Place = "runs"
    """Folder of all runs."""
    seed: Seed = 0
    """Seed of weights, order, augmentation and negatives."""
    init: OptionalPlace = ""
    """Checkpoint, run or HuggingFace folder (MLCD, RICE, CLIP) whose transformer the run begins with; step,
    moments, projection and heads are new. Empty draws the weights. A resumed run does not look at it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    head: HeadsConfig = field(default_factory=HeadsConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    machines: MachinesConfig = field(default_factory=MachinesConfig)
    stages: tuple[StageConfig, ...] = field(default=())
    """Resolutions that follow on model.image_size, in their order; a run resumes in the middle of any."""

    def stage(self, position: int) -> StageConfig:
        """The resolution at a position of the stream."""
        passed = [stage for stage in self.stages if stage.from_image <= position]
        return passed[-1] if passed else StageConfig(self.model.image_size)
