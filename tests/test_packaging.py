"""The package can be built, carries the files it needs and nothing else, and its pins are complete.

The source distribution is built from a copy of the tree, the wheel from that source distribution,
both in this environment and with a torch that refuses to be imported: neither the build nor the
version may need it.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grades_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CEILINGS = {"triton"}  # the CUDA build of torch brings an older one than the CPU build allows


def read_constraints(text: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def expand(requirements: list[str]) -> list[Requirement]:
    """The requirements with references to our own extras replaced by what these contain."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in sorted(requirement.extras):
                found += expand(EXTRAS[extra])
        else:
            found.append(requirement)
    return found


def missing_pins(requirements: list[Requirement], constraints: dict[str, Requirement]) -> set[str]:
    """Names below `requirements`, as installed here, for which pip could choose a version itself.

    A requirement that its parent holds to one version with `==` needs no constraint of ours.
    """
    missing, seen, queue = set(), set(), list(requirements)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or any(s.operator == "==" for s in requirement.specifier):
            continue
        seen.add(name)
        if name not in constraints:
            missing.add(name)
        try:
            children = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        queue += [c for c in children if c.marker is None or c.marker.evaluate({"extra": ""})]
    return missing


CONSTRAINTS = read_constraints((ROOT / "constraints.txt").read_text())
DEVELOPMENT = [*map(Requirement, PROJECT["dependencies"]), *expand(EXTRAS["dev"])]


def build(folder: Path, replace: tuple[str, str, str] | None = None) -> tuple[Path, Path]:
    """Build in `folder` and return the paths of the source distribution and the wheel.

    `replace` (file, old text, new text) first breaks the copied tree on purpose.
    """
    (folder / "no_torch").mkdir()
    (folder / "no_torch" / "torch.py").write_text("raise ImportError('the build imported torch')")
    environment = {**os.environ, "PYTHONPATH": str(folder / "no_torch")}
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "dist", ".*_cache")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    if replace:
        file, old, new = replace
        text = (tree / file).read_text()
        assert old in text
        (tree / file).write_text(text.replace(old, new))

    def run(*command: str, cwd: Path) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    run("-m", "pip", "wheel", "--quiet", *options, str(sdist), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def packed_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def package_files() -> set[str]:
    files = (ROOT / "grades_kernels").rglob("*")
    return {str(f.relative_to(ROOT)) for f in files if f.suffix == ".py" or f.name == "py.typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def wheel_metadata(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_version_is_the_same_everywhere(wheel_metadata):
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert wheel_metadata["Version"] == grades_kernels.__version__ == newest


def test_the_wheel_holds_every_module_and_nothing_else(built):
    assert "grades_kernels/py.typed" in package_files()
    assert packed_files(built[1]) == package_files()


def test_tests_inside_the_wheel_would_be_noticed(tmp_path):
    pattern = 'include = ["grades_kernels*"]'
    _, wheel = build(
        tmp_path, ("pyproject.toml", pattern, 'include = ["grades_kernels*", "tests*"]')
    )
    assert packed_files(wheel) > package_files()


def test_a_build_that_imports_torch_would_be_noticed(tmp_path):
    with pytest.raises(AssertionError, match="the build imported torch"):
        build(tmp_path, ("setup.py", "from setuptools", "import torch\nfrom setuptools"))


def test_the_wheel_carries_its_licence_and_command(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
        (commands,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "grades-kernels = grades_kernels.cli:main" in archive.read(commands).decode()


def test_the_command_points_at_a_function_that_exists():
    module, function = PROJECT["scripts"]["grades-kernels"].split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_source_distribution_can_run_its_own_checks(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    assert tests | {"Makefile", "constraints.txt", "pyproject.toml", ".ci/run"} <= names


def test_a_plain_install_asks_for_torch_numpy_and_on_linux_triton(wheel_metadata):
    requirements = [Requirement(text) for text in wheel_metadata.get_all("Requires-Dist")]
    plain = {
        platform: {
            r.name
            for r in requirements
            if r.marker is None or r.marker.evaluate({"extra": "", "sys_platform": platform})
        }
        for platform in ("linux", "darwin")
    }
    assert plain == {"linux": {"torch", "numpy", "triton"}, "darwin": {"torch", "numpy"}}


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_is_pinned_to_a_version_it_accepts(extra):
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *expand(EXTRAS[extra])]:
        name = canonicalize_name(requirement.name)
        (pin,) = CONSTRAINTS[name].specifier
        assert pin.operator == ("<=" if name in CEILINGS else "=="), name
        assert requirement.specifier.contains(pin.version), f"{requirement} rules out {pin}"


def test_what_the_packages_need_in_turn_is_pinned_too():
    assert missing_pins(DEVELOPMENT, CONSTRAINTS) == set()


def test_a_forgotten_pin_is_noticed():
    without = {name: pin for name, pin in CONSTRAINTS.items() if name not in {"numpy", "pluggy"}}
    assert missing_pins(DEVELOPMENT, without) == {"numpy", "pluggy"}


def test_dev_contains_every_other_extra():
    """The Makefile counts `demo` and `bench` as installed once `dev` is."""
    everything = {r.name for extra in EXTRAS.values() for r in expand(extra)}
    assert everything == {r.name for r in expand(EXTRAS["dev"])}


def test_the_readme_names_only_make_targets_that_exist():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", readme.read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
