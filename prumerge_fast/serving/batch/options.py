"""What `prumerge-fast batch` is asked for. Imports neither Ray nor PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prumerge_fast.errors import InputError


@dataclass(frozen=True)
class BatchOptions:
    """The options of the command (`prumerge-fast batch --help` describes them).

    Args:
        actors: How many models run at once; `None`: one a GPU, without GPUs one.
        chosen: Options of `PruMergeConfig`; others are left to the model.
        num_cpus: Of each actor, as Ray counts them.
        num_gpus: Of each actor; `None`: 1 (of each process of an engine) where the cluster has
            GPUs, else 0.
        engine_kwargs: Further arguments of vLLM's engine.

    Raises:
        InputError: The engine has no such positions.
    """

    command: list[str]
    images: Path
    model: str | None
    prompts: list[str]
    output: Path
    image_folder: Path | None
    conv_template: str | None
    image_aspect_ratio: str | None
    chosen: Mapping[str, Any]
    engine: str
    engine_kwargs: Mapping[str, Any]
    address: str | None
    actors: int | None
    num_cpus: float
    num_gpus: float | None
    backend: str
    dtype: str
    batch_size: int
    max_new_tokens: int
    retry_errors: bool
    shows_progress: bool

    def __post_init__(self) -> None:
        positions = self.chosen.get("positions", "compact")
        if self.engine == "vllm" and positions != "compact":
            raise InputError(
                "--positions: expected compact beside --engine vllm, which counts positions by "
                f"itself, got {positions}"
            )

    @property
    def encodes(self) -> bool:
        """Whether pictures are encoded in front of the engines, which each decides for itself."""
        return self.engine == "vllm" and self.chosen.get("keep") is None


def check_installed(engine: str) -> None:
    """Raises InputError where Ray is not installed, or what the engine needs."""
    needed = [("ray", "ray")] + ([("vllm", "vllm")] if engine == "vllm" else [])
    for package, extra in needed:
        if importlib.util.find_spec(package) is None:
            asked = "batch" if package == "ray" else f"--engine {engine}"
            raise InputError(
                f"{asked}: expected {package} to be installed, got none; "
                f'run: pip install "prumerge_fast[{extra}]"'
            )


def engine_workers(engine_kwargs: Mapping[str, Any]) -> int:
    """How many processes of vLLM, each of which takes a GPU, are one engine."""
    sizes = [engine_kwargs.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise InputError(
            "--engine-kwargs: expected tensor_parallel_size and pipeline_parallel_size to be whole "
            f"numbers >= 1, got {sizes[0]!r} and {sizes[1]!r}"
        )
    return sizes[0] * sizes[1]
