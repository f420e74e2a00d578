"""`received_attention`: against the definition, and against a model's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ptxemu
import pytest
import torch
from kernel_cases import CHANNELS, IMAGES, TOKENS, far_apart, relative_error
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

import prumerge_fast
from prumerge_fast.reduction import received_torch
from prumerge_fast.reduction.received import received_attention
from prumerge_fast.reduction.received_torch import MOST_BYTES, _chunks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def inputs(
    batch: int, rows: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, keys = 2 * torch.randn(2, batch, rows, channels, generator=generator)
    return query.to(dtype), keys.to(dtype)


def definition(query: Tensor, keys: Tensor, num_heads: int, class_token: bool) -> Tensor:
    """With the whole N x N attention, in float64."""
    q, k = (one.double().unflatten(2, (num_heads, -1)).transpose(1, 2) for one in (query, keys))
    shares = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)  # [B, H, R, R]
    first = int(class_token)
    return shares[:, :, first:, first:].mean((1, 2))


SHAPES = [(2, 9, 6, 3), (1, 1, 4, 1), (3, 50, 24, 1), (2, 33, 40, 5)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("batch", "patches", "channels", "heads"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_definition(
    batch: int,
    patches: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    class_token: bool,
    backend: str,
) -> None:
    given = inputs(batch, patches + class_token, channels, dtype)
    found = received_attention(*given, num_heads=heads, class_token=class_token, backend=backend)
    assert found.dtype == dtype
    assert found.shape == (batch, patches)
    expected = definition(*given, heads, class_token)
    assert relative_error(found, expected) < TOLERANCE[dtype]
    if not class_token:
        torch.testing.assert_close(found.sum(1), torch.ones(batch, dtype=dtype))


@pytest.mark.parametrize("layer", [0, 2])
def test_is_what_a_tower_computes(layer: int) -> None:
    """SigLIP, with its own eager attentions."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=3,
        intermediate_size=64,
        image_size=28,
        patch_size=4,
    )
    tower = SiglipVisionModel._from_config(config, attn_implementation="eager").eval()
    caught: dict[str, Tensor] = {}
    encoder = getattr(tower, "vision_model", tower).encoder
    for name in ("q_proj", "k_proj"):
        getattr(encoder.layers[layer].self_attn, name).register_forward_hook(
            lambda module, args, output, name=name: caught.update({name: output})
        )
    with torch.no_grad():
        outputs = tower(torch.randn(2, 3, 28, 28), output_attentions=True)
    expected = outputs.attentions[layer].mean((1, 2))  # [B, N]
    found = received_attention(caught["q_proj"], caught["k_proj"], num_heads=4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("most", [MOST_BYTES, 9000])
def test_gradients(most: int, class_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in chunks."""
    monkeypatch.setattr(received_torch, "MOST_BYTES", most)
    query, keys = (one.requires_grad_() for one in inputs(2, 7, 6, torch.float64))

    def score(query: Tensor, keys: Tensor) -> Tensor:
        return received_attention(query, keys, num_heads=3, class_token=class_token)

    assert torch.autograd.gradcheck(score, (query, keys))
    assert torch.autograd.gradgradcheck(score, (query, keys))


def test_gradients_under_autocast() -> None:
    """Where `backward` is called in it."""
    given = tuple(one.requires_grad_() for one in inputs(2, 20, 64))
    score = received_attention(*given, num_heads=4).square().sum()
    expected = torch.autograd.grad(score, given, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(score, given)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("most", [1, 20_000, 100_000])
def test_chunks_change_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(5, 40, 12)
    whole = received_attention(*given, num_heads=3)
    monkeypatch.setattr(received_torch, "MOST_BYTES", most)
    assert sum(len(chunks) for _, chunks in _chunks(given[1], 3, 40)) > 1
    torch.testing.assert_close(received_attention(*given, num_heads=3), whole)


@pytest.mark.parametrize(
    ("batch", "rows", "channels", "heads"),
    [(64, 729, 1152, 16), (8, 1025, 4096, 16), (1, 4096, 1024, 16), (300, 197, 384, 6)],
)
def test_chunks_hold_little(batch: int, rows: int, channels: int, heads: int) -> None:
    """Counted for the backward pass, which holds the most: copies of keys and four of shares."""
    keys = torch.empty(batch, rows, channels, device="meta", dtype=torch.float16)
    for images, chunks in _chunks(keys, heads, rows):
        count = len(range(*images.indices(batch)))
        queries = len(range(*chunks[0].indices(rows)))
        assert count * heads * queries * rows * 4 * 4 <= MOST_BYTES
        assert count * rows * channels * 4 * 4 <= MOST_BYTES


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(40, 30, 48), (2, 200, 48)], ids=["images", "queries"])
def test_memory(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocated at once by both passes, as the profiler counts it."""
    most = 2**19
    monkeypatch.setattr(received_torch, "MOST_BYTES", most)
    given = tuple(one.requires_grad_() for one in inputs(*shape, dtype))
    grad = torch.ones(*shape[:2], dtype=dtype if dtype == torch.float64 else torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        received = received_attention(*given, num_heads=3)
        gradients = torch.autograd.grad(received, given, grad)
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    held = list(itertools.accumulate(size for _, size in sorted(changes)))
    outputs = sum(one.nbytes for one in (received, *gradients))
    assert held[-1] == outputs
    assert max(held) - outputs <= most


def bad(**changes: Any) -> dict[str, Any]:
    query, keys = inputs(2, 9, 6)
    return {"query": query, "keys": keys, "num_heads": 3, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (bad(query=None), TypeError, "query: expected a torch.Tensor, got NoneType"),
        (
            bad(query=torch.ones(2, 6)),
            ValueError,
            r"query: expected the shape of keys, \[2, 9, 6\]",
        ),
        (bad(keys=torch.ones(9, 6)), ValueError, r"keys: expected shape \[B, N, C\]"),
        (bad(keys=torch.ones(2, 1, 6), class_token=True), ValueError, r"\[B, 1\+N, C\]"),
        (bad(num_heads=4), ValueError, "num_heads: expected a divisor of C = 6, .* got 4"),
        (bad(num_heads=0), ValueError, "num_heads: expected a divisor"),
        (bad(num_heads=1.0), TypeError, "num_heads: expected an int, got float"),
        (bad(class_token=1), TypeError, "class_token: expected True or False, got int"),
        (bad(query=torch.ones(2, 9, 6).half()), TypeError, "query: expected the dtype of keys"),
        (bad(backend="flash"), ValueError, "backend: expected one of"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        prumerge_fast.received_attention(**arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_images(backend: str) -> None:
    query, keys = inputs(0, 9, 6)
    assert received_attention(query, keys, num_heads=2, backend=backend).shape == (0, 9)


def test_compiles() -> None:
    given = inputs(2, 20, 12)
    compiled = torch.compile(
        lambda *two: received_attention(*two, num_heads=3) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*given), received_attention(*given, num_heads=3) * 2)


def test_gradients_compiled_under_autocast() -> None:
    def score(query: Tensor, keys: Tensor) -> Tensor:
        return received_attention(query, keys, num_heads=4).square().sum()

    given = tuple(one.requires_grad_() for one in inputs(2, 20, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(score, fullgraph=True, backend="aot_eager")(*given)
    expected = torch.autograd.grad(score(*given), given)
    for one, other in zip(torch.autograd.grad(found, given), expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.fixture(params=[80, pytest.param(120, marks=pytest.mark.slow)])
def emulator(request: pytest.FixtureRequest) -> Iterator[ptxemu.Emulator]:
    with ptxemu.install(request.param, schedule="interleave") as installed:
        yield installed


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-3)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("patches", "channels", "heads"), [(20, 48, 3), (70, 72, 1), (33, 80, 2)])
def test_kernel(
    emulator: ptxemu.Emulator,
    patches: int,
    channels: int,
    heads: int,
    class_token: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    given = inputs(2, patches + class_token, channels, dtype)
    options = {"num_heads": heads, "class_token": class_token}
    found = received_attention(*given, **options, backend="triton")
    expected = definition(*given, heads, class_token)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < tolerance
    assert torch.equal(found, received_attention(*given, **options, backend="triton"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_kernel_at_a_real_size(emulator: ptxemu.Emulator, dtype: torch.dtype) -> None:
    """Two of SigLIP-SO400M's sixteen heads."""
    given = inputs(1, 729, 144, dtype)
    found = received_attention(*given, num_heads=2, backend="triton")
    assert relative_error(found, definition(*given, 2, False)) < 1e-3


def test_operator_is_sound(emulator: ptxemu.Emulator) -> None:
    query, keys = (one.requires_grad_() for one in inputs(2, 20, 48))
    torch.library.opcheck(
        torch.ops.prumerge_fast.received_attention.default, (query, keys, 3, True)
    )
    gradients = []
    for backend in ("triton", "torch"):
        query.grad = keys.grad = None
        score = received_attention(query, keys, num_heads=3, class_token=True, backend=backend)
        score.square().sum().backward()
        gradients.append((query.grad, keys.grad))
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-4


def test_kernel_takes_any_strides(emulator: ptxemu.Emulator) -> None:
    query, keys = inputs(2, 20, 48)
    both = torch.cat((query, keys), 2)
    found = received_attention(
        both[:, :, :48],
        keys.transpose(1, 2).contiguous().transpose(1, 2),
        num_heads=3,
        backend="triton",
    )
    assert relative_error(found, definition(query, keys, 3, False)) < 1e-5


@pytest.mark.parametrize("heads", [3, 1])  # of one step of channels, of three
@pytest.mark.parametrize("where", [0, 1], ids=["query", "keys"])
def test_kernel_offsets_past_32_bits(emulator: ptxemu.Emulator, where: int, heads: int) -> None:
    emulator.schedule, emulator.check_races = "lockstep", False
    given = inputs(2, 20, 48, torch.float16)
    expected = definition(*given, heads, False)
    for axis, stride in enumerate((IMAGES, TOKENS, CHANNELS)):
        moved = list(given)
        moved[where] = far_apart(given[where], axis, stride)
        found = received_attention(moved[0], moved[1], num_heads=heads, backend="triton")
        assert relative_error(found, expected) < 1e-3
