"""The blocks of documents run, on the demo model; those with vLLM are run in `tests/serving`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import BLOCKS, DOCS, DOCUMENTS, run
from torch import nn
from transformers import LlavaForConditionalGeneration

import prumerge_fast
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.families.encode import encode
from prumerge_fast.harness.models import load
from prumerge_fast.harness.prompts import prepare
from prumerge_fast.patching.patch import is_patched, unpatch


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks take for given."""
    monkeypatch.chdir(tmp_path)
    loaded = load(MODEL_DIR, dtype="float32", device="cpu")
    inputs = prepare(loaded, items_from_demo(2))
    return {
        "torch": torch,
        "prumerge_fast": prumerge_fast,
        "LlavaForConditionalGeneration": LlavaForConditionalGeneration,
        "model": loaded.model,
        "inputs": inputs,
        "labels": inputs["input_ids"],
    }


def answer(names: dict[str, Any], model: Any) -> torch.Tensor:
    output = model.generate(**names["inputs"], max_new_tokens=8, do_sample=False)
    return output[:, names["inputs"]["input_ids"].shape[1] :]


def test_no_block_is_left_out() -> None:
    blocks = sum((DOCS / name).read_text().count("```python") for name in DOCUMENTS)
    assert blocks == len(BLOCKS) == 11


@pytest.mark.parametrize("bits", [4, 8])
def test_bits(names: dict[str, Any], bits: int) -> None:
    plain = names["model"]
    model = run(names, "bits", **{"quantisation_config(4)": f"quantisation_config({bits})"})[
        "model"
    ]
    linear = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantised = {name for name, kind in linear.items() if kind is not nn.Linear}
    assert {linear[name].__name__ for name in quantised} == {
        "Linear4bit" if bits == 4 else "Linear8bitLt"
    }
    assert quantised == {name for name in linear if "language_model" in name}
    assert is_patched(model)
    assert torch.equal(answer(names, model), answer(names, prumerge_fast.patch(plain)))


def test_offload(names: dict[str, Any]) -> None:
    expected = answer(names, prumerge_fast.patch(names["model"]))
    model = run(names, "offload")["model"]
    assert "disk" in model.hf_device_map.values()
    assert is_patched(model)
    assert torch.equal(answer(names, model), expected)


def test_static(names: dict[str, Any]) -> None:
    expected = answer(names, prumerge_fast.patch(names["model"], keep=64))
    unpatch(names["model"])
    got = run(names, "static")["answer"][:, names["inputs"]["input_ids"].shape[1] :]
    assert torch.equal(got[:, : expected.shape[1]], expected)


def test_vision(names: dict[str, Any]) -> None:
    tokens = run(names, "vision")["tokens"]
    features = encode(names["model"], names["inputs"]["pixel_values"])
    expected = prumerge_fast.prune_merge(*features[:3], names["config"]).tokens
    assert tokens.shape == (2, 65, features[2].shape[2])
    torch.testing.assert_close(tokens, expected)


def test_copies(names: dict[str, Any]) -> None:
    model, twin, again = (run(names, "copies")[name] for name in ("model", "twin", "again"))
    kept = [m.prumerge.config.keep for m in (model, twin, again)]
    assert kept == [64, 16, 64]
    assert torch.equal(answer(names, again), answer(names, model))
    saved = LlavaForConditionalGeneration.from_pretrained("runs/llava")
    assert not is_patched(saved)
    assert torch.equal(answer(names, saved), answer(names, unpatch(model)))


def test_lora(names: dict[str, Any]) -> None:
    trained = run(names, "lora-training")["model"]
    touched = [n for n, p in trained.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("multi_modal_projector" in name for name in touched)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # as after training
    expected = answer(names, trained.eval())
    run(names, "lora-saving")
    for model in (names["model"], names["merged"]):
        assert is_patched(model)
        assert torch.equal(answer(names, model), expected)
    assert not is_patched(LlavaForConditionalGeneration.from_pretrained("runs/merged"))
