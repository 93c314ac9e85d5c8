"""The machine code of the kernels, compiled for GPUs that need not be there.

Contract of `benchmarks/codegen.py`: exit status 0 if no variant spills registers, every access to a
tensor on the aligned path moves 16 bytes, all loads come before their uses, and no kernel has
an atomic operation; 1 otherwise, with the fault in its row. Each kind of fault is put into a copy
of the kernels on purpose and must be reported.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest
from harness import ROOT, run_python

pytest.importorskip("triton")

KERNELS = ROOT / "grades_kernels" / "backends" / "triton_kernels.py"


# For each list of arguments the rows and the status, of AdamW alone and of the variants with the
# most tensors: every fault shows in them. A kernel takes half a second to disassemble.
SEVERAL = """
import json, sys
from benchmarks import codegen
codegen.FLAGS, codegen.DECISIONS = [codegen.FLAGS[0], codegen.FLAGS[-1]], ()
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    print("status", codegen.main())
"""


run = functools.partial(run_python, cwd=ROOT, TRITON_INTERPRET=None)


def patched(path: Path, edits: dict[str, str]) -> str:
    """The path of a copy of the kernels with some pieces of text replaced."""
    source = KERNELS.read_text()
    for old, new in edits.items():
        assert old in source, f"the kernels have changed: {old!r}"
        source = source.replace(old, new)
    path.write_text(source)
    return str(path)


def test_aligned_path_is_wide_and_nothing_spills():
    done = run("-m", "benchmarks.codegen", "--quick", "--target", "sm_90", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 kernels" in done.stdout


LOAD_PARAM = "                p = _load(param_ptr, offsets, mask, NARROW)\n"
# Edits of the kernels, the targets and the messages that must appear in a row of each.
FAULTS = {
    "without the hint every aligned access falls apart into single elements": (
        {"1 if NARROW else 16": "1"},
        ("sm_90",),
        ["loads 0 bytes per thread in wide accesses, needs 64", "stores 0 bytes"],
    ),
    "blocks of eight times the size need more registers than there are": (
        {"* 16 // itemsize": "* 128 // itemsize"},
        ("sm_90",),
        ["spills registers"],
    ),
    "a load behind the stores of other tensors, and a sum by atomic additions": (
        {
            LOAD_PARAM: "                p = grad\n",
            "before = p.": "before = _load(param_ptr, offsets, mask, NARROW).",
            "tl.store(partial, numerator)": "tl.atomic_add(partial, numerator)",
        },
        ("sm_90", "gfx942"),
        ["waits between its loads", "has atomic operations"],
    ),
    "a load whose address depends on another load": (
        {LOAD_PARAM: LOAD_PARAM.replace("param_ptr", "param_ptr + tl.max(m.to(tl.int32)) * 16")},
        ("sm_90",),
        ["waits between its loads"],
    ),
}


def test_faults_are_reported(tmp_path):
    options = ("--quick", "--dtypes", "fp32", "--kernels")
    calls = [
        [*options, patched(tmp_path / f"{n}.py", edits), "--target", *targets]
        for n, (edits, targets, _) in enumerate(FAULTS.values())
    ]
    done = run("-c", SEVERAL, json.dumps(calls))
    assert done.returncode == 0, done.stdout + done.stderr
    *reports, _ = done.stdout.split("status 1")
    for (name, (_, targets, messages)), report in zip(FAULTS.items(), reports, strict=True):
        for message, target in itertools.product(messages, targets):
            rows = [line for line in report.splitlines() if target in line]
            assert any(message in row for row in rows), f"{name}: {message}, {target}\n{report}"
