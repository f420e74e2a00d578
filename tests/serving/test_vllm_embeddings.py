"""Embeddings in place of images: how the plugin reads them, and answers from an encoder stage."""

import io

import numpy as np
import pytest
import torch
from engines import engine, expected, said, saved_demo
from PIL import Image
from saved_families import save
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import LlavaImageEmbeddingInputs
from vllm.model_executor.models.llava_next import LlavaNextImageEmbeddingInputs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media.image import ImageEmbeddingMediaIO
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems

from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving import PruMergeEncoder
from prumerge_fast.serving.vllm import register

WIDTH = 64
RAGGED = [torch.ones(3, WIDTH), torch.ones(5, WIDTH)]


@pytest.fixture(scope="module", params=["LLaVA", "LLaVA-NeXT"])
def folder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[None, {"keep": 4}], ids=["no setting", "setting"])
def parse(request, folder):
    """A function: how the plugin's model has vLLM read images."""
    register()
    config = ModelConfig(
        str(folder),
        dtype="float16",
        enable_mm_embeds=True,
        hf_overrides={} if request.param is None else {"prumerge": request.param},
    )
    parser = MULTIMODAL_REGISTRY.create_processor(config).info.data_parser
    return lambda images: parser.parse_mm_data({"image": images})["image"]


@pytest.mark.parametrize("inputs", [LlavaImageEmbeddingInputs, LlavaNextImageEmbeddingInputs])
def test_vllm_alone_refuses_embeddings_of_mixed_lengths(inputs):
    """Red: vLLM takes them by itself, and `EmbeddingsOfAnyLength` may go."""
    inputs(type="image_embeds", data=[RAGGED[0], RAGGED[0]])
    with pytest.raises(ValueError, match="inconsistent shapes"):
        inputs(type="image_embeds", data=RAGGED)


def test_embeddings_that_are_some(parse):
    for images in (RAGGED, torch.ones(2, 3, WIDTH), [RAGGED[0].double(), RAGGED[1].bfloat16()]):
        items = parse(images)
        assert isinstance(items, ImageEmbeddingItems)
        assert [len(items.get(i)) for i in range(2)] == [len(one) for one in images]


def test_pixels_are_left_alone(parse):
    square = torch.zeros(3, 30, 30)
    for images in ([square, square], torch.stack([square] * 2), [Image.new("RGB", (30, 30))] * 2):
        items = parse(images)
        assert isinstance(items, ImageProcessorItems)
        assert items.get_count() == 2


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (torch.full((3, WIDTH), torch.nan), r"finite numbers in the model's float16"),
        (torch.full((3, WIDTH), -torch.inf), r"finite numbers in the model's float16"),
        (torch.full((3, WIDTH), 1e6), r"finite numbers in the model's float16"),
        (torch.ones(0, WIDTH), r"at least one row, got \[0, 64\]"),
        (torch.ones(3, WIDTH, dtype=torch.int32), r"float32, bfloat16, .*got torch.int32"),
        (torch.ones(3, WIDTH, dtype=torch.complex64), r"float32, bfloat16, .*got torch.complex64"),
        (torch.ones(WIDTH), r"\[n, D\], got \[64\]"),
        (torch.ones(3, 3, WIDTH), r"\[n, D\], got \[3, 3, 64\]"),
        (torch.ones(1, 1, 3, WIDTH), r"\[n, D\], got \[1, 1, 3, 64\]"),
    ],
)
def test_embeddings_that_are_none(parse, second, says):
    with pytest.raises(VLLMValidationError, match=rf"^image_embeds\[1\]: expected .*{says}"):
        parse([RAGGED[0], second])


def test_fields_are_no_embedding(parse):
    with pytest.raises(VLLMValidationError, match=r"got fields named 'image_embeds', 'sizes'"):
        parse({"image_embeds": torch.ones(1, 3, WIDTH), "sizes": torch.ones(1, 2)})


def test_registered_twice_reads_as_once():
    register()
    load = ImageEmbeddingMediaIO.load_bytes
    register()
    assert ImageEmbeddingMediaIO.load_bytes is load
    with pytest.raises(VLLMValidationError, match=r"7 bytes that are none"):
        ImageEmbeddingMediaIO().load_bytes(b"garbage")


def npy(header):
    with io.BytesIO() as file:
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue() + b"0" * 64


UNREADABLE = {
    "text": npy({"descr": "<U4", "fortran_order": False, "shape": (1, 4)}),
    "fields": npy({"descr": [("a", "<f4")], "fortran_order": False, "shape": (1, 4)}),
    "open header": b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((",
    "archive": b"PK\x03\x04garbage",
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_bytes_that_no_reader_expects(data):
    """Whatever a reader raises for them: an error of another kind is the server's own, with 500."""
    register()
    with pytest.raises(VLLMValidationError, match=rf"{len(data)} bytes that are none"):
        ImageEmbeddingMediaIO().load_bytes(data)


SHAPES = [(168, 168), (500, 160), (160, 500), (700, 90), (333, 401)]


def test_llava_next_from_an_encoder_stage(tmp_path):
    """Rows that each picture decides, in both orders, for an engine without a vision tower."""
    folder = saved_demo(tmp_path / "next", "LlavaNext")
    scenes = [item.load() for item in items_from_demo(len(SHAPES))]
    pictures = [scene.resize(shape) for scene, shape in zip(scenes, SHAPES, strict=True)]
    text = "USER: {} What is it? ASSISTANT:"
    asked = [(text.format("<image>\n"), [one]) for one in pictures]
    asked.append((text.format("<image>\n" * 3), pictures[:3]))
    options = {"limit_mm_per_prompt": {"image": 0}, "enable_mm_embeds": True}
    with engine(folder, max_model_len=2048, **options) as llm:
        for order in ("attention", "raster"):
            config = PruMergeConfig(order=order)
            encoder = PruMergeEncoder(folder, config, dtype="float32")
            found = said(llm, [(prompt, encoder.encode(images)) for prompt, images in asked])
            assert [answer for answer, _ in found] == expected(folder, asked, config)
            assert len({length for _, length in found}) > 3
