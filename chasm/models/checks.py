"""Checks of the options that recipes give to models."""

from __future__ import annotations

from chasm.errors import ConfigError


def check_sizes(**sizes: int) -> None:
    """Raise a ConfigError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model:{name}", f"found {size}", "Use a size of 1 or above.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the option and its choices if `value` is none of them."""
    if value not in choices:
        listed = ", ".join(choices)
        raise ConfigError(f"model:{name}", f"found {value!r}", f"Use one of: {listed}.")
