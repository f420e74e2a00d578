"""LLaVA-1.5 in vLLM with PruMerge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from prumerge_fast.reduction.reading import reduce_patches
from prumerge_fast.serving.vllm.embeddings import CheckedEmbeddings, EmbeddingsOfAnyLength
from prumerge_fast.serving.vllm.settings import PrunedInfo, settings
from prumerge_fast.serving.vllm.tower import SHORT_NAMES, PrunedModel


class LlavaInfo(CheckedEmbeddings, base.LlavaProcessingInfo):
    """What vLLM says of LLaVA, and embeddings are checked."""


class PruMergeLlavaInfo(PrunedInfo, LlavaInfo):
    """Counts what PruMerge leaves of an image; placeholders and memory follow from that."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        patches = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.prumerge.capacity(patches)


def _info(ctx: Any) -> Any:
    if settings(ctx.get_hf_config()) is not None:
        return PruMergeLlavaInfo(ctx)
    plain = base._build_llava_or_pixtral_hf_info(ctx)
    return LlavaInfo(ctx) if isinstance(plain, base.LlavaProcessingInfo) else plain


@MULTIMODAL_REGISTRY.register_processor(
    base._build_llava_or_pixtral_hf_processor,
    info=_info,
    dummy_inputs=base.LlavaDummyInputsBuilder,
)
class PruMergeLlava(PrunedModel, EmbeddingsOfAnyLength, base.LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration`; with the setting, its images are pruned and merged."""

    hf_to_vllm_mapper = base.LlavaForConditionalGeneration.hf_to_vllm_mapper | SHORT_NAMES
    embedding_inputs = base.LlavaImageEmbeddingInputs

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Tensor) -> Tensor:
        if self.prumerge is None:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        merged = [
            reduce_patches(self.read(pixel_values[images]), self.prumerge).tokens
            for images in self.batches([1] * len(pixel_values))
        ]
        return torch.cat(merged)  # [B, keep + 1, C]
