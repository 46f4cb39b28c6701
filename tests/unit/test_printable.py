"""Characters that steer do not come through; everything else does."""

from __future__ import annotations

import sys
import unicodedata

from ara.printable import printable


def test_what_comes_through() -> None:
    """Held against Unicode's own tables."""
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        steers = unicodedata.category(char) in ("Cc", "Zl", "Zp") and char not in "\t\n"
        turns = unicodedata.bidirectional(char) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
        if steers or turns or char in "\u061c\u200e\u200f\ufffe\uffff":
            assert printable(char) == "\ufffd", hex(code)
        elif 0xD800 <= code < 0xE000:
            assert printable(char) == f"\\u{code:x}"
        else:
            assert printable(char) == char, hex(code)


def test_other_encodings_escape_what_they_lack() -> None:
    assert printable("é → 日", "latin-1") == "é \\u2192 \\u65e5"
