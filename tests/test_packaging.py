"""The package can be built, carries the files it needs and nothing else, and its pins are complete.

The source distribution is built from a copy of the tree, the wheel from that source distribution,
both in this environment and with a torch that refuses to be imported: neither the build nor the
version may need it. Where torch and a compiler are at hand, wheel and editable installation carry
the native op; both are tried in a clean environment.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grades_kernels
from grades_kernels import native

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
    tree = copy_of_the_tree(folder)
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


def copy_of_the_tree(folder: Path) -> Path:
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "*.egg-info", "build", "dist", ".*_cache", "*.so"
    )
    return shutil.copytree(ROOT, folder / "tree", ignore=ignored)


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


# The native op


def pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def wheel_of(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel that pip makes of a tree or a source distribution, and what it printed."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    done = pip("wheel", "--verbose", *options, str(source), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture
def clean_environment(tmp_path):
    """A new virtual environment that sees the packages of this one, but no installed package."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", command], capture_output=True, text=True, check=True)
    # A path in a .pth file is searched, but the .pth files there are not read: that of an editable
    # installation of this project stays without effect.
    (Path(place.stdout.strip()) / "others.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


USE = """
import torch, grades_kernels, sys
from grades_kernels import GradESAdamW, native
assert native.why_not_loaded() is None, native.why_not_loaded()
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
def test_a_wheel_with_the_op_works_in_a_clean_environment(built, clean_environment, tmp_path):
    """Built from the source distribution; one binary for every Python and torch from 2.10 on."""
    wheel, _ = wheel_of(built[0], tmp_path, GRADES_KERNELS_NATIVE="require")
    assert "-cp310-abi3-" in wheel.name
    assert packed_files(wheel) == package_files() | {"grades_kernels/_native.abi3.so"}
    done = pip("--python", str(clean_environment), "install", "--no-deps", "--no-index", str(wheel))
    assert done.returncode == 0, done.stdout + done.stderr
    used = subprocess.run(
        [clean_environment, "-c", USE], cwd=tmp_path, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    assert Path(used.stdout.strip()).is_relative_to(clean_environment.parent.parent)


@needs_compiler
def test_an_editable_installation_builds_the_op(clean_environment, tmp_path):
    tree = copy_of_the_tree(tmp_path)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--editable", str(tree))
    done = pip(
        "--python", str(clean_environment), "install", *options, GRADES_KERNELS_NATIVE="require"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    used = subprocess.run(
        [clean_environment, "-c", USE], cwd=tmp_path, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    assert Path(used.stdout.strip()).is_relative_to(tree)


def setup(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"GRADES_KERNELS_NATIVE": "skip"}, "GRADES_KERNELS_NATIVE=skip"),
        ({"CXX": "no-such-compiler"}, r"there is no C\+\+ compiler 'no-such-compiler'"),
        ({"PYTHONPATH": "no_torch"}, r"the build sees no torch .*--no-build-isolation"),
    ],
    ids=["asked for", "no compiler", "no torch"],
)
def test_otherwise_it_is_pure_python_with_one_line(environment, reason, tmp_path):
    tree = copy_of_the_tree(tmp_path)
    (tree / "no_torch").mkdir()
    (tree / "no_torch" / "torch.py").touch()
    done = setup(tree, "build", **environment)
    assert done.returncode == 0, done.stderr
    assert re.search(f"^grades-kernels: pure Python, .*: {reason}", done.stderr, re.MULTILINE)
    assert not list(tree.rglob("*.so"))
    if environment.get("GRADES_KERNELS_NATIVE") != "skip":
        done = setup(tree, "build", **environment, GRADES_KERNELS_NATIVE="require")
        assert done.returncode != 0
        assert re.search(f"cannot be built: {reason}", done.stderr)


@needs_compiler
def test_code_that_does_not_compile_is_an_error_only_where_it_is_required(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    (tree / "csrc" / "grades_adamw.cpp").write_text("#error on purpose\n")
    done = setup(tree, "build")
    assert done.returncode == 0, done.stderr
    assert 'building extension "grades_kernels._native" failed' in done.stdout + done.stderr
    assert setup(tree, "build", GRADES_KERNELS_NATIVE="require").returncode != 0


def test_an_unknown_mode_is_refused():
    done = setup(ROOT, "--version", GRADES_KERNELS_NATIVE="maybe")
    assert done.returncode != 0
    assert "GRADES_KERNELS_NATIVE=maybe: choose 'auto', 'require' or 'skip'" in done.stderr


def test_the_command_points_at_a_function_that_exists():
    module, function = PROJECT["scripts"]["grades-kernels"].split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_source_distribution_can_run_its_own_checks(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    code = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert tests | code | {"Makefile", "constraints.txt", "pyproject.toml", ".ci/run"} <= names


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
