"""`patch`, `unpatch`, `patched`: on one instance, in any order, and off without a trace."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import images, lengths_seen, prompt, same, snapshot, tiny_llava
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.patching.patch import PruMergeState, is_patched, patch, patched, unpatch
from prumerge_fast.reduction.config import PruMergeConfig

INPUTS = {
    "input_ids": torch.tensor([prompt([5, 6], "image", [7, 8])]),
    "pixel_values": images(1),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def test_patch_and_unpatch_leave_no_trace() -> None:
    model, other = tiny_llava(), tiny_llava(seed=1)
    class_before = dict(vars(LlavaForConditionalGeneration))
    expected, of_other = logits(model), logits(other)
    before = snapshot(model)  # after a call: transformers 5 notes the first one on the tower
    assert patch(model, keep=3) is model
    seen = lengths_seen(model)
    assert logits(model).shape == expected.shape
    model.model.language_model._forward_pre_hooks.clear()
    assert seen == [expected.shape[1] - 25 + 4]  # 3 centres and the supplement
    assert model.prumerge.last_lengths == (4,)
    model.generate(**INPUTS, max_new_tokens=2)
    assert torch.equal(logits(other), of_other)
    assert not is_patched(other)
    assert not hasattr(other, "prumerge")
    assert unpatch(model) is model
    assert same(before, snapshot(model))
    assert type(model) is LlavaForConditionalGeneration
    assert dict(vars(LlavaForConditionalGeneration)) == class_before
    assert torch.equal(logits(model), expected)
    assert not hasattr(model, "prumerge")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def around(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("compiled", [around, in_place])
def test_compiled_models(compiled: Any) -> None:
    """Patched inside the wrapper of `torch.compile`, whose code does not go on as before."""
    torch.compiler.reset()
    plain, pruned = logits(tiny_llava()), logits(patch(tiny_llava(), keep=3))
    model = tiny_llava()
    wrapper = compiled(model)
    torch.testing.assert_close(logits(wrapper), plain)
    assert patch(wrapper, keep=3) is wrapper
    assert is_patched(wrapper)
    assert is_patched(model)
    assert wrapper.prumerge is model.prumerge
    torch.testing.assert_close(logits(wrapper), pruned)
    assert unpatch(wrapper) is wrapper
    assert type(model) is LlavaForConditionalGeneration
    assert not is_patched(wrapper)
    torch.testing.assert_close(logits(wrapper), plain)
    with patched(wrapper) as inside:
        assert inside is wrapper
        assert is_patched(model)
    assert not is_patched(model)


def test_patching_again_reconfigures() -> None:
    model = patch(tiny_llava(), keep=5, neighbours=3, backend="reference")
    kind = type(model)
    patch(model, keep=2)
    assert type(model) is kind
    assert model.prumerge.config == PruMergeConfig(keep=2, neighbours=3)
    assert model.prumerge.backend == "reference"
    patch(model, PruMergeConfig(merge="none"), order="raster", backend="torch")
    assert model.prumerge.config == PruMergeConfig(merge="none", order="raster")
    assert model.prumerge.backend == "torch"
    unpatch(model)
    assert type(model) is LlavaForConditionalGeneration
    assert patch(model).prumerge.config == PruMergeConfig()


def test_state() -> None:
    model = patch(tiny_llava())
    assert model.prumerge == PruMergeState(PruMergeConfig(), "auto", "caller", None)
    assert model.model.prumerge is model.prumerge


def test_patched_restores_what_was() -> None:
    model = tiny_llava()
    before = snapshot(model)
    with patched(model, keep=2) as inside:
        assert inside is model
        assert model.prumerge.config.keep == 2
    assert same(before, snapshot(model))

    state = patch(model, keep=4, backend="torch").prumerge
    with patched(model, keep=2, backend="reference"):
        assert model.prumerge.config.keep == 2
        logits(model)
    assert model.prumerge is state
    assert state.last_lengths is None
    with patched(model):
        unpatch(model)
    assert model.prumerge is state
    unpatch(model)
    with patched(model):
        unpatch(model)
    assert same(before, snapshot(model))


def test_patched_restores_after_an_error() -> None:
    model = tiny_llava()
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert type(model) is LlavaForConditionalGeneration


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kep": 3}, TypeError, "'kep'.*variant, keep, neighbours"),
        ({"keep": 0}, ValueError, "keep"),
        ({"keep": 26}, ValueError, "at most N = 25"),
        ({"keep": "3"}, TypeError, "keep"),
        ({"backend": "cuda"}, ValueError, "backend.*auto, triton, torch, reference"),
        ({"backend": 3}, TypeError, "backend"),
        ({"config": {"keep": 3}}, TypeError, "config: expected a PruMergeConfig or None, got dict"),
    ],
)
@pytest.mark.parametrize("already", [False, True])
def test_bad_arguments_change_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str, already: bool
) -> None:
    model = tiny_llava()
    if already:
        patch(model, keep=4)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch(model, **arguments)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "llava", LlavaForConditionalGeneration])
def test_unknown_models(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"supported: LlavaForConditionalGeneration \("):
        patch(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"feature_layer": 9}, "vision_feature_layer: expected one int from -5 to 4"),
        ({"feature_layer": [-2, 9]}, r"vision_feature_layer\[1\]: expected one int"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy.*'default'"),
    ],
)
def test_unsupported_configurations(options: dict[str, Any], reason: str) -> None:
    model = tiny_llava(**options)
    with pytest.raises(UnsupportedModelError, match=reason):
        patch(model)
    assert not is_patched(model)


def test_unpatching_a_plain_model() -> None:
    with pytest.raises(ValueError, match="expected a patched model, got a plain Llava"):
        unpatch(tiny_llava())


def test_subclasses_are_patched() -> None:
    class Mine(LlavaForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + 1
            return outputs

    model = tiny_llava()
    plain = logits(patch(model))
    unpatch(model).__class__ = Mine
    assert torch.equal(logits(patch(model)), plain + 1)
    assert type(unpatch(model)) is Mine


def test_a_new_model_of_its_class_is_plain(tmp_path: Path) -> None:
    model = patch(tiny_llava())
    model.save_pretrained(tmp_path)
    for new in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert type(new) is LlavaForConditionalGeneration
        assert logits(new).shape[1] == INPUTS["input_ids"].shape[1]
    assert is_patched(model)


def test_a_class_put_over_the_patched_one_is_not_lost() -> None:
    model = patch(tiny_llava())
    pruned_class = type(model)
    model.__class__ = type("Wrapped", (pruned_class,), {})
    with pytest.raises(UnsupportedModelError, match="its class was replaced after patching"):
        unpatch(model)
    model.__class__ = pruned_class
    assert type(unpatch(model)) is LlavaForConditionalGeneration


def test_looks_like_its_class() -> None:
    model = patch(tiny_llava())
    assert isinstance(model, LlavaForConditionalGeneration)
    assert str(type(model)) == str(LlavaForConditionalGeneration)
    assert type(model).__doc__ == LlavaForConditionalGeneration.__doc__


def test_saves_the_plain_model(tmp_path: Path) -> None:
    model = tiny_llava()
    expected = logits(model)
    patch(model).save_pretrained(tmp_path)
    assert "prumerge" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert type(loaded) is LlavaForConditionalGeneration
    assert loaded.config.architectures == ["LlavaForConditionalGeneration"]
    assert torch.equal(logits(loaded.eval()), expected)
    assert "lm_head.weight" in model.state_dict()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, through_torch])
def test_copies_are_patched_on_their_own(duplicate: Any) -> None:
    model = patch(tiny_llava(), keep=3)
    expected = logits(model)
    twin = duplicate(model)
    assert torch.equal(logits(twin), expected)
    patch(twin, keep=7)
    assert model.prumerge.config.keep == 3
    unpatch(twin)
    assert type(twin) is LlavaForConditionalGeneration
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("first", ["hook", "patch"])
@pytest.mark.parametrize("removed_first", ["hook", "patch"])
def test_accelerate_hooks(first: str, removed_first: str) -> None:
    """They replace `forward` on the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_llava()
    calls = []

    class Count(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    unpruned = logits(model)
    pruned = logits(patch(model, keep=3))
    unpatch(model)
    before = snapshot(model)

    def add_hook() -> None:
        hooks.add_hook_to_module(model, Count())

    for step in [add_hook, lambda: patch(model, keep=3)][:: 1 if first == "hook" else -1]:
        step()
    assert torch.equal(logits(model), pruned)
    assert calls == [model]
    if removed_first == "hook":
        hooks.remove_hook_from_module(model)
        assert torch.equal(logits(model), pruned)
        assert calls == [model]
        unpatch(model)
        assert torch.equal(logits(model), unpruned)
    else:
        unpatch(model)
        assert torch.equal(logits(model), unpruned)
        assert calls == [model, model]
        hooks.remove_hook_from_module(model)
    assert model.forward == LlavaForConditionalGeneration.forward.__get__(model)
    del model.forward  # accelerate leaves it on the instance
    assert same(before, snapshot(model))


def test_methods_replaced_on_the_instance_are_refused() -> None:
    """But for the whole model's `forward`, which goes by the inner model's (test_callers.py)."""
    model = tiny_llava()
    model.model.forward = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedModelError, match="`forward` of its LlavaModel was replaced"):
        patch(model)
    assert not is_patched(model)
    assert not is_patched(model.model)
    del model.model.forward
    model.generate = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedModelError, match="`generate`"):
        patch(model)
    del model.generate


def test_importing_does_not_import_transformers() -> None:
    code = (
        "import sys, prumerge_fast.patching.patch, prumerge_fast.families.llava\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
