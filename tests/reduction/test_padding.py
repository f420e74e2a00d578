"""`reduce_unpadded`: patches that are padding might as well not be there."""

import pytest
import torch

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.padding import reduce_unpadded
from prumerge_fast.reduction.reading import Reading


def inputs(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = 3 * torch.randn(batch, 21, 8, generator=generator)
    return keys[:, 0].clone(), keys, torch.randn(batch, 21, 8, generator=generator)


def reading(*tensors: torch.Tensor) -> Reading:
    return Reading(*tensors, num_heads=2, class_token=True)


VALID = torch.ones(5, 20, dtype=torch.bool)
VALID[1, :4] = False  # as many as in image 3, but others
VALID[3, 7:11] = False
VALID[2, 2:] = False
VALID[4] = False


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 5}, {"keep": 0.5}, {"variant": "prumerge+", "keep": 6, "order": "raster"}],
    ids=str,
)
def test_equals_images_without_the_padding(options: dict) -> None:
    config = PruMergeConfig(neighbours=3, **options)
    query, keys, hidden = inputs()
    results = reduce_unpadded(reading(query, keys, hidden), VALID, config, "torch")
    assert [len(tokens) > 0 for tokens, _ in results] == [True] * 4 + [False]
    for image, (tokens, kept) in enumerate(results[:4]):
        patches = VALID[image].nonzero()[:, 0]
        rows = torch.cat([torch.zeros(1, dtype=torch.long), patches + 1])
        limited = config
        if isinstance(config.keep, int):
            limited = config.replace(keep=min(config.keep, len(patches)))
        one = slice(image, image + 1)
        expected = prune_merge(
            query[one], keys[one, rows], hidden[one, rows], limited, backend="reference"
        )
        torch.testing.assert_close(tokens, expected.split()[0])
        chosen = [-1 if p < 0 else int(patches[p]) for p in expected.kept[0, : len(tokens)]]
        assert kept.tolist() == chosen


def test_padding_reaches_nothing() -> None:
    query, keys, hidden = inputs()
    before = reduce_unpadded(reading(query, keys, hidden), VALID, PruMergeConfig(), "torch")
    padding = torch.nn.functional.pad(~VALID, (1, 0))[..., None]  # [B, 1+N, 1]
    worse = keys.masked_fill(padding, torch.nan), hidden.masked_fill(padding, torch.nan)
    after = reduce_unpadded(reading(query, *worse), VALID, PruMergeConfig(), "torch")
    for (tokens, kept), (same_tokens, same_kept) in zip(before, after, strict=True):
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(kept, same_kept)
