import pytest

from gemma_scope_jax.runtime import printing


def test_control_characters_are_escaped():
    assert printing.printable("a\x1b[2Jb\r\nc\u202ed\ud800\u2028") == r"a\x1b[2Jb\r\nc\u202ed\ud800\u2028"


def test_letters_of_all_languages_are_kept():
    assert printing.printable("λ 日本 café 🙂") == "λ 日本 café 🙂"


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0001"])
def test_long_text_is_cut_with_its_length(letter):
    shown = printing.printable(letter * 10**6)
    assert len(shown) <= printing.LONGEST and shown.endswith("… (1,000,000 characters)")


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
def test_shareable_text_has_no_user_names_or_credentials(given, shown, monkeypatch):
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
def test_the_ending_of_a_text_starts_at_a_word(tokens, shown):
    assert printing.ending(tokens) == shown
