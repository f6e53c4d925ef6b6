"""Tiny models and a tokenizer, made in memory; nothing here reaches a network."""

import json
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from m3bert_hf import M3BertConfig, M3BertForMaskedLM, build_sentence_transformer
from m3bert_hf.tokenizer_training import train_tokenizer


TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "how do I resize a photo on my computer",
    "ein kleiner Hund läuft über die grüne Wiese",
    "le chat noir dort sur la chaise rouge",
    "写真のサイズを変更する方法を教えてください",
    "как изменить размер фотографии на компьютере",
]


def tiny_config(**fields) -> M3BertConfig:
    """A configuration small enough for every test, with odd sizes where they are allowed."""
    values = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "exit_layers": [1, 3, 4],
        "matryoshka_dimensions": [8, 20, 32],
        # Larger than in real models: with tiny weights, every wrong path would still be near zero.
        "initializer_range": 0.3,
    }
    return M3BertConfig(**{**values, **fields})


def tiny_batch(config: M3BertConfig, lengths=(11, 7, 1), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask [rows, longest]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, config.vocab_size, (length,), generator=generator)
        mask[row, :length] = 1
    return ids, mask


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 400, model_max_length=48)


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    """A saved masked-language model with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def sentence_model(checkpoint):
    return build_sentence_transformer(checkpoint)


@pytest.fixture
def pairs(tmp_path):
    """A file of query-document pairs."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"lang": "x", "source": "s", "query": text[:10], "document": text} for text in TEXTS]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
