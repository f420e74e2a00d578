"""vLLM with and without PruMerge: requests a second, and what the vision tower needs at its peak.

    python bench/serving.py                              # the tower of LLaVA-1.5, a toy decoder
    python bench/serving.py --decoder 7b --layers 2      # layers of the 7B decoder's shape

Needs the extra `vllm`. Weights are random (`load_format="dummy"`): what is answered means nothing,
what it costs does. Each policy is an engine in a process of its own; they take the rounds in turn,
and the others wait. Every image is new, so that no cache answers. Rows of other decoders, and of
other numbers of layers, in the result file stay.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import script

script.interruptible()

import torch  # noqa: E402

from prumerge_fast.errors import InputError  # noqa: E402

RESULTS = Path(__file__).parent / "results"
POLICIES: dict[str, dict[str, Any] | None] = {
    "LLaVA": None,
    "PruMerge, keep=32": {"keep": 32},
    "PruMerge+, keep=144": {"variant": "prumerge+", "keep": 144},
}
DECODERS = ("toy", "7b")
TOY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
       "num_key_value_heads": 4}  # fmt: skip
ANSWER_TOKENS = 8
BUDGET = 2048  # tokens that vLLM computes in one step, and the encoder's outputs among them


def main(arguments: list[str] | None = None) -> Path:
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--decoder", choices=DECODERS, default="toy")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--requests", type=int, default=16, help="images of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving-cpu.json")
    options = parser.parse_args(arguments)
    for name in ("layers", "requests", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM: expected it to be installed, it is not; run: pip install '.[vllm]'")
    rows = script.read_result("--output", options.output) if options.output.exists() else []
    with script.taking_apart("--output", options.output):
        mine = (options.decoder, options.layers, options.dtype)
        rows = [row for row in rows if (row["decoder"], row["layers"], row["dtype"]) != mine]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), options.decoder, options.layers)
        row = measured(Path(folder), options)
    options.output.write_text(json.dumps([*rows, row], indent=2) + "\n")
    print(options.output)
    return options.output


def save(folder: Path, decoder: str, layers: int) -> None:
    """Configuration, tokenizer and image processor of the model, without weights."""
    from subjects import llava_1_5_config
    from transformers import AutoProcessor

    from prumerge_fast.demo import MODEL_DIR

    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    config = llava_1_5_config(layers)
    if decoder == "toy":
        for name, value in TOY.items():
            setattr(config.text_config, name, value)
        config.text_config.head_dim = TOY["hidden_size"] // TOY["num_attention_heads"]
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    config.architectures = ["LlavaForConditionalGeneration"]
    config.text_config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    side = config.vision_config.image_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.patch_size = config.vision_config.patch_size
    processor.save_pretrained(folder)


def measured(folder: Path, options: Any) -> dict[str, Any]:
    """One row of the result file."""
    from prumerge_fast.harness.provenance import provenance
    from prumerge_fast.serving.installed import version_of_vllm

    spawn = multiprocessing.get_context("spawn")
    engines = {}
    try:
        for name, setting in POLICIES.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=engine, args=(theirs, folder, setting, options.dtype), daemon=True
            )
            process.start()
            engines[name] = (ours, process)
            received(ours, process)  # ready
        seconds: dict[str, list[float]] = {name: [] for name in POLICIES}
        seed = 0
        for number in range(options.rounds + 1):  # the first warms up
            for name, (ours, process) in engines.items():
                ours.send(("round", seed, options.requests))
                took, tokens = received(ours, process)
                seed += options.requests
                if number:
                    seconds[name].append(took)
                    print(f"{name}: {options.requests / took:.2f} requests/s, {tokens} tokens each")
        policies = {}
        for name, (ours, process) in engines.items():
            ours.send(("memory", options.decoder == "toy"))
            ratios = [a / b for a, b in zip(seconds["LLaVA"], seconds[name], strict=True)]
            policies[name] = {
                "requests_per_second": options.requests / statistics.median(seconds[name]),
                "seconds": seconds[name],
                "ratio_median": statistics.median(ratios),
                "ratios": ratios,
                **received(ours, process),
            }
    finally:
        for ours, process in engines.values():
            ours.close()  # which ends the process
            process.join(30)
            if process.is_alive():
                process.terminate()
    origin = provenance([], torch.device("cpu"))
    origin["versions"]["vllm"] = version_of_vllm()
    origin["command"] = ["python", "bench/serving.py", *sys.argv[1:]]
    return {
        "decoder": options.decoder,
        "layers": options.layers,
        "dtype": options.dtype,
        "requests": options.requests,
        "answer_tokens": ANSWER_TOKENS,
        "max_num_batched_tokens": BUDGET,
        "policies": policies,
        **origin,
    }


def received(connection: Any, process: Any) -> Any:
    """What an engine's process sends next.

    Raises:
        InputError: It ended instead; what was wrong stands on standard error.
    """
    while not connection.poll(1):
        if not process.is_alive():
            raise InputError(f"vLLM: expected it to run, got exit code {process.exitcode}")
    return connection.recv()


def engine(connection: Any, folder: Path, setting: dict[str, Any] | None, dtype: str) -> None:
    """Answers what comes over the connection, until that closes."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import vllm

    llm = vllm.LLM(
        str(folder),
        dtype=dtype,
        load_format="dummy",
        distributed_executor_backend="uni",
        hf_overrides={} if setting is None else {"prumerge": setting},
        max_model_len=1024,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=64,
        mm_processor_cache_gb=0,
        enforce_eager=True,
    )
    connection.send("ready")
    while True:
        try:
            command, *values = connection.recv()
        except EOFError:
            return
        connection.send(
            answered(llm, *values)
            if command == "round"
            else memory(llm, setting is not None, *values)
        )


def answered(llm: Any, seed: int, count: int) -> tuple[float, int]:
    """Seconds for so many requests at once, and the tokens of a prompt."""
    import vllm

    from prumerge_fast.demo.items import items_from_demo

    items = items_from_demo(seed + count)[seed:]
    requests = [
        {
            "prompt": f"USER: <image>\n{one.text} ASSISTANT:",
            "multi_modal_data": {"image": one.load()},
        }
        for one in items
    ]
    parameters = vllm.SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    return time.perf_counter() - start, len(outputs[0].prompt_token_ids)


@torch.inference_mode()
def memory(llm: Any, pruned: bool, run: bool) -> dict[str, Any]:
    """Peak bytes beside the weights while the images are encoded that vLLM hands over at once.

    With PruMerge also as if the tower saw them all at once. The decoder takes no part in it, so
    that one of them is enough to `run` it for.
    """
    from peak_memory import peak_memory

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    side = model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    rows = model.prumerge.capacity(patches) if pruned else patches
    images = BUDGET // rows
    weights = model.vision_tower.parameters()
    pixels = torch.randn(images, 3, side, side, dtype=next(weights).dtype)

    def encode() -> Any:
        return model.embed_multimodal(pixel_values=pixels)

    def peak() -> int:
        found = peak_memory(encode, [pixels], torch.device("cpu"))
        return found["peak_torch_bytes"] - found["torch_bytes_before"]

    result = {"images_at_once": images, "tokens_per_image": rows}
    if run:
        result["encoder_peak_bytes"] = peak()
    if run and pruned:
        result["tower_batch"] = model.tower_batch
        model.tower_batch = images
        result["encoder_peak_bytes_unsplit"] = peak()
    return result


if __name__ == "__main__":
    script.run(main)
