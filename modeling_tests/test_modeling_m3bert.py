import copy
import itertools
import json
import logging
import subprocess
import sys

import pytest
import torch
from conftest import tiny_batch, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface, AutoModel

from m3bert_hf import (
    M3BertForMaskedLM,
    M3BertForMultipleChoice,
    M3BertForQuestionAnswering,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
    modeling_m3bert,
)
from m3bert_hf.modeling_m3bert import M3BertRMSNorm, apply_rotary_pos_emb
from m3bert_hf.packing_m3bert import PackedDocuments


ARCHITECTURES = {
    "released": {},
    "rotary": {"position_embedding_type": "rotary"},
    "local": {"position_embedding_type": "rotary", "global_attn_every_n_layers": 2, "local_attention": 6},
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "last-norm": {"exit_norm": "last"},
    "absolute-local": {"global_attn_every_n_layers": 3, "local_attention": 4, "num_key_value_heads": 1},
}


def make(model_class=M3BertModel, attention="sdpa", seed=0, **fields):
    torch.manual_seed(seed)
    config = tiny_config(**fields)
    config._attn_implementation = attention
    return model_class(config).eval()


def pack(ids, mask):
    """Documents of a padded batch in one row, as DataCollatorWithFlattening makes it."""
    lengths = mask.sum(dim=1)
    row = ids[mask.bool()][None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return row, positions, boundaries, int(lengths.max())


# ---------------------------------------------------------------- promise 1: exits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_to_an_exit_gives_the_same_state(name, tmp_path):
    model = make(**ARCHITECTURES[name])
    ids, mask = tiny_batch(model.config)
    with torch.no_grad():
        exits = model(ids, mask, output_exits=True).exit_hidden_states
        assert len(exits) == len(model.config.exit_layers)
        model.save_pretrained(tmp_path)
        for layer, from_full in zip(model.config.exit_layers, exits, strict=True):
            asked = model(ids, mask, exit_layer=layer)
            assert torch.equal(asked.last_hidden_state, from_full)
            cut = M3BertModel.from_pretrained(tmp_path, exit_layer=layer).eval()
            assert len(cut.layers) == layer
            torch.testing.assert_close(cut(ids, mask).last_hidden_state, from_full, atol=1e-5, rtol=0)
            with torch.device("cpu"):
                cut.save_pretrained(tmp_path / str(layer))
            again = M3BertModel.from_pretrained(tmp_path / str(layer)).eval()
            torch.testing.assert_close(again(ids, mask).last_hidden_state, from_full, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_exits_padding_and_packing_agree_for_random_configurations(data, tmp_path_factory):
    heads = data.draw(st.sampled_from([1, 2, 4, 6]), "heads")
    head_dim = data.draw(st.sampled_from([4, 6, 10]), "head_dim")
    depth = data.draw(st.integers(1, 5), "depth")
    width = heads * head_dim
    fields = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0]), "kv"),
        "num_hidden_layers": depth,
        "exit_layers": sorted(data.draw(st.sets(st.integers(1, depth)), "exits") | {depth}),
        "matryoshka_dimensions": sorted(data.draw(st.sets(st.integers(1, width), min_size=1), "dims")),
        "position_embedding_type": data.draw(st.sampled_from(["absolute", "rotary"]), "positions"),
        "global_attn_every_n_layers": data.draw(st.integers(1, 3), "every"),
        "local_attention": data.draw(st.integers(2, 9), "window"),
        "tie_word_embeddings": data.draw(st.booleans(), "tied"),
        "exit_norm": data.draw(st.sampled_from(["shared", "last"]), "norm"),
    }
    attention = data.draw(st.sampled_from(["eager", "sdpa"]), "attention")
    lengths = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=4), "lengths")
    model = make(M3BertForMaskedLM, attention, seed=data.draw(st.integers(0, 3), "seed"), **fields)
    ids, mask = tiny_batch(model.config, lengths)
    path = tmp_path_factory.mktemp("random")
    model.save_pretrained(path)
    row, positions, boundaries, _ = pack(ids, mask)
    with torch.no_grad():
        exits = model.model(ids, mask, output_exits=True).exit_hidden_states
        for layer, state in zip(model.config.exit_layers, exits, strict=True):
            cut = M3BertForMaskedLM.from_pretrained(path, num_hidden_layers=layer).eval()
            singles = [
                model.model(ids[i : i + 1, :n], exit_layer=layer).last_hidden_state[0] for i, n in enumerate(lengths)
            ]
            for other in (
                model.model(ids, mask, exit_layer=layer).last_hidden_state[mask.bool()],
                cut.model(ids, mask).last_hidden_state[mask.bool()],
                torch.cat(singles),
                model.model(row, position_ids=positions, exit_layer=layer).last_hidden_state[0],
                cut.model(row, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries).last_hidden_state[0],
            ):
                # Raw residual streams (exit_norm="last") are larger than 1, and float error grows with them.
                scale = max(1.0, state.abs().max().item())
                torch.testing.assert_close(other, state[mask.bool()], atol=1e-5 * scale, rtol=1e-5)


def test_the_head_reads_what_the_exit_returns():
    model = make(M3BertForMaskedLM)
    ids, mask = tiny_batch(model.config)
    with torch.no_grad():
        for layer in model.config.exit_layers:
            for width in (*model.config.matryoshka_dimensions, 5):
                state = model.model(ids, mask, exit_layer=layer).last_hidden_state[..., :width]
                hidden = torch.nn.functional.linear(state, model.head.dense.weight[:width, :width])
                hidden = torch.nn.functional.silu(hidden + model.head.dense.bias[:width])
                hidden = hidden * (hidden.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
                hidden = hidden * model.head.norm.weight[:width]
                expected = hidden @ model.decoder.weight[:, :width].T + model.decoder.bias
                logits = model(ids, mask, exit_layer=layer, truncate_dim=width).logits
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- promise 2: padding and packing


# Flex attention is slow without a GPU: two architectures hold between them all that its masks depend on.
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for attention in ("eager", "sdpa") for name in ARCHITECTURES]
    + [("local", "flex_attention"), ("grouped", "flex_attention")],
)
def test_padded_packed_and_single_agree(name, attention):
    # Flex attention needs heads of at least 16.
    model = make(attention=attention, **{**ARCHITECTURES[name], "hidden_size": 64, "matryoshka_dimensions": [64]})
    ids, mask = tiny_batch(model.config, (16, 9, 3))
    row, positions, boundaries, longest = pack(ids, mask)
    with torch.no_grad():
        padded = model(ids, mask).last_hidden_state[mask.bool()]
        single = torch.cat([model(ids[i : i + 1, :n]).last_hidden_state[0] for i, n in enumerate((16, 9, 3))])
        by_positions = model(row, position_ids=positions).last_hidden_state[0]
        by_boundaries = model(
            row, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=longest, max_length_k=longest
        ).last_hidden_state[0]
    for other in (single, by_positions, by_boundaries):
        # Products of different shapes take different kernels, whose float error depends on the processor.
        torch.testing.assert_close(other, padded, atol=1e-4, rtol=1e-4)


def test_packed_documents_do_not_see_one_another():
    model = make()
    ids, mask = tiny_batch(model.config)
    row, positions, _, _ = pack(ids, mask)
    changed = row.clone()
    changed[:, 11:] = 5
    with torch.no_grad():
        before = model(row, position_ids=positions).last_hidden_state[:, :11]
        after = model(changed, position_ids=positions).last_hidden_state[:, :11]
    assert torch.equal(before, after)


def test_padding_on_the_left_and_packed_rows_with_padding():
    model = make()
    ids, mask = tiny_batch(model.config)
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
        left = torch.full_like(ids, 1)
        left_mask = torch.zeros_like(mask)
        positions = torch.zeros_like(ids)
        for i, n in enumerate(mask.sum(1)):
            left[i, -n:], left_mask[i, -n:], positions[i, -n:] = ids[i, :n], 1, torch.arange(n)
        got = model(left, left_mask, positions).last_hidden_state
        for i, n in enumerate(mask.sum(1)):
            torch.testing.assert_close(got[i, -n:], expected[i, :n], atol=1e-5, rtol=1e-5)


def test_a_row_of_padding_alone_stays_finite():
    for attention in ("eager", "sdpa"):
        model = make(attention=attention)
        ids, mask = tiny_batch(model.config)
        mask[1] = 0
        with torch.no_grad():
            states = model(ids, mask).last_hidden_state
        assert states.isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"position_embedding_type": "rotary", "num_key_value_heads": 2},
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 2},
    ],
)
def test_takes_the_calls_of_vllm_s_transformers_backend(fields):
    """All texts in one row, told apart by their positions, no mask, and an attention layer for each of the model's."""
    torch.manual_seed(0)
    lengths = (5, 1, 9)
    reference = M3BertModel(tiny_config(**fields)).eval()

    class Layer:
        def __init__(self, attention):
            self.attention = attention

        def forward(self, *states):
            outputs = []
            for text in zip(*(x.split(lengths) for x in states), strict=True):
                heads = [x.view(len(x), -1, self.attention.head_dim).transpose(0, 1) for x in text]
                mask = None
                if self.attention.sliding_window:
                    places = torch.arange(len(text[0]))
                    mask = (places[:, None] - places).abs() < self.attention.sliding_window
                options = {"attn_mask": mask, "scale": self.attention.scaling, "enable_gqa": True}
                output = nn.functional.scaled_dot_product_attention(*(x[None] for x in heads), **options)
                outputs.append(output[0].transpose(0, 1).flatten(1))
            return torch.cat(outputs)

    def attend(module, query, key, value, attention_mask, attention_instances, **kwargs):
        assert attention_mask is None and not module.is_causal
        rows = (x.transpose(1, 2).flatten(2)[0] for x in (query, key, value))
        return attention_instances[module.layer_idx].forward(*rows), None

    AttentionInterface.register("vllm", attend)
    config = copy.deepcopy(reference.config)
    config._attn_implementation = "vllm"
    model = AutoModel.from_config(config).eval()
    assert model.get_decoder() is model and model.is_backend_compatible()
    model.load_state_dict(reference.state_dict())
    ids = torch.randint(4, config.vocab_size, (1, sum(lengths)))
    with torch.inference_mode():
        states = model(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            use_cache=False,
            attention_instances={layer.self_attn.layer_idx: Layer(layer.self_attn) for layer in model.layers},
            return_dict=False,
        )[0]
        for text, state in zip(ids.split(lengths, dim=1), states.split(lengths, dim=1), strict=True):
            assert torch.allclose(state, reference(text).last_hidden_state, atol=1e-5)


def test_flash_attention_gets_the_boundaries_of_packed_documents(monkeypatch):
    """The flash kernels need a GPU; what they are called with does not."""
    seen = {}

    def varlen(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs)
        starts = kwargs["cu_seq_lens_q"].tolist()
        out = torch.zeros_like(query)
        for a, b in itertools.pairwise(starts):
            part = [x[:, :, a:b] for x in (query, key, value)]
            out[:, :, a:b] = nn.functional.scaled_dot_product_attention(*part)
        return out.transpose(1, 2).contiguous(), None

    from m3bert_hf import modeling_m3bert

    model = make()
    ids, mask = tiny_batch(model.config)
    row, positions, boundaries, longest = pack(ids, mask)
    with torch.no_grad():
        expected = model(row, position_ids=positions).last_hidden_state
    monkeypatch.setattr(modeling_m3bert, "is_flash_attention_requested", lambda config: True)
    monkeypatch.setattr(modeling_m3bert.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: varlen)
    monkeypatch.setattr(M3BertModel, "_masks", lambda *_: {"full_attention": None})
    with torch.no_grad():
        got = model(row, position_ids=positions).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["cu_seq_lens_q"], boundaries) and seen["max_length_q"] == longest
    with pytest.raises(ValueError, match="in one row"):
        model(row.repeat(2, 1), position_ids=positions.repeat(2, 1))


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("side", "alone"), [("right", 1), ("left", 6), ("holes", 32)])
def test_without_padding_the_same_states_and_gradients(architecture, attention, side, alone, monkeypatch):
    monkeypatch.setattr(PackedDocuments, "alone", alone)
    monkeypatch.setattr(PackedDocuments, "run", alone)
    model = make(attention=attention, **ARCHITECTURES[architecture])
    ids, mask = tiny_batch(model.config, lengths=(11, 7, 1, 6, 5))
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    elif side == "holes":
        mask[0, 4:6] = 0
    found = []
    for unpad in (True, False, None):
        model.config.unpad_inputs = unpad
        model.zero_grad()
        output = model(ids, mask, output_exits=True)
        tokens = torch.cat([state[mask.bool()] for state in output.exit_hidden_states])
        (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
        with torch.no_grad():
            alone_or_not = model(ids, mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(alone_or_not, output.last_hidden_state[mask.bool()], atol=1e-4, rtol=1e-3)
        found.append([tokens, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for unpadded in (found[0], found[2]):
        for a, b in zip(unpadded, found[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_only_attention_sees_padding():
    model = make()
    ids, mask = tiny_batch(model.config, lengths=(11, 7, 1, 6, 5))
    seen = []
    model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    with torch.no_grad():
        padded = model(ids, mask).last_hidden_state
        model(ids, torch.ones_like(mask))
        model.config.unpad_inputs = False
        model(ids, mask)
    assert seen == [(1, 30), (5, 11), (5, 11)]
    assert not padded[mask == 0].any()


def test_a_mask_beside_packed_documents_is_heeded():
    model = make()
    ids, mask = tiny_batch(model.config, lengths=(9, 7))
    row, _, boundaries, longest = pack(ids, mask)
    options = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    options.update(max_length_q=longest, max_length_k=longest)
    hidden = torch.ones_like(row)
    hidden[0, 2] = 0
    with torch.no_grad():
        plain = model(row, **options).last_hidden_state
        torch.testing.assert_close(
            model(row, torch.ones_like(row), **options).last_hidden_state, plain, atol=1e-5, rtol=1e-5
        )
        masked = model(row, hidden, **options).last_hidden_state
        recorded = model(row, hidden, output_hidden_states=True, **options).last_hidden_state
    assert not torch.allclose(masked, plain, atol=1e-3)
    torch.testing.assert_close(masked, recorded, atol=1e-5, rtol=1e-5)


def test_packed_rows_need_no_mask_of_all_pairs(monkeypatch):
    from m3bert_hf import modeling_m3bert

    model = make()
    ids, mask = tiny_batch(model.config, lengths=(11, 7, 1, 6, 5))
    row, _, boundaries, longest = pack(ids, mask)
    largest = []
    attend = modeling_m3bert.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watching(module, query, *args, **kwargs):
        largest.append(query.shape[2])
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling_m3bert.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: watching)
    options = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    options.update(max_length_q=longest, max_length_k=longest)
    with torch.no_grad():
        packed = model(row, **options).last_hidden_state[0]
        padded = model(ids, mask).last_hidden_state[mask.bool()]
    assert max(largest) == 11
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- promise 3: depth not asked for


def test_layers_above_the_exit_are_not_run():
    model = make()
    ran = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    ids, mask = tiny_batch(model.config)
    for layer in model.config.exit_layers:
        ran.clear()
        output = model(ids, mask, exit_layer=layer, output_hidden_states=True)
        assert ran == list(range(layer))
        assert len(output.hidden_states) == layer + 1


def test_layers_above_the_exit_are_not_allocated_or_reported(tmp_path, caplog):
    make().save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    for arguments in ({"exit_layer": 3}, {"num_hidden_layers": 3}):
        caplog.clear()
        model, info = M3BertModel.from_pretrained(tmp_path, output_loading_info=True, **arguments)
        assert len(model.layers) == 3
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert "UNEXPECTED" not in caplog.text


def test_real_mismatches_are_still_reported(tmp_path):
    from safetensors.torch import load_file, save_file

    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    weights["stray.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = M3BertModel.from_pretrained(tmp_path, exit_layer=1, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"layers.9.mlp.up_proj.weight", "stray.weight"}


def test_loading_a_part_takes_the_memory_of_the_part(tmp_path):
    """Real sizes are in benchmarks/loading.py; here the whole file is 60 MB and the part 16 MB."""
    fields = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "matryoshka_dimensions": [256]}
    torch.manual_seed(0)
    config = tiny_config(**fields, exit_layers=[1, 12])
    M3BertModel(config).save_pretrained(tmp_path)
    code = (
        "import sys, torch\nfrom m3bert_hf import M3BertModel\n"
        f"M3BertModel.from_pretrained({str(tmp_path)!r}, exit_layer=1)\n"
        "import resource\nbase = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"model = M3BertModel.from_pretrained({str(tmp_path)!r}, **eval(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base, sum(p.nbytes for p in model.parameters()))"
    )
    grown = {}
    for arguments in ("{'exit_layer': 1}", "{}"):
        result = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True)
        grown[arguments] = [int(value) for value in result.stdout.split()[-2:]]
    part, whole = grown["{'exit_layer': 1}"], grown["{}"]
    assert part[1] < whole[1] / 5
    assert part[0] * 1024 < 0.5 * whole[1]


# ---------------------------------------------------------------- promise 5: bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_layer": 2}, r"exit_layer=2 does not exist: this model can exit at \[1, 3, 4\]"),
        ({"exit_layer": 99}, "exit_layer=99"),
        ({"exit_layer": True}, "exit_layer=True"),
        ({"input_ids": torch.tensor([[5, 101]])}, "Token id 101 is not within 0 and 100"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "Token id -1"),
        ({"input_ids": torch.ones(1, 49, dtype=torch.long)}, "49 tokens, the model takes at most 48"),
        ({"attention_mask": torch.ones(1, 5)}, "does not fit"),
        ({"input_ids": None}, "exactly one"),
        ({"position_ids": torch.tensor([[0, 48]])}, "Position 48"),
        ({"cu_seq_lens_q": torch.tensor([0, 1])}, "cu_seq_lens_q"),
    ],
)
def test_bad_input_is_named(arguments, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.tensor([[5, 6]]), **arguments})


def test_bad_dimensions_and_labels_are_named():
    model = make(M3BertForMaskedLM)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="truncate_dim=33 does not exist"):
        model(ids, truncate_dim=33)
    with pytest.raises(ValueError, match="Label 101 is outside the vocabulary"):
        model(ids, labels=torch.tensor([[101, -100]]))
    with pytest.raises(ValueError, match="Label -7"):
        model(ids, labels=torch.tensor([[-7, -100]]))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing-layer"])
def test_damaged_checkpoints_are_refused(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    make(M3BertForMaskedLM).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 4000)
    else:
        weights = {k: v for k, v in load_file(file).items() if ".layers.2." not in k}
        save_file(weights, file, {"format": "pt"})
    for model_class in (M3BertModel, M3BertForMaskedLM):
        with pytest.raises(OSError, match=r"corrupt or incomplete|lacks \d+ tensors"):
            model_class.from_pretrained(tmp_path)
    if damage == "missing-layer":
        assert len(M3BertModel.from_pretrained(tmp_path, exit_layer=1).layers) == 1


# ---------------------------------------------------------------- what the library expects of a model


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_compiles_without_graph_breaks_at_every_exit(layer):
    for name in ("released", "local"):
        torch._dynamo.reset()
        model = make(**ARCHITECTURES[name])
        ids, mask = tiny_batch(model.config)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            got, wanted = (m(ids, mask, exit_layer=layer).last_hidden_state[mask.bool()] for m in (compiled, model))
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_changes_nothing(attention):
    model = make(M3BertForMaskedLM, attention).train()
    ids, mask = tiny_batch(model.config)
    grads = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_every_parameter_is_trained():
    model = make(M3BertForMaskedLM).train()
    ids, mask = tiny_batch(model.config)
    model(ids, mask, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_hidden_states_attentions_and_embeddings():
    model = make(attention="eager")
    ids, mask = tiny_batch(model.config)
    output = model(ids, mask, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    assert output.attentions[0].shape == (3, 4, 11, 11)
    embeds = model.get_input_embeddings()(ids)
    state = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(state[mask.bool()], output.last_hidden_state[mask.bool()])
    picked = model(ids, mask, output_hidden_states=[2]).hidden_states
    assert sum(state is not None for state in picked) <= 2


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_work_at_every_granularity(tied, tmp_path):
    model = make(M3BertForMaskedLM, tie_word_embeddings=tied)
    model.resize_token_embeddings(120)
    ids = torch.tensor([[5, 119, 7]])
    assert model(ids, exit_layer=1, truncate_dim=8).logits.shape == (1, 3, 120)
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    again = M3BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_lora_trains_only_its_adapters():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(M3BertForMaskedLM), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    ids, mask = tiny_batch(model.config)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(dtype):
    model = make(initializer_range=0.05)
    ids, mask = tiny_batch(model.config)
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state[mask.bool()]
        got = copy.deepcopy(model).to(dtype)(ids, mask).last_hidden_state[mask.bool()]
    assert got.dtype == dtype
    assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1).min() > 0.99


def test_device_map(tmp_path):
    make().save_pretrained(tmp_path)
    model = M3BertModel.from_pretrained(tmp_path, device_map={"": "cpu"}, exit_layer=3)
    assert model(torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 32)


ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 24},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 24,
    },
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_scores_depend_on_distance_alone(kind, tmp_path):
    parameters = {"rope_type": kind, "rope_theta": 1000.0, **ROPE[kind]}
    model = make(position_embedding_type="rotary", rope_parameters=parameters)
    ids, _ = tiny_batch(model.config, (20,))
    with torch.no_grad():
        start = model(ids, position_ids=torch.arange(20)[None]).last_hidden_state
        moved = model(ids, position_ids=torch.arange(3, 23)[None]).last_hidden_state
        torch.testing.assert_close(start, moved, atol=1e-3, rtol=1e-3)
        plain = make(position_embedding_type="rotary")(ids).last_hidden_state
        assert not torch.allclose(start, plain, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = M3BertModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state)
        longest = model.config.max_input_length
        assert longest == (96 if kind in ("linear", "dynamic") else 48)
        assert model(torch.ones(1, longest, dtype=torch.long)).last_hidden_state.isfinite().all()
        with pytest.raises(ValueError, match=f"{longest + 1} tokens, the model takes at most {longest}"):
            model(torch.ones(1, longest + 1, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_norm_without_gradients_is_that_with_them(dtype, scale, monkeypatch):
    norm = M3BertRMSNorm(64, 1e-6).to(dtype)
    norm.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    states = (scale * torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(0))).to(dtype)
    before, expected = states.clone(), norm(states)
    exact = states.double() * (states.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    exact = exact * norm.weight[:48].double()
    chains = []
    rms_norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *a, **k: chains.append(1) or rms_norm(*a, **k))
    with torch.no_grad():
        found = norm(states)
    assert bool(chains) == (dtype == torch.float32), "in low precision by fewer operations"
    assert torch.equal(states, before) and found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=eps)
    torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 4])
def test_rotation_without_gradients_is_that_with_them(dtype, width, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    # As projections give it: heads within tokens, beside other heads.
    states = torch.randn(2, 5, 6, 8, generator=generator).to(dtype).transpose(1, 2)[:, :4]
    angles = torch.rand(1, 5, width // 2, generator=generator).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before, expected = states.clone(), apply_rotary_pos_emb(states, cos, sin)
    monkeypatch.setattr(modeling_m3bert, "rotate_half", None)
    with torch.no_grad():
        found = apply_rotary_pos_emb(states, cos, sin)
    assert torch.equal(states, before)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert torch.equal(found[..., width:], states[..., width:])
    torch.testing.assert_close(found.float().norm(dim=-1), states.float().norm(dim=-1), rtol=0.02, atol=0)


def test_local_layers_see_their_window_only():
    fields = {"num_hidden_layers": 1, "exit_layers": [1], "layer_types": ["sliding_attention"], "local_attention": 4}
    model = make(position_embedding_type="rotary", **fields)
    ids, _ = tiny_batch(model.config, (12,))
    changed = ids.clone()
    changed[0, 0] = 5 if ids[0, 0] != 5 else 6
    with torch.no_grad():
        moved = (model(ids).last_hidden_state != model(changed).last_hidden_state).any(-1)[0]
    assert moved[:3].all() and not moved[3:].any()


def test_dropout_acts_in_training_only():
    model = make(attention_dropout=0.3, hidden_dropout=0.3, embedding_dropout=0.3)
    ids, mask = tiny_batch(model.config)
    assert torch.equal(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    model.train()
    assert not torch.equal(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("width", [None, 8])
def test_sequence_classification(pooling, width):
    model = make(M3BertForSequenceClassification, classifier_pooling=pooling, truncate_dim=width, num_labels=3)
    assert model.classifier.in_features == (width or 32)
    ids, mask = tiny_batch(model.config)
    output = model(ids, mask, labels=torch.tensor([0, 1, 2]))
    output.loss.backward()
    single = torch.cat([model(ids[i : i + 1, :n]).logits for i, n in enumerate((11, 7, 1))])
    torch.testing.assert_close(single, output.logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids, mask, exit_layer=1).logits, output.logits)
    with pytest.raises(ValueError, match="one text a row"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 5, 11]))


def test_regression_and_multi_label_classification():
    ids = torch.tensor([[5, 6], [7, 8]])
    regression = make(M3BertForSequenceClassification, num_labels=1)
    assert regression(ids, labels=torch.tensor([0.5, 1.0])).loss.isfinite()
    several = make(M3BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    assert several(ids, labels=torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).loss.isfinite()


def test_token_classification_question_answering_and_multiple_choice():
    ids, mask = tiny_batch(tiny_config())
    tokens = make(M3BertForTokenClassification, num_labels=5)
    output = tokens(ids, mask, labels=ids % 5)
    assert output.logits.shape == (3, 11, 5) and output.loss.isfinite()
    answers = make(M3BertForQuestionAnswering)
    output = answers(ids, mask, start_positions=torch.tensor([0, 1, 0]), end_positions=torch.tensor([2, 3, 0]))
    assert output.start_logits.shape == (3, 11) and output.loss.isfinite()
    choices = make(M3BertForMultipleChoice)
    output = choices(ids[None], mask[None], labels=torch.tensor([1]))
    assert output.logits.shape == (1, 3) and output.loss.isfinite()
    single = torch.stack([choices(ids[None, i : i + 1, :n]).logits[0, 0] for i, n in enumerate((11, 7, 1))])
    torch.testing.assert_close(single, output.logits[0], atol=1e-5, rtol=1e-4)


def test_labels_and_logits_of_one_granularity():
    model = make(M3BertForMaskedLM, exit_layer=3)
    ids, mask = tiny_batch(model.config)
    whole = model(ids, mask, labels=ids)
    assert whole.logits is None and whole.granularity_losses.shape == (3, 3)
    for row, layer in enumerate(model.config.exit_layers):
        for column, width in enumerate(model.config.matryoshka_dimensions):
            one = model(ids, mask, labels=ids, exit_layer=layer, truncate_dim=width)
            torch.testing.assert_close(one.loss, whole.granularity_losses[row, column], atol=1e-5, rtol=1e-5)
    both = model(ids, mask, labels=ids, output_logits=True)
    torch.testing.assert_close(both.logits, model(ids, mask).logits)
    torch.testing.assert_close(both.logits, model(ids, mask, exit_layer=3).logits)


def test_saved_config_names_every_auto_class(tmp_path):
    make(M3BertForMaskedLM).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 7 and auto_map["AutoModel"] == "modeling_m3bert.M3BertModel"
    for target in auto_map.values():
        assert (tmp_path / f"{target.split('.')[0]}.py").is_file()
