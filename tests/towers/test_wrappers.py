"""Towers inside `torch.compile` and PEFT's wrappers, and what is no tower's wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import EVERYTHING, PIXELS, PROMPTS, batch, same, snapshot, tiny_llava
from torch import nn

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.encode import encode
from prumerge_fast.patching.patch import patch, unpatch
from prumerge_fast.towers.clip import TOWER
from prumerge_fast.towers.wrappers import unwrapped, wrapping
from prumerge_fast.versions import vision_transformer

INPUTS: dict[str, Any] = {**batch(PROMPTS), "pixel_values": PIXELS}


def compiled(tower: nn.Module) -> Any:
    return torch.compile(tower, backend="eager")


def compiled_in_place(tower: nn.Module) -> Any:
    tower.compile(backend="eager")
    return tower


def with_lora(tower: nn.Module, **options: Any) -> Any:
    """Adapters that change something, as trained ones do."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tower, config, **options).eval()


def with_mixed_lora(tower: nn.Module) -> Any:
    return with_lora(tower, mixed=True)


WRAPPERS: dict[str, list[Callable[[Any], Any]]] = {
    "compiled": [compiled],
    "compiled in place": [compiled_in_place],
    "PEFT": [with_lora],
    "several kinds of PEFT": [with_mixed_lora],
    "PEFT of a compiled tower": [compiled, with_lora],
    "a compiled PEFT": [with_lora, compiled],
    "three": [with_lora, compiled_in_place, compiled],
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def wrapped_llava(*wrappers: Callable[[Any], Any]) -> Any:
    model = tiny_llava()
    for wrap in wrappers:
        model.model.vision_tower = wrap(model.model.vision_tower)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**INPUTS).logits


@pytest.mark.parametrize("name", WRAPPERS)
def test_answers_as_without_the_wrapper(name: str) -> None:
    model = wrapped_llava(*WRAPPERS[name])
    bare = wrapped_llava(*(wrap for wrap in WRAPPERS[name] if "compiled" not in wrap.__name__))
    bare.model.vision_tower = unwrapped(bare.model.vision_tower)  # LoRA is in the layers
    tower = model.model.vision_tower
    plain = logits(model)
    before = snapshot(model)

    expected = logits(patch(bare, keep=5))
    assert patch(model, keep=5) is model
    assert torch.equal(logits(model), expected)
    answers = [m.generate(**INPUTS, max_new_tokens=3) for m in (model, bare)]
    assert torch.equal(*answers)
    for one, other in zip(encode(model, PIXELS)[:3], encode(bare, PIXELS)[:3], strict=True):
        assert torch.equal(one, other)
    assert TOWER.num_patches(tower) == TOWER.num_patches(bare.model.vision_tower)

    assert unpatch(model) is model
    assert model.model.vision_tower is tower
    assert same(before, snapshot(model))
    assert torch.equal(logits(model), plain)
    kept = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(logits(patch(model, **EVERYTHING))[kept], plain[kept])


@pytest.mark.parametrize("name", WRAPPERS)
def test_adapters_of_the_tower_are_trained(name: str) -> None:
    if "PEFT" not in name:
        pytest.skip("no adapters")
    model = patch(wrapped_llava(*WRAPPERS[name]), keep=5)
    labels = INPUTS["input_ids"].masked_fill(INPUTS["attention_mask"] == 0, -100)
    model(**INPUTS, labels=labels).loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    unread = {n for n in adapters if "layers.3" in n and "v_proj" in n}  # no layer behind reads it
    for parameter_name, parameter in adapters.items():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == (parameter_name not in unread), parameter_name


def test_adapters_are_turned_off_and_on() -> None:
    model = patch(wrapped_llava(with_lora), keep=5)
    adapted = logits(model)
    with model.model.vision_tower.disable_adapter():
        assert torch.equal(logits(model), logits(patch(tiny_llava(), keep=5)))
    assert torch.equal(logits(model), adapted)


def test_the_copy_that_is_active() -> None:
    """Of a tower among PEFT's `modules_to_save`, with several adapters."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["vision_tower"])
    model: Any = get_peft_model(tiny_llava(), config)
    model.add_adapter("other", config)
    wrapper = model.get_base_model().model.vision_tower
    assert list(wrapping(wrapper)) == [wrapper, wrapper.modules_to_save["default"]]
    model.set_adapter("other")
    assert unwrapped(wrapper) is wrapper.modules_to_save["other"]
    with model.disable_adapter():
        assert unwrapped(wrapper) is wrapper.original_module


def test_modules_of_a_tower_that_are_compiled() -> None:
    expected = logits(patch(tiny_llava(), keep=5))
    model = tiny_llava()
    encoder = vision_transformer(model.model.vision_tower).encoder
    encoder.layers[0] = compiled(encoder.layers[0])
    encoder.layers[1].compile(backend="eager")
    encoder.layers[3] = compiled(encoder.layers[3])
    torch.testing.assert_close(logits(patch(model, keep=5)), expected)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parallel(kind: str, module: nn.Module) -> nn.Module:
    if kind == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))
    return getattr(nn.parallel, kind)(module)


KINDS = ["DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", KINDS)
def test_parallel_wrappers_of_a_tower(kind: str) -> None:
    model = tiny_llava()
    tower = model.model.vision_tower
    model.model.vision_tower = parallel(kind, tower)
    message = (
        f"vision tower: expected one of CLIPVisionModel, .*, got {kind}, which has to be called"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        patch(model)
    model.model.vision_tower = tower
    patch(model).model.vision_tower = parallel(kind, tower)
    with pytest.raises(UnsupportedModelError, match=message):  # and not another result
        model(**INPUTS)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", KINDS)
def test_parallel_wrappers_of_a_model(kind: str) -> None:
    expected = logits(patch(tiny_llava(), keep=5))
    model = tiny_llava()
    wrapper = parallel(kind, model)
    with pytest.raises(UnsupportedModelError, match=f"got a {kind} around one; patch its `module`"):
        patch(wrapper)
    patch(wrapper.module, keep=5)
    torch.testing.assert_close(logits(wrapper), expected)


@pytest.mark.usefixtures("process_group")
def test_a_reader_whose_weights_are_gathered_with_it() -> None:
    model = patch(tiny_llava())
    layers = vision_transformer(model.model.vision_tower).encoder.layers
    layers[0] = parallel("FullyShardedDataParallel", layers[0])
    torch.testing.assert_close(logits(model), logits(patch(tiny_llava())))
    layers[3] = parallel("FullyShardedDataParallel", layers[3])
    with pytest.raises(UnsupportedModelError, match="expected layer 3 whole, got it sharded"):
        model(**INPUTS)


def test_prompt_learning_is_refused() -> None:
    """Its tokens stand among the patches."""
    model = tiny_llava()
    tower = model.model.vision_tower
    tower.config.vocab_size = 1  # PEFT asks for one
    config = PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=3,
        token_dim=64,
        num_layers=4,
        num_attention_heads=4,
    )
    model.model.vision_tower = compiled(PeftModel(tower, config))
    with pytest.raises(UnsupportedModelError, match=r"vision tower: .* got PrefixTuningConfig"):
        patch(model)


def test_copies_of_a_wrapped_tower() -> None:
    model = patch(wrapped_llava(with_lora), keep=5)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert unwrapped(twin.model.vision_tower) is not unwrapped(model.model.vision_tower)


def test_the_tower_alone() -> None:
    tower = tiny_llava().model.vision_tower
    with torch.no_grad():
        expected = TOWER.read(tower, PIXELS, -2)[:3]
        actual = TOWER.read(compiled(tower), PIXELS, -2)[:3]
    assert all(map(torch.equal, actual, expected))
