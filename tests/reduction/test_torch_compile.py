"""`torch.compile(fullgraph=True)` over `prune_merge` with a fixed budget."""

import shutil

import pytest
import torch
from merge_cases import assert_same, grid_inputs, smooth_inputs
from tiny_models import images, tiny_llava

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.reading import reduce_patches
from prumerge_fast.towers.clip import TOWER


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(config, backend, **options):
    return torch.compile(
        lambda *inputs: prune_merge(*inputs, config), fullgraph=True, backend=backend, **options
    )


CONFIGS = [
    PruMergeConfig(keep=8),
    PruMergeConfig(keep=0.2, merge="none", order="raster"),
    PruMergeConfig(variant="prumerge+", keep=9, merge="average", supplement=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["sum", "none", "plus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_graph(config, dtype):
    inputs = grid_inputs(2, 49, dtype=dtype)
    assert_same(compiled(config, "aot_eager")(*inputs), prune_merge(*inputs, config))


def test_gradients():
    config = PruMergeConfig(keep=6, neighbours=5)
    inputs = [tensor.requires_grad_() for tensor in smooth_inputs(2, 30, 8)]
    gradients = [
        torch.autograd.grad(function(*inputs).tokens.sin().sum(), inputs)
        for function in (compiled(config, "aot_eager"), compiled(config, "eager"))
    ]
    plain = torch.autograd.grad(prune_merge(*inputs, config).tokens.sin().sum(), inputs)
    for actual in gradients:
        torch.testing.assert_close(actual, plain)


def test_any_number_of_images_with_one_graph():
    config = PruMergeConfig(keep=6)
    function = compiled(config, "eager", dynamic=True)
    function(*grid_inputs(2, 30))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (3, 5):
            inputs = grid_inputs(batch, 30, seed=batch)
            assert_same(function(*inputs), prune_merge(*inputs, config))


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
def test_inductor():
    config = PruMergeConfig(variant="prumerge+", keep=8, neighbours=5)
    inputs = grid_inputs(2, 49)
    assert_same(compiled(config, "inductor")(*inputs), prune_merge(*inputs, config))


def test_vision_path():
    """The tower up to the queries and keys, and the reduction behind it, are one graph."""
    model, config = tiny_llava(), PruMergeConfig(keep=8)

    def reduced(pixel_values):
        return reduce_patches(TOWER.read(model.model.vision_tower, pixel_values, -2), config)

    whole = torch.compile(reduced, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for count in (2, 3):
            assert_same(whole(images(count)), reduced(images(count)))
