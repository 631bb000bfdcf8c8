"""What all command lines share: flags from settings, one clear line for a mistake, and how a process ends."""

from __future__ import annotations

import argparse
import atexit
import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megaregion.bounds import Choice, File, Kind, Misfit, Several, Switch, Text, did_you_mean, kind_of, shown
from megaregion.checks import check_config
from megaregion.config import RunConfig
from megaregion.errors import FENCED_EXIT, USER_ERROR_EXIT, Fenced, UserError, say
from megaregion.settings import (
    check,
    flag_name,
    parse_yaml,
    read_file,
    read_settings,
    read_yaml,
    sections,
    to_yaml,
    unknown,
)

INTERRUPTED_EXIT = 130
"""Exit code after Ctrl-C, as shells give it."""
TRACEBACK = "MEGAREGION_TRACEBACK"
"""Environment variable that shows where an error of the machine came from."""

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line: the flag, the value and the way out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})
        # argparse takes -5 for a value but -1e30 and -inf for flags.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag is refused first, for its value would be taken for a command."""
        words = list(sys.argv[1:] if args is None else args)
        commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        for word in words:
            if word == "--" or any(word in action.choices for action in commands):
                break
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                raise unknown(flag[2:], [known.lstrip("-") for known in self._option_string_actions])
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line by a :class:`UserError`."""
        text = " ".join(re.sub(r"^argument ([^\s:]+): ", r"\1 ", message).split())
        choice = re.match(r"(\S+) invalid choice: '?(.*?)'? \(choose from (.*)\)", text)
        if choice:
            words = choice[3].replace("'", "").split(", ")
            hint = did_you_mean(choice[2], words)
            text = f"{choice[1]} must be {' or '.join(words)}, got {shown(choice[2])}{hint}"
        elif " must " not in text:
            text += "; --help shows how"
        raise UserError(text)

    def add_flag(
        self, name: str, kind: Any, default: Any, told: str, group: Any = None, **options: Any
    ) -> None:
        """Add a flag, as ``--batch``, or without dashes an argument, of a command's own.

        Its kind is a type of bounds.py or a :class:`Kind`, bool for a switch, or a function that reads a
        text. ``group`` is where ``--help`` shows it, if not with all others; further options are argparse's.
        """
        if kind is bool:
            options["action"] = "store_true"
        elif inspect.isfunction(kind):
            options = {"type": kind, "default": default, **options}
        else:
            kind = kind_of(kind)
            if isinstance(kind, Several):
                kind, options["nargs"] = kind.item, kind.count or "+"
            options = {"type": kind.fit, "default": default, "metavar": kind.metavar, **options}
        (group or self).add_argument(name, help=told, **options)

    def add_settings(self, defaults: Any, flat: bool = False, without: Sequence[str] = ()) -> None:
        """Add a flag for every setting of a class; :func:`chosen_settings` gives what they set.

        They are named as ``--model.width``, or ``flat`` as ``--min-edge``, where names are unique; keys
        ``without`` get none.
        """
        dest = _dest(defaults)
        for section in sections(defaults):
            named = section.key and not flat
            told = section.told.rstrip(".")
            group = self.add_argument_group(f"{section.key}: {told}" if named else told)
            if named:
                group.add_argument(
                    f"--{section.key}", metavar="YAML", action=_Change, dest=dest, key=section.key,
                    help="the settings of this section, a file or as {name: value}",
                )  # fmt: skip
            for one in section.settings:
                if one.key in without:
                    continue
                kind = "" if isinstance(one.kind, (Choice, Switch, Text)) else f"{one.kind.told}; "
                told = f"{one.told.rstrip('.')} ({kind}default: {written(one.default)})"
                group.add_argument(
                    flag_name(one.key) if flat else f"--{one.key}", metavar=one.kind.metavar, action=_Change,
                    dest=dest, key=one.key, kind=one.kind,
                    nargs="+" if isinstance(one.kind, Several) else None, help=told.replace("%", "%%"),
                )  # fmt: skip

    def add_settings_files(self) -> None:
        """Add ``--config`` and ``--print_config`` for :func:`chosen_settings`."""
        told = "YAML file of settings; several are merged in order, and flags win"
        self.add_flag("--config", File, [], told, action="append")
        self.add_argument(
            "--print_config", "--print-config", action="store_true", help="print all settings as YAML and end"
        )


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or action.default is False or action.default == []
        return action.help if unsaid else super()._get_help_string(action)


@contextmanager
def progress(step: str, count: int) -> Iterator[Callable[..., Any]]:
    """A bar on a terminal, one line at the end elsewhere; gives what is called with the things just done."""
    from tqdm import tqdm

    with tqdm(total=count, desc=f"{step:<10}", unit_scale=True, disable=None) as bar:
        yield bar.update
    if bar.disable:
        print(f"{step}: done")


def chosen_settings(flags: argparse.Namespace, defaults: T) -> T:
    """The settings of a command line, those of its files and flags; prints them if it is asked to.

    Raises:
        UserError: A file cannot be read, or a value does not fit.
    """
    settings = defaults
    for file in flags.config:
        settings = read_file(settings, file)
    settings = changed_settings(flags, settings)
    check(settings)
    if flags.print_config:
        print(to_yaml(settings), end="")
        sys.exit(0)
    return settings


def changed_settings(flags: argparse.Namespace, settings: T) -> T:
    """Settings with what flags of :meth:`Parser.add_settings` set, in the order of the command line."""
    for key, value in getattr(flags, _dest(settings), ()):
        for name in reversed(key.split(".")):
            value = {name: value}
        settings = read_settings(settings, value)
    return settings


def _dest(settings: object) -> str:
    """Where the namespace holds the changes of one class of settings."""
    return f"changes of {type(settings).__name__}"


class _Change(argparse.Action):
    """Notes a setting, or the values of a section without a kind, that a flag changes."""

    def __init__(self, *names: Any, key: str, kind: Kind | None = None, **options: Any) -> None:
        super().__init__(*names, **{**options, "default": argparse.SUPPRESS})
        self._key, self._kind = key, kind

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        # Several values are words of their own, or one word with commas between them.
        text = values[0] if isinstance(values, list) and len(values) == 1 else values
        try:
            if self._kind is not None:
                value = self._kind.fit(text)
            else:
                value = parse_yaml(text) if text.lstrip().startswith("{") else read_yaml(Path(text))
        except Misfit as misfit:
            raise argparse.ArgumentError(self, str(misfit)) from None
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, ()), (self._key, value)])


def run_settings(flags: argparse.Namespace) -> RunConfig:
    """The settings of a training run, from the flags that :meth:`Parser.add_settings` added for RunConfig.

    Raises:
        UserError: An unknown key (the nearest known one is named), or a value that does not fit.
    """
    config = chosen_settings(flags, RunConfig())
    check_config(config)
    return config


def written(value: Any) -> str:
    """A default as a user writes it."""
    if isinstance(value, tuple):
        return " ".join(written(one) for one in value) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value) or "empty"


def run(main: Callable[[], int | None], teardown: bool = True) -> NoReturn:
    """Run a command, which gives its exit code, and end the process.

    A user's mistake is one line on stderr and exit code 2. A run that a newer start of itself took over ends
    with one line too, and exit code 86; so does what the machine refuses, with exit code 1 where another
    start may be luckier. Without ``teardown`` it ends by :func:`end_process`.
    """
    try:
        code = main() or 0
    except BrokenPipeError:
        # Whoever read our output, `head` for one, has seen enough; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (UserError, Fenced) as error:
        say(error)
        code = USER_ERROR_EXIT if isinstance(error, UserError) else FENCED_EXIT
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED_EXIT
    except Exception as error:  # Libraries have classes of their own for a lack of memory.
        code = _of_the_machine(error)
    if teardown:
        sys.exit(code)
    end_process(code)


def _tell_uncaught(kind: Any, error: Any, trace: Any) -> None:
    """What nobody catches: Ctrl-C while modules are imported is a line, all else a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted")
    else:
        sys.__excepthook__(kind, error, trace)


# Before anything heavy is imported: Ctrl-C may come at once.
sys.excepthook = _tell_uncaught


def _of_the_machine(error: Exception) -> int:
    """Say in a line what the machine refused; what is a mistake of ours is raised again."""
    told = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search(_NO_MEMORY, told):
        line, code = f"not enough memory ({told[:200] or 'of the host'}); take less at once", 1
    elif _NO_FILES in told or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
        line, code = f"{_NO_FILES}; raise the limit on them (ulimit -n) or take fewer workers", 1
    elif _NO_THREADS in told:
        line, code = f"{_NO_THREADS}; raise the limits (ulimit -u, ulimit -v) or take fewer workers", 1
    elif isinstance(error, ModuleNotFoundError) and not f"{error.name}.".startswith("megaregion."):
        line, code = f'{error.name} is not installed; pip install ".[train,curate]" has it', USER_ERROR_EXIT
    elif isinstance(error, OverflowError):
        line, code = f"a number is too large for the machine ({told}); give a smaller one", USER_ERROR_EXIT
    elif isinstance(error, OSError):
        # A file that cannot take its name is called by that, not by the one under which it was written.
        path = error.filename2 or error.filename
        place = f"{path}: " if path else ""
        line, code = f"{place}{error.strerror or told}", USER_ERROR_EXIT if error.errno in _MENDABLE else 1
    else:
        raise error
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    say(f"{line} ({TRACEBACK}=1 shows where)")
    return code


_NO_FILES = "Too many open files"
_NO_THREADS = "can't start new thread"
_NO_MEMORY = r"(out of|not enough|allocate) memory|failed to map segment"
"""As libraries say it, the loader of shared ones included."""
_MENDABLE = (
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""Errors that stay the same until a person does something; after others, another start may be luckier."""


def end_process(code: int) -> NoReturn:
    """Run the exit hooks, then end at once.

    Threads inside torch and gloo may ask for the interpreter while it is taken down, which aborts the
    process now and then: a rank that had done its work would look like one that died.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
