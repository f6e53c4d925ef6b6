"""Documents for pretraining: files or Hub datasets in, tokenised pieces of documents out, memory-mapped and cached.

Everything goes through `datasets`: files are converted to Arrow once, tokenised once, and read from disk by random
access afterwards, so that memory does not grow with the corpus and a run may resume anywhere in it.
"""

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase


_COMPRESSIONS = ("", ".xz", ".gz", ".zst", ".bz2")
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def _format_of(path: Path) -> str:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes = suffixes[:-1]
    kind = _FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise ValueError(
            f"{path} is of no known format: expected {', '.join(_FORMATS)}, each perhaps with "
            f"{', '.join(_COMPRESSIONS[1:])}."
        )
    return kind


def _expand(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if any(f in p.suffixes for f in _FORMATS))
    return [path] if path.exists() else sorted(map(Path, glob.glob(source)))


def _load_file(path: Path) -> Dataset:
    kind = _format_of(path)
    # In a text file an empty line ends a document.
    options: dict[str, Any] = {"sample_by": "paragraph"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=str(path), split="train", **options)
    except (DatasetGenerationError, EOFError, OSError, ValueError, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno == 28:
            raise OSError(
                28, f"No space left to convert {path}: free some, or point HF_DATASETS_CACHE elsewhere"
            ) from error
        raise ValueError(
            f"{path} cannot be read ({type(cause).__name__}: {cause}): it is corrupt, truncated, or not {kind}. "
            "Replace it or leave it out; what was read of the other files stays cached."
        ) from error


def load_documents(
    sources: Sequence[str],
    text_columns: str = "text",
    language_column: str = "lang",
    split: str = "train",
) -> Dataset:
    """Load documents of files and Hub datasets as rows of `text` and `language`.

    Args:
        sources: Files (JSON lines, Parquet, text with an empty line between documents; JSON lines and text also
            compressed as .xz, .gz, .zst or .bz2), patterns, directories, or names of datasets on the Hub
            (`owner/name` or `owner/name:configuration`).
        text_columns: Column of the text, or several joined by line breaks, as in `"title,body"`. Of alternatives, as
            in `"text|query,document"`, a source's rows are read by the first that they have.
        language_column: Column of the language; rows without it have the language "".
        split: Of Hub datasets.

    Raises:
        FileNotFoundError: If a source is neither a file nor a dataset.
        ValueError: If a file cannot be read, or lacks the columns, naming it.
    """
    parts = []
    for source in sources:
        paths = _expand(source)
        if paths:
            loaded = [(str(path), _load_file(path)) for path in paths]
        else:
            name, _, configuration = source.partition(":")
            try:
                loaded = [(source, load_dataset(name, configuration or None, split=split))]
            except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
                raise FileNotFoundError(
                    f"{source!r} is neither a file, a pattern, a directory, nor a dataset that the Hub gives: {error}"
                ) from error
        parts += [_select(part, name, text_columns, language_column) for name, part in loaded]
    if not parts:
        raise FileNotFoundError(f"No sources of text were given: {list(sources)}.")
    return concatenate_datasets(parts)


def _select(dataset: Dataset, name: str, text_columns: str, language_column: str) -> Dataset:
    alternatives = [part.split(",") for part in text_columns.split("|")]
    columns = next((c for c in alternatives if set(c) <= set(dataset.column_names)), None)
    if columns is None:
        raise ValueError(
            f"{name} has no column {text_columns!r}; it has {dataset.column_names}. Name the right one with "
            "text_columns."
        )
    has_language = language_column in dataset.column_names

    def convert(batch):
        texts = ["\n".join(t for t in row if t) for row in zip(*(batch[c] for c in columns), strict=True)]
        languages = batch[language_column] if has_language else [""] * len(texts)
        return {"text": texts, "language": [language or "" for language in languages]}

    fingerprint = hashlib.sha1(repr((dataset._fingerprint, columns, has_language, language_column)).encode())
    return dataset.map(
        convert,
        batched=True,
        remove_columns=dataset.column_names,
        new_fingerprint=fingerprint.hexdigest(),
        desc=f"Reading {Path(name).name}",
    )


def is_held_out(text: str, share: float) -> bool:
    """Tell whether a document belongs to the held-out split: by a hash, so that copies of it do so too."""
    return int.from_bytes(hashlib.sha1(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") < share * 2**32


@dataclass
class TokenizedCorpus:
    """Pieces of documents, each at most `max_length` tokens with its special tokens.

    Attributes:
        pieces: `input_ids` without special tokens, one piece a row, memory-mapped.
        lengths: Tokens of each piece with special tokens [pieces], int32.
        languages: Index into `language_names` of each piece [pieces], int16.
        language_names: Languages, sorted.
        held_out: Whether the piece is of a held-out document [pieces].
        special: Token ids that begin and end each piece.
    """

    pieces: Dataset
    lengths: np.ndarray
    languages: np.ndarray
    language_names: list[str]
    held_out: np.ndarray
    special: tuple[int, int]

    def documents(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Return pieces [tokens] with their special tokens, int64."""
        rows = self.pieces[list(indices)]["input_ids"]
        first, last = self.special
        return [np.concatenate(([first], row, [last])).astype(np.int64) for row in rows]

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Count each token of the pieces that are not held out [vocab_size]; special tokens once a piece."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        training = np.flatnonzero(~self.held_out)
        for start in range(0, len(training), 10_000):
            rows = self.pieces.with_format("arrow")[training[start : start + 10_000]]["input_ids"]
            counts += np.bincount(pc.list_flatten(rows).to_numpy(), minlength=vocab_size)
        counts[list(self.special)] += len(training)
        return counts


def tokenize_corpus(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    held_out_share: float = 0.0,
    min_length: int = 8,
    processes: int | None = None,
) -> TokenizedCorpus:
    """Tokenise documents and cut them into pieces; the result is cached by content, tokenizer and lengths.

    Documents are cut into consecutive pieces. Pieces of fewer than `min_length` tokens, special tokens included, are
    left out: they give no context to predict from.

    Args:
        documents: Rows of `text` and `language`, of [`load_documents`].
        tokenizer: With `cls_token` and `sep_token`.
        max_length: Longest piece in tokens, special tokens included.
        held_out_share: Share of documents kept for evaluation; copies of a document fall on the same side.
        min_length: Shortest piece.
        processes: Processes that tokenise; fast tokenizers use all cores with one.

    Raises:
        ValueError: If no piece is left, or the tokenizer has no `cls_token` and `sep_token`.
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError("Pretraining needs a tokenizer with `cls_token` and `sep_token`; this one lacks them.")
    room = max_length - 2
    if room < 1:
        raise ValueError(f"max_length={max_length} leaves no room beside the two special tokens.")

    def tokenize(batch):
        output: dict[str, list] = {"input_ids": [], "language": [], "held_out": []}
        # Without text there is nothing to tokenise; such documents leave no trace.
        kept = [(t, x) for t, x in zip(batch["text"], batch["language"], strict=True) if t and t.strip()]
        if not kept:
            return output
        encoded = tokenizer([text for text, _ in kept], add_special_tokens=False, verbose=False)["input_ids"]
        for (text, language), ids in zip(kept, encoded, strict=True):
            held_out = is_held_out(text, held_out_share)
            for start in range(0, len(ids), room):
                piece = ids[start : start + room]
                if len(piece) + 2 >= min_length:
                    output["input_ids"].append(np.array(piece, dtype=np.int32))
                    output["language"].append(language)
                    output["held_out"].append(held_out)
        return output

    # The tokenizer's state changes with use, and with it the hash that `datasets` would take of it.
    identity = repr(sorted(tokenizer.get_vocab().items()))
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        identity = json.dumps({key: state[key] for key in state if key not in ("truncation", "padding")})
    key = repr((documents._fingerprint, max_length, held_out_share, min_length, tokenizer.all_special_tokens))
    pieces = documents.map(
        tokenize,
        batched=True,
        batch_size=200,
        remove_columns=documents.column_names,
        num_proc=processes,
        new_fingerprint=hashlib.sha1((key + hashlib.sha1(identity.encode()).hexdigest()).encode()).hexdigest(),
        desc="Tokenising",
    )
    if not len(pieces):
        raise ValueError(
            f"No text to train on: all {len(documents):,} documents are empty or shorter than {min_length} tokens."
        )
    table = pieces.with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int32) + 2
    encoded = table["language"].combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    order = np.argsort(np.array(names))
    rank = np.empty(len(names), dtype=np.int16)
    rank[order] = np.arange(len(names))
    return TokenizedCorpus(
        pieces=pieces.select_columns(["input_ids"]).with_format("numpy"),
        lengths=lengths,
        languages=rank[encoded.indices.to_numpy()],
        language_names=[names[i] for i in order],
        held_out=table["held_out"].to_numpy(),
        special=(tokenizer.cls_token_id, tokenizer.sep_token_id),
    )


__all__ = ["TokenizedCorpus", "is_held_out", "load_documents", "tokenize_corpus"]
