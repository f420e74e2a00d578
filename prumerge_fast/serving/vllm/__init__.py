"""The vLLM plugin: LLaVA-1.5 and LLaVA-NeXT with PruMerge at a fixed budget.

`vllm serve MODEL --hf-overrides '{"prumerge": {"variant": "prumerge+", "keep": 64}}'`, or the same
`hf_overrides` given to `vllm.LLM`. vLLM finds `register` by the entry point
`vllm.general_plugins` and calls it in each of its processes, once or more often.
"""

from __future__ import annotations

from prumerge_fast.serving.installed import NAME, tested_versions, version_of_vllm


def register() -> None:
    """Put this package's models in the place of vLLM's; without the setting they are the same.

    Raises:
        ImportError: This version of vLLM is made otherwise. vLLM then ends: it would ignore the
            setting.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"prumerge_fast: expected vLLM {tested_versions()}, got {version_of_vllm()} "
            f"({type(error).__name__}: {error}); to run vLLM without PruMerge, set the environment "
            f"variable VLLM_PLUGINS to the names of other plugins, without {NAME!r}, or to nothing"
        ) from error


def _register() -> None:
    from vllm import ModelRegistry

    from prumerge_fast.serving.vllm.checks import PRUNED, add_checks
    from prumerge_fast.serving.vllm.embeddings import refuse_unreadable

    # By name: vLLM imports the models where it runs them.
    models = f"{__name__}.llava:PruMergeLlava", f"{__name__}.llava_next:PruMergeLlavaNext"
    for architecture, model in zip(PRUNED, models, strict=True):
        ModelRegistry.register_model(architecture, model)
    add_checks()
    refuse_unreadable()
