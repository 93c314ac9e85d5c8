"""Compile every variant of the kernels for GPUs that need not be there, and read the machine code.

    python -m benchmarks.codegen [--quick] [--target sm_90 gfx942] [--save]

Exits with 1 if a kernel spills registers, if it touches a tensor on its aligned path with less
than 16 bytes per thread and access, or if it has an atomic operation: no result may depend on the
order in which programs run. There is no exception for mixed dtypes: a block is as large as 16 bytes
per thread of the narrowest tensor, so that a wider one takes two whole accesses.

Both paths through a block, aligned and masked, are in the same machine code, and the masked one is
narrow by right. They are told apart by the line table that the compiler writes beside each access:
an access from the body of an `if FULL:` is on the aligned path. So that an access which the line
table loses cannot pass, the bytes found there must be exactly those that the variant's tensors
take: each once.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
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
from grades_kernels.freezing.statistics import STATISTICS

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

# MEASURE, UPDATE, STORE_GRAD as a step launches them.
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
    """What the machine code of one kernel says about itself."""

    loads: Counter  # bytes per thread and access on the aligned path -> number
    stores: Counter
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


def aligned_lines(kernels: ModuleType) -> set[int]:
    """Line numbers of the kernels' source on the aligned path alone: the bodies of `if FULL:`."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(kernels.__file__).read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "FULL":
            for statement in node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return lines


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
        "STORE_GRAD": variant.keep,
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


def inspect(compiled: Any, aligned: set[int]) -> Code:
    """Widths of the aligned path's accesses, and what the kernel takes of the processor."""
    shared = compiled.metadata.shared
    if "ptx" in compiled.asm:
        usage = _cuda_usage(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
        counts = _count(text, aligned, _PTX_ACCESS, _ptx_access)
        local = usage["STACK"] + usage["LOCAL"]
        return Code(*counts, usage["REG"], local, shared, len(_ATOMIC.findall(text)))
    text = compiled.asm["amdgcn"]
    usage = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    counts = _count(text, aligned, _GCN_ACCESS, _gcn_access)
    spilled = usage["vgpr_spill_count"] + usage["sgpr_spill_count"]
    spilled += usage["private_segment_fixed_size"]
    return Code(*counts, usage["vgpr_count"], spilled, shared, len(_ATOMIC.findall(text)))


_LOC = re.compile(r"^\s*\.loc\s+\d+\s+(\d+)", re.MULTILINE)
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_([a-z]+)(?:x(\d))?[\s_]")
_ATOMIC = re.compile(r"\b(?:atom|red)\.\w|\b(?:global|buffer|flat|ds)_(?:atomic|add|cmpst)_")
_GCN_BYTES = {"dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1, "sbyte": 1, "sshort": 2}


def _ptx_access(kind: str, vector: str, bits: str) -> tuple[bool, int]:
    return kind == "ld", int(vector or 1) * int(bits) // 8


def _gcn_access(kind: str, unit: str, vector: str) -> tuple[bool, int]:
    return kind == "load", int(vector or 1) * _GCN_BYTES[unit]


def _instructions(text: str) -> Iterator[tuple[int, str]]:
    """Every line of assembly with the line of the source that it comes from."""
    line, in_asm = 0, False
    for instruction in text.splitlines():
        if "inline asm" in instruction:
            in_asm = "begin" in instruction
        if found := _LOC.match(instruction):
            # Inside inline assembly LLVM counts on from the line where it stands.
            line = line if in_asm else int(found[1])
        else:
            yield line, instruction


def _count(text, lines, pattern, parse) -> tuple[Counter, Counter]:
    loads, stores = Counter(), Counter()
    for line, instruction in _instructions(text):
        if line in lines and (access := pattern.search(instruction)):
            is_load, n_bytes = parse(*access.groups())
            (loads if is_load else stores)[n_bytes] += 1
    return loads, stores


def _cuda_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def faults_of_any(code: Code) -> list[str]:
    found = ["spills registers"] if code.spilled else []
    return found + (["has atomic operations"] if code.atomics else [])


def faults(variant: Variant, code: Code, elements_per_thread: int) -> list[str]:
    found = faults_of_any(code)
    for name, counts, dtypes in zip(
        ("loads", "stores"), (code.loads, code.stores), variant.accesses(), strict=True
    ):
        if narrow := [n for n in counts if n < WIDE]:
            found.append(f"{name} of {min(narrow)} bytes")
        total = sum(n * count for n, count in counts.items())
        needed = sum(map(_bytes, dtypes)) * elements_per_thread
        if total != needed:
            found.append(f"{name} {total} bytes per thread, needs {needed}")
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
    parser.add_argument("--save", action="store_true", help="write results/codegen.csv anew")
    options = parser.parse_args()
    kernels = load_kernels(options.kernels)
    aligned, start = aligned_lines(kernels), time.perf_counter()
    dtypes = options.dtypes or (QUICK_DTYPES if options.quick else DTYPES)
    rows = []
    for name in options.target or (QUICK_TARGETS if options.quick else TARGETS):
        for variant in variants(dtypes, options.quick):
            compiled, per_thread = compile_step(kernels, variant, TARGETS[name])
            code = inspect(compiled, aligned)
            rows.append(_row(name, variant, code, faults(variant, code, per_thread)))
        for flags in DECISIONS:
            code = inspect(compile_decide(kernels, TARGETS[name], flags), set())
            label = " ".join(["decide", *flags]).lower()
            rows.append(_row(name, label, code, faults_of_any(code)))
    harness.print_table("Machine code of the kernels (widths: aligned path, per thread)", rows)
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s, {len(bad)} with faults")
    if options.save:
        path = harness.RESULTS / "codegen.csv"
        path.unlink(missing_ok=True)
        harness.append_rows("codegen", rows, torch.device("cpu"))
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
