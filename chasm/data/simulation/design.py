"""The experiment's design: which subject sees which image on which trial."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chasm.data.simulation.config import REPEATS, SimulationConfig, Stream, random_stream

RUNS_PER_SESSION = 12
CLUSTERED_REPEATS = 0.5
"""Share of images whose repeats come close together in time instead of anywhere."""
CLUSTER_CONCENTRATION = 3.0
"""Von Mises concentration of the clustered repeats on the circle of the experiment."""


@dataclass(frozen=True)
class Design:
    """NSD's design arrays, ids 1-based as in `nsd_expdesign.mat`.

    Parameters
    ----------
    masterordering
        (trials,) 10k id of each trial; ids up to `n_shared` are shared images.
    subjectim
        (subjects, images) 73k id of each subject's 10k ids.
    sharedix
        (shared,) 73k ids of the shared images, ascending.
    stimpattern
        (sessions, runs, slots) 1 where a slot of a run holds a stimulus trial.
    basiccnt
        (3, sessions) images shown once, twice, three times within a session.
    trials_per_session
        Stimulus trials in a session.
    """

    masterordering: np.ndarray
    subjectim: np.ndarray
    sharedix: np.ndarray
    stimpattern: np.ndarray
    basiccnt: np.ndarray
    trials_per_session: int

    def subject_images(self, subject: int) -> np.ndarray:
        """Rows of the stimulus file that a subject may see, (images,) 0-based, by 10k id."""
        return self.subjectim[subject - 1] - 1

    def shared_images(self) -> np.ndarray:
        """Rows of the stimulus file that every subject sees, (shared,) 0-based."""
        return self.sharedix - 1

    def trial_positions(self, sessions: int) -> np.ndarray:
        """10k ids of the first `sessions` sessions, (trials,) 0-based."""
        return self.masterordering[: sessions * self.trials_per_session] - 1

    def session_positions(self, session: int) -> np.ndarray:
        """10k ids of one session (1-based number), (trials,) 0-based."""
        start = (session - 1) * self.trials_per_session
        return self.masterordering[start : start + self.trials_per_session] - 1

    def runs(self) -> np.ndarray:
        """Run number of each trial of a session, (trials,) 1-based."""
        counts = self.stimpattern[0].sum(axis=1, dtype=np.int64)
        return np.repeat(np.arange(1, len(counts) + 1), counts)


def make_design(config: SimulationConfig) -> Design:
    """Draw the design of a config; it is the same whichever subjects are written."""
    rng = random_stream(config.seed, Stream.DESIGN)
    order = _order_trials(config.n_images, rng)
    stimuli = rng.permutation(config.n_stimuli) + 1
    shared = np.sort(stimuli[: config.n_shared])
    own = stimuli[config.n_shared :].reshape(config.n_subjects, -1)
    repeated = np.broadcast_to(shared, (config.n_subjects, config.n_shared))
    return Design(
        masterordering=order + 1,
        subjectim=np.concatenate([repeated, own], axis=1),
        sharedix=shared,
        stimpattern=_stimulus_pattern(config, rng),
        basiccnt=_repeats_within_sessions(order.reshape(-1, config.trials_per_session)),
        trials_per_session=config.trials_per_session,
    )


def _order_trials(n_images: int, rng: np.random.Generator) -> np.ndarray:
    """Put three showings of each image in order, (trials,) 0-based 10k ids.

    Each image has a time on the circle of the experiment. Its repeats follow a von Mises
    distribution around that time or, for the other images, a uniform one; in NSD's design
    the same mixture gives short and long lags. Ranking all times gives the trials.
    """
    first = rng.uniform(0, 1, (n_images, 1))
    near = rng.vonmises(0, CLUSTER_CONCENTRATION, (n_images, REPEATS)) / (2 * np.pi)
    anywhere = rng.uniform(0, 1, (n_images, REPEATS))
    clustered = rng.random((n_images, 1)) < CLUSTERED_REPEATS
    times = np.where(clustered, (first + near) % 1, anywhere)
    order = np.argsort(times, axis=None, kind="stable") // REPEATS
    return _part_neighbours(order, rng)


def _part_neighbours(order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Swap trials until no image follows itself at once."""
    order = order.copy()
    while (twins := np.flatnonzero(order[1:] == order[:-1])).size:
        for trial in (twins + 1).tolist():
            nearby = np.arange(max(0, trial - 20), min(len(order), trial + 21))
            other = rng.choice(nearby)
            order[[trial, other]] = order[[other, trial]]
    return order


def _stimulus_pattern(config: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Lay stimulus trials into the slots of 12 runs; NSD has 63 or 62 trials in 75 slots."""
    edges = np.ceil(
        np.arange(RUNS_PER_SESSION + 1) * config.trials_per_session / RUNS_PER_SESSION
    ).astype(int)
    counts = np.diff(edges)
    slots = int(np.ceil(1.2 * config.trials_per_session / RUNS_PER_SESSION))
    slots = max(slots, int(counts.max()) + 2)
    pattern = np.zeros((max(config.sessions), RUNS_PER_SESSION, slots), np.uint8)
    for session in pattern:
        for run, count in zip(session, counts, strict=True):
            run[1 + rng.choice(slots - 2, count, replace=False)] = 1
    return pattern


def _repeats_within_sessions(order: np.ndarray) -> np.ndarray:
    """Count images shown k times within a session; `order` is (sessions, trials)."""
    counted = np.zeros((REPEATS, len(order)), np.int64)
    for column, trials in enumerate(order):
        shown = np.bincount(np.unique(trials, return_counts=True)[1], minlength=REPEATS + 1)
        counted[:, column] = shown[1:]
    return counted
