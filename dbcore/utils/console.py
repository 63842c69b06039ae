"""What is printed must not end a run: a console's character set may lack a photo's name."""

import contextlib
import sys


@contextlib.contextmanager
def printable():
    """Within the block, characters that the console has not are printed as escapes."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors="backslashreplace")
        yield
    finally:
        for stream, errors in zip(streams, before):
            stream.reconfigure(errors=errors)
