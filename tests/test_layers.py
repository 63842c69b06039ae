"""Imports run downhill: a room of the house knows the rooms below it, and none above."""

import ast
from pathlib import Path

import pytest

import dbcore

ROOT = Path(dbcore.__file__).parent
LAYERS = [["utils"], ["config"], ["models", "datasets"], ["engines"], ["tools", "toybench"],
          ["course"]]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# The recipe judges what it has trained, and for that it trains LoRAs.
JUDGES = {"dbcore.toybox.gates", "dbcore.toybox.__main__"}


def name_of(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name, late=True):
    """The project's modules that one imports; `late`: those within functions too."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dbcore"):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from below & {*MODULES} or {node.module}


def room(name):
    return (name.split(".") + [""])[1]


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in LEVEL])
def test_nothing_is_imported_from_above(name):
    level = LEVEL[room(name)]
    above = {other for other in imports(name) if LEVEL.get(room(other), level) > level}
    assert above == set()


def test_the_toy_world_needs_only_the_models_below_it():
    allowed = {"toybox", "models", "utils", "config"}
    found = {(name, other) for name in MODULES if room(name) == "toybox" and name not in JUDGES
             for other in imports(name) if room(other) not in allowed | {""}}
    assert found == set()


@pytest.mark.parametrize("name", [name for name in MODULES if LEVEL.get(room(name), 9) < 4])
def test_nothing_below_the_tools_knows_the_toy_world(name):
    assert not [other for other in imports(name) if room(other) == "toybox"]


def test_no_module_imports_itself_by_a_way_round():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            path.append(name)
            for other in imports(name, late=False):
                visit(other)
            done.add(path.pop())

    for name in MODULES:
        visit(name)
