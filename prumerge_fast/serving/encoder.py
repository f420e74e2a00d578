"""Images to embeddings, as many rows as each image needs: a LLaVA without its language model.

Engines count placeholders before they see features, so that the number of rows has to be fixed
there. Where each image is to decide its own, it is encoded in front of the engine, which then takes
embeddings in place of the image (vLLM: `image_embeds`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from prumerge_fast.errors import InputError, UnsupportedModelError
from prumerge_fast.families import adapter_for_class
from prumerge_fast.families.base import Adapter, inner_model
from prumerge_fast.harness.models import read_config, resolve_device
from prumerge_fast.harness.pictures import as_seen
from prumerge_fast.harness.sizes import check_sizes
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving.checkpoint import plain_name, read_weights
from prumerge_fast.towers.kinds import tower_kind

_DTYPES = ("float32", "bfloat16", "float16")
_TILING = "crop_to_patches"


class PruMergeEncoder:
    """Vision tower and projector of a LLaVA, with PruMerge between them.

    The language model is neither read nor allocated. `encode` gives what a model that
    `prumerge_fast.patch` patched gives its language model for the same images.

    Args:
        model_id: Folder or hub name of a checkpoint of transformers with safetensors, of any family
            that `patch` takes (vLLM takes embeddings for LLaVA and LLaVA-NeXT).
        config: Options; `None` for those that `patch(model)` starts from: each image decides its
            number of rows, or, where the tower has no class token, a quarter of it is kept.
            Positions are the engine's to count: `positions` has to be `"compact"`.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:INDEX".
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16", "float16" or a `torch.dtype`.
        backend: "auto", "triton", "torch" or "reference", as in `prune_merge`.
        revision: Branch, tag or commit on the hub.

    Attributes:
        config: The options.
        device: Where it encodes, and where embeddings are.
        dtype: Of weights and embeddings.
        width: D, of an embedding's rows.

    Raises:
        InputError: The checkpoint or the device is not there, broken or quantised.
        UnsupportedModelError: The model's family is unknown, or it is configured in a way that
            PruMerge does not work with.
        TypeError, ValueError: An argument is of the wrong type or out of range.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """

    def __init__(
        self,
        model_id: str | Path,
        config: PruMergeConfig | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        revision: str | None = None,
    ) -> None:
        if config is not None and not isinstance(config, PruMergeConfig):
            raise TypeError(
                f"config: expected a PruMergeConfig or None, got {type(config).__name__}"
            )
        if config is not None and config.positions != "compact":
            raise ValueError(
                f"positions: expected 'compact', got {config.positions!r}: an encoder gives rows "
                "alone, whose positions the engine counts"
            )
        self.backend = backend
        self.device = resolve_device(str(device), "device")
        chosen = _dtype(dtype)
        folder = Path(model_id).expanduser()
        source = str(folder) if folder.is_dir() else str(model_id)
        settings = read_config(
            source, "a folder or a hub name of a LLaVA", name="model_id", revision=revision
        )
        model_class, self._adapter = _family(settings, source)
        check_sizes(settings, "vision_config")
        self._model = _without_language_model(model_class, settings)
        self._adapter.check(self._model)
        self.config = self._adapter.default_config(self._model) if config is None else config
        self.config.budget(self._adapter.num_patches(self._model))  # raises where it does not fit
        resolve_backend(backend, self.device)
        self._image_processor = _image_processor(source, revision)
        self.dtype = _load(self._model, source, revision, chosen or settings.dtype)
        for modality in self._adapter.pixels:
            tower = self._adapter.tower(self._model, modality)
            tower_kind(tower).make_buffers(tower)
        _check_buffers(self._model)
        self._model.eval().requires_grad_(False).to(self.device)
        self.width: int = settings.text_config.hidden_size

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The embeddings of images, which are encoded as one batch.

        Args:
            images: Of any size, as `prumerge_fast.harness.pictures.as_seen` shows them: upright,
                on white, in RGB.

        Returns:
            For each image [n, D] of the encoder's dtype, on its device; n is its own for each
            image unless the config has `keep`. Without `supplement` and without an outlier n is
            0, which vLLM refuses.

        Raises:
            TypeError: `images` is no sequence of Pillow's images.
            PictureError: An image has 16 or 32 bits a channel, or hardly any shape.
        """
        if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
            raise TypeError(f"images: expected a list of PIL images, got {type(images).__name__}")
        for index, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise TypeError(
                    f"images[{index}]: expected a PIL image, got {type(image).__name__}"
                )
        if not images:
            return []
        seen = [as_seen(image, f"images[{index}]") for index, image in enumerate(images)]
        # InternVL's cuts images into tiles where the whole processor asks it to, which always does.
        tiling = {_TILING: True} if hasattr(self._image_processor, _TILING) else {}
        processed = dict(self._image_processor(seen, return_tensors="pt", **tiling))
        tiles = processed.pop("num_patches", [1] * len(images))
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in processed.items()
        }
        arguments = self._adapter.renamed(inputs)
        encoded = self._adapter.encode(self._model, arguments, self.config, self.backend)["image"]
        lengths = iter(encoded.lengths)
        whole = [sum(itertools.islice(lengths, int(count))) for count in tiles]
        # Copies, so that one image's rows do not hold the memory of all.
        return [rows.clone() for rows in encoded.features.split(whole)]


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of that name; `None` for the checkpoint's own."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        return None
    if dtype in _DTYPES:
        return getattr(torch, str(dtype))
    raise ValueError(
        f"dtype: expected auto, {', '.join(_DTYPES)} or a floating-point torch.dtype, got {dtype!r}"
    )


def _family(config: Any, source: str) -> tuple[Any, Adapter]:
    """The class of models that a configuration names, and the adapter of its family."""
    import transformers

    names = config.architectures or [config.model_type]
    model_class = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if model_class is None:
        raise UnsupportedModelError(
            f"model_id: expected a checkpoint of a model in transformers, got {' '.join(names)} in "
            f"{source}"
        )
    adapter = adapter_for_class(model_class)
    if not isinstance(adapter, Adapter):
        raise UnsupportedModelError(
            f"model_id: expected a checkpoint of transformers, got {names[0]} in {source}"
        )
    return model_class, adapter


def _without_language_model(model_class: Any, config: Any) -> Any:
    """A model whose parts in front of the language model are there, on the meta device."""
    with torch.device("meta"):
        model = model_class(config)
    model.lm_head = None
    inner_model(model).language_model = None
    return model


def _image_processor(source: str, revision: str | None) -> Any:
    # `transformers` itself has some versions' only with torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, revision=revision)
    except Exception as error:  # files that are absent or broken raise any
        raise InputError(
            f"model_id: expected an image processor in {source}, got none that loads "
            f"({type(error).__name__}: {error})"
        ) from None


def _load(
    model: nn.Module, source: str, revision: str | None, dtype: torch.dtype | None
) -> torch.dtype:
    """Gives the model, on the meta device, its weights from a checkpoint; returns their dtype.

    Args:
        model: Without a language model.
        source: Folder or hub name.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights; `None`: that of the checkpoint's.
    """
    expected = {plain_name(name): (name, made) for name, made in model.state_dict().items()}
    stored = read_weights(source, expected.keys(), revision)
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise InputError(
            f"model_id: expected all weights of vision tower and projector in {source}, got none "
            f"for {len(missing)}, such as {missing[0]}"
        )
    for plain, tensor in stored.items():
        shape = expected[plain][1].shape
        if tensor.shape != shape or not tensor.is_floating_point():
            raise InputError(
                f"model_id: expected {plain} {list(shape)} of floating-point numbers in {source}, "
                f"got {list(tensor.shape)} of {tensor.dtype}; towers that are quantised cannot be "
                "read"
            )
    if dtype is None:
        dtype = next(iter(stored.values())).dtype
    weights = {expected[plain][0]: tensor.to(dtype) for plain, tensor in stored.items()}
    model.load_state_dict(weights, assign=True)
    return dtype


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModelError(
                "model: expected no buffers beside its weights but those that its tower is known "
                f"to have, got {name}"
            )
