"""Measures everything that the documents report, and writes bench/results anew.

    python bench/measure.py                  # all steps, about three hours on 2 cores
    python bench/measure.py cost vision-cpu  # these only
    python bench/measure.py --list           # the steps and their commands

`python bench/update_docs.py` then brings the documents up to date. A step works in a folder below
runs/measure, and its old result stays until it has succeeded; the same command goes on where it
was stopped. Nothing else should run on the machine meanwhile. The demo model is not trained anew
(`python -m prumerge_fast.demo.train`), and a GPU has a command of its own (`bench/gpu.py`). The
last step, serving-cpu, needs the extra `vllm`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import script

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
WORK = Path("runs") / "measure"  # below `ROOT`


class Step(NamedTuple):
    """Commands that make one result file.

    Attributes:
        name: The result file's, without `.json`.
        commands: In their order; `{output}` is where they leave the result.
        captured: Whether the result is what the command prints.
        made: What the command calls the result in its folder `{output}`, for one that takes a
            folder.
    """

    name: str
    commands: tuple[str, ...]
    captured: bool = False
    made: str = ""

    @property
    def folder(self) -> Path:
        """Where the step works, below `ROOT`."""
        return WORK / self.name

    @property
    def result(self) -> Path:
        """The committed file."""
        return RESULTS / f"{self.name}.json"

    @property
    def output(self) -> Path:
        """Where the result stands until the step has succeeded, below `ROOT`."""
        return self.folder / (self.made or self.result.name)

    def lines(self) -> list[str]:
        """The commands as they are run."""
        given = self.folder if self.made else self.output
        return [command.format(output=given) for command in self.commands]


_END_TO_END = "python bench/end_to_end.py --output {output} --rounds 3 --model "
_SERVING = "python bench/serving.py --output {output} "
STEPS = (
    Step(
        "cost",
        (
            "prumerge-fast cost --json --device V100 --device A100 --device H100 "
            "--device RTX4090 --device T4",
        ),
        captured=True,
    ),
    Step("static-report", ("python bench/static_report.py --output {output}",)),
    Step("prune-merge-cpu", ("pytest bench/bench_prune_merge.py --benchmark-json={output}",)),
    Step("vision-cpu", ("pytest bench/bench_vision.py --benchmark-json={output}",)),
    Step("demo-compare", ("prumerge-fast compare --count 1000 --json",), captured=True),
    Step("demo-quantised", ("python bench/quantisation.py --output {output}",)),
    Step(
        "end-to-end-cpu",
        (
            f"{_END_TO_END}demo",
            f"{_END_TO_END}llava-1.5-7b --precision bfloat16 --batch-size 1 --layers 32",
            f"{_END_TO_END}llava-1.5-7b --precision float32 --batch-size 1 --layers 8",
            f"{_END_TO_END}llava-1.5-7b --precision nf4 --batch-size 1 --layers 8",
            f"{_END_TO_END}llava-1.5-7b --precision bfloat16 --batch-size 8 --layers 4",
            f"{_END_TO_END}llava-1.5-7b --precision float32 --batch-size 8 --layers 2",
            f"{_END_TO_END}llava-1.5-7b --precision nf4 --batch-size 8 --layers 2",
        ),
    ),
    Step("demo-accuracy", ("prumerge-fast evaluate --output {output}",)),
    Step(
        "demo-scores",
        (
            "prumerge-fast evaluate --policies scores --tokens 16 --tokens 32 --tokens 64 "
            "--tokens 128 --output {output}",
        ),
    ),
    Step(
        "demo-finetune",
        ("python -m prumerge_fast.demo.finetune --output {output}",),
        made="result.json",
    ),
    Step(  # needs the extra vllm
        "serving-cpu",
        (
            f"{_SERVING}--requests 12 --rounds 5",
            f"{_SERVING}--decoder 7b --layers 4 --requests 6 --rounds 3",
        ),
    ),
)


def run(step: Step) -> int:
    """Runs a step's commands up to the first that fails, whose exit code it returns."""
    # Commands of the environment that this runs in, active or not.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    output = ROOT / step.output
    (ROOT / step.folder).mkdir(parents=True, exist_ok=True)
    for line in step.lines():
        print(f"$ {line}", flush=True)
        words = shlex.split(line)
        # By its path: only the parent's PATH is searched for a bare name.
        words[0] = shutil.which(words[0], path=path) or words[0]
        call = {"cwd": ROOT, "env": {**os.environ, "PATH": path}}
        if step.captured:
            with output.open("w", encoding="utf-8") as file:
                code = subprocess.run(words, stdout=file, check=False, **call).returncode
        else:
            code = subprocess.run(words, check=False, **call).returncode
        if code:
            return code
    shutil.copyfile(output, step.result)
    shutil.rmtree(ROOT / step.folder)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps named, or all that an earlier call has not done yet."""
    names = [step.name for step in STEPS]
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="print the steps, measure nothing")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.steps) - set(names))
    if unknown:
        parser.error(f"STEP: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    steps = [step for step in STEPS if not options.steps or step.name in options.steps]
    if options.list:
        for step in steps:
            print(f"{step.name}:", *step.lines(), sep="\n    ")
        return 0
    for number, step in enumerate(steps, 1):
        title = f"== {number} of {len(steps)}, {step.name}"
        done = ROOT / WORK / f"{step.name}.done"
        if done.exists() and not options.steps:
            print(f"{title}: done {done.read_text()}; to measure it anew, name it")
            continue
        print(title, flush=True)
        start = time.monotonic()
        code = run(step)
        if code:
            print(f"{step.name}: exit code {code}; the same command goes on from here")
            return code
        if not options.steps:  # of a whole run, which an interruption would begin anew
            done.write_text(time.strftime("%F %T"))
        print(f"{step.name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
    if not options.steps:  # the next call begins anew
        shutil.rmtree(ROOT / WORK)
    return 0


if __name__ == "__main__":
    script.run(main)
