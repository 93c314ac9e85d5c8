"""A random language model and data that run in milliseconds."""

import pytest
import torch


def tiny_llama(**changes):
    """A Llama with two blocks, 14 matrices and always the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            initializer_range=0.2,
            **changes,
        )
    )


def sentences(n=32, length=8):
    """Rows of a data set for causal language models, always the same."""
    rows = torch.randint(0, 32, (n, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]
