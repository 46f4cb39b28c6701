"""Removes control characters from text before it is shown on a terminal, in a model card or on a page.

A model's name, a prompt or a generated text may hold terminal escape sequences, or marks that change the direction of
the surrounding text. XML does not allow the former.
"""

from __future__ import annotations

# C0 except tab and newline, DEL and C1; direction marks (Arabic letter mark, left-to-right and right-to-left marks,
# embeddings, overrides, isolates); line and paragraph separators; noncharacters.
_CONTROL = (
    *(code for code in range(32) if chr(code) not in "\t\n"),
    *range(0x7F, 0xA0),
    0x061C,
    *(0x200E, 0x200F),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *(0xFFFE, 0xFFFF),
)
_REPLACED = dict.fromkeys(_CONTROL, "\N{REPLACEMENT CHARACTER}")


def printable(text: str, encoding: str = "utf-8") -> str:
    """Return ``text`` without control characters, encodable in ``encoding``.

    Args:
        text: any text; tabs and newlines stay.
        encoding: of the output. Characters that it lacks are escaped, such as ``\\udce9``.
    """
    return text.translate(_REPLACED).encode(encoding, "backslashreplace").decode(encoding)
