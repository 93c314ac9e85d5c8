"""The machine code of the kernels, compiled for GPUs that need not be there.

Contract of `benchmarks/codegen.py`: exit status 0 if no variant spills registers, every access to a
tensor on the aligned path moves 16 bytes, and whoever judges a unit sees what all its programs have
measured; 1 otherwise, with the fault in its row. Each kind of fault is put into a copy of the
kernels on purpose and must be reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "grades_kernels" / "triton_kernels.py"


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def codegen(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "benchmarks.codegen", *arguments)


def patched(tmp_path: Path, old: str, new: str) -> str:
    """The path of a copy of the kernels with one piece of text replaced."""
    source = KERNELS.read_text()
    assert source.count(old) == 1, f"the kernels have changed: {old!r}"
    path = tmp_path / "triton_kernels.py"
    path.write_text(source.replace(old, new))
    return str(path)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_aligned_path_is_wide_and_nothing_spills(target):
    run = codegen("--quick", "--target", target)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "44 kernels" in run.stdout


def test_unhinted_pointers_are_reported(tmp_path):
    """Without the hint every aligned access falls apart into single elements."""
    kernels = patched(tmp_path, "ptr = tl.multiple_of(ptr, 16)", "ptr = ptr + 0")
    run = codegen("--quick", "--target", "sm_90", "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "loads of 4 bytes" in run.stdout and "stores of 4 bytes" in run.stdout


def test_lost_accesses_are_reported(tmp_path):
    """An access that the line table does not put on the aligned path is missed, not forgiven."""
    line = "        x = tl.load(_at(address, first, dtype, FULL) + lanes)\n"
    kernels = patched(
        tmp_path,
        f"    if FULL:\n{line}    else:",
        f"    if FULL == 1:\n{line}    else:",
    )
    run = codegen("--quick", "--target", "sm_90", "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "loads 0 bytes per thread, needs 64" in run.stdout


def test_spills_are_reported(tmp_path):
    """Blocks of eight times the size need more registers than there are."""
    kernels = patched(tmp_path, "* 16 // itemsize", "* 128 // itemsize")
    run = codegen("--quick", "--target", "sm_90", "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "spills registers" in run.stdout


CHAIN = """
import sys
from pathlib import Path
from benchmarks import codegen

for path in sys.argv[1:]:
    kernels = codegen.load_kernels(Path(path))
    lines = codegen.find_lines(kernels)
    for target, asm, links, barrier in (
        ("sm_90", "ptx", codegen.PTX, "bar.sync"),
        ("gfx942", "amdgcn", codegen.GCN, "s_barrier"),
    ):
        variant = codegen.Variant("fp32", "norm", measure=True, update=False, keep=False)
        compiled, _ = codegen.compile_step(kernels, variant, codegen.TARGETS[target])
        text = compiled.asm[asm]
        print("; ".join(codegen.unordered(text, lines, links)))
        print("; ".join(codegen.unordered(text.replace(barrier, "nop"), lines, links)))
"""


TICKET = 'tl.atomic_add(tickets_ptr + unit, 1, sem="acq_rel")'
CACHED = "sums are read through the first-level cache"
RELAXED, RELEASE = "lacks a ticket that releases and acquires", "lacks a release before the ticket"
BROKEN = {  # what is replaced, and what must be said of sm_90 and of gfx942
    "whole": (TICKET, TICKET, "", ""),
    "relaxed": (TICKET, TICKET.replace("acq_rel", "relaxed"), RELAXED, RELEASE),
    "acquires alone": (TICKET, TICKET.replace("acq_rel", "acquire"), RELAXED, RELEASE),
    "releases alone": (
        TICKET,
        TICKET.replace("acq_rel", "release"),
        RELAXED,
        "lacks an acquisition after the ticket",
    ),
    "for its own block": (TICKET, TICKET.replace(")", ', scope="cta")'), RELAXED, RELEASE),
    "cached": ('            cache_modifier=".cg",\n', "", CACHED, ""),
}


def test_a_broken_chain_from_shares_to_judge_is_reported(tmp_path):
    """A ticket that orders too little, sums through a cache, no barrier before the ticket.

    Triton itself puts a barrier before an atomic operation whose result all threads need, so the
    barrier is taken out of the machine code and not out of the source.
    """
    paths = []
    for name, (old, new, *_) in BROKEN.items():
        (tmp_path / name).mkdir()
        paths.append(patched(tmp_path / name, old, new))
    run = python("-c", CHAIN, *paths)
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert said[::2] == [message for broken in BROKEN.values() for message in broken[2:]]
    assert all("lacks a barrier before the ticket" in message for message in said[1::2])
