"""What every script shares: an error of ours is one line for the user, and a non-zero exit."""

from __future__ import annotations

import sys
from collections.abc import Callable

from transformers.utils.logging import disable_progress_bar

# What a user can mend. Anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError)


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; print an error that the user can mend as one line and exit with 1."""
    # One short file of weights needs no bar of its own beside those of the run.
    disable_progress_bar()
    try:
        main()
    except USER_ERRORS as error:
        if not _is_ours(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _is_ours(error: BaseException) -> bool:
    """Messages of the house start with `Expected`; those of the operating system name a path."""
    return str(error).startswith("Expected") or isinstance(error, OSError)
