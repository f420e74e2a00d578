"""The demo model with its language model in 4 and 8 bits: the same model, but for rounding."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EVERYTHING

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.harness.models import Loaded, load
from prumerge_fast.harness.prompts import prepare
from prumerge_fast.harness.quantisation import quantisation_config
from prumerge_fast.harness.questions import accuracy
from prumerge_fast.patching.patch import patch, unpatch
from prumerge_fast.reduction.config import PruMergeConfig

BENCH = Path(__file__).parents[2] / "bench"
COUNT = 100
POINTS = 0.03  # how much accuracy may differ


def demo(bits: int | None) -> Loaded:
    return load(MODEL_DIR, dtype="float32", device="cpu", bits=bits)


@pytest.fixture(scope="module")
def plain() -> dict[PruMergeConfig | None, float]:
    return accuracies(demo(None))


def accuracies(loaded: Loaded) -> dict[PruMergeConfig | None, float]:
    items = items_from_demo(COUNT)
    configs = (None, PruMergeConfig(), PruMergeConfig("prumerge+"))
    return {c: accuracy(loaded, c, items, batch_size=25)["accuracy"] for c in configs}


@pytest.mark.parametrize("bits", [4, 8])
def test_accuracy(bits: int, plain: Any) -> None:
    for config, found in accuracies(demo(bits)).items():
        assert abs(found - plain[config]) <= POINTS, config


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_everything_kept_equals_the_quantised_model(bits: int) -> None:
    loaded = demo(bits)
    model, inputs = loaded.model, prepare(loaded, items_from_demo(3))
    expected = model(**inputs).logits
    exact = demo(None).model(**inputs).logits
    assert (expected - exact).abs().max() > 1e-3  # quantised at all
    kept = inputs["attention_mask"].bool()
    found = patch(model, **EVERYTHING)(**inputs).logits
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(unpatch(model)(**inputs).logits, expected)


def test_four_bits_are_nf4_and_compute_in_the_models_dtype() -> None:
    for name, module in demo(4).model.named_modules():
        if type(module).__name__ == "Linear4bit":
            assert module.weight.quant_state.quant_type == "nf4", name
            assert module.compute_dtype == torch.float32, name


def test_four_bits_train_adapters_under_the_patch() -> None:
    """QLoRA: gradients pass through the quantised language model into the tower's adapters."""
    peft = pytest.importorskip("peft")
    loaded = demo(4)
    inputs = prepare(loaded, items_from_demo(3))
    model = peft.prepare_model_for_kbit_training(loaded.model, use_gradient_checkpointing=False)
    targets = r".*(language_model|vision_tower).*\.[qv]_proj"
    model = patch(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("language_model", "vision_tower"):
        assert any(part in name and "lora_B" in name for name in moved), part
    assert all("lora" in name for name in moved)


@pytest.mark.parametrize("bits", [2, "4", None])
def test_other_numbers_of_bits(bits: Any) -> None:
    with pytest.raises(ValueError, match=f"bits: expected 4 or 8, got {bits!r}"):
        quantisation_config(bits)


@pytest.mark.parametrize("dtype", ["auto", None])
def test_other_dtypes(dtype: Any) -> None:
    with pytest.raises(TypeError, match=rf"dtype: expected a torch\.dtype, got {dtype!r}"):
        quantisation_config(4, dtype)


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    main = importlib.import_module("quantisation").main
    runs = json.loads(main(["--count", "2", "--output", str(tmp_path / "r.json")]).read_text())
    assert [run["settings"]["bits"] for run in runs.values()] == [None, 8, 4]
    sizes = [run["weight_bytes"] for run in runs.values()]
    assert sizes[0] > 1.5 * sizes[1]
    assert sizes[1] > sizes[2]
    committed = json.loads((BENCH / "results" / "demo-quantised.json").read_text())
    found = [run["weight_bytes"] for run in committed.values()]
    assert found == pytest.approx(sizes, abs=1024)  # 4.57 has another buffer


def test_committed_accuracy() -> None:
    whole, *others = json.loads((BENCH / "results" / "demo-quantised.json").read_text()).values()
    for run in others:
        assert run["questions"] == whole["questions"] >= 500
        for policy, row in run["results"].items():
            assert abs(row["accuracy"] - whole["results"][policy]["accuracy"]) <= POINTS
