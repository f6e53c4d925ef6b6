import pickle

import pytest
import torch
from conftest import tiny_batch, tiny_config

from m3bert_hf import M3BertForMaskedLM, M3BertModel
from m3bert_hf.compilation import compile_encoder, undo_compilation


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch.compiler.reset()
    return M3BertModel(tiny_config(position_embedding_type="rotary")).eval()


def counting_backend():
    """Return a backend that runs graphs as they are, and the list of graphs it was given."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@torch.inference_mode()
def exits(model, lengths, seed=0):
    ids, mask = tiny_batch(model.config, lengths, seed)
    return model(ids, attention_mask=mask, output_exits=True).exit_hidden_states


SHAPES = [(9, 9, 9, 9), (11, 7, 1), (23, 2, 2, 2, 2), (40,), (3, 3), (17, 16, 15, 14, 13, 12)]


def test_compiled_states_are_the_plain_ones_for_padded_and_packed_batches(model):
    expected = [exits(model, lengths) for lengths in SHAPES]
    compile_encoder(model, at_least=8)
    for lengths, wanted in zip(SHAPES, expected, strict=True):
        for state, reference in zip(exits(model, lengths), wanted, strict=True):
            assert torch.allclose(state, reference, atol=1e-5)


def test_one_graph_of_each_piece_serves_layers_exits_and_lengths(model):
    backend, graphs = counting_backend()
    compile_encoder(model, at_least=8, backend=backend)
    # Three pieces, padded and packed, in inference mode and without gradients; nothing is compiled afterwards.
    assert len(graphs) == 12
    for lengths in SHAPES:
        exits(model, lengths)
    with torch.inference_mode():
        model(tiny_batch(model.config, (12, 12))[0], exit_layer=1)
    with torch.no_grad():
        model(tiny_batch(model.config, (12, 12, 13))[0])
    assert len(graphs) == 12


def test_small_batches_and_training_take_the_plain_path(model):
    backend, graphs = counting_backend()
    compile_encoder(model, at_least=20, warm_up=False, backend=backend)
    exits(model, (9, 9))
    model(tiny_batch(model.config, (12, 12))[0]).last_hidden_state.sum().backward()
    assert not graphs and model.layers[0].mlp.up_proj.weight.grad is not None
    exits(model, (10, 10))
    assert graphs


def test_copies_for_other_processes_take_the_plain_path(model):
    backend, _ = counting_backend()
    compile_encoder(model, at_least=8, backend=backend)
    copy = pickle.loads(pickle.dumps(model))
    piece = copy.layers[1].feed_forward
    assert piece.compiled is piece.plain and piece.module is copy.layers[1]
    for state, reference in zip(exits(copy, (9, 9)), exits(model, (9, 9)), strict=True):
        assert torch.allclose(state, reference, atol=1e-5)


def test_weights_that_change_are_read_anew_and_names_stay(model):
    names = set(model.state_dict())
    backend, _ = counting_backend()
    compile_encoder(model, at_least=8, backend=backend)
    assert set(model.state_dict()) == names
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight.mul_(-1)
    changed = exits(model, (9, 9))
    undo_compilation(model)
    for state, reference in zip(changed, exits(model, (9, 9)), strict=True):
        assert torch.allclose(state, reference, atol=1e-5)
    assert "feed_forward" not in vars(model.layers[0])


def test_models_around_the_encoder(sentence_model):
    texts = ["the quick brown fox jumps over the lazy dog", "le chat noir"] * 8
    expected = sentence_model.encode(texts)
    backend, graphs = counting_backend()
    torch.compiler.reset()
    assert compile_encoder(sentence_model, at_least=8, backend=backend) is sentence_model
    assert torch.allclose(torch.tensor(sentence_model.encode(texts)), torch.tensor(expected), atol=1e-5) and graphs
    head = M3BertForMaskedLM(tiny_config())
    compile_encoder(head, at_least=8, backend=backend, warm_up=False)
    with pytest.raises(ValueError, match="Linear holds no m3BERT encoder"):
        compile_encoder(torch.nn.Linear(2, 2))


def test_a_failed_compilation_says_so_and_leaves_the_model_as_it_was(model):
    def backend(graph, _):
        raise OSError("no compiler")

    with pytest.raises(RuntimeError, match=r"no compiler.*needs a C\+\+ compiler"):
        compile_encoder(model, at_least=8, backend=backend)
    assert "feed_forward" not in vars(model.layers[0]) and "forward" not in vars(model.layers[0].input_layernorm)
    exits(model, (9, 9))
