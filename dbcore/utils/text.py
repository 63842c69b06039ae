"""Text files as people save them, and words in a text."""

import codecs
import re
from pathlib import Path

from dbcore.utils.errors import InputError

MARKS = (  # the byte order marks, UTF-32's before UTF-16's, which it begins with
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def read_text(path: str | Path, limit: int | None = None) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 where its first bytes (BOM) say so.

    Raises InputError, without the file's name, for another encoding, for what is no text,
    and for more than `limit` characters; OSError where it cannot be read.
    """
    most = -1 if limit is None else 4 * limit + 4
    with open(Path(path), "rb") as file:
        data = file.read(most)
    codec = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = codecs.getincrementaldecoder(codec)().decode(data, final=len(data) != most)
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise InputError(f"is not {codec.upper()} text ({found}): save it as UTF-8") from None
    if limit is not None and len(text) > limit:
        raise InputError(f"is longer than {limit} characters")
    return plain(text)


def plain(text: str) -> str:
    """`text` itself. Raises InputError for control characters and halves of characters."""
    odd = next(
        (c for c in text if not c.isspace() and (ord(c) < 32 or 0xD800 <= ord(c) < 0xE000)), None
    )
    if odd is not None:
        raise InputError(
            f"holds the character U+{ord(odd):04X}, which is none of a text: save it as UTF-8"
        )
    return text


def replace_word(word: str, other: str, text: str) -> str:
    """`text` with `other` for each `word` in it that stands alone, in small letters or capitals."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _: other, text, flags=re.IGNORECASE)
