"""Accuracy and memory of the demo model with its language model in full precision, 8 and 4 bits.

    python bench/quantisation.py          # bench/results/demo-quantised.json

Runs `prumerge-fast compare --json` once for each, and keeps what it says but for single answers.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import script

RESULTS = Path(__file__).parent / "results"
PRECISIONS: dict[str, list[str]] = {
    "float32": [],
    "8 bits": ["--load-in-8bit"],
    "4 bits": ["--load-in-4bit"],
}


def main(arguments: list[str] | None = None) -> Path:
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", default="1000", help="questions")
    parser.add_argument("--output", type=Path, default=RESULTS / "demo-quantised.json")
    options = parser.parse_args(arguments)
    runs = {}
    for name, flags in PRECISIONS.items():
        command = ["prumerge-fast", "compare", "--count", options.count, "--json", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs[name] = json.loads(done.stdout)
        del runs[name]["answers"]
    options.output.write_text(json.dumps(runs, indent=2) + "\n")
    print(options.output)
    return options.output


if __name__ == "__main__":
    script.run(main)
