"""A batch job: questions about images through actors of Ray Data into a folder, resumably."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from ray.data import DataContext, Dataset

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.errors import InputError, PruMergeError
from prumerge_fast.evaluation import fingerprint
from prumerge_fast.harness.models import Described, config_of, describe, outline, resolve_dtype
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving.batch.cluster import Actors, running
from prumerge_fast.serving.batch.folder import BatchFolder
from prumerge_fast.serving.batch.options import BatchOptions
from prumerge_fast.serving.batch.questions import read_questions
from prumerge_fast.serving.batch.rows import ID

_MOST_ROWS = 1024  # of a file of answers: what is lost at most, of each actor, when a job is killed
_BLOCKS = 8  # of each actor at least, so that none waits long for the last


def run(options: BatchOptions, remark: Callable[[str], None]) -> dict[str, Any]:
    """Asks what has no row yet in the folder, and writes all rows as JSON.

    Args:
        options: Those of the command.
        remark: Is told in a line what has to be said of the input.

    Returns:
        What `--json` holds.

    Raises:
        InputError: Something given cannot be used, or the actors failed. Rows written stay.
    """
    questions, remarks = read_questions(options.images, options.prompts, options.image_folder)
    for line in remarks:
        remark(line)
    described = describe(options.model or MODEL_DIR)
    config = config_of(outline(described), options.chosen)
    folder = BatchFolder(options.output)
    with (
        folder.taken(),
        running(options, folder.path) as actors,
    ):
        folder.check_settings(_settings(options, config, described, actors))
        retried = folder.forget_errors(questions[ID]) if options.retry_errors else 0
        missing = _missing(questions, folder)
        start = time.perf_counter()
        if len(missing) or folder.has_pending():
            _ask(options, config, described, folder, actors, questions, len(missing))
        seconds = time.perf_counter() - start
        lacking = len(_missing(questions, folder))
        if lacking:  # Ray may only warn, where it keeps no account of what is done
            raise InputError(
                f"batch: expected a row of each of {len(questions)} questions in {folder.answers}, "
                f"got none of {lacking}"
            )
        rows = folder.rows()
        folder.write_lines(rows)
        cluster = {
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "actors": asdict(actors),
            "ray": ray.__version__,
        }
    return {
        "model": described.name,
        "output": str(options.output),
        "answers": str(folder.lines),
        "questions": len(rows),
        "pictures": len(pc.unique(rows["image"])),
        "answered_by_earlier_runs": len(rows) - len(missing),
        "asked_again": retried,
        "seconds": seconds,
        "questions_per_second": len(missing) / seconds if len(missing) else None,
        "visual_tokens": pc.mean(rows["visual_tokens"]).as_py(),
        "prompt_tokens": pc.mean(rows["prompt_tokens"]).as_py(),
        "failed": [
            {
                "image": row["image"],
                "modality": "image",
                "prompt": row["prompt"],
                "error": row["error"],
            }
            for row in rows.filter(pc.is_valid(rows["error"])).to_pylist()
        ],
        "settings": _settings(options, config, described, actors),
        "cluster": cluster,
        **provenance(options.command, _device(actors, here=True)),
    }


def _missing(questions: pa.Table, folder: BatchFolder) -> pa.Table:
    """The questions that have no row."""
    return questions.filter(pc.invert(pc.is_in(questions[ID], folder.done())))


def _settings(
    options: BatchOptions, config: PruMergeConfig, described: Described, actors: Actors
) -> dict[str, Any]:
    """What answers depend on."""
    return {
        "model": described.name,
        "weights": fingerprint.of_checkpoint(described.source, described.config),
        "prompts": options.prompts,
        "conv_template": options.conv_template,
        "image_aspect_ratio": options.image_aspect_ratio,
        "config": asdict(config),
        "engine": options.engine,
        "engine_kwargs": dict(options.engine_kwargs),
        "backend": options.backend,
        "dtype": _dtype(options, actors),
        "max_new_tokens": options.max_new_tokens,
    }


def _device(actors: Actors, *, here: bool = False) -> torch.device:
    """That of the actors; `here`: of this machine, for what a result says of it."""
    has = actors.num_gpus > 0 and (torch.cuda.is_available() or not here)
    return torch.device("cuda" if has else "cpu")


def _dtype(options: BatchOptions, actors: Actors) -> str:
    return str(resolve_dtype(options.dtype, _device(actors))).removeprefix("torch.")


def _ask(
    options: BatchOptions,
    config: PruMergeConfig,
    described: Described,
    folder: BatchFolder,
    actors: Actors,
    questions: pa.Table,
    missing: int,
) -> None:
    """Has Ray ask the questions without a row; `missing` is how many they are."""
    # Ray leaves out what is done only of what it reads from files.
    pq.write_table(questions, folder.questions)
    context = DataContext.get_current()
    context.checkpoint_config = folder.checkpoint_config()
    context.enable_progress_bars = options.shows_progress
    context.enable_rich_progress_bars = True  # the others say nothing while workers are silenced
    context.use_ray_tqdm = False
    context.print_on_execution_start = False
    # The second starts 32 processes to read the footer of one file.
    context.use_datasource_v2 = False
    _quiet()
    batches = math.ceil(max(missing, 1) / (options.batch_size * actors.count * _BLOCKS))
    most = max(_MOST_ROWS // options.batch_size, 1)
    # One file is one block, which one actor would get.
    dataset = ray.data.read_parquet(str(folder.questions), override_num_blocks=1).repartition(
        target_num_rows_per_block=options.batch_size * min(batches, most)
    )
    try:
        _answered(options, config, described, actors, dataset).write_parquet(str(folder.answers))
    except ray.exceptions.RayError as error:
        raise _as_input_error(error) from error
    finally:
        context.checkpoint_config = None


def _quiet() -> None:
    """Leaves standard error to our own messages; what Ray Data logs stays in its file."""
    for name in ("ray", "ray.data"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="ray")  # such as of fewer blocks than actors


def _as_input_error(error: Exception) -> PruMergeError:
    """What an actor refused, or what else stopped the job, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PruMergeError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    last = str(error).strip().splitlines()[-1]
    return InputError(f"batch: expected actors that answer, got {type(error).__name__}: {last}")


def _answered(
    options: BatchOptions,
    config: PruMergeConfig,
    described: Described,
    actors: Actors,
    questions: Dataset,
) -> Dataset:
    common = {
        "conv_template": options.conv_template,
        "image_aspect_ratio": options.image_aspect_ratio,
    }
    place = Path(described.source)
    model = str(place.absolute()) if place.is_dir() else described.source
    dtype = _dtype(options, actors)
    if options.engine == "vllm":
        from prumerge_fast.serving.batch import vllm_engine

        return vllm_engine.answered(
            questions,
            model=model,
            config=config,
            backend=options.backend,
            dtype=dtype,
            actors=actors,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            engine_kwargs=options.engine_kwargs,
            **common,
        )
    from prumerge_fast.serving.batch.patched_model import PatchedModel

    device = str(_device(actors))
    return questions.map_batches(
        PatchedModel,
        fn_constructor_kwargs={
            "loading": {"model": model, "dtype": dtype, "device": device, **common},
            "config": config,
            "backend": options.backend,
            "max_new_tokens": options.max_new_tokens,
        },
        batch_size=options.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors.count),
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus,
    )
