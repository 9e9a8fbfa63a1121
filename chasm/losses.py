"""Training losses: each term a function, and their weighted sum for each stage.

Where several processes share a batch, a term is the mean over this process's images; what it
needs to know of the whole batch, it learns from the other processes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chasm.errors import ConfigError
from chasm.processes import gather, own_rows

_EPSILON = 1e-8


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over images and units.

    Parameters
    ----------
    prediction, target
        (images, units), z-scored.

    Returns
    -------
    Tensor
        Scalar.
    """
    return F.mse_loss(prediction, target)


def peak_focused_mse(
    prediction: Tensor, target: Tensor, alpha: float = 0.5, tau: float = 0.3
) -> Tensor:
    r"""Squared error that counts strong responses more (CHASMBrain's code).

    .. math::

        L = \frac{1}{n K} \sum_{ik} w_{ik} (\hat y_{ik} - y_{ik})^2,
        \qquad w_{ik} = 1 + \alpha \max(|y_{ik} - \bar y_k| - \tau, 0)

    with :math:`\bar y_k` the unit's mean over the batch. The weights are not normalised.

    Parameters
    ----------
    prediction, target
        (images, units), z-scored.
    alpha
        Extra weight per unit of distance beyond the threshold, 0 or above.
    tau
        Distance from the batch mean from which a response is a peak, 0 or above.

    Returns
    -------
    Tensor
        Scalar.
    """
    distance = (target - gather(target).mean(dim=0, keepdim=True)).abs()
    weight = 1 + alpha * (distance - tau).clamp(min=0)
    return (weight * (prediction - target).square()).mean()


def pearson_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the Pearson correlation over units, mean over images.

    The norms have a floor of 1e-8: an image with a constant prediction or target counts as
    r = 0, so that the loss stays differentiable. Metrics report such images instead.

    Parameters
    ----------
    prediction, target
        (images, units).

    Returns
    -------
    Tensor
        Scalar in [0, 2].
    """
    centred = prediction - prediction.mean(dim=-1, keepdim=True)
    reference = target - target.mean(dim=-1, keepdim=True)
    return 1 - F.cosine_similarity(centred, reference, dim=-1, eps=_EPSILON).mean()


def std_matching(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared difference of the standard deviations over units, mean over images.

    Regression to the mean shrinks predictions; this term asks for patterns of the target's
    amplitude. Standard deviations divide by the number of units and have a floor of 1e-4.

    Parameters
    ----------
    prediction, target
        (images, units).

    Returns
    -------
    Tensor
        Scalar.
    """

    def amplitude(values: Tensor) -> Tensor:
        return (values.var(dim=-1, correction=0) + _EPSILON).sqrt()

    return (amplitude(prediction) - amplitude(target)).square().mean()


def info_nce(
    visual: Tensor,
    response: Tensor,
    temperature: float = 0.15,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE between embeddings of images and of responses.

    Mean of the cross-entropies of picking the right response for each image and the right image
    for each response by cosine similarity (Oord et al. 2018; CLIP's symmetric form).

    Parameters
    ----------
    visual, response
        (trials, width), row i of both belongs to trial i; normalised here.
    temperature
        Divides the cosine similarities; above 0.
    image_ids
        (trials,), optional: other trials of the same image are then no negatives.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    ConfigError
        If `temperature` is not positive.
    """
    if temperature <= 0:
        raise ConfigError("info_nce:temperature", f"found {temperature}", "Use a positive number.")
    own = own_rows(visual)
    visual, response = gather(visual), gather(response)
    logits = F.normalize(visual, dim=-1) @ F.normalize(response, dim=-1).T / temperature
    if image_ids is not None:
        image_ids = gather(image_ids)
        same = image_ids[:, None] == image_ids[None, :]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
    right = torch.arange(len(logits), device=logits.device)[own]
    return (F.cross_entropy(logits[own], right) + F.cross_entropy(logits.T[own], right)) / 2


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of a diagonal Gaussian from the standard one.

    .. math::

        L = \frac{1}{n d} \sum_{ij}
        \tfrac{1}{2} \left(\mu_{ij}^2 + \sigma_{ij}^2 - \log \sigma_{ij}^2 - 1\right)

    Nats per latent dimension, as in CHASMBrain's code, so that its weight does not depend on
    the width of the latent; the divergence itself is `d` times this.

    Parameters
    ----------
    mean, log_variance
        (images, d).

    Returns
    -------
    Tensor
        Scalar, 0 or above.
    """
    excess = torch.expm1(log_variance) - log_variance
    return 0.5 * (mean.square() + excess).mean()


class Stage1Loss(nn.Module):
    """Weighted sum of the Stage-1 terms; a term of weight 0 is not computed.

    Parameters
    ----------
    error
        "plain" for the mean squared error, "peak" for `peak_focused_mse`.
    error_weight, pearson_weight, std_weight, contrastive_weight
        Weight of each term, 0 or above. CHASMBrain's code: 1, .3, .2, .2 with error "peak".
    peak_alpha, peak_tau
        Constants of `peak_focused_mse`.
    temperature
        Of `info_nce`.

    Raises
    ------
    ConfigError
        If `error` is unknown or a weight is negative.
    """

    def __init__(
        self,
        error: Literal["plain", "peak"] = "plain",
        error_weight: float = 1.0,
        pearson_weight: float = 0.0,
        std_weight: float = 0.0,
        contrastive_weight: float = 0.0,
        peak_alpha: float = 0.5,
        peak_tau: float = 0.3,
        temperature: float = 0.15,
    ) -> None:
        super().__init__()
        if error not in ("plain", "peak"):
            raise ConfigError("loss:error", f"found {error!r}", 'Use "plain" or "peak".')
        self.weights = {
            "error": error_weight,
            "pearson": pearson_weight,
            "std": std_weight,
            "contrastive": contrastive_weight,
        }
        _check_weights(self.weights)
        self.error = error
        self.peak_alpha = peak_alpha
        self.peak_tau = peak_tau
        self.temperature = temperature

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        visual: Tensor | None = None,
        response: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms and their weighted sum.

        Parameters
        ----------
        prediction, target
            (trials, parcels), z-scored.
        visual, response
            (trials, width), embeddings for the contrastive term; needed if it has weight.
        image_ids
            (trials,), see `info_nce`.

        Returns
        -------
        dict
            Scalars: the unweighted terms that have weight, and "total".

        Raises
        ------
        ConfigError
            If the contrastive term has weight and an embedding is missing.
        """
        terms: dict[str, Tensor] = {}
        if self.weights["error"]:
            terms["error"] = self._error(prediction, target)
        if self.weights["pearson"]:
            terms["pearson"] = pearson_loss(prediction, target)
        if self.weights["std"]:
            terms["std"] = std_matching(prediction, target)
        if self.weights["contrastive"]:
            if visual is None or response is None:
                raise ConfigError(
                    "loss:contrastive_weight",
                    "the contrastive term needs both embeddings",
                    "Give them, or set the weight to 0.",
                )
            terms["contrastive"] = info_nce(visual, response, self.temperature, image_ids)
        return {**terms, "total": _weighted_sum(terms, self.weights, prediction)}

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.error == "plain":
            return mse(prediction, target)
        return peak_focused_mse(prediction, target, self.peak_alpha, self.peak_tau)


class Stage2Loss(nn.Module):
    """Weighted sum of the Stage-2 terms; a term of weight 0 is not computed.

    Parameters
    ----------
    error_weight, pearson_weight, std_weight, kl_weight
        Weight of the mean squared error, `pearson_loss`, `std_matching` and `kl_divergence`,
        0 or above. CHASMBrain: 1, 0, 0, 1e-3 in the text; 1, .3, .2, 1e-3 in the code.

    Raises
    ------
    ConfigError
        If a weight is negative.
    """

    def __init__(
        self,
        error_weight: float = 1.0,
        pearson_weight: float = 0.0,
        std_weight: float = 0.0,
        kl_weight: float = 1e-3,
    ) -> None:
        super().__init__()
        self.weights = {
            "error": error_weight,
            "pearson": pearson_weight,
            "std": std_weight,
            "kl": kl_weight,
        }
        _check_weights(self.weights)

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        mean: Tensor | None = None,
        log_variance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms and their weighted sum.

        Parameters
        ----------
        prediction, target
            (trials, voxels), z-scored.
        mean, log_variance
            (trials, d_latent), of the latent; None for a model without one, whose "kl" term is
            absent.

        Returns
        -------
        dict
            Scalars: the unweighted terms that have weight, and "total".
        """
        terms: dict[str, Tensor] = {}
        if self.weights["error"]:
            terms["error"] = mse(prediction, target)
        if self.weights["pearson"]:
            terms["pearson"] = pearson_loss(prediction, target)
        if self.weights["std"]:
            terms["std"] = std_matching(prediction, target)
        if self.weights["kl"] and mean is not None and log_variance is not None:
            terms["kl"] = kl_divergence(mean, log_variance)
        return {**terms, "total": _weighted_sum(terms, self.weights, prediction)}


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if weight < 0:
            raise ConfigError(f"loss:{name}_weight", f"found {weight}", "Use 0 or above.")


def _weighted_sum(
    terms: dict[str, Tensor], weights: dict[str, float], prediction: Tensor
) -> Tensor:
    total = prediction.new_zeros(())
    for name, term in terms.items():
        total = total + weights[name] * term
    return total
