"""One family of errors: only they become a line, and everything that is meant for a user is one of
them."""

import ast
import builtins
import gc
from pathlib import Path

import pytest
import torch

import dbcore
from dbcore.__main__ import main
from dbcore.config import ConfigError
from dbcore.utils.errors import DBCoreError, Interrupted

SOURCES = sorted(Path(dbcore.__file__).parent.rglob("*.py"))
# Misuse of a widget in a cell, where its traceback is what helps; Ctrl-C; an attribute that is not
# there.
THEIR_OWN = {("widgets.py", "RuntimeError"), ("signals.py", "KeyboardInterrupt"),
             ("base.py", "AttributeError")}


def raised(path):
    """The names of the exceptions that a source file raises."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


@pytest.mark.parametrize("path", SOURCES,
                         ids=lambda path: path.relative_to(Path(dbcore.__file__).parent).as_posix())
def test_no_error_for_a_user_is_pythons_own(path):
    theirs = [name for name in raised(path) if hasattr(builtins, name)
              and (path.name, name) not in THEIR_OWN]
    assert theirs == []


def run(error, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr("dbcore.tools.generate.main", fail)
    main(["generate"])


@pytest.mark.parametrize("error", [ValueError("a library's bug"), OSError("the disk"),
                                   KeyError("x"), RuntimeError("shapes")], ids=repr)
def test_what_is_no_error_of_ours_keeps_its_traceback(error, monkeypatch):
    with pytest.raises(type(error)) as caught:
        run(error, monkeypatch)
    assert caught.value is error


def test_an_error_of_ours_is_one_line(monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(ConfigError("--rank 0: give 1 or more"), monkeypatch)
    assert ended.value.code == "dbcore generate: --rank 0: give 1 or more"


def test_a_full_memory_is_one_line_with_what_takes_less(monkeypatch):
    with pytest.raises(SystemExit, match=r"^dbcore generate: .* memory is full.*--low_vram"):
        run(torch.OutOfMemoryError("CUDA out of memory."), monkeypatch)


def test_a_run_that_was_stopped_says_how_to_go_on(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(Interrupted("Go on with latest."), monkeypatch)
    assert ended.value.code == 130
    assert capsys.readouterr().out == "Go on with latest.\n"


def test_with_a_variable_set_a_programmer_sees_the_traceback(monkeypatch):
    monkeypatch.setenv("DBCORE_DEBUG", "1")
    with pytest.raises(DBCoreError):
        run(ConfigError("x"), monkeypatch)


def test_the_garbage_collector_is_left_as_it_was(monkeypatch):
    before, during = gc.get_threshold(), []
    monkeypatch.setattr("dbcore.tools.generate.main",
                        lambda args: during.append(gc.get_threshold()))
    main(["generate"])
    assert gc.get_threshold() == before != during[0]
