"""Times the stages of one `generate` call, and counts what it left in the KV cache.

Nothing is run twice or simulated: hooks on the model's own modules take the time while the real
`generate` answers. The stages follow each other without gaps:

| stage       | from                               | to                                |
|-------------|------------------------------------|-----------------------------------|
| vision      | patch embedding                    | the vision tower's last module    |
| prune+merge | there                              | projector                         |
| projector   | there                              | its end                           |
| prefill     | there                              | logits of the first token         |
| decode      | there                              | end of `generate`                 |

A model that encodes images and videos in one call goes through the first three twice, which count
together. Frames are pooled (LLaVA-NeXT-Video) as part of the vision stage. Newlines and the like
are put between projected tokens in the prefill stage.

A family that is pruned behind the projector (LLaVA-OneVision) scores patches, projects all of them
and goes on pruning: prune+merge is both what is between the tower and the projector and what is
between the projector and the prompt's embeddings, with which prefill begins. It includes packing,
interpolation, pooling and newlines, which are prefill's where such a model is not patched.

`total` is the whole call, with what
`generate` does before the vision tower. A stage that does not exist is `None`: unpatched, nothing
happens between tower and projector, and a prompt without images has no vision. On a GPU the marks
are CUDA events, so that the clock itself never makes the host wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prumerge_fast.families.base import inner_model
from prumerge_fast.harness.models import family_of
from prumerge_fast.patching.patch import patched
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.kinds import tower_kind
from prumerge_fast.towers.wrappers import unwrapped
from prumerge_fast.versions import cache_of, configured_feature_layer


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one `generate` call, all of its images and prompts together."""

    vision: float | None
    prune_merge: float | None
    projector: float | None
    prefill: float
    decode: float
    total: float

    def per_question(self, count: int) -> StageTimes:
        """The share of one out of `count` questions."""
        shares: dict[str, Any] = {
            stage: None if seconds is None else seconds / count
            for stage, seconds in asdict(self).items()
        }
        return StageTimes(**shares)

    @property
    def first_token(self) -> float:
        """From the call to the first token's logits."""
        return self.total - self.decode


@dataclass(frozen=True)
class Measurement:
    """What one `generate` call on B prompts gave.

    Args:
        answers: [B, new tokens], the ids behind the prompts.
        times: Seconds for the whole batch.
        cache_bytes: Keys and values of all layers, for the whole batch, padding included.
        visual_tokens: Tokens of each prompt's images and videos that the language model saw.
    """

    answers: torch.Tensor
    times: StageTimes
    cache_bytes: int
    visual_tokens: list[int]


def measure(
    model: Any,
    inputs: Any,
    config: PruMergeConfig | None,
    *,
    backend: str,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
) -> Measurement:
    """Answers a batch greedily with the model as it is (`config=None`) or patched, on the clock."""
    with ExitStack() as stack:
        if config is not None:
            stack.enter_context(patched(model, config, backend=backend))
        clock = stack.enter_context(_Clock(model, pruned=config is not None))
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            pad_token_id=_pad_token_id(model),
        )
        times = clock.stop()
        kept = None if config is None else model.prumerge.last_lengths
        visual_tokens = _visual_tokens(model, inputs["input_ids"], kept)
    prompt_length = inputs["input_ids"].shape[1]
    return Measurement(
        output.sequences[:, prompt_length:].cpu(),
        times,
        cache_bytes(cache_of(output)),
        visual_tokens,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache (4.57 and 5.x)."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


def _visual_tokens(model: Any, input_ids: torch.Tensor, kept: Sequence[int] | None) -> list[int]:
    """Of each prompt [B, L]; `kept` has those of each image, then of each video, where pruned."""
    family, llava = family_of(model), unwrapped(model)
    counts = {
        modality: (input_ids == family.placeholder_id(llava, modality)).sum(1).tolist()
        for modality in family.pixels
    }
    if kept is None:
        return [sum(of_prompt) for of_prompt in zip(*counts.values(), strict=True)]
    owners = [
        i
        for modality, of_modality in counts.items()
        for i, count in enumerate(of_modality)
        for _ in range(family.pieces(llava, modality, count))
    ]
    if len(owners) != len(kept):
        raise ValueError(
            "inputs: expected at most one image and one video a prompt, so that tokens count for "
            f"their prompt, got {len(kept)} in {len(owners)} prompts"
        )
    tokens = [0] * len(input_ids)
    for owner, length in zip(owners, kept, strict=True):
        tokens[owner] += length
    return tokens


def _pad_token_id(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    end = model.generation_config.eos_token_id
    return pad if pad is not None else end[0] if isinstance(end, list) else end


class _Clock:
    """Notes when the model passes from one stage to the next, for as long as it is entered."""

    def __init__(self, model: Any, *, pruned: bool) -> None:
        self._model = model
        self._pruned = pruned
        self._marks: list[tuple[str, Any]] = []  # a stage, and when it began: seconds or an event
        self._hooks = ExitStack()

    def __enter__(self) -> _Clock:
        family, llava = family_of(self._model), unwrapped(self._model)
        layer = configured_feature_layer(llava.config)
        towers = {id(tower): tower for tower in (family.tower(llava, m) for m in family.pixels)}
        for tower in towers.values():
            kind = tower_kind(tower)
            self._before(kind.first(tower), "vision")
            if self._pruned:
                # The tower ends with the last product that scores need.
                for module in kind.last(tower, layer):
                    self._after(module, "prune_merge")
        pooling = family.pooling(llava)
        if pooling is not None and self._pruned:  # unpatched, the stage goes on to the projector
            self._before(pooling, "vision")
            self._after(pooling, "prune_merge")
        self._before(inner_model(llava).multi_modal_projector, "projector")
        if self._pruned and family.prunes_projected:
            self._after(inner_model(llava).multi_modal_projector, "prune_merge")
            self._before(llava.get_input_embeddings(), "prefill", only_first=True)
        else:
            self._after(inner_model(llava).multi_modal_projector, "prefill")
        self._after(self._model.get_output_embeddings(), "decode", only_first=True)
        self._mark("before")
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def stop(self) -> StageTimes:
        """The times from entering until now."""
        self._mark("end")
        last = self._marks[-1][1]
        if not isinstance(last, float):
            last.synchronize()
        times: dict[str, float] = {}
        for (stage, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            times[stage] = times.get(stage, 0.0) + _seconds(start, end)
        return StageTimes(
            vision=times.get("vision"),
            prune_merge=times.get("prune_merge"),
            projector=times.get("projector"),
            prefill=times.get("prefill", times["before"]),  # of prompts without images
            decode=times["decode"],
            total=_seconds(self._marks[0][1], last),
        )

    def _before(self, module: torch.nn.Module, name: str, *, only_first: bool = False) -> None:
        def hook(*_: object) -> None:
            self._mark(name)
            if only_first:
                handle.remove()

        handle = module.register_forward_pre_hook(hook)
        self._hooks.callback(handle.remove)

    def _after(self, module: torch.nn.Module, name: str, *, only_first: bool = False) -> None:
        def hook(*_: object) -> None:
            self._mark(name)
            if only_first:
                handle.remove()

        handle = module.register_forward_hook(hook)
        self._hooks.callback(handle.remove)

    def _mark(self, name: str) -> None:
        """Ends the stage before, and begins that of this name."""
        if self._model.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._model.device))
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
