"""Where a result comes from: data, versions, revision, seed, hardware."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from chasm.data.datamodule import NSDDataModule
from chasm.data.subjects import SubjectsDataModule
from chasm.models.scan import resolve_backend
from chasm.training.recipes import Recipe

PACKAGES = (
    "chasm-fmri", "torch", "lightning", "timm", "torchmetrics", "himalaya", "plenoptic", "peft",
    "optuna",
    "nilearn", "numpy", "numba", "h5py", "mamba-ssm", "causal-conv1d",
)  # fmt: skip


def provenance(recipe: Recipe, data: NSDDataModule | SubjectsDataModule) -> dict[str, Any]:
    """Everything needed to say where a result comes from, as plain types.

    For subjects trained together, what is of a subject is under ``subjects``, by name.
    """
    if isinstance(data, SubjectsDataModule):
        parts = {name: facts_of_subject(part) for name, part in data.parts.items()}
        simulated = any(part["simulated"] for part in parts.values())
        own: dict[str, Any] = {"simulated": simulated, "subjects": parts}
    else:
        own = facts_of_subject(data)
    return {
        "command": ["chasm", *sys.argv[1:]],
        "recipe": recipe.name,
        "seed": recipe.seed,
        **own,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": recipe.n_processes,
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "scan": _scan(recipe),
        },
    }


def _scan(recipe: Recipe) -> str:
    """Name the selective scan that "auto" is where this recipe trains."""
    found = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = found is None or recipe.settings()["trainer"].get("accelerator") == "cpu"
    return resolve_backend(torch.device("cpu") if on_cpu or found is None else found)


def facts_of_subject(data: NSDDataModule) -> dict[str, Any]:
    """Say which store, tokens and images of a subject were used."""
    store, tokens, split = data.store, data.tokens, data.data_split
    return {
        "simulated": store.simulated,
        "dataset": store.dataset,
        "subject": store.subject,
        "source": store.source,
        "beta_version": store.beta_version,
        "store": {"path": str(data.store_path), "fingerprint": store.fingerprint},
        "tokens": {
            "path": str(tokens.folder), "fingerprint": tokens.fingerprint,
            "backbone": data.backbone.model, "weights": tokens.weights_label,
            "backbone_key": tokens.manifest["backbone"],
        },
        "split": {
            "name": split.name, "train": len(split.train),
            "validation": len(split.validation), "test": len(split.test),
        },
        "few_shot": None if data.few_shot is None else asdict(data.few_shot),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the revision of the checkout this package runs from, or None."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
