"""The commands that hand SAEs on: `export`, `convert`, `publish`.

Each imports what it runs when it runs: --help must not take seconds.
"""

from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import Dtype, Flag, MaybeText, Place, Positional


def export(
    run: Positional[Place],
    out: Place,
    format: str = "saelens",
    bank: MaybeText = None,
    dtype: Dtype = "float32",
) -> None:
    """Write the SAEs of a run in a format that other tools read.

    gemma-scope export runs/quickstart --format gemma_scope --out exported

    Args:
      run: a run directory.
      out: folder to write to.
      format: saelens, gemma_scope, gemma_scope_2, dictionary_learning or circuit_tracer; several with commas, or all.
      bank: only this bank's SAEs.
      dtype: of the matrices.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.saes import formats
    from gemma_scope_jax.training import export as export_lib

    chosen = formats.written() if format == "all" else tuple(format.split(","))
    for one in chosen:
        formats.format_to_write(one)
    for place in export_lib.export_run(run, chosen, out, bank, dtype):
        common.say(f"Exported {place}")


def convert(
    sae: Positional[str],
    format: str,
    out: Place,
    model: str = "",
    site: str = "",
    target_site: str = "",
    weights: str = "",
    dtype: Dtype = "float32",
) -> None:
    """Write an SAE of a file, or a set of transcoders, in another format.

    gemma-scope convert hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 --format saelens --out sae

    Args:
      sae: a path or hf://OWNER/NAME/FOLDER, in any format.
      format: saelens, gemma_scope, gemma_scope_2, dictionary_learning or circuit_tracer.
      out: folder to write to.
      model: if the file does not say it or is wrong, as in gemma2_2b.
      site: likewise what it reads, as in layer_20_resid_post.
      target_site: likewise what a transcoder predicts.
      weights: Gemma's, where formats differ in the gain that a transcoder reads after.
      dtype: of the matrices.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.saes import saving

    sites = {"model": model, "site": site, "target_site": target_site}
    for place in saving.convert(sae, format, out, dtype, weights, **sites):
        common.say(f"Wrote {place}")


def publish(
    run: Positional[Place],
    out: Place,
    repo: str,
    license: str = "",
    format: str = "saelens",
    dtype: Dtype = "float32",
    push: Flag = False,
) -> None:
    """Write a repository of a run's SAEs for Hugging Face's hub, and perhaps upload it.

    gemma-scope publish runs/quickstart --repo you/gemma-saes --license cc-by-4.0 --out published

    Args:
      run: the directory of a run that has been evaluated.
      out: folder to write to.
      repo: OWNER/NAME on the hub.
      license: that you choose for your SAEs, as the hub calls it, such as cc-by-4.0.
      format: saelens or gemma_scope.
      dtype: of the matrices.
      push: upload it, too.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.training import publish as publish_lib

    publish_lib.publish(run, out, repo, license, format, dtype, push)
