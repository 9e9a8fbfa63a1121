"""Commands that several processes run at once: who writes, who speaks, who goes on alone.

Lightning starts the processes of a node by running the command again (``LOCAL_RANK`` tells them
apart), SLURM and torchrun by running it several times; either way each goes through the whole
command, and they meet where training begins.
"""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only

from chasm.errors import ConfigError
from chasm.processes import part_ways, will_be_first
from chasm.training.recipes import Recipe


def is_main_process(recipe: Recipe) -> bool:
    """Whether this is the process that writes: the only one, or the first of several."""
    return recipe.n_processes == 1 or will_be_first()


def speak_once(recipe: Recipe) -> None:
    """Let the first of several processes say what all do; the others only warn.

    A process that trains alone is the first whatever number a scheduler gave it: several of them
    may be the tasks of one job.
    """
    if recipe.n_processes == 1:
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    if not is_main_process(recipe):
        logging.getLogger("chasm").setLevel(logging.WARNING)


def leave_to_first(recipe: Recipe) -> None:
    """End every process but the first one: what comes after training is done once.

    Raises
    ------
    SystemExit
        In the other processes, with status 0.
    """
    others = not is_main_process(recipe)
    part_ways()
    if others:
        raise SystemExit(0)


def refuse_several(recipe: Recipe, what: str) -> None:
    """Refuse a recipe for several processes in a command that trains more than one recipe.

    Raises
    ------
    ConfigError
        The recipe asks for them.
    """
    if recipe.n_processes > 1:
        raise ConfigError(
            "trainer.devices",
            f"{what} uses one device, {recipe.n_processes} processes are asked for",
            "Leave trainer.devices and trainer.num_nodes out, or train by `chasm fit`.",
        )
