"""The layout of a shrunk prompt on the KV cache, which later steps and turns go by."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CACHE, PIXELS, PROMPTS, Oracle, batch, images, prompt, tiny_llava
from transformers import DynamicCache, LlavaForConditionalGeneration

from prumerge_fast.patching.cache_layout import forget_layout, remember_layout, remembered_layout
from prumerge_fast.patching.patch import patch
from prumerge_fast.patching.prompt import PromptLayout
from prumerge_fast.reduction.config import PruMergeConfig

TOKENS = torch.tensor([[3], [4], [5], [6]])


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return patch(tiny_llava())


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)  # logits up to 10


def test_layout_on_a_cache() -> None:
    cache = SimpleNamespace(get_seq_length=lambda: cache.length, length=2)
    layout = PromptLayout(torch.tensor([[0, 3]]), 4, torch.tensor([[2]]), torch.tensor([[3]]))
    assert remembered_layout(cache) is None
    remember_layout(cache, layout)
    assert remembered_layout(cache) is layout
    cache.length = 1
    with pytest.raises(ValueError, match="2 tokens after pruning, got one of length 1"):
        remembered_layout(cache)
    cache.length = 0
    assert remembered_layout(cache) is None
    cache.length = 2  # of another prompt
    assert remembered_layout(cache) is None
    remember_layout(cache, layout)
    forget_layout(cache)
    forget_layout(cache)
    assert not hasattr(cache, "_prumerge_layout")


REARRANGED = {
    "reorder_cache": (torch.tensor([2, 0, 3, 1]), [2, 0, 3, 1]),
    "batch_select_indices": (torch.tensor([3, 1]), [3, 1]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("name", REARRANGED)
@pytest.mark.parametrize("copied", [False, True])
@torch.no_grad()
def test_sequences_of_the_cache_that_are_rearranged(
    model: LlavaForConditionalGeneration, name: str, copied: bool
) -> None:
    """As hand-written beam search does; twice, so that it starts from more rows than prompts."""
    inputs = batch(PROMPTS)
    cache = model(**inputs, pixel_values=PIXELS, use_cache=True)[CACHE]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    tokens = torch.tensor([[3], [4], [5], [6]])
    expected = model(tokens, attention_mask=mask, **{CACHE: copy.deepcopy(cache)}).logits
    if copied:
        cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5, 6]))
    argument, rows = REARRANGED[name]
    getattr(cache, name)(argument)
    step = model(tokens[rows], attention_mask=mask[rows], **{CACHE: cache})
    close(step.logits, expected[rows])


@torch.no_grad()
def test_copies_of_the_cache_are_rearranged_alone(model: LlavaForConditionalGeneration) -> None:
    """Shallow ones too, whether they share their layers or not."""
    cache = model(**batch(PROMPTS), pixel_values=PIXELS, use_cache=True)[CACHE]
    expected = model(TOKENS, **{CACHE: copy.deepcopy(cache)}).logits
    order = torch.tensor([2, 0, 3, 1])

    def step(of: Any, rows: torch.Tensor) -> torch.Tensor:
        return model(TOKENS[rows], **{CACHE: copy.deepcopy(of)}).logits

    apart = copy.copy(cache)
    apart.layers = [copy.copy(layer) for layer in cache.layers]
    apart.reorder_cache(order)
    close(step(apart, order), expected[order])
    close(step(cache, torch.arange(4)), expected)
    shared = copy.copy(cache)
    shared.reorder_cache(order)
    close(step(shared, order), expected[order])
    close(step(cache, order), expected[order])


def test_caches_are_freed_at_once(model: LlavaForConditionalGeneration) -> None:
    """And not when the garbage collector comes by: they hold memory, and gradients."""
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    gc.disable()
    try:
        outputs = model(**inputs)
        freed = [weakref.ref(outputs[CACHE])]
        outputs = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        freed.append(weakref.ref(outputs[CACHE]))
        del outputs
        assert [one() for one in freed] == [None, None]
    finally:
        gc.enable()


def test_classes_of_layers_come_and_go(model: LlavaForConditionalGeneration) -> None:
    cache = DynamicCache()
    model(**batch(PROMPTS), pixel_values=PIXELS, **{CACHE: cache})
    layer, plain = cache.layers[0], type(cache.layers[1])
    assert isinstance(layer, plain)
    assert type(layer) is not plain
    assert type(layer).__name__ == plain.__name__
    forget_layout(cache)
    assert type(layer) is plain
    assert not [name for name in vars(layer) if "prumerge" in name]


UNEQUAL = [prompt("image", [3, 4, 5, 6 + i]) for i in range(4)]  # alike but for their images


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_llava(), PruMergeConfig())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("first", ["forward", "generate"])
@torch.no_grad()
def test_steps_that_leave_positions_to_the_model(
    model: LlavaForConditionalGeneration, oracle: Oracle, first: str, positions: bool, masked: bool
) -> None:
    """Where rows lose unequal numbers of tokens, each goes on from its own."""
    pixels = images(4, seed=5)
    ids = torch.tensor(UNEQUAL)
    ones = {"attention_mask": torch.ones_like(ids)} if masked else {}
    given = {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)} if positions else {}
    spoken = ids
    if first == "forward":
        cache = model(ids, pixel_values=pixels, use_cache=True, **ones, **given)[CACHE]
    else:
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
        output = model.generate(ids, pixel_values=pixels, **ones, **options)
        cache, spoken = output[CACHE], output.sequences[:, :-1]  # the last is not in the cache
    assert len(set(model.prumerge.last_lengths)) > 1
    for token in (40, 41):
        spoken = torch.cat([spoken, torch.full((4, 1), token)], 1)
        mask = {"attention_mask": torch.ones_like(spoken)} if masked else {}
        step = model(spoken[:, -1:], **mask, **{CACHE: cache}).logits
        for row, (tokens, image) in enumerate(zip(spoken.tolist(), pixels, strict=True)):
            close(step[row, 0], oracle.logits(tokens, image[None])[-1])


@torch.no_grad()
def test_a_turn_of_generate_behind_a_step_by_hand(
    model: LlavaForConditionalGeneration, oracle: Oracle
) -> None:
    pixels, ids = images(4, seed=5), torch.tensor(UNEQUAL)
    cache = model(ids, pixel_values=pixels, use_cache=True)[CACHE]
    longer = torch.cat([ids, torch.tensor([[40, 41]] * 4)], 1)
    output = model.generate(longer, max_new_tokens=4, do_sample=False, **{CACHE: cache})
    for row, image in zip(output.tolist(), pixels, strict=True):
        expected = oracle.answer(row[: longer.shape[1]], image[None], 4)
        assert row[longer.shape[1] :][: len(expected)] == expected


@torch.no_grad()
def test_steps_behind_a_packed_row(model: LlavaForConditionalGeneration, oracle: Oracle) -> None:
    """Positions go on from the last sequence, by what that one lost."""
    rows = UNEQUAL[:2]
    ids = torch.tensor([rows[0] + rows[1]])
    places = torch.arange(len(rows[0])).repeat(2)[None]
    first = model(ids, pixel_values=images(4, seed=5)[:2], position_ids=places, use_cache=True)
    gone = len(rows[1]) - len(oracle.logits(rows[1], images(4, seed=5)[1:2]))
    callers, own = (
        model(
            torch.tensor([[40]]),
            position_ids=torch.tensor([[len(rows[1]) - lost]]),
            **{CACHE: copy.deepcopy(first[CACHE])},
        ).logits
        for lost in (0, gone)
    )
    assert torch.equal(callers, own)


def test_compiled_steps_are_one_graph_with_positions(model: LlavaForConditionalGeneration) -> None:
    """Nothing waits for the positions; what looks at the mask's length breaks no more graphs."""
    from torch._dynamo.testing import CompileCounter

    inputs = batch(PROMPTS[:1])
    with torch.no_grad():
        cache = model(**inputs, pixel_values=PIXELS[:1], use_cache=True)[CACHE]
        graphs = {}
        for place in (None, torch.tensor([[inputs["input_ids"].shape[1]]])):
            torch.compiler.reset()
            counter = CompileCounter()
            compiled = torch.compile(model, backend=counter)
            compiled(TOKENS[:1], position_ids=place, **{CACHE: copy.deepcopy(cache)})
            graphs[place is None] = counter.frame_count
    assert graphs[False] <= graphs[True]
