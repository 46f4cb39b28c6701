"""Text that somebody else wrote, made fit to be shown: on a terminal, in a model card, on a page.

A model's name, a prompt or a generated text may hold characters that do not show but steer: escape sequences of
terminals, and marks that turn the direction of the text around them. XML knows none of the former, either.
"""

from __future__ import annotations

# C0 but tab and newline, DEL and C1; marks of direction (Arabic letter mark, left-to-right and right-to-left marks,
# embeddings, overrides, isolates); separators of lines and paragraphs; what is no character.
_STEERING = (
    *(code for code in range(32) if chr(code) not in "\t\n"),
    *range(0x7F, 0xA0),
    0x061C,
    *(0x200E, 0x200F),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *(0xFFFE, 0xFFFF),
)
_REPLACED = dict.fromkeys(_STEERING, "\N{REPLACEMENT CHARACTER}")


def printable(text: str, encoding: str = "utf-8") -> str:
    """Return ``text`` without characters that steer, in characters that ``encoding`` has.

    Args:
        text: anything; tabs and newlines stay.
        encoding: of what it is written to. What that does not have (another script; bytes of a file name that are no
            text) is escaped: ``\\udce9``.
    """
    return text.translate(_REPLACED).encode(encoding, "backslashreplace").decode(encoding)
