"""Compile every variant of the kernels for GPUs that need not be there, and read the machine code.

    python -m benchmarks.codegen [--quick] [--target sm_90 gfx942] [--save]

Exits with 1 if a variant spills registers, if it touches a tensor on its aligned path with less
than 16 bytes per thread and access, or if the program that judges a unit could miss what other
programs have measured. There is no exception for mixed dtypes: a block is as large as 16 bytes per
thread of the narrowest tensor, so that a wider one takes two whole accesses.

Both paths through a block, aligned and masked, are in the same machine code, and the masked one is
narrow by right. They are told apart by the line table that the compiler writes beside each access:
what comes from the body of an `if FULL:` is the aligned path. So that an access which the line
table loses cannot pass, the bytes found there must be exactly those that the variant's tensors
take: each once.

The judge is the program with the last ticket of a unit; it sums shares that other programs have
stored. That it sees them follows from a chain whose links are looked for in the machine code: the
stores, a barrier of the program's threads, the ticket (an atomic addition that releases what came
before it and acquires what others released, for the whole device), another barrier, the loads.
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
    unordered: list[str]  # links missing from the chain between shares and judge


class Lines(NamedTuple):
    """Where in the kernels' source the accesses stand that are looked for, by line number."""

    aligned: set[int]  # on the aligned path alone: the bodies of `if FULL:`
    shares: set[int]  # the stores of what a program has measured
    ticket: set[int]
    sums: set[int]  # the loads of what all programs of a unit have measured


NOWHERE = Lines(set(), set(), set(), set())


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


def find_lines(kernels: ModuleType) -> Lines:
    """The lines to look for, from the syntax tree of the kernels' source."""
    tree = ast.parse(Path(kernels.__file__).read_text())
    lines = Lines(set(), set(), set(), set())
    (sums,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "_sum_shares")
    inside_sums = set(ast.walk(sums))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "FULL":
            for statement in node.body:
                lines.aligned.update(_range(statement))
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            if call.startswith("tl.store(share"):
                lines.shares.update(_range(node))
            elif call.startswith("tl.atomic_add(tickets_ptr"):
                lines.ticket.update(_range(node))
            elif call.startswith("tl.load(") and node in inside_sums:
                lines.sums.update(_range(node))
    return lines


def _range(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


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


def inspect(compiled: Any, lines: Lines) -> Code:
    """Widths of the aligned path's accesses, what the kernel takes of the processor, its order."""
    shared = compiled.metadata.shared
    if "ptx" in compiled.asm:
        usage = _cuda_usage(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
        counts = _count(text, lines.aligned, _PTX_ACCESS, _ptx_access)
        local = usage["STACK"] + usage["LOCAL"]
        return Code(*counts, usage["REG"], local, shared, unordered(text, lines, PTX))
    text = compiled.asm["amdgcn"]
    usage = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    counts = _count(text, lines.aligned, _GCN_ACCESS, _gcn_access)
    spilled = usage["vgpr_spill_count"] + usage["sgpr_spill_count"]
    spilled += usage["private_segment_fixed_size"]
    return Code(*counts, usage["vgpr_count"], spilled, shared, unordered(text, lines, GCN))


_LOC = re.compile(r"^\s*\.loc\s+\d+\s+(\d+)", re.MULTILINE)
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_([a-z]+)(?:x(\d))?[\s_]")
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
        if place := _LOC.match(instruction):
            # Inside inline assembly LLVM counts on from the line where it stands.
            line = line if in_asm else int(place[1])
        else:
            yield line, instruction


def _count(text, lines, pattern, parse) -> tuple[Counter, Counter]:
    loads, stores = Counter(), Counter()
    for line, instruction in _instructions(text):
        if line in lines and (access := pattern.search(instruction)):
            is_load, n_bytes = parse(*access.groups())
            (loads if is_load else stores)[n_bytes] += 1
    return loads, stores


# What the links of the chain look like: of the instructions that stand between the last store of a
# share and the first load for a sum, in the order in which they must come.
PTX = {
    # Other multiprocessors have stored the shares: not by way of the first-level cache (`.cg`), let
    # alone the one for constants (`.nc`).
    "load": re.compile(r"\bld\.global\.cg\.b"),
    "chain": {
        "a barrier before the ticket": re.compile(r"\bbar(rier)?\.(cta\.)?sync\b"),
        "a ticket that releases and acquires": re.compile(
            r"\batom(?=\S*\.acq_rel)(?=\S*\.(gpu|sys))\S*\.add\b"
        ),
        "a barrier after the ticket": re.compile(r"\bbar(rier)?\.(cta\.)?sync\b"),
    },
}
GCN = {
    "load": re.compile(r"\b(global|buffer|flat)_load_"),
    "chain": {
        "a barrier before the ticket": re.compile(r"\bs_barrier\b"),
        "a release before the ticket": re.compile(r"\bbuffer_wbl2 sc1\b"),
        "a wait for the release": re.compile(r"\bs_waitcnt vmcnt\(0\)"),
        "a ticket": re.compile(r"\bglobal_atomic_add\b"),
        "a wait for the ticket": re.compile(r"\bs_waitcnt vmcnt\(0\)"),
        "an acquisition after the ticket": re.compile(r"\bbuffer_inv sc1\b"),
        "a barrier after the ticket": re.compile(r"\bs_barrier\b"),
    },
}
_STORE = re.compile(r"\b(st\.global|(global|buffer|flat)_store_)")
_LOAD = re.compile(r"\b(ld\.global|(global|buffer|flat)_load_)")
_ATOMIC = re.compile(r"\b(atom\.|red\.|(global|buffer|flat)_atomic_)")


def unordered(text: str, lines: Lines, links: dict[str, Any]) -> list[str]:
    """What is missing between the shares that a program stores and those that a judge loads."""
    code = list(_instructions(text))
    stores = [n for n, (at, x) in enumerate(code) if at in lines.shares and _STORE.search(x)]
    tickets = [n for n, (at, x) in enumerate(code) if at in lines.ticket and _ATOMIC.search(x)]
    loads = [n for n, (at, x) in enumerate(code) if at in lines.sums and _LOAD.search(x)]
    if not (stores and len(tickets) == 1 and loads and max(stores) < tickets[0] < min(loads)):
        return ["shares, ticket and sums are not in this order"]
    past_cache = all(links["load"].search(code[n][1]) for n in loads)
    missing = [] if past_cache else ["sums are read through the first-level cache"]
    between = iter(x for _, x in code[max(stores) + 1 : min(loads)])
    for name, link in links["chain"].items():
        if not any(map(link.search, between)):  # goes on behind the link before
            return [*missing, f"lacks {name}"]
    return missing


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
    found += code.unordered if variant.measure else []
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
    lines, start = find_lines(kernels), time.perf_counter()
    dtypes = options.dtypes or (QUICK_DTYPES if options.quick else DTYPES)
    rows = []
    for name in options.target or (QUICK_TARGETS if options.quick else TARGETS):
        for variant in variants(dtypes, options.quick):
            compiled, per_thread = compile_step(kernels, variant, TARGETS[name])
            code = inspect(compiled, lines)
            rows.append(_row(name, variant, code, faults(variant, code, per_thread)))
        for other, compile_other in (("judge", compile_judge), ("begin", compile_begin)):
            code = inspect(compile_other(kernels, TARGETS[name]), NOWHERE)
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
