"""LLaVA-NeXT (1.6) in vLLM with PruMerge, every crop of an image pruned on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_next as base
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from prumerge_fast.families.crops import crop_counts, crop_layout, prune_crops, with_newlines
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.padding import within_budget
from prumerge_fast.serving.vllm.checks import num_patches
from prumerge_fast.serving.vllm.embeddings import CheckedEmbeddings, EmbeddingsOfAnyLength
from prumerge_fast.serving.vllm.settings import PrunedInfo, settings
from prumerge_fast.serving.vllm.tower import SHORT_NAMES, PrunedModel


class LlavaNextInfo(CheckedEmbeddings, base.LlavaNextProcessingInfo):
    """What vLLM says of LLaVA-NeXT, and embeddings are checked."""


class PruMergeLlavaNextInfo(PrunedInfo, LlavaNextInfo):
    """Counts what PruMerge leaves of an image; placeholders and memory follow from that."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        hf_config, config = self.get_hf_config(), self.prumerge
        sizes = [[image_height, image_width]]
        layout = crop_layout(
            hf_config, crop_counts(hf_config, sizes), sizes, num_patches(hf_config)
        )
        total, one_of_image = 0, config.supplement == "image"
        of_crop = config.replace(supplement=config.supplement and not one_of_image)
        for read, overview in zip(layout.is_read.sum(1).tolist(), layout.is_overview, strict=True):
            if read:  # of a crop that is not all padding; a newline ends each but the overview
                total += within_budget(of_crop, read).capacity(read) + int(not overview)
        return total + one_of_image


def _info(ctx: Any) -> Any:
    pruned = settings(ctx.get_hf_config()) is not None
    return (PruMergeLlavaNextInfo if pruned else LlavaNextInfo)(ctx)


@MULTIMODAL_REGISTRY.register_processor(
    base.LlavaNextMultiModalProcessor, info=_info, dummy_inputs=LlavaDummyInputsBuilder
)
class PruMergeLlavaNext(PrunedModel, EmbeddingsOfAnyLength, base.LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration`; with the setting, its crops are pruned and merged."""

    hf_to_vllm_mapper = base.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | SHORT_NAMES
    embedding_inputs = base.LlavaNextImageEmbeddingInputs

    def _process_image_input(self, image_input: Any) -> Any:
        config = self.prumerge
        if config is None or image_input["type"] == "image_embeds":
            return super()._process_image_input(image_input)
        sizes = image_input["image_sizes"]
        counts = crop_counts(self.config, sizes)
        features: list[Tensor] = []
        for images in self.batches(counts):
            crops = [
                pixels[:count]  # behind them, crops that only pad an image to the batch's
                for pixels, count in zip(
                    image_input["pixel_values"][images], counts[images], strict=True
                )
            ]
            features += self._encode(torch.cat(crops), counts[images], sizes[images], config)
        return features

    def _encode(
        self, crops: Tensor, counts: list[int], sizes: Tensor, config: PruMergeConfig
    ) -> list[Tensor]:
        """The tokens [n, D] of each image, from the crops [K, 3, H, W] of all."""
        layout = crop_layout(self.config, counts, sizes, num_patches(self.config))
        rows = prune_crops(self.read(crops), layout, config, "auto")
        projected = self.multi_modal_projector(rows.tokens)  # [R, D]
        features, lengths, _ = with_newlines(
            projected, self.image_newline, rows, layout, config.order
        )
        return list(features.split(lengths))
