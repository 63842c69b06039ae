"""No feature is claimed that no test covers: the table of features names the tests, and they are
there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEATURES = ROOT / "data" / "results" / "features.md"


def rows():
    """[cells] of the table's rows, without its head."""
    lines = [line for line in FEATURES.read_text(encoding="utf-8").splitlines()
             if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def linked_in(cell):
    """[(path, function's name or "")] of the tests that a row links to."""
    return re.findall(r'\]\(\.\./\.\./(tests/\S+?\.py)(?: "(\w+)")?\)', cell)


def functions_in(path):
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)}


def test_the_table_is_whole():
    assert len(rows()) > 20
    assert {len(row) for row in rows()} == {10}
    assert {cell for row in rows() for cell in row[1:9]} == {"Y", "P", "N", "?"}
    assert {row[8] for row in rows()} == {"Y"}  # of our own, nothing is left open


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_claim_has_its_test(row):
    assert linked_in(row[-1]), f"no test covers {row[0]!r}"
    for path, name in linked_in(row[-1]):
        there = functions_in(ROOT / path)
        assert any(function.startswith("test_") for function in there), path
        assert not name or name in there, f"{path} has no {name}"
