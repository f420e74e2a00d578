"""Fine-tuning the demo model: what it learns from, resuming, LoRA on the tower, the result file."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer

from prumerge_fast.demo import MODEL_DIR, finetune
from prumerge_fast.demo.conversations import IGNORE
from prumerge_fast.demo.finetune import FinetuneConfig, Questions, add_lora
from prumerge_fast.harness.models import load
from prumerge_fast.patching.patch import patch

RESULT = Path(__file__).parents[2] / "bench" / "results" / "demo-finetune.json"
SHORT = FinetuneConfig(questions=12, batch_size=4, rank=4, save_every=1)  # three steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the rows of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("finetune")
    return folder, finetune.run(folder, SHORT, 4)


def test_four_rows(whole):
    _, rows = whole
    assert list(rows) == [
        *("LLaVA", "LLaVA-PruMerge"),
        *("LLaVA fine-tuned", "LLaVA-PruMerge fine-tuned"),
    ]
    for name, row in rows.items():
        tokens = row["visual_tokens"]["mean"]
        assert tokens < 60 if "PruMerge" in name else tokens == 196
        assert ("training" in row) == name.endswith("fine-tuned")
    assert rows["LLaVA fine-tuned"]["training"]["steps"] == 3


def test_interrupted_run_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    folder, rows = whole
    read = Questions.__getitem__
    asked = []

    def interrupted(self, index):
        asked.append(index)
        if len(asked) > 8:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(Questions, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(tmp_path, SHORT, 4)
    monkeypatch.undo()
    (tmp_path / "llava" / "checkpoint-3").mkdir()  # whose writing was interrupted
    take, taken = Trainer.training_step, []
    monkeypatch.setattr(
        Trainer, "training_step", lambda *given, **named: taken.append(1) or take(*given, **named)
    )
    again = finetune.run(tmp_path, SHORT, 4)
    left = again["LLaVA fine-tuned"]["training"]["steps"]
    assert 0 < left < 3
    assert len(taken) == left + 3  # and all of the other model's
    for name in ("llava", "llava-prumerge"):
        path = f"{name}/adapter/adapter_model.safetensors"
        expected, found = load_file(folder / path), load_file(tmp_path / path)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=key)
    assert finetune.run(tmp_path, SHORT, 4)["LLaVA fine-tuned"]["training"]["steps"] == 0
    assert again["LLaVA-PruMerge"] == rows["LLaVA-PruMerge"]


def test_runs_of_other_settings_are_not_mixed(whole):
    folder, _ = whole
    with pytest.raises(ValueError, match="output: expected a new folder or a run with the setting"):
        finetune.run(folder, replace(SHORT, tower=True), 4)


@pytest.mark.parametrize("tower", [False, True])
def test_adapters_learn_through_the_merge(tower):
    loaded = load(MODEL_DIR, dtype="float32", device="cpu")
    torch.manual_seed(0)
    model = patch(add_lora(loaded.model, rank=4, tower=tower)).train()
    data = Questions(loaded.processor.tokenizer, 4)
    batch = next(iter(DataLoader(data, 4, collate_fn=data.collate)))
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert any("vision_tower" in name for name in adapters) == tower
    last = f"layers.{loaded.model.config.vision_config.num_hidden_layers - 1}.self_attn"
    for name, parameter in adapters.items():
        if "lora_B" in name:  # zero before
            unused = last in name and ("v_proj" in name or "out_proj" in name)
            assert parameter.any() != unused, name


def test_only_answers_are_learnt():
    tokenizer = load(MODEL_DIR, dtype="float32", device="cpu").processor.tokenizer
    data = Questions(tokenizer, 6)
    batch = data.collate([data[i] for i in range(6)])
    assert len({tuple(row["labels"].shape) for row in (data[i] for i in range(6))}) > 1
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        learnt = labels != IGNORE
        assert torch.equal(ids[learnt], labels[learnt])
        assert 0 < learnt.sum() < 6
        assert not (learnt & (mask == 0)).any()
        assert labels[mask.bool()][-1] == tokenizer.eos_token_id


def test_command(tmp_path, monkeypatch):
    rows = {"LLaVA": {"accuracy": 1.0}}
    asked = []
    monkeypatch.setattr(finetune, "run", lambda *given: asked.append(given) or rows)
    command = ["finetune", "--output", str(tmp_path), "--tower", "--count", "3"]
    monkeypatch.setattr(sys, "argv", command)
    finetune.main()
    assert asked == [(tmp_path, FinetuneConfig(tower=True), 3)]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"][2:] == ["prumerge_fast.demo.finetune", *command[1:]]
    assert result.keys() == json.loads(RESULT.read_text()).keys()


BAD = {
    "--count: expected a whole number >= 1, got 0": ["--count", "0"],
    "--seed: expected a whole number from 0 to 2**32 - 1, got -1": ["--seed", "-1"],
    "output: expected a folder to write to, got": ["--output", str(RESULT / "runs")],
    "output: expected a new folder or a run with the settings": ["--seed", "1"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.json").write_text(json.dumps(asdict(FinetuneConfig())))
    command = ["finetune", "--output", str(tmp_path), *BAD[message]]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        finetune.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupted_command(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "evaluate", interrupted)
    monkeypatch.setattr(sys, "argv", ["finetune", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        finetune.main()
    assert stopped.value.code == 130


def test_committed_result_is_of_the_defaults():
    assert json.loads(RESULT.read_text())["settings"] == asdict(FinetuneConfig())
