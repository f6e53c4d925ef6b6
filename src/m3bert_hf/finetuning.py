"""Contrastive fine-tuning of an m3BERT checkpoint at every (exit, dimension), or at some, on query-document pairs."""

import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoConfig

from .corpus import load_documents
from .masked_language_loss import MaskedLanguageLoss, SaveMaskedLanguageHead
from .modeling_m3bert import M3BertForMaskedLM
from .multigranular_loss import MultigranularLoss
from .neighbour_batches import NeighbourBatchSampler
from .retrieval_task import load_retrieval_task
from .sentence_transformer import M3BertSentenceTransformer, build_sentence_transformer
from .text_data import group_rows, sample_balanced
from .trainer import last_complete_checkpoint
from .whitening import whiten_embeddings


logger = logging.getLogger(__name__)

# The name of the dataset of texts to be masked, among those of the pairs.
MASKED_TEXTS = "masked-texts"


@dataclass
class FinetuneArguments:
    """What to fine-tune on, beside sentence-transformers' own training arguments."""

    model: str = field(metadata={"help": "Checkpoint to start from."})
    train_files: list[str] = field(
        metadata={"help": "JSON-lines files with `query`, `document` and perhaps `negatives` (a list) in each row."}
    )
    exclude_files: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation files whose queries and documents must not be trained on."}
    )
    max_pairs: int | None = field(default=None, metadata={"help": "Pairs to draw; all by default."})
    temperature: float = field(
        default=0.5, metadata={"help": "Sampling over languages and sources: 1 as in the files, 0 all equal."}
    )
    batches_by: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields such as source and lang that all rows of a batch share, so that in-batch negatives cannot "
            "be told apart by them; groups smaller than a batch are joined by the first field, then into one."
        },
    )
    neighbours: int = field(
        default=1,
        metadata={
            "help": "Documents that follow one another in alphabetical order to put in a batch together, as harder "
            "negatives (NeighbourBatchSampler); 1 draws each by itself, by `batch_sampler`."
        },
    )
    granularities: list[str] | None = field(
        default=None,
        metadata={
            "help": "Pairs exit:dimension to train, such as 4:64 12:768; all of the checkpoint's by default. Layers "
            "above the deepest are not loaded, and the saved model offers these exits."
        },
    )
    granularity_weights: list[float] | None = field(default=None, metadata={"help": "One weight for each pair."})
    partial_initialization: bool = field(
        default=False,
        metadata={"help": "Allow exits that the checkpoint was not pretrained for: any number of its first layers."},
    )
    whiten_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Undo the collapse of a model that was pretrained for minutes or hours (whiten_embeddings)."
        },
    )
    align_weight: float = field(default=0.0, metadata={"help": "Weight of the alignment with the deepest exit."})
    align: str = field(default="similarity", metadata={"help": "What is aligned: similarity or embedding."})
    masked_language_model: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained checkpoint whose masked-language head is trained along, so that the result still "
            "fills in words; one process only."
        },
    )
    masked_language_share: float = field(default=0.25, metadata={"help": "Share of the batches that are masked text."})
    masked_language_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of text to mask, with a column `text` and perhaps `lang`, by paragraphs cut at "
            "document_length, drawn over languages by `temperature`; the documents of the pairs by default."
        },
    )
    masked_language_weight: float = field(default=1.0, metadata={"help": "Weight of a masked batch's loss."})
    masked_language_untied: bool = field(
        default=False,
        metadata={"help": "Give the head a decoder of its own where the pretrained one is tied to the embeddings."},
    )
    # The lengths, temperature and pooling of the authors' fine-tuning on clicks (arXiv 2605.19568).
    query_length: int = field(default=16, metadata={"help": "Tokens of a query."})
    document_length: int = field(default=64, metadata={"help": "Tokens of a document."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens that the saved model reads of a text."})
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Temperature of InfoNCE."})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Texts encoded at once, for batches beyond the memory (GradCache)."}
    )
    mined_negatives: int = field(
        default=0, metadata={"help": "Hard negatives to mine for each query before training."}
    )
    mining_range: list[int] = field(
        default_factory=lambda: [10, 100],
        metadata={"help": "Ranks that negatives are drawn from: the first ones are too often right themselves."},
    )
    mining_relative_margin: float | None = field(
        default=0.05, metadata={"help": "Negatives must be this share less similar than the right document."}
    )
    eval_queries: str | None = field(
        default=None,
        metadata={"help": "JSON lines with `query`, `id`: measured during training, over eval_documents."},
    )
    eval_documents: str | None = field(default=None, metadata={"help": "JSON lines with `id`, `document`."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "Queries of the evaluation during training, drawn at random."}
    )
    eval_metric: str = field(
        default="mrr@10", metadata={"help": "What the best checkpoint is chosen by, mean of cells."}
    )


def parse_granularities(texts: list[str] | None) -> list[tuple[int, int]] | None:
    """Read pairs written as `exit:dimension`.

    Raises:
        ValueError: If one is not written so.
    """
    if texts is None:
        return None
    pairs = []
    for text in texts:
        if isinstance(text, int):
            # YAML 1.1 reads 12:32 without quotes as a number of base 60.
            text = "{}:{}".format(*divmod(text, 60))
        exit_layer, _, dimension = str(text).partition(":")
        if not (exit_layer.isdigit() and dimension.isdigit()):
            raise ValueError(f"granularities: {text!r} is not exit:dimension, such as 4:64.")
        pairs.append((int(exit_layer), int(dimension)))
    return pairs


def load_pairs(arguments: FinetuneArguments, seed: int, batch_size: int = 1) -> Dataset | DatasetDict:
    """Draw pairs over languages and sources and leave out what the evaluation files hold.

    Args:
        arguments: Files and sampling.
        seed: Of the draw.
        batch_size: Rows that a group of `batches_by` must have to stand by itself.

    Returns:
        Columns `query`, `document` and, where the rows have `negatives`, `negative_1`, `negative_2`, ...; with
        `batches_by`, one dataset for each group, which sentence-transformers draws whole batches from.

    Raises:
        ValueError: If no pair is left, a row lacks a text or has an empty one, or rows differ in their number of
            negatives.
    """
    held_out = _held_out(arguments)
    groups = group_rows(arguments.train_files, by=("lang", "source"))
    for rows in groups.values():
        for row in rows:
            for key in ("query", "document"):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise ValueError(f"A row of {arguments.train_files} has no text in {key!r}: {str(row)[:200]}")
            if not all(isinstance(text, str) and text.strip() for text in row.get("negatives") or ()):
                raise ValueError(f"A row of {arguments.train_files} has negatives without text: {str(row)[:200]}")
    groups = {
        name: [
            row for row in rows if held_out.isdisjoint((row["query"], row["document"], *(row.get("negatives") or ())))
        ]
        for name, rows in groups.items()
    }
    size = sum(map(len, groups.values())) if arguments.max_pairs is None else arguments.max_pairs
    drawn = [row for _, row in sample_balanced(groups, size, arguments.temperature, seed)]
    if not drawn:
        raise ValueError(f"No pairs to train on in {arguments.train_files}: rows need `query` and `document`.")
    counts = Counter(len(row.get("negatives") or []) for row in drawn)
    if len(counts) > 1:
        raise ValueError(f"Rows must have the same number of `negatives`; found {dict(counts)} (number: rows).")
    if not arguments.batches_by:
        return _columns(drawn)
    parts = _batch_groups(drawn, arguments.batches_by, batch_size)
    return DatasetDict({name: _columns(rows) for name, rows in parts.items()})


def _held_out(arguments: FinetuneArguments) -> set[str]:
    """Return the queries and documents of all evaluation files."""
    evaluation = [*arguments.exclude_files, *filter(None, (arguments.eval_queries, arguments.eval_documents))]
    rows = (row for group in group_rows(evaluation).values() for row in group)
    return {row[key] for row in rows for key in ("query", "document") if key in row}


def _columns(rows: list[dict[str, Any]]) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in ("query", "document")}
    for index in range(len(rows[0].get("negatives") or [])):
        columns[f"negative_{index + 1}"] = [row["negatives"][index] for row in rows]
    return Dataset.from_dict(columns)


def _batch_groups(rows: list[dict[str, Any]], fields: list[str], batch_size: int) -> dict[str, list[dict[str, Any]]]:
    """Group rows by all fields; groups below a batch fall back to fewer fields, the last of them to one rest."""
    absent = [name for name in fields if not any(name in row for row in rows)]
    if absent:
        raise ValueError(f"batches_by: no row has {', '.join(absent)}; fields are {', '.join(sorted(rows[0]))}.")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    left = rows
    for depth in range(len(fields), -1, -1):
        found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in left:
            found.setdefault(tuple(str(row.get(name, "")) for name in fields[:depth]), []).append(row)
        groups.update({key: part for key, part in found.items() if len(part) >= batch_size or depth == 0})
        left = [row for part in found.values() if len(part) < batch_size for row in part]
    # The library makes modules of these names, which must be unique, not empty and without dots.
    return {
        f"pairs {number}: {'/'.join(key) or 'others'}".replace(".", "_"): part
        for number, (key, part) in enumerate(groups.items())
    }


def load_start(arguments: FinetuneArguments) -> tuple[M3BertSentenceTransformer, list[tuple[int, int]]]:
    """Load the checkpoint, no deeper than asked for, and return it with the pairs to train.

    With `granularities`, the model offers just these exits afterwards, since the others would be left as pretraining
    made them, useless for search; with a single pair its dimension becomes the default width.

    Raises:
        ValueError: If an exit or a dimension does not exist, or an exit was not pretrained and
            `partial_initialization` is not set.
    """
    pairs = parse_granularities(arguments.granularities)
    options: dict[str, Any] = {"max_seq_length": arguments.max_seq_length}
    if pairs is not None:
        config = AutoConfig.from_pretrained(arguments.model)
        exits = sorted({e for e, _ in pairs})
        if not arguments.partial_initialization:
            for exit_layer in exits:
                config.resolve_exit_layer(exit_layer)
        for _, dimension in pairs:
            config.resolve_truncate_dim(dimension)
        unknown = sorted(set(exits) - set(config.exit_layers))
        if unknown:
            logger.warning(
                "Exits %s were not pretrained (the checkpoint's are %s): its first %s layers start as they are.",
                unknown,
                list(config.exit_layers),
                exits[-1],
            )
        options["config_kwargs"] = {
            "num_hidden_layers": exits[-1],
            "exit_layers": exits,
            "matryoshka_dimensions": sorted({d for _, d in pairs} | {config.hidden_size}),
        }
        if len(pairs) == 1:
            options["truncate_dim"] = pairs[0][1]
    model = build_sentence_transformer(arguments.model, **options)
    config = model.transformers_model.config
    return model, pairs or [(e, d) for e in config.exit_layers for d in model.matryoshka_dimensions]


def finetune(
    arguments: FinetuneArguments, training: SentenceTransformerTrainingArguments
) -> M3BertSentenceTransformer:
    """Fine-tune with InfoNCE and in-batch negatives at all chosen granularities; save in `training.output_dir`.

    With evaluation files, every evaluation measures the grid; `load_best_model_at_end` keeps the checkpoint whose
    mean over the cells is best.

    Args:
        arguments: Data, lengths and granularities.
        training: Of sentence-transformers. `resume_from_checkpoint` may be a path, `"true"` for the last complete
            checkpoint, or `"auto"` for that if there is one.

    Raises:
        ValueError: If no pair is left to train on, or an exit or a dimension does not exist.
    """
    model, granularities = load_start(arguments)
    transformer: Any = model[0]
    pairs = load_pairs(arguments, training.seed, training.train_batch_size)
    if arguments.whiten_embeddings:
        # A run that is resumed reads its weights from the checkpoint afterwards.
        whiten_embeddings(transformer.model, count_tokens(model, pairs, arguments))
    if arguments.mined_negatives:
        pairs = _mine_groups(model, pairs, arguments)
    transformer.query_length = arguments.query_length
    transformer.document_length = arguments.document_length
    scale = 1.0 / arguments.contrastive_temperature
    if arguments.mini_batch_size:
        inner: Any = CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=arguments.mini_batch_size)
    else:
        inner = MultipleNegativesRankingLoss(model, scale=scale)
    loss = MultigranularLoss(
        model,
        inner,
        granularities,
        arguments.granularity_weights,
        align_weight=arguments.align_weight,
        align=arguments.align,  # type: ignore[arg-type]
    )
    # A column's role is what makes the library cut queries and documents at their own lengths.
    columns = next(iter(pairs.values())).column_names if isinstance(pairs, DatasetDict) else pairs.column_names
    routes = {name: "query" if name == "query" else "document" for name in columns}
    training.router_mapping = dict.fromkeys(pairs, routes) if isinstance(pairs, DatasetDict) else routes
    if arguments.neighbours > 1:
        training.batch_sampler = partial(NeighbourBatchSampler, neighbours=arguments.neighbours)
    masked = callback = None
    losses: Any = loss
    if not arguments.masked_language_model and (arguments.masked_language_files or arguments.masked_language_untied):
        raise ValueError(
            "masked_language_files and masked_language_untied do nothing without masked_language_model: name the "
            "checkpoint whose head is to be trained along."
        )
    if arguments.masked_language_model:
        masked = _masked_language_loss(model, arguments, training)
        callback = SaveMaskedLanguageHead(masked)
        pairs = pairs if isinstance(pairs, DatasetDict) else DatasetDict(pairs=pairs)
        losses = {**dict.fromkeys(pairs, loss), MASKED_TEXTS: masked}
        training.router_mapping = {**dict.fromkeys(pairs, routes), MASKED_TEXTS: {"document": "document"}}
        pairs[MASKED_TEXTS] = _masked_texts(pairs, arguments, training.seed)
    asked = arguments.eval_queries or arguments.eval_documents
    evaluator = _evaluator(arguments, granularities, training) if asked else None
    trainer = SentenceTransformerTrainer(
        model=model,
        args=training,
        train_dataset=pairs,
        loss=losses,
        evaluator=evaluator,
        callbacks=None if callback is None else [callback],
    )
    resume: Any = training.resume_from_checkpoint
    if str(resume).lower() in ("auto", "true"):
        resume = last_complete_checkpoint(training.output_dir)
        if resume is None and str(training.resume_from_checkpoint).lower() == "true":
            raise ValueError(f"{training.output_dir} holds no complete checkpoint to go on from.")
    elif str(resume).lower() == "false":
        resume = None
    if callback is not None and resume:
        callback.restore(resume)
    trainer.train(resume_from_checkpoint=resume)
    best = trainer.state.best_model_checkpoint
    if callback is not None and training.load_best_model_at_end and best:
        # The Trainer has read the best checkpoint's encoder, and knows nothing of the head.
        callback.restore(best)
    # The lengths belong to the training run: whoever encodes may give longer texts, up to max_seq_length.
    transformer.query_length = transformer.document_length = None
    if trainer.is_world_process_zero():
        model.save_pretrained(str(training.output_dir))
        if masked is not None:
            masked.save(str(training.output_dir))
    trainer.save_state()
    return model


def _masked_language_loss(
    model: M3BertSentenceTransformer,
    arguments: FinetuneArguments,
    training: SentenceTransformerTrainingArguments,
) -> MaskedLanguageLoss:
    if training.world_size > 1:
        raise ValueError(
            f"masked_language_model trains in one process, not in {training.world_size}: the head belongs to a loss, "
            "whose weights sentence-transformers does not synchronise."
        )
    if not 0 < arguments.masked_language_share < 1:
        raise ValueError(f"masked_language_share={arguments.masked_language_share} must be between 0 and 1.")
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    head = M3BertForMaskedLM.from_pretrained(arguments.masked_language_model)
    return MaskedLanguageLoss(
        model,
        head,
        autocast_dtype=dtype,
        weight=arguments.masked_language_weight,
        untie=arguments.masked_language_untied,
    )


def _masked_texts(pairs: DatasetDict, arguments: FinetuneArguments, seed: int) -> Dataset:
    """Draw texts such that they make up `masked_language_share` of all batches; none that an evaluation file holds.

    Raises:
        ValueError: If `masked_language_files` have no paragraph of 8 words or 20 characters.
    """
    share = arguments.masked_language_share
    wanted = max(round(sum(map(len, pairs.values())) * share / (1 - share)), 1)
    if arguments.masked_language_files:
        documents, held_out = load_documents(arguments.masked_language_files), _held_out(arguments)
        places: dict[str, list[int]] = {}
        for place, language in enumerate(documents["language"]):
            places.setdefault(language, []).append(place)
        # As many documents as texts at most, whatever the size of the files.
        drawn = sorted(place for _, place in sample_balanced(places, wanted, arguments.temperature, seed))
        groups: dict[str, list[str]] = {}
        for row in documents.select(drawn):
            paragraphs = (line.strip() for line in row["text"].split("\n"))
            groups.setdefault(row["language"], []).extend(
                paragraph for paragraph in paragraphs if _has_context(paragraph) and paragraph not in held_out
            )
        texts = [text for _, text in sample_balanced(groups, wanted, arguments.temperature, seed)]
        if not texts:
            raise ValueError(
                f"masked_language_files={arguments.masked_language_files} have no paragraph of 8 words, or 20 "
                "characters where words are not separated: name files of running text, or none to mask the pairs' "
                "documents."
            )
    else:
        texts = sorted({text for part in pairs.values() for text in part["document"]})
        random.Random(seed).shuffle(texts)
    return Dataset.from_dict({"document": [texts[index % len(texts)] for index in range(wanted)]})


def _has_context(paragraph: str) -> bool:
    """Whether a masked word of a text has words around it; scripts without spaces are counted by characters."""
    words = paragraph.count(" ") + 1
    return words >= 8 or (len(paragraph) >= 20 and len(paragraph) / words > 10)


def count_tokens(
    model: M3BertSentenceTransformer, pairs: Dataset | DatasetDict, arguments: FinetuneArguments, rows: int = 20000
) -> torch.Tensor:
    """Count the tokens [vocab_size] of queries and documents, cut at their lengths, in the first rows of each dataset.

    Args:
        model: Whose tokenizer counts.
        pairs: With columns `query` and `document`.
        arguments: `query_length` and `document_length`.
        rows: To read at most, shared by the datasets in proportion to their sizes.
    """
    parts = list(pairs.values()) if isinstance(pairs, DatasetDict) else [pairs]
    total = sum(map(len, parts))
    counts = torch.zeros(model.transformers_model.config.vocab_size, dtype=torch.long)
    for part in parts:
        some = part.select(range(min(len(part), -(-rows * len(part) // total))))
        for column, length in (("query", arguments.query_length), ("document", arguments.document_length)):
            ids = model.tokenizer(list(some[column]), truncation=True, max_length=length)["input_ids"]
            counts += torch.bincount(torch.tensor([i for row in ids for i in row]), minlength=len(counts))
    return counts


def mine(model: M3BertSentenceTransformer, pairs: Dataset, arguments: FinetuneArguments) -> Dataset:
    """Add hard negatives with sentence-transformers' `mine_hard_negatives`, found by the model that will be trained.

    Args:
        model: Searches at its deepest exit and full width.
        pairs: With columns `query` and `document`.
        arguments: `mined_negatives`, `mining_range`, `mining_relative_margin`.

    Raises:
        ValueError: If the pairs have negatives already, or no query has enough of them in the range.
    """
    if len(pairs.column_names) > 2:
        raise ValueError("The training files hold negatives already: leave out mined_negatives.")
    first, last = arguments.mining_range
    mined = mine_hard_negatives(
        pairs,
        model,
        anchor_column_name="query",
        positive_column_name="document",
        range_min=first,
        range_max=last,
        relative_margin=arguments.mining_relative_margin,
        num_negatives=arguments.mined_negatives,
        output_format="n-tuple",
        batch_size=256,
    )
    if not len(mined):
        raise ValueError(
            f"No query has {arguments.mined_negatives} negatives within ranks {arguments.mining_range}: widen "
            "mining_range or lower mining_relative_margin."
        )
    names = {name: name.replace("negative", "negative_1") for name in mined.column_names if name == "negative"}
    return mined.rename_columns(names)


def _mine_groups(
    model: M3BertSentenceTransformer, pairs: Dataset | DatasetDict, arguments: FinetuneArguments
) -> Dataset | DatasetDict:
    """Mine within each group of `batches_by`; a group too small for the range is left out, with a warning."""
    if not isinstance(pairs, DatasetDict):
        return mine(model, pairs, arguments)
    mined = {}
    for name, part in pairs.items():
        try:
            mined[name] = mine(model, part, arguments)
        except ValueError as error:
            if len(part.column_names) > 2:
                raise
            logger.warning("%s: left out. %s", name, error)
    if not mined:
        raise ValueError(
            f"No group has {arguments.mined_negatives} negatives within ranks {arguments.mining_range}: widen "
            "mining_range or lower mining_relative_margin."
        )
    return DatasetDict(mined)


def _evaluator(arguments: FinetuneArguments, granularities: list[tuple[int, int]], training: Any) -> Any:
    from .granularity_evaluator import GranularityEvaluator

    if not arguments.eval_documents or not arguments.eval_queries:
        raise ValueError("eval_queries and eval_documents need each other.")
    task = load_retrieval_task(arguments.eval_queries, arguments.eval_documents)
    if arguments.eval_limit:
        task = task.sample(arguments.eval_limit, training.seed)
    evaluator = GranularityEvaluator.from_task(
        task,
        exit_layers=sorted({e for e, _ in granularities}),
        truncate_dims=sorted({d for _, d in granularities}),
        batch_size=training.per_device_eval_batch_size * 8,
        name=Path(arguments.eval_queries).name.split(".")[0],
        primary_metric=arguments.eval_metric,
        measure_speed=False,
    )
    if training.load_best_model_at_end and training.metric_for_best_model in (None, "loss"):
        training.metric_for_best_model = f"eval_{evaluator.primary_metric}"
        training.greater_is_better = True
    return evaluator


__all__ = ["FinetuneArguments", "finetune", "load_pairs", "load_start", "mine", "parse_granularities"]
