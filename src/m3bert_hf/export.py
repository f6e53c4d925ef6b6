"""Export of one granularity as a checkpoint of its own: fewer layers, narrower vectors, a smaller vocabulary."""

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn
from transformers import AutoConfig

from .modeling_m3bert import M3BertForMaskedLM
from .sentence_transformer import M3BertSentenceTransformer, _encoders, build_sentence_transformer
from .vocabulary_trimming import TrimmedVocabulary, trim_vocabulary


logger = logging.getLogger(__name__)

_PROBES = [
    "a short query",
    "Eine etwas längere Anfrage, mit Umlauten und 12 Ziffern.",
    "写真のサイズを変更する方法",
    "как изменить размер фотографии",
    "x",
]


def export_submodel(
    model: str | Path | M3BertSentenceTransformer,
    output_dir: str | Path,
    exit_layer: int | None = None,
    truncate_dim: int | None = None,
    corpus: Iterable[str] | None = None,
    languages: Sequence[str] | None = None,
    vocabulary: Iterable[str] | None = None,
    min_count: int = 1,
    other_texts: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    normalize: bool = True,
    keep_mlm_head: bool | None = None,
) -> dict[str, Any]:
    """Write a standalone checkpoint of one granularity, checked against its parent before it is written.

    The layers above the exit are gone; vectors have `truncate_dim` dimensions and length 1 whoever encodes, since
    truncation (a `Dense` module that holds the identity) and `Normalize` are modules of the checkpoint; with a corpus,
    languages or a vocabulary, embeddings, decoder and tokenizer hold what these need and no more. Exits below
    `exit_layer` stay usable, and training can go on from it. It loads by `AutoModel`, by `SentenceTransformer` and,
    with its masked-language-model head, by `AutoModelForMaskedLM`.

    Args:
        model: Directory or Hub name of a checkpoint, or a loaded model, which is left as it is.
        output_dir: Directory to write; what it held before is replaced once the export has been checked.
        exit_layer: Layer to end at; `None` means the deepest.
        truncate_dim: Width of the vectors; `None` means the full one.
        corpus: Texts whose tokens stay; see [`trim_vocabulary`] for this and the next four.
        languages: Codes of languages whose scripts stay.
        vocabulary: Tokens that stay.
        min_count: Least count of a token in the corpus.
        other_texts: Texts to measure the smaller tokenizer on.
        dtype: Of the weights, such as `torch.bfloat16`; `None` keeps the parent's.
        normalize: Give unit vectors.
        keep_mlm_head: Whether to keep the head that pretraining goes on with; `None` keeps it where there is one.

    Returns:
        A report: exits, dimensions, layers, parameters and bytes of parent and export, the trimming's figures, and the
        largest difference (`max_difference`, in float32) and least cosine (`min_cosine`) between their vectors.

    Raises:
        ValueError: If the exit or dimension does not exist, nothing is left to keep, `output_dir` holds something else
            than a checkpoint, or the export does not give the parent's vectors. Nothing is written then.
    """
    source = str(model) if isinstance(model, (str, Path)) else None
    output = _writable(Path(output_dir), source)
    parent, masked_lm = _load(model, exit_layer, keep_mlm_head)
    config = parent.transformers_model.config
    width = config.resolve_truncate_dim(truncate_dim)
    texts = None if corpus is None else [text for text in corpus if text.strip()]
    trimmed = None
    if texts is not None or languages is not None or vocabulary is not None:
        trimmed = trim_vocabulary(parent.tokenizer, texts, languages, vocabulary, min_count, other_texts)
    report: dict[str, Any] = {
        "source": source or config.name_or_path or "a loaded model",
        "exit_layer": config.num_hidden_layers,
        "truncate_dim": width,
        "dtype": str(dtype or config.dtype or torch.float32).removeprefix("torch."),
    }
    if trimmed is not None:
        report["vocabulary"] = trimmed.report
    probes = _covered(parent, trimmed, texts)
    if not probes:
        raise ValueError("What is kept of the vocabulary covers no text to compare vectors on: keep more tokens.")
    parent_dtype = parent.transformers_model.dtype
    wanted = _encode(parent, probes, width)

    encoder = parent.transformers_model
    if trimmed is not None:
        _trim(encoder, masked_lm, trimmed)
        first: Any = parent[0]
        first.processor = trimmed.tokenizer
    config.truncate_dim = None if width == config.hidden_size else width
    dims = [d for d in config.matryoshka_dimensions if d <= width]
    config.matryoshka_dimensions = sorted({*dims, width, config.hidden_size})
    if dtype is not None:
        parent.to(dtype)
        if masked_lm is not None:
            nn.Module.to(masked_lm, dtype)
    exported = M3BertSentenceTransformer(
        modules=_modules(parent, width, normalize, dtype),
        prompts=parent.prompts,
        default_prompt_name=parent.default_prompt_name,
        similarity_fn_name=parent.similarity_fn_name,
    )
    with tempfile.TemporaryDirectory(dir=_existing(output.parent), prefix=".export-") as folder:
        draft = Path(folder) / "model"
        exported.save_pretrained(str(draft), create_model_card=False)
        if masked_lm is not None:
            masked_lm.save_pretrained(draft)
        again = build_sentence_transformer(str(draft))
        report.update(_compare(_encode(again, probes, width, normalized=normalize), wanted))
        exact = parent_dtype == torch.float32 and dtype in (None, torch.float32)
        # Written so that a vector that is not a number is refused too.
        good = report["max_difference"] <= 1e-5 if exact else report["min_cosine"] >= 0.98
        if not good:
            raise ValueError(
                f"The export does not give its parent's vectors (difference {report['max_difference']:.2g}, cosine "
                f"{report['min_cosine']:.4f}): nothing was written."
            )
        whole: Any = encoder if masked_lm is None else masked_lm
        report["parameters"] = sum(p.numel() for p in whole.parameters())
        report["bytes"] = sum(file.stat().st_size for file in draft.rglob("*.safetensors"))
        report["parent"] = _parent_size(source)
        (draft / "export.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        _card(report, again, normalize).save(draft / "README.md")
        if output.exists():
            output.rename(Path(folder) / "before")
        shutil.move(str(draft), output)
    return report


def _writable(output: Path, source: str | None) -> Path:
    """Refuse a directory that an export must not replace."""
    place = output.resolve()
    for kept, what in ((Path.cwd(), "the working directory"), (source and Path(source), "the checkpoint to export")):
        if kept and (place == Path(kept).resolve() or place in Path(kept).resolve().parents):
            raise ValueError(f"output_dir={output} is {what} or holds it: choose another.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"output_dir={output} is no directory: choose another.")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").exists():
        raise ValueError(f"output_dir={output} holds something else than a checkpoint: choose another, or empty it.")
    return place


def _existing(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _load(
    model: Any, exit_layer: int | None, keep_mlm_head: bool | None
) -> tuple[M3BertSentenceTransformer, M3BertForMaskedLM | None]:
    """Return a model that may be changed, cut at the exit, and the masked-language model around its encoder."""
    if not isinstance(model, (str, Path)):
        if keep_mlm_head:
            raise ValueError(
                "A loaded SentenceTransformer has no masked-language-model head: export from a directory."
            )
        depth = _encoders(model)[0].config.resolve_exit_layer(exit_layer)
        parent = copy.deepcopy(model)
        encoder: Any = parent.transformers_model
        encoder.layers = encoder.layers[:depth]
        encoder.config._cut_to(depth)
        encoder.config.exit_layer = None
        if encoder.config.exit_norm == "none":
            encoder.norm = None
        return parent, None
    parent = build_sentence_transformer(str(model), exit_layer=exit_layer)
    parent.transformers_model.config.exit_layer = None
    has_head = "M3BertForMaskedLM" in (AutoConfig.from_pretrained(model).architectures or [])
    if keep_mlm_head and not has_head:
        raise ValueError(f"{model} has no masked-language-model head to keep.")
    if not has_head or keep_mlm_head is False:
        return parent, None
    masked_lm = M3BertForMaskedLM.from_pretrained(str(model), exit_layer=exit_layer)
    masked_lm.config.exit_layer = None
    # One encoder, so that what is trimmed and cast below is trimmed and cast for both.
    masked_lm.model = parent.transformers_model
    masked_lm.config = parent.transformers_model.config
    masked_lm.tie_weights()
    return parent, masked_lm


def _covered(
    parent: M3BertSentenceTransformer, trimmed: TrimmedVocabulary | None, corpus: Sequence[str] | None
) -> list[str]:
    """Return texts to compare vectors on: those that the trimmed tokenizer splits as its parent does."""
    texts = list(corpus[:: max(1, len(corpus) // 64)][:64]) if corpus else []
    texts += _PROBES
    if trimmed is None:
        return texts
    before, after = parent.tokenizer, trimmed.tokenizer
    return [
        text
        for text in texts
        if before(text)["input_ids"] == [trimmed.kept_ids[index] for index in after(text)["input_ids"]]
    ]


def _encode(
    model: M3BertSentenceTransformer, texts: Sequence[str], width: int, normalized: bool = True
) -> torch.Tensor:
    vectors = model.encode(list(texts), convert_to_tensor=True, truncate_dim=width).float().cpu()
    return nn.functional.normalize(vectors, dim=1) if normalized else vectors


def _compare(vectors: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    unit = nn.functional.normalize(vectors, dim=1)
    return {
        "compared_texts": len(unit),
        "max_difference": (unit - wanted).abs().max().item(),
        "min_cosine": (unit * wanted).sum(dim=1).min().item(),
    }


def _trim(encoder: Any, masked_lm: M3BertForMaskedLM | None, trimmed: TrimmedVocabulary) -> None:
    kept = torch.tensor(trimmed.kept_ids)
    config = encoder.config
    old = encoder.get_input_embeddings().weight
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(old.detach()[kept].clone(), freeze=False))
    if masked_lm is not None:
        decoder = nn.Linear(config.hidden_size, len(kept), dtype=old.dtype)
        with torch.no_grad():
            decoder.weight.copy_(masked_lm.decoder.weight[kept])
            decoder.bias.copy_(masked_lm.decoder.bias[kept])
        masked_lm.decoder = decoder
    ids = {name: trimmed.new_id(getattr(config, name, None)) for name in _id_fields(config, trimmed)}
    config.vocab_size = len(kept)
    for name, value in ids.items():
        setattr(config, name, value)
    if masked_lm is not None:
        masked_lm.tie_weights()


def _id_fields(config: Any, trimmed: TrimmedVocabulary) -> list[str]:
    names = [f"{kind}_token_id" for kind in ("pad", "bos", "eos", "cls", "sep", "mask")]
    return [name for name in names if getattr(config, name, None) in set(trimmed.kept_ids)]


def _modules(parent: M3BertSentenceTransformer, width: int, normalize: bool, dtype: Any) -> list[nn.Module]:
    modules: list[Any] = [module for module in parent.children() if not isinstance(module, Normalize)]
    had_norm = len(modules) < len(list(parent.children()))
    full = parent.get_embedding_dimension() if parent.truncate_dim is None else None
    full = full or next(
        m.get_embedding_dimension() for m in reversed(modules) if hasattr(m, "get_embedding_dimension")
    )
    if width < full:
        cut = Dense(full, width, bias=False, activation_function=nn.Identity())
        with torch.no_grad():
            cut.linear.weight.copy_(torch.eye(width, full))
        modules.append(cut.to(dtype or parent.transformers_model.dtype))
    if normalize or had_norm:
        modules.append(Normalize())
    return modules


def _parent_size(source: str | None) -> dict[str, int] | None:
    if source is None or not Path(source).is_dir():
        return None
    # The modules lie one level down; checkpoints of a training run do too, and are not part of it.
    folders = [p for p in Path(source).iterdir() if p.is_dir() and not p.name.startswith("checkpoint-")]
    files = [file for folder in (Path(source), *folders) for file in folder.glob("*.safetensors")]
    return {"bytes": sum(file.stat().st_size for file in files)}


def _card(report: dict[str, Any], model: M3BertSentenceTransformer, normalize: bool) -> ModelCard:
    config = model.transformers_model.config
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["m3bert", "matryoshka", "feature-extraction"],
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {Path(report['source']).name}, exit {report['exit_layer']}, {report['truncate_dim']} dimensions",
        "",
        f"A part of `{Path(report['source']).name}`, exported by `m3bert_hf export`. What was cut:",
        "",
        f"- layers: {config.num_hidden_layers} are left; it can exit at {', '.join(map(str, config.exit_layers))}.",
        f"- vectors: {report['truncate_dim']} dimensions of {config.hidden_size}"
        + (", of length 1." if normalize else "."),
        f"- weights: {report['dtype']}, {report['parameters']:,} parameters, {report['bytes'] / 2**20:.1f} MiB"
        + (f" (before: {report['parent']['bytes'] / 2**20:.1f} MiB)." if report["parent"] else "."),
    ]
    if "vocabulary" in report:
        figures = report["vocabulary"]
        lines.append(f"- vocabulary: {figures['new_size']:,} of {figures['old_size']:,} tokens.")
        if "corpus_texts" in figures:
            lines.append(
                f"  {figures['corpus_unchanged']:.2%} of the {figures['corpus_texts']:,} texts it was made for are "
                "split as before."
            )
        if "other_texts" in figures:
            lines.append(
                f"  Of {figures['other_texts']:,} other texts, {1 - figures['other_unchanged']:.2%} are split "
                f"differently ({figures['other_tokens_ratio']:.3f} times the tokens)."
            )
        else:
            lines.append("  How other texts fare was not measured: text that needs the dropped tokens is read worse.")
    lines += [
        "",
        f"Compared with its parent on {report['compared_texts']} texts: largest difference of a coordinate "
        f"{report['max_difference']:.1e}, least cosine {report['min_cosine']:.6f}.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("this directory", trust_remote_code=True)',
        "```",
    ]
    return ModelCard("\n".join(lines) + "\n")


__all__ = ["export_submodel"]
