"""The evaluation: its policies, its measures against closed forms, and the command."""

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal
from safetensors.torch import load_file, save_file

from prumerge_fast import PruMergeConfig, patched
from prumerge_fast.cli import main
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.errors import PictureError
from prumerge_fast.evaluation import fingerprint, metrics, policies, run, stored
from prumerge_fast.harness import inputs, provenance
from prumerge_fast.harness.inputs import Item
from prumerge_fast.harness.models import load
from prumerge_fast.harness.prompts import prepare
from prumerge_fast.reduction.reading import Reading

BUDGET = 16


@pytest.fixture(scope="module")
def demo():
    return load(MODEL_DIR, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def items():
    return items_from_demo(10)


@pytest.fixture(scope="module")
def compared(demo):
    return policies.methods([BUDGET], demo.patches)


@pytest.fixture(scope="module")
def chosen(compared):
    return compared.policies


@pytest.fixture(scope="module")
def answered(demo, items, chosen):
    return run.answer_batch(demo, items, chosen, max_new_tokens=8)


# Policies


POSITIONS = ("compact", "original")


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        ("all tokens", None),
        ("PruMerge, adaptive", PruMergeConfig()),
        ("PruMerge+, adaptive", PruMergeConfig(variant="prumerge+")),
        ("PruMerge (16)", PruMergeConfig(keep=15)),
        ("PruMerge+, raster order (16)", PruMergeConfig("prumerge+", keep=15, order="raster")),
        ("attention top-k (16)", PruMergeConfig(keep=16, merge="none", supplement=False)),
        ("attention top-k + merge (16)", PruMergeConfig(keep=16, supplement=False)),
        ("PruMerge, weighted average (16)", PruMergeConfig(keep=15, merge="average")),
    ],
)
def test_answers_are_those_of_the_model_itself(demo, items, answered, policy, config):
    """What comes from shared features is what `generate` says, plain or patched."""
    inputs = prepare(demo, items)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if config is None:
        ids = demo.model.generate(**inputs, **options)
    else:
        with patched(demo.model, config):
            ids = demo.model.generate(**inputs, **options)
            assert list(demo.model.prumerge.last_lengths) == answered["tokens"][policy]
    new = ids[:, inputs["input_ids"].shape[1] :]
    texts = demo.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert [text.strip() for text in texts] == answered["texts"][policy]


def test_a_policy_has_its_own_positions(demo, items):
    """Which are the model's business: the tokens are the same."""
    config = PruMergeConfig(keep=15, order="raster", positions="original")
    chosen = [policies.Policy(each, None, config.replace(positions=each)) for each in POSITIONS]
    answered = run.answer_batch(demo, items, chosen, max_new_tokens=8)
    inputs = prepare(demo, items)
    for policy in chosen:
        with patched(demo.model, policy.config):
            ids = demo.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = demo.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        assert [text.strip() for text in texts] == answered["texts"][policy.name]


def test_every_method_spends_its_budget(chosen, answered):
    assert len({policy.name for policy in chosen}) == len(chosen)
    fixed = [policy for policy in chosen if policy.budget is not None]
    assert [policy.method for policy in fixed] == list(policies.METHODS)
    for policy in fixed:
        assert set(answered["tokens"][policy.name]) == {BUDGET}


@pytest.mark.parametrize("class_token", [True, False])
def test_policies_of_scores(class_token):
    """Every score of a tower at every budget, with the pairs that are there."""
    found = policies.scorings([5, 9], 25, class_token=class_token)
    names = [policy.name for policy in found.policies]
    assert len(set(names)) == len(names) == 1 + 2 * 2 * (7 if class_token else 5)
    assert any("class" in name for name in names) == class_token
    for one, other in found.pairs:
        assert {f"{one} (5)", f"{other} (9)"} <= set(names)
    configs = {policy.name: policy.config for policy in found.policies}
    first = configs["PruMerge+, received, separate (5)"]
    assert (first.scores, first.heads, first.capacity(25)) == ("received", "separate", 5)
    assert configs["PruMerge, raster order, original positions (9)"].positions == "original"
    assert len(found.pairs) == (10 if class_token else 6)
    with pytest.raises(ValueError, match="tokens: expected 2 to N = 25"):
        policies.scorings([26], 25, class_token=class_token)


def test_policies_hand_over_the_tokens_that_they_choose(chosen):
    hidden = torch.arange(2 * 26.0).reshape(2, 26, 1)  # 5 x 5 patches
    given = Reading(torch.ones(2, 1), torch.ones_like(hidden), hidden, 1, class_token=True)
    found = {
        policy.method: policy.reduction(["a", "b"])(given, policy.config, "auto").split()
        for policy in policies.methods([4], 25).policies
        if policy.method in (policies.ALL_TOKENS, policies.RANDOM, policies.EVEN)
    }
    assert torch.equal(torch.stack(found[policies.ALL_TOKENS]), hidden[:, 1:])
    for image, name in enumerate("ab"):
        drawn = policies.random_patches(25, 4, name)
        assert found[policies.RANDOM][image][:, 0].tolist() == [26 * image + 1 + p for p in drawn]
    assert found[policies.EVEN][0][:, 0].tolist() == [1 + p for p in (6, 8, 16, 18)]


@pytest.mark.parametrize("side", [5, 14, 24])
def test_even_patches_are_distinct_and_cover_the_image(side):
    for count in range(1, side**2 + 1):
        found = policies.even_patches(side**2, count)
        assert len(set(found)) == count
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < side**2
        rows, columns = np.divmod(found, side)
        # The centre of gravity is the image's, nearly.
        assert abs(rows.mean() - (side - 1) / 2) <= 0.11 * side
        assert abs(columns.mean() - (side - 1) / 2) <= 0.11 * side


def test_random_patches_follow_from_the_name_alone_and_are_uniform():
    assert policies.random_patches(196, 9, "x") == policies.random_patches(196, 9, "x")
    assert policies.random_patches(196, 9, "x") != policies.random_patches(196, 9, "y")
    counts = np.bincount(
        np.concatenate([policies.random_patches(25, 5, str(i)) for i in range(2000)]), minlength=25
    )
    assert (abs(counts - 400) < 5 * math.sqrt(400)).all()


# Measures


def test_exact_match_is_normalised():
    found = metrics.exact_match([["Red.", "two"], ["blue", " the 2 "]], ["red", "2"])
    assert found.numerator.tolist() == [[1, 0], [0, 1]]
    assert found.value().tolist() == [0.5, 0.5]


def test_pope_by_hand():
    answers = ["Yes, it is.", "No", "There is no dog.", "yes", "It is. Not sure", "not there"]
    expected = ["yes", "no", "yes", "no", "Yes.", "no"]
    assert [metrics.says_yes(a) for a in answers] == [True, False, False, True, True, False]
    measures = metrics.pope([[*answers, "Yes!", "no, no"]], [*expected, "no", "no"])
    # Two hits, two false alarms, one miss, three right rejections.
    assert {name: measure.value().tolist() for name, measure in measures.items()} == {
        "accuracy": [5 / 8],
        "precision": [2 / 4],
        "recall": [2 / 3],
        "f1": pytest.approx([4 / 7]),
        "yes_ratio": [4 / 8],
    }
    never = metrics.pope([["no", "no"]], ["yes", "no"])
    assert math.isnan(never["precision"].value()[0])
    assert never["f1"].value().tolist() == [0.0]
    assert [metrics.is_yes_no(a) for a in ("Yes.", "no", "red")] == [True, True, False]


def test_intervals_are_those_of_the_normal_approximation():
    rng = np.random.default_rng(1)
    correct = (rng.random((2, 900)) < [[0.3], [0.8]]).astype(float)
    measure = metrics.Measure(correct, np.ones_like(correct))
    resamples = measure.resampled([str(i) for i in range(900)])
    for p, share in enumerate(measure.value()):
        margin = 1.96 * math.sqrt(share * (1 - share) / 900)
        low, high = metrics.interval(resamples[:, p])
        assert low == pytest.approx(share - margin, abs=0.15 * margin)
        assert high == pytest.approx(share + margin, abs=0.15 * margin)


def test_intervals_are_of_images_and_paired():
    rng = np.random.default_rng(2)
    right = np.repeat((rng.random(100) < 0.5).astype(float), 9)  # nine alike questions an image
    images = [f"image {i // 9}" for i in range(900)]
    worse = right.copy()
    worse[:9] = 1 - worse[:9]  # differs in one image only
    measure = metrics.Measure(np.stack([right, worse]), np.ones((2, 900)))
    resamples = measure.resampled(images)
    low, high = metrics.interval(resamples[:, 0])
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)  # as of 100 questions, not 900
    low, high = metrics.interval(resamples[:, 0] - resamples[:, 1])
    assert high - low < 0.05


def test_parts_of_a_measure_share_resamples():
    measure = metrics.Measure(np.asarray([[1.0, 0, 1, 1]]), np.ones((1, 4)))
    asked = np.asarray([True, True, False, False])
    images = ["a", "b", "a", "b"]
    first, second = (measure.only(mask).resampled(images) for mask in (asked, ~asked))
    assert measure.only(asked).value() == 0.5
    # Where the first half has drawn `a` alone, so has the second.
    assert set(first[:, 0].tolist()) == {0, 0.5, 1}
    assert set(second[:, 0].tolist()) == {1}
    assert np.allclose(measure.resampled(images), (first + second) / 2)


def said(texts, tokens):
    """Answers that were given now."""
    return run.Answers(texts, tokens, (stored.now(), stored.now()), 0)


def test_scores_by_kind_and_pair(compared, chosen, items):
    """Policies that are right on known questions get known figures."""
    names = [policy.name for policy in chosen]
    right = [item.expected for item in items]
    wrong = ["no" if answer == "yes" else "yes" for answer in right]
    texts = dict.fromkeys(names, wrong)
    texts[f"{policies.PRUMERGE} ({BUDGET})"] = right
    texts[policies.ALL_TOKENS] = right[:5] + wrong[5:]
    tokens = {name: [3] * len(items) for name in names}
    result = run.score(items, compared, said(texts, tokens))
    rows = result["policies"]
    assert result["questions"] == {"overall": 10} | dict.fromkeys(
        ["existence", "colour", "shape", "count", "position"], 2
    )
    assert rows["PruMerge (16)"]["accuracy"]["overall"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert rows["all tokens"]["accuracy"]["colour"]["value"] == 0.5
    assert rows["random (16)"]["pope"]["accuracy"]["value"] == 0.0
    assert rows["random (16)"]["visual_tokens"] == 3.0
    paired = {(row["policy"], row["against"], row["kind"]): row for row in result["paired"]}
    assert paired["PruMerge (16)", "random (16)", "shape"]["value"] == 1.0
    assert paired["PruMerge (16)", "attention top-k + merge (16)", "overall"]["value"] == 1.0
    assert paired["PruMerge (16)", "attention top-k (16)", "overall"]["value"] == 1.0
    assert paired["PruMerge+ (16)", "attention top-k (16)", "overall"]["value"] == 0.0
    assert paired["random (16)", "all tokens", "overall"]["value"] == -0.5
    json.dumps(result, allow_nan=False)


def test_intervals_of_differences_are_paired(compared, chosen, items):
    """A policy that answers alike differs by nothing; one that fails, by the other's accuracy."""
    right = [item.expected for item in items]
    texts = {policy.name: ["" for _ in items] for policy in chosen}
    texts[policies.ALL_TOKENS] = texts["evenly spaced (16)"] = right[:5] + [""] * 5
    tokens = {name: [3] * len(items) for name in texts}
    result = run.score(items, compared, said(texts, tokens))
    low, high = result["policies"][policies.ALL_TOKENS]["accuracy"]["overall"]["interval"]
    assert low < 0.5 < high
    differences = {
        row["policy"]: (row["value"], row["interval"])
        for row in result["paired"]
        if row["against"] == policies.ALL_TOKENS and row["kind"] == "overall"
    }
    assert differences["evenly spaced (16)"] == (0, [0, 0])
    assert differences["random (16)"] == (-0.5, pytest.approx([-high, -low]))


def test_pope_by_category_and_the_mean_f1_of_categories(compared, chosen):
    """By hand: `a` has a hit and a miss, `b` is all right, `c` asks for no yes or no."""
    names = [policy.name for policy in chosen]
    asked = [("a", "yes"), ("a", "yes"), ("a", "no"), ("b", "yes"), ("b", "no"), ("c", "red")]
    items = [
        Item(n, f"{n % 3}", load=None, text="?", expected=answer, category=kind)
        for n, (kind, answer) in enumerate([*asked, (None, "no")])
    ]
    texts = {name: ["yes", "no", "no", "yes", "no", "red", "yes"] for name in names}
    result = run.score(items, compared, said(texts, {name: [3] * 7 for name in names}))
    assert result["yes_no_questions"] == 6
    assert result["yes_no_by_kind"] == {"a": 3, "b": 2}
    row = result["policies"][names[0]]
    assert row["pope"]["f1"]["value"] == pytest.approx(4 / 6)  # two hits, one false alarm, one miss
    assert {kind: found["f1"]["value"] for kind, found in row["pope_by_kind"].items()} == {
        "a": pytest.approx(2 / 3),
        "b": 1.0,
    }
    assert row["pope_by_kind"]["a"]["recall"]["value"] == 0.5
    assert row["pope_mean_f1"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    low, high = row["pope_mean_f1"]["interval"]
    assert 0.5 <= low < high <= 1.0
    json.dumps(result, allow_nan=False)


def test_pope_without_categories_and_without_questions_of_that_sort(compared, chosen):
    names = [policy.name for policy in chosen]
    for answer, measures in (("yes", set(metrics.POPE_MEASURES)), ("red", set())):
        items = [Item(0, "x", load=None, text="?", expected=answer)]
        texts, tokens = ({name: [entry] for name in names} for entry in ("no", 3))
        result = run.score(items, compared, said(texts, tokens))
        row = result["policies"][names[0]]
        assert set(row["pope"]) == measures
        assert row["pope_by_kind"] == result["yes_no_by_kind"] == {}
        assert row["pope_mean_f1"] == {"value": None, "interval": None}


# What answers depend on


def weights(**changed):
    """A model whose weights are no whole rows of bytes, with some of them changed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(700, 5), torch.nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        for name, change in changed.items():
            change(model.get_parameter(name.replace("_", ".")))
    return model


def swap(index, other):
    def change(weight):
        weight[index], weight[other] = weight[other].clone(), weight[index].clone()

    return change


@pytest.mark.parametrize(
    "changed",
    [
        {"0_weight": lambda weight: weight.zero_()},
        {"0_weight": lambda weight: weight[4, 699].add_(1e-7)},
        {"0_weight": swap((0, 0), (0, 2))},
        {"0_weight": swap((0, 0), (2, 648))},  # 8 KiB further on
        {"0_weight": swap(0, 1)},
        {"0_bias": lambda bias: bias[0].neg_()},
        {"1_weight": swap((0, 0), (2, 4))},
    ],
)
def test_fingerprint_of_weights(changed):
    assert fingerprint.of_weights(weights()) == fingerprint.of_weights(weights())
    assert fingerprint.of_weights(weights(**changed)) != fingerprint.of_weights(weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_of_weights_in_other_precision(dtype):
    halved = fingerprint.of_weights(weights().to(dtype))
    assert halved == fingerprint.of_weights(weights().to(dtype))
    assert halved != fingerprint.of_weights(weights())


def test_fingerprint_of_buffers_of_any_type():
    def model(flag):
        module = torch.nn.BatchNorm1d(3)  # counts its batches in a tensor of no dimension
        module.register_buffer("flag", torch.tensor([True, flag]))
        module.register_buffer("nothing", torch.empty(0))
        return module

    assert fingerprint.of_weights(model(True)) == fingerprint.of_weights(model(True))
    assert fingerprint.of_weights(model(True)) != fingerprint.of_weights(model(False))


def test_fingerprint_of_code_has_the_kernels():
    expected = set()
    for name, start in (("prumerge_fast", ""), ("prumerge_fast.kernels", "kernels/")):
        place = Path(importlib.import_module(name).__file__).parent
        expected |= {start + path.relative_to(place).as_posix() for path in place.rglob("*.py")}
    assert fingerprint.code_files().keys() == expected


# The command


@pytest.fixture
def command(tmp_path):
    output = tmp_path / "out" / "result.json"
    return [
        *("evaluate", "--count", "6", "--batch-size", "2", "--tokens", "8"),
        *("--output", str(output)),
    ], output


def test_interrupted_run_goes_on_where_it_was(command, capsys, monkeypatch):
    arguments, output = command
    asked = []
    answer_batch = run.answer_batch

    def interrupted(loaded, batch, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([item.question_id for item in batch])
        return answer_batch(loaded, batch, *rest)

    monkeypatch.setattr(run, "answer_batch", interrupted)
    monkeypatch.setattr(stored, "now", lambda: "2026-01-02T03:04:05+00:00")
    assert main(arguments) == 130
    assert not output.exists()
    with stored.answers_file(output).open("a") as file:
        file.write('{"texts": {"all to')  # killed while writing
    monkeypatch.setattr(run, "answer_batch", lambda *a: asked.append(a) or answer_batch(*a))
    monkeypatch.setattr(stored, "now", lambda: "2026-01-03T03:04:05+00:00")
    assert main([*arguments, "--json"]) == 0
    assert asked[:2] == [[0, 1], [2, 3]]
    assert len(asked) == 3
    resumed = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == resumed
    assert resumed["answered"] == {
        "first": "2026-01-02T03:04:05+00:00",
        "last": "2026-01-03T03:04:05+00:00",
        "by_earlier_runs": 4,
    }

    monkeypatch.setattr(run, "answer_batch", None)
    assert main([*arguments, "--json"]) == 0  # from the file alone
    assert json.loads(capsys.readouterr().out)["policies"] == resumed["policies"]

    monkeypatch.setattr(run, "answer_batch", answer_batch)
    without_file = [*arguments[:-2], "--json"]
    assert main(without_file) == 0
    at_once = json.loads(capsys.readouterr().out)
    assert at_once["answered"]["by_earlier_runs"] == 0
    for field in ("policies", "paired", "questions"):
        assert at_once[field] == resumed[field]


def test_answers_of_other_settings_are_not_mixed(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments, _ = command
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "all tokens" in shown
    assert "POPE's measures of 2 questions" in shown
    assert "earlier run" not in shown
    assert main(arguments) == 0
    assert "6 of 6 questions were answered by an earlier run" in capsys.readouterr().out
    for other in (["--max-new-tokens", 3], ["--conv-template", "vicuna_v1"]):
        message = refusal(capsys, *arguments, *other)
        assert "--output: expected answers of a run with these settings" in message


@pytest.fixture
def question_file(photos, tmp_path):
    """Writes questions, with their answers, about one photograph into one file."""
    path = tmp_path / "questions.jsonl"

    def write(*questions):
        path.write_text(
            "".join(
                json.dumps({"question_id": n, "image": "coffee.jpg", "text": text, "answer": "w1"})
                + "\n"
                for n, text in enumerate(questions)
            )
        )
        return path

    return write


@pytest.fixture
def ask(folder, photos, tmp_path):
    return [
        *("evaluate", "--model", folder, "--questions", tmp_path / "questions.jsonl"),
        *("--image-folder", photos, "--tokens", "5", "--max-new-tokens", "2", "--batch-size", "1"),
        *("--output", tmp_path / "result.json"),
    ]


@pytest.mark.parametrize("changed", [["what ?", "where ?"], ["what ?"]])
def test_answers_to_other_questions_are_not_mixed(ask, question_file, capsys, changed):
    question_file("what ?", "who ?")
    assert main([str(argument) for argument in ask]) == 0
    capsys.readouterr()
    question_file(*changed)
    message = refusal(capsys, *ask)
    assert "--output: expected answers of a run with these settings" in message


def test_answers_of_other_models_and_images_are_not_mixed(ask, question_file, capsys, tmp_path):
    question_file("what ?")
    assert main([str(argument) for argument in ask]) == 0
    capsys.readouterr()
    for option in ("--model", "--image-folder"):
        given = ask[ask.index(option) + 1]
        other = tmp_path / "other" / given.name  # of the same name
        shutil.copytree(given, other)
        message = refusal(capsys, *(other if argument is given else argument for argument in ask))
        assert "--output: expected answers of a run with these settings" in message


@pytest.fixture
def own(ask, folder, photos, tmp_path):
    """`ask` with a model and images that a test may change."""
    copies = {}
    for given in (folder, photos):
        copies[given] = tmp_path / given.name
        shutil.copytree(given, copies[given])
    return [str(copies.get(argument, argument)) for argument in ask]


def zeroed(arguments, monkeypatch):
    path = Path(arguments[arguments.index("--model") + 1]) / "model.safetensors"
    content = {name: 0 * weight for name, weight in load_file(path).items()}
    save_file(content, path, metadata={"format": "pt"})


def redrawn(arguments, monkeypatch):
    images = Path(arguments[arguments.index("--image-folder") + 1])
    shutil.copy(images / "astronaut.png", images / "coffee.jpg")


def renamed(arguments, monkeypatch):
    path = Path(arguments[arguments.index("--model") + 1]) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    path.write_text(json.dumps(tokenizer))


def upgraded(arguments, monkeypatch):
    versions = provenance.versions()
    monkeypatch.setattr(provenance, "versions", lambda: {**versions, "torch": "9.0"})


def moved(arguments, monkeypatch):
    monkeypatch.setattr(provenance, "_processor", lambda: "another one")


def rewritten(arguments, monkeypatch):
    monkeypatch.setattr(fingerprint, "code_files", lambda: {"run.py": Path(__file__)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (zeroed, "weights"),
        (redrawn, "images"),
        (renamed, "model_settings"),
        (upgraded, "torch_version"),
        (moved, "processor"),
        (rewritten, "code"),
    ],
)
def test_answers_are_not_taken_for_those_of_something_else(
    own, question_file, capsys, monkeypatch, change, named
):
    """The same paths, with other things in them: old answers are not scored as new ones."""
    question_file("what ?")
    assert main(own) == 0
    capsys.readouterr()
    change(own, monkeypatch)
    message = refusal(capsys, *own)
    assert f"result.answers.jsonl with {named} " in message
    assert message.count(" instead of ") == 1
    assert "; remove it to start anew" in message


def test_answers_are_taken_up_after_files_were_copied(own, question_file, capsys, monkeypatch):
    question_file("what ?")
    assert main(own) == 0
    for option in ("--model", "--image-folder"):
        given = Path(own[own.index(option) + 1])
        shutil.copytree(given, given.with_name("copy"), copy_function=shutil.copyfile)
        shutil.rmtree(given)
        given.with_name("copy").rename(given)
    monkeypatch.setattr(run, "answer_batch", None)
    assert main(own) == 0


def test_resumes_over_answers_with_line_ends_of_unicode(command, capsys, monkeypatch):
    arguments, _ = command
    decoded = run.answer_batch

    def answer_batch(*given):
        line = decoded(*given)
        return {**line, "texts": {name: ["a\u2028b"] * 2 for name in line["texts"]}}

    monkeypatch.setattr(run, "answer_batch", answer_batch)
    assert main(arguments) == 0
    monkeypatch.setattr(run, "answer_batch", None)
    assert main(arguments) == 0


def test_budgets_given_twice_are_asked_once(command, capsys):
    arguments, _ = command
    assert main([*arguments[:-2], "--tokens", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["tokens"] == [8]
    pairs = [(row["policy"], row["against"], row["kind"]) for row in result["paired"]]
    assert len(pairs) == len(set(pairs))


def test_question_file(folder, photos, tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    records = [
        {"question_id": i, "image": name, "text": "what ?", "category": "thing", "label": label}
        for i, (name, label) in enumerate([("astronaut.png", "yes"), ("coffee.jpg", "w1")] * 2)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [
        *("evaluate", "--model", str(folder), "--questions", str(path), "--tokens", "5"),
        *("--image-folder", str(photos), "--max-new-tokens", "2"),
    ]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == {"overall": 4, "thing": 4}
    assert result["yes_no_questions"] == 2
    assert set(result["policies"]["random (5)"]["pope"]) == set(metrics.POPE_MEASURES)
    del records[0]["label"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "got none for 1 of 4" in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--tokens", "197"], "--tokens: expected 2 to N = 196"),
        (["--tokens", "1"], "--tokens: expected 2 to N = 196"),
        (["--tokens", "many"], "'--tokens': expected a whole number >= 1, got many"),
        (["--tokens", "9" * 5000], "'--tokens': "),
        (["--count", "0"], "--count"),
        (["--count", "999999999999"], "--count: expected at most 100000, got 999999999999"),
        (["--image-folder", "x"], "--image-folder: expected --questions"),
        (["--questions", "gone.jsonl"], "--questions: expected a readable text file"),
        (["--output", f"{__file__}/x.json"], "--output: expected a writable file"),
        (["--output", str(Path(__file__).parent)], "--output: expected a file, got the folder"),
        (["--output", "."], "--output: expected a file, got the folder"),
    ],
)
def test_bad_options(command, capsys, extra, says):
    assert says in refusal(capsys, *command[0], *extra)


@pytest.fixture
def break_pictures(photos, tmp_path):
    """Puts two questions about broken pictures between those of a file."""

    def insert(questions):
        content = (photos / "astronaut.png").read_bytes()
        lines = questions.read_text().splitlines()
        for place, (name, size) in enumerate({"cut.png": 5000, "empty.png": 0}.items(), start=1):
            (tmp_path / name).write_bytes(content[:size])
            record = {**json.loads(lines[0]), "question_id": name, "image": f"{tmp_path}/{name}"}
            lines.insert(place, json.dumps(record))
        questions.write_text("\n".join(lines))
        return lines

    return insert


@pytest.mark.parametrize("size", ["1", "2", "25"])
def test_broken_pictures_are_left_out_for_all_policies(
    ask, question_file, break_pictures, capsys, tmp_path, size
):
    arguments = [*map(str, ask), "--json", "--batch-size", size, "--output"]
    questions = question_file("what ?", "who ?", "where ?")
    assert main([*arguments, str(tmp_path / "good.json")]) == 0
    good = json.loads(capsys.readouterr().out)
    assert (good["failed"], good["pictures"]) == ([], 1)
    break_pictures(questions)
    for _ in range(2):  # a broken picture is tried again, and is as broken
        assert main([*arguments, str(tmp_path / "broken.json")]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("prumerge-fast: 2 of 3 pictures could not be read: expected")
        assert captured.err.endswith("cut.png (image file is truncated); and 1 more\n")
        found = json.loads(captured.out)
        assert [entry["question_id"] for entry in found["failed"]] == ["cut.png", "empty.png"]
        for key in ("questions", "policies", "paired"):
            assert found[key] == good[key]
        assert json.loads((tmp_path / "broken.json").read_text())["failed"] == found["failed"]
    arguments.remove("--json")
    assert main([*arguments, str(tmp_path / "broken.json")]) == 2
    assert "Questions left out: 2, whose pictures could not be read" in capsys.readouterr().out
    assert "cut.png" in refusal(capsys, *arguments, tmp_path / "broken.json", "--strict")


def test_broken_pictures_are_tried_again(ask, question_file, capsys, monkeypatch):
    """The same file may be read later: by a newer Pillow, say, or with pillow-heif."""
    question_file("what ?", "who ?")

    def unreadable(path):
        raise PictureError(f"expected a picture, got {path}")

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "read_image", unreadable)
        assert "the image could not be read" in refusal(capsys, *ask)
    assert main([*map(str, ask), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["failed"], found["answered"]["by_earlier_runs"]) == ([], 0)


def test_a_picture_that_may_not_be_read(
    ask, question_file, break_pictures, capsys, monkeypatch, tmp_path
):
    questions = question_file("what ?")
    break_pictures(questions)
    read_bytes = Path.read_bytes

    def refused(path):
        if path.name == "empty.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert main([*map(str, ask), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [entry["question_id"] for entry in found["failed"]] == ["cut.png", "empty.png"]


def test_only_broken_pictures(ask, question_file, break_pictures, capsys, tmp_path):
    questions = question_file("what ?")
    questions.write_text("\n".join(break_pictures(questions)[1:]))
    assert "none of the 2 pictures could be read" in refusal(capsys, *ask)
    assert not (tmp_path / "result.json").exists()


def test_failure_to_write_leaves_answers_and_result(ask, question_file, capsys, monkeypatch):
    question_file("what ?")
    write_text = Path.write_text

    def full(path, *rest, **options):
        if path.name.startswith("result.json"):
            path.open("w").close()
            raise OSError(28, "No space left on device")
        return write_text(path, *rest, **options)

    output = ask[-1]
    output.write_text("old")
    monkeypatch.setattr(Path, "write_text", full)
    assert main([*map(str, ask), "--json"]) == 2
    assert output.read_text() == "old"
    captured = capsys.readouterr()
    assert json.loads(captured.out)["questions"] == {"overall": 1}
    assert re.search(r"--output: .* No space .* stay in \S*result\.answers\.jsonl", captured.err)
    assert captured.err.count("\n") == 1


@pytest.fixture
def answered_file(ask, question_file, capsys, tmp_path):
    """The answers of a run about two questions, one a batch, as header and lines."""
    question_file("what ?", "who ?")
    assert main([*map(str, ask), "--json"]) == 0
    path = tmp_path / "result.answers.jsonl"
    result = json.loads(capsys.readouterr().out)
    return path, path.read_text().split("\n")[:-1], result


def again(ask, capsys):
    assert main([*map(str, ask), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_batch_that_two_runs_asked(ask, answered_file, capsys):
    """Each had been interrupted after the first batch: the second is asked, not the first scored
    for it."""
    path, (header, first, _), result = answered_file
    path.write_text("\n".join([header, first, first, ""]))
    resumed = again(ask, capsys)
    assert resumed["answered"]["by_earlier_runs"] == 1
    assert resumed["policies"] == result["policies"]
    assert resumed["paired"] == result["paired"]


def test_batches_in_another_order(ask, answered_file, capsys, monkeypatch):
    path, (header, first, second), result = answered_file
    path.write_text("\n".join([header, second, first, ""]))
    monkeypatch.setattr(run, "answer_batch", None)
    assert again(ask, capsys)["policies"] == result["policies"]


@pytest.mark.parametrize("length", [0, 5, 50, -1])
def test_a_header_that_was_cut_off(ask, answered_file, capsys, length):
    path, (header, *_), result = answered_file
    path.write_text(header[:length])
    assert again(ask, capsys)["policies"] == result["policies"]
    assert path.read_text().split("\n")[0] == header


@pytest.mark.parametrize("content", ["notes", "{}", "3\n", "[]\n{}\n", "[" * 99_999 + "\n", "\n"])
def test_files_of_something_else_are_left_alone(ask, answered_file, capsys, content):
    path = answered_file[0]
    path.write_text(content)
    assert "--output: expected " in refusal(capsys, *ask)
    assert path.read_text() == content


def damaged(field, value):
    def damage(line):
        return json.dumps({**json.loads(line), field: value})

    return damage


def shortened(field):
    def damage(line):
        batch = json.loads(line)
        batch[field]["all tokens"] = batch[field]["all tokens"][1:]
        return json.dumps(batch)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda line: "3", "expected a JSON object, got int"),
        (lambda line: "{}", "expected a batch from 0 to 1, got None"),
        (lambda line: line[:60], ""),
        (lambda line: "[" * 99_999, "recursion"),
        (lambda line: "", ""),
        (damaged("batch", 2), "expected a batch from 0 to 1, got 2"),
        (damaged("batch", -1), "expected a batch from 0 to 1, got -1"),
        (damaged("batch", True), "expected a batch from 0 to 1, got True"),
        (damaged("date", None), "Invalid isoformat string"),
        (damaged("texts", {"all tokens": ["a"]}), "expected texts of each policy"),
        (damaged("tokens", None), "expected tokens of each policy"),
        (shortened("texts"), "expected 1 texts of all tokens"),
        (shortened("tokens"), "expected 1 tokens of all tokens"),
        (lambda line: line.replace('["', "[[]", 1).replace('"]', "]", 1), ""),
    ],
)
def test_a_damaged_line_is_named_and_may_be_removed(ask, answered_file, capsys, damage, says):
    path, (header, first, second), result = answered_file
    content = "\n".join([header, damage(first), second, ""])
    path.write_text(content)
    message = refusal(capsys, *ask)
    assert "result.answers.jsonl:2 (" in message
    assert says in message
    assert "remove that line to have its questions asked again" in message
    assert path.read_text() == content
    path.write_text("\n".join([header, second, ""]))
    assert again(ask, capsys)["policies"] == result["policies"]


def test_full_disk_while_answering(command):
    """A limit on the size of files stands for a full disk: one line, and the run goes on later."""
    arguments, output = command
    program = f"{sys.executable} -m prumerge_fast {' '.join(arguments)} --batch-size 1 --json"
    limited = ["bash", "-c", f"ulimit -f 4; {program}"]  # KiB
    done = subprocess.run(limited, capture_output=True, text=True)
    path = stored.answers_file(output)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"--output: expected a file that takes more answers, got {path} (" in done.stderr
    earlier = path.read_text().count("\n") - 1
    assert earlier >= 1
    assert main([*arguments, "--batch-size", "1"]) == 0
    assert json.loads(output.read_text())["answered"]["by_earlier_runs"] == earlier


@pytest.mark.parametrize("name", ["questions.jsonl", "link.json", "coffee.jpg"])
def test_results_do_not_replace_what_is_read(ask, question_file, photos, tmp_path, capsys, name):
    path = question_file("what ?")
    (tmp_path / "link.json").symlink_to(path)
    shutil.copy(photos / "coffee.jpg", tmp_path)
    given = [tmp_path if argument is photos else argument for argument in ask[:-1]]
    output = tmp_path / name
    content = output.read_bytes()
    message = refusal(capsys, *given, output)
    assert "--output: expected another file than the questions and their images" in message
    assert output.read_bytes() == content


def test_answers_do_not_replace_the_questions(ask, question_file, tmp_path, capsys):
    path = question_file("what ?").rename(tmp_path / "result.answers.jsonl")
    given = [path if argument == tmp_path / "questions.jsonl" else argument for argument in ask]
    message = refusal(capsys, *given)
    assert f"whose answers would be written to {path}" in message
    assert path.read_text().count("\n") == 1


def test_category_of_all_questions(ask, question_file, capsys):
    path = question_file("what ?")
    path.write_text(json.dumps({**json.loads(path.read_text()), "category": "overall"}))
    assert "--questions: expected no category 'overall'" in refusal(capsys, *ask)


def test_images_whose_names_are_no_unicode(ask, photos, tmp_path, capsys):
    name = "\udcff.jpg"
    shutil.copy(photos / "coffee.jpg", tmp_path / name)
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 0, "image": name, "text": "what ?", "answer": "w"}))
    given = [tmp_path if argument is photos else argument for argument in ask]
    assert main([*map(str, given), "--json"]) == 0
