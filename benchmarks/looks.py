"""The analyses that docs/explore.md shows: of the quickstart's SAE, and of the 54 SAEs of the suite `sites`."""

import dataclasses
import html
import json
import pathlib
import tempfile

import numpy as np

from benchmarks import notebooks
from benchmarks.commands import RESULTS, measure
from gemma_scope_jax import analysis
from gemma_scope_jax.analysis.attribution import gradients
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.display import plotting
from gemma_scope_jax.evaluation import detection
from gemma_scope_jax.models import masking
from gemma_scope_jax.saes import attached

RUN, SITES = "runs/quickstart", "runs/sites"
ROWS = 256  # To choose a latent on, and the same number to measure it on.
RANDOM = 20  # Latents that it is compared with.
PROMPT, ANSWER = "Fellow citizens of the Senate and of the House of", " Representatives"
# Professions that are stereotypically women's, and men's.
PROFESSIONS = (
    "nurse secretary librarian receptionist nanny maid hairdresser dancer teacher typist housekeeper seamstress "
    "midwife babysitter cleaner cashier florist nutritionist therapist counselor stylist caregiver",
    "engineer carpenter plumber mechanic soldier general captain doctor lawyer judge pilot surgeon farmer miner "
    "blacksmith butcher sailor programmer architect electrician firefighter sheriff banker senator governor",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A range of other rows, in the same order."""

    whole: token_rows.Rows
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> token_rows.Batch:
        """Returns the rows at some indices."""
        return self.whole.read(self.first + np.asarray(indices))


def latent() -> tuple[list[str], dict]:
    """A latent chosen by how well its passages describe it, compared on other text with random latents."""
    scope = analysis.open_scope(RUN)
    ((name, subject),) = scope.subjects.items()
    held_out = scope.held_out()
    ends = [Part(held_out, first, ROWS) for first in (0, len(held_out) - ROWS)]
    batches = [end.read(np.arange(ROWS)) for end in ends]
    # Rows are in the order of documents, so no document is in both parts.
    assert batches[0].first_document.max() + 1 < batches[1].first_document.min()

    def detect(subject: object, rows: token_rows.Batch, latents: int) -> detection.Detection:
        config = scope.config
        options = (
            latents,
            0,
            config.evaluation.rows_per_batch,
            scope.tokenizer.decode,
            masking.masked_prefix(config.data),
        )
        return detection.detect(scope.gemma, {name: subject}, rows, *options)[name]

    first = {one.latent: one for one in detect(subject, batches[0], 100).latents}
    latents = list(first)
    other = {
        latents[one.latent]: one
        for one in detect(attached.alone(subject, latents), batches[1], len(latents)).latents
    }
    # Only latents that are scored on both parts. The choice does not depend on the scores on the second part.
    best = max(other, key=lambda latent: first[latent].auroc)
    drawn = np.random.default_rng(0).permutation([latent for latent in other if latent != best])[:RANDOM]
    picked, random = other[best], [other[latent] for latent in drawn.tolist()]
    unseen = dataclasses.replace(scope, held_out=lambda: ends[1])
    look = analysis.look_at(unseen, name, best, rows=ROWS)
    plotting.write_png(RESULTS.parent / "docs" / "images" / "latent.png", look.figure(), dpi=120)
    with tempfile.TemporaryDirectory() as scratch:
        command = f"gemma-scope dashboards {RUN}"
        seconds, memory = measure(f"{command} --out={pathlib.Path(scratch) / 'dashboards'}")
    return ["make quickstart", command], {
        "sae": name,
        "rows": ROWS,
        "scored": len(other),
        "latent": best,
        "auroc_picked_on": first[best].auroc,
        "auroc": picked.auroc,
        "control": picked.control,
        "random": [one.auroc for one in random],
        "random_control": [one.control for one in random],
        "words": picked.words,
        "frequency": look.frequency,
        "latents": len(subject.sae.b_enc),
        "dashboards_s": seconds,
        "dashboards_peak_bytes": memory,
    }


def prompts(scope: analysis.Scope) -> list[str]:
    """Ten prompts of 24 tokens each from held-out addresses."""
    rows = scope.held_out().read(np.arange(0, 800, 80))
    return [scope.tokenizer.decode(row[100:124].tolist()) for row in rows.tokens]


def attribution() -> tuple[list[str], dict]:
    """Correlations of attributions with ablations, and the gap of integrated gradients."""
    numbers = {}
    for path, latents in ((RUN, 32), (SITES, 48)):
        scope = analysis.open_scope(path)
        texts = prompts(scope)
        found = analysis.ablations_of_prompts(scope, texts, latents)
        numbers[path] = {
            "saes": len(scope.subjects),
            "width": len(next(iter(scope.subjects.values())).sae.b_enc),
            **{of: found.correlation(of) for of in ("all", "strongest", "random")},
            "prompts": [found.correlation(prompt=number) for number in range(len(texts))],
            "layers": {int(layer): found.correlation(layer=layer) for layer in np.unique(found.layer_N)},
        }
    scope = analysis.open_scope(RUN)
    (name,) = scope.subjects
    integrals = []
    for text in prompts(scope):
        whole, plain = analysis.integrate(scope, text, name), analysis.attribute(scope, text)
        # Both are compared on the same latents, chosen by the plain gradient.
        ablated = analysis.ablations(scope, plain, 32)
        parts_N = whole.parts[name].latents_M[ablated.latent_N]
        integrals.append(
            {
                "gap_of_gain": whole.integral.gap / (whole.metric - whole.integral.baseline),
                "nodes": whole.integral.nodes,
                "pearson": dataclasses.replace(ablated, attributed_N=parts_N).correlation().pearson,
                "pearson_of_plain": ablated.correlation().pearson,
                "sum_off_total": _off(plain.parts[name]),
            }
        )
    return ["python -m benchmarks.results attribution"], numbers | {"integrals": integrals}


def _off(parts: gradients.Parts) -> float:
    """The largest error of the sum of the parts of gradient × activation, relative to the largest y · g."""
    summed_L = parts.latents_L + parts.error_L + parts.bias_L + parts.skip_L
    return float(np.abs(summed_L - parts.total_L).max() / np.abs(parts.total_L).max())


def steering() -> tuple[list[str], dict]:
    """Replies with the latent chosen by `latent` added, and the effect and damage at several strengths."""
    latent = json.loads((RESULTS / "latent.json").read_text())["numbers"]["latent"]
    scope = analysis.open_scope(RUN)
    (name,) = scope.subjects
    typical = analysis.typical(scope, name, latent)
    texts = ["Once upon a time", "My fellow Americans"]
    steered = analysis.steer(scope, texts, [analysis.add(name, latent, 3 * typical)], num_tokens=30)
    swept = analysis.sweep(scope, name, latent, rows=8)
    numbers = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(swept).items()
    }
    commands = [
        f'gemma-scope steer {RUN} "Once upon a time" --edit={latent}+3t --num-tokens=30',
        f"gemma-scope steer {RUN} --edit={latent}+t --sweep --rows=8",
    ]
    replies = [
        {"prompt": text, "clean": clean, "changed": changed}
        for text, ((clean,), (changed,)) in zip(
            texts, zip(steered.clean, steered.changed, strict=True), strict=True
        )
    ]
    return commands, {"latent": latent, "typical": typical, "replies": replies, "sweep": numbers}


def bias() -> tuple[list[str], dict]:
    """How much of a gap is left without the latents that distinguish two sets of prompts, as in the notebook."""
    names = notebooks.names_of("correct_a_bias")
    scope, women, men, asked = (names[name] for name in ("scope", "women", "men", "asked"))
    made = {"seed 0": _corrected(names["found"], names["corrected"])}

    def add(label: str, choosing: tuple, measured: tuple, is_paired: bool = False, seed: int = 0) -> None:
        found = analysis.contrast(scope, *choosing, is_paired=is_paired, seed=seed)
        made[label] = None
        if found.found():
            made[label] = _corrected(found, analysis.correct(scope, found, *asked, *measured, seed=seed))

    for seed in (1, 2):
        add(f"seed {seed}", *analysis.halves(women, men, seed=seed), seed=seed)
    add("pairs", *analysis.halves(women, men, True), is_paired=True)
    professions = [[f"The {word} said that" for word in words.split()] for words in PROFESSIONS]
    add("latents of all the words, on professions", (women, men), professions)
    add("latents of professions, on others", *analysis.halves(*professions))
    return ["python -m benchmarks.results bias"], made


def _corrected(found: analysis.Contrast, corrected: analysis.Correction) -> dict:
    changes = [corrected.change, *(one.gap - corrected.clean.gap for one in corrected.random)]
    return {
        "tested": found.tested,
        "prompts": [len(found.first), len(found.second)],
        "found": [
            {"sae": name, "latent": latent, "auroc": float(found.of[name].auroc_M[latent]),
             "q": float(found.of[name].q_M[latent])}
            for name, latent in found.found()
        ],
        "first": [float(one.first_A.mean()) for one in (corrected.clean, corrected.ablated)],
        "second": [float(one.second_B.mean()) for one in (corrected.clean, corrected.ablated)],
        "gap": [corrected.clean.gap, corrected.ablated.gap],
        "gap_se": corrected.gap_se,
        "change": changes[0],
        "change_se": corrected.change_se,
        "random": changes[1:],
        "as_good": corrected.as_good,
        "delta_loss": corrected.ablated.delta_loss,
        "delta_loss_se": corrected.ablated.delta_loss_se,
        "random_delta_loss": [one.delta_loss for one in corrected.random if one.delta_loss is not None],
    }  # fmt: skip


def links() -> tuple[list[str], dict]:
    """Correlations of attributions and of weights with the effects of ablation on later latents."""
    scope = analysis.open_scope(SITES)
    names = {s.site.layer: name for name, s in scope.subjects.items() if s.site.kind == "resid_post"}
    of = analysis.activity(scope, 8, [names[6]])[names[6]]
    latents = np.random.default_rng(0).choice(np.flatnonzero(of.frequency_M > 0), 5, replace=False).tolist()
    layers: dict[int, dict[str, list[float]]] = {}
    for latent in latents:
        found = analysis.links(scope, names[6], latent)
        for layer in range(7, 18):
            kept = layers.setdefault(layer, {"attribution": [], "weight": []})
            kept["attribution"].append(found.correlation(found.attribution, names[layer]))
            kept["weight"].append(found.correlation(found.weight, names[layer]))
    flow = analysis.flow(scope, PROMPT, ANSWER)
    lens = {
        "stream": flow.lens.stream,
        "reconstruction": flow.lens.reconstruction,
        "output": flow.lens.output,
    }
    followed = {
        of: [
            [float(p), int(rank)]
            for p, rank in zip(made.answer_probability[:, -1], made.answer_rank[:, -1], strict=True)
        ]
        for of, made in lens.items()
    }
    command = f'gemma-scope flow {SITES} "{PROMPT}" --answer="{ANSWER}"'
    return [command, "python -m benchmarks.results links"], {
        "latents": latents, "rows": 8, "layers": layers, "flow": followed
    }  # fmt: skip


def latent_table(numbers: dict) -> str:
    """How well the chosen latent is described, compared with random latents."""
    latent, rows, random, control = (numbers[key] for key in ("latent", "rows", "random", "random_control"))
    better = sum(value >= numbers["auroc"] for value in random)
    on, before = (" ".join(f"`{word}`" for word in numbers["words"][part]) for part in ("on", "before"))
    return "\n".join(
        [
            f"{numbers['scored']} latents of the quickstart's SAE fire often enough to be scored on two parts of the "
            f"held-out text. On the first part, {rows} rows, `detect` describes latent {latent} best: AUROC "
            f"{numbers['auroc_picked_on']:.3f}. The picture and the following numbers are of the second part, {rows} "
            "rows of other documents:",
            "",
            "| | AUROC | AUROC with another latent's description |",
            "|---|---|---|",
            f"| latent {latent} | {numbers['auroc']:.3f} | {numbers['control']:.3f} |",
            f"| {len(random)} random other latents, mean | {np.mean(random):.3f} | {np.mean(control):.3f} |",
            f"| {len(random)} random other latents, lowest and highest | {min(random):.3f}, {max(random):.3f} "
            f"| {min(control):.3f}, {max(control):.3f} |",
            "",
            f"Of the {len(random)} random latents, {better or 'none'} reach{'es' if better == 1 else ''} the AUROC "
            f"of latent {latent}. Its description contains {on} on the firing token, and {before} before it. "
            f"Dashboards of all {numbers['latents']:,} latents on 512 rows take {numbers['dashboards_s'] / 60:.1f} "
            f"minutes on two cores, and {numbers['dashboards_peak_bytes'] / 1e9:.1f} GB of memory.",
        ]
    )


def _shown(correlation: list) -> str:
    latents, pearson, spearman = correlation
    return f"{latents} | {pearson:.3f} | {spearman:.3f}"


def attribution_table(numbers: dict) -> str:
    """Correlations of attributions with ablations, and the gap of integrated gradients."""
    one, many = numbers[RUN], numbers[SITES]
    lines = ["| SAEs | latents | number ablated | Pearson | Spearman |", "|---|---|---|---|---|"]
    label = f"`configs/quickstart.py`: layer 9, `resid_post`, {one['width']:,} latents"
    for of, what in (
        ("all", "all"),
        ("strongest", "strongest by attribution"),
        ("random", "random others"),
    ):
        lines.append(f"| {label} | {what} | {_shown(one[of])} |")
        label = ""

    def spread(found: list[list]) -> str:
        ends = [f"{min(one[k] for one in found):.3f} to {max(one[k] for one in found):.3f}" for k in (1, 2)]
        fewest, most = min(one[0] for one in found), max(one[0] for one in found)
        return f"{fewest}{f' to {most}' if most > fewest else ''} each | {' | '.join(ends)}"

    lines.append(f"| | all, for each of {len(one['prompts'])} prompts | {spread(one['prompts'])} |")
    label = f"{many['saes']} SAEs of {many['width']} latents, 18 layers × `resid_post`, `mlp_out`, `attn_out`"
    lines.append(f"| {label} | all | {_shown(many['all'])} |")
    for first, last in ((0, 1), (2, 9), (10, 17)):
        found = [
            many["layers"][str(layer)] for layer in range(first, last + 1) if str(layer) in many["layers"]
        ]
        lines.append(f"| | all, for each of layers {first} to {last} | {spread(found)} |")
    integrals = numbers["integrals"]
    off, gap = (max(abs(one[key]) for one in integrals) for key in ("sum_off_total", "gap_of_gain"))
    nodes = [one["nodes"] for one in integrals]
    r, plain = (np.mean([one[key] for one in integrals]) for key in ("pearson", "pearson_of_plain"))
    lines += [
        "",
        f"The parts of gradient times activation sum to y · g with an error of at most {off:.1e} of its largest "
        f"value. Integrated gradients leave a gap of at most {gap:.1e} of the gain, with {min(nodes)} to "
        f"{max(nodes)} nodes. For the same latents, the Pearson correlation with ablation is {r:.3f} for integrated "
        f"gradients and {plain:.3f} for the plain gradient, as means over the prompts.",
    ]
    return "\n".join(lines)


def steering_table(numbers: dict) -> str:
    """Replies side by side, and the sweep."""
    sweep, latent = numbers["sweep"], numbers["latent"]
    lines = [
        f"| prompt | original | with {3 * numbers['typical']:.0f} added to latent {latent} |",
        "|---|---|---|",
    ]
    for of in numbers["replies"]:
        # The model's text must not be read as Markdown.
        cells = [html.escape(of[key]).replace("\n", "↵").replace("|", "&#124;") for key in of]
        lines.append("| " + " | ".join(f"<code>{cell}</code>" for cell in cells) + " |")
    tokens = ", ".join(f"`{token}`" for token in sweep["tokens"])
    lines += [
        "",
        f"The effect is on the tokens {tokens}, which the latent's decoder raises most. Both columns are means over "
        f"{sweep['predictions']:,} predictions of {sweep['rows']} rows, whose loss is {sweep['clean_loss']:.3f} "
        "without a change:",
        "",
        f"| multiples of {sweep['unit']:.4g} added | effect, nats | damage, nats |",
        "|---|---|---|",
    ]
    columns = ("strengths_N", "effect_N", "effect_se_N", "damage_N", "damage_se_N")
    for strength, effect, effect_se, damage, damage_se in zip(
        *(sweep[name] for name in columns), strict=True
    ):
        lines.append(f"| {strength:g} | {effect:.3f} ± {effect_se:.3f} | {damage:.3f} ± {damage_se:.3f} |")
    return "\n".join(lines)


def bias_table(numbers: dict) -> str:
    """The gap without a change, without the latents found and without random latents; the gap left by seed."""
    of = numbers["seed 0"]
    found = ", ".join(f"{one['latent']} (AUROC {one['auroc']:.2f}, q {one['q']:.2g})" for one in of["found"])
    random = of["random"]
    lines = [
        f"{of['tested']} latents fire on one half of the prompts, {of['prompts'][0]} and {of['prompts'][1]}. The "
        f"latents found are {found}. On the other half:",
        "",
        "| ablated | women | men | gap | change in the gap | delta loss, nats |",
        "|---|---|---|---|---|---|",
        f"| nothing | {of['first'][0]:.3f} | {of['second'][0]:.3f} | {of['gap'][0]:.3f} ± {of['gap_se']:.3f} | | |",
        f"| {len(of['found'])} latents found | {of['first'][1]:.3f} | {of['second'][1]:.3f} | {of['gap'][1]:.3f} "
        f"| {of['change']:.3f} ± {of['change_se']:.3f} | {of['delta_loss']:.4f} ± {of['delta_loss_se']:.4f} |",
        f"| {len(random)} random sets, mean | | | {of['gap'][0] + np.mean(random):.3f} | {np.mean(random):.3f} "
        f"({min(random):.3f} to {max(random):.3f}) | {np.mean(of['random_delta_loss']):.4f} (of "
        f"{len(of['random_delta_loss'])} sets) |",
        "",
    ]
    for label, one in numbers.items():
        if one is None:
            lines.append(f"- {label}: no latents found.")
            continue
        count, share = len(one["found"]), one["gap"][1] / one["gap"][0]
        lines.append(
            f"- {label}: {count} latent{'' if count == 1 else 's'} found; {share:.0%} of a gap of "
            f"{one['gap'][0]:.3f} is left. {one['as_good']} of {len(one['random'])} random sets narrow the gap "
            "as much."
        )
    return "\n".join(lines)


def flow_table(numbers: dict) -> str:
    """The probability and rank of the answer at each layer."""
    lines = [
        "| layer | p from the stream | rank | p from the reconstruction | rank |",
        "|---|---|---|---|---|",
    ]
    of = numbers["flow"]
    for layer, pair in enumerate(zip(of["stream"], of["reconstruction"], strict=True)):
        lines.append(f"| {layer} | " + " | ".join(f"{p:.2g} | {rank:,}" for p, rank in pair) + " |")
    ((p, rank),) = of["output"]
    return "\n".join([*lines, f"| output | {p:.2g} | {rank} | | |"])


def links_table(numbers: dict) -> str:
    """Correlations with the effects of ablation, by layer."""
    lines = ["| layer | attributions | weights |", "|---|---|---|"]
    for layer, of in numbers["layers"].items():
        shown = [
            f"{np.nanmedian(of[key]):.2f} ({np.nanmin(of[key]):.2f} to {np.nanmax(of[key]):.2f})"
            for key in of
        ]
        lines.append(f"| {layer} | {' | '.join(shown)} |")
    return "\n".join(
        [
            f"Correlations with the effects of ablation: median (lowest to highest) over {len(numbers['latents'])} "
            f"random latents that fire in the residual stream after layer 6, on {numbers['rows']} rows:",
            "",
            *lines,
        ]
    )


# By the name of the file in results/: the function that measures it, and the function that makes its table.
LOOKS = {
    "latent": (latent, latent_table),
    "attribution": (attribution, attribution_table),
    "steering": (steering, steering_table),
    "bias": (bias, bias_table),
    "links": (links, links_table),
}
