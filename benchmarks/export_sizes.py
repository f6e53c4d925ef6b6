"""What export saves: a base-size model with a vocabulary of 250,000 cut to (4, 64) and three languages.

    python benchmarks/export_sizes.py FILES --languages en de ja --output export.json

For each family of tokenizers (Unigram, BPE with byte fallback, WordPiece): trains one of `--vocab-size` tokens (as
many as the texts give) on texts of FILES (JSON lines with `text` and `lang`) drawn over all their languages as
`train-tokenizer` draws them, builds a base-size model with random weights around it, and exports exit 4 at 64
dimensions with the vocabulary that texts of three languages need.
Sizes are those of the files; memory is what loading and encoding adds to a process of its own; a sample of the same
languages that the export has not seen shows how other text fares.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from m3bert_hf import M3BertConfig, M3BertModel, export_submodel
from m3bert_hf.corpus import load_documents
from m3bert_hf.text_data import sample_balanced
from m3bert_hf.tokenizer_training import train_tokenizer


def wordpiece(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, **{f"{k}_token": v for k, v in names.items()}
    )


def balanced_texts(documents: Dataset, characters: int, temperature: float) -> list[str]:
    """Draw texts over the languages, as `train-tokenizer` does, until they have so many characters."""
    groups: dict[str, list[str]] = defaultdict(list)
    for text, language in zip(documents["text"], documents["language"], strict=True):
        groups[language].append(text[:2000])
    size = characters * len(documents) // max(sum(len(text) for texts in groups.values() for text in texts), 1)
    drawn: list[str] = []
    while sum(map(len, drawn)) < characters and len(drawn) < len(documents):
        drawn = [text for _, text in sample_balanced(groups, size, temperature)]
        size = size * 5 // 4 + 1
    return drawn


def loaded_memory(folder: Path) -> float:
    """Return the MiB of resident memory that loading a checkpoint and encoding a text adds to a process."""
    code = (
        "import sys, torch, sentence_transformers, m3bert_hf\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "before = resident()\n"
        "model = m3bert_hf.build_sentence_transformer(sys.argv[1], device='cpu')\n"
        "model.encode('a text')\n"
        "sum(p.sum() for p in model.parameters())  # mapped weights count once they are read\n"
        "print(resident() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Export from each family and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--languages", nargs="+", default=["en", "de", "ja"])
    parser.add_argument("--vocab-size", type=int, default=250_000)
    parser.add_argument("--characters", type=int, default=40_000_000, help="of text for the tokenizers")
    parser.add_argument("--temperature", type=float, default=0.3, help="language balance, 1 as is, 0 equal")
    parser.add_argument("--min-count", type=int, default=1, help="least count of a token in the corpus")
    parser.add_argument("--families", nargs="+", default=["unigram", "bpe", "wordpiece"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    documents = load_documents(options.files, "text", "lang").shuffle(seed=0)
    texts = balanced_texts(documents, options.characters, options.temperature)
    wanted = documents.filter(lambda language: language in options.languages, input_columns="language")["text"]
    lines = [line for text in wanted for line in text.split("\n") if line.strip()]
    # Nine tenths to cut by, the rest to see how other text fares.
    corpus, others = lines[: len(lines) * 9 // 10][:60_000], lines[len(lines) * 9 // 10 :][:10_000]
    rows: list[dict[str, Any]] = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            if family == "wordpiece":
                tokenizer = wordpiece(texts, options.vocab_size)
            else:
                tokenizer = train_tokenizer(texts, options.vocab_size, model=family)
            trained = time.perf_counter() - start
            torch.manual_seed(0)
            parent, child = Path(folder) / "parent", Path(folder) / "child"
            M3BertModel(
                M3BertConfig(vocab_size=options.vocab_size, pad_token_id=tokenizer.pad_token_id)
            ).save_pretrained(parent)
            tokenizer.save_pretrained(parent)
            start = time.perf_counter()
            report = export_submodel(
                parent, child, 4, 64, corpus=corpus, other_texts=others, min_count=options.min_count
            )
            figures = report["vocabulary"]
            row = {
                "family": family,
                "tokens_before": figures["old_size"],
                "tokens_after": figures["new_size"],
                "tokenizer_seconds": trained,
                "export_seconds": time.perf_counter() - start,
                "mib_before": report["parent"]["bytes"] / 2**20,
                "mib_after": report["bytes"] / 2**20,
                "memory_before": loaded_memory(parent),
                "memory_after": loaded_memory(child),
                "max_difference": report["max_difference"],
                "corpus_texts": figures["corpus_texts"],
                "corpus_unchanged": figures["corpus_unchanged"],
                "other_changed": 1 - figures["other_unchanged"],
                "other_tokens_ratio": figures["other_tokens_ratio"],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    print("| family | tokens | disk (MiB) | smaller | memory (MiB) | smaller | difference | other texts changed |")
    print("| --- |" + " ---: |" * 7)
    for row in rows:
        print(
            f"| {row['family']} | {row['tokens_before']:,} to {row['tokens_after']:,} | {row['mib_before']:,.0f} to "
            f"{row['mib_after']:,.0f} | {row['mib_before'] / row['mib_after']:.1f}x | {row['memory_before']:,.0f} to "
            f"{row['memory_after']:,.0f} | {row['memory_before'] / row['memory_after']:.1f}x | "
            f"{row['max_difference']:.1e} | {row['other_changed']:.1%} |"
        )
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
