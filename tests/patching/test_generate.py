"""`generate` of a patched model keeps the contract of `generate`."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from tiny_models import (
    BOS,
    CACHE,
    EOS,
    EVERYTHING,
    IMAGE,
    OF_PROMPT,
    PAD,
    PATCHES,
    PIXELS,
    PROMPTS,
    VOCAB,
    Oracle,
    batch,
    images,
    prompt,
)
from tiny_models import tiny_llava as fresh_llava
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from prumerge_fast.patching.patch import patch
from prumerge_fast.reduction.config import PruMergeConfig

INPUTS = {**batch(PROMPTS), "pixel_values": PIXELS}
LENGTH = INPUTS["input_ids"].shape[1]
V5 = hasattr(DynamicCache, "activate_past_recording")
# Older versions penalise the padding of the caller's batch like tokens.
PENALTY = inspect.signature(RepetitionPenaltyLogitsProcessor).parameters
LEAVES_PADDING_OUT = "Tensor" in str(PENALTY["prompt_ignore_length"].annotation)
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 1}


@pytest.fixture(scope="module")
def plain() -> LlavaForConditionalGeneration:
    return fresh_llava()


@pytest.fixture(scope="module")
def oracle(plain: LlavaForConditionalGeneration) -> Oracle:
    return Oracle(plain, PruMergeConfig())


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return patch(fresh_llava())


def check_answers(
    output: torch.Tensor, oracle: Oracle, count: int, inputs: dict[str, torch.Tensor] = INPUTS
) -> None:
    """The prompts as passed, then greedy answers, padded after EOS."""
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    for answer, ids, pixels in zip(output[:, length:].tolist(), PROMPTS, OF_PROMPT, strict=True):
        expected = oracle.answer(ids, pixels, count)
        assert answer[: len(expected)] == expected
        assert set(answer[len(expected) :]) <= {PAD}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(
    model: LlavaForConditionalGeneration, oracle: Oracle, side: str, mask: bool, use_cache: bool
) -> None:
    inputs = batch(PROMPTS, side)
    if not mask:  # inferred from the padding id
        del inputs["attention_mask"]
    output = model.generate(
        **inputs, pixel_values=PIXELS, max_new_tokens=8, use_cache=use_cache, do_sample=False
    )
    assert output.shape == (4, LENGTH + 8)
    check_answers(output, oracle, 8, inputs)


def test_without_any_padding_id(model: LlavaForConditionalGeneration, oracle: Oracle) -> None:
    model.generation_config.pad_token_id = None
    ids = torch.tensor(PROMPTS[:1])
    output = model.generate(ids, pixel_values=PIXELS[:1], max_new_tokens=4)
    assert output[0, ids.shape[1] :].tolist() == oracle.answer(PROMPTS[0], PIXELS[:1], 4)


@pytest.mark.parametrize("pad", [EOS, PAD])
def test_padding_id_in_a_prompt(model: LlavaForConditionalGeneration, pad: int) -> None:
    """Without a mask it is padding, unless it is an end of answers as well."""
    model.generation_config.pad_token_id = pad
    inputs = {"input_ids": torch.tensor([prompt([pad] * 9, "image", [5])])}
    inputs["pixel_values"] = PIXELS[:1]
    mask = (inputs["input_ids"] != pad).long()
    if pad == EOS:
        mask = torch.ones_like(mask)
    output, masked, not_masked = (
        model.generate(**inputs, **masks, max_new_tokens=6)
        for masks in ({}, {"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)})
    )
    assert torch.equal(output, masked)
    assert torch.equal(masked, not_masked) == (pad == EOS)


def test_prompt_by_either_name(model: LlavaForConditionalGeneration) -> None:
    ids = INPUTS["input_ids"]
    rest = {"attention_mask": INPUTS["attention_mask"], "pixel_values": PIXELS, "max_new_tokens": 3}
    expected = model.generate(input_ids=ids, **rest)
    assert torch.equal(model.generate(ids, **rest), expected)
    assert torch.equal(model.generate(inputs=ids, **rest), expected)
    with pytest.raises(ValueError, match="inputs and input_ids"):
        model.generate(ids, input_ids=ids, **rest)


def forbidding(banned: int) -> Any:
    def allowed(batch_id: int, sequence: torch.Tensor) -> list[int]:
        return [t for t in range(VOCAB) if t != banned and t != int(sequence[-1])]

    return allowed


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "early stopping": {"num_beams": 2, "early_stopping": True},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "max_length": {"max_new_tokens": None, "max_length": LENGTH + 4},
    "max_length in a config": {
        "max_new_tokens": None,
        "generation_config": GenerationConfig(
            max_length=LENGTH + 4, pad_token_id=PAD, eos_token_id=EOS
        ),
    },
    "default length": {"max_new_tokens": None},
    "min_length": {"min_length": LENGTH + 5, "eos_token_id": list(range(60))},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(60))},
    "several ends": {"eos_token_id": [EOS, *range(3, 40)]},
    "repetition": {"repetition_penalty": 3.0},
    "repetition and beams": {"repetition_penalty": 3.0, "num_beams": 2},
    "n-grams": {"no_repeat_ngram_size": 2},
    "encoder": {"encoder_repetition_penalty": 0.5},
    "encoder n-grams": {"encoder_no_repeat_ngram_size": 1},
    "forced end": {"forced_eos_token_id": 7},
    "decay": {"exponential_decay_length_penalty": (2, 3.0)},
    "suppressed": {"begin_suppress_tokens": list(range(30)), "suppress_tokens": [40, 41]},
    "bad words": {"bad_words_ids": [[9, 10], [3]], "sequence_bias": [[[14, 5], 9.0]]},
    "prefix": {"prefix_allowed_tokens_fn": forbidding(5)},
    "prefix and beams": {"prefix_allowed_tokens_fn": forbidding(5), "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_keeping_everything_changes_no_option(
    plain: LlavaForConditionalGeneration, name: str
) -> None:
    model = patch(copy.deepcopy(plain), **EVERYTHING)
    # Without the prompt of two images, which transformers 4 mixes up among beams.
    inputs = {**batch([PROMPTS[row] for row in (0, 1, 3)]), "pixel_values": PIXELS[:2]}
    options = {"max_new_tokens": 6, **OPTIONS[name]}
    outputs = []
    for one in (plain, model):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs.append(one.generate(**inputs, **copy.deepcopy(options)))
        outputs.append(sorted({str(w.message) for w in caught}))
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[1] == outputs[3]


# What one may leave out when each prompt is run on its own: lengths count that prompt.
PRUNED = [name for name in OPTIONS if "length" not in name and "sampl" not in name]


@pytest.mark.parametrize("name", PRUNED)
def test_options_behind_a_shrunk_prompt(
    plain: LlavaForConditionalGeneration,
    model: LlavaForConditionalGeneration,
    oracle: Oracle,
    name: str,
) -> None:
    """A batch against single prompts, pruned by hand, on the unpatched model."""
    options = {"max_new_tokens": 6, **OPTIONS[name]}
    if name.startswith("encoder"):  # transformers ignores it where it sees embeddings only
        pytest.skip("no way to give it to the unpatched model")
    output = model.generate(**INPUTS, **copy.deepcopy(options))
    returned = options.get("num_return_sequences", 1)
    for row, (ids, pixels) in enumerate(zip(PROMPTS, OF_PROMPT, strict=True)):
        embeds = oracle.embeds(ids, pixels)
        lengths = [len(f) for f in oracle.features(pixels)] if pixels is not None else []
        short = [t for t in ids if t != IMAGE]
        short = [BOS] + [IMAGE] * sum(lengths) + short[1:]
        if ids[-1] == IMAGE or embeds.shape[1] != len(short):
            raise AssertionError("the oracle's prompt is wrong")
        # Only ids near the end and the set of all ids matter to these options.
        expected = plain.generate(
            input_ids=torch.tensor([short]),
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, len(short), dtype=torch.long),
            **copy.deepcopy(options),
        )[:, len(short) :]
        mine = output[row * returned : (row + 1) * returned, LENGTH:]
        assert torch.equal(mine[:, : expected.shape[1]], expected), row
        assert (mine[:, expected.shape[1] :] == PAD).all()


def test_options_that_look_at_the_prompt(model: LlavaForConditionalGeneration) -> None:
    """They see the caller's prompt, as ids: `generate` would warn and ignore them otherwise."""
    options = {"max_new_tokens": 6, "encoder_repetition_penalty": 20.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeating = model.generate(**INPUTS, **options)[:, LENGTH:].tolist()
        new = model.generate(**INPUTS, **options, encoder_no_repeat_ngram_size=1)[:, LENGTH:]
    for ids, answer, other in zip(PROMPTS, repeating, new.tolist(), strict=True):
        assert set(ids) & set(answer)
        assert not set(ids) & set(other)


def test_repetition_penalty_leaves_padding_out_as_before(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    """Padding that pruning adds or moves is no token of the prompt."""
    seen = {}

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.setdefault("scores", scores.clone())
        return scores

    rows = [prompt("image", "image", [5]), prompt([6] * 40)]  # the second is the longer, pruned
    inputs = {**batch(rows), "pixel_values": PIXELS[:2], "max_new_tokens": 1}
    model.generate(**inputs, repetition_penalty=5.0, logits_processor=[look])
    penalised = seen.pop("scores")
    model.generate(**inputs, logits_processor=[look])
    changed = (penalised != seen["scores"]).nonzero().tolist()
    expected = [[0, BOS], [0, 5], [1, BOS], [1, 6]]  # and the image token, whose logit is 0
    if not LEAVES_PADDING_OUT:
        expected.append([1, PAD])
    assert changed == sorted(expected)


def test_max_length_counts_the_callers_prompt(
    model: LlavaForConditionalGeneration, oracle: Oracle
) -> None:
    config = GenerationConfig(max_length=LENGTH + 3, pad_token_id=PAD, eos_token_id=EOS)
    before = config.to_dict()
    for options in ({"max_length": LENGTH + 3}, {"generation_config": config}):
        output = model.generate(**INPUTS, **options)
        assert output.shape == (4, LENGTH + 3)
        check_answers(output, oracle, 3)
    assert config.to_dict() == before
    model.generation_config.max_length = LENGTH + 5
    assert model.generate(**INPUTS).shape == (4, LENGTH + 5)
    assert model.generate(**INPUTS, max_new_tokens=2).shape == (4, LENGTH + 2)
    model.generation_config.max_length = 5  # shorter than the prompt, but not what counts
    assert model.generate(**INPUTS, max_new_tokens=2).shape == (4, LENGTH + 2)
    model.generation_config.max_new_tokens = 1
    assert model.generate(**INPUTS).shape == (4, LENGTH + 1)
    assert model.generation_config.max_length == 5


@pytest.mark.parametrize("limit", [LENGTH, 5])
def test_max_length_below_the_prompt(model: LlavaForConditionalGeneration, limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_length.*prompt's {LENGTH} tokens, got {limit}"):
        model.generate(**INPUTS, max_length=limit)


@pytest.mark.parametrize("extra", [3 - LENGTH, 0, 1, 4])
def test_min_length_counts_the_callers_prompt(
    plain: LlavaForConditionalGeneration, oracle: Oracle, extra: int
) -> None:
    model = patch(copy.deepcopy(plain))
    ends = list(range(VOCAB - 2))
    options = {"max_new_tokens": 8, "eos_token_id": ends, "pad_token_id": PAD}
    output = model.generate(**INPUTS, **options, min_length=LENGTH + extra)
    for row, ids, pixels in zip(output[:, LENGTH:], PROMPTS, OF_PROMPT, strict=True):
        expected = plain.generate(
            inputs_embeds=oracle.embeds(ids, pixels), **options, min_new_tokens=max(extra, 0)
        )[0]
        assert row[: len(expected)].tolist() == expected.tolist()
        assert (row[len(expected) :] == PAD).all()


def test_lengths_of_the_model_behind_a_configuration(model: LlavaForConditionalGeneration) -> None:
    """A configuration that says nothing of them leaves them to the model's."""
    model.generation_config.min_length = LENGTH + 3
    model.generation_config.eos_token_id = list(range(VOCAB - 2))
    output = model.generate(**INPUTS, generation_config=GenerationConfig(num_beams=2))
    assert (output[:, LENGTH : LENGTH + 3] >= VOCAB - 2).all()
    model.generation_config.max_length = LENGTH + 5
    model.generation_config.eos_token_id = None
    output = model.generate(**INPUTS, generation_config=GenerationConfig(num_beams=2))
    assert output.shape[1] == LENGTH + 5


@pytest.mark.skipif(V5, reason="an option of transformers 4")
def test_lengths_of_the_model_that_are_not_to_be_used(model: LlavaForConditionalGeneration) -> None:
    model.generation_config.max_length = LENGTH + 3
    config = GenerationConfig(pad_token_id=PAD)
    output = model.generate(**INPUTS, generation_config=config, use_model_defaults=False)
    assert output.shape[1] == LENGTH + 20


def test_lengths_that_equal_the_default(model: LlavaForConditionalGeneration) -> None:
    """Chosen by the caller, 20 tokens are 20 in all, of which the prompt has fewer."""
    ids = torch.tensor([PROMPTS[0][:2] + [IMAGE] * PATCHES + [5]])  # 28
    with pytest.raises(ValueError, match="max_length: expected more than the prompt's 28 tokens"):
        model.generate(ids, pixel_values=PIXELS[:1], max_length=20)
    removed = PATCHES - len(model.get_image_features(PIXELS[:1])[0])
    config = GenerationConfig(max_length=20 + removed, eos_token_id=None, pad_token_id=PAD)
    if 20 + removed > 28:
        output = model.generate(ids, pixel_values=PIXELS[:1], generation_config=config)
        assert output.shape[1] == 20 + removed


def test_options_set_to_none_override_the_models(model: LlavaForConditionalGeneration) -> None:
    model.generation_config.max_new_tokens = 2
    output = model.generate(**INPUTS, max_new_tokens=None, max_length=LENGTH + 5, eos_token_id=None)
    assert output.shape[1] == LENGTH + 5
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: assisted decoding"):
        model.generate(**INPUTS)
    output = model.generate(**INPUTS, prompt_lookup_num_tokens=None)
    assert output.shape[1] <= LENGTH + 2


@pytest.mark.parametrize("beams", [1, 3])
def test_dictionaries(
    plain: LlavaForConditionalGeneration,
    model: LlavaForConditionalGeneration,
    oracle: Oracle,
    beams: int,
) -> None:
    options = {
        "max_new_tokens": 5,
        "num_beams": beams,
        "num_return_sequences": beams,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    output = model.generate(**INPUTS, **options)
    assert torch.equal(
        output.sequences[:, :LENGTH], INPUTS["input_ids"].repeat_interleave(beams, 0)
    )
    assert output[CACHE].get_seq_length() == output.hidden_states[0][0].shape[1] + 4
    assert output[CACHE].get_seq_length() < LENGTH
    mine = model.compute_transition_scores(
        output.sequences, output.scores, getattr(output, "beam_indices", None)
    )
    for row, (ids, pixels) in enumerate(zip(PROMPTS, OF_PROMPT, strict=True)):
        rows = slice(row * beams, (row + 1) * beams)
        alone = plain.generate(inputs_embeds=oracle.embeds(ids, pixels), **options)
        width = alone.sequences.shape[1]
        assert torch.equal(output.sequences[rows, LENGTH:][:, :width], alone.sequences)
        indices = getattr(alone, "beam_indices", None)
        theirs = plain.compute_transition_scores(alone.sequences, alone.scores, indices)
        torch.testing.assert_close(mine[rows, : theirs.shape[1]], theirs, atol=1e-3, rtol=1e-4)
        if beams > 1:
            mine_at = output.beam_indices[rows][:, : indices.shape[1]]
            assert torch.equal(mine_at, indices + row * beams * (indices >= 0))
            torch.testing.assert_close(
                output.sequences_scores[rows], alone.sequences_scores, atol=1e-4, rtol=1e-4
            )


def test_samples(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    oracle = Oracle(plain, PruMergeConfig())
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6}
    torch.manual_seed(3)
    output = model.generate(torch.tensor(PROMPTS[2:3]), pixel_values=PIXELS[2:], **options)
    torch.manual_seed(3)
    expected = plain.generate(inputs_embeds=oracle.embeds(PROMPTS[2], PIXELS[2:]), **options)
    assert len(expected.unique(dim=0)) > 1
    assert torch.equal(output[:, len(PROMPTS[2]) :], expected)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_the_callers_prompt_first(model: LlavaForConditionalGeneration) -> None:
    streamer = Recorder()
    ids = torch.tensor(PROMPTS[:1])
    output = model.generate(ids, pixel_values=PIXELS[:1], max_new_tokens=4, streamer=streamer)
    assert torch.equal(streamer.values[0], ids)
    assert torch.equal(torch.cat([v.flatten() for v in streamer.values]), output[0])
    assert streamer.ended == 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_callbacks_see_the_callers_prompt(
    model: LlavaForConditionalGeneration, options: dict[str, Any]
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"processor": [], "criterion": [], "prefix": []}

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen["processor"].append(ids)
        return scores

    def criterion(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        seen["criterion"].append(ids)
        return torch.full((len(ids),), ids.shape[1] == LENGTH + 3)

    def prefix(_: int, ids: torch.Tensor) -> list[int]:
        seen["prefix"].append(ids[None])
        return list(range(VOCAB))

    output = model.generate(
        **INPUTS,
        max_new_tokens=6,
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([criterion]),
        prefix_allowed_tokens_fn=prefix,
        **options,
    )
    assert output.shape[1] == LENGTH + 3
    for calls in seen.values():
        assert calls[0].shape[1] in (LENGTH, LENGTH + 1)
        for ids in calls:
            if len(ids) > 1:
                expected = INPUTS["input_ids"].repeat_interleave(len(ids) // 4, 0)
                assert torch.equal(ids[:, :LENGTH], expected)
            else:
                assert (ids[0, :LENGTH] == INPUTS["input_ids"]).all(1).any()


def test_custom_counters_count_the_callers_prompt(model: LlavaForConditionalGeneration) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=LENGTH + 2)])
    output = model.generate(**INPUTS, max_new_tokens=6, stopping_criteria=criteria)
    assert output.shape[1] == LENGTH + 2
    ends = list(range(VOCAB - 2))
    processors = LogitsProcessorList([MinLengthLogitsProcessor(LENGTH + 3, ends)])
    output = model.generate(
        **INPUTS, max_new_tokens=6, logits_processor=processors, eos_token_id=ends
    )
    assert (output[:, LENGTH : LENGTH + 3] >= VOCAB - 2).all()
    assert len(criteria) == len(processors) == 1


@pytest.mark.parametrize("made_by", ["generate", "caller"])
def test_static_cache(
    plain: LlavaForConditionalGeneration,
    model: LlavaForConditionalGeneration,
    oracle: Oracle,
    made_by: str,
) -> None:
    cache: dict[str, Any] = {"cache_implementation": "static"}
    if made_by == "caller":
        options = {} if V5 else {"max_batch_size": 4, "device": "cpu", "dtype": torch.float32}
        config = plain.config.text_config
        cache = {CACHE: StaticCache(config=config, max_cache_len=30, **options)}
    output = model.generate(**INPUTS, max_new_tokens=6, return_dict_in_generate=True, **cache)
    check_answers(output.sequences, oracle, 6)
    assert output[CACHE].layers[0].keys.shape[2] <= 30
    assert LENGTH > 30


def conversation(
    output: torch.Tensor, mask: torch.Tensor, more: list[list[int]]
) -> dict[str, torch.Tensor]:
    ids = torch.cat([output, torch.tensor(more)], 1)
    later = torch.ones(len(more), ids.shape[1] - mask.shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, later], 1)}


@pytest.mark.parametrize("images_again", [True, False])
@pytest.mark.parametrize("cache_by", ["output", "caller"])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
def test_later_turns(
    model: LlavaForConditionalGeneration,
    oracle: Oracle,
    images_again: bool,
    cache_by: str,
    rows: list[int],
) -> None:
    inputs = batch([PROMPTS[row] for row in rows])
    pixels = PIXELS if len(rows) > 1 else PIXELS[:1]
    own = {CACHE: DynamicCache()} if cache_by == "caller" else {}
    # No answer ends before the others: what follows EOS is padding, which would be attended to.
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    first = model.generate(
        **inputs, pixel_values=pixels, return_dict_in_generate=True, **own, **options
    )
    sequences, mask, cache = first.sequences, inputs["attention_mask"], first[CACHE]
    length = inputs["input_ids"].shape[1]
    spoken = [[] for _ in rows]
    for turn in range(2):
        more = [[40 + row, 50 + turn] for row in range(len(rows))]
        inputs = conversation(sequences, mask, more)
        again = {"pixel_values": pixels} if images_again else {}
        held = cache.get_seq_length()
        output = model.generate(**inputs, **again, **{CACHE: cache}, **options)
        assert cache.get_seq_length() == held + 3 + 2
        assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        for row, number in enumerate(rows):
            spoken[row] = output[row, length : inputs["input_ids"].shape[1]].tolist()
            whole = PROMPTS[number] + spoken[row]
            expected = oracle.answer(whole, OF_PROMPT[number], 3)
            if EOS not in expected:
                assert output[row, inputs["input_ids"].shape[1] :].tolist() == expected
        sequences, mask = output, inputs["attention_mask"]


def test_later_turns_that_cannot_go_on(model: LlavaForConditionalGeneration) -> None:
    options = {"max_new_tokens": 3, "return_dict_in_generate": True}
    first = model.generate(**INPUTS, **options)
    cache, mask = first[CACHE], INPUTS["attention_mask"]
    new_image = conversation(first.sequences, mask, [[IMAGE] * PATCHES + [5]] * 4)
    with pytest.raises(ValueError, match=f"expected no image behind the tokens in {CACHE}"):
        model.generate(**new_image, pixel_values=images(8), **{CACHE: cache})
    short = {key: value[:, :20] for key, value in new_image.items()}
    with pytest.raises(ValueError, match="expected the whole conversation, more than the"):
        model.generate(**short, **{CACHE: cache})
    ids, ones = new_image["input_ids"][:, -1:], new_image["attention_mask"]
    with pytest.raises(ValueError, match="expected the whole conversation"):
        model.generate(ids, attention_mask=ones, **{CACHE: cache})
    text = conversation(first.sequences, mask, [[40]] * 4)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: assisted decoding"):
        model.generate(**text, **{CACHE: cache}, prompt_lookup_num_tokens=2)
    assert model.generate(**text, **{CACHE: cache}, max_new_tokens=2).shape[1] == LENGTH + 6

    prefix = model.generate(torch.tensor([PROMPTS[3]]), **options)
    row = torch.cat([prefix.sequences, torch.tensor([[IMAGE] * PATCHES + [5]])], 1)
    with pytest.raises(ValueError, match=f"{CACHE}: expected an empty cache"):
        model.generate(row, pixel_values=PIXELS[:1], **{CACHE: prefix[CACHE]})


def test_a_failing_later_turn_leaves_the_cache_usable(model: LlavaForConditionalGeneration) -> None:
    first = model.generate(**INPUTS, max_new_tokens=3, return_dict_in_generate=True)
    text = conversation(first.sequences, INPUTS["attention_mask"], [[40]] * 4)
    expected = model.generate(**text, **{CACHE: copy.deepcopy(first[CACHE])}, max_new_tokens=3)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**text, **{CACHE: first[CACHE]}, nonsense=1)
    again = model.generate(**text, **{CACHE: first[CACHE]}, max_new_tokens=3)
    assert torch.equal(again, expected)


def test_a_failing_first_turn_leaves_the_cache_usable(model: LlavaForConditionalGeneration) -> None:
    """It holds the shrunk prompt, which later turns have to know of."""

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError

    cache, options = DynamicCache(), {"max_new_tokens": 3, "min_new_tokens": 3}
    ids = torch.tensor(PROMPTS[:1])
    text = torch.cat([ids, torch.tensor([[40]])], 1)
    expected = model.generate(text, pixel_values=PIXELS[:1], **options)
    with pytest.raises(KeyError):
        model.generate(ids, pixel_values=PIXELS[:1], **{CACHE: cache}, logits_processor=[fail])
    assert 0 < cache.get_seq_length() < ids.shape[1]
    assert torch.equal(model.generate(text, **{CACHE: cache}, **options), expected)


def test_later_turns_of_several_samples(model: LlavaForConditionalGeneration) -> None:
    """The cache then holds each prompt several times."""
    ids = torch.tensor(PROMPTS[:1])
    first = model.generate(
        ids,
        pixel_values=PIXELS[:1],
        return_dict_in_generate=True,
        do_sample=True,
        num_return_sequences=2,
        min_new_tokens=3,
        max_new_tokens=3,
    )
    rows = torch.cat([first.sequences, torch.tensor([[40], [41]])], 1)
    output = model.generate(rows, **{CACHE: first[CACHE]}, **GREEDY)
    for row, ids in zip(output, rows, strict=True):
        expected = model.generate(ids[None], pixel_values=PIXELS[:1], **GREEDY)
        assert torch.equal(row, expected[0])


@pytest.mark.skipif(not V5, reason="continuous batching of transformers 4 needs a GPU")
def test_processors_for_others_are_left_alone(model: LlavaForConditionalGeneration) -> None:
    """`generate_batch` asks for them with the configuration alone."""
    config = GenerationConfig(do_sample=True, top_k=5)
    found = model._get_logits_processor(config)
    assert [type(one).__name__ for one in found] == ["TopKLogitsWarper"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_text_alone_passes_as_it_is(
    plain: LlavaForConditionalGeneration,
    model: LlavaForConditionalGeneration,
    options: dict[str, Any],
) -> None:
    inputs = {"input_ids": torch.tensor([PROMPTS[3]])}
    expected = plain.generate(**inputs, max_new_tokens=5, **options)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, **options), expected)
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    if "prompt_lookup_num_tokens" not in options:
        expected = plain.generate(inputs_embeds=embeds, max_new_tokens=5, **options)
        again = model.generate(inputs_embeds=embeds, max_new_tokens=5, **options)
        assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: assisted decoding"),
        ({"assistant_model": "a model"}, "assistant_model: assisted decoding"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size: prefilling in chunks"),
        ({"token_healing": True}, "token_healing"),
        ({"return_legacy_cache": True}, "return_legacy_cache: a cache as a tuple"),
        ({"cache_implementation": "paged"}, "cache_implementation.*paged"),
        ({"position_ids": torch.zeros(4, 9)}, "position_ids: expected the shape of input_ids"),
        ({CACHE: ()}, f"{CACHE}: expected a Cache or None"),
        ({"custom_generate": "some/repository"}, "custom_generate: expected a callable"),
        ({"inputs_embeds": torch.zeros(4, LENGTH, 64)}, "inputs_embeds: expected None"),
        ({"attention_mask": torch.ones(4, 9)}, "attention_mask: expected the shape of input_ids"),
        ({"pixel_values": PIXELS[:3]}, "image tokens do not match"),
        ({"nonsense": 3}, "nonsense"),
    ],
)
def test_what_does_not_work_says_so(
    model: LlavaForConditionalGeneration, options: dict[str, Any], message: str
) -> None:
    inputs = {**INPUTS, "max_new_tokens": 2}
    expected = model.generate(**inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, **options})
    assert torch.equal(model.generate(**inputs), expected)
    with pytest.raises(ValueError, match="input_ids: expected a tensor"):
        model.generate(pixel_values=PIXELS)


@pytest.mark.skipif(not V5, reason="transformers 4 does not count them up")
def test_positions_of_the_caller(model: LlavaForConditionalGeneration) -> None:
    mask = INPUTS["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    expected = model.generate(**INPUTS, max_new_tokens=5)
    output = model.generate(**INPUTS, position_ids=positions, max_new_tokens=5)
    assert torch.equal(output, expected)


def test_decoding_loop_of_the_caller(model: LlavaForConditionalGeneration) -> None:
    def loop(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        assert input_ids.shape[1] < LENGTH
        return type(model)._sample(model, input_ids, **options)

    expected = model.generate(**INPUTS, max_new_tokens=4)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=4, custom_generate=loop), expected)


@pytest.mark.parametrize("returned", [dict, tuple])
def test_decoding_loops_that_return_something_else(
    model: LlavaForConditionalGeneration, returned: type
) -> None:
    message = f"custom_generate: expected it to return ids .* got {returned.__name__}"
    with pytest.raises(ValueError, match=message):
        model.generate(**INPUTS, custom_generate=lambda *_args, **_options: returned())


def test_keeps_no_gradients(model: LlavaForConditionalGeneration) -> None:
    tracked = []
    model.model.multi_modal_projector.register_forward_hook(
        lambda _module, _args, output: tracked.append(output.requires_grad)
    )
    model.generate(**INPUTS, max_new_tokens=2)
    assert tracked == [False]
