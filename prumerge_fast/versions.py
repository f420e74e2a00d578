"""Every difference between the supported transformers versions (4.57 and 5.x) that we meet."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

from torch import Tensor


def vision_transformer(tower: Any) -> Any:
    """The module with `embeddings` and `encoder` of CLIP and SigLIP: 4.x wraps it once more."""
    return getattr(tower, "vision_model", tower)


def run_encoder_layer(layer: Any, hidden: Tensor, **arguments: Any) -> Tensor:
    """A vision tower's layer, [B, R, C] to [B, R, C]; 4.x returns a tuple."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def clip_layer_masks() -> dict[str, None]:
    """The masks that CLIP's layers ask for, of which there are none: one more in 4.x."""
    # Not asked of their signature, which wrappers hide.
    return {"attention_mask": None} | ({"causal_attention_mask": None} if is_4() else {})


def configured_feature_layer(config: Any) -> Any:
    """`vision_feature_layer` of a model's configuration; that of ViP-LLaVA in 4.x adds an "s"."""
    name = "vision_feature_layers"
    return getattr(config, name) if hasattr(config, name) else config.vision_feature_layer


def ties_embeddings(config: Any) -> bool:
    """Whether a LLaVA's output layer is its embedding table: 4.x asks the language model's
    configuration alone, 5.x the whole one, which takes over what the language model's says."""
    if is_4():
        config = config.text_config
    return bool(config.tie_word_embeddings)


def set_visual_outputs(outputs: Any, modality: str, features: Tensor, encoded: Any) -> None:
    """Note the visual tokens on what `forward` returns: from 5.24 on as `get_image_features` or
    `get_video_features` returns them (`encoded`), before as their `features` alone."""
    if hasattr(outputs, f"{modality}_outputs"):
        outputs[f"{modality}_outputs"] = encoded
    else:
        outputs[f"{modality}_hidden_states"] = features


def cache_of(values: dict[str, Any]) -> Any:
    """The KV cache among the arguments or the outputs of `forward` or `generate`, or `None`.

    5.24 names it `cache`. It takes older names as well, and goes by the newest that is there.
    """
    # `dict.get` and `keys`, because an output of 5.24 warns of the older names.
    names = ("cache", "past_key_values", "cache_params")
    name = next((name for name in names if name in dict.keys(values)), names[0])
    return dict.get(values, name)


def cache_argument() -> str:
    """The name of that argument, `cache` or `past_key_values`."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
    return "cache" if "cache" in names else "past_key_values"


def is_default_length(model: Any, arguments: dict[str, Any], limit: int, name: str) -> bool:
    """Whether nobody chose `max_length` or `min_length`, which `generate` resolved to `limit`.

    A `GenerationConfig` of 5.x leaves them `None`; one of 4.x has the default itself.
    """
    if arguments.get(name) is not None:
        return False
    default = getattr(type(model.generation_config)(), name)
    if default is not None:
        return limit == default
    configs = (arguments.get("generation_config"), model.generation_config)
    return all(getattr(config, name, None) is None for config in configs)


def set_length(arguments: dict[str, Any], name: str, limit: int) -> None:
    """Make `generate` take `limit` for `max_length` or `min_length`; changes `arguments` only.

    5.x warns of arguments beside a configuration; 4.x takes a limit in a configuration that
    happens to equal the default for the default.
    """
    config = arguments.get("generation_config")
    if (
        config is None
        or arguments.get(name) is not None
        or getattr(type(config)(), name) is not None
    ):
        arguments[name] = limit
    else:
        arguments["generation_config"] = copy.deepcopy(config)
        setattr(arguments["generation_config"], name, limit)


def takes_special_tokens_option(processor: Any) -> bool:
    """Whether a processor takes `add_special_tokens`: that of Video-LLaVA in 4.x does not."""
    parameters = inspect.signature(type(processor).__call__).parameters.values()
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def is_4() -> bool:
    """Whether transformers is of version 4."""
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5
