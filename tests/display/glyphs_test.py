"""Text of figures: formulas, lines and characters without a glyph."""

from gemma_scope_jax.display import glyphs


def test_a_dollar_does_not_start_a_formula():
    assert glyphs.plottable("$x_1$") == r"\$x_1\$"


def test_lines_for_a_figure_are_wrapped_before_dollars_are_escaped():
    assert glyphs.plottable("ab $$$$$ cd", columns=5) == "ab\n" + 5 * r"\$" + "\ncd"
    assert max(map(len, glyphs.plottable("name_" * 30, 200, 40).split("\n"))) == 40


def test_a_character_without_a_glyph_is_escaped_unless_a_font_has_it(monkeypatch):
    letter = "\U0001d4d0"  # In STIXGeneral, which comes with Matplotlib, but not in DejaVu Sans.
    fonts = (glyphs.fallback_fonts, glyphs._fonts)
    for installed, shown in (("no such font", r"\U0001d4d0 a"), ("STIXGeneral", f"{letter} a")):
        monkeypatch.setattr(glyphs, "CJK_FONTS", (installed,))
        for of in fonts:
            of.cache_clear()
        assert glyphs.plottable(f"{letter} a") == shown
    monkeypatch.undo()
    for of in fonts:
        of.cache_clear()
