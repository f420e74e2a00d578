"""Ray, started for one job or joined, with room for what the job runs."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from prumerge_fast.errors import InputError
from prumerge_fast.serving.batch.options import BatchOptions, engine_workers

# Beside the actors, Ray Data runs one that leaves out what is done, and tasks that read and write.
# Without a CPU for them, everything waits for ever.
SPARE_CPUS = 2
# Of this process and of the cluster that it starts, where the caller's has nothing else.
_ENVIRONMENT = {
    # Else Ray hides all devices from actors without a GPU, which vLLM takes for a broken one.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


@dataclass(frozen=True)
class Actors:
    """How many there are, and what Ray sets aside for each."""

    count: int
    num_cpus: float
    num_gpus: float


def encoding(engines: Actors) -> Actors:
    """What encodes pictures for engines of vLLM: as many, on a tenth of their GPUs.

    Of a GPU's memory vLLM takes 92 % unless told otherwise, which leaves the tower room.
    """
    return Actors(engines.count, 1.0, engines.num_gpus / 10)


@contextmanager
def running(
    options: BatchOptions,
    folder: Path,
) -> Iterator[Actors]:
    """Has Ray run, and this process with it, until the block ends.

    Args:
        options: Where Ray is or is to be, and what runs on it.
        folder: Where workers look for modules instead of in this process' folder, in which any
            folder may have the name of a package.

    Yields:
        The actors, which can all run at once.

    Raises:
        InputError: There is no such cluster, or the actors cannot all run on it.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = options.address
    if address is None:
        cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
        found = _actors([{"CPU": cpus, "GPU": gpus}], options)
        # Cores are shared, so the spare ones need not be there.
        room = max(cpus, math.ceil(_cpus(found, options)))
        _init(folder, address="local", num_cpus=room, num_gpus=gpus, include_dashboard=False)
    else:
        try:
            _check_answers(address)
            _init(folder, address=address)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--address: expected a Ray cluster that runs, got {address} ({error})"
            ) from None
    try:
        if address is not None:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            found = _actors(nodes, options)
            total, needed = sum(node.get("CPU", 0) for node in nodes), _cpus(found, options)
            if total < needed:
                raise InputError(
                    f"--actors: expected a cluster with {needed - found.count * found.num_cpus:g} "
                    f"CPUs beside those of the actors, for reading and writing, got {total:g} CPUs "
                    f"in all for {found.count} actors of {found.num_cpus:g}"
                )
        yield found
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT, for which Ray would wait very long."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _init(folder: Path, **arguments: object) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    finally:
        os.chdir(before)


def _cpus(actors: Actors, options: BatchOptions) -> float:
    """What must be there so that nothing waits for ever."""
    needed = actors.count * actors.num_cpus + SPARE_CPUS
    if options.encodes:
        encoders = encoding(actors)
        needed += encoders.count * encoders.num_cpus
    return needed


def _actors(nodes: Sequence[Mapping[str, float]], options: BatchOptions) -> Actors:
    """What is asked for, or follows from the nodes' resources.

    Raises:
        InputError: They cannot all run at once.
    """
    count, num_cpus, num_gpus = options.actors, options.num_cpus, options.num_gpus
    if num_cpus <= 0:
        raise InputError(f"--num-cpus: expected more than 0, got {num_cpus:g}")
    if num_gpus is None:
        has = any(node.get("GPU", 0) for node in nodes)
        num_gpus = engine_workers(options.engine_kwargs) if has else 0
    places = sum(
        min(
            int(node.get("CPU", 0) / num_cpus + 1e-6),
            int(node.get("GPU", 0) / num_gpus + 1e-6) if num_gpus else 2**31,
        )
        for node in nodes
    )
    if count is None:
        count = places if num_gpus else 1
    if count > places or not places:
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        raise InputError(
            f"--actors: expected at most {places} of {num_cpus:g} CPUs and {num_gpus:g} GPUs each "
            f"on {cpus:g} CPUs and {gpus:g} GPUs, got {max(count, 1)}"
        )
    return Actors(count, num_cpus, num_gpus)
