"""What the configurations in examples/distributed rely on, with two gloo processes on a CPU."""

import os
import socket

import torch
import torch.multiprocessing as mp
from conftest import tiny_batch, tiny_config
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from m3bert_hf import M3BertForMaskedLM
from m3bert_hf.modeling_m3bert import M3BertLayer


def labelled_batch(config):
    ids, mask = tiny_batch(config, (11, 7, 9, 5))
    labels = torch.where(torch.arange(ids.shape[1]) % 3 == 1, ids, -100)
    return ids, mask, labels.masked_fill(mask == 0, -100)


def sharded_gradients(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for name, policy in (
        ("float32", MixedPrecisionPolicy()),
        ("bfloat16", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
    ):
        torch.manual_seed(0)
        model = M3BertForMaskedLM(tiny_config()).train()
        ids, mask, labels = labelled_batch(model.config)
        # As accelerate wraps them: each layer, then what is around them.
        for module in [m for m in model.modules() if isinstance(m, M3BertLayer)] + [model]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        part = slice(2 * rank, 2 * rank + 2)
        count = (labels != -100).sum()
        # Gradients are averaged over processes, the loss is summed over them: as in the Trainer.
        loss = model(ids[part], mask[part], labels=labels[part], num_items_in_batch=count).loss * 2
        loss.backward()
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
        whole = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        if rank == 0:
            torch.save(whole, f"{out}/{name}.pt")
    torch.distributed.destroy_process_group()


def test_sharded_parameters_give_the_gradients_of_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(sharded_gradients, (port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config()).train()
    ids, mask, labels = labelled_batch(model.config)
    model(ids, mask, labels=labels).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        got = torch.load(tmp_path / f"{name}.pt")
        assert got.keys() == wanted.keys() and len(wanted) > 20
        for key, gradient in wanted.items():
            error = (got[key].float() - gradient).norm() / gradient.norm().clamp_min(1e-6)
            assert error <= tolerance, f"{name} {key}: {error}"
