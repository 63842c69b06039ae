"""What is printed must not end a run: a console's character set may lack a photo's name."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def printable() -> Iterator[None]:
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


def progress(items: Iterable[Any], is_main: bool = True, **options: Any) -> Any:
    """tqdm's progress bar; none but in the first process, and where TQDM_DISABLE is set."""
    from tqdm.auto import tqdm

    disable = not is_main or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(items, disable=disable, **options)
