"""`forward` of a patched model, against an unpatched one run on prompts pruned by hand."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
from tiny_models import (
    BOS,
    CACHE,
    EVERYTHING,
    IMAGE,
    OF_PROMPT,
    PATCHES,
    PIXELS,
    PROMPTS,
    Oracle,
    batch,
    features_of,
    images,
    labels_of,
    prompt,
    tiny_llava,
)
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache

from prumerge_fast.patching.patch import patch, unpatch
from prumerge_fast.reduction.config import PruMergeConfig

CONFIGS = {
    "iqr": PruMergeConfig(),
    "plus": PruMergeConfig("prumerge+"),
    "budget": PruMergeConfig(keep=5, merge="average"),
    "more tokens than placeholders": PruMergeConfig(keep=1.0, supplement=True),
    "no tokens": PruMergeConfig(fence=1e6, supplement=False),
}
V5 = hasattr(DynamicCache, "activate_past_recording")


@pytest.fixture(scope="module")
def plain() -> LlavaForConditionalGeneration:
    return tiny_llava()


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return patch(tiny_llava())


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)  # logits up to 10


@pytest.mark.parametrize("side", ["left", "right", "unpadded"])
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)],
)
@torch.no_grad()
def test_keeping_everything_changes_nothing(side: str, attention: str, dtype: torch.dtype) -> None:
    model = tiny_llava(attention=attention).to(dtype)
    if side == "unpadded":
        inputs = {"input_ids": torch.tensor([PROMPTS[0], prompt("image", [3] * 12)])}
        inputs["pixel_values"] = PIXELS[:2]
    else:
        inputs = {**batch(PROMPTS, side), "pixel_values": PIXELS}
    labels = labels_of(inputs["input_ids"])
    expected = model(**inputs, labels=labels)
    actual = patch(model, **EVERYTHING)(**inputs, labels=labels)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(features_of(actual), features_of(expected))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_equal_single_prompts(
    plain: LlavaForConditionalGeneration, side: str, name: str
) -> None:
    oracle = Oracle(plain, CONFIGS[name])
    model = patch(tiny_llava(), CONFIGS[name], outputs="shrunk")
    inputs = batch(PROMPTS, side)
    outputs = model(**inputs, pixel_values=PIXELS, use_cache=True)
    expected = [oracle.logits(*pair) for pair in zip(PROMPTS, OF_PROMPT, strict=True)]
    width = max(map(len, expected))
    assert outputs.logits.shape[1] == width
    assert outputs[CACHE].get_seq_length() == width
    for row, logits in zip(outputs.logits, expected, strict=True):
        close(row[-len(logits) :] if side == "left" else row[: len(logits)], logits)
    features = oracle.features(PIXELS)
    assert model.prumerge.last_lengths == tuple(map(len, features))
    torch.testing.assert_close(features_of(outputs), torch.cat(features))

    patch(model, outputs="caller")
    pairs = zip(expected, PROMPTS, OF_PROMPT, strict=True)
    shown = torch.cat([logits[oracle.rows(ids, pixels)] for logits, ids, pixels in pairs])
    outputs = model(**inputs, pixel_values=PIXELS, use_cache=True)
    assert outputs[CACHE].get_seq_length() == width
    close(outputs.logits[inputs["attention_mask"].bool()], shown)


@torch.no_grad()
def test_images_of_unequal_lengths_without_a_mask(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    rows = [prompt("image", [3, 4, 5, i]) for i in range(6, 12)]
    pixel_values = images(6, seed=5)
    outputs = model(input_ids=torch.tensor(rows), pixel_values=pixel_values)
    assert len(set(model.prumerge.last_lengths)) > 1
    oracle = Oracle(plain, PruMergeConfig())
    for row, ids, pixels in zip(outputs.logits, rows, pixel_values, strict=True):
        close(row, oracle.logits(ids, pixels[None])[oracle.rows(ids, pixels[None])])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_loss(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration, side: str
) -> None:
    inputs = batch(PROMPTS, side)
    labels = labels_of(inputs["input_ids"])
    loss = model(**inputs, pixel_values=PIXELS, labels=labels).loss
    oracle = Oracle(plain, PruMergeConfig())
    losses = []
    for ids, pixels in zip(PROMPTS, OF_PROMPT, strict=True):
        logits = oracle.logits(ids, pixels)
        lengths = [len(f) for f in oracle.features(pixels)] if pixels is not None else []
        targets, column = [], 0
        while column < len(ids):  # the shrunk labels, by hand
            if ids[column] == IMAGE:
                targets += [-100] * lengths.pop(0)
                column += PATCHES
            else:
                targets.append(-100 if ids[column] == BOS else ids[column])
                column += 1
        each = cross_entropy(logits[:-1], torch.tensor(targets[1:]), reduction="none")
        losses += each[torch.tensor(targets[1:]) != -100].tolist()
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("labelled", ["words", "image tokens too"])
@torch.no_grad()
def test_loss_by_the_trainers_count(model: LlavaForConditionalGeneration, labelled: str) -> None:
    """`Trainer` counts labels as passed, of all batches of a step; here of two that are alike."""
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if labelled == "words":
        labels[labels == IMAGE] = -100
    loss = model(**inputs, labels=labels).loss
    count = 2 * (labels[:, 1:] != -100).sum()
    halved = model(**inputs, labels=labels, num_items_in_batch=count).loss
    assert float(halved) == pytest.approx(float(loss) / 2, rel=1e-5)
    assert float(model(**inputs, labels=labels.fill_(-100), num_items_in_batch=count).loss) == 0


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_loss_of_a_batch_is_that_of_its_prompts(
    model: LlavaForConditionalGeneration, side: str
) -> None:
    """With labels for every word, the first among them, which nothing predicts."""
    rows = [prompt("image", [3, 4, 5, i]) for i in range(6, 9)]
    inputs = {**batch(rows, side), "pixel_values": images(3, seed=5)}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    loss = model(**inputs, labels=labels).loss
    assert len(set(model.prumerge.last_lengths)) > 1
    each = [
        float(model(ids[None], pixel_values=pixels[None], labels=label[None]).loss)
        for ids, pixels, label in zip(
            inputs["input_ids"], inputs["pixel_values"], labels, strict=True
        )
    ]  # of as many words each
    assert float(loss) == pytest.approx(sum(each) / 3, rel=1e-4)


@torch.no_grad()
def test_types_of_tokens_shrink_with_the_prompt(model: LlavaForConditionalGeneration) -> None:
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    types = (inputs["input_ids"] == IMAGE).long() + 1
    used: dict[str, Any] = {}
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: used.update(kwargs), with_kwargs=True
    )
    model(**inputs, token_type_ids=types, mm_token_type_ids=types)
    mask = used["attention_mask"]
    assert torch.equal(used["token_type_ids"] > 0, mask.bool())
    assert int((used["token_type_ids"] == 2).sum()) == sum(model.prumerge.last_lengths)
    assert torch.equal(used["token_type_ids"], used["mm_token_type_ids"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast(backend: str) -> None:
    model = tiny_llava()
    inputs = {**batch(PROMPTS, "right"), "pixel_values": PIXELS}
    inputs["labels"] = labels_of(inputs["input_ids"])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs)
        everything = patch(model, **EVERYTHING, backend=backend)(**inputs)
        assert torch.equal(everything.logits, expected.logits)
        pruned = patch(model, PruMergeConfig())(**inputs)
        del inputs["labels"]
        model.generate(**inputs, max_new_tokens=2)
    pruned.loss.backward()
    assert model.model.vision_tower.get_parameter(_query_weight(model)).grad.any()


def _query_weight(model: LlavaForConditionalGeneration) -> str:
    names = dict(model.model.vision_tower.named_parameters())
    return next(name for name in names if name.endswith("layers.3.self_attn.q_proj.weight"))


@torch.no_grad()
def test_images_in_a_list(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(PROMPTS)
    expected = model(**inputs, pixel_values=PIXELS).logits
    for pixels in (list(PIXELS), list(PIXELS.split(1)), [PIXELS[:3], PIXELS[3]]):
        assert torch.equal(model(**inputs, pixel_values=pixels).logits, expected)
    one = torch.tensor(PROMPTS[:1])
    assert torch.equal(
        model(one, pixel_values=PIXELS[0]).logits, model(one, pixel_values=PIXELS[:1]).logits
    )


@torch.no_grad()
def test_no_images_in_a_batch_of_images(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    text = {"input_ids": torch.tensor([PROMPTS[3]])}
    for empty in (PIXELS[:0], []):
        assert torch.equal(model(**text, pixel_values=empty).logits, plain(**text).logits)
        model.generate(**text, pixel_values=empty, max_new_tokens=2)
        of_one = {"input_ids": torch.tensor(PROMPTS[:1]), "pixel_values": empty}
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"do not match.*25 image tokens, .* no image"):
                call(**of_one)


@torch.no_grad()
def test_a_cache_used_again(model: LlavaForConditionalGeneration) -> None:
    options = {} if V5 else {"max_batch_size": 1, "device": "cpu", "dtype": torch.float32}
    cache = StaticCache(config=model.config.text_config, max_cache_len=60, **options)
    model(torch.tensor(PROMPTS[:1]), pixel_values=PIXELS[:1], **{CACHE: cache})
    cache.reset()
    ids = torch.tensor([[BOS, *range(3, 50)]])  # longer than the pruned prompt
    expected = model(ids).logits
    first = model(ids[:, :40], **{CACHE: cache}).logits
    places = torch.arange(40, ids.shape[1])[None]
    rest = model(ids[:, 40:], **{CACHE: cache}, position_ids=places).logits
    close(torch.cat([first, rest], 1), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_tower(checkpointing: bool) -> None:
    model = patch(tiny_llava()).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch(PROMPTS, "right")
    model(**inputs, pixel_values=PIXELS, labels=inputs["input_ids"]).loss.backward()
    unused = ("v_proj", "out_proj", "mlp", "layer_norm2")
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name or ("layers.3" in name and any(u in name for u in unused)):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "k_proj.bias" not in name:  # softmax does not see it, but for the merge's neighbours
            assert parameter.grad.any(), name


def test_gradients_equal_those_of_the_model_itself() -> None:
    inputs = {**batch(PROMPTS, "right"), "pixel_values": PIXELS}
    inputs["labels"] = labels_of(inputs["input_ids"])
    model = tiny_llava().train()
    model(**inputs).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    patch(model, **EVERYTHING)(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@torch.no_grad()
def test_positions_of_the_caller(model: LlavaForConditionalGeneration) -> None:
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**inputs).logits
    used = {}
    model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: used.update(kwargs), with_kwargs=True
    )
    for given in (positions, positions + 7):
        actual = model(**inputs, position_ids=given).logits
        mask = used["attention_mask"]
        shift = int(given.min())
        counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0) + shift * mask
        assert torch.equal(used["position_ids"], counted)
        real = inputs["attention_mask"].bool()
        close(actual[real], expected[real])  # rotary embeddings are relative


@torch.no_grad()
def test_last_logits_only(model: LlavaForConditionalGeneration) -> None:
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    assert torch.equal(model(**inputs, logits_to_keep=3).logits, model(**inputs).logits[:, -3:])
    patch(model, outputs="shrunk")
    assert torch.equal(model(**inputs, logits_to_keep=3).logits, model(**inputs).logits[:, -3:])
    with pytest.raises(ValueError, match="logits_to_keep: expected an int"):
        model(**inputs, logits_to_keep=torch.tensor([3]))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_some_columns(model: LlavaForConditionalGeneration, side: str) -> None:
    """The caller's columns, of which one row of the head stands for many."""
    inputs = {**batch(PROMPTS, side), "pixel_values": PIXELS}
    every = model(**inputs).logits
    computed: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[1]))
    width = every.shape[1]
    for columns in (1, 30, width, width + 9, [3], [7, 3, 3, -1], list(range(width))):
        given = columns if isinstance(columns, int) else torch.tensor(columns)
        index = slice(-columns, None) if isinstance(columns, int) else columns
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = model(**inputs, logits_to_keep=given).logits
        close(actual, every[:, index])
    shrunk = max(model.prumerge.last_lengths) + width - PATCHES
    assert max(computed) <= shrunk < width


@pytest.mark.parametrize("logits_to_keep", [0, 3])
@torch.no_grad()
def test_answers_padded_on_the_right_of_prompts(
    plain: LlavaForConditionalGeneration, logits_to_keep: int
) -> None:
    """As when rewards are learnt: prompts padded on the left, answers on the right."""
    rows = [prompt([30], "image", [31] * 3), prompt([5], "image", [8]), prompt("image", [4] * 9)]
    answers = batch([[40, 41], [50], [60, 61]], "right")  # without BOS
    inputs = {name: torch.cat([value, answers[name]], 1) for name, value in batch(rows).items()}
    inputs["pixel_values"] = PIXELS[:3]
    options = {"logits_to_keep": logits_to_keep}
    mask = inputs["attention_mask"][:, -logits_to_keep:].bool()
    expected = plain(**inputs, **options).logits
    everything = patch(tiny_llava(), **EVERYTHING)(**inputs, **options).logits
    assert torch.equal(everything[mask], expected[mask])
    pruned = patch(tiny_llava())(**inputs, **options).logits[:, -3:]
    oracle = Oracle(plain, PruMergeConfig())
    for row, (ids, answer) in enumerate(zip(rows, ([40, 41], [50], [60, 61]), strict=True)):
        logits = oracle.logits([*ids, *answer], PIXELS[row : row + 1])[-len(answer) - 1 :]
        close(pruned[row, : len(answer) + 1], logits)


@torch.no_grad()
def test_packed_rows(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    """Sequences of a row are told apart by positions that begin anew."""
    parts = [prompt([30], "image", [31] * 3), prompt("image", [4, 5, 6, 7])]
    ids = torch.tensor([parts[0] + parts[1]])
    positions = torch.tensor([[*range(len(parts[0])), *range(len(parts[1]))]])
    pixels = images(4, seed=3)
    logits = model(ids, pixel_values=pixels[:2], position_ids=positions, use_cache=False).logits
    oracle = Oracle(plain, PruMergeConfig())
    expected = oracle.logits(parts[1], pixels[1:2])[oracle.rows(parts[1], pixels[1:2])]
    close(logits[0, -len(parts[1]) :], expected)
    two = {"input_ids": ids.repeat(2, 1), "position_ids": positions.repeat(2, 1)}
    with pytest.raises(ValueError, match=r"position_ids: .*pack into one row, or set keep"):
        model(**two, pixel_values=pixels, use_cache=False)
    patch(model, keep=5)
    assert model(**two, pixel_values=pixels, use_cache=False).logits.shape[0] == 2


@torch.no_grad()
def test_steps_behind_padding_on_the_right(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    inputs = batch([*PROMPTS[:2], PROMPTS[3]], "right")
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first = model(**inputs, pixel_values=PIXELS[:2], position_ids=positions, use_cache=True)
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    step = model(
        torch.tensor([[3], [4], [5]]),
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        **{CACHE: first[CACHE]},
    )
    oracle = Oracle(plain, PruMergeConfig())
    for row, token, number in ((0, 3, 0), (1, 4, 1), (2, 5, 3)):
        expected = oracle.logits([*PROMPTS[number], token], OF_PROMPT[number])
        close(step.logits[row, 0], expected[-1])


@torch.no_grad()
def test_tuples_and_positional_arguments(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(PROMPTS)
    expected = model(**inputs, pixel_values=PIXELS)
    actual = model(inputs["input_ids"], PIXELS, inputs["attention_mask"], return_dict=False)
    assert isinstance(actual, tuple)
    assert torch.equal(actual[0], expected.logits)
    features = actual[-1] if isinstance(actual[-1], torch.Tensor) else torch.cat(actual[-1][0])
    assert torch.equal(features, features_of(expected))


@torch.no_grad()
def test_image_features(
    plain: LlavaForConditionalGeneration, model: LlavaForConditionalGeneration
) -> None:
    oracle = Oracle(plain, PruMergeConfig())
    for layer in (-2, -3):
        output = model.get_image_features(PIXELS, layer)
        features = output.pooler_output if V5 else output
        assert isinstance(features, list)
        expected = oracle.features(PIXELS, layer)
        assert model.prumerge.last_lengths == tuple(map(len, expected))
        for actual, one in zip(features, expected, strict=True):
            torch.testing.assert_close(actual, one)
        plain_form = model.get_image_features(PIXELS, layer, return_dict=False)
        assert all(map(torch.equal, plain_form[-1] if V5 else plain_form, features))
    with pytest.raises(TypeError, match=r"get_image_features.*do_rescale"):
        model.get_image_features(PIXELS, do_rescale=True)


@pytest.mark.skipif(not V5, reason="transformers 4 does not take encoded images")
@torch.no_grad()
def test_encoded_images(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(PROMPTS)
    first = model(**inputs, pixel_values=PIXELS)
    expected = first.logits
    encoded = {"image": model.get_image_features(PIXELS)}
    assert torch.equal(model(**inputs, mm_encoder_outputs=encoded).logits, expected)
    if "image_outputs" in first:  # from 5.24 on
        returned = {"image": first.image_outputs}
        assert torch.equal(model(**inputs, mm_encoder_outputs=returned).logits, expected)
    answers = model.generate(**inputs, pixel_values=PIXELS, max_new_tokens=4)
    again = model.generate(**inputs, mm_encoder_outputs=encoded, max_new_tokens=4)
    assert torch.equal(answers, again)
    with pytest.raises(ValueError, match="pixel_values: expected None"):
        model(**inputs, pixel_values=PIXELS, mm_encoder_outputs=encoded)

    # As hooks and containers rebuild outputs, of their fields.
    rebuilt = {"image": type(encoded["image"])(dict(encoded["image"]))}
    assert torch.equal(model(**inputs, mm_encoder_outputs=rebuilt).logits, expected)
    mapped = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, encoded)
    assert torch.equal(model(**inputs, mm_encoder_outputs=mapped).logits, expected)
    again = pickle.loads(pickle.dumps(encoded))
    assert torch.equal(model(**inputs, mm_encoder_outputs=again).logits, expected)

    for other, message in (
        (model.get_image_features(PIXELS, return_dict=False), "expected an output .* got tuple"),
        (dataclasses.replace(encoded["image"], pooler_output=[PIXELS[0, 0]]), "each of 1 images"),
    ):
        with pytest.raises(ValueError, match=f"mm_encoder_outputs: .*{message}"):
            model(**inputs, mm_encoder_outputs={"image": other})

    none = {"image": model.get_image_features(PIXELS[:0])}
    text = {"input_ids": torch.tensor([PROMPTS[3]])}
    assert torch.equal(model(**text, mm_encoder_outputs=none).logits, model(**text).logits)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"100 image tokens, and mm_encoder_outputs no image"):
            call(**inputs, mm_encoder_outputs=none)


@torch.no_grad()
def test_text_alone_passes_as_it_is(plain: LlavaForConditionalGeneration) -> None:
    model = patch(tiny_llava())
    inputs = batch([prompt([5, 6, 7]), prompt([8])])
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds).logits, plain(inputs_embeds=embeds).logits)
    assert model.prumerge.last_lengths is None


def bad(**changes: Any) -> dict[str, Any]:
    return {**batch(PROMPTS), "pixel_values": PIXELS, **changes}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (bad(pixel_values=PIXELS[:3]), "image tokens do not match.*100 image tokens, expected 75"),
        (bad(input_ids=batch(PROMPTS)["input_ids"].clamp(max=8)), "do not match"),
        (bad(input_ids=None), "input_ids: expected a tensor.*NoneType"),
        (bad(inputs_embeds=torch.zeros(4, 9, 64)), "inputs_embeds: expected None"),
        (bad(attention_mask=torch.ones(4, 9)), "attention_mask: expected the shape of input_ids"),
        (bad(attention_mask={"full": None}), "attention_mask: .*got dict"),
        (bad(shift_labels=torch.zeros(4, 9)), "shift_labels: expected None"),
        (bad(cu_seq_lens_q=torch.zeros(4)), "cu_seq_lens_q: .*pass position_ids"),
        (bad(image_sizes=torch.zeros(4, 2)), "image_sizes: expected None"),
        (bad(pixel_values=torch.zeros(4, 3, 9, 9)), "size"),
        (bad(pixel_values=torch.zeros(2, 2, 3, 30, 30)), r"pixel_values: .*got \[2, 2, 3, 30, 30"),
        (bad(pixel_values=[PIXELS[0], PIXELS[0, :, 1:]]), r"pixel_values: .*\[3, 29, 30\]\]"),
        (bad(labels=torch.zeros(4, 9)), r"labels: expected the shape of input_ids.*got \[4, 9\]"),
        (bad(labels=[[1]]), "labels: expected the shape of input_ids.*got list"),
        (bad(position_ids=torch.zeros(3, 9)), "position_ids: expected the shape of input_ids"),
        (bad(position_ids=torch.zeros(1, 9)), "position_ids: expected the shape of input_ids"),
        (bad(**{CACHE: ()}), f"{CACHE}: expected a Cache or None.*got tuple"),
    ],
)
def test_bad_inputs(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    "option", [{"vision_feature_layer": 9}, {"vision_feature_select_strategy": "full"}]
)
def test_overrides_that_cannot_work(
    model: LlavaForConditionalGeneration, option: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=next(iter(option))):
        model(**batch(PROMPTS), pixel_values=PIXELS, **option)


def test_values_that_are_not_finite(model: LlavaForConditionalGeneration) -> None:
    pixel_values = PIXELS.clone()
    pixel_values[1] = torch.nan
    outputs = model(**batch(PROMPTS), pixel_values=pixel_values)
    assert outputs.logits[0, -1].isfinite().all()
    assert outputs.logits[1, -1].isnan().all()


@pytest.mark.parametrize("mask", ["as passed", "as pruned", "none"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_decoding_by_hand(
    plain: LlavaForConditionalGeneration,
    model: LlavaForConditionalGeneration,
    mask: str,
    positions: bool,
    static: bool,
) -> None:
    steps, inputs = 5, batch(PROMPTS)
    long_mask = inputs["attention_mask"]
    counted = (long_mask.cumsum(1) - 1).clamp(min=0) if positions else None
    cache: Any = None
    if static:
        options = {} if V5 else {"max_batch_size": 4, "device": "cpu", "dtype": torch.float32}
        cache = StaticCache(config=plain.config.text_config, max_cache_len=40, **options)
    outputs = model(
        **inputs,
        pixel_values=PIXELS,
        position_ids=counted,
        **{CACHE: cache},
        use_cache=True,
    )
    cache = outputs[CACHE]
    cached = int(cache.get_seq_length())
    assert cached < 30
    ones = torch.ones(4, 1, dtype=torch.long)
    kept = [len(f) for f in Oracle(plain, PruMergeConfig()).features(PIXELS)]
    gone = PATCHES * torch.tensor([1, 1, 2, 0])
    gone -= torch.tensor([kept[0], kept[1], kept[2] + kept[3], 0])
    short_mask = (torch.arange(cached) >= cached - (long_mask.sum(1) - gone)[:, None]).long()
    answers = []
    for _ in range(steps):
        tokens = outputs.logits[:, -1:].argmax(-1)
        answers.append(tokens)
        long_mask = torch.cat([long_mask, ones], 1)
        short_mask = torch.cat([short_mask, ones], 1)
        step = {"as passed": long_mask, "as pruned": short_mask, "none": None}[mask]
        place = short_mask if mask == "as pruned" else long_mask
        outputs = model(
            input_ids=tokens,
            attention_mask=step,
            position_ids=place.sum(1, keepdim=True) - 1 if positions else None,
            **{CACHE: cache},
            use_cache=True,
        )
    oracle = Oracle(plain, PruMergeConfig())
    for row, ids, pixels in zip(torch.cat(answers, 1).tolist(), PROMPTS, OF_PROMPT, strict=True):
        expected = oracle.answer(ids, pixels, steps)
        assert row[: len(expected)] == expected


@torch.no_grad()
def test_a_step_in_other_terms(model: LlavaForConditionalGeneration) -> None:
    """Embeddings for ids, and where the caller's prompt ends."""
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    length = inputs["input_ids"].shape[1]
    first = model(**inputs, use_cache=True)
    place = {"cache_position": torch.arange(length)}
    assert torch.equal(model(**inputs, **place).logits, first.logits)
    tokens = torch.tensor([[3], [4], [5], [6]])
    expected = model(tokens, **{CACHE: copy.deepcopy(first[CACHE])}).logits
    for step in (
        {"inputs_embeds": model.get_input_embeddings()(tokens)},
        {"input_ids": tokens, "cache_position": torch.tensor([length])},
    ):
        cache = copy.deepcopy(first[CACHE])
        assert torch.equal(model(**step, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("counted", ["tokens", "columns"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_positions_in_the_callers_terms_or_in_the_caches(
    model: LlavaForConditionalGeneration, counted: str, masked: bool
) -> None:
    """A loop may count its own prompt or what the cache holds, with or without a mask."""
    prompts = PROMPTS if masked else [PROMPTS[0], prompt("image", [3] * 12)]
    inputs = batch(prompts) if masked else {"input_ids": torch.tensor(prompts)}
    pixels, mask = PIXELS[: 4 if masked else 2], inputs.get("attention_mask")
    rows, length = inputs["input_ids"].shape
    positions = None
    if counted == "tokens":
        ones = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        positions = (ones.cumsum(1) - 1).clamp(min=0)
    first = model(**inputs, pixel_values=pixels, position_ids=positions, use_cache=True)
    cache = first[CACHE]
    cached = int(cache.get_seq_length())
    assert cached < length
    caller = torch.full((1, 1), length) if positions is None else positions[:, -1:] + 1
    kept = iter(model.prumerge.last_lengths)
    pictures = [ids.count(IMAGE) // PATCHES for ids in prompts]
    gone = torch.tensor([[sum(PATCHES - next(kept) for _ in range(n))] for n in pictures])
    for step in range(3):
        tokens = torch.full((rows, 1), 3 + step)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        given = {"input_ids": tokens, "attention_mask": mask}
        answers = []
        for own in (False, True):
            place = caller + step
            if own and positions is None:
                place = torch.full((1, 1), cached + step)
            elif own:
                place = place - gone
            again = copy.deepcopy(cache)
            answers.append(model(**given, position_ids=place, **{CACHE: again}).logits)
        assert torch.equal(*answers)
        if positions is None:  # which the model counts alike by itself
            alone = copy.deepcopy(cache)
            assert torch.equal(model(**given, **{CACHE: alone}).logits, answers[0])
        model(**given, position_ids=place, **{CACHE: cache})


@torch.no_grad()
def test_the_older_name_of_the_cache(model: LlavaForConditionalGeneration) -> None:
    """Which transformers 5.24 renamed and still takes."""
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    expected, cache = model(**inputs, use_cache=True), DynamicCache()
    first = model(**inputs, past_key_values=cache)
    assert torch.equal(first.logits, expected.logits)
    tokens = torch.tensor([[3], [4], [5], [6]])
    step = model(tokens, **{CACHE: expected[CACHE]})
    assert torch.equal(model(tokens, past_key_values=cache).logits, step.logits)
    ids = torch.cat([inputs["input_ids"], tokens, torch.tensor([[40]] * 4)], 1)
    options = {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)}
    options.update(max_new_tokens=3, do_sample=False)
    held = copy.deepcopy(cache)
    answers = model.generate(ids, **options, **{CACHE: expected[CACHE]})
    assert torch.equal(model.generate(ids, **options, past_key_values=cache), answers)
    if CACHE == "cache":  # which `generate` also takes by a third name
        assert torch.equal(model.generate(ids, **options, cache_params=held), answers)
    with pytest.raises(ValueError, match=f"{CACHE}: expected an empty cache"):
        model(**inputs, past_key_values=cache)


@torch.no_grad()
def test_caches_that_do_not_fit(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(PROMPTS)
    cache = model(**inputs, pixel_values=PIXELS, use_cache=True)[CACHE]
    step = {"input_ids": torch.ones(4, 1, dtype=torch.long), CACHE: cache}
    with pytest.raises(ValueError, match=f"{CACHE}: expected an empty cache"):
        model(**inputs, pixel_values=PIXELS, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"attention_mask: expected \[4, \d+\], as the prompt"):
        model(**step, attention_mask=torch.ones(4, 5))
    with pytest.raises(ValueError, match="cache of 3 sequences, got one of 4"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), **{CACHE: cache})
    cache.crop(4 - int(cache.get_seq_length()))
    with pytest.raises(ValueError, match="got one of length 4"):
        model(**step)


@torch.no_grad()
def test_compiled() -> None:
    model = patch(tiny_llava(), keep=4)
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    expected = model(**inputs).logits
    close(torch.compile(model, backend="eager")(**inputs).logits, expected)
    text = {"input_ids": torch.tensor([PROMPTS[3]])}  # and so every step of decoding
    whole = torch.compile(model, backend="eager", fullgraph=True)
    close(whole(**text).logits, model(**text).logits)


@torch.no_grad()
def test_calls_do_not_depend_on_earlier_ones(model: LlavaForConditionalGeneration) -> None:
    inputs = {**batch(PROMPTS), "pixel_values": PIXELS}
    text = batch([PROMPTS[3]])
    expected, of_text = model(**inputs).logits, model(**text).logits
    with pytest.raises(ValueError, match="do not match"):
        model(**batch(PROMPTS), pixel_values=PIXELS[:2])
    model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert torch.equal(model(**text).logits, of_text)
    assert torch.equal(model(**inputs).logits, expected)
    assert unpatch(model) is model
