"""The Triton backend as PyTorch sees it: one operator that traces, differentiates and dispatches.

The kernel runs as compiled code in the emulator, one warp step after the other; orders of warps and
programs are `test_kernel_emulator.py`'s matter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ptxemu
import pytest
import torch
from kernel_cases import CONFIGS, TOLERANCE, random_inputs, relative_error
from prumerge_fast.kernels import autotune
from prumerge_fast.kernels import prune_merge as kernel
from prumerge_fast.kernels.launch_config import LaunchConfig
from triton.runtime.errors import OutOfResources

import prumerge_fast
from prumerge_fast.config import PruMergeConfig
from prumerge_fast.demo import PROMPT, load_demo
from prumerge_fast.demo.scenes import benchmark
from prumerge_fast.dispatch import prune_merge, resolve_backend
from prumerge_fast.errors import BackendUnavailableError
from prumerge_fast.triton_backend import triton_obstacle


@pytest.fixture
def emulator() -> Iterator[ptxemu.Emulator]:
    with ptxemu.install(80, schedule="lockstep") as installed:
        yield installed


FIXED = [name for name, config in CONFIGS.items() if config.keep is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_operator_is_sound(emulator: ptxemu.Emulator, name: str) -> None:
    config = CONFIGS[name]
    inputs = random_inputs(2, 20, 16, torch.float32)
    for tensor in inputs:
        tensor.requires_grad_()
    budget = config.budget(20)
    options = (config.variant, config.neighbours, config.fence, config.merge)
    arguments = (*inputs, -1 if budget is None else budget, *options, config.supplement)
    torch.library.opcheck(
        torch.ops.prumerge_fast.prune_merge.default,
        (*arguments, config.order),
    )


@pytest.mark.parametrize("name", FIXED)
def test_compiles_as_one_graph(emulator: ptxemu.Emulator, name: str) -> None:
    inputs = random_inputs(2, 20, 16, torch.float32)

    def reduce(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        merged = prune_merge(*tensors, CONFIGS[name], backend="triton")
        return merged.tokens * 2, merged.kept

    compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*inputs), reduce(*inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_torch_backends(emulator: ptxemu.Emulator, name: str) -> None:
    gradients = {}
    for backend in ("torch", "triton"):
        inputs = random_inputs(2, 20, 16, torch.float32)
        for tensor in inputs:
            tensor.requires_grad_()
        merged = prune_merge(*inputs, CONFIGS[name], backend=backend)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(merged.tokens.shape, generator=generator)
        (merged.tokens * upstream).sum().backward()
        gradients[backend] = [tensor.grad for tensor in inputs]
    for expected, found in zip(gradients["torch"], gradients["triton"], strict=True):
        assert expected is not None
        assert found is not None
        assert relative_error(found, expected) < TOLERANCE[torch.float32]


@torch.no_grad()
def test_patched_generate_runs_the_kernel(emulator: ptxemu.Emulator) -> None:
    model, processor = load_demo()
    scenes = benchmark("validation", 2)
    inputs = processor(
        images=[scene.render() for scene, _ in scenes],
        text=[PROMPT.format(question=question.text) for _, question in scenes],
        padding=True,
        return_tensors="pt",
    )
    outputs = {}
    for backend in ("torch", "triton"):
        with prumerge_fast.patched(model, backend=backend):
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            outputs[backend] = ids.tolist(), model.prumerge.last_lengths
    assert emulator.last is not None
    assert outputs["triton"] == outputs["torch"]


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "triton"), ((7, 5), "torch")])
def test_dispatch_is_traced_as_a_constant(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    """What `prune_merge(backend="auto")` asks about a GPU, within `torch.compile`."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    torch.compiler.reset()

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        resolved = resolve_backend("auto", "cuda", tensor.dtype, tensor.shape[0])
        return tensor + (1 if resolved.name == "triton" else 2)

    compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=True)
    assert compiled(torch.zeros(20)).tolist() == [1 if name == "triton" else 2] * 20


def test_autotune_keeps_the_fastest(
    emulator: ptxemu.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUMERGE_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_fastest", {})
    timed: list[LaunchConfig] = []
    launched: list[LaunchConfig] = []
    real = kernel.prune_merge

    def launch_noted(*args: Any, launch: LaunchConfig, **options: Any) -> Any:
        launched.append(launch)
        return real(*args, launch=launch, **options)

    def timer(run: Callable[[], Any], quantiles: tuple[float, ...]) -> float:
        """The third candidate is the fastest, and the second does not fit."""
        run()
        timed.append(launched[-1])
        if len(timed) == 2:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0 if len(timed) == 3 else 2.0

    monkeypatch.setattr(kernel, "prune_merge", launch_noted)
    monkeypatch.setattr(type(emulator), "get_benchmarker", lambda self: timer)
    inputs = random_inputs(1, 40, 64, torch.float16)
    config = PruMergeConfig(keep=20, neighbours=5)
    first = prune_merge(*inputs, config, backend="triton")
    assert len(timed) == len(set(timed)) >= 3
    assert launched == [*timed, timed[2]]
    again = prune_merge(*inputs, config, backend="triton")
    assert launched == [*timed, timed[2], timed[2]]
    assert torch.equal(first.tokens, again.tokens)


def test_autotune_takes_0_or_1(emulator: ptxemu.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUMERGE_FAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="PRUMERGE_FAST_AUTOTUNE: expected 0 or 1, got 'yes'"):
        prune_merge(*random_inputs(1, 20, 16, torch.float32), backend="triton")


def test_forced_without_a_gpu() -> None:
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        prune_merge(*random_inputs(1, 20, 16, torch.float32), backend="triton")
    assert resolve_backend("auto", "cpu").name == "torch"


def test_forced_with_a_dtype_it_does_not_take(emulator: ptxemu.Emulator) -> None:
    with pytest.raises(BackendUnavailableError, match=r"not torch\.float64"):
        prune_merge(*random_inputs(1, 20, 16, torch.float64), backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed" in str(triton_obstacle(torch.device("cpu")))


_INTERPRETED = """
import torch
from kernel_cases import CONFIGS, assert_like_torch, random_inputs

for dtype in (torch.float32, torch.float16):
    for config in CONFIGS.values():
        assert_like_torch(random_inputs(2, 23, 40, dtype), config, dtype)
query, keys, hidden = random_inputs(2, 23, 40, torch.float32)
layers = torch.cat((hidden, keys), 2)  # side by side
assert_like_torch((query, keys, layers), CONFIGS["default"], torch.float32)
print("agreed")
"""


def test_interpreter_agrees() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{_INTERPRETED}"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "agreed\n", done.stderr
