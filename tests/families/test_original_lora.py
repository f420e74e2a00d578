"""The recipe of docs/original-llava.md: the authors' LoRA checkpoints in transformers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import images, prompt, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM

import prumerge_fast

peft = pytest.importorskip("peft", reason="peft is not installed")
DOCUMENT = Path(__file__).parents[2] / "docs" / "original-llava.md"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 80  # of the base; the LLaVA's is padded


@pytest.fixture(scope="module")
def recipe() -> Any:
    (code,) = re.findall(
        r"<!-- recipe:lora -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(code, names)
    return names["load_authors_lora"]


@pytest.mark.parametrize(
    ("safetensors", "prefix"), [(True, "base_model.model."), (False, "")], ids=["new", "old"]
)
@torch.no_grad()
def test_recipe(recipe: Any, tmp_path: Path, safetensors: bool, prefix: str) -> None:
    llava = tiny_llava()
    text = {**llava.config.text_config.to_dict(), "vocab_size": VOCAB, "pad_token_id": None}
    base = LlamaForCausalLM(LlamaConfig(**text))
    original = tiny_llava(seed=1)  # what is to come out, put together by hand
    table, head = original.get_input_embeddings().weight, original.lm_head.weight
    table.copy_(llava.get_input_embeddings().weight)
    head.copy_(llava.lm_head.weight)
    table[:VOCAB], head[:VOCAB] = base.model.embed_tokens.weight, base.lm_head.weight
    original.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict())
    layers = {n: w for n, w in base.model.state_dict().items() if "embed" not in n}
    original.model.language_model.load_state_dict(layers, strict=False)

    # As the package's training script saves it; its models are `LlamaForCausalLM`s.
    wrapped = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=PROJECTIONS,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    wrapped.save_pretrained(tmp_path, safe_serialization=safetensors)
    projector = original.model.multi_modal_projector
    trained = {
        f"{prefix}model.mm_projector.{layer}.{kind}": getattr(linear, kind).clone()
        for layer, linear in [("0", projector.linear_1), ("2", projector.linear_2)]
        for kind in ("weight", "bias")
    }
    torch.save(trained, tmp_path / "non_lora_trainables.bin")
    state = wrapped.state_dict()
    plain = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.clone()
        for name, value in state.items()
        if "lora_" not in name
    }
    for name in state:
        if "lora_A" in name:
            target = name.replace("base_model.model.model.", "").replace(".lora_A.default", "")
            delta = 2 * state[name.replace("lora_A", "lora_B")] @ state[name]
            original.model.language_model.get_parameter(target).add_(delta)

    fresh = LlamaForCausalLM(base.config)
    fresh.load_state_dict(plain)
    model = recipe(llava, fresh, str(tmp_path))
    assert type(model) is type(original)
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)
    prumerge_fast.patch(model)
    prumerge_fast.patch(original)
    call = {"input_ids": torch.tensor([prompt([5], "image", [6])]), "pixel_values": images(1)}
    torch.testing.assert_close(model(**call).logits, original(**call).logits, rtol=1e-4, atol=1e-4)

    more = {**trained, f"{prefix}lm_head.weight": head}
    for weights, message in [(more, "Unexpected key.*lm_head"), ({}, "Missing key.*linear_1")]:
        torch.save(weights, tmp_path / "non_lora_trainables.bin")
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            recipe(tiny_llava(), fresh, str(tmp_path))
