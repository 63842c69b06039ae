"""The command line: `python -m dbcore TOOL ...`, or `dbcore TOOL ...`."""

import argparse
import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dbcore.utils.console import printable
from dbcore.utils.errors import DBCoreError, Interrupted

TOOLS = ("prepare", "doctor", "train", "generate", "evaluate", "quickstart", "export", "merge",
         "extract", "slider", "toybench")


def make_parser(wanted: str | None) -> argparse.ArgumentParser:
    """A parser of all tools; only the wanted one's options are read, so that --help is quick."""
    parser = argparse.ArgumentParser(prog="dbcore",
                                     description="Teach a text-to-image model a new subject.")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name in TOOLS:
        if wanted not in (name, None):
            tools.add_parser(name)
            continue
        module = importlib.import_module(f"dbcore.tools.{name}")
        tool = tools.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        if wanted == name:
            module.add_arguments(tool)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one tool.

    A `DBCoreError` ends the program with its one line; any other exception passes through.
    """
    argv = sys.argv[1:] if argv is None else argv
    wanted = argv[0] if argv and argv[0] in TOOLS else None
    with fewer_collections(), printable():
        args = with_home(make_parser(wanted).parse_args(argv))
        try:
            importlib.import_module(f"dbcore.tools.{args.tool}").main(args)
        except KeyboardInterrupt:
            sys.exit(f"dbcore {args.tool}: stopped at once, nothing was saved after the "
                     "last checkpoint")
        except Interrupted as words:
            print(words)
            sys.exit(130)
        except DBCoreError as error:
            if os.environ.get("DBCORE_DEBUG"):
                raise
            sys.exit(f"dbcore {args.tool}: {error}")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # by name: torch takes long to import
                raise
            sys.exit(f"dbcore {args.tool}: the device's memory is full. Close what else uses it, "
                     "or give a smaller --resolution or --batch_size, or --low_vram, where "
                     f"`dbcore {args.tool} --help` has them")


def with_home(args: argparse.Namespace) -> argparse.Namespace:
    """`~/photos` in any option as a shell would read it, which leaves it alone in
    `--output_dir=~/photos`."""
    for name, value in vars(args).items():
        if isinstance(value, list):
            setattr(args, name, [home_of(item) for item in value])
        else:
            setattr(args, name, home_of(value))
    return args


def home_of(value: Any) -> Any:
    if isinstance(value, (str, Path)) and str(value).startswith(("~/", "~\\")):
        return type(value)(os.path.expanduser(value))
    return value


@contextlib.contextmanager
def fewer_collections() -> Iterator[None]:
    """Imports make objects by the million, to stay: looking for garbage among them takes a
    second."""
    before = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


if __name__ == "__main__":
    main()
