"""`prune_merge` as an interface: argument checks, choice of backend, autocast, synchronisation."""

import re
from collections import Counter

import pytest
import torch
from merge_cases import grid_inputs, smooth_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from prumerge_fast.errors import BackendUnavailableError, PruMergeError, UnsupportedModelError
from prumerge_fast.reduction.backends import BACKENDS, resolve_backend
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge


@pytest.fixture
def inputs():
    return dict(zip(("query", "keys", "hidden"), grid_inputs(2, 9), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("query", [1.0], TypeError, "query: expected a torch.Tensor, got list"),
        ("keys", None, TypeError, "keys: expected a torch.Tensor, got NoneType"),
        ("hidden", torch.ones(2, 10, 16).int(), TypeError, "hidden: expected dtype"),
        ("hidden", torch.ones(2, 10, 16).half(), TypeError, "hidden: expected the dtype of keys"),
        ("query", torch.ones(2, 16).double(), TypeError, "query: expected the dtype of keys"),
        ("keys", torch.ones(10, 16), ValueError, "keys: expected shape [B, 1+N, C], got [10, 16]"),
        ("keys", torch.ones(2, 1, 16), ValueError, "at least one patch token"),
        ("keys", torch.ones(2, 10, 0), ValueError, "one channel, got [2, 10, 0]"),
        ("hidden", torch.ones(2, 9, 16), ValueError, "hidden: expected the shape of keys"),
        ("hidden", torch.ones(2, 10, 24), ValueError, "or a multiple of its channels, got"),
        ("hidden", torch.ones(2, 10, 0), ValueError, "got [2, 10, 0]"),
        ("hidden", torch.ones(10, 16), ValueError, "hidden: expected the shape of keys"),
        ("query", torch.ones(1, 16), ValueError, "query: expected shape [2, 16] or [2, 10, 16]"),
        ("query", torch.ones(2, 9, 16), ValueError, "query: expected shape"),
        ("query", torch.ones(2, 16, device="meta"), ValueError, "query: expected the device"),
        ("config", {"keep": 3}, TypeError, "config: expected a PruMergeConfig or None, got dict"),
        ("config", PruMergeConfig(keep=10), ValueError, "keep: expected at most N = 9"),
        ("backend", "cuda", ValueError, "backend: expected one of auto, triton, torch, reference"),
        ("backend", None, TypeError, "backend: expected a string, got None"),
    ],
)
def test_bad_arguments_are_named(inputs, name, value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        prune_merge(**{**inputs, name: value})


def test_no_patch_token(inputs):
    with pytest.raises(ValueError, match="N >= 1"):
        prune_merge(inputs["query"], inputs["keys"][:, :1], inputs["hidden"][:, :1])


def test_unknown_keyword(inputs):
    with pytest.raises(TypeError, match="keep"):
        prune_merge(**inputs, keep=3)


def test_row_0_of_a_whole_query_is_used(inputs):
    whole = torch.randn(2, 10, 16)
    whole[:, 0] = inputs["query"]
    short = prune_merge(**inputs)
    long = prune_merge(whole, inputs["keys"], inputs["hidden"])
    assert torch.equal(long.tokens, short.tokens)
    assert torch.equal(long.kept, short.kept)


def test_default_config(inputs):
    explicit = prune_merge(**inputs, config=PruMergeConfig())
    assert torch.equal(prune_merge(**inputs).tokens, explicit.tokens)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_inputs_are_left_as_they_are(inputs, backend):
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    prune_merge(**inputs, config=PruMergeConfig(merge="average"), backend=backend)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


def test_resolve_backend():
    assert BACKENDS == ("auto", "triton", "torch", "reference")
    assert resolve_backend("reference", "cpu").name == "reference"
    name, reason = resolve_backend("auto", torch.device("cpu"))
    assert name == "torch"
    assert reason == "vectorised PyTorch, because the tensors are on a CPU"


def test_the_errors_are_also_what_python_calls_them():
    assert issubclass(BackendUnavailableError, PruMergeError)
    assert issubclass(BackendUnavailableError, RuntimeError)
    assert issubclass(UnsupportedModelError, PruMergeError)
    assert issubclass(UnsupportedModelError, TypeError)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_changes_nothing(backend):
    inputs = smooth_inputs(2, 40, 32, dtype=torch.float32)
    config = PruMergeConfig(keep=5, neighbours=4)
    plain = prune_merge(*inputs, config, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs[1] @ inputs[1].mT).dtype == torch.bfloat16  # autocast is at work
        cast = prune_merge(*inputs, config, backend=backend)
    assert cast.tokens.dtype == torch.float32
    assert torch.equal(cast.tokens, plain.tokens)


class Operators(TorchDispatchMode):
    """Counts the operators that run within."""

    # Those whose result the host has to wait for.
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def waits(self):
        return sum(self.counts[name] for name in self.WAITING)


def operators_of(inputs, config):
    with Operators() as operators:
        prune_merge(*inputs, config, backend="torch")
    return operators


@pytest.mark.parametrize("merge", ["sum", "average", "none"])
@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
def test_the_host_waits_only_for_the_number_of_rows(variant, merge):
    inputs = grid_inputs(3, 50)
    config = PruMergeConfig(variant=variant, merge=merge)
    assert operators_of(inputs, config.replace(keep=9)).waits() == 0
    assert operators_of(inputs, config).waits() == 1


def test_shapes_without_data():
    """On the meta device there are no values to wait for."""
    inputs = (torch.empty(*shape, device="meta") for shape in ((2, 8), (2, 50, 8), (2, 50, 8)))
    merged = prune_merge(*inputs, PruMergeConfig(variant="prumerge+", keep=9), backend="torch")
    assert merged.tokens.shape == (2, 10, 8)
    assert merged.kept.shape == (2, 10)


@pytest.mark.parametrize("keep", [None, 20])
def test_no_loop_over_images_or_centres(keep):
    """The same operators, as often, for 8 images as for 1 and for 20 centres as for 2."""
    many = PruMergeConfig(variant="prumerge+", keep=keep)
    few = many.replace(keep=keep and 2)
    counts = operators_of(grid_inputs(8, 50), many).counts
    assert sum(counts.values()) > 20
    assert operators_of(grid_inputs(1, 50), few).counts == counts


def test_memory_that_nobody_wrote_is_not_used():
    """`torch.empty` filled with NaN, or the largest integer, changes nothing."""
    inputs = grid_inputs(2, 30)
    configs = [PruMergeConfig(), PruMergeConfig(variant="prumerge+", keep=5, merge="average")]
    plain = [prune_merge(*inputs, config) for config in configs]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = [prune_merge(*inputs, config) for config in configs]
    finally:
        torch.use_deterministic_algorithms(False)
    for actual, expected in zip(poisoned, plain, strict=True):
        assert torch.equal(actual.tokens, expected.tokens)
        assert torch.equal(actual.kept, expected.kept)
