"""The structure that CONTRIBUTING.md and docs/architecture.md describe.

Imports inside functions and for type checking count too. A package's `__init__.py` only re-exports:
an import from it counts as one from the module that defines the name.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

import grades_kernels

ROOT = Path(grades_kernels.__file__).parent
MAX_LAYERS, MAX_FILE, MAX_CLASS = 8, 520, 400


def modules():
    """Module name -> its file, without the faces of packages."""
    files = {f for f in ROOT.rglob("*.py") if f.name != "__init__.py"}
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


MODULES = modules()


def nodes(kind):
    """(module, node) for every node of this kind in the syntax trees."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield name, node


def imports_of(path, package):
    """The modules of this package that a file imports; `package` is the one that it lies in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield from resolved(target, alias.name)


def resolved(target, name):
    """The module in which `name`, imported from `target`, is to be found."""
    for candidate in (".".join((*target, name)), ".".join(target)):
        if candidate in MODULES:
            yield candidate
            return
    face = ROOT.joinpath(*target, "__init__.py")
    for node in ast.walk(ast.parse(face.read_text())):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            yield from resolved((*target, *node.module.split(".")), name)


def graph():
    return {
        name: set(imports_of(path, tuple(name.split(".")[:-1]))) - {name}
        for name, path in MODULES.items()
    }


def layers(edges):
    """Module -> its layer: one above the highest of its imports.

    Raises:
        AssertionError: If modules import each other in a circle.
    """
    under_way = []

    @cache
    def layer(name):
        assert name not in under_way, f"a circle: {' -> '.join([*under_way, name])}"
        under_way.append(name)
        result = 1 + max(map(layer, sorted(edges[name])), default=0)
        under_way.pop()
        return result

    return {name: layer(name) for name in edges}


def test_imports_go_one_way_in_at_most_eight_layers():
    found = layers(graph())
    assert max(found.values()) <= MAX_LAYERS, sorted(found.items(), key=lambda x: x[1])
    assert found["freezing.table"] == 1 < found["optimizer"]


def test_an_import_upward_would_be_noticed():
    edges = graph()
    edges["freezing.table"].add("optimizer")
    with pytest.raises(AssertionError, match="a circle"):
        layers(edges)


def test_freezing_imports_no_backend():
    for name, targets in graph().items():
        if name.startswith("freezing."):
            assert all(target.startswith("freezing.") for target in targets), name


def test_triton_is_imported_by_its_backend_alone():
    absolute = [(name, node.module) for name, node in nodes(ast.ImportFrom) if not node.level]
    absolute += [(name, x.name) for name, node in nodes(ast.Import) for x in node.names]
    importing = {name for name, target in absolute if "triton" in target}
    assert importing == {"backends.triton_kernels"}


def test_no_file_and_no_class_is_too_long():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= MAX_FILE, path
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < MAX_CLASS, f"{path}: {node.name}"


def test_nothing_is_inherited_within_the_package():
    classes = list(nodes(ast.ClassDef))
    own = {node.name for _, node in classes}
    for name, node in classes:
        bases = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
        assert not bases & own, f"{name}.{node.name}"
