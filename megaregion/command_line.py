"""What all command lines share: a run's settings from files and flags, and one clear line for a mistake."""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megaregion.checks import check_config
from megaregion.config import RunConfig, setting_names
from megaregion.errors import FENCED_EXIT, USER_ERROR_EXIT, Fenced, UserError

INTERRUPTED_EXIT = 130
"""Exit code after Ctrl-C, as shells give it."""


def run(main: Callable[[], int | None], teardown: bool = True) -> NoReturn:
    """Run a command and end the process: a user's mistake is one line on stderr and exit code 2.

    A run that was taken over by a newer start of itself ends with one line too, and exit code 86.

    Args:
        main: The command; returns its exit code.
        teardown: Whether the interpreter takes itself down; see :func:`end_process`.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(f"megaregion: {error}", file=sys.stderr)
        code = USER_ERROR_EXIT
    except Fenced as error:
        print(f"megaregion: {error}", file=sys.stderr)
        code = FENCED_EXIT
    except BrokenPipeError:
        # Whoever read our output, `head` for one, has seen enough; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("megaregion: interrupted", file=sys.stderr)
        code = INTERRUPTED_EXIT
    if teardown:
        sys.exit(code)
    end_process(code)


def end_process(code: int) -> NoReturn:
    """Run the exit hooks, then end at once.

    Threads inside torch and gloo may ask for the interpreter while it is taken down, which aborts the
    process now and then: a rank that had done its work would look like one that died.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_parser(description: str) -> Any:
    """A jsonargparse parser with every setting of a run; add a command's own flags to it."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    # The sentence under each field of config.py is the text of --help.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, default_env=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; several are merged in order"
    )
    parser.add_class_arguments(RunConfig, nested_key=None, as_group=True)
    return parser


def parse_run(parser: Any, argv: Sequence[str] | None = None) -> tuple[RunConfig, Any]:
    """Read a run's settings and check them.

    Args:
        parser: Made by :func:`run_parser`.
        argv: Arguments without the program's name; the process's own if None.

    Returns:
        The settings and the namespace with the command's own flags.

    Raises:
        UserError: An unknown key (the nearest known one is named), or a value that does not fit.
    """
    from jsonargparse import ArgumentError

    try:
        namespace = parser.parse_args(list(argv) if argv is not None else None)
        built = parser.instantiate_classes(namespace)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_clear(str(error))) from error
    names = [f.name for f in dataclasses.fields(RunConfig)]
    config = RunConfig(**{name: getattr(built, name) for name in names})
    check_config(config)
    return config, namespace


def _clear(message: str) -> str:
    """The parser's message in one line, with the nearest known key where the key is unknown."""
    text = " ".join(message.split())
    for pattern in _UNKNOWN_KEY:
        unknown = re.search(pattern, text)
        if unknown:
            return _with_nearest(".".join(unknown.groups()))
    return text


_UNKNOWN_KEY = (
    r"[Uu]nrecognized arguments: -*([\w.]+)",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"[Kk]ey ['\"]?([\w.]+)['\"]? is not expected",
    r"Option '([\w.]+)' is not accepted",
)
"""How jsonargparse words an unknown key, by where it stands."""


def _with_nearest(key: str) -> str:
    names = setting_names()
    leaf = {name.rsplit(".", 1)[-1]: name for name in names}
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    near = near or [leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, n=1, cutoff=0.5)]
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all settings"
    return f"unknown setting {key}{hint}"
