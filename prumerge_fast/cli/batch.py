"""`batch`: answers about very many images, and what a job came to."""

from __future__ import annotations

from typing import Any

from prumerge_fast.cli import report
from prumerge_fast.errors import InputError
from prumerge_fast.harness.answers import failures_line
from prumerge_fast.serving.batch.options import BatchOptions
from prumerge_fast.serving.batch.run import run as answer


def run(options: BatchOptions, *, as_json: bool) -> None:
    """Runs the command.

    Raises:
        InputError: Something given cannot be used, or, at the end, some pictures could not. Rows
            written until then stay.
    """
    result = answer(options, report.remark)
    if as_json:
        report.print_json(result)
    else:
        for line in _lines(result):
            report.console().print(line, soft_wrap=True)
    if result["failed"]:
        line = failures_line(result["pictures"], result["failed"], "be asked about")
        raise InputError(f"{line} ({result['answers']} has all; --retry-errors asks again)")


def _lines(result: dict[str, Any]) -> list[str]:
    """What the job came to."""
    earlier, asked = result["answered_by_earlier_runs"], result["questions"]
    lines = [
        f"{result['model']}: {asked} questions about {result['pictures']} pictures, "
        f"{len(result['failed'])} of them with an error"
    ]
    if earlier:
        lines.append(f"{earlier} of them were answered by an earlier run")
    if result["questions_per_second"] is not None:
        lines.append(
            f"{result['seconds']:.1f} s, {result['questions_per_second']:.2f} questions a second, "
            "models loaded and all"
        )
    if result["visual_tokens"] is not None:
        lines.append(
            f"{result['visual_tokens']:.1f} visual tokens an image, {result['prompt_tokens']:.1f} "
            "tokens a prompt"
        )
    return [*lines, f"{result['answers']}: the answers, and as parquet beside it"]
