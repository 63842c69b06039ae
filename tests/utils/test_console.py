"""A console that lacks a character prints its escape, and is as it was afterwards."""

import io
import sys

from runs import leave_out_report, make_options

from dbcore.__main__ import main
from dbcore.config import TrainConfig
from dbcore.engines.trainer import train


def windows_console(monkeypatch):
    """A console of Western Europe's Windows, until the test ends."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_a_photo_named_in_cyrillic_does_not_stop_training(tmp_path, monkeypatch):
    windows = windows_console(monkeypatch)
    leave_out_report(monkeypatch)
    options = make_options(tmp_path, max_train_steps=1)
    (tmp_path / "photos" / "собака.png").write_bytes(b"no image")
    path = train(TrainConfig(**options, output_dir=tmp_path / "run"))
    assert path.is_file()
    assert b"\\u0441\\u043e" in windows.buffer.getvalue()
    assert windows.errors == "strict"


def test_nor_does_it_stop_another_tool(monkeypatch):
    windows = windows_console(monkeypatch)
    monkeypatch.setattr("dbcore.tools.prepare.main", lambda args: print("собака"))
    main(["prepare", "--instance_data_dir", "x", "--output_dir", "y"])
    assert windows.buffer.getvalue().startswith(b"\\u0441")
    assert windows.errors == "strict"
