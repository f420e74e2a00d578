"""The matrix products that each stage of a LLaVA consists of, for one image and one prompt.

Everything else, normalisation, activations, residual additions, softmax, counts as fused into its
neighbours: it does less than one operation for a hundred of the products', and need move nothing.
Attention is one fused product pair that never writes its scores. Its operations are counted for the
whole square of positions, as `torch.utils.flop_counter` does; a causal kernel may skip half.
"""

from __future__ import annotations

from dataclasses import dataclass

from prumerge_fast.cost.shapes import DecoderShape, LlavaShape, TowerShape
from prumerge_fast.reduction.config import PruMergeConfig


@dataclass(frozen=True)
class Product:
    """One matrix product, or attention, with what it has to read and write at least.

    Args:
        operations: A multiplication and an addition count as two.
        weights: Parameters read.
        values: Activations, keys and values read or written.
        repeats: In how many layers it occurs.
        quantised: Its weights are those that INT8 and INT4 shrink.
    """

    operations: int
    weights: int
    values: int
    repeats: int = 1
    quantised: bool = False


def tower_products(tower: TowerShape, config: PruMergeConfig | None) -> list[Product]:
    """The vision tower. Unpruned (`None`), all layers run, also those behind the features.

    Pruned, it ends with queries, the class token's or all, and the keys of all tokens in the layer
    that reads the features: less than half of that layer, and nothing behind it. Where none does,
    it ends with the last layer.
    """
    rows, width, mlp = tower.rows, tower.width, tower.mlp_width
    layers = tower.layers if config is None else tower.reading_layer
    products = [
        _linear(tower.patches, tower.channels * tower.patch_size**2, width),
        _linear(rows, width, width, 4 * layers),
        _attention(rows, rows, width, width, layers),
        _linear(rows, width, mlp, layers),
        _linear(rows, mlp, width, layers),
    ]
    if config is None:
        if tower.pooling_head:
            products += [
                *(_linear(asked, width, width) for asked in (1, rows, rows, 1)),
                _attention(1, rows, width, width, 1),
                _linear(1, width, mlp),
                _linear(1, mlp, width),
            ]
    elif tower.reading_layer < tower.layers:
        asking = rows if config.scoring(class_token=tower.class_token).received else 1
        products += [_linear(rows, width, width), _linear(asking, width, width)]
    return products


def prune_merge_products(tower: TowerShape, config: PruMergeConfig) -> list[Product]:
    """Scores, similarities of the centres to all patches, and the merge. Keys and features are read
    once each, as one fused kernel does. Attention received is counted as PyTorch computes it; the
    Triton kernel, which keeps none of it, computes its products twice.

    Raises:
        ValueError: `keep` is not given, so that the number of centres is not known, or too large.
    """
    patches, width = tower.patches, tower.width
    centres = config.budget(patches)
    if centres is None:
        raise ValueError("keep: expected a number of tokens, because cost has no image to count on")
    merged = centres if config.merge != "none" else 0
    supplement = int(bool(config.supplement))
    rows = centres + supplement
    asking = patches if config.scoring(class_token=tower.class_token).received else 1
    return [
        Product(2 * asking * tower.rows * width, 0, (asking + tower.rows) * width),
        Product(2 * merged * patches * width, 0, 0),
        Product(2 * (merged + supplement) * patches * width, 0, (patches + rows) * width),
    ]


def projector_products(shape: LlavaShape, rows: int) -> list[Product]:
    """The two-layer projector on `rows` visual tokens."""
    inner = shape.decoder.width
    return [_linear(rows, shape.tower.width, inner), _linear(rows, inner, inner)]


def decoder_products(decoder: DecoderShape, rows: int, cached: int = 0) -> list[Product]:
    """The language model on `rows` new tokens behind `cached` ones; logits for the last only."""
    width, mlp, layers = decoder.width, decoder.mlp_width, decoder.layers
    heads, kv = decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    return [
        _linear(rows, width, heads, layers, quantised=True),
        _linear(rows, width, kv, 2 * layers, quantised=True),  # writes the KV cache
        _attention(rows, cached + rows, heads, kv, layers),
        _linear(rows, heads, width, layers, quantised=True),
        _linear(rows, width, mlp, 2 * layers, quantised=True),
        _linear(rows, mlp, width, layers, quantised=True),
        _linear(1, width, decoder.vocabulary),
    ]


def _linear(
    rows: int, inputs: int, outputs: int, repeats: int = 1, *, quantised: bool = False
) -> Product:
    return Product(
        2 * rows * inputs * outputs,
        inputs * outputs,
        rows * (inputs + outputs),
        repeats,
        quantised,
    )


def _attention(queries: int, keys: int, width: int, kv_width: int, repeats: int) -> Product:
    """Both products of all heads, `width` channels together; scores stay on the chip."""
    return Product(
        4 * queries * keys * width, 0, 2 * queries * width + 2 * keys * kv_width, repeats
    )
