"""Times whole answers, stage by stage: LLaVA, PruMerge, PruMerge+ and fixed budgets, in turn.

    python bench/end_to_end.py --output runs/end-to-end.json

Everything is measured in the real `generate` (`prumerge_fast/harness/stages.py` says how); nothing
is extrapolated: of LLaVA-1.5-7B's 32 decoder layers, each row says how many there were. Times are
of a whole batch. Each round asks every policy about the same new images, starting with another one
each time, so that what else the machine does hits all alike; ratios are to LLaVA in the same round.
The same command again goes on from what its output file holds; with `--memory-only` it adds the
peak memory to those rows that lack it, and leaves their times as they are. The committed results
are those of `python bench/measure.py end-to-end-cpu`.
"""

from __future__ import annotations

import script

if __name__ == "__main__":
    script.interruptible()

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from end_to_end_tables import summary
from gpu import seconds_of
from peak_memory import peak_memory, tensors_of
from rich.progress import Progress
from subjects import DECODER_LAYERS, DTYPES, Subject, demo, layers_that_fit, real_shape

from prumerge_fast.cli import report
from prumerge_fast.errors import InputError
from prumerge_fast.families.encode import encode
from prumerge_fast.harness.files import write_whole
from prumerge_fast.harness.models import resolve_device
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.harness.stages import Measurement, measure
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import reduce_patches

BASELINE = "LLaVA"
POLICIES: dict[str, PruMergeConfig | None] = {
    BASELINE: None,
    "PruMerge": PruMergeConfig(),
    "PruMerge+": PruMergeConfig(variant="prumerge+"),
    **{f"PruMerge, keep {n}": PruMergeConfig(keep=n) for n in (32, 64, 144)},
}
MODELS = ("demo", "llava-1.5-7b")
RATIOS = ("first_token", "prefill", "total")
MOST_QUESTIONS = 1024  # at once; many more would take hours to draw before anything is timed
CELL = ("model", "precision", "batch_size")


def time_subject(
    subject: Subject, *, batch: int, rounds: int, new_tokens: int, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """One row of results for each policy.

    Args:
        subject: The model.
        batch: Questions at once.
        rounds: Timed calls of each policy.
        new_tokens: Length of every answer.
        tick: Called after each call of `generate`.
    """
    model = subject.model
    memory = memory_of_subject(subject, batch=batch, new_tokens=new_tokens, tick=tick)  # warms up
    measured: dict[str, list[Measurement]] = {name: [] for name in POLICIES}
    preprocessing = []
    for number in range(rounds):
        start = time.perf_counter()
        inputs = subject.preprocess((1 + number) * batch, batch)
        preprocessing.append(time.perf_counter() - start)
        names = list(POLICIES)
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            measured[name].append(_answer(model, inputs, POLICIES[name], new_tokens))
            tick()
    return [
        {
            "decoder_layers": subject.decoder_layers,
            "of_layers": subject.of_layers,
            "batch_size": batch,
            "policy": name,
            "config": None if config is None else asdict(config),
            "prompt_tokens": inputs["input_ids"].shape[1],
            "new_tokens": new_tokens,
            "preprocessing_ms": spread(preprocessing),
            **_row(measured[name], measured[BASELINE]),
            **memory[name],
            "replay_ms": replayed(model, inputs, config) if model.device.type == "cuda" else None,
        }
        for name, config in POLICIES.items()
    ]


def memory_of_subject(
    subject: Subject, *, batch: int, new_tokens: int, tick: Callable[[], None]
) -> dict[str, dict[str, int]]:
    """`peak_memory` of an answer to the first batch, for each policy.

    Args:
        subject: The model.
        batch: Questions at once.
        new_tokens: Length of every answer.
        tick: Called after each call of `generate`.
    """
    model, inputs = subject.model, subject.preprocess(0, batch)

    def call(config: PruMergeConfig | None) -> None:
        _answer(model, inputs, config, new_tokens)
        tick()

    call(POLICIES["PruMerge"])  # bitsandbytes packs its weights anew in the first call on a CPU
    return {
        name: peak_memory(
            lambda config=config: call(config), (*tensors_of(model), *inputs.values()), model.device
        )
        for name, config in POLICIES.items()
    }


def _answer(
    model: Any, inputs: dict[str, torch.Tensor], config: PruMergeConfig | None, new_tokens: int
) -> Measurement:
    return measure(
        model,
        inputs,
        config,
        backend="auto",
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )


def _row(measured: list[Measurement], baseline: list[Measurement]) -> dict[str, Any]:
    def seconds(of: list[Measurement], stage: str) -> list[float]:
        return [getattr(one.times, stage) for one in of]

    tokens = [count for one in measured for count in one.visual_tokens]
    steps = measured[0].answers.shape[1] - 1  # the first token is the prefill's
    milliseconds: dict[str, Any] = {
        stage: None if measured[0].times.prune_merge is None else spread(seconds(measured, stage))
        for stage in ("prune_merge",)
    }
    for stage in ("vision", "projector", "prefill", "decode", "first_token", "total"):
        milliseconds[stage] = spread(seconds(measured, stage))
    milliseconds["decode_step"] = spread(s / steps for s in seconds(measured, "decode"))
    return {
        "visual_tokens": {
            "mean": statistics.fmean(tokens),
            "min": min(tokens),
            "max": max(tokens),
        },
        "milliseconds": milliseconds,
        "speedup": {
            stage: ratio(seconds(baseline, stage), seconds(measured, stage)) for stage in RATIOS
        },
        "kv_cache_bytes": statistics.fmean(one.cache_bytes for one in measured),
    }


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    return _quartiles([1e3 * value for value in seconds])


def ratio(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of rounds: how many times faster than the baseline."""
    return _quartiles([slow / fast for slow, fast in zip(baseline, ours, strict=True)])


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high}


@torch.inference_mode()
def replayed(
    model: Any, inputs: dict[str, torch.Tensor], config: PruMergeConfig | None
) -> dict[str, float] | None:
    """Median milliseconds of the vision path (tower, reduction, projector) and of the prefill.

    As CUDA graphs, without Python between the kernels; `None` where lengths depend on the image, so
    that no graph can be captured.
    """
    if config is not None and config.keep is None:
        return None
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    is_image = ids == model.config.image_token_id
    text = int((~is_image[0]).sum())

    def vision() -> torch.Tensor:
        if config is None:
            tower = model.model.vision_tower(pixels, output_hidden_states=True)
            tokens = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
        else:
            tokens = reduce_patches(encode(model, pixels), config).tokens
        return model.model.multi_modal_projector(tokens)  # [B, m, D]

    features = vision()
    length = text + features.shape[1]
    prompt = features.new_zeros((len(ids), length, features.shape[2]))
    prompt[:, : features.shape[1]] = features

    def prefill() -> torch.Tensor:
        states = model.model.language_model(inputs_embeds=prompt, use_cache=False)[0]
        return model.lm_head(states[:, -1])

    return {
        name: 1e3 * statistics.median(seconds_of([call], model.device, graphs=True))
        for name, call in (("vision", vision), ("prefill", prefill))
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """Writes the results, cell by cell, and returns them.

    Raises:
        InputError: Something given cannot be used.
    """
    options = _options(arguments)
    run = provenance([], resolve_device(options.device))
    run["command"] = ["python", "bench/end_to_end.py", *arguments]
    result = _resumed(options, run)
    with Progress(console=report.messages()) as progress:
        if options.memory_only:
            _fill_in_memory(options, result, run, progress)
        else:
            _time_cells(options, result, run["command"], progress)
    if options.as_json:
        report.print_json(result)
    else:
        report.console().print(summary(result))
    return result


def _time_cells(
    options: argparse.Namespace, result: dict[str, Any], command: list[str], progress: Progress
) -> None:
    """Adds the rows of all cells that the result does not hold."""
    done = [tuple(row[name] for name in CELL) for row in result["rows"] if _layers(options, row)]
    calls = 1 + (1 + options.rounds) * len(POLICIES)
    for model, precision in itertools.product(options.model, options.precision):
        batches = [b for b in options.batch_size if (model, precision, b) not in done]
        if not batches:
            continue
        name = f"{model}, {precision}"
        bar = progress.add_task(f"{name}: loading", total=calls * len(batches))
        subject = _subject(model, precision, options.device, options.layers)
        for batch in batches:
            progress.update(bar, description=f"{name}, batch of {batch}")
            rows = time_subject(
                subject,
                batch=batch,
                rounds=options.rounds,
                new_tokens=options.new_tokens,
                tick=lambda bar=bar: progress.advance(bar),
            )
            result["rows"] += [
                {"model": model, "precision": precision, "command": command, **row} for row in rows
            ]
            _write(options.output, result)
        del subject


def _fill_in_memory(
    options: argparse.Namespace, result: dict[str, Any], run: dict[str, Any], progress: Progress
) -> None:
    """Adds the peak memory to those rows of the cells that lack it.

    `memory_runs` says what each was taken with, by its number in the row's `memory_run`.
    """
    lacking: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}  # by model and batch
    for row in result["rows"]:
        asked = all(row[name] in getattr(options, name) for name in CELL) and _layers(options, row)
        if asked and row["peak_torch_bytes"] is None and row["policy"] in POLICIES:
            key = (row["model"], row["precision"], row["decoder_layers"])
            lacking.setdefault(key, {}).setdefault(row["batch_size"], []).append(row)
    for (model, precision, layers), batches in lacking.items():
        name = f"memory of {model}, {precision}"
        bar = progress.add_task(f"{name}: loading", total=(1 + len(POLICIES)) * len(batches))
        subject = _subject(model, precision, options.device, layers)
        for batch, rows in batches.items():
            progress.update(bar, description=f"{name}, batch of {batch}")
            found = memory_of_subject(
                subject,
                batch=batch,
                new_tokens=options.new_tokens,
                tick=lambda bar=bar: progress.advance(bar),
            )
            runs = result.setdefault("memory_runs", [])
            if run not in runs:
                runs.append(run)
            for row in rows:
                row |= {**found[row["policy"]], "memory_run": runs.index(run)}
            _write(options.output, result)
        del subject


def _layers(options: argparse.Namespace, row: dict[str, Any]) -> bool:
    """Whether a row is of the number of layers asked for: other numbers are other rows."""
    return row["model"] == "demo" or options.layers in (None, row["decoder_layers"])


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = script.Parser(description=__doc__.splitlines()[0])
    whole = _whole_number
    parser.add_argument("--output", type=Path, required=True, help="the result file (JSON)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--precision", nargs="+", choices=DTYPES, default=["float32", "bfloat16", "nf4"]
    )
    parser.add_argument("--batch-size", nargs="+", type=whole, default=[1, 8])
    parser.add_argument(
        "--layers", type=whole, help="decoder layers of llava-1.5-7b; default: what fits, up to 32"
    )
    parser.add_argument("--rounds", type=whole, default=5, help="timed calls of each policy")
    parser.add_argument("--new-tokens", type=whole, default=8, help="length of every answer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    parser.add_argument(
        "--memory-only",
        action="store_true",
        help="time nothing, add the peak memory to rows of the result file that lack it",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the results")
    options = parser.parse_args(arguments)
    for name in CELL:
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))  # each once
    for name in ("rounds", "new_tokens"):
        if getattr(options, name) < 2:
            parser.error(f"--{name.replace('_', '-')}: expected at least 2, got 1")
    for name, most in (("layers", DECODER_LAYERS), ("batch_size", MOST_QUESTIONS)):
        given = getattr(options, name) or 0
        if (largest := max(given) if isinstance(given, list) else given) > most:
            parser.error(f"--{name.replace('_', '-')}: expected at most {most}, got {largest}")
    if "nf4" in options.precision and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--precision: expected bitsandbytes to be installed for nf4, got none")
    return options


def _whole_number(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {value}")
    return int(value)


def _subject(model: str, precision: str, device: str, layers: int | None) -> Subject:
    found = resolve_device(device)
    if model == "demo":
        return demo(precision, found)
    return real_shape(precision, found, layers or layers_that_fit(precision, found))


def _resumed(options: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """What the output file holds, or an empty result, which is written."""
    path, option = options.output, "--output"
    # Each row has its own command.
    expected = {key: value for key, value in run.items() if key != "command"}
    expected["settings"] = {key: getattr(options, key) for key in ("rounds", "new_tokens")}
    expected["settings"]["attention"] = "sdpa"
    if not path.exists():
        if options.memory_only:
            raise InputError(f"{option}: expected results of an earlier run, got {path}, no file")
        _write(path, {**expected, "rows": []})
    found = script.read_result(option, path)
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise InputError(f"{option}: expected a file of this command, got {path}")
    with script.taking_apart(option, path):
        # Memory says what it was taken with; times do not, and are of one machine.
        for key in ("settings",) if options.memory_only else ("settings", "versions", "machine"):
            if found[key] != expected[key]:
                raise InputError(
                    f"{option}: expected a new file or one with {key} {expected[key]}, got {path} "
                    f"with {found[key]}"
                )
        if found["machine"]["device"] != expected["machine"]["device"]:
            raise InputError(
                f"--device: expected that of the rows in {path}, {found['machine']['device']}, "
                f"got {expected['machine']['device']}"
            )
        summary(found)  # before anything is measured: each row has what its table is made of
    return found


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n", errors="strict")
    except (OSError, ValueError) as error:  # the latter for names that UTF-8 cannot hold
        raise InputError(
            f"--output: expected a file that can be written, got {path} ({error})"
        ) from None


if __name__ == "__main__":
    script.run(main)
