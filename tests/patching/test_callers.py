"""Whoever calls a patched model with pixels gets pruned tokens, or an error that says so."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from tiny_models import (
    CACHE,
    EVERYTHING,
    PIXELS,
    PROMPTS,
    batch,
    labels_of,
    lengths_seen,
    same,
    snapshot,
    tiny_llava,
)
from torch.nn.functional import cross_entropy
from transformers import GenerationMixin, LlavaForConditionalGeneration

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.patching.patch import is_patched, patch, unpatch

INPUTS = {**batch(PROMPTS, "right"), "pixel_values": PIXELS}
MASK = INPUTS["attention_mask"].bool()
IDS = INPUTS["input_ids"]
LABELS = labels_of(IDS)
WIDTH = IDS.shape[1]


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return patch(tiny_llava(), keep=5)


def outside_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """As trainers compute it: each column predicts the label of the next."""
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def fused_head(self: Any, labels: Any = None, **kwargs: Any) -> Any:
    """As TRL and Liger-Kernel put it on an instance: hidden states of the inner model, own loss."""
    hidden = self.model(**kwargs).last_hidden_state  # [B, L, D]
    return outside_loss(self.lm_head(hidden), labels)


@torch.no_grad()
def test_the_inner_model(model: Any) -> None:
    seen = lengths_seen(model)
    expected = model(**INPUTS, output_hidden_states=True)
    outputs = model.model(**INPUTS, output_hidden_states=True)
    assert len(set(seen)) == 1
    assert seen[0] < WIDTH
    assert outputs.last_hidden_state.shape[:2] == expected.logits.shape[:2] == IDS.shape
    assert torch.equal(model.lm_head(outputs.last_hidden_state), expected.logits)
    assert model.prumerge.last_lengths == (6,) * 4
    for one, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert one.shape[:2] == IDS.shape
        assert torch.equal(one, other)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    as_tuple = model.model(**INPUTS, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.last_hidden_state)
    positional = model.model(IDS, PIXELS, INPUTS["attention_mask"])
    assert torch.equal(positional.last_hidden_state, outputs.last_hidden_state)
    reduced = model.model.get_image_features(PIXELS)
    assert [len(each) for each in getattr(reduced, "pooler_output", reduced)] == [6] * 4
    patch(model, outputs="shrunk")
    hidden = model.model(**INPUTS).last_hidden_state
    assert hidden.shape[1] == seen[0]
    assert torch.equal(model.lm_head(hidden), model(**INPUTS).logits)


@torch.no_grad()
def test_keeping_everything_the_inner_model_is_the_plain_one() -> None:
    model = tiny_llava()
    expected = model.model(**INPUTS, output_hidden_states=True)
    actual = patch(model, **EVERYTHING).model(**INPUTS, output_hidden_states=True)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))


@torch.no_grad()
def test_steps_behind_a_prompt_by_the_inner_model(model: Any) -> None:
    first = model.model(**INPUTS, use_cache=True)
    step = {"input_ids": torch.full((4, 1), 7)}
    step["attention_mask"] = torch.nn.functional.pad(INPUTS["attention_mask"], (0, 1), value=1)
    hidden = model.model(**step, **{CACHE: first[CACHE]}).last_hidden_state
    again = model(**INPUTS, use_cache=True)
    expected = model(**step, **{CACHE: again[CACHE]}).logits
    assert torch.equal(model.lm_head(hidden), expected)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.model(**{CACHE: again[CACHE]})


@torch.no_grad()
def test_losses_outside_the_model(model: Any) -> None:
    """By the caller's labels they are what `labels` gives."""
    inside = model(**INPUTS, labels=LABELS)
    assert outside_loss(inside.logits, LABELS) == pytest.approx(float(inside.loss), rel=1e-5)


@pytest.mark.parametrize("first", ["patch", "forward"])
@torch.no_grad()
def test_a_forward_on_the_instance(first: str) -> None:
    model = tiny_llava()
    plain = outside_loss(model(**INPUTS).logits, LABELS)
    forward = MethodType(fused_head, model)
    if first == "forward":
        model.forward = forward
    before = snapshot(model)
    patch(model, keep=5)
    if first == "patch":
        model.forward = forward
    expected = float(patch(tiny_llava(), keep=5)(**INPUTS, labels=LABELS).loss)
    seen = lengths_seen(model)
    assert model(**INPUTS, labels=LABELS) == pytest.approx(expected, rel=1e-5)
    assert seen[0] < WIDTH
    model.model.language_model._forward_pre_hooks.clear()
    unpatch(model)
    assert model.forward is forward
    assert model(**INPUTS, labels=LABELS) == pytest.approx(plain, rel=1e-5)
    if first == "patch":
        del model.forward
    assert same(before, snapshot(model))
    assert not is_patched(model.model)


@torch.no_grad()
def test_what_wraps_the_patched_forward_outlives_the_patch(model: Any) -> None:
    wrapped = model.forward
    model.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    seen = lengths_seen(model)
    model(**INPUTS)
    unpatch(model)
    assert torch.equal(model(**INPUTS).logits, tiny_llava()(**INPUTS).logits)
    assert seen[0] < seen[1] == WIDTH


@torch.no_grad()
def test_the_plain_class_around_the_instance(model: Any) -> None:
    seen = lengths_seen(model)
    expected = model(**INPUTS).logits
    actual = LlavaForConditionalGeneration.forward(model, **INPUTS).logits
    assert torch.equal(actual, expected)
    prompts = {**batch(PROMPTS, "left"), "pixel_values": PIXELS}
    options = {"max_new_tokens": 5, "do_sample": False}
    answer = model.generate(**prompts, **options)
    del seen[:]
    assert torch.equal(GenerationMixin.generate(model, **prompts, **options), answer)
    assert seen == [seen[0], 1, 1, 1, 1]
    assert 1 < seen[0] < WIDTH


@torch.no_grad()
def test_the_plain_inner_forward_is_refused(model: Any) -> None:
    plain_forward = type(tiny_llava().model).forward
    with pytest.raises(UnsupportedModelError, match=r"around the patch.*model\.model\(\.\.\.\)"):
        plain_forward(model.model, **INPUTS)
    model.model.forward = MethodType(plain_forward, model.model)
    with pytest.raises(UnsupportedModelError, match="around the patch"):
        LlavaForConditionalGeneration.forward(model, **INPUTS)


class Around(torch.nn.Module):
    """A wrapper that nobody knows, around an inner model."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@torch.no_grad()
def test_another_inner_model_put_there_after_the_patch(model: Any) -> None:
    old, model.model = model.model, tiny_llava().model
    before = snapshot(model.model)
    for call in (model, model.generate, model.get_image_features):
        given = INPUTS if call != model.get_image_features else {"pixel_values": PIXELS}
        with pytest.raises(UnsupportedModelError, match=r"LlavaModel that was put .* patch the mo"):
            call(**given)
    patch(model, keep=4)
    seen = lengths_seen(model)
    model.model(**INPUTS)
    assert model.prumerge.last_lengths == (5,) * 4
    assert seen[0] < WIDTH
    model.model.language_model._forward_pre_hooks.clear()
    model.model.language_model._forward_pre_hooks_with_kwargs.clear()
    unpatch(model)
    assert same(before, snapshot(model.model))
    assert is_patched(old)
    assert not is_patched(unpatch(old))


@torch.no_grad()
def test_the_inner_model_of_two_models(model: Any) -> None:
    other = tiny_llava()
    other.model = model.model
    with pytest.raises(UnsupportedModelError, match="its LlavaModel was patched with another"):
        patch(other, keep=3)
    assert not is_patched(other)
    model.model(**INPUTS)
    assert model.prumerge.last_lengths == (6,) * 4
    unpatch(model)
    patch(other, keep=3).model(**INPUTS)
    assert other.prumerge.last_lengths == (4,) * 4
    assert model(**INPUTS).logits.shape[1] == WIDTH


@torch.no_grad()
def test_what_is_put_around_the_inner_model(model: Any) -> None:
    model.model = Around(model.model)
    patch(model, keep=3)
    model(**INPUTS)
    assert model.prumerge.last_lengths == (4,) * 4
    model.model(**INPUTS)
    assert model.prumerge.last_lengths == (4,) * 4
    unpatch(model)
    assert not is_patched(model.model.inner)
    assert torch.equal(model(**INPUTS).logits, tiny_llava()(**INPUTS).logits)
    with pytest.raises(UnsupportedModelError, match=r"an inner model with .* got a Around"):
        patch(model)


def test_outputs_are_caller_or_shrunk(model: Any) -> None:
    with pytest.raises(ValueError, match=r"outputs: expected 'caller' or 'shrunk' for .*'short'"):
        patch(model, outputs="short")
    assert patch(model, outputs="shrunk").prumerge.outputs == "shrunk"
    assert patch(model, keep=3).prumerge.outputs == "shrunk"
    assert patch(model, outputs="caller").model.prumerge.outputs == "caller"


def test_gradients_by_either_way() -> None:
    gradients = []
    for by_inner in (False, True):
        model = patch(tiny_llava(), keep=5).train()
        if by_inner:
            logits = model.lm_head(model.model(**INPUTS).last_hidden_state)
            cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()).backward()
        else:
            model(**INPUTS, labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
