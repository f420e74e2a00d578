"""Loads a LLaVA and its processor."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prumerge_fast.errors import InputError, UnsupportedModelError
from prumerge_fast.families import FAMILIES, adapter_for, adapter_named
from prumerge_fast.families.base import Adapter
from prumerge_fast.harness.processors import load_processor
from prumerge_fast.harness.quantisation import quantisation_config
from prumerge_fast.harness.sizes import check_sizes
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.wrappers import unwrapped


@dataclass(frozen=True)
class Loaded:
    """A LLaVA, ready to run, with its processor.

    Args:
        patches: N, the patch tokens of an image.
        conv_template: The conversation that questions stand in; `None`: the processor's own.
        image_aspect_ratio: "pad": images are padded to squares first; `None`: as they are.
    """

    model: Any
    processor: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    patches: int
    conv_template: str | None = None
    image_aspect_ratio: str | None = None

    @property
    def adapter(self) -> Adapter:
        """Of the model's family."""
        return family_of(self.model)


@dataclass(frozen=True)
class Described:
    """A LLaVA by its configuration; nothing of it is loaded.

    Args:
        source: Where to load it from: a folder, or its name on the hub.
        name: What it is called in results.
        config: Of transformers.
        family: The adapter of its family.
        model_class: Of transformers.
    """

    source: str
    name: str
    config: Any
    family: Adapter
    model_class: Any


@dataclass(frozen=True)
class Conversation:
    """What a LLaVA is asked with, without the model: for who makes its prompts elsewhere.

    Args:
        processor: Of transformers.
        conv_template: As in `Loaded`.
        image_aspect_ratio: As in `Loaded`.
    """

    processor: Any
    conv_template: str | None = None
    image_aspect_ratio: str | None = None


def family_of(model: Any) -> Adapter:
    """The adapter of a model of transformers, wrapped or not.

    Raises:
        UnsupportedModelError: It is of no family that can be patched.
        TypeError: It is of the original LLaVA package.
    """
    adapter = adapter_for(unwrapped(model))
    if not isinstance(adapter, Adapter):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    return adapter


def load(
    model: str | Path,
    *,
    dtype: str,
    device: str,
    bits: int | None = None,
    conv_template: str | None = None,
    image_aspect_ratio: str | None = None,
) -> Loaded:
    """Loads a LLaVA, of any family of transformers that `patch` takes, from a folder or the hub.

    Args:
        model: Folder or hub name.
        dtype: "auto" (float32 on a CPU, else float16), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:INDEX".
        bits: Quantise the language model with bitsandbytes to 4 (NF4) or 8; `None` leaves it.
        conv_template: "vicuna_v1", or `None` for the processor's chat template.
        image_aspect_ratio: "pad", or `None` to leave images to the processor.

    Raises:
        InputError: The model, the device or the quantisation is not available, or the model is of
            no supported family.
        UnsupportedModelError: PruMerge cannot work on this model of a supported family.
    """
    _quiet()
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    source, _ = _source(str(model))
    if sys.stderr.isatty():
        print(f"loading {source}", file=sys.stderr)
    described = describe(model)
    quantisation = _quantisation(bits, precision, target)
    with _refused(source):
        processor = _processor(described)
        found: Any = described.model_class.from_pretrained(
            source, dtype=precision, output_loading_info=True, **quantisation
        )
    llava, loading = found
    if loading["missing_keys"]:  # transformers would only have warned, and made up weights
        raise InputError(
            f"--model: expected all weights in {source}, got none for "
            f"{len(loading['missing_keys'])} parameters, such as {min(loading['missing_keys'])}"
        )
    described.family.check(llava)
    if bits is None:
        llava.to(target)
    return Loaded(
        llava.eval(),
        processor,
        described.name,
        target,
        precision,
        described.family.num_patches(llava),
        conv_template,
        image_aspect_ratio,
    )


def describe(model: str | Path) -> Described:
    """What a LLaVA's configuration says of it, in a folder or on the hub.

    Raises:
        InputError: There is none, it is broken, or it is of no supported family.
    """
    _quiet()
    source, name = _source(str(model))
    config = read_config(source, "a folder or a hub name of a LLaVA")
    family, model_class = _family(config, source)
    try:
        check_sizes(config, "vision_config")  # of the text model, each kind has its own
    except UnsupportedModelError as error:
        raise InputError(f"--model {source}: {error}") from None
    return Described(source, name, config, family, model_class)


def outline(described: Described) -> Any:
    """The model, made without memory for its weights, and of a single layer behind the tower.

    Raises:
        InputError: Its sizes do not fit together.
        UnsupportedModelError: PruMerge cannot work on this model of a supported family.
    """
    config = copy.deepcopy(described.config)
    config.get_text_config().num_hidden_layers = 1  # they take their time, and say nothing here
    with _refused(described.source), torch.device("meta"):
        llava = described.model_class(config)
    described.family.check(llava)
    return llava


def conversation(
    described: Described, conv_template: str | None = None, image_aspect_ratio: str | None = None
) -> Conversation:
    """What a model is asked with, its processor loaded.

    Raises:
        InputError: There is no processor, or it is broken.
    """
    with _refused(described.source):
        processor = _processor(described)
    return Conversation(processor, conv_template, image_aspect_ratio)


def _processor(described: Described) -> Any:
    """The model's processor, which pads on the left."""
    processor = load_processor(
        described.source, described.config, takes_videos="video" in described.family.pixels
    )
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _quiet() -> None:
    """Leaves standard error to our own messages and, on a terminal, the progress of downloads."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


@contextmanager
def _refused(source: str) -> Iterator[None]:
    """Makes an InputError of what loading from `source` raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # files that are absent, broken or do not fit each other raise any
        raise InputError(
            f"--model: expected a folder or a hub name of a LLaVA, got {source} "
            f"({type(error).__name__}: {error})"
        ) from None


def _family(config: Any, source: str) -> tuple[Adapter, Any]:
    """The family that a configuration names, and its class of models.

    Raises:
        InputError: It names none, or one that is not in transformers.
    """
    import transformers

    names = config.architectures or [config.model_type]
    known = [name for name in names if name in FAMILIES]
    adapter = adapter_named(known[0]) if known else None
    if isinstance(adapter, Adapter):
        return adapter, getattr(transformers, known[0])
    if adapter is not None:
        raise InputError(
            f"--model: expected a checkpoint of transformers, got {known[0]} of "
            f"{FAMILIES[known[0]].title} in {source}, which can be patched in Python only"
        )
    taken = [name for name in FAMILIES if isinstance(adapter_named(name), Adapter)]
    raise InputError(
        f"--model: expected a {', '.join(taken[:-1])} or {taken[-1]}, got "
        f"{' '.join(names)} in {source}"
    )


def read_config(
    source: str, expected: str, *, name: str = "--model", revision: str | None = None
) -> Any:
    """The configuration in a folder or on the hub.

    Args:
        source: Folder or hub name.
        expected: What the error says was.
        name: What errors call the argument.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: There is none, or it is broken.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except Exception as error:  # what values of the wrong kind raise depends on where they are
        raise InputError(
            f"{name}: expected {expected}, got {source} ({type(error).__name__}: {error})"
        ) from None
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise InputError(
            f"{name} {source}: architectures: expected a list of names, got {architectures!r}"
        )
    return config


def resolve_device(device: str, name: str = "--device") -> torch.device:
    """The device of that name; for "auto" a GPU where there is one, otherwise the CPU.

    Errors call the argument `name`.

    Raises:
        InputError: There is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InputError(
            f"{name}: expected auto, cpu, cuda or cuda:INDEX, got {device!r}"
        ) from None
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"{name}: expected auto, cpu, cuda or cuda:INDEX, got {device!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"{name}: expected one of the {torch.cuda.device_count()} CUDA devices that PyTorch "
            f"sees here, got {device!r}"
        )
    return target


def config_of(model: Any, chosen: Mapping[str, Any]) -> PruMergeConfig:
    """What `patch` would patch a model with, given these options of `PruMergeConfig`.

    Raises:
        InputError: They do not fit the model.
    """
    family, llava = family_of(model), unwrapped(model)
    config = family.default_config(llava).replace(**chosen)
    try:
        family.resolved(llava, config)
        config.budget(family.num_patches(llava))
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return config


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for "auto" float32 on a CPU, float16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return getattr(torch, dtype)


def _source(model: str) -> tuple[str, str]:
    """Where to load from, and the model's name in results."""
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"--model: expected a folder with config.json, got {model}, without it")
    return (
        (str(folder), folder.resolve().name) if folder.is_dir() else (model, model.split("/")[-1])
    )


def _quantisation(bits: int | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for 4 or 8 bits."""
    if bits is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"--load-in-{bits}bit: expected bitsandbytes to be installed, got none; "
            "run: pip install 'prumerge_fast[int4]'"
        )
    return {"quantization_config": quantisation_config(bits, dtype), "device_map": {"": device}}
