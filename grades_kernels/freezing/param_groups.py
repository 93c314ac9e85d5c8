"""Parameter groups for `GradESAdamW`: the linear layers in the repeated blocks of a model."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from .config import check_number
from .naming import canonical_name, exclusion_reason, is_lora_factor, layer_and_kind, unit_of

_WITHOUT_DECAY = frozenset({"vector", "norm", "bias"})


class _NamedTensor(NamedTuple):
    """A tensor of a model: a member of `unit`, or left unmonitored for a `reason`."""

    name: str
    tensor: Tensor
    unit: str | None
    reason: str | None


def grades_param_groups(
    model: nn.Module,
    *,
    tau: float | str,
    weight_decay: float | None = None,
    taus: Mapping[str, float | None] | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for `GradESAdamW`, built from the modules of a model.

    Monitored are the weights of the linear layers (`nn.Linear`, transformers' `Conv1D`,
    `nn.MultiheadAttention`, experts stacked in one parameter of 3 dimensions) inside the repeated
    blocks of the model, and LoRA factors anywhere, unless their names say otherwise (a router, for
    example). Blocks are the modules of an `nn.ModuleList` or a numbered `nn.ModuleDict`, and those
    of an `nn.Sequential` whose class occurs in it again (or that is alone in it), unless a module
    of another class beside them has larger blocks. All other tensors are trained as by AdamW. A
    weight shared by several linear layers is monitored under its first name, one tied to a head is
    not. Tensors with `requires_grad=False` are left out.

    Args:
        model: The model, bare or wrapped (DDP, FSDP, torch.compile, PEFT).
        tau: Threshold of the monitored units, at least 0; 0.0 only observes, "auto" is for the
            statistic "signal" alone.
        weight_decay: For all tensors but vectors, norms and biases, which get 0. Default: that of
            the optimizer.
        taus: Thresholds for some units, `{regex: tau}`: the first regex that `re.search` finds in
            the canonical name of a unit or of one of its tensors wins. None as a threshold leaves
            the units unmonitored. One that finds only tensors with `requires_grad=False` has no
            effect, with a warning. Default: none.
        verbose: Print a table of the monitored units and one of the other tensors. Default False.

    Returns:
        Groups with the keys "params" (`(name, tensor)` pairs, each tensor once), "tau" (None for
        a group that is not monitored) and, where it is given or 0, "weight_decay". No group is
        empty.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `taus` not a mapping.
        ValueError: A number out of its range, an invalid regex or one that matches no unit, two
            units of one name, or nothing to monitor in this model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    tau = tau if tau == "auto" else _checked_number("tau", tau)
    if weight_decay is not None:
        weight_decay = _checked_number("weight_decay", weight_decay)
    taus = {} if taus is None else taus
    if not isinstance(taus, Mapping):
        raise TypeError(f"taus={taus!r} must be a mapping of regular expressions to thresholds")

    tensors = _named_tensors(model, requires_grad=True)
    units = _tensors_of_units(tensors)
    if not units:
        raise ValueError(_nothing_to_monitor(model))
    tau_of_unit = _taus_of_units(units, tau, taus, model)
    if all(value is None for value in tau_of_unit.values()):
        raise ValueError(
            f"taus={taus} sets None for every one of the {len(units)} units: nothing is left to "
            "monitor. Narrow its patterns, or use torch.optim.AdamW"
        )

    groups: dict[tuple[float | str | None, float | None], dict[str, Any]] = {}
    for name, tensor, unit, reason in tensors:
        decay = 0.0 if reason in _WITHOUT_DECAY else weight_decay
        unit_tau = None if unit is None else tau_of_unit[unit]
        own = {} if decay is None else {"weight_decay": decay}
        group = groups.setdefault((unit_tau, decay), {"params": [], "tau": unit_tau, **own})
        group["params"].append((name, tensor))
    if verbose:
        _print_tables(type(model).__name__, tensors, units, tau_of_unit)
    return list(groups.values())


def _named_tensors(model: nn.Module, *, requires_grad: bool) -> list[_NamedTensor]:
    """Every tensor with this flag once, under its first name; any of its names can exclude it."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad == requires_grad:
            names[parameter].append(name)
    linear = _linear_weights(model)
    tensors = []
    for tensor, (name, *tied) in names.items():
        reasons = (exclusion_reason(n, tensor.shape, tensor.dtype) for n in [name, *tied])
        reason = next(filter(None, reasons), None)
        if reason is None and not is_lora_factor(name) and tensor not in linear:
            reason = "no linear layer of a block"
        unit = None if reason else unit_of(name, tensor.shape, tensor.dtype)
        tensors.append(_NamedTensor(name, tensor, unit, reason))
    return tensors


def _tensors_of_units(tensors: Iterable[_NamedTensor]) -> dict[str, list[_NamedTensor]]:
    units: dict[str, list[_NamedTensor]] = defaultdict(list)
    first: dict[str, str] = {}
    for entry in tensors:
        if entry.unit is not None:
            name = canonical_name(entry.name)
            if first.setdefault(name, entry.name) != entry.name:
                raise ValueError(
                    f"two tensors, {first[name]!r} and {entry.name!r}, are both called {name!r} "
                    "once the prefixes of wrappers are removed. Rename one of the modules"
                )
            units[entry.unit].append(entry)
    return units


def _linear_weights(model: nn.Module) -> set[Tensor]:
    """The weights of the linear layers inside the repeated blocks of a model."""
    return {
        tensor
        for block in _blocks(model)
        for module in block.modules()
        for name, tensor in module.named_parameters(recurse=is_parametrized(module))
        if _is_linear_weight(module, name, tensor)
    }


def _is_linear_weight(module: nn.Module, name: str, tensor: Tensor) -> bool:
    if isinstance(module, nn.Linear) or _is_transformers_conv1d(module):
        # Or the tensor from which a parametrized, normalized or pruned weight is computed.
        return name.removeprefix("parametrizations.").startswith("weight")
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("proj_weight")
    # Any other parameter of 3 dimensions is a stack of matrices, except in a convolution.
    is_kernel = isinstance(module, (nn.modules.conv._ConvNd, ParametrizationList))
    return tensor.dim() == 3 and tensor.shape[0] > 1 and not is_kernel


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's transposed linear layer; transformers need not be installed."""
    classes = ((c.__name__, c.__module__.partition(".")[0]) for c in type(module).__mro__)
    return ("Conv1D", "transformers") in classes


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks of a model."""
    children = list(module.children())
    repeated: list[nn.Module] = []
    if isinstance(module, nn.ModuleList):
        repeated = children
    elif isinstance(module, nn.ModuleDict):  # torchtitan numbers its layers in one
        repeated = children if all(key.isdigit() for key in module) else []
    elif isinstance(module, nn.Sequential):
        # Layers, activations, a stem or a head can be in a Sequential too, and are no blocks.
        composed = [child for child in children if next(child.children(), None) is not None]
        classes = Counter(map(type, composed))
        repeated = [child for child in composed if classes[type(child)] > 1]
        others = (child for child in composed if classes[type(child)] == 1)
        within = (x for child in others for x in _linear_weights(child))
        own = (x for child in repeated for x in child.parameters())
        if repeated and _n_elements(within) > _n_elements(own):
            repeated = []  # heads of one class, above a model that has the blocks
        if len(children) == 1 and composed and next(_blocks(composed[0]), None) is None:
            repeated = composed  # one block, as in a model of depth 1, and no shell around others
    yield from repeated
    for child in children:
        if child not in repeated:
            yield from _blocks(child)


def _n_elements(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def _checked_number(argument: str, value: Any) -> float:
    check_number(argument, value, "[0, inf]", lambda x: x >= 0)
    return float(value)


def _taus_of_units(
    units: Mapping[str, Sequence[_NamedTensor]],
    tau: float | str,
    taus: Mapping[str, float | None],
    model: nn.Module,
) -> dict[str, float | str | None]:
    """The tau of every unit: that of the first pattern that matches one of its names."""
    names = {unit: [unit, *(canonical_name(e.name) for e in units[unit])] for unit in units}
    chosen: dict[str, float | str | None] = {}
    unmatched: list[str] = []
    for pattern, value in taus.items():
        try:
            search = re.compile(pattern).search
        except (re.error, TypeError) as error:
            raise ValueError(
                f"Invalid pattern in taus: {pattern!r} is no regular expression ({error}). Escape "
                "special characters, as in r'\\.layers\\.0\\.'"
            ) from None
        unit_tau = None if value is None else _checked_number(f"taus[{pattern!r}]", value)
        matched = [unit for unit in units if any(map(search, names[unit]))]
        if not matched:
            unmatched.append(pattern)
        chosen = {**dict.fromkeys(matched, unit_tau), **chosen}
    if unmatched:
        others = _named_tensors(model, requires_grad=False)
        untrained = [name for e in others if e.unit for name in (e.unit, canonical_name(e.name))]
        for pattern in unmatched:
            if not any(map(re.compile(pattern).search, untrained)):
                raise ValueError(
                    f"taus: {pattern!r} matches none of the {len(units)} monitored units, which "
                    f"are called {_sample(units)}. Correct the pattern or leave it out"
                )
        warnings.warn(  # a cut may lie above them
            "these patterns in taus match only tensors with requires_grad=False and have no "
            f"effect: {_sample(unmatched)}.",
            stacklevel=3,
        )
    return {**dict.fromkeys(units, tau), **chosen}


def _nothing_to_monitor(model: nn.Module) -> str:
    found = f"nothing to monitor in {type(model).__name__}."
    parameters = dict(model.named_parameters())
    if not parameters:
        return f"{found} It has no parameters. Pass the model that is to be trained"
    trained = [name for name, tensor in parameters.items() if tensor.requires_grad]
    modules = (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    types = Counter(type(module).__name__ for module in modules).most_common(8)
    linear = _linear_weights(model)
    return (
        f"{found} The model has {len(parameters)} tensors ({_sample(trained or parameters)}) in "
        f"modules of the types {', '.join(f'{name} ({n})' for name, n in types)}; "
        f"{len(parameters) - len(trained)} of the tensors have requires_grad=False, among them "
        f"{sum(not weight.requires_grad for weight in linear)} of the {len(linear)} linear weights "
        "in repeated blocks. Set requires_grad=True on the tensors to be trained (if a cut has "
        "frozen all blocks on purpose, train the rest with torch.optim.AdamW); for an "
        "architecture without repeated blocks, or another adapter than LoRA, pass "
        "model.named_parameters() and tau to GradESAdamW, which chooses matrices by name alone"
    )


def _sample(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more


def _print_tables(
    title: str,
    tensors: Sequence[_NamedTensor],
    units: Mapping[str, Sequence[_NamedTensor]],
    tau_of_unit: Mapping[str, float | str | None],
) -> None:
    """Prints the units by kind, shape and tau, and the unmonitored tensors by reason."""
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for unit, entries in units.items():
        shape = " + ".join("x".join(map(str, entry.tensor.shape)) for entry in entries)
        tau = tau_of_unit[unit]
        row = (layer_and_kind(unit)[1], shape, f"{tau:g}" if isinstance(tau, float) else str(tau))
        sizes[row].append(sum(entry.tensor.numel() for entry in entries))
    rows = [(kind, str(len(n)), shape, f"{sum(n):,}", t) for (kind, shape, t), n in sizes.items()]
    header: tuple[str, ...] = ("kind", "units", "shape", "elements", "tau")
    _print_table(f"{title}: {len(units)} units", header, rows)
    rest: dict[str, list[int]] = defaultdict(list)
    for entry in tensors:
        if entry.reason is not None:
            rest[entry.reason].append(entry.tensor.numel())
    others = [(reason, str(len(n)), f"{sum(n):,}") for reason, n in rest.items()]
    header = ("reason", "tensors", "elements")
    _print_table(f"{title}: trained, not monitored", header, others)


def _print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in (header, *rows):
            print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
