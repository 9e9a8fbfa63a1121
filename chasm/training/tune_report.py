"""What a sweep found: the best recipe, a table of trials, figures, a page."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.importance import get_param_importances
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.text import Text

from chasm.evaluation.figures import BASELINE_COLOUR, GREY, MODEL_COLOURS, STYLE, to_png, to_svg
from chasm.evaluation.grids import Grid, Line, rich_grid
from chasm.evaluation.page import fill
from chasm.io import atomic_path, write_text
from chasm.training.recipes import Recipe
from chasm.training.search_space import Sweep, as_arguments, short_names

log = logging.getLogger(__name__)

BEST = 5
"""Columns of the table of the best trials, beside the recipe as it is."""

_BEST_COLOUR = MODEL_COLOURS[0]


class Findings:
    """A study that has complete trials, and what can be said of it.

    Parameters
    ----------
    study
        With at least one complete trial.
    sweep, recipe
        What was searched, and the recipe without search.
    facts
        Where it comes from: ``simulated``, ``subject``, ``dataset``, ``weights_label``.
    """

    def __init__(
        self, study: Study, sweep: Sweep, recipe: Recipe, facts: Mapping[str, Any]
    ) -> None:
        self.study, self.sweep, self.recipe, self.facts = study, sweep, recipe, facts
        self.trials = study.get_trials(deepcopy=False)
        self.monitor = recipe.selection.monitor
        self.names = short_names([d.key for d in sweep.space])
        self.best = study.best_trial

    @property
    def complete(self) -> list[FrozenTrial]:
        """Complete trials, the best one first."""
        sign = 1 if self.study.direction == StudyDirection.MINIMIZE else -1
        found = [t for t in self.trials if t.state == TrialState.COMPLETE]
        return sorted(found, key=lambda t: (sign * (t.value or 0.0), t.number))

    @property
    def usual(self) -> FrozenTrial | None:
        """The trial of the recipe as it is, if it was one."""
        values = self.sweep.values_of(self.recipe.settings())
        return next((t for t in self.complete if self.sweep.suggest(t) == values), None)

    @property
    def headline(self) -> str:
        """Say what this is about, in a line."""
        said = f"Sweep {self.study.study_name} of {self.recipe.name}, {self.facts['subject']}"
        return f"SIMULATED. {said}" if self.facts["simulated"] else said

    def sentences(self) -> list[str]:
        """Say what was found."""
        n = {state: sum(t.state == state for t in self.trials) for state in TrialState}
        said = [
            f"{n[TrialState.COMPLETE]} trials were trained to their end, "
            f"{n[TrialState.PRUNED]} were stopped early, {n[TrialState.FAIL]} failed.",
            f"Best: trial {self.best.number}, {self.monitor} {self.best.value:#.5g}.",
        ]
        if self.usual is not None:
            if self.usual.number == self.best.number:
                said[-1] += " It is the recipe as it is."
            else:
                said[-1] += (
                    f" The recipe as it is (trial {self.usual.number}): {self.usual.value:#.5g}."
                )
        said.append(
            "All values are of validation images, the best of many, and so too good; test images "
            "were not read."
        )
        return said

    def grid(self) -> Grid:
        """Table of the best trials, and of the recipe as it is; a line for each key."""
        shown = self.complete[:BEST]
        if self.usual is not None and self.usual not in shown:
            shown.append(self.usual)
        values = [self.sweep.suggest(trial) for trial in shown]
        lines = [
            Line(self.monitor, "model", tuple(f"{t.value:#.5g}" for t in shown)),
            Line("best epoch", "", tuple(map(_best_epoch, shown))),
            *(
                Line(name, "", tuple(_short(found.get(key, "–")) for found in values))
                for key, name in self.names.items()
            ),
        ]
        usual = None if self.usual is None else self.usual.number
        columns = tuple(f"#{t.number}{'*' * (t.number == usual)}" for t in shown)
        note = "* The recipe as it is." if usual is not None else ""
        return Grid(f"Best trials of {len(self.trials)}", columns, tuple(lines), note)

    def frame(self) -> pd.DataFrame:
        """One line for each trial."""
        lines = []
        for trial in self.trials:
            duration = trial.duration.total_seconds() if trial.duration else None
            line = {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                self.monitor: trial.value,
                "epochs": len(trial.intermediate_values),
                "seconds": duration,
            }
            line |= {key: trial.params.get(key) for key in self.names}
            line |= {name: trial.user_attrs.get(name, "") for name in ("run", "worker", "error")}
            lines.append(line)
        return pd.DataFrame(lines)

    def best_recipe(self) -> str:
        """Give the recipe of the best trial, with all that it sets, as YAML."""
        values = self.sweep.suggest(self.best)
        # The run knows all its settings; their defaults may be others by now.
        config = Path(self.best.user_attrs.get("run", "")) / "config.yaml"
        if config.is_file():
            text = config.read_text(encoding="utf-8")
        else:
            text = _with(self.recipe, as_arguments(values))
        lines = [
            f"{self.headline}: the best trial, {self.best.number} of {len(self.trials)}",
            f"{self.monitor} {self.best.value:.5g}; searched in {self.sweep.path.name}:",
            *(f"  {key}: {_short(value)}" for key, value in values.items()),
        ]
        return "".join(f"# {line}\n" for line in lines) + text

    # Figures.

    def figures(self) -> dict[str, tuple[str, Figure, str]]:
        """Figures by file name: title, figure, note."""
        found = {
            "history": ("Trial after trial", self._history(), "The line is the best so far."),
            "curves": (
                "Validation, epoch by epoch",
                self._curves(),
                "Blue: the best trial. Orange: stopped early, in the epoch of the dot.",
            ),
        }
        importance = self._importance()
        if importance is not None:
            found["importance"] = (
                "What mattered",
                importance,
                "Share of a key in what separates the better trials from the others (PED-ANOVA, "
                "complete trials only); with few trials it is rough.",
            )
        found["slices"] = ("Each searched key", self._slices(), "Every dot is a complete trial.")
        return found

    def _history(self) -> Figure:
        figure, axes = _axes(self.headline)
        pruned = [t for t in self.trials if t.state == TrialState.PRUNED and t.value is not None]
        for trials, colour, name in (
            (self.complete, _BEST_COLOUR, "trained to the end"),
            (pruned, BASELINE_COLOUR, "stopped early"),
        ):
            if trials:
                x, y = [t.number for t in trials], [t.value or 0.0 for t in trials]
                axes.plot(x, y, "o", color=colour, markersize=5, label=name)
        ordered = pd.Series({t.number: t.value for t in self.complete}).sort_index()
        minimum = self.study.direction == StudyDirection.MINIMIZE
        best = ordered.cummin() if minimum else ordered.cummax()
        axes.step(best.index, best, where="post", color=_BEST_COLOUR, linewidth=1)
        axes.set(xlabel="trial", ylabel=self.monitor)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
        return figure

    def _curves(self) -> Figure:
        figure, axes = _axes(self.headline)
        for trial in self.trials:
            curve = pd.Series(trial.intermediate_values, dtype=float).sort_index()
            if curve.empty or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
                continue
            pruned, best = trial.state == TrialState.PRUNED, trial.number == self.best.number
            colour = _BEST_COLOUR if best else BASELINE_COLOUR if pruned else GREY
            width, order = (2.2, 3) if best else (0.9, 2)
            axes.plot(curve.index + 1, curve, color=colour, linewidth=width, zorder=order)
            if pruned:
                axes.plot(curve.index[-1] + 1, curve.iloc[-1], "o", color=colour, markersize=4)
        axes.set(xlabel="epoch", ylabel=self.monitor)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure

    def _importance(self) -> Figure | None:
        try:
            with warnings.catch_warnings():
                # Optuna warns of keys that no better trial has; their share is 0.
                warnings.simplefilter("ignore", UserWarning)
                found = get_param_importances(self.study)
        except (ValueError, RuntimeError) as error:  # too few trials, or all of one value
            log.info("no importances: %s", " ".join(str(error).split()))
            return None
        if len(self.complete) < 2 or not found:
            return None
        shares = pd.Series(found).rename(self.names).sort_values()
        figure, axes = _axes(self.headline, height=0.9 + 0.32 * len(shares))
        axes.barh(shares.index, shares, color=_BEST_COLOUR, height=0.6)
        for y, share in enumerate(shares):
            axes.text(share, y, f" {share:.2f}", va="center", fontsize=8)
        axes.set(xlabel="importance", xlim=(0, 1.12 * shares.max()))
        return figure

    def _slices(self) -> Figure:
        n = len(self.names)
        columns = min(3, n)
        rows = -(-n // columns)
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(2.4 * columns, 2.0 * rows + 0.4), layout="constrained")
            grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
            figure.suptitle(self.headline, fontsize=9)
        for axes, dimension in zip(grid, self.sweep.space, strict=False):
            trials = [t for t in self.complete if dimension.key in t.params]
            values = [self.sweep.suggest(t)[dimension.key] for t in trials]
            scale = dimension.distribution
            if not isinstance(scale, (FloatDistribution, IntDistribution)):
                values = [_short(value) for value in values]
            colours = [_BEST_COLOUR if t.number == self.best.number else GREY for t in trials]
            axes.scatter(values, [t.value for t in trials], c=colours, s=16)
            if getattr(scale, "log", False):
                axes.set_xscale("log")
                axes.set_xticks(dimension.ends, labels=[_short(end) for end in dimension.ends])
                axes.minorticks_off()
            axes.set_xlabel(self.names[dimension.key])
        for axes in grid[n:]:
            axes.set_visible(False)
        for axes in grid[::columns]:
            axes.set_ylabel(self.monitor)
        return figure


def write_findings(findings: Findings, folder: Path) -> None:
    """Write best.yaml, trials.csv, the figures as PNG and report.html."""
    write_text(folder / "best.yaml", findings.best_recipe())
    with atomic_path(folder / "trials.csv") as temporary:
        findings.frame().to_csv(temporary, index=False)
    figures = findings.figures()
    for name, (_, figure, _) in figures.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(to_png(figure))
    context = {
        "study": findings.study.study_name,
        "subject": findings.facts["subject"],
        "headline": findings.headline,
        "info": findings.facts,
        "summary": findings.sentences(),
        "grid": findings.grid(),
        "figures": [
            {"title": title, "svg": to_svg(figure), "note": note}
            for title, figure, note in figures.values()
        ],
        "failed": {t.number: _reason(t) for t in findings.trials if t.state == TrialState.FAIL},
        "facts": {
            "recipe": findings.sweep.recipe,
            "search space": findings.sweep.path,
            "optuna": optuna.__version__,
            "dataset": findings.facts["dataset"],
            "tokens": findings.facts["weights_label"],
        },
    }
    templates = Path(__file__).with_name("templates")
    write_text(folder / "report.html", fill("sweep.html.j2", context, templates))


def show(findings: Findings) -> None:
    """Print the best trials and what was found to the terminal."""
    console = Console()
    style = "bold yellow" if findings.facts["simulated"] else "bold"
    texts = [Text(line) for line in findings.sentences()]
    console.print(Group(Text(findings.headline, style=style), rich_grid(findings.grid()), *texts))


def _reason(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("error", "stopped before its end; it was queued again"))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best_epoch(trial: FrozenTrial) -> str:
    found = [step for step, value in trial.intermediate_values.items() if value == trial.value]
    return str(found[0] + 1) if found else "–"


def _axes(title: str, height: float = 3.2) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=9, loc="left")
    return figure, axes


def _with(recipe: Recipe, arguments: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        write_text(path, recipe.resolved())
        return Recipe(["-c", str(path), *arguments]).resolved()
