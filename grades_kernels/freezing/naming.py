"""Parameter names: the unit that a tensor belongs to, and the layer and the kind of a unit.

Names are compared by whole components ("lm_head") or whole words of a component ("q_norm" is a
norm), never by substrings: "overhead_proj" and "normalizer_proj" contain none of the words below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

# torch.compile, FSDP1, activation checkpointing and Fabric put these between any two components.
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
# DDP, DataParallel, AveragedModel and PEFT wrap the whole model. These words can also be the
# model's own further inside ("decoder.module.fc"), so they are removed from the front only.
_FRONT = re.compile(r"^(?:module\.|base_model\.model\.)+")
# A model in an nn.Sequential, as in sentence-transformers, or a block of one.
_IN_SEQUENTIAL = re.compile(r"^(?:model\.)?\d+\.")
# Tensors from which torch.nn.utils computes a weight; magnitudes are "original0" and "weight_g".
_PARAMETRIZED = re.compile(r"(?:parametrizations\.)?(\w*weight\w*)(?:\.original1?|_v|_orig)$")

_LORA_FACTOR = re.compile(r"lora_[ABEabe]")  # E: the singular values of AdaLoRA
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# PEFT stores a module and its adapters under these components; they do not describe the module.
_ADAPTER_PART = re.compile(
    r"base_layer|modules_to_save|original_module|lora_.*|token_adapter|trainable_tokens_.*"
)

_EMBEDDING_WORDS = frozenset({"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe"})
_POSITION = re.compile(r"(.*_)?pos(ition(s|al)?)?(_(enc|encodings?|table|[hwt]))?|pe")
_NORM_WORDS = frozenset({"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "ln", "bn"})
_BIAS = re.compile(r"(.*_)?bias(es)?(_table|_[a-z])?")
# Scales and shifts in one tensor, the decay rates of a state space, magnitudes of rows.
_VECTORS = re.compile(r"(.*_)?table|a_logs?|\w*weight\w*_g|original0")
_EXPERT = re.compile(r"(.*_)?experts?")
_EXPERT_GATE = re.compile(r"(.*_)?experts?_gate")
# "sa_head" and "multi_head" are the names of attention heads in small models written by hand.
_HEAD = re.compile(
    r"(?!(.*_)?(sa|multi|attn|attention)_head$)(.*_)?head|lm_heads|(.*_)?classifiers?"
)
# These words mean a head only outside of numbered modules: a block can contain a "score".
_HEAD_OUTSIDE_BLOCKS = re.compile(
    r"cls|score|pooler|qa_outputs|lm_loss|unembed|vocab_.*|logits?(_.*)?|(.*_)?predictions?"
)
# These words mean a head only at the top of a model: "output.weight" of Meta's Llama is one,
# "layers.0.attention.output.weight" is not.
_HEADS_AT_THE_TOP = frozenset({"output", "decoder", "generator", "proj_out"})
_SHELLS = frozenset({"model", "auto_model", "transformer", "decoder"})

# A block has at most one matrix of such a name, apart from experts and cross attention.
_UNIQUE_IN_BLOCK = re.compile(
    r"(q|k|v|o|qkv|kv|gate|up|down|gate_up)(_[ab])?_proj(_with_mqa)?|qkv|query_key_value|fc[12]"
)
_GENERIC_PARTS = frozenset(
    {"self_attn", "self_attention", "attention", "attn", "mixer", "mlp", "feed_forward", "ffn"}
    | {"block_sparse_moe", "moe"}
)
_STACKS = {
    "decoder": "decoder.",
    "up": "decoder.",  # the second half of a U-Net
    "vision": "vision.",
    "visual": "vision.",
    "audio": "audio.",
}


def canonical_name(name: str) -> str:
    """The name of a tensor in the bare model, without the prefixes of wrappers.

    `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.` and
    `_forward_module.` (Fabric) are removed anywhere, `module.` (DDP) and `base_model.model.` (PEFT)
    at the front. PEFT's `.base_layer` stays: it distinguishes the base weight from the weights of
    the adapter.

    >>> canonical_name("module._orig_mod.base_model.model.lm_head.weight")
    'lm_head.weight'
    """
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _FRONT.sub("", bare)


def unit_of(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """The unit that a named tensor belongs to, or None if `exclusion_reason` names a reason.

    `name` is a full parameter name, with or without the prefixes of wrappers, `shape` that of the
    whole tensor, not of a shard. The unit is the canonical name of the tensor; for the factors of a
    LoRA update one common name, "...q_proj.lora.NAME" for "...q_proj.lora_A.NAME.weight" and
    "...lora_B.NAME.weight", NAME being the adapter's (absent if the factors' names have none).
    """
    if exclusion_reason(name, shape, dtype) is not None:
        return None
    canonical = canonical_name(name)
    parts = canonical.split(".")
    factor = _factor_position(parts)
    if factor is None:
        return canonical
    adapter = parts[factor + 1 : -1 if parts[-1] == "weight" else None]
    return ".".join([*parts[:factor], "lora", *adapter])


def exclusion_reason(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """The reason why a named tensor is left unmonitored, in one or two words, or None.

    Excluded are tensors that are not floating (complex ones included) or have no elements,
    vectors (fewer than two dimensions, or three and more of which at most one is longer than 1, as
    in a class token), and by their name embeddings, positional tables, output heads, norms,
    biases, scales and shifts, and routers of a mixture of experts. A module called just "gate" is
    a router if it has fewer outputs than inputs and lies outside the experts, otherwise the gate of
    a gated MLP.
    """
    if not dtype.is_floating_point:
        return "not floating"
    if math.prod(shape) == 0:
        return "empty"
    if len(shape) < 2 or (len(shape) > 2 and sum(size > 1 for size in shape) <= 1):
        return "vector"
    weight = _PARAMETRIZED.sub(r"\1", canonical_name(name))
    parts = _IN_SEQUENTIAL.sub("", weight).split(".")
    if any(part.startswith("lora_embedding_") for part in parts):
        return "embedding"
    path = _path(parts)
    named = [part for part in path if not part.isdigit()]
    if not named:
        return None
    owner, words = named[-1], _words(named[-1])
    before_blocks = list(takewhile(lambda part: not part.isdigit(), path))
    at_the_top = path[-1] == owner and _SHELLS.issuperset(path[:-1])

    embedding = (
        not _EMBEDDING_WORDS.isdisjoint(words)
        or any(_words(part)[-1] in _EMBEDDING_WORDS for part in named)
        or _POSITION.fullmatch(owner)
        or (owner == "shared" and path == before_blocks)
        or (words[-1] in ("token", "tokens") and parts[-1] != "weight")
        or (words[-1] == "table" and parts[-1] == "weight")
    )
    # Both factors of a LoRA pair get one answer, whatever the rank makes of their shapes.
    narrows = len(shape) == 2 and shape[0] < shape[1] and _factor_position(parts) is None
    router = (
        any("router" in _words(part) for part in named)
        or _EXPERT_GATE.fullmatch(owner)
        or (owner == "gate" and narrows and not any(map(_EXPERT.fullmatch, named)))
    )
    head = (
        any(map(_HEAD.fullmatch, [*before_blocks, owner]))
        or (owner in before_blocks and any(map(_HEAD_OUTSIDE_BLOCKS.fullmatch, before_blocks)))
        or (owner in _HEADS_AT_THE_TOP and at_the_top)
    )
    # The main word of a compound is the last, or the one before a last letter ("norm_f").
    noun = words[-2] if len(words) > 1 and len(words[-1]) == 1 else words[-1]
    norm = words[0] == "ln" or noun in _NORM_WORDS
    reasons = {"embedding": embedding, "router": router, "output head": head, "norm": norm}
    reasons["bias"] = _BIAS.fullmatch(owner) is not None
    reasons["vector"] = _VECTORS.fullmatch(owner) is not None
    return next((reason for reason, applies in reasons.items() if applies), None)


def is_embedding(name: str, p: Tensor) -> bool:
    """Whether a named tensor is an embedding or a positional table, below all blocks."""
    return exclusion_reason(name, p.shape, p.dtype) == "embedding"


def is_lora_factor(name: str) -> bool:
    """Whether a named tensor is one of the factors of a LoRA update."""
    return _factor_position(canonical_name(name).split(".")) is not None


_INDEX = re.compile(r"(?:\w*(?:layer|block)_?)?(\d+)", re.IGNORECASE)
"""A part of a name that numbers a repeated block: "3" or "block_3"."""
_BLOCKS = r"\w*(?:layer|block|stage)s?|levels|h|resnets|attentions|transformer"
"""Lists of blocks, in a whole model or in a larger block."""
# "blocks.1." in "layers.0.blocks.1.attn.qkv" of Swin, "layer.1." in "block.0.layer.1" of T5.
_INNER_BLOCKS = re.compile(rf"^(?:(?:(?:{_BLOCKS})\.)?(?:\d+\.)+(?!lora$)(?=\D))+")


def stack_of(unit: str) -> str:
    """The part of a unit's name before the index of the layer, such as "model.layers"."""
    parts = unit.split(".")
    return ".".join(parts[: _block_position(parts)])


def layer_and_kind(unit: str) -> tuple[int | None, str]:
    """The layer of a unit and its kind, which is the same in every layer, for reports.

    The layer is the first index in the name, apart from that of a whole model in an nn.Sequential,
    or None. The kind is the rest of the name without generic words and the indices of blocks inside
    of a block: "model.layers.3.self_attn.q_proj.weight" is (3, "q_proj"), and so is
    "layers.3.blocks.1.attention.q_proj.weight" of Swin. Words that distinguish matrices stay, as in
    "attn.c_proj" and "mlp.c_proj" of GPT-2. A second stack is named: "decoder.SelfAttention.q" of
    T5. The experts of a layer share a kind ("experts.w1"), and so do the adapters of a matrix
    ("q_proj.lora"). "group0.param3" is (None, "group0").
    """
    if nameless := re.fullmatch(r"(group\d+)\.param\d+", unit):
        return None, nameless[1]
    parts = _PARAMETRIZED.sub(r"\1", unit).split(".")
    if "lora" in parts[1:]:
        parts = parts[: parts.index("lora", 1) + 1]
    elif len(parts) > 1 and parts[-1] == "weight":
        parts = parts[:-1]
    before_copy = takewhile(lambda part: part != "modules_to_save", parts)
    parts = [part for part in before_copy if part != "base_layer"]
    position = _block_position(parts)
    index = _INDEX.fullmatch(parts[position]) if position < len(parts) else None
    if index is None:
        return None, ".".join(parts)
    stack, inside = parts[:position], _kind_parts(parts[position + 1 :])
    kind = ".".join(inside) or (stack[-1] if stack else "weight")
    return int(index[1]), _second_stack(stack) + kind


def _block_position(parts: list[str]) -> int:
    """The position of the index of the layer, or the number of components."""
    indices = [i for i, part in enumerate(parts) if _INDEX.fullmatch(part)]
    if _IN_SEQUENTIAL.match(".".join(parts)):
        inner = [i for i in indices[1:] if re.fullmatch(_BLOCKS, parts[i - 1])]
        indices = inner or indices
    return next(iter(indices), len(parts))


def _path(parts: Sequence[str]) -> list[str]:
    """The components that describe a tensor, in snake case: modules, then a bare parameter."""
    of_module = takewhile(lambda part: not _ADAPTER_PART.fullmatch(part), parts)
    path = [_WORD_BORDER.sub("_", part).lower() for part in of_module]
    if path and path[-1] == "weight":
        path.pop()
    return [*path[:-1], *(part.removesuffix("_weight") for part in path[-1:])]


def _words(part: str) -> list[str]:
    """The words of a snake-case component without trailing digits: "norm1" is ["norm"]."""
    return [word.rstrip("0123456789") or word for word in part.split("_") if word] or [part]


def _factor_position(parts: Sequence[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if _LORA_FACTOR.fullmatch(part)), None)


def _kind_parts(inside: list[str]) -> list[str]:
    """The components after the layer's index, without the generic ones."""
    kind: list[str] = []
    for part in _INNER_BLOCKS.sub("", ".".join(inside)).split("."):
        if not (part.isdigit() and kind and _EXPERT.fullmatch(kind[-1])):
            kind.append(part)
    if len(kind) > 1 and kind[0] in _GENERIC_PARTS:
        matrix = ".".join(part for part in kind[1:] if part != "lora")
        if _EXPERT.fullmatch(kind[1]) or _UNIQUE_IN_BLOCK.fullmatch(matrix):
            kind = kind[1:]
    return kind


def _second_stack(stack: list[str]) -> str:
    """The prefix of a stack beside the first one, such as "decoder."; "" for the first."""
    words = (word for part in reversed(stack) for word in _words(part.lower()))
    return next((_STACKS[word] for word in words if word in _STACKS), "")
