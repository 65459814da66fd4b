"""The documents show the measured numbers, name only existing files, and their code and commands run."""

import functools
import json
import pathlib
import re
import shlex
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
import toys

import configs
import gemma_scope_jax as gs
from benchmarks import results
from gemma_scope_jax import analysis, config
from gemma_scope_jax.cli import main
from gemma_scope_jax.data import sources
from gemma_scope_jax.evaluation import probing
from gemma_scope_jax.models import forward, interventions, predictions, registry
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import devices
from gemma_scope_jax.saes import attached, loading, naming
from gemma_scope_jax.saes.formats import common
from gemma_scope_jax.training import config_files

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_in_the_documents_match_the_results(monkeypatch):
    for name in ("tiny", "gemma2_small"):  # Registered by other tests.
        monkeypatch.delitem(registry.MODELS, name, raising=False)
    tables = results.tables()
    text = "".join((ROOT / path).read_text(encoding="utf-8") for path in results.DOCUMENTS)
    named = re.findall(r"<!-- (\S+) -->\n", text)
    assert sorted(tables) == sorted(name for name in named if name != "end")
    assert set(tables) >= {f"results/{name}.json" for name in ("quickstart", "step", "tpu", "precision")}
    for name, table in tables.items():
        shown = text.split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0]
        assert shown == table, f"{name} has changed; run python -m benchmarks.results tables"


def test_the_forecast_memory_of_tpu_slices_is_within_a_tenth_of_the_compilers():
    steps = json.loads((ROOT / "results" / "tpu.json").read_text())["numbers"]["steps"]
    told = [sum(need["bytes"] for need in case["needs"]) for case in steps if "needs" in case]
    assert len(told) >= 6
    np.testing.assert_allclose([case["peak_bytes"] for case in steps if "needs" in case], told, rtol=0.1)


# The models' shapes, from the papers: vocabulary, D, hidden width F, heads N, key-value heads, head width H.
SHAPES = {
    "gemma2_2b": (256_000, 2304, 9216, 8, 4, 256),
    "gemma2_9b": (256_000, 3584, 14_336, 16, 8, 256),
    "gemma2_27b": (256_000, 4608, 36_864, 32, 16, 128),
}


def test_harvests_on_tpu_slices_hold_the_parameters_up_to_their_layer_once():
    """Each parameter takes two bytes, on every chip or split over all chips."""
    harvests = json.loads((ROOT / "results" / "tpu.json").read_text())["numbers"]["harvests"]
    assert {case["model"] for case in harvests} == set(SHAPES)
    for case in harvests:
        v, d, f, n, kv, h = SHAPES[case["model"]]
        block = 2 * d * n * h + 2 * d * kv * h + 3 * d * f + 4 * d
        assert case["parameters"] == v * d + (case["layer"] + 1) * block + d, case["model"]
        share = 2 * case["parameters"] / (case["chips"] if case["split"] else 1)
        assert abs(case["argument_bytes"] / share - 1) < 0.01, case["model"]
        assert case["argument_bytes"] < case["peak_bytes"]
        assert case["peak_bytes"] < devices.CHIPS[case["topology"].split(":")[0]].memory


def test_the_python_of_the_models_page_runs(capsys):
    """Also checks that the real model's reply has the likeliest tokens of a pass without a cache."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)
    assert len(code) == 2
    names = {}
    exec("\n".join(code), names)
    assert names["values"][names["mlp"]].shape == (1, 6, 640)
    assert np.isfinite(names["logits"]).all()
    gemma, prompt, reply = names["gemma"], names["prompts"][0], names["replies"][0]
    tokens = jnp.array([[*prompt, *reply]])
    where = interventions.Where(tokens, jnp.arange(tokens.size)[None], None, {})
    write = {names["resid"]: lambda x: names["steering"](x, where)}
    x = forward.embed(gemma, tokens)
    x, _ = forward.run_blocks(gemma, x, tokens, gemma.layers, write=write)
    logits = predictions.logits(gemma, x)
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == reply
    assert capsys.readouterr().out


def test_the_python_of_the_explore_page_runs(tiny_gemma, tmp_path, monkeypatch, capsys):
    """Uses the small model, which has a token for each letter."""
    subjects = {"layer_1": attached.Subject(toys.random_sae(), Site("resid_post", 1), None)}
    scope = scopes.make(tiny_gemma, subjects, held_out=tiny.tokens(4, 24, seed=4))
    monkeypatch.setattr(analysis, "open_scope", lambda path: scope)
    monkeypatch.chdir(tmp_path)
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "explore.md").read_text(), re.DOTALL))
    names = {}
    exec(code.replace('" strong"', '"s"').replace('" weak"', '"w"'), names)
    assert names["found"].against[1] == "w" and "layer_1" in capsys.readouterr().out
    for name in ("reading.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_config_of_the_banks_page_is_valid():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "banks.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    chosen = config.from_dict(names["get_config"]().to_dict())
    assert {name: len(naming.members(b)) for name, b in chosen.banks.items()} == {"residual": 6, "heads": 1}


def test_the_labelled_texts_of_the_metrics_page_can_be_probed(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = probing.read_labelled(tmp_path / "labelled.jsonl")
    assert set(found.labels) == {"from 1913", "before 1913"} and len(set(found.groups)) > 240
    probing.split(found, 0)


def test_the_layout_names_every_package_and_links_name_existing_files():
    layout = (ROOT / "docs" / "design.md").read_text().split("## Layout")[1].split("```")[1]
    package = ROOT / "gemma_scope_jax"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert rooms | {"config.py", "api.py"} == set(re.findall(r"^  ([\w.]+/?) ", layout, re.MULTILINE))
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]*)[^)]*\)", document.read_text()):
            assert not target or target.startswith("http") or (document.parent / target).exists(), (
                document,
                target,
            )


def test_python_files_named_in_the_documents_exist():
    there = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for named in re.findall(r"(?<![\w*])[\w/]+\.py\b", document.read_text()):
            if named in ("my_config.py", "suite.py"):  # The reader writes these.
                continue
            ending = "/" + named.lstrip("/")
            assert any(f"/{path}".endswith(ending) for path in there), (document.name, named)


def test_the_readmes_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def python_of(document):
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.silent
@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_the_python_of_the_first_pages_runs(document, inputs, tmp_path, monkeypatch, capsys):
    """Uses the tests' small model, and a random SAE instead of Google's."""
    monkeypatch.chdir(tmp_path)
    load_model = functools.partial(gs.load_model, weights=str(inputs / "weights"))
    monkeypatch.setattr(config_files, "load", lambda name: config.to_dict(tiny.run_config(inputs)))
    monkeypatch.setattr(gs, "load_model", load_model, raising=False)
    published = loading.LoadedSAE(
        "published", toys.random_sae(), common.About(), "tiny", Site("resid_post", 1), Site("resid_post", 1)
    )
    monkeypatch.setattr(gs, "load_sae", lambda location: published, raising=False)
    names = {}
    exec("\n".join(python_of(ROOT / document)).replace("width=2048", "width=128"), names)
    assert names["results"].results.keys() == names["run"].saes.keys()
    if document == "README.md":
        assert names["latents"].shape == (len("The capital of France is Paris"), 64)
        assert names["scope"].subjects.keys() == names["run"].saes.keys()
    out, err = capsys.readouterr()
    assert "delta" in out and err == ""


@pytest.mark.parametrize(("document", "members"), [("training.md", 3), ("tutorials/publish_a_suite.md", 6)])
def test_the_configs_of_the_guides_are_valid(document, members, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gemma_scope_jax.configs", configs)
    names = {}
    exec("\n".join(python_of(ROOT / "docs" / document)), names)
    made = config.from_dict(names["get_config"]().to_dict())
    assert sum(len(naming.members(b)) for b in made.banks.values()) == members
    if made.data.text == "speeches.jsonl":
        assert len(list(sources.documents(made.data.text))) > 200


def commands_of(document):
    """The `gemma-scope` commands in a document's code blocks, each as one line."""
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("gemma-scope "):
                yield line.strip()


# Values for the placeholders in the documents' commands; None drops the word.
PLACEHOLDERS = {"N": "7", "LATENT+3t": "7+3t", "LATENT+t": "7+t", "…": None, "CONFIG": "quickstart"}
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
DOCUMENTED = sorted({(document.name, line) for document in DOCUMENTS for line in commands_of(document)})


@pytest.mark.parametrize(("document", "line"), DOCUMENTED)
def test_commands_in_the_documents_have_valid_arguments(document, line, monkeypatch):
    """Parses the arguments, including the optional ones in brackets, without running the command."""
    words = shlex.split(line.replace("[", "").replace("]", "").replace(" ...", ""), comments=True)[1:]
    words = [re.sub(r"(?<==)N$", "7", PLACEHOLDERS.get(word, word) or "") for word in words]
    words = [word for word in words if word and word != "--FIELD" and word != "VALUE"]
    called = []

    def recorded(function):
        return functools.wraps(function)(lambda *args, **kwargs: called.append(function.__name__))

    name, *arguments = words
    command = main.COMMANDS[name]
    call = (lambda default: recorded(command.call(default))) if command.has_fields else recorded(command.call)
    main.call(name, command._replace(call=call), arguments)
    assert called == [name]
