"""Compiled kernels give the results of PyTorch on every emulated architecture."""

from __future__ import annotations

import pytest
import sample_kernels as kernels
import torch

CAPABILITIES = (75, 80, 89, 120)
# Triton itself cannot compile these for sm_75.
BEYOND_SM75 = ("int8", "float8")


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def emulator(request, emulate):
    torch.manual_seed(1)
    return emulate(request.param)


def check_dot(dtype, shape=(32, 32, 32), num_warps=4, precision="default", tolerance=1e-3):
    M, N, K = shape
    if dtype == torch.int8:
        a = torch.randint(-9, 9, (M, K), dtype=dtype)
        b = torch.randint(-9, 9, (K, N), dtype=dtype)
        c = torch.zeros(M, N, dtype=torch.int32)
    else:
        a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.zeros(M, N)
    kernels.dot[(1,)](a, b, c, M, N, K, precision, num_warps=num_warps)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "num_warps"), [((32, 32, 32), 4), ((128, 128, 64), 8)])
def test_dot_half(emulator, dtype, shape, num_warps):
    check_dot(dtype, shape, num_warps)
    assert (emulator.last.mma > 0) == (emulator.capability >= 80)


def test_dot_float32(emulator):
    check_dot(torch.float32, precision="ieee")


def test_dot_tf32(emulator):
    check_dot(torch.float32, precision="tf32", tolerance=0.05)


def test_dot_int8(emulator):
    if emulator.capability == 75:
        pytest.skip("Triton does not compile int8 dot for sm_75")
    check_dot(torch.int8, tolerance=0)


@pytest.mark.parametrize(
    ("shape", "block", "stages", "num_warps"),
    [
        ((128, 128, 128), (64, 64, 32), 3, 4),
        ((128, 128, 128), (128, 64, 32), 4, 8),
        ((96, 64, 100), (32, 32, 16), 2, 2),
    ],
)
def test_matmul(emulator, shape, block, stages, num_warps):
    M, N, K = shape
    BM, BN, BK = block
    emulator.schedule = "lockstep" if emulator.capability == 75 else "interleave"
    a, b, c = torch.randn(M, K).half(), torch.randn(K, N).half(), torch.full((M, N), torch.nan)
    kernels.matmul[(-(-M // BM), -(-N // BN))](
        a, b, c, M, N, K, BM=BM, BN=BN, BK=BK, num_stages=stages, num_warps=num_warps
    )
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("stages", [1, 3])
def test_attention(emulator, stages):
    if emulator.capability == 75:
        emulator.schedule = "lockstep"
    T, D = 100, 64
    q, k, v = (torch.randn(T, D).bfloat16() for _ in range(3))
    o = torch.full((T, D), torch.nan)
    kernels.attention[(2,)](q, k, v, o, T, D**-0.5, BM=64, BN=32, D=D, num_stages=stages)
    causal = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    scores = (q.double() @ k.double().T * D**-0.5).masked_fill(causal, -torch.inf)
    torch.testing.assert_close(o.double(), scores.softmax(-1) @ v.double(), atol=2e-2, rtol=0)


def test_softmax(emulator):
    x = torch.randn(4, 781)
    o = torch.full_like(x, torch.nan)
    kernels.softmax[(4,)](x, o, 781, 781, B=1024)
    torch.testing.assert_close(o, x.softmax(1), atol=1e-6, rtol=0)


def test_cumsum(emulator):
    x, o = torch.randn(512), torch.empty(512)
    kernels.cumsum[(1,)](x, o, 512)
    torch.testing.assert_close(o, x.cumsum(0), atol=1e-4, rtol=0)


def test_sort(emulator):
    x, o = torch.randn(256), torch.empty(256)
    kernels.sort[(1,)](x, o, 256)
    assert torch.equal(o, x.sort().values)


def test_argmax(emulator):
    x, o = torch.randn(16, 128), torch.empty(16, dtype=torch.int32)
    kernels.argmax[(1,)](x, o, 16, 128)
    assert torch.equal(o.long(), x.argmax(1))


def test_histogram(emulator):
    x, o = torch.randint(0, 64, (512,), dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    kernels.histogram[(1,)](x, o, 512, 64)
    assert torch.equal(o, torch.bincount(x, minlength=64).int())


def test_gather(emulator):
    x, o = torch.randn(256), torch.empty(256)
    index = torch.randint(0, 256, (256,), dtype=torch.int32)
    kernels.gather[(1,)](x, index, o, 256)
    assert torch.equal(o, x[index.long()])


def test_transcendental_functions(emulator):
    x, o = torch.randn(256), torch.empty(7, 256)
    kernels.transcendental[(1,)](x, o, 256)
    magnitude = x.abs()
    expected = [x.exp(), (magnitude + 0.5).log(), x.sin(), (magnitude + 1).rsqrt()]
    expected += [x.sigmoid(), x.erf(), magnitude.sqrt()]
    torch.testing.assert_close(o, torch.stack(expected), atol=1e-5, rtol=0)


def test_casts(emulator):
    x = torch.randn(256)
    half, brain = torch.empty(256).half(), torch.empty(256).bfloat16()
    octet = torch.empty(256, dtype=torch.int8)
    kernels.casts[(1,)](x, half, brain, octet, 256)
    assert torch.equal(half, x.half())
    assert torch.equal(brain, x.bfloat16())
    assert torch.equal(octet, (x * 40).to(torch.int8))


def test_float8_cast(emulator):
    if emulator.capability == 75:
        pytest.skip("Triton does not compile float8 casts for sm_75")
    x, o = torch.randn(128), torch.empty(128)
    kernels.float8[(1,)](x, o, 128)
    assert torch.equal(o, x.to(torch.float8_e5m2).float())


def test_denormals_survive(emulator):
    x, y, o = torch.full((128,), 1e-40), torch.zeros(128), torch.empty(128)
    kernels.add[(1,)](x, y, o, 128, B=128)
    assert torch.equal(o, x)


def test_philox(emulator):
    o = torch.empty(128, dtype=torch.int32)
    kernels.random_ints[(1,)](o, 42, 128)
    assert o[:3].tolist() == [-1662324653, -52747993, -747896283]
    assert o.unique().numel() > 120


def test_integer64(emulator):
    x = torch.randint(0, 2**30, (128,))
    o = torch.empty_like(x)
    kernels.integer64[(1,)](x, o, 128)
    assert torch.equal(o, x * x // 7 + x % 5)


def test_float_atomics(emulator):
    x, o = torch.rand(512), torch.zeros(2)
    kernels.atomic_max_and_sum[(4,)](x, o, 128)
    torch.testing.assert_close(o, torch.stack([x.max(), x.sum()]), atol=1e-3, rtol=0)


def test_wrong_results_are_noticed(emulator):
    """A kernel that computes something else must not compare equal."""
    x, o = torch.randn(4, 781), torch.full((4, 781), torch.nan)
    kernels.softmax[(4,)](x, o, 780, 781, B=1024)
    assert not torch.allclose(o, x.softmax(1), atol=1e-6)
