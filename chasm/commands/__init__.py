"""The commands, one module per family; this table is all that start-up reads."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command: what it does, in a few words, and ``module:function`` that takes its arguments."""

    purpose: str
    target: str


COMMANDS = {
    "simulate": Command(
        "write a simulated NSD, in NSD's own layout", "chasm.commands.data:simulate"
    ),
    "prepare": Command("NSD tree, or arrays -> subject store", "chasm.commands.data:prepare"),
    "extract": Command(
        "frozen backbone over a subject's images -> token cache", "chasm.commands.data:extract"
    ),
    "fit": Command("train a recipe; validation selects", "chasm.commands.training:fit"),
    "test": Command(
        "read the test images once: predictions, table, report", "chasm.commands.training:test"
    ),
    "report": Command(
        "make table and report again from a run's predictions", "chasm.commands.training:report"
    ),
    "run": Command(
        "all of the above for one recipe, skipping what is current", "chasm.commands.training:run"
    ),
    "baselines": Command(
        "run every baseline of a folder of recipes; one table with costs and published values",
        "chasm.commands.baselines:baselines",
    ),
    "adapt": Command(
        "a model of other subjects -> a new one, tested", "chasm.commands.transfer:adapt"
    ),
    "fewshot": Command(
        "every way to a new subject over the number of its images: tables, figure, page",
        "chasm.commands.transfer:fewshot",
    ),
    "transfer-table": Command(
        "the paper's transfer table, published values beside",
        "chasm.commands.transfer:transfer_table",
    ),
    "tune": Command(
        "search the settings of a recipe: an Optuna study, on validation images",
        "chasm.commands.tune:tune",
    ),
    "predict": Command(
        "responses of a trained model to any images -> HDF5", "chasm.commands.inference:predict"
    ),
    "map": Command(
        "scores or a prediction in the subject's volume (NIfTI) or on fsaverage (GIFTI)",
        "chasm.commands.inference:draw_map",
    ),
    "export": Command(
        "run -> folder to hand on: safetensors, config, voxel table, model card",
        "chasm.commands.inference:export",
    ),
    "convert-official": Command(
        "checkpoint of the published code -> the same kind of folder",
        "chasm.commands.inference:convert_official",
    ),
}
