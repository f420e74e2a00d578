"""What the plugin refuses, and what it counts, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401 - the environment that vLLM reads when it is imported
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig, SiglipVisionConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from prumerge_fast.families.crops import crop_counts, crop_layout, prune_crops, with_newlines
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import Reading
from prumerge_fast.serving.vllm import register
from prumerge_fast.serving.vllm.checks import PRUNED, PruMergeCheck
from prumerge_fast.serving.vllm.llava_next import PruMergeLlavaNextInfo
from prumerge_fast.serving.vllm.tower import PrunedModel


def asked(architecture: str, hf_config: Any, **options: Any) -> Any:
    """What vLLM checks of an engine."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            architecture=architecture, hf_config=hf_config, quantization=options.get("quantization")
        ),
        lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def test_every_other_model_refuses_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that vLLM checks by itself too, whose own checks follow."""
    seen = []

    class Own(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            seen.append(vllm_config)

    monkeypatch.setitem(MODELS_CONFIG_MAP, "GptOssForCausalLM", Own)
    register()
    checks = dict(MODELS_CONFIG_MAP)
    register()
    assert checks == MODELS_CONFIG_MAP
    for architecture in MODELS_CONFIG_MAP.keys() - set(PRUNED):
        setting = asked(architecture, SimpleNamespace(prumerge={"keep": 4}))
        with pytest.raises(ValueError, match=rf"expected one of .*, got {architecture}$"):
            MODELS_CONFIG_MAP[architecture].verify_and_update_config(setting)
    plain = asked("GptOssForCausalLM", SimpleNamespace())
    MODELS_CONFIG_MAP["GptOssForCausalLM"].verify_and_update_config(plain)
    assert seen == [plain]


def test_what_is_refused_before_anything_is_loaded() -> None:
    setting = {"keep": 4}
    siglip = LlavaConfig(vision_config=SiglipVisionConfig(), prumerge=setting)
    with pytest.raises(ValueError, match=r"expected 'clip_vision_model'.*got 'siglip_vision_mode"):
        PruMergeCheck.verify_and_update_config(asked(PRUNED[0], siglip))
    clip = LlavaConfig(vision_config=CLIPVisionConfig(), prumerge=setting)
    PruMergeCheck.verify_and_update_config(asked(PRUNED[0], clip))
    counted = LlavaConfig(
        vision_config=CLIPVisionConfig(), prumerge={**setting, "positions": "original"}
    )
    with pytest.raises(ValueError, match=r"positions: expected 'compact', got 'original'"):
        PruMergeCheck.verify_and_update_config(asked(PRUNED[0], counted))
    with pytest.raises(ValueError, match=r"quantization: expected another than 'bitsandbytes'"):
        PruMergeCheck.verify_and_update_config(asked(PRUNED[0], clip, quantization="bitsandbytes"))


SIDE, PATCHES = 30, 25  # of crops, and their patches


@pytest.mark.parametrize(
    ("crops", "batches"),
    [
        ([], []),
        ([1] * 5, [[1] * 5]),
        ([1] * 6, [[1] * 5, [1]]),
        ([3, 2, 1, 7, 1, 4, 5], [[3, 2], [1], [7], [1, 4], [5]]),  # an image is never cut
    ],
)
def test_batches_of_the_tower(crops: list[int], batches: list[list[int]]) -> None:
    model = SimpleNamespace(tower_batch=5)
    found = PrunedModel.batches(model, crops)  # type: ignore[arg-type]
    assert [crops[images] for images in found] == batches


ODD = [(1, 100_000), (100_000, 1), (1, 1), (1, 1000), (47, 60), (60, 60), (90, 31)]


@pytest.mark.parametrize("keep", [1, 24, PATCHES, 0.001, 0.3, 1.0])
@pytest.mark.parametrize(
    ("variant", "supplement"), [("prumerge", True), ("prumerge+", False), ("prumerge", "image")]
)
def test_placeholders_of_llava_next_are_its_rows(
    keep: float, variant: Any, supplement: Any
) -> None:
    """Of pictures of any shape; the encoder's room is for the one with most."""
    random = np.random.default_rng(0)
    sizes = [*ODD, *random.integers(1, 300, (20, 2)).tolist()]
    sizes += [(low, high) for low in (1, 2, 3) for high in random.integers(1, 3000, 4).tolist()]
    options = {"keep": keep, "variant": variant, "supplement": supplement}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=SIDE // 5),
        image_grid_pinpoints=[[30, 60], [60, 30], [60, 60], [90, 30]],
        prumerge=options,
    )
    info = PruMergeLlavaNextInfo(SimpleNamespace(get_hf_config=lambda _: config))
    counted = [info.get_num_image_tokens(image_width=w, image_height=h) for h, w in sizes]

    prumerge = PruMergeConfig(**options)  # type: ignore[arg-type]
    tensor = torch.tensor(sizes)
    counts = crop_counts(config, tensor)
    layout = crop_layout(config, counts, tensor, PATCHES)
    crops, generator = sum(counts), torch.Generator().manual_seed(0)
    query = torch.randn(crops, 8, generator=generator)
    keys, hidden = torch.randn(2, crops, 1 + PATCHES, 8, generator=generator)
    reading = Reading(query, keys, hidden, 2, class_token=True)
    rows = prune_crops(reading, layout, prumerge, "auto")
    _, lengths, _ = with_newlines(rows.tokens, torch.zeros(8), rows, layout, prumerge.order)
    assert counted == lengths
    assert max(counted) <= info.get_max_image_tokens()
