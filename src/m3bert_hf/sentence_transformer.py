"""m3BERT in sentence-transformers: choose depth and width at loading, as an attribute, per call or in a context."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import quantize_embeddings
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

_STOCK_TRANSFORMER = f"{Transformer.__module__}.{Transformer.__name__}"
_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def _encoders(model: nn.Module) -> list[PreTrainedModel]:
    """Return the m3BERT encoders in a model, whether their code comes from this package or from the Hub."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type == "m3bert" and module.base_model is module
    ]
    if not found:
        raise TypeError(f"{type(model).__name__} holds no m3BERT encoder.")
    return found


@contextmanager
def early_exit(model: nn.Module, exit_layer: int | None) -> Iterator[None]:
    """Make every m3BERT encoder in `model` exit at `exit_layer` within the context.

    Args:
        model: Any model that holds m3BERT encoders: a `SentenceTransformer`, a `Router`, an `AutoModel`.
        exit_layer: One of the model's exits, or `None` for the deepest.

    Raises:
        TypeError: If the model holds no m3BERT encoder.
        ValueError: If the exit does not exist.
    """
    configs = [encoder.config for encoder in _encoders(model)]
    before = [config.exit_layer for config in configs]
    with ExitStack() as restore:
        for config, value in zip(configs, before, strict=True):
            restore.callback(setattr, config, "exit_layer", value)
            config.exit_layer = exit_layer
        yield


class M3BertTransformer(Transformer):
    """sentence-transformers' `Transformer` with the exit as an attribute and, in training, all exits in one pass.

    In saved repositories the stock class stands in its place (see [`M3BertSentenceTransformer.save`]), so that they
    load without this package.
    """

    forward_kwargs = {"exit_layer", "output_exits"}

    @property
    def exit_layer(self) -> int:
        """The layer this model exits at when a call names none.

        Setting it raises a `ValueError` that names the valid choices when the exit does not exist; `None` sets the
        deepest.
        """
        return self.model.config.resolve_exit_layer()

    @exit_layer.setter
    def exit_layer(self, value: int | None) -> None:
        self.model.config.exit_layer = value

    @property
    def exit_layers(self) -> list[int]:
        """The layers this model can exit at."""
        return list(self.model.config.exit_layers)

    def forward(self, features: dict[str, Any], output_exits: bool = False, **kwargs) -> dict[str, Any]:
        """Write `token_embeddings` [batch, tokens, width] and, if asked, `exit_hidden_states` into the features.

        Args:
            features: What `preprocess` returned.
            output_exits: Also write the states of every exit, a tuple in the order of `exit_layers`.
            **kwargs: `exit_layer` for this call.
        """
        if not output_exits:
            return super().forward(features, **kwargs)
        inputs = {key: features[key] for key in _MODEL_INPUTS if key in features}
        output = self.model(**inputs, **kwargs, output_exits=True, return_dict=True)
        features["exit_hidden_states"] = output.exit_hidden_states
        features[self.module_output_name] = output.last_hidden_state
        return features


class M3BertSentenceTransformer(SentenceTransformer):
    """A `SentenceTransformer` over m3BERT that checks `exit_layer` and `truncate_dim` and saves stock modules.

    Takes what `SentenceTransformer` takes, and loads any checkpoint of an m3BERT model: one that was saved as a
    `SentenceTransformer`, or one of transformers (mean pooling is added, as the library does).

    Raises:
        TypeError: If the checkpoint is not an m3BERT model.
        ValueError: If `truncate_dim` is wider than the model, or an exit does not exist.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        kwargs_by_module = self.module_kwargs = dict(self.module_kwargs or {})
        for name, module in self.named_children():
            if type(module) is Transformer and getattr(module.config, "model_type", None) == "m3bert":
                # The subclass adds no state. Making the switch here covers every way the library loads modules.
                module.__class__ = M3BertTransformer
            if isinstance(module, M3BertTransformer) and "exit_layer" not in kwargs_by_module.get(name, []):
                kwargs_by_module[name] = [*kwargs_by_module.get(name, []), "exit_layer"]
        self._trained_dims = set.union(*(set(e.config.matryoshka_dimensions) for e in _encoders(self)))
        self._check_truncate_dim(self.truncate_dim)

    # ------------------------------------------------------------------ depth

    @property
    def exit_layer(self) -> int:
        """The layer that `encode` exits at when a call names none; assign one of `exit_layers` or `None`."""
        return _encoders(self)[0].config.resolve_exit_layer()

    @exit_layer.setter
    def exit_layer(self, value: int | None) -> None:
        for encoder in _encoders(self):
            encoder.config.exit_layer = value

    @property
    def exit_layers(self) -> list[int]:
        """The layers this model can exit at."""
        return list(_encoders(self)[0].config.exit_layers)

    def early_exit(self, exit_layer: int | None):
        """Return a context in which `encode` exits at `exit_layer` (see [`early_exit`])."""
        return early_exit(self, exit_layer)

    # ------------------------------------------------------------------ width

    @property
    def truncate_dim(self) -> int | None:
        """The width that `encode` returns when a call names none; `None` is the full one.

        Setting a width that was not trained warns; one that the model does not have raises a `ValueError`.
        """
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        self._check_truncate_dim(value)
        self._truncate_dim = value

    @property
    def embedding_width(self) -> int:
        """Width of what the last module gives, before `truncate_dim`; an export may be narrower than its encoder."""
        modules: list[Any] = list(self.children())
        return next(m.get_embedding_dimension() for m in reversed(modules) if hasattr(m, "get_embedding_dimension"))

    @property
    def matryoshka_dimensions(self) -> list[int]:
        """Trained dimensions that this model can give."""
        width = self.embedding_width
        return sorted({d for d in _encoders(self)[0].config.matryoshka_dimensions if d < width} | {width})

    def _check_truncate_dim(self, value: int | None) -> None:
        # During construction there is no width to check against yet; __init__ checks at its end.
        trained = self.__dict__.get("_trained_dims")
        if value is None or trained is None:
            return
        width = self.embedding_width
        if not 1 <= value <= width:
            raise ValueError(
                f"truncate_dim={value} does not exist: choose a width within 1 and {width}; trained are "
                f"{sorted(trained)}."
            )
        if value not in trained:
            logger.warning(
                "truncate_dim=%s was not trained (trained are %s): expect less than the next smaller one gives.",
                value,
                sorted(trained),
            )

    def encode(
        self,
        inputs,
        *args,
        truncate_dim: int | None = None,
        exit_layer: int | None = None,
        batch_tokens: int | None = None,
        **kwargs,
    ):
        """Encode as [`~sentence_transformers.SentenceTransformer.encode`] does, at the exit and width of the call.

        Args:
            inputs: A text or texts. An empty text is encoded as its special tokens alone; a text longer than
                `max_seq_length` is cut off there.
            truncate_dim: Width of the vectors; `None` is `self.truncate_dim`. With `normalize_embeddings=True` they
                are unit vectors at every width.
            exit_layer: Exit for this call; `None` is `self.exit_layer`.
            batch_tokens: Tokens of a batch at most, padding included, in place of `batch_size` texts: many short
                texts or few long ones at once, so that neither the memory nor the matrices' size swings with the
                texts' length. A longer text is a batch by itself. For a list of texts and their vectors only.
            *args: As in the library.
            **kwargs: As in the library.

        Raises:
            ValueError: If the width or the exit does not exist, or `batch_tokens` is not positive or is asked for
                beside several processes or another output than sentence embeddings.
        """
        self._check_truncate_dim(truncate_dim)
        if exit_layer is not None:
            for encoder in _encoders(self):
                encoder.config.resolve_exit_layer(exit_layer)
            kwargs["exit_layer"] = exit_layer
        if batch_tokens is not None:
            if batch_tokens < 1:
                raise ValueError(f"batch_tokens={batch_tokens} must be positive.")
            if not self.is_singular_input(inputs):
                kwargs["truncate_dim"] = truncate_dim
                return self._encode_by_tokens(list(inputs), args, batch_tokens, kwargs)
        return super().encode(inputs, *args, truncate_dim=truncate_dim, **kwargs)

    def _encode_by_tokens(self, inputs: list[str], args: tuple, batch_tokens: int, kwargs: dict[str, Any]):
        refused = [name for name in ("pool", "chunk_size") if kwargs.get(name) is not None]
        if isinstance(kwargs.get("device"), list):
            refused.append("several devices")
        if kwargs.get("output_value", "sentence_embedding") != "sentence_embedding":
            refused.append(f"output_value={kwargs['output_value']!r}")
        if args:
            refused.append("arguments without their names")
        if not all(isinstance(text, str) for text in inputs):
            refused.append("inputs other than texts")
        if refused:
            raise ValueError(f"batch_tokens={batch_tokens} cannot be combined with {', '.join(refused)}.")
        kwargs.pop("batch_size", None)
        progress = kwargs.pop("show_progress_bar", None)
        if progress is None:
            progress = logger.isEnabledFor(logging.INFO)
        precision: Any = kwargs.pop("precision", None) or "float32"
        to_tensor = kwargs.pop("convert_to_tensor", False)
        to_numpy = kwargs.pop("convert_to_numpy", True) and not to_tensor
        # The library's own checks of what is left, before the work.
        super().encode([], precision=precision, **kwargs)
        given = {key: kwargs.get(key) for key in ("prompt", "prompt_name", "task", "processing_kwargs")}
        batches = self.token_batches(inputs, batch_tokens, **given)
        if not batches:
            return super().encode([], convert_to_tensor=to_tensor, convert_to_numpy=to_numpy, **kwargs)
        parts = []
        with tqdm(total=len(inputs), desc="Texts", disable=not progress) as bar:
            for rows in batches:
                vectors = super().encode(
                    [inputs[row] for row in rows],
                    batch_size=len(rows),
                    convert_to_tensor=True,
                    show_progress_bar=False,
                    **kwargs,
                )
                parts.append(vectors.cpu() if to_numpy else vectors)
                bar.update(len(rows))
        back = torch.tensor([row for rows in batches for row in rows]).argsort()
        vectors = torch.cat(parts)
        vectors = vectors[back.to(vectors.device)]
        # The ranges of int8 are those of all vectors, not of a batch.
        output: Any = vectors if precision == "float32" else quantize_embeddings(vectors, precision=precision)
        if to_numpy:
            # numpy has no bfloat16.
            output = output.float() if getattr(output, "dtype", None) == torch.bfloat16 else output
            return output.numpy() if isinstance(output, torch.Tensor) else output
        output = torch.as_tensor(output)
        return output if to_tensor else list(output)

    def token_batches(
        self,
        inputs: Sequence[str],
        batch_tokens: int,
        prompt: str | None = None,
        prompt_name: str | None = None,
        task: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
    ) -> list[list[int]]:
        """Group texts into batches of at most `batch_tokens` tokens, padding included, longest first.

        Args:
            inputs: Texts.
            batch_tokens: Most tokens of a batch; a longer text is a batch by itself.
            prompt: That texts are encoded with.
            prompt_name: Its name among `prompts`.
            task: `query` or `document`, where these have lengths of their own.
            processing_kwargs: As `encode` takes them; `max_length` of `text` is read.

        Returns:
            The rows of each batch; together, every row once.

        Raises:
            ValueError: If `batch_tokens` is not positive.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} must be positive.")
        if prompt is None:
            prompt = self.prompts.get(prompt_name or self.default_prompt_name or "")
        # The order of what cuts a text is that of the library's Transformer.
        first: Any = self[0]
        limit = ((processing_kwargs or {}).get("text") or {}).get("max_length")
        limit = limit or getattr(first, f"{task}_length", None) or self.max_seq_length
        lengths: list[int] = []
        for start in range(0, len(inputs), 4096):
            texts = [(prompt or "") + text for text in inputs[start : start + 4096]]
            found = self.tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)
            lengths += [len(ids) for ids in found["input_ids"]]
        batches: list[list[int]] = []
        for row in sorted(range(len(inputs)), key=lambda row: -lengths[row]):
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.inference_mode()
    def encode_exits(
        self,
        inputs: Sequence[str],
        exit_layers: Sequence[int] | None = None,
        task: Literal["query", "document"] | None = None,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        show_progress_bar: bool = False,
    ) -> dict[int, torch.Tensor]:
        """Encode texts at several exits in one pass, as `encode` gives them at each (promise of exit consistency).

        Args:
            inputs: Texts.
            exit_layers: Exits; `None` means all. Layers above the deepest are not run.
            task: Encode as `encode_query` or `encode_document` does, with their prompt and length.
            batch_size: Texts encoded at once, longest first.
            truncate_dim: Width of the vectors; `None` is `self.truncate_dim`.
            normalize_embeddings: Return unit vectors.
            show_progress_bar: Show one.

        Returns:
            For each exit, vectors [texts, width] in the order of the texts, on the CPU.

        Raises:
            TypeError: If `inputs` is a single text.
            ValueError: If an exit or the width does not exist.
        """
        if isinstance(inputs, str):
            raise TypeError("encode_exits takes a list of texts, got one text: put it in a list.")
        self._check_truncate_dim(truncate_dim)
        width = self.truncate_dim if truncate_dim is None else truncate_dim
        exits = list(self.exit_layers if exit_layers is None else exit_layers)
        for exit_layer in exits:
            _encoders(self)[0].config.resolve_exit_layer(exit_layer)
        names = {"query": ("query",), "document": ("document", "passage", "corpus")}.get(task or "", ())
        name = next((name for name in names if name in self.prompts), self.default_prompt_name)
        prompt = self.prompts.get(name) if name is not None else None
        self.eval()
        if not len(inputs):
            return {exit_layer: torch.empty(0, width or self.embedding_width) for exit_layer in exits}
        order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
        found: dict[int, list[torch.Tensor]] = {exit_layer: [] for exit_layer in exits}
        steps = range(0, len(order), batch_size)
        for start in tqdm(steps, desc="Batches", disable=not show_progress_bar):
            texts = [inputs[index] for index in order[start : start + batch_size]]
            features = self.preprocess(texts, prompt=prompt, **({"task": task} if task else {}))
            features = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
            for exit_layer, vectors in zip(exits, exit_embeddings(self, features, exits, task), strict=True):
                vectors = vectors[:, :width].float()
                if normalize_embeddings:
                    vectors = nn.functional.normalize(vectors, dim=1)
                found[exit_layer].append(vectors.cpu())
        back = torch.tensor(order).argsort()
        return {exit_layer: torch.cat(parts)[back] for exit_layer, parts in found.items()}

    # ------------------------------------------------------------------ saving

    def save(self, path: str, *args, **kwargs) -> None:
        """Save so that the directory needs nothing but sentence-transformers and the model's own remote code."""
        super().save(path, *args, **kwargs)
        ours = f"{M3BertTransformer.__module__}.{M3BertTransformer.__name__}"
        file = Path(path) / "modules.json"
        modules = json.loads(file.read_text(encoding="utf-8"))
        for module in modules:
            if module["type"] == ours:
                module["type"] = _STOCK_TRANSFORMER
        file.write_text(json.dumps(modules, indent=2), encoding="utf-8")


def build_sentence_transformer(
    model_name_or_path: str,
    exit_layer: int | None = None,
    truncate_dim: int | None = None,
    pooling_mode: str | None = None,
    max_seq_length: int | None = None,
    **kwargs,
) -> M3BertSentenceTransformer:
    """Turn any m3BERT checkpoint into a `SentenceTransformer`.

    Args:
        model_name_or_path: Directory or Hub name of a checkpoint, of transformers or of sentence-transformers.
        exit_layer: Load only the layers up to this exit. `None` loads all; the exit can then be chosen per call.
        truncate_dim: Width of the vectors.
        pooling_mode: Pooling in place of the saved one; `None` keeps it (mean for a plain transformers checkpoint).
        max_seq_length: Longest text in tokens; longer ones are cut off.
        **kwargs: What `SentenceTransformer` takes.

    Raises:
        TypeError: If the checkpoint is not an m3BERT model.
        ValueError: If the exit or the width does not exist.
    """
    if exit_layer is not None:
        kwargs["config_kwargs"] = {**(kwargs.get("config_kwargs") or {}), "exit_layer": exit_layer}
    model = M3BertSentenceTransformer(str(model_name_or_path), truncate_dim=truncate_dim, **kwargs)
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    if pooling_mode is not None:
        for name, module in model.named_children():
            if isinstance(module, Pooling):
                setattr(model, name, Pooling(module.embedding_dimension, pooling_mode, module.include_prompt))
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers for data parallelism (`module`) and compilation (`_orig_mod`)."""
    while not isinstance(model, SentenceTransformer):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            return model
        model = inner
    return model


def exit_embeddings(
    model: nn.Module,
    features: dict[str, Any],
    exit_layers: Sequence[int] | None = None,
    task: str | None = None,
) -> list[torch.Tensor]:
    """Return the text vectors of several exits, each [batch, width], from one pass of the encoder.

    Args:
        model: An [`M3BertSentenceTransformer`], possibly wrapped for data parallelism or compiled.
        features: Preprocessed texts.
        exit_layers: Exits to return, in this order; layers above the deepest are not run. `None` means all.
        task: Route of a `Router`: `query` or `document`.

    Raises:
        ValueError: If an exit does not exist.
    """
    core: Any = unwrap(model)
    available = core.exit_layers
    wanted = list(available if exit_layers is None else exit_layers)
    deepest = max(wanted)
    route = {"task": task} if task else {}
    output = model(dict(features), output_exits=True, exit_layer=deepest, **route)
    states = output.pop("exit_hidden_states")
    by_exit = {deepest: output["sentence_embedding"]}
    for exit_layer, state in zip(available, states, strict=False):
        if exit_layer in wanted and exit_layer != deepest:
            pooled = {**output, "token_embeddings": state}
            for module in list(core.children())[1:]:
                pooled = module(pooled)
            by_exit[exit_layer] = pooled["sentence_embedding"]
    return [by_exit[exit_layer] for exit_layer in wanted]


__all__ = [
    "M3BertSentenceTransformer",
    "M3BertTransformer",
    "build_sentence_transformer",
    "early_exit",
    "exit_embeddings",
    "unwrap",
]
