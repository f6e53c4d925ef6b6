"""Masked pretraining at every (exit, dimension): text files in, an `M3BertForMaskedLM` checkpoint out."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from .configuration_m3bert import M3BertConfig
from .modeling_m3bert import M3BertForMaskedLM
from .text_data import group_rows, sample_balanced


@dataclass
class PretrainArguments:
    """What to pretrain, beside transformers' own `TrainingArguments`."""

    train_files: list[str] = field(metadata={"help": "JSON-lines files with `text` and perhaps `lang` in each row."})
    tokenizer: str = field(metadata={"help": "Directory or Hub name of the tokenizer."})
    init_from: str | None = field(default=None, metadata={"help": "m3BERT checkpoint to go on from."})
    config: dict | None = field(default=None, metadata={"help": "Fields of M3BertConfig for a new model."})
    max_length: int = field(default=128, metadata={"help": "Tokens of one training example."})
    max_blocks: int | None = field(default=None, metadata={"help": "Training examples to draw; all by default."})
    temperature: float = field(default=0.5, metadata={"help": "Language sampling: 1 as in the files, 0 all equal."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens to predict."})


def tokenize_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int, max_blocks: int | None = None
) -> Dataset:
    """Cut each text into consecutive blocks of at most `max_length` tokens, special tokens included.

    Blocks of fewer than 8 words' tokens are left out: there is nothing to learn from their context.

    Args:
        texts: Documents; empty ones yield nothing.
        tokenizer: With `cls_token` and `sep_token`.
        max_length: Tokens of a block.
        max_blocks: Stop after this many.

    Returns:
        A dataset of `input_ids`.
    """
    room = max_length - 2
    blocks: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            if len(piece) >= min(8, room):
                blocks.append([tokenizer.cls_token_id, *piece, tokenizer.sep_token_id])
        if max_blocks is not None and len(blocks) >= max_blocks:
            break
    return Dataset.from_dict({"input_ids": blocks[:max_blocks]})


@torch.no_grad()
def start_from_token_frequencies(model: M3BertForMaskedLM, dataset: Dataset) -> None:
    """Set the decoder's bias to the log frequency of each token, so that training need not begin by learning it.

    From a bias of zero, a model first learns the frequencies by moving every state to one direction. A short run, or
    one with tied embeddings, hardly recovers from that collapse.

    Args:
        model: A new model.
        dataset: Training examples with `input_ids`.
    """
    counts = torch.ones(model.config.vocab_size)
    for start in range(0, len(dataset), 1000):
        for ids in dataset[start : start + 1000]["input_ids"]:
            counts += torch.bincount(torch.tensor(ids), minlength=len(counts))
    model.decoder.bias.copy_((counts / counts.sum()).log())


class GranularityTrainer(Trainer):
    """transformers' `Trainer` that logs the loss of every (exit, dimension) beside their sum."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._granularity_sums: torch.Tensor | None = None
        self._granularity_steps = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the model's loss and keep its parts for the next log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        losses = outputs.granularity_losses
        if model.training and losses is not None:
            self._granularity_sums = losses if self._granularity_sums is None else self._granularity_sums + losses
            self._granularity_steps += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add `loss_L{exit}D{dimension}` to the logs, each averaged over the steps since the last log."""
        if "loss" in logs and self._granularity_sums is not None:
            # Each part was divided by the whole batch's tokens: summing over a step's accumulation gives its mean.
            steps = max(self._granularity_steps / self.args.gradient_accumulation_steps, 1.0)
            means = (self._granularity_sums / steps).tolist()
            config = self.accelerator.unwrap_model(self.model).config
            for layer, row in zip(config.exit_layers, means, strict=True):
                for dimension, value in zip(config.matryoshka_dimensions, row, strict=True):
                    logs[f"loss_L{layer}D{dimension}"] = round(value, 4)
            self._granularity_sums, self._granularity_steps = None, 0
        super().log(logs, *args, **kwargs)


def pretrain(
    arguments: PretrainArguments, training: TrainingArguments, config_overrides: dict[str, Any] | None = None
) -> M3BertForMaskedLM:
    """Pretrain a model and save it, with its tokenizer, in `training.output_dir`.

    Args:
        arguments: Data and model.
        training: Of transformers; `resume_from_checkpoint` continues an interrupted run.
        config_overrides: Further fields of [`M3BertConfig`] for a new model.

    Raises:
        ValueError: If there is no text in the files.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    groups = group_rows(arguments.train_files)
    rows = sample_balanced(groups, sum(map(len, groups.values())), arguments.temperature, training.seed)
    if arguments.max_blocks is not None:
        # Few blocks must still show every language in its share: draw documents, and one stretch of each.
        room = arguments.max_length * 6
        rows = sample_balanced(groups, arguments.max_blocks, arguments.temperature, training.seed)
        texts: Sequence[str] = [row["text"][:room] for _, row in rows]
    else:
        texts = [row["text"] for _, row in rows]
    dataset = tokenize_blocks(texts, tokenizer, arguments.max_length, arguments.max_blocks)
    if not len(dataset):
        raise ValueError(f"No text to train on in {arguments.train_files}: rows need a non-empty `text`.")
    if arguments.init_from:
        model = M3BertForMaskedLM.from_pretrained(arguments.init_from)
    else:
        fields = {**(arguments.config or {}), **(config_overrides or {})}
        fields.setdefault("vocab_size", len(tokenizer))
        model = M3BertForMaskedLM(M3BertConfig(**fields))
        start_from_token_frequencies(model, dataset)
    trainer = GranularityTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=arguments.mlm_probability),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses and not math.isfinite(losses[-1]):
        raise ValueError(f"The loss became {losses[-1]}: lower the learning rate. Saved in {training.output_dir}.")
    return model


__all__ = [
    "GranularityTrainer",
    "PretrainArguments",
    "pretrain",
    "start_from_token_frequencies",
    "tokenize_blocks",
]
