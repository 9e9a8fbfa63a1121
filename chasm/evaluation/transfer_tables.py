"""Curves over the number of images: the tidy frame, its tables, and what they say in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from rich.console import Console, Group
from rich.text import Text

from chasm.evaluation.bootstrap import interval
from chasm.evaluation.catalogue import label_of
from chasm.evaluation.grids import Cell as GridCell
from chasm.evaluation.grids import Grid, Line, make_cell, markdown_grid, number, rich_grid
from chasm.evaluation.prediction_parts import RunInfo
from chasm.evaluation.transfer import METRICS, Cell
from chasm.evaluation.transfer_arms import ARMS, REFERENCE

SHOWN = (
    "noise_normalised_r2",
    "pattern_correlation",
    "voxelwise_correlation_mean",
    "pattern_correlation_centred",
)
"""Metrics that have a table of their own; the CSV holds all."""

STRONGER = "banded_ridge"
"""A second arm from scratch that the adapters are compared with in words."""

_MIN_WIDTH = 120


@dataclass(frozen=True)
class Curve:
    """The cells of one subject, and what they are about.

    Attributes
    ----------
    cells
        All of them.
    ceiling
        Metric to the score of the best possible prediction.
    target_variance
        Mean over units of the variance over test images.
    info
        Subject, data set, units, split, backbone.
    sources
        Names of the source subjects.
    n_images, n_boot, seed
        Test images and their resamples.
    order
        ``random`` or ``presentation``.
    left_out
        Numbers that the data do not have.
    failed
        Name of an arm, number and draw that is missing, to the error it ended with.
    """

    cells: tuple[Cell, ...]
    ceiling: Mapping[str, float]
    target_variance: float
    info: RunInfo
    sources: tuple[str, ...]
    n_images: int
    n_boot: int
    seed: int
    order: str = "random"
    left_out: tuple[int, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """Metric of the findings: noise-normalised R², or R² where no ceiling is known."""
        return "noise_normalised_r2" if np.isfinite(self.ceiling["r2"]) else "r2"


@dataclass(frozen=True)
class SpreadCell(GridCell):
    """A number with its interval over images and its standard deviation over draws."""

    spread: float | None = None

    @property
    def text(self) -> str:
        """The value, with the spread where there are several draws."""
        plain = super().text
        return plain if self.spread is None else f"{plain} ± {self.spread:.3f}"


def curve_frame(cells: Sequence[Cell], reference: str = REFERENCE) -> pd.DataFrame:
    """Average over draws, and subtract the reference at the same number of images.

    Returns
    -------
    pandas.DataFrame
        One line per arm, number and metric: value (mean over draws), low and high (95 %
        percentile interval over images of that mean), draws, sd_draws (NaN for one draw),
        n_trained, difference, difference_low, difference_high (arm minus reference on the
        same resamples, over the draws that both have), difference_draws.
    """
    found: dict[tuple[str, int], dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.arm, cell.n), {})[cell.draw] = cell
    order = {arm: rank for rank, arm in enumerate(ARMS)}
    lines = []
    for arm, n in sorted(found, key=lambda key: (order[key[0]], key[1])):
        own, other = found[arm, n], found.get((reference, n), {})
        shared = [] if arm == reference else sorted(own.keys() & other.keys())
        for metric in METRICS:
            lines.append(
                {"arm": arm, "label": ARMS[arm].label, "kind": ARMS[arm].kind, "n": n}
                | {"metric": metric, "n_trained": next(iter(own.values())).n_trained}
                | _averaged(list(own.values()), metric)
                | _subtracted([(own[d], other[d]) for d in shared], metric)
            )
    return pd.DataFrame(lines)


def _averaged(cells: Sequence[Cell], metric: str) -> dict[str, float]:
    points = np.array([cell.points[metric] for cell in cells])
    low, high = interval(np.mean([cell.samples[metric] for cell in cells], axis=0))
    return {
        "value": float(points.mean()),
        "low": float(low),
        "high": float(high),
        "draws": len(cells),
        "sd_draws": float(points.std(ddof=1)) if len(cells) > 1 else np.nan,
    }


def _subtracted(pairs: Sequence[tuple[Cell, Cell]], metric: str) -> dict[str, float]:
    names = ("difference", "difference_low", "difference_high")
    if not pairs:
        return dict.fromkeys(names, np.nan) | {"difference_draws": 0}
    points = [own.points[metric] - other.points[metric] for own, other in pairs]
    samples = [own.samples[metric] - other.samples[metric] for own, other in pairs]
    low, high = interval(np.mean(samples, axis=0))
    values = (float(np.mean(points)), float(low), float(high))
    return dict(zip(names, values, strict=True)) | {"difference_draws": len(pairs)}


def draws_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Every cell's scores: a line per arm, number, draw and metric."""
    return pd.DataFrame(
        [
            {"arm": c.arm, "n": c.n, "draw": c.draw, "n_trained": c.n_trained}
            | {"metric": metric, "value": c.points[metric]}
            for c in cells
            for metric in METRICS
        ]
    )


def headline(info: RunInfo, n_images: int) -> str:
    """Title: SIMULATED when it is so, subject, unit, split, test images, backbone."""
    prefix = "SIMULATED · " if info.simulated else ""
    return (
        f"{prefix}{info.subject} ({info.dataset}) · {info.unit}s · split {info.split} · "
        f"{n_images} test images · backbone {info.backbone} [{info.weights_label}]"
    )


def metric_grid(curve: Curve, frame: pd.DataFrame, metric: str) -> Grid:
    """Arms by numbers of images: value ± sd over draws, interval over images; then the ceiling."""
    part = frame[frame["metric"] == metric]
    numbers = sorted(part["n"].unique())
    lines = []
    for _, own in part.groupby("arm", sort=False):
        at = own.set_index("n")
        kind = {"adapter": "model"}.get(at["kind"].iloc[0], at["kind"].iloc[0])
        cells = [_spread_cell(at.loc[n]) if n in at.index else "" for n in numbers]
        lines.append(Line(at["label"].iloc[0], kind, tuple(cells)))
    ceiling = curve.ceiling[metric]
    if np.isfinite(ceiling):
        lines.append(Line("noise ceiling", "ceiling", (number(ceiling),) * len(numbers)))
    return Grid(
        label_of(metric, curve.info.unit),
        tuple(f"N = {n}" for n in numbers),
        tuple(lines),
        "Value: mean over draws ± standard deviation over draws, where there are several: there is "
        "one draw of more than half of all images.",
    )


def _spread_cell(line: pd.Series) -> SpreadCell:
    plain = make_cell(line["value"], line["low"], line["high"])
    spread = None if np.isnan(line["sd_draws"]) else float(line["sd_draws"])
    return SpreadCell(plain.value, plain.low, plain.high, spread=spread)


def difference_grid(curve: Curve, frame: pd.DataFrame, metric: str) -> Grid:
    """Adapters minus ridge from scratch at the same number of images."""
    part = frame[(frame["metric"] == metric) & (frame["kind"] != "reference")]
    part = part[part["difference_draws"] > 0]
    numbers = sorted(part["n"].unique())
    names = ["difference", "difference_low", "difference_high"]
    lines = []
    for _, own in part.groupby("arm", sort=False):
        at = own.set_index("n")
        cells = [
            make_cell(*at.loc[n, names].astype(float), signed=True) if n in at.index else ""
            for n in numbers
        ]
        kind = "model" if at["kind"].iloc[0] == "adapter" else "baseline"
        lines.append(Line(f"{at['label'].iloc[0]} − {ARMS[REFERENCE].label}", kind, tuple(cells)))
    return Grid(
        f"{label_of(metric, curve.info.unit)}: difference to {ARMS[REFERENCE].label}",
        tuple(f"N = {n}" for n in numbers),
        tuple(lines),
        "Same draws, same resamples of the test images. The intervals are over images, each for "
        "itself, and do not include the choice of the N images.",
    )


def size_grid(frame: pd.DataFrame) -> Grid:
    """Weights fitted to the subject, and draws, of every arm."""
    part = frame[frame["metric"] == METRICS[0]]
    lines = []
    for name, own in part.groupby("arm", sort=False):
        sizes, draws = own["n_trained"].unique(), own["draws"].unique()
        lines.append(
            Line(
                own["label"].iloc[0],
                "",
                (
                    f"{sizes.min():,}" + (f" to {sizes.max():,}" if len(sizes) > 1 else ""),
                    f"{draws.min()}" + (f" to {draws.max()}" if len(draws) > 1 else ""),
                    ARMS[str(name)].meaning,
                ),
            )
        )
    return Grid("Arms", ("Weights fitted", "Draws", "What it is"), tuple(lines))


def findings(curve: Curve) -> list[str]:
    """Say at which numbers of images every adapter is above, below or beside the scratch arms.

    Every adapter is compared with ridge by two metrics, and with banded ridge where it is above
    ridge at some number.
    """
    unit, metric = curve.info.unit, curve.metric
    sentences = [
        f"{label_of(metric, unit)} on {curve.n_images} test images of {curve.info.subject}; "
        f"source: {', '.join(curve.sources)}."
    ]
    against = {
        reference: curve_frame(curve.cells, reference).query("kind == 'adapter'")
        for reference in (REFERENCE, STRONGER)
    }
    ahead = against[REFERENCE].query("metric == @metric and difference_low > 0")["arm"]
    for reference, key in (
        (REFERENCE, metric),
        (STRONGER, metric),
        (REFERENCE, "voxelwise_correlation_mean"),
    ):
        frame = against[reference]
        frame = frame[(frame["metric"] == key) & (frame["difference_draws"] > 0)]
        if reference == STRONGER:
            frame = frame[frame["arm"].isin(ahead)]
        start = "" if key == metric else f"By {label_of(key, unit).lower()}: "
        sentences += [
            start + _finding(own["label"].iloc[0], ARMS[reference].label, own)
            for _, own in frame.groupby("arm", sort=False)
        ]
    return sentences


def told_apart(frame: pd.DataFrame, reference: str) -> dict[str, pd.DataFrame]:
    """Sort the lines of a frame by whether the interval of their difference excludes 0.

    Parameters
    ----------
    frame
        With ``difference_low`` and ``difference_high``; lines without an interval are left out.
    reference
        What the differences are to, for the wording.

    Returns
    -------
    dict
        Lines under ``above <reference>``, ``below ...``, ``not told apart from ...``, in this
        order; only those that there are.
    """
    low, high = (frame[f"difference_{end}"] for end in ("low", "high"))
    chosen = {
        f"above {reference}": low > 0,
        f"below {reference}": high < 0,
        f"not told apart from {reference}": (low <= 0) & (high >= 0),
    }
    return {what: frame[lines] for what, lines in chosen.items() if lines.any()}


def _finding(label: str, reference: str, own: pd.DataFrame) -> str:
    texts = []
    for what, lines in told_apart(own, reference).items():
        places = [f"{line['n']} ({line['difference']:+.3f})" for _, line in lines.iterrows()]
        texts.append(f"{what} at N = {', '.join(places)}")
    start = f"{label[:1].upper()}{label[1:]} is "
    return start + ("; ".join(texts) if texts else f"not compared with {reference}") + "."


def notes(curve: Curve) -> list[str]:
    """Say how the numbers were made, and what is missing."""
    images = "drawn at random" if curve.order == "random" else "in the order they were presented"
    lines = [
        f"N images are {images}; validation is taken from inside N where an arm needs it, and "
        "session statistics come from all train trials at any N. Every arm predicts the same test "
        "images. R², noise-normalised R² and the centred correlation are against the mean pattern "
        "of all train images, so that they mean the same at any N.",
        f"In brackets: 95 % intervals over test images, {curve.n_boot} bootstrap resamples shared "
        f"by all arms (seed {curve.seed}), of the mean over draws."
        if curve.n_boot
        else "No intervals were computed.",
    ]
    if curve.left_out:
        numbers = ", ".join(map(str, curve.left_out))
        lines.append(f"Left out, because there are fewer train images: N = {numbers}.")
    return lines + [f"{name} is missing: {error}" for name, error in curve.failed.items()]


def grids(curve: Curve) -> list[Grid]:
    """List all tables of a curve."""
    frame = curve_frame(curve.cells)
    metrics = dict.fromkeys((curve.metric, *SHOWN))
    known = [m for m in metrics if frame.loc[frame["metric"] == m, "value"].notna().any()]
    return [
        metric_grid(curve, frame, known[0]),
        difference_grid(curve, frame, known[0]),
        *(metric_grid(curve, frame, metric) for metric in known[1:]),
        size_grid(frame),
    ]


def markdown(curve: Curve) -> str:
    """Return the tables of a curve as Markdown."""
    parts = [f"# {headline(curve.info, curve.n_images)}", " ".join(findings(curve))]
    parts += notes(curve) + [markdown_grid(grid) for grid in grids(curve)]
    return "\n\n".join(parts) + "\n"


def show(curve: Curve, console: Console | None = None) -> None:
    """Print the first tables and the findings to a terminal."""
    console = console or Console()
    if console.width < _MIN_WIDTH and not console.is_terminal:
        console.width = _MIN_WIDTH
    style = "bold yellow" if curve.info.simulated else "bold"
    pieces = [rich_grid(grid) for grid in grids(curve)[:2]]
    texts = [Text(line) for line in (*notes(curve), *findings(curve))]
    console.print(Group(Text(headline(curve.info, curve.n_images), style=style), *pieces, *texts))
