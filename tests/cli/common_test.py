"""Configs are read from what is given, and from nothing else."""

import argparse
import os
import pathlib
import re
import subprocess
import sys

import pytest

from gemma_scope_jax.cli import common, main
from gemma_scope_jax.runtime import errors

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_a_config_is_read_with_the_fields_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--config.seed=9"])
    values = common.read_config("configs/gemma2_2b.py:resid_post_16k", ["--config.banks.main.layers=(5, 7)"])
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
        common.read_config(path, fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (FileExistsError(17, "File exists", "a"), "a: File exists"),
        (OSError(39, "Directory not empty", "a", None, "b"), "a: b: Directory not empty"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (OSError("Not a gzipped file"), "Not a gzipped file"),
        (OSError(40, "Too many levels of links", "a\x1b[1m"), r"a\\x1b\[1m: Too many levels of links"),
        (OSError(28, "No space left on device", "a"), "the disk is full; .*a"),
        (errors.InputError("bad"), "bad"),
        (ValueError("a library's own"), None),
        (KeyError("defect"), None),
    ],
)
def test_what_the_system_refuses_is_said_in_one_line_with_the_files_name(error, message):
    found = common.explain(error)
    assert found is None if message is None else re.fullmatch(f".*{message}.*", found) and len(found) < 500


def test_a_tilde_is_the_home_folder_in_every_argument(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = main._parser()
    for line in (
        "export ~/run --out=~/x", "publish ~/run --repo=a/b --out=~/x", "convert x --format=saelens --out=~/x",
        "compare ~/a ~/b --out=~/x", "dashboards x --out=~/x", "explore x y --html=~/x", "flow x y --png=~/x",
        "attribute x --prompts=~/x --png=~/y --html=~/z", "steer x --edit=y --html=~/x --png=~/y",
        "contrast x --first=~/a --second=~/b --out=~/c", "links x --sae=a --latent=1 --png=~/x",
        "generate --model=x --prompts=~/a --out=~/b", "probe x --labelled=~/x --out=~/y", "detect x --out=~/x",
    ):  # fmt: skip
        args = vars(parser.parse_args(line.split()))
        given = [v for value in args.values() for v in (value if isinstance(value, list) else [value])]
        paths = [value for value in given if isinstance(value, pathlib.Path)]
        assert len(paths) == line.count("~") and all(p.is_relative_to("/home/me") for p in paths), line


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
    found = list(numbers_of(main._parser()))
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
        main.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, said)
    assert said.count("\n") == 1 and len(said) < 500


def test_a_name_that_the_terminal_cannot_show_ends_nothing():
    program = (
        r'from gemma_scope_jax.cli import common; common.run(lambda: print("Wrote \udce9/±", flush=True))'
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    assert done.stdout == b"Wrote \\udce9/\\xb1\n"
