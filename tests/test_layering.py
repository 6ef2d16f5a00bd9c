"""Who may import what, how long a module may be, and what the package promises."""

from __future__ import annotations

import ast
import pathlib

import pytest

import mwc

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("mwc", "passes")
MODULES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
TESTS = sorted(p for d in ("tests", "examples") for p in (ROOT / d).rglob("*.py"))
INTERNALS = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")
LINES = 400


def label(path):
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", MODULES, ids=label)


def names_of(tree):
    """Dotted names that a module imports or reads, as far as they are written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def touches(name, package):
    return name == package or name.startswith(package + ".")


def test_there_are_modules():
    assert len(MODULES) > 20


@each_module
def test_passes_know_nothing_of_mwc(path):
    if path.is_relative_to(ROOT / "passes"):
        found = [n for n in names_of(ast.parse(path.read_text())) if touches(n, "mwc")]
        assert not found


@each_module
def test_one_package_touches_internals(path):
    if path.is_relative_to(ROOT / "passes" / "_jax"):
        return
    names = list(names_of(ast.parse(path.read_text())))
    assert not [n for n in names for package in INTERNALS if touches(n, package)]


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=label)
def test_modules_are_short_and_explained(path):
    text = path.read_text()
    assert len(text.splitlines()) < LINES
    assert ast.get_docstring(ast.parse(text))


def test_public_names():
    assert len(set(mwc.__all__)) == len(mwc.__all__)
    for name in mwc.__all__:
        assert getattr(mwc, name).__doc__


def test_internals_are_found():
    """The check sees each way to write them."""
    text = "import jax._src.core\nfrom jax.extend import core\nx = jax.interpreters.ad"
    found = {p for n in names_of(ast.parse(text)) for p in INTERNALS if touches(n, p)}
    assert found == {"jax._src", "jax.extend", "jax.interpreters"}
