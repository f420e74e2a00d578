"""Every difference between the supported transformers versions (4.57 and 5.x) that we meet."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def clip_transformer(tower: Any) -> Any:
    """The module with `embeddings`, `pre_layrnorm` and `encoder`: 4.x wraps it once more."""
    return getattr(tower, "vision_model", tower)


def run_encoder_layer(layer: Any, hidden: Tensor) -> Tensor:
    """One CLIP encoder layer without any mask, [B, 1+N, C] to [B, 1+N, C].

    4.x asks for a second mask and returns a tuple.
    """
    masks = {"attention_mask": None}
    if "causal_attention_mask" in inspect.signature(layer.forward).parameters:
        masks["causal_attention_mask"] = None
    output = layer(hidden, **masks)
    return output[0] if isinstance(output, tuple) else output


def image_features_output(features: list[Tensor], return_dict: bool) -> Any:
    """What `get_image_features` returns: 4.x the list itself, 5.x an output that holds it."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return features
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    form: Any = BaseModelOutputWithPooling  # declared to hold one tensor, used with a list
    output = form(pooler_output=features)
    return output if return_dict else output.to_tuple()
