"""Contrastive fine-tuning of an m3BERT checkpoint at every (exit, dimension) on query-document pairs."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from .multigranular_loss import MultigranularLoss
from .sentence_transformer import M3BertSentenceTransformer, build_sentence_transformer
from .text_data import group_rows, sample_balanced


@dataclass
class FinetuneArguments:
    """What to fine-tune on, beside sentence-transformers' own training arguments."""

    model: str = field(metadata={"help": "Checkpoint to start from."})
    train_files: list[str] = field(metadata={"help": "JSON-lines files with `query` and `document` in each row."})
    exclude_files: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation files whose queries and documents must not be trained on."}
    )
    max_pairs: int | None = field(default=None, metadata={"help": "Pairs to draw; all by default."})
    temperature: float = field(
        default=0.5, metadata={"help": "Sampling over languages and sources: 1 as in the files."}
    )
    # The lengths, temperature and pooling of the authors' fine-tuning on clicks (arXiv 2605.19568).
    query_length: int = field(default=16, metadata={"help": "Tokens of a query."})
    document_length: int = field(default=64, metadata={"help": "Tokens of a document."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens that the saved model reads of a text."})
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Temperature of InfoNCE."})


def load_pairs(arguments: FinetuneArguments, seed: int) -> Dataset:
    """Draw pairs over languages and sources and leave out what the evaluation files hold.

    Raises:
        ValueError: If no pair is left.
    """
    held_out: set[str] = set()
    for rows in group_rows(arguments.exclude_files).values():
        held_out.update(row[key] for row in rows for key in ("query", "document") if key in row)
    groups = {
        name: [row for row in rows if row["query"] not in held_out and row["document"] not in held_out]
        for name, rows in group_rows(arguments.train_files, by=("lang", "source")).items()
    }
    size = sum(map(len, groups.values())) if arguments.max_pairs is None else arguments.max_pairs
    drawn = sample_balanced(groups, size, arguments.temperature, seed)
    if not drawn:
        raise ValueError(f"No pairs to train on in {arguments.train_files}: rows need `query` and `document`.")
    return Dataset.from_dict(
        {"query": [row["query"] for _, row in drawn], "document": [row["document"] for _, row in drawn]}
    )


def finetune(
    arguments: FinetuneArguments, training: SentenceTransformerTrainingArguments
) -> M3BertSentenceTransformer:
    """Fine-tune with InfoNCE and in-batch negatives at all granularities; save in `training.output_dir`.

    Args:
        arguments: Data and lengths.
        training: Of sentence-transformers.

    Raises:
        ValueError: If no pair is left to train on.
    """
    model = build_sentence_transformer(arguments.model, max_seq_length=arguments.max_seq_length)
    transformer: Any = model[0]
    transformer.query_length = arguments.query_length
    transformer.document_length = arguments.document_length
    pairs = load_pairs(arguments, training.seed)
    loss = MultigranularLoss(model, MultipleNegativesRankingLoss(model, scale=1.0 / arguments.contrastive_temperature))
    # A column's role is what makes the library cut queries and documents at their own lengths.
    training.router_mapping = {"query": "query", "document": "document"}
    trainer = SentenceTransformerTrainer(model=model, args=training, train_dataset=pairs, loss=loss)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    # The lengths belong to the training run: whoever encodes may give longer texts, up to max_seq_length.
    transformer.query_length = transformer.document_length = None
    model.save_pretrained(str(training.output_dir))
    return model


__all__ = ["FinetuneArguments", "finetune", "load_pairs"]
