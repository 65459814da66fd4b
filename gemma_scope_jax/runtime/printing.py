"""Untrusted text, made safe to print, to plot and to put on a page.

A name in a file may hold escape sequences that a terminal obeys, line breaks that forge a second message, characters
that reverse the rest of a line, or a million characters. For HTML, `html.render` escapes the text as well.
"""

import functools
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from typing import TextIO

LONGEST = 200  # The most characters of a name or value that a message quotes.

# Fonts with Chinese, Japanese and Korean characters, which figures use where DejaVu Sans has no glyph: first those of
# Linux, then of macOS, then of Windows.
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Microsoft YaHei", "Yu Gothic",
    "MS Gothic", "Arial Unicode MS",
)  # fmt: skip

# Control, format (bidirectional marks among them) and surrogate characters, and separators of lines and paragraphs.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, limit: int = LONGEST) -> str:
    """The text in one line of at most `limit` characters, with unsafe characters escaped."""
    return _in_a_line(str(text), limit, _escaped)


def _in_a_line(whole: str, limit: int, shown: Callable[[str], str]) -> str:
    # Cut first, because the rest may be very long; an escape has at most ten characters.
    escaped = "".join(shown(letter) for letter in whole[:limit])
    if len(whole) <= limit and len(escaped) <= limit:
        return escaped
    rest = f"… ({len(whole):,} characters)"
    return escaped[: max(limit - len(rest), 0)] + rest


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
    return "".join(letter if letter == "\n" else _escaped(letter) for letter in text)


def plottable(text: object, limit: int = 60, columns: int | None = None) -> str:
    """`printable` for a figure: no formulas, characters without a glyph escaped, and never left out of a legend.

    With `columns`, it is broken into lines of at most so many characters.
    """
    shown = _in_a_line(str(text), limit, drawable)
    if columns:
        shown = "\n".join(textwrap.wrap(shown, columns))
    # Matplotlib leaves labels that begin with _ out of a legend.
    return f"{' ' * shown.startswith('_')}{shown}".replace("$", r"\$")


def drawable(letter: str) -> str:
    """The character for a figure; escaped, such as `\\u6cd5`, if it is unsafe or no font of figures has it."""
    return _escaped(letter) if has_glyph(letter) else letter.encode("unicode_escape").decode()


def has_glyph(letter: str) -> bool:
    """Whether DejaVu Sans, which comes with Matplotlib, or the `fallback_fonts` have a glyph for the character."""
    return any(font.get_char_index(ord(letter)) for font in _fonts())


@functools.cache
def fallback_fonts() -> tuple[str, ...]:
    """The installed ones of `CJK_FONTS`."""
    import matplotlib.font_manager  # Slow to import, and only figures need it.

    installed = set(matplotlib.font_manager.get_font_names())
    return tuple(name for name in CJK_FONTS if name in installed)


@functools.cache
def _fonts() -> tuple[object, ...]:
    from matplotlib import font_manager

    names = ("DejaVu Sans", *fallback_fonts())
    return tuple(font_manager.get_font(font_manager.findfont(name)) for name in names)


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
