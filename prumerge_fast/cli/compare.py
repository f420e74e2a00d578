"""`compare`: the same images, videos and prompts through LLaVA and LLaVA-PruMerge, side by side."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from prumerge_fast.cli import page, report
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.errors import InputError
from prumerge_fast.harness.answers import Answer, summarise
from prumerge_fast.harness.inputs import Item, items_from_images, items_from_jsonl
from prumerge_fast.harness.models import Loaded, check_keep, load
from prumerge_fast.harness.prompts import check_modalities, prepare
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.harness.questions import batches, decoded
from prumerge_fast.harness.stages import Measurement, StageTimes, measure
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import resolve_backend

MOST_ANSWERS_SHOWN = 12
_NAMES = {"prumerge": "PruMerge", "prumerge+": "PruMerge+"}


@dataclass(frozen=True)
class CompareOptions:
    """The options of the command (`prumerge-fast compare --help` describes them)."""

    command: list[str]
    model: str | None
    images: list[Path]
    videos: list[Path]
    frames: int
    prompts: list[str]
    questions: Path | None
    image_folder: Path | None
    conv_template: str | None
    image_aspect_ratio: str | None
    answers: Path | None
    overwrite: bool
    html: Path | None
    count: int
    configs: list[PruMergeConfig]
    backend: str
    dtype: str
    device: str
    bits: int | None
    batch_size: int
    max_new_tokens: int
    repeat: int
    as_json: bool


class _Policy:
    """One way to treat visual tokens, with all that it has answered so far."""

    def __init__(self, config: PruMergeConfig | None) -> None:
        self.config = config
        self.name = "LLaVA" if config is None else _NAMES[config.variant]
        self.slug = report.SLUGS[self.name]
        self.answers: list[Answer] = []
        self.times: list[StageTimes] = []
        self.file: TextIO | None = None


def run(options: CompareOptions) -> None:
    """Runs the command.

    Raises:
        InputError: Something given cannot be used. Answers written until then stay.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    items = _items(options)
    policies = [_Policy(config) for config in (None, *options.configs)]
    with ExitStack() as stack:
        for policy in policies:
            policy.file = _open_answers(options, policy.slug, stack)
        html = None if options.html is None else stack.enter_context(page.writable(options.html))
        loaded = load(
            options.model or MODEL_DIR,
            dtype=options.dtype,
            device=options.device,
            bits=options.bits,
            conv_template=options.conv_template,
            image_aspect_ratio=options.image_aspect_ratio,
        )
        for config in options.configs:
            check_keep(config, loaded.patches)
        check_modalities(loaded, items)
        backend = resolve_backend(options.backend, loaded.device).name
        try:
            _answer_all(options, loaded, policies, items)
        except KeyboardInterrupt:
            done = min(len(policy.answers) for policy in policies)
            report.messages().print(f"interrupted after {done} of {len(items)} questions")
            raise
        results = {
            policy.name: summarise(policy.answers, policy.times, policies[0].answers)
            for policy in policies
        }
        result = _as_json(options, loaded, backend, policies, results)
        _print(options, loaded, policies, results, result)
        if html is not None:
            images = {item.image: item for item in items}
            pictures = page.panels(
                loaded, result, lambda name: images[name].load(), backend=options.backend
            )
            page.write(html, page.render(result, pictures))
    if options.html is not None and not options.as_json:
        report.console().print(f"{options.html}: the same as a page, with pictures", soft_wrap=True)


def _print(
    options: CompareOptions,
    loaded: Loaded,
    policies: Sequence[_Policy],
    results: dict[str, dict[str, Any]],
    result: dict[str, Any],
) -> None:
    """Shows the results, before anything else can go wrong."""
    if options.as_json:
        report.print_json(result)
        return
    console = report.console()
    items = policies[0].answers
    if len(items) <= MOST_ANSWERS_SHOWN:
        console.print(report.answers_table({p.name: p.answers for p in policies}))
    console.print(
        f"{loaded.name}: {len(items)} questions, {_dtype_name(loaded)}"
        f"{f', language model in {options.bits} bits' if options.bits else ''} on {loaded.device}, "
        f"batches of {options.batch_size}, backend {result['settings']['backend']}"
    )
    console.print(report.comparison_table(results))
    console.print("Times: median per question; total is all of generate().")


def _items(options: CompareOptions) -> list[Item]:
    if options.questions is not None:
        if options.images or options.videos or options.prompts:
            raise InputError(
                "--questions: expected no --images, --videos or --prompt beside it, because the "
                "file names images, videos and questions"
            )
        folder = options.image_folder or options.questions.parent
        return items_from_jsonl(options.questions, folder, options.frames)
    if options.image_folder is not None:
        raise InputError("--image-folder: expected --questions beside it, got none")
    if options.images or options.videos:
        if not options.prompts:
            given = "--images" if options.images else "--videos"
            raise InputError(f"--prompt: expected at least one with {given}, got none")
        return items_from_images(options.images, options.prompts, options.videos, options.frames)
    if options.prompts:
        raise InputError("--images: expected at least one with --prompt, or --videos, got none")
    return items_from_demo(options.count)


def _open_answers(options: CompareOptions, slug: str, stack: ExitStack) -> TextIO | None:
    if options.answers is None:
        return None
    if options.answers.is_dir():
        raise InputError(f"--answers: expected a file, got the folder {options.answers}")
    path = options.answers.with_name(f"{options.answers.stem}-{slug}{options.answers.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > 0 and not options.overwrite:
            raise InputError(
                f"--answers: expected a new file, got {path}, which exists; --overwrite replaces it"
            )
        # Not "w": what is there stays until the first new answer.
        return stack.enter_context(
            path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        )
    except OSError as error:
        raise InputError(f"--answers: expected a writable file, got {path} ({error})") from None


def _answer_all(
    options: CompareOptions, loaded: Loaded, policies: Sequence[_Policy], items: list[Item]
) -> None:
    """Puts every question to every policy; answers are written as they come.

    Each batch starts with another policy, so that drifts of the machine hit all of them alike.
    """
    for policy in policies:  # warm-up
        _measure(options, loaded, policy, prepare(loaded, items[: options.batch_size]))
    for policy in policies:
        if policy.file is not None:
            policy.file.truncate(0)
    with report.progress(len(items)) as advance:
        for number, batch in enumerate(batches(items, options.batch_size)):
            inputs = prepare(loaded, batch)
            for repeat in range(options.repeat):
                first = (number + repeat) % len(policies)
                for policy in (*policies[first:], *policies[:first]):
                    measured = _measure(options, loaded, policy, inputs)
                    policy.times.append(measured.times.per_question(len(batch)))
                    if repeat == 0:
                        _record(loaded, policy, batch, measured)
            advance(len(batch))


def _measure(options: CompareOptions, loaded: Loaded, policy: _Policy, inputs: Any) -> Measurement:
    return measure(
        loaded.model,
        inputs,
        policy.config,
        backend=options.backend,
        max_new_tokens=options.max_new_tokens,
    )


def _record(loaded: Loaded, policy: _Policy, batch: list[Item], measured: Measurement) -> None:
    """Keeps a batch of answers and writes them in the format of LLaVA's evaluation scripts."""
    for answer in decoded(loaded, batch, measured):
        policy.answers.append(answer)
        if policy.file is not None:
            record = {
                "question_id": answer.item.question_id,
                "prompt": answer.item.text,
                "text": answer.text,
                "answer_id": uuid.uuid4().hex,
                "model_id": f"{loaded.name}-{policy.slug}",
                "metadata": {"visual_tokens": answer.visual_tokens},
            }
            policy.file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _is_video(answer: Answer) -> bool:
    return answer.item.modality == "video"


def _dtype_name(loaded: Loaded) -> str:
    return str(loaded.dtype).removeprefix("torch.")


def _as_json(
    options: CompareOptions,
    loaded: Loaded,
    backend: str,
    policies: list[_Policy],
    results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "settings": {
            "dtype": _dtype_name(loaded),
            "bits": options.bits,
            "conv_template": options.conv_template,
            "image_aspect_ratio": options.image_aspect_ratio,
            "backend": backend,
            "frames": options.frames if any(map(_is_video, policies[0].answers)) else None,
            "batch_size": options.batch_size,
            "max_new_tokens": options.max_new_tokens,
            "repeat": options.repeat,
        },
        "parameters": loaded.model.num_parameters(),
        "weight_bytes": loaded.model.get_memory_footprint(),
        "questions": len(policies[0].answers),
        "results": {
            policy.name: {
                "config": None if policy.config is None else asdict(policy.config),
                **results[policy.name],
            }
            for policy in policies
        },
        "answers": [
            {
                "question_id": said[0].item.question_id,
                "image": said[0].item.image,
                "modality": said[0].item.modality,
                "question": said[0].item.text,
                "expected": said[0].item.expected,
                "category": said[0].item.category,
                "answers": {p.name: a.text for p, a in zip(policies, said, strict=True)},
            }
            for said in zip(*(policy.answers for policy in policies), strict=True)
        ],
        **provenance(options.command, loaded.device),
    }
