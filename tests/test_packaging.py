"""The package can be built, contains the files that it needs and no others; pinned requirements.

The source distribution is built from a copy of the tree and the wheel from that source
distribution, with a torch that cannot be imported: neither the build nor the version may need it.
Where torch and a compiler are available, a wheel and an editable installation contain the native
op; both are tried in a clean environment.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from harness import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grades_kernels
from grades_kernels.backends import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CEILINGS = {"triton"}  # the CUDA build of torch needs an older one than the CPU build allows
WHEEL = ("wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")


def run(*command, cwd=None, fails=False, **environment):
    """Run a command of this interpreter, check how it ends, and return its output."""
    command, environment = [sys.executable, *command], {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_of_the_tree(folder):
    ignored = [".git", ".venv*", "*.egg-info", "build", "dist", "site", ".*_cache", "*.so"]
    ignored.append(".hypothesis")  # other tests write there meanwhile
    return shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*ignored))


def build(folder):
    """Build in `folder` and return the paths of the source distribution and the wheel."""
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')")
    tree = copy_of_the_tree(folder)
    sdist = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run("-c", sdist, cwd=tree, PYTHONPATH=str(folder))
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    run("-m", "pip", *WHEEL, str(folder), str(sdist), PYTHONPATH=str(folder))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("build"))


def packed_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def package_files():
    files = (ROOT / "grades_kernels").rglob("*")
    return {str(f.relative_to(ROOT)) for f in files if f.suffix == ".py" or f.name == "py.typed"}


@pytest.fixture(scope="module")
def dist_info(built):
    """Name -> text of the files that describe the wheel."""
    with zipfile.ZipFile(built[1]) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        return {n.partition(".dist-info/")[2]: archive.read(n).decode() for n in names}


def test_the_version_is_the_same_everywhere(dist_info):
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    version = Parser().parsestr(dist_info["METADATA"])["Version"]
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert version == grades_kernels.__version__ == newest == cited


def test_the_wheel_contains_every_module_and_nothing_else(built):
    assert "grades_kernels/py.typed" in package_files()
    assert packed_files(built[1]) == package_files()


def test_the_wheel_contains_its_licence_and_a_command_that_exists(dist_info):
    assert "licenses/LICENSE" in dist_info
    command = re.search(r"^grades-kernels = (\S+):(\S+)$", dist_info["entry_points.txt"], re.M)
    assert callable(getattr(import_module(command[1]), command[2]))


def test_the_source_distribution_can_run_its_own_checks(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    code = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    docs = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.*")} | {"mkdocs.yml"}
    others = {"Makefile", "constraints.txt", "pyproject.toml", ".ci/run"}
    assert tests | code | docs | others <= names


# The native op

USE = """
import torch, grades_kernels
from grades_kernels import GradESAdamW
w = torch.nn.Parameter(torch.ones(3, 4))
w.grad = torch.ones(3, 4)
optimizer = GradESAdamW([w], tau=1.0, grace_steps=0)
optimizer.step()
assert optimizer.backend == "native" and not w.equal(torch.ones(3, 4))
print(grades_kernels.__file__)
"""

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or native.why_not_loaded() is not None,
    reason="the native op cannot be built here",
)


@needs_compiler
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_an_installation_with_the_op_works_in_a_clean_environment(built, editable, tmp_path):
    """The environment has the packages of this one, but not this project."""
    compiler = tmp_path / "c++"  # a fifth of the time; this environment has the op with -O3
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    with_op = {"GRADES_KERNELS_NATIVE": "require", "CXX": str(compiler)}
    if editable:
        source, expected = ["--editable", str(copy_of_the_tree(tmp_path))], tmp_path / "tree"
    else:  # one binary for every Python and torch from 2.10 on
        run("-m", "pip", *WHEEL, str(tmp_path), str(built[0]), **with_op)
        (wheel,) = tmp_path.glob("*-cp310-abi3-*.whl")
        assert packed_files(wheel) == package_files() | {"grades_kernels/_native.abi3.so"}
        source, expected = [str(wheel)], tmp_path / "venv"
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but the .pth files there are not read, so an editable
    # installation of this project has no effect.
    (site / "others.pth").write_text(str(Path(torch.__file__).parent.parent))
    options = ("install", "--no-deps", "--no-index", "--no-build-isolation", *source)
    run("-m", "pip", "--python", python, *options, **with_op)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    used = subprocess.run(
        [python, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    assert Path(used.stdout.strip()).is_relative_to(expected)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"GRADES_KERNELS_NATIVE": "skip"}, "GRADES_KERNELS_NATIVE=skip"),
        ({"CXX": "no-such-compiler"}, r"there is no C\+\+ compiler 'no-such-compiler'"),
        ({"PYTHONPATH": "no_torch"}, r"the build sees no torch .*--no-build-isolation"),
    ],
    ids=["skipped", "no compiler", "no torch"],
)
def test_without_the_op_the_build_is_pure_python_and_prints_why(environment, reason, tmp_path):
    tree = copy_of_the_tree(tmp_path)
    (tree / "no_torch").mkdir()
    (tree / "no_torch" / "torch.py").touch()
    printed = run("setup.py", "build", cwd=tree, **environment)
    assert re.search(f"^grades-kernels: pure Python, .*: {reason}", printed, re.MULTILINE)
    assert not list(tree.rglob("*.so"))
    if "GRADES_KERNELS_NATIVE" not in environment:
        required = {**environment, "GRADES_KERNELS_NATIVE": "require"}
        printed = run("setup.py", "build", cwd=tree, fails=True, **required)
        assert re.search(f"cannot be built: {reason}", printed)


@needs_compiler
def test_code_that_does_not_compile_is_an_error_only_where_the_op_is_required(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    (tree / "csrc" / "grades_adamw.cpp").write_text("#error on purpose\n")
    printed = run("setup.py", "build", cwd=tree)
    assert 'building extension "grades_kernels._native" failed' in printed
    run("setup.py", "build", cwd=tree, fails=True, GRADES_KERNELS_NATIVE="require")


def test_an_unknown_mode_is_refused():
    printed = run("setup.py", "--version", cwd=ROOT, fails=True, GRADES_KERNELS_NATIVE="maybe")
    assert "GRADES_KERNELS_NATIVE=maybe: choose 'auto', 'require' or 'skip'" in printed


# Dependencies


def read_constraints(text):
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def expand(requirements):
    """The requirements with references to this project's extras replaced by their contents."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            found += expand([r for extra in sorted(requirement.extras) for r in EXTRAS[extra]])
        else:
            found.append(requirement)
    return found


def missing_pins(requirements, constraints):
    """Names below `requirements`, as installed here, for which pip could choose a version itself.

    A requirement that its parent pins to one version with `==` needs no constraint.
    """
    seen, queue = set(), list(requirements)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or any(s.operator == "==" for s in requirement.specifier):
            continue
        seen.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            children = map(Requirement, metadata.requires(name) or [])
            queue += [c for c in children if not c.marker or c.marker.evaluate({"extra": ""})]
    return seen - constraints.keys()


CONSTRAINTS = read_constraints((ROOT / "constraints.txt").read_text())
DEVELOPMENT = expand([*PROJECT["dependencies"], *EXTRAS["dev"]])


@pytest.mark.parametrize(("platform", "more"), [("linux", {"triton"}), ("darwin", set())])
def test_a_plain_install_requires_torch_numpy_and_on_linux_triton(platform, more, dist_info):
    listed = Parser().parsestr(dist_info["METADATA"]).get_all("Requires-Dist")
    here = {"extra": "", "sys_platform": platform}
    found = {r.name for r in map(Requirement, listed) if not r.marker or r.marker.evaluate(here)}
    assert found == {"torch", "numpy"} | more


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_is_pinned_to_a_version_it_accepts(extra):
    for requirement in expand([*PROJECT["dependencies"], *EXTRAS[extra]]):
        name = canonicalize_name(requirement.name)
        (pin,) = CONSTRAINTS[name].specifier
        assert pin.operator == ("<=" if name in CEILINGS else "=="), name
        assert requirement.specifier.contains(pin.version), f"{requirement} rules out {pin}"


def test_indirect_dependencies_are_pinned_too():
    assert missing_pins(DEVELOPMENT, CONSTRAINTS) == set()
    without = {name: pin for name, pin in CONSTRAINTS.items() if name not in {"numpy", "pluggy"}}
    assert missing_pins(DEVELOPMENT, without) == {"numpy", "pluggy"}


def test_dev_contains_every_other_extra():
    """The Makefile counts `demo` and `bench` as installed once `dev` is; `study` is large."""
    others = [extra for name, extra in EXTRAS.items() if name != "study"]
    everything = {r.name for extra in others for r in expand(extra)}
    assert everything == {r.name for r in expand(EXTRAS["dev"])}
