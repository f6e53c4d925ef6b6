"""Cut a tokenizer down to what given texts need, so that these texts are tokenised as before, id for id renamed.

Why that holds, for each model of a `tokenizer.json`:

- Unigram picks the segmentation of highest score. The pieces that texts use are kept; taking others away only takes
  away candidates that lost. The piece of worst score is kept too, as the score of unknown characters depends on it.
- BPE applies the merge of lowest rank among adjacent pairs, again and again. Every merge that can lead to a token in
  use is kept, in order, so that each step finds the same merge; a merge that is dropped was never applied.
- WordPiece takes the longest piece that fits. Pieces in use are kept, and those that matched before a word turned out
  unknown; a longer one cannot appear.

Special tokens, added tokens, byte-fallback tokens and the byte alphabet of byte-level BPE always stay, and so do
single characters that occur in the texts.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BATCH = 1000

# Scripts of languages, to cut a vocabulary without any text of them; ISO 639-1 codes. Unicode blocks as ranges.
_SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x00AA, 0x00AA), (0x00BA, 0x024F), (0x0250, 0x02AF), (0x1E00, 0x1EFF), (0xFB00, 0xFB06)),
    "cyrillic": ((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "hebrew": ((0x0590, 0x05FF), (0xFB1D, 0xFB4F)),
    "devanagari": ((0x0900, 0x097F), (0xA8E0, 0xA8FF)),
    "bengali": ((0x0980, 0x09FF),),
    "tamil": ((0x0B80, 0x0BFF),),
    "telugu": ((0x0C00, 0x0C7F),),
    "malayalam": ((0x0D00, 0x0D7F),),
    "thai": ((0x0E00, 0x0E7F),),
    "lao": ((0x0E80, 0x0EFF),),
    "georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "armenian": ((0x0530, 0x058F), (0xFB13, 0xFB17)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "han": ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF65, 0xFF9F)),
}
_LANGUAGES = {
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk", "kk", "ky", "mn", "tg"), ("cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur", "ug", "ps"), ("arabic",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("devanagari",)),
    "sr": ("cyrillic", "latin"),
    "el": ("greek",),
    "he": ("hebrew",),
    "bn": ("bengali",),
    "ta": ("tamil",),
    "te": ("telugu",),
    "ml": ("malayalam",),
    "th": ("thai",),
    "lo": ("lao",),
    "ka": ("georgian",),
    "hy": ("armenian",),
    "ko": ("hangul", "han"),
    "zh": ("han",),
    "ja": ("han", "kana"),
    **dict.fromkeys(
        (
            *(
                "en",
                "de",
                "fr",
                "es",
                "it",
                "pt",
                "nl",
                "pl",
                "cs",
                "sk",
                "sl",
                "hr",
                "bs",
                "hu",
                "ro",
                "tr",
                "az",
                "id",
            ),
            *(
                "ms",
                "vi",
                "sv",
                "da",
                "no",
                "nb",
                "nn",
                "fi",
                "et",
                "lv",
                "lt",
                "is",
                "ga",
                "cy",
                "eu",
                "ca",
                "gl",
                "af",
            ),
            *("sw", "tl", "sq", "uz", "la", "eo", "mt", "lb"),
        ),
        ("latin",),
    ),
}


@dataclass
class TrimmedVocabulary:
    """A smaller tokenizer and what became of the old ids.

    Attributes:
        tokenizer: The smaller tokenizer.
        kept_ids: Old ids in the order of the new ones.
        report: Sizes, and the shares of texts that tokenise as before.
    """

    tokenizer: PreTrainedTokenizerFast
    kept_ids: list[int]
    report: dict[str, Any] = field(default_factory=dict)

    def new_id(self, old: int | None) -> int | None:
        """Return the new id of an old one, `None` for `None`.

        Raises:
            KeyError: If it was not kept.
        """
        return None if old is None else {old_id: new for new, old_id in enumerate(self.kept_ids)}[old]


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Iterable[str] | None = None,
    languages: Sequence[str] | None = None,
    vocabulary: Iterable[str] | None = None,
    min_count: int = 1,
    other_texts: Sequence[str] | None = None,
) -> TrimmedVocabulary:
    """Keep the tokens that texts use, those of languages' scripts, or those listed; check the result before returning.

    Args:
        tokenizer: Fast tokenizer with a Unigram, BPE or WordPiece model.
        corpus: Texts that must tokenise as before.
        languages: ISO 639-1 codes: tokens written in their scripts stay. It needs no text, and keeps far more than a
            corpus does: every Latin token for English alone.
        vocabulary: Tokens that must stay, as the tokenizer writes them. These three add up.
        min_count: Drop tokens that the corpus uses less often; its texts are then covered but for rare words.
        other_texts: Texts to measure, on which share the smaller tokenizer differs (a sample of what users send).

    Returns:
        The smaller tokenizer, the old ids it keeps and a report: `old_size`, `new_size`, `corpus_texts`,
        `corpus_unchanged`, `other_texts`, `other_unchanged` (shares of texts) and `other_tokens_ratio` (tokens after,
        relative to before).

    Raises:
        TypeError: If the tokenizer is not a fast one or has another model.
        ValueError: If nothing says what to keep, a token or language does not exist, the corpus is empty, or, with
            `min_count` of 1, a text of the corpus tokenises differently after all.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(f"{type(tokenizer).__name__} has no tokenizer.json: load the tokenizer with AutoTokenizer.")
    if corpus is None and languages is None and vocabulary is None:
        raise ValueError("Say what to keep: `corpus` (texts), `languages` (codes) or `vocabulary` (tokens).")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"].get("type")
    if kind not in ("Unigram", "BPE", "WordPiece"):
        raise TypeError(f"A tokenizer with a {kind} model cannot be trimmed: Unigram, BPE and WordPiece can.")
    tokens = _tokens(content["model"], kind)
    ids = {token: index for index, token in tokens.items()}
    kept: set[int] = set()
    texts: list[str] = []
    characters: set[str] = set()
    if corpus is not None:
        texts = [text for text in corpus if text]
        if not texts:
            raise ValueError("The corpus is empty: it needs texts that the smaller tokenizer must cover.")
        counts = _used(tokenizer, texts, content, kind, ids)
        kept.update(index for index, count in counts.items() if count >= min_count and index in tokens)
        characters.update(*texts, *(_normalized(tokenizer, texts)))
    if languages is not None:
        if "ByteLevel" in json.dumps(content.get("pre_tokenizer")):
            raise ValueError(
                "`languages` cannot be used with a byte-level tokenizer, whose tokens are not written in the scripts: "
                "pass a corpus of their texts."
            )
        kept.update(_in_scripts(tokens, languages))
    if vocabulary is not None:
        for token in vocabulary:
            if token not in ids:
                raise ValueError(f"Token {token!r} does not exist in the vocabulary of {len(ids):,} tokens.")
            kept.add(ids[token])
    kept |= _always(content, kind, tokens, ids, characters)
    if kind == "BPE":
        kept = _with_merges(content["model"], kept, tokens, ids)
    added = {entry["id"] for entry in content.get("added_tokens") or []}
    order = sorted(kept | added)
    smaller = _rebuild(tokenizer, content, kind, order)
    result = TrimmedVocabulary(smaller, order)
    result.report = _check(tokenizer, result, texts, other_texts, strict=min_count <= 1)
    return result


def _tokens(model: dict[str, Any], kind: str) -> dict[int, str]:
    if kind == "Unigram":
        return {index: token for index, (token, _) in enumerate(model["vocab"])}
    return {index: token for token, index in model["vocab"].items()}


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the backend without truncation and padding, which would hide the end of long texts."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _normalized(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[str]:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return (text if normalizer is None else normalizer.normalize_str(text) for text in texts)


def _used(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], content: dict, kind: str, ids: dict[str, int]
) -> Counter[int]:
    """Count the tokens of texts; for WordPiece also the pieces that matched within words that are unknown."""
    backend = _plain(tokenizer)
    counts: Counter[int] = Counter()
    for batch in _batches(texts):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    if kind == "WordPiece" and ids.get(content["model"]["unk_token"], -1) in counts:
        prefix = content["model"]["continuing_subword_prefix"]
        words: Counter[str] = Counter()
        for text in _normalized(tokenizer, texts):
            words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        for word, times in words.items():
            for piece in _matched_before_unknown(word, ids, prefix):
                counts[piece] += times
    return counts


def _matched_before_unknown(word: str, ids: dict[str, int], prefix: str) -> list[int]:
    """Return the pieces that WordPiece matches from the left of a word until none fits; none for a word it knows."""
    found: list[int] = []
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = (prefix if start else "") + word[start:end]
            if piece in ids:
                found.append(ids[piece])
                start = end
                break
        else:
            return found
    return []


def _always(content: dict, kind: str, tokens: dict[int, str], ids: dict[str, int], characters: set[str]) -> set[int]:
    """Return what stays whatever the texts: special, byte and unknown tokens, and single characters of the texts."""
    model = content["model"]
    kept = {ids[token] for token in (f"<0x{byte:02X}>" for byte in range(256)) if token in ids}
    marks = {"", "▁", "Ġ", model.get("continuing_subword_prefix") or ""}
    for mark in marks:
        for character in characters:
            for token in (mark + character, character + (model.get("end_of_word_suffix") or "")):
                if token in ids:
                    kept.add(ids[token])
    if kind == "Unigram":
        scores = [score for _, score in model["vocab"]]
        kept.add(min(range(len(scores)), key=scores.__getitem__))
        if model.get("unk_id") is not None:
            kept.add(model["unk_id"])
    elif model.get("unk_token") in ids:
        kept.add(ids[model["unk_token"]])
    if "ByteLevel" in json.dumps(content.get("pre_tokenizer")):
        kept.update(ids[c] for c in pre_tokenizers.ByteLevel.alphabet() if c in ids)
    # Named by the post-processor, even where they are not among the added tokens.
    for token in _mentioned(content.get("post_processor")):
        if token in ids:
            kept.add(ids[token])
    return kept


def _mentioned(processor: Any) -> Iterator[str]:
    if not isinstance(processor, dict):
        return
    for key in ("cls", "sep"):
        if isinstance(processor.get(key), list):
            yield processor[key][0]
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry["tokens"]
    for part in processor.get("processors") or []:
        yield from _mentioned(part)


def _with_merges(model: dict[str, Any], kept: set[int], tokens: dict[int, str], ids: dict[str, int]) -> set[int]:
    """Add the parts of every merge that leads to a kept token."""
    parts: dict[int, list[tuple[int, int]]] = {}
    for left, right in _merges(model):
        merged = _merged(model, left, right)
        if merged in ids and left in ids and right in ids:
            parts.setdefault(ids[merged], []).append((ids[left], ids[right]))
    closure, waiting = set(kept), list(kept)
    while waiting:
        for pair in parts.get(waiting.pop(), ()):
            for index in pair:
                if index not in closure:
                    closure.add(index)
                    waiting.append(index)
    return closure


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _merged(model: dict[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _in_scripts(tokens: dict[int, str], languages: Sequence[str]) -> set[int]:
    unknown = sorted(set(languages) - set(_LANGUAGES))
    if unknown:
        raise ValueError(
            f"No script is known for languages {unknown}: pass a corpus of their texts, or choose of "
            f"{', '.join(sorted(_LANGUAGES))}."
        )
    wanted = {script for language in languages for script in _LANGUAGES[language]} | {"latin"}
    ranges = [block for script, blocks in _SCRIPTS.items() if script not in wanted for block in blocks]

    def foreign(character: str) -> bool:
        code = ord(character)
        return code > 0xA9 and any(low <= code <= high for low, high in ranges)

    return {index for index, token in tokens.items() if not any(map(foreign, token))}


def _rebuild(
    tokenizer: PreTrainedTokenizerFast, content: dict[str, Any], kind: str, order: list[int]
) -> PreTrainedTokenizerFast:
    """Write the tokenizer with only the ids in `order`, which become 0, 1, 2, ..."""
    content = copy.deepcopy(content)
    new = {old: index for index, old in enumerate(order)}
    model = content["model"]
    if kind == "Unigram":
        size = len(model["vocab"])
        # Added tokens may lie beyond the model's own vocabulary; those that lie within it stay in it.
        inside = [old for old in order if old < size]
        if inside != order[: len(inside)]:
            raise ValueError("Added tokens lie before the pieces of the vocabulary: this tokenizer cannot be trimmed.")
        model["vocab"] = [model["vocab"][old] for old in inside]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {t: new[i] for t, i in sorted(model["vocab"].items(), key=lambda item: item[1]) if i in new}
    if kind == "BPE":
        vocab = model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in _merges(model)
            if left in vocab and right in vocab and _merged(model, left, right) in vocab
        ]
    for entry in content.get("added_tokens") or []:
        entry["id"] = new[entry["id"]]
    if isinstance(content.get("padding"), dict):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    _rename(content.get("post_processor"), new)
    special = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name, None) is not None}
    extra = [t for t in tokenizer.all_special_tokens if t not in special.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **special,
        **({"extra_special_tokens": extra} if extra else {}),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=list(tokenizer.model_input_names),
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
    )


def _rename(processor: Any, new: dict[int, int]) -> None:
    if not isinstance(processor, dict):
        return
    for key in ("cls", "sep"):
        if isinstance(processor.get(key), list):
            processor[key][1] = new[processor[key][1]]
    for entry in (processor.get("special_tokens") or {}).values():
        entry["ids"] = [new[old] for old in entry["ids"]]
    for part in processor.get("processors") or []:
        _rename(part, new)


def _check(
    tokenizer: PreTrainedTokenizerFast,
    result: TrimmedVocabulary,
    corpus: Sequence[str],
    other_texts: Sequence[str] | None,
    strict: bool,
) -> dict[str, Any]:
    report: dict[str, Any] = {"old_size": len(tokenizer), "new_size": len(result.tokenizer)}
    before, after = _plain(tokenizer), _plain(result.tokenizer)
    for name in _SPECIAL:
        if getattr(tokenizer, name, None) is not None:
            old, new = getattr(tokenizer, f"{name}_id"), getattr(result.tokenizer, f"{name}_id")
            if result.kept_ids[new] != old:
                raise ValueError(f"{name} {getattr(tokenizer, name)!r} would not survive the trimming.")
    for name, texts in (("corpus", corpus), ("other", other_texts or ())):
        if not texts:
            continue
        unchanged = old_tokens = new_tokens = 0
        for batch in _batches(texts):
            pairs = zip(batch, before.encode_batch(batch), after.encode_batch(batch), strict=True)
            for text, old_encoding, new_encoding in pairs:
                same = old_encoding.ids == [result.kept_ids[index] for index in new_encoding.ids]
                if not same and name == "corpus" and strict:
                    raise ValueError(
                        f"The smaller tokenizer would split {text[:100]!r} differently ({old_encoding.tokens[:20]} "
                        f"became {new_encoding.tokens[:20]}): nothing was written. Please report this tokenizer."
                    )
                unchanged += same
                old_tokens += len(old_encoding.ids)
                new_tokens += len(new_encoding.ids)
        report[f"{name}_texts"] = len(texts)
        report[f"{name}_unchanged"] = unchanged / len(texts)
        report[f"{name}_tokens_ratio"] = new_tokens / max(1, old_tokens)
    return report


__all__ = ["TrimmedVocabulary", "trim_vocabulary"]
