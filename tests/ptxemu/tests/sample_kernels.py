"""Triton kernels that exercise the emulator."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def softmax(x, o, columns, stride, B: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, B)
    m = c < columns
    v = tl.load(x + row * stride + c, mask=m, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + row * stride + c, e / tl.sum(e, 0), mask=m)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        a_mask = (rm[:, None] < M) & ((k + rk)[None, :] < K)
        b_mask = ((k + rk)[:, None] < K) & (rn[None, :] < N)
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :], mask=a_mask, other=0.0)
        y = tl.load(b + (k + rk)[:, None] * N + rn[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(x, y, acc)
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=mask)


@triton.jit
def attention(Q, K, V, output, T, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """Causal flash attention over one head."""
    start = tl.program_id(0) * BM
    rm = start + tl.arange(0, BM)
    rd = tl.arange(0, D)
    q = tl.load(Q + rm[:, None] * D + rd[None, :], mask=rm[:, None] < T, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for n in range(0, tl.minimum(start + BM, T), BN):
        rn = n + tl.arange(0, BN)
        k = tl.load(K + rn[None, :] * D + rd[:, None], mask=rn[None, :] < T, other=0.0)
        s = tl.dot(q, k) * scale
        s = tl.where((rm[:, None] >= rn[None, :]) & (rn[None, :] < T), s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(V + rn[:, None] * D + rd[None, :], mask=rn[:, None] < T, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    out = acc / total[:, None]
    tl.store(output + rm[:, None] * D + rd[None, :], out, mask=rm[:, None] < T)


@triton.jit
def dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, precision: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    z = tl.dot(x, y) if precision == "default" else tl.dot(x, y, input_precision=precision)
    tl.store(c + m[:, None] * N + n[None, :], z)


@triton.jit
def cumsum(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.cumsum(tl.load(x + i), 0))


@triton.jit
def sort(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.sort(tl.load(x + i)))


@triton.jit
def argmax(x, o, R: tl.constexpr, B: tl.constexpr):
    r = tl.arange(0, R)
    i = tl.arange(0, B)
    tl.store(o + r, tl.argmax(tl.load(x + r[:, None] * B + i[None, :]), 1))


@triton.jit
def histogram(x, o, B: tl.constexpr, BINS: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + tl.arange(0, BINS), tl.histogram(tl.load(x + i), BINS))


@triton.jit
def gather(x, index, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.gather(tl.load(x + i), tl.load(index + i), 0))


@triton.jit
def transcendental(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, tl.exp(v))
    tl.store(o + B + i, tl.log(tl.abs(v) + 0.5))
    tl.store(o + 2 * B + i, tl.sin(v))
    tl.store(o + 3 * B + i, tl.rsqrt(tl.abs(v) + 1))
    tl.store(o + 4 * B + i, tl.sigmoid(v))
    tl.store(o + 5 * B + i, tl.erf(v))
    tl.store(o + 6 * B + i, tl.sqrt(tl.abs(v)))


@triton.jit
def casts(x, o16, ob, oi, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o16 + i, v.to(tl.float16))
    tl.store(ob + i, v.to(tl.bfloat16))
    tl.store(oi + i, (v * 40).to(tl.int8))


@triton.jit
def random_ints(o, seed, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.randint(seed, i))


@triton.jit
def integer64(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, v * v // 7 + v % 5)


@triton.jit
def float8(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i).to(tl.float8e5).to(tl.float32))


@triton.jit
def locked_increment(lock, total, B: tl.constexpr):
    """A spin lock around a read-modify-write of a vector."""
    i = tl.arange(0, B)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.debug_barrier()
    tl.store(total + i, tl.load(total + i) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def unlocked_increment(total, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(total + i, tl.load(total + i) + 1)


@triton.jit
def wait_for_other(flag, o):
    """Program 0 waits for program 1, so both must be running."""
    if tl.program_id(0) == 0:
        while tl.atomic_add(flag, 0) == 0:
            pass
        tl.store(o, tl.load(o + 1) + 1)
    else:
        tl.store(o + 1, 41)
        tl.atomic_xchg(flag, 1)


@triton.jit
def atomic_max_and_sum(x, o, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_max(o, tl.max(tl.load(x + i), 0))
    tl.atomic_add(o + 1, tl.sum(tl.load(x + i), 0))


@triton.jit
def counts_and_tickets(index, counts, tickets, n, B: tl.constexpr):
    p = tl.program_id(0)
    i = p * B + tl.arange(0, B)
    m = i < n
    tl.atomic_add(counts + tl.load(index + i, mask=m, other=0), 1, mask=m)
    tl.store(tickets + 1 + p, tl.atomic_add(tickets, 1))


@triton.jit
def last_program_sums(x, parts, ticket, o, SEM: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    """The last program to take a ticket adds up what all of them stored."""
    p = tl.program_id(0)
    tl.store(parts + p, tl.sum(tl.load(x + p * B + tl.arange(0, B)), 0))
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem=SEM) == P - 1:
        tl.store(o, tl.sum(tl.load(parts + tl.arange(0, P)), 0))


@triton.jit
def unmasked_load(x, o, B: tl.constexpr):
    p = tl.program_id(0)
    tl.store(o + p, tl.sum(tl.load(x + p * B + tl.arange(0, B)), 0))


@triton.jit
def strided_copy(x, o, stride, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i * stride))


@triton.jit
def through_scratch(x, scratch, o, B: tl.constexpr, BARRIER: tl.constexpr):
    """Reverse a vector through global memory, with or without the barrier that needs."""
    i = tl.arange(0, B)
    tl.store(scratch + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(o + i, tl.load(scratch + B - 1 - i))
