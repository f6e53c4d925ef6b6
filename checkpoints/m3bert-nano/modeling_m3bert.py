"""PyTorch m3BERT: a bidirectional encoder that may stop at any of its exits and be read at any of its dimensions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .attention_m3bert import sdpa_attention_forward
from .compat_m3bert import (
    ALL_ATTENTION_FUNCTIONS,
    ROPE_INIT_FUNCTIONS,
    GradientCheckpointingLayer,
    can_return_tuple,
    capture_outputs,
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    dynamic_rope_update,
    find_packed_sequence_indices,
    init,
    is_flash_attention_requested,
    is_tracing,
    merge_with_config_defaults,
    packed_sequence_mask_function,
)
from .configuration_m3bert import M3BertConfig
from .loss_m3bert import MLMLossOptions, multigranular_mlm_loss
from .packing_m3bert import PackedDocuments, padded
from .repetition_m3bert import RepeatedTokens


AUTO_MAP = {
    "AutoConfig": "configuration_m3bert.M3BertConfig",
    "AutoModel": "modeling_m3bert.M3BertModel",
    "AutoModelForMaskedLM": "modeling_m3bert.M3BertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_m3bert.M3BertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_m3bert.M3BertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_m3bert.M3BertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_m3bert.M3BertForMultipleChoice",
}


@dataclass
class M3BertModelOutput(BaseModelOutput):
    """Output of [`M3BertModel`].

    Attributes:
        last_hidden_state: State at the exit, normed as `config.exit_norm` says, [batch, tokens, hidden_size].
        exit_hidden_states: With `output_exits=True`, the same for every exit up to the one asked for, shallow first.
        hidden_states: With `output_hidden_states=True`, the embeddings and the output of every layer that ran, before
            the final norm except for the last.
        attentions: With `output_attentions=True` and eager attention, [batch, heads, tokens, tokens] for each layer.
    """

    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class M3BertMaskedLMOutput(MaskedLMOutput):
    """Output of [`M3BertForMaskedLM`].

    Attributes:
        loss: Sum of the granularities' losses, with `labels`.
        granularity_losses: Cross entropy of each (exit, dimension) [exits, dimensions], detached; NaN where the loss
            options leave it out.
        granularity_accuracies: Share of labelled tokens that each (exit, dimension) predicts, likewise.
        logits: [batch, tokens, vocab_size] at the exit and dimension asked for.
    """

    granularity_losses: torch.FloatTensor | None = None
    granularity_accuracies: torch.FloatTensor | None = None


def _runs_on_cpu(states: torch.Tensor) -> bool:
    """Whether this is a plain run on a CPU without gradients, where writing in place saves passes over the memory.

    Tracers see the plain operations. Their tensors are of other classes, or a mode says so; asking for these two is
    faster than `is_tracing`, which counts for norms of single queries.
    """
    return (
        type(states) is torch.Tensor
        and states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


class M3BertRMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension; one narrower than the weight uses the weight's first part."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        # In float32 whatever the input, as the released code does; a low-precision mean of squares drifts with width.
        states = hidden_states.float()
        if states is not hidden_states and _runs_on_cpu(states):
            # On a CPU rms_norm is a chain of plain operations; these are fewer, and write over what was converted.
            factors = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(width).add_(self.eps)
            normed = states.mul_(factors.rsqrt_()).to(hidden_states.dtype)
        else:
            normed = F.rms_norm(states, (width,), eps=self.eps).to(hidden_states.dtype)
        return normed * self.weight[:width].to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class M3BertEmbeddings(nn.Module):
    """Token embeddings, plus learned positions if the configuration has them, then RMSNorm and dropout."""

    def __init__(self, config: M3BertConfig):
        super().__init__()
        # The padding row is an ordinary one, as in the release: a row held at zero would not survive conversion.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.position_embeddings = None
        self.norm = M3BertRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids, inputs_embeds, position_ids) -> torch.Tensor:
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.position_embeddings(position_ids)
        return self.dropout(self.norm(hidden_states))


class M3BertRotaryEmbedding(nn.Module):
    """Rotary angles for each kind of layer, for every `rope_type` of transformers."""

    def __init__(self, config: M3BertConfig, device=None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.layer_types = sorted(set(config.layer_types))
        self.rope_type = {}
        for layer_type in self.layer_types:
            self.rope_type[layer_type] = config.rope_parameters[layer_type]["rope_type"]
            inv_freq, scaling = self.frequencies(layer_type, device)
            self.register_buffer(f"{layer_type}_inv_freq", inv_freq, persistent=False)
            self.register_buffer(f"{layer_type}_original_inv_freq", inv_freq.clone(), persistent=False)
            setattr(self, f"{layer_type}_attention_scaling", scaling)

    def frequencies(self, layer_type: str, device=None) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies [rotated dims / 2] and the factor on cosine and sine."""
        parameters = self.config.rope_parameters[layer_type]
        if parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, device, layer_type=layer_type)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids, layer_type: str):
        inv_freq = getattr(self, f"{layer_type}_inv_freq")
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + dim / 2) of the last dimension by a right angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` dimensions of [batch, heads, tokens, head_dim] by the tokens' positions."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width, half = cos.shape[-1], cos.shape[-1] // 2
    rotated, rest = states[..., :width], states[..., width:]
    if states.dtype == cos.dtype and _runs_on_cpu(states):
        # Two passes over the memory in place of five.
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos
        rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(first, sin[..., half:])
    else:
        rotated = rotated * cos + rotate_half(rotated) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, [batch, heads, tokens, head_dim]; the one implementation that returns its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more; hooks and adapters may count on a row for each token."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked


class M3BertAttention(nn.Module):
    """Bidirectional multi-head or grouped-query self-attention without biases."""

    def __init__(self, config: M3BertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # The flash interface counts the token itself; transformers' masks do not.
        local = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window + 1 if local else None
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def project(
        self, hidden_states, position_embeddings=None, repeated: RepeatedTokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values [batch, heads, tokens, head_dim], rotated by the tokens' positions.

        Tokens that are `repeated` are multiplied once where their states are equal.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        selected = None
        if repeated is not None and all(map(_is_plain_linear, projections)) and not torch.compiler.is_compiling():
            selected = repeated.select(hidden_states)
        if repeated is None or selected is None:
            states = [projection(hidden_states) for projection in projections]
        else:
            states = [repeated.spread(projection(selected)) for projection in projections]
        shape = hidden_states.shape[:-1]
        query, key, value = (part.view(*shape, -1, self.head_dim).transpose(1, 2) for part in states)
        if position_embeddings is not None:
            query = apply_rotary_pos_emb(query, *position_embeddings)
            key = apply_rotary_pos_emb(key, *position_embeddings)
        return query, key, value

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        shape = hidden_states.shape[:-1]
        documents, repeated = kwargs.pop("documents", None), kwargs.pop("repeated", None)
        query, key, value = self.project(hidden_states, position_embeddings, repeated)
        attend: Callable = sdpa_attention_forward
        if self.config._attn_implementation != "sdpa":
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "sliding_window": self.sliding_window,
            **kwargs,
        }
        if documents is not None:
            output, weights = documents.attend(attend, self, query, key, value, attention_mask, options), None
        else:
            output, weights = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class M3BertMLP(nn.Module):
    """SwiGLU feed-forward without biases."""

    def __init__(self, config: M3BertConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class M3BertLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer, [batch, tokens, hidden_size] to the same."""

    def __init__(self, config: M3BertConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = M3BertRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = M3BertAttention(config, layer_idx)
        self.post_attention_layernorm = M3BertRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = M3BertMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return self.feed_forward(hidden_states, attended)

    def feed_forward(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Add attention's output to the residual stream, then the feed-forward's: what follows attention, in one."""
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class M3BertPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all m3BERT models."""

    config: M3BertConfig
    config_class = M3BertConfig
    base_model_prefix = "model"
    input_modalities = "text"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M3BertEmbeddings", "M3BertLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": M3BertLayer, "attentions": M3BertAttention}

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        # Assignments made before this point may have gone around the configuration's own checks.
        config.validate()
        left_out = range(config.num_hidden_layers, config.checkpoint_layers)
        # Only what was left out on purpose: any other unexpected tensor is still reported.
        patterns = [rf"(^|\.)layers\.({'|'.join(map(str, left_out))})\."] if left_out else []
        if config.exit_norm == "none":
            patterns.append(rf"^({self.base_model_prefix}\.)?norm\.weight$")
        if isinstance(self, M3BertModel):
            # A checkpoint with its masked-language head is as good a source as one without.
            patterns += [r"^head\.", r"^decoder\."]
        self._keys_to_ignore_on_load_unexpected = patterns

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, M3BertRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, M3BertRotaryEmbedding):
            for layer_type in module.layer_types:
                inv_freq, _ = module.frequencies(layer_type)
                init.copy_(getattr(module, f"{layer_type}_inv_freq"), inv_freq)
                init.copy_(getattr(module, f"{layer_type}_original_inv_freq"), inv_freq)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint, or only the part of it that a shallower exit needs.

        | call | layers read and allocated | default exit |
        | --- | --- | --- |
        | `from_pretrained(path)` | all | as saved |
        | `from_pretrained(path, exit_layer=4)` | 4 | 4 |
        | `from_pretrained(path, num_hidden_layers=4)` | 4 | the deepest of them |
        | `from_pretrained(path, exit_layer=4, num_hidden_layers=12)` | 12 | 4 |

        Takes everything that [`~transformers.PreTrainedModel.from_pretrained`] takes; fields of [`M3BertConfig`] given
        as keywords override the saved ones, also beside a `config` object.

        Raises:
            ValueError: If the exit does not exist, or the fields do not fit one another.
            OSError: If the checkpoint's weights cannot be read, or lack tensors of the encoder. With
                `output_loading_info=True`, missing tensors are returned instead.
        """
        if isinstance(config, M3BertConfig) or hasattr(config, "with_overrides"):
            overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in type(config).__dataclass_fields__}
            # These are also arguments of from_pretrained itself.
            for key in ("dtype", "output_hidden_states"):
                if key in overrides:
                    kwargs[key] = overrides.pop(key)
            config = config.with_overrides(**overrides) if overrides else config
        report = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"The weights in {pretrained_model_name_or_path} cannot be read ({error}): the file is corrupt or "
                "incomplete. Download or copy it again."
            ) from error
        if report:
            return model, info
        prefix = "" if model.base_model is model else f"{cls.base_model_prefix}."
        missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
        if missing:
            raise OSError(
                f"The checkpoint {pretrained_model_name_or_path} lacks {len(missing)} tensors of the encoder, such as "
                f"{missing[:3]}: it is incomplete, or its config.json belongs to another model "
                f"(num_hidden_layers={model.config.num_hidden_layers}, "
                f"position_embedding_type={model.config.position_embedding_type!r}, "
                f"exit_norm={model.config.exit_norm!r})."
            )
        return model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as [`~transformers.PreTrainedModel.save_pretrained`] does, loadable from the Hub by every Auto class.

        The directory gets the source of the model beside its weights, and `config.json` names it for every Auto
        class and not only for the one saved, so that `AutoModel` loads what `M3BertForMaskedLM` saved.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


def _check_range(ids: torch.Tensor, limit: int, what: str, remedy: str) -> None:
    if ids.device.type == "meta" or is_tracing(ids) or not ids.numel():
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= limit:
        raise ValueError(f"{what} {low if low < 0 else high} is not within 0 and {limit - 1}. {remedy}")


class M3BertModel(M3BertPreTrainedModel):
    """The encoder: token ids to states [batch, tokens, hidden_size] at a chosen exit (arXiv 2605.19568)."""

    _auto_class = "AutoModel"

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.embeddings = M3BertEmbeddings(config)
        self.layers = nn.ModuleList([M3BertLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = None if config.exit_norm == "none" else M3BertRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = M3BertRotaryEmbedding(config) if config.position_embedding_type == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.embeddings.word_embeddings = value

    def exit_state(self, hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
        """Return what the model outputs at exit `layer`, given the residual stream after that layer."""
        if self.norm is None or (self.config.exit_norm == "last" and layer < len(self.layers)):
            return hidden_states
        return self.norm(hidden_states)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        exit_layer: int | None = None,
        output_exits: bool = False,
        **kwargs,
    ) -> M3BertModelOutput:
        """Encode a batch.

        Args:
            input_ids: Token ids [batch, tokens], int64.
            attention_mask: 1 for tokens and 0 for padding [batch, tokens]; or a prepared mask as transformers'
                `create_bidirectional_mask` makes, or a dictionary of these by layer type.
            position_ids: Positions [batch, tokens]. Where they do not count up by one, a new document begins: packed
                documents do not see one another, whatever the attention implementation.
            inputs_embeds: Token embeddings [batch, tokens, hidden_size] in place of `input_ids`.
            exit_layer: Layer to stop after, one of `config.exit_layers`; the layers above are not run. `None` is
                `config.exit_layer`.
            output_exits: Also return the state of every exit up to `exit_layer`.
            **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` for packed documents in one row
                (transformers' `DataCollatorWithFlattening`), `output_hidden_states`, `output_attentions`.

        Raises:
            ValueError: If the exit does not exist, an id is outside the vocabulary, a position or the input is longer
                than the model, or the mask does not fit the input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        exit_layer = self.config.resolve_exit_layer(exit_layer)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None:
            _check_range(
                input_ids,
                self.embeddings.word_embeddings.num_embeddings,
                "Token id",
                "The tokenizer does not belong to this model, or its new tokens need resize_token_embeddings.",
            )
        position_ids, packed = self._positions(inputs, position_ids, kwargs)
        padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if padding_mask and attention_mask.shape != inputs.shape[:2]:
            raise ValueError(
                f"`attention_mask` of shape {list(attention_mask.shape)} does not fit an input of "
                f"{list(inputs.shape[:2])} (batch, tokens)."
            )
        documents = self._documents(inputs, packed, attention_mask, kwargs)
        padding = None
        if documents is None and packed is None and padding_mask and self._unpads(attention_mask, kwargs):
            # The tokens alone, one text after another; what comes out is put back where the tokens stood.
            padding = attention_mask.bool()
            documents = PackedDocuments(padding.sum(dim=1).tolist(), inputs.device)
            position_ids = position_ids.expand(inputs.shape[:2])[padding][None]
            if input_ids is None:
                inputs_embeds = inputs_embeds[padding][None]
            else:
                input_ids = input_ids[padding][None]
        repeated = self._repeated(input_ids)
        hidden_states = self.embeddings(input_ids, inputs_embeds, position_ids)
        masks = self._masks(hidden_states, attention_mask, packed, documents)
        if documents is not None:
            kwargs["documents"] = documents
        angles = {}
        if self.rotary_emb is not None:
            angles = {kind: self.rotary_emb(hidden_states, position_ids, kind) for kind in self.rotary_emb.layer_types}

        exits = []
        for depth, layer in enumerate(self.layers[:exit_layer], start=1):
            kind = self.config.layer_types[depth - 1]
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=angles.get(kind),
                **({"repeated": repeated} if depth == 1 and repeated is not None else {}),
                **kwargs,
            )
            if depth == exit_layer or (output_exits and depth in self.config.exit_layers):
                state = self.exit_state(hidden_states, depth)
                exits.append(state if padding is None else padded(state, padding))
        return M3BertModelOutput(
            last_hidden_state=exits[-1], exit_hidden_states=tuple(exits) if output_exits else None
        )

    def _positions(self, inputs, position_ids, kwargs):
        """Return position ids [batch or 1, tokens] and, for packed input, the document of each token or `None`."""
        batch, tokens = inputs.shape[:2]
        longest = self.config.max_input_length
        boundaries = kwargs.get("cu_seq_lens_q")
        if boundaries is not None:
            if batch != 1 or (not is_tracing(boundaries) and int(boundaries[-1]) != tokens):
                raise ValueError(
                    "`cu_seq_lens_q` needs all documents in one row and must end with its number of tokens; got "
                    f"{batch} rows of {tokens} tokens."
                )
            index = torch.arange(tokens, device=inputs.device)
            packed = torch.bucketize(index, boundaries[1:].to(index.dtype), right=True)[None]
            if position_ids is None:
                position_ids = index[None] - boundaries.to(index.dtype)[packed[0]][None]
        elif position_ids is not None:
            position_ids = position_ids.expand(batch, tokens)
            packed = find_packed_sequence_indices(position_ids)
        else:
            if tokens > longest:
                raise ValueError(
                    f"The input has {tokens} tokens, the model takes at most {longest} (max_position_embeddings). "
                    f"Truncate it, as with tokenizer(..., truncation=True, max_length={longest})."
                )
            return torch.arange(tokens, device=inputs.device)[None], None
        _check_range(position_ids, longest, "Position", "Truncate the documents to the model's length.")
        if packed is not None and boundaries is None and is_flash_attention_requested(self.config):
            self._add_boundaries(packed, kwargs)
        return position_ids, packed

    @staticmethod
    def _add_boundaries(packed, kwargs):
        """Give the flash kernels the documents' boundaries, which they cannot read from a mask."""
        if packed.shape[0] != 1:
            raise ValueError(
                f"Flash attention takes packed documents in one row, got {packed.shape[0]} rows: concatenate them, as "
                "transformers' DataCollatorWithFlattening does, or use attn_implementation='sdpa'."
            )
        lengths = torch.bincount(packed[0])
        boundaries = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        kwargs.update(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=longest, max_length_k=longest)

    def _unpads(self, attention_mask, kwargs) -> bool:
        """Whether to leave padding out of everything but attention."""
        asked = self.config.unpad_inputs
        if asked is False or is_tracing(attention_mask) or self._records(kwargs):
            return False
        if is_flash_attention_requested(self.config) or self.config._attn_implementation == "flex_attention":
            return False
        # On a GPU the numbers of tokens would have to be waited for; there it is left to whoever has measured it.
        if asked is None and attention_mask.device.type != "cpu":
            return False
        if "sliding_attention" in self.config.layer_types:
            # A window counts places in the row: padding between tokens of a text takes part in it.
            starts = attention_mask[:, :1].sum(dim=1) + (attention_mask.int().diff(dim=1) > 0).sum(dim=1)
            if bool((starts > 1).any()):
                return False
        tokens = int(attention_mask.sum())
        # Little padding costs less than taking it out and putting it back, which gradients make dearer.
        fullest = 1.0 if asked else 0.9 if torch.is_grad_enabled() else 0.97
        return 0 < tokens <= fullest * attention_mask.numel()

    def _repeated(self, input_ids) -> RepeatedTokens | None:
        """Return which tokens are repeated, where the first layer's products need them once (not timed on a GPU)."""
        if input_ids is None or self.embeddings.position_embeddings is not None or torch.is_grad_enabled():
            return None
        if self.training or is_tracing(input_ids) or input_ids.device.type != "cpu":
            return None
        return RepeatedTokens.find(input_ids)

    def _records(self, kwargs) -> bool:
        """Whether states or weights of single layers are asked for, which keep the shape of the input."""
        names = ("output_attentions", "output_hidden_states")
        return any(kwargs.get(name) or getattr(self.config, name, False) for name in names)

    def _documents(self, inputs, packed, attention_mask, kwargs) -> PackedDocuments | None:
        """Return the documents of a packed row, for attention functions that would need a mask [tokens, tokens]."""
        boundaries = kwargs.get("cu_seq_lens_q")
        if packed is None or boundaries is None or is_tracing(boundaries) or self._records(kwargs):
            return None
        # A mask beside the boundaries hides tokens within documents, which only the mask of all pairs can say.
        plain = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and bool(attention_mask.all())
        if attention_mask is not None and not plain:
            return None
        if self.config._attn_implementation not in ("sdpa", "eager") or is_flash_attention_requested(self.config):
            return None
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        return PackedDocuments(boundaries.diff().tolist(), inputs.device)

    def _masks(self, hidden_states, attention_mask, packed, documents=None):
        if isinstance(attention_mask, dict):
            return attention_mask
        makers = {
            "full_attention": create_bidirectional_mask,
            "sliding_attention": create_bidirectional_sliding_window_mask,
        }
        if documents is not None:
            masks = {}
            for kind in set(self.config.layer_types):
                masks[kind] = [
                    makers[kind](
                        config=self.config,
                        inputs_embeds=hidden_states.new_empty(*place.shape, 1),
                        attention_mask=valid,
                    )
                    for place, valid in zip(documents.places, documents.valid, strict=True)
                ]
            return masks
        arguments = {
            "config": self.config,
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "and_mask_function": None if packed is None else packed_sequence_mask_function(packed),
        }
        return {kind: makers[kind](**arguments) for kind in set(self.config.layer_types)}


class M3BertPredictionHead(nn.Module):
    """Dense, activation and RMSNorm on the first d dimensions, with the first d rows and columns of the weights."""

    def __init__(self, config: M3BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = M3BertRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        dense = F.linear(hidden_states, self.dense.weight[:width, :width], self.dense.bias[:width])
        return self.norm(self.act_fn(dense))


class M3BertForMaskedLM(M3BertPreTrainedModel):
    """m3BERT with its masked-language-model head, which exists once for all exits and is sliced per dimension.

    Attributes:
        loss_options: What the loss sums; an [`MLMLossOptions`] that may be replaced, and is not saved.
    """

    _auto_class = "AutoModelForMaskedLM"
    _tied_weights_keys = {"decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.model = M3BertModel(config)
        self.head = M3BertPredictionHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.loss_options = MLMLossOptions()
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the decoder."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder."""
        self.decoder = new_embeddings

    def _deepest_scored(self, output_logits: bool | None) -> int:
        """Return the deepest exit that the loss reads, or the logits."""
        pairs = self.loss_options.resolve(self.config.exit_layers, self.config.matryoshka_dimensions)
        deepest = max(layer for layer, _ in pairs)
        return max(deepest, self.config.resolve_exit_layer()) if output_logits else deepest

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        exit_layer: int | None = None,
        truncate_dim: int | None = None,
        output_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> M3BertMaskedLMOutput:
        """Predict masked tokens, or with `labels` compute the multigranular pretraining loss.

        Args:
            input_ids: Token ids [batch, tokens]; as the next three, see [`M3BertModel.forward`].
            attention_mask: Padding mask.
            position_ids: Positions.
            inputs_embeds: Embeddings in place of ids.
            labels: Token to predict at each position [batch, tokens], -100 for none. The loss is the sum over the
                (exit, dimension) pairs that `loss_options` names, by default all of the configuration; an
                `exit_layer` or `truncate_dim` given in the call restricts it to that one, plainly.
            exit_layer: Exit of the logits; `None` is `config.exit_layer`.
            truncate_dim: Dimension of the logits; `None` is `config.truncate_dim`.
            output_logits: Whether to compute logits; `None` means only without `labels`, since training never needs
                [batch, tokens, vocab_size].
            num_items_in_batch: Labelled tokens of the whole batch that this call is a part of (the Trainer passes it).
            **kwargs: As in [`M3BertModel.forward`].

        Raises:
            ValueError: If the exit or dimension does not exist, or a label is outside the vocabulary.
        """
        width = self.config.resolve_truncate_dim(truncate_dim)
        every_exit = labels is not None and exit_layer is None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            exit_layer=self._deepest_scored(output_logits) if every_exit else exit_layer,
            output_exits=every_exit,
            **kwargs,
        )
        scored = logits = None
        if labels is not None:
            restricted = not every_exit or truncate_dim is not None
            scored = multigranular_mlm_loss(
                outputs.exit_hidden_states if every_exit else [outputs.last_hidden_state],
                labels,
                self.head,
                self.decoder,
                self.config.exit_layers if every_exit else [self.config.resolve_exit_layer(exit_layer)],
                self.config.matryoshka_dimensions if truncate_dim is None else [width],
                num_items_in_batch,
                MLMLossOptions(reduction=self.loss_options.reduction) if restricted else self.loss_options,
                self.training,
            )
        if output_logits or (output_logits is None and labels is None):
            state = outputs.last_hidden_state
            if every_exit:
                state = outputs.exit_hidden_states[self.config.exit_layers.index(self.config.resolve_exit_layer())]
            state = self.head(state[..., :width])
            logits = F.linear(state, self.decoder.weight[:, :width], self.decoder.bias)
        return M3BertMaskedLMOutput(
            loss=None if scored is None else scored.loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            granularity_losses=None if scored is None else scored.granularity_losses,
            granularity_accuracies=None if scored is None else scored.granularity_accuracies,
        )


class M3BertTaskModel(M3BertPreTrainedModel):
    """An encoder with a linear classifier on the first `config.truncate_dim` dimensions of its exit."""

    num_outputs: int | None = None

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = M3BertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.resolve_truncate_dim(), self.num_outputs or config.num_labels)
        self.post_init()

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Classify [..., hidden_size] by its first dimensions."""
        return self.classifier(self.dropout(states[..., : self.classifier.in_features]))

    def pool(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return one vector [batch, hidden_size] for each row, by `config.classifier_pooling`."""
        if attention_mask is None:
            attention_mask = torch.ones(states.shape[:2], device=states.device, dtype=torch.long)
        if self.config.classifier_pooling == "cls":
            # The first token that is not padding, which with padding on the left is not the first of the row.
            return states[torch.arange(states.shape[0], device=states.device), attention_mask.int().argmax(dim=1)]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _refuse_packed(attention_mask, kwargs):
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("A classifier of whole texts needs one text a row: pass padded input, not packed documents.")
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        raise ValueError("A classifier of whole texts needs a mask [batch, tokens] to pool by.")


class M3BertForSequenceClassification(M3BertTaskModel):
    """m3BERT with a classifier or regressor of whole texts."""

    _auto_class = "AutoModelForSequenceClassification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Return logits [batch, labels] and, with `labels` [batch], the loss that `config.problem_type` names."""
        _refuse_packed(attention_mask, kwargs)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        logits = self.score(self.pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class M3BertForTokenClassification(M3BertTaskModel):
    """m3BERT with a classifier of tokens."""

    _auto_class = "AutoModelForTokenClassification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Return logits [batch, tokens, labels] and, with `labels` [batch, tokens], the mean cross entropy."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class M3BertForQuestionAnswering(M3BertTaskModel):
    """m3BERT with a head that finds the span of an answer."""

    _auto_class = "AutoModelForQuestionAnswering"
    num_outputs = 2

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Return start and end logits [batch, tokens] and, with both positions [batch], the mean of their losses."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.score(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class M3BertForMultipleChoice(M3BertTaskModel):
    """m3BERT with a head that scores each of several choices."""

    _auto_class = "AutoModelForMultipleChoice"
    num_outputs = 1

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Return logits [batch, choices] from inputs [batch, choices, tokens] and, with `labels` [batch], the loss."""
        _refuse_packed(None, kwargs)
        given = input_ids if input_ids is not None else inputs_embeds
        choices = given.shape[1]

        def flat(tensor):
            return None if tensor is None else tensor.flatten(0, 1)

        mask = flat(attention_mask)
        outputs = self.model(flat(input_ids), mask, flat(position_ids), flat(inputs_embeds), **kwargs)
        logits = self.score(self.pool(outputs.last_hidden_state, mask)).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "M3BertForMaskedLM",
    "M3BertForMultipleChoice",
    "M3BertForQuestionAnswering",
    "M3BertForSequenceClassification",
    "M3BertForTokenClassification",
    "M3BertModel",
    "M3BertPreTrainedModel",
]
