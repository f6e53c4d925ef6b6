import platform
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from m3bert_hf import M3BertForMaskedLM, throughput
from m3bert_hf.throughput import backbone_operations, decoder_operations, keep_freed_memory, matrix_rate


def test_operations_are_those_that_torch_counts():
    # Eager attention, whose products the counter sees.
    config = tiny_config(num_key_value_heads=2)
    config._attn_implementation = "eager"
    model = M3BertForMaskedLM(config)
    ids, _ = tiny_batch(config, (11, 11, 11))
    with FlopCounterMode(display=False) as counter:
        model.model(ids).last_hidden_state.sum().backward()
    assert counter.get_total_flops() == backbone_operations(config, 33, 3 * 11 * 11)
    # Gradients are computed in the forward pass: three products with the decoder for each token and dimension.
    assert decoder_operations(101, 7 * (8 + 20)) == 3 * 2 * 101 * 7 * 28


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch):
    now, products = [0.0], []
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def multiply(left, right, out):
        products.append((left.shape, right.shape, left.dtype))
        # The first takes longest, as real ones do; the third is the fastest.
        now[0] += (0.5, 0.02, 0.01, 0.03)[min(len(products) - 1, 3)]

    monkeypatch.setattr(torch, "mm", multiply)
    rate = matrix_rate(torch.device("cpu"), torch.bfloat16, size=32, seconds=0.1)
    assert rate == pytest.approx(2 * 32**3 / 0.01)
    # One to warm up, then until the time is over.
    assert products == [((32, 32), (32, 32), torch.bfloat16)] * 6


def test_freed_memory_is_kept_where_the_c_library_can():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    # Allocation goes on as before.
    assert torch.ones(3_000_000).sum() == 3_000_000
