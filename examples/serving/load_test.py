"""Load a running server with many clients and check every answer.

    python examples/serving/load_test.py http://127.0.0.1:8000 --clients 64 --seconds 60 --pid PID

Each client sends requests of mixed numbers of texts, lengths, exits and dimensions one after another, and between them
bodies that are wrong in some way. An answer is right if it has the shape that was asked for and length 1, and if the
same text got the same vector before; what is wrong must get a 4xx. With `--pid`, the server's memory is watched.
"""

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np


WORDS = ["photo", "resize", "how", "small", "house", "Wiese", "chat", "noir", "写真", "サイズ", "файл", "price", "red"]


def bad_body(generator: random.Random) -> bytes:
    """Return a body that no server should take."""
    choices: list[Any] = [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b"[]",
        b"null",
        {},
        {"input": []},
        {"input": ""},
        {"input": [1, 2]},
        {"input": [["a"]]},
        {"input": {"a": 1}},
        {"input": "a", "dimensions": generator.choice([0, -1, 10**9, 1.5, "64", True, None])},
        {"input": "a", "exit_layer": generator.choice([0, -1, 99, "1", 1.0, 1.5, [], True])},
        {"input": "a", "encoding_format": "hex"},
        {"input": "a", "task": "cook"},
        {"input": "a", "truncate": "yes"},
        {"input": "a", "temperature": 1},
        {"input": "word " * 5000},
        {"input": ["a"] * 10_000},
        {"input": "\ud800"},
    ]
    chosen = generator.choice(choices)
    return chosen if isinstance(chosen, bytes) else json.dumps(chosen).encode()


async def client(index: int, url: str, until: float, shape: dict[str, Any], seen: dict, counts: dict) -> None:
    """Send requests until the time is over."""
    generator = random.Random(index)
    async with httpx.AsyncClient(base_url=url, timeout=60) as session:
        while time.monotonic() < until:
            if generator.random() < 0.2:
                answer = await session.post("/v1/embeddings", content=bad_body(generator))
                assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
                assert answer.json()["error"]["message"]
                counts["refused"] += 1
                continue
            texts = [
                " ".join(generator.choices(WORDS, k=generator.choice([1, 2, 3, 8, 40])))
                for _ in range(generator.choice([1, 1, 1, 2, 5, 30]))
            ]
            exit_layer, width = generator.choice(shape["exit_layers"]), generator.choice(shape["dimensions"])
            body = {"input": texts, "exit_layer": exit_layer, "dimensions": width, "truncate": True}
            answer = await session.post("/v1/embeddings", json=body)
            if answer.status_code == 429:
                counts["told to wait"] += 1
                await asyncio.sleep(0.1)
                continue
            assert answer.status_code == 200, (answer.status_code, answer.text[:300])
            vectors = np.array([row["embedding"] for row in answer.json()["data"]])
            assert vectors.shape == (len(texts), width)
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
            for text, vector in zip(texts, vectors, strict=True):
                known = seen.setdefault((text, exit_layer, width), vector)
                assert np.allclose(known, vector, atol=1e-4), "the same text got another vector"
            counts["answered"] += 1
            counts["texts"] += len(texts)


def memory(pid: int | None) -> float:
    """Return the resident MiB of a process."""
    if pid is None:
        return 0.0
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the clients and return what they counted."""
    async with httpx.AsyncClient(base_url=options.url, timeout=60) as session:
        shape = (await session.get("/v1/models")).json()["data"][0]
    counts = {"answered": 0, "refused": 0, "told to wait": 0, "texts": 0}
    seen: dict = {}
    start = time.monotonic()
    until = start + options.seconds
    tasks = [asyncio.create_task(client(i, options.url, until, shape, seen, counts)) for i in range(options.clients)]
    # The first seconds fill the allocator and the prepared shapes: memory is compared from then on.
    await asyncio.sleep(options.seconds / 4)
    early = memory(options.pid)
    await asyncio.gather(*tasks)
    return {
        **counts,
        "seconds": round(time.monotonic() - start, 1),
        "memory_mib_after_a_quarter": round(early, 1),
        "memory_mib_at_the_end": round(memory(options.pid), 1),
    }


def main() -> None:
    """Parse the command line and print the counts; an assertion that fails is an error of the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pid", type=int)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
