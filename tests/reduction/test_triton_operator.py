"""The Triton backend as PyTorch sees it: one operator that traces, differentiates and dispatches.

The kernel runs as compiled code in the emulator, one warp step after the other; orders of warps and
programs are `test_kernel_emulator.py`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import ptxemu
import pytest
import torch
from kernel_cases import (
    CONFIGS,
    TOLERANCE,
    assert_generates_like_torch,
    random_inputs,
    relative_error,
)
from prumerge_fast.kernels import autotune
from prumerge_fast.kernels import prune_merge as kernel
from prumerge_fast.kernels.launch_config import LaunchConfig
from triton.runtime.errors import OutOfResources

from prumerge_fast.cli import main
from prumerge_fast.errors import BackendUnavailableError
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.gradients import prune_merge_gradients
from prumerge_fast.reduction.triton_backend import triton_obstacle


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


def tokens_and_gradients(
    reduce: Callable[..., torch.Tensor], forward: Any, backward: Any
) -> list[torch.Tensor]:
    """The tokens and the gradients of all inputs, with a context for each pass."""
    inputs = random_inputs(2, 20, 16, torch.float32)
    for tensor in inputs:
        tensor.requires_grad_()
    with forward:
        tokens = reduce(*inputs)
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    loss = (tokens * upstream).sum()
    with backward:
        loss.backward()
    return [tokens, *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_torch_backends(emulator: ptxemu.Emulator, name: str) -> None:
    results = [
        tokens_and_gradients(
            lambda *inputs: prune_merge(*inputs, CONFIGS[name], backend=backend).tokens,  # noqa: B023
            nullcontext(),
            nullcontext(),
        )
        for backend in ("torch", "triton")
    ]
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("where", ["backward", "compiled forward"])
def test_autocast_leaves_gradients_alone(emulator: ptxemu.Emulator, where: str) -> None:
    def reduce(*inputs: torch.Tensor) -> torch.Tensor:
        return prune_merge(*inputs, CONFIGS["budget-average"], backend="triton").tokens

    plain = tokens_and_gradients(reduce, nullcontext(), nullcontext())
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    if where == "backward":
        cast = tokens_and_gradients(reduce, nullcontext(), autocast)
    else:  # whose backward pass is traced with it
        compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager")
        cast = tokens_and_gradients(compiled, autocast, nullcontext())
    for found, expected in zip(cast, plain, strict=True):
        assert torch.equal(found, expected)


def test_patched_generate_runs_the_kernel(emulator: ptxemu.Emulator) -> None:
    assert_generates_like_torch()
    assert emulator.last is not None


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


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "no tensor-core code for sm_75"), ((9, 0), "supports")]
)
def test_doctor_says_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    reason: str,
) -> None:
    major, minor = capability
    gpu = SimpleNamespace(name="a GPU", major=major, minor=minor, total_memory=2**34)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: gpu.name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backends"]["cuda:0"]
    assert found["name"] == ("torch" if major < 8 else "triton")
    assert reason in found["reason"]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_formula_in_float64(name: str) -> None:
    """The backward pass itself, against autograd of the reference, which gradcheck confirms."""
    config = CONFIGS[name].replace(neighbours=3)
    query, keys, hidden = (tensor.double() for tensor in random_inputs(1, 9, 4, torch.float32))
    inputs = [tensor.requires_grad_() for tensor in (query, keys, hidden)]

    def reduce(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        merged = prune_merge(*tensors, config, backend="reference")
        return merged.tokens, merged.attention

    assert torch.autograd.gradcheck(reduce, inputs)
    merged = prune_merge(*inputs, config, backend="reference")
    outputs = (merged.tokens, merged.attention)
    upstream = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in outputs]
    expected = torch.autograd.grad(outputs, inputs, upstream)
    found = prune_merge_gradients(
        *upstream,
        *(tensor.detach() for tensor in inputs),
        merged.lengths,
        merged.kept,
        neighbours=config.neighbours,
        merge=config.merge,
        supplement=config.supplement,
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_autotune_keeps_the_fastest(
    emulator: ptxemu.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUMERGE_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_fastest", {})
    timed: list[LaunchConfig] = []
    launched: list[LaunchConfig] = []
    current: list[torch.Tensor] = []  # whose device is the current one
    real = kernel.prune_merge

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def launch_noted(*args: Any, launch: LaunchConfig, **options: Any) -> Any:
        assert current
        launched.append(launch)
        return real(*args, launch=launch, **options)

    def timer(run: Callable[[], Any], quantiles: tuple[float, ...]) -> float:
        """The third candidate is the fastest, and the second does not fit."""
        assert current  # events and streams are the current device's
        run()
        timed.append(launched[-1])
        if len(timed) == 2:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0 if len(timed) == 3 else 2.0

    monkeypatch.setattr("torch.cuda.device_of", device_of)
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
