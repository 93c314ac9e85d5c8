"""Compile every variant of the kernels for GPUs that need not be there, and read the machine code.

    python -m benchmarks.codegen [--quick] [--target sm_90 gfx942] [--save]

Exits with 1 if a kernel spills registers, if it has an atomic operation (no result may depend on
the order in which programs run), or if the path for aligned tensors is not as it should be:

- Every tensor is read and written once, in accesses of at least 16 bytes per thread. There is no
  exception for mixed dtypes: a block is as large as 16 bytes per thread of the narrowest tensor, so
  that a wider one takes two whole accesses.
- All loads of a block come before its stores, and on NVIDIA before the first instruction that needs
  what one of them loads, so that their latencies overlap. This is read off the final code, since
  ptxas moves loads. It also unrolls a loop that only measures: there the loads of one block must be
  together.

The path for unaligned tensors is in the same machine code and has narrower accesses only.
So the wide ones are those of the aligned path; their bytes must be those that the variant's tensors
take, and an access that has fallen apart shows because it is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import harness
from grades_kernels.backends.triton_tables import FIELDS
from grades_kernels.freezing.table import STATISTICS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
QUICK_TARGETS = ("sm_90", "gfx942")

F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
DTYPES = {  # of parameter, gradient and moments
    "fp32": (F32, F32, F32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "bf16, fp32 g": (BF16, F32, BF16),
    "bf16, fp32 m": (BF16, BF16, F32),
}
QUICK_DTYPES = ("fp32", "bf16", "bf16, fp32 m")

# MEASURE, UPDATE, KEEP as a step launches them.
FLAGS = [
    ("norm", False, True, False),  # AdamW alone
    ("change", False, True, True),  # the step before a check
    # "weight_change" is known after the update alone.
    *((statistic, True, False, False) for statistic in STATISTICS if statistic != "weight_change"),
    *((statistic, True, True, False) for statistic in STATISTICS),
    ("change", True, True, True),  # next_step, a check in every step
]
WIDE = 16  # bytes
DECIDE_FLAGS = ("SUM", "COMPARE", "STORE", "LOAD")
DECISIONS = (("SUM", "COMPARE"), ("SUM", "STORE"), ("SUM", "LOAD"), ("SUM",), ("COMPARE",))
BEHIND = ("coefficients_ptr", "decided_ptr", "past_ptr", "units_ptr")


class Variant(NamedTuple):
    dtypes: str
    statistic: str
    measure: bool
    update: bool
    keep: bool
    amsgrad: bool = False
    scaled: bool = False

    def __str__(self) -> str:
        flags = ("measure", "update", "keep", "amsgrad", "scaled")
        return " ".join([self.statistic, *(flag for flag in flags if getattr(self, flag))])

    def accesses(self) -> tuple[list[tl.dtype], list[tl.dtype]]:
        """The dtypes of the tensors that a block loads and stores."""
        p, g, m = DTYPES[self.dtypes]
        has_change = self.statistic == "change"
        moments = [m] * (3 if self.amsgrad else 2)
        loads = [g] + ([g] if self.measure and has_change else [])
        stores = [g] if self.keep else []
        if self.update:
            loads += [p, *moments]
            stores += [p, *moments] + ([g] if self.scaled else [])
        else:
            loads += [m] * {"momentum": 1, "signal": 2, "gain": 2}.get(self.statistic, 0)
        return loads, stores


class Code(NamedTuple):
    """The facts in the machine code of one kernel."""

    loads: Counter  # bytes per thread and access, of at least 16 -> number
    stores: Counter
    together: list[int]  # bytes of the loads between which nothing stores or needs one of them
    registers: int
    spilled: int  # bytes of local memory per thread, or registers spilled
    shared: int  # bytes
    atomics: int


def variants(chosen: Iterable[str], quick: bool) -> Iterator[Variant]:
    for dtypes in chosen:
        for flags in FLAGS:
            if quick:
                yield Variant(dtypes, *flags)
                continue
            for amsgrad in (False, True) if flags[2] else (False,):
                for scaled in (False, True):
                    yield Variant(dtypes, *flags, amsgrad, scaled)
        if quick:  # the one with the most tensors
            yield Variant(dtypes, *FLAGS[-1], amsgrad=True, scaled=True)


def load_kernels(path: Path | None) -> ModuleType:
    """The kernels of the package, or a copy of their module under another path."""
    name = "grades_kernels.backends.triton_kernels"
    if path is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_step(kernels: ModuleType, variant: Variant, target: GPUTarget) -> tuple[Any, int]:
    """The compiled kernel as a step launches it, and its elements per thread and block."""
    dtypes = DTYPES[variant.dtypes]
    block = kernels.block_size(min(map(_bytes, dtypes)))
    constants = {
        "FIELDS": FIELDS,
        **dict(zip(("PARAM", "GRAD", "MOMENT"), dtypes, strict=True)),
        "STATISTIC": variant.statistic,
        "MEASURE": variant.measure,
        "UPDATE": variant.update,
        "KEEP": variant.keep,
        "AMSGRAD": variant.amsgrad,
        "SCALED": variant.scaled,
        "BLOCK": block,
    }
    pointers = {
        "programs_ptr": "*i32",
        "tensors_ptr": "*i64",
        "inputs_ptr": "*i64",
        "coefficients_ptr": "*fp32",
        "decided_ptr": "*fp64",
        "partials_ptr": "*fp32",
        "found_inf_ptr": "*fp32",
        "grad_scale_ptr": "*fp32",
    }
    options = kernels.launch_options(target.backend, target.warp_size)
    scalars = {"first_program": "i32"}
    compiled = _compile(kernels.step_kernel, pointers, scalars, constants, target, options)
    return compiled, block // kernels.THREADS


def compile_decide(kernels: ModuleType, target: GPUTarget, flags: tuple[str, ...]) -> Any:
    pointers = {
        "units_ptr": "*fp64",
        "members_ptr": "*i32",
        "tensors_ptr": "*i64",
        "past_ptr": "*fp64",
        "partials_ptr": "*fp32",
        "sums_ptr": "*fp64",
        "values_ptr": "*fp64",
        "decided_ptr": "*fp64",
    }
    constants = {"FIELDS": FIELDS, **{flag: flag in flags for flag in DECIDE_FLAGS}}
    options = kernels.launch_options(target.backend, target.warp_size)
    return _compile(kernels.decide_kernel, pointers, {}, constants, target, options)


def _compile(
    kernel: Any,
    pointers: dict[str, str],
    scalars: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    options: dict[str, Any],
) -> Any:
    source = ASTSource(
        kernel,
        {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")},
        constants,
        # Tables come from torch's allocator or lie at 16 bytes in one of its tensors, except those
        # that stand behind another table. Integers are not specialised.
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(pointers) if name not in BEHIND},
    )
    return triton.compile(source, target=target, options=options)


def inspect(compiled: Any) -> Code:
    """Wide accesses and their order, and the registers and memory of the kernel."""
    if "ptx" in compiled.asm:
        text = _disassembled(compiled.asm["cubin"])
        usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        accesses = [
            (kind, int(vector) * int(bits) // 8)
            for kind, vector, bits in _PTX_ACCESS.findall(compiled.asm["ptx"])
        ]
        order, registers, spilled = list(_sass(text)), usage["REG"], usage["STACK"] + usage["LOCAL"]
    else:
        text = compiled.asm["amdgcn"]
        usage = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        accesses = order = list(_gcn(text))
        registers = usage["vgpr_count"]
        # Spilled scalar registers stay in lanes of vector registers; only memory counts.
        spilled = usage["vgpr_spill_count"] + usage["private_segment_fixed_size"]
    loads = Counter(n for kind, n in accesses if kind == "ld" and n >= WIDE)
    stores = Counter(n for kind, n in accesses if kind == "st" and n >= WIDE)
    runs = itertools.groupby(order, lambda step: step[0] == "ld")
    together = [sum(n for _, n in run) for is_load, run in runs if is_load]
    atomics = len(_ATOMIC.findall(text))
    return Code(loads, stores, together, registers, spilled, compiled.metadata.shared, atomics)


_ATOMIC = re.compile(r"\b(?:ATOM[GS]?|REDG?)\.\w|\b(?:global|buffer|flat|ds)_(?:atomic|add|cmpst)_")
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?\.v(\d)\.[bfsu](\d+)\s")
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);")
_SASS_ACCESS = re.compile(r"(LD|ST)G?\.E\.(?:\w+\.)*(128|256)\b")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(lo|st)\w+_dwordx4\b")


def _sass(text: str) -> Iterator[tuple[str, int]]:
    """Wide loads ("ld") and stores ("st") with their bytes, and uses of loaded values."""
    loaded: set[int] = set()
    for opcode, operands in _SASS.findall(text):
        found = [(int(n), 2 if pair else 1) for n, pair in _REGISTER.findall(operands)]
        access = _SASS_ACCESS.match(opcode)
        target = found.pop(0)[0] if access and access[1] == "LD" else None
        if loaded & {n + k for n, width in found for k in range(width)}:
            yield "use", 0
        if access:
            yield access[1].lower(), int(access[2]) // 8
        if access and target is not None:
            loaded |= {target + k for k in range(int(access[2]) // 32)}


def _gcn(text: str) -> Iterator[tuple[str, int]]:
    """Wide loads and stores; LLVM orders uses as it thinks best, in some variants between loads."""
    for access in _GCN_ACCESS.findall(text):
        yield {"lo": "ld", "st": "st"}[access], 16


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults_of_any(code: Code) -> list[str]:
    found = ["spills registers"] if code.spilled else []
    return found + (["has atomic operations"] if code.atomics else [])


def faults(variant: Variant, code: Code, elements_per_thread: int) -> list[str]:
    found = faults_of_any(code)
    needed = [sum(map(_bytes, dtypes)) * elements_per_thread for dtypes in variant.accesses()]
    for name, counts, n in zip(("loads", "stores"), (code.loads, code.stores), needed, strict=True):
        total = sum(n_bytes * count for n_bytes, count in counts.items())
        if total != n:
            found.append(f"{name} {total} bytes per thread in wide accesses, needs {n}")
    if max(code.together, default=0) < needed[0]:
        found.append("waits between its loads")
    return found


def _bytes(dtype: tl.dtype) -> int:
    return dtype.primitive_bitwidth // 8


def _widths(counts: Counter) -> str:
    return " + ".join(f"{count} x {n} B" for n, count in sorted(counts.items())) or "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the main variants, two targets")
    parser.add_argument("--kernels", type=Path, help="compile this copy of triton_kernels.py")
    parser.add_argument(
        "--save", action="store_true", help="write results/codegen-triton-VERSION.csv anew"
    )
    options = parser.parse_args()
    kernels = load_kernels(options.kernels)
    start = time.perf_counter()
    dtypes = options.dtypes or (QUICK_DTYPES if options.quick else DTYPES)
    rows = []
    for name in options.target or (QUICK_TARGETS if options.quick else TARGETS):
        for variant in variants(dtypes, options.quick):
            compiled, per_thread = compile_step(kernels, variant, TARGETS[name])
            code = inspect(compiled)
            rows.append(_row(name, variant, code, faults(variant, code, per_thread)))
        for flags in DECISIONS:
            code = inspect(compile_decide(kernels, TARGETS[name], flags))
            label = " ".join(["decide", *flags]).lower()
            rows.append(_row(name, label, code, faults_of_any(code)))
    harness.print_table("Machine code of the kernels (widths: aligned path, per thread)", rows)
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s, {len(bad)} with faults")
    if options.save:
        name = f"codegen-triton-{triton.__version__.rpartition('.')[0]}"
        (harness.RESULTS / f"{name}.csv").unlink(missing_ok=True)
        harness.append_rows(name, rows, torch.device("cpu"))
    return 1 if bad else 0


def _row(target: str, variant: Variant | str, code: Code, found: list[str]) -> dict[str, Any]:
    return {
        "target": target,
        "dtypes": getattr(variant, "dtypes", ""),
        "variant": str(variant),
        "loads": _widths(code.loads),
        "stores": _widths(code.stores),
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": code.shared,
        "faults": "; ".join(found),
    }


if __name__ == "__main__":
    sys.exit(main())
