"""The vision path of a patched LLaVA against the unpatched one, at CLIP ViT-L/14-336's shape.

    pytest bench/bench_vision.py --benchmark-json=bench/results/vision-cpu.json

Random weights, B = 1. Unpatched: the whole tower, and the projector on all 576 tokens. Patched: the
tower up to the feature layer, query and keys of the layer behind it, prune and merge, and the
projector on the tokens that are left. Without the projector, both end before it.
"""

from __future__ import annotations

import pytest
import torch
from subjects import random_llava
from transformers import LlavaForConditionalGeneration

from prumerge_fast.families.encode import encode
from prumerge_fast.patching.patch import patched
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import reduce_patches

CONFIG = PruMergeConfig(keep=72)  # random weights say nothing about what adapts to the image


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's tower and projector; the language model is not used."""
    return random_llava(layers=1)


@pytest.mark.parametrize("projector", [True, False], ids=["with projector", "tower"])
@torch.inference_mode()
def test_patched_against_unpatched(against, model, projector):
    pixel_values = torch.randn(1, 3, 336, 336)

    def unpatched() -> None:
        if projector:
            model.get_image_features(pixel_values)
        else:
            _ = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2]

    def pruned() -> int:
        if not projector:
            return int(reduce_patches(encode(model, pixel_values), CONFIG).lengths[0])
        with patched(model, CONFIG):
            model.get_image_features(pixel_values)
            return model.prumerge.last_lengths[0]

    tokens = against(unpatched, pruned, rounds=15)
    assert tokens == CONFIG.capacity(576)
