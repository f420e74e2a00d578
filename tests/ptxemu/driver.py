"""A Triton driver that runs launches on the emulator instead of a GPU."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver as triton_driver

from .machine import SCHEDULES, Code, Launch
from .memory import Buffer, GlobalMemory
from .mma import mma_shape
from .parser import parse
from .ptxtypes import UNSIGNED, WARP_SIZE, float_to_bfloat
from .races import RaceDetector
from .stats import LaunchStats, Traffic

# Bytes of shared memory a block may use, and the device numbers under which Triton keeps the
# kernels compiled for each capability apart.
_MAX_SHARED = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 120: 101376, 121: 101376}
_DEFAULT_MAX_SHARED = 232448
_FIRST_DEVICE = 1000

_SCALARS = {
    "i1": np.uint8, "u1": np.uint8, "i8": np.int8, "u8": np.uint8, "i16": np.int16,
    "u16": np.uint16, "i32": np.int32, "u32": np.uint32, "i64": np.int64, "u64": np.uint64,
    "fp16": np.float16, "fp32": np.float32, "f32": np.float32, "fp64": np.float64,
}  # fmt: skip

RewritePtx = Callable[[str], str]


class _FakeUtils:
    """What Triton expects of a driver's `utils`, for the emulator that is installed."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        capability = device - _FIRST_DEVICE
        return {
            "max_shared_mem": _MAX_SHARED.get(capability, _DEFAULT_MAX_SHARED),
            "multiprocessor_count": 4,
            "warpSize": WARP_SIZE,
            "max_num_regs": 65536,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        ptx = _ptx_of_binary[binary]
        return name, ptx, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class Emulator(AbstractContextManager):
    """The fake driver of a CUDA device of the given compute capability; see `install`."""

    #: Kernels launched under this driver take CPU tensors; a wrapper may ask before it launches.
    accepts_cpu_tensors = True

    def __init__(
        self,
        capability: int,
        schedule: str,
        seed: int,
        check_races: bool | str,
        profile: bool,
        max_instructions: int | None,
        rewrite_ptx: RewritePtx | None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, not {schedule!r}")
        if check_races not in (False, True, "raise"):
            raise ValueError("check_races must be False, True or 'raise'")
        self.capability = capability
        self.schedule = schedule
        self.seed = seed
        self.check_races = check_races
        self.profile = profile
        self.max_instructions = max_instructions
        self.rewrite_ptx = rewrite_ptx
        self.last: LaunchStats | None = None
        self.utils = _FakeUtils()
        self.launcher_cls = _Launcher
        self._previous: Any = None
        self._installed = False

    # ---- installation

    def install(self) -> Emulator:
        """Become Triton's active driver."""
        if not self._installed:
            self._previous = triton_driver._active
            triton_driver.set_active(self)
            self._installed = True
        return self

    def uninstall(self) -> None:
        """Give Triton back the driver it had."""
        if self._installed:
            triton_driver._active = self._previous
            self._installed = False

    def __exit__(self, *exception: object) -> None:
        self.uninstall()

    # ---- the interface of a Triton driver

    def get_current_target(self) -> GPUTarget:
        """The GPU that Triton compiles for."""
        return GPUTarget("cuda", self.capability, WARP_SIZE)

    def get_current_device(self) -> int:
        """A number that keeps kernels compiled for different capabilities apart."""
        return _FIRST_DEVICE + self.capability

    def set_current_device(self, device: int) -> None:
        """Ignored: there is one device."""

    def get_current_stream(self, device: int = 0) -> int:
        """There are no streams; launches finish before they return."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tensors live on the CPU."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What stands in for `torch.cuda`."""
        return torch.cpu

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """There is no cache to flush."""
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is no cache to flush."""

    def get_benchmarker(self) -> Callable[..., Any]:
        """For `triton.autotune`: ranks configurations by warp instructions, not by time."""

        def count(function: Callable[[], Any], quantiles: Any = None, **_: Any) -> Any:
            function()
            instructions = float(self.last.warp_instructions)
            return [instructions] * len(quantiles) if quantiles else instructions

        return count

    # ---- launching

    def launch(
        self,
        ptx: str,
        grid: tuple[int, int, int],
        metadata: Any,
        arguments: list[tuple[str, str, Any]],
    ) -> None:
        """Emulate one launch; `arguments` are (name, Triton type, value)."""
        code = _decoded(self.rewrite_ptx(ptx) if self.rewrite_ptx else ptx)
        values, buffers, keep_alive = _marshal(arguments)
        for kind in ("global_scratch_size", "profile_scratch_size"):
            size = getattr(metadata, kind, 0) * grid[0] * grid[1] * grid[2]
            scratch = torch.zeros(size, dtype=torch.uint8)
            keep_alive.append(scratch)
            values.append(np.uint64(scratch.data_ptr() if size else 0))
            if size:
                buffers.append(Buffer.of_tensor(kind, scratch))
        for name, table in code.program.constants.items():
            buffers.append(Buffer.of_array(name, table))
        launch = Launch(
            code=code,
            grid=grid,
            num_warps=metadata.num_warps,
            shared_bytes=metadata.shared,
            parameters=_parameters(code.program.parameters, values),
            memory=GlobalMemory(buffers),
            schedule=self.schedule,
            rng=random.Random(self.seed),
            races=RaceDetector(self.check_races == "raise") if self.check_races else None,
            profile=self.profile,
            max_instructions=self.max_instructions,
        )
        started = time.perf_counter()
        try:
            launch.run()
        finally:
            self.last = _statistics(launch, self.capability)
            self.last.emulation_seconds = time.perf_counter() - started


class _Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.names = source.fn.arg_names
        self.types = list(source.signature.values())

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, ptx: str, packed_metadata: Any,
        launch_metadata: Any, enter_hook: Any, exit_hook: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        emulator = triton_driver.active
        described = list(zip(self.names, self.types, arguments, strict=True))
        emulator.launch(ptx, (grid_x, grid_y, grid_z), self.metadata, described)


# Triton hands a driver only the binary; the PTX it was assembled from is noted when the compiled
# kernel is created, which may be before an emulator is installed.
_ptx_of_binary: dict[bytes, str] = {}
_code_of_ptx: dict[str, Code] = {}
_original_init = CompiledKernel.__init__


def _remember_ptx(self: CompiledKernel, *args: Any, **kwargs: Any) -> None:
    _original_init(self, *args, **kwargs)
    if "ptx" in self.asm:
        _ptx_of_binary[self.kernel] = self.asm["ptx"]


CompiledKernel.__init__ = _remember_ptx


def _decoded(ptx: str) -> Code:
    if ptx not in _code_of_ptx:
        _code_of_ptx[ptx] = Code(parse(ptx))
    return _code_of_ptx[ptx]


def _marshal(arguments: list[tuple[str, Any, Any]]) -> tuple[list, list[Buffer], list]:
    """Kernel parameters, the memory they point to, and objects to keep alive meanwhile."""
    values: list[Any] = []
    buffers: list[Buffer] = []
    keep_alive: list[Any] = []

    def add(name: str, type_: Any, value: Any) -> None:
        if isinstance(type_, tuple):
            for position, (inner, part) in enumerate(zip(type_, value, strict=True)):
                add(f"{name}[{position}]", inner, part)
        elif type_ == "constexpr":
            pass
        elif type_.startswith("*"):
            if value is not None and value.numel():
                if value.device.type != "cpu":
                    raise ValueError(f"argument '{name}' must be a CPU tensor")
                buffers.append(Buffer.of_tensor(name, value))
                keep_alive.append(value)
            values.append(np.uint64(0 if value is None else value.data_ptr()))
        elif type_ == "bf16":
            values.append(float_to_bfloat(np.array([value], np.float32))[0])
        elif type_ in _SCALARS:
            values.append(np.asarray(value).astype(_SCALARS[type_])[()])
        else:
            raise NotImplementedError(f"argument '{name}' of type {type_}")

    for name, type_, value in arguments:
        add(name, type_, value)
    return values, buffers, keep_alive


def _parameters(declared: dict[str, str], values: list) -> dict[str, np.unsignedinteger]:
    """The bits of each PTX parameter."""
    parameters = {}
    for (name, kind), value in zip(declared.items(), values, strict=False):
        bits = np.asarray(value).view(UNSIGNED[value.dtype.itemsize])
        parameters[name] = bits.astype(UNSIGNED[int(kind[1:]) // 8])[()]
    return parameters


def _statistics(launch: Launch, capability: int) -> LaunchStats:
    program = launch.code.program
    stats = LaunchStats(
        name=program.name,
        grid=launch.grid,
        num_warps=launch.num_warps,
        capability=capability,
        shared_bytes=launch.shared_bytes + program.static_shared_bytes,
        program_instructions=launch.program_instructions,
        warp_instructions=sum(launch.program_instructions.values()),
        longest_warp=launch.longest_warp,
        barriers=launch.barriers,
        footprint_bytes=launch.footprint_bytes,
        races=launch.races.races if launch.races else [],
    )
    counts = np.broadcast_to(launch.instruction_counts, len(program.instructions)).tolist()
    opcodes: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for instruction, count in zip(program.instructions, counts, strict=True):
        opcodes[instruction.name] += count
        lines[instruction.source] += count
        if instruction.name == "mma" and count:
            m, n, k = mma_shape(instruction.modifiers)
            stats.tensor_flops += 2 * m * n * k * count
    stats.opcodes, stats.source_lines = +opcodes, +lines
    stats.mma = opcodes["mma"]
    for (at, space, kind), traffic in launch.traffic.items():
        stats.traffic.setdefault((space, kind), Traffic()).add(traffic)
        instruction = program.instructions[at]
        text = f"{instruction.source} {instruction.text}"
        stats.traffic_by_instruction.setdefault((space, kind, text), Traffic()).add(traffic)
    return stats


def install(
    capability: int = 80,
    schedule: str = "interleave",
    seed: int = 0,
    check_races: bool | str = False,
    profile: bool = False,
    max_instructions: int | None = None,
    rewrite_ptx: RewritePtx | None = None,
) -> Emulator:
    """Make Triton compile for `sm_<capability>` and run launches on CPU tensors in the emulator.

    schedule: "interleave" switches between programs and warps every few instructions;
        "shuffle" runs whole programs in random order and "sequential" in launch order, their
        warps in random order between barriers; "lockstep" runs all warps of a program together,
        which is several times faster but tests no ordering between warps.
    seed: of the random choices; the same seed gives the same run.
    check_races: True collects data races in `.last.races`, "raise" raises `RaceDetected`.
    profile: count sectors, shared-memory wavefronts and bytes touched.
    max_instructions: raise `Deadlock` after about this many warp instructions.
    rewrite_ptx: applied to the PTX before it runs, to test that a test notices a mutation.

    All of these are attributes of the result and may be changed between launches.  Use it as a
    context manager, or call `.uninstall()` at the end; `.last` describes the latest launch.
    """
    return Emulator(
        capability, schedule, seed, check_races, profile, max_instructions, rewrite_ptx
    ).install()
