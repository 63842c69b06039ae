"""What the package raises when its reader can put something right.

Everything else that is raised is a bug.
"""


class DBCoreError(Exception):
    """Names the file or option, what was found, and what to do; the command line shows it as one
    line.

    Any other exception is a fault of this package or of a library, and keeps its traceback.
    """


class InputError(DBCoreError, ValueError):
    """A value, an option or a file of the user's that cannot be used."""


class Interrupted(DBCoreError):
    """The run was stopped from outside, after a checkpoint; the message says how to go on."""


class Diverged(DBCoreError, FloatingPointError):
    """Training has left the numbers: the loss, or a weight, is infinite or not a number."""


class MemoryFull(DBCoreError, MemoryError):
    """The device's memory did not hold a run; the message says which options make it smaller."""
