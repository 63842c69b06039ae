"""Exercises that mark themselves: `check_...` runs the learner's function and says what it saw.

One function an exercise, named `check_<notebook>_<exercise>`. It raises `NotYet` through `expect` or `same`,
or returns what is right; `exercise` turns either, and any mistake in the learner's code, into a `Verdict`,
which prints itself as the last value of a cell and counts as True or False.
"""

import functools

import numpy as np

CHECKS = {}


class NotYet(Exception):
    """The answer is not there yet; the message says what was seen and what was expected."""


class Verdict:
    """'Right: ...' or 'Not yet: ...'; true if right."""

    def __init__(self, right, message):
        self.right, self.message = right, message

    def __bool__(self):
        return self.right

    def __repr__(self):
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


def exercise(check):
    """Decorator: register a check and let it return a `Verdict`, whatever the learner's code does."""

    @functools.wraps(check)
    def verdict(*answers):
        if any(answer is None or answer is Ellipsis for answer in answers):
            return Verdict(False, "nothing to look at yet; put your answer in the place of the dots.")
        try:
            return Verdict(True, check(*answers))
        except NotYet as reason:
            return Verdict(False, str(reason))
        except Exception as error:  # noqa: BLE001 - a learner's first try may raise anything
            return Verdict(False, f"your code stopped with {type(error).__name__}: {error}")

    CHECKS[check.__name__] = verdict
    return verdict


def expect(condition, message):
    """Raise `NotYet(message)` unless `condition`."""
    if not condition:
        raise NotYet(message)


def same(got, wanted, what, tolerance=1e-4):
    """Raise `NotYet` unless `got` is a number, array or tensor like `wanted`, to `tolerance` of its size."""
    expect(got is not None and got is not Ellipsis, f"{what} gives nothing yet; does your function return it?")
    got, wanted = _array(got), _array(wanted)
    expect(got.dtype.kind in "biuf", f"{what} is not made of numbers.")
    expect(got.shape == wanted.shape, f"{what} has shape {got.shape}; expected {wanted.shape}.")
    expect(np.isfinite(got).all(), f"{what} holds infinite values or NaN.")
    worst = float(np.abs(got - wanted).max(initial=0))
    allowed = tolerance * max(1.0, float(np.abs(wanted).max(initial=0)))
    expect(worst <= allowed, f"{what} {_compared(got, wanted)}.")


def _array(values):
    if hasattr(values, "detach"):
        values = values.detach().cpu().float()
    array = np.asarray(values)
    return array.astype(float) if array.dtype.kind in "biuf" else array


def _compared(got, wanted):
    if got.size == 1:
        return f"is {got.item():.4g}; expected {wanted.item():.4g}"
    k = int(np.abs(got - wanted).argmax())
    return f"is off most at entry {k}: {got.flat[k]:.4g}; expected {wanted.flat[k]:.4g}"
