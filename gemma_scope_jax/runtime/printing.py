"""Text that somebody else wrote, made safe to print, to plot and to put on a page.

A name in a file may hold escape sequences that a terminal obeys, line breaks that forge a second message, letters
that turn the rest of a line around, or a million characters. What HTML itself reads, `html.render` escapes.
"""

import functools
import pathlib
import re
import unicodedata
from typing import TextIO

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


def lines(text: str) -> str:
    """A text in the lines that it has, of any length, each otherwise `printable`."""
    if text.isascii() and text.isprintable():  # As pictures are, of many megabytes.
        return text
    return "".join(letter if letter == "\n" else _escaped(letter) for letter in text)


def plottable(text: object, limit: int = 60) -> str:
    """`printable` in a figure: no formula after a dollar sign, a box for what the font lacks, and in legends, too."""
    shown = "".join(letter if has_glyph(letter) else "□" for letter in printable(text, limit))
    # Matplotlib leaves out of a legend what begins with _.
    return f"{' ' * shown.startswith('_')}{shown}".replace("$", r"\$")


def has_glyph(letter: str) -> bool:
    """Whether the font has it that Matplotlib brings along and falls back to."""
    return bool(_font().get_char_index(ord(letter)))


@functools.cache
def _font() -> object:
    import matplotlib.font_manager  # Not for the sake of a message.

    return matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans"))


# What stands before a host, a query, which may sign, and a token of Hugging Face's.
_CREDENTIALS = (
    (re.compile(r"(?<=://)[^/\s]*@"), ""),
    (re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*"), r"\1"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_…"),
)


def without_credentials(text: object) -> str:
    """A path, an address or a command without user, password, query and token."""
    found = str(text)
    for pattern, replacement in _CREDENTIALS:
        found = pattern.sub(replacement, found)
    return found


def shareable(text: object) -> str:
    """The same without user names too: a home, of whomever it is, becomes `~`."""
    own = pathlib.Path.home()
    homes = [r"/(?:home|Users)/[^/\s'\"]+", *([re.escape(str(own))] if own.name else [])]
    return re.sub(rf"(?<![\w.])(?:{'|'.join(homes)})(?![\w.-])", "~", without_credentials(text))


class Unfailing:
    """A stream on which no word fails: what a gone reader, a full disk or a closed file does not take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # A closed file and what cannot be encoded are ValueErrors.
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def unfailing(stream: TextIO) -> Unfailing:
    """The stream, `Unfailing` if it is not yet."""
    return stream if isinstance(stream, Unfailing) else Unfailing(stream)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) in _UNSAFE:
        return letter.encode("unicode_escape").decode()
    return letter
