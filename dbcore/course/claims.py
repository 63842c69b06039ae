"""What a notebook claims about numbers: printed with its number, asserted only where it is tested.

A learner who changes the subject, the base or the steps gets other numbers, and should read them
instead of an error. Where DBCORE_STRICT is set, as in a replay of the course under nbval, a claim
that does not hold stops the notebook.
"""

import operator
import os
from collections.abc import Callable

STRICT = "DBCORE_STRICT"
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}


class ClaimError(AssertionError):
    """A claim of the course that does not hold where it has to."""


def claim(words: str, value: float, sign: str, other: float) -> None:
    """Print `words`, the numbers `value sign other`, and whether that held here.

    `sign`: one of <, <=, ==, >=, >. A comparison with NaN does not hold. Raises `ClaimError` where
    it does not hold and DBCORE_STRICT is set to anything but 0.
    """
    held = bool(SIGNS[sign](value, other))
    line = (f"{words}: {'held' if held else 'did NOT hold'} here "
            f"({shown(value)} {sign} {shown(other)}).")
    print(line)
    if not held and os.environ.get(STRICT, "0") not in ("", "0"):
        raise ClaimError(line)


def shown(number: float) -> str:
    """A count in full, as 415,744; any other number in three digits."""
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
