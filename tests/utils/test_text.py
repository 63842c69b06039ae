"""Text files in every encoding that a Windows editor writes: read right, or refused in words."""

import pytest

from dbcore.utils.errors import InputError
from dbcore.utils.text import read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_each_encoding_that_names_itself_is_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("sks dog, café\r\n犬", encoding=encoding, newline="")
    assert read_text(tmp_path / "a.txt") == "sks dog, café\r\n犬"


def test_big_endian_with_its_mark_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + "café".encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == "café"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            "the owner’s café".encode("cp1252"),
            r"is not UTF-8 text \(byte 0x92 at 9\): save it as UTF-8",
        ),
        ("собака".encode("cp1251"), "is not UTF-8 text"),
        ("犬".encode("shift_jis"), "is not UTF-8 text"),
        ("sks dog".encode("utf-16-le"), r"U\+0000"),  # without its mark
        (b"\x89PNG\x0d\x0a", "is not UTF-8 text"),
        (b"PK\x03\x04", r"U\+0003"),
    ],
)
def test_whatever_else_is_refused(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ["x" * 11, "é" * 11, "犬" * 11])
def test_a_limit_is_one_of_characters(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="longer than 10 characters"):
        read_text(tmp_path / "a.txt", limit=10)
    assert read_text(tmp_path / "a.txt", limit=11) == text
