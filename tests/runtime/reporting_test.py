"""Messages and bars: what the command line shows, and that a library call is silent."""

import re

import pytest

from gemma_scope_jax.runtime import reporting


def states(text):
    return [re.sub(r"\s+", " ", part) for part in text.split("\r") if part.strip()]


def test_a_bar_says_that_it_compiles_until_that_is_done(capsys):
    with reporting.bar("Reading", "row", 4, compiles=2) as bar:
        for _ in range(4):
            bar.update()
            bar.refresh()
    said = [
        (part.partition("| ")[2].split("/")[0], "compiling" in part)
        for part in states(capsys.readouterr().err)
    ]
    assert {("0", True), ("1", True), ("2", False), ("4", False)} <= {
        (n.split()[-1], is_it) for n, is_it in said
    }
    assert ("0", False) not in said and ("4", True) not in said


def test_a_bar_keeps_its_own_words(capsys):
    with reporting.bar("", "step", 2) as bar:
        bar.set_postfix_str("L0 3", refresh=False)
        bar.update()
        bar.refresh()
    assert "L0 3" in capsys.readouterr().err


@pytest.mark.silent
def test_a_library_call_is_silent(capsys):
    with reporting.bar("Reading", "row", 2, compiles=1) as bar:
        reporting.say("something")
        bar.update(2)
    assert capsys.readouterr() == ("", "")
