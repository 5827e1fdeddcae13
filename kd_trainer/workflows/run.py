"""What every script shares: an error of ours is one line for the user, and a non-zero exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from transformers.utils.logging import disable_progress_bar

from kd_trainer.own_errors import is_own, own_message_of_worker
from kd_trainer.safe_files import plain

# What a user can mend. Anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError)


GO_ON = "Go on with the same command and --resume."


def run_script(main: Callable[[], None], *, go_on: str = GO_ON) -> None:
    """Call `main`; print an error that the user can mend as one line and exit with 1.

    A training that was told to stop, and has saved itself, ends with 128 and the signal's number,
    and with the line `go_on`.
    """
    # One short file of weights needs no bar of its own beside those of the run.
    disable_progress_bar()
    try:
        main()
    except USER_ERRORS as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as stop:
        # Not above: it imports the Trainer, and `--help` should answer at once.
        from kd_trainer.resuming import Stopped

        if not isinstance(stop, Stopped):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{plain(stop)} {go_on}", file=sys.stderr)
        sys.exit(stop.code)


def user_message(error: BaseException) -> str | None:
    """The message on one printable line, or None if the error is no fault of the user's.

    Messages of the operating system name a path. An error from a process that reads data arrives as
    the text of its traceback, whose end it is.
    """
    text = str(error)
    message = own_message_of_worker(text) if "DataLoader worker" in text else None
    if message is None and (is_own(error) or isinstance(error, OSError)):
        message = text
    return None if message is None else plain(" ".join(message.split()))
