"""`llava_prumerge`: a LLaVA of transformers, with or without PruMerge, under lmms-eval.

Batches are padded and answered at once; an error ends the run and leaves no empty answer behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from tqdm import tqdm

from prumerge_fast.errors import InputError
from prumerge_fast.harness.inputs import IMAGE_TOKEN, VIDEO_TOKEN
from prumerge_fast.harness.models import config_of, load
from prumerge_fast.harness.options import DEFAULT_FRAMES, AspectRatio, ConvTemplate, Dtype
from prumerge_fast.harness.pictures import as_seen
from prumerge_fast.harness.prompts import chat_prompt, model_inputs, placeholder
from prumerge_fast.harness.videos import read_video
from prumerge_fast.patching.patch import patch
from prumerge_fast.reduction.config import PruMergeConfig, Variant

UNPRUNED = "none"
_SAMPLING = ("temperature", "top_p", "num_beams", "do_sample", "max_new_tokens")
_WITHOUT_EFFECT = ("image_aspect_ratio",)  # tasks set it for other models; ours is an argument
_CHOICES = {
    "variant": (None, *get_args(Variant), UNPRUNED),
    "dtype": [dtype.value for dtype in Dtype],
    "conv_template": [None, *(template.value for template in ConvTemplate)],
    "image_aspect_ratio": [None, *(ratio.value for ratio in AspectRatio)],
}


class Picture(NamedTuple):
    """An image, or the frames [F, height, width, 3] of a video; `modality` says which."""

    modality: str
    content: Any


class LlavaPruMerge(lmms):
    """A LLaVA of transformers, of any family that `patch` takes, for lmms-eval, patched.

    Args:
        pretrained: Folder or Hugging Face name.
        variant: "prumerge", "prumerge+", or "none" for the model as it is. `None`: "prumerge", or
            "prumerge+" where the vision tower has no class token.
        keep: How many patch tokens to keep of an image, a crop or a frame: a number, or a share
            such as 0.25; "none" lets each image decide. `None`: that, or 0.25 where the vision
            tower has no class token.
        scores: "auto", "class" or "received", as in `PruMergeConfig`.
        heads: "auto", "joint" or "separate", as in `PruMergeConfig`.
        positions: "compact" or "original", as in `PruMergeConfig`.
        dtype: "auto" (float32 on a CPU, else float16), "float32", "bfloat16" or "float16".
        load_in_4bit: Language model in NF4 (bitsandbytes).
        conv_template: `None`: the processor's chat template, as `prumerge-fast compare`;
            "vicuna_v1": LLaVA-1.5's own conversation, which begins with a system message.
        image_aspect_ratio: `None`: as the image processor does, which crops for the checkpoints on
            the hub; "pad": made square with the processor's mean colour before, as in LLaVA-1.5.
        frames: How many frames of a video are read, evenly from its first to its last.
        batch_size: Questions answered at once.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:INDEX"; under
            `accelerate launch`, each process takes its own GPU.
        max_batch_size: lmms-eval's option for batch sizes that it finds by itself, which are not
            supported.

    Raises:
        TypeError: An argument is not known.
        ValueError: An argument is out of range.
        UnsupportedModelError: PruMerge cannot work on this model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        variant: str | None = None,
        keep: int | float | str | None = None,
        scores: str = "auto",
        heads: str = "auto",
        positions: str = "compact",
        dtype: str = "auto",
        load_in_4bit: bool = False,
        conv_template: str | None = None,
        image_aspect_ratio: str | None = None,
        frames: int = DEFAULT_FRAMES,
        batch_size: int | str = 1,
        device: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _checked_batch_size(batch_size)
        if max_batch_size is not None:
            raise ValueError(f"max_batch_size: expected none, got {max_batch_size}")
        _check_choices(
            variant=variant,
            dtype=dtype,
            conv_template=conv_template,
            image_aspect_ratio=image_aspect_ratio,
        )
        if not isinstance(load_in_4bit, bool):
            raise TypeError(f"load_in_4bit: expected True or False, got {load_in_4bit!r}")
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames: expected a whole number >= 1, got {frames!r}")
        self._frames = frames
        if variant == UNPRUNED:
            for name, value, unset in (
                ("keep", keep, None),
                ("scores", scores, "auto"),
                ("heads", heads, "auto"),
                ("positions", positions, "compact"),
            ):
                if value != unset:
                    raise ValueError(
                        f"{name}: expected none beside variant={UNPRUNED}, got {value}"
                    )
            chosen: dict[str, Any] | None = None
        else:
            chosen = {"scores": scores, "heads": heads, "positions": positions}
            if variant is not None:
                chosen["variant"] = variant
            if keep is not None:
                chosen["keep"] = None if keep == "none" else keep
            PruMergeConfig(**chosen)  # raises before the model is loaded
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            device = str(self.accelerator.device)
        try:
            self._loaded = load(
                pretrained,
                dtype=dtype,
                device=device,
                bits=4 if load_in_4bit else None,
                conv_template=conv_template,
                image_aspect_ratio=image_aspect_ratio,
            )
            if chosen is not None:
                patch(self._loaded.model, config_of(self._loaded.model, chosen))
        except InputError as error:
            raise _of_argument(error) from None

    @property
    def model(self) -> Any:
        """The LLaVA, patched unless `variant` is "none"."""
        return self._loaded.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._loaded.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests (context, options, visuals, id, task, split)."""
        # By options first: a batch shares them.
        batches = Collator(
            [request.args for request in requests], lambda args: (-len(args[0]), args[0]),
            grouping=True,
        )  # fmt: skip
        answers: list[str] = []
        with self._progress(len(requests)) as progress:
            for batch in batches.get_batched(n=self.batch_size):
                options = batch[0][1]
                pictures = [self._pictures(*args[2:]) for args in batch]
                texts = self._answer([args[0] for args in batch], pictures, options)
                for args, text in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", (args[0], options), text)
                answers += texts
                progress.update(len(batch))
        return batches.get_original(answers)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each request (context, continuation, visuals, id, task, split): mean loss, greedy.

        The loss a token of the continuation, of which tasks take the smallest (lmms-eval's own
        models return the same), and whether greedy decoding would have given the continuation.
        """
        found = []
        with self._progress(len(requests)) as progress:
            for context, target, visuals, number, task, split in (r.args for r in requests):
                document = self.task_dict[task][split][number]
                continuation = target if isinstance(target, str) else target(document)
                pictures = self._pictures(visuals, number, task, split)
                found.append(self._loss(context, str(continuation), pictures))
                progress.update()
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("llava_prumerge: expected tasks of one round, got several rounds")

    def _pictures(self, visuals: Any, number: int, task: str, split: str) -> list[Picture]:
        """Images, and videos, which lmms-eval gives by the names of their files."""
        found = []
        for one in visuals(self.task_dict[task][split][number]) or []:
            if isinstance(one, Image.Image):
                found.append(Picture("image", as_seen(one, f"that of {task} {number}")))
            elif isinstance(one, (str, Path)) and "video" in self._loaded.adapter.pixels:
                found.append(Picture("video", read_video(Path(one), self._frames)))
            else:
                taken = "images or files of videos"
                if "video" not in self._loaded.adapter.pixels:
                    taken = f"images, which are all that a {type(self.model).__name__} takes,"
                raise TypeError(
                    f"{task}: expected {taken} for llava_prumerge, got {type(one).__name__}"
                )
        return found

    def _prompt(self, context: str, pictures: Sequence[Picture]) -> str:
        # Contexts of some tasks say where their images are.
        tokens = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}
        missing = [one.modality for one in pictures if tokens[one.modality] not in context]
        for modality in self._loaded.adapter.pixels:
            context = context.replace(tokens[modality], placeholder(self._loaded, modality))
        return chat_prompt(self._loaded, context, missing)

    def _inputs(self, prompts: list[str], pictures: list[list[Picture]]) -> Any:
        images, videos = (
            [one.content for some in pictures for one in some if one.modality == modality]
            for modality in ("image", "video")
        )
        return model_inputs(self._loaded, prompts, images, videos)

    @torch.inference_mode()
    def _answer(
        self, contexts: list[str], pictures: list[list[Picture]], options: dict[str, Any]
    ) -> list[str]:
        given = dict(options)
        until = given.pop("until", None) or []
        ends = [until] if isinstance(until, str) else until
        sampling = {name: given.pop(name) for name in _SAMPLING if name in given}
        unknown = [name for name in given if name not in _WITHOUT_EFFECT]
        if unknown:
            logger.warning(f"generation_kwargs without effect on llava_prumerge: {unknown}")
        sampling.setdefault("max_new_tokens", 1024)
        # Tasks give either, or both; a temperature of 0 is greedy whatever else they say.
        temperature = sampling.get("temperature")
        sampling["do_sample"] = temperature != 0 and sampling.get("do_sample", bool(temperature))
        if not sampling["do_sample"]:  # transformers warns of what sampling alone reads
            sampling.update(temperature=None, top_p=None, top_k=None)
        prompts = [self._prompt(*each) for each in zip(contexts, pictures, strict=True)]
        inputs = self._inputs(prompts, pictures)
        tokenizer = self._loaded.processor.tokenizer
        output = self.model.generate(**inputs, **sampling, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [_before(text, ends).strip() for text in texts]

    @torch.inference_mode()
    def _loss(self, context: str, continuation: str, pictures: list[Picture]) -> tuple[float, bool]:
        prompt = self._prompt(context, pictures)
        # As LLaVA was trained: "ASSISTANT: answer".
        space = "" if prompt[-1:].isspace() or continuation[:1].isspace() else " "
        whole = f"{prompt}{space}{continuation}"
        tokenizer = self._loaded.processor.tokenizer
        count = len(tokenizer(whole)["input_ids"]) - len(tokenizer(prompt)["input_ids"])
        if count < 1:
            raise ValueError(
                f"loglikelihood: expected a continuation with tokens, got {continuation!r}"
            )
        inputs = self._inputs([whole], [pictures])
        target = inputs["input_ids"][:, -count:]  # [1, T]
        logits = self.model(**inputs, logits_to_keep=count + 1).logits[:, :-1].float()  # [1, T, V]
        loss = torch.nn.functional.cross_entropy(logits[0], target[0])
        return loss.item(), bool((logits.argmax(-1) == target).all())

    def _progress(self, total: int) -> tqdm[Any]:
        return tqdm(total=total, disable=self.rank != 0, desc="llava_prumerge")


def _before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of the strings that end it."""
    for end in ends:
        text = text.split(end)[0] if end else text
    return text


def _of_argument(error: InputError) -> InputError:
    """The same error with the argument's name in place of the command line's option."""
    option, _, says = str(error).partition(": ")
    name = option.removeprefix("--").replace("-", "_")
    return InputError(f"{'pretrained' if name == 'model' else name}: {says}")


def _check_choices(**given: Any) -> None:
    for name, value in given.items():
        if value not in _CHOICES[name]:
            expected = " or ".join(repr(choice) for choice in _CHOICES[name] if choice is not None)
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _checked_batch_size(value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"batch_size: expected a whole number >= 1, got {value}")
    return int(value)
