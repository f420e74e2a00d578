"""Writes the tables and pictures of the documents from the committed result files.

    python bench/update_docs.py           # after new results
    python bench/update_docs.py --check   # exit code 1 if a table or a picture is stale

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`. A picture carries the
checksum of the results that it shows, and is drawn only where they changed: the curves need
matplotlib, the excerpt of the report Chromium and playwright (`pip install -e ".[all]"`).
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accuracy_tables
import cost_tables
import demo_tables
import end_to_end_tables
import kernel_tables
import script
import serving_tables
import support_table
from PIL import Image

from prumerge_fast.errors import InputError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "prumerge_fast" / "demo" / "tiny-llava" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)


def comparison() -> str:
    """What `prumerge-fast compare --json` measured: a column for each policy."""
    run = _read("demo-compare.json")
    policies = run["results"]

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> str:
        return f"| {title} | " + " | ".join(cell(policy) for policy in policies.values()) + " |"

    def milliseconds(stage: str) -> Callable[[dict[str, Any]], str]:
        def cell(policy: dict[str, Any]) -> str:
            value = policy["milliseconds"][stage]
            return "–" if value is None else f"{value:.1f} ms"

        return cell

    plain = next(iter(policies.values()))
    lines = [
        "| | " + " | ".join(policies) + " |",
        "|---|" + "---:|" * len(policies),
        row("visual tokens (mean)", lambda p: f"{p['visual_tokens']['mean']:.1f}"),
        row("vision tower", milliseconds("vision")),
        row("prune + merge", milliseconds("prune_merge")),
        row("projector", milliseconds("projector")),
        row("prefill", milliseconds("prefill")),
        row("decode", milliseconds("decode")),
        row("whole answer", milliseconds("total")),
        row("KV cache", lambda p: f"{p['kv_cache_bytes'] / 1024:.0f} KiB"),
        row("**accuracy**", lambda p: f"**{p['accuracy']:.1%}**"),
        *(
            row(f"– {kind}", lambda p, kind=kind: f"{p['accuracy_by_category'][kind]:.1%}")
            for kind in plain["accuracy_by_category"]
        ),
        row("same answer as LLaVA", lambda p: f"{p['agreement']:.1%}"),
        "",
        f"{run['questions']} questions on scenes never trained on; medians per question. "
        + _provenance(run, "demo-compare.json"),
    ]
    return "\n".join(lines)


def speed() -> str:
    """What the pytest-benchmark files of `bench/` hold: ratios to a baseline run in turn."""
    lines = [
        "| at CLIP ViT-L/14-336's shape | baseline | prumerge_fast | ratio (quartiles) |",
        "|---|---:|---:|---:|",
    ]
    for name, title in {
        "prune-merge-cpu.json": "vectorised `prune_merge` against the reference loop",
        "vision-cpu.json": "patched vision path against the unpatched one",
    }.items():
        run = _read(name)
        for benchmark in run["benchmarks"]:
            info = benchmark["extra_info"]
            low, high = info["ratio_quartiles"]
            if "keep=72" in benchmark["param"]:  # the README need not be complete, the file is
                continue
            case = benchmark["param"].replace("-", ", ") if benchmark["param"] else ""
            if "batch" in info:
                case = f"{case.split(', ', 1)[1]}, B = {info['batch']}"
            lines.append(
                f"| {title}, {case} | {info['baseline_median_ms']:.1f} ms "
                f"| {info['median_ms']:.1f} ms "
                f"| **{info['ratio_median']:.2f}** ({low:.2f}–{high:.2f}) |"
            )
    cpu = run["machine_info"]["cpu"]
    lines += [
        "",
        "Medians of rounds run in turn; `pytest bench/bench_*.py` on "
        f"{cpu['brand_raw']}, {info['threads']} threads, torch {info['versions']['torch']}, "
        f"transformers {info['versions']['transformers']}, {run['datetime'][:10]}; "
        "all figures: `bench/results/*-cpu.json`.",
    ]
    return "\n".join(lines)


def quantised() -> str:
    """What `compare --json` says of the demo model in each precision of its language model."""
    name = "demo-quantised.json"
    runs = _read(name)
    last = {**list(runs.values())[-1], "command": ["python bench/quantisation.py"]}
    return f"{demo_tables.quantised(runs)} {_provenance(last, name)}"


def end_to_end(*, only: tuple[str, str, int] | None = None) -> str:
    """What `bench/end_to_end.py` measured, by one command or several.

    Args:
        only: Model, precision and batch size of one table, the README's; `None` for all.
    """
    name = "end-to-end-cpu.json"
    run = _read(name)
    rows = [
        row
        for row in run["rows"]
        if only in (None, (row["model"], row["precision"], row["batch_size"]))
    ]
    commands = dict.fromkeys(" ".join(row["command"]) for row in rows)
    run |= {"rows": rows, "command": ["`, `".join(commands)]}
    spreads = "[docs/end-to-end.md](docs/end-to-end.md)" if only else None
    return f"{end_to_end_tables.markdown(run, spreads_in=spreads)}\n\n{_provenance(run, name)}"


def _serving(table: Callable[[list[dict[str, Any]]], str]) -> Callable[[], str]:
    """A table of what `bench/serving.py` measured, by one command for each row."""

    def build() -> str:
        name = "serving-cpu.json"
        rows = _read(name)
        commands = "`, `".join(" ".join(row["command"]) for row in rows)
        vllm = rows[-1]["versions"]["vllm"]
        origin = _provenance({**rows[-1], "command": [commands]}, name)
        return f"{table(rows)}\n\nvLLM {vllm}. {origin}"

    return build


def _from_run(name: str, table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table with the provenance of the result file that it is of."""

    def build() -> str:
        run = _read(name)
        return f"{table(run)}\n\n{_provenance(run, name)}"

    return build


def _read(name: str) -> dict[str, Any]:
    return script.read_result(f"bench/results/{name}", RESULTS / name)


def _provenance(run: dict[str, Any], name: str) -> str:
    versions, machine = run["versions"], run["machine"]
    where = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    return (
        f"`{' '.join(run['command'])}` on {where}, {machine['threads']} threads, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{run['date'][:10]}; all figures: `bench/results/{name}`."
    )


TABLES = {
    "comparison": comparison,
    "speed": speed,
    "cost": _from_run("cost.json", cost_tables.shapes),
    "published": _from_run("cost.json", cost_tables.published),
    "kernel_counts": _from_run("static-report.json", kernel_tables.counts),
    "received_counts": _from_run("static-report.json", kernel_tables.received),
    "kernel_resources": _from_run("static-report.json", kernel_tables.resources),
    "curve": _from_run("demo-accuracy.json", accuracy_tables.curve),
    "kinds": _from_run("demo-accuracy.json", accuracy_tables.kinds),
    "finetuning": _from_run("demo-finetune.json", demo_tables.finetuning),
    "trained": _from_run("demo-finetune.json", demo_tables.trained),
    "quantised": quantised,
    "end_to_end": end_to_end,
    "seven_billion": functools.partial(end_to_end, only=("llava-1.5-7b", "bfloat16", 1)),
    "support": support_table.table,
    "sizing": _from_run("cost.json", serving_tables.sizing),
    "throughput": _serving(serving_tables.throughput),
    "encoder_memory": _serving(serving_tables.memory),
    "paired": _from_run("demo-accuracy.json", accuracy_tables.paired),
    "scores": _from_run("demo-scores.json", accuracy_tables.curve),
    "scores_paired": _from_run("demo-scores.json", accuracy_tables.paired),
}


def _draw_curves(path: Path) -> None:
    import plot_accuracy  # needs matplotlib

    plot_accuracy.draw(RESULTS / "demo-accuracy.json", path)


def _photograph_report(path: Path) -> None:
    import report  # loads the demo model

    with tempfile.TemporaryDirectory() as folder:
        report.main(["--output", f"{folder}/report.html", "--screenshot", str(path)])


PICTURES = {  # of which results, drawn by what
    ROOT / "docs" / "accuracy.png": ("demo-accuracy.json", _draw_curves),
    ROOT / "docs" / "report.png": ("demo-compare.json", _photograph_report),
}


def shows(picture: Path, results: Path) -> bool:
    """Whether a picture carries the checksum of the results."""
    with Image.open(picture) as image:
        return image.info.get("Results") == hashlib.sha256(results.read_bytes()).hexdigest()


def check_markers(texts: dict[str, str]) -> None:
    """Makes sure that no table escapes `updated`: by name of the document, its text.

    Raises:
        InputError: A marker lacks its other half, or a table is unknown or nowhere.
    """
    used = set()
    for document, text in texts.items():
        opened = None
        # Misspelt ones too, as far as they can be told.
        for marker in re.findall(r"<!--[^>]*\bresults:[^>]*-->", text):
            name = marker.removeprefix("<!-- results:").removesuffix(" -->")
            if opened is not None:
                if marker != f"<!-- /results:{opened} -->":
                    raise InputError(
                        f"{document}: expected <!-- /results:{opened} -->, got {marker}"
                    )
                opened = None
            elif name in TABLES:
                opened = name
                used.add(name)
            else:
                raise InputError(
                    f"{document}: expected <!-- results:NAME --> with NAME one of "
                    f"{', '.join(TABLES)}, got {marker}"
                )
        if opened is not None:
            raise InputError(f"{document}: expected <!-- /results:{opened} -->, got none")
    for name in TABLES:
        if name not in used:
            raise InputError(
                f"documents: expected <!-- results:{name} --> in one of them, got none"
            )


def updated(text: str) -> str:
    """A document with every table written anew."""

    def replace(match: re.Match[str]) -> str:
        with script.taking_apart(f"table {match[2]}", RESULTS):
            table = TABLES[match[2]]()
        return f"{match[1]}\n{table}\n{match[3]}"

    pattern = r"(<!-- results:(\w+) -->).*?(<!-- /results:\2 -->)"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Writes what is stale, or says so, and returns the exit code.

    Raises:
        InputError: A document or a result file is not as it should be, or a tool is not there.
    """
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args(arguments).check
    check_markers({str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS})
    texts = [path for path in DOCUMENTS if updated(path.read_text()) != path.read_text()]
    pictures = [path for path, (name, _) in PICTURES.items() if not shows(path, RESULTS / name)]
    stale = texts + pictures
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: stale, run python bench/update_docs.py")
        return int(bool(stale))
    for path in texts:
        path.write_text(updated(path.read_text()))
    for path in pictures:
        try:
            PICTURES[path][1](path)
        except ModuleNotFoundError as error:
            raise InputError(
                f"{path.relative_to(ROOT)}: expected {error.name} to be installed, got none"
            ) from None
    return 0


if __name__ == "__main__":
    script.run(main)
