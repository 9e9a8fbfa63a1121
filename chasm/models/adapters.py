"""What a new subject takes from models of others: a shared backbone, heads of its own, LoRA."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from chasm.models.encoder import ParcelEncoder, Stage1Output
from chasm.models.linear_path import RidgeHead

HEAD_SPACES = ("global", "local", "responses")
"""Feature spaces that trained models offer to another subject."""

_READ_BY_WEIGHT = ("x_proj", "dt_proj", "out_proj")
"""Linear layers whose weights a fused kernel reads past their `forward`: never wrapped."""
NOT_IN_PREDICTION = "contrastive"
"""Part of an encoder that only a contrastive loss uses."""


def belongs(name: str, parts: Collection[str]) -> bool:
    """Whether a parameter or submodule of this name is, or is inside, one of some parts."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def share_backbone(encoders: Sequence[ParcelEncoder]) -> None:
    """Let encoders of one architecture have the first one's modules, all but their heads."""
    first, *others = encoders
    for other in others:
        _share(first, other, first.head_names)


def _share(source: nn.Module, target: nn.Module, heads: Collection[str], above: str = "") -> None:
    own: list[tuple[str, Tensor | None]] = [*source._parameters.items(), *source._buffers.items()]
    for name, value in own:
        if not belongs(above + name, heads):
            setattr(target, name, value)
    for name, part in source.named_children():
        if belongs(above + name, heads):
            continue
        if any(head.startswith(f"{above}{name}.") for head in heads):
            _share(part, target.get_submodule(name), heads, f"{above}{name}.")
        else:
            setattr(target, name, part)


def backbone_state(encoder: ParcelEncoder) -> dict[str, Tensor]:
    """Give the state of all but the heads."""
    state = encoder.state_dict()
    return {name: value for name, value in state.items() if not belongs(name, encoder.head_names)}


def copy_backbone(source: ParcelEncoder, target: ParcelEncoder) -> None:
    """Copy the state of all but the heads into an encoder of the same architecture."""
    target.load_state_dict(target.state_dict() | backbone_state(source))


def freeze(encoder: nn.Module, trained: Collection[str]) -> None:
    """Train nothing of an encoder but the parts named."""
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(belongs(name, trained))


def lora_targets(encoder: ParcelEncoder) -> list[str]:
    """Names of the backbone's linear layers that every way through the model calls."""
    return [
        name
        for name, layer in encoder.named_modules()
        if type(layer) is nn.Linear
        and not belongs(name, (*encoder.head_names, NOT_IN_PREDICTION))
        and name.rsplit(".", 1)[-1] not in _READ_BY_WEIGHT
    ]


def add_lora(encoder: ParcelEncoder, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze an encoder and put trained low-rank matrices beside its linear layers (peft).

    A layer's output becomes ``W x + alpha / rank * B A x``, with B = 0 at first (Hu et al. 2021,
    "LoRA: Low-Rank Adaptation of Large Language Models").

    Parameters
    ----------
    encoder
        Changed in place; its heads are frozen, too.
    rank, alpha
        Rank and scale of the product B A.
    dropout
        Of the input of A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=lora_targets(encoder),
        bias="none",
    )
    inject_adapter_in_model(config, encoder)
    for layer in encoder.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            # In eval mode torch's fast path would read the wrapped layers' weights; this says
            # that it does not know the activation, so that it calls them.
            layer.activation_relu_or_gelu = 0


def merge_lora(encoder: nn.Module) -> None:
    """Add every B A to its W and take the wrapping off; predictions stay the same."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [n for n, layer in encoder.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name in wrapped:
        layer = encoder.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer)
        layer.merge()
        encoder.set_submodule(name, layer.get_base_layer())


class SourceFeatures(nn.Module):
    """Frozen models of other subjects, as features of images; always in eval mode.

    Parameters
    ----------
    encoders
        Of one backbone, which they share from now on.
    """

    def __init__(self, encoders: Sequence[ParcelEncoder]) -> None:
        super().__init__()
        share_backbone(encoders)
        self.encoders = nn.ModuleList(encoders)
        self.requires_grad_(False)
        self.eval()

    @property
    def first(self) -> ParcelEncoder:
        """The model whose backbone is every model's."""
        encoder = self.encoders[0]
        assert isinstance(encoder, ParcelEncoder)
        return encoder

    def train(self, mode: bool = True) -> SourceFeatures:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Give `from_streams` of tokens, see `ParcelEncoder.forward`."""
        return self.from_streams(self.first.streams(cls, patches))

    def from_streams(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give (images, features) of every space from what `ParcelEncoder.streams` gave.

        Returns
        -------
        dict
            ``global`` and ``local``, see `ParcelEncoder.features_of`; ``responses``, what the
            models predict, one subject after the other.
        """
        backbone = self.first.backbone(streams)
        predicted = [encoder.read_out(backbone).parcels for encoder in self._encoders()]
        return {**self.first.features_of(backbone), "responses": torch.cat(predicted, 1)}

    def _encoders(self) -> Iterator[ParcelEncoder]:
        for encoder in self.encoders:
            assert isinstance(encoder, ParcelEncoder)
            yield encoder


class RidgeEncoder(ParcelEncoder):
    """A closed-form head on the features of frozen models of other subjects.

    Parameters
    ----------
    encoders
        The models, of one backbone.
    cls_width, n_cls, patch_width, n_patches, n_parcels
        Sizes of the new subject's data, see `ParcelEncoder`.
    rank
        See `chasm.models.linear_path.RidgeHead`.
    """

    title = "ridge head"

    def __init__(
        self,
        encoders: Sequence[ParcelEncoder],
        cls_width: int,
        n_cls: int,
        patch_width: int,
        n_patches: int,
        n_parcels: int,
        rank: int | None = None,
    ) -> None:
        super().__init__(cls_width, n_cls, patch_width, n_patches, n_parcels, 0.0)
        self.source = SourceFeatures(encoders)
        self.cls_scaler = self.source.first.cls_scaler
        self.patch_scaler = self.source.first.patch_scaler
        with torch.no_grad():
            found = self.source(
                torch.zeros(1, n_cls, cls_width), torch.zeros(1, n_patches, patch_width)
            )
        widths = {space: found[space].shape[1] for space in HEAD_SPACES}
        self.head = RidgeHead(widths, n_parcels, rank)
        self.head_names = ("head",)
        self.separable = self.source.first.separable

    def streams(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Give the frozen models' streams."""
        return self.source.first.streams(cls, patches)

    def from_streams(self, streams: Mapping[str, Tensor]) -> Stage1Output:
        """Predict a batch from them."""
        return Stage1Output(self.head.from_features(self.source.from_streams(streams)))
