"""The sizes of a LLaVA that its cost depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.harness.sizes import check_sizes
from prumerge_fast.towers.encoder import layer_index
from prumerge_fast.versions import ties_embeddings

_FAMILY = "LlavaForConditionalGeneration"
# Decoders of pre-normalised layers with grouped attention and a gated MLP, and which of their
# attention projections (q, k and v; the output's) have biases whatever the config says.
_DECODERS = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False)}

# Towers, and how a LLaVA takes all of their patch tokens and no other.
_STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}


@dataclass(frozen=True)
class TowerShape:
    """A vision tower of width C with N patches: CLIP's, or SigLIP's, without a class token.

    Args:
        width: C.
        mlp_width: Width of the MLP between its two layers.
        layers: Encoder layers.
        reading_layer: Index of the encoder layer that reads the features. Layers from there on do
            not run when patched, but for the queries and the keys of that one. `layers` where none
            reads them: all run, and queries and keys are those of the last.
        image_size: Pixels along a side.
        patch_size: Pixels along a side of a patch.
        channels: Colour channels.
        class_token: Whether there is one.
        pooling_head: Whether an attention of one query ends the tower, as SigLIP's own use needs.
    """

    width: int
    mlp_width: int
    layers: int
    reading_layer: int
    image_size: int
    patch_size: int
    channels: int = 3
    class_token: bool = True
    pooling_head: bool = False

    @property
    def rows(self) -> int:
        """Tokens of an image, the class token among them."""
        return self.class_token + self.patches

    @property
    def patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """All of the tower's, those that are never used among them."""
        width, mlp = self.width, self.mlp_width
        # CLIP's class token is a vector of its own, SigLIP's patches have a bias.
        embeddings = width * (self.channels * self.patch_size**2 + 1 + self.rows)
        linear = 4 * width * (width + 1) + 2 * width * mlp + mlp + width
        layer = linear + 4 * width
        norms = 4 * width if self.class_token else 2 * width
        head = self.pooling_head * (linear + 3 * width)
        return embeddings + self.layers * layer + norms + head


@dataclass(frozen=True)
class DecoderShape:
    """A language model of width D.

    Args:
        width: D.
        mlp_width: Width of the gated MLP.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_width: Channels of a head.
        vocabulary: Rows of the embedding table and of the output layer.
        tied: The output layer is the embedding table.
        qkv_bias, output_bias, mlp_bias: Which linear layers have biases.
    """

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers within the decoder layers: those that are quantised."""
        heads, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return self.layers * self.width * (2 * heads + 2 * kv + 3 * self.mlp_width)

    @property
    def parameters(self) -> int:
        """All of the language model's, embedding table and output layer among them."""
        heads, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        rest = 2 * self.width
        rest += self.qkv_bias * (heads + 2 * kv) + self.output_bias * self.width
        rest += self.mlp_bias * (2 * self.mlp_width + self.width)
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.linear_parameters + self.layers * rest + self.width + tables


@dataclass(frozen=True)
class LlavaShape:
    """Vision tower, two-layer projector and language model."""

    name: str
    tower: TowerShape
    decoder: DecoderShape
    projector_bias: bool = True

    @property
    def projector_parameters(self) -> int:
        inner = self.decoder.width
        return self.tower.width * inner + inner * inner + 2 * inner * self.projector_bias

    @property
    def parameters(self) -> int:
        return self.tower.parameters + self.projector_parameters + self.decoder.parameters


def shape_of(config: Any, name: str = "LLaVA") -> LlavaShape:
    """The shape that a transformers configuration describes.

    Args:
        config: A `LlavaConfig` with a CLIP or a SigLIP tower.
        name: What to call it in results.

    Raises:
        UnsupportedModelError: It is no LLaVA with one of these towers and a Llama-like language
            model, or PruMerge cannot work with its features.
    """
    architectures = getattr(config, "architectures", None) or []
    # By architecture too: the original LLaVA package's configs have the same model type, but other
    # fields, which transformers would silently fill with the defaults of a 7B model.
    if config.model_type != "llava" or _FAMILY not in architectures:
        got = " ".join(architectures) or config.model_type
        raise UnsupportedModelError(f"model: expected a {_FAMILY}, got {got}")
    vision, text = config.vision_config, config.text_config
    if vision.model_type not in _STRATEGIES:
        raise UnsupportedModelError(
            f"vision_config: expected a {' or '.join(_STRATEGIES)}, got {vision.model_type}"
        )
    if text.model_type not in _DECODERS:
        raise UnsupportedModelError(
            f"text_config: expected one of {', '.join(_DECODERS)}, got {text.model_type}"
        )
    strategy = _STRATEGIES[vision.model_type]
    if config.vision_feature_select_strategy != strategy:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy: expected {strategy!r} (all patch tokens) for a "
            f"{vision.model_type}, got {config.vision_feature_select_strategy!r}"
        )
    check_sizes(config, "vision_config", "text_config")
    qkv_bias, output_bias = _DECODERS[text.model_type]
    attention_bias = bool(getattr(text, "attention_bias", False))
    return LlavaShape(
        name,
        TowerShape(
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_hidden_layers,
            layer_index(
                vision.num_hidden_layers, config.vision_feature_layer, "vision_feature_layer"
            ),
            vision.image_size,
            vision.patch_size,
            vision.num_channels,
            class_token=vision.model_type == "clip_vision_model",
            pooling_head=vision.model_type == "siglip_vision_model"
            and getattr(vision, "vision_use_head", True),
        ),
        DecoderShape(
            text.hidden_size,
            text.intermediate_size,
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads or text.num_attention_heads,
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            text.vocab_size,
            ties_embeddings(config),
            qkv_bias or attention_bias,
            output_bias or attention_bias,
            bool(getattr(text, "mlp_bias", False)),
        ),
        bool(getattr(config, "multimodal_projector_bias", True)),
    )


# CLIP ViT-L/14 at 336 pixels before Vicuna 7B and 13B, as in LLaVA-1.5 (arXiv 2310.03744).
_VIT_L_336 = TowerShape(1024, 4096, 24, reading_layer=23, image_size=336, patch_size=14)
LLAVA_1_5_7B = LlavaShape(
    "llava-1.5-7b", _VIT_L_336, DecoderShape(4096, 11008, 32, 32, 32, 128, vocabulary=32000)
)
LLAVA_1_5_13B = LlavaShape(
    "llava-1.5-13b", _VIT_L_336, DecoderShape(5120, 13824, 40, 40, 40, 128, vocabulary=32000)
)
