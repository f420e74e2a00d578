"""The vLLM plugin: LLaVA-1.5 and LLaVA-NeXT with PruMerge at a fixed budget.

`vllm serve MODEL --hf-overrides '{"prumerge": {"variant": "prumerge+", "keep": 64}}'`, or the same
`hf_overrides` given to `vllm.LLM`. vLLM finds `register` by the entry point
`vllm.general_plugins` and calls it in each of its processes, once or more often.
"""

from __future__ import annotations


def register() -> None:
    """Put this package's models in the place of vLLM's; without the setting they are the same.

    Only names are registered: vLLM imports the models when it runs one.
    """
    from vllm import ModelRegistry

    models = f"{__name__}.llava:PruMergeLlava", f"{__name__}.llava_next:PruMergeLlavaNext"
    ModelRegistry.register_model("LlavaForConditionalGeneration", models[0])
    ModelRegistry.register_model("LlavaNextForConditionalGeneration", models[1])
