"""Fingerprints of what answers depend on: a model's weights, its other files, pictures, code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import prumerge_fast

_WORD = 8  # bytes of the integers that are added up
_PAGE = 4096  # bytes
_LARGE = 2**24  # bytes of a file that is not read as a whole
_ROW = 1024 * _WORD  # bytes; a matrix of LLaVA-1.5 is so many of them that nothing is padded


def of_weights(model: torch.nn.Module) -> str:
    """Of every parameter and buffer as it is loaded, on whatever device.

    Sums rather than a hash of the bytes, which takes up to a minute for the 14 GB of a 7B model.
    They are of whole numbers, so exact, and a changed word changes its row's and its column's; what
    trades places within a tensor changes one of the two at least.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_sums(tensor).cpu().numpy().tobytes())
    return digest.hexdigest()


def of_checkpoint(source: str, config: Any) -> str:
    """Of a checkpoint that is not loaded: its commit on the hub, or its files in a folder.

    Of large files the length and a page of every MiB, which any training changes: all of the 14 GB
    of a 7B model would take a minute.

    Args:
        source: Folder or hub name.
        config: The configuration that was read from there.
    """
    folder = Path(source)
    if not folder.is_dir():
        return str(config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name!a} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, 2**20):
                file.seek(start)
                digest.update(file.read(_PAGE if path.stat().st_size > _LARGE else 2**20))
    return digest.hexdigest()


def of_settings(model: Any, processor: Any) -> str:
    """Of a model's configuration and of how its processor makes inputs and reads answers."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)  # those written in Python have none
    parts = [
        model.config.to_json_string(),
        model.generation_config.to_json_string(),
        processor.to_json_string(),
        processor.image_processor.to_json_string(),
        str(processor.chat_template),
        repr(tokenizer),
        str(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def code_files() -> dict[str, Path]:
    """This package's modules, whose version stays while a checkout changes."""
    files = _modules(Path(prumerge_fast.__file__).parent)
    # In a checkout the kernels are elsewhere; found without importing triton.
    kernels = importlib.util.find_spec("prumerge_fast.kernels")
    for place in (kernels and kernels.submodule_search_locations) or ():
        files |= {f"kernels/{name}": path for name, path in _modules(Path(place)).items()}
    return files


def of_files(files: Mapping[str, Path]) -> str:
    """Of files by name, and of what they hold: a copy with another date is the same.

    One that cannot be read counts as such: of pictures, questions about it are left out.
    """
    digest = hashlib.sha256()
    for name, path in files.items():
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            content = "unreadable"
        digest.update(f"{name!a} {content}\n".encode())
    return digest.hexdigest()


def _modules(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}


def _sums(tensor: Tensor) -> Tensor:
    """Row and column sums [columns + rows] of a tensor's bytes, folded to rows of `_ROW`."""
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    if len(content) % _ROW:
        content = pad(content, (0, -len(content) % _ROW))
    words = content.view(torch.int64).view(-1, _ROW // _WORD)  # overflow wraps around
    return torch.cat([words.sum(0), words.sum(1)])
