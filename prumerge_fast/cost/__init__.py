"""What a LLaVA costs with and without PruMerge, from its shape alone: counts, not timings.

    from prumerge_fast import PruMergeConfig, cost

    plain = cost.estimate(cost.LLAVA_1_5_7B, None, text_tokens=40)
    pruned = cost.estimate(cost.LLAVA_1_5_7B, PruMergeConfig(keep=40), text_tokens=40)
    plain.stages["prefill"].operations / pruned.stages["prefill"].operations
    pruned.seconds(cost.DEVICES["V100"])  # by stage; a roofline model, not a measurement

`docs/cost.md` gives the formulas in words.
"""

from prumerge_fast.cost.devices import DEVICES, Device, measured_cpu
from prumerge_fast.cost.estimate import PRECISIONS, Estimate, Precision, StageCost, estimate
from prumerge_fast.cost.published import Comparison, compare_with_paper
from prumerge_fast.cost.shapes import (
    LLAVA_1_5_7B,
    LLAVA_1_5_13B,
    DecoderShape,
    LlavaShape,
    TowerShape,
    shape_of,
)

__all__ = [
    "DEVICES",
    "LLAVA_1_5_7B",
    "LLAVA_1_5_13B",
    "PRECISIONS",
    "Comparison",
    "DecoderShape",
    "Device",
    "Estimate",
    "LlavaShape",
    "Precision",
    "StageCost",
    "TowerShape",
    "compare_with_paper",
    "estimate",
    "measured_cpu",
    "shape_of",
]
