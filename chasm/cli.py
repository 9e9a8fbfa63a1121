"""The `chasm` command. Start-up is light: every command imports what it needs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from chasm.commands import COMMANDS
from chasm.errors import ChasmError
from chasm.memory import keep_freed_memory

HELP = """usage: chasm COMMAND [options]     (chasm COMMAND --help tells a command's options)

{commands}

examples
  chasm run -c experiments/stage1.yaml --data.subject 1 --simulate
  chasm run -c experiments/nsd/stage1.yaml --data.subject 1 --nsd /path/to/nsd
  chasm fit -c experiments/stage1.yaml --data.subject 1 --model.init_args.learning_rate 1e-4
  chasm predict --model runs/simulated/subj01/stage1-0123abcd --images photos --out pred.h5

Bad input ends in one line on standard error and exit status 2; `chasm predict` ends with 3 when
some images were refused and the predictions of the others were written.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends in one line on standard error and exit status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {c.purpose}" for name, c in COMMANDS.items())
        sys.stdout.write(HELP.format(commands=lines))
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(version("chasm-fmri") + "\n")
        return 0
    if args[0] not in COMMANDS:
        return _fail(f"chasm: no command {args[0]!r}. Commands: {', '.join(COMMANDS)}.")
    keep_freed_memory()
    set_up_logging()
    module, _, function = COMMANDS[args[0]].target.partition(":")
    try:
        getattr(import_module(module), function)(args[1:])
    except ChasmError as error:
        return _fail(str(error), error.exit_status)
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, status: int = 2) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status


def set_up_logging() -> None:
    """Show what the package says on standard error, and nothing that others say."""
    import warnings

    from rich.logging import RichHandler

    from chasm.progress import console, quiet_lightning

    handler = RichHandler(
        console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("chasm")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    quiet_lightning()
    # Lightning's advice on worker counts and logging intervals does not fit memory maps.
    warnings.filterwarnings("ignore", module=r"lightning\..*")


if __name__ == "__main__":
    sys.exit(main())
