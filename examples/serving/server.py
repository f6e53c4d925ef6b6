"""An OpenAI-compatible embedding server for m3BERT, with a depth and a width for each request.

    pip install 'm3bert-hf[serve]'
    python examples/serving/server.py checkpoints/m3bert-nano --port 8000
    curl localhost:8000/v1/embeddings -H 'content-type: application/json' \
        -d '{"input": ["resize a photo"], "dimensions": 64, "exit_layer": 1}'

`POST /v1/embeddings` takes `input` (a text or a list), `dimensions`, `encoding_format` (`float` or `base64`), and of
our own `exit_layer`, `task` (`query` or `document`, for models with prompts) and `truncate` (cut texts that are longer
than the model, instead of refusing them). `GET /health`, `/metrics` (Prometheus) and `/v1/models` are there too.
Vectors have length 1.

Requests that wait are encoded together, up to `--max-batch-texts` at a time, those of one exit and task in a batch
whatever their dimensions. What cannot be served is refused at once: 400 for what is wrong, 413 for a body that is too
large, 429 when too many texts wait.
"""

import argparse
import asyncio
import base64
import copy
import json
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from m3bert_hf import build_sentence_transformer
from m3bert_hf.prepacking import prepack_weights
from m3bert_hf.throughput import keep_freed_memory


@dataclass
class Limits:
    """What a server accepts."""

    max_texts: int = 256
    max_characters: int = 100_000
    max_body_bytes: int = 8_000_000
    max_waiting_texts: int = 4096
    max_batch_texts: int = 64
    max_wait_ms: float = 2.0


class RequestError(Exception):
    """A request that is answered with an error; `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


@dataclass
class Job:
    """The texts of one request on their way through the queue."""

    texts: list[str]
    exit_layer: int
    task: str | None
    result: asyncio.Future
    arrived: float = field(default_factory=time.perf_counter)


class Batcher:
    """Encodes what waits, one batch at a time in a thread, so that the event loop stays free."""

    def __init__(self, model: Any, limits: Limits, metrics: "Metrics"):
        self.model, self.limits, self.metrics = model, limits, metrics
        self.waiting: deque[Job] = deque()
        self.waiting_texts = 0
        self.closing = False
        self.arrival = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "encode")
        self.task: asyncio.Task | None = None

    async def encode(self, texts: list[str], exit_layer: int, task: str | None) -> np.ndarray:
        """Return unit vectors [texts, width] at full width."""
        if self.closing:
            raise RequestError(503, "The server is shutting down.")
        if self.waiting_texts + len(texts) > self.limits.max_waiting_texts:
            raise RequestError(429, f"{self.waiting_texts} texts are waiting already: try again later.")
        job = Job(texts, exit_layer, task, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self.waiting_texts += len(texts)
        self.arrival.set()
        return await job.result

    def _next_batch(self) -> list[Job]:
        first = self.waiting.popleft()
        batch, count, rest = [first], len(first.texts), deque()
        while self.waiting:
            job = self.waiting.popleft()
            alike = (job.exit_layer, job.task) == (first.exit_layer, first.task)
            if alike and count + len(job.texts) <= self.limits.max_batch_texts:
                batch.append(job)
                count += len(job.texts)
            else:
                rest.append(job)
        self.waiting = rest
        self.waiting_texts -= count
        return batch

    def _run(self, batch: list[Job]) -> np.ndarray:
        encode = {"query": self.model.encode_query, "document": self.model.encode_document}.get(
            batch[0].task or "", self.model.encode
        )
        return encode(
            [text for job in batch for text in job.texts],
            exit_layer=batch[0].exit_layer,
            batch_size=self.limits.max_batch_texts,
            show_progress_bar=False,
        )

    async def work(self) -> None:
        """Encode until the server closes and nothing waits."""
        loop = asyncio.get_running_loop()
        while not (self.closing and not self.waiting):
            if not self.waiting:
                self.arrival.clear()
                await self.arrival.wait()
                # A short wait lets requests of the same moment share a batch.
                await asyncio.sleep(self.limits.max_wait_ms / 1e3)
                continue
            batch = self._next_batch()
            self.metrics.batch_texts.observe(sum(len(job.texts) for job in batch))
            try:
                vectors = await loop.run_in_executor(self.thread, self._run, batch)
            except Exception as error:  # whatever it is, the requests that wait for it must hear of it
                for job in batch:
                    if not job.result.done():
                        job.result.set_exception(error)
                continue
            start = 0
            for job in batch:
                if not job.result.done():
                    job.result.set_result(vectors[start : start + len(job.texts)])
                start += len(job.texts)

    async def close(self) -> None:
        """Finish what waits, then stop."""
        self.closing = True
        self.arrival.set()
        if self.task is not None:
            await self.task
        self.thread.shutdown()


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("m3bert_requests", "Requests", ["status"], registry=self.registry)
        self.texts = Counter("m3bert_texts", "Texts encoded", ["exit_layer"], registry=self.registry)
        self.tokens = Counter("m3bert_tokens", "Tokens encoded", registry=self.registry)
        self.seconds = Histogram("m3bert_request_seconds", "Time of a request", registry=self.registry)
        self.batch_texts = Histogram(
            "m3bert_batch_texts",
            "Texts of a batch",
            registry=self.registry,
            buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256],
        )
        self.waiting = Gauge("m3bert_waiting_texts", "Texts that wait", registry=self.registry)


def counting_tokenizer(model: Any) -> Any:
    """Return a tokenizer of one's own to count tokens with: `encode` sets padding and truncation on the model's.

    Both run in threads, and a fast tokenizer keeps these settings in itself.
    """
    backend = copy.deepcopy(model.tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_request(body: Any, model: Any, counter: Any, limits: Limits) -> dict[str, Any]:
    """Check a request's body and fill in defaults.

    Raises:
        RequestError: If something is wrong, naming the field, the value and the valid choices.
    """
    if not isinstance(body, dict):
        raise RequestError(400, f"The body must be a JSON object, got {type(body).__name__}.")
    known = {"input", "model", "dimensions", "encoding_format", "exit_layer", "task", "truncate", "user"}
    unknown = sorted(set(body) - known)
    if unknown:
        raise RequestError(400, f"Unknown fields {unknown}: choose of {sorted(known)}.", unknown[0])
    texts = [body["input"]] if isinstance(body.get("input"), str) else body.get("input")
    if not isinstance(texts, list) or not texts:
        raise RequestError(400, "`input` must be a text or a list of at least one text.", "input")
    if len(texts) > limits.max_texts:
        raise RequestError(400, f"{len(texts)} texts are more than the {limits.max_texts} of a request.", "input")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(400, f"input[{index}] must be a text, got {type(text).__name__}.", "input")
        if not text.strip():
            raise RequestError(400, f"input[{index}] is empty.", "input")
        if len(text) > limits.max_characters:
            raise RequestError(
                400, f"input[{index}] has {len(text)} characters, at most {limits.max_characters}.", "input"
            )
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise RequestError(400, f"input[{index}] holds half a surrogate pair, which is no text.", "input")
    width = model.truncate_dim or model.embedding_width
    dimensions = body.get("dimensions", width)
    if not isinstance(dimensions, int) or isinstance(dimensions, bool) or not 1 <= dimensions <= width:
        trained = [d for d in model.matryoshka_dimensions if d <= width]
        raise RequestError(
            400, f"dimensions={dimensions!r} must be within 1 and {width}; trained are {trained}.", "dimensions"
        )
    exit_layer = body.get("exit_layer", model.exit_layer)
    if not isinstance(exit_layer, int) or isinstance(exit_layer, bool) or exit_layer not in model.exit_layers:
        raise RequestError(
            400, f"exit_layer={exit_layer!r} does not exist: choose one of {model.exit_layers}.", "exit_layer"
        )
    task = body.get("task")
    if task not in (None, "query", "document"):
        raise RequestError(400, f"task={task!r} does not exist: choose 'query' or 'document'.", "task")
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise RequestError(
            400, f"encoding_format={encoding!r} does not exist: choose 'float' or 'base64'.", "encoding_format"
        )
    truncate = body.get("truncate", False)
    if not isinstance(truncate, bool):
        raise RequestError(400, f"truncate={truncate!r} must be true or false.", "truncate")
    lengths = [len(encoding.ids) for encoding in counter.encode_batch(texts)]
    longest = model.max_seq_length
    if max(lengths) > longest and not truncate:
        index = lengths.index(max(lengths))
        raise RequestError(
            400,
            f"input[{index}] has {lengths[index]} tokens, the model reads {longest}: shorten it, or send "
            "`truncate: true` to have it cut.",
            "input",
        )
    return {
        "texts": texts,
        "dimensions": dimensions,
        "exit_layer": exit_layer,
        "task": task,
        "encoding": encoding,
        "tokens": sum(min(length, longest) for length in lengths),
    }


def make_app(model: Any, name: str, limits: Limits | None = None) -> FastAPI:
    """Make the application around a loaded model.

    Args:
        model: An `M3BertSentenceTransformer`.
        name: What `/v1/models` and answers call it.
        limits: `None` means the defaults.
    """
    limits = limits or Limits()
    metrics = Metrics()
    tokenizing = ThreadPoolExecutor(1, "tokenize")
    counter = counting_tokenizer(model)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        batcher = app.state.batcher = Batcher(model, limits, metrics)
        batcher.task = asyncio.create_task(batcher.work())
        yield
        await batcher.close()

    app = FastAPI(title="m3BERT embeddings", lifespan=lifespan)

    def refusal(status: int, message: str, param: str | None = None) -> JSONResponse:
        metrics.requests.labels(status).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        headers = {"retry-after": "1"} if status in (429, 503) else None
        content = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        return JSONResponse(content, status, headers)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return refusal(error.status, error.message, error.param)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return refusal(500, f"{type(error).__name__}: the server's log has more.")

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> JSONResponse:
        start = time.perf_counter()
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > limits.max_body_bytes:
                raise RequestError(413, f"The body is larger than {limits.max_body_bytes:,} bytes.")
        try:
            body = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"The body is not JSON: {error}.") from error
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(tokenizing, read_request, body, model, counter, limits)
        batcher: Batcher = app.state.batcher
        vectors = await batcher.encode(asked["texts"], asked["exit_layer"], asked["task"])
        vectors = np.asarray(vectors, dtype=np.float32)[:, : asked["dimensions"]]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if asked["encoding"] == "base64":
            encoded: list[Any] = [base64.b64encode(vector.tobytes()).decode("ascii") for vector in vectors]
        else:
            encoded = vectors.tolist()
        metrics.requests.labels(200).inc()
        metrics.texts.labels(asked["exit_layer"]).inc(len(encoded))
        metrics.tokens.inc(asked["tokens"])
        metrics.seconds.observe(time.perf_counter() - start)
        return JSONResponse(
            {
                "object": "list",
                "model": name,
                "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(encoded)],
                "usage": {"prompt_tokens": asked["tokens"], "total_tokens": asked["tokens"]},
            }
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        batcher: Batcher = app.state.batcher
        running = batcher.task is not None and not batcher.task.done() and not batcher.closing
        return JSONResponse({"status": "ok" if running else "closing"}, 200 if running else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {
            "id": name,
            "object": "model",
            "exit_layers": model.exit_layers,
            "dimensions": model.matryoshka_dimensions,
            "max_tokens": model.max_seq_length,
        }
        return {"object": "list", "data": [entry]}

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        metrics.waiting.set(app.state.batcher.waiting_texts)
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def main() -> None:
    """Load the model and serve it until SIGTERM or SIGINT; requests under way are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory or Hub name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--exit-layer", type=int, help="load no layer above this exit")
    parser.add_argument("--max-seq-length", type=int)
    parser.add_argument(
        "--prepack",
        action="store_true",
        help="lay weights out for the CPU, for memory that grows with each new number of tokens (docs/deployment.md)",
    )
    for name, value in vars(Limits()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    model = build_sentence_transformer(options.model, options.exit_layer, max_seq_length=options.max_seq_length)
    if model.device.type == "cpu":
        if options.prepack:
            prepack_weights(model)
        # The next batch needs about the memory of the last one: the system need not clear its pages again.
        keep_freed_memory()
    limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
    app = make_app(model, Path(options.model).name, limits)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
