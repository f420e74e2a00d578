"""Embeddings in place of images (`image_embeds`), of as many rows each as its image needed.

vLLM refuses embeddings of the wrong width and prompts that are too long. What it lets through is
refused here, in the process that answers HTTP: an exception in the engine's would end the server,
and NaN stays in memory that later requests compute with, whoever sent them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.image import ImageEmbeddingMediaIO
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataParser

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckedParser(MultiModalDataParser):
    """Refuses image embeddings that are none."""

    def __init__(self, *, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(**options)
        self._dtype = dtype

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, dict):
            raise VLLMValidationError(
                "image_embeds: expected an embedding [n, D] of each image, got fields named "
                f"{', '.join(map(repr, data))}"
            )
        self._check_shapes(data)
        items = super()._parse_image_data(data)
        if isinstance(items, ImageEmbeddingItems):
            for index, embedding in enumerate(items.get_all()):
                check_embedding(embedding, self._dtype, f"image_embeds[{index}]")
        return items

    def _check_shapes(self, data: Any) -> None:
        """Raises where vLLM would take embeddings of odd shapes for pixels [3, height, width]."""
        if isinstance(data, Tensor) and data.ndim > 3:  # as the server stacks them
            data = list(data)
        for index, one in enumerate(data if isinstance(data, (list, tuple)) else ()):
            if not isinstance(one, Tensor):
                continue
            is_batch = one.ndim == 3 and one.shape[-1] == self.expected_hidden_size
            if is_batch or one.ndim not in (2, 3):
                raise VLLMValidationError(
                    f"image_embeds[{index}]: expected [n, D], got {list(one.shape)}"
                )


class CheckedEmbeddings:
    """For the processing information of a model: embeddings are checked."""

    ctx: Any
    allow_missing_mm_embeddings: bool

    def get_data_parser(self) -> MultiModalDataParser:
        return CheckedParser(
            dtype=self.ctx.model_config.dtype,
            expected_hidden_size=self._get_expected_hidden_size(),  # type: ignore[attr-defined]
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


def check_embedding(embedding: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raises VLLMValidationError unless a model can compute with an image's embedding.

    Args:
        embedding: Should be [n, D], n > 0, of finite floating-point numbers.
        dtype: The model's, in which they have to be finite as well.
        name: What the error calls it.
    """
    if embedding.dtype not in _DTYPES:
        expected = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        raise VLLMValidationError(f"{name}: expected {expected}, got {embedding.dtype}")
    if not len(embedding):
        raise VLLMValidationError(f"{name}: expected at least one row, got {list(embedding.shape)}")
    if not embedding.to(dtype).isfinite().all():
        raise VLLMValidationError(
            f"{name}: expected finite numbers in the model's {str(dtype).removeprefix('torch.')}, "
            "got NaN or infinite ones"
        )


def refuse_unreadable() -> None:
    """Have vLLM answer embeddings that cannot be decoded as the caller's error, not as its own."""
    load = ImageEmbeddingMediaIO.load_bytes
    if hasattr(load, "__wrapped__"):  # plugins may be registered again
        return

    @functools.wraps(load)
    def load_bytes(self: Any, data: bytes) -> Tensor:
        try:
            tensor = load(self, data)
        except (ValueError, VLLMValidationError):
            raise  # which vLLM answers as the caller's fault
        except Exception as error:  # readers raise any for bytes that they did not write
            # Without the reason: torch's is advice to unpickle all the same.
            raise VLLMValidationError(
                "image_embeds: expected base64 of a .npy file, or of a tensor that torch.save "
                f"wrote, got {len(data)} bytes that are none ({type(error).__name__})",
                parameter="image_embeds",
            ) from None
        if tensor.is_nested or tensor.is_meta:
            raise VLLMValidationError(
                "image_embeds: expected a tensor with values of its own, got a "
                f"{'nested' if tensor.is_nested else 'meta'} tensor",
                parameter="image_embeds",
            )
        return tensor.detach()

    ImageEmbeddingMediaIO.load_bytes = load_bytes


class EmbeddingsOfAnyLength:
    """For a model: embeddings [n, D] of images whose n differ may share a batch.

    vLLM's schema, `embedding_inputs`, wants one n for all and fails the engine otherwise.
    """

    embedding_inputs: Any

    def _parse_and_validate_image_input(self, **kwargs: object) -> Any:
        embeddings = kwargs.get("image_embeds")
        if kwargs.get("pixel_values") is None and isinstance(embeddings, (list, tuple)):
            return self.embedding_inputs(type="image_embeds", data=list(embeddings), validate=False)
        return super()._parse_and_validate_image_input(**kwargs)  # type: ignore[misc]
