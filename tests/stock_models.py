"""Tiny models of transformers with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    MobileViTV2Config,
    MobileViTV2ForSemanticSegmentation,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 16,
}
BEIT = VIT | {"out_indices": [2, 4, 6, 8], "use_relative_position_bias": True}


def segformer(**names: Any) -> PreTrainedModel:
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "decoder_hidden_size": 16}
    config = SegformerConfig(**sizes, num_attention_heads=[1, 2, 2, 2], **names)
    return SegformerForSemanticSegmentation(config)


def upernet(**names: Any) -> PreTrainedModel:
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16]}
    backbone = ConvNextConfig(**sizes, out_features=STAGES)
    sizes = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 16}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes, **names))


def upernet_swin(**names: Any) -> PreTrainedModel:
    sizes = {"depths": [1, 1, 1, 1], "embed_dim": 8, "num_heads": [1, 2, 2, 2]}
    backbone = SwinConfig(image_size=64, window_size=2, **sizes, out_features=STAGES)
    sizes = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 32}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes, **names))


def dpt(**names: Any) -> PreTrainedModel:
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    config = DPTConfig(image_size=64, backbone_out_indices=[1, 3, 5, 7], **VIT, **neck, **names)
    return DPTForSemanticSegmentation(config)


def beit(**names: Any) -> PreTrainedModel:
    config = BeitConfig(image_size=64, auxiliary_channels=8, **BEIT, **names)
    return BeitForSemanticSegmentation(config)


def data2vec(**names: Any) -> PreTrainedModel:
    config = Data2VecVisionConfig(image_size=64, auxiliary_channels=8, **BEIT, **names)
    return Data2VecVisionForSemanticSegmentation(config)


def mobilevit(**names: Any) -> PreTrainedModel:
    sizes = {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16]}
    config = MobileViTConfig(**sizes, aspp_out_channels=8, num_attention_heads=2, **names)
    return MobileViTForSemanticSegmentation(config)


def mobilevitv2(**names: Any) -> PreTrainedModel:
    sizes = {"base_attn_unit_dims": [16, 24, 32], "width_multiplier": 0.25}
    config = MobileViTV2Config(**sizes, aspp_out_channels=16, **names)
    return MobileViTV2ForSemanticSegmentation(config)


def mobilenet(**names: Any) -> PreTrainedModel:
    config = MobileNetV2Config(depth_multiplier=0.25, output_stride=16, **names)
    return MobileNetV2ForSemanticSegmentation(config)


FAMILIES = {
    make.__name__: make
    for make in (
        *(segformer, upernet, upernet_swin, dpt, beit, data2vec),
        *(mobilevit, mobilevitv2, mobilenet),
    )
}


def stock_model(family: str, num_labels: int = 2, seed: int = 0) -> PreTrainedModel:
    """A model with names for its classes, in training mode as a new one is."""
    torch.manual_seed(seed)
    id2label = {0: "background"} | {i: f"class_{i}" for i in range(1, num_labels)}
    label2id = {name: index for index, name in id2label.items()}
    return FAMILIES[family](id2label=id2label, label2id=label2id)
