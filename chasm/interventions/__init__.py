"""Interventions on frozen models: what a named tensor is replaced by, from outside the model."""

from chasm.interventions.fitting import (
    collect,
    evaluating,
    fit_optimal,
    fit_patches_from_cls,
)
from chasm.interventions.hooks import intervene, record
from chasm.interventions.operations import derangements
from chasm.interventions.reference import LinearMap, Reference
from chasm.interventions.specification import INPUTS, OPERATIONS, Intervention, on_stream

__all__ = [
    "INPUTS",
    "OPERATIONS",
    "Intervention",
    "LinearMap",
    "Reference",
    "collect",
    "derangements",
    "evaluating",
    "fit_optimal",
    "fit_patches_from_cls",
    "intervene",
    "on_stream",
    "record",
]
