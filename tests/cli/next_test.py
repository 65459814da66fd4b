"""Output for newcomers: the next command, early errors for empty prompts, and the help."""

import re
import shlex

import pytest

from gemma_scope_jax import analysis
from gemma_scope_jax.cli import common, main
from gemma_scope_jax.cli import evaluate as evaluate_lib
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.training import loop
from gemma_scope_jax.training import publish as publish_lib


@pytest.fixture
def last_line(capsys, tmp_path, monkeypatch):
    """Runs a command whose work is replaced, and returns its last line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "my run" / "config.json").write_text("{}")
    monkeypatch.setattr(loop, "train", lambda config, workdir: None)
    monkeypatch.setattr(evaluate_lib, "evaluate_path", lambda path, *args, **options: {})

    def publish(run, out, *options):
        (out / "layer_1" / "width_64").mkdir(parents=True)
        return [out / "layer_1" / "width_64"]

    monkeypatch.setattr(publish_lib, "publish", publish)

    def run(*words):
        main.run(words)
        return capsys.readouterr().out.splitlines()[-1]

    return run


def test_the_next_command_is_shown_and_can_be_typed(last_line):
    assert last_line("train", "quickstart", "my run") == "Next: gemma-scope evaluate 'my run'"
    assert last_line("evaluate", "my run") == (
        "Next: gemma-scope dashboards 'my run', or gemma-scope explore 'my run' 'a prompt'"
    )
    assert "Next" not in last_line("evaluate", "hf://google/gemma-scope-2b-pt-res/layer_12")
    published = ["publish", "my run", "--repo=me/saes", "--license=mit"]
    assert last_line(*published, "--out=a b") == "Next: hf upload me/saes 'a b'"
    pushed = last_line(*published, "--out=c", "--push")
    words = shlex.split(pushed.removeprefix("Next: gemma-scope "))
    assert words == ["explore", "hf://me/saes/layer_1/width_64", "a prompt"]


@pytest.mark.parametrize(
    "words",
    [
        ["explore", "run", ""],
        ["flow", "run", ""],
        ["attribute", "run", ""],
        ["links", "run", "--sae=a", "--latent=1", "--prompt="],
    ],
)
def test_an_empty_prompt_is_refused_before_anything_is_loaded(words, monkeypatch, capsys):
    monkeypatch.setattr(common, "say", None)
    with pytest.raises(SystemExit):
        main.run(words)
    said = " ".join(re.sub("[│|]", " ", capsys.readouterr().err).split())
    assert "it is empty; give a text of at least one token" in said


def test_an_empty_text_to_continue_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(analysis, "open_scope", None)
    with pytest.raises(InputError, match="a prompt is empty; give a text of at least one token"):
        main.run(["steer", "run", "stars", "", "--edit=1+t"])


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", "CONFIG RUN"),
        ("plan", "CONFIG TOPOLOGY"),
        ("prepare", "CONFIG"),
        ("explore", "RUN PROMPT"),
        ("evaluate", "RUN"),
        ("publish", "RUN"),
    ],
)
def test_the_usage_names_the_arguments(command, arguments, capsys):
    with pytest.raises(SystemExit):
        main.run([command, "--help"])
    assert re.search(
        rf"^usage: gemma-scope {command} \[-h\] \[?(OPTIONS|.*)\]? {arguments}$",
        capsys.readouterr().out,
        re.M,
    )


def test_the_help_shows_no_empty_default(capsys):
    for command in main.COMMANDS:
        with pytest.raises(SystemExit):
            main.run([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert not re.search(r"\(default: ('\(\)'|none)\)", shown), command


def test_the_imports_are_announced(last_line, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(common, "say", said.append)
    monkeypatch.setattr(loop, "train", lambda config, workdir: said.append("trained"))
    with pytest.raises(IndexError):  # All lines are in `said`.
        last_line("train", "quickstart", "my run")
    assert said[0].startswith("Importing") and said[1] == "trained"
