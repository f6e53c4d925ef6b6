"""Quality, speed and size of a model at every (exit, dimension), as a sentence-transformers evaluator."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from .grid_report import GridReport
from .retrieval_metrics import retrieval_metrics
from .retrieval_task import RetrievalTask
from .search import Precision, bytes_per_vector, exact_search, through_precision
from .sentence_transformer import M3BertSentenceTransformer, _encoders


logger = logging.getLogger(__name__)

_SPEED_TEXTS = 256


class GranularityEvaluator(SentenceEvaluator):
    """Measure every (exit, dimension) of a model: in a trainer, or by `evaluator(model)`.

    All exits encode in one pass over the texts, dimensions are slices, search is exact over the whole pool. For each
    cell: MRR@k, Recall@k and nDCG@10 (or Spearman's correlation), per group of queries such as languages and over all;
    bytes per vector; parameters and megabytes that the cell needs; and, with `measure_speed`, the p50 and p95 latency
    of a single query, of its exact search, and the queries and documents per second of batches. Encoding time depends
    on the exit alone: a narrower slice saves storage and search, not encoding.

    A model that is not an m3BERT is measured at its only exit, so that peers stand in the same table.

    Args:
        queries: Text of each query, by name, as sentence-transformers' `InformationRetrievalEvaluator` takes it.
        corpus: Text of each document, by name.
        relevant_docs: Names of the right documents of each query. Documents of the same text count as right too.
        groups: Group of each query by name, such as its language.
        exit_layers: `None` means all of the model's.
        truncate_dims: `None` means the model's matryoshka dimensions.
        precisions: Vectors as stored: `float32`, `int8`, `binary`.
        cutoffs: Values of k for MRR@k and Recall@k.
        batch_size: Texts encoded at once.
        name: Put before the names of the metrics.
        primary_metric: Whose mean over the cells chooses the best checkpoint.
        measure_speed: Measure latency and throughput (some seconds for each exit).
        show_progress_bar: Show one while encoding.

    Raises:
        ValueError: If there is nothing to evaluate, a text is empty, or a relevant document does not exist.
    """

    def __init__(
        self,
        queries: Mapping[str, str],
        corpus: Mapping[str, str],
        relevant_docs: Mapping[str, set[str]],
        groups: Mapping[str, str] | None = None,
        exit_layers: Sequence[int] | None = None,
        truncate_dims: Sequence[int] | None = None,
        precisions: Sequence[Precision] = ("float32",),
        cutoffs: Sequence[int] = (10, 100),
        batch_size: int = 64,
        name: str = "",
        primary_metric: str | None = None,
        measure_speed: bool = True,
        show_progress_bar: bool = False,
    ):
        places = {key: index for index, key in enumerate(corpus)}
        for key, right in relevant_docs.items():
            missing = [name for name in right if name not in places]
            if missing:
                raise ValueError(f"Relevant document {missing[0]!r} of query {key!r} is not in the corpus.")
        names = [key for key in queries if relevant_docs.get(key)]
        if len(names) < len(queries):
            logger.warning("%s queries have no relevant document and are left out.", len(queries) - len(names))
        task = RetrievalTask(
            [queries[key] for key in names],
            list(corpus.values()),
            [{places[name] for name in relevant_docs[key]} for key in names],
            [str(groups[key]) for key in names] if groups else [],
        )
        self._set_up(
            task=task,
            exit_layers=exit_layers,
            truncate_dims=truncate_dims,
            precisions=precisions,
            cutoffs=cutoffs,
            batch_size=batch_size,
            name=name,
            primary_metric=primary_metric,
            measure_speed=measure_speed,
            show_progress_bar=show_progress_bar,
        )

    def _set_up(
        self,
        task: RetrievalTask | None = None,
        similarity: tuple[list[str], list[str], list[float]] | None = None,
        exit_layers: Sequence[int] | None = None,
        truncate_dims: Sequence[int] | None = None,
        precisions: Sequence[Precision] = ("float32",),
        cutoffs: Sequence[int] = (10, 100),
        batch_size: int = 64,
        name: str = "",
        primary_metric: str | None = None,
        measure_speed: bool = True,
        show_progress_bar: bool = False,
    ) -> None:
        SentenceEvaluator.__init__(self)
        for precision in precisions:
            bytes_per_vector(1, precision)
        self.task = task
        self.similarity = similarity
        self.exit_layers = exit_layers
        self.truncate_dims = truncate_dims
        self.precisions = list(precisions)
        self.cutoffs = sorted(cutoffs)
        self.batch_size = batch_size
        self.name = name
        self.measure_speed = measure_speed
        self.show_progress_bar = show_progress_bar
        self.metric = primary_metric or ("spearman" if similarity else f"mrr@{self.cutoffs[0]}")
        known = (
            ["spearman"]
            if similarity
            else ["ndcg@10", *(f"{kind}@{k}" for kind in ("mrr", "recall") for k in self.cutoffs)]
        )
        if self.metric not in known:
            raise ValueError(f"primary_metric={self.metric!r} is not measured: choose one of {known}.")
        self.primary_metric = f"{name}_mean_{self.metric}" if name else f"mean_{self.metric}"
        self.report: GridReport | None = None

    @classmethod
    def from_task(cls, task: RetrievalTask, **options) -> "GranularityEvaluator":
        """Make an evaluator for a [`RetrievalTask`]; options as for the class."""
        evaluator = cls.__new__(cls)
        evaluator._set_up(task=task, **{"name": task.name, **options})
        return evaluator

    @classmethod
    def from_pairs(
        cls, queries: Sequence[str], documents: Sequence[str], groups: Sequence[str] | None = None, **options
    ) -> "GranularityEvaluator":
        """Make an evaluator for pairs: the pool is their distinct documents.

        Raises:
            ValueError: If the lists differ in length, or a text is empty.
        """
        if len(queries) != len(documents):
            raise ValueError(f"{len(queries)} queries do not pair with {len(documents)} documents.")
        pool = list(dict.fromkeys(documents))
        places = {text: index for index, text in enumerate(pool)}
        relevant = [{places[text]} for text in documents]
        return cls.from_task(RetrievalTask(list(queries), pool, relevant, list(groups or [])), **options)

    @classmethod
    def from_similarity(
        cls, sentences1: Sequence[str], sentences2: Sequence[str], scores: Sequence[float], **options
    ) -> "GranularityEvaluator":
        """Make an evaluator for scored pairs (STS): Spearman's correlation of the cosine with the scores.

        Raises:
            ValueError: If the lists differ in length or hold fewer than two pairs.
        """
        if not len(sentences1) == len(sentences2) == len(scores) or len(scores) < 2:
            raise ValueError(
                f"Expected equally many sentences and scores, at least 2; got {len(sentences1)}, {len(sentences2)} "
                f"and {len(scores)}."
            )
        evaluator = cls.__new__(cls)
        evaluator._set_up(similarity=(list(sentences1), list(sentences2), list(map(float, scores))), **options)
        return evaluator

    # ------------------------------------------------------------------ measuring

    def __call__(  # type: ignore[override]
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure a model; write JSON, CSV and pictures where `output_path` is given.

        Returns:
            `{name}_exit{l}_dim{d}_{metric}` for each cell and `{name}_mean_{metric}`, the mean over float32 cells.
        """
        report = self.evaluate(model)
        if output_path is not None:
            suffix = f"_step{steps}" if steps >= 0 else f"_epoch{epoch}" if epoch >= 0 else ""
            report.save(Path(output_path) / f"granularities{'_' + self.name if self.name else ''}{suffix}")
        metrics = report.flat_metrics()
        prefixed = {f"{self.name}_{key}" if self.name else key: value for key, value in metrics.items()}
        logger.info("%s\n%s", self.name, report.table(self.metric))
        self.store_metrics_in_model_card_data(model, prefixed, epoch, steps)
        return prefixed

    @torch.inference_mode()
    def evaluate(self, model: SentenceTransformer) -> GridReport:
        """Measure a model and return the grid.

        Raises:
            ValueError: If an exit or a dimension does not exist in the model.
        """
        exits, dims = self._cells(model)
        rows = (
            self._similarity_rows(model, exits, dims) if self.similarity else self._retrieval_rows(model, exits, dims)
        )
        sizes = {exit_layer: model_size(model, exit_layer) for exit_layer in exits}
        for row in rows:
            parameters, size = sizes[row["exit_layer"]]
            row["parameters"] = parameters
            row["megabytes"] = size / 1e6
            row["bytes_per_vector"] = bytes_per_vector(row["truncate_dim"], row["precision"])
        self.report = GridReport(rows, self._description(model), self.metric)
        return self.report

    def _cells(self, model: SentenceTransformer) -> tuple[list[int], list[int]]:
        config = _m3bert_config(model)
        if config is None:
            depth = getattr(getattr(model.transformers_model, "config", None), "num_hidden_layers", 1)
            width = int(model.get_embedding_dimension() or 0)
            exits, dims = list(self.exit_layers or [depth]), list(self.truncate_dims or [width])
            if exits != [depth]:
                raise ValueError(f"exit_layers={exits} do not exist: {type(model).__name__} has only {depth}.")
            for dimension in dims:
                if not 1 <= dimension <= width:
                    raise ValueError(f"truncate_dim={dimension} does not exist: choose a width within 1 and {width}.")
            return exits, dims
        exits = [config.resolve_exit_layer(e) for e in self.exit_layers or config.exit_layers]
        if isinstance(model, M3BertSentenceTransformer):
            width, trained = model.embedding_width, model.matryoshka_dimensions
        else:
            width = int(model.get_embedding_dimension() or config.hidden_size)
            trained = [d for d in config.matryoshka_dimensions if d < width] + [width]
        dims = list(self.truncate_dims or trained)
        for dimension in dims:
            if not 1 <= dimension <= width:
                raise ValueError(
                    f"truncate_dim={dimension} does not exist: choose a width within 1 and {width}; trained are "
                    f"{trained}."
                )
        return exits, dims

    def _encode(
        self, model: SentenceTransformer, texts: list[str], task: Any, exits: list[int], width: int
    ) -> dict[int, torch.Tensor]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "truncate_dim": width}
        if isinstance(model, M3BertSentenceTransformer):
            return model.encode_exits(texts, exits, task, show_progress_bar=self.show_progress_bar, **options)
        encode = {"query": model.encode_query, "document": model.encode_document}.get(task, model.encode)
        options.update(show_progress_bar=self.show_progress_bar, convert_to_tensor=True)
        if _m3bert_config(model) is None:
            return {exits[0]: encode(texts, **options).float().cpu()}
        return {e: encode(texts, exit_layer=e, **options).float().cpu() for e in exits}

    def _retrieval_rows(self, model: SentenceTransformer, exits: list[int], dims: list[int]) -> list[dict[str, Any]]:
        task = self.task
        assert task is not None
        # Each distinct text is encoded once; the pool keeps its size.
        distinct = list(dict.fromkeys(task.documents))
        numbers = {text: index for index, text in enumerate(distinct)}
        text_ids = torch.tensor([numbers[text] for text in task.documents])
        start = time.perf_counter()
        queries = self._encode(model, task.queries, "query", exits, max(dims))
        documents = self._encode(model, distinct, "document", exits, max(dims))
        self.encoding_seconds = time.perf_counter() - start
        groups = sorted(set(task.groups)) if any(task.groups) else []
        members = {g: torch.tensor([i for i, own in enumerate(task.groups) if own == g]) for g in groups}
        rows = []
        for exit_layer in exits:
            speed = self._speed(model, exit_layer) if self.measure_speed else {}
            for dimension in dims:
                for precision in self.precisions:
                    stored = through_precision(documents[exit_layer][:, :dimension], precision)
                    pool = stored if len(distinct) == len(text_ids) else stored[text_ids]
                    asked = queries[exit_layer][:, :dimension]
                    _, hits = exact_search(asked, pool, max(*self.cutoffs, 10))
                    metrics = retrieval_metrics(hits, task.relevant, self.cutoffs, text_ids)
                    row: dict[str, Any] = {"exit_layer": exit_layer, "truncate_dim": dimension, "precision": precision}
                    row.update({name: values.mean().item() for name, values in metrics.items()})
                    if groups:
                        row["groups"] = {
                            group: {
                                "queries": len(own),
                                **{name: values[own].mean().item() for name, values in metrics.items()},
                            }
                            for group, own in members.items()
                        }
                    row.update(speed)
                    if self.measure_speed:
                        row.update(_search_latency(asked, pool))
                    rows.append(row)
        return rows

    def _similarity_rows(self, model: SentenceTransformer, exits: list[int], dims: list[int]) -> list[dict[str, Any]]:
        assert self.similarity is not None
        first, second, scores = self.similarity
        left = self._encode(model, first, None, exits, max(dims))
        right = self._encode(model, second, None, exits, max(dims))
        rows = []
        for exit_layer in exits:
            speed = self._speed(model, exit_layer) if self.measure_speed else {}
            for dimension in dims:
                for precision in self.precisions:
                    stored = through_precision(right[exit_layer][:, :dimension], precision)
                    cosines = torch.nn.functional.cosine_similarity(left[exit_layer][:, :dimension], stored)
                    row: dict[str, Any] = {"exit_layer": exit_layer, "truncate_dim": dimension, "precision": precision}
                    row["spearman"] = float(spearmanr(cosines.numpy(), scores).statistic)
                    rows.append({**row, **speed})
        return rows

    def _speed(self, model: SentenceTransformer, exit_layer: int) -> dict[str, float]:
        """Time single queries, and batches of queries and documents, at an exit."""
        if self.task is not None:
            queries, documents = self.task.queries, self.task.documents
        else:
            assert self.similarity is not None
            queries, documents = self.similarity[0], self.similarity[1]
        options: dict[str, Any] = {"show_progress_bar": False, "convert_to_tensor": True}
        if _m3bert_config(model) is not None:
            options["exit_layer"] = exit_layer
        # Spread over the files, which are often sorted by language.
        queries = queries[:: max(1, len(queries) // _SPEED_TEXTS)][:_SPEED_TEXTS]
        documents = documents[:: max(1, len(documents) // _SPEED_TEXTS)][:_SPEED_TEXTS]
        for text in queries[:3]:
            model.encode_query(text, **options)
        times = []
        for text in queries[:64]:
            start = time.perf_counter()
            _synchronized(model.encode_query(text, **options))
            times.append(time.perf_counter() - start)
        rates = []
        for encode, texts in ((model.encode_query, queries), (model.encode_document, documents)):
            start = time.perf_counter()
            _synchronized(encode(texts, batch_size=self.batch_size, **options))
            rates.append(len(texts) / (time.perf_counter() - start))
        return {
            "query_p50_ms": 1e3 * float(np.percentile(times, 50)),
            "query_p95_ms": 1e3 * float(np.percentile(times, 95)),
            "queries_per_second": rates[0],
            "documents_per_second": rates[1],
        }

    def _description(self, model: SentenceTransformer) -> dict[str, Any]:
        description: dict[str, Any] = {
            "task": self.name,
            "threads": torch.get_num_threads(),
            "device": str(model.device),
            "torch": torch.__version__,
            "batch_size": self.batch_size,
            "max_seq_length": model.max_seq_length,
        }
        if self.task is not None:
            description.update(queries=len(self.task.queries), documents=len(self.task.documents))
        elif self.similarity is not None:
            description.update(pairs=len(self.similarity[0]))
        return description

    @property
    def description(self) -> str:
        """What sentence-transformers' model cards call this evaluation."""
        return "Granularities"

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card names."""
        return {"exit_layers": self.exit_layers, "truncate_dims": self.truncate_dims, "precisions": self.precisions}


def _synchronized(vectors: torch.Tensor) -> torch.Tensor:
    if vectors.is_cuda:
        torch.cuda.synchronize(vectors.device)
    return vectors


def _search_latency(queries: torch.Tensor, documents: torch.Tensor) -> dict[str, float]:
    """Time the exact search of single queries over unit vectors that lie in memory, as an index holds them."""
    unit = torch.nn.functional.normalize(queries[:20], dim=1)
    transposed = documents.T
    times = []
    for query in unit:
        start = time.perf_counter()
        (query @ transposed).topk(min(10, len(documents)))
        times.append(time.perf_counter() - start)
    return {"search_p50_ms": 1e3 * float(np.percentile(times, 50))}


def _m3bert_config(model: SentenceTransformer) -> Any:
    try:
        return _encoders(model)[0].config
    except TypeError:
        return None


def model_size(model: SentenceTransformer, exit_layer: int) -> tuple[int, int]:
    """Return the parameters, and their bytes, that a model needs to exit at a layer."""
    unneeded: set[int] = set()
    if _m3bert_config(model) is not None:
        for encoder in _encoders(model):
            layers: Any = encoder.layers
            for layer in list(layers)[exit_layer:]:
                unneeded.update(id(p) for p in layer.parameters())
    needed = [p for p in model.parameters() if id(p) not in unneeded]
    return sum(p.numel() for p in needed), sum(p.numel() * p.element_size() for p in needed)


__all__ = ["GranularityEvaluator", "model_size"]
