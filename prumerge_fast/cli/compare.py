"""`compare`: the same images, videos and prompts through LLaVA and LLaVA-PruMerge, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from prumerge_fast.cli import answer_files, page, report
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.errors import InputError
from prumerge_fast.evaluation import fingerprint
from prumerge_fast.harness.answers import Answer, failures, failures_line, summarise
from prumerge_fast.harness.folders import find_images, find_videos
from prumerge_fast.harness.inputs import Item, items_from_images, items_from_jsonl
from prumerge_fast.harness.models import Loaded, config_of, load
from prumerge_fast.harness.prompts import check_modalities, prepare_readable
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.harness.questions import batches, decoded
from prumerge_fast.harness.stages import Measurement, StageTimes, measure
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.reduction.config import PruMergeConfig

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
    resume: bool
    strict: bool
    html: Path | None
    count: int
    chosen: list[Mapping[str, Any]]
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

    def __init__(self, chosen: Mapping[str, Any] | None) -> None:
        self.chosen = chosen
        self.config: PruMergeConfig | None = None  # until the model is there; unpruned, for ever
        self.name = "LLaVA" if chosen is None else _NAMES[chosen["variant"]]
        self.slug = report.SLUGS[self.name]
        self.answers: dict[int, Answer] = {}  # by the number of the question, as they came
        self.times: list[StageTimes] = []
        self.file: TextIO | None = None
        self.origin: dict[str, Any] = {}  # what answers on file depend on


def run(options: CompareOptions) -> None:
    """Runs the command.

    Raises:
        InputError: Something given cannot be used, or, at the end, some pictures could not. Answers
            written until then stay.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    if options.resume and (options.answers is None or options.overwrite):
        beside = "with --answers" if options.answers is None else "without --overwrite"
        raise InputError(f"--resume: expected it {beside}, which says what to go on from")
    items = _items(options)
    policies = [_Policy(chosen) for chosen in (None, *options.chosen)]
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
        for policy in policies:
            if policy.chosen is not None:
                policy.config = config_of(loaded.model, policy.chosen)
        check_modalities(loaded, items)
        backend = resolve_backend(options.backend, loaded.device).name
        if options.answers is not None:
            _take_up(options, loaded, backend, policies, items)
        earlier = _answered(policies)
        failed: dict[int, str] = {}
        try:
            _answer_all(options, loaded, policies, items, failed)
        except KeyboardInterrupt:
            done = len(_answered(policies))
            report.messages().print(f"interrupted after {done} of {len(items)} questions")
            raise
        not_asked = failures(items, failed)
        pictures = len({item.picture for item in items})
        said = _answered(policies)
        if not said:
            raise InputError(failures_line(pictures, not_asked))
        answers = [[policy.answers[number] for number in said] for policy in policies]
        results = {
            policy.name: summarise(given, policy.times, answers[0])
            for policy, given in zip(policies, answers, strict=True)
        }
        result = _as_json(options, loaded, backend, policies, results, answers)
        result |= {"answered_by_earlier_runs": len(earlier), "failed": not_asked}
        _print(options, loaded, answers, results, result)
        if html is not None:
            by_picture = {item.picture: item for item in items}
            panels = page.panels(
                loaded, result, lambda *picture: by_picture[picture].load(), backend=options.backend
            )
            page.write(html, page.render(result, panels))
    if options.html is not None and not options.as_json:
        report.console().print(f"{options.html}: the same as a page, with pictures", soft_wrap=True)
    if not_asked:
        raise InputError(failures_line(pictures, not_asked))


def _print(
    options: CompareOptions,
    loaded: Loaded,
    answers: Sequence[Sequence[Answer]],
    results: dict[str, dict[str, Any]],
    result: dict[str, Any],
) -> None:
    """Shows the results, before anything else can go wrong."""
    if options.as_json:
        report.print_json(result)
        return
    console = report.console()
    count = len(answers[0])
    if count <= MOST_ANSWERS_SHOWN:
        console.print(report.answers_table(dict(zip(results, answers, strict=True))))
    console.print(
        f"{loaded.name}: {count} questions, {_dtype_name(loaded)}"
        f"{f', language model in {options.bits} bits' if options.bits else ''} on {loaded.device}, "
        f"batches of {options.batch_size}, backend {result['settings']['backend']}"
    )
    console.print(report.comparison_table(results))
    console.print("Times: median per question; total is all of generate().")
    for remark in report.remarks(result):
        console.print(remark, soft_wrap=True)


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
        images, videos = find_images(options.images), find_videos(options.videos)
        for found in (images, videos):
            if found.skipped:
                report.remark(found.remark())
        return items_from_images(images.files, options.prompts, videos.files, options.frames)
    if options.prompts:
        raise InputError("--images: expected at least one with --prompt, or --videos, got none")
    return items_from_demo(options.count)


def _open_answers(options: CompareOptions, slug: str, stack: ExitStack) -> TextIO | None:
    if options.answers is None:
        return None
    if options.answers.is_dir():
        raise InputError(f"--answers: expected a file, got the folder {options.answers}")
    path = _answer_file(options.answers, slug)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = not options.overwrite and not options.resume
        if path.exists() and path.stat().st_size > 0 and kept:
            raise InputError(
                f"--answers: expected a new file, got {path}, which exists; --overwrite replaces "
                "it, --resume goes on from it"
            )
        # Not "w": what is there stays until the first new answer.
        return stack.enter_context(
            path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        )
    except OSError as error:
        raise InputError(f"--answers: expected a writable file, got {path} ({error})") from None


def _answer_file(answers: Path, slug: str) -> Path:
    return answers.with_name(f"{answers.stem}-{slug}{answers.suffix}")


def _take_up(
    options: CompareOptions,
    loaded: Loaded,
    backend: str,
    policies: Sequence[_Policy],
    items: list[Item],
) -> None:
    """Says what answers on file depend on, and goes on from those there where that is asked for."""
    settings = _settings(options, loaded, backend)
    settings["weights"] = fingerprint.of_weights(loaded.model)
    for name in ("batch_size", "repeat"):  # with which the answers do not change
        del settings[name]
    for policy in policies:
        config = None if policy.config is None else asdict(policy.config)
        policy.origin = {
            "model_id": f"{loaded.name}-{policy.slug}",
            "settings": {**settings, "config": config},
        }
        if options.resume and options.answers is not None:
            path = _answer_file(options.answers, policy.slug)
            policy.answers = answer_files.resumed(path, items, policy.origin)


def _answered(policies: Sequence[_Policy]) -> list[int]:
    """The questions, by number, that every policy has answered."""
    first, *others = (policy.answers.keys() for policy in policies)
    return sorted(set(first).intersection(*others))


def _answer_all(
    options: CompareOptions,
    loaded: Loaded,
    policies: Sequence[_Policy],
    items: list[Item],
    failed: dict[int, str],
) -> None:
    """Puts every question to every policy that has not answered it; answers are written as they
    come.

    Each batch starts with another policy, so that drifts of the machine hit all of them alike.
    Questions whose pictures cannot be read go into `failed`, by number.
    """
    work = list(_work(policies, len(items), options.batch_size))
    for _, numbers in work:
        inputs, _ = _prepare(options, loaded, items, numbers)
        if inputs is not None:
            for policy in policies:  # warm-up
                _measure(options, loaded, policy, inputs)
            for policy in policies:
                if policy.file is not None and not options.resume:
                    policy.file.truncate(0)
            break
    with report.progress(len(items), len(_answered(policies))) as advance:
        for batch, (asked, numbers) in enumerate(work):
            inputs, broken = _prepare(options, loaded, items, numbers)
            failed |= broken
            good = [number for number in numbers if number not in broken]
            for repeat in range(options.repeat if good else 0):
                first = (batch + repeat) % len(asked)
                for policy in (*asked[first:], *asked[:first]):
                    measured = _measure(options, loaded, policy, inputs)
                    policy.times.append(measured.times.per_question(len(good)))
                    if repeat == 0:
                        _record(loaded, policy, items, good, measured)
            advance(len(numbers))
    for policy in policies:
        if options.resume and policy.file is not None:
            policy.file.close()  # Windows replaces no open file
            answer_files.put_in_order(Path(policy.file.name), list(policy.answers))


def _work(
    policies: Sequence[_Policy], questions: int, size: int
) -> Iterator[tuple[list[_Policy], list[int]]]:
    """Batches of questions, by number, and which policies have not answered them."""

    def lacking(number: int) -> list[_Policy]:
        return [policy for policy in policies if number not in policy.answers]

    for asked, numbers in groupby(range(questions), key=lacking):
        if asked:
            for batch in batches(list(numbers), size):
                yield asked, batch


def _prepare(
    options: CompareOptions, loaded: Loaded, items: list[Item], numbers: list[int]
) -> tuple[Any, dict[int, str]]:
    """Inputs of those questions whose pictures can be read, and what is wrong with the others."""
    batch = [items[number] for number in numbers]
    inputs, failed = prepare_readable(loaded, batch, strict=options.strict)
    return inputs, {numbers[place]: error for place, error in failed.items()}


def _measure(options: CompareOptions, loaded: Loaded, policy: _Policy, inputs: Any) -> Measurement:
    return measure(
        loaded.model,
        inputs,
        policy.config,
        backend=options.backend,
        max_new_tokens=options.max_new_tokens,
    )


def _record(
    loaded: Loaded,
    policy: _Policy,
    items: list[Item],
    numbers: list[int],
    measured: Measurement,
) -> None:
    """Keeps a batch of answers and writes them."""
    batch = [items[number] for number in numbers]
    for number, answer in zip(numbers, decoded(loaded, batch, measured), strict=True):
        policy.answers[number] = answer
        if policy.file is not None:
            policy.file.write(answer_files.line(answer, policy.origin))


def _dtype_name(loaded: Loaded) -> str:
    return str(loaded.dtype).removeprefix("torch.")


def _settings(options: CompareOptions, loaded: Loaded, backend: str) -> dict[str, Any]:
    return {
        "dtype": _dtype_name(loaded),
        "bits": options.bits,
        "conv_template": options.conv_template,
        "image_aspect_ratio": options.image_aspect_ratio,
        "frames": options.frames if "video" in loaded.adapter.pixels else None,
        "backend": backend,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "repeat": options.repeat,
    }


def _as_json(
    options: CompareOptions,
    loaded: Loaded,
    backend: str,
    policies: list[_Policy],
    results: dict[str, dict[str, Any]],
    answers: Sequence[Sequence[Answer]],
) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "settings": _settings(options, loaded, backend),
        "parameters": loaded.model.num_parameters(),
        "weight_bytes": loaded.model.get_memory_footprint(),
        "questions": len(answers[0]),
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
            for said in zip(*answers, strict=True)
        ],
        **provenance(options.command, loaded.device),
    }
