"""What can be chosen of a model and its prompts, for the command line and for lmms-eval alike.

Imports nothing that takes time: `--help` reads it.
"""

from __future__ import annotations

from enum import Enum

DEFAULT_FRAMES = 8  # of a video


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ConvTemplate(str, Enum):
    vicuna_v1 = "vicuna_v1"


class AspectRatio(str, Enum):
    pad = "pad"
