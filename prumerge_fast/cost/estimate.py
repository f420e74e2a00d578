"""Operations, bytes, memory and roofline times of one prompt with one image."""

from __future__ import annotations

from dataclasses import dataclass

from prumerge_fast.cost.devices import Device
from prumerge_fast.cost.products import (
    Product,
    decoder_products,
    projector_products,
    prune_merge_products,
    tower_products,
)
from prumerge_fast.cost.shapes import LlavaShape
from prumerge_fast.reduction.config import PruMergeConfig

HALF = 2  # bytes of an FP16 number: all activations, keys and values, and what is not quantised


@dataclass(frozen=True)
class Precision:
    """How the weights of the decoder layers' linear layers are stored.

    Arithmetic is FP16 whatever they are stored in: quantisation shrinks bytes, not operations. The
    scales of quantised blocks are left out (NF4's: half a bit a weight).
    """

    name: str
    weight_bits: int


PRECISIONS = {
    p.name: p for p in (Precision("FP16", 16), Precision("INT8", 8), Precision("INT4", 4))
}
"""Precisions by name."""


@dataclass(frozen=True)
class StageCost:
    """One stage: the sum over its products.

    Args:
        operations: A multiplication and an addition count as two.
        bytes: What has to move between memory and chip at least.
    """

    operations: int
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """What one prompt with one image costs.

    Args:
        precision: Of the language model's weights.
        visual_tokens: Tokens of the image that the language model reads.
        prompt_tokens: Those and the text's.
        products: The matrix products of each stage.
        weights_bytes: All parameters of the model.
        kv_cache_bytes: Keys and values of the prompt in all layers.
        activation_bytes: Most that any stage holds at once beside weights and cache: for each
            layer, the residual stream, the layer's input and what its widest step has open.
    """

    precision: Precision
    visual_tokens: int
    prompt_tokens: int
    products: dict[str, list[Product]]
    weights_bytes: float
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def stages(self) -> dict[str, StageCost]:
        """Cost by stage: vision, prune_merge (pruned only), projector, prefill, decode (a step)."""
        return {
            stage: StageCost(
                sum(p.repeats * p.operations for p in products),
                sum(p.repeats * self._bytes(p) for p in products),
            )
            for stage, products in self.products.items()
        }

    @property
    def memory_bytes(self) -> float:
        """Weights, KV cache and activations together."""
        return self.weights_bytes + self.kv_cache_bytes + self.activation_bytes

    def seconds(self, device: Device) -> dict[str, float]:
        """Roofline time of each stage, its products one by one. A model, not a measurement.

        Each product takes as long as its operations at the peak rate or its bytes at the peak
        bandwidth, whichever is longer.
        """
        return {
            stage: sum(
                p.repeats * max(p.operations / device.operations, self._bytes(p) / device.bandwidth)
                for p in products
            )
            for stage, products in self.products.items()
        }

    def _bytes(self, product: Product) -> float:
        weight = self.precision.weight_bits / 8 if product.quantised else HALF
        return product.weights * weight + product.values * HALF


def estimate(
    shape: LlavaShape,
    config: PruMergeConfig | None,
    *,
    text_tokens: int,
    precision: Precision = PRECISIONS["FP16"],
) -> Estimate:
    """The cost of a prompt of one image and `text_tokens` tokens of text.

    Args:
        shape: The model.
        config: How the image is pruned, with `keep` given; `None` for all of its tokens.
        text_tokens: Prompt tokens that are not the image's.
        precision: Of the language model's weights.

    Raises:
        ValueError: `keep` is not given or larger than N, or `text_tokens` is less than 1.
    """
    if text_tokens < 1:
        raise ValueError(f"text_tokens: expected at least 1, got {text_tokens}")
    tower, decoder = shape.tower, shape.decoder
    visual = tower.patches
    products = {"vision": tower_products(tower, config)}
    if config is not None:
        products["prune_merge"] = prune_merge_products(tower, config)
        visual = config.capacity(tower.patches)
    prompt = visual + text_tokens
    products |= {
        "projector": projector_products(shape, visual),
        "prefill": decoder_products(decoder, prompt),
        "decode": decoder_products(decoder, 1, cached=prompt),
    }
    quantised = decoder.linear_parameters
    return Estimate(
        precision,
        visual,
        prompt,
        products,
        weights_bytes=(shape.parameters - quantised) * HALF + quantised * precision.weight_bits / 8,
        kv_cache_bytes=2 * decoder.layers * prompt * decoder.kv_heads * decoder.head_width * HALF,
        activation_bytes=HALF * _peak_activations(shape, prompt, pruned=config is not None),
    )


def _peak_activations(shape: LlavaShape, prompt: int, *, pruned: bool) -> int:
    """Values held at once: in the vision tower's widest step or in the language model's."""
    tower, decoder = shape.tower, shape.decoder
    rows = tower.rows
    vision = rows * (2 * tower.width + max(tower.mlp_width, 4 * tower.width))
    if not pruned:
        vision += rows * tower.width * tower.layers  # transformers keeps every layer's output
    attention = (2 * decoder.heads + 2 * decoder.kv_heads) * decoder.head_width
    widest = max(2 * decoder.mlp_width, attention)
    return max(vision, prompt * (2 * decoder.width + widest))
