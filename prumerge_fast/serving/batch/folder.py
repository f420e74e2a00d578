"""The folder that a batch job writes to, and from which the next one goes on.

| in it | |
|---|---|
| `settings.json` | what the answers depend on: another run goes on only with the same |
| `questions.parquet` | what the last run was asked |
| `answers/*.parquet` | the answers, as Ray writes them |
| `checkpoint/*.parquet` | Ray's: the ids of the rows in the file of that name in `answers` |
| `answers.jsonl` | the answers once more, in order, when a run has come to its end |

Ray commits in two phases: ids are `NAME.pending.parquet` until the rows are written, and what is
pending when it starts it takes back. So rows count from when their checkpoint has its name.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_writer import PENDING_CHECKPOINT_SUFFIX, CheckpointWriter

from prumerge_fast.errors import InputError
from prumerge_fast.harness.files import write_whole
from prumerge_fast.harness.provenance import differences
from prumerge_fast.serving.batch.rows import ANSWERS, ID

_FORMAT = {"format": "prumerge-fast batch 1"}
_PENDING = f"{PENDING_CHECKPOINT_SUFFIX}.parquet"
_LOCK = "lock"


class BatchFolder:
    """A job's folder; its layout is this module's.

    Args:
        path: Of the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.questions = self.path / "questions.parquet"
        self.answers = self.path / "answers"
        self.lines = self.path / "answers.jsonl"
        self._settings = self.path / "settings.json"
        self._checkpoint = self.path / "checkpoint"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Has the folder for this run alone, and makes it where there is none.

        Raises:
            InputError: Another run has it, or it is no folder that can be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / _LOCK, timeout=0):  # the system's, gone with the process
                yield
        except Timeout:
            raise InputError(
                f"--output: expected a folder that no other run writes to, got {self.path}"
            ) from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"--output: expected a writable folder, got {error}") from None

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes down what answers depend on; where there are answers, compares it.

        Raises:
            InputError: That run had other settings, or the folder holds something else.
        """
        expected = {**_FORMAT, **settings}
        if not self._settings.exists():
            others = [path.name for path in self.path.iterdir() if path.name != _LOCK]
            if others:
                raise InputError(
                    f"--output: expected a new or empty folder or one of an earlier run, got "
                    f"{self.path}, which holds {min(others)}"
                )
        if not self._settings.exists() or not self._committed():
            text = json.dumps(expected, indent=1, ensure_ascii=False)
            write_whole(self._settings, f"{text}\n", errors="strict")
            return
        try:
            found = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"expected a JSON object, got {type(found).__name__}")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"--output: expected settings of an earlier run, got {self._settings} ({error})"
            ) from None
        different = differences(found, expected)
        if different:
            raise InputError(
                f"--output: expected the folder of a run with these settings, got {self.path} with "
                f"{different}; choose another, or remove it to start anew"
            )

    def checkpoint_config(self) -> CheckpointConfig:
        """How Ray keeps what is done; what failed counts as done, too."""
        return CheckpointConfig(
            id_column=ID, checkpoint_path=str(self._checkpoint), delete_checkpoint_on_success=False
        )

    def done(self) -> pa.ChunkedArray:
        """The ids [n] of the questions that have a row."""
        tables = [pq.read_table(path, columns=[ID]) for path in self._committed()]
        return (pa.concat_tables(tables) if tables else ANSWERS.empty_table())[ID]

    def has_pending(self) -> bool:
        """Whether there are rows that Ray is to take back before anyone reads `answers`."""
        return any(self._checkpoint.glob(f"*{_PENDING}"))

    def rows(self) -> pa.Table:
        """All rows as `rows.ANSWERS`, by image and prompt."""
        tables = [
            pq.read_table(path, schema=ANSWERS)
            for name in self._committed()
            for path in self._written(name)
        ]
        table = pa.concat_tables(tables) if tables else ANSWERS.empty_table()
        return table.sort_by([("image", "ascending"), ("prompt", "ascending"), (ID, "ascending")])

    def write_lines(self, table: pa.Table) -> None:
        """Writes rows as JSON, one a line, in the place of what an earlier run wrote."""
        lines = (
            json.dumps(row, ensure_ascii=False) + "\n"
            for batch in table.to_batches(max_chunksize=1024)
            for row in batch.to_pylist()
        )
        write_whole(self.lines, "".join(lines), errors="strict")

    def forget_errors(self) -> int:
        """Has Ray ask again what has an error, and says how many questions that are.

        The file's good rows are written to another, with the ids of the new file pending, before
        the old file's are. Stopped between any two steps, Ray takes back what is pending, and no
        row is lost or there twice.
        """
        writer = CheckpointWriter.create(self.checkpoint_config())
        count = 0
        for checkpoint in self._committed():
            files = self._written(checkpoint)
            table = pa.concat_tables(pq.read_table(path, schema=ANSWERS) for path in files)
            good = table.filter(pc.is_null(table["error"]))
            if len(good) == len(table):
                continue
            count += len(table) - len(good)
            name = f"retried_{uuid.uuid4().hex}"
            pending = writer.write_pending_checkpoint(good[ID], name)  # None for no ids
            if pending is not None:
                pq.write_table(good, self.answers / f"{name}.parquet")
            checkpoint.replace(checkpoint.with_name(f"{checkpoint.stem}{_PENDING}"))
            if pending is not None:
                writer.commit_checkpoint(pending)
        return count

    def _committed(self) -> list[Path]:
        """Ray's files of ids whose rows are written."""
        paths = sorted(self._checkpoint.glob("*.parquet"))
        return [path for path in paths if not path.name.endswith(_PENDING)]

    def _written(self, checkpoint: Path) -> list[Path]:
        """The files with the rows whose ids a checkpoint has: Ray may number them."""
        return sorted(self.answers.glob(f"{checkpoint.stem}[.-]*parquet"))
