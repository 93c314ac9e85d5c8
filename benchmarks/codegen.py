"""Compile every variant of the kernels for GPUs that need not be there, and read the machine code.

    python -m benchmarks.codegen [--quick] [--target sm_90 gfx942] [--save]

Exits with 1 if a variant spills registers, or if it touches a tensor on its aligned path with less
than 16 bytes per thread and access. There is no exception for mixed dtypes: a block is as large as
16 bytes per thread of the narrowest tensor, so that a wider one takes two whole accesses.

Both paths through a block, aligned and masked, are in the same machine code, and the masked one is
narrow by right. They are told apart by the line table that the compiler writes beside each access:
what comes from the body of an `if FULL:` is the aligned path. So that an access which the line
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import harness
from grades_kernels.freezing import STATISTICS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
QUICK_TARGETS = ("sm_90", "gfx942")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
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


class Variant(NamedTuple):
    dtypes: str
    statistic: str
    measure: bool
    update: bool
    keep: bool
    amsgrad: bool = False
    scaled: bool = False
    agree: bool = False

    def __str__(self) -> str:
        flags = ("measure", "update", "keep", "amsgrad", "scaled", "agree")
        return " ".join([self.statistic, *(flag for flag in flags if getattr(self, flag))])

    def accesses(self) -> tuple[list[torch.dtype], list[torch.dtype]]:
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
            loads += [m] * {"momentum": 1, "signal": 2}.get(self.statistic, 0)
        return loads, stores


class Code(NamedTuple):
    """What the machine code of one kernel says about itself."""

    loads: Counter  # bytes per thread and access on the aligned path -> number
    stores: Counter
    registers: int
    spilled: int  # bytes of local memory per thread, or registers spilled
    shared: int  # bytes


def variants(chosen: Iterable[str], quick: bool) -> Iterator[Variant]:
    for dtypes in chosen:
        for flags in FLAGS:
            if quick:
                yield Variant(dtypes, *flags)
                continue
            for amsgrad in (False, True) if flags[2] else (False,):
                for scaled in (False, True):
                    yield Variant(dtypes, *flags, amsgrad, scaled)
        yield Variant(dtypes, *FLAGS[-1], agree=True)
        if quick:  # the one with the most tensors
            yield Variant(dtypes, *FLAGS[-1], amsgrad=True, scaled=True)


def load_kernels(path: Path | None) -> ModuleType:
    """The kernels of the package, or a copy of their module under another path."""
    name = "grades_kernels.triton_kernels"
    if path is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def aligned_lines(kernels: ModuleType) -> set[int]:
    """Lines of the kernels' source that run on the aligned path alone: the bodies of `if FULL:`."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(kernels.__file__).read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "FULL":
            lines.update(*(range(x.lineno, x.end_lineno + 1) for x in node.body))
    return lines


def compile_step(kernels: ModuleType, variant: Variant, target: GPUTarget) -> tuple[Any, int]:
    """The compiled kernel as a step launches it, and its elements per thread and block."""
    dtypes = DTYPES[variant.dtypes]
    block = kernels.block_size(min(dtype.itemsize for dtype in dtypes))
    constants = {
        **dict(zip(("PARAM", "GRAD", "MOMENT"), map(kernels._DTYPES.get, dtypes), strict=True)),
        "STATISTIC": variant.statistic,
        "MEASURE": variant.measure,
        "UPDATE": variant.update,
        "KEEP": variant.keep,
        "AMSGRAD": variant.amsgrad,
        "SCALED": variant.scaled,
        "AGREE": variant.agree,
        "BLOCK": block,
    }
    pointers = {
        "blocks_ptr": "*i32",
        "tensors_ptr": "*i64",
        "inputs_ptr": "*i64",
        "units_ptr": "*i64",
        "partials_ptr": "*fp32",
        "tickets_ptr": "*i32",
        "agreed_ptr": "*fp64",
    }
    scalars = {"first_program": "i32"}
    options = kernels.launch_options(target.backend, target.warp_size)
    compiled = _compile(kernels._step_kernel, pointers, scalars, constants, target, options)
    return compiled, block // kernels.THREADS


def compile_judge(kernels: ModuleType, target: GPUTarget) -> Any:
    pointers = {"agreed_ptr": "*fp64", "inputs_ptr": "*i64", "units_ptr": "*i64"}
    return _compile(kernels._judge_kernel, pointers, {}, {}, target, {"enable_fp_fusion": False})


def compile_begin(kernels: ModuleType, target: GPUTarget) -> Any:
    pointers = dict.fromkeys(("inputs_ptr", "units_ptr", "tensors_ptr", "hyper_ptr"), "*i64")
    scalars, constants = {"n_tensors": "i32"}, {"TILE": 128}
    return _compile(
        kernels._begin_kernel, pointers, scalars, constants, target, {"enable_fp_fusion": False}
    )


def _compile(kernel, pointers, scalars, constants, target, options):
    source = ASTSource(
        kernel,
        {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")},
        constants,
        # Tables come from torch's allocator; integers are not specialised.
        {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    return triton.compile(source, target=target, options=options)


def inspect(compiled: Any, lines: set[int]) -> Code:
    """Widths of the aligned path's accesses, and what the kernel takes of the processor."""
    shared = compiled.metadata.shared
    if "ptx" in compiled.asm:
        usage = _cuda_usage(compiled.asm["cubin"])
        counts = _count(compiled.asm["ptx"], lines, _PTX_ACCESS, _ptx_access)
        return Code(*counts, usage["REG"], usage["STACK"] + usage["LOCAL"], shared)
    text = compiled.asm["amdgcn"]
    usage = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    counts = _count(text, lines, _GCN_ACCESS, _gcn_access)
    spilled = usage["vgpr_spill_count"] + usage["sgpr_spill_count"]
    return Code(*counts, usage["vgpr_count"], spilled + usage["private_segment_fixed_size"], shared)


_LOC = re.compile(r"^\s*\.loc\s+\d+\s+(\d+)", re.MULTILINE)
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_([a-z]+)(?:x(\d))?[\s_]")
_GCN_BYTES = {"dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1, "sbyte": 1, "sshort": 2}


def _ptx_access(kind: str, vector: str, bits: str) -> tuple[bool, int]:
    return kind == "ld", int(vector or 1) * int(bits) // 8


def _gcn_access(kind: str, unit: str, vector: str) -> tuple[bool, int]:
    return kind == "load", int(vector or 1) * _GCN_BYTES[unit]


def _count(text, lines, pattern, parse) -> tuple[Counter, Counter]:
    loads, stores, line, in_asm = Counter(), Counter(), 0, False
    for instruction in text.splitlines():
        if "inline asm" in instruction:
            in_asm = "begin" in instruction
        if place := _LOC.match(instruction):
            # Inside inline assembly LLVM counts on from the line where it stands.
            line = line if in_asm else int(place[1])
        elif line in lines and (access := pattern.search(instruction)):
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


def faults(variant: Variant, code: Code, elements_per_thread: int) -> list[str]:
    found = ["spills registers"] if code.spilled else []
    for name, counts, dtypes in zip(
        ("loads", "stores"), (code.loads, code.stores), variant.accesses(), strict=True
    ):
        if narrow := [n for n in counts if n < WIDE]:
            found.append(f"{name} of {min(narrow)} bytes")
        total = sum(n * count for n, count in counts.items())
        needed = sum(dtype.itemsize for dtype in dtypes) * elements_per_thread
        if total != needed:
            found.append(f"{name} {total} bytes per thread, needs {needed}")
    return found


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
    lines, start = aligned_lines(kernels), time.perf_counter()
    dtypes = options.dtypes or (QUICK_DTYPES if options.quick else DTYPES)
    rows = []
    for name in options.target or (QUICK_TARGETS if options.quick else TARGETS):
        for variant in variants(dtypes, options.quick):
            compiled, per_thread = compile_step(kernels, variant, TARGETS[name])
            code = inspect(compiled, lines)
            rows.append(_row(name, variant, code, faults(variant, code, per_thread)))
        for other, compile_other in (("judge", compile_judge), ("begin", compile_begin)):
            code = inspect(compile_other(kernels, TARGETS[name]), set())
            rows.append(_row(name, other, code, ["spills registers"] if code.spilled else []))
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
