"""The model card of an exported encoder, filled from its run; its code runs as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.export.layouts import Layout
from megaregion.schemas.evaluation import EVALUATION, markdown, read_evaluation

_HEAD = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
license: {license}
tags: [vision, region, megaregion]
---

# {name}

A vision encoder trained by region-based cluster discrimination with megaregion: run `{run}`, step {step:,}, \
{parameters:,} parameters, {depth} blocks of width {width}, patches of {patch} px, images of {side} px.
Any height and width that are multiples of {patch} work.
"""

_TRANSFORMERS = """
```python
import torch
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("."{trust})  # this folder
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=image, return_tensors="pt")["pixel_values"]
features = model(pixel_values=pixels)
features.last_hidden_state  # class token, then patches row by row, before the last norm
features.pooler_output  # class token after the last norm
```

transformers 4.57 and 5 load it.
"""

_LLAVA = """
The keys and settings are those of LLaVA-OneVision-1.5's RICE tower, without its patch merger: copy the
tensors `visual.*` into a model of that project, whose `visual.merger.*` begins untrained, and config.json
into its `vision_config`. The layout was taken from that project's public code and not run with it.
"""

_API = """
## Features of regions

A region's feature is the class token of a network whose last {region_layers} blocks see only the region's
patches; one pass over the image serves all its regions. Images may have different numbers of regions.

```python
side = model.config.image_size
whole = processor(
    images=image, size={{"height": side, "width": side}}, do_center_crop=False, return_tensors="pt"
)["pixel_values"]
boxes = torch.tensor([[0, 0, image.width / 2, image.height / 2]])  # x0, y0, x1, y1 in pixels of the image
boxes = boxes * torch.tensor([side / image.width, side / image.height] * 2)
[regions] = model.get_region_features(whole, boxes=[boxes])  # {told}
```

`masks=[bool [N, H, W]]` takes exact shapes instead; `projected=False` gives the normed tokens [N, {width}].
"""

_HOOK = """
## Features of regions

A region's feature is the class token of a network whose last {region_layers} blocks see only the region's
patches. An export with `--regions` brings a class for it (`get_region_features`); this is the plain encoder.
"""

_SEPARATE = """
## Features of regions

Region tokens had weights of their own in training; this folder does not hold them (an export with `--regions`
does) and gives features of images and patches only.
"""

_TRAINING = """
## Training

| | |
|---|---|
{rows}

## Evaluation

{evaluation}
## Licence

`{license}`{unknown}. The pictures that it was trained on have licences of their own.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells."""

    config: RunConfig
    """The run's settings."""
    manifest: dict[str, Any]
    """The checkpoint's manifest."""
    parameters: int
    """Parameters of the exported model."""
    license: str
    """The hub's identifier of the weights' licence."""
    name: str
    """Name of the model."""
    regions: bool
    """Whether the folder holds the region part."""


def model_card(facts: CardFacts, layout: Layout, evaluation: str) -> str:
    """Write the card; `evaluation` is Markdown of what was measured."""
    model = facts.config.model
    values = {
        "name": facts.name, "run": facts.config.name, "license": facts.license,
        "step": int(facts.manifest["step"]), "parameters": facts.parameters, "depth": model.depth,
        "width": model.width, "patch": model.patch_size, "side": model.image_size,
        "region_layers": model.region_layers, "rows": _training(facts), "evaluation": evaluation,
        "trust": ", trust_remote_code=True" if facts.regions else "",
        "told": f"[N, {facts.config.head.embedding_dim}]: what the heads classified",
        "unknown": " (nobody has stated one)" if facts.license == "unknown" else "",
    }  # fmt: skip
    if layout.usage == "llava":
        parts = [_HEAD, _LLAVA]
    elif facts.regions:
        parts = [_HEAD, _TRANSFORMERS, _API]
    else:
        parts = [_HEAD, _TRANSFORMERS, _SEPARATE if model.region_weights == "separate" else _HOOK]
    return "".join(part.format(**values) for part in [*parts, _TRAINING])


def evaluation_section(checkpoint: Path, file: Path | None = None) -> str:
    """Markdown of what evaluation.json, the run's own or another, says of a checkpoint, if there is one.

    Raises:
        UserError: A file was named and cannot be used.
    """
    found = file or checkpoint.parent.parent / EVALUATION
    if file is None and not found.is_file():
        return "This checkpoint has not been evaluated (`tools/evaluate.py` does it).\n"
    try:
        evaluation = read_evaluation(found)
        if not evaluation.tables:
            raise UserError(f"{found} holds no table; write it anew with tools/evaluate.py")
    except UserError as error:
        if file is None:
            # Nobody asked for it: an export must not fail over a table.
            return f"`{EVALUATION}` of the run could not be read; see `report.html` there.\n"
        raise UserError(f"--evaluation: {error}") from None
    told = f"Measured at step {evaluation.step:,} on the `{evaluation.split}` split, beside its baselines."
    return f"{told}\n\n{markdown(evaluation.tables, level=3)}"


def _training(facts: CardFacts) -> str:
    """Rows of the training table."""
    config, ranks = facts.config, facts.manifest.get("ranks")
    step, loss = int(facts.manifest["step"]), facts.manifest.get("loss")
    head, optimizer, batch = config.head.object, config.optimizer, config.train.global_batch
    rows = {
        **_data(facts),
        "steps": f"{step:,} of {config.train.steps:,}, {step * batch:,} images seen",
        "batch": f"{batch:,} images, {config.data.regions_per_image} regions each",
        "loss": "" if loss is None else f"{loss:.4g} (mean since the checkpoint before)",
        "head": f"{head.loss}, margin {head.margin:g} ({head.margin_kind}), scale {head.scale:g}, "
        f"{head.sample_rate:.0%} of the object classes a step",
        "optimizer": f"AdamW, peak lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}, "
        f"betas {optimizer.beta1:g} and {optimizer.beta2:g}",
        "region tokens": f"last {config.model.region_layers} blocks, {config.model.region_weights} weights",
        "precision": config.train.precision,
        "ranks": f"{ranks['tensor']} tensor x {ranks['data']} data, ZeRO {config.parallel.zero_stage}"
        if ranks
        else "",
        "began with": f"`{config.init}`" if config.init else "",
        "seed": str(config.seed),
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)


def _data(facts: CardFacts) -> dict[str, str]:
    """What the run was trained on."""
    data = facts.manifest.get("dataset")
    if not data:
        return {"data": "none by megaregion: converted weights"}
    return {
        "data": f"`{facts.config.data.path}`: {data['samples']:,} images, {data['object_classes']:,} object "
        f"clusters, {data['text_classes']:,} text tokens",
        "labels": f"centers {_short(data['centers_sha256'])}, tokenizer {_short(data['tokenizer_sha256'])} "
        "(SHA-256)",
    }


def _short(checksum: str | None) -> str:
    return checksum[:12] if checksum else "none"
