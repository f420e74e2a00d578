"""The setting `--hf-overrides '{"prumerge": {...}}'`, read from a model's configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from prumerge_fast.reduction.config import PruMergeConfig

NAME = "hf_overrides['prumerge']"


def settings(hf_config: Any) -> PruMergeConfig | None:
    """What a model's configuration says of PruMerge; `None` where it says nothing.

    Raises:
        ValueError: It is no mapping of options of `PruMergeConfig`, or has no `keep`.
    """
    options = getattr(hf_config, "prumerge", None)
    if options is None:
        return None
    if not isinstance(options, dict):
        raise ValueError(
            f'{NAME}: expected options such as {{"keep": 64}}, got {options!r}; leave it out for '
            "no PruMerge"
        )
    try:
        config = PruMergeConfig().replace(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{NAME}: {error}") from None
    if config.keep is None:
        raise ValueError(
            f"{NAME}: keep: expected a number of tokens or a share, got None: vLLM counts an "
            "image's tokens before it sees the image; for counts that the image decides, encode "
            "with prumerge_fast.serving.PruMergeEncoder and pass image_embeds"
        )
    return config


class PrunedInfo:
    """What vLLM asks of a model before it runs it, of one with the setting."""

    @property
    def prumerge(self) -> PruMergeConfig:
        """The setting."""
        config = settings(self.get_hf_config())  # type: ignore[attr-defined]
        if config is None:
            raise ValueError(f"{NAME}: expected it to be given, got None")
        return config

    @property
    def model_id(self) -> str:
        """Part of the key of what vLLM, or a cache that several engines share, keeps of images."""
        options = json.dumps(dataclasses.asdict(self.prumerge), sort_keys=True)
        return f"{super().model_id}#prumerge:{options}"  # type: ignore[misc]
