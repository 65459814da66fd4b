"""Untrusted text, made safe to print and to put on a page; for figures see `display.glyphs`.

A name in a file may hold escape sequences that a terminal obeys, line breaks that forge a second message, characters
that reverse the rest of a line, or a million characters. For HTML, `html.render` escapes the text as well.
"""

import pathlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TextIO

LONGEST = 200  # The most characters of a name or value that a message quotes.

# Control, format (bidirectional marks among them) and surrogate characters, and separators of lines and paragraphs.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, limit: int = LONGEST) -> str:
    """The text in one line of at most `limit` characters, with unsafe characters escaped."""
    return in_a_line(str(text), limit, escaped)


def in_a_line(whole: str, limit: int, shown: Callable[[str], str]) -> str:
    """A text of at most `limit` characters, each as `shown` gives it; if it is cut, it ends with its length."""
    # Cut first, because the rest may be very long; an escape has at most ten characters.
    line = "".join(shown(letter) for letter in whole[:limit])
    if len(whole) <= limit and len(line) <= limit:
        return line
    rest = f"… ({len(whole):,} characters)"
    return line[: max(limit - len(rest), 0)] + rest


def quoted(value: object, limit: int = LONGEST) -> str:
    """The `repr` of a value, made `printable`; a string is in quotes."""
    return printable(repr(value), limit)


def ending(tokens: Sequence[str], most: int = 40) -> str:
    """The end of a text of tokens, of at most `most` characters; if it is cut, "…" and whole words.

    A word without a space in its last `most` characters, as in Chinese, is cut between two tokens.
    """
    text = "".join(tokens)
    if len(text) <= most:
        return text
    if space := re.search(r"\s+(?=\S)", text[-most - 1 :]):
        return "…" + text[-most - 1 :][space.end() :]
    first = len(tokens) - 1
    while first and len("".join(tokens[first - 1 :])) <= most:
        first -= 1
    return "…" + "".join(tokens[first:])


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
    return "".join(letter if letter == "\n" else escaped(letter) for letter in text)


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


def escaped(letter: str) -> str:
    """The character, or its escape, such as `\\x1b`, if it is unsafe."""
    if unicodedata.category(letter) in _UNSAFE:
        return letter.encode("unicode_escape").decode()
    return letter
