"""The encoder stage: what a patched model gives its language model, without a language model."""

import base64
import io
import json
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from saved_families import save
from tiny_families import FAMILIES as TINY
from tiny_models import features_of

import prumerge_fast
from prumerge_fast import PruMergeConfig
from prumerge_fast.errors import (
    BackendUnavailableError,
    InputError,
    PictureError,
    UnsupportedModelError,
)
from prumerge_fast.families import adapter_for
from prumerge_fast.harness.processors import load_processor
from prumerge_fast.serving import PruMergeEncoder, to_base64
from prumerge_fast.serving.checkpoint import read_weights

FAMILIES = ["LLaVA", "ViP-LLaVA", "Video-LLaVA", "LLaVA-NeXT", "LLaVA-NeXT-Video"]
FAMILIES += ["LLaVA-OneVision", "LLaVA with Pixtral"]
CONFIGS = {
    "adaptive": PruMergeConfig(),
    "keep": PruMergeConfig(keep=4),
    "plus": PruMergeConfig(variant="prumerge+"),
    "plus, keep": PruMergeConfig(variant="prumerge+", keep=0.4),
    "raster": PruMergeConfig(order="raster"),
}
PROJECTOR = "multi_modal_projector.linear_1.weight"


def pictures(*sizes):
    """Pictures of these widths and heights, of noise."""
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


try:
    from transformers import GotOcr2ImageProcessorPil as GotOcr2
except ImportError:  # 4.x
    from transformers import GotOcr2ImageProcessor as GotOcr2

PICTURES = pictures((30, 30), (60, 60), (50, 10), (40, 90), (60, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of saved models, by family; made at first use."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp("model"))
        return folders[name]

    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A LLaVA's folder of this test alone."""
    return shutil.copytree(saved("LLaVA"), tmp_path / "copy")


def patched_features(folder, config, dtype=torch.float32):
    """The tokens [m, D] of each picture, as a whole model reads them that `patch` patched."""
    model_class = getattr(transformers, json_of(folder / "config.json")["architectures"][0])
    model = prumerge_fast.patch(model_class.from_pretrained(folder, dtype=dtype), config)
    processor = load_processor(
        str(folder), model.config, takes_videos="video" in adapter_for(model).pixels
    )
    inputs = processor(
        images=PICTURES,
        text=[processor.image_token] * len(PICTURES),
        padding=True,
        return_tensors="pt",
    )
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        features = features_of(model.eval()(**inputs))
    return features.split(model.prumerge.last_lengths)


def json_of(path):
    return json.loads(path.read_text())


def rewrite(folder, change):
    """Saves the weights again by the names that `change` gives them, or not at all for `None`."""
    path = folder / "model.safetensors"
    weights = {change(name): tensor.clone() for name, tensor in load_file(path).items()}
    weights.pop(None, None)
    save_file(weights, path, metadata={"format": "pt"})


def same(encoder, other):
    return all(map(torch.equal, encoder.encode(PICTURES), other.encode(PICTURES)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("family", ["LLaVA", "LLaVA-NeXT"])
def test_equals_the_patched_model(saved, family, config):
    expected = patched_features(saved(family), config)
    encoded = PruMergeEncoder(saved(family), config).encode(PICTURES)
    lengths = [len(rows) for rows in encoded]
    if config.keep is None:
        assert len(set(lengths)) > 1  # each picture its own
    elif family == "LLaVA":
        assert set(lengths) == {config.capacity(25)}
    for rows, right in zip(encoded, expected, strict=True):
        assert torch.equal(rows, right)


@pytest.mark.parametrize("family", ["LLaVA", "LLaVA-NeXT"])
def test_equals_the_patched_model_in_bfloat16(saved, family):
    expected = patched_features(saved(family), PruMergeConfig(), torch.bfloat16)
    encoder = PruMergeEncoder(saved(family), dtype="bfloat16")
    for rows, right in zip(encoder.encode(PICTURES), expected, strict=True):
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, right)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"LLaVA", "LLaVA-NeXT"}))
def test_other_families(saved, family):
    expected = patched_features(saved(family), None)
    for rows, right in zip(PruMergeEncoder(saved(family)).encode(PICTURES), expected, strict=True):
        assert torch.equal(rows, right)


def test_tiles_of_an_image_are_one(tmp_path):
    """InternVL's image processor cuts images, of which the model knows tiles alone."""
    family = TINY["InternVL"]
    model = family.model()
    model.save_pretrained(tmp_path)
    size = {"height": 36, "width": 36}
    GotOcr2(size=size, max_patches=4).save_pretrained(tmp_path)
    prumerge_fast.patch(model, keep=3)
    encoder = PruMergeEncoder(tmp_path, model.prumerge.config)
    # The one that is loaded, which with torchvision resizes otherwise.
    processed = encoder._image_processor(PICTURES, crop_to_patches=True, return_tensors="pt")
    tiles = [int(count) for count in processed["num_patches"]]
    assert len(set(tiles)) > 1
    with torch.no_grad():
        features = model.get_image_features(processed["pixel_values"])
    features = getattr(features, "pooler_output", features)
    encoded = encoder.encode(PICTURES)
    assert [len(rows) for rows in encoded] == [4 * count for count in tiles]
    assert torch.equal(torch.cat(encoded), torch.cat(features))


@pytest.mark.parametrize("family", FAMILIES)
def test_holds_nothing_of_the_language_model(saved, family):
    model = PruMergeEncoder(saved(family))._model
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert names
    assert not [name for name in names if "language_model" in name or "lm_head" in name]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_reads_no_shard_of_the_language_model(copied):
    """Shards with nothing but the language model are absent, broken, or never asked for."""
    whole = PruMergeEncoder(copied)
    weights = load_file(copied / "model.safetensors")
    ours = {n: t for n, t in weights.items() if "vision_tower" in n or "multi_modal" in n}
    projector = {n: ours.pop(n) for n in list(ours) if "multi_modal" in n}
    shards = {"tower": ours, "projector": projector}
    where = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
    for number, name in enumerate(sorted(weights.keys() - where.keys())):
        where[name] = f"text-{number % 2}.safetensors"
    for shard, tensors in shards.items():
        save_file(tensors, copied / f"{shard}.safetensors")
    (copied / "text-0.safetensors").write_bytes(b"no safetensors at all")
    (copied / "model.safetensors").unlink()
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert same(PruMergeEncoder(copied), whole)

    (copied / "projector.safetensors").unlink()
    with pytest.raises(InputError, match=r"model_id: expected projector.safetensors in .*index"):
        PruMergeEncoder(copied)
    (copied / "projector.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(InputError, match=r"model_id: expected readable safetensors .*Safetensor"):
        PruMergeEncoder(copied)
    index.write_text("{")
    with pytest.raises(InputError, match=r"model_id: expected readable safetensors .*JSONDecode"):
        PruMergeEncoder(copied)


@pytest.mark.parametrize("outer", ["", "model."])
@pytest.mark.parametrize("inner", ["", "vision_model."])
def test_names_of_every_version(copied, outer, inner):
    whole = PruMergeEncoder(copied)
    seen = []

    def renamed(name):
        if "language_model" in name or "lm_head" in name:
            return None
        plain = name.removeprefix("model.").replace("vision_model.", "")
        seen.append(outer + plain.replace("vision_tower.", f"vision_tower.{inner}"))
        return seen[-1]

    rewrite(copied, renamed)
    assert any(name.startswith(f"{outer}vision_tower.{inner}embeddings") for name in seen)
    assert same(PruMergeEncoder(copied), whole)


def test_dtype(copied):
    """The checkpoint's own, unless another is asked for."""
    assert PruMergeEncoder(copied).dtype == torch.float32
    settings = json_of(copied / "config.json")
    for name in ("dtype", "torch_dtype"):
        settings.pop(name, None)
    for stored in ("bfloat16", "float16", None):
        own = {} if stored is None else {"dtype": stored}
        (copied / "config.json").write_text(json.dumps({**settings, **own}))
        encoder = PruMergeEncoder(copied)
        assert encoder.dtype == getattr(torch, stored or "float32")
        assert all(weight.dtype == encoder.dtype for weight in encoder._model.parameters())
        assert encoder.encode(PICTURES[:1])[0].dtype == encoder.dtype
    assert PruMergeEncoder(copied, dtype=torch.bfloat16).dtype == torch.bfloat16
    for dtype in ("float64", "half", 16, torch.int8):
        with pytest.raises(ValueError, match=r"dtype: expected auto, float32.*got"):
            PruMergeEncoder(copied, dtype=dtype)


def test_pictures_as_people_see_them(saved):
    encoder = PruMergeEncoder(saved("LLaVA"))
    picture = PICTURES[3]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = io.BytesIO()
    picture.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    turned, right = encoder.encode([Image.open(file), picture])
    torch.testing.assert_close(turned, right)  # places in a batch may round otherwise
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    on_white, white = encoder.encode([clear, Image.new("RGB", (30, 30), "white")])
    torch.testing.assert_close(on_white, white)


def test_rows_of_one_image_hold_no_others(saved):
    encoder = PruMergeEncoder(saved("LLaVA"))
    assert encoder.encode([]) == []
    encoded = encoder.encode(PICTURES)
    assert encoder.width == encoded[0].shape[1] == 64
    for rows in encoded:
        assert rows.untyped_storage().nbytes() == rows.nbytes
        assert not rows.requires_grad


def test_an_image_without_an_outlier(saved):
    pictures = [Image.new("RGB", (30, 30))]
    for supplement in (True, False):
        config = PruMergeConfig(fence=1e6, supplement=supplement)
        (rows,) = PruMergeEncoder(saved("LLaVA"), config).encode(pictures)
        assert rows.shape == (int(supplement), 64)


def test_images_are_checked(saved):
    encoder = PruMergeEncoder(saved("LLaVA"))
    for images, says in [
        (PICTURES[0], r"images: expected a list of PIL images, got Image"),
        ("a.png", r"images: expected a list of PIL images, got str"),
        ([PICTURES[0], "a.png"], r"images\[1\]: expected a PIL image, got str"),
        ([torch.zeros(3, 30, 30)], r"images\[0\]: expected a PIL image, got Tensor"),
    ]:
        with pytest.raises(TypeError, match=says):
            encoder.encode(images)
    with pytest.raises(PictureError, match=r"8 bits a channel, got images\[1\]"):
        encoder.encode([PICTURES[0], Image.new("I;16", (30, 30))])


def test_arguments_are_checked(saved):
    folder = saved("LLaVA")
    with pytest.raises(TypeError, match="config: expected a PruMergeConfig or None, got dict"):
        PruMergeEncoder(folder, {"keep": 4})
    with pytest.raises(ValueError, match=r"keep: .*25.*26"):
        PruMergeEncoder(folder, PruMergeConfig(keep=26))
    with pytest.raises(ValueError, match=r"^positions: expected 'compact', got 'original'.*engine"):
        PruMergeEncoder(folder, PruMergeConfig(positions="original"))
    with pytest.raises(InputError, match=r"^device: expected auto, cpu"):
        PruMergeEncoder(folder, device="gpu")
    with pytest.raises(BackendUnavailableError):
        PruMergeEncoder(folder, device="cpu", backend="triton")
    with pytest.raises(InputError, match=r"^model_id: expected a folder or a hub name of a LLaVA"):
        PruMergeEncoder(folder / "nowhere")


def test_checkpoints_are_checked(copied):
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    rewrite(copied, lambda name: None if name.endswith(PROJECTOR) else name)
    with pytest.raises(
        InputError, match=rf"model_id: expected all weights .* 1, such as {PROJECTOR}"
    ):
        PruMergeEncoder(copied)
    for wrong, says in [
        (torch.zeros(64, 65), r"\[64, 64\] of floating-point numbers in .*, got \[64, 65\]"),
        (torch.zeros(64, 64, dtype=torch.int8), r"\[64, 64\] .*, got \[64, 64\] of torch.int8"),
    ]:
        file.write_bytes(whole)
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        weights[next(name for name in weights if name.endswith(PROJECTOR))] = wrong
        save_file(weights, file)
        with pytest.raises(InputError, match=f"model_id: expected {PROJECTOR} {says}"):
            PruMergeEncoder(copied)
    file.rename(copied / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model_id: expected model.safetensors or .*save_pretr"):
        PruMergeEncoder(copied)


def test_other_models_are_refused(copied):
    """With the errors of `patch`."""
    settings = json_of(copied / "config.json")

    def refused(says, **changes):
        (copied / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(UnsupportedModelError, match=says):
            PruMergeEncoder(copied)

    refused(r"Mistral3.* Pixtral", architectures=["Mistral3ForConditionalGeneration"])
    refused(r"got LlamaForCausalLM; supported: Llava", architectures=["LlamaForCausalLM"])
    refused(r"model_id: .* in transformers, got NoSuchModel", architectures=["NoSuchModel"])
    refused(r"strategy: expected 'default'", vision_feature_select_strategy="full")
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 64, "num_attention_heads": 4}
    siglip |= {"num_hidden_layers": 2, "image_size": 30, "patch_size": 6}
    refused(r"strategy: expected 'full'", vision_config=siglip)
    refused(r"image_size: expected at least patch_size", vision_config={"image_size": 3})


def test_from_the_hub_only_what_is_needed(copied, tmp_path):
    """A cache with a file that is missing stands for the hub: asking for more would fail."""
    rewrite(copied, lambda name: name if "tower" in name or "projector" in name else None)
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(copied, cached / "snapshots" / ("0" * 40))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cached / "snapshots" / ("0" * 40) / name).unlink()
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("0" * 40)
    code = (
        "import sys; import prumerge_fast.serving as serving; "
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules; "
        "from PIL import Image; "
        "encoder = serving.PruMergeEncoder('someone/tiny', revision='v1'); "
        "print(encoder.encode([Image.new('RGB', (30, 30))])[0].shape[1])"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-1:] == ["64"], done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_base64_of_an_embedding(dtype):
    embedding = torch.randn(5, 8, dtype=dtype)
    read = torch.from_numpy(
        np.load(io.BytesIO(base64.b64decode(to_base64(embedding), validate=True)))
    )
    assert read.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(read.to(dtype), embedding)


def test_base64_of_something_else():
    with pytest.raises(ValueError, match=r"embedding: expected \[n, D\], got \[1, 2, 3\]"):
        to_base64(torch.zeros(1, 2, 3))
    with pytest.raises(
        TypeError, match=r"embedding: expected a floating-point tensor, got torch.int64"
    ):
        to_base64(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="embedding: expected a floating-point tensor, got list"):
        to_base64([[0.0]])


@pytest.mark.parametrize(
    "cached", [{}, {"model.safetensors.index.json": {"a": "1.safetensors"}}], ids=["none", "index"]
)
def test_hub_out_of_reach(tmp_path, monkeypatch, cached):
    """No advice to save another checkpoint where the files only cannot be fetched."""

    def download(source, name, revision):
        if name not in cached:
            raise LocalEntryNotFoundError("outgoing traffic has been disabled")
        (tmp_path / name).write_text(json.dumps({"weight_map": cached[name]}))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"got someone/tiny \(LocalEntryNotFoundError: outgoing"):
        read_weights("someone/tiny", ["a"])
