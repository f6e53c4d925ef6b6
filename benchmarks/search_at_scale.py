"""Exact and approximate search over a million vectors: time, memory, and what it would take for the paper's size.

    python benchmarks/search_at_scale.py --output search.json

Random unit vectors of 64 dimensions in clusters, 20,000 queries, 1,000,000 documents by default. The documents lie in
a file that is mapped into memory; the peak of the process shows that only blocks of them are copied. The paper
searches 1,000,000 queries x 9,000,000 documents (arXiv 2605.19568): the time of the exact search grows with the
product, so one measured pair of sizes gives the rest. `torch.topk` over all similarities of a query block at once is
the naive peer.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from m3bert_hf.search import exact_search, faiss_index, faiss_search, overlap, two_step_search


def clustered(count: int, width: int, centers: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw unit vectors around centers: uniform ones have no neighbours that an index could find."""
    generator = torch.Generator().manual_seed(seed)
    chosen = centers[torch.randint(len(centers), (count,), generator=generator)]
    return torch.nn.functional.normalize(chosen + torch.randn(count, width, generator=generator) * 0.6, dim=1)


def main() -> None:
    """Measure each search and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    centers = torch.randn(2000, options.width, generator=torch.Generator().manual_seed(0))
    queries = clustered(options.queries, options.width, centers, 1)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.npy"
        stored = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(options.documents, options.width))
        for start in tqdm(range(0, options.documents, 100_000), desc="documents"):
            part = clustered(min(100_000, options.documents - start), options.width, centers, 2 + start)
            stored[start : start + len(part)] = part.numpy()
        stored.flush()
        documents = np.load(file, mmap_mode="r")

        def measure(name: str, work, count: int) -> torch.Tensor:
            start = time.perf_counter()
            indices = work()
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append({"search": name, "queries": count, "seconds": seconds, "peak_mib": peak})
            print(json.dumps(rows[-1]), flush=True)
            return indices

        part = queries[: max(1, options.queries // 20)]
        # First what holds little: the peak of a process never falls again.
        exact = measure("exact, blocks", lambda: exact_search(queries, documents, options.top_k)[1], options.queries)
        found = measure(
            "two steps, 32 dimensions first",
            lambda: two_step_search(part, documents, options.top_k, options.width // 2)[1],
            len(part),
        )
        rows[-1]["recall"] = overlap(found, exact[: len(part)])
        whole = torch.from_numpy(np.array(documents))

        def naive() -> torch.Tensor:
            return torch.cat([(block @ whole.T).topk(options.top_k).indices for block in part.split(256)])

        found = measure("naive, all documents at once", naive, len(part))
        rows[-1]["recall"] = overlap(found, exact[: len(part)])
        try:
            import faiss  # noqa: F401
        except ImportError:
            print("faiss is not installed: pip install faiss-cpu")
        else:
            flat = faiss_index(documents)
            measure("faiss Flat", lambda: faiss_search(queries, flat, options.top_k)[1], options.queries)
            del flat
            start = time.perf_counter()
            inverted = faiss_index(documents, "IVF1024,Flat")
            built = time.perf_counter() - start
            inverted.nprobe = 32
            found = measure(
                "faiss IVF1024, 32 cells", lambda: faiss_search(queries, inverted, options.top_k)[1], options.queries
            )
            rows[-1].update(recall=overlap(found, exact), build_seconds=built)
    pair = rows[0]["seconds"] / options.queries / options.documents
    print(f"\n| search | queries | s | queries/s | recall@{options.top_k} | peak MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        rate = row["queries"] / row["seconds"]
        print(
            f"| {row['search']} | {row['queries']:,} | {row['seconds']:.1f} | {rate:,.0f} | "
            f"{row.get('recall', 1.0):.3f} | {row['peak_mib']:,.0f} |"
        )
    operations = 2 * options.width * 1e6 * 9e6
    print(
        f"\nThe paper's 1M x 9M at {options.width} dimensions: {pair * 9e12 / 3600:.1f} h here, exact, at "
        f"{2 * options.width / pair / 1e9:.0f} GFLOP/s; {operations / 1e15:.2f} PFLOP, that is "
        f"{operations / 100e12:.0f} s of products at 100 TFLOP/s on a GPU; vectors "
        f"{9e6 * options.width * 4 / 1e9:.1f} GB, result {1e6 * 1000 * 12 / 1e9:.0f} GB at 1,000 hits."
    )
    if options.output:
        options.output.write_text(
            json.dumps({"documents": options.documents, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
