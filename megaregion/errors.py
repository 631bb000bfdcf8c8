"""Mistakes that a user can mend: one line that names the key, the value and the way out."""

USER_ERROR_EXIT = 2
"""Exit code of a command that ended because of a :class:`UserError`."""

REQUEUE_EXIT = 85
"""Exit code of a run that saved on a signal and wants to be started again."""


class UserError(Exception):
    """Bad input from outside (a setting, a file, a folder); its text is all that the user sees."""
