"""What `batch` refuses before Ray is needed."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from command_line import refusal

from prumerge_fast.serving.batch import options


@pytest.fixture
def without(monkeypatch):
    """Takes packages away."""
    found = importlib.util.find_spec

    def take(*packages):
        monkeypatch.setattr(
            options.importlib.util,
            "find_spec",
            lambda name, *_: (
                None if name in packages else object() if name in ("ray", "vllm") else found(name)
            ),
        )

    return take


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_without_ray(without, capsys, photos, tmp_path, engine):
    without("ray")
    message = refusal(capsys, "batch", photos, "--output", tmp_path / "o", "--engine", engine)
    assert message == (
        "prumerge-fast: batch: expected ray to be installed, got none; run: pip install "
        '"prumerge_fast[ray]"\n'
    )
    assert not (tmp_path / "o").exists()


def test_without_vllm(without, capsys, photos, tmp_path):
    without("vllm")
    message = refusal(capsys, "batch", photos, "--output", tmp_path / "o", "--engine", "vllm")
    assert message == (
        "prumerge-fast: --engine vllm: expected vllm to be installed, got none; run: pip install "
        '"prumerge_fast[vllm]"\n'
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--actors", "0"], "'--actors': expected a whole number >= 1, got 0"),
        (["--batch-size", "0"], "'--batch-size': expected a whole number >= 1, got 0"),
        (["--num-cpus", "1.5"], "expected a whole number or a share of 1, got 1.5"),
        (["--num-gpus", "-1"], "expected a whole number or a share of 1, got -1"),
        (["--num-gpus", "all"], "expected a whole number or a share of 1, got all"),
        (["--engine", "tensorrt"], "'tensorrt' is not one of 'transformers', 'vllm'"),
    ],
)
def test_bad_options(capsys, photos, tmp_path, given, says):
    assert says in refusal(capsys, "batch", photos, "--output", tmp_path / "o", *given)
    assert not (tmp_path / "o").exists()


def test_output_is_required(capsys, photos):
    assert "'--output'" in refusal(capsys, "batch", photos)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--engine-kwargs", "{}"], "expected --engine vllm beside it, got transformers"),
        (["--engine", "vllm", "--engine-kwargs", "{"], "expected a JSON object, got { ("),
        (["--engine", "vllm", "--engine-kwargs", "[1]"], "expected a JSON object, got [1]"),
        *(
            (["--engine", "vllm", "--engine-kwargs", given], f"--engine-kwargs: expected {says}")
            for given, says in (
                ('{"hf_overrides": 3}', "hf_overrides to be a JSON object without prumerge"),
                ('{"hf_overrides": {"prumerge": {}}}', "hf_overrides to be a JSON object without"),
                ('{"dtype": "float32"}', "no dtype, which is --dtype, got"),
                ('{"model": "other"}', "no model, which is --model, got"),
            )
        ),
        (["--keep", "0"], "--keep: expected a whole number >= 1 (tokens), a share"),
    ],
)
def test_bad_values(without, monkeypatch, capsys, photos, tmp_path, given, says):
    without()
    # It imports Ray, which need not be there: nothing of it is reached.
    monkeypatch.setitem(sys.modules, "prumerge_fast.cli.batch", SimpleNamespace(run=None))
    assert says in refusal(capsys, "batch", photos, "--output", tmp_path / "o", *given)
