"""What tests of the commands share: a model on disk, photographs, and how bad input ends."""

import pytest
from PIL import Image
from tiny_models import BOS, EOS, IMAGE, PAD, VOCAB, tiny_llava
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from prumerge_fast.cli import main


def tokenizer(**tokens):
    """Of single words, with these special tokens beside the usual ones: their ids by their text."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>"}
    special |= {number: text for text, number in tokens.items()}
    words = iter(
        ["USER", ":", "ASSISTANT", "what", "is", "this", "?", *(f"w{i}" for i in range(99))]
    )
    vocabulary = {special.get(i) or next(words): i for i in range(VOCAB)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={f"{text[1:-1]}_token": text for text in tokens},
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny LLaVA with random weights and its processor, saved."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}
        ),
        tokenizer=tokenizer(**{"<image>": IMAGE}),
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    tiny_llava().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two real photographs of different shapes."""
    from skimage import data

    path = tmp_path_factory.mktemp("photos")
    Image.fromarray(data.astronaut()).save(path / "astronaut.png")
    Image.fromarray(data.coffee()).save(path / "coffee.jpg")
    return path


def refusal(capsys, *arguments):
    """Runs a command that must be refused: exit code 2 and one line on standard error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("prumerge-fast: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err
