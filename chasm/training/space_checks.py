"""What is found wrong with a sweep before any of it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from chasm.errors import ChasmError, ConfigError
from chasm.training.recipes import Recipe
from chasm.training.search_space import Sweep, Value, as_arguments

_COMPARED = "it changes what trials are compared on; make a sweep for each value"
_OF_THE_STUDY = "it is the same in all trials of a study; give it on the command line"
_NO_EFFECT = "it changes nothing in the result"

REFUSED = {
    **dict.fromkeys(
        ("data.subject", "data.dataset_dir", "data.split", "data.split_seed", "data.statistics",
         "data.parcels", "data.few_shot", "selection", "trainer.limit_val_batches",
         "trainer.overfit_batches", "trainer.fast_dev_run"),
        _COMPARED,
    ),
    **dict.fromkeys(
        ("seed_everything", "data.seed", "runs", "name", "stage1", "source", "subjects",
         "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator"),
        _OF_THE_STUDY,
    ),
    **dict.fromkeys(
        ("data.num_workers", "model.init_args.cache_stage1", "model.init_args.compile",
         "trainer.logger", "trainer.callbacks", "trainer.default_root_dir",
         "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler",
         "trainer.enable_checkpointing", "trainer.log_every_n_steps"),
        _NO_EFFECT,
    ),
    "data.backbone": "every value needs tokens of its own; make a sweep for each backbone",
}  # fmt: skip
"""Keys that cannot be searched, and why."""

LOSS = ("model.init_args.loss", "model.init_args.target", "model.init_args.top_p",
        "model.init_args.parcel_weight")  # fmt: skip
"""Keys that change the value of ``val/loss``."""


def check_space(sweep: Sweep, more: Sequence[str] = ()) -> Recipe:
    """Parse the recipe with the ends of every range and every choice.

    Parameters
    ----------
    sweep
        What is searched.
    more
        Arguments that win over the recipe in all trials.

    Returns
    -------
    Recipe
        The recipe as it is without search.

    Raises
    ------
    ConfigError
        A key or value that the recipe does not take, or that cannot be searched, with the file
        and the key; or several devices for one trial.
    """
    base = Recipe(sweep.arguments(more))
    _check_keys(sweep, base, more)
    _check_base(base)
    for values in assignments(sweep):
        try:
            _check_values(sweep, base, values, more)
        except ChasmError as error:
            # Which of them it is: each by itself, with what it depends on. Values that are
            # refused only beside others cost a trial, not the study.
            if len(values) > 1:
                for dimension in sweep.space:
                    if dimension.key in values:
                        needed = (*_needed(sweep, dimension.key), dimension.key)
                        alone = {key: values[key] for key in needed}
                        _check_one(sweep, base, dimension.key, alone, more)
                continue
            raise _unusable(sweep, next(iter(values)), values, error) from error
    return base


def assignments(sweep: Sweep) -> Iterator[dict[str, Value]]:
    """Give few sets of values that have every end and choice in one of them."""
    left = [(d, value) for d in sweep.space for value in d.ends]
    while left:
        values: dict[str, Value] = {}
        wanted = list(left)
        for dimension, value in wanted:
            needed = _needed(sweep, dimension.key) | {dimension.key: value}
            if all(values.get(k, v) == v for k, v in needed.items()):
                values |= needed
                left.remove((dimension, value))
        yield {d.key: values[d.key] for d in sweep.space if d.key in values}


def _needed(sweep: Sweep, key: str) -> dict[str, Value]:
    """Values of other keys under which a key is searched."""
    (dimension,) = (d for d in sweep.space if d.key == key)
    needed: dict[str, Value] = {}
    for parent, taken in dimension.when.items():
        needed |= _needed(sweep, parent) | {parent: taken[0]}
    return needed


def _check_keys(sweep: Sweep, base: Recipe, more: Sequence[str]) -> None:
    fixed = {str(key) for key in sweep.settings}
    fixed |= {a.removeprefix("--").partition("=")[0] for a in more if a.startswith("--")}
    refused: Mapping[str, str] = REFUSED
    if base.selection.monitor == "val/loss":
        refused = REFUSED | dict.fromkeys(LOSS, "it changes the value that trials are compared by")
    for dimension in sweep.space:
        where = f"{sweep.path}: space.{dimension.key}"
        for key, why in refused.items():
            if _overlap(dimension.key, key):
                raise ConfigError(where, f"cannot be searched: {why}", "Leave it out of the space.")
        for key in fixed:
            if _overlap(dimension.key, key):
                remedy = "Fix it or search it, not both."
                raise ConfigError(where, f"{key} is fixed for all trials", remedy)


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _check_base(base: Recipe) -> None:
    if base.n_processes > 1:
        raise ConfigError(
            "trainer.devices",
            f"a trial would train on {base.n_processes} devices",
            "Give each trial one device, and several workers: chasm tune --workers N.",
        )
    monitors = base.make_model().monitors
    if base.selection.monitor not in monitors:
        known = f"Use one of: {', '.join(monitors)}."
        raise ConfigError("selection.monitor", f"{base.selection.monitor!r} is not logged", known)


def _check_one(
    sweep: Sweep, base: Recipe, key: str, values: dict[str, Value], more: Sequence[str]
) -> None:
    try:
        _check_values(sweep, base, values, more)
    except ChasmError as error:
        raise _unusable(sweep, key, values, error) from error


def _check_values(
    sweep: Sweep, base: Recipe, values: dict[str, Value], more: Sequence[str]
) -> None:
    recipe = Recipe([*sweep.arguments(more), *as_arguments(values)])
    model, usual = recipe.make_model(), base.make_model()
    if (model.unit, model.needs_stage1) != (usual.unit, usual.needs_stage1):
        raise ConfigError("model", f"predicts {model.unit}s, not {usual.unit}s", _COMPARED)


def _unusable(
    sweep: Sweep, key: str, values: Mapping[str, Value], error: ChasmError
) -> ConfigError:
    return ConfigError(
        f"{sweep.path}: space.{key}",
        f"{values[key]!r} cannot be used: {error.problem}",
        "Correct the key or the range.",
    )
