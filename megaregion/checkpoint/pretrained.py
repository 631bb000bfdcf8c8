"""Weights that a run begins with instead of drawn ones: our checkpoint, or somebody's HuggingFace folder.

Only the transformer's weights are taken: projection and heads belong to the classes of one dataset. The image
size is free, for rotary positions have no table. Below: folders of transformers' ``MLCDVisionModel``, and its
names of our parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaregion.bounds import shown
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, open_checkpoint, run_config
from megaregion.checks import check_config
from megaregion.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from megaregion.errors import UserError
from megaregion.files import read_json
from megaregion.models import VisionTransformer
from megaregion.models.initialisation import initial_value
from megaregion.settings import check, read_settings

FUNCTION = (
    "patch_size", "width", "depth", "heads", "mlp_width", "activation", "norm_eps", "rope_theta", "registers",
)  # fmt: skip
"""Settings that weights only make sense with."""


@dataclass(frozen=True)
class Pretrained:
    """Weights to begin with."""

    source: EncoderFolder | CheckpointReader
    model: ModelConfig
    """Settings of the transformer that they belong to."""
    data: DataConfig
    """Mean and deviation of the images it saw."""
    notices: tuple[str, ...] = ()
    """What a user should know of them, a line each."""

    def read(self, name: str) -> Tensor:
        """One parameter under its name in VisionTransformer, float32.

        Raises:
            UserError: It is missing or damaged.
        """
        if isinstance(self.source, EncoderFolder):
            return self.source.read(name)
        try:
            return finite(
                self.source.read(self.source.encoder(f"vit.{name}")).float(), f"{self.source.folder}: {name}"
            )
        except DamagedCheckpoint as error:
            raise UserError(f"{error}; copy the checkpoint again") from error

    @torch.no_grad()
    def fill(self, vit: VisionTransformer) -> None:
        """Put the weights into a transformer, whole on this rank; its image size may be another.

        Region tokens' own weights become copies of the blocks' where there are none yet, as in a new run;
        registers and the query of region tokens stay as they were drawn where there were none.

        Raises:
            UserError: The transformer's settings are others.
        """
        theirs, ours = self.model, vit.config
        drawn = self._drawn(ours)
        if REGISTERS in drawn:
            ours = replace(ours, registers=0)
        other = [key for key in FUNCTION if getattr(theirs, key) != getattr(ours, key)]
        if other:
            told = ", ".join(
                f"model.{key} {getattr(theirs, key)} and not {getattr(ours, key)}" for key in other
            )
            raise UserError(
                f"init: the weights in {self.source.folder} need {told}; set them, or add the model.yaml "
                "that tools/convert_checkpoint.py from-hf writes as a last --config"
            )
        for name, parameter in vit.named_parameters():
            if name not in drawn:
                parameter.copy_(self.read(self._source_of(name)))

    def advice(self, config: RunConfig) -> list[str]:
        """What a user who begins a run with these weights should know."""
        lacking = self._drawn(config.model).values()
        found = [*self.notices, *(f"they have no {told}" for told in lacking)]
        if self.model.region_start == "learned" != config.model.region_start:
            found.append("their learned query of region tokens is left out: model.region_start is class")
        if (self.data.mean, self.data.std) != (config.data.mean, config.data.std):
            found.append(
                f"they saw images normalised by data.mean {list(self.data.mean)} and data.std "
                f"{list(self.data.std)}, this run has others"
            )
        return found

    def _drawn(self, ours: ModelConfig) -> dict[str, str]:
        """Parameters that the weights lack and a run keeps as they were drawn, each with what is told."""
        found = {}
        if ours.registers > self.model.registers == 0:
            found[REGISTERS] = f"registers: the run's {ours.registers} begin untrained"
        if ours.region_start == "learned" != self.model.region_start:
            found[QUERY] = "learned query of region tokens: the run's begins untrained"
        return found

    def _source_of(self, name: str) -> str:
        """Whose values a parameter takes: for a region token's own weights perhaps the block's."""
        if ".region." not in name:
            return name
        block, theirs = int(name.split(".")[1]), self.model
        if theirs.region_weights == "separate" and block >= theirs.depth - theirs.region_layers:
            return name
        return name.replace(".region.", ".")


def open_pretrained(path: Path, verify: bool = True) -> Pretrained:
    """Open a HuggingFace folder, or what :func:`open_checkpoint` opens.

    Raises:
        UserError: It is none of them, or damaged.
    """
    if is_encoder_folder(path):
        folder = EncoderFolder(path)
        return Pretrained(folder, folder.model, folder.data, tuple(folder.notices))
    reader = open_checkpoint(path, verify)
    config = run_config(reader)
    return Pretrained(reader, config.model, config.data)


ARCHITECTURES = {
    "mlcd": "MLCD", "mlcd_vision_model": "MLCD", "clip_vision_model": "CLIP", "clip": "CLIP",
    "megaregion_vit": "MLCD",
}  # fmt: skip
"""What config.json may say as model_type, and whose vision tower that is."""
FLOATS = ("F32", "F16", "BF16", "F64")

PREFIX = "vision_model."
"""Begins every key of the encoder in a folder, whose config.json says ``mlcd``, as the released folders do:
transformers 4.57 finds neither without, and would fill the model with random weights; 5.x takes both."""
REGION = "region_layers."
"""Begins the keys of region tokens' own weights, which only the region class knows."""
INDEX = "model.safetensors.index.json"
"""Says which of several files holds which tensor."""
REGISTERS = "register_tokens"
"""Name of the parameter of VisionTransformer that holds registers."""
QUERY = "region_query"
"""Name of the parameter of VisionTransformer that region tokens may begin as, and its key in folders."""
PROJECTION = "projection.weight"
"""Key of the projection in folders with the region class; ours is called the same."""


@dataclass(frozen=True)
class _Place:
    file: Path
    key: str
    shape: tuple[int, ...]


class EncoderFolder:
    """Random access to the weights of a folder, in float32, one parameter at a time.

    It may be of MLCD or RICE, what ``to-hf`` wrote, or CLIP's vision tower, alone or beside its text tower.
    Only config.json, preprocessor_config.json and safetensors files are read: no pickle, no code.
    """

    def __init__(self, folder: Path) -> None:
        """Read the settings and the headers of all files.

        Raises:
            UserError: It is no such folder, a file is missing, or the architecture or a type is another.
        """
        self.folder = folder
        settings = _json(folder / "config.json")
        self.architecture = _architecture(folder, settings)
        vision = settings.get("vision_config", settings) if settings["model_type"] == "clip" else settings
        if not isinstance(vision, dict):
            raise UserError(f"{folder}/config.json: vision_config must be an object, got {shown(vision)}")
        self.model = _model(folder, vision)
        kinds = ("region_layers", "region_weights", "region_start")
        self.of_regions = tuple(key for key in kinds if key in vision)
        """Settings of region tokens that the folder says, as one with the region class does."""
        self.data = _data(folder, vision)
        self._places = _places(folder)
        with torch.device("meta"):
            parameters = VisionTransformer(self.model).named_parameters()
            self._shapes = {name: parameter.shape for name, parameter in parameters}
        self.notices = self._notices()

    @property
    def embedding_dim(self) -> int | None:
        """Width of the projection; None if there is none."""
        place = self._places.get(PROJECTION)
        return place.shape[0] if place is not None and len(place.shape) == 2 else None

    def names(self) -> list[str]:
        """Names of all parameters of VisionTransformer."""
        return list(self._shapes)

    def read(self, name: str) -> Tensor:
        """One parameter, under its name in VisionTransformer or as ``projection.weight``, float32.

        Raises:
            UserError: It is missing, has another shape or cannot be read.
        """
        if name == PROJECTION:
            return self._tensor(name)
        if name == "class_pos_emb" and self.architecture == "CLIP":
            return initial_value(f"vit.{name}", self._shapes[name], self.model, seed=0)
        try:
            tensor = join_mlcd(name, self._tensor, self.model)
        except RuntimeError as error:
            raise UserError(f"{self.folder}: {name} does not fit config.json ({error})") from error
        if tensor.shape != self._shapes[name]:
            raise UserError(
                f"{self.folder}: {name} has the shape {list(tensor.shape)}, config.json asks for "
                f"{list(self._shapes[name])}; weights and config.json belong to different models"
            )
        return tensor

    def _tensor(self, key: str) -> Tensor:
        place = self._places.get(key)
        if place is None:
            raise UserError(f"{self.folder} holds no tensor {key}; the folder is not complete, copy it again")
        try:
            with safe_open(place.file, framework="pt") as file:
                tensor = file.get_tensor(place.key).to(torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{place.file} cannot be read: {error}; copy it again") from error
        return finite(tensor, f"{place.file}: {place.key}")

    def _notices(self) -> list[str]:
        """What a user should know of what was left or made."""
        found = []
        if self.architecture == "CLIP":
            found.append(
                "CLIP's absolute positions are dropped and its class token gets a drawn angle: with 2D "
                "rotary positions its features are others until it has trained"
            )
        known = {"embeddings.position_embedding.weight", "embeddings.position_ids", PROJECTION}
        known.update(key for name in self._shapes for key in mlcd_keys(name, self.model))
        left = [key for key in self._places if key not in known and not key.startswith(_OTHER_PARTS)]
        deeper = [key for key in left if key.startswith(f"encoder.layers.{self.model.depth}.")]
        if deeper:
            raise UserError(
                f"{self.folder} holds {deeper[0]}, but config.json names {self.model.depth} layers; weights "
                "and config.json belong to different models"
            )
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            found.append(f"left out, for the encoder has no such parameters: {', '.join(left[:3])}{more}")
        return found


def finite(tensor: Tensor, where: str) -> Tensor:
    """The same tensor; raises UserError if a value is NaN or infinite: all training on it would be lost."""
    if not tensor.isfinite().all():
        raise UserError(f"{where} holds values that are not finite; take other weights, or copy them again")
    return tensor


_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""Keys of a whole CLIP that are no part of its vision tower."""

_ENCODER = (
    "class_pos_emb", "embeddings.class_embedding", "embeddings.patch_embedding.", "pre_layrnorm.",
    "encoder.layers.", "post_layernorm.", REGION, f"embeddings.{REGISTERS}", QUERY,
)  # fmt: skip


def is_encoder_folder(folder: Path) -> bool:
    """Whether a folder looks like one of HuggingFace's."""
    return (folder / "config.json").is_file()


def _json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} is no HuggingFace folder (no {file.name}); give a folder with config.json and "
            "safetensors files"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings; copy it again")
    return content


def _architecture(folder: Path, settings: dict[str, Any]) -> str:
    kind = settings.get("model_type")
    if kind == "rice_vit":
        raise UserError(
            f"{folder} has the layout llava-onevision-1.5, which lacks the last norm; give the MLCD folder "
            "of the same encoder"
        )
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"{folder}/config.json says model_type {shown(kind)}, which is another architecture; this reads "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[kind]


_SIZES = {
    "num_hidden_layers": "depth", "image_size": "image_size", "patch_size": "patch_size",
    "hidden_size": "width", "num_attention_heads": "heads", "intermediate_size": "mlp_width",
}  # fmt: skip


def _model(folder: Path, settings: dict[str, Any]) -> ModelConfig:
    """Our settings from theirs; a :class:`UserError` where our transformer has no such thing."""
    where = f"{folder}/config.json"
    fixed = {"num_channels": 3, "num_key_value_groups": 1, "attention_dropout": 0}
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise UserError(f"{where}: {key} {shown(settings[key])} is not supported, only {value}")
    rotary = settings.get("rope_parameters") or {}
    if not isinstance(rotary, dict):
        raise UserError(f"{where}: rope_parameters must be an object, got {shown(rotary)}")
    if rotary.get("rope_type", "axial") != "axial":
        raise UserError(f"{where}: rope_type {shown(rotary['rope_type'])} is not supported, only axial")
    activation = settings.get("hidden_act", "gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"{where}: hidden_act {shown(activation)} is not supported, only gelu and quick_gelu")
    for key in _SIZES:
        size = settings.get(key)
        if isinstance(size, bool) or not isinstance(size, int):
            raise UserError(f"{where}: {key} must be one whole number, got {shown(size)}")
    values = {
        **{ours: settings[theirs] for theirs, ours in _SIZES.items()},
        "activation": activation,
        "norm_eps": settings.get("layer_norm_eps", 1e-5),
        "rope_theta": rotary.get("rope_theta", 10_000.0),
        "region_layers": settings.get(
            "region_layers", min(settings["num_hidden_layers"], ModelConfig.region_layers)
        ),
        "region_weights": settings.get("region_weights", "shared"),
        "region_start": settings.get("region_start", "class"),
        "registers": settings.get("num_register_tokens", 0),
    }
    try:
        model = read_settings(ModelConfig(), values, "model")
        check_config(RunConfig(model=model, optimizer=OptimizerConfig(warmup_steps=0)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return model


def _data(folder: Path, vision: dict[str, Any]) -> DataConfig:
    """Mean and deviation of preprocessor_config.json, CLIP's if there is none; coverage of config.json."""
    usual = DataConfig()
    try:
        usual = read_settings(
            usual, {key: vision[key] for key in ("patch_coverage",) if key in vision}, "data"
        )
        check(usual, "data")
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from None
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return usual
    settings = _json(file)
    parts = [settings.get("image_mean", usual.mean), settings.get("image_std", usual.std)]
    if not all(isinstance(part, (list, tuple)) and len(part) == 3 for part in parts):
        raise UserError(f"{file}: image_mean and image_std must be three numbers each, got {shown(parts)}")
    try:
        data = read_settings(usual, {"mean": parts[0], "std": parts[1]}, "data")
        check(data, "data")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return data


def _places(folder: Path) -> dict[str, _Place]:
    """Where every tensor lies, by its key without prefix."""
    places = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no dictionary
                    described, bare = opened.get_slice(key), key.removeprefix(PREFIX)
                    if (kind := described.get_dtype()) not in FLOATS and bare.startswith(_ENCODER):
                        raise UserError(
                            f"{file}: {key} has the type {kind}, which is not supported; save the model as "
                            f"one of {', '.join(FLOATS)}"
                        )
                    places[bare] = _Place(file, key, tuple(described.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}; copy it again") from error
    return places


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        listed = _json(index).get("weight_map")
        names = listed.values() if isinstance(listed, dict) else [None]
        if not all(isinstance(name, str) and 0 < len(name.encode(errors="replace")) < 256 for name in names):
            raise UserError(f"{index} has no weight_map of file names; copy it again")
        files = [folder / Path(name).name for name in sorted(set(names))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            unread = f" (pickles such as {pickles[0]} are not read)" if pickles else ""
            way_out = "save the model with safe_serialization" if pickles else "copy the folder again"
            raise UserError(f"{file} is missing{unread}; {way_out}")
    return files


_WHOLE = {
    "class_pos_emb": "class_pos_emb",
    "class_embedding": "embeddings.class_embedding",
    REGISTERS: f"embeddings.{REGISTERS}",
    QUERY: QUERY,
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # The misspelling is theirs, and part of the format.
    "post_norm": "post_layernorm",
}

_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.out": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

_BLOCK = re.compile(r"blocks\.(\d+)\.(region\.)?(.+)\.(weight|bias)")
_FUSED = "attention.qkv"


def mlcd_keys(name: str, config: ModelConfig) -> list[str]:
    """Names in MLCDVisionModel of a parameter of VisionTransformer: one, or queries, keys and values apart.

    Raises:
        KeyError: VisionTransformer has no such parameter.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        stem, _, end = name.rpartition(".")
        return [f"{_WHOLE[stem]}.{end}" if stem in _WHOLE else _WHOLE[name]]
    block, own, part, end = match.groups()
    first = config.depth - config.region_layers
    layer = f"{REGION}{int(block) - first}" if own else f"encoder.layers.{block}"
    if part != _FUSED:
        return [f"{layer}.{_IN_BLOCK[part]}.{end}"]
    return [f"{layer}.self_attn.{letter}_proj.{end}" for letter in "qkv"]


def mlcd_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Rename a parameter as :func:`mlcd_keys` does, and split it where it is a fused projection.

    One on the meta device gives the shapes.
    """
    keys = mlcd_keys(name, config)
    if len(keys) == 1:
        yield keys[0], tensor
        return
    # Rows are laid out (heads, 3, head width): a plain chunk in three would mix heads up.
    heads = tensor.view(config.heads, 3, config.head_dim, *tensor.shape[1:])
    for index, key in enumerate(keys):
        yield key, heads[:, index].flatten(0, 1)


def join_mlcd(name: str, read: Callable[[str], Tensor], config: ModelConfig) -> Tensor:
    """Put one of our parameters together from theirs, which ``read`` gives; undoes :func:`mlcd_tensors`."""
    parts = [read(key) for key in mlcd_keys(name, config)]
    if len(parts) == 1:
        return parts[0]
    heads = [part.view(config.heads, config.head_dim, *part.shape[1:]) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)
