"""Single instructions on edge cases, against their definition in plain Python."""

from __future__ import annotations

import math
import random
import struct

import numpy as np
import pytest
from ptxemu.errors import UnsupportedInstruction
from ptxemu.machine import Code, Launch
from ptxemu.memory import Buffer, GlobalMemory
from ptxemu.parser import parse

MODULE = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 in_a, .param .u64 in_b, .param .u64 in_c, .param .u64 out)
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<16>;
    .reg .b64 %d<16>;
    ld.param.u64 %d0, [in_a];
    ld.param.u64 %d1, [in_b];
    ld.param.u64 %d2, [in_c];
    ld.param.u64 %d3, [out];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d4, %r0, 8;
    add.s64 %d0, %d0, %d4;
    add.s64 %d1, %d1, %d4;
    add.s64 %d2, %d2, %d4;
    add.s64 %d3, %d3, %d4;
    ld.global.b64 %d5, [%d0];
    ld.global.b64 %d6, [%d1];
    ld.global.b64 %d7, [%d2];
    cvt.u32.u64 %r5, %d5;
    cvt.u32.u64 %r6, %d6;
    cvt.u32.u64 %r7, %d7;
    {body}
    st.global.b64 [%d3], %d8;
    ret;
}}
"""
SPECIAL = [0, 1, 2, 5, 31, 32, 33, 63, 64, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1]


def run(body: str, a, b=None, c=None) -> list[int]:
    """Execute `body` in one warp: operands in %d5-%d7 and %r5-%r7, result in %d8."""
    inputs = [np.zeros(32, np.uint64) for _ in range(3)]
    for array, values in zip(inputs, (a, b, c), strict=True):
        if values is not None:
            array[:] = np.array(values, np.uint64)
    arrays = [*inputs, np.zeros(32, np.uint64)]
    code = Code(parse(MODULE.format(body=body)))
    launch = Launch(
        code=code,
        grid=(1, 1, 1),
        num_warps=1,
        shared_bytes=1024,
        parameters={
            name: np.uint64(array.ctypes.data)
            for name, array in zip(code.program.parameters, arrays, strict=True)
        },
        memory=GlobalMemory([Buffer.of_array(f"array {i}", x) for i, x in enumerate(arrays)]),
        schedule="interleave",
        rng=random.Random(0),
    )
    launch.run()
    return arrays[-1].tolist()


def operands(bits: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    values = rng.choices(SPECIAL, k=16) + [rng.getrandbits(bits) for _ in range(16)]
    return [value % 2**bits for value in values]


def signed(value: int, bits: int) -> int:
    return value - (value >> (bits - 1) << bits)


BINARY = {
    "mul.hi.u64 %d8, %d5, %d6;": (64, lambda a, b: a * b >> 64),
    "mul.hi.s64 %d8, %d5, %d6;": (64, lambda a, b: signed(a, 64) * signed(b, 64) >> 64),
    "mul.hi.s32 %r8, %r5, %r6;": (32, lambda a, b: signed(a, 32) * signed(b, 32) >> 32),
    "mul.lo.s32 %r8, %r5, %r6;": (32, lambda a, b: a * b),
    "add.s32 %r8, %r5, %r6;": (32, lambda a, b: a + b),
    "sub.s64 %d8, %d5, %d6;": (64, lambda a, b: a - b),
    "min.s32 %r8, %r5, %r6;": (32, lambda a, b: min(signed(a, 32), signed(b, 32))),
    "max.u64 %d8, %d5, %d6;": (64, max),
    "shl.b32 %r8, %r5, %r6;": (32, lambda a, b: a << min(b, 32)),
    "shl.b64 %d8, %d5, %r6;": (64, lambda a, b: a << min(b % 2**32, 64)),
    "shr.u32 %r8, %r5, %r6;": (32, lambda a, b: a >> min(b, 32)),
    "shr.s64 %d8, %d5, %r6;": (64, lambda a, b: signed(a, 64) >> min(b % 2**32, 63)),
    "div.u32 %r8, %r5, %r6;": (32, lambda a, b: a // b if b else -1),
    "div.s32 %r8, %r5, %r6;": (
        32,
        lambda a, b: (
            int(math.copysign(1, signed(a, 32) * signed(b, 32)))
            * (abs(signed(a, 32)) // abs(signed(b, 32)))
            if b
            else -1
        ),
    ),
    "rem.s32 %r8, %r5, %r6;": (
        32,
        lambda a, b: int(math.fmod(signed(a, 32), signed(b, 32))) if b else a,
    ),
    "bfe.u32 %r8, %r5, 4, %r6;": (32, lambda a, b: a >> 4 & (1 << min(b & 255, 32)) - 1),
    "lop3.b32 %r8, %r5, %r6, %r6, 0x3c;": (32, lambda a, b: a ^ b),
    "shf.l.wrap.b32 %r8, %r5, %r6, 9;": (32, lambda a, b: (b << 32 | a) << 9 >> 32),
}
UNARY = {
    "popc.b64 %r8, %d5;": (64, lambda a: a.bit_count()),
    "clz.b32 %r8, %r5;": (32, lambda a: 32 - a.bit_length()),
    "brev.b32 %r8, %r5;": (32, lambda a: int(f"{a:032b}"[::-1], 2)),
    "neg.s32 %r8, %r5;": (32, lambda a: -a),
    "not.b64 %d8, %d5;": (64, lambda a: ~a),
    "abs.s32 %r8, %r5;": (32, lambda a: abs(signed(a, 32))),
    "cvt.s32.s8 %r8, %r5;": (32, lambda a: signed(a & 255, 8)),
    "cvt.s64.s32 %d8, %r5;": (32, lambda a: signed(a, 32)),
    "cvt.u64.u16 %d8, %r5;": (32, lambda a: a & 0xFFFF),
    "prmt.b32 %r8, %r5, 0, 0x0123;": (32, lambda a: int.from_bytes(a.to_bytes(4, "little"))),
    "bfe.s32 %r8, %r5, 8, 4;": (32, lambda a: signed(a >> 8 & 15, 4)),
    "mov.b32 {%h1, %h2}, %r5; mov.b32 %r8, {%h2, %h1};": (32, lambda a: a >> 16 | a << 16),
    "{ .reg .b32 x<2>; mov.b32 x0, %r5; add.u32 x1, x0, 1; mov.b32 %r8, x1; }": (
        32,
        lambda a: a + 1,
    ),
}


def finish(body: str) -> tuple[str, int]:
    """Widen a 32-bit result, and say how many bits of it count."""
    if "%d8" in body:
        return body, 64
    return body + " cvt.u64.u32 %d8, %r8;", 32


@pytest.mark.parametrize("body", BINARY)
def test_binary(body):
    bits, expected = BINARY[body]
    a, b = operands(bits, 1), operands(bits, 2)
    text, result_bits = finish(body)
    assert run(text, a, b) == [expected(x, y) % 2**result_bits for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("body", UNARY)
def test_unary(body):
    bits, expected = UNARY[body]
    a = operands(bits, 3)
    text, result_bits = finish(body)
    assert run(text, a) == [expected(x) % 2**result_bits for x in a]


def bits_of(*values: float) -> list[int]:
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
    return words + [0] * (32 - len(words))


def floats(body: str, *inputs: list[float]) -> list[float]:
    words = run(body + " cvt.u64.u32 %d8, %r8;", *[bits_of(*values) for values in inputs])
    return [struct.unpack("<f", struct.pack("<I", word))[0] for word in words]


def test_float_minimum_and_nan():
    a, b = [1.0, math.nan, math.nan, -0.5], [2.0, 3.0, math.nan, math.inf]
    plain = floats("min.f32 %r8, %r5, %r6;", a, b)
    assert plain[:2] == [1.0, 3.0]
    assert math.isnan(plain[2])
    assert math.isnan(floats("min.NaN.f32 %r8, %r5, %r6;", a, b)[1])


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [("lt", [1, 0, 0, 0]), ("ge", [0, 1, 1, 0]), ("ne", [1, 1, 0, 0]), ("neu", [1, 1, 0, 1]),
     ("ltu", [1, 0, 0, 1]), ("equ", [0, 0, 1, 1]), ("num", [1, 1, 1, 0]), ("nan", [0, 0, 0, 1])],
)  # fmt: skip
def test_float_comparisons(comparison, expected):
    body = f"setp.{comparison}.f32 %p1, %r5, %r6; selp.b64 %d8, 1, 0, %p1;"
    a, b = bits_of(1, 3, 2, math.nan), bits_of(2, 2, 2, 2)
    assert run(body, a, b)[:4] == expected


def test_comparison_with_two_results_and_combination():
    body = """
    setp.lt.u32 %p1, %r5, 16;
    setp.lt.and.u32 %p2|%p3, %r5, 8, %p1;
    selp.b32 %r8, 1, 0, %p2;
    @%p3 add.u32 %r8, %r8, 2;
    @!%p1 mov.u32 %r8, 9;
    cvt.u64.u32 %d8, %r8;"""
    assert run(body, range(32)) == [1] * 8 + [2] * 8 + [9] * 16


def test_float_to_integer_saturates():
    values = [1.5, -1.5, 3e9, -3e9, math.nan, math.inf, 2.5, -0.4]
    words = run("cvt.rni.s32.f32 %r8, %r5; cvt.u64.u32 %d8, %r8;", bits_of(*values))
    expected = [2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2, 0]
    assert [signed(word, 32) for word in words[:8]] == expected
    unsigned = run("cvt.rzi.u32.f32 %r8, %r5; cvt.u64.u32 %d8, %r8;", bits_of(*values))
    assert unsigned[:8] == [1, 0, 3_000_000_000, 0, 0, 2**32 - 1, 2, 0]


def test_fused_multiply_add_rounds_once():
    a, b, c = [1 + 2**-23], [1 - 2**-23], [-1.0]
    assert floats("fma.rn.f32 %r8, %r5, %r6, %r7;", a, b, c)[0] == -(2.0**-46)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("bfly.b32 %r8, %r5, 3", lambda i: i ^ 3), ("up.b32 %r8, %r5, 2", lambda i: max(i - 2, 0)),
     ("down.b32 %r8, %r5, 1", lambda i: min(i + 1, 31)), ("idx.b32 %r8, %r5, 7", lambda i: 7),
     ("idx.b32 %r8, %r5, %r6", lambda i: 31 - i)],
)  # fmt: skip
def test_shuffles(mode, expected):
    clamp = 0 if mode.startswith("up") else 31
    body = f"shfl.sync.{mode}, {clamp}, -1; cvt.u64.u32 %d8, %r8;"
    result = run(body, range(32), range(31, -1, -1))
    if mode.startswith("up"):  # out of range keeps the own value
        assert result == [i if i < 2 else i - 2 for i in range(32)]
    else:
        assert result == [expected(i) for i in range(32)]


def test_votes_and_reductions():
    body = """
    setp.lt.u32 %p1, %r5, 3;
    vote.sync.ballot.b32 %r8, %p1, -1;
    redux.sync.add.s32 %r9, %r5, -1;
    shl.b32 %r9, %r9, 8;
    or.b32 %r8, %r8, %r9;
    cvt.u64.u32 %d8, %r8;"""
    assert run(body, range(32)) == [7 | 496 << 8] * 32


def test_loop_with_divergent_trip_counts():
    body = """
    mov.u32 %r8, 0;
    mov.u32 %r9, 0;
$LOOP:
    add.u32 %r8, %r8, %r9;
    add.u32 %r9, %r9, 1;
    setp.le.u32 %p1, %r9, %r5;
    @%p1 bra $LOOP;
    cvt.u64.u32 %d8, %r8;"""
    assert run(body, range(32)) == [i * (i + 1) // 2 for i in range(32)]


@pytest.mark.parametrize(
    "body",
    [
        "add.cc.u32 %r8, %r5, %r6;",
        "wgmma.fence.sync.aligned;",
        "mbarrier.arrive.shared.b64 %d8, [%r5];",
        "mov.u64 %d8, %clock64;",
        "call.uni f, ();",
        "cvta.shared.u64 %d8, %d5;",
    ],
)
def test_what_is_not_modelled_says_so(body):
    with pytest.raises(UnsupportedInstruction, match=r"at PTX line \d+"):
        run(body, range(32))


def test_unreached_instructions_need_no_model():
    body = "bra $OVER; wgmma.fence.sync.aligned; $OVER: mov.u64 %d8, 5;"
    assert run(body, range(32)) == [5] * 32


def test_local_memory_is_private():
    body = """
    .local .align 8 .b8 stack[16];
    mov.u64 %d9, stack;
    st.local.u64 [%d9+8], %d5;
    ld.local.u64 %d8, [%d9+8];"""
    assert run(body, range(32)) == list(range(32))
