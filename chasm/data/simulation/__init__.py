"""A simulated Natural Scenes Dataset, in NSD's own file layout, whose truth is known.

The generator exists to test and calibrate everything downstream of NSD's files. It is not
a model of the brain: accuracy on it is never a result about NSD.

Its parts follow known practice: oriented contrast energy through receptive fields with a
compressive exponent (Kay et al. 2008, Nature 452:352; Kay et al. 2013, J Neurophysiol
110:481), ground truth for receptive field software (Lerma-Usabiaga et al. 2020, PLoS Comput
Biol 16:e1007924), simulation as a check of model comparison (Han, Poggio & Cheung 2023,
ICML; Schütt et al. 2023, eLife 12:e82566).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chasm.data.simulation.config import SimulationConfig

if TYPE_CHECKING:
    from chasm.data.simulation.generate import simulate
    from chasm.data.simulation.truth import Truth, load_truth

__all__ = ["SimulationConfig", "Truth", "load_truth", "simulate"]


def __getattr__(name: str) -> Any:
    # The config alone must import fast: the command line reads its fields for its help.
    if name == "simulate":
        from chasm.data.simulation import generate

        return generate.simulate
    if name in ("Truth", "load_truth"):
        from chasm.data.simulation import truth

        return getattr(truth, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
