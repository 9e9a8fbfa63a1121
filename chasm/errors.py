"""Errors that a user can act on: what is wrong, where, and what to do."""


class ChasmError(Exception):
    """Bad input, said in one line.

    Parameters
    ----------
    where
        The file, and after a colon the field inside it, e.g. ``subj01.h5:/betas``.
    problem
        What is wrong there, with the value found and the value expected.
    remedy
        What the user can do about it.
    """

    exit_status = 2
    """What the command line returns."""

    def __init__(self, where: object, problem: str, remedy: str) -> None:
        self.where = str(where)
        self.problem = problem.strip().rstrip(".")
        self.remedy = remedy.strip()
        super().__init__(f"{self.where}: {self.problem}. {self.remedy}")


class DataError(ChasmError):
    """A data file is missing, damaged, or not what its format says."""


class StoreError(DataError):
    """A subject store cannot be used."""


class CacheError(DataError):
    """A token cache cannot be used."""


class ConfigError(ChasmError):
    """A recipe, an option or an argument has a value that cannot be used."""


class TrainingError(ChasmError):
    """Training diverged, or was stopped from outside before its end."""
