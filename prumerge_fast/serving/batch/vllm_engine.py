"""Engine "vllm": `ray.data.llm`, with a fixed number of visual tokens by the plugin for vLLM.

Where each picture decides its number, actors in front of the engines encode it, and these take
embeddings in its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from prumerge_fast.errors import PictureError
from prumerge_fast.harness.inputs import items_from_images
from prumerge_fast.harness.models import Conversation, Described, conversation, describe
from prumerge_fast.harness.prompts import first_token_once, format_prompt, framed
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving.batch.cluster import Actors, encoding
from prumerge_fast.serving.batch.encoded import EMBEDS, EncodedPictures, from_bytes
from prumerge_fast.serving.batch.encoded import ERROR as PICTURE_ERROR
from prumerge_fast.serving.batch.options import engine_workers
from prumerge_fast.serving.batch.rows import ANSWERS, answers_table, readable

ERROR = "__inference_error__"  # as `ray.data.llm` calls it
_OFF = {"enabled": False}


def answered(
    questions: Dataset,
    *,
    model: str,
    conv_template: str | None,
    image_aspect_ratio: str | None,
    config: PruMergeConfig,
    backend: str,
    dtype: str,
    actors: Actors,
    batch_size: int,
    max_new_tokens: int,
    engine_kwargs: Mapping[str, Any],
) -> Dataset:
    """Answers as `rows.ANSWERS` to questions as `rows.QUESTIONS`, by engines of vLLM.

    Args:
        questions: What is asked.
        model: Folder or hub name.
        conv_template: As in `harness.models.load`.
        image_aspect_ratio: As in `harness.models.load`.
        config: With `keep` for the plugin; without, pictures are encoded in front of the engines.
        backend: What reduces the tokens there.
        dtype: "float32", "bfloat16" or "float16".
        actors: The engines; as many encode, of the same GPUs.
        batch_size: Rows that Ray hands to an engine at once.
        max_new_tokens: Of the longest answer.
        engine_kwargs: Further arguments of vLLM's engine.
    """
    kwargs = {"dtype": dtype, **engine_kwargs}
    gpus = actors.num_gpus
    if config.keep is None:
        encoders = encoding(actors)
        gpus -= encoders.num_gpus
        questions = questions.map_batches(
            EncodedPictures,
            fn_constructor_kwargs={
                "model": model,
                "config": config,
                "image_aspect_ratio": image_aspect_ratio,
                "options": {
                    "device": "cuda" if encoders.num_gpus else "cpu",
                    "dtype": dtype,
                    "backend": backend,
                },
            },
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=encoders.count),
            num_cpus=encoders.num_cpus,
            num_gpus=encoders.num_gpus,
        )
        # Embeddings only: the engine need not load the tower.
        kwargs |= {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    else:
        kwargs["hf_overrides"] = {"prumerge": asdict(config), **kwargs.get("hf_overrides", {})}
    workers = engine_workers(engine_kwargs)
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=kwargs,
            concurrency=(actors.count, actors.count),
            batch_size=batch_size,
            should_continue_on_error=True,
            log_engine_metrics=False,
            placement_group_config={
                "bundle_per_worker": {"CPU": actors.num_cpus / workers, "GPU": gpus / workers}
            },
            chat_template_stage=_OFF,  # prompts are token ids already
            tokenize_stage=_OFF,
            detokenize_stage=_OFF,
            prepare_multimodal_stage=_OFF,
        ),
        preprocess=_Request(model, conv_template, image_aspect_ratio, dtype, max_new_tokens),
        postprocess=_Answer(model),
    )
    return processor(questions).map_batches(_as_answers, batch_size=None, batch_format="pyarrow")


class _Request:
    """A question as `ray.data.llm` takes it, or the error of its picture."""

    def __init__(
        self,
        model: str,
        conv_template: str | None,
        image_aspect_ratio: str | None,
        dtype: str,
        max_new_tokens: int,
    ) -> None:
        self._asked_with = (model, conv_template, image_aspect_ratio)
        self._dtype = dtype
        self._sampling = {"temperature": 0, "max_tokens": max_new_tokens}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        # Not "prompt", which the engine puts its own into.
        request = {"id": row["id"], "image": row["image"], "question": row["prompt"]}
        described, asked_with = _asked_with(*self._asked_with)
        item = items_from_images([Path(os.fsdecode(row["path"]))], [row["prompt"]])[0]
        if EMBEDS in row:
            if row[EMBEDS] is None:
                return {**request, ERROR: row[PICTURE_ERROR]}
            width = described.config.get_text_config().hidden_size
            picture: Any = [from_bytes(row[EMBEDS], width, getattr(torch, self._dtype))]
        else:
            try:
                picture = framed(asked_with, item.load())
            except PictureError as error:
                return {**request, ERROR: readable(error.says)}
        tokenizer = asked_with.processor.tokenizer
        prompts, adds_first = first_token_once(tokenizer, [format_prompt(asked_with, item)])
        ids = tokenizer(prompts[0], add_special_tokens=adds_first)["input_ids"]
        return {
            **request,
            EMBEDS: None,  # not once more
            "tokenized_prompt": ids,
            "multimodal_data": {"image": picture},
            "sampling_params": dict(self._sampling),
        }


class _Answer:
    """What came of a request, but for errors, which `ray.data.llm` hands on as they are."""

    def __init__(self, model: str) -> None:
        self._model = model

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        _, asked_with = _asked_with(self._model, None, None)
        placeholder = asked_with.processor.image_token_id
        return {
            **{name: row[name] for name in ("id", "image", "question")},
            "answer": row["generated_text"].strip(),
            "visual_tokens": sum(int(token) == placeholder for token in row["prompt_token_ids"]),
            "prompt_tokens": row["num_input_tokens"],
        }


@cache  # of a worker's process
def _asked_with(
    model: str, conv_template: str | None, image_aspect_ratio: str | None
) -> tuple[Described, Conversation]:
    described = describe(model)
    return described, conversation(described, conv_template, image_aspect_ratio)


def _as_answers(rows: pa.Table) -> pa.Table:
    """`rows.ANSWERS`, whatever columns rows with errors have brought."""
    questions = pa.table({"id": rows["id"], "image": rows["image"], "prompt": rows["question"]})
    wanted = [name for name in (*ANSWERS.names[3:], ERROR) if name in rows.column_names]
    answers = []
    for row in rows.select(wanted).to_pylist():
        error = row.pop(ERROR, None)
        answers.append({"error": error} if error else row)
    return answers_table(questions, answers)
