"""Configuration of m3BERT: an encoder whose every (exit layer, first d dimensions) is a model by itself."""

import copy
from numbers import Integral
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


_LAYER_TYPES = ("full_attention", "sliding_attention")


@strict
class M3BertConfig(PreTrainedConfig):
    r"""Configuration of an m3BERT encoder; the defaults are the released base model (arXiv 2605.19568).

    Args:
        vocab_size: Number of token embeddings.
        hidden_size: Width of the residual stream and of the full output.
        intermediate_size: Width of the SwiGLU feed-forward layer.
        num_hidden_layers: Number of layers this model holds, which is also its deepest exit.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; fewer than `num_attention_heads` is grouped-query
            attention. `None` means `num_attention_heads`.
        hidden_act: Activation of the gate of the feed-forward layer and of the masked-language-model head.
        max_position_embeddings: Longest input in tokens; rotary positions with a scaling `factor` reach further.
        position_embedding_type: `"absolute"` (learned, as released) or `"rotary"`.
        rope_parameters: Rotary parameters in transformers' format, flat or keyed by layer type; only with
            `position_embedding_type="rotary"`.
        layer_types: `"full_attention"` or `"sliding_attention"` for each layer; `None` derives it from
            `global_attn_every_n_layers`.
        global_attn_every_n_layers: With `layer_types=None`, every n-th layer starting with the first attends
            globally and the others locally (ModernBERT's pattern); 1 means all layers attend globally.
        local_attention: Width in tokens of the window of a local layer, half of it to each side.
        exit_layers: Layers after which the model may stop, ascending; the last must be `num_hidden_layers`.
            `None` means thirds of the depth.
        exit_layer: The exit used when a call names none; `None` is the deepest.
        matryoshka_dimensions: Output widths that are trained, ascending. `None` means 32, 64, 128 and
            `hidden_size`, as far as they fit. With `is_matryoshka`, the keys that vLLM reads.
        truncate_dim: The output width that the heads use when a call names none; `None` is `hidden_size`.
            The encoder itself always returns the full width: its first d dimensions are the d-dimensional output.
        exit_norm: `"shared"`: the final RMSNorm runs at every exit. `"last"`: it runs after the last layer only and
            shallower exits return the raw residual stream, which is what the released pretraining loss reads.
            `"none"`: it never runs, which is what `"last"` becomes when the last layer is cut off.
        rms_norm_eps: Epsilon of all RMSNorms.
        initializer_range: Standard deviation of the initial weights.
        attention_dropout: Dropout of the attention probabilities.
        embedding_dropout: Dropout after the embeddings.
        hidden_dropout: Dropout of what attention and feed-forward add to the residual stream.
        classifier_dropout: Dropout before the classifier of the task heads.
        classifier_pooling: `"cls"` (first token) or `"mean"` (all tokens) for sequence classification.
        unpad_inputs: Whether padded batches run without their padding, which all but attention then never sees.
            `None`: on a CPU, where 3% of the batch or more is padding, with gradients a tenth. The states of padding
            are zero then.
        tie_word_embeddings: Whether the decoder of the masked-language-model head shares the token embeddings.

    The names of the released configuration, `mrl_layers`, `mrl_dims` and `cur_dim`, are accepted for `exit_layers`,
    `matryoshka_dimensions` and `truncate_dim`.

    Raises:
        ValueError: When fields that exclude one another are combined, naming the field, the value and the valid
            choices: at assignment directly, at construction and loading inside huggingface_hub's
            `StrictDataclassClassValidationError`.
    """

    model_type = "m3bert"
    attribute_map = {
        "mrl_layers": "exit_layers",
        "mrl_dims": "matryoshka_dimensions",
        "cur_dim": "truncate_dim",
    }
    keys_to_ignore_at_inference = ["exit_hidden_states", "granularity_losses", "granularity_accuracies"]
    default_theta = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
    # Makes save_pretrained ship this file with the checkpoint (what register_for_auto_class would set).
    _auto_class = "AutoConfig"

    vocab_size: int = 250_002
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 512
    position_embedding_type: Literal["absolute", "rotary"] = "absolute"
    rope_parameters: dict[str, Any] | None = None
    layer_types: list[str] | None = None
    global_attn_every_n_layers: int = 1
    local_attention: int = 128
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_layer: int | None = None
    matryoshka_dimensions: list[int] | tuple[int, ...] | None = None
    is_matryoshka: bool = True
    truncate_dim: int | None = None
    unpad_inputs: bool | None = None
    exit_norm: Literal["shared", "last", "none"] = "shared"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    classifier_pooling: Literal["cls", "mean"] = "mean"
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    cls_token_id: int | None = 0
    sep_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        for released, name in self.attribute_map.items():
            if released in kwargs:
                setattr(self, name, kwargs.pop(released))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.exit_layers is None:
            # Resolved here and not in the model: a depth chosen at loading must select among the exits that were
            # trained, which thirds of the new depth are not.
            depth = self.num_hidden_layers
            self.exit_layers = sorted({-(-depth // 3), -(-2 * depth // 3), depth})
        self.exit_layers = list(self.exit_layers)
        if self.matryoshka_dimensions is None:
            self.matryoshka_dimensions = [d for d in (32, 64, 128) if d < self.hidden_size] + [self.hidden_size]
        self.matryoshka_dimensions = list(self.matryoshka_dimensions)
        if self.layer_types is None:
            self.layer_types = self._default_layer_types()
        super().__post_init__(**kwargs)
        self._fields_are_set = True

    # ------------------------------------------------------------------ validation

    def validate_architecture(self):
        """Check the fields against one another (called at construction, saving and assignment)."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("max_position_embeddings", "global_attn_every_n_layers", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("attention_dropout", "embedding_dropout", "hidden_dropout", "classifier_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        self._validate_granularities()
        self._validate_positions()

    def _validate_granularities(self):
        depth, width = self.num_hidden_layers, self.hidden_size
        exits, dims = self.exit_layers, self.matryoshka_dimensions
        for name, values, limit, unit in (
            ("exit_layers", exits, depth, "num_hidden_layers"),
            ("matryoshka_dimensions", dims, width, "hidden_size"),
        ):
            if not values or list(values) != sorted(set(values)) or values[0] < 1 or values[-1] > limit:
                raise ValueError(
                    f"`{name}` must be ascending, without repetition, and within 1 and `{unit}` ({limit}); got "
                    f"{list(values or [])}."
                )
        if exits[-1] != depth:
            raise ValueError(
                f"`exit_layers` {list(exits)} must end with `num_hidden_layers` ({depth}): the layers above the last "
                f"exit would never be used. Add {depth} to the exits, or use {exits[-1]} layers."
            )
        if self.exit_layer is not None and self.exit_layer not in exits:
            raise ValueError(self._missing_exit_message(self.exit_layer))
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= width:
            raise ValueError(self._missing_dim_message(self.truncate_dim))

    def _validate_positions(self):
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - set(_LAYER_TYPES):
            raise ValueError(
                f"`layer_types` must name one of {list(_LAYER_TYPES)} for each of the {self.num_hidden_layers} "
                f"layers, got {self.layer_types}."
            )
        if "sliding_attention" in self.layer_types and self.local_attention < 2:
            raise ValueError(f"`local_attention` must be at least 2 tokens, got {self.local_attention}.")
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rotary" and head_dim % 2:
            raise ValueError(
                f"Rotary positions need an even head dimension, got {head_dim} (`hidden_size` {self.hidden_size} / "
                f"`num_attention_heads` {self.num_attention_heads})."
            )
        if self.position_embedding_type == "absolute" and self.rope_parameters:
            raise ValueError(
                f"`rope_parameters` {self.rope_parameters} have no effect with `position_embedding_type='absolute'`: "
                "set it to 'rotary', or leave them out."
            )

    def __setattr__(self, key, value):
        key = self.attribute_map.get(key, key)
        if not self.__dict__.get("_fields_are_set") or key not in type(self).__dataclass_fields__:
            super().__setattr__(key, value)
            return
        if key == "num_hidden_layers" and value != self.num_hidden_layers:
            self._cut_to(value)
            return
        before = dict(self.__dict__)
        super().__setattr__(key, value)
        try:
            self._standardize_positions({key})
            self.validate_architecture()
        except (TypeError, ValueError):
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _standardize_positions(self, changed: set[str]) -> None:
        """Bring the fields that follow from changed ones up to date, as construction does."""
        if "global_attn_every_n_layers" in changed and "layer_types" not in changed:
            self.__dict__["layer_types"] = self._default_layer_types()
        if changed & {"layer_types", "global_attn_every_n_layers", "rope_parameters", "position_embedding_type"}:
            ready = self.__dict__.pop("_fields_are_set", None)
            self.convert_rope_params_to_dict()
            if ready:
                self._fields_are_set = True

    def _default_layer_types(self) -> list[str]:
        every = max(self.global_attn_every_n_layers, 1)
        return [_LAYER_TYPES[bool(i % every)] for i in range(self.num_hidden_layers)]

    # ------------------------------------------------------------------ granularities

    @property
    def sliding_window(self) -> int:
        """Tokens that a local layer sees to each side, in the convention of transformers' mask functions."""
        return self.local_attention // 2

    @sliding_window.setter
    def sliding_window(self, value: int) -> None:
        self.local_attention = 2 * value

    @property
    def max_input_length(self) -> int:
        """Longest input in tokens: `max_position_embeddings`, or as far as rotary positions are scaled beyond it."""
        longest = self.max_position_embeddings
        if self.position_embedding_type == "rotary":
            kinds = (self.rope_parameters[kind] for kind in set(self.layer_types))
            longest = max(
                longest,
                min(int(p.get("original_max_position_embeddings", longest) * p.get("factor", 1.0)) for p in kinds),
            )
        return longest

    def resolve_exit_layer(self, exit_layer: int | None = None) -> int:
        """Return the exit that a call with `exit_layer` uses.

        Raises:
            ValueError: If the layer is not one of `exit_layers`.
        """
        if exit_layer is None:
            return self.num_hidden_layers if self.exit_layer is None else self.exit_layer
        if not isinstance(exit_layer, Integral) or isinstance(exit_layer, bool) or exit_layer not in self.exit_layers:
            raise ValueError(self._missing_exit_message(exit_layer))
        return exit_layer

    def resolve_truncate_dim(self, truncate_dim: int | None = None) -> int:
        """Return the output width that a call with `truncate_dim` uses.

        Raises:
            ValueError: If the width is not within 1 and `hidden_size`.
        """
        if truncate_dim is None:
            return self.hidden_size if self.truncate_dim is None else self.truncate_dim
        if not 1 <= truncate_dim <= self.hidden_size or isinstance(truncate_dim, bool):
            raise ValueError(self._missing_dim_message(truncate_dim))
        return truncate_dim

    def submodel(self, exit_layer: int) -> "M3BertConfig":
        """Return the configuration of the model that holds only the layers up to `exit_layer`.

        Raises:
            ValueError: If the layer is not one of `exit_layers`.
        """
        config = copy.deepcopy(self)
        config._cut_to(exit_layer)
        return config

    def _missing_exit_message(self, exit_layer) -> str:
        message = f"exit_layer={exit_layer} does not exist: this model can exit at {list(self.exit_layers)}."
        if self.checkpoint_layers > self.num_hidden_layers:
            message += (
                f" Only {self.num_hidden_layers} of the checkpoint's {self.checkpoint_layers} layers were loaded; "
                "load it without `exit_layer` and `num_hidden_layers` to use the deeper exits."
            )
        return message

    def _missing_dim_message(self, truncate_dim) -> str:
        return (
            f"truncate_dim={truncate_dim} does not exist: choose a width within 1 and {self.hidden_size}; trained are "
            f"{list(self.matryoshka_dimensions)}."
        )

    @property
    def checkpoint_layers(self) -> int:
        """Number of layers of the checkpoint this configuration was cut from; `num_hidden_layers` if it was not."""
        return self.__dict__.get("_checkpoint_layers", self.num_hidden_layers)

    def _cut_to(self, depth: int, exit_layers: list[int] | None = None) -> None:
        """Keep the layers up to `depth`, which must be an exit (or be made one by `exit_layers`)."""
        if depth == self.num_hidden_layers and exit_layers is None:
            return
        if exit_layers is None and depth not in self.exit_layers:
            raise ValueError(
                f"{depth} layers cannot be taken from this model: it can exit at {list(self.exit_layers)} of its "
                f"{self.num_hidden_layers} layers. Take one of these, or name the exits of the new model in the same "
                f"call, as in M3BertConfig(num_hidden_layers={depth}, exit_layers=[{depth}])."
            )
        if not 1 <= depth <= self.num_hidden_layers:
            raise ValueError(f"{depth} layers cannot be taken from a model of {self.num_hidden_layers} layers.")
        values = self.__dict__
        cut = depth < self.num_hidden_layers
        if cut and self.exit_norm == "last":
            values["exit_norm"] = "none"
        if cut:
            values["_checkpoint_layers"] = self.checkpoint_layers
        values["num_hidden_layers"] = depth
        values["layer_types"] = self.layer_types[:depth]
        values["exit_layers"] = [e for e in self.exit_layers if e <= depth] if exit_layers is None else exit_layers
        if self.exit_layer is not None and self.exit_layer > depth:
            values["exit_layer"] = None
        self.validate_architecture()

    # ------------------------------------------------------------------ loading and saving

    def with_overrides(self, **overrides) -> "M3BertConfig":
        """Return a copy with fields replaced together, the depth cut if an exit or a depth is asked for.

        `exit_layer` alone asks for the sub-model that ends there (its layers and no more); with `num_hidden_layers`
        beside it, it only sets the default exit.

        Raises:
            ValueError: If the fields do not fit one another.
        """
        config = copy.deepcopy(self)
        overrides = {self.attribute_map.get(key, key): value for key, value in overrides.items()}
        depth = overrides.pop("num_hidden_layers", None)
        if depth is None and overrides.get("exit_layer") is not None:
            depth = self.resolve_exit_layer(overrides["exit_layer"])
        if "exit_norm" in overrides:
            config.exit_norm = overrides.pop("exit_norm")
        exits = overrides.pop("exit_layers", None)
        if depth is not None or exits is not None:
            config._cut_to(
                config.num_hidden_layers if depth is None else depth, None if exits is None else list(exits)
            )
        config.__dict__.pop("_fields_are_set", None)
        for key, value in overrides.items():
            setattr(config, key, value)
        config._standardize_positions(set(overrides))
        config._fields_are_set = True
        config.validate()
        return config

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several fields at once, checking them together."""
        self.__dict__.update(self.with_overrides(**config_dict).__dict__)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a configuration from a dictionary; `exit_layer` and `num_hidden_layers` in `kwargs` cut the depth.

        This is where `AutoConfig.from_pretrained(path, exit_layer=4)` and `AutoModel.from_pretrained(path,
        exit_layer=4)` arrive. An `exit_layer` stored in the dictionary is only a default and cuts nothing.
        """
        names = {*cls.__annotations__, *cls.attribute_map}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
        result = super().from_dict(dict(config_dict), **kwargs)
        config, *unused = result if isinstance(result, tuple) else (result,)
        if overrides:
            config = config.with_overrides(**overrides)
        return (config, *unused) if unused else config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, without what holds for this process only."""
        output = super().to_dict()
        for key in ("_checkpoint_layers", "_fields_are_set"):
            output.pop(key, None)
        return output

    # ------------------------------------------------------------------ rotary parameters

    def convert_rope_params_to_dict(self, **kwargs):
        """Bring rotary parameters into one dictionary per layer type (called by transformers at construction)."""
        if self.position_embedding_type != "rotary":
            # A released configuration carries `rope_theta` although its model has learned positions.
            for key in ("rope_theta", "rope_scaling"):
                kwargs.pop(key, None)
            return kwargs
        given = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        theta = kwargs.pop("rope_theta", None)
        nested = bool(set(given) & set(_LAYER_TYPES))
        parameters = {}
        for layer_type in dict.fromkeys(self.layer_types):
            own = dict((given.get(layer_type) or {}) if nested else given)
            own.setdefault("rope_type", own.pop("type", "default"))
            own.setdefault("rope_theta", theta or self.default_theta[layer_type])
            parameters[layer_type] = own
        self.rope_parameters = parameters
        self.standardize_rope_params()
        return kwargs


__all__ = ["M3BertConfig"]
