"""`compare` where pictures are broken, and where it goes on from an earlier run's answers."""

import json
import shutil

import pytest
from command_line import refusal
from PIL import Image

from prumerge_fast.cli import compare, main
from prumerge_fast.harness import stages

SLUGS = ("llava", "prumerge", "prumerge-plus")


@pytest.fixture
def pictures(photos, tmp_path):
    """Five pictures, the second of which is broken."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in (0, 2, 3, 4):
        with Image.open(photos / "astronaut.png") as photo:
            photo.rotate(40 * number).save(path / f"{number}.png")
    (path / "1.png").write_bytes((photos / "astronaut.png").read_bytes()[:5000])
    return path


@pytest.fixture
def command(folder, pictures):
    return [
        *("compare", "--model", str(folder), "--images", str(pictures)),
        *("--prompt", "what ?", "--max-new-tokens", "2"),
    ]


@pytest.fixture
def answers(tmp_path):
    return tmp_path / "answers" / "a.jsonl"


def ask(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def records(answers, slug="llava"):
    lines = (answers.parent / f"a-{slug}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ids(answers):
    return [[record["question_id"] for record in records(answers, slug)] for slug in SLUGS]


def mend(pictures):
    shutil.copy(pictures / "0.png", pictures / "1.png")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_one_broken_picture_of_many(command, pictures, answers, capsys, size):
    options = ("--batch-size", size, "--answers", answers, "--json")
    code, out, err = ask(capsys, *command, *options)
    bad = pictures / "1.png"
    assert code == 2
    assert err == (
        f"prumerge-fast: 1 of 5 pictures could not be read: expected a readable image, got {bad} "
        "(image file is truncated)\n"
    )
    result = json.loads(out)
    assert result["failed"] == [
        {
            "question_id": 1,
            "image": str(bad),
            "modality": "image",
            "error": f"expected a readable image, got {bad} (image file is truncated)",
        }
    ]
    assert result["questions"] == 4
    assert [answer["question_id"] for answer in result["answers"]] == [0, 2, 3, 4]
    assert ids(answers) == [[0, 2, 3, 4]] * 3
    bad.unlink()
    code, out, err = ask(capsys, *command, "--json")
    assert (code, err) == (0, "")
    others = json.loads(out)
    assert others["failed"] == []
    said = [[entry["answers"] for entry in each["answers"]] for each in (others, result)]
    assert said[0] == said[1]


def test_the_first_picture_broken_and_two_more(command, pictures, answers, capsys):
    for name in ("0.png", "3.png"):
        (pictures / name).write_bytes(b"")
    code, out, err = ask(capsys, *command, "--answers", answers)
    assert code == 2
    assert "3 of 5 pictures could not be read: expected an image file, got" in err
    assert err.endswith("0.png (which is empty); and 2 more\n")
    assert "Questions left out: 3, whose pictures could not be read:" in out
    assert "1.png (image file is truncated)" in out
    assert "tiny: 2 questions" in out
    assert ids(answers) == [[2, 4]] * 3


def test_many_questions_about_one_broken_picture(command, capsys):
    code, out, err = ask(capsys, *command, "--prompt", "what is this ?", "--json")
    assert code == 2
    assert "1 of 5 pictures" in err
    assert [entry["question_id"] for entry in json.loads(out)["failed"]] == [2, 3]


@pytest.mark.parametrize("size", [1, 2])
def test_all_pictures_broken(command, pictures, answers, capsys, tmp_path, size):
    assert ask(capsys, *command, "--answers", answers)[0] == 2
    before = ids(answers)
    for path in pictures.iterdir():
        path.write_text("no picture")
    page = tmp_path / "page.html"
    command += ["--batch-size", str(size)]
    message = refusal(capsys, *command, "--answers", answers, "--overwrite", "--html", page)
    assert "none of the 5 pictures could be read: expected an image file" in message
    assert message.endswith("; and 4 more\n")
    assert ids(answers) == before
    assert not page.exists()


def test_the_only_picture_broken(command, pictures, capsys):
    given = [*command[:3], "--images", pictures / "1.png", *command[5:]]
    message = refusal(capsys, *given)
    assert message.startswith("prumerge-fast: the image could not be read: expected a readable im")


def test_strict_stops_at_the_first(command, answers, capsys):
    message = refusal(capsys, *command, "--strict", "--answers", answers)
    assert message.startswith("prumerge-fast: image: expected a readable image, got ")
    assert ids(answers) == [[0]] * 3


def test_page_with_broken_pictures(command, pictures, capsys, tmp_path):
    (pictures / "1.png").rename(pictures / "<b>1.png")
    page = tmp_path / "page.html"
    code, _, err = ask(capsys, *command, "--html", page)
    assert (code, err.count("\n")) == (2, 1)
    content = page.read_text()
    assert "Pictures that could not be read" in content
    assert "1 more could not be asked" in content
    assert "&lt;b&gt;1.png" in content
    assert "<b>1.png" not in content


def test_pictures_in_a_question_file(folder, pictures, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"question_id": f"q{n}", "image": f"{n}.png", "text": "what ?", "answer": "w1"}
        for n in range(5)
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    command = ["compare", "--model", folder, "--questions", questions, "--image-folder", pictures]
    code, out, _ = ask(capsys, *command, "--json", "--max-new-tokens", 1)
    assert code == 2
    assert [entry["question_id"] for entry in json.loads(out)["failed"]] == ["q1"]
    (pictures / "1.png").unlink()  # one that is not there is a bad question file
    assert "questions.jsonl:2: expected an existing image" in refusal(capsys, *command)


def test_skipped_files_are_named(command, pictures, capsys):
    mend(pictures)
    (pictures / "[b]raw.DNG").write_bytes(b"raw")
    (pictures / "a\nb.dng").write_bytes(b"raw")
    (pictures / "._0.png").write_bytes(b"\0\5\x16\7")
    code, out, err = ask(capsys, *command, "--json")
    assert (code, err) == (0, "skipped: [b]raw.DNG, a b.dng (.dng is not supported)\n")
    assert json.loads(out)["questions"] == 5


def interrupt_after(monkeypatch, calls):
    made = []

    def measure(*arguments, **options):
        made.append(None)
        if len(made) > calls:
            raise KeyboardInterrupt
        return stages.measure(*arguments, **options)

    monkeypatch.setattr(compare, "measure", measure)
    return made


def whole_run(command, capsys):
    code, out, _ = ask(capsys, *command, "--json")
    assert code == 0
    return json.loads(out)


def without_times(result):
    rows = {
        name: {key: value for key, value in row.items() if key != "milliseconds"}
        for name, row in result["results"].items()
    }
    return rows, result["answers"]


# Three calls to warm up, then three a question: policies' files are of equal length, or not.
@pytest.mark.parametrize("calls", [2, 3, 5, 6, 7, 11, 17])
def test_resuming_gives_what_one_run_gives(command, pictures, answers, capsys, monkeypatch, calls):
    mend(pictures)
    whole = whole_run(command, capsys)
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        assert ask(capsys, *command, "--answers", answers)[0] == 130
    half = answers.parent / "a-prumerge.jsonl"
    half.write_bytes(half.read_bytes() + '{"question_id": 4, "text": "é'.encode()[:-1])
    asked = interrupt_after(monkeypatch, 1000)
    code, out, err = ask(capsys, *command, "--answers", answers, "--resume", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert without_times(result) == without_times(whole)
    assert result["answered_by_earlier_runs"] == max(calls - 3, 0) // 3
    assert len(asked) == 3 + 15 - max(calls - 3, 0)
    assert ids(answers) == [[0, 1, 2, 3, 4]] * 3


def test_nothing_is_left_to_ask(command, pictures, answers, capsys, monkeypatch, tmp_path):
    mend(pictures)
    assert ask(capsys, *command, "--answers", answers, "--resume")[0] == 0  # starts anew
    before = [records(answers, slug) for slug in SLUGS]
    asked = interrupt_after(monkeypatch, 0)
    page = tmp_path / "page.html"
    more = ("--answers", answers, "--resume", "--html", page)
    code, out, err = ask(capsys, *command, *more)
    assert (code, err, asked) == (0, "", [])
    assert "5 of 5 questions were answered by an earlier run: times are of the others" in out
    assert "5 of the questions were answered by an earlier run" in page.read_text()
    assert "Time by stage" not in page.read_text()
    assert [records(answers, slug) for slug in SLUGS] == before
    code, out, _ = ask(capsys, *command, *more, "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result["results"]["LLaVA"]["milliseconds"].values()) == {None}
    assert result["results"]["LLaVA"]["visual_tokens"]["mean"] == 25


def test_broken_pictures_are_tried_again(command, pictures, answers, capsys):
    assert ask(capsys, *command, "--answers", answers)[0] == 2
    assert ids(answers) == [[0, 2, 3, 4]] * 3
    code, _, err = ask(capsys, *command, "--answers", answers, "--resume")
    assert (code, "1 of 5 pictures could not be read" in err) == (2, True)
    mend(pictures)
    assert ask(capsys, *command, "--answers", answers, "--resume")[::2] == (0, "")
    assert ids(answers) == [[0, 1, 2, 3, 4]] * 3  # in order, as LLaVA's script for POPE reads them
    for slug in SLUGS:
        assert [record["metadata"]["image"][-5] for record in records(answers, slug)] == [*"01234"]


def test_a_picture_that_breaks_between_runs(command, pictures, answers, capsys, monkeypatch):
    """One policy has answered, the others cannot: it counts for none."""
    mend(pictures)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3 + 3 + 1)
        assert ask(capsys, *command, "--answers", answers)[0] == 130
    (pictures / "1.png").write_bytes(b"")
    code, out, _ = ask(capsys, *command, "--answers", answers, "--resume", "--json")
    result = json.loads(out)
    assert (code, result["questions"]) == (2, 4)
    assert [entry["question_id"] for entry in result["failed"]] == [1]
    assert sorted(map(len, ids(answers))) == [4, 4, 5]


def test_twice_the_same_question(folder, pictures, tmp_path, answers, capsys, monkeypatch):
    questions = tmp_path / "questions.jsonl"
    line = {"question_id": 1, "image": "0.png", "text": "what ?"}
    questions.write_text("\n".join([json.dumps(line)] * 3))
    command = ["compare", "--model", folder, "--questions", questions, "--image-folder", pictures]
    command += ["--max-new-tokens", 1, "--answers", answers]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        assert ask(capsys, *command)[0] == 130
    assert ask(capsys, *command, "--resume")[0] == 0
    assert ids(answers) == [[1, 1, 1]] * 3
    path = answers.parent / "a-llava.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    message = refusal(capsys, *command, "--resume")
    assert "a-llava.jsonl:4 to question 1 about 0.png, which is answered before" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-new-tokens", "3"], "a-llava.jsonl:1 with max_new_tokens 2 instead of 3"),
        (["--dtype", "bfloat16"], 'dtype "float32" instead of "bfloat16"'),
        (["--backend", "reference"], 'backend "torch" instead of "reference"'),
        (["--conv-template", "vicuna_v1"], 'conv_template null instead of "vicuna_v1"'),
        (["--image-aspect-ratio", "pad"], 'image_aspect_ratio null instead of "pad"'),
        (["--keep", "5"], "a-prumerge.jsonl:1 with config {"),
        (["--merge", "average"], "a-prumerge.jsonl:1 with config {"),
        (["--prompt", "what is this ?"], "a-llava.jsonl:2 to question 1 about "),
    ],
)
def test_resuming_another_run_is_refused(command, pictures, answers, capsys, options, says):
    mend(pictures)
    assert ask(capsys, *command, "--answers", answers)[0] == 0
    before = [records(answers, slug) for slug in SLUGS]
    message = refusal(capsys, *command, "--answers", answers, "--resume", *options)
    assert message.startswith("prumerge-fast: --resume: expected ")
    assert says in message
    assert "--overwrite starts anew" in message
    assert [records(answers, slug) for slug in SLUGS] == before


def test_resuming_with_another_prompt_is_refused(command, pictures, answers, capsys):
    mend(pictures)
    assert ask(capsys, *command, "--answers", answers)[0] == 0
    command[command.index("what ?")] = "what is this ?"
    message = refusal(capsys, *command, "--answers", answers, "--resume")
    assert "a-llava.jsonl:1 to question 0 about " in message
    assert "which is none of them" in message


def test_resuming_with_another_model_is_refused(command, folder, pictures, answers, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    mend(pictures)
    assert ask(capsys, *command, "--answers", answers)[0] == 0
    other = answers.parent / folder.name  # of the same name
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    message = refusal(capsys, *command, "--model", other, "--answers", answers, "--resume")
    assert "with weights" in message
    renamed = other.rename(answers.parent / "renamed")
    message = refusal(capsys, *command, "--model", renamed, "--answers", answers, "--resume")
    assert 'with model_id "tiny-llava" instead of "renamed-llava"' in message


def test_another_batch_size_may_go_on(command, pictures, answers, capsys, monkeypatch):
    mend(pictures)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        assert ask(capsys, *command, "--answers", answers)[0] == 130
    more = ("--answers", answers, "--resume", "--batch-size", "3", "--repeat", "2")
    assert ask(capsys, *command, *more)[0] == 0
    assert ids(answers) == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"no JSON", "(Expecting value"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "(expected a JSON object, got list)"),
        (b"", "(Expecting value"),
        (b"[" * 100_000, "(maximum recursion depth"),
        (b'{"question_id": 0, "prompt": "what ?"}', "(expected text, got None)"),
        (
            b'{"question_id": 0, "prompt": "what ?", "text": "w", "metadata": {"image": "0.png"}}',
            "(expected visual_tokens, got None)",  # as earlier versions wrote them
        ),
    ],
)
def test_damaged_answer_files(command, pictures, answers, capsys, line, says):
    mend(pictures)
    assert ask(capsys, *command, "--answers", answers)[0] == 0
    path = answers.parent / "a-prumerge.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, line + b"\n", *others]))
    message = refusal(capsys, *command, "--answers", answers, "--resume")
    assert f"--resume: expected answers of `compare`, got {path}:2 " in message
    assert says in message


def test_resuming_needs_answers_to_go_on_from(command, answers, capsys):
    assert "--resume: expected it with --answers" in refusal(capsys, *command, "--resume")
    both = ("--answers", answers, "--resume", "--overwrite")
    assert "--resume: expected it without --overwrite" in refusal(capsys, *command, *both)


def test_names_that_are_no_unicode_go_on(command, pictures, answers, capsys):
    (pictures / "1.png").unlink()
    shutil.copy(pictures / "0.png", pictures / "\udcff é.png")
    assert ask(capsys, *command, "--answers", answers)[0] == 0
    assert ask(capsys, *command, "--answers", answers, "--resume")[0] == 0
