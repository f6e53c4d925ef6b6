"""The serving example on loopback: answers, refusals, many clients, shutdown."""

import base64
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest


httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from m3bert_hf import build_sentence_transformer  # noqa: E402


SERVING = Path(__file__).resolve().parents[1] / "examples" / "serving"


@pytest.fixture(scope="module")
def server(checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = ["--max-texts", "64", "--max-body-bytes", "200000"]
    process = subprocess.Popen(
        [sys.executable, str(SERVING / "server.py"), str(checkpoint), "--port", str(port), *limits]
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    yield url, process
    process.kill()


def post(url, **body):
    return httpx.post(f"{url}/v1/embeddings", json=body, timeout=60)


def test_answers_are_what_encode_gives(server, checkpoint):
    url, _ = server
    texts = ["one text", "写真のサイズ", "x"]
    model = build_sentence_transformer(checkpoint)
    answer = post(url, input=texts, dimensions=20, exit_layer=3, model="any").json()
    wanted = model.encode(texts, exit_layer=3, truncate_dim=20, normalize_embeddings=True)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], wanted, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, model.tokenizer(texts)["input_ids"]))
    coded = post(url, input="one text", encoding_format="base64").json()["data"][0]["embedding"]
    vector = np.frombuffer(base64.b64decode(coded), dtype=np.float32)
    np.testing.assert_allclose(vector, model.encode("one text", normalize_embeddings=True), atol=1e-5)
    long = post(url, input="word " * 500, truncate=True).json()["data"][0]["embedding"]
    np.testing.assert_allclose(long, model.encode("word " * 500, normalize_embeddings=True), atol=1e-5)
    shape = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert shape["exit_layers"] == [1, 3, 4] and shape["dimensions"] == [8, 20, 32]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "a", "exit_layer": 2}, "exit_layer=2 does not exist: choose one of [1, 3, 4]"),
        ({"input": "a", "dimensions": 99}, "dimensions=99 must be within 1 and 32"),
        ({"input": ["a", " "]}, "input[1] is empty"),
        ({"input": "word " * 500}, "the model reads 48: shorten it"),
        ({"input": ["a"] * 65}, "65 texts are more than the 64"),
        ({"text": "a"}, "Unknown fields ['text']"),
        ({"input": "a", "task": "x"}, "task='x' does not exist"),
    ],
)
def test_refusals_name_value_and_choices(server, body, message):
    answer = post(server[0], **body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_large_bodies_are_not_read(server):
    assert post(server[0], input="a" * 300_000).status_code == 413


def test_many_clients_get_every_answer(server):
    url, process = server
    command = [sys.executable, str(SERVING / "load_test.py"), url, "--seconds", "4", "--pid", str(process.pid)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["answered"] > 64 and counts["refused"] > 10
    text = httpx.get(f"{url}/metrics").text
    assert 'm3bert_requests_total{status="200"}' in text and "m3bert_batch_texts_bucket" in text


def test_a_request_under_way_is_answered_before_the_server_ends(server):
    url, process = server
    import threading

    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(post(url, input=["some text of a few words"] * 60).status_code))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert answers and set(answers) <= {200, 503} and 200 in answers
