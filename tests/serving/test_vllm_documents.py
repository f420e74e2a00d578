"""The blocks of docs/serving.md that start an engine."""

from pathlib import Path
from typing import Any

import pytest
from engines import shut_down
from recipes import run

from prumerge_fast.demo.items import items_from_demo

# What makes engines start fast, and in this process.
SMALL = 'enforce_eager=True, max_model_len=512, distributed_executor_backend="uni", '


def test_plugin() -> None:
    names: dict[str, Any] = {}
    run(names, "plugin", hf_overrides=f"{SMALL}hf_overrides")
    (output,) = names["llm"].generate(
        {
            "prompt": "USER: <image>\nWhat is it? ASSISTANT:",
            "multi_modal_data": {"image": items_from_demo(1)[0].load()},
        }
    )
    shut_down(names["llm"])
    assert 65 < len(output.prompt_token_ids) < 100


def test_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items_from_demo(1)[0].load().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run(names, "encoder", enable_mm_embeds=f"{SMALL}enable_mm_embeds")
    shut_down(names["llm"])
    *answer, tokens = capsys.readouterr().out.split()
    assert answer
    assert len(names["embedding"]) < int(tokens) < len(names["embedding"]) + 35
