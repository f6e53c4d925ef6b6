"""The released model written out plainly, for parity: its own parameter names, one dense cross entropy per pair."""

import torch
import torch.nn.functional as F


def released_config(**fields) -> dict:
    """A released-format config.json."""
    values = {
        "architectures": ["CustomLlamaForMLM"],
        "model_type": "llama",
        "mrl_dims": [5, 12, 24],
        "mrl_layers": [1, 3],
        "cur_dim": 24,
        "bi_attn": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "input_dropout": 0.0,
        "hidden_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 19,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 77,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return {**values, **fields}


def released_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(seed)
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]

    def normal(*shape):
        return torch.randn(shape) * 0.2

    weights = {
        "model.embed_tokens.weight": normal(vocabulary, width),
        "model.pos_embeddings.weight": normal(config["max_position_embeddings"], width),
        "model.input_norm.weight": 1 + normal(width),
        "model.norm.weight": 1 + normal(width),
        "lm_head.dense.weight": normal(width, width),
        "lm_head.dense.bias": normal(width),
        "lm_head.layer_norm.weight": 1 + normal(width),
        "lm_head.decoder.weight": normal(vocabulary, width),
        "lm_head.decoder.bias": normal(vocabulary),
    }
    weights["lm_head.bias"] = weights["lm_head.decoder.bias"].clone()
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = normal(width, width)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(inner, width)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(inner, width)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(width, inner)
        weights[f"{prefix}input_layernorm.weight"] = 1 + normal(width)
        weights[f"{prefix}post_attention_layernorm.weight"] = 1 + normal(width)
    return weights


def _norm(x, weight, eps):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def residual_streams(weights, config, ids, mask) -> list[torch.Tensor]:
    """The raw state after every layer."""
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    x = weights["model.embed_tokens.weight"][ids] + weights["model.pos_embeddings.weight"][: ids.shape[1]]
    x = _norm(x, weights["model.input_norm.weight"], eps)
    states = []
    for i in range(config["num_hidden_layers"]):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if k.startswith(f"model.layers.{i}.")}
        h = _norm(x, w["input_layernorm.weight"], eps)
        q, k, v = (
            (h @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("q", "k", "v")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attended @ w["self_attn.o_proj.weight"].T
        h = _norm(x, w["post_attention_layernorm.weight"], eps)
        gated = F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + gated @ w["mlp.down_proj.weight"].T
        states.append(x)
    return states


def logits(weights, config, state, d) -> torch.Tensor:
    """Logits of the first d dimensions of a state."""
    h = state[..., :d] @ weights["lm_head.dense.weight"][:d, :d].T + weights["lm_head.dense.bias"][:d]
    h = _norm(F.silu(h), weights["lm_head.layer_norm.weight"][:d], config["rms_norm_eps"])
    return h @ weights["lm_head.decoder.weight"][:, :d].T + weights["lm_head.decoder.bias"]


def released_losses(weights, config, ids, mask, labels, normed_exits=False) -> torch.Tensor:
    """Mean cross entropy of every (exit, dimension) [exits, dimensions]; dense logits at every position."""
    states = residual_streams(weights, config, ids, mask)
    rows = []
    for layer in config["mrl_layers"]:
        state = states[layer - 1]
        if normed_exits or layer == config["num_hidden_layers"]:
            state = _norm(state, weights["model.norm.weight"], config["rms_norm_eps"])
        rows.append(
            torch.stack(
                [
                    F.cross_entropy(logits(weights, config, state, d).flatten(0, 1), labels.flatten())
                    for d in config["mrl_dims"]
                ]
            )
        )
    return torch.stack(rows)
