"""Which hooks on the modules of a vision tower fire under `patch`: the table in docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import PATCHES, PIXELS, PROMPTS, batch, tiny_llava
from torch import nn

from prumerge_fast.patching.patch import patch
from prumerge_fast.versions import vision_transformer

INPUTS: dict[str, Any] = {**batch(PROMPTS), "pixel_values": PIXELS}
# Paths in the tower, of 4 layers, the last of which reads the features.
WHOLE = ["", "encoder"]
AS_WITHOUT = ["embeddings", "pre_layrnorm", "encoder.layers.0", "encoder.layers.2.self_attn"]
READER = ["layer_norm1", "self_attn.k_proj", "self_attn.q_proj"]
NOT_RUN = ["", "self_attn", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2", "mlp"]


def wrapped(tower: nn.Module) -> Any:
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    return get_peft_model(tower, config).eval()


def modules_of(model: Any) -> dict[str, nn.Module]:
    transformer = vision_transformer(model.model.vision_tower)
    modules = {path: transformer.get_submodule(path) for path in [*WHOLE[1:], *AS_WITHOUT]}
    for path in NOT_RUN + READER:
        modules[f"reader.{path}"] = transformer.get_submodule(f"encoder.layers.3.{path}".strip("."))
    return modules | {
        "post_layernorm": transformer.post_layernorm,
        "projector": model.model.multi_modal_projector,
    }


def watch(modules: dict[str, nn.Module]) -> dict[str, list[Any]]:
    """The output, or its hidden state, of each call of the modules that are called."""
    seen: dict[str, list[Any]] = {}
    for name, module in modules.items():

        def note(_module: Any, _args: Any, output: Any, name: str = name) -> None:
            if hasattr(output, "last_hidden_state"):
                output = output.last_hidden_state
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append(output)

        module.register_forward_hook(note)
    return seen


@torch.no_grad()
def test_modules_of_the_tower() -> None:
    model = tiny_llava()
    modules = modules_of(model)
    del modules["encoder"]
    seen = watch(modules)
    model(**INPUTS)
    plain = {name: list(outputs) for name, outputs in seen.items()}
    assert plain.keys() == modules.keys()
    seen.clear()

    patch(model, keep=5)(**INPUTS)
    reads = {f"reader.{path}" for path in READER}
    assert seen.keys() == {*AS_WITHOUT, *reads, "projector"}
    for name in [*AS_WITHOUT, "reader.layer_norm1", "reader.self_attn.k_proj"]:
        assert len(seen[name]) == len(plain[name]) == 1, name
        assert torch.equal(seen[name][0], plain[name][0]), name
    [query], [of_all] = seen["reader.self_attn.q_proj"], plain["reader.self_attn.q_proj"]
    torch.testing.assert_close(query, of_all[:, 0])  # the class token's
    assert seen["projector"][0].shape[0] == sum(model.prumerge.last_lengths)


@torch.no_grad()
def test_modules_of_a_tower_that_runs_as_a_whole() -> None:
    """All of them, and the three that patching asks for the scores once more."""
    model = patch(tiny_llava(), keep=5)
    seen = watch(modules_of(model))
    model(**INPUTS)
    reads = {f"reader.{path}" for path in READER}
    assert {name for name, outputs in seen.items() if len(outputs) == 2} == reads
    assert seen.keys() == modules_of(model).keys()


@pytest.mark.parametrize("wrap", [None, wrapped])
@pytest.mark.parametrize("place", ["tower", "transformer", "encoder"])
@pytest.mark.parametrize("feature_layer", [-2, [-2, 1]])
@torch.no_grad()
def test_tower_and_encoder(
    place: str, wrap: Callable[[Any], Any] | None, feature_layer: Any
) -> None:
    """With what they see without the patch, and each once a call; the answers stay."""
    model = tiny_llava(feature_layer=feature_layer)
    if wrap is not None:
        model.model.vision_tower = wrap(model.model.vision_tower)
    expected = patch(model, keep=5)(**INPUTS).logits
    tower = model.model.vision_tower
    transformer = vision_transformer(tower)
    places = {"tower": tower, "transformer": transformer, "encoder": transformer.encoder}
    seen = watch({place: places[place]})
    before = []
    places[place].register_forward_pre_hook(lambda *_: before.append(place))

    assert torch.equal(model(**INPUTS).logits, expected)
    model.generate(**INPUTS, max_new_tokens=2)
    state = tower(PIXELS).last_hidden_state  # of the last layer, too
    assert len(seen[place]) == len(before) == 3
    assert state.shape == (4, 1 + PATCHES, 64)
    for found in seen[place]:
        assert torch.equal(found, state)


@torch.no_grad()
def test_hooks_that_change_something() -> None:
    """Pixels on their way in, hidden states on their way out."""
    model = patch(tiny_llava(), keep=5)
    expected = model(**{**INPUTS, "pixel_values": PIXELS.flip(-1)}).logits
    handle = model.model.vision_tower.register_forward_pre_hook(
        lambda _module, args, kwargs: ((args[0].flip(-1), *args[1:]), kwargs), with_kwargs=True
    )
    assert torch.equal(model(**INPUTS).logits, expected)
    handle.remove()

    def zeros(_module: Any, _args: Any, output: Any) -> Any:
        output.hidden_states = tuple(torch.zeros_like(state) for state in output.hidden_states)
        return output

    model.model.vision_tower.register_forward_hook(zeros)
    features = model.get_image_features(PIXELS)
    features = getattr(features, "pooler_output", features)
    nothing = model.model.multi_modal_projector(torch.zeros(1, 64))
    torch.testing.assert_close(torch.cat(features), nothing.expand(4 * 6, -1))


@torch.no_grad()
def test_hooks_on_all_modules_change_nothing_in_what_runs() -> None:
    model, called = patch(tiny_llava(), keep=5), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        model(**INPUTS)
    finally:
        hook.remove()
    transformer = vision_transformer(model.model.vision_tower)
    reader = transformer.encoder.layers[3]
    assert transformer.embeddings in called
    assert called.count(reader.self_attn.k_proj) == 1
    for module in (model.model.vision_tower, transformer.encoder, reader, reader.mlp):
        assert module not in called


def test_backward_hooks_on_the_tower_fire_for_nobody() -> None:
    """The last layer's output, which they would hang on, is in no loss, patched or not."""
    model, seen = tiny_llava(), []
    for module in (model.model.vision_tower, vision_transformer(model.model.vision_tower).encoder):
        module.register_full_backward_hook(lambda *_: seen.append("full"))
        module.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    inputs = {**INPUTS, "pixel_values": PIXELS.clone().requires_grad_()}
    model(**inputs).logits.sum().backward()
    patch(model, keep=5)(**inputs).logits.sum().backward()
    assert not seen


@torch.no_grad()
def test_a_tower_that_runs_as_a_whole_is_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = patch(tiny_llava(), keep=5)(**INPUTS).logits
    for whole in (["CLIPVisionModel"], ["CLIPEncoder"], []):
        model = accelerate.cpu_offload(
            tiny_llava(), torch.device("cpu"), preload_module_classes=whole
        )
        seen = watch({"tower": model.model.vision_tower})
        assert torch.equal(patch(model, keep=5)(**INPUTS).logits, expected)
        assert len(seen["tower"]) == 1
        assert all(parameter.is_meta for parameter in model.parameters())
