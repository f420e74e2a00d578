"""Times whole answers, stage by stage: LLaVA, PruMerge, PruMerge+ and fixed budgets, in turn.

    python bench/end_to_end.py --output bench/results/end-to-end-cpu.json

Everything is measured in the real `generate` (`prumerge_fast/cli/stages.py` says how); nothing is
extrapolated: of LLaVA-1.5-7B's 32 decoder layers, each row says how many there were. Times are of a
whole batch. Each round asks every policy about the same new images, starting with another policy
each time, so that what else the machine does hits all alike; ratios are to LLaVA in the same round.
The same command again goes on from what its output file holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from end_to_end_tables import summary
from gpu import seconds_of
from rich.progress import Progress
from subjects import DECODER_LAYERS, DTYPES, Subject, demo, layers_that_fit, real_shape

from prumerge_fast.cli import report
from prumerge_fast.cli.inputs import InputError
from prumerge_fast.cli.models import resolve_device
from prumerge_fast.cli.stages import Measurement, measure
from prumerge_fast.config import PruMergeConfig
from prumerge_fast.dispatch import prune_merge
from prumerge_fast.vision import encode

BASELINE = "LLaVA"
KEEPS = (32, 64, 144)
MODELS = ("demo", "llava-1.5-7b")
RATIOS = ("first_token", "prefill", "total")
PROCESS = psutil.Process()


def policies(patches: int) -> dict[str, PruMergeConfig | None]:
    """All that are timed, by name; budgets that an image has patches for."""
    found = {
        BASELINE: None,
        "PruMerge": PruMergeConfig(),
        "PruMerge+": PruMergeConfig(variant="prumerge+"),
    }
    budgets = {f"PruMerge, keep {n}": PruMergeConfig(keep=n) for n in KEEPS if n <= patches}
    return found | budgets


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
    device = model.device

    def call(config: PruMergeConfig | None, inputs: dict[str, torch.Tensor]) -> Measurement:
        measured = measure(
            model,
            inputs,
            config,
            backend="auto",
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        tick()
        return measured

    inputs = subject.preprocess(0, batch)
    chosen = policies(int((inputs["input_ids"][0] == model.config.image_token_id).sum()))
    memory = {  # the warm-up as well
        name: peak_memory(lambda config=config: call(config, inputs), device)
        for name, config in chosen.items()
    }
    measured: dict[str, list[Measurement]] = {name: [] for name in chosen}
    preprocessing = []
    for number in range(rounds):
        start = time.perf_counter()
        inputs = subject.preprocess((1 + number) * batch, batch)
        preprocessing.append(time.perf_counter() - start)
        names = list(chosen)
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            measured[name].append(call(chosen[name], inputs))
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
            "replay_ms": replayed(model, inputs, config) if device.type == "cuda" else None,
        }
        for name, config in chosen.items()
    ]


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


def peak_memory(call: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Peaks while something runs, in bytes; `None` where the system keeps no such figure.

    `process`: resident memory, weights included (Linux). `torch`: what PyTorch allocated on the
    GPU; on a CPU it keeps no count.
    """
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # proc(5): the peak starts anew from what is resident now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = PROCESS.memory_info().rss
    call()
    peak = None
    if reset.exists():
        status = Path("/proc/self/status").read_text().split()
        peak = 1024 * int(status[status.index("VmHWM:") + 1])
    return {
        "process_bytes_before": before,
        "peak_process_bytes": peak,
        "peak_torch_bytes": torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else None,
    }


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
            tokens = prune_merge(*encode(model, pixels), config).tokens
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
    device = resolve_device(options.device)
    cells = list(itertools.product(options.model, options.precision, options.batch_size))
    settings = {key: getattr(options, key) for key in ("rounds", "new_tokens")}
    settings["attention"] = "sdpa"
    result = _resumed(options.output, settings, report.provenance([], device))
    command = ["python", "bench/end_to_end.py", *arguments]
    done = {
        (row["model"], row["precision"], row["batch_size"])
        for row in result["rows"]
        # Other numbers of layers are other rows.
        if row["model"] == "demo" or options.layers in (None, row["decoder_layers"])
    }
    calls = (1 + options.rounds) * (3 + len(KEEPS))
    with Progress(console=report.messages()) as progress:
        for model, precision in dict.fromkeys(cell[:2] for cell in cells):
            batches = [
                b for b in dict.fromkeys(options.batch_size) if (model, precision, b) not in done
            ]
            if not batches:
                continue
            name = f"{model}, {precision}"
            bar = progress.add_task(f"{name}: loading", total=calls * len(batches))
            subject = _subject(model, precision, device, options.layers)
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
                    {"model": model, "precision": precision, "command": command, **row}
                    for row in rows
                ]
                _write(options.output, result)
            progress.update(bar, completed=calls * len(batches))
            del subject
    if options.as_json:
        report.print_json(result)
    else:
        report.console().print(summary(result))
    return result


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the results")
    options = parser.parse_args(arguments)
    for name in ("rounds", "new_tokens"):
        if getattr(options, name) < 2:
            parser.error(f"--{name.replace('_', '-')}: expected at least 2, got 1")
    if options.layers is not None and options.layers > DECODER_LAYERS:
        parser.error(f"--layers: expected at most {DECODER_LAYERS}, got {options.layers}")
    if "nf4" in options.precision and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--precision: expected bitsandbytes to be installed for nf4, got none")
    return options


def _whole_number(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {value}")
    return int(value)


def _subject(model: str, precision: str, device: torch.device, layers: int | None) -> Subject:
    if model == "demo":
        return demo(precision, device)
    return real_shape(precision, device, layers or layers_that_fit(precision, device))


def _resumed(path: Path, settings: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or an empty result, which is written."""
    del run["command"]  # each row has its own
    run["settings"] = settings
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, {**run, "rows": []})
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--output: expected a writable file with results of an earlier run or none, got {path}"
            f" ({error})"
        ) from None
    if not isinstance(found, dict) or "rows" not in found:
        raise InputError(f"--output: expected a file of this command, got {path}")
    for key in ("settings", "versions", "machine"):
        if found.get(key) != run[key]:
            raise InputError(
                f"--output: expected a new file or one with {key} {run[key]}, got {path} with "
                f"{found.get(key)}"
            )
    return found


def _write(path: Path, result: dict[str, Any]) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    whole.replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"end_to_end.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
