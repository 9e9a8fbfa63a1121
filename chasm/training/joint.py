"""Several subjects at once: one backbone, a head for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from chasm.data.batches import Batch
from chasm.data.subjects import SubjectsDataModule
from chasm.io import atomic_path, write_json, write_text
from chasm.models.adapters import share_backbone
from chasm.models.encoder import ParcelEncoder
from chasm.processes import n_processes, weigh
from chasm.training.checkpoints import load_module, read_checkpoint
from chasm.training.compilation import compile_networks
from chasm.training.facts import facts_of
from chasm.training.modules import Stage1Module
from chasm.training.optimisation import make_optimizer
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, read_provenance


class JointModule(L.LightningModule):
    """Stage 1 models of several subjects that share all but their heads.

    The loss is the mean over subjects; so are the validation values, beside which
    ``val/<subject>/...`` has each subject's own.

    Parameters
    ----------
    subjects
        A model for every subject, by its name, all of one recipe; not built.
    """

    def __init__(self, subjects: Mapping[str, Stage1Module]) -> None:
        super().__init__()
        self.names = tuple(subjects)
        self.models = nn.ModuleList(subjects.values())
        self._losses = nn.ModuleList(MeanMetric() for _ in subjects)

    @property
    def subjects(self) -> dict[str, Stage1Module]:
        """Every subject's model, complete by itself."""
        found = {}
        for name, model in zip(self.names, self.models, strict=True):
            assert isinstance(model, Stage1Module)
            found[name] = model
        return found

    @property
    def n_trained(self) -> int:
        """Parameters that are trained or solved, those that subjects share once."""
        every = [p for model in self.subjects.values() for p in model.trained_parameters()]
        return sum(parameter.numel() for parameter in {id(p): p for p in every}.values())

    def configure_model(self) -> None:
        """Build every subject's model from the data module, unless a checkpoint did."""
        if self._built or self._trainer is None:
            return
        data = self._data
        statistics = data.token_statistics()
        facts = {name: facts_of(part) for name, part in data.parts.items()}
        for name, model in self.subjects.items():
            part = data.parts[name]
            model.build(part.sizes, part.parcellation)
            if model.token_scaling == "standard":
                model.scale_tokens(statistics)
            others = [facts[other] for other in self.names if other != name]
            model.trained_on = facts[name] | {"trained_with": others}
        self._share()

    @property
    def _built(self) -> bool:
        return all(model.built for model in self.subjects.values())

    @property
    def _data(self) -> SubjectsDataModule:
        data: SubjectsDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _share(self) -> None:
        encoders = []
        for model in self.subjects.values():
            assert isinstance(model.encoder, ParcelEncoder)
            encoders.append(model.encoder)
        share_backbone(encoders)

    def on_fit_start(self) -> None:
        """Solve every subject's closed form, where the recipe has one; compile if it says so."""
        for name, model in self.subjects.items():
            model.solve_closed_form(self._data.parts[name])
            if model.compiled:
                compile_networks(model.trained_networks(), self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what every subject's own checkpoint needs."""
        checkpoint["subjects"] = {}
        for name, model in self.subjects.items():
            own: dict[str, Any] = {"hyper_parameters": dict(model.hparams)}
            model.on_save_checkpoint(own)
            checkpoint["subjects"][name] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build every subject's model before the weights are loaded."""
        for name, model in self.subjects.items():
            model.on_load_checkpoint(checkpoint["subjects"][name])
        self._share()

    # Steps.

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> Tensor:
        """Give the mean of the subjects' losses, each on a batch of its own."""
        losses = []
        for name, model in self.subjects.items():
            n_images = len(batch[name]["betas"])
            loss = model.terms(batch[name])[1]["total"]
            self._log_mean("train/loss", loss, n_images)
            losses.append(weigh(loss, n_images))
        return torch.stack(losses).mean()

    def _log_mean(self, name: str, value: Tensor, n_images: int) -> None:
        self.log(
            name, value.detach(), on_step=False, on_epoch=True, sync_dist=True,
            batch_size=n_images * n_processes(),
        )  # fmt: skip

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a subject's batch into its validation scores."""
        model = self.subjects[self.names[dataloader_idx]]
        output, terms = model.terms(batch)
        self._losses[dataloader_idx].update(terms["total"], len(batch["betas"]))  # type: ignore
        model.watch(output.parcels, batch)

    def on_validation_epoch_end(self) -> None:
        """Log every subject's scores, and their mean over subjects."""
        found: dict[str, list[Tensor]] = {}
        for (name, model), loss in zip(self.subjects.items(), self._losses, strict=True):
            assert isinstance(loss, MeanMetric)
            scores = {"val/loss": loss.compute(), **model.validation_scores()}
            loss.reset()
            for key, value in scores.items():
                found.setdefault(key, []).append(value)
                self.log(f"val/{name}/{key.removeprefix('val/')}", value)
        self.log_dict({k: torch.stack(v).mean() for k, v in found.items()}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a per-step schedule; what subjects share is in it once."""
        one = next(iter(self.subjects.values()))
        return make_optimizer(
            self.named_parameters(),
            one.rate_factors,
            int(self.trainer.estimated_stepping_batches),
            one.learning_rate,
            one.weight_decay,
            one.warmup,
            one.schedule,
            str(self.trainer.precision),
        )


def subject_runs(run: Path) -> list[Path]:
    """Give the runs of the single subjects in the finished run of several; none elsewhere.

    They are in the order of the subjects in the recipe.
    """
    if not is_finished(run):
        return []
    return [run / name for name in read_provenance(run).get("subjects", ())]


def write_subject_runs(
    run: Path, recipe: Recipe, data: SubjectsDataModule, facts: Mapping[str, Any]
) -> None:
    """Write an ordinary run of every subject into the finished run of all.

    It has the selected weights, and what every command that takes a run reads.

    Parameters
    ----------
    run
        Folder of the run of all.
    recipe, data
        What it was trained by and on.
    facts
        Its provenance; what is of a subject is under ``subjects``, by name.
    """
    saved = read_checkpoint(run / "checkpoints" / "best.ckpt")
    metrics = pd.read_csv(run / "metrics.csv")
    common = {key: value for key, value in facts.items() if key != "subjects"}
    for number, name in enumerate(data.parts):
        folder = run / name
        start = f"models.{number}."
        own: dict[str, Any] = saved["subjects"][name]
        own["state_dict"] = {
            key.removeprefix(start): value
            for key, value in saved["state_dict"].items()
            if key.startswith(start)
        }
        for key in ("epoch", "global_step", "pytorch-lightning_version"):
            own[key] = saved[key]
        checkpoint = folder / "checkpoints" / "best.ckpt"
        with atomic_path(checkpoint) as temporary:
            torch.save(own, temporary)
        with atomic_path(folder / "metrics.csv") as temporary:
            _metrics_of(name, data.parts, metrics).to_csv(temporary, index=False)
        write_text(folder / "config.yaml", recipe.for_subject(name).resolved())
        parameters = list(load_module(checkpoint).parameters())
        trained = {
            **facts["trained"],
            "together_with": [other for other in data.parts if other != name],
            "n_parameters": sum(p.numel() for p in parameters),
            "n_trained": sum(p.numel() for p in parameters if p.requires_grad),
        }
        told = {**common, **facts["subjects"][name], "trained": trained, "status": "finished"}
        write_json(folder / "provenance.json", told)


def _metrics_of(name: str, subjects: Iterable[str], metrics: pd.DataFrame) -> pd.DataFrame:
    """Columns of one subject, and those that are nobody's own."""
    others = tuple(f"val/{other}/" for other in subjects)
    own = f"val/{name}/"
    mine = [column.removeprefix(own) for column in metrics.columns if column.startswith(own)]
    kept = [
        column
        for column in metrics.columns
        if not column.startswith(others) and column.removeprefix("val/") not in mine
    ]
    renamed = metrics[[own + column for column in mine]]
    return pd.concat(
        [metrics[kept], renamed.rename(columns=lambda c: f"val/{c[len(own) :]}")], axis=1
    )
