"""Errors that name the ranks of a job, where one of them does otherwise than the others."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REPORTED_WITHIN = timedelta(seconds=3)
"""How long a rank that has found an error waits for the reports of the others."""
DIFFERENT_MODELS = "if the ranks train different models, set optimizer.process_group."


@contextlib.contextmanager
def naming_absent_ranks(group: ProcessGroup | None, t: int, what: str = "check") -> Iterator[None]:
    """Let an error of a collective in step `t` name the ranks that did not take part in it.

    The ranks in which it failed report that in the store of the group within `REPORTED_WITHIN`.

    Raises:
        RuntimeError: From the error of the collective, if some rank has reported nothing.
    """
    try:
        yield
    except RuntimeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith("torch.distributed"):
            raise_if_absent(error, group, t, what)
        raise


def raise_if_absent(
    error: Exception, group: ProcessGroup | None, t: int, what: str = "check"
) -> None:
    """Raise if some rank does not report that this collective of step `t` has failed there too."""
    missing = "another rank"
    try:
        found = reports(group, f"{t}/{what}", "failed")
        absent = [rank for rank, report in found.items() if report is None]
        if not absent:
            return
        missing = f"rank {', '.join(map(str, absent))}"
    except RuntimeError:  # the store was in a process that has left
        pass
    raise RuntimeError(
        f"step {t} of the optimizer failed on rank {dist.get_rank()}: {missing} did not take part "
        f"in its {what}. It has skipped a step, raised an error, ended, or not seen that units "
        "have changed here (requires_grad, tau, groups), while every rank must call step() equally "
        f"often, and units must change in the same step on all; {DIFFERENT_MODELS}"
    ) from error


def reports(group: ProcessGroup | None, what: str, own: str) -> dict[int, str | None]:
    """The report of every rank of a group within `REPORTED_WITHIN`; None: there is none.

    They go through the group's store, since a rank may be alone with the error it has found.
    """
    group = group or dist.group.WORLD
    if group is None:  # it has been destroyed
        return {}
    keys = {rank: f"grades_kernels/{what}/{rank}" for rank in dist.get_process_group_ranks(group)}
    store = group.get_group_store()
    store.set(keys[dist.get_rank()], own)
    with contextlib.suppress(RuntimeError):  # some have not reported
        store.wait([*keys.values()], REPORTED_WITHIN)
    return {
        rank: store.get(key).decode() if store.check([key]) else None for rank, key in keys.items()
    }


def check_same(
    what: str,
    values: Sequence[Any],
    error: type[Exception] = ValueError,
    *,
    ranks: Sequence[int] | None = None,
    way_out: str = "Every rank must do the same to its optimizer, and load the same checkpoint; "
    + DIFFERENT_MODELS,
) -> None:
    """Raise `error` with the values of two ranks (None: 0, 1, ...) unless all have the same."""
    ranks = range(len(values)) if ranks is None else ranks
    odd = next((n for n, value in enumerate(values) if value != values[0]), None)
    if odd is not None:
        raise error(
            f"the ranks differ in {what}: rank {ranks[0]}: {values[0]}, rank {ranks[odd]}: "
            f"{values[odd]}. {way_out}"
        )
