"""Text that somebody else wrote, made safe to print and to plot.

A name in a file may hold escape sequences that a terminal obeys, line breaks that forge a second message, letters
that turn the rest of a line around, or a million characters. HTML needs nothing of this: Jinja escapes it.
"""

import unicodedata

LONGEST = 200  # Characters of a name or a value that a message quotes.

# Control, format (bidirectional marks among them) and surrogate characters, and separators of lines and paragraphs.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, limit: int = LONGEST) -> str:
    """The text in one line of at most `limit` characters, with what a terminal would obey written as an escape."""
    whole = str(text)
    # Cut first, since what is cut off may be long; an escape makes ten characters of one at most.
    escaped = "".join(_escaped(letter) for letter in whole[:limit])
    if len(whole) <= limit and len(escaped) <= limit:
        return escaped
    rest = f"… ({len(whole):,} characters)"
    return escaped[: max(limit - len(rest), 0)] + rest


def quoted(value: object, limit: int = LONGEST) -> str:
    """A value as Python writes it, a string in quotes; `printable`."""
    return printable(repr(value), limit)


def well_formed(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON and names of files may hold."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def plottable(text: object, limit: int = LONGEST) -> str:
    """`printable`, and a dollar sign does not make Matplotlib read what follows as a formula."""
    return printable(text, limit).replace("$", r"\$")


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) in _UNSAFE:
        return letter.encode("unicode_escape").decode()
    return letter
