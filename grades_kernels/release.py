"""Release of frozen tensors: less backward work, and the memory of their gradients and moments.

The freeze table masks updates and nothing else. Releasing a frozen unit sets `requires_grad=False`
on its tensors, drops their gradients and replaces their moments by placeholders, where that is
safe.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle, unserializable_hook

from .distributed import Ranks, all_sharded, in_a_job, is_initialized
from .freezing.naming import is_embedding, layer_and_kind, stack_of
from .freezing.table import NEVER, Unit
from .freezing.unit_map import UnitMap
from .report.record import Memory
from .state_tensors import MOMENTS, gradient_dtype, local, placeholder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

State = Mapping[Tensor, dict[str, Any]]

_RELEASED = "_grades_released"
"""An attribute of released tensors: a checkpoint may train them again, also with another optimizer.

It is the tensor's `id`, so that a copy or pickle is not marked. With a weak reference to a tensor
torch could neither move a DTensor nor swap tensors; a swap loses attributes, so that living
optimizers are asked too.
"""

_ALIVE: WeakSet[Release] = WeakSet()

NOTHING_LEFT = (
    "every parameter of this optimizer is frozen and needs no gradient any more. Where nothing "
    "else trains, backward() raises from now on: stop when optimizer.all_frozen is true, or use "
    "stop_grad=False."
)


class Release:
    """Releases the frozen tensors of one optimizer.

    Attributes:
        stop_grad: As in `GradESAdamW`.
        released: The tensors that are released now.
        changed_since_rewrap: Whether tensors were released or taken back since `rewrap`.
        find_wrapper: Returns the model as a loop calls it; set by `release_under_ddp`.
    """

    def __init__(self, stop_grad: bool | str) -> None:
        self.stop_grad = stop_grad
        self.released: set[Tensor] = set()
        self.changed_since_rewrap = False
        self.find_wrapper: Callable[[], Any] = lambda: None
        self._has_begun = False
        self._detector: ReentrantDetector | None = None
        _ALIVE.add(self)

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The DDP wrapper of the loop; None where there is none, or where it is not known."""
        return ddp_of(self.find_wrapper())

    def begin_run(self, unit_map: UnitMap, group: ProcessGroup | None, ranks: Ranks | None) -> None:
        """Look for reentrant checkpointing from the first step on; raise as `raise_if_required`."""
        if self._has_begun:
            return
        reason = self.why_not(unit_map, group, ranks) if unit_map.members else None
        self.raise_if_required(reason)
        self._has_begun = True
        # Also where nothing is released by itself: `apply_freezes` may be called.
        self.observe(unit_map)

    def observe(self, unit_map: UnitMap) -> None:
        """Look for reentrant checkpointing in the next backward pass, around new tensors too."""
        if self._detector is None:
            self._detector = ReentrantDetector()
        self._detector.observe(p for p, _ in unit_map.monitored)

    def why_not(
        self,
        unit_map: UnitMap,
        group: ProcessGroup | None,
        ranks: Ranks | None,
        *,
        ddp: DistributedDataParallel | None = None,
        automatic: bool = False,
    ) -> str | None:
        """The reason why gradients cannot be stopped safely, or None.

        Args:
            unit_map, group, ranks: The optimizer's, `ranks` once they have joined.
            ddp: The wrapper that will be initialised anew, as the one of `find_wrapper` always is.
            automatic: Whether nobody has asked for it. A job of a single process may use DDP too.
        """
        if self._detector is not None and self._detector.found:
            return (
                "with reentrant activation checkpointing, a block none of whose inputs needs a "
                "gradient silently stops learning. Use checkpoint(..., use_reentrant=False)."
            )
        if automatic and self._detector is not None and self._detector.is_off:
            return (
                "with compiled autograd it cannot be found out whether activation checkpointing is "
                "reentrant. Use stop_grad=True where it is not."
            )
        members = [p for p, _ in unit_map.monitored]
        if not in_a_job(group, members) and not (automatic and is_initialized()):
            return None
        ddp = ddp or self.ddp
        if ddp is not None:
            if any(hasattr(state, "start_localSGD_iter") for _, state in _hooks(ddp)):
                return (
                    "with post_localSGD_hook the weights of the ranks differ until they are "
                    "averaged, and torch's averagers leave out those without a gradient."
                )
            if ddp.mixed_precision or ddp._delay_all_reduce_params:
                return (
                    "mixed_precision and delay_all_reduce_named_params of DistributedDataParallel "
                    "leave hooks in the model, so that it cannot be wrapped anew. Leave them out "
                    "(autocast does the same as the first), or use fully_shard (FSDP2)."
                )
            if ranks is None or ranks.everywhere:
                return None
            return (
                "each rank has other tensors (ZeroRedundancyOptimizer), while the wrapper needs "
                "the same ones to stop on all. For the saving, use fully_shard (FSDP2)."
            )
        if all_sharded(members, group):  # reduced tensor by tensor
            return None
        # After a change of requires_grad it takes one step with unsynchronised gradients, then
        # raises.
        return (
            "DistributedDataParallel, or another wrapper that averages gradients, would wait for "
            "them. For the saving under DDP, call ddp_model = optimizer.apply_freezes(ddp_model) "
            "now and then, or once grades_kernels.integrations.release_under_ddp."
        )

    def raise_if_required(self, reason: str | None) -> None:
        """Raise if `stop_grad=True` demands a release and there is a reason against it."""
        if reason is not None and self.stop_grad is True:
            raise RuntimeError(f"stop_grad=True: {reason} Or use stop_grad='auto' or False.")

    def release(self, units: Iterable[Unit], unit_map: UnitMap, state: State, t: int) -> None:
        """Release frozen units after `t` steps: no gradients, no moments."""
        for unit in units:
            for p in unit_map.members[unit]:
                own = state.get(p, {})
                for key in MOMENTS:
                    if key in own:
                        own[key] = placeholder(p, own[key].dtype)
                _stop_gradient(p)
                self.released.add(p)
                setattr(p, _RELEASED, id(p))
            if unit.released_at == NEVER:  # else it was before the checkpoint that was loaded
                unit.released_at = t
            self.changed_since_rewrap = True

    def stop_again(self) -> None:
        """Stop the gradients of released tensors again: PEFT's `disable_adapter` asks for them."""
        for p in self.released:
            if p.requires_grad:
                _stop_gradient(p)

    def take_back(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors need gradients again."""
        for p in tensors:
            p.requires_grad_(True)
            vars(p).pop(_RELEASED, None)
            if p in self.released:
                self.released.discard(p)
                self.changed_since_rewrap = True

    def take_all_back(self, tensors: Iterable[Tensor]) -> None:
        """Let those need gradients again that this optimizer or another one has released."""
        self.take_back([p for p in tensors if _is_released(p)])

    def rewrap(self, ddp: DistributedDataParallel | None) -> nn.Module | None:
        """Initialise the wrapper anew if tensors were released or taken back since it last was."""
        if ddp is None or not self.changed_since_rewrap:
            return ddp
        self.changed_since_rewrap = False
        return initialise_anew(ddp)


_IN_BACKWARD = {x.__code__ for name, x in vars(BackwardCFunction).items() if "apply" in name}
"""The code that runs on the stack while a `torch.autograd.Function` computes its gradients."""


class ReentrantDetector:
    """Finds out from one backward pass whether reentrant activation checkpointing is in use.

    Reentrant checkpointing (`use_reentrant=True`, or a `torch.autograd.Function` of another
    library) runs a block without gradients if no input of the block needs one. Stopping a gradient
    below can bring that about, and then every tensor of the block silently stops learning. Nothing
    in a model says which kind of checkpointing it uses, but a reentrant backward pass runs inside
    that of a function, whose frame is on the stack when a gradient arrives. Each tensor is observed
    until its first gradient; `found` has the result so far.

    `is_off` is whether nothing is observed: compiled autograd breaks its graph at every hook, and
    would take a second per tensor to compile the second backward pass.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.found = False
        dynamo = sys.modules.get("torch._dynamo")
        self.is_off = dynamo is not None and dynamo.config.compiled_autograd
        # By the `id`: a tensor that refers to itself is not freed before a garbage collection.
        self._handles: dict[int, RemovableHandle] = {}
        self._observed: set[int] = set()
        self.observe(tensors)

    def observe(self, tensors: Iterable[Tensor]) -> None:
        """Observe these and no others, where they need a gradient and have not been observed."""
        present = {id(p): p for p in (() if self.is_off or self.found else tensors)}
        self._observed &= present.keys()  # another tensor may get the `id` of one that has gone
        for number in self._handles.keys() - present.keys():
            self._handles.pop(number).remove()
        for number, p in present.items():
            if p.requires_grad and number not in self._observed:
                # A copy or pickle of the tensor goes without it, and need not warn about that.
                hook = unserializable_hook(partial(self._look, number))
                self._handles[number] = p.register_hook(hook)
                self._observed.add(number)

    def stop(self) -> None:
        """Observe nothing any more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _look(self, tensor_id: int, grad: Tensor) -> None:
        self._handles.pop(tensor_id).remove()
        frame: FrameType | None = sys._getframe()
        while frame is not None and not self.found:
            self.found = frame.f_code in _IN_BACKWARD
            frame = frame.f_back


def ddp_of(model: Any) -> DistributedDataParallel | None:
    """A model as its DDP wrapper, which may be inside of Fabric's; None where it has none."""
    inner = getattr(model, "_forward_module", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def initialise_anew(ddp: DistributedDataParallel) -> nn.Module:
    """Initialise a DDP wrapper anew, with its settings, for the tensors that still need gradients.

    It stays the same object, so every reference to it stays right. Where nothing is left to train,
    which DDP refuses to wrap, the result is the bare module, and using the wrapper raises an error.
    """
    hooks, module, own = _hooks(ddp), ddp.module, vars(ddp)
    builtin = str(ddp._get_ddp_logging_data().get("comm_hook") if "logger" in own else None)
    # Most arguments are attributes of the same name; the mesh has given its process group.
    arguments = inspect.signature(DistributedDataParallel.__init__).parameters
    settings = {name: own[name] for name in arguments if name in own and name != "device_mesh"}
    settings["init_sync"] = False  # the ranks have the same weights already
    if not ddp.bucket_bytes_cap_default:
        settings["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    if caps := own.get("bucket_bytes_cap_list"):  # since torch 2.11
        settings["bucket_cap_mb_list"] = [cap / 2**20 for cap in caps]
    kept = [*vars(nn.Module()), "require_backward_grad_sync", "require_forward_param_sync"]
    before = {name: own[name] for name in kept}  # forward hooks, training, no_sync, ...
    # They have hooks on the gradients, of which there must not be two kinds.
    for name in ("reducer", "logger"):
        own.pop(name, None)
    if not any(p.requires_grad for p in module.parameters()):
        return module
    DistributedDataParallel.__init__(ddp, module, **settings)
    own.update(before)
    for hook, state in hooks:
        if hasattr(state, "start_powerSGD_iter"):
            # Its buffers have the sizes of the buckets, which DDP changes again after a pass.
            for of_bucket in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                of_bucket.clear()
            state.iter = min(state.iter, state.start_powerSGD_iter - 2)
        ddp.register_comm_hook(state, hook)
    kind, _, name = builtin.partition(".")
    if kind == "BuiltinCommHookType":
        ddp._register_builtin_comm_hook(getattr(torch.distributed.BuiltinCommHookType, name))
    return ddp


def _hooks(ddp: Any) -> list[tuple[Callable[..., Any], Any]]:
    """The communication hooks of a wrapper, with their states."""
    return list(getattr(ddp, "_comm_hooks", ()))


def memory_of(unit_map: UnitMap, state: State, released: Iterable[Tensor]) -> Memory:
    """Bytes of an optimizer's tensors on this process, and those given back.

    `released` are the tensors that have given up gradient and moments.
    """
    states = [state[p] for p in unit_map.params if state.get(p)]
    given_up, given_back = set(released), 0
    for p, unit in unit_map.monitored:
        grad_bytes = _n_bytes(p) // p.element_size() * gradient_dtype(p.grad, p).itemsize
        if unit.is_decided and unit.uses_prev_grad:
            given_back += grad_bytes
        if p in given_up:
            amsgrad = "max_exp_avg_sq" in state.get(p, {})
            given_back += grad_bytes + (3 if amsgrad else 2) * _n_bytes(p)
    return Memory(
        moments=sum(_n_bytes(own.get(key)) for own in states for key in MOMENTS),
        prev_grads=sum(_n_bytes(own.get("prev_grad")) for own in states),
        grads=sum(_n_bytes(p.grad) for p in unit_map.params),
        released=given_back,
    )


def frozen_prefix(units: Sequence[Unit], unit_map: UnitMap) -> tuple[int, tuple[str, ...]]:
    """The number of lowest monitored blocks that are frozen; names that still train in or below.

    Only below a prefix in which nothing trains can a backward pass end early. Of several stacks of
    blocks, such as encoder and decoder, none is the lowest: 0.
    """
    frozen: dict[int, bool] = {}
    stacks: set[str] = set()
    for unit in units:
        layer, _ = layer_and_kind(unit.name)
        if layer is not None:
            frozen[layer] = frozen.get(layer, True) and unit.is_frozen
            stacks.add(stack_of(unit.name))
    if len(stacks) > 1:
        return 0, ()
    prefix = list(takewhile(frozen.__getitem__, sorted(frozen)))
    below = []
    for name, p, row in unit_map.named() if prefix else ():
        layer, _ = layer_and_kind(name)
        if (own := stack_of(name)) not in stacks and any(x.startswith(own) for x in stacks):
            layer = None  # its index is that of a module in an nn.Sequential around the stack
        is_below = is_embedding(name, p) if layer is None else layer <= prefix[-1]
        if is_below and p.requires_grad and (row is None or not row.is_frozen):
            below.append(name)
    return len(prefix), tuple(below)


def _is_released(p: Tensor) -> bool:
    """Whether an optimizer of this process has released it, and none has taken it back."""
    return getattr(p, _RELEASED, None) == id(p) or any(p in x.released for x in _ALIVE)


def _stop_gradient(p: Tensor) -> None:
    if p.is_leaf:  # AdamW takes others too, with `retain_grad`
        p.requires_grad_(False)
    p.grad = None


def _n_bytes(x: Tensor | None) -> int:
    """Bytes of a tensor on this process; of a DTensor, those of its local shard."""
    return 0 if x is None else local(x).numel() * x.element_size()
