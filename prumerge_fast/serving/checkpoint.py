"""Reads chosen tensors of a checkpoint, from the files that hold them and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from prumerge_fast.errors import InputError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Versions of transformers save one module under several names; of either kind, the short one.
_OUTER = re.compile(r"^model\.")
_WRAPPED_TOWER = re.compile(r"(?<=_tower\.)vision_model\.")


def plain_name(name: str) -> str:
    """The name of a LLaVA's weight without what only some versions of transformers write."""
    return _WRAPPED_TOWER.sub("", _OUTER.sub("", name), count=1)


def read_weights(
    source: str, names: Collection[str], revision: str | None = None
) -> dict[str, Tensor]:
    """The tensors of those names that a checkpoint has, as they are stored, on the CPU.

    Args:
        source: Folder or hub name; of the hub, only the files that hold them are downloaded.
        names: As `plain_name` gives them, and so are those of the result.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: It has no safetensors, or a file that is needed is absent or broken.
    """
    from safetensors import safe_open

    weights = {}
    try:
        for path in _files(source, names, revision):
            with safe_open(path, "pt") as file:
                for stored in file.keys():  # noqa: SIM118 - it is no mapping
                    name = plain_name(stored)
                    if name in names:
                        weights[name] = file.get_tensor(stored)
    except InputError:
        raise
    except Exception as error:  # files that are absent, broken or of another kind raise any
        raise InputError(
            f"model_id: expected readable safetensors of vision tower and projector, got {source} "
            f"({type(error).__name__}: {error})"
        ) from None
    return weights


def _files(source: str, names: Collection[str], revision: str | None) -> list[Path]:
    """The checkpoint's files that hold any of these tensors."""
    index = _find(source, _INDEX, revision)
    if index is None:
        single = _find(source, _SINGLE, revision, needed=True)
        if single is None:
            raise InputError(
                f"model_id: expected {_SINGLE} or {_INDEX}, from which tensors can be read one by "
                f"one, got {source}, without either; transformers' `save_pretrained` writes them"
            )
        return [single]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    needed = {file for name, file in shards.items() if plain_name(name) in names}
    found = {file: _find(source, file, revision, needed=True) for file in sorted(needed)}
    absent = [file for file, path in found.items() if path is None]
    if absent:
        raise InputError(
            f"model_id: expected {absent[0]} in {source}, which its {_INDEX} names, got no such "
            "file"
        )
    return [path for path in found.values() if path is not None]


def _find(source: str, name: str, revision: str | None, needed: bool = False) -> Path | None:
    """A file of the checkpoint, downloaded if need be; `None` if it has none of that name.

    Where that cannot be told, because the hub is out of reach, raises if the file is `needed`.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError as error:
        if needed and isinstance(error, LocalEntryNotFoundError):
            raise
        return None
