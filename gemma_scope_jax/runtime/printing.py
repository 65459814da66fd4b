"""Untrusted text, made safe to print, to plot and to put on a page.

A name in a file may hold escape sequences that a terminal obeys, line breaks that forge a second message, characters
that reverse the rest of a line, or a million characters. For HTML, `html.render` escapes the text as well.
"""

import functools
import pathlib
import re
import unicodedata
from typing import TextIO

LONGEST = 200  # The most characters of a name or value that a message quotes.

# Control, format (bidirectional marks among them) and surrogate characters, and separators of lines and paragraphs.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, limit: int = LONGEST) -> str:
    """The text in one line of at most `limit` characters, with unsafe characters escaped."""
    whole = str(text)
    # Cut first, because the rest may be very long; an escape has at most ten characters.
    escaped = "".join(_escaped(letter) for letter in whole[:limit])
    if len(whole) <= limit and len(escaped) <= limit:
        return escaped
    rest = f"… ({len(whole):,} characters)"
    return escaped[: max(limit - len(rest), 0)] + rest


def quoted(value: object, limit: int = LONGEST) -> str:
    """The `repr` of a value, made `printable`; a string is in quotes."""
    return printable(repr(value), limit)


def well_formed(text: str) -> str:
    """The text with U+FFFD for each unpaired surrogate, which JSON and file names may hold."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def lines(text: str) -> str:
    """The text with its line breaks and of any length, otherwise `printable`."""
    if text.isascii() and text.isprintable():  # Fast for encoded pictures of many megabytes.
        return text
    return "".join(letter if letter == "\n" else _escaped(letter) for letter in text)


def plottable(text: object, limit: int = 60) -> str:
    """`printable` for a figure: no formulas, a box for each missing glyph, and never left out of a legend."""
    shown = "".join(letter if has_glyph(letter) else "□" for letter in printable(text, limit))
    # Matplotlib leaves labels that begin with _ out of a legend.
    return f"{' ' * shown.startswith('_')}{shown}".replace("$", r"\$")


def has_glyph(letter: str) -> bool:
    """Whether Matplotlib's own fallback font has a glyph for the character."""
    return bool(_font().get_char_index(ord(letter)))


@functools.cache
def _font() -> object:
    import matplotlib.font_manager  # Slow to import, and only figures need it.

    return matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans"))


# User and password before a host, the query of an address, which may hold a signature, and Hugging Face's tokens.
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
    """`without_credentials`, and with `~` for the home folder of any user."""
    own = pathlib.Path.home()
    homes = [r"/(?:home|Users)/[^/\s'\"]+", *([re.escape(str(own))] if own.name else [])]
    return re.sub(rf"(?<![\w.])(?:{'|'.join(homes)})(?![\w.-])", "~", without_credentials(text))


class Unfailing:
    """A stream whose writes never fail: text is lost if the reader is gone, the disk full or the file closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the file is closed, or the text cannot be encoded.
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def unfailing(stream: TextIO) -> Unfailing:
    """The stream, wrapped in `Unfailing` if it is not yet."""
    return stream if isinstance(stream, Unfailing) else Unfailing(stream)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) in _UNSAFE:
        return letter.encode("unicode_escape").decode()
    return letter
