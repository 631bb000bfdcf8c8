"""How a process ends: exit codes, mistakes that a user can mend, and the one line that says why."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

EARLY_EXIT = 1
"""Exit code of a rank that left before the first step. srun tells the highest code of all ranks, and when one
fails it asks the others to stop: theirs must not hide its own."""
USER_ERROR_EXIT = 2
"""Exit code of a command that ended because of a :class:`UserError`."""
REQUEUE_EXIT = 85
"""Exit code of a run that saved on a signal and wants to be started again."""
FENCED_EXIT = 86
"""Exit code of a run that found a newer start of itself and ended; it must not be started again."""
WATCHDOG_EXIT = 87
"""Exit code of a run that stood still and was ended by its watchdog."""
UNFIT_EXIT = 88
"""Exit code of a start that found a host sick, slow or different; another allocation may do without it."""


class UserError(Exception):
    """Bad input from outside (a setting, a file, a folder); its text is all that the user sees."""


class Fenced(Exception):
    """A newer start of the same run owns its folder; its text is one line, and this process must end."""


def is_said(line: str) -> bool:
    """Whether another rank has said a line on the terminal that it shares with this one; else this one must.

    torchrun gives the ranks of a host one folder, for as long as they run.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return False
    try:
        (Path(own).parents[1] / f"said-{hashlib.sha256(line.encode()).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except (OSError, IndexError):
        pass
    return False


def say(line: object) -> None:
    """Tell the user why this command ends, on stderr."""
    if not is_said(str(line)):
        print(f"megaregion: {line}", file=sys.stderr, flush=True)
