"""`batch`: every question gets one row, whatever breaks on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal
from PIL import Image

pytest.importorskip("ray")

import pyarrow as pa
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster
from ray.data.checkpoint import checkpoint_filter
from ray.data.checkpoint.checkpoint_writer import CheckpointWriter

from prumerge_fast.cli import main
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.errors import BackendUnavailableError, InputError
from prumerge_fast.serving.batch import folder as batch_folder
from prumerge_fast.serving.batch.folder import BatchFolder
from prumerge_fast.serving.batch.rows import ANSWERS, QUESTIONS, question_id

PROMPT = "what is this ?"
COLUMNS = ["id", "image", "prompt", "answer", "error", "visual_tokens", "prompt_tokens"]
BROKEN = {17: b"", 100: b"no picture", 183: None}  # None: cut off half-way


@pytest.fixture(scope="module")
def address():
    """Of a cluster of four CPUs: enough for two actors."""
    head = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 pictures in two folders, three of them broken."""
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(200):
        place = path / f"part{number % 2}" / f"{number:03}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(place)
        if number in BROKEN:
            content = BROKEN[number]
            place.write_bytes(place.read_bytes()[:900] if content is None else content)
    return path


def command(folder, images, output, *more):
    given = ("batch", images, "--model", folder, "--output", output, "--batch-size", 4)
    return [str(argument) for argument in (*given, "--max-new-tokens", 3, *more)]


def ask(capfd, *arguments):
    code = main(list(arguments))
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def lines(output):
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def in_parquet(output):
    """The rows by id, of every file that anyone would read."""
    return pq.read_table(output / "answers").sort_by("id").to_pylist()


def every_row_once(output, count):
    rows = in_parquet(output)
    assert len(rows) == len({row["id"] for row in rows}) == count
    assert sorted(lines(output), key=lambda row: row["id"]) == rows


@pytest.fixture(scope="module")
def job(address, folder, pictures, tmp_path_factory):
    """Two actors on 200 pictures: exit code, output, errors and the folder."""
    output = tmp_path_factory.mktemp("jobs") / "out"
    given = command(folder, pictures, output, "--prompt", PROMPT, "--address", address)
    done = subprocess.run(
        [sys.executable, "-m", "prumerge_fast", *given, "--actors", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=output.parent,
    )
    return done.returncode, done.stdout, done.stderr, output


def test_200_pictures_of_which_3_are_broken(job, pictures):
    code, out, err, output = job
    assert code == 2, err
    assert err.splitlines()[-1].startswith(
        "prumerge-fast: 3 of 200 pictures could not be asked about: "
    )
    assert f"{output / 'answers.jsonl'} has all" in err
    result = json.loads(out)
    assert (result["questions"], result["pictures"]) == (200, 200)
    assert result["answered_by_earlier_runs"] == 0
    assert result["cluster"]["actors"] == {"count": 2, "num_cpus": 1, "num_gpus": 0}
    assert result["questions_per_second"] == pytest.approx(200 / result["seconds"])
    names = [Path(entry["image"]).name for entry in result["failed"]]
    assert sorted(names) == ["017.png", "100.png", "183.png"]
    every_row_once(output, 200)
    rows = lines(output)
    assert [row["image"] for row in rows] == sorted(map(str, pictures.glob("*/*.png")))
    assert [list(row) for row in rows] == [COLUMNS] * 200
    failed = {Path(row["image"]).name: row["error"] for row in rows if row["error"] is not None}
    assert "which is empty" in failed["017.png"]
    assert "unknown format" in failed["100.png"]
    assert failed["183.png"].startswith("expected a readable image, got ")
    for row in rows:
        assert (row["error"] is None) == (row["answer"] is not None)
        assert (row["error"] is None) == (row["visual_tokens"] is not None)


def test_answers_are_those_of_a_patched_model(job, folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import prumerge_fast

    model = prumerge_fast.patch(LlavaForConditionalGeneration.from_pretrained(folder))
    processor = AutoProcessor.from_pretrained(folder)
    counts = set()
    for row in lines(job[-1]):
        if row["error"] is not None:
            continue
        inputs = processor(
            images=Image.open(row["image"]).convert("RGB"),
            text=f"USER: <image>\n{PROMPT} ASSISTANT:",
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert row["answer"] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        (kept,) = model.prumerge.last_lengths
        text = int((inputs["input_ids"] != processor.image_token_id).sum())
        assert (row["visual_tokens"], row["prompt_tokens"]) == (kept, kept + text)
        counts.add(kept)
    assert len(counts) > 1  # each picture decides


def test_the_same_again_asks_nothing(job, address, folder, pictures, capfd):
    output = job[-1]
    before = sorted(path.name for path in (output / "answers").iterdir())
    given = command(folder, pictures, output, "--prompt", PROMPT, "--address", address)
    code, out, err = ask(capfd, *given, "--json")
    result = json.loads(out)
    assert (code, result["answered_by_earlier_runs"], result["questions"]) == (2, 200, 200)
    assert result["questions_per_second"] is None
    assert err.count("\n") == 1, err
    assert sorted(path.name for path in (output / "answers").iterdir()) == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--keep", "5"], 'with config {"variant": "prumerge", "keep": null'),
        (["--max-new-tokens", "4"], "with max_new_tokens 3 instead of 4"),
        (["--prompt", "what ?"], f'with prompts ["{PROMPT}"] instead of ["{PROMPT}", "what ?"]'),
        (["--dtype", "bfloat16"], 'with dtype "float32" instead of "bfloat16"'),
        (["--model", str(MODEL_DIR)], "with model "),
        (["--conv-template", "vicuna_v1"], "with conv_template null"),
    ],
)
def test_other_settings_are_refused(job, address, folder, pictures, capfd, more, says):
    given = command(folder, pictures, job[-1], "--prompt", PROMPT, "--address", address)
    message = refusal(capfd, *given, *more)
    assert message.startswith("prumerge-fast: --output: expected the folder of a run with these")
    assert says in message
    every_row_once(job[-1], 200)


def test_weights_of_the_same_name_are_told_apart(job, address, folder, pictures, capfd, tmp_path):
    other = tmp_path / folder.name
    shutil.copytree(folder, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    given = command(other, pictures, job[-1], "--prompt", PROMPT, "--address", address)
    assert "with weights " in refusal(capfd, *given)


def test_settings_of_a_run_without_answers_are_no_hindrance(tmp_path):
    folder = BatchFolder(tmp_path / "out")
    with folder.taken():
        folder.check_settings({"keep": 1})
        folder.check_settings({"keep": 2})
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["keep"] == 2


def test_settings_of_another_program_are_left_alone(tmp_path):
    (tmp_path / "settings.json").write_text('{"format": "vi"}')
    folder = BatchFolder(tmp_path)
    with folder.taken(), pytest.raises(InputError, match="--output: expected settings of an earl"):
        folder.check_settings({"keep": 1})
    assert (tmp_path / "settings.json").read_text() == '{"format": "vi"}'


def test_one_token_is_not_a_share_of_one(tmp_path):
    """`--keep 1` and `--keep 1.0`, which Python takes for equal."""
    folder = BatchFolder(tmp_path / "out")
    with folder.taken():
        folder.check_settings({"keep": 1})
        written(folder, "uuid_000000", {"a": {"answer": "w"}})
        folder.check_settings({"keep": 1})
        with pytest.raises(InputError, match=r"with keep 1 instead of 1\.0"):
            folder.check_settings({"keep": 1.0})


def test_rows_that_are_gone_are_no_answers(tmp_path):
    folder = BatchFolder(tmp_path)
    written(folder, "uuid_000000", {"a": {"answer": "w"}})
    (folder.answers / "uuid_000000-0.parquet").unlink()
    with pytest.raises(InputError, match=r"uuid_000000\.parquet has, got no such file"):
        folder.done()


def test_rows_that_are_there_twice_are_refused(tmp_path):
    """As a run leaves them that is killed and yet goes on writing for a moment."""
    folder = BatchFolder(tmp_path)
    written(folder, "uuid_000000", {"a": {"answer": "w"}, "b": {"answer": "w"}})
    written(folder, "uuid_000001", {"b": {"answer": "w"}})
    with pytest.raises(InputError, match="expected one row of each question, got 3 of 2 questions"):
        folder.rows()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://bucket/captions", "expected a folder on a file system, got s3:/bucket/captions"),
        ("what?", "expected a path without ?, line ends and tabs, which Ray can write to"),
        ("two\nlines", "expected a path without ?, line ends and tabs, which Ray can write to"),
        ("\udcff", "--output: expected Unicode text"),
    ],
)
def test_an_output_that_ray_cannot_write_to(tmp_path, monkeypatch, name, says):
    """It would write elsewhere, or nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused, BatchFolder(Path(name)).taken():
        pass
    assert says in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_a_run_is_not_blamed_on_its_folder(tmp_path):
    with pytest.raises(PermissionError), BatchFolder(tmp_path).taken():
        raise PermissionError(13, "Permission denied", "model.safetensors")


def test_two_runs_at_once_are_refused(address, folder, pictures, capfd, tmp_path):
    given = command(folder, pictures, tmp_path / "out", "--prompt", PROMPT, "--address", address)
    with BatchFolder(tmp_path / "out").taken():
        assert "expected a folder that no other run writes to" in refusal(capfd, *given)


@pytest.mark.parametrize("what", ["file", "other"])
def test_an_output_that_is_none(address, folder, pictures, capfd, tmp_path, what):
    output = tmp_path / "out"
    if what == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
    given = command(folder, pictures, output, "--prompt", PROMPT, "--address", address)
    says = "--output: expected a " + (
        "writable folder" if what == "file" else "new or empty folder"
    )
    assert says in refusal(capfd, *given)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--actors", "3"], "--actors: expected a cluster with 2 CPUs beside those of the actors"),
        (["--actors", "5"], "--actors: expected at most 4 of 1 CPUs and 0 GPUs each on 4 CPUs"),
        (["--num-gpus", "1"], "--actors: expected at most 0 of 1 CPUs and 1 GPUs each"),
        (["--num-cpus", "0"], "--num-cpus: expected more than 0, got 0"),
        (["--keep", "26"], "--keep: "),
        (["--engine", "vllm", "--actors", "2"], "expected a cluster with 4 CPUs beside those of"),
        (["--address", "127.0.0.1:1"], "--address: expected a Ray cluster that runs, got 127.0.0"),
    ],
)
def test_what_cannot_run_is_refused(address, folder, pictures, capfd, tmp_path, more, says):
    if "vllm" in more:
        pytest.importorskip("vllm")
    given = command(folder, pictures, tmp_path / "o", "--prompt", PROMPT, "--address", address)
    assert says in refusal(capfd, *given, *more)


def test_more_actors_than_questions(address, folder, pictures, tmp_path):
    picture = pictures / "part0" / "000.png"
    given = command(folder, picture, tmp_path / "o", "--prompt", PROMPT, "--address", address)
    done = subprocess.run(
        [sys.executable, "-m", "prumerge_fast", *given, "--actors", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    every_row_once(tmp_path / "o", 1)


def test_a_manifest_and_its_mended_pictures(address, folder, pictures, capfd, tmp_path):
    """Prompts of their own, one question twice, a missing picture; then it is there."""
    for number in range(6):
        shutil.copy(pictures / "part0" / "000.png", tmp_path / f"{number}.png")
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes(b"")
    manifest = tmp_path / "all.jsonl"
    rows = [{"image": f"{number}.png"} for number in range(6)]
    rows[2]["prompt"] = "what ?"
    manifest.write_text("\n".join(map(json.dumps, [*rows, rows[0], {**rows[0], "text": "w1 ?"}])))
    output = tmp_path / "out"
    given = command(folder, manifest, output, "--prompt", PROMPT, "--address", address)
    code, _, err = ask(capfd, *given)
    assert code == 2
    assert f"asked once: 1 questions that {manifest} has more than once" in err
    assert "2 of 6 pictures could not be asked about: expected an existing file, got" in err
    every_row_once(output, 7)
    first = {row["id"]: row for row in lines(output)}
    asked = [("0.png", "w1 ?"), *((f"{n}.png", "what ?" if n == 2 else PROMPT) for n in range(6))]
    assert sorted(asked) == [(row["image"], row["prompt"]) for row in first.values()]
    for number in (3, 4):
        shutil.copy(pictures / "part0" / "000.png", tmp_path / f"{number}.png")
    checkpoint = next((output / "checkpoint").iterdir())  # as a run leaves it that is stopped
    (rows,) = (output / "answers").glob(f"{checkpoint.stem}*")
    shutil.copy(rows, rows.with_name("half-0.parquet"))
    shutil.copy(checkpoint, checkpoint.with_name("half.pending.parquet"))
    code, out, _ = ask(capfd, *given, "--json")  # what failed counts as done
    assert (code, json.loads(out)["answered_by_earlier_runs"]) == (2, 7)
    every_row_once(output, 7)
    code, out, _ = ask(capfd, *given, "--retry-errors", "--json")
    result = json.loads(out)
    assert (code, result["asked_again"], result["failed"]) == (0, 2, [])
    assert result["answered_by_earlier_runs"] == 5
    every_row_once(output, 7)
    answers = {row["id"]: row for row in lines(output)}
    assert {key: row for key, row in answers.items() if first[key]["error"] is None} == {
        key: row for key, row in first.items() if row["error"] is None
    }
    assert len({row["answer"] for row in answers.values() if row["prompt"] == PROMPT}) == 1


def asked_of(images, cwd, monkeypatch):
    from prumerge_fast.serving.batch.questions import read_questions

    monkeypatch.chdir(cwd)
    return read_questions(Path(images), ["a"], None)


def test_a_picture_is_the_same_from_everywhere(pictures, tmp_path, monkeypatch):
    """However the path is written, so that nothing is asked once more, nor twice."""
    (tmp_path / "link").symlink_to(pictures)
    ways = [
        asked_of(pictures, tmp_path, monkeypatch),
        asked_of("link", tmp_path, monkeypatch),
        asked_of("part0/..", pictures, monkeypatch),
        asked_of(f"../{pictures.name}", pictures, monkeypatch),
    ]
    ids = [sorted(table["id"].to_pylist()) for table, _ in ways]
    assert len(ids[0]) == 200
    assert ids == [ids[0]] * 4


def test_names_that_are_no_unicode(pictures, tmp_path, monkeypatch):
    """They can be opened; what is written of them is their bytes."""
    from prumerge_fast.serving.batch.questions import read_questions
    from prumerge_fast.serving.batch.rows import answers_table

    try:
        shutil.copy(pictures / "part0" / "000.png", tmp_path / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("a file system of Unicode names")
    table, _ = read_questions(tmp_path, ["a"], None)
    (row,) = table.to_pylist()
    assert row["image"] == f"{tmp_path}/\\udcff.png"
    assert Image.open(os.fsdecode(row["path"])).size == (30, 30)
    rows = answers_table(table, [{"error": f"expected a file, got {os.fsdecode(row['path'])}"}])
    assert rows["error"][0].as_py().endswith("\\udcff.png")


def test_a_parquet_manifest(pictures, tmp_path):
    from prumerge_fast.serving.batch.questions import read_questions

    manifest = tmp_path / "all.parquet"
    pq.write_table(pa.table({"image": ["000.png", "002.png"], "text": ["a", None]}), manifest)
    table, remarks = read_questions(manifest, ["b", "c"], pictures / "part0")
    asked = list(zip(table["image"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    assert asked == [("000.png", "a"), ("002.png", "b"), ("002.png", "c")]
    assert table["path"][0].as_py() == os.fsencode(pictures / "part0" / "000.png")
    assert table["id"][0].as_py() == question_id(str(pictures / "part0" / "000.png"), "a")
    assert remarks == []


@pytest.mark.parametrize(
    ("content", "prompts", "says"),
    [
        ("{", ["a"], "all.jsonl:1: expected one JSON object a line, got "),
        ("[]", ["a"], "all.jsonl:1: expected a JSON object, got list"),
        ('\n{"path": "a.png"}', ["a"], "all.jsonl:2: expected image to be a path, got None"),
        ('{"image": "a\\u0000/b"}', ["a"], "expected image to be a path, got 'a\\x00/b'"),
        ('{"image": "a.png"}', [], "all.jsonl:1: expected a prompt, there or as --prompt, got no"),
        ('{"image": "a", "prompt": 3}', [], "all.jsonl:1: expected prompt to be a str, got 3"),
        ('{"image": "a", "prompt": "", "text": ""}', [], ":1: expected prompt or text, got both"),
        ('{"image": "a", "prompt": "<image><image>"}', [], "expected at most one <image>"),
        ('{"image": "\\ud800"}', ["a"], "all.jsonl:1: image: expected Unicode text, got"),
        (
            f'{{"image": ["{"a" * 9999}"]}}',
            ["a"],
            "expected image to be a path, got ['aaaaaaaaaaaa...",
        ),
        (
            f'{{"image": "a", "text": [{"1, " * 9999}1]}}',
            [],
            "be a str, got [1, 1, 1, 1, 1, 1, ...]",
        ),
        ("\n", ["a"], "IMAGES: expected at least one picture, got "),
    ],
)
def test_bad_manifests(tmp_path, content, prompts, says):
    from prumerge_fast.serving.batch.questions import read_questions

    (tmp_path / "all.jsonl").write_text(content)
    with pytest.raises(InputError) as refused:
        read_questions(tmp_path / "all.jsonl", prompts, None)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("images", "more", "says"),
    [
        ("empty", [], "IMAGES: expected a folder with images ("),
        ("none", [], "IMAGES: expected an existing file or folder, got "),
        ("none.jsonl", [], "IMAGES: expected an existing file or folder, got "),
        ("broken.parquet", [], "IMAGES: expected a readable manifest, got "),
        ("one.png", ["--image-folder", "."], "--image-folder: expected a manifest (.jsonl or"),
        ("all.jsonl", ["--image-folder", "none"], "--image-folder: expected an existing folder"),
    ],
)
def test_bad_images(capfd, folder, tmp_path, monkeypatch, images, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("one.png", "all.jsonl", "broken.parquet"):
        (tmp_path / name).write_text("{}")
    given = command(folder, images, tmp_path / "out", "--prompt", PROMPT, *more)
    assert refusal(capfd, *given).startswith(f"prumerge-fast: {says}")


def test_no_prompt(capfd, folder, pictures, tmp_path):
    given = command(folder, pictures, tmp_path / "out")
    assert "--prompt: expected at least one, got none" in refusal(capfd, *given)


def written(folder, name, rows):
    """A file of answers as Ray writes them, with its checkpoint."""
    table = pa.Table.from_pylist(
        [{"id": key, "image": key, "prompt": "p", **more} for key, more in rows.items()], ANSWERS
    )
    writer = CheckpointWriter.create(folder.checkpoint_config())
    pending = writer.write_pending_checkpoint(table["id"], name)
    folder.answers.mkdir(exist_ok=True)
    pq.write_table(table, folder.answers / f"{name}-0.parquet")
    writer.commit_checkpoint(pending)


def test_errors_of_other_questions_are_not_forgotten(tmp_path):
    """A run about other pictures would not ask them again: their rows would be lost."""
    folder = BatchFolder(tmp_path)
    bad = {"error": "e"}
    written(folder, "uuid_000000", {"a": {"answer": "w"}, "b": bad, "c": bad})
    assert folder.forget_errors(pa.array(["b", "d"])) == 1
    cleaned(folder)
    assert folder.rows()["id"].to_pylist() == ["a", "c"]
    assert folder.forget_errors(pa.array(["b", "d"])) == 0


def cleaned(folder):
    """What Ray does first when it goes on: it takes back what is pending."""
    config = folder.checkpoint_config()
    checkpoint_filter._clean_pending_checkpoints_task._function(
        config.checkpoint_path, config.filesystem, str(folder.answers), config.filesystem
    )


# Stopped at the first such call; in place of that of the second file; never.
@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4, 5, 99])
def test_forgetting_errors_is_safe_at_every_step(tmp_path, monkeypatch, calls):
    """Whatever moment it is stopped at: a row is there once, or asked again; never both."""
    folder = BatchFolder(tmp_path)
    good, bad = {"answer": "w"}, {"error": "e"}
    written(folder, "uuid_000000", {"a": good, "b": bad, "c": good})
    written(folder, "uuid_000001", {"d": bad})
    written(folder, "uuid_000002", {"e": good})
    made = []

    def stopping(call):
        def instead(*arguments, **options):
            made.append(None)
            if len(made) > calls:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return instead

    with monkeypatch.context() as patch:
        patch.setattr(batch_folder.pq, "write_table", stopping(pq.write_table))
        patch.setattr(Path, "replace", stopping(Path.replace))
        writer = batch_folder.CheckpointWriter.create(folder.checkpoint_config())
        patch.setattr(type(writer), "commit_checkpoint", stopping(type(writer).commit_checkpoint))
        try:
            asked_again = folder.forget_errors(pa.array(["a", "b", "c", "d", "e"]))
        except KeyboardInterrupt:
            asked_again = None
    cleaned(folder)
    rows = [row["id"] for row in in_parquet(tmp_path)]
    assert sorted(rows) == sorted(folder.done().to_pylist())
    assert "e" in rows
    assert len(rows) == len(set(rows))
    if calls == 99:
        assert asked_again == 2
        assert sorted(rows) == ["a", "c", "e"]


def questions_about(paths):
    rows = [
        {"id": str(path), "image": path.name, "path": os.fsencode(path), "prompt": PROMPT}
        for path in paths
    ]
    return pa.Table.from_pylist(rows, QUESTIONS)


@pytest.fixture
def actor(folder):
    from prumerge_fast.reduction.config import PruMergeConfig
    from prumerge_fast.serving.batch.patched_model import PatchedModel

    loading = {"model": folder, "dtype": "float32", "device": "cpu"}
    return PatchedModel(loading, PruMergeConfig(), "torch", 3)


def test_a_batch_that_fails_is_asked_one_by_one(actor, pictures, monkeypatch):
    """One of them fails alone, too: a row with its error."""
    from prumerge_fast.serving.batch import patched_model

    measure = patched_model.measure
    paths = sorted((pictures / "part0").iterdir())[:4]
    expected = actor(questions_about(paths)).to_pylist()
    calls = []

    def out_of_memory(model, inputs, *more, **options):
        calls.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 1 or len(calls) == 3:
            raise RuntimeError("CUDA out of memory.\nTried to allocate")
        return measure(model, inputs, *more, **options)

    monkeypatch.setattr(patched_model, "measure", out_of_memory)
    rows = actor(questions_about(paths)).to_pylist()
    assert calls == [4, 1, 1, 1, 1]
    assert [rows[n] for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]
    assert rows[1]["answer"] is None
    says = "expected an answer, got RuntimeError (CUDA out of memory. Tried to allocate)"
    assert rows[1]["error"] == says


def test_what_fails_for_every_picture_ends_the_job(actor, pictures, monkeypatch):
    from prumerge_fast.serving.batch import patched_model

    def unavailable(*_, **__):
        raise BackendUnavailableError("backend: expected ...")

    monkeypatch.setattr(patched_model, "measure", unavailable)
    with pytest.raises(BackendUnavailableError):
        actor(questions_about(sorted((pictures / "part0").iterdir())[:4]))


def test_a_batch_that_cannot_be_encoded_is_tried_one_by_one(folder, pictures, monkeypatch):
    from prumerge_fast.reduction.config import PruMergeConfig
    from prumerge_fast.serving.batch.encoded import EncodedPictures, from_bytes
    from prumerge_fast.serving.encoder import PruMergeEncoder

    stage = EncodedPictures(str(folder), PruMergeConfig(), None, {"device": "cpu"})
    encode = PruMergeEncoder.encode
    names = ("part0/000.png", "part1/017.png", "part0/002.png")
    questions = questions_about([pictures / name for name in names])
    calls = []

    def out_of_memory(self, images):
        calls.append(len(images))
        if len(images) > 1 or len(calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return encode(self, images)

    monkeypatch.setattr(PruMergeEncoder, "encode", out_of_memory)
    first, empty, last = stage(questions).to_pylist()
    assert calls == [2, 1, 1]
    assert (first["embeds"], empty["embeds"], last["picture_error"]) == (None, None, None)
    alone = encode(stage._encoder, [Image.open(pictures / "part0" / "002.png")])[0]
    assert from_bytes(last["embeds"], alone.shape[1], alone.dtype).equal(alone)
    assert first["picture_error"] == "expected an answer, got RuntimeError (CUDA out of memory)"
    assert "which is empty" in empty["picture_error"]


def start(folder, pictures, output):
    """A job of its own cluster, with blocks of 25 questions."""
    given = command(folder, pictures, output, "--prompt", PROMPT, "--batch-size", 1)
    return subprocess.Popen(
        [sys.executable, "-m", "prumerge_fast", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=output.parent,
        start_new_session=True,
    )


def wait_for_files(process, output, count):
    end = time.monotonic() + 240
    while len(list((output / "checkpoint").glob("*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_job_stopped_half_way_goes_on(address, folder, pictures, capfd, tmp_path, kind):
    output = tmp_path / "out"
    process = start(folder, pictures, output)
    wait_for_files(process, output, 2)
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # as a terminal does
    else:
        process.send_signal(kind)
    assert process.wait(60) == (130 if kind == signal.SIGINT else -kind), process.stderr.read()
    given = command(folder, pictures, output, "--prompt", PROMPT, "--address", address)
    code, out, _ = ask(capfd, *given, "--json")
    assert code == 2
    assert 25 <= json.loads(out)["answered_by_earlier_runs"] < 200
    every_row_once(output, 200)


@pytest.mark.slow
def test_a_killed_actor(folder, pictures, tmp_path):
    psutil = pytest.importorskip("psutil")
    output = tmp_path / "out"
    process = start(folder, pictures, output)
    wait_for_files(process, output, 2)
    actors = [
        child.pid
        for child in psutil.Process(process.pid).children(recursive=True)
        if "PatchedModel" in " ".join(child.cmdline())
    ]
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    every_row_once(output, 200)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [32, None])
def test_vllm(tmp_path, keep):
    """20 pictures, one of them broken, through an engine of vLLM: fixed counts, and their own."""
    pytest.importorskip("vllm")
    from prumerge_fast.harness.models import load
    from prumerge_fast.harness.prompts import prepare
    from prumerge_fast.harness.questions import decoded
    from prumerge_fast.harness.stages import measure
    from prumerge_fast.reduction.config import PruMergeConfig

    items = items_from_demo(20)
    for number, item in enumerate(items):
        item.load().save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"")
    kwargs = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}
    manifest = tmp_path / "all.jsonl"
    rows = [{"image": f"{n:02}.png", "prompt": item.text} for n, item in enumerate(items)]
    rows.append({"image": "00.png", "prompt": "a " * 600})  # the engine refuses it
    manifest.write_text("\n".join(map(json.dumps, rows)))
    given = ("batch", manifest, "--output", tmp_path / "out", "--engine", "vllm")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prumerge_fast", *map(str, given), "--max-new-tokens", "4"),
            *(() if keep is None else ("--keep", str(keep))),
            *("--engine-kwargs", json.dumps(kwargs), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 2, done.stderr
    assert "2 of 20 pictures could not be asked about" in done.stderr.splitlines()[-1]
    assert len(json.loads(done.stdout)["failed"]) == 2
    every_row_once(tmp_path / "out", 21)
    said = {(row["image"], row["prompt"]): row for row in lines(tmp_path / "out")}
    assert "which is empty" in said["07.png", items[7].text]["error"]
    assert "512" in said["00.png", "a " * 600]["error"]
    loaded = load(MODEL_DIR, dtype="auto", device="cpu")
    counts = set()
    for number, item in enumerate(items):
        if number == 7:
            continue
        inputs = prepare(loaded, [item])
        measured = measure(
            loaded.model,
            inputs,
            PruMergeConfig(keep=keep),
            backend="torch",
            max_new_tokens=4,
        )
        (answer,) = decoded(loaded, [item], measured)
        row = said[f"{number:02}.png", item.text]
        assert row["answer"] == answer.text
        assert row["visual_tokens"] == answer.visual_tokens
        text = int((inputs["input_ids"] != loaded.processor.image_token_id).sum())
        assert row["prompt_tokens"] == answer.visual_tokens + text
        counts.add(answer.visual_tokens)
    assert (counts == {33}) == (keep == 32)
