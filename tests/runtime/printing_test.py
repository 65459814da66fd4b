import pytest

from gemma_scope_jax.runtime import printing


def test_what_a_terminal_obeys_is_escaped():
    assert printing.printable("a\x1b[2Jb\r\nc\u202ed\ud800\u2028") == r"a\x1b[2Jb\r\nc\u202ed\ud800\u2028"


def test_letters_of_all_languages_stay():
    assert printing.printable("λ 日本 café 🙂") == "λ 日本 café 🙂"


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0001"])
def test_long_text_is_cut_and_its_length_told(letter):
    shown = printing.printable(letter * 10**6)
    assert len(shown) <= printing.LONGEST and shown.endswith("… (1,000,000 characters)")


def test_a_dollar_is_no_formula():
    assert printing.plottable("$x_1$") == r"\$x_1\$"


def test_lines_for_a_figure_are_broken_before_dollars_are_escaped():
    assert printing.plottable("ab $$$$$ cd", columns=5) == "ab\n" + 5 * r"\$" + "\ncd"
    assert max(map(len, printing.plottable("name_" * 30, 200, 40).split("\n"))) == 40


def test_a_character_that_no_font_of_figures_has_is_escaped_unless_one_is_installed(monkeypatch):
    letter = "\U0001d4d0"  # In STIXGeneral, which comes with Matplotlib, but not in DejaVu Sans.
    fonts = (printing.fallback_fonts, printing._fonts)
    for installed, shown in (("no such font", r"\U0001d4d0 a"), ("STIXGeneral", f"{letter} a")):
        monkeypatch.setattr(printing, "CJK_FONTS", (installed,))
        for of in fonts:
            of.cache_clear()
        assert printing.plottable(f"{letter} a") == shown
    monkeypatch.undo()
    for of in fonts:
        of.cache_clear()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://alice:secret@host.org/a.jsonl", "https://host.org/a.jsonl"),
        ("https://alice:p@ss@host.org/a?token=1#b", "https://host.org/a"),
        (f"https://host.org/hf_{'x' * 34}/a", "https://host.org/hf_…/a"),
        ("hf://google/gemma-2-2b@main/a", "hf://google/gemma-2-2b@main/a"),
        ("--text=news=/home/alice/a.jsonl", "--text=news=~/a.jsonl"),
        ("/Users/alice", "~"),
        ("/srv/me/a.txt", "~/a.txt"),
        ("/srv/menu/a.txt", "/srv/menu/a.txt"),
        ("gs://bucket/home/models/a", "gs://bucket/home/models/a"),
    ],
)
def test_what_is_shared_tells_neither_names_nor_credentials(given, shown, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/me")
    assert printing.shareable(given) == shown
    assert printing.shareable(shown) == shown


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (("The", " year", " ", "1", "9", "8", "7"), "The year 1987"),
        (("a" * 30, " ", "1", "2", "3", "4", "5", " bread", " and rivers of", " the states"),
         "…12345 bread and rivers of the states"),
        (("a" * 30, "  ", "123", "45", " bread", " and rivers of", " the", " states of it"),
         "…bread and rivers of the states of it"),
        (tuple("日本語" * 20), "…語" + "日本語" * 13),
    ],
)  # fmt: skip
def test_the_end_of_a_text_begins_with_a_whole_word(tokens, shown):
    assert printing.ending(tokens) == shown
