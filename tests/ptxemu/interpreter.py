"""The Triton interpreter with programs in random or interleaved order, and bounds checks.

Needs `TRITON_INTERPRET=1` before Triton is imported, so it cannot share a process with the
emulator.  It sees the Triton source rather than the compiled code: use it for quick checks of
locks, tickets and masks.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from .errors import Deadlock, MemoryAccessError

SCHEDULES = ("interleave", "shuffle", "sequential")

GridIndex = tuple[int, int, int]
Program = tuple[GridIndex, Callable[[], None]]

# Which argument of a memory operation holds its mask, after the pointer.
_MASK_POSITION = {
    "create_masked_load": 0,
    "create_masked_store": 1,
    "create_atomic_rmw": 2,
    "create_atomic_cas": None,
}


@dataclass
class _Settings:
    schedule: str
    seed: int
    check_bounds: bool
    max_switches: int
    ranges: list[tuple[int, int, str]] = field(default_factory=list)


class _Interleaver:
    """Runs every program in a thread of its own, exactly one at a time."""

    def __init__(self, programs: list[Program], rng: random.Random, max_switches: int) -> None:
        self._programs = programs
        self._rng = rng
        self._max_switches = max_switches
        self._switches = 0
        self._turns: dict[int, threading.Event] = {}
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        for number, (index, body) in enumerate(self._programs):
            self._turns[number] = threading.Event()
            arguments = (number, index, body)
            threading.Thread(target=self._program, args=arguments, daemon=True).start()
        self._wake_any()
        self._finished.wait()
        if self._error:
            raise self._error

    def _program(self, number: int, index: GridIndex, body: Callable[[], None]) -> None:
        turn = self._turns[number]
        turn.wait()
        turn.clear()
        interpreter_builder.grid_idx = index
        _current.program = (self, number, index)
        try:
            if self._error is None:
                body()
        except BaseException as error:
            self._error = self._error or error
        del self._turns[number]
        self._wake_any()

    def _wake_any(self) -> None:
        if self._turns:
            self._turns[self._rng.choice(list(self._turns))].set()
        else:
            self._finished.set()

    def switch(self, number: int, index: GridIndex) -> None:
        """Hand over to a random program, and return when it is this one's turn again."""
        self._switches += 1
        if self._switches > self._max_switches:
            self._error = self._error or Deadlock(f"no end after {self._max_switches} switches")
        if self._error:
            raise self._error
        chosen = self._rng.choice(list(self._turns))
        if chosen != number:
            mine = self._turns[number]
            self._turns[chosen].set()
            mine.wait()
            mine.clear()
        interpreter_builder.grid_idx = index
        if self._error:
            raise self._error


_current = threading.local()


class _Collector:
    """Stands in for the kernel: collects one call per program and runs them when all are there."""

    def __init__(self, function: Callable[..., None], settings: _Settings) -> None:
        self._function = function
        self._settings = settings
        self._programs: list[Program] = []
        self.__signature__ = inspect.signature(function)
        for attribute in ("__globals__", "__name__", "__annotations__"):
            setattr(self, attribute, getattr(function, attribute))

    def __call__(self, **arguments: Any) -> None:
        self._programs.append((interpreter_builder.grid_idx, lambda: self._function(**arguments)))
        if len(self._programs) < np.prod(interpreter_builder.grid_dim):
            return
        programs, self._programs = self._programs, []
        rng = random.Random(self._settings.seed)
        if self._settings.schedule != "sequential":
            rng.shuffle(programs)
        if self._settings.schedule == "interleave":
            _Interleaver(programs, rng, self._settings.max_switches).run()
            return
        for index, body in programs:
            interpreter_builder.grid_idx = index
            body()


def _check_bounds(settings: _Settings, name: str, pointer: Any, mask: Any) -> None:
    type_ = getattr(pointer.dtype, "scalar", pointer.dtype)
    element = getattr(type_, "element_ty", type_)
    size = max(1, element.primitive_bitwidth // 8)
    addresses = np.asarray(pointer.data, np.uint64).astype(np.int64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
    inside = np.zeros(addresses.shape, bool)
    for start, stop, _ in settings.ranges:
        inside |= (addresses >= start) & (addresses + size <= stop)
    if inside.all():
        return
    address = int(addresses[~inside].reshape(-1)[0])
    start, stop, argument = min(
        settings.ranges, key=lambda span: max(span[0] - address, address - span[1] + 1)
    )
    raise MemoryAccessError(
        f"{name} in program {interpreter_builder.grid_idx}: {int((~inside).sum())} elements "
        f"outside every argument, the first at byte {address - start} of '{argument}' "
        f"which has {stop - start}"
    )


def _wrap_memory_operation(name: str, settings: _Settings) -> Callable[..., Any]:
    original = getattr(type(interpreter_builder), name)

    def operation(self: Any, first: Any, *rest: Any, **keywords: Any) -> Any:
        program = getattr(_current, "program", None)
        if program and settings.schedule == "interleave":
            scheduler, number, index = program
            scheduler.switch(number, index)
        if settings.check_bounds and settings.ranges:
            pointer = rest[0] if name == "create_atomic_rmw" else first
            position = _MASK_POSITION[name]
            _check_bounds(settings, name, pointer, None if position is None else rest[position])
        return original(self, first, *rest, **keywords)

    return operation


@contextlib.contextmanager
def scheduled(
    schedule: str = "interleave",
    seed: int = 0,
    check_bounds: bool = True,
    max_switches: int = 2_000_000,
) -> Iterator[None]:
    """Within this context the Triton interpreter runs programs in the given order.

    "interleave" switches to a random program before every load, store and atomic, so that spin
    locks, tickets and lost updates are exercised; a run of more than `max_switches` of them raises
    `Deadlock`.  Errors arrive as the `__cause__` of Triton's `InterpreterError`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, not {schedule!r}")
    settings = _Settings(schedule, seed, check_bounds, max_switches)
    make_executor, take_arguments = GridExecutor.__init__, GridExecutor._init_args_hst

    def init(self: GridExecutor, function: Callable, *args: Any, **keywords: Any) -> None:
        make_executor(self, function, *args, **keywords)
        self.fn = _Collector(self.fn, settings)

    def note_arguments(self: GridExecutor, arguments: Any, keywords: dict) -> Any:
        on_host, keywords_on_host = take_arguments(self, arguments, keywords)
        named = [*zip(self.arg_names, on_host, strict=False), *keywords_on_host.items()]
        settings.ranges = [
            (tensor.data_ptr(), tensor.data_ptr() + _span(tensor), name)
            for name, tensor in named
            if isinstance(tensor, torch.Tensor) and tensor.numel()
        ]
        return on_host, keywords_on_host

    builder = type(interpreter_builder)
    originals = {name: getattr(builder, name) for name in _MASK_POSITION}
    for name in _MASK_POSITION:
        setattr(builder, name, _wrap_memory_operation(name, settings))
    GridExecutor.__init__, GridExecutor._init_args_hst = init, note_arguments
    try:
        yield
    finally:
        GridExecutor.__init__, GridExecutor._init_args_hst = make_executor, take_arguments
        for name, original in originals.items():
            setattr(builder, name, original)


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a (possibly strided) tensor."""
    steps = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()
