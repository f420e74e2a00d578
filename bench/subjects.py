"""The models that `end_to_end.py` times: the demo model, and LLaVA-1.5-7B's shape."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from prumerge_fast.cost.shapes import LLAVA_1_5_7B
from prumerge_fast.demo import MODEL_DIR, load_demo
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.harness.models import load
from prumerge_fast.harness.prompts import prepare
from prumerge_fast.harness.quantisation import quantisation_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "nf4": torch.bfloat16}  # fmt: skip
"""What each precision computes in: NF4 is a way to store the language model's weights."""

TEXT_TOKENS = 40  # beside the image's 576, as in the paper's efficiency table (section 4.3)
SHARE_OF_MEMORY = 0.7  # of what is free, for weights; the rest is for activations
IMAGE_TOKEN_ID = 31999
DECODER_LAYERS = LLAVA_1_5_7B.decoder.layers


@dataclass(frozen=True)
class Subject:
    """A model to time.

    Args:
        model: Ready to run.
        preprocess: Model inputs for questions `first` to `first + count - 1`, from their images.
        decoder_layers: How many of the language model's layers there are.
        of_layers: How many the model of that name has.
    """

    model: LlavaForConditionalGeneration
    preprocess: Callable[[int, int], dict[str, torch.Tensor]]
    decoder_layers: int
    of_layers: int


def demo(precision: str, device: torch.device) -> Subject:
    """The demo model on questions about scenes that it was not trained on."""
    loaded = load(
        MODEL_DIR,
        dtype=str(DTYPES[precision]).removeprefix("torch."),
        device=str(device),
        bits=4 if precision == "nf4" else None,
    )

    def preprocess(first: int, count: int) -> dict[str, torch.Tensor]:
        return dict(prepare(loaded, items_from_demo(first + count)[first:]))

    layers = loaded.model.config.text_config.num_hidden_layers
    return Subject(loaded.model, preprocess, layers, layers)


def real_shape(precision: str, device: torch.device, layers: int) -> Subject:
    """LLaVA-1.5-7B's shape with random weights and `layers` of its 32 decoder layers."""
    dtype = DTYPES[precision]
    model = _quantised(layers, dtype, device) if precision == "nf4" else random_llava(layers, dtype)
    demo_processor = load_demo()[1].image_processor
    side = LLAVA_1_5_7B.tower.image_size
    processor = type(demo_processor)(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    patches = LLAVA_1_5_7B.tower.patches

    def preprocess(first: int, count: int) -> dict[str, torch.Tensor]:
        images = [item.load() for item in items_from_demo(first + count)[first:]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]  # [B, 3, 336, 336]
        text = torch.Generator().manual_seed(first)
        ids = torch.randint(3, 31000, (count, TEXT_TOKENS), generator=text)
        image = torch.full((count, patches), IMAGE_TOKEN_ID)
        half = TEXT_TOKENS // 2
        ids = torch.cat((ids[:, :half], image, ids[:, half:]), dim=1)  # [B, 616]
        return {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "pixel_values": pixels.to(device, dtype),
        }

    return Subject(model.to(device), preprocess, layers, DECODER_LAYERS)


def llava_1_5_config(layers: int) -> LlavaConfig:
    """LLaVA-1.5-7B's, with some of its decoder layers."""
    tower, decoder = LLAVA_1_5_7B.tower, LLAVA_1_5_7B.decoder
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.mlp_width,
            num_hidden_layers=tower.layers,
            num_attention_heads=16,
            image_size=tower.image_size,
            patch_size=tower.patch_size,
        ),
        text_config=LlamaConfig(
            hidden_size=decoder.width,
            intermediate_size=decoder.mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=decoder.heads,
            vocab_size=decoder.vocabulary,
        ),
        image_token_id=IMAGE_TOKEN_ID,
        image_token_index=IMAGE_TOKEN_ID,
    )


def random_llava(layers: int, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B with random weights and some of its decoder layers."""
    torch.manual_seed(0)
    config = llava_1_5_config(layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def layers_that_fit(precision: str, device: torch.device) -> int:
    """How many decoder layers of LLaVA-1.5-7B there is memory for, at most all.

    NF4 is made from 16-bit weights, which have to fit first.
    """
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    decoder = LLAVA_1_5_7B.decoder
    size = DTYPES[precision].itemsize
    layer = decoder.linear_parameters // decoder.layers * size
    rest = LLAVA_1_5_7B.parameters * size - decoder.layers * layer
    return max(1, min(decoder.layers, int((SHARE_OF_MEMORY * free - rest) // layer)))


def _quantised(
    layers: int, dtype: torch.dtype, device: torch.device
) -> LlavaForConditionalGeneration:
    """`random_llava`, its language model in NF4.

    bitsandbytes quantises while a model is loaded, so it goes through a folder. No name holds the
    16-bit model: its memory is free again before the other is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        random_llava(layers, dtype).save_pretrained(folder)
        return LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantisation_config(4, dtype),
        ).eval()
