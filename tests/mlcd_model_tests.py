"""transformers' ModelTesterMixin on an export: test_exported_model.py runs it in a process of its own.

``theirs`` is the tests folder of transformers' source distribution, and EXPORT names the folder under test.
"""

from __future__ import annotations

import os
import unittest
from typing import Any

import torch
from theirs.test_modeling_common import ModelTesterMixin, floats_tensor
from transformers import AutoConfig, MLCDVisionModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

EXPORT = os.environ["EXPORT"]
RegionVisionModel = get_class_from_dynamic_module("modeling_megaregion.RegionVisionModel", EXPORT)
BOXES = torch.tensor([[0.0, 0.0, 30.0, 40.0], [9.0, 9.0, 60.0, 60.0]])


class WithLoss(RegionVisionModel):
    """Training tests ask for a loss, and for a gradient of every weight."""

    def forward(self, *given: Any, **named: Any) -> Any:
        output = super().forward(*given, **named)
        output.loss = output.region_features.square().mean()
        return output


class Tester:
    """What the mixin asks a model's tests for."""

    is_training = True
    batch_size = 3

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        config = self.get_config()
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads
        self.num_hidden_layers, self.side = config.num_hidden_layers, config.image_size
        self.seq_length = (self.side // config.patch_size) ** 2 + 1

    def get_config(self) -> Any:
        return AutoConfig.from_pretrained(EXPORT, trust_remote_code=True, **self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        given = {"pixel_values": floats_tensor([self.batch_size, 3, self.side, self.side])}
        if self.settings:
            given["boxes"] = BOXES.expand(self.batch_size, -1, -1)
        return self.get_config(), given


class PlainTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MLCDVisionModel,)
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = Tester()

    @unittest.skip("its input embeddings are a convolution, as every vision model's")
    def test_model_get_set_embeddings(self) -> None: ...


class SharedTest(PlainTest):
    """Regions that read with the blocks' weights."""

    all_model_classes = (RegionVisionModel,)

    def setUp(self) -> None:
        self.model_tester = Tester(region_weights="shared")

    def test_training(self) -> None:
        self.all_model_classes = (WithLoss,)
        super().test_training()

    def check_training_gradient_checkpointing(self, **how: Any) -> None:
        self.all_model_classes = (WithLoss,)
        super().check_training_gradient_checkpointing(**how)


class SeparateTest(SharedTest):
    """Regions that read with weights of their own."""

    def setUp(self) -> None:
        self.model_tester = Tester(region_weights="separate")
