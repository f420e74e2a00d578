"""`positions="original"`: tokens, and what follows them, stand where they stood in the prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES, V5, Family, FamilyOracle
from tiny_models import BOS, CACHE, EVERYTHING, IMAGE, PAD, labels_of
from torch.nn.functional import pad
from transformers import AttentionInterface, StaticCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    prepare_fa_kwargs_from_position_ids,
)

from prumerge_fast.patching.patch import patch
from prumerge_fast.patching.prompt import Placeholders, shrink_prompt
from prumerge_fast.reduction.config import PruMergeConfig

CONFIGS = {
    "attention": PruMergeConfig(positions="original"),
    "raster": PruMergeConfig("prumerge+", order="raster", positions="original"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def llava() -> Family:
    return FAMILIES["LLaVA"]


PLAIN: dict[str, Any] = {}


def plain_of(family: Family) -> Any:
    """Unpatched; to be copied."""
    name = type(family).__name__
    if name not in PLAIN:
        PLAIN[name] = family.model()
    return PLAIN[name]


def patched_copy(family: Family, config: PruMergeConfig, **options: Any) -> Any:
    return patch(copy.deepcopy(plain_of(family)), config, **options)


def oracle_of(family: Family, config: PruMergeConfig) -> FamilyOracle:
    return FamilyOracle(family, plain_of(family), config)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-4)  # logits up to 10


@contextmanager
def standing(model: Any, columns: list[int], end: int) -> Iterator[None]:
    """Whatever a plain model takes its tokens' positions for, they are these; `end` follows."""

    def move(_module: Any, _args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        counted = kwargs["position_ids"]  # of what is left
        table = torch.tensor([*columns, *range(end, end + 100)])
        kwargs["position_ids"] = table[counted]
        cache = kwargs.get(CACHE)
        if kwargs.get("attention_mask") is None and (cache is None or not cache.get_seq_length()):
            kwargs["attention_mask"] = torch.ones_like(counted)  # or gaps would end sequences
        return _args, kwargs

    handle = model.model.language_model.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "ends": {"eos_token_id": list(range(3, 40))},
}


@pytest.mark.parametrize("order", CONFIGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_generate(family: Family, name: str, order: str) -> None:
    """A batch of unequal prompts against single prompts on the plain model."""
    options = {"max_new_tokens": 5, **OPTIONS[name]}
    config, prompts = CONFIGS[order], family.prompts()
    model, oracle = patched_copy(family, config), oracle_of(family, config)
    inputs = family.inputs(prompts)
    output = model.generate(**inputs, **options)
    length, each = inputs["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(output[::each, :length], inputs["input_ids"])
    for row, parts in enumerate(prompts):
        with standing(oracle.model, oracle.columns(parts), len(family.ids(parts))):
            expected = oracle.model.generate(inputs_embeds=oracle.embeds(parts), **options)
        mine = output[each * row : each * (row + 1), length:]
        assert torch.equal(mine[:, : expected.shape[1]], expected), row
        assert (mine[:, expected.shape[1] :] == PAD).all()


def test_samples(llava: Family) -> None:
    config, parts = CONFIGS["attention"], llava.prompts()[2]
    model, oracle = patched_copy(llava, config), oracle_of(llava, config)
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6}
    torch.manual_seed(3)
    output = model.generate(**llava.inputs([parts]), **options)
    torch.manual_seed(3)
    with standing(oracle.model, oracle.columns(parts), len(llava.ids(parts))):
        expected = oracle.model.generate(inputs_embeds=oracle.embeds(parts), **options)
    assert len(expected.unique(dim=0)) > 1
    assert torch.equal(output[:, len(llava.ids(parts)) :], expected)


@torch.no_grad()
def test_positions_matter(family: Family) -> None:
    """That the other tests see a difference."""
    inputs = family.inputs(family.prompts())
    compact, original = (
        patched_copy(family, family.default.replace(positions=positions))(**inputs).logits
        for positions in ("compact", "original")
    )
    assert (compact - original).abs().max() > 0.1


@pytest.mark.parametrize("order", CONFIGS)
def test_later_turns(family: Family, order: str) -> None:
    """From the cache of an answer, and from that of a `forward`."""
    config, parts = CONFIGS[order], max(family.prompts(), key=len)
    model, oracle = patched_copy(family, config), oracle_of(family, config)
    inputs = family.inputs([parts])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    answer = first.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer == oracle.answer(parts, None, 4)
    said = [*answer, 40, 41, 42]
    longer = torch.cat([inputs["input_ids"], torch.tensor([said])], 1)
    of_forward = model(**inputs, use_cache=True)[CACHE]
    for cache in (first[CACHE], of_forward):
        mask = torch.ones_like(longer)  # the answer may hold the padding id
        second = model.generate(longer, attention_mask=mask, **{CACHE: cache}, **options)
        expected = oracle.answer([*parts, said], None, 4)
        assert second.sequences[0, longer.shape[1] :].tolist()[: len(expected)] == expected


@pytest.mark.parametrize("mask", ["as passed", "as pruned", "none"])
@pytest.mark.parametrize("positions", [None, "as passed", "as pruned"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_decoding_by_hand(llava: Family, mask: str, positions: str | None, static: bool) -> None:
    """A loop may count the caller's prompt or what is left of it, in masks and in positions."""
    config, prompts, steps = CONFIGS["attention"], llava.prompts(), 4
    model, oracle = patched_copy(llava, config), oracle_of(llava, config)
    inputs = llava.inputs(prompts)
    long_mask = inputs["attention_mask"]
    counted = None if positions is None else (long_mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    if static:
        options = {} if V5 else {"max_batch_size": 4, "device": "cpu", "dtype": torch.float32}
        cache = StaticCache(config=model.config.text_config, max_cache_len=70, **options)
    outputs = model(**inputs, position_ids=counted, **{CACHE: cache}, use_cache=True)
    cache = outputs[CACHE]
    lengths = torch.tensor([len(oracle.columns(parts)) for parts in prompts])[:, None]
    cached = int(cache.get_seq_length())
    short_mask = (torch.arange(cached) >= cached - lengths).long()
    answers = []
    for _ in range(steps):
        tokens = outputs.logits[:, -1:].argmax(-1)
        answers.append(tokens)
        long_mask, short_mask = (pad(each, (0, 1), value=1) for each in (long_mask, short_mask))
        places = {"as passed": long_mask, "as pruned": short_mask}
        outputs = model(
            tokens,
            attention_mask={**places, "none": None}[mask],
            position_ids=places[positions].sum(1, keepdim=True) - 1 if positions else None,
            **{CACHE: cache},
            use_cache=True,
        )
    for row, parts in zip(torch.cat(answers, 1).tolist(), prompts, strict=True):
        expected = oracle.answer(parts, None, steps)
        assert row[: len(expected)] == expected


REARRANGED = {
    "reorder_cache": (torch.tensor([2, 0, 3, 1]), [2, 0, 3, 1]),
    "batch_select_indices": (torch.tensor([3, 1]), [3, 1]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("name", REARRANGED)
@torch.no_grad()
def test_sequences_of_the_cache_that_are_rearranged(llava: Family, name: str) -> None:
    config, prompts = CONFIGS["attention"], llava.prompts()
    model, oracle = patched_copy(llava, config), oracle_of(llava, config)
    inputs = llava.inputs(prompts)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = copy.deepcopy(model(**inputs, position_ids=places, use_cache=True)[CACHE])
    argument, rows = REARRANGED[name]
    getattr(cache, name)(argument)
    for token in range(2):
        tokens = torch.tensor([[3 + 10 * token + row] for row in rows])
        mask = pad(mask, (0, 1), value=1)
        step = model(
            tokens,
            attention_mask=mask[rows],
            position_ids=mask[rows].sum(1, keepdim=True) - 1,
            **{CACHE: cache},
        ).logits
        for row, logits in zip(rows, step, strict=True):
            said = [3 + 10 * done + row for done in range(token + 1)]
            close(logits[0], oracle.logits([*prompts[row], said], None)[-1])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_of_the_caller(llava: Family, side: str, use_cache: bool) -> None:
    """Tokens have those of their columns, whatever they are."""
    config, prompts = CONFIGS["raster"], llava.prompts()
    model, oracle = patched_copy(llava, config, outputs="shrunk"), oracle_of(llava, config)
    inputs = llava.inputs(prompts, side)
    places = 7 + 2 * (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    outputs = model(**inputs, position_ids=places, use_cache=use_cache)
    for logits, parts in zip(outputs.logits, prompts, strict=True):
        columns = 7 + 2 * torch.tensor([oracle.columns(parts)])
        mask = torch.ones_like(columns)
        embeds = oracle.embeds(parts)
        expected = oracle.model(inputs_embeds=embeds, position_ids=columns, attention_mask=mask)
        found = logits[-columns.shape[1] :] if side == "left" else logits[: columns.shape[1]]
        close(found, expected.logits[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_packed_rows(llava: Family, attention: str, rows: int) -> None:
    """Positions tell their sequences apart, and not the gaps in them."""
    config = CONFIGS["attention"].replace(keep=5)
    plain = llava.model(attention=attention)
    model, oracle = patch(copy.deepcopy(plain), config), FamilyOracle(llava, plain, config)
    prompts = llava.prompts()[:3]  # the last has two images
    flat = [part for parts in prompts for part in parts]
    inputs = llava.inputs([flat] * rows)
    del inputs["attention_mask"]
    places = torch.tensor([[*range(len(llava.ids(parts)))] for parts in prompts[:1]])
    places = torch.cat([torch.arange(len(llava.ids(parts))) for parts in prompts])[None]
    logits = model(**inputs, position_ids=places, use_cache=False).logits
    assert logits.shape[0] == rows
    start = 0
    for parts in prompts:
        length = len(llava.ids(parts))
        expected = oracle.logits(parts, None)[oracle.rows(parts)]
        for row in logits:
            close(row[start : start + length], expected)
        start += length
    everything = patch(model, PruMergeConfig(**EVERYTHING, positions="original"))
    for use_cache in (False, True):  # with one, transformers does not tell them apart
        given = {**inputs, "position_ids": places.expand(rows, -1), "use_cache": use_cache}
        assert torch.equal(everything(**given).logits, plain(**given).logits)


def test_packed_rows_in_training(llava: Family) -> None:
    """Checkpointing turns the cache off, and with it on, sequences would not be told apart."""
    model = patched_copy(llava, CONFIGS["attention"]).train()
    prompts = llava.prompts()[:3]
    inputs = llava.inputs([[part for parts in prompts for part in parts]])
    del inputs["attention_mask"]
    places = torch.cat([torch.arange(len(llava.ids(parts))) for parts in prompts])[None]
    expected = model(**inputs, position_ids=places, use_cache=False).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(model(**inputs, position_ids=places).logits, expected)


def test_packed_rows_and_a_window(llava: Family) -> None:
    model = patched_copy(llava, CONFIGS["attention"])
    model.model.language_model.config.sliding_window = 8
    inputs = llava.inputs([[*llava.prompts()[0], *llava.prompts()[1]]])
    del inputs["attention_mask"]
    half = len(llava.ids(llava.prompts()[0]))
    places = torch.cat([torch.arange(half), torch.arange(inputs["input_ids"].shape[1] - half)])
    with pytest.raises(ValueError, match=r"position_ids: expected one sequence .* to 8 token"):
        model(**inputs, position_ids=places[None], use_cache=False)


def flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention by hand: which tokens are of one sequence it is told as transformers tells."""
    q, k = query.shape[2], key.shape[2]
    sees = torch.ones(q, k, dtype=torch.bool).tril(k - q)[None, None]
    if attention_mask is not None:
        sees = sees & attention_mask[:, None, None, -k:].bool()
    elif cu_seq_lens_q is not None or _is_packed_sequence(position_ids, len(query)):
        ends = cu_seq_lens_q
        if ends is None:
            (ends, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
        assert ends[0] == 0, "tokens in front of the first sequence"
        assert ends[-1] == q == k
        sequence = torch.searchsorted(ends, torch.arange(q), right=True)
        sees = sees & (sequence[:, None] == sequence)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, torch.finfo().min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def flash_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> Any:
    return None if attention_mask is None or attention_mask.all() else attention_mask


@pytest.fixture
def like_flash() -> Any:
    """A patched model whose language model has that attention, and one image in front of all."""
    AttentionInterface.register("flash_by_hand", flash)
    AttentionMaskInterface.register("flash_by_hand", flash_mask)

    def switch(model: Any) -> Any:
        model.model.language_model.config._attn_implementation = "flash_by_hand"
        return model

    return switch


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_flash_attention(llava: Family, like_flash: Any, rows: int, use_cache: bool) -> None:
    config = CONFIGS["attention"]
    model, oracle = like_flash(patched_copy(llava, config)), oracle_of(llava, config)
    # The image comes first: the first position is somewhere, or nowhere, among its tokens.
    prompts = [[("image", 0), [31] * 11], [[BOS, 30], ("image", 2), [5, 6, 7, 8]]][:rows]
    inputs = llava.inputs(prompts)
    for arguments in (inputs, {**inputs, "attention_mask": None}):
        if rows == 2 and arguments["attention_mask"] is None:
            continue
        logits = model(**arguments, use_cache=use_cache).logits
        for row, parts in zip(logits, prompts, strict=True):
            expected = oracle.logits(parts, None)[oracle.rows(parts)]
            close(row[-len(expected) :], expected)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache)
    length = inputs["input_ids"].shape[1]
    for answer, parts in zip(output[:, length:].tolist(), prompts, strict=True):
        expected = oracle.answer(parts, None, 4)
        assert answer[: len(expected)] == expected


@torch.no_grad()
def test_flash_attention_of_packed_rows(llava: Family, like_flash: Any) -> None:
    config, prompts = CONFIGS["attention"], llava.prompts()[:3]
    model, oracle = like_flash(patched_copy(llava, config)), oracle_of(llava, config)
    inputs = llava.inputs([[part for parts in prompts for part in parts]])
    places = torch.cat([torch.arange(len(llava.ids(parts))) for parts in prompts])[None]
    expected = [oracle.logits(parts, None)[oracle.rows(parts)] for parts in prompts]
    for mask in (None, inputs["attention_mask"]):
        given = {**inputs, "attention_mask": mask, "position_ids": places}
        close(model(**given).logits[0], torch.cat(expected))


def test_training(family: Family) -> None:
    """Gradients, without a cache, are those of the loss of prompts one by one."""
    config, prompts = CONFIGS["raster"], family.prompts()
    model, plain = patched_copy(family, config).train(), copy.deepcopy(plain_of(family)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = family.inputs(prompts, "right")
    model(**inputs, labels=labels_of(inputs["input_ids"])).loss.backward()
    oracle, losses = FamilyOracle(family, plain, config), []
    for parts in prompts:
        embeds = oracle.embeds(parts)
        placed = oracle.placed(parts, embeds.shape[1])
        logits = plain(inputs_embeds=embeds, **placed).logits[0, :-1]
        targets = torch.tensor(oracle.labels(parts)[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    every = torch.cat(losses)
    every[every != 0].mean().backward()
    mine, theirs = (
        {name: p.grad for name, p in one.named_parameters() if "language_model.layers" in name}
        for one in (model, plain)
    )
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, atol=2e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_the_inner_model_and_rows_as_computed(llava: Family) -> None:
    config, prompts = CONFIGS["attention"], llava.prompts()
    model, inputs = patched_copy(llava, config), llava.inputs(prompts)
    whole = model(**inputs).logits
    assert torch.equal(model.lm_head(model.model(**inputs).last_hidden_state), whole)


@torch.no_grad()
def test_encoded_pictures(family: Family) -> None:
    """Features that `get_image_features` returned know where they stand."""
    if not V5 or type(family).__name__ == "VideoLlava":
        pytest.skip("no way to pass them back")
    model, prompts = patched_copy(family, CONFIGS["raster"]), family.prompts()
    inputs = family.inputs(prompts)
    encoded = {}
    for kind in family.kinds:
        numbers = [number for _, number in family.pictures(prompts, kind)]
        method = getattr(model, f"get_{kind}_features")
        # The first parameter holds the pixels; its name depends on the version.
        (_, pixels), *others = family.arguments(kind, numbers).items()
        encoded[kind] = method(pixels, **dict(others), return_dict=True)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits
    assert torch.equal(model(**text, mm_encoder_outputs=encoded).logits, expected)
    answer = model.generate(**inputs, max_new_tokens=3)
    again = model.generate(**text, mm_encoder_outputs=encoded, max_new_tokens=3)
    assert torch.equal(again, answer)
    encoded["image"].places = encoded["image"].places[:-1]
    with pytest.raises(ValueError, match="mm_encoder_outputs: expected the places of"):
        model(**text, mm_encoder_outputs=encoded)


def test_text_alone_is_left_to_transformers(llava: Family) -> None:
    """Packed rows, and positions given to `generate`, of a caller without an image."""
    plain, model = plain_of(llava), patched_copy(llava, CONFIGS["attention"])
    ids = torch.tensor([[BOS, 5, 6, 7, BOS, 8, 9]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        given = {"input_ids": ids, "position_ids": places, "use_cache": False}
        assert torch.equal(model(**given).logits, plain(**given).logits)
    given = {"input_ids": ids, "position_ids": places, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**given), plain.generate(**given))


def test_text_alone_within_a_call_with_pictures(llava: Family) -> None:
    """As of a logits processor that asks the model something else."""
    model, inputs = patched_copy(llava, CONFIGS["attention"]), llava.inputs(llava.prompts()[:1])
    text = {"input_ids": torch.tensor([[BOS, 5, 6, 7]]), "max_new_tokens": 3, "do_sample": False}
    options = {**inputs, "max_new_tokens": 3, "do_sample": False}
    alone, expected, answers = model.generate(**text), model.generate(**options), []

    def ask(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answers.append(model.generate(**text))
        return scores

    assert torch.equal(model.generate(**options, logits_processor=[ask]), expected)
    assert len(answers) == 3
    assert all(torch.equal(answer, alone) for answer in answers)


@pytest.mark.parametrize("patched_first", [False, True])
def test_generate_through_peft(llava: Family, patched_first: bool) -> None:
    """Whose wrapper of causal language models prepares inputs by itself."""
    config, inputs = CONFIGS["attention"], llava.inputs(llava.prompts())
    expected = patched_copy(llava, config).generate(**inputs, max_new_tokens=5)
    model = copy.deepcopy(plain_of(llava))
    adapters = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM")
    if patched_first:
        wrapped = get_peft_model(patch(model, config), adapters)
    else:
        wrapped = patch(get_peft_model(model, adapters), config)
    for _ in range(2):
        assert torch.equal(wrapped.eval().generate(**inputs, max_new_tokens=5), expected)


@torch.no_grad()
def test_compiled(llava: Family) -> None:
    config, inputs = CONFIGS["attention"].replace(keep=4), llava.inputs(llava.prompts())
    model = patched_copy(llava, config)
    expected = model(**inputs, use_cache=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    close(compiled(**inputs).logits, expected.logits)
    step = {"input_ids": torch.tensor([[3], [4], [5], [6]])}
    after = model(**step, **{CACHE: copy.deepcopy(expected[CACHE])}).logits
    close(compiled(**step, **{CACHE: expected[CACHE]}).logits, after)


def test_what_is_not_known() -> None:
    model = FAMILIES["LLaVA"].model()
    with pytest.raises(ValueError, match="positions: expected 'compact' or 'original', got 'new'"):
        patch(model, positions="new")
    with pytest.raises(TypeError, match="positions: expected 'compact' or 'original', got None"):
        patch(model, positions=None)


@st.composite
def prompts_with_places(draw: st.DrawFn) -> list[list[Any]]:
    """Rows of pieces: a token of text, or an image, (placeholders, places of its tokens)."""

    def image(count: int) -> Any:
        places = st.lists(st.integers(0, count - 1), max_size=count + 1)
        return places.map(lambda chosen: (count, chosen))

    piece = st.one_of(st.integers(1, 8), st.integers(1, 5).flatmap(image))
    rows = st.lists(st.lists(piece, max_size=5).map(lambda row: [1, *row]), min_size=1, max_size=3)
    return draw(rows)


@given(prompts_with_places(), st.sampled_from(["left", "right"]))
@settings(max_examples=200, deadline=None)
def test_layout_against_lists(rows: list[list[Any]], side: str) -> None:
    long, columns, counts, lengths, places = [], [], [], [], []
    for pieces in rows:
        ids: list[int] = []
        stands: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                stands.append(len(ids))
                ids.append(piece)
            else:
                count, chosen = piece
                stands += [len(ids) + place for place in chosen]
                ids += [IMAGE] * count
                counts.append(count)
                lengths.append(len(chosen))
                places += chosen
        long.append(ids)
        columns.append(stands)
    width, shrunk = max(map(len, long)), max(map(len, columns))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    expected = torch.full((len(rows), shrunk), -1)
    offsets = []
    for row, (tokens, stands) in enumerate(zip(long, columns, strict=True)):
        offset = width - len(tokens) if side == "left" else 0
        start = shrunk - len(stands) if side == "left" else 0
        ids[row, offset : offset + len(tokens)] = torch.tensor(tokens)
        expected[row, start : start + len(stands)] = torch.tensor(stands) + offset
        offsets.append(offset)
    mask = (ids != 0).long()
    images = Placeholders("image", IMAGE, counts, lengths, torch.tensor(places, dtype=torch.long))
    layout = shrink_prompt(ids, mask, [images], padding_side=side)
    assert torch.equal(layout.stands, expected)

    # Columns as positions, padding numbered on from its neighbour; the caller's; and later ones.
    own = layout.columns()
    is_token = expected >= 0
    assert torch.equal(own[is_token], expected[is_token])
    for row, stands in enumerate(columns):
        start = shrunk - len(stands) if side == "left" else 0
        for padding in range(start):
            assert own[row, padding] == max(0, own[row, start] - (start - padding))
        last = start + len(stands) - 1
        for padding in range(last + 1, shrunk):
            limit = max(width, shrunk) - 1
            assert own[row, padding] == min(limit, own[row, last] + padding - last)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    later = mask.sum(1, keepdim=True) + torch.arange(3)
    moved = layout.positions(torch.cat([counted, later], 1))
    assert torch.equal(moved[:, shrunk:], later)
    for row, offset in enumerate(offsets):
        kept = is_token[row]
        assert torch.equal(moved[row, :shrunk][kept], expected[row][kept] - offset)
    assert torch.equal(layout.later_positions(later, 0, of_caller=True), later)
    layout = layout.placed(counted)
    assert torch.equal(layout.next_position, later[:, :1])
    left = is_token.sum(1, keepdim=True) + torch.arange(3)
    held = shrunk + torch.arange(3)[None]
    for done in (0, 1):
        for of_caller in (True, False):
            for seen in (later, left, held):  # the caller's, what is left, the cache's columns
                found = layout.later_positions(seen[:, done:], shrunk + done, of_caller)
                assert torch.equal(found, later[:, done:])
    other = later + 1000
    gone = later[:, :1] - left[:, :1]
    assert torch.equal(layout.later_positions(other, shrunk, of_caller=True), other)
    assert torch.equal(layout.later_positions(other, shrunk, of_caller=False), other + gone)


def test_placeholders_of_a_picture_by_themselves() -> None:
    """One column each, of images and videos alike; what sums up is at the end."""
    ids = torch.tensor([[1, 9, 9, 9, 2, 8, 8, 3]])
    image = Placeholders("image", 9, [3], [2], torch.tensor([2, 2]))
    video = Placeholders("video", 8, [2], [1], torch.tensor([1]))
    layout = shrink_prompt(ids, None, [image, video], padding_side="left")
    assert layout.source.tolist() == [[0, 1, 2, 4, 5, 7]]
    assert layout.stands.tolist() == [[0, 3, 3, 4, 6, 7]]
    assert layout.rows([0, 0]).stands.tolist() == 2 * [[0, 3, 3, 4, 6, 7]]
