"""RunError: what a user can mend, said in one message without a traceback."""


class RunError(Exception):
    """A run that cannot start or go on, with what was wrong, what was got, and what to do."""


def hub_advice(what: str, error: BaseException, *, instead: str) -> RunError:
    """The one message for something that could not be had from the Hub."""
    reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return RunError(
        f"{what} could not be loaded from the Hugging Face Hub ({reason}).\n"
        f"Without internet: set HF_ENDPOINT to a mirror, or copy the cache (HF_HOME) of a machine that has it here and "
        f"set HF_HUB_OFFLINE=1. {instead}"
    )
