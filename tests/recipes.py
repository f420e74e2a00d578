"""The blocks of documents, made to run on the demo model."""

import re
from pathlib import Path
from typing import Any

from prumerge_fast.demo import MODEL_DIR

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENTS = ("recipes.md", "finetuning.md", "serving.md")
BLOCKS = {
    name: code
    for document in DOCUMENTS
    for name, code in re.findall(
        r"<!-- recipe:([\w-]+) -->\n```python\n(.*?)```\n<!-- /recipe:\1 -->",
        (DOCS / document).read_text(),
        re.DOTALL,
    )
}
REPLACED = {
    "llava-hf/llava-1.5-7b-hf": MODEL_DIR.as_posix(),
    'max_memory={0: "6GiB", "cpu": "16GiB"}': 'max_memory={"cpu": "7MiB"}',
    "@torch.compile(": '@torch.compile(backend="eager", ',
    ".compile()": '.compile(backend="eager")',
    "torch.float16": "torch.float32",
}


def run(names: dict[str, Any], *recipes: str, **changed: str) -> dict[str, Any]:
    for recipe in recipes:
        code = BLOCKS[recipe]
        for old, new in {**REPLACED, **changed}.items():
            code = code.replace(old, new)
        exec(code, names)
    return names
