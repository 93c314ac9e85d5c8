"""Runs the kernels on CPU tensors as they are compiled for a GPU, from their PTX.

Every access is checked for faults that Triton's interpreter cannot show: an address that is not
aligned, although a hint promised it; memory outside of the tensors that a launch was given; bytes
that one program of a launch writes and another one reads or writes; barriers and exchanges that not
all threads reach together.

All threads of some programs are stepped together, in NumPy. A register is an array with one number
per thread; threads that are in another branch are masked. In which order a device would run
programs, warps and accesses is not shown, nor the machine code that ptxas makes of the PTX.

As a plugin of pytest it takes the place of the interpreter in the tests of the Triton backend:

    PYTHONPATH=tests PTX_TARGET=sm_90 python -m pytest -p ptx tests/test_triton_kernels.py
"""

from __future__ import annotations

import ctypes
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from grades_kernels.backends.triton_kernels import THREADS, launch_options
from grades_kernels.backends.triton_tables import FIELDS, TENSOR

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}

_BASE = 4096  # below it no memory is mapped
_PROGRAMS_AT_ONCE = 64
_PROGRAM_BITS = 17  # addresses have 47, and the lowest one is dropped
_POINTERS = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
_LETTERS = {"b": "u", "u": "u", "s": "i", "f": "f"}
_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_ROUNDED = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **_ROUNDED,
    "mov": lambda a: a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "min": np.minimum,  # of integers, as `max` without "NaN"
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "neg": np.negative,
    "not": np.invert,
    "mad": lambda a, b, c: a * b + c,
    "bfe": lambda a, first, n: a >> first & (1 << n) - 1,
}


class Fault(AssertionError):
    """An access that a GPU would not do, or do otherwise each time."""


@cache
def _type(kind: str) -> np.dtype:
    """The NumPy type of a PTX type: "s32", "f64", "pred"."""
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype(f"{_LETTERS[kind[0]]}{int(kind[1:]) // 8}")


@cache
def _memory(size: int) -> np.ndarray:
    """All memory of this process as integers of so many bytes, from `_BASE` on."""
    n = (2**47 - _BASE) // size
    return np.frombuffer((ctypes.c_uint8 * (n * size)).from_address(_BASE), dtype=f"u{size}")


def _bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == bool else x.view(f"u{x.itemsize}")


def _narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """The bits of fp32 numbers that are rounded to "bf16" or "f16"."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _wide(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


@cache
def _split(operands: str) -> list[str]:
    """Operands between commas; a vector in braces is one of them."""
    return [x.strip() for x in re.split(r",(?![^{]*\})", operands)]


def _parts(vector: str) -> list[str]:
    return [x.strip() for x in vector.strip("{} ").split(",")]


_LINE = re.compile(r"(?:(\$\w+):)?\s*(?:(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)\s*([^;]*?)\s*;)?")


class Code:
    """A kernel: its instructions as (predicate, whether it is negated, opcode, operands)."""

    def __init__(self, text: str, shared_bytes: int) -> None:
        self.shared_bytes = shared_bytes
        signature, _, body = text.partition(".visible .entry")[2].partition("{")
        self.params = re.findall(r"\w+_param_\d+", signature)
        self.labels: dict[str, int] = {}
        self.instructions: list[tuple[str | None, bool, str, str]] = []
        for line in body.partition("$L__func_end")[0].splitlines():
            line = line.partition("//")[0].strip().replace("shared::cta", "shared")  # Triton 3.8
            if line.startswith((".reg", ".loc", ".pragma")) or line in ("{", "}"):
                continue
            found = _LINE.fullmatch(line)
            assert found is not None, line
            label, negated, predicate, opcode, operands = found.groups()
            if label:
                self.labels[label] = len(self.instructions)
            if opcode:
                self.instructions.append((predicate, bool(negated), opcode, operands))
        after = [n + 1 for n, x in enumerate(self.instructions) if x[2] in _JUMPS]
        # Where a run of instructions begins, all of which the threads that begin it take.
        self.starts = np.array(sorted({0, *self.labels.values(), *after}))


_JUMPS = ("bra", "bra.uni", "ret")


class Threads:
    """The threads of some programs of a launch.

    Args:
        code: The kernel.
        programs: Numbers of the programs.
        n_programs: Of the whole launch.
        arguments: Of the kernel, as integers.
        first_bytes, last_bytes: Of the memory that the launch was given, in order.
        accesses: Receives (whether it stores, bytes, addresses, programs).
    """

    def __init__(
        self,
        code: Code,
        programs: np.ndarray,
        n_programs: int,
        arguments: dict[str, int],
        first_bytes: np.ndarray,
        last_bytes: np.ndarray,
        accesses: list[tuple[bool, int, np.ndarray, np.ndarray]],
    ) -> None:
        self.code, self.arguments, self.accesses = code, arguments, accesses
        self.first_bytes, self.last_bytes = first_bytes, last_bytes
        self.n = len(programs) * THREADS
        self.program = np.repeat(programs, THREADS)
        self.row = np.repeat(np.arange(len(programs)), THREADS)  # in `shared`
        self.shared = np.zeros((len(programs), max(code.shared_bytes, 16)), np.uint8)
        self.registers: dict[str, np.ndarray] = {
            "%ctaid.x": self.program.astype(np.uint32),
            "%nctaid.x": np.full(self.n, n_programs, np.uint32),
            "%tid.x": np.tile(np.arange(THREADS, dtype=np.uint32), len(programs)),
            "global_smem": np.zeros(self.n, np.uint32),
        }
        self.next = np.zeros(self.n, np.int64)  # instruction of each thread

    def run(self) -> None:
        """Take the threads that are furthest behind to the next branch, until none is left."""
        instructions, starts = self.code.instructions, self.code.starts
        end_of_all = len(instructions)
        while (self.next < end_of_all).any():
            begin = int(self.next.min())
            here = self.next == begin
            end = int(starts[np.searchsorted(starts, begin, "right")])
            self.next[here] = end
            for predicate, negated, opcode, operands in instructions[begin:end]:
                chosen = here
                if predicate:
                    chosen = here & (self.registers[predicate] ^ negated)
                if opcode == "ret":
                    self.next[chosen] = end_of_all
                elif opcode in _JUMPS:
                    self.next[chosen] = self.code.labels[operands]
                else:
                    self._execute(opcode, _split(operands), chosen)

    def _execute(self, opcode: str, operands: list[str], chosen: np.ndarray) -> None:
        name, *kinds = opcode.split(".")
        kind = kinds[-1]
        if name in ("ld", "st"):
            self._access(name == "st", kinds, operands, chosen)
        elif name == "bar":
            _check_together(chosen, THREADS, opcode)
        else:
            target, *sources = operands
            if name == "shfl":
                _check_together(chosen, 32, opcode)
                value = self._read(sources[0], kind)[np.arange(self.n) ^ int(sources[1])]
            elif name == "setp":
                a, b = (self._read(x, kind) for x in sources)
                # Comparisons without "u" are false for NaN, which NumPy's "not equal" is not.
                value = _COMPARISONS[kinds[0]](a, b) & (a == a) & (b == b)
            elif name == "selp":
                a, b = (self._read(x, kind) for x in sources[:2])
                value = np.where(self._read(sources[2], "pred"), a, b)
            elif name == "cvt":
                value = self._converted(kinds, sources)
            elif name == "mov" and "{" in target:
                self._unpack(target, self._read(sources[0], kind), chosen)
                return
            elif name == "mov" and "{" in sources[0]:
                value = self._packed(_parts(sources[0]), kind)
            else:
                value = self._computed(name, kinds, sources)
            self._write(target, value, chosen)

    def _computed(self, name: str, kinds: list[str], sources: list[str]) -> np.ndarray:
        kind = kinds[-1]
        if name in ("shl", "shr"):
            bits, n = (
                self._read(sources[0], kind),
                self._read(sources[1], "u32").astype(_type(kind)),
            )
            return bits << n if name == "shl" else bits >> n
        if name == "abs" and kind in ("bf16", "f16", "bf16x2", "f16x2"):
            is_pair = kind.endswith("x2")
            bits = self._read(sources[0], "b32" if is_pair else "b16")
            return bits & bits.dtype.type(0x7FFF7FFF if is_pair else 0x7FFF)
        rounds = kind[0] in "bf" and (name in _ROUNDED or name == "sqrt")
        if rounds and (kinds[0] != "rn" or "ftz" in kinds):
            raise Fault(f"{name}.{'.'.join(kinds)} does not round to the nearest number")
        if kind == "f32x2":
            pairs = [self._read(x, "b64").view(np.float32) for x in sources]
            return _ROUNDED[name](*pairs).view(np.uint64)
        if kind in ("bf16", "f16"):  # one narrow operand, the other and the result are fp32
            return _ROUNDED[name](
                _wide(self._read(sources[0], "b16"), kind), self._read(sources[1], "f32")
            )
        values = [self._read(x, kind) for x in sources]
        if kinds[0] == "wide":
            double = f"{kind[0]}{2 * int(kind[1:])}"
            values = [x.astype(_type(double)) for x in values[:2]]
            product = values[0] * values[1]
            return product + self._read(sources[2], double) if name == "mad" else product
        return _OPERATIONS[name](*values)

    def _converted(self, kinds: list[str], sources: list[str]) -> np.ndarray:
        *modes, to, source = kinds
        if to.endswith("x2"):
            high, low = (_narrow(self._read(x, "f32"), to[:-2]) for x in sources)
            return high.astype(np.uint32) << 16 | low
        if to in ("bf16", "f16"):
            return _narrow(self._read(sources[0], "f32"), to)
        if source in ("bf16", "f16"):
            return _wide(self._read(sources[0], "b16"), source)
        value = self._read(sources[0], source)
        return (np.trunc(value) if "rzi" in modes else value).astype(_type(to))

    def _unpack(self, vector: str, whole: np.ndarray, chosen: np.ndarray) -> None:
        parts = _parts(vector)
        width = whole.itemsize // len(parts)
        for part, value in zip(parts, whole.view(f"u{width}").reshape(self.n, -1).T, strict=True):
            self._write(part, np.ascontiguousarray(value), chosen)

    def _packed(self, parts: list[str], kind: str) -> np.ndarray:
        columns = [self._read(x, f"b{int(kind[1:]) // len(parts)}") for x in parts]
        return np.stack(columns, axis=1).view(_type(kind)).reshape(self.n)

    def _access(
        self, stores: bool, kinds: list[str], operands: list[str], chosen: np.ndarray
    ) -> None:
        vector, address = reversed(operands) if stores else operands
        registers, size = _parts(vector), int(kinds[-1][1:]) // 8
        base, _, offset = address.strip("[] ").partition("+")
        base = base.strip()
        if kinds[0] == "param":
            value = np.full(self.n, self.arguments[base], f"u{size}")
            self._write(registers[0], value, chosen)
            return
        threads = np.flatnonzero(chosen)
        if len(threads) == 0:
            return
        at = _bits(self.registers[base])[threads].astype(np.int64) + int(offset or "0")
        n_bytes = size * len(registers)
        if (at % n_bytes).any():
            raise Fault(f"access of {n_bytes} bytes at an address that is not aligned")
        if kinds[0] == "shared":
            memory: Any = self.shared.view(f"u{size}")
            if (at + n_bytes > self.shared.shape[1]).any():
                raise Fault("access outside of the shared memory")
            place: Any = lambda i: (self.row[threads], at // size + i)  # noqa: E731
        else:
            assert kinds[0] == "global", kinds
            region = np.searchsorted(self.first_bytes, at, "right") - 1
            if ((region < 0) | (at + n_bytes - 1 > self.last_bytes[region])).any():
                raise Fault("access outside of all tensors of the launch")
            self.accesses.append((stores, n_bytes, at, self.program[threads]))
            memory = _memory(size)
            place = lambda i: (at - _BASE) // size + i  # noqa: E731
        for i, register in enumerate(registers):
            if stores:
                memory[place(i)] = self._read(register, f"b{8 * size}")[threads]
            else:
                value = np.zeros(self.n, f"u{size}")
                value[threads] = memory[place(i)]
                self._write(register, value, chosen)

    def _read(self, operand: str, kind: str) -> np.ndarray:
        """The value of a register, or of a constant, for every thread."""
        dtype = _type(kind)
        if operand in self.registers:
            return self.registers[operand].view(dtype)
        if operand.startswith("%"):  # nothing has been written to it, so anything will do
            return np.full(self.n, -1, _type(f"s{8 * dtype.itemsize}")).view(dtype)
        if operand[:2] in ("0f", "0d"):
            bits = np.array(int(operand[2:], 16), f"u{dtype.itemsize}")
        else:
            bits = np.array(int(operand, 0) & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
        return np.full(self.n, bits).view(dtype)

    def _write(self, register: str, value: np.ndarray, chosen: np.ndarray) -> None:
        if register == "_":
            return
        bits = _bits(value)
        if register not in self.registers:
            self.registers[register] = np.zeros_like(bits)
        np.copyto(self.registers[register], bits, where=chosen)


def _check_together(chosen: np.ndarray, n: int, opcode: str) -> None:
    """Raise unless of every `n` neighbours all threads are there, or none."""
    groups = chosen.reshape(-1, n)
    if not (groups.all(1) | ~groups.any(1)).all():
        raise Fault(f"{opcode} is not reached by all threads together")


def check_races(accesses: Sequence[tuple[bool, int, np.ndarray, np.ndarray]]) -> None:
    """Raise if a program wrote bytes that another one of its launch wrote or read."""

    def pairs(wanted: bool) -> np.ndarray:
        """All that was stored, or loaded: the address in units of 2 bytes, then the program."""
        found = [np.zeros(0, np.int64)]
        for stores, n_bytes, at, program in accesses:
            if stores == wanted:
                units = at[:, None] // 2 + np.arange(max(1, n_bytes // 2))
                found.append((units << _PROGRAM_BITS | program[:, None]).ravel())
        return np.unique(np.concatenate(found))

    written = pairs(True)
    places = written >> _PROGRAM_BITS  # in order, as `written` is
    if (places[1:] == places[:-1]).any():
        raise Fault("two programs write the same bytes")
    read = pairs(False)
    read = read[np.isin(read >> _PROGRAM_BITS, places)]
    if not np.isin(read, written).all():
        raise Fault("a program reads bytes that another one writes")


class Driver:
    """The driver by which Triton learns for what device it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = self.get_current_stream = lambda *_: 0


class EmulatedKernel:
    """Compiles a kernel as a launch by Triton does, and runs it here."""

    n_launches = 0

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.__name__ = kernel, kernel.__name__
        self.codes: dict[Any, Code] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def warmup(self, *args: Any, grid: tuple[int], **options: Any) -> Code:
        options |= launch_options("cuda")  # in place of those for the interpreter
        compiled = self.kernel.warmup(*args, grid=grid, **options)
        if compiled not in self.codes:
            self.codes[compiled] = Code(compiled.asm["ptx"], compiled.metadata.shared)
        return self.codes[compiled]

    def _launch(self, grid: tuple[int], *args: Any, **options: Any) -> None:
        EmulatedKernel.n_launches += 1
        (n_programs,) = grid
        assert n_programs < 1 << _PROGRAM_BITS
        code = self.warmup(*args, grid=grid, **options)
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        arguments = dict.fromkeys(code.params, 0)  # Triton adds two that are not used
        arguments.update(zip(code.params, values, strict=False))
        regions = [(x.data_ptr(), x.nbytes) for x in args if isinstance(x, torch.Tensor)]
        if "GRAD" in options:
            regions += _tensors_of_step(n_programs, args, options)
        first, last = np.array(list(_joined(regions))).T
        accesses: list[Any] = []
        with np.errstate(all="ignore"):
            for start in range(0, n_programs, _PROGRAMS_AT_ONCE):
                programs = np.arange(start, min(start + _PROGRAMS_AT_ONCE, n_programs))
                Threads(code, programs, n_programs, arguments, first, last, accesses).run()
        check_races(accesses)


def _tensors_of_step(
    n_programs: int, args: Sequence[Any], options: dict[str, Any]
) -> Iterator[tuple[int, int]]:
    """Address and bytes of all that the tables give to a launch of `step_kernel`."""
    programs, tensors, inputs, *_, first = args
    param, grad, moment = (options[x].primitive_bitwidth // 8 for x in ("PARAM", "GRAD", "MOMENT"))
    sizes = {"param": param, "exp_avg": moment, "exp_avg_sq": moment, "max_exp_avg_sq": moment}
    chosen = np.unique(programs.numpy().reshape(-1, 2)[first : first + n_programs, 0])
    rows = tensors.numpy().view(TENSOR).reshape(-1)[chosen]
    grads = inputs.numpy().reshape(-1, FIELDS.input_row)[chosen, FIELDS.grad]
    for row, address in zip(rows, grads.tolist(), strict=True):
        n = int(row["n_elements"])
        yield int(row["step"]), 4
        yield address, n * grad
        yield int(row["prev_grad"]), n * grad
        for name, size in sizes.items():
            yield int(row[name]), n * size


def _joined(regions: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First and last byte of stretches of memory, in order; tables may lie in one another."""
    end = -1
    first = end
    for address, n_bytes in sorted(regions):
        if address == 0 or n_bytes == 0:
            continue
        if address > end:
            if end >= 0:
                yield first, end
            first = address
        end = max(end, address + n_bytes - 1)
    yield first, end


def install(engine: Any, target: str, put: Callable[..., None] = setattr) -> None:
    """Let the module of the Triton engine launch its kernels here; `put` sets its attributes."""
    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    for name in ("step_kernel", "decide_kernel"):
        put(engine, name, EmulatedKernel(getattr(engine, name)))


def pytest_configure() -> None:
    from grades_kernels.backends import triton_engine

    install(triton_engine, os.environ["PTX_TARGET"])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{EmulatedKernel.n_launches} launches of PTX")
