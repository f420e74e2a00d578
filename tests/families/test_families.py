"""Every family of transformers, patched, against its unpatched self and prompts pruned by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_families import FAMILIES, FRAMES, V5, Family, FamilyOracle, Part, takes
from tiny_models import (
    BOS,
    CACHE,
    EVERYTHING,
    IMAGE,
    PAD,
    PATCHES,
    VIDEO,
    features_of,
    labels_of,
    lengths_seen,
    same,
    snapshot,
)
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from prumerge_fast.demo import MODEL_DIR, PROMPT
from prumerge_fast.demo.scenes import benchmark
from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.harness.quantisation import quantisation_config
from prumerge_fast.patching.patch import patch, patched, unpatch
from prumerge_fast.reduction.config import PruMergeConfig

CONFIGS = {
    "iqr": PruMergeConfig(),
    "raster": PruMergeConfig(order="raster", neighbours=3),
    "plus": PruMergeConfig("prumerge+"),
    "budget": PruMergeConfig(keep=5, merge="average"),
    "heads": PruMergeConfig(heads="separate"),
    "more tokens than placeholders": PruMergeConfig(keep=1.0),
    "no tokens": PruMergeConfig(fence=1e6, supplement=False),
    "no tokens in rows": PruMergeConfig(fence=1e6, supplement=False, order="raster"),
    "original positions": PruMergeConfig(positions="original"),
    "original positions in rows": PruMergeConfig("prumerge+", order="raster", positions="original"),
    "more, in original positions": PruMergeConfig(keep=1.0, positions="original"),
    "none, in original positions": PruMergeConfig(
        fence=1e6, supplement=False, positions="original", order="raster"
    ),
    "one supplement": PruMergeConfig(keep=3, supplement="image"),
    "one supplement, rows": PruMergeConfig(
        fence=2.5, supplement="image", order="raster", positions="original"
    ),
}


# What says the least beside the others is in `.ci/run`, not in the default test run.
FAMILIES_LATER = ("LLaVA of several layers", "LLaVA-NeXT with SigLIP")
COMPILED = ("LLaVA", "LLaVA-OneVision")  # each takes ten seconds
CONFIGS_FIRST = ("iqr", "plus", "budget", "no tokens", "original positions in rows")
FLAT_FIRST = ("iqr", "budget")


def slow_but(names: Iterable[str], fast: Callable[[str], bool]) -> list[Any]:
    return [name if fast(name) else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", params=slow_but(FAMILIES, lambda name: name not in FAMILIES_LATER))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def plain(family: Family) -> Any:
    return family.model()


@pytest.fixture
def model(plain: Any) -> Any:
    """Unpatched; a copy, because models note their first call."""
    return copy.deepcopy(plain)


def in_dtype(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """With pixels of that dtype, as not all towers take those of another."""
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-4)  # logits up to 10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_keeping_everything_changes_nothing(
    family: Family, model: Any, side: str, dtype: torch.dtype, positions: str
) -> None:
    model.to(dtype)
    inputs = in_dtype(family.inputs(family.prompts(), side), dtype)
    labels = labels_of(inputs["input_ids"])
    expected = model(**inputs, labels=labels)
    actual = patch(model, **EVERYTHING, positions=positions)(**inputs, labels=labels)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    for kind in family.kinds:
        assert torch.equal(features_of(actual, kind), features_of(expected, kind))


def test_autocast(family: Family, model: Any) -> None:
    """Of weights in float32, as trainers have it: the tower, the projector and newlines differ."""
    inputs = family.inputs(family.prompts(), "right")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected = model(**inputs).logits
            actual = patch(model, **EVERYTHING)(**inputs).logits
            assert torch.equal(actual, expected)
            answer = patch(model, family.default).generate(**inputs, max_new_tokens=2)
            assert torch.equal(answer[:, :-2], inputs["input_ids"])
        labels = labels_of(inputs["input_ids"])
        patch(model.train(), family.default)(**inputs, labels=labels).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "layers.0" in name]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", slow_but(CONFIGS, CONFIGS_FIRST.__contains__))
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_equal_single_prompts(
    family: Family, plain: Any, model: Any, side: str, name: str
) -> None:
    oracle, prompts = FamilyOracle(family, plain, CONFIGS[name]), family.prompts()
    inputs = family.inputs(prompts, side)
    outputs = patch(model, CONFIGS[name], outputs="shrunk")(**inputs, use_cache=True)
    expected = [oracle.logits(parts, None) for parts in prompts]
    width = max(map(len, expected))
    assert outputs.logits.shape[1] == width
    assert outputs[CACHE].get_seq_length() == width
    for row, logits in zip(outputs.logits, expected, strict=True):
        close(row[-len(logits) :] if side == "left" else row[: len(logits)], logits)
    pictures = [part for kind in family.kinds for part in family.pictures(prompts, kind)]
    assert model.prumerge.last_lengths == tuple(len(oracle.tokens(part)) for part in pictures)

    patch(model, outputs="caller")
    shown = torch.cat([e[oracle.rows(parts)] for e, parts in zip(expected, prompts, strict=True)])
    mask = inputs["attention_mask"].bool()
    seen = lengths_seen(model)
    whole = model(**inputs)
    close(whole.logits[mask], shown)
    inner = model.model(**inputs)
    assert torch.equal(model.lm_head(inner.last_hidden_state)[mask], whole.logits[mask])
    assert seen == [width, width]


@pytest.mark.parametrize(
    ("side", "positions"),
    [("left", "compact"), ("right", "compact"), ("left", "original"), ("right", "original")],
    ids=["left", "right", "left, original", "right, original"],
)
@torch.no_grad()
def test_loss(family: Family, plain: Any, model: Any, side: str, positions: str) -> None:
    config = family.default.replace(positions=positions)
    oracle, prompts = FamilyOracle(family, plain, config), family.prompts()
    inputs = family.inputs(prompts, side)
    # As in training, without a cache, where transformers looks for packed sequences.
    labels = {"labels": labels_of(inputs["input_ids"]), "use_cache": False}
    loss = patch(model, config)(**inputs, **labels).loss
    losses = []
    for parts in prompts:
        targets = torch.tensor(oracle.labels(parts)[1:])
        each = cross_entropy(oracle.logits(parts, None)[:-1], targets, reduction="none")
        losses += each[targets != -100].tolist()
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
    "repetition": {"repetition_penalty": 3.0},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", OPTIONS)
def test_generate_keeping_everything(family: Family, model: Any, name: str, positions: str) -> None:
    prompts = family.prompts()
    # Without the prompts of several pictures, which transformers 4 mixes up among beams.
    inputs = family.inputs([parts for parts in prompts if len(parts) <= 3])
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, max_new_tokens=5, **OPTIONS[name]))
        if len(outputs) == 1:
            patch(model, **EVERYTHING, positions=positions)
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "name", ["iqr", "raster", "original positions", "original positions in rows"]
)
def test_generate(family: Family, plain: Any, model: Any, name: str) -> None:
    """The prompts as passed, then greedy answers, padded after EOS; pictures in some or none."""
    check_answers(family, plain, patch(model, CONFIGS[name]), family.prompts())


SELECTIONS = {
    "several images": lambda parts: sum(part[0] == "image" for part in parts) > 1,
    "videos": lambda parts: any(part[0] == "video" for part in parts),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_generate_from(family: Family, plain: Any, model: Any, name: str) -> None:
    prompts = [parts for parts in family.prompts() if SELECTIONS[name](parts)]
    if not prompts:
        pytest.skip("the model takes no videos")
    for parts in prompts:
        check_answers(family, plain, patch(model), [parts])


def check_answers(family: Family, plain: Any, model: Any, prompts: list[list[Part]]) -> None:
    oracle = FamilyOracle(family, plain, model.prumerge.config)
    inputs = family.inputs(prompts)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    for answer, parts in zip(output[:, length:].tolist(), prompts, strict=True):
        expected = oracle.answer(parts, None, 6)
        assert answer[: len(expected)] == expected
        assert set(answer[len(expected) :]) <= {PAD}


def test_beams(family: Family, plain: Any, model: Any) -> None:
    oracle, prompts = FamilyOracle(family, plain, family.default), family.prompts()
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    inputs = family.inputs(prompts)
    output = patch(model).generate(**inputs, **options)
    answers = output[:, inputs["input_ids"].shape[1] :]
    for row, parts in enumerate(prompts):
        expected = plain.generate(inputs_embeds=oracle.embeds(parts), **options)
        mine = answers[2 * row : 2 * row + 2]
        assert torch.equal(mine[:, : expected.shape[1]], expected), row
        assert (mine[:, expected.shape[1] :] == PAD).all()


def with_pictures(family: Family) -> Any:
    """A prompt with a picture of each kind."""
    return max(family.prompts(), key=len)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.clone())

    def end(self) -> None:
        self.values.append(torch.tensor([-1]))


def test_streamer(family: Family, model: Any) -> None:
    inputs = family.inputs([with_pictures(family)])
    streamer = Recorder()
    output = patch(model).generate(**inputs, max_new_tokens=4, streamer=streamer)
    assert torch.equal(streamer.values[0], inputs["input_ids"])
    streamed = torch.cat([value.flatten() for value in streamer.values])
    assert torch.equal(streamed, torch.cat([output[0], torch.tensor([-1])]))


def test_max_length_and_later_turns(family: Family, model: Any) -> None:
    inputs = family.inputs([with_pictures(family)])
    length = inputs["input_ids"].shape[1]
    options = {"return_dict_in_generate": True, "eos_token_id": None}
    output = patch(model).generate(**inputs, max_length=length + 3, **options)
    assert output.sequences.shape == (1, length + 3)
    expected = model.generate(**inputs, max_new_tokens=5, **options).sequences
    cache = copy.deepcopy(output[CACHE])
    again = model.generate(output.sequences, **{CACHE: cache}, max_new_tokens=2, **options)
    assert torch.equal(again.sequences, expected)
    placeholder = IMAGE if "video" not in family.kinds else VIDEO
    more = torch.cat([output.sequences, torch.tensor([[placeholder, 4]])], 1)
    with pytest.raises(ValueError, match="expected no image behind"):
        model.generate(more, **{CACHE: output[CACHE]})


@torch.no_grad()
def test_patch_and_unpatch_leave_no_trace(family: Family, model: Any) -> None:
    inputs = family.inputs(family.prompts())
    kind, expected = type(model), model(**inputs)
    before = snapshot(model)  # after a call, which models may note
    patch(model)(**inputs)
    model.generate(**inputs, max_new_tokens=2)
    assert unpatch(model) is model
    assert same(before, snapshot(model))
    assert type(model) is kind
    assert torch.equal(model(**inputs).logits, expected.logits)


def by_name(method: Any, arguments: dict[str, Any], **options: Any) -> Any:
    """Calls it with the pixels, which versions name otherwise, and the rest."""
    pixels, *others = arguments.items()
    return method(pixels[1], **dict(others), **options)


@torch.no_grad()
def test_features(family: Family, plain: Any, model: Any) -> None:
    oracle = FamilyOracle(family, plain, family.default)
    patch(model)
    for kind in family.kinds:
        if not hasattr(model, f"get_{kind}_features"):
            assert (family.model_name, kind) == ("VideoLlava", "video")  # `model.model` has it
            continue
        method = getattr(model, f"get_{kind}_features")
        numbers = [0, 1]
        expected = [oracle.tokens((kind, number)) for number in numbers]
        arguments = family.arguments(kind, numbers)
        output = by_name(method, arguments)
        features = output.pooler_output if V5 else output
        assert isinstance(features, list)
        assert model.prumerge.last_lengths == tuple(map(len, expected))
        for actual, one in zip(features, expected, strict=True):
            torch.testing.assert_close(actual, one, atol=1e-5, rtol=1e-5)
        if V5:
            as_tuple = by_name(method, arguments, return_dict=False)
            assert all(map(torch.equal, as_tuple[-1], features))
        with pytest.raises(TypeError, match="output_attentions"):
            by_name(method, arguments, output_attentions=True)


@torch.no_grad()
def test_encoded_pictures(family: Family, plain: Any, model: Any) -> None:
    """By the patched model; and by the unpatched one, which passes them as they are."""
    if not takes(plain, "mm_encoder_outputs"):
        pytest.skip("the model takes no encoded images in this version of transformers")
    prompts = family.prompts()
    inputs = family.inputs(prompts)
    pixels = {}
    for kind in family.kinds:
        numbers = [number for _, number in family.pictures(prompts, kind)]
        pixels[kind] = family.arguments(kind, numbers)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def encoded(by: Any) -> dict[str, Any]:
        if family.model_name == "VideoLlava":  # the outer model has no method for videos
            by = by.model
        return {
            kind: by_name(getattr(by, f"get_{kind}_features"), pixels[kind], return_dict=True)
            for kind in family.kinds
        }

    of_plain = encoded(plain)
    expected = plain(**inputs).logits
    assert torch.equal(patch(model)(**text, mm_encoder_outputs=of_plain).logits, expected)
    with pytest.raises(ValueError, match=r"pixel_values\w*: expected None together with mm_enc"):
        model(**inputs, mm_encoder_outputs=of_plain)
    if family.model_name == "VideoLlava":
        return
    of_patched = encoded(model)
    assert torch.equal(model(**text, mm_encoder_outputs=of_patched).logits, model(**inputs).logits)
    answer = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(
        model.generate(**text, mm_encoder_outputs=of_patched, max_new_tokens=3), answer
    )


def test_gradients_reach_tower_and_projector(family: Family, model: Any) -> None:
    inputs = family.inputs(family.prompts(), "right")
    patch(model.train())(**inputs, labels=labels_of(inputs["input_ids"])).loss.backward()
    unused = ("v_proj", "out_proj", "mlp", "layer_norm2")
    for name, parameter in model.named_parameters():
        last = "_tower" in name and "layers.3" in name and -1 not in family.layers
        behind = "post_layernorm" in name or "vision_model.head" in name or "tower.head" in name
        if behind or (last and any(u in name for u in unused)):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "k_proj.bias" not in name:  # softmax does not see it, but for the merge's neighbours
            assert parameter.grad.any(), name


def test_lora(family: Family, model: Any) -> None:
    """Patched through PEFT's wrapper; gradients reach the adapters of both halves."""
    inputs = family.inputs(family.prompts(), "right")
    targets = r".*(language_model|_tower)\..*\.[qv]_proj"
    adapters = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(model, adapters).eval()
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        assert torch.equal(patch(wrapped, **EVERYTHING)(**inputs).logits, expected)
    patch(wrapped, PruMergeConfig())(
        **inputs, labels=labels_of(inputs["input_ids"])
    ).loss.backward()
    moved = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert all("lora" in name for name in moved)
    towers = [f"{kind}_tower" for kind in family.kinds]
    for part in ("language_model", *(towers if family.model_name == "VideoLlava" else ["_tower"])):
        first = re.compile(rf"{part}.*layers?\.0\.")
        assert any(map(first.search, moved)), part


@torch.no_grad()
def test_four_bits(family: Family, tmp_path: Any) -> None:
    """A language model in NF4, a tower as it was."""
    pytest.importorskip("bitsandbytes")
    model = family.model(feed_forward=128)  # bitsandbytes' kernel for CPUs takes multiples of 64
    inputs = family.inputs(family.prompts())
    exact = model(**inputs).logits
    model.save_pretrained(tmp_path)
    quantised = type(model).from_pretrained(
        tmp_path,
        quantization_config=quantisation_config(4, torch.float32),
        device_map={"": "cpu"},
    )
    in_four_bits = {
        name for name, m in quantised.named_modules() if type(m).__name__ == "Linear4bit"
    }
    assert len(in_four_bits) == 2 * 7  # the projections of the language model's layers
    assert all("language_model" in name for name in in_four_bits)
    inputs = in_dtype(inputs, family.tower(quantised, "image").dtype)
    expected = quantised(**inputs).logits
    assert (expected - exact).abs().max() > 1e-2
    # The kernel's blocks depend on the number of rows, which rounds sums in another order.
    close(patch(quantised, **EVERYTHING)(**inputs).logits, expected)
    output = patch(quantised, PruMergeConfig()).generate(**inputs, max_new_tokens=2)
    assert torch.equal(output[:, :-2], inputs["input_ids"])


@torch.no_grad()
def test_offloaded(family: Family, model: Any) -> None:
    """Weights brought by accelerate's hooks, module by module."""
    accelerate = pytest.importorskip("accelerate")
    inputs = family.inputs(family.prompts())
    expected = patch(model, order="raster")(**inputs).logits
    accelerate.cpu_offload(unpatch(model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(patch(model, order="raster")(**inputs).logits, expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "family", slow_but(FAMILIES, COMPILED.__contains__), indirect=True, scope="module"
)
def test_compiled(family: Family, model: Any) -> None:
    inputs = family.inputs(family.prompts())
    expected = patch(model, keep=4)(**inputs, use_cache=True)
    step = {"input_ids": torch.full((len(inputs["input_ids"]), 1), 7)}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    first = compiled(**inputs, use_cache=True)
    close(first.logits, expected.logits)
    later = [
        run(**step, attention_mask=mask, **{CACHE: outputs[CACHE]}).logits
        for run, outputs in ((model, expected), (compiled, first))
    ]
    close(*later)


def compiled(tower: Any) -> Any:
    return torch.compile(tower, backend="eager")


def with_lora(tower: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(tower, config).eval()


@pytest.mark.parametrize("wrap", [compiled, with_lora])
@torch.no_grad()
def test_wrapped_towers(family: Family, model: Any, wrap: Any) -> None:
    """Every tower of the model; the wrappers come back untouched."""
    torch.compiler.reset()
    towers = {name: m for name, m in model.model.named_children() if name.endswith("_tower")}
    for name, tower in towers.items():
        setattr(model.model, name, wrap(tower))
    inputs = family.inputs(family.prompts())
    plain = model(**inputs).logits
    before = snapshot(model)
    pruned = patch(model, keep=4)(**inputs).logits
    assert same(before, snapshot(unpatch(model)))
    assert torch.equal(model(**inputs).logits, plain)
    close(patch(model, **EVERYTHING)(**inputs).logits, plain)
    for name, tower in towers.items():
        setattr(model.model, name, tower)  # its layers keep their adapters
    assert torch.equal(patch(model, family.default, keep=4)(**inputs).logits, pruned)


def resized(
    family: Family, kind: str, height: int, width: int, ids: int = 0
) -> tuple[dict[str, Any], int]:
    """A prompt with a picture of that size and `ids` placeholders too many; and its patches."""
    arguments = family.arguments(kind, [0])
    name = next(iter(arguments))
    generator = torch.Generator().manual_seed(0)
    shape = (*arguments[name].shape[:-2], height, width)
    arguments[name] = torch.randn(shape, generator=generator)
    patches = (height // 6) * (width // 6)
    count = patches if kind == "image" else FRAMES * (1 + patches)
    placeholder = IMAGE if kind == "image" else VIDEO
    row = [BOS, 5, *[placeholder] * (count + ids), 6, 7, 8]
    return {"input_ids": torch.tensor([row]), **arguments}, patches


SIZES = {"larger": (48, 36), "smaller": (12, 24), "the tower's": (30, 30)}


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_interpolated_positions(family: Family, model: Any, kind: str, name: str) -> None:
    """N is that of the pixels: of the placeholders, of `keep` as a share, and at most of an int."""
    if kind not in family.kinds or family.cuts or family.takes_any_size:
        pytest.skip("not of this family")
    inputs, patches = resized(family, kind, *SIZES[name])
    option = {"interpolate_pos_encoding": True}
    tower = family.tower(model, kind)
    pixels = inputs[next(iter(family.arguments(kind, [0])))].reshape(-1, 3, *SIZES[name])
    states = tower(pixels, output_hidden_states=True, **option).hidden_states
    hidden = torch.cat([states[layer] for layer in family.layers], -1)
    read = hidden[:, 1:] if kind == "image" and family.class_token else hidden
    features = model.model.multi_modal_projector(read)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, 2:-3] = features.flatten(0, 1)
    expected = model(inputs_embeds=embeds).logits
    own = Version(transformers.__version__) >= Version("5.24")  # whose LLaVA takes it itself
    if kind == "image" and family.model_name == "Llava" and own:
        torch.testing.assert_close(model(**inputs, **option).logits, expected)

    patch(model, **EVERYTHING)
    assert torch.equal(model(**inputs, **option).logits, expected)
    answer = model.generate(**inputs, **option, max_new_tokens=2)
    assert torch.equal(answer[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert int(answer[0, inputs["input_ids"].shape[1]]) == int(expected[0, -1].argmax())

    frames = 1 if kind == "image" else FRAMES
    extra = 0 if kind == "image" else FRAMES  # class tokens
    share = PruMergeConfig(keep=0.4).budget(patches)
    for keep, kept in ((0.4, share), (10, min(10, patches))):
        patch(model, keep=keep)(**inputs, **option)
        assert model.prumerge.last_lengths == (frames * kept + extra,), keep
    fewer, _ = resized(family, kind, *SIZES[name], ids=-1)
    with pytest.raises(ValueError, match=r"features and .* tokens do not match"):
        model(**fewer, **option)


@torch.no_grad()
def test_interpolated_features(model: Any, family: Family) -> None:
    """The placeholders that they say they need are those of their pixels."""
    if family.cuts or family.takes_any_size:
        pytest.skip("not of this family")
    if not V5 and family.model_name != "Llava":
        pytest.skip("the plain method takes no such argument in transformers 4")
    inputs, patches = resized(family, "image", 48, 36)
    ids = {"input_ids": inputs.pop("input_ids")}
    features = patch(model, keep=7).get_image_features
    encoded = by_name(features, inputs, interpolate_pos_encoding=True)
    if takes(model, "mm_encoder_outputs"):
        assert encoded.placeholders.tolist() == [patches]
        again = model(**ids, mm_encoder_outputs={"image": encoded}).logits
        expected = model(**ids, **inputs, interpolate_pos_encoding=True).logits
        assert torch.equal(again, expected)
    assert model.prumerge.last_lengths == (8,)


@pytest.mark.parametrize("value", [False, None, True])
@torch.no_grad()
def test_interpolation_that_changes_nothing(family: Family, model: Any, value: Any) -> None:
    inputs = family.inputs(family.prompts())
    expected = patch(model)(**inputs).logits
    assert torch.equal(model(**inputs, interpolate_pos_encoding=value).logits, expected)
    answers = [
        model.generate(**inputs, max_new_tokens=2, **options)
        for options in ({}, {"interpolate_pos_encoding": value})
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_other_sizes_without_interpolation(family: Family, model: Any, kind: str) -> None:
    """The plain model's own error; of crops and pooled frames, whose grids are fixed, ours."""
    if kind not in family.kinds or family.takes_any_size:
        pytest.skip("no videos, or of any size")
    inputs, _ = resized(family, kind, 48, 36)
    messages = []
    for _ in range(2):
        sizes = r"48\*36.*30\*30|30\*30.*48\*36|size of tensor"
        with pytest.raises((ValueError, RuntimeError), match=sizes) as error:
            model(**inputs)
        messages.append(str(error.value))
        if len(messages) == 1:
            patch(model)
    if family.class_token:
        assert messages[0] == messages[1]
    else:  # PyTorch's, which names no argument
        assert messages[1].startswith("pixel_values: expected the size of this vision tower, 30*30")
    if family.cuts:
        message = "interpolate_pos_encoding: expected crops and frames of 30 x 30 .* got 48 x 36"
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs, interpolate_pos_encoding=True)


@torch.no_grad()
def test_text_alone_passes_as_it_is(family: Family, plain: Any, model: Any) -> None:
    inputs = family.inputs([[[BOS, 5, 6, 7]], [[BOS, 8]]])
    assert torch.equal(patch(model)(**inputs).logits, plain(**inputs).logits)
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds).logits, plain(inputs_embeds=embeds).logits)
    assert model.prumerge.last_lengths is None


@pytest.mark.parametrize("name", slow_but(CONFIGS, FLAT_FIRST.__contains__))
@torch.no_grad()
def test_one_flat_colour(
    family: Family, plain: Any, model: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No patch stands out, or all do; with a budget ties go to the lower index."""
    pixels = family.pixels
    monkeypatch.setattr(
        family, "pixels", lambda kind, number: torch.full_like(pixels(kind, number), 0.3)
    )
    prompts = family.prompts()
    inputs, oracle = family.inputs(prompts), FamilyOracle(family, plain, CONFIGS[name])
    outputs = patch(model, CONFIGS[name])(**inputs)
    for row, parts in zip(outputs.logits, prompts, strict=True):
        expected = oracle.logits(parts, None)[oracle.rows(parts)]
        close(row[-len(expected) :], expected)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == len(inputs["input_ids"])


@pytest.mark.parametrize("heads", ["auto", "joint"])
@torch.no_grad()
def test_attention_that_patches_receive(family: Family, plain: Any, model: Any, heads: str) -> None:
    """Flat, so that a fence keeps little."""
    config = PruMergeConfig(keep=6, scores="received", heads=heads)
    patch(model, config)
    prompts = family.prompts()
    inputs, oracle = family.inputs(prompts), FamilyOracle(family, plain, config)
    for row, parts in zip(model(**inputs).logits, prompts, strict=True):
        expected = oracle.logits(parts, None)[oracle.rows(parts)]
        close(row[-len(expected) :], expected)
    if not family.class_token:
        with pytest.raises(ValueError, match="scores: expected 'auto' or 'received' for a vision"):
            patch(model, scores="class")
        assert model.prumerge.config == config
        return
    by_class = patch(model, scores="class")(**inputs).logits
    assert not torch.allclose(by_class, patch(model, scores="received")(**inputs).logits)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pixels_of_the_wrong_size(family: Family, model: Any, kind: str) -> None:
    if kind not in family.kinds:
        pytest.skip("no videos")
    inputs = family.inputs([parts for parts in family.prompts() if family.pictures([parts], kind)])
    name = next(iter(family.arguments(kind, [0])))
    patch(model)
    with pytest.raises((ValueError, RuntimeError), match="size"):  # InternVL's own of a shape
        model(**inputs | {name: inputs[name][..., 1:]})
    for pixels in (inputs[name][0, ..., 0], inputs[name][0]):
        with pytest.raises(ValueError, match=r"pixel_values|image_sizes|do not match"):
            model(**inputs | {name: pixels})


def test_prompts_that_do_not_fit(family: Family, model: Any) -> None:
    patch(model)
    for kind in family.kinds:
        prompts = [parts for parts in family.prompts() if family.pictures([parts], kind)]
        inputs = family.inputs(prompts)
        placeholder = IMAGE if kind == "image" else VIDEO
        first = (inputs["input_ids"] == placeholder).nonzero()[0]
        fewer = inputs["input_ids"].clone()
        fewer[tuple(first)] = 7
        message = f"{kind.capitalize()} features and {kind} tokens do not match"
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs | {"input_ids": fewer})
            with pytest.raises(ValueError, match="inputs_embeds: expected None"):
                call(**inputs, inputs_embeds=torch.zeros(*fewer.shape, 64))


def test_placeholders_without_pictures(family: Family, model: Any) -> None:
    """A batch of none, as processors and data loaders make them."""
    patch(model)
    for kind in family.kinds:
        prompts = [parts for parts in family.prompts() if family.pictures([parts], kind)]
        inputs = family.inputs(prompts)
        for name in family.arguments(kind, [0]):
            inputs[name] = inputs[name][:0]
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=f"{kind} tokens, and pixel_values.* no {kind}"):
                call(**inputs)


def test_pictures_without_placeholders(family: Family, model: Any) -> None:
    patch(model)
    text = family.inputs([[[BOS, 5, 6, 7]]])
    for kind in family.kinds:
        with pytest.raises(ValueError, match=f"holds 0 {kind} tokens"):
            model(**text, **family.arguments(kind, [1]))


@pytest.mark.parametrize("name", ["vision_feature_layer", "vision_feature_select_strategy"])
def test_overrides_that_cannot_work(family: Family, model: Any, name: str) -> None:
    strategy = "full" if family.class_token else "default"
    option = {name: 5 if name == "vision_feature_layer" else strategy}
    if family.model_name == "VipLlava" and name != "vision_feature_layer":
        pytest.skip("not an option of this family")
    with pytest.raises(TypeError, match=name):
        patch(model)(**family.inputs(family.prompts()), **option)


@torch.no_grad()
def test_other_layers_for_a_call(family: Family, model: Any) -> None:
    if family.model_name == "InternVL" and not V5:
        pytest.skip("the plain model reads the last layer only")
    inputs = family.inputs(family.prompts())
    layers = [layer - 1 for layer in family.layers] if len(family.layers) > 1 else -3
    if len(family.layers) > 1:
        layers = [layers[0], *family.layers[1:]]
    option = {family.layer_argument: layers}
    expected = model(**inputs, **option).logits
    with patched(model, **EVERYTHING):
        assert torch.equal(model(**inputs, **option).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)


def test_saves_the_plain_model(family: Family, model: Any, tmp_path: Any) -> None:
    inputs = family.inputs(family.prompts())
    kind = type(model)
    expected = patch(model)(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind
    assert torch.equal(patch(loaded)(**inputs).logits, expected)
    assert torch.equal(copy.deepcopy(loaded)(**inputs).logits, expected)


PICTURES = {  # height and width; what LLaVA-NeXT has of the grid, newlines included
    "1 x 1": (1, 1, 5 * 7),
    "thin rows": (1, 10_000, 1 * 11),
    "thin columns": (10_000, 1, 5 * 1),  # newlines only
}


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_pictures_of_extreme_shape(family: Family, model: Any, name: str) -> None:
    height, width, grid = PICTURES[name]
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    if family.model_name != "InternVL" and family.takes_any_size and height != width:
        pytest.skip("the processor refuses it")
    pictures = family.processed(Image.fromarray(noise.to(torch.uint8).numpy()))
    placeholders = PATCHES + (grid if "image_sizes" in pictures else 0)
    if family.model_name == "InternVL":
        placeholders = family.placeholders("image", 0)
    elif family.takes_any_size:
        placeholders = int((pictures["image_sizes"] // 6).prod())
    inputs = {"input_ids": torch.tensor([[BOS, *[IMAGE] * placeholders, 5, 6]]), **pictures}
    expected = model(**inputs).logits
    assert torch.equal(patch(model, **EVERYTHING)(**inputs).logits, expected)
    patch(model, family.default)
    assert model(**inputs).logits.isfinite().all()
    assert model.prumerge.last_lengths[0] < max(placeholders, 3)  # one patch and its supplement


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": None}, "image_sizes: expected the height and width of each image"),
        ({"image_sizes": torch.tensor([[60, 60]])}, r"pixel_values: expected crops.*are \[5\]"),
        ({"pixel_values": torch.zeros(5, 3, 30, 30)}, r"are \[5, 3\], got \[5, 3, 30, 30\]"),
        ({"pixel_values": [torch.zeros(5, 3, 30, 30)] * 2}, "pixel_values: expected crops"),
    ],
)
def test_crops_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    family = FAMILIES["LLaVA-NeXT"]
    inputs = family.inputs(family.prompts()[:2])
    with pytest.raises(ValueError, match=message):
        patch(family.model())(**{**inputs, **changes})


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision"])
@torch.no_grad()
def test_crops_in_a_row(name: str) -> None:
    """Crops of all images in one batch, without padding, as the model takes them too."""
    family = FAMILIES[name]
    inputs, model = family.inputs(family.prompts()), patch(family.model())
    expected = model(**inputs).logits
    images = family.pictures(family.prompts(), "image")
    crops = torch.cat([family.pixels(*image) for image in images])
    assert torch.equal(model(**inputs | {"pixel_values": crops}).logits, expected)


class OnDevice(torch.Tensor):
    """Counts how often the host reads it, which waits for a GPU each time."""

    reads: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.__name__ in ("tolist", "item", "__int__", "__bool__", "cpu", "numpy"):
            cls.reads.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision", "LLaVA with Pixtral"])
@torch.no_grad()
def test_sizes_are_read_once(name: str) -> None:
    family = FAMILIES[name]
    inputs, model = family.inputs(family.prompts()), patch(family.model())
    expected = model(**inputs).logits
    names = {"image_sizes", "batch_num_images"} & inputs.keys()
    OnDevice.reads = []
    counted = {name: inputs[name].as_subclass(OnDevice) for name in names}
    assert torch.equal(model(**inputs | counted).logits, expected)
    assert OnDevice.reads == ["tolist"] * len(names)


@pytest.mark.parametrize("order", ["attention", "raster"])
@torch.no_grad()
def test_images_that_are_not_cut_have_their_own_supplement(order: Any) -> None:
    """`supplement="image"` is `True` for them."""
    family = FAMILIES["LLaVA-OneVision"]
    inputs, model = family.inputs([family.prompts()[2]]), family.model()
    patch(model, keep=3, order=order)
    expected = model(**inputs).logits
    assert model.prumerge.last_lengths == (5, 5)
    assert torch.equal(patch(model, supplement="image")(**inputs).logits, expected)


def test_settings_of_onevision() -> None:
    family = FAMILIES["LLaVA-OneVision"]
    for ratio in ("pad", "anyres", "anyres_max_0", "anyres_max_"):
        model = family.model(vision_aspect_ratio=ratio)
        message = f"vision_aspect_ratio: expected 'anyres_max_' .* got '{ratio}'"
        with pytest.raises(UnsupportedModelError, match=message):
            patch(model)
    model = patch(family.model())
    inputs = family.inputs([family.prompts()[2]])
    for several in ([1], [3], [1, 2]):
        changed = {**inputs, "batch_num_images": torch.tensor(several)}
        with pytest.raises(ValueError, match=r"batch_num_images: .* 2 together.*, got \["):
            model(**changed)
    with pytest.raises(ValueError, match=r"vision_aspect_ratio: .* got 'anyres'"):
        model(**inputs, vision_aspect_ratio="anyres")


@torch.no_grad()
def test_another_aspect_ratio_for_a_call() -> None:
    """By it an image is interpolated further, as the plain `get_image_features` does."""
    family = FAMILIES["LLaVA-OneVision"]
    plain, model = family.model(), patch(family.model(), **EVERYTHING)
    arguments = family.arguments("image", [0, 3])
    lengths = []
    for ratio in ("anyres_max_9", "anyres_max_2"):
        found = [
            one.get_image_features(**arguments, vision_aspect_ratio=ratio)
            for one in (plain.model, model.model)
        ]
        expected, actual = (one.pooler_output if V5 else one for one in found)
        assert all(map(torch.equal, actual, expected))
        lengths.append(len(actual[1]))
    assert lengths[0] > lengths[1]


@torch.no_grad()
def test_both_names_of_images() -> None:
    family = FAMILIES["Video-LLaVA"]
    inputs, model = family.inputs(family.prompts()[:1]), patch(family.model())
    expected = model(**inputs).logits
    if "pixel_values" not in inputs:
        pytest.skip("there is only one in this version of transformers")
    pixels = inputs.pop("pixel_values")
    assert torch.equal(model(**inputs, pixel_values_images=pixels).logits, expected)
    with pytest.raises(ValueError, match="pixel_values and pixel_values_images"):
        model(**inputs, pixel_values=pixels, pixel_values_images=pixels)


def test_pipeline() -> None:
    """The demo model as people load models, patched inside their pipeline."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR)
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    [(scene, question)] = benchmark("test", 1)
    image, prompt = scene.render(), PROMPT.format(question=question.text)

    def answer() -> str:
        found = pipe(text=prompt, images=image, max_new_tokens=8, return_full_text=False)
        return found[0]["generated_text"]

    plain = answer()
    assert plain
    with patched(model, **EVERYTHING):
        assert answer() == plain
        assert model.prumerge.last_lengths == (196,)
    with patched(model, keep=64):
        assert answer()
        assert model.prumerge.last_lengths == (65,)
    assert answer() == plain
