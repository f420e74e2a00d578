"""What works with which model family, each cell by the test that shows it.

`.ci/run` runs these tests in every version that the table names; `tests/conftest.py` fails those
that are skipped.
"""

from __future__ import annotations

FAMILY_TESTS = "tests/families/test_families.py"
ORIGINAL_TESTS = "tests/families/test_original_llava.py"
VERSIONS = ("4.57.6", "5.17.0", "newest 5.x")
FAMILIES = {  # as `tests/tiny_families.py` calls them, and the class
    "LLaVA": "`LlavaForConditionalGeneration`",
    "LLaVA of several layers": "the same, `vision_feature_layer` a list",
    "ViP-LLaVA": "`VipLlavaForConditionalGeneration`",
    "LLaVA-NeXT": "`LlavaNextForConditionalGeneration`",
    "LLaVA-OneVision": "`LlavaOnevisionForConditionalGeneration`",
    "Video-LLaVA": "`VideoLlavaForConditionalGeneration`",
    "LLaVA-NeXT-Video": "`LlavaNextVideoForConditionalGeneration`",
    "LLaVA with SigLIP": "`LlavaForConditionalGeneration` with SigLIP",
    "LLaVA-NeXT with SigLIP": "`LlavaNextForConditionalGeneration` with SigLIP",
    "LLaVA with Pixtral": "`LlavaForConditionalGeneration` with Pixtral",
    "InternVL": "`InternVLForConditionalGeneration`",
}
FEATURES = {  # test of FAMILY_TESTS, with FAMILY for the family
    "generate": "test_generate[FAMILY-iqr]",
    "batch": "test_padded_batches_equal_single_prompts[FAMILY-left-iqr]",
    "beams": "test_beams[FAMILY]",
    "streamer": "test_streamer[FAMILY]",
    "labels": "test_loss[FAMILY-right]",
    "several images": "test_generate_from[FAMILY-several images]",
    "video": "test_generate_from[FAMILY-videos]",
    "4-bit": "test_four_bits[FAMILY]",
    "LoRA": "test_lora[FAMILY]",
    "compile": "test_compiled[FAMILY]",
    "offload": "test_offloaded[FAMILY]",
}
WITH_VIDEOS = ("Video-LLaVA", "LLaVA-NeXT-Video", "LLaVA-OneVision")
NO_VIDEOS = "not supported: the model takes no videos"
ORIGINAL = {  # test of ORIGINAL_TESTS, or why not
    "generate": "test_generate",
    "batch": "test_batches_equal_single_prompts",
    "beams": "test_beams_and_streamer",
    "streamer": "test_beams_and_streamer",
    "labels": "test_labels",
    "several images": "test_batches_equal_single_prompts",
    "video": "not supported: the model takes no videos",
    "4-bit": "not tested: transformers 4.37 quantises on a GPU only",
    "LoRA": "test_lora_checkpoint",
    "compile": "not tested: the package splices prompts token by token in Python",
    "offload": "not tested: the package loads its tower by itself, past accelerate's `device_map`",
}


def family_cell(family: str, feature: str) -> str:
    """A node id of pytest, or why there is none."""
    if feature == "video" and family not in WITH_VIDEOS:
        return NO_VIDEOS
    return f"{FAMILY_TESTS}::{FEATURES[feature].replace('FAMILY', family)}"


def node_ids() -> list[str]:
    """Of the families of transformers."""
    cells = [family_cell(family, feature) for family in FAMILIES for feature in FEATURES]
    return [cell for cell in cells if cell.startswith("tests/")]


def original_node_ids() -> list[str]:
    """Of the original LLaVA package."""
    return [f"{ORIGINAL_TESTS}::{test}" for test in ORIGINAL.values() if test.startswith("test_")]


def table() -> str:
    """Markdown: a row for each family, then the tests and the reasons."""
    notes: list[str] = []

    def shown(cell: str) -> str:
        if cell.startswith("test"):
            return "yes"
        if cell not in notes:
            notes.append(cell)
        return f"no ({notes.index(cell) + 1})"

    rows = [
        (title, ", ".join(VERSIONS), [shown(family_cell(family, f)) for f in FEATURES])
        for family, title in FAMILIES.items()
    ]
    rows.append(("llava-torch 1.2.2", "4.37.2", [shown(cell) for cell in ORIGINAL.values()]))
    lines = [
        "| model | transformers | " + " | ".join(FEATURES) + " |",
        "|---|---|" + "---|" * len(FEATURES),
        *(f"| {title} | {versions} | {' | '.join(cells)} |" for title, versions, cells in rows),
        "",
        *(f"({number}) {note}  " for number, note in enumerate(notes, 1)),
        "",
        f"| | test, in `{FAMILY_TESTS}` | in `{ORIGINAL_TESTS}` |",
        "|---|---|---|",
    ]
    for feature, test in FEATURES.items():
        own = ORIGINAL[feature]
        lines.append(f"| {feature} | `{test}` | {f'`{own}`' if own.startswith('test_') else '–'} |")
    return "\n".join(lines)
