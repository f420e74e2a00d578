"""Puts every question to every policy, resumably, and scores the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from prumerge_fast.cli import report
from prumerge_fast.cli.inputs import InputError, Item, items_from_demo, items_from_jsonl
from prumerge_fast.cli.models import Loaded, load
from prumerge_fast.cli.prompts import prepare
from prumerge_fast.encoder_output import PrunedFeatures
from prumerge_fast.evaluation import metrics
from prumerge_fast.evaluation.policies import (
    ABLATION,
    ALL_TOKENS,
    EVEN,
    PRUMERGE,
    PRUMERGE_PLUS,
    RANDOM,
    Encoded,
    Policy,
    policies,
)
from prumerge_fast.patching import patched
from prumerge_fast.vision import encode

# What is subtracted from what, at equal budgets: ours from the simple ones, and each ablation step.
PAIRS = (
    *((ours, other) for ours in (PRUMERGE, PRUMERGE_PLUS) for other in (RANDOM, EVEN)),
    *zip(ABLATION[1:], ABLATION, strict=False),
)
OVERALL = "overall"
FAMILY = "LlavaForConditionalGeneration"


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of the command (`prumerge-fast evaluate --help` describes them)."""

    command: list[str]
    model: str | None
    questions: Path | None
    image_folder: Path | None
    conv_template: str | None
    image_aspect_ratio: str | None
    count: int
    budgets: list[int]
    output: Path | None
    dtype: str
    device: str
    batch_size: int
    max_new_tokens: int
    as_json: bool


@dataclass(frozen=True)
class Answers:
    """What the policies said: texts and visual tokens by policy, a question a column."""

    texts: dict[str, list[str]]
    tokens: dict[str, list[int]]


def run(options: EvaluationOptions) -> None:
    """Runs the command.

    Raises:
        InputError: Something given cannot be used. Answers written until then stay.
    """
    items = _items(options)
    if options.output is not None and (options.output.is_dir() or not options.output.name):
        raise InputError(f"--output: expected a file, got the folder {options.output}")
    loaded = load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        conv_template=options.conv_template,
        image_aspect_ratio=options.image_aspect_ratio,
    )
    if not any(cls.__name__ == FAMILY for cls in type(loaded.model).__mro__):
        raise InputError(
            f"--model: expected a {FAMILY}, whose images have N patches each, got "
            f"{type(loaded.model).__name__}"
        )
    try:
        chosen = policies(options.budgets, loaded.patches)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    answers = answer_all(options, loaded, items, chosen)
    result = {
        "model": loaded.name,
        "settings": _settings(options, loaded),
        **score(items, chosen, answers),
        **report.provenance(options.command, loaded.device),
    }
    if options.as_json:
        report.print_json(result)
    else:
        report.console().print(_table(result))
    if options.output is not None:
        _write(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _write(output: Path, text: str) -> None:
    try:
        # File names may hold what UTF-8 cannot; JSON reads the escapes.
        output.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(
            f"--output: expected a writable file, got {output} ({error}); the answers stay in "
            f"{answers_file(output)}, and the same command goes on from them"
        ) from None


def _items(options: EvaluationOptions) -> list[Item]:
    if options.questions is None:
        if options.image_folder is not None:
            raise InputError("--image-folder: expected --questions beside it, got none")
        return items_from_demo(options.count)
    items = items_from_jsonl(options.questions, options.image_folder or options.questions.parent)
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


def _settings(options: EvaluationOptions, loaded: Loaded) -> dict[str, Any]:
    """What a result says of how it came about."""
    return {
        "questions": None if options.questions is None else str(options.questions),
        "count": None if options.questions is not None else options.count,
        "tokens": options.budgets,
        "conv_template": options.conv_template,
        "image_aspect_ratio": options.image_aspect_ratio,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
    }


def _header(options: EvaluationOptions, loaded: Loaded, items: Sequence[Item]) -> dict[str, Any]:
    """What answers depend on, so that a run is resumed only with the same."""
    asked = [[item.question_id, item.image, item.text] for item in items]
    return {
        "model": loaded.name,
        "source": options.model,
        **_settings(options, loaded),
        "image_folder": None if options.image_folder is None else str(options.image_folder),
        "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }


def answers_file(output: Path) -> Path:
    """Where the answers of a run are kept, to be resumed from."""
    return output.with_suffix(".answers.jsonl")


def answer_all(
    options: EvaluationOptions, loaded: Loaded, items: list[Item], chosen: Sequence[Policy]
) -> Answers:
    """Every question to every policy, a batch after another; those already on file are not asked.

    Raises:
        InputError: The answers on file are of other settings, or cannot be read or written.
    """
    size = options.batch_size
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    path = None if options.output is None else answers_file(options.output)
    lines = [] if path is None else _resumed(path, _header(options, loaded, items), len(batches))
    console = report.messages()
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(items), completed=min(len(items), len(lines) * size))
        for batch in batches[len(lines) :]:
            lines.append(answer_batch(loaded, batch, chosen, options.max_new_tokens))
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
            progress.advance(bar, len(batch))
    return Answers(
        *(
            {p.name: [entry for line in lines for entry in line[field][p.name]] for p in chosen}
            for field in ("texts", "tokens")
        )
    )


def _resumed(path: Path, header: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The batches on file, `most` at most, which is begun with `header` where there is none."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # an interrupted last line is asked again
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        first, *lines = [json.loads(line) for line in whole.split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise InputError(
            f"--output: expected a writable file with answers of an earlier run or none beside it, "
            f"got {path} ({error})"
        ) from None
    if first != header:
        raise InputError(
            f"--output: expected answers of a run with these settings, got {path} with "
            f"{json.dumps(first)}; remove it to start anew"
        )
    if len(lines) > most:  # two runs at once
        raise InputError(
            f"--output: expected at most {most} batches of answers, got {len(lines)} in {path}; "
            "remove it to start anew"
        )
    return lines


@torch.inference_mode()
def answer_batch(
    loaded: Loaded, batch: Sequence[Item], chosen: Sequence[Policy], max_new_tokens: int
) -> dict[str, Any]:
    """`texts` and `tokens` by policy. The vision tower runs once; policies share its features."""
    inputs = prepare(loaded, batch)
    encoded = Encoded(
        *encode(loaded.model, inputs.pop("pixel_values")),
        names=[f"{item.image} {item.question_id}" for item in batch],
    )
    texts, tokens = {}, {}
    for policy in chosen:
        reduced = policy.reduce(encoded)
        tokens[policy.name] = [len(rows) for rows in reduced]
        ids = generate(loaded, inputs, reduced, max_new_tokens)
        decoded = loaded.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts[policy.name] = [text.strip() for text in decoded]
    return {"texts": texts, "tokens": tokens}


def generate(loaded: Loaded, inputs: Any, reduced: list[Tensor], max_new_tokens: int) -> Tensor:
    """Greedy answers [B, new tokens] behind prompts whose images have these tokens [m, C]."""
    lengths = [len(rows) for rows in reduced]
    features = loaded.model.model.multi_modal_projector(torch.cat(reduced))  # [sum of m, D]
    # A patched model takes images that are encoded already, as many tokens of each as there are.
    image = PrunedFeatures(
        pooler_output=list(features.split(lengths)),
        placeholders=torch.full((len(lengths),), loaded.patches),
    )
    with patched(loaded.model):
        sequences = loaded.model.generate(
            **inputs,
            mm_encoder_outputs={"image": image},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
        )
    return sequences[:, inputs["input_ids"].shape[1] :].cpu()


def score(items: Sequence[Item], chosen: Sequence[Policy], answers: Answers) -> dict[str, Any]:
    """Accuracy overall and by kind, POPE's measures, and paired differences, with intervals.

    Shares of 1; intervals are of 95 %, bootstrapped over images.
    """
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
        for p, q in _pairs(chosen):
            paired.append(
                {
                    "policy": names[p],
                    "against": names[q],
                    "kind": kind,
                    **_entry(values[p] - values[q], resamples[:, p] - resamples[:, q]),
                }
            )

    yes_no = [i for i, answer in enumerate(expected) if metrics.is_yes_no(answer)]
    if yes_no:
        said = [[row[i] for i in yes_no] for row in texts]
        for title, measure in metrics.pope(said, [expected[i] for i in yes_no]).items():
            values = measure.value()
            resamples = measure.resampled([images[i] for i in yes_no])
            for p, name in enumerate(names):
                rows[name]["pope"][title] = _entry(values[p], resamples[:, p])
    return {
        "questions": {kind: int(asked.sum()) for kind, asked in kinds.items()},
        "yes_no_questions": len(yes_no),
        "bootstrap": {"resamples": metrics.RESAMPLES, "level": metrics.LEVEL, "over": "images"},
        "policies": rows,
        "paired": paired,
    }


def _pairs(chosen: Sequence[Policy]) -> list[tuple[int, int]]:
    """Which policies are subtracted: all tokens from all others, and `PAIRS` at equal budgets."""
    where = {(policy.method, policy.budget): p for p, policy in enumerate(chosen)}
    everything = where[ALL_TOKENS, None]
    found = [(p, everything) for p in range(len(chosen)) if p != everything]
    for budget in dict.fromkeys(p.budget for p in chosen if p.budget is not None):
        found += [(where[ours, budget], where[other, budget]) for ours, other in PAIRS]
    return found


def _entry(value: float, resamples: np.ndarray) -> dict[str, Any]:
    """JSON has no NaN: a measure without a denominator is null."""
    if np.isnan(value):
        return {"value": None, "interval": None}
    return {"value": float(value), "interval": metrics.interval(resamples)}


def _table(result: dict[str, Any]) -> Table:
    kinds = result["questions"]
    table = Table(
        title=f"{result['model']}: exact match, with its 95 % interval over images",
        title_justify="left",
    )
    for heading in ("policy", "tokens", *(f"{kind} ({n})" for kind, n in kinds.items())):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    budget: int | None = None
    for name, row in result["policies"].items():
        if row["budget"] != budget and table.rows:
            table.rows[-1].end_section = True
        budget = row["budget"]
        overall, *others = (row["accuracy"][kind] for kind in kinds)
        low, high = overall["interval"]
        table.add_row(
            name,
            f"{row['visual_tokens']:.1f}",
            f"{overall['value']:.1%} ({low:.1%}–{high:.1%})",
            *(f"{entry['value']:.1%}" for entry in others),
        )
    return table
