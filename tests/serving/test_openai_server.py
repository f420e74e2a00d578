"""An OpenAI server of vLLM with the plugin: images, adaptive and malformed embeddings.

One server for all, over HTTP as its users have it; no request is trusted not to kill it.
"""

import base64
import concurrent.futures
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from engines import expected
from recipes import run
from transformers import AutoTokenizer

from prumerge_fast.demo import MODEL_DIR, PROMPT
from prumerge_fast.demo.scenes import benchmark
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving import PruMergeEncoder, to_base64

COUNT, KEEP = 50, 32
MOST = 8  # tokens of an answer, as `expected` has them
START = 240  # seconds that a server may take
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # an engine in a process of its own, which can die
}


class Server:
    """What clients see of it."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def alive(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def ask(self, text, *parts):
        """The status, the answer or the error, and how many tokens the prompt had."""
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": MOST,
            "add_special_tokens": True,  # LLaVA's template writes no first token
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"], None
        content = said["choices"][0]["message"]["content"]
        return 200, content.strip(), said["usage"]["prompt_tokens"]

    def ask_all(self, requests):
        """The answers to these, all asked at the same time."""
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda request: self.ask(*request), requests))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name=demo", "--dtype=float32", "--max-model-len=512"]
    options += ["--enforce-eager", "--enable-mm-embeds", f"--port={port}", "--host=127.0.0.1"]
    options += [f"--hf-overrides={json.dumps({'prumerge': {'keep': KEEP}})}"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL_DIR)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options],
            env=os.environ | ENVIRONMENT,
            cwd=folder,  # not the root, where our `kernels` would be taken for another package
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server, deadline = Server(port), time.monotonic() + START
        while not server.alive():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((folder / "log").read_text()[-4000:])
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # its engine too
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def questions():
    """Pictures and questions about them."""
    return [(scene.render(), question.text) for scene, question in benchmark("test", COUNT)]


@pytest.fixture(scope="module")
def right(questions):
    """A function: what the model answers in transformers, patched, in prompts of which length."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    texts = [PROMPT.format(question=text) for _, text in questions]

    def answers(config, rows):
        prompts = [(text, [picture]) for text, (picture, _) in zip(texts, questions, strict=True)]
        said = expected(MODEL_DIR, prompts, config)
        words = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]  # but the placeholder
        return [
            (200, answer, before + count)
            for answer, before, count in zip(said, words, rows, strict=True)
        ]

    return answers


@pytest.fixture(scope="module")
def embeddings(questions):
    return PruMergeEncoder(MODEL_DIR, dtype="float32").encode([one for one, _ in questions])


def embeds(payload):
    return {"type": "image_embeds", "image_embeds": payload}


def image(picture):
    with io.BytesIO() as file:
        picture.save(file, "png")
        data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_embeddings_of_mixed_lengths_at_once(server, questions, embeddings, right):
    """First, with cold caches: plain vLLM ends at the first two that share an encoder batch."""
    assert len({len(one) for one in embeddings}) > 5
    requests = [
        (text, embeds(to_base64(embedding)))
        for (_, text), embedding in zip(questions, embeddings, strict=True)
    ]
    assert server.ask_all(requests) == right(PruMergeConfig(), map(len, embeddings))
    assert server.alive()


def test_images_at_once(server, questions, right):
    """Each prompt holds 33 tokens of its image, which `usage` shows, and not 196."""
    requests = [(text, image(picture)) for picture, text in questions]
    assert server.ask_all(requests) == right(PruMergeConfig(keep=KEEP), [KEEP + 1] * COUNT)


def test_several_embeddings_in_a_prompt(server, questions, embeddings):
    (_, _, one), (_, _, other), (code, _, both) = server.ask_all(
        [
            (questions[0][1], *(embeds(to_base64(embeddings[i])) for i in numbers))
            for numbers in ([0], [1], [0, 1])
        ]
    )
    assert code == 200
    between = both - one - len(embeddings[1])  # tokens that the template writes for an image
    assert both == other + len(embeddings[0]) + between
    assert 0 <= between <= 2


def test_the_documents_client(server, questions, tmp_path, monkeypatch, capsys):
    questions[0][0].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    changed = {f'model="{MODEL_DIR.as_posix()}"': 'model="demo"'}
    run({}, "encoder-client", **changed, **{"http://localhost:8000": server.url})
    *answer, tokens = capsys.readouterr().out.split()
    assert answer
    assert int(tokens) < 100


def npy(values, **options):
    with io.BytesIO() as file:
        np.save(file, values, **options)
        return base64.b64encode(file.getvalue()).decode()


def saved(value):
    with io.BytesIO() as file:
        torch.save(value, file)
        return base64.b64encode(file.getvalue()).decode()


def claiming(shape):
    """A `.npy` file whose header says so, with nothing behind it."""
    with io.BytesIO() as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return base64.b64encode(file.getvalue()).decode()


def with_value(value, dtype="float32"):
    values = GOOD.astype(dtype)
    values[2, 3] = value
    return npy(values)


WIDTH = 192
GOOD = np.random.default_rng(0).standard_normal((7, WIDTH)).astype("float32")
UNREADABLE = "expected base64 of a .npy file"
MALFORMED = {
    "NaN": (with_value(np.nan), "expected finite numbers in the model's float32"),
    "infinite": (with_value(np.inf), "expected finite numbers"),
    "infinite in the model's dtype": (with_value(1e300, "float64"), "expected finite numbers"),
    "no rows": (npy(GOOD[:0]), "expected at least one row, got [0, 192]"),
    "wrong width": (npy(GOOD[:, 1:]), "got 191, but model expects 192"),
    "10,000 rows": (npy(np.zeros((10_000, WIDTH), "f4")), "exceeds model's maximum context"),
    "1-D": (npy(GOOD[0]), "expected [n, D], got [192]"),
    "3-D": (npy(np.stack([GOOD, GOOD])), "expected [n, D], got [2, 7, 192]"),
    "3-D as pixels": (npy(np.stack([GOOD] * 3)), "expected [n, D], got [3, 7, 192]"),
    "4-D": (npy(GOOD[None, None]), "expected [n, D], got [1, 1, 7, 192]"),
    "whole numbers": (npy(GOOD.astype("int64")), "expected float32, bfloat16"),
    "complex": (npy(GOOD.astype("complex64")), "expected float32, bfloat16"),
    "float8": (saved(torch.tensor(GOOD).to(torch.float8_e4m3fn)), "expected float32, bfloat16"),
    "pickle": (base64.b64encode(pickle.dumps(GOOD)).decode(), UNREADABLE),
    "pickle in .npy": (npy(np.array([{}]), allow_pickle=True), "Object arrays"),
    "garbage": (base64.b64encode(b"garbage").decode(), UNREADABLE),
    "garbage base64": ("!garbage!", "Non-base64"),
    "nothing": ("", UNREADABLE),
    "cut off": (npy(GOOD)[:400], "EOF"),
    "header that lies": (claiming((10**12, WIDTH)), UNREADABLE),
    "sparse": (saved(torch.eye(9000, WIDTH).to_sparse()), "exceeds model"),
    "meta": (saved(torch.empty(7, WIDTH, device="meta")), "values of its own, got a meta"),
    "no tensor": (saved({"rows": 7}), "did not deserialize to a torch.Tensor"),
    "fields": ({"image_embeds": npy(GOOD)}, "got fields named 'image_embeds'"),
    "null": (None, "is empty"),
}


@pytest.mark.parametrize(("payload", "says"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_embeddings(server, questions, embeddings, payload, says):
    """An error that says why, and the next caller is answered as ever."""
    text, good = questions[0][1], embeds(to_base64(embeddings[0]))
    before = server.ask(text, good)
    assert before[0] == 200
    code, message, _ = server.ask(text, embeds(payload))
    assert (code, says in message) == (400, True), (code, message)
    # Twice: NaN would come back with the memory that the refused request held.
    assert [server.ask(text, good) for _ in range(2)] == [before] * 2
    # Beside a good one it is refused as well; some shapes fail in vLLM before the plugin sees them.
    code, message, _ = server.ask(text, good, embeds(payload))
    assert code >= 400, message
    assert server.ask(text, good) == before
