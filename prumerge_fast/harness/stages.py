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

`total` is the whole call, with what `generate` does before the vision tower. Unpatched, nothing
happens between tower and projector, so prune+merge is `None`. On a GPU the marks are CUDA events,
so that the clock itself never makes the host wait.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prumerge_fast.patching.patch import patched
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.clip import reading_layer
from prumerge_fast.versions import cache_of, clip_transformer


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one `generate` call, all of its images and prompts together."""

    vision: float
    prune_merge: float | None
    projector: float
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
        visual_tokens: Tokens of each image that the language model saw.
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
        if config is None:
            is_image = inputs["input_ids"] == model.config.image_token_id
            visual_tokens = is_image.sum(1).tolist()
        else:
            visual_tokens = list(model.prumerge.last_lengths)
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


def _pad_token_id(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    end = model.generation_config.eos_token_id
    return pad if pad is not None else end[0] if isinstance(end, list) else end


class _Clock:
    """Notes when the model passes from one stage to the next, for as long as it is entered."""

    def __init__(self, model: Any, *, pruned: bool) -> None:
        self._model = model
        self._pruned = pruned
        self._marks: dict[str, Any] = {}  # seconds, or CUDA events
        self._hooks = ExitStack()

    def __enter__(self) -> _Clock:
        llava = self._model.model
        tower: Any = clip_transformer(llava.vision_tower)
        self._before(tower.embeddings, "vision")
        if self._pruned:
            # The tower ends with the projections that the class attention needs.
            index = reading_layer(llava.vision_tower, self._model.config.vision_feature_layer)
            attention = tower.encoder.layers[index].self_attn
            self._after(attention.q_proj, "vision end")
            self._after(attention.k_proj, "vision end")
        self._before(llava.multi_modal_projector, "projector")
        self._after(llava.multi_modal_projector, "projector end")
        self._after(self._model.get_output_embeddings(), "logits", only_first=True)
        self._mark("start")
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def stop(self) -> StageTimes:
        """The times from entering until now."""
        self._mark("end")
        vision_end = "vision end" if self._pruned else "projector"
        return StageTimes(
            vision=self._between("vision", vision_end),
            prune_merge=self._between(vision_end, "projector") if self._pruned else None,
            projector=self._between("projector", "projector end"),
            prefill=self._between("projector end", "logits"),
            decode=self._between("logits", "end"),
            total=self._between("start", "end"),
        )

    def _between(self, start: str, end: str) -> float:
        first, last = self._marks[start], self._marks[end]
        if isinstance(first, float):
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def _before(self, module: torch.nn.Module, name: str) -> None:
        handle = module.register_forward_pre_hook(lambda *_: self._mark(name))
        self._hooks.callback(handle.remove)

    def _after(self, module: torch.nn.Module, name: str, *, only_first: bool = False) -> None:
        def hook(*_: object) -> None:
            self._mark(name)
            if only_first:
                handle.remove()

        handle = module.register_forward_hook(hook)
        self._hooks.callback(handle.remove)

    def _mark(self, name: str) -> None:
        if self._model.device.type == "cuda":
            self._marks[name] = torch.cuda.Event(enable_timing=True)
            self._marks[name].record(torch.cuda.current_stream(self._model.device))
        else:
            self._marks[name] = time.perf_counter()
