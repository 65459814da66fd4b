"""The command line shows messages and progress bars; library calls are silent."""

import re

import pytest

from gemma_scope_jax.runtime import reporting


def states(text):
    return [re.sub(r"\s+", " ", part) for part in text.split("\r") if part.strip()]


def test_a_bar_says_that_it_is_compiling_until_it_has_compiled(capsys):
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


def test_a_bar_keeps_its_postfix(capsys):
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
