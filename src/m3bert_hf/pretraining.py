"""Masked pretraining at every (exit, dimension): text in, an `M3BertForMaskedLM` checkpoint out."""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed

from .configuration_m3bert import M3BertConfig
from .corpus import TokenizedCorpus, load_documents, tokenize_corpus
from .encoder_conversion import initialize_from
from .masking import M3BertDataCollator
from .modeling_m3bert import M3BertForMaskedLM
from .throughput import keep_freed_memory
from .trainer import M3BertTrainer, M3BertTrainingArguments, last_complete_checkpoint
from .training_plan import PlannedRows, plan_evaluation, plan_training


logger = logging.getLogger(__name__)


@dataclass
class PretrainArguments:
    """What to pretrain on and how to read it, beside [`M3BertTrainingArguments`]."""

    train_files: list[str] = field(
        metadata={"help": "Files (.jsonl, .parquet, .txt; .xz, .gz, .zst), patterns, directories or Hub datasets."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Directory or Hub name of the tokenizer; that of init_from by default."}
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to start from: m3BERT (such as the stage before), BERT, XLM-R or ModernBERT."},
    )
    config: dict | None = field(
        default=None,
        metadata={"help": "Fields of M3BertConfig for a new model, or to change in the one of init_from."},
    )
    text_columns: str = field(default="text", metadata={"help": "Column of the text; title,body joins two."})
    language_column: str = field(default="lang", metadata={"help": "Column of the language, if there is one."})
    dataset_split: str = field(default="train", metadata={"help": "Split of Hub datasets."})
    max_length: int = field(default=512, metadata={"help": "Tokens of the longest piece of a document."})
    min_length: int = field(default=8, metadata={"help": "Tokens of the shortest piece."})
    packing: bool = field(default=True, metadata={"help": "Pack pieces into rows; otherwise pad rows of like length."})
    row_length: int | None = field(default=None, metadata={"help": "Tokens of a packed row; max_length by default."})
    temperature: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Language sampling, 1 as in the files, 0 all equal; two values: from the first to the second."
        },
    )
    max_language_repeats: float | None = field(
        default=4.0, metadata={"help": "Passes over a language at most, as far as the corpus allows."}
    )
    mask_ratio: list[float] = field(
        default_factory=lambda: [0.3],
        metadata={"help": "Share of tokens to predict; two values: from the first to the second over the run."},
    )
    mask_replace: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1], metadata={"help": "Shares that become mask, random, or stay."}
    )
    whole_words: bool = field(default=False, metadata={"help": "Mask all tokens of a word together."})
    held_out_share: float = field(default=0.0, metadata={"help": "Share of documents kept for evaluation."})
    eval_rows: int = field(default=512, metadata={"help": "Rows of the evaluation at most."})
    eval_mask_ratio: float = field(default=0.15, metadata={"help": "Share of tokens to predict in evaluation."})
    preprocessing_processes: int | None = field(default=None, metadata={"help": "Processes that tokenise."})


@torch.no_grad()
def start_from_token_frequencies(model: M3BertForMaskedLM, corpus: TokenizedCorpus) -> None:
    """Set the decoder's bias to the log frequency of each token, so that training need not begin by learning it.

    From a bias of zero, a model first learns the frequencies by moving every state to one direction. A short run, or
    one with tied embeddings, hardly recovers from that collapse.

    Args:
        model: A new model.
        corpus: What it will be trained on.
    """
    counts = torch.from_numpy(corpus.token_counts(model.config.vocab_size)).double() + 1.0
    model.decoder.bias.copy_((counts / counts.sum()).log())


def build_model(
    arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase, corpus: TokenizedCorpus | None = None
) -> M3BertForMaskedLM:
    """Make the model to pretrain: a new one, that of the stage before, or one started from another encoder.

    Args:
        arguments: `init_from` and `config`.
        tokenizer: Of the run.
        corpus: For a new model, whose decoder starts at the token frequencies.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """
    fields = dict(arguments.config or {})
    if arguments.init_from:
        model, report = initialize_from(arguments.init_from, tokenizer, fields)
        if report:
            logger.warning("%s", report)
    else:
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("pad", "bos", "eos", "cls", "sep"):
            fields.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        model = M3BertForMaskedLM(M3BertConfig(**fields))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}: use the tokenizer "
            "that the model was trained with."
        )
    if corpus is not None and not arguments.init_from:
        start_from_token_frequencies(model, corpus)
    return model


def pretrain(arguments: PretrainArguments, training: M3BertTrainingArguments) -> M3BertForMaskedLM:
    """Pretrain a model; save it, its tokenizer and the metrics of held-out documents in `training.output_dir`.

    Tokenising, the order of the rows and the masks follow from the arguments alone, so that a run that was ended at
    any moment goes on from its last checkpoint with `resume_from_checkpoint` as if it had not been.

    Args:
        arguments: Data and model.
        training: Of the Trainer. With `max_steps` the corpus is repeated as often as it takes, otherwise
            `num_train_epochs` times. `resume_from_checkpoint` may be a path, `"true"` for the last complete
            checkpoint, or `"auto"` for that if there is one.

    Raises:
        ValueError: If there is no text, the arguments do not fit one another, or `output_dir` holds another run.
        FloatingPointError: If the loss becomes NaN or infinite.
    """
    resume = _resume_point(training)
    if training.device.type == "cpu":
        keep_freed_memory()
    set_seed(training.seed)
    source = arguments.tokenizer or arguments.init_from
    if source is None:
        raise ValueError("Name a `tokenizer`, or a checkpoint in `init_from` that has one.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    row_length = arguments.row_length or arguments.max_length
    if row_length < arguments.max_length:
        raise ValueError(f"row_length={row_length} must be at least max_length={arguments.max_length}.")
    with training.main_process_first(desc="reading and tokenising"):
        documents = load_documents(
            arguments.train_files, arguments.text_columns, arguments.language_column, arguments.dataset_split
        )
        corpus = tokenize_corpus(
            documents,
            tokenizer,
            arguments.max_length,
            arguments.held_out_share,
            arguments.min_length,
            arguments.preprocessing_processes,
        )
    model = build_model(arguments, tokenizer, corpus)
    longest = model.config.max_input_length
    if arguments.max_length > longest:
        raise ValueError(
            f"max_length={arguments.max_length} is longer than the model takes ({longest} tokens). Lower it, or raise "
            "max_position_embeddings in config."
        )
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    plan = plan_training(
        corpus,
        row_length,
        rows=training.max_steps * batch if training.max_steps > 0 else None,
        epochs=training.num_train_epochs,
        temperature=arguments.temperature,
        max_repeats=arguments.max_language_repeats,
        packing=arguments.packing,
        group_size=batch,
        seed=training.seed,
    )
    # The plan holds all epochs: the Trainer goes through it once.
    training = copy.copy(training)
    training.num_train_epochs = 1
    shape = {"row_length": row_length if arguments.packing else None, "longest_document": arguments.max_length}
    evaluation = plan_evaluation(corpus, row_length, arguments.eval_rows)
    evaluation_collator = M3BertDataCollator(
        tokenizer, arguments.eval_mask_ratio, row_length=row_length, longest_document=arguments.max_length, seed=1
    )
    collator = M3BertDataCollator(
        tokenizer,
        arguments.mask_ratio,
        total_rows=len(plan),
        replace=arguments.mask_replace,
        whole_words=arguments.whole_words,
        seed=training.seed,
        **shape,
    )
    _describe(corpus, plan, row_length, batch)
    trainer = M3BertTrainer(
        model=model,
        args=training,
        train_dataset=PlannedRows(corpus, plan),
        eval_dataset=None if evaluation is None else PlannedRows(corpus, evaluation),
        processing_class=tokenizer,
        data_collator=collator,
        eval_data_collator=evaluation_collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    if evaluation is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    return trainer.accelerator.unwrap_model(trainer.model)


def _resume_point(training: TrainingArguments) -> str | bool | None:
    """Return the checkpoint to resume from, if any; refuse to start a run in the middle of another one."""
    asked = training.resume_from_checkpoint
    last = last_complete_checkpoint(training.output_dir)
    word = str(asked).lower()
    if word == "auto":
        return last
    if word in ("none", "false"):
        if last is not None:
            raise ValueError(
                f"{training.output_dir} holds checkpoints of another run, the last of them {Path(last).name}. Go on "
                "with it by --resume_from_checkpoint true, or choose another output_dir, or delete it."
            )
        return None
    return True if word == "true" else asked


def _describe(corpus: TokenizedCorpus, plan, row_length: int, batch: int) -> None:
    used = int(corpus.lengths[plan.pieces].sum())
    held_out = int(corpus.lengths[corpus.held_out].sum())
    logger.warning(
        "%s tokens in %s pieces, %s languages; %s tokens held out. The run reads %s tokens in %s rows (%.1f%% full), "
        "%s steps.",
        f"{int(corpus.lengths.sum()):,}",
        f"{len(corpus.lengths):,}",
        len(corpus.language_names),
        f"{held_out:,}",
        f"{used:,}",
        f"{len(plan):,}",
        100.0 * used / (len(plan) * row_length),
        f"{-(-len(plan) // batch):,}",
    )


__all__ = ["PretrainArguments", "build_model", "pretrain", "start_from_token_frequencies"]
