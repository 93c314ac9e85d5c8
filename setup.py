"""Builds the native CPU op (csrc/). Every fact about the package stands in pyproject.toml.

GRADES_KERNELS_NATIVE decides: "auto" (default) builds the op where torch and a C++ compiler are at
hand and otherwise installs pure Python, "require" makes that an error, "skip" does not try. torch
is not imported, and an isolated build, which has none, does not download one.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Loops are vectorized although a root might have set errno; no operation is fused or reordered,
    # so that every instruction set gives the same bits.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the binary needs no function newer than 2.10
]


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def why_not_built(torch: Path | None) -> str | None:
    if sys.platform == "win32":
        return "its code is for GCC and Clang"
    if torch is None:
        return (
            "the build sees no torch (install torch, then use `pip install --no-build-isolation`)"
        )
    shim = torch / "include/torch/csrc/stable/c/shim.h"
    if not shim.exists() or "torch_parallel_for" not in shim.read_text():
        return "it needs torch 2.10 or newer"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if not shutil.which(compiler):
        return f"there is no C++ compiler {compiler!r} (set CXX to name another)"
    return None


def extensions() -> list[Extension]:
    mode = os.environ.get("GRADES_KERNELS_NATIVE") or "auto"
    if mode not in ("auto", "require", "skip"):
        sys.exit(f"GRADES_KERNELS_NATIVE={mode}: choose 'auto', 'require' or 'skip'")
    torch = torch_folder()
    reason = "GRADES_KERNELS_NATIVE=skip" if mode == "skip" else why_not_built(torch)
    if reason is None and torch is not None:
        return [
            Extension(
                "grades_kernels._native",
                ["csrc/grades_adamw.cpp"],
                depends=["csrc/kernel.h"],
                include_dirs=[str(torch / "include")],
                library_dirs=[str(torch / "lib")],
                libraries=["torch_cpu"],
                extra_compile_args=FLAGS,
                language="c++",
                optional=mode == "auto",  # a failed compilation is a warning
                py_limited_api=True,  # it uses nothing of Python's
            )
        ]
    if mode == "require":
        sys.exit(f"grades-kernels: the native CPU op cannot be built: {reason}")
    if {"bdist_wheel", "editable_wheel", "build"} & set(sys.argv):
        print(f"grades-kernels: pure Python, without the native CPU op: {reason}", file=sys.stderr)
    return []


found = extensions()
# One wheel serves every Python from 3.10 on.
setup(
    ext_modules=found,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if found else {},
)
