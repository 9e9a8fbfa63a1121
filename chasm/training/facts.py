"""What a model was trained on, as its checkpoint tells."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from chasm.data.datamodule import NSDDataModule


def facts_of(data: NSDDataModule) -> dict[str, Any]:
    """Say what a model is trained on, so that another stage cannot mix it with other data."""
    split = data.data_split
    return {
        "subject": str(data.store.subject),
        "dataset": str(data.store.dataset),
        "store": data.store.fingerprint,
        "images": data.store.image_fingerprint,
        "tokens": data.tokens.fingerprint,
        "backbone": data.tokens.manifest["backbone"],
        "parcels": asdict(data.parcels),
        "train": torch.from_numpy(split.train.astype("int64")),
        "validation": torch.from_numpy(split.validation.astype("int64")),
    }
