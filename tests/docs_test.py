"""The README says what was measured, and names what is there."""

import pathlib
import re

from benchmarks import results

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_results_file_stands_in_the_readme_as_it_was_measured():
    tables = results.tables()
    assert (
        set(tables) == set(re.findall(r"<!-- results/(\S+) -->", README)) >= {"quickstart.json", "step.json"}
    )
    for name, table in tables.items():
        shown = README.split(f"<!-- results/{name} -->\n")[1].split("\n<!-- end -->")[0]
        assert shown == table, f"README differs from results/{name}; run python -m benchmarks.results"


def test_the_readme_names_every_module_and_only_files_that_exist():
    modules = {path.name for path in (ROOT / "gemma_scope_jax").glob("*.py")} - {
        "__init__.py",
        "__main__.py",
        "cli.py",
    }
    layout = README.split("## Layout")[1]
    assert modules <= set(re.findall(r"\w+\.py", layout))
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_the_readmes_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
