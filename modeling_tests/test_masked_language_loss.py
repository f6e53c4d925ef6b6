import json
from dataclasses import replace

import pytest
import torch
from conftest import TEXTS, tiny_config
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import AutoModelForMaskedLM

from m3bert_hf import M3BertForMaskedLM, build_sentence_transformer
from m3bert_hf.finetuning import FinetuneArguments, finetune
from m3bert_hf.masked_language_loss import HEAD_FILE, MaskedLanguageLoss
from m3bert_hf.trainer import last_complete_checkpoint


@pytest.fixture
def masked(checkpoint):
    model = build_sentence_transformer(checkpoint)
    return MaskedLanguageLoss(model, M3BertForMaskedLM.from_pretrained(checkpoint))


def training(tmp_path, **options):
    return SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def test_the_loss_is_that_of_pretraining_on_the_same_masks(checkpoint, masked):
    features = masked.model.preprocess(TEXTS[:4])
    seen = {}

    def remember(module, arguments, keywords):
        seen.update(keywords)

    masked.masked_lm.loss_options.stochastic_granularities = None
    masked.masked_lm.register_forward_pre_hook(remember, with_kwargs=True)
    value = masked([features])
    assert (seen["labels"] != -100).any() and (seen["labels"][features["attention_mask"] == 0] == -100).all()
    alone = M3BertForMaskedLM.from_pretrained(checkpoint).train(masked.training)
    assert torch.allclose(value, alone(**seen).loss, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_encoder_is_shared_and_the_head_learns(tokenizer, tied, tmp_path):
    M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=tied)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    masked = MaskedLanguageLoss(build_sentence_transformer(tmp_path), M3BertForMaskedLM.from_pretrained(tmp_path))
    masked([masked.model.preprocess(TEXTS)]).backward()
    encoder = masked.model.transformers_model
    assert masked.masked_lm.model is encoder
    assert (masked.masked_lm.decoder.weight is encoder.embeddings.word_embeddings.weight) == tied
    assert ("decoder.weight" in masked.head_state()) != tied
    assert all(p.grad is not None for p in (encoder.layers[0].mlp.up_proj.weight, masked.masked_lm.head.dense.weight))


def test_untied_the_decoder_begins_as_the_pretrained_one_and_parts_from_the_embeddings(tied):
    model = build_sentence_transformer(tied)
    embeddings = model.transformers_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        embeddings.mul_(2.0)  # as contrastive training moves them
    pretrained = M3BertForMaskedLM.from_pretrained(tied)
    assert pretrained.config.tie_word_embeddings
    expected = pretrained.decoder.weight.detach().clone()
    masked = MaskedLanguageLoss(model, pretrained, untie=True)
    decoder = masked.masked_lm.decoder.weight
    assert torch.equal(decoder, expected) and not torch.equal(decoder, embeddings)
    masked([model.preprocess(TEXTS)]).backward()
    assert decoder.grad is not None and embeddings.grad is not None and "decoder.weight" in masked.head_state()


def test_the_weight_scales_the_loss(checkpoint, masked):
    features, values = masked.model.preprocess(TEXTS[:4]), []
    for weight in (1.0, 0.25):
        loss = MaskedLanguageLoss(masked.model, M3BertForMaskedLM.from_pretrained(checkpoint), weight=weight)
        loss.masked_lm.loss_options.stochastic_granularities = None
        torch.manual_seed(0)
        values.append(loss([features]).item())
    assert values[1] == pytest.approx(0.25 * values[0])
    with pytest.raises(ValueError, match="weight=0 must be above 0"):
        MaskedLanguageLoss(masked.model, M3BertForMaskedLM.from_pretrained(checkpoint), weight=0)


def test_granularities_are_drawn_in_training_and_mixed_precision_is_used(masked, monkeypatch):
    import m3bert_hf.loss_m3bert as loss_module

    drawn, types = [], []
    draw = loss_module.draw_granularities
    monkeypatch.setattr(loss_module, "draw_granularities", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    masked.model.transformers_model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, o: types.append(o.dtype))
    masked.autocast_dtype = torch.bfloat16
    masked.model.train()
    masked([masked.model.preprocess(TEXTS)]).backward()
    assert drawn and types == [torch.bfloat16]
    masked.model.eval()
    masked([masked.model.preprocess(TEXTS)])
    assert len(drawn) == 1


def test_a_head_of_another_size_is_refused(checkpoint, masked):
    other = M3BertForMaskedLM.from_pretrained(checkpoint)
    other.config.vocab_size = 24
    with pytest.raises(ValueError, match="vocab_size=24, the model"):
        MaskedLanguageLoss(masked.model, other)


def test_fine_tuned_along_and_loaded_three_ways(checkpoint, pairs, tmp_path):
    arguments = FinetuneArguments(
        str(checkpoint),
        [str(pairs)],
        batches_by=["source"],
        masked_language_model=str(checkpoint),
        masked_language_share=0.5,
    )
    model = finetune(arguments, training(tmp_path, max_steps=12))
    output = tmp_path / "out"
    before, after = (AutoModelForMaskedLM.from_pretrained(path) for path in (checkpoint, output))
    assert not torch.equal(before.head.dense.weight, after.head.dense.weight)
    again = SentenceTransformer(str(output))
    expected = model.encode(TEXTS, exit_layer=3, truncate_dim=8)
    assert (again.encode(TEXTS, exit_layer=3, truncate_dim=8) == expected).all()
    assert torch.equal(after.model.layers[0].mlp.up_proj.weight, again[0].model.layers[0].mlp.up_proj.weight)


@pytest.fixture
def tied(tokenizer, tmp_path):
    path = tmp_path / "tied"
    M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=True)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_masked_files_and_an_untied_decoder_survive_saving(tied, pairs, tmp_path, monkeypatch):
    import m3bert_hf.finetuning as finetuning

    file, held_out, seen = tmp_path / "texts.jsonl", tmp_path / "held-out.jsonl", []
    long = [" ".join([text] * 3) for text in TEXTS]
    rows = [{"text": f"too short\n{text}", "lang": str(number)} for number, text in enumerate(long)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    held_out.write_text(json.dumps({"query": "never asked", "document": long[0]}), encoding="utf-8")
    make = finetuning._masked_texts
    monkeypatch.setattr(finetuning, "_masked_texts", lambda *a: seen.append(make(*a)) or seen[-1])
    arguments = FinetuneArguments(
        str(tied),
        [str(pairs)],
        exclude_files=[str(held_out)],
        masked_language_model=str(tied),
        masked_language_share=0.5,
        masked_language_files=[str(file)],
        masked_language_untied=True,
        document_length=40,
    )
    finetune(arguments, training(tmp_path, max_steps=6))
    assert set(seen[0]["document"]) == set(long[1:])
    before, after = (AutoModelForMaskedLM.from_pretrained(path) for path in (tied, tmp_path / "out"))
    assert before.config.tie_word_embeddings and not after.config.tie_word_embeddings
    assert not torch.equal(after.decoder.weight, after.model.embeddings.word_embeddings.weight)
    assert not torch.equal(after.decoder.weight, before.decoder.weight)
    again = SentenceTransformer(str(tmp_path / "out"))
    assert torch.equal(again[0].model.embeddings.word_embeddings.weight, after.model.embeddings.word_embeddings.weight)
    file.write_text(json.dumps({"text": "short", "lang": "en"}), encoding="utf-8")
    with pytest.raises(ValueError, match="no paragraph of 8 words"):
        finetune(arguments, training(tmp_path / "other"))
    with pytest.raises(ValueError, match="nothing without masked_language_model"):
        finetune(replace(arguments, masked_language_model=None), training(tmp_path / "third"))


def test_a_resumed_run_has_the_same_untied_head_and_a_tied_one_is_refused(tied, pairs, tmp_path):
    options = {"masked_language_model": str(tied), "masked_language_share": 0.5, "document_length": 40}
    arguments = FinetuneArguments(str(tied), [str(pairs)], masked_language_untied=True, **options)
    finetune(arguments, training(tmp_path / "whole", max_steps=6, save_steps=3))
    target = tmp_path / "resumed/out/checkpoint-3"
    target.parent.mkdir(parents=True)
    (tmp_path / "whole/out/checkpoint-3").rename(target)
    again = training(tmp_path / "resumed", max_steps=6, save_steps=3, resume_from_checkpoint="auto")
    with pytest.raises(ValueError, match=r"do not share \['decoder.weight'\]"):
        finetune(replace(arguments, masked_language_untied=False), again)
    finetune(arguments, again)
    whole, resumed = (M3BertForMaskedLM.from_pretrained(tmp_path / name / "out") for name in ("whole", "resumed"))
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name


def test_a_resumed_run_has_the_same_head(checkpoint, pairs, tmp_path):
    arguments = FinetuneArguments(
        str(checkpoint), [str(pairs)], masked_language_model=str(checkpoint), masked_language_share=0.5
    )
    for name, options in (("whole", {}), ("resumed", {"resume_from_checkpoint": "auto"})):
        run = training(tmp_path / name, max_steps=6, save_steps=3, **options)
        if name == "resumed":
            # The run up to its first checkpoint, as the whole one left it.
            source, target = tmp_path / "whole/out/checkpoint-3", tmp_path / "resumed/out/checkpoint-3"
            target.parent.mkdir(parents=True)
            source.rename(target)
            assert (target / HEAD_FILE).exists() and last_complete_checkpoint(target.parent) == str(target)
        finetune(arguments, run)
    whole, resumed = (M3BertForMaskedLM.from_pretrained(tmp_path / name / "out") for name in ("whole", "resumed"))
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name


def test_bad_shares_are_named(checkpoint, pairs, tmp_path):
    arguments = FinetuneArguments(
        str(checkpoint), [str(pairs)], masked_language_model=str(checkpoint), masked_language_share=1.0
    )
    with pytest.raises(ValueError, match=r"masked_language_share=1.0 must be between 0 and 1"):
        finetune(arguments, training(tmp_path))
