"""nolora-vision predict | summary | export: argv → exit code, each error of the user's as one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from nolora_vision.training.progress import print_anything

INTERRUPTED, BROKEN_PIPE = 130, 141
"""128 + the signal's number, as shells have it."""
DESCRIPTION = """Use adapters that nolora_vision has trained.

On an error of a file or an option there is one message; with --traceback, the whole traceback. --version: which this
is. Training is `python train.py`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: its exit code; 2 after one message about what the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        from nolora_vision import __version__

        print(f"nolora-vision {__version__}")
        return 0
    print_anything()
    show_traceback = "--traceback" in args
    try:
        code = run([arg for arg in args if arg != "--traceback"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("nolora-vision: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads our output has had enough, as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return BROKEN_PIPE
    except Exception as error:
        if show_traceback or not isinstance(error, user_errors()):
            raise
        print(f"nolora-vision: {error}", file=sys.stderr)
        return 2


def run(args: Sequence[str]) -> int:
    """Parse and do what is asked; what a command returns, if it is a number, is the exit code.

    Raises:
        SystemExit: 0 after --help, 2 for a command line that cannot be read.
    """
    result: Any = tyro.extras.subcommand_cli_from_dict(
        commands(), prog="nolora-vision", description=DESCRIPTION, args=args or ["--help"]
    )
    return result if isinstance(result, int) else 0


def commands() -> dict[str, Callable[..., Any]]:
    """The commands by name."""
    from nolora_vision.commands.export import export_command
    from nolora_vision.commands.look import summary_command
    from nolora_vision.commands.predict import predict_command

    return {"predict": predict_command, "summary": summary_command, "export": export_command}


def user_errors() -> tuple[type[Exception], ...]:
    """What a user can mend, said in one message."""
    from nolora_vision import CheckpointError, ConfigError, InjectionError
    from nolora_vision.adapters.export import ExportError
    from nolora_vision.training.errors import RunError

    return CheckpointError, ConfigError, InjectionError, ExportError, RunError
