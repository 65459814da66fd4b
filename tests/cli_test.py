"""Configs are read from what is given, and from nothing else."""

import argparse
import re

import pytest

from gemma_scope_jax import __main__, cli

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_a_config_is_read_with_the_fields_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--config.seed=9"])
    values = cli.read_config("configs/gemma2_2b.py:resid_post_16k", ["--config.banks.main.layers=(5, 7)"])
    assert values["banks"]["main"]["layers"] == (5, 7)
    assert (values["model"], values["seed"]) == ("gemma2_2b", 0)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("quickstart", ["--config.banks.main.widht=3"], r"no field 'widht', .*; did you mean 'width'\?"),
        ("quickstart", ["--config.seed=many"], "many"),
        ("quickstart", ["seed=3"], "unexpected argument 'seed=3'; fields are set by"),
        ("nothing", [], r"configs/nothing\.py"),
        ("gemma3.py:2b", [], "unknown size '2b'; choose one of"),
        ("gemma2_2b.py:resid_mid_16k", [], "gemma2_2b has no suite 'resid_mid_16k'"),
    ],
)
def test_mistakes_are_said_in_one_line(file, fields, message):
    path = f"configs/{file}" if ":" in file else f"configs/{file}.py"
    with pytest.raises(ValueError, match=message) as caught:
        cli.read_config(path, fields)
    assert "\n" not in str(caught.value)


def numbers_of(parser):
    """Every option of all commands that takes a number, with what it is called by."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from ((name, *found[1:]) for found in numbers_of(command))
        elif isinstance(action.default, (int, float)) and action.nargs != 0:
            yield "", action.option_strings[0], action.type
        elif action.type in (int, float):
            yield "", action.option_strings[0], action.type


def test_no_option_takes_a_number_without_a_range():
    found = list(numbers_of(__main__._parser()))
    assert len(found) > 20
    assert [option for option in found if option[2] in (int, float, None)] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["links", "run", "--sae=a", "--latent=-1"],
            "argument --latent: it is -1; it must be at least 0 and",
        ),
        (["explore", "run", "a", "--top=0"], "argument --top: it is 0; it must be at least 1 and"),
        (["detect", "run", "--seed=4294967296"], "--seed: it is 4294967296; .* at most 2,147,483,647"),
        (["contrast", "run", "--first=a", "--second=b", "--rate=nan"], "argument --rate: it is nan"),
        (["steer", "run", "a", "--edit=1+t", "--temperature=inf"], "argument --temperature: it is inf"),
        (["steer", "run", "--edit=1+t", "--sweep", "--strengths=1,1e400"], "argument --strengths: it is inf"),
        (["steer", "run", "a", "--edit=1+t", "--samples=two"], "--samples: two is not a whole number"),
        (["attribute", "run", "a", "--token=" + "9" * 5000], "argument --token: 999"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gemma_scope_jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, said)
    assert said.count("\n") == 1 and len(said) < 500
