"""A learner reads whether a claim held; a replay of the course stops where it did not."""

import math

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from dbcore.course.claims import STRICT, ClaimError, claim

pytest_plugins = ["pytester"]


@pytest.fixture
def learner(monkeypatch):
    monkeypatch.delenv(STRICT, raising=False)


@pytest.mark.parametrize(("value", "sign", "other", "held"), [
    (2, ">", 1, True), (1, ">", 2, False), (1, ">", 1, False), (1, ">=", 1, True),
    (1, "<", 2, True), (2, "<=", 1, False), (3, "==", 3, True), (math.nan, "<", 1, False),
])  # fmt: skip
def test_it_says_whether_it_held(learner, capsys, value, sign, other, held):
    claim("nearer to the photos", value, sign, other)
    words = "held here" if held else "did NOT hold here"
    assert capsys.readouterr().out == (f"nearer to the photos: {words} "
                                       f"({value:.3g} {sign} {other:.3g}).\n")


def test_a_count_is_shown_in_full(learner, capsys):
    claim("as many", 415744, "<", 415745.0)
    assert "(415,744 < 4.16e+05)" in capsys.readouterr().out


def test_a_broken_claim_stops_a_test_alone(monkeypatch, capsys):
    for value in ("", "0"):
        monkeypatch.setenv(STRICT, value)
        claim("more", 1, ">", 2)
    monkeypatch.setenv(STRICT, "1")
    claim("more", 2, ">", 1)
    with pytest.raises(ClaimError, match=r"more: did NOT hold here \(1 > 2\)"):
        claim("more", 1, ">", 2)


@pytest.mark.slow
def test_a_replay_is_strict(pytester, monkeypatch):
    from pathlib import Path

    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")
    source = "from dbcore.course.claims import claim\nclaim('more', {}, '>', 0)"
    for value, outcome in ((1, "passed"), (-1, "failed")):
        cell = new_code_cell(source.format(value), execution_count=1)
        nbformat.write(new_notebook(cells=[cell]), pytester.path / "one.ipynb")
        result = pytester.runpytest_subprocess("-p", "notebook_pictures", "--nbval-lax",
                                               "--nbval-current-env", "one.ipynb")
        result.assert_outcomes(**{outcome: 1})
