"""The folder that a batch job writes to, and from which the next one goes on.

| in it | |
|---|---|
| `settings.json` | what the answers depend on: another run goes on only with the same |
| `questions.parquet` | what the last run was asked |
| `answers/*.parquet` | the answers, as Ray writes them |
| `checkpoint/*.parquet` | Ray's: the ids of the rows in the file of that name in `answers` |
| `answers.jsonl` | the answers once more, in order, when a run has come to its end |
| `lock` | empty: what a run holds while it has the folder |

Ray commits in two phases: ids are `NAME.pending.parquet` until the rows are written, and what is
pending when it starts it takes back. So rows count from when their checkpoint has its name.
"""

from __future__ import annotations

import json
import re
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
from prumerge_fast.harness.inputs import check_unicode
from prumerge_fast.harness.provenance import differences
from prumerge_fast.serving.batch.rows import ANSWERS, ID

_PROGRAM = "prumerge-fast batch"
_FORMAT = {"format": f"{_PROGRAM} 1"}
_PENDING = f"{PENDING_CHECKPOINT_SUFFIX}.parquet"
_LOCK = "lock"


class BatchFolder:
    """A job's folder; its layout is this module's.

    Args:
        path: Of the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._given = path
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
        self._check_path()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK).acquire(timeout=0)  # gone with the process
        except Timeout:
            raise InputError(
                f"--output: expected a folder that no other run writes to, got {self.path}"
            ) from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"--output: expected a writable folder, got {error}") from None
        with lock:
            yield

    def _check_path(self) -> None:
        check_unicode(str(self.path), "--output")
        if re.match("[a-z][a-z0-9+.-]+:", self._given.parts[0] if self._given.parts else ""):
            raise InputError(
                f"--output: expected a folder on a file system, got {self._given}, which looks "
                "like an address"
            )
        if re.search(r"[?\r\n\t]", str(self.path)):
            raise InputError(
                "--output: expected a path without ?, line ends and tabs, which Ray can write to, "
                f"got {str(self.path)!r}"
            )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes down what answers depend on; where there are answers, compares it.

        Raises:
            InputError: That run had other settings, or the folder holds something else.
        """
        expected = {**_FORMAT, **settings}
        if self._settings.exists():
            found = self._earlier_settings()
        else:
            found = expected
            others = [path.name for path in self.path.iterdir() if path.name != _LOCK]
            if others:
                raise InputError(
                    f"--output: expected a new or empty folder or one of an earlier run, got "
                    f"{self.path}, which holds {min(others)}"
                )
        if not self._committed():
            text = json.dumps(expected, indent=1, ensure_ascii=False)
            write_whole(self._settings, f"{text}\n", errors="strict")
            return
        different = differences(found, expected)
        if different:
            raise InputError(
                f"--output: expected the folder of a run with these settings, got {self.path} with "
                f"{different}; choose another, or remove it to start anew"
            )

    def _earlier_settings(self) -> dict[str, Any]:
        try:
            found = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not str(found.get("format")).startswith(_PROGRAM):
                raise ValueError(f"expected a JSON object with a format of {_PROGRAM}")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"--output: expected settings of an earlier run, got {self._settings} ({error})"
            ) from None
        return found

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
        """All rows as `rows.ANSWERS`, by image and prompt.

        Raises:
            InputError: A question has more than one.
        """
        tables = [
            pq.read_table(path, schema=ANSWERS)
            for paths in self._committed().values()
            for path in paths
        ]
        table = pa.concat_tables(tables) if tables else ANSWERS.empty_table()
        questions = len(pc.unique(table[ID]))
        if len(table) != questions:
            raise InputError(
                f"--output: expected one row of each question, got {len(table)} of {questions} "
                f"questions in {self.answers}"
            )
        return table.sort_by([("image", "ascending"), ("prompt", "ascending"), (ID, "ascending")])

    def write_lines(self, table: pa.Table) -> None:
        """Writes rows as JSON, one a line, in the place of what an earlier run wrote."""
        lines = (
            json.dumps(row, ensure_ascii=False) + "\n"
            for batch in table.to_batches(max_chunksize=1024)
            for row in batch.to_pylist()
        )
        write_whole(self.lines, "".join(lines), errors="strict")

    def forget_errors(self, questions: pa.ChunkedArray) -> int:
        """Has Ray ask again what has an error, and says how many questions that are.

        Of those with an id in `questions` [n] alone: it would not ask the others.

        The file's other rows are written to another, with the ids of the new file pending, before
        the old file's are. Stopped between any two steps, Ray takes back what is pending, and no
        row is lost or there twice.
        """
        writer = CheckpointWriter.create(self.checkpoint_config())
        count = 0
        for checkpoint, files in self._committed().items():
            table = pa.concat_tables(pq.read_table(path, schema=ANSWERS) for path in files)
            again = pc.and_(pc.is_valid(table["error"]), pc.is_in(table[ID], questions))
            good = table.filter(pc.invert(again))
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

    def _committed(self) -> dict[Path, list[Path]]:
        """Ray's files of ids whose rows are written, with those of the rows: Ray may number them.

        Raises:
            InputError: Rows are gone.
        """
        paths = sorted(self._checkpoint.glob("*.parquet"))
        found = {
            path: sorted(self.answers.glob(f"{path.stem}[.-]*parquet"))
            for path in paths
            if not path.name.endswith(_PENDING)
        }
        for path, written in found.items():
            if not written:
                raise InputError(
                    f"--output: expected the rows in {self.answers} whose ids {path} has, got no "
                    "such file; put it there, or remove those ids to have them asked again"
                )
        return found
