"""The command line: `prumerge-fast compare`, `show`, `cost`, `evaluate`, `batch` and `doctor`.

Only what parses the arguments is imported here; PyTorch and transformers are imported by the
command that needs them, so that `--help` is instant.

Exit codes: 0 done; 2 bad input, or some pictures of many could not be read (one line on standard
error says what is wrong); 130 interrupted.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from typer.core import TyperOption

from prumerge_fast.errors import InputError, PruMergeError
from prumerge_fast.harness.files import NO_ROOM
from prumerge_fast.harness.options import DEFAULT_FRAMES, AspectRatio, ConvTemplate, Dtype

app = typer.Typer(
    name="prumerge-fast",
    help="LLaVA beside LLaVA-PruMerge: fewer visual tokens, the same answers.",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Variant(str, Enum):
    prumerge = "prumerge"
    prumerge_plus = "prumerge+"


class Merge(str, Enum):
    sum = "sum"
    average = "average"
    none = "none"


class Supplement(str, Enum):
    each = "each"
    image = "image"
    none = "none"


class Engine(str, Enum):
    transformers = "transformers"
    vllm = "vllm"


class Scores(str, Enum):
    auto = "auto"
    by_class = "class"
    received = "received"


class Heads(str, Enum):
    auto = "auto"
    joint = "joint"
    separate = "separate"


class Policies(str, Enum):
    methods = "methods"
    scores = "scores"


class Positions(str, Enum):
    compact = "compact"
    original = "original"


class Backend(str, Enum):
    auto = "auto"
    triton = "triton"
    torch = "torch"
    reference = "reference"


def _whole_number(value: str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"expected a whole number >= 1, got {value}")
    return int(value)


def _resource(value: str) -> float:
    """As Ray takes it: parts of one, or whole ones."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf or (number > 1 and number != int(number)):
        raise typer.BadParameter(f"expected a whole number or a share of 1, got {value}")
    return number


def _count_option(description: str, **options: Any) -> Any:
    return typer.Option(parser=_whole_number, metavar="N", help=description, **options)


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder or Hugging Face name of a LLaVA, such as llava-hf/llava-1.5-7b-hf, "
        "llava-hf/llava-v1.6-vicuna-7b-hf or LanguageBind/Video-LLaVA-7B-hf.",
        show_default="the small demo model",
    ),
]
QuestionsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Questions in LLaVA's format: question_id, image (or video), text; optionally answer "
        "(or label) and category.",
    ),
]
ImageFolderOption = Annotated[
    Path | None,
    typer.Option(
        help="Where the question file's images and videos are.", show_default="beside the file"
    ),
]
ConvTemplateOption = Annotated[
    ConvTemplate | None,
    typer.Option(
        help="vicuna_v1: the conversation LLaVA-1.5 was trained with, system message included.",
        show_default="the model's chat template",
    ),
]
AspectRatioOption = Annotated[
    AspectRatio | None,
    typer.Option(
        help="pad: images are padded to squares with the mean colour, as in LLaVA-1.5's own code.",
        show_default="as the model's image processor, which may crop",
    ),
]
FramesOption = Annotated[
    int, _count_option("Frames of a video, from its first to its last, evenly.")
]
VariantOption = Annotated[
    Variant | None,
    typer.Option(show_default="prumerge; prumerge+ where the vision tower has no class token"),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        help="How many patch tokens to keep of an image, a crop or a frame: a whole number, a "
        "share such as 0.25, or none: each image decides.",
        show_default="none; 0.25 where the vision tower has no class token",
    ),
]
NeighboursOption = Annotated[
    int, _count_option("How many similar tokens merge into each kept one.")
]
MergeOption = Annotated[
    Merge, typer.Option(help="sum: the authors' code; average: the paper's text; none: only prune.")
]
SupplementOption = Annotated[
    Supplement,
    typer.Option(
        help="One more token that sums up what was pruned: of each image, crop or frame; one of "
        "all crops of an image; or none."
    ),
]
ScoresOption = Annotated[
    Scores,
    typer.Option(
        help="What patches are ranked by: the attention that the class token pays them, or that "
        "which they receive from all patches. auto: the first where the tower has one."
    ),
]
HeadsOption = Annotated[
    Heads,
    typer.Option(
        help="One head over the full width (joint), or the mean over the layer's own (separate). "
        "auto: joint for the class token's attention."
    ),
]
PositionsOption = Annotated[
    Positions,
    typer.Option(
        help="compact: the language model counts the tokens that are left; original: each stands "
        "in its place in the whole prompt."
    ),
]
BackendOption = Annotated[Backend, typer.Option(help="What runs the token reduction.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: float32 on a CPU, float16 on a GPU.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Stop at the first picture that cannot be read. Otherwise it is reported, its "
        "questions are left out, and the exit code is 2 at the end.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Write JSON, with provenance, to standard output.")
]


@app.command("compare")
def _compare(
    context: typer.Context,
    more_files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES]...", help="More after --images or --videos, as if after another one."
        ),
    ] = None,
    model: ModelOption = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER ...",
            help="Images to ask about; of a folder, those right in it. HEIC needs pillow-heif.",
        ),
    ] = None,
    videos: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER ...",
            help="Videos to ask about, of a model that takes videos (extra: video).",
        ),
    ] = None,
    frames: FramesOption = DEFAULT_FRAMES,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A question about every image and video; may be repeated. One that contains "
            "`<image>` or `<video>` is taken as the whole prompt, another gets the model's chat "
            "format."
        ),
    ] = None,
    questions: QuestionsOption = None,
    image_folder: ImageFolderOption = None,
    conv_template: ConvTemplateOption = None,
    image_aspect_ratio: AspectRatioOption = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.jsonl",
            help="Write answers as they come, in the format LLaVA's evaluation scripts read: "
            "OUT-llava.jsonl, OUT-prumerge.jsonl, OUT-prumerge-plus.jsonl.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace answer files that hold something.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the answer files: ask only what they lack, pictures that could not be "
            "read once more. Times are of what is asked now.",
        ),
    ] = False,
    strict: StrictOption = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.html",
            help="Write a page as well: figures, plots, and the first questions with pictures of "
            "what each policy keeps. Is replaced if it exists.",
        ),
    ] = None,
    count: Annotated[
        int, _count_option("How many questions about demo scenes, without --images.")
    ] = 200,
    variant: Annotated[
        list[Variant] | None,
        typer.Option(help="May be repeated.", show_default="both"),
    ] = None,
    keep: KeepOption = None,
    neighbours: NeighboursOption = 32,
    merge: MergeOption = Merge.sum,
    scores: ScoresOption = Scores.auto,
    heads: HeadsOption = Heads.auto,
    positions: PositionsOption = Positions.compact,
    supplement: SupplementOption = Supplement.each,
    backend: BackendOption = Backend.auto,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Language model in NF4 (extra: int4).")
    ] = False,
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Language model in LLM.int8() (extra: int4).")
    ] = False,
    batch_size: Annotated[int, _count_option("Questions answered at once.")] = 1,
    max_new_tokens: Annotated[int, _count_option("Longest answer.")] = 32,
    repeat: Annotated[int, _count_option("Time every batch so often; medians are shown.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """LLaVA beside PruMerge and PruMerge+: tokens, time, memory, answers.

    Without --images, --videos and --questions, asks about demo scenes that no one was trained on.
    Accuracy and agreement compare answers in lower case, without punctuation at the ends and
    without a leading article.
    """
    from prumerge_fast.cli.compare import CompareOptions, run

    more_images, more_videos = _after_which(context, more_files or [])
    run(
        CompareOptions(
            command=context.obj,
            model=model,
            images=[*(images or []), *more_images],
            videos=[*(videos or []), *more_videos],
            frames=frames,
            prompts=prompt or [],
            questions=questions,
            image_folder=image_folder,
            conv_template=_value(conv_template),
            image_aspect_ratio=_value(image_aspect_ratio),
            answers=answers,
            overwrite=overwrite,
            resume=resume,
            strict=strict,
            html=html,
            count=count,
            chosen=[
                _chosen(one, keep, neighbours, merge, scores, heads, positions, supplement)
                for one in dict.fromkeys(variant or Variant)
            ],
            backend=backend.value,
            dtype=dtype.value,
            device=device,
            bits=_bits(load_in_4bit, load_in_8bit),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            repeat=repeat,
            as_json=as_json,
        )
    )


@app.command("show")
def _show(
    context: typer.Context,
    image: Annotated[
        str, typer.Argument(help="An image or video file, or demo:INDEX for a demo scene.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.png",
            help="Is replaced if it exists.",
            show_default="IMAGE-VARIANT.png",
        ),
    ] = None,
    frames: FramesOption = DEFAULT_FRAMES,
    model: ModelOption = None,
    image_aspect_ratio: AspectRatioOption = None,
    variant: VariantOption = None,
    keep: KeepOption = None,
    neighbours: NeighboursOption = 32,
    scores: ScoresOption = Scores.auto,
    heads: HeadsOption = Heads.auto,
    supplement: SupplementOption = Supplement.each,
    backend: BackendOption = Backend.auto,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Attention, kept tokens and merge neighbourhoods of one image or video, drawn over it.

    Crops are drawn in their places beside the overview, a video frame by frame.
    """
    from prumerge_fast.cli.show import ShowOptions, run

    run(
        ShowOptions(
            command=context.obj,
            image=image,
            output=output,
            frames=frames,
            model=model,
            image_aspect_ratio=_value(image_aspect_ratio),
            chosen=_chosen(
                variant, keep, neighbours, Merge.sum, scores, heads, supplement=supplement
            ),
            backend=backend.value,
            dtype=dtype.value,
            device=device,
            as_json=as_json,
        )
    )


@app.command("cost")
def _cost(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="llava-1.5-7b, llava-1.5-13b (built in), or a folder or Hugging Face name of a "
            "LLaVA, of which only the configuration is read; may be repeated.",
            show_default="both built-in ones",
        ),
    ] = None,
    variant: Annotated[
        list[Variant] | None, typer.Option(help="May be repeated.", show_default="both")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="How many patch tokens to keep: a whole number, or a share such as 0.25.",
            show_default="the paper's averages: 40 of 576 for PruMerge, 144 for PruMerge+",
        ),
    ] = None,
    scores: ScoresOption = Scores.auto,
    heads: HeadsOption = Heads.auto,
    text_tokens: Annotated[int, _count_option("Tokens of the prompt beside the image's.")] = 40,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="V100, A100, H100, RTX4090, T4 or cpu (this one, measured); may be repeated.",
            show_default="all",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Operations, bytes, memory and roofline times from a model's shape; the paper's beside ours.

    Nothing is run but, for `cpu`, two seconds of products and copies: these are counts and a model.
    """
    from prumerge_fast.cli.cost import CostOptions, run

    run(
        CostOptions(
            command=context.obj,
            models=list(dict.fromkeys(model or [])),
            chosen=[
                _chosen(one, keep, 32, Merge.sum, scores, heads)
                for one in dict.fromkeys(variant or Variant)
            ],
            text_tokens=text_tokens,
            devices=device or [],
            as_json=as_json,
        )
    )


@app.command("evaluate")
def _evaluate(
    context: typer.Context,
    model: ModelOption = None,
    questions: QuestionsOption = None,
    image_folder: ImageFolderOption = None,
    conv_template: ConvTemplateOption = None,
    image_aspect_ratio: AspectRatioOption = None,
    frames: FramesOption = DEFAULT_FRAMES,
    count: Annotated[
        int, _count_option("How many questions about demo scenes, without --questions.")
    ] = 2000,
    policies: Annotated[
        Policies,
        typer.Option(
            help="methods: PruMerge beside simple ways to choose; scores: PruMerge by each score "
            "of patches, and with positions that close the gaps or stay."
        ),
    ] = Policies.methods,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            parser=_whole_number,
            metavar="N",
            help="Visual tokens of an image, a crop or a frame at which methods are compared; may "
            "be repeated.",
            show_default="8 16 32 64 128",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.json",
            help="Write the results there, and beside it the answers as they come: the same "
            "command again goes on from them.",
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, _count_option("Questions answered at once.")] = 25,
    max_new_tokens: Annotated[int, _count_option("Longest answer.")] = 16,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Accuracy with intervals, at equal numbers of tokens and with paired differences.

    Without --questions, asks about demo scenes that no one was trained on.
    """
    from prumerge_fast.cli.evaluate import run
    from prumerge_fast.evaluation.run import EvaluationOptions

    run(
        EvaluationOptions(
            command=context.obj,
            model=model,
            questions=questions,
            image_folder=image_folder,
            conv_template=_value(conv_template),
            image_aspect_ratio=_value(image_aspect_ratio),
            frames=frames,
            count=count,
            policies=policies.value,
            budgets=list(dict.fromkeys(tokens or (8, 16, 32, 64, 128))),
            output=output,
            dtype=dtype.value,
            device=device,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            strict=strict,
            as_json=as_json,
        )
    )


@app.command("batch")
def _batch(
    context: typer.Context,
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="A folder, with those in it; an image; or a manifest (.jsonl or .parquet) whose "
            "rows have an image and, if they like, a prompt of their own.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "--out",
            "-o",
            metavar="DIR",
            help="The folder of the answers. The same command again does only what is missing.",
        ),
    ],
    model: ModelOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A question about every image; may be repeated. One that contains `<image>` is "
            "taken as the whole prompt, another gets the model's chat format."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Where a manifest's images are.", show_default="beside the manifest"),
    ] = None,
    conv_template: ConvTemplateOption = None,
    image_aspect_ratio: AspectRatioOption = None,
    variant: VariantOption = None,
    keep: KeepOption = None,
    neighbours: NeighboursOption = 32,
    merge: MergeOption = Merge.sum,
    scores: ScoresOption = Scores.auto,
    heads: HeadsOption = Heads.auto,
    positions: PositionsOption = Positions.compact,
    supplement: SupplementOption = Supplement.each,
    engine: Annotated[
        Engine,
        typer.Option(
            help="transformers: patched models; vllm: `ray.data.llm` (extra: vllm), to which, "
            "without --keep, more actors hand encoded images."
        ),
    ] = Engine.transformers,
    engine_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="More arguments of vLLM's engine, such as '{\"max_model_len\": 4096}'.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a Ray cluster that runs, or auto.",
            show_default="Ray is started on this machine, and ended",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        _count_option("How many models run at once.", show_default="one a GPU; without GPUs one"),
    ] = None,
    num_cpus: Annotated[
        float,
        typer.Option(parser=_resource, metavar="N", help="CPUs that Ray keeps for each actor."),
    ] = 1.0,
    num_gpus: Annotated[
        float | None,
        typer.Option(
            parser=_resource,
            metavar="N",
            help="GPUs of each actor; 0.5: two share one.",
            show_default="1 where there are GPUs",
        ),
    ] = None,
    backend: BackendOption = Backend.auto,
    dtype: DtypeOption = Dtype.auto,
    batch_size: Annotated[int, _count_option("Questions an actor is given at once.")] = 16,
    max_new_tokens: Annotated[int, _count_option("Longest answer.")] = 64,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again what has an error in DIR.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answers about very many images, on one machine or a cluster, by Ray Data (extra: ray).

    DIR gets answers/*.parquet and answers.jsonl, with a row for every image and prompt. An image
    that cannot be asked about is a row with its error, and the exit code is 2 at the end.
    """
    from prumerge_fast.serving.batch.options import BatchOptions, check_installed

    check_installed(engine.value)
    from prumerge_fast.cli.batch import run

    run(
        BatchOptions(
            command=context.obj,
            images=images,
            model=model,
            prompts=list(dict.fromkeys(prompt or [])),
            output=output,
            image_folder=image_folder,
            conv_template=_value(conv_template),
            image_aspect_ratio=_value(image_aspect_ratio),
            chosen=_chosen(variant, keep, neighbours, merge, scores, heads, positions, supplement),
            engine=engine.value,
            engine_kwargs=_engine_kwargs(engine_kwargs, engine),
            address=address,
            actors=actors,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            backend=backend.value,
            dtype=dtype.value,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            retry_errors=retry_errors,
            shows_progress=sys.stdout.isatty() and not as_json,  # Ray writes its bars there
        ),
        as_json=as_json,
    )


@app.command("doctor")
def _doctor(context: typer.Context, model: ModelOption = None, as_json: JsonOption = False) -> None:
    """What is installed, which backend will run, what scores a model's patches, and why."""
    from prumerge_fast.cli.doctor import run

    run(context.obj, model, as_json=as_json)


def _after_which(context: typer.Context, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files that stand by themselves among the arguments: those behind --videos come second."""
    options = [param for param in context.command.params if isinstance(param, TyperOption)]
    flags = {name for option in options if option.is_flag for name in option.opts}
    by_themselves: list[bool] = []  # whether each is a video
    is_video = is_value = only_files = False
    for argument in context.obj[1:]:  # behind the command's name
        if is_value:
            is_value = False
        elif only_files or not argument.startswith("-") or argument == "-":
            by_themselves.append(is_video)
        elif argument == "--":
            only_files = True
        else:
            name, equals, _ = argument.partition("=")
            is_video = name == "--videos" or (is_video and name != "--images")
            is_value = not equals and name not in flags
    images, videos = (
        [file for file, found in zip(files, by_themselves, strict=True) if found == wanted]
        for wanted in (False, True)
    )
    return images, videos


def _value(choice: Enum | None) -> str | None:
    return None if choice is None else choice.value


def _chosen(
    variant: Variant | None,
    keep: str | None,
    neighbours: int,
    merge: Merge,
    scores: Scores,
    heads: Heads,
    positions: Positions = Positions.compact,
    supplement: Supplement = Supplement.each,
) -> dict[str, Any]:
    """Options of `PruMergeConfig`; what is not given is left to the model."""
    from prumerge_fast.reduction.config import PruMergeConfig

    chosen: dict[str, Any] = {
        "neighbours": neighbours,
        "merge": merge.value,
        "scores": scores.value,
        "heads": heads.value,
        "positions": positions.value,
        "supplement": {"each": True, "image": "image", "none": False}[supplement.value],
    }
    if variant is not None:
        chosen["variant"] = variant.value
    try:
        if keep == "none":
            chosen["keep"] = None
        elif keep is not None:
            chosen["keep"] = int(keep) if keep.lstrip("+-").isdecimal() else float(keep)
        PruMergeConfig(**chosen)
    except ValueError:
        raise InputError(
            "--keep: expected a whole number >= 1 (tokens), a share in (0, 1] such as 0.25, or "
            f"none, got {keep}"
        ) from None
    return chosen


def _engine_kwargs(text: str | None, engine: Engine) -> dict[str, Any]:
    if text is None:
        return {}
    if engine is not Engine.vllm:
        raise InputError(f"--engine-kwargs: expected --engine vllm beside it, got {engine.value}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--engine-kwargs: expected a JSON object, got {text} ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"--engine-kwargs: expected a JSON object, got {text}")
    for name in ("model", "dtype"):
        if name in found:
            raise InputError(f"--engine-kwargs: expected no {name}, which is --{name}, got {text}")
    overrides = found.get("hf_overrides", {})
    if not isinstance(overrides, dict) or "prumerge" in overrides:
        raise InputError(
            "--engine-kwargs: expected hf_overrides to be a JSON object without prumerge, which is "
            "--keep, --variant, --neighbours, --merge, --scores, --heads and --supplement, got "
            f"{text}"
        )
    return found


def _bits(load_in_4bit: bool, load_in_8bit: bool) -> int | None:
    if load_in_4bit and load_in_8bit:
        raise InputError("--load-in-8bit: expected it without --load-in-4bit, got both")
    return 4 if load_in_4bit else 8 if load_in_8bit else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: Those of the process for `None`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and answers may hold what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    # Bad usage, in typer of any version: the base class is public only through this subclass.
    usage_error: Any = typer.BadParameter.__base__
    # Phones take 200 megapixels; Pillow refuses twice this number, for fear of small files that
    # fill the memory.
    Image.MAX_IMAGE_PIXELS = 2**27
    try:
        code = app(arguments, prog_name="prumerge-fast", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except usage_error as error:
        return _fail(error.format_message())
    except PruMergeError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno in NO_ROOM:  # which names no file
            return _fail(f"expected room for what is written, got {error}")
        if error.filename is None:  # no file's: what went wrong is in the traceback
            raise
        return _fail(f"expected a file that can be read or written, got {error}")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"prumerge-fast: {' '.join(message.split())}", file=sys.stderr)
    return 2
