"""The data of a report: units and memory, without any tensor; dataclasses to JSON and back."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints


class Memory(NamedTuple):
    """Memory of an optimizer on one process, in bytes.

    Attributes:
        moments: Current size of ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.
        prev_grads: Current size of the previous gradients.
        grads: Current size of the gradients.
        released: Former size of all three for the frozen tensors that no longer have them.
    """

    moments: int = 0
    prev_grads: int = 0
    grads: int = 0
    released: int = 0


NO_MEMORY = Memory()


@dataclass(frozen=True)
class UnitReport:
    """State of one unit.

    Attributes:
        name: Name of the unit.
        layer: Number of the repeated block it belongs to, None outside of any.
        kind: Sort of matrix, "q_proj" for example; colours and tables group units by it.
        n_elements: Elements of all its tensors.
        criterion: Name of its statistic, e.g. "change"; see `GradESAdamW`.
        tau: Threshold; 0 observes without ever freezing.
        statistic: Last measured value, NaN before the first.
        hits: Consecutive checks below ``tau`` so far.
        decided_at: Step of the decision to freeze it, -1 while there is none.
        frozen_at: First step in which it is frozen, -1 while it is not (cooling down included).
    """

    name: str
    layer: int | None
    kind: str
    n_elements: int
    criterion: str
    tau: float
    statistic: float
    hits: int
    decided_at: int
    frozen_at: int

    @property
    def state(self) -> str:
        """One of "active", "cooling" (decided, not yet frozen) and "frozen"."""
        if self.frozen_at >= 0:
            return "frozen"
        return "cooling" if self.decided_at >= 0 else "active"


def units_by_kind(units: Sequence[UnitReport]) -> dict[str, list[UnitReport]]:
    """The units of every kind: kinds in model order, the units of each by layer."""
    kinds: dict[str, list[UnitReport]] = {unit.kind: [] for unit in units}
    for unit in sorted(units, key=lambda u: math.inf if u.layer is None else u.layer):
        kinds[unit.kind].append(unit)
    return kinds


def frozen_over_time(units: Sequence[UnitReport], last_step: int) -> list[tuple[int, int, int]]:
    """`(step, frozen units, frozen elements)` at step 0, every change and the last step."""
    rows, n_units, n_elements = {0: (0, 0)}, 0, 0
    frozen = (unit for unit in units if unit.state == "frozen")
    for unit in sorted(frozen, key=lambda unit: unit.frozen_at):
        n_units, n_elements = n_units + 1, n_elements + unit.n_elements
        rows[unit.frozen_at] = n_units, n_elements
    rows[last_step] = n_units, n_elements
    return [(step, *row) for step, row in sorted(rows.items())]


def save_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write a dataclass to a file, replaced as a whole: after an error it is as before."""
    path, text = Path(path), json.dumps(to_json(data), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_json(cls: type, path: str | os.PathLike[str], what: str) -> Any:
    """Read what `save_json` wrote; ValueError, which names `what`, if it is no such file."""
    try:
        return from_json(cls, json.loads(Path(path).read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not {what} ({type(error).__name__}: {error}); give a file "
            f"that {cls.__name__}.save() wrote"
        ) from error


def to_json(value: Any) -> Any:
    """A dataclass in the types of strict JSON: NaN becomes None, an infinity "inf" or "-inf"."""
    if is_dataclass(value):
        value = vars(value)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def from_json(annotation: Any, value: Any) -> Any:
    """The inverse of `to_json` for a value with this type annotation."""
    if annotation is float:
        return math.nan if value is None else float(value)
    if annotation in (int, str) and type(value) is not annotation:
        raise TypeError(f"{value!r} instead of {annotation.__name__}")
    if get_origin(annotation) is tuple:
        first, *others = get_args(annotation)
        items = repeat(first) if others == [...] else (first, *others)
        return tuple(map(from_json, items, value))
    if is_dataclass(annotation) or hasattr(annotation, "_fields"):
        types = get_type_hints(annotation)
        return annotation(**{name: from_json(types[name], item) for name, item in value.items()})
    return value
