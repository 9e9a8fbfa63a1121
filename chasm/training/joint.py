"""Several subjects at once: one backbone, a head for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from chasm.data.subjects import SubjectsDataModule
from chasm.training.modules import Stage1Module
from chasm.training.recipes import Recipe


class JointModule(L.LightningModule):
    """Stage 1 models of several subjects that share all but their heads."""

    def __init__(self, subjects: Mapping[str, Stage1Module]) -> None:
        super().__init__()
        raise NotImplementedError


def subject_runs(run: Path) -> list[Path]:
    """Give the runs of the single subjects in the run of several; none in any other folder."""
    return []


def write_subject_runs(
    run: Path, recipe: Recipe, data: SubjectsDataModule, facts: Mapping[str, Any]
) -> None:
    """Write an ordinary run of every subject into the finished run of all."""
    raise NotImplementedError
