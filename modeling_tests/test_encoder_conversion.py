import pytest
import torch
from conftest import TEXTS, tiny_config
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from m3bert_hf import M3BertForMaskedLM
from m3bert_hf.encoder_conversion import initialize_from
from m3bert_hf.tokenizer_training import train_tokenizer


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def source(kind, tokenizer, path, **fields):
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **SHAPE, **fields}
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**fields, max_position_embeddings=48))
    elif kind == "xlm-roberta":
        model = XLMRobertaForMaskedLM(XLMRobertaConfig(**fields, max_position_embeddings=50))
    else:
        model = ModernBertForMaskedLM(
            ModernBertConfig(**fields, cls_token_id=0, sep_token_id=2, max_position_embeddings=48, decoder_bias=True)
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
def test_every_tensor_with_a_place_is_carried_over_and_the_rest_is_reported(kind, tokenizer, tmp_path):
    theirs = source(kind, tokenizer, tmp_path)
    model, report = initialize_from(tmp_path, tokenizer, {"exit_layers": [2, 4]})
    assert model.config.exit_layers == [2, 4] and model.config.vocab_size == len(tokenizer)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert model(ids).logits.isfinite().all()
    layer = model.model.layers[2]
    if kind == "modernbert":
        own = theirs.model.layers[2]
        joined = [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
        torch.testing.assert_close(torch.cat(joined), own.attn.Wqkv.weight)
        x = torch.randn(3, 32)
        torch.testing.assert_close(layer.mlp(x), own.mlp(x))
        positions = torch.arange(9)[None]
        for kind_of_layer in ("full_attention", "sliding_attention"):
            got = model.model.rotary_emb(x[None], positions, kind_of_layer)
            want = theirs.model.rotary_emb(x[None], positions, kind_of_layer)
            torch.testing.assert_close(got, want)
        assert "LayerNorm became RMSNorm" in report
    else:
        base = theirs.bert if kind == "bert" else theirs.roberta
        own = base.encoder.layer[2]
        torch.testing.assert_close(layer.self_attn.k_proj.weight, own.attention.self.key.weight)
        torch.testing.assert_close(layer.mlp.down_proj.weight, own.output.dense.weight)
        # What enters the norm of the embeddings is the sum that entered it there.
        ids = torch.tensor([[5, 6, 7]])
        inner = []
        base.embeddings.LayerNorm.register_forward_pre_hook(lambda _, inputs: inner.append(inputs[0]))
        base(ids)
        ours = model.model.embeddings
        total = ours.word_embeddings(ids) + ours.position_embeddings(torch.arange(3)[None])
        torch.testing.assert_close(total, inner[0])
        assert "mlp.up_proj" in report.split("New,")[1] and ".bias" in report.split("Left behind:")[1]


def test_a_shallower_model_and_another_vocabulary(tokenizer, tmp_path):
    theirs = source("modernbert", tokenizer, tmp_path)
    other = train_tokenizer([*TEXTS[:2], "entirely different words appear"] * 30, 330)
    model, report = initialize_from(tmp_path, other, {"num_hidden_layers": 2, "exit_layers": [1, 2]})
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size >= len(other)
    old, new = tokenizer.get_vocab(), other.get_vocab()
    shared = sorted(set(old) & set(new))
    assert 100 < len(shared) < len(other)
    ours, before = model.model.embeddings.word_embeddings.weight, theirs.model.embeddings.tok_embeddings.weight
    torch.testing.assert_close(ours[[new[t] for t in shared]], before[[old[t] for t in shared]])
    assert f"{len(shared):,} of {len(other):,} tokens" in report
    model, report = initialize_from(tmp_path, tokenizer, {"hidden_size": 16, "num_attention_heads": 2})
    assert "1 tensors carried over" in report and "decoder.bias" not in report.split("New,")[1]


def test_m3bert_itself_is_taken_as_it_is_and_others_are_refused(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "m3")
    again, report = initialize_from(tmp_path / "m3", tokenizer)
    assert report is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=50, dim=8, n_heads=1, n_layers=1, hidden_dim=8)).save_pretrained(
        tmp_path / "d"
    )
    with pytest.raises(ValueError, match="is a 'distilbert' model: only m3bert, bert"):
        initialize_from(tmp_path / "d", tokenizer)
