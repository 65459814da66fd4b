"""The logit lens: next-token predictions from each layer's residual stream and from its SAE reconstruction.

Shapes: R streams, L tokens, D width of the stream, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.patches
import numpy as np

from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import predictions as predictions_lib
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import distributed, sharding


class Predictions(NamedTuple):
    """Predictions of the next token from streams; arrays [R, L]."""

    token: np.ndarray  # the likeliest token
    probability: np.ndarray  # of the likeliest token
    answer_probability: np.ndarray
    answer_rank: np.ndarray  # 1 if no token is likelier


@dataclasses.dataclass(frozen=True)
class Lens(Result):
    """Predictions from streams and their reconstructions at each of L tokens, by layer."""

    tokens: tuple[str, ...]
    layers: tuple[str, ...]  # R labels, from the first layer to the last
    answer_L: np.ndarray  # the token at each position whose probability and rank are given
    is_given: bool  # True: the caller chose one answer; False: the model's own prediction at each token
    stream: Predictions  # [R, L]
    reconstruction: Predictions  # [R, L]
    output: Predictions  # [1, L], of the model
    texts: Mapping[int, str]  # of all tokens in the predictions

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each token and each of: a layer's stream, its reconstruction, and the model's output."""
        sides = {"stream": self.stream, "reconstruction": self.reconstruction, "output": self.output}
        for side, seen in sides.items():
            for row, layer in enumerate(self.layers if side != "output" else [""]):
                yield from records_of(
                    {
                        "layer": layer,
                        "of": side,
                        "position": np.arange(len(self.tokens)) + 1,
                        "token": list(self.tokens),
                        "likeliest": [self.texts[int(token)] for token in seen.token[row]],
                        "probability": seen.probability[row],
                        "answer": [self.texts[int(token)] for token in self.answer_L],
                        "answer_probability": seen.answer_probability[row],
                        "answer_rank": seen.answer_rank[row],
                    }
                )

    def show(self, token: int = -1) -> None:
        """Prints the predictions at one token of the prompt, a line for each layer."""
        answer = repr(self.texts[int(self.answer_L[token])])
        title = f"likeliest token after {self.tokens[token]!r}; p and rank of {answer}"
        table = tables.Table(title=title)
        table.add_column("layer", justify="right")
        for side in ("stream", "reconstruction"):
            table.add_column(side)
            for heading in ("", "p", "rank"):
                table.add_column(heading, justify="right")
        for row, layer in reversed(list(enumerate(self.layers))):
            of = [*self._cells(self.stream, row, token), *self._cells(self.reconstruction, row, token)]
            table.add_row(layer, *of)
        table.add_row("output", *self._cells(self.output, 0, token), *[""] * 4)
        tables.show(table)

    def _cells(self, seen: Predictions, row: int, token: int) -> tuple[str, ...]:
        top, p, answer_p, rank = (values[row, token] for values in seen)
        return repr(self.texts[int(top)]), f"{p:.0%}", f"{answer_p:.2g}", f"{rank:,}"

    def grid(self, of: Predictions) -> list[list[dict]]:
        """Rows of cells in the order shown: the model's output, then layers from the last to the first."""
        parts = [np.concatenate(part)[::-1] for part in zip(of, self.output, strict=True)]
        return [
            [
                {
                    "text": self.texts[int(top)],
                    "p": float(p),
                    "answer": self.texts[int(answer)],
                    "answer_p": float(answer_p),
                    "rank": int(rank),
                    "is_answer": bool(top == answer),
                }
                for top, p, answer_p, rank, answer in zip(*row, self.answer_L, strict=True)
            ]
            for row in zip(*parts, strict=True)
        ]

    @property
    def rows(self) -> tuple[str, ...]:
        """The labels of a grid's rows."""
        return ("output", *self.layers[::-1])

    def figure(self) -> matplotlib.figure.Figure:
        """Two grids of layers × tokens with the likeliest next token: from streams (top) and from reconstructions.

        A darker cell means a higher probability. A frame marks cells whose likeliest token is the answer; in other
        cells a small number is the answer's rank.
        """
        height = 0.34 * len(self.rows) + 1.2
        width = max(0.62 * len(self.tokens) + 1.2, 5)
        figure, axes = plotting.new_figure(2, 1, width, height)
        answer = f"{self.texts[int(self.answer_L[0])]!r}" if self.is_given else "the model's prediction"
        title = f"likeliest next token, framed if it is {answer}; number: its rank"
        figure.suptitle(plottable(title, 200, plotting.columns_in(width, 10)), fontsize=10)
        sides = (("from the stream", self.stream), ("from the SAEs' reconstructions", self.reconstruction))
        for axis, (title, of) in zip(axes[:, 0], sides, strict=True):
            self._draw(axis, of)
            axis.set_title(title, fontsize=9)
            axis.set_ylabel("layer", fontsize=8)
        return figure

    def _draw(self, axis: object, of: Predictions) -> None:
        cells = self.grid(of)
        p = np.array([[cell["p"] for cell in row] for row in cells])
        # `vmax` above 1 keeps cells light enough for the text to be legible.
        axis.imshow(p, aspect="auto", cmap="Blues", vmin=0, vmax=1.5, interpolation="nearest")
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                style = {"ha": "center", "va": "center", "parse_math": False}
                lift = 0 if cell["is_answer"] else 0.15
                text = plotting.label(cell["text"], 9)
                weight = "bold" if cell["is_answer"] else "normal"
                axis.text(x, y - lift, text, fontsize=7, fontweight=weight, **style)
                if cell["is_answer"]:
                    corner, size = (x - 0.47, y - 0.44), (0.94, 0.88)
                    axis.add_patch(_frame(corner, *size))
                else:
                    axis.text(x, y + 0.27, _short(cell["rank"]), fontsize=5, color="#333333", **style)
        plotting.label_tokens(axis, self.tokens, most=len(self.tokens))
        plotting.label_rows(axis, self.rows)


def _frame(corner: tuple[float, float], width: float, height: float) -> object:
    return matplotlib.patches.Rectangle(corner, width, height, fill=False, edgecolor="#d93025", linewidth=1.2)


def _short(rank: int) -> str:
    return f"{rank}" if rank < 10_000 else f"{rank / 1000:.0f}k"


# The maximum number of logits in memory at a time.
_LOGITS = 2**24


@jax.jit
def _predictions(
    gemma: Gemma,
    x_RxLxD: jax.Array,
    answer_L: jax.Array,
) -> Predictions:
    gemma = gemma.whole()

    def at(of_token: tuple[jax.Array, jax.Array]) -> Predictions:
        x_RxD, answer = of_token
        logits_RxV = predictions_lib.logits(gemma, x_RxD)
        total_R = jax.nn.logsumexp(logits_RxV, axis=-1)
        answer_R = logits_RxV[:, answer]
        return Predictions(
            token=logits_RxV.argmax(-1),
            probability=jnp.exp(logits_RxV.max(-1) - total_R),
            answer_probability=jnp.exp(answer_R - total_R),
            answer_rank=1 + (logits_RxV > answer_R[:, None]).sum(-1),
        )

    of_a_token = len(x_RxLxD) // gemma.mesh.size * gemma.module.config.num_embed
    at_once = min(max(_LOGITS // of_a_token, 1), len(answer_L))
    found = jax.lax.map(at, (jnp.moveaxis(x_RxLxD, 1, 0), answer_L), batch_size=at_once)
    return sharding.constrain(gemma.mesh, jax.tree.map(lambda value: value.T, found), sharding.REPLICATED)


def predictions(gemma: Gemma, streams_RxLxD: np.ndarray, answer_L: np.ndarray) -> Predictions:
    """Predicts the token after each token from streams: final norm, unembedding, soft-cap.

    Args:
      gemma: the model.
      streams_RxLxD: the streams, in the model's dtype.
      answer_L: the token at each position whose probability and rank are returned.

    Returns:
      Arrays [R, L].
    """
    count = len(streams_RxLxD)
    # Streams are split over all devices; the last one is repeated as padding.
    padded = -(-count // gemma.mesh.size) * gemma.mesh.size
    x_RxLxD = streams_RxLxD[np.minimum(np.arange(padded), count - 1)]
    placed = jax.NamedSharding(gemma.mesh, sharding.TOKENS)
    put = jax.make_array_from_callback(x_RxLxD.shape, placed, lambda index: x_RxLxD[index])
    found = distributed.fetch(_predictions(gemma, put, np.asarray(answer_L, np.int32)))
    return Predictions(*(part[:count] for part in found))
