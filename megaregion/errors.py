"""Mistakes that a user can mend: one line that names the key, the value and the way out."""

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
