"""What vLLM is asked to run, checked where it starts, before it spawns processes."""

from __future__ import annotations

from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.serving.vllm.settings import NAME, settings
from prumerge_fast.towers.encoder import layer_index


def reading_layer(hf_config: Any) -> int:
    """Index of the tower's layer that reads the features, of which vLLM builds those before.

    Raises:
        ValueError: No layer reads them, or they are of several layers.
    """
    layers, feature_layer = (
        hf_config.vision_config.num_hidden_layers,
        hf_config.vision_feature_layer,
    )
    try:
        index = layer_index(layers, feature_layer, "vision_feature_layer")
    except UnsupportedModelError as error:
        raise ValueError(f"{NAME}: {error}") from None
    if index == layers:
        raise ValueError(
            f"{NAME}: vision_feature_layer: expected one below the last layer, got "
            f"{feature_layer}: no layer reads the output of the last of {layers} layers"
        )
    return index


def num_patches(hf_config: Any) -> int:
    """N, the patch tokens of an image or of a crop."""
    vision = hf_config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


class PruMergeCheck(VerifyAndUpdateConfig):
    """Refuses, for the models that PruMerge runs, what it cannot run or was never tested with."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        hf_config = vllm_config.model_config.hf_config
        config = settings(hf_config)
        if config is None:
            return
        kind = hf_config.vision_config.model_type
        if kind != "clip_vision_model":
            raise ValueError(
                f"{NAME}: vision_config.model_type: expected 'clip_vision_model', whose class "
                f"token PruMerge ranks patches by, got {kind!r}"
            )
        strategy = hf_config.vision_feature_select_strategy
        if strategy != "default":
            raise ValueError(
                f"{NAME}: vision_feature_select_strategy: expected 'default' (patch tokens "
                f"without the class token), got {strategy!r}"
            )
        reading_layer(hf_config)
        try:
            config.capacity(num_patches(hf_config))
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from None
        if hf_config.model_type == "llava_next" and config.order != "attention":
            raise ValueError(
                f"{NAME}: order: expected 'attention' for LLaVA-NeXT, got {config.order!r}: the "
                "number of its newlines would depend on the picture, and vLLM counts tokens "
                "before it sees that"
            )
        if config.positions != "compact":
            raise ValueError(
                f"{NAME}: positions: expected 'compact', got {config.positions!r}: vLLM counts "
                "positions itself, those of the tokens that are left"
            )
        quantization = vllm_config.model_config.quantization
        if quantization == "bitsandbytes":
            raise ValueError(
                f"{NAME}: quantization: expected another than 'bitsandbytes', whose loader does "
                "not know the layer that reads the features"
            )
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError(
                f"{NAME}: enable_tower_connector_lora: expected False, got True: LoRA would not "
                "reach the layer that reads the features, and patches are chosen by that"
            )
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1:
            raise ValueError(
                f"{NAME}: pipeline_parallel_size: expected 1, got {stages}: not tested; use "
                "tensor_parallel_size"
            )


class NoPruMerge(VerifyAndUpdateConfig):
    """Refuses the setting for models that would not heed it."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        model = vllm_config.model_config
        if getattr(model.hf_config, "prumerge", None) is not None:
            raise ValueError(
                f"{NAME}: expected one of {', '.join(PRUNED)} run by vLLM itself "
                f"(model_impl 'auto' or 'vllm'), got {model.architecture}"
            )


PRUNED = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")


def add_checks() -> None:
    """Have vLLM call these, in whichever of its processes makes the configuration.

    Some models have checks of vLLM's own, which follow; plugins may be registered again.
    """
    for architecture in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        check = PruMergeCheck if architecture in PRUNED else NoPruMerge
        known = MODELS_CONFIG_MAP.get(architecture)
        if known is None:
            MODELS_CONFIG_MAP[architecture] = check
        elif not issubclass(known, check):
            MODELS_CONFIG_MAP[architecture] = _before(check, known)


def _before(
    check: type[VerifyAndUpdateConfig], known: type[VerifyAndUpdateConfig]
) -> type[VerifyAndUpdateConfig]:
    """`known`, with `check` in front."""

    class Both(known, check):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check.verify_and_update_config(vllm_config)
            known.verify_and_update_config(vllm_config)

    return Both
