"""A check says what it saw, in friendly words, whatever the learner's code does."""

import re

import numpy as np
import pytest
import torch

from dbcore.course import checks
from dbcore.course.checks import CHECKS, exercise, expect, same


@exercise
def check_99_double(double):
    same(double(2), 4, "double(2)")
    expect(double(0) == 0, "Twice nothing is nothing.")
    return "twice as much."


@pytest.mark.parametrize(("answer", "words"), [
    (None, "nothing to look at yet"),
    (..., "nothing to look at yet"),
    (lambda x: ..., "double(2) gives nothing yet"),
    (lambda x: None, "double(2) gives nothing yet"),
    (lambda x: 3, "double(2) is 3; expected 4"),
    (lambda x: [4, 4], "double(2) has shape (2,); expected ()"),
    (lambda x: "four", "double(2) is not made of numbers"),
    (lambda x: float("nan"), "double(2) holds infinite values or NaN"),
    (lambda x: 4, "Twice nothing is nothing."),
    (lambda x: x / 0, "your code stopped with ZeroDivisionError: division by zero"),
    (lambda: 4, "your code stopped with TypeError"),
])  # fmt: skip
def test_a_wrong_answer_is_told_why(answer, words):
    verdict = check_99_double(answer)
    assert not verdict
    assert repr(verdict).startswith("Not yet: ")
    assert words in repr(verdict)


def test_the_right_answer_is_told_so():
    verdict = check_99_double(lambda x: 2 * x)
    assert verdict
    assert repr(verdict) == "Right: twice as much."


@pytest.mark.parametrize("got", [[1, 2], (1.0, 2.0), np.array([1, 2]),
                                 torch.tensor([1.0, 2.0], requires_grad=True)])
def test_same_takes_any_kind_of_numbers(got):
    same(got, [1, 2], "x")
    with pytest.raises(checks.NotYet, match="off most at entry 1: 2; expected 3"):
        same(got, [1, 3], "x")


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_same_allows_rounding_and_no_more(size):
    scale = max(1.0, size)
    same(size + 0.5e-4 * scale, size, "x")
    with pytest.raises(checks.NotYet):
        same(size + 2e-4 * scale, size, "x")


def test_an_interrupt_is_not_taken_for_an_answer():
    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_99_double(stop)


def test_every_check_is_named_after_its_notebook():
    assert "check_99_double" in CHECKS
    assert all(re.fullmatch(r"check_\d\d_[a-z0-9_]+", name) for name in CHECKS)
    assert all(check.__module__ == __name__ or getattr(checks, name) is check
               for name, check in CHECKS.items())
