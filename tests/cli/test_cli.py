"""The commands on a tiny random LLaVA and real photographs: results, bad input, interruption."""

import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tiny_models import PATCHES

from prumerge_fast import patched
from prumerge_fast.cli import compare, main
from prumerge_fast.harness import models, prompts, stages
from prumerge_fast.harness.inputs import items_from_images

POLICIES = ["LLaVA", "PruMerge", "PruMerge+"]


@pytest.fixture
def command(folder, photos):
    """`compare` on both photographs with two prompts, briefly."""
    return [
        *("compare", "--model", str(folder), "--images", str(photos)),
        *("--prompt", "what is this ?", "--prompt", "what ?", "--max-new-tokens", "3"),
    ]


@pytest.fixture
def questions(tmp_path, photos):
    path = tmp_path / "questions.jsonl"
    records = [
        {"question_id": 10 + i, "image": name, "text": "what ?", "category": kind, "label": "w1"}
        for i, (name, kind) in enumerate([("astronaut.png", "person"), ("coffee.jpg", "thing")] * 2)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_compare_as_json(command, capsys):
    assert main([*command, "--json", "--repeat", "2", "--keep", "0.25"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["results"]) == POLICIES
    assert result["questions"] == len(result["answers"]) == 4
    rows = result["results"]
    tokens = {name: row["visual_tokens"] for name, row in rows.items()}
    assert tokens["LLaVA"] == {"mean": PATCHES, "min": PATCHES, "max": PATCHES}
    assert tokens["PruMerge"] == tokens["PruMerge+"] == {"mean": 7, "min": 7, "max": 7}
    # Keys and values, two layers of 32 channels in float32, for every token but the last answer's.
    saved = rows["LLaVA"]["kv_cache_bytes"] - rows["PruMerge"]["kv_cache_bytes"]
    assert saved == (PATCHES - 7) * 2 * 2 * 32 * 4
    assert rows["LLaVA"]["milliseconds"]["prune_merge"] is None
    assert rows["PruMerge"]["config"]["keep"] == 0.25
    for name, row in rows.items():
        stages_ = [ms for ms in row["milliseconds"].values() if ms is not None]
        assert all(ms > 0 for ms in stages_), name
        assert sum(stages_[:-1]) <= 1.5 * stages_[-1]  # medians, so only nearly the total
        assert row["accuracy"] is None
    assert rows["LLaVA"]["agreement"] == 1.0
    assert result["command"][:2] == ["prumerge-fast", "compare"]
    assert {"versions", "machine", "date"} <= result.keys()


def test_compare_answers_are_those_of_the_model(command, folder, photos, capsys):
    """The unpatched column is what plain transformers says to each image and prompt."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    assert main([*command, "--json", "--batch-size", "3"]) == 0
    said = json.loads(capsys.readouterr().out)["answers"]
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for answer in said:
        inputs = processor(
            images=Image.open(answer["image"]).convert("RGB"),
            text=f"USER: <image>\n{answer['question']} ASSISTANT:",
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer["answers"]["LLaVA"] == expected


def test_compare_in_original_positions(command, folder, photos, capsys):
    assert main([*command, "--json", "--positions", "original", "--keep", "6"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"]["PruMerge"]["config"]["positions"] == "original"
    loaded = models.load(str(folder), dtype="auto", device="cpu")
    for answer in result["answers"]:
        items = items_from_images([Path(answer["image"])], [answer["question"]])
        inputs = prompts.prepare(loaded, items)
        with patched(loaded.model, keep=6, positions="original"):
            ids = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        said = loaded.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer["answers"]["PruMerge"] == said


def test_prompts_get_the_models_own_format_and_one_first_token(folder, photos):
    loaded = models.load(str(folder), dtype="auto", device="cpu")
    decode = loaded.processor.tokenizer.batch_decode
    photo = photos / "coffee.jpg"
    items = items_from_images([photo], ["what ?", "this <image> is"])
    assert decode(prompts.prepare(loaded, items)["input_ids"]) == [
        f"<s> USER : {'<image> ' * PATCHES}what ? ASSISTANT :",
        f"{'<pad> ' * 4}<s> this {'<image> ' * PATCHES}is",
    ]
    loaded.processor.chat_template = "<s>what: <image> {{ messages[0].content[1].text }}"
    ids = prompts.prepare(loaded, items[:1])["input_ids"]
    assert decode(ids) == [f"<s> what : {'<image> ' * PATCHES}what ?"]


def test_llavas_own_conversation_and_padding(command, folder, photos, capsys):
    """What `--conv-template` and `--image-aspect-ratio` ask is what LLaVA-1.5 was trained on."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    options = ["--conv-template", "vicuna_v1", "--image-aspect-ratio", "pad"]
    assert main([*command, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["conv_template"] == "vicuna_v1"
    assert result["settings"]["image_aspect_ratio"] == "pad"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    colour = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
    for answer in result["answers"]:
        picture = Image.open(answer["image"]).convert("RGB")
        inputs = processor(
            images=ImageOps.pad(picture, (max(picture.size),) * 2, color=colour),
            text="A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions. "
            f"USER: <image>\n{answer['question']} ASSISTANT:",
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer["answers"]["LLaVA"] == expected


@pytest.mark.parametrize("size", [(101, 60), (60, 101), (77, 77)])
def test_padding_is_that_of_llava(folder, size):
    picture = Image.effect_noise(size, 90).convert("RGB")
    padded = models.load(str(folder), dtype="auto", device="cpu", image_aspect_ratio="pad")
    seen = np.asarray(prompts.framed(padded, picture))
    side, (width, height) = max(size), size
    top, left = (side - height) // 2, (side - width) // 2
    inside = np.zeros((side, side), dtype=bool)
    inside[top : top + height, left : left + width] = True
    assert np.array_equal(seen[inside], np.asarray(picture).reshape(-1, 3))
    mean = padded.processor.image_processor.image_mean
    assert (seen[~inside] == [int(255 * channel) for channel in mean]).all()
    plain = models.load(str(folder), dtype="auto", device="cpu")
    assert prompts.framed(plain, picture) is picture


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (40, 3), (3, 40), (40, 1)])
def test_a_few_pixels_are_not_taken_for_channels(folder, size):
    """Image processors of transformers 4 guess which side the channels are."""
    loaded = models.load(str(folder), dtype="auto", device="cpu")
    process = loaded.processor.image_processor
    red = process(Image.new("RGB", (30, 30), "red"), return_tensors="pt")["pixel_values"]
    framed = prompts.framed(loaded, Image.new("RGB", size, "red"))
    assert min(framed.size) > 3
    assert torch.equal(process(framed, return_tensors="pt")["pixel_values"], red)


def test_show_draws_what_the_padded_model_sees(folder, photos, tmp_path, capsys):
    ask = ["show", str(photos / "coffee.jpg"), "--model", str(folder), "--json"]
    ask += ["--output", str(tmp_path / "shown.png")]
    attention = []
    for option in ([], ["--image-aspect-ratio", "pad"]):
        assert main([*ask, *option]) == 0
        attention.append(json.loads(capsys.readouterr().out)["attention"])
    assert attention[0] != attention[1]


def test_compare_prints_tables(command, capsys):
    arguments = ["--variant", "prumerge+", "--keep", "4", "--dtype", "bfloat16"]
    assert main([*command, *arguments, "--prompt", "[red]what :star: ?"]) == 0
    captured = capsys.readouterr()
    rows = ["vision tower, ms", "prune+merge, ms", "prefill, ms", "decode, ms", "KV cache, KiB"]
    for expected in (*rows, "PruMerge+", "same answer as LLaVA", "[red]what", "astronaut.png"):
        assert expected in captured.out
    assert "5.0" in captured.out  # four tokens and the supplement
    assert captured.err == ""


def test_images_may_follow_one_option(folder, photos, capsys):
    files = [str(photos / "astronaut.png"), str(photos / "coffee.jpg")]
    arguments = ["--prompt", "what ?", "--model", str(folder), "--max-new-tokens", "1", "--json"]
    assert main(["compare", "--images", *files, *arguments]) == 0
    assert [a["image"] for a in json.loads(capsys.readouterr().out)["answers"]] == files


def test_question_file_and_answer_files(folder, photos, questions, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    arguments = [
        *("compare", "--model", str(folder), "--questions", str(questions), "--json"),
        *("--image-folder", str(photos), "--answers", str(out), "--max-new-tokens", "2"),
    ]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"]["LLaVA"]["accuracy"] is not None
    assert set(result["results"]["LLaVA"]["accuracy_by_category"]) == {"person", "thing"}
    names = ["out-llava.jsonl", "out-prumerge-plus.jsonl", "out-prumerge.jsonl"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    for name in names:
        records = [json.loads(line) for line in (out.parent / name).read_text().splitlines()]
        assert [record["question_id"] for record in records] == [10, 11, 12, 13]
        assert all(
            record.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
            for record in records
        )
        assert {record["model_id"] for record in records} == {f"tiny-{name[4:-6]}"}
    assert "exists; --overwrite replaces it" in refusal(capsys, *arguments)
    before = (out.parent / names[0]).read_text()
    refusal(capsys, *arguments, "--overwrite", "--keep", 1000)
    assert (out.parent / names[0]).read_text() == before
    assert main([*arguments, "--overwrite"]) == 0
    assert len((out.parent / names[0]).read_text().splitlines()) == 4


def test_policies_take_turns_and_warm_up_does_not_count(command, capsys, monkeypatch):
    order = []

    def spy(model, inputs, config, **options):
        order.append("LLaVA" if config is None else config.variant)
        return stages.measure(model, inputs, config, **options)

    monkeypatch.setattr(compare, "measure", spy)
    assert main([*command, "--json"]) == 0
    names = ["LLaVA", "prumerge", "prumerge+"]
    assert order[:3] == names  # warm-up
    assert order[3:12] == [*names, *names[1:], names[0], names[2], *names[:2]]
    assert len(order) == 3 + 3 * 4


def test_interruption_keeps_the_answers_so_far(command, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) > 3 + 2 * 3:  # after the warm-up and two questions
            raise KeyboardInterrupt
        return stages.measure(*arguments, **options)

    monkeypatch.setattr(compare, "measure", interrupted)
    assert main([*command, "--answers", str(tmp_path / "a.jsonl")]) == 130
    assert capsys.readouterr() == ("", "interrupted after 2 of 4 questions\n")
    for slug in ("llava", "prumerge", "prumerge-plus"):
        assert len((tmp_path / f"a-{slug}.jsonl").read_text().splitlines()) == 2


def test_ctrl_c(command, tmp_path):
    """A real signal: no traceback, exit code 130, and the first answers are on the disk."""
    first = tmp_path / "a-llava.jsonl"
    arguments = [*command, "--answers", str(tmp_path / "a.jsonl"), "--repeat", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prumerge_fast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 60
    while not (first.exists() and first.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    written = first.stat().st_size
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert re.fullmatch(r"interrupted after [01] of 4 questions\n", errors)
    assert written > 0  # before the interruption, not because of it
    assert json.loads(first.read_text())["question_id"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "0"], r"--keep: expected .* got 0"),
        (["--keep", "1000"], r"--keep: expected at most N = 25.* got 1000"),
        (["--keep", "1.5"], r"--keep: expected .* got 1\.5"),
        (["--keep", "many"], r"--keep: expected .* got many"),
        (["--batch-size", "0"], r"--batch-size.*0"),
        (["--max-new-tokens", "0"], r"--max-new-tokens.*0"),
        (["--repeat", "0"], r"--repeat.*0"),
        (["--neighbours", "0"], r"--neighbours.*0"),
        (["--dtype", "int8"], r"--dtype.*int8.*float32"),
        (["--variant", "prune"], r"--variant.*prune"),
        (["--backend", "cuda"], r"--backend.*cuda"),
        (["--device", "tpu"], r"--device: expected auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--device", "cuda:99"], r"--device: expected one of the \d+ CUDA devices .*'cuda:99'"),
        (["--images", "gone.png"], r"--images: expected an existing file or folder, got gone\.png"),
        (
            ["--prompt", "<image><image>"],
            r"--prompt: expected at most one <image> or <video>, got 2",
        ),
        (["--questions", "q.jsonl"], r"--questions: expected no --images"),
        (["--image-folder", "x"], r"--image-folder: expected --questions"),
        (["--model", "nowhere/at-all"], r"--model: expected .* got nowhere/at-all"),
        (["--model", "./gone"], r"--model: expected .* got \./gone"),
        (["--answers", f"{__file__}/out.jsonl"], r"--answers: expected a writable file"),
        (["--unheard-of"], r"--unheard-of"),
    ],
)
def test_bad_options(command, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(says, refusal(capsys, *command, *arguments))


def test_more_scenes_than_anyone_waits_for_are_refused(capsys):
    message = refusal(capsys, "compare", "--count", 999_999_999_999)
    assert "--count: expected at most 100000, got 999999999999" in message


def test_names_that_no_file_can_have(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "load", None)
    too_long = "x" * 300
    for option in ("--answers", "--html"):
        assert "too long" in refusal(capsys, *command, option, f"{too_long}.html")
    assert "too long" in refusal(capsys, "show", "demo:0", "-o", f"{too_long}.png")
    assert "too long" in refusal(capsys, "evaluate", "-o", f"{too_long}.json")
    for folder in (tmp_path, "."):
        message = refusal(capsys, *command, "--answers", folder)
        assert "--answers: expected a file, got the folder" in message


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_of_what_standard_output_cannot_encode(
    command, photos, tmp_path, monkeypatch, encoding
):
    name = "\udcff é.png"  # no Unicode, but a file may be called that
    shutil.copy(photos / "astronaut.png", tmp_path / name)
    arguments = [str(tmp_path) if argument == str(photos) else argument for argument in command]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
    assert main([*arguments, "--json"]) == 0
    assert json.loads(written.getvalue().decode(encoding))["answers"][0]["image"].endswith(name)


def test_prompts_and_images_need_each_other(photos, capsys):
    assert "--prompt: expected at least one" in refusal(capsys, "compare", "--images", photos)
    assert "--images: expected at least one" in refusal(capsys, "compare", "--prompt", "what?")


def test_folders_without_a_usable_model(command, folder, tmp_path, capsys):
    assert "expected a folder with config.json" in refusal(capsys, *command, "--model", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "bert"}))
    message = refusal(capsys, *command, "--model", tmp_path)
    assert "expected a LlavaForConditionalGeneration, LlavaNextForCond" in message
    assert "VipLlavaForConditionalGeneration" in message
    assert "ForConditionalGeneration, got bert" in message
    config.write_text(json.dumps({"model_type": "no-such-model"}))
    assert "no-such-model" in refusal(capsys, *command, "--model", tmp_path)
    config.write_text("{")
    assert "--model: expected" in refusal(capsys, *command, "--model", tmp_path)
    config.write_bytes((folder / "config.json").read_bytes())  # neither weights nor processor
    assert "--model: expected" in refusal(capsys, *command, "--model", tmp_path)


def test_weights_that_are_missing_or_do_not_fit(command, folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    lost = next(name for name in weights if name.endswith("lm_head.weight"))
    partial = {name: weight for name, weight in weights.items() if name != lost}
    save_file(partial, broken / "model.safetensors", {"format": "pt"})
    message = refusal(capsys, *command, "--model", broken)
    assert "got none for 1 parameters, such as lm_head.weight" in message
    save_file({**weights, lost: torch.zeros(3, 3)}, broken / "model.safetensors", {"format": "pt"})
    assert "--model: expected" in refusal(capsys, *command, "--model", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "--model: expected" in refusal(capsys, *command, "--model", broken)


def test_models_that_prumerge_cannot_work_on(command, folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["vision_feature_select_strategy"] = "full"
    (broken / "config.json").write_text(json.dumps(config))
    assert "vision_feature_select_strategy" in refusal(capsys, *command, "--model", broken)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_pixels_that_are_not_finite(command, folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (broken / name).exists():
            text = (broken / name).read_text()
            (broken / name).write_text(
                re.sub(r'"image_std": \[[^]]*\]', '"image_std": [0,0,0]', text)
            )
    message = refusal(capsys, *command, "--model", broken)
    assert "none of the 2 pictures could be read: expected finite pixel values" in message
    assert "astronaut.png" in message
    assert "astronaut.png" in refusal(capsys, *command, "--model", broken, "--strict")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_needs_bitsandbytes(command, capsys, monkeypatch, bits):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    message = refusal(capsys, *command, f"--load-in-{bits}bit")
    assert f"--load-in-{bits}bit: expected bitsandbytes" in message
    assert "pip install 'prumerge_fast[int4]'" in message


def test_four_and_eight_bits_at_once(command, capsys):
    message = refusal(capsys, *command, "--load-in-4bit", "--load-in-8bit")
    assert "--load-in-8bit: expected it without --load-in-4bit" in message


def test_show_draws_three_panels(folder, photos, tmp_path, capsys):
    out = tmp_path / "shown.png"
    arguments = ["show", str(photos / "coffee.jpg"), "--model", str(folder), "--keep", "5"]
    assert main([*arguments, "-o", str(out), "--json", "--neighbours", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["patches"], result["visual_tokens"]) == (PATCHES, 6)
    kept, attention = result["kept"], result["attention"]
    assert kept == sorted(range(PATCHES), key=lambda j: -attention[j])[:5]
    assert [int(centre) for centre in result["neighbours"]] == kept[:4]
    for centre, near in result["neighbours"].items():
        assert len({*near} - {int(centre)}) == 3
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 480
        third = sheet.width // 3
        panels = [sheet.crop((i * third, 60, (i + 1) * third, 480)) for i in range(3)]
        assert len({panel.tobytes() for panel in panels}) == 3

    assert main([*arguments, "--output", str(out), "--variant", "prumerge+"]) == 0
    assert capsys.readouterr().out == f"{out}: 6 of 25 visual tokens\n"


def test_show_refuses(folder, photos, tmp_path, capsys):
    photo = photos / "astronaut.png"
    model = ("--model", folder)
    assert "expected an existing file" in refusal(capsys, "show", tmp_path / "gone.png", *model)
    assert "ends in .png" in refusal(capsys, "show", photo, *model, "-o", "x.gif")
    assert "another file than the image" in refusal(capsys, "show", photo, *model, "-o", photo)
    nowhere = tmp_path / "no" / "x.png"
    assert "expected a writable file" in refusal(capsys, "show", photo, *model, "-o", nowhere)
    assert "expected demo:INDEX" in refusal(capsys, "show", "demo:x", *model)
    assert "at most N = 25" in refusal(capsys, "show", photo, *model, "--keep", 26)


def test_show_takes_any_name_that_ends_in_png(folder, tmp_path, capsys):
    assert main(["show", "demo:0", "--model", str(folder), "-o", str(tmp_path / "..png")]) == 0
    assert (tmp_path / "..png").stat().st_size


def test_show_a_demo_scene(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "demo:3", "--model", str(folder)]) == 0
    assert (tmp_path / "demo-3-prumerge.png").is_file()


def test_show_a_png_of_the_folder_it_draws_into(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "navy").save("photo.png")
    assert main(["show", "photo.png", "--model", str(folder)]) == 0, capsys.readouterr().err
    assert (tmp_path / "photo-prumerge.png").is_file()


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["cpu"]["name"] == "torch"
    assert found["backends"]["cpu"]["reason"]
    assert found["demo_model"]["present"] in (True, False)
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert "transformers" in table
    assert "backend torch" in table
    refusal(capsys, "doctor", "--unheard-of")


def test_doctor_of_a_model_whose_sizes_do_not_fit(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 5
    (broken / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "doctor", "--model", broken)
    assert "--model: expected a folder or a hub name of a LLaVA" in message
    assert "heads" in message


def test_help_imports_neither_torch_nor_transformers():
    program = (
        "import sys; from prumerge_fast.cli import main; code = main(['compare', '--help']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout


def test_module_entry_point(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "prumerge_fast", "show", "demo:x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "prumerge-fast: IMAGE: expected demo:INDEX with INDEX >= 0, got 'demo:x'\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["doctor", "cost"])
def test_a_full_disk_is_one_line(command):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "prumerge_fast", command, "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert process.returncode == 2
    assert process.stderr.startswith("prumerge-fast: expected room for what is written, got ")
    assert process.stderr.count("\n") == 1


BROKEN = {
    "vision_config": [3, [1], {"hidden_size": 0}, {"hidden_size": 64.5}, {"hidden_size": "64"}],
    "text_config": [[1], "llama", {"hidden_size": -64}, {"num_attention_heads": 0}],
    "vision_feature_layer": [None, "last", 99],
    "architectures": [3, [None], "Llava"],
    "model_type": [7, None],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BROKEN.items() for value in values]
    + [("vision_config", {"patch_size": 0}), ("vision_config", {"image_size": 3})]
    + [("vision_config", {"image_size": [30, 30]}), ("text_config", {"vocab_size": None})],
)
def test_broken_configurations_are_one_line(folder, tmp_path, capsys, name, value):
    shutil.copytree(folder, tmp_path / "broken")
    path = tmp_path / "broken" / "config.json"
    config = json.loads(path.read_text())
    if isinstance(value, dict):
        value = {**config[name], **value}
    path.write_text(json.dumps({**config, name: value}))
    for command in (["cost"], ["show", "demo:0", "-o", tmp_path / "out.png"]):
        assert re.search(
            f"broken|{name}: expected", refusal(capsys, *command, "--model", tmp_path / "broken")
        )
