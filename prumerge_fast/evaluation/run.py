"""Puts every question to every policy, resumably, and scores the answers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.errors import InputError
from prumerge_fast.evaluation import fingerprint, metrics, stored
from prumerge_fast.evaluation.policies import ALL_TOKENS, Comparison, Policy, methods, scorings
from prumerge_fast.families.base import ImageTokens
from prumerge_fast.harness.answers import failures, failures_line
from prumerge_fast.harness.inputs import Item, items_from_jsonl
from prumerge_fast.harness.models import Loaded, load
from prumerge_fast.harness.prompts import check_modalities, pictures_of, prepare_readable
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.harness.questions import batches
from prumerge_fast.patching.encoder_output import pruned_features
from prumerge_fast.patching.patch import patched
from prumerge_fast.reduction.config import Positions
from prumerge_fast.towers.wrappers import unwrapped

OVERALL = "overall"


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of the command (`prumerge-fast evaluate --help` describes them)."""

    command: list[str]
    model: str | None
    questions: Path | None
    image_folder: Path | None
    conv_template: str | None
    image_aspect_ratio: str | None
    frames: int
    count: int
    policies: str
    budgets: list[int]
    output: Path | None
    dtype: str
    device: str
    batch_size: int
    max_new_tokens: int
    strict: bool
    as_json: bool


@dataclass(frozen=True)
class Answers:
    """What the policies said: texts and visual tokens by policy, a question a column.

    Args:
        texts: By policy.
        tokens: By policy.
        given: The times of the first and of the last batch.
        earlier: How many questions an earlier run has answered.
        failed: What is wrong with the pictures of questions that have no column, by number.
    """

    texts: dict[str, list[str]]
    tokens: dict[str, list[int]]
    given: tuple[str, str]
    earlier: int
    failed: dict[int, str] = field(default_factory=dict)


Track = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]
"""`(questions, of them already answered)` to what is told how many more were."""


def run(options: EvaluationOptions, track: Track) -> dict[str, Any]:
    """Asks and scores; answers are written as they come, where there is an `--output`.

    Args:
        options: Those of the command.
        track: Shows how far it has come.

    Returns:
        What `--output` and `--json` hold.

    Raises:
        InputError: Something given cannot be used, or no picture. Answers written until then stay.
    """
    items = _items(options)
    images = _images(options, items)
    _check_output(options, images)
    loaded = load(
        options.model or MODEL_DIR,
        dtype=options.dtype,
        device=options.device,
        conv_template=options.conv_template,
        image_aspect_ratio=options.image_aspect_ratio,
    )
    check_modalities(loaded, items)
    try:
        compared = _compared(options, loaded)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    header = {} if options.output is None else _header(options, loaded, items, images)
    answers = answer_all(options, loaded, items, compared.policies, header, track)
    failed = failures(items, answers.failed)
    pictures = len({item.picture for item in items})
    if len(failed) == len(items):
        raise InputError(failures_line(pictures, failed))
    items = [item for number, item in enumerate(items) if number not in answers.failed]
    return {
        "model": loaded.name,
        "settings": _settings(options, loaded),
        "answered": {
            "first": answers.given[0],
            "last": answers.given[1],
            "by_earlier_runs": answers.earlier,
        },
        "pictures": pictures,
        "failed": failed,
        **score(items, compared, answers),
        **provenance(options.command, loaded.device),
    }


def _compared(options: EvaluationOptions, loaded: Loaded) -> Comparison:
    if options.policies == "methods":
        return methods(options.budgets, loaded.patches)
    class_token = loaded.adapter.has_class_token(unwrapped(loaded.model))
    return scorings(options.budgets, loaded.patches, class_token=class_token)


def _items(options: EvaluationOptions) -> list[Item]:
    if options.questions is None:
        if options.image_folder is not None:
            raise InputError("--image-folder: expected --questions beside it, got none")
        return items_from_demo(options.count)
    folder = options.image_folder or options.questions.parent
    items = items_from_jsonl(options.questions, folder, options.frames)
    unknown = sum(item.expected is None for item in items)
    if unknown:
        raise InputError(
            f"--questions: expected an answer or a label for every question, got none for {unknown}"
            f" of {len(items)} in {options.questions}"
        )
    if any(item.category == OVERALL for item in items):
        raise InputError(
            f"--questions: expected no category {OVERALL!r}, which is that of all questions "
            f"together, got one in {options.questions}"
        )
    return items


def _images(options: EvaluationOptions, items: Sequence[Item]) -> dict[str, Path]:
    """The image files that are asked about, by name; demo scenes have none."""
    if options.questions is None:
        return {}
    folder = options.image_folder or options.questions.parent
    return {item.image: folder / item.image for item in items}


def _check_output(options: EvaluationOptions, images: Mapping[str, Path]) -> None:
    """Raises InputError where a result would overwrite a folder or what is read."""
    output = options.output
    if output is None:
        return
    if output.is_dir() or not output.name:
        raise InputError(f"--output: expected a file, got the folder {output}")
    given = [path for path in (options.questions, *images.values()) if path is not None]
    for written in (output, stored.answers_file(output)):
        if written.exists() and any(os.path.samefile(written, path) for path in given):
            raise InputError(
                f"--output: expected another file than the questions and their images, got {output}"
                + ("" if written is output else f", whose answers would be written to {written}")
            )


def _settings(options: EvaluationOptions, loaded: Loaded) -> dict[str, Any]:
    """What a result says of how it came about."""
    return {
        "questions": None if options.questions is None else str(options.questions),
        "count": None if options.questions is not None else options.count,
        "policies": options.policies,
        "tokens": options.budgets,
        "conv_template": options.conv_template,
        "image_aspect_ratio": options.image_aspect_ratio,
        "frames": options.frames,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
    }


def _header(
    options: EvaluationOptions,
    loaded: Loaded,
    items: Sequence[Item],
    images: Mapping[str, Path],
) -> dict[str, Any]:
    """What answers depend on, so that a run is resumed only with the same."""
    asked = [[item.question_id, item.image, item.text] for item in items]
    run = provenance(options.command, loaded.device)
    # An update of the system changes no answer, nor do more cores to answer with.
    machine = {name: run["machine"][name] for name in ("processor", "device")}
    return {
        "model": loaded.name,
        "source": options.model,
        **_settings(options, loaded),
        "image_folder": None if options.image_folder is None else str(options.image_folder),
        "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "images": fingerprint.of_files(images),  # demo scenes follow from the code
        "weights": fingerprint.of_weights(loaded.model),
        "model_settings": fingerprint.of_settings(loaded.model, loaded.processor),
        "code": fingerprint.of_files(fingerprint.code_files()),
        **{f"{package}_version": version for package, version in run["versions"].items()},
        **machine,
    }


def answer_all(
    options: EvaluationOptions,
    loaded: Loaded,
    items: list[Item],
    chosen: Sequence[Policy],
    header: dict[str, Any],
    track: Track,
) -> Answers:
    """Every question to every policy, a batch after another; those already on file are not asked.

    Raises:
        InputError: The answers on file are of another header, or cannot be read or written.
    """
    size = options.batch_size
    every = list(batches(items, size))
    names = [policy.name for policy in chosen]
    path = None if options.output is None else stored.answers_file(options.output)
    done: dict[int, dict[str, Any]] = {}
    if path is not None:
        done = stored.resumed(path, header, names, [len(batch) for batch in every])
    earlier = sum(len(every[number]) for number in done)
    with track(len(items), earlier) as advance:
        for number, batch in enumerate(every):
            if number in done:
                continue
            said = answer_batch(loaded, batch, chosen, options.max_new_tokens, options.strict)
            done[number] = {"batch": number, "date": stored.now(), **said}
            if path is not None:
                stored.append(path, done[number])
            advance(len(batch))
    texts, tokens = (
        {
            name: [entry for n in range(len(every)) for entry in done[n][field][name]]
            for name in names
        }
        for field in ("texts", "tokens")
    )
    failed = {
        size * n + place: error for n in range(len(every)) for place, error in done[n]["failed"]
    }
    dates = sorted(batch["date"] for batch in done.values())
    return Answers(texts, tokens, (dates[0], dates[-1]), earlier, failed)


@torch.inference_mode()
def answer_batch(
    loaded: Loaded,
    batch: Sequence[Item],
    chosen: Sequence[Policy],
    max_new_tokens: int,
    strict: bool = False,
) -> dict[str, Any]:
    """`texts` and `tokens` by policy, and `failed`: places of unusable pictures, with the errors.

    The vision tower runs once; policies share its features.

    Raises:
        PictureError: A picture cannot be used, and that is to end the run (`strict`).
    """
    inputs, broken = prepare_readable(loaded, batch, strict=strict)
    failed = [[place, error] for place, error in broken.items()]
    batch = [item for place, item in enumerate(batch) if place not in broken]
    if not batch:
        nothing: dict[str, list[Any]] = {policy.name: [] for policy in chosen}
        return {"texts": nothing, "tokens": nothing, "failed": failed}
    pictures = pictures_of(loaded, inputs)
    prompts = {name: value for name, value in inputs.items() if not _is_picture(loaded, name)}
    once = loaded.adapter.reading_once()
    texts, tokens = {}, {}
    for policy in chosen:
        encoded: dict[str, ImageTokens] = {}
        lengths = [0] * len(batch)
        for modality, pixels in once.pixels.items():
            asked = [i for i, item in enumerate(batch) if item.modality == modality]
            if not asked:
                continue
            names = [f"{batch[i].image} {batch[i].question_id}" for i in asked]
            others = set(once.pixels.values()) - {pixels}
            given = {name: value for name, value in pictures.items() if name not in others}
            adapter = once.reading_once(policy.reduction(names))
            encoded |= adapter.encode(loaded.model, given, policy.config, "auto")
            placeholder = once.placeholder_id(loaded.model, modality)
            counts = (inputs["input_ids"] == placeholder).sum(1).tolist()
            pieces = [once.pieces(loaded.model, modality, count) for count in counts]
            owners = [i for i in asked for _ in range(pieces[i])]
            for i, length in zip(owners, encoded[modality].lengths, strict=True):
                lengths[i] += length
        tokens[policy.name] = lengths
        ids = generate(loaded, prompts, encoded, max_new_tokens, policy.config.positions)
        decoded = loaded.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts[policy.name] = [text.strip() for text in decoded]
    return {"texts": texts, "tokens": tokens, "failed": failed}


def _is_picture(loaded: Loaded, name: str) -> bool:
    return name in loaded.adapter.image_arguments


def generate(
    loaded: Loaded,
    prompts: Mapping[str, Tensor],
    encoded: Mapping[str, ImageTokens],
    max_new_tokens: int,
    positions: Positions = "compact",
) -> Tensor:
    """Greedy answers [B, new tokens] behind prompts whose images and videos have these tokens."""
    # A patched model takes images that are encoded already, as many tokens of each as there are.
    outputs = {modality: pruned_features(tokens) for modality, tokens in encoded.items()}
    with patched(loaded.model, positions=positions):
        sequences = loaded.model.generate(
            **prompts,
            mm_encoder_outputs=outputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
        )
    return sequences[:, prompts["input_ids"].shape[1] :].cpu()


def score(items: Sequence[Item], compared: Comparison, answers: Answers) -> dict[str, Any]:
    """Accuracy overall and by kind, POPE's measures, and paired differences, with intervals.

    Shares of 1; intervals are of 95 %, bootstrapped over images.
    """
    chosen = compared.policies
    names = [policy.name for policy in chosen]
    expected = [item.expected or "" for item in items]
    images = [item.image for item in items]
    texts = [answers.texts[name] for name in names]
    matches = metrics.exact_match(texts, expected)
    kinds = {OVERALL: np.ones(len(items), dtype=bool)}
    for kind in dict.fromkeys(item.category for item in items):
        if kind is not None:
            kinds[kind] = np.asarray([item.category == kind for item in items])

    rows: dict[str, dict[str, Any]] = {
        policy.name: {
            "method": policy.method,
            "budget": policy.budget,
            "visual_tokens": float(np.mean(answers.tokens[policy.name])),
            "accuracy": {},
            "pope": {},
            "pope_by_kind": {},
            "pope_mean_f1": _entry(np.nan, np.empty(0)),
        }
        for policy in chosen
    }
    paired = []
    for kind, asked in kinds.items():
        measure = matches.of(asked)
        values = measure.value()
        resamples = measure.resampled([i for i, used in zip(images, asked, strict=True) if used])
        for p, name in enumerate(names):
            rows[name]["accuracy"][kind] = _entry(values[p], resamples[:, p])
        for p, q in _pairs(compared):
            paired.append(
                {
                    "policy": names[p],
                    "against": names[q],
                    "kind": kind,
                    **_entry(values[p] - values[q], resamples[:, p] - resamples[:, q]),
                }
            )

    yes_no = np.asarray([metrics.is_yes_no(answer) for answer in expected])
    of_kinds = {
        kind: asked[yes_no]
        for kind, asked in kinds.items()
        if kind != OVERALL and (asked & yes_no).any()
    }
    if yes_no.any():
        where = np.flatnonzero(yes_no)
        measures = metrics.pope(
            [[row[i] for i in where] for row in texts], [expected[i] for i in where]
        )
        scored = _pope(measures, [images[i] for i in where], of_kinds)
        for name, row in zip(names, scored, strict=True):
            rows[name].update(row)
    return {
        "questions": {kind: int(asked.sum()) for kind, asked in kinds.items()},
        "yes_no_questions": int(yes_no.sum()),
        "yes_no_by_kind": {kind: int(asked.sum()) for kind, asked in of_kinds.items()},
        "bootstrap": {"resamples": metrics.RESAMPLES, "level": metrics.LEVEL, "over": "images"},
        "policies": rows,
        "paired": paired,
    }


def _pope(
    measures: Mapping[str, metrics.Measure], images: Sequence[str], kinds: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """POPE's measures of each policy: of all questions, by kind, and the mean F1 of the kinds.

    Args:
        measures: Of n questions.
        images: [n].
        kinds: Which questions are of a kind, [n] bool.
    """
    policies = len(measures["f1"].numerator)
    found: list[dict[str, Any]] = [
        {"pope": {}, "pope_by_kind": {kind: {} for kind in kinds}} for _ in range(policies)
    ]
    for title, measure in measures.items():
        parts = [measure, *(measure.only(asked) for asked in kinds.values())]
        values = [part.value() for part in parts]  # [P] each
        resamples = [part.resampled(images) for part in parts]  # [RESAMPLES, P] each
        for p, row in enumerate(found):
            entries = [_entry(v[p], r[:, p]) for v, r in zip(values, resamples, strict=True)]
            row["pope"][title] = entries[0]
            for kind, entry in zip(kinds, entries[1:], strict=True):
                row["pope_by_kind"][kind][title] = entry
            if title == "f1" and kinds:
                row["pope_mean_f1"] = _entry(
                    np.mean([v[p] for v in values[1:]]),
                    np.mean([r[:, p] for r in resamples[1:]], axis=0),
                )
    return found


def _pairs(compared: Comparison) -> list[tuple[int, int]]:
    """Which policies are subtracted: all tokens from all others, and pairs at equal budgets."""
    chosen = compared.policies
    where = {(policy.method, policy.budget): p for p, policy in enumerate(chosen)}
    everything = where[ALL_TOKENS, None]
    found = [(p, everything) for p in range(len(chosen)) if p != everything]
    for budget in dict.fromkeys(p.budget for p in chosen if p.budget is not None):
        found += [(where[one, budget], where[other, budget]) for one, other in compared.pairs]
    return found


def _entry(value: float, resamples: np.ndarray) -> dict[str, Any]:
    """JSON has no NaN: a measure without a denominator is null."""
    if np.isnan(value):
        return {"value": None, "interval": None}
    return {"value": float(value), "interval": metrics.interval(resamples)}
