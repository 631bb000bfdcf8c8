"""The model card of an exported encoder; its code runs as it stands."""

from __future__ import annotations

from megaregion.config import RunConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [vision, region, megaregion]
---

# {name}

A vision encoder trained by region-based cluster discrimination with megaregion: step {step}, \
{parameters:,} parameters, {depth} blocks of width {width}, patches of {patch} px, images of {side} px.
Any height and width that are multiples of {patch} work.

```python
import torch
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".")  # this folder
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=image, return_tensors="pt")["pixel_values"]
features = model(pixel_values=pixels)
features.last_hidden_state  # class token, then patches row by row, before the last norm
features.pooler_output  # class token after the last norm
```
"""

_REGIONS = """
## Features of regions

A region's feature is the class token of a network whose last {region_layers} blocks see only the region's
patches; one pass over the image serves all its regions. `visible` is bool [images, regions, patches].

```python
def region_features(model, pixels, visible, region_layers={region_layers}):
    count = visible.shape[1]
    inputs = []
    hook = model.encoder.layers[-region_layers].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    model(pixel_values=pixels)
    hook.remove()
    ((tokens, (cos, sin), *_), _), length = inputs[0], inputs[0][0][0].shape[1]
    # Region tokens start as class tokens, stand at the class token's position, and are seen by nobody.
    tokens = torch.cat((tokens, tokens[:, :1].expand(-1, count, -1)), dim=1)
    position = [torch.cat((x, x[:1].expand(count, -1))) for x in (cos, sin)]
    seen = torch.zeros(len(tokens), 1, length + count, length + count, dtype=torch.bool, device=tokens.device)
    seen[:, :, :length, :length] = True
    seen[:, 0, length:, 1:length] = visible
    mask = torch.zeros(seen.shape, dtype=tokens.dtype, device=tokens.device).masked_fill(~seen, -torch.inf)
    for layer in model.encoder.layers[-region_layers:]:
        tokens = layer(tokens, position, mask)
    return model.post_layernorm(tokens[:, length:])
```
"""

_SEPARATE = """
Region tokens had weights of their own in training; this model does not hold them, and gives features of
images and patches only.
"""


def model_card(config: RunConfig, step: int, parameters: int) -> str:
    """Write the card.

    Args:
        config: The run's settings.
        step: Optimizer steps taken.
        parameters: Parameters of the exported model.
    """
    model = config.model
    card = _CARD.format(
        name=config.name,
        step=step,
        parameters=parameters,
        depth=model.depth,
        width=model.width,
        patch=model.patch_size,
        side=model.image_size,
    )
    if model.region_weights == "separate":
        return card + _SEPARATE
    return card + _REGIONS.format(region_layers=model.region_layers)
