"""Untrusted text, made safe to draw: only characters for which figures have a glyph, and no formulas."""

import functools
import textwrap

from matplotlib import font_manager

from gemma_scope_jax.runtime import printing

# Fonts with Chinese, Japanese and Korean characters, which figures use where DejaVu Sans has no glyph: first those of
# Linux, then of macOS, then of Windows.
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Microsoft YaHei", "Yu Gothic",
    "MS Gothic", "Arial Unicode MS",
)  # fmt: skip


def plottable(text: object, limit: int = 60, columns: int | None = None) -> str:
    """`printable` for a figure: no formulas, and characters without a glyph escaped. No legend leaves it out.

    With `columns`, the text is broken into lines of at most that many characters.
    """
    shown = printing.in_a_line(str(text), limit, drawable)
    if columns:
        shown = "\n".join(textwrap.wrap(shown, columns))
    # Matplotlib leaves labels that begin with _ out of a legend.
    return f"{' ' * shown.startswith('_')}{shown}".replace("$", r"\$")


def drawable(letter: str) -> str:
    """The character for a figure; escaped, such as `\\u6cd5`, if it is unsafe or no font of figures has it."""
    return printing.escaped(letter) if has_glyph(letter) else letter.encode("unicode_escape").decode()


def has_glyph(letter: str) -> bool:
    """Whether DejaVu Sans, which comes with Matplotlib, or the `fallback_fonts` have a glyph for the character."""
    return any(font.get_char_index(ord(letter)) for font in _fonts())


@functools.cache
def fallback_fonts() -> tuple[str, ...]:
    """The installed ones of `CJK_FONTS`."""
    installed = set(font_manager.get_font_names())
    return tuple(name for name in CJK_FONTS if name in installed)


@functools.cache
def _fonts() -> tuple[object, ...]:
    names = ("DejaVu Sans", *fallback_fonts())
    return tuple(font_manager.get_font(font_manager.findfont(name)) for name in names)
