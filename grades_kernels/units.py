"""From names and modules to units: what GradES watches, what it calls it, and with which tau.

A *unit* is a set of tensors that freeze together: one weight matrix, one stack of expert matrices
kept in a single parameter, or the factors of one LoRA update. Two doors lead to the units and
`unit_of` is behind both, so they cannot disagree:

* `unit_of` judges a tensor by its name and shape. It leaves out what is clearly something else
  than a projection (embeddings, output heads, norms, biases, routers) and takes the rest.
* `grades_param_groups` looks at the modules. It takes only linear layers inside the repeated
  blocks of a model, and of those only what `unit_of` takes too.

Names are judged by whole components ("lm_head"), or by the whole words of a component
("q_norm" is a norm), never by substrings: "overhead_proj", "headwise" and "normalizer_proj" hold
none of the words below.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

# torch.compile, FSDP1 and activation checkpointing put these between any two components.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# DDP, DataParallel, AveragedModel and PEFT wrap the whole model: their words may be the model's
# own further inside ("decoder.module.fc"), so they go from the front alone.
_FRONT = re.compile(r"^(?:module\.|base_model\.model\.)+")

_LORA_FACTOR = re.compile(r"lora_[ABEabe]")  # E: the singular values of AdaLoRA
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# From here on a name says how PEFT holds a module, no longer what the module is.
_ADAPTER_PART = re.compile(r"base_layer|modules_to_save|original_module|lora_.*")

_EMBEDDING_WORDS = frozenset({"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe"})
_POSITION = re.compile(r"(.*_)?pos(ition(s|al)?)?(_(enc|encodings?|table))?|pe")
_NORM_WORDS = frozenset({"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "ln", "bn"})
_BIAS = re.compile(r"(.*_)?bias(_table)?")
_EXPERT = re.compile(r"(.*_)?experts?")
_EXPERT_GATE = re.compile(r"(.*_)?experts?_gate")
# "sa_head" and "multi_head" are attention heads, as small models written by hand call them.
_HEAD = re.compile(
    r"(?!(.*_)?(sa|multi|attn|attention)_head$)(.*_)?head|lm_heads|(.*_)?classifiers?"
)
# Words that mean a head only outside of numbered modules: a block may well hold a "score", and a
# whole network be called so.
_HEAD_OUTSIDE_BLOCKS = re.compile(
    r"cls|score|pooler|qa_outputs|lm_loss|unembed|vocab_.*|logits?(_.*)?|(.*_)?predictions?"
)
# Words that mean it only at the top of a model: "output.weight" of Meta's Llama, against
# "layers.0.attention.output.weight".
_HEADS_AT_THE_TOP = frozenset({"output", "decoder", "generator", "proj_out"})
_SHELLS = frozenset({"model", "transformer", "decoder"})


def canonical_name(name: str) -> str:
    """The name a tensor has in the bare model, whatever the model was wrapped in.

    Removed: `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`
    anywhere; `module.` (DDP) and `base_model.model.` (PEFT) at the front, repeatedly and in any
    order. PEFT's `.base_layer` stays: it tells the frozen weight from what was added to it.

    >>> canonical_name("module._orig_mod.base_model.model.lm_head.weight")
    'lm_head.weight'
    """
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _FRONT.sub("", bare)


def unit_of(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """The unit that a named tensor belongs to, or None if it is to be left unmonitored.

    A tensor of two or more dimensions is monitored unless something says otherwise, so that
    "0.weight", "fc1.weight" or "a" are. Left out are tensors that are not floating (complex
    ones included), hold no elements, or are vectors (fewer than two dimensions, or three and
    more of which at most one is longer than 1, as a class token of shape (1, 1, n) is), and by
    their name embeddings, positional tables, output heads, norms, biases and routers of a
    mixture of experts. A module called just "gate" is a router if it has fewer outputs than
    inputs and lies outside the experts; otherwise it is the gate of a gated MLP.

    Args:
        name: Full parameter name, with or without the prefixes of wrappers.
        shape: Shape of the whole tensor, not of a shard.
        dtype: Its dtype.

    Returns:
        The canonical name of the tensor; for the factors of a LoRA update one common name,
        "...q_proj.lora.NAME" for "...q_proj.lora_A.NAME.weight" and "...lora_B.NAME.weight",
        NAME being the adapter's (absent where the factors carry none).
    """
    if _role(name, shape, dtype) is not None:
        return None
    canonical = canonical_name(name)
    parts = canonical.split(".")
    factor = _factor_position(parts)
    if factor is None:
        return canonical
    adapter = parts[factor + 1 :]
    if adapter and adapter[-1] == "weight":
        adapter = adapter[:-1]
    return ".".join([*parts[:factor], "lora", *adapter])


def is_embedding(name: str, p: Tensor) -> bool:
    """Whether a named tensor is an embedding or a positional table, below all blocks."""
    return _role(name, p.shape, p.dtype) == "embedding"


def place_of(unit: str) -> tuple[int | None, str]:
    """Where a unit sits, for reports: its layer, and its kind, which is the same in every layer.

    The layer is the first index in the name, or None. The kind is what follows it, less words
    that tell nothing: "model.layers.3.self_attn.q_proj.weight" is (3, "q_proj"). Words that
    tell matrices apart stay: "attn.c_proj" and "mlp.c_proj" of GPT-2, "attention.output.dense"
    and "output.dense" of BERT, "mlp.0" and "mlp.2" of a Sequential. A second stack is named:
    "decoder.SelfAttention.q" of T5, "vision.q_proj" of CLIP. The experts of a layer share a kind
    ("experts.w1"), and so do the adapters of a matrix ("q_proj.lora"). A nameless unit
    "group0.param3" is (None, "group0").
    """
    nameless = re.fullmatch(r"(group\d+)\.param\d+", unit)
    if nameless:
        return None, nameless[1]
    parts = unit.split(".")
    if "lora" in parts[1:]:
        parts = parts[: parts.index("lora", 1) + 1]
    elif len(parts) > 1 and parts[-1] == "weight":
        parts = parts[:-1]
    parts = list(takewhile(lambda part: part != "modules_to_save", parts))
    parts = [part for part in parts if part != "base_layer"]
    for position, part in enumerate(parts):
        index = re.fullmatch(r"(?:\w*(?:layer|block)_?)?(\d+)", part, re.IGNORECASE)
        if index:
            stack, inside = parts[:position], _kind_parts(parts[position + 1 :])
            kind = ".".join(inside) or (stack[-1] if stack else "weight")
            return int(index[1]), _second_stack(stack) + kind
    return None, ".".join(parts)


def grades_param_groups(
    model: nn.Module,
    *,
    tau: float | str,
    weight_decay: float = 1e-2,
    taus: Mapping[str, float | None] | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for `GradESAdamW`, built from the modules of a model.

    Monitored are the weights of the linear layers (`nn.Linear`, transformers' `Conv1D`,
    `nn.MultiheadAttention`, experts stacked in one parameter of 3 dimensions) inside the repeated
    blocks of the model, and LoRA factors wherever they are, as far as `unit_of` takes them. Blocks
    are the modules of an `nn.ModuleList` or a numbered `nn.ModuleDict`, and those modules of an
    `nn.Sequential` whose class occurs in it again (or that is alone in it). All other tensors
    (embeddings, heads and what is tied to them, norms, biases, routers, convolutions) are trained
    as plain AdamW does. A weight shared by several linear layers is monitored under its first name.
    Tensors with `requires_grad=False` are left out.

    Args:
        model: The model, bare or wrapped (DDP, FSDP, torch.compile, PEFT).
        tau: Threshold of the monitored units, at least 0; 0.0 only observes, "auto" is for the
            statistic "signal" alone.
        weight_decay: For all tensors but vectors, norms and biases, which get 0. Default 1e-2.
        taus: Thresholds for some units, `{regex: tau}`: `re.search` on the canonical name of a
            unit or of one of its tensors, the first match wins. None as a threshold leaves the
            units unmonitored. Default: none.
        verbose: Print a table of what was matched, and what was not. Default False.

    Returns:
        Groups with the keys "params" (`(name, tensor)` pairs, each tensor once), "tau" (None
        where nothing is monitored) and "weight_decay"; an empty group is not made.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `taus` not a mapping.
        ValueError: A number out of its range, an invalid regex or one that matches no unit, two
            units of one name, or nothing to monitor in this model (the error says what was seen).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    tau = tau if tau == "auto" else _checked_number("tau", tau)
    weight_decay = _checked_number("weight_decay", weight_decay)
    patterns = _checked_patterns(taus)

    tensors = _trainable_tensors(model)
    units = _units_of_tensors(tensors)
    if not units:
        raise ValueError(_nothing_to_monitor(model))
    tau_of_unit = _taus_of_units(units, tau, patterns)
    if all(value is None for value in tau_of_unit.values()):
        raise ValueError(
            f"taus={dict(taus or {})} sets None for every one of the {len(units)} units: "
            "nothing is left to monitor. Narrow its patterns, or use torch.optim.AdamW"
        )

    groups: dict[tuple[float | str | None, float], dict[str, Any]] = {}
    for entry in tensors:
        unit_tau = tau_of_unit[entry.unit] if entry.unit is not None else None
        decay = 0.0 if entry.reason in _WITHOUT_DECAY else weight_decay
        group = groups.setdefault(
            (unit_tau, decay), {"params": [], "tau": unit_tau, "weight_decay": decay}
        )
        group["params"].append((entry.name, entry.tensor))
    if verbose:
        _print_tables(type(model).__name__, tensors, units, tau_of_unit)
    return list(groups.values())


# Names


def _role(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """What keeps a named tensor from being a unit, in a word; None if nothing does."""
    if not dtype.is_floating_point:
        return "not floating"
    if math.prod(shape) == 0:
        return "empty"
    if len(shape) < 2 or (len(shape) > 2 and sum(size > 1 for size in shape) <= 1):
        return "vector"
    parts = canonical_name(name).split(".")
    if any(part.startswith("lora_embedding_") for part in parts):
        return "embedding"
    return _role_of_path(_path(parts), shape, is_module=parts[-1] == "weight")


def _role_of_path(path: list[str], shape: Sequence[int], *, is_module: bool) -> str | None:
    """`_role` by name alone: `path` leads to a module if `is_module`, else to a bare parameter."""
    named = [part for part in path if not part.isdigit()]
    if not named:
        return None
    owner, words = named[-1], _words(named[-1])
    before_blocks = list(takewhile(lambda part: not part.isdigit(), path))
    is_outside = owner in before_blocks
    at_the_top = path[-1] == owner and _SHELLS.issuperset(path[:-1])

    if (
        not _EMBEDDING_WORDS.isdisjoint(words)
        or any(_words(part)[-1] in _EMBEDDING_WORDS for part in named)
        or _POSITION.fullmatch(owner)
        or (owner == "shared" and at_the_top)
        or (words[-1] in ("token", "tokens") and not is_module)
    ):
        return "embedding"
    if (
        any(_words(part)[-1] == "router" for part in named)
        or _EXPERT_GATE.fullmatch(owner)
        or (
            owner == "gate"
            and len(shape) == 2
            and shape[0] < shape[1]
            and not any(_EXPERT.fullmatch(part) for part in named)
        )
    ):
        return "router"
    if (
        any(_HEAD.fullmatch(part) for part in [*before_blocks, owner])
        or any(_HEAD_OUTSIDE_BLOCKS.fullmatch(part) for part in before_blocks if is_outside)
        or (owner in _HEADS_AT_THE_TOP and at_the_top)
    ):
        return "output head"
    if words[0] == "ln" or _noun(words) in _NORM_WORDS:
        return "norm"
    if _BIAS.fullmatch(owner):
        return "bias"
    return None


def _path(parts: Sequence[str]) -> list[str]:
    """The components that say what a tensor is, in snake case: modules, then a bare parameter."""
    path: list[str] = []
    for part in parts:
        if _ADAPTER_PART.fullmatch(part):
            break
        path.append(_WORD_BORDER.sub("_", part).lower())
    if path and path[-1] == "weight":
        path.pop()
    if path:
        path[-1] = path[-1].removesuffix("_weight")
    return path


def _words(part: str) -> list[str]:
    """The words of a snake-case component without trailing digits: "norm1" is ["norm"]."""
    return [word.rstrip("0123456789") or word for word in part.split("_") if word] or [part]


def _noun(words: list[str]) -> str:
    """What a compound names: its last word, or the one before a last letter ("norm_f")."""
    return words[-2] if len(words) > 1 and len(words[-1]) == 1 else words[-1]


def _factor_position(parts: Sequence[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if _LORA_FACTOR.fullmatch(part)), None)


# Kinds, for `place_of`

# A block holds at most one matrix of such a name, apart from experts and cross attention.
_TELLS_ALL = re.compile(
    r"(q|k|v|o|qkv|kv|gate|up|down|gate_up)(_[ab])?_proj(_with_mqa)?|qkv|query_key_value|fc[12]"
)
_TELLS_NOTHING = frozenset(
    {"self_attn", "self_attention", "attention", "attn", "mixer", "mlp", "feed_forward", "ffn"}
    | {"block_sparse_moe", "moe"}
)
_STACKS = {"decoder": "decoder.", "vision": "vision.", "visual": "vision.", "audio": "audio."}


def _kind_parts(inside: list[str]) -> list[str]:
    """The components after the layer's index, less those that tell nothing."""
    # T5 numbers the two or three parts of a block, and names them too.
    if len(inside) > 2 and inside[0] == "layer" and inside[1].isdigit():
        inside = inside[2:]
    kind: list[str] = []
    for part in inside:
        if not (part.isdigit() and kind and _EXPERT.fullmatch(kind[-1])):
            kind.append(part)
    if len(kind) > 1 and kind[0] in _TELLS_NOTHING:
        alone = [part for part in kind[1:] if part != "lora"]
        if _EXPERT.fullmatch(kind[1]) or (len(alone) == 1 and _TELLS_ALL.fullmatch(alone[0])):
            kind = kind[1:]
    return kind


def _second_stack(stack: list[str]) -> str:
    """A prefix for the stack that comes beside another one; the first needs none."""
    words = (word for part in reversed(stack) for word in _words(part.lower()))
    return next((_STACKS[word] for word in words if word in _STACKS), "")


# Modules


@dataclass
class _Entry:
    """A trainable tensor of a model: a member of `unit`, or left unmonitored for a `reason`."""

    name: str
    tensor: Tensor
    unit: str | None
    reason: str | None


_WITHOUT_DECAY = frozenset({"vector", "norm", "bias"})
_NOT_IN_A_BLOCK = "no linear layer of a block"


def _trainable_tensors(model: nn.Module) -> list[_Entry]:
    """Every trainable tensor once, under the first of its names; all of them are judged."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    linear = _linear_weights(model)
    entries = []
    for tensor, aliases in names.items():
        roles = (_role(alias, tensor.shape, tensor.dtype) for alias in aliases)
        reason = next((role for role in roles if role is not None), None)
        is_factor = _factor_position(canonical_name(aliases[0]).split(".")) is not None
        if reason is None and not is_factor and tensor not in linear:
            reason = _NOT_IN_A_BLOCK
        unit = None if reason else unit_of(aliases[0], tensor.shape, tensor.dtype)
        entries.append(_Entry(aliases[0], tensor, unit, reason))
    return entries


def _units_of_tensors(tensors: Iterable[_Entry]) -> dict[str, list[_Entry]]:
    units: dict[str, list[_Entry]] = {}
    names: dict[str, str] = {}
    for entry in tensors:
        if entry.unit is None:
            continue
        name = canonical_name(entry.name)
        if name in names:
            raise ValueError(
                f"two tensors, {names[name]!r} and {entry.name!r}, are both called {name!r} once "
                "the prefixes of wrappers are removed. Rename one of the modules"
            )
        names[name] = entry.name
        units.setdefault(entry.unit, []).append(entry)
    return units


def _linear_weights(model: nn.Module) -> set[Tensor]:
    """The weights of the linear layers inside the repeated blocks of a model."""
    weights: set[Tensor] = set()
    for block in _blocks(model):
        for module in block.modules():
            for name, tensor in module.named_parameters(recurse=False):
                if _is_linear_weight(module, name, tensor):
                    weights.add(tensor)
    return weights


def _is_linear_weight(module: nn.Module, name: str, tensor: Tensor) -> bool:
    if isinstance(module, nn.Linear) or _is_transformers_conv1d(module):
        return name == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("proj_weight")
    # What remains of 3 dimensions is a stack of matrices, one for each expert or head, unless it
    # is the kernel of a one-dimensional convolution.
    is_kernel = isinstance(module, (nn.modules.conv._ConvNd, ParametrizationList))
    return tensor.dim() == 3 and not is_kernel


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed linear layer of GPT-2, told without importing transformers."""
    return any(
        base.__name__ == "Conv1D" and base.__module__.partition(".")[0] == "transformers"
        for base in type(module).__mro__
    )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks of a model."""
    repeated = _repeated_children(module)
    yield from repeated
    for child in module.children():
        if child not in repeated:
            yield from _blocks(child)


def _repeated_children(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    if isinstance(module, nn.ModuleList):
        return children
    if isinstance(module, nn.ModuleDict):  # torchtitan numbers its layers in one
        return children if all(key.isdigit() for key in module) else []
    if not isinstance(module, nn.Sequential):
        return []
    # A Sequential also holds what is no block: layers and activations, a stem, a head.
    composed = [child for child in children if any(True for _ in child.children())]
    classes = Counter(type(child) for child in composed)
    if len(children) == 1 and composed:
        # One block, as in a model of depth 1, unless it is a shell around further blocks.
        return [] if any(True for _ in _blocks(composed[0])) else composed
    return [child for child in composed if classes[type(child)] > 1]


# Arguments and messages of `grades_param_groups`


def _checked_number(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
        raise ValueError(f"Invalid {argument}: {value!r} (a number of at least 0 is needed)")
    return float(value)


def _checked_patterns(
    taus: Mapping[str, float | None] | None,
) -> list[tuple[re.Pattern[str], float | None]]:
    if taus is None:
        return []
    if not isinstance(taus, Mapping):
        raise TypeError(f"taus={taus!r} must be a mapping of regular expressions to thresholds")
    patterns = []
    for pattern, value in taus.items():
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Invalid pattern in taus: {pattern!r} is no regular expression ({error}). Escape "
                "special characters, as in r'\\.layers\\.0\\.'"
            ) from None
        tau = None if value is None else _checked_number(f"taus[{pattern!r}]", value)
        patterns.append((compiled, tau))
    return patterns


def _taus_of_units(
    units: Mapping[str, Sequence[_Entry]],
    tau: float | str,
    patterns: Sequence[tuple[re.Pattern[str], float | None]],
) -> dict[str, float | str | None]:
    """The tau of every unit: that of the first pattern that matches one of its names."""
    chosen: dict[str, float | str | None] = {}
    unused = dict.fromkeys(pattern.pattern for pattern, _ in patterns)
    for unit, entries in units.items():
        names = [unit, *(canonical_name(entry.name) for entry in entries)]
        hits = [(p, value) for p, value in patterns if any(map(p.search, names))]
        chosen[unit] = hits[0][1] if hits else tau
        for pattern, _ in hits:
            unused.pop(pattern.pattern, None)
    if unused:
        raise ValueError(
            f"taus: {', '.join(map(repr, unused))} matches none of the {len(units)} monitored "
            f"units, which are called {_sample(units)}. Correct the pattern or leave it out"
        )
    return chosen


def _nothing_to_monitor(model: nn.Module) -> str:
    found = f"nothing to monitor in {type(model).__name__}."
    parameters = dict(model.named_parameters())
    if not parameters:
        return f"{found} It has no parameters. Pass the model that is to be trained"
    trained = [name for name, tensor in parameters.items() if tensor.requires_grad]
    holders = Counter(
        type(module).__name__
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    )
    linear = _linear_weights(model)
    frozen = sum(not weight.requires_grad for weight in linear)
    return (
        f"{found} Seen: {len(parameters)} tensors ({_sample(trained or parameters)}) in modules of "
        f"the types {', '.join(f'{name} ({count})' for name, count in holders.most_common(8))}; "
        f"{len(parameters) - len(trained)} of the tensors have requires_grad=False, among them "
        f"{frozen} of the {len(linear)} linear weights in repeated blocks. Monitored are trainable "
        "linear layers in the blocks of an nn.ModuleList or nn.Sequential, and LoRA factors: set "
        "requires_grad=True on what is to be trained. For another architecture or adapter pass "
        "model.named_parameters() and tau to GradESAdamW: it monitors every matrix that is by name "
        "no embedding, output head, norm, bias or router"
    )


def _sample(names: Iterable[str], size: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - size} more" if len(names) > size else ""
    return ", ".join(map(repr, names[:size])) + more


def _print_tables(
    title: str,
    tensors: Sequence[_Entry],
    units: Mapping[str, Sequence[_Entry]],
    tau_of_unit: Mapping[str, float | str | None],
) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    elements: Counter[tuple[str, str, str]] = Counter()
    for unit, entries in units.items():
        shape = " + ".join("x".join(map(str, entry.tensor.shape)) for entry in entries)
        tau = tau_of_unit[unit]
        row = (place_of(unit)[1], shape, f"{tau:g}" if isinstance(tau, float) else str(tau))
        counts[row] += 1
        elements[row] += sum(entry.tensor.numel() for entry in entries)
    _print_table(
        f"{title}: {len(units)} units",
        ["kind", "units", "shape", "elements", "tau"],
        [
            [kind, str(counts[kind, shape, tau]), shape, f"{elements[kind, shape, tau]:,}", tau]
            for kind, shape, tau in counts
        ],
    )
    rest = Counter(entry.reason for entry in tensors if entry.reason)
    if not rest:
        return
    _print_table(
        f"{title}: trained, not monitored",
        ["reason", "tensors", "elements"],
        [
            [
                str(reason),
                str(count),
                f"{sum(entry.tensor.numel() for entry in tensors if entry.reason == reason):,}",
            ]
            for reason, count in rest.items()
        ],
    )


def _print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [header, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        print(title)
        for line in lines:
            print("  " + "  ".join(map(str.ljust, line, widths)).rstrip())
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(title, highlight=False, markup=False)
    console.print(table)
