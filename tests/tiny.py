"""Small random models, data and Trainer settings, for runs that take less than a second."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

TRAINER = {
    "per_device_train_batch_size": 4,
    "max_steps": 16,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Arguments of `TrainingArguments` for a short run on the CPU that writes no checkpoint."""


def tiny_llama(**changes):
    """A Llama with two blocks and 14 matrices; every call returns the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))


def sentences(n=32, length=8, words=32):
    """`n` rows of a data set for causal language models, the same in every call.

    With fewer than 32 words there is something to learn for other rows.
    """
    rows = torch.randint(0, words, (n, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def tiny_network():
    """A network with three matrices, 8 inputs and 2 outputs; the same weights in every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    )


def regression_data(n):
    """`n` pairs of 8 inputs and 2 targets, the same in every call."""
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 8, generator=g), torch.randn(n, 2, generator=g))


class Recomputed(torch.autograd.Function):
    """Reentrant activation checkpointing that is no torch's, as in Megatron or Unsloth."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.block(x)
        torch.autograd.backward(output, grad)
        return None, x.grad


def in_fabric(model):
    """The model in the wrapper that Lightning's Fabric puts around it."""
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricModule

    return _FabricModule(model, SingleDeviceStrategy("cpu"))


class Recorder:
    """A data collator that stores a copy of every batch, for a plain loop over the same batches."""

    def __init__(self, collate=default_collate):
        self.collate = collate
        self.batches = []

    def __call__(self, rows):
        batch = self.collate(rows)
        tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
        self.batches.append(copy.deepcopy(tensors))
        return batch


def assert_same_weights(a, b):
    """The parameters of two models are equal bit for bit."""
    theirs = dict(b.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


def assert_same_run(a, b, history=True):
    """Two pairs (model, optimizer) have equal weights, events and statistics.

    Args:
        history: Compare the statistics of every step, of which a checkpoint stores the last alone.
    """
    ours, theirs = (optimizer.report().to_dict() for _, optimizer in (a, b))
    for part in ["events", "units"] + ["history"] * history:
        assert ours[part] == theirs[part], part
    assert_same_weights(a[0], b[0])
