"""The analysis commands, as they are typed: the scope each opens, its output and its files."""

import sys

import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.cli import main
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached

SUBJECTS = {
    "shallow": attached.Subject(random_sae(0), Site("resid_post", 0), None),
    "deep": attached.Subject(random_sae(1), Site("resid_post", 2), None),
}


@pytest.fixture
def command(tiny_gemma, tmp_path, monkeypatch, capsys):
    """Runs a command in a new folder; returns the output, and the arguments the path was opened with."""
    scope = scopes.make(tiny_gemma, SUBJECTS, held_out=tiny.tokens(4, 24, seed=4))
    opened = {}

    def open_scope(path, **overrides):
        opened.update(
            {"path": path}, **{name: value for name, value in overrides.items() if value is not None}
        )
        return scope

    monkeypatch.setattr(analysis, "open_scope", open_scope)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["gemma_scope_jax", *arguments])
        main.run(sys.argv[1:])
        return capsys.readouterr().out, opened

    return run


def test_explore(command, tmp_path):
    shown, opened = command("explore", "run", "a law", "--top=2", "--html=a.html", "--model=tiny")
    assert opened == {"path": "run", "model": "tiny"}
    assert "shallow" in shown and "deep" in shown and "strongest 2" in shown and "Wrote a.html" in shown
    assert "shallow" in (tmp_path / "a.html").read_text()


def test_undecodable_bytes_of_a_prompt_are_replaced(command):
    shown, _ = command("explore", "run", "caf\udce9")  # Python's form of a byte from a Latin-1 terminal.
    assert "'f'" in shown and len(tiny.encode("caf\ufffd")) == 6


def test_flow(command, tmp_path):
    shown, _ = command("flow", "run", "a law", "--answer=e", "--png=a.png", "--html=a.html")
    assert "rank of 'e'" in shown and "Wrote a_lens.png" in shown
    for name in ("a.png", "a_lens.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "deep" in (tmp_path / "a.html").read_text()


def test_links(command, tmp_path):
    asked = ["links", "run", "--sae=shallow", "--latent=5", "--top=3"]
    shown, opened = command(*asked, "--rows=2", "--to=deep", "--png=a.png", "--text=other.txt")
    assert "fed by latent 5 of shallow" in shown and opened["text"] == "other.txt"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown, _ = command(*asked, "--prompt=rivers of bread")
    assert "of 15 activations" in shown
    with pytest.raises(ValueError, match="there is no SAE 'other'; choose from shallow, deep"):
        command(*asked, "--to=other")


def test_an_unknown_option_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("links", "run", "--sae=shallow", "--latent=5", "--nothing=1")
    assert "Unrecognized options: --nothing" in capsys.readouterr().err
