"""What a simulated NSD consists of: sizes, design, planted truth, seed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from chasm.errors import ConfigError

VOXEL_SIZE_MM = 1.8
"""Edge of a voxel of NSD's func1pt8mm space."""
FIELD_OF_VIEW_DEG = 8.4
"""Width of an NSD image in degrees of visual angle."""
BETA_SCALE = 300
"""Stored int16 value of one percent signal change."""
REPEATS = 3
"""How often the design shows each image to a subject who finishes it."""
BETA_FORMATS = ("hdf5", "nii.gz")


class Stream(IntEnum):
    """Names of the independent random streams; the order of writing cannot matter."""

    LATENTS = 1
    PIXELS = 2
    DESIGN = 3
    CORTEX = 4
    TUNING = 5
    NOISE = 6
    SCALING = 7
    BEHAVIOUR = 8


def random_stream(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Return the generator of one stream, e.g. ``(seed, NOISE, subject, session)``."""
    return np.random.default_rng([seed, int(stream), *keys])


@dataclass(frozen=True)
class SimulationConfig:
    """Everything that decides the bytes of a simulated NSD.

    The defaults are the demo: one subject is written in under a minute on two cores.
    See `full` for NSD's own size and `toy` for tests.

    Parameters
    ----------
    seed
        Seed of every random stream.
    image_size
        Width and height of the stimuli in pixels (NSD: 425).
    sessions
        Number of sessions of each subject of the design, subject 1 first.
    trials_per_session
        Stimulus trials in a session (NSD: 750).
    n_shared
        Images that every subject sees (NSD: 1000).
    grids
        Shape (X, Y, Z) of each subject's 1.8 mm volume, for as many subjects or more.
    cortex_thickness_mm
        Depth of the cortical shell.
    local_share
        Planted share w of signal variance driven by local energy, for the early, mid and
        higher stream groups.
    local_share_jitter
        Standard deviation of w over the voxels of a group; w is clipped to [0, 1].
    interaction
        Share of signal variance carried by the local × global product.
    category_position
        Probability that an object stands where its category prefers to stand.
    noise_length_mm
        Length constant of the exponential spatial correlation of the noise.
    noise_global_share
        Share of noise variance common to all voxels of a trial.
    session_gain_sd, session_offset_sd
        Standard deviation over sessions of a voxel's log gain, and of its offset in
        percent signal change.
    betas_format
        ``"hdf5"`` or ``"nii.gz"``.
    beta_version
        Name of the betas folder.
    allocate_all_chunks
        Store the zeros outside the brain too, as NSD's files do.

    Raises
    ------
    ConfigError
        When a value cannot be used.
    """

    seed: int = 0
    image_size: int = 128
    sessions: tuple[int, ...] = (12, 12, 11, 10, 12, 11, 12, 10)
    trials_per_session: int = 300
    n_shared: int = 360
    grids: tuple[tuple[int, int, int], ...] = (
        (29, 34, 27),
        (29, 35, 28),
        (29, 35, 27),
        (30, 32, 26),
        (28, 32, 25),
        (30, 37, 27),
        (28, 31, 26),
        (29, 34, 25),
    )
    cortex_thickness_mm: float = 2.5
    local_share: tuple[float, float, float] = (0.9, 0.5, 0.2)
    local_share_jitter: float = 0.05
    interaction: float = 0.0
    category_position: float = 0.3
    noise_length_mm: float = 4.0
    noise_global_share: float = 0.1
    session_gain_sd: float = 0.15
    session_offset_sd: float = 0.3
    betas_format: str = "hdf5"
    beta_version: str = "betas_fithrf_GLMdenoise_RR"
    allocate_all_chunks: bool = False

    def __post_init__(self) -> None:
        checks = {
            "image_size": (self.image_size >= 32, "at least 32 pixels"),
            "sessions": (
                len(self.sessions) > 0 and min(self.sessions) > 0,
                "at least one session for each subject",
            ),
            "trials_per_session": (
                self.trials_per_session >= 12
                and max(self.sessions, default=0) * self.trials_per_session % REPEATS == 0,
                "at least 12, and a multiple of 3 trials in the longest subject's sessions",
            ),
            "n_shared": (
                0 < self.n_shared < self.n_images,
                f"between 1 and {self.n_images - 1}, so that each subject has own images",
            ),
            "grids": (
                len(self.grids) >= len(self.sessions)
                and all(len(grid) == 3 and min(grid) >= 10 for grid in self.grids),
                f"at least {len(self.sessions)} shapes (X, Y, Z), each side 10 voxels or more",
            ),
            "cortex_thickness_mm": (self.cortex_thickness_mm > 0, "a positive depth"),
            "local_share": (
                len(self.local_share) == 3 and all(0 <= w <= 1 for w in self.local_share),
                "three shares in [0, 1]: early, mid, higher",
            ),
            "local_share_jitter": (self.local_share_jitter >= 0, "zero or more"),
            "interaction": (0 <= self.interaction < 1, "a share in [0, 1)"),
            "category_position": (0 <= self.category_position <= 1, "a probability"),
            "noise_length_mm": (self.noise_length_mm > 0, "a positive length"),
            "noise_global_share": (0 <= self.noise_global_share < 1, "a share in [0, 1)"),
            "betas_format": (self.betas_format in BETA_FORMATS, f"one of {BETA_FORMATS}"),
        }
        for field, (good, expected) in checks.items():
            if not good:
                raise ConfigError(
                    f"SimulationConfig:{field}",
                    f"found {getattr(self, field)!r}",
                    f"Give {expected}.",
                )

    @classmethod
    def full(cls, **changes: Any) -> SimulationConfig:
        """NSD's own size: 425 px, 40/32/30 sessions of 750 trials, NSD's volumes.

        A subject takes 42 GB of betas at 40 sessions, as in NSD.
        """
        sizes: dict[str, Any] = {
            "image_size": 425,
            "sessions": (40, 40, 32, 30, 40, 32, 40, 30),
            "trials_per_session": 750,
            "n_shared": 1000,
            "grids": (
                (81, 104, 83),
                (82, 106, 84),
                (81, 106, 82),
                (85, 99, 80),
                (79, 97, 78),
                (85, 113, 83),
                (78, 95, 81),
                (80, 103, 78),
            ),
            "cortex_thickness_mm": 1.6,
            "allocate_all_chunks": True,
        }
        return cls(**(sizes | changes))

    @classmethod
    def toy(cls, **changes: Any) -> SimulationConfig:
        """Smallest tree on which every step still runs: three subjects, 80 images each."""
        sizes: dict[str, Any] = {
            "image_size": 48,
            "sessions": (4, 4, 3),
            "trials_per_session": 60,
            "n_shared": 32,
            "grids": ((14, 16, 12), (14, 17, 12), (14, 16, 13)),
            "cortex_thickness_mm": 1.5,
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SimulationConfig:
        """Rebuild a config from `to_dict` (lists become tuples)."""
        tuples: dict[str, Any] = {
            key: tuple(tuple(v) if isinstance(v, list) else v for v in value)
            if isinstance(value, list)
            else value
            for key, value in values.items()
        }
        return cls(**tuples)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive a round trip through JSON."""
        values = dataclasses.asdict(self)
        values["sessions"] = list(self.sessions)
        values["grids"] = [list(grid) for grid in self.grids]
        values["local_share"] = list(self.local_share)
        return values

    @property
    def n_subjects(self) -> int:
        """Subjects of the design."""
        return len(self.sessions)

    @property
    def subjects(self) -> range:
        """Subject numbers, 1-based as in NSD's file names."""
        return range(1, self.n_subjects + 1)

    @property
    def n_trials(self) -> int:
        """Trials of a subject who finishes the design (NSD: 30000)."""
        return max(self.sessions, default=0) * self.trials_per_session

    @property
    def n_images(self) -> int:
        """Images of one subject: NSD's "10k" ids."""
        return self.n_trials // REPEATS

    @property
    def n_stimuli(self) -> int:
        """Images of all subjects: NSD's "73k" ids and rows of the stimulus file."""
        return self.n_shared + self.n_subjects * (self.n_images - self.n_shared)

    @property
    def special_sessions(self) -> int:
        """Sessions that every subject finished (NSD: 30)."""
        return min(self.sessions)
