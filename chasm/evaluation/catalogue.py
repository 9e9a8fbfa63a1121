"""The metrics of the score table in plain language, and the published rows beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFacts:
    """What a reader needs to know about a metric.

    Attributes
    ----------
    label
        Name in tables; ``{unit}`` is replaced by voxel or parcel.
    short
        Column heading.
    meaning, null, ceiling
        Sentences: what it measures, what an image-blind prediction gets, what the best
        possible prediction gets.
    higher_is_better
        Direction.
    """

    label: str
    short: str
    meaning: str
    null: str
    ceiling: str
    higher_is_better: bool = True


_PATTERN_CEILING = (
    "Below 1, because the measured pattern is noisy: the correlation that the noise-free pattern "
    "would reach, from the agreement of repeats (Spearman-Brown)."
)
_UNIT_CEILING = "Mean over {unit}s of the square root of the noise ceiling."

METRICS: dict[str, MetricFacts] = {
    "pattern_correlation": MetricFacts(
        "Pattern correlation",
        "Pattern r",
        "For each image, the correlation between the predicted and the measured pattern across "
        "{unit}s; then the mean over images.",
        "Not 0: the mean pattern of the train images, which ignores the image, already scores "
        "whatever the row 'mean pattern' shows.",
        _PATTERN_CEILING,
    ),
    "pattern_correlation_centred": MetricFacts(
        "Pattern correlation, centred",
        "Centred pattern r",
        "The same after the mean pattern of the train images is subtracted from both, so that "
        "only what differs between images counts.",
        "0 for chance; undefined for the mean pattern itself.",
        "Below 1 for the same reason; not estimated separately.",
    ),
    "voxelwise_correlation_mean": MetricFacts(
        "{Unit}wise correlation (mean)",
        "{Unit}wise r, mean",
        "For each {unit}, the correlation between predicted and measured responses across "
        "images; then the mean over {unit}s.",
        "0. A prediction that ignores the image has no correlation across images (shown as –).",
        _UNIT_CEILING,
    ),
    "voxelwise_correlation_median": MetricFacts(
        "{Unit}wise correlation (median)",
        "{Unit}wise r, median",
        "The same, with the median over {unit}s.",
        "0.",
        "Median over {unit}s of the square root of the noise ceiling.",
    ),
    "r2": MetricFacts(
        "Explained variance R²",
        "R²",
        "For each {unit}, 1 minus the squared error over the squared distance from the train "
        "mean; then the mean over {unit}s. Unlike a correlation it punishes wrong amplitudes.",
        "0 for the train mean; a useless prediction with amplitude is negative.",
        "Mean noise ceiling over {unit}s.",
    ),
    "noise_normalised_r2": MetricFacts(
        "Noise-normalised R²",
        "Noise-norm. R²",
        "R² summed over {unit}s, divided by the summed noise ceiling: the share of the "
        "explainable variance that is explained. Never clipped.",
        "0.",
        "1 by construction; above 1 only by chance.",
    ),
    "noise_normalised_signed_r2": MetricFacts(
        "Noise-normalised signed r²",
        "Noise-norm. signed r²",
        "The same with the signed squared correlation in place of R²: blind to amplitude and "
        "offset, as in most published noise-normalised scores.",
        "0: by chance as often below as above, because the sign is kept.",
        "1 by construction.",
    ),
    "mse": MetricFacts(
        "Mean squared error",
        "MSE",
        "Mean squared difference. It means nothing without the variance of the target, which "
        "is printed beside it.",
        "About the variance of the target, for the mean pattern.",
        "The noise left in the target, for each {unit} its variance times (1 − noise ceiling); "
        "then the mean over {unit}s.",
        higher_is_better=False,
    ),
    "identification_top1": MetricFacts(
        "Identification, top 1",
        "Ident. top 1",
        "How often the image that was shown is the first guess among all test images, by "
        "pattern correlation with their predictions.",
        "1 / number of test images.",
        "1.",
    ),
    "identification_top5": MetricFacts(
        "Identification, top 5",
        "Ident. top 5",
        "The same among the first five guesses.",
        "5 / number of test images.",
        "1.",
    ),
    "identification_two_way": MetricFacts(
        "Identification, two-way",
        "Ident. 2-way",
        "How often the shown image wins against one other test image.",
        "0.5.",
        "1.",
    ),
}

MAIN_METRICS = (
    "noise_normalised_r2",
    "pattern_correlation",
    "pattern_correlation_centred",
    "voxelwise_correlation_mean",
    "voxelwise_correlation_median",
    "r2",
    "mse",
    "identification_top1",
    "identification_two_way",
)
"""Columns of the printed table; the CSV holds all metrics."""

GROUP_METRICS = ("noise_normalised_r2", "voxelwise_correlation_mean", "pattern_correlation")
"""Metrics of the tables by Early / Mid / Higher."""

ROI_METRICS = ("noise_normalised_r2", "voxelwise_correlation_mean")
"""Metrics of the tables by ROI."""


@dataclass(frozen=True)
class PublishedRow:
    """A number from a paper, with what it measures."""

    system: str
    metric: str
    data: str
    value: str


PUBLISHED: tuple[PublishedRow, ...] = (
    PublishedRow(
        "CHASMBrain",
        "pattern correlation",
        "session-z betas, mean of 3 repeats, subjects 1, 2, 5, 7 (trained: best epoch on test)",
        ".429",
    ),
    PublishedRow("CHASMBrain's DINOv2 probe", "pattern correlation", "the same", ".407"),
    PublishedRow("CHASMBrain's DINOv2 ridge", "pattern correlation", "the same", ".368"),
    PublishedRow(
        "CHASMBrain, Stage 1 (parcels)",
        "pattern correlation over parcels",
        "top-p parcel targets of the same trials",
        ".585",
    ),
    PublishedRow(
        "MindSimulator, 1 draw / 5 draws",
        "pattern correlation",
        "z-scored betas, mean of 3 repeats",
        ".346 / .355–.357",
    ),
    PublishedRow(
        "SynBrain (its linear row), S1",
        "pattern correlation",
        "betas that are not z-scored, single trials",
        ".687 (.676)",
    ),
    PublishedRow(
        "NRF / linear CLIP / fWRF",
        "voxelwise correlation, median",
        "best epoch on the evaluation images",
        ".358 / .323 / .343",
    ),
    PublishedRow(
        "GNet8j, V1–hV4",
        "voxelwise correlation, median",
        "single trials, subjects 1, 2, 5, 7",
        ".361 .339 .287 .239",
    ),
    PublishedRow(
        "Transformer brain encoder, DINOv2",
        "r² / noise ceiling",
        "fsaverage, capped, subjects 1, 2, 5, 7",
        ".60 .56 .56 .42",
    ),
    PublishedRow(
        "Algonauts 2023, first three / baseline",
        "mean of r² / noise ceiling",
        "fsaverage, hidden test set",
        ".709 .635 .616 / .405",
    ),
    PublishedRow(
        "Brain-Score AlexNet ridge, V1 V2 V4 IT",
        "ceiled score",
        "voxels with a noise ceiling above 30 %",
        ".402 .437 .348 .287",
    ),
    PublishedRow("BraInCoRL, 100 images / all images", "R²", "subjects 1, 2", ".13 .15 / .18 .19"),
)


def label_of(metric: str, unit: str, *, short: bool = False) -> str:
    """Return the name of a metric for voxels or for parcels."""
    facts = METRICS[metric]
    return fill_unit(facts.short if short else facts.label, unit)


def fill_unit(text: str, unit: str) -> str:
    """Put ``voxel`` or ``parcel`` into a sentence of the catalogue."""
    return text.replace("{unit}", unit).replace("{Unit}", unit.capitalize())
