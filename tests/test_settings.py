"""Every setting of every command: what is within its bounds is taken, all else is a line that names it."""

from __future__ import annotations

import dataclasses
import errno
import math
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from launch import repository

from megaregion.atlas.settings import AtlasSettings
from megaregion.bounds import Kind, Real, Several, Text, Whole, kind_of
from megaregion.checkpoint.reader import config_from_dict
from megaregion.command_line import Parser, changed_settings, chosen_settings, run
from megaregion.config import RunConfig, StageConfig
from megaregion.curation.settings import CurationSettings
from megaregion.demo.scenes import SceneSettings
from megaregion.errors import Fenced, UserError
from megaregion.planning.hardware import Hardware
from megaregion.settings import Setting, check, flag_name, read_settings, read_yaml, sections, to_yaml

CLASSES = (RunConfig, StageConfig, CurationSettings, AtlasSettings, SceneSettings, Hardware)
HOSTILE = (
    math.nan, math.inf, -math.inf, -1, 0, 1e30, 10**23, -(10**23), 0.5, "", "nan", "1" * 5000, "no such word",
    "\0", "a\nb", "../evil", True, None, [], [1], {}, {"a": 1},
)  # fmt: skip
LINES = (
    "",
    ".nan",
    "-.inf",
    "1e30",
    "1" + "0" * 23,
    "-1",
    "~",
    "{}",
    "[]",
    "[[]]",
    "'\\0'",
    '"\\0"',
    "&a [*a]",
)
ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A list of nine lists of nine lists ..., nine times: 400 million values in 600 bytes."""


def settings_of(cls: type) -> list[Setting]:
    return [setting for section in sections(cls()) for setting in section.settings]


def numbers_of(kind: Kind) -> Iterator[Real]:
    if isinstance(kind, Several):
        yield from numbers_of(kind.item)
    elif isinstance(kind, Real):
        yield kind


def nested(key: str, value: object) -> Any:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def value_at(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def must_fit(settings: Any, one: Setting) -> None:
    """What was taken is of its kind and within its bounds."""
    value = value_at(settings, one.key)
    for number in numbers_of(one.kind):
        for item in value if isinstance(value, tuple) else (value,):
            assert isinstance(item, int if isinstance(number, Whole) else (int, float))
            assert math.isfinite(item)
            assert number.low <= item <= number.high or (item == 0 and number.zero), (one.key, item)
    if isinstance(one.kind, Text):
        assert value.isprintable()
        assert value or one.kind.empty


def must_name(error: UserError, name: str) -> None:
    """The refusal is a line, and says what is wrong."""
    text = str(error)
    assert name in text, text
    assert "\n" not in text
    assert len(text) < 400
    assert text.isprintable()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_number_has_finite_bounds_that_fit_where_it_goes(cls: type) -> None:
    for one in settings_of(cls):
        for number in numbers_of(one.kind):
            assert math.isfinite(number.low)
            assert number.low < number.high < 2**63
    check(cls())


@pytest.mark.parametrize("cls", CLASSES)
def test_a_hostile_value_is_within_the_bounds_or_a_line_that_names_its_key(cls: type) -> None:
    began = time.process_time()
    for one in settings_of(cls):
        for value in HOSTILE:
            try:
                settings = read_settings(cls(), nested(one.key, value))
                check(settings)
            except UserError as error:
                must_name(error, one.key)
            else:
                must_fit(settings, one)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("cls", CLASSES)
def test_a_hostile_flag_is_within_the_bounds_or_a_line_that_names_it(cls: type) -> None:
    flat = cls in (AtlasSettings, CurationSettings, Hardware)
    parser = Parser()
    parser.add_settings(cls(), flat)
    for one in settings_of(cls):
        flag = flag_name(one.key) if flat else f"--{one.key}"
        for value in HOSTILE:
            for words in ([f"{flag}={value}"], [flag, str(value)]):
                try:
                    settings = changed_settings(parser.parse_args(words), cls())
                    check(settings)
                except UserError as error:
                    must_name(error, one.key.rpartition(".")[2] if not flat else flag_name(one.key))
                else:
                    must_fit(settings, one)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_hostile_line_in_a_file_is_within_the_bounds_or_a_line_that_names_its_key(
    cls: type, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    for one in settings_of(cls):
        for text in LINES:
            *sections_of, name = one.key.split(".")
            lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(sections_of)]
            file.write_text("\n".join([*lines, f"{'  ' * len(sections_of)}{name}: {text}"]))
            try:
                settings = read_settings(cls(), read_yaml(file))
                check(settings)
            except UserError as error:
                must_name(error, one.key if "nested" not in str(error) else file.name)
            else:
                must_fit(settings, one)


def is_taken(cls: type, one: Setting, value: float) -> bool:
    try:
        check(read_settings(cls(), nested(one.key, value)))
    except UserError as error:
        must_name(error, f"{one.key} must lie in")
        return False
    return True


@pytest.mark.parametrize("cls", CLASSES)
def test_bounds_are_taken_where_they_are_included_and_refused_beyond(cls: type) -> None:
    for one in settings_of(cls):
        if isinstance(one.kind, Real):
            kind, whole = one.kind, isinstance(one.kind, Whole)
            for edge, excluded, sign in ((kind.low, kind.above, -1), (kind.high, kind.below, 1)):
                assert is_taken(cls, one, edge) == (not excluded or (edge == 0 and bool(kind.zero))), one.key
                past = edge + sign * (1 if whole else max(abs(edge), 1) / 1000)
                assert is_taken(cls, one, past) == (past == 0 and bool(kind.zero)), one.key


@pytest.mark.parametrize("cls", [RunConfig, CurationSettings, AtlasSettings])
def test_printed_settings_are_read_back_the_same(
    cls: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser()
    parser.add_settings_files()
    parser.add_settings(cls(), flat=cls is not RunConfig)
    flags = {
        RunConfig: ["--seed=7", "--stages=[{image_size: 336, from_image: 4096}]"],
        CurationSettings: ["--proposal-sides", "512", "64", "--ocr=none"],
        AtlasSettings: ["--seed=7"],
    }[cls]
    expected = chosen_settings(parser.parse_args(flags), cls())
    with pytest.raises(SystemExit) as ended:
        chosen_settings(parser.parse_args([*flags, "--print_config"]), cls())
    assert not ended.value.code
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert file.read_text() == to_yaml(expected)
    assert chosen_settings(parser.parse_args(["--config", str(file)]), cls()) == expected != cls()
    assert all(one.told.split()[0] in parser.format_help() for one in settings_of(cls))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head: {object: {loss: }}", "head.object.loss is empty"),
        ("guard:\n  enabled:\n", "guard.enabled is empty"),
        ("train: {precision: ~}", "train.precision is empty"),
        ("model:\n", "model is empty"),
        ("model: {width: 64}\nmodel: {heads: 4}", "gives model twice, again in line 2"),
        ("model: {width: 64, width: 32}", "gives width twice"),
        ("model: [1]", "model must be settings with names, got ['1']"),
        ("stages: [1]", r"stages[0] must be settings with names, got 1"),
        ("stages: [{image_size: -1}]", r"stages[0].image_size must lie in"),
        ("model: {width: 64", "is no YAML"),
        ("\ttrain: 1", "is no YAML"),
        ("- 1", "must hold settings by name"),
        ("only words", "must hold settings by name"),
        ("[" * 90_000, "is nested too deep"),
        ("x: " * 30_000, "is no YAML"),
        (ALIAS_BOMB, "holds more than 10000 values"),
        ("a: &a [*a]", "is nested too deep"),
        ("model: {<<: 5}", "merges 5 by <<"),
        ("name: " + "x" * 200_000, "is larger than 100 kB"),
        ("model: {width: !!python/object/apply:os.system [ls]}", "model.width must be a whole number"),
        ("\xff", "unknown"),
    ],
)  # fmt: skip
def test_a_file_of_settings_that_is_wrong_is_a_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="latin-1")
    parser = Parser()
    parser.add_settings_files()
    parser.add_settings(RunConfig())
    began = time.process_time()
    with pytest.raises(UserError) as refused:
        chosen_settings(parser.parse_args(["--config", str(file)]), RunConfig())
    assert time.process_time() - began < 5
    must_name(refused.value, "run.yaml" if words == "unknown" or "must lie" not in words else words)
    assert words in str(refused.value) or words == "unknown"


def test_an_alias_repeats_a_section_and_merges_into_another(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("head:\n  object: &same {margin: 0.1, scale: 16}\n  text: {<<: *same, scale: 32}\n")
    head = read_settings(RunConfig(), read_yaml(file)).head
    assert (head.object.margin, head.object.scale, head.text.margin, head.text.scale) == (0.1, 16, 0.1, 32)


def test_a_section_may_be_given_at_once_as_text_or_file_and_later_flags_win(tmp_path: Path) -> None:
    parser = Parser()
    parser.add_settings(RunConfig())
    file = tmp_path / "model.yaml"
    file.write_text("width: 32\nheads: 2")
    for value in ("{width: 32, heads: 2}", str(file)):
        model = changed_settings(parser.parse_args(["--model", value, "--model.heads=4"]), RunConfig()).model
        assert (model.width, model.heads, model.depth) == (32, 4, 12)


def test_a_number_without_bounds_is_no_setting() -> None:
    for annotation in (int, float, list[int], Annotated[int, "many"], tuple[float, float], object):
        with pytest.raises(TypeError, match="is no type of a setting"):
            kind_of(annotation)


def test_whole_numbers_may_be_written_with_an_exponent_and_no_fraction() -> None:
    kind = Whole(0, 10**12)
    assert [kind.read(text) for text in ("1e9", "1_000", "12", "3.0")] == [10**9, 1000, 12, 3]
    for value in ("1.5", "nan", "inf", "x", "", 1.5, True, None):
        with pytest.raises(ValueError, match="must be a whole number in"):
            kind.read(value)


TOOLS = [
    ("curate.py --images x --workers -1", "--workers must lie in [0, 1024], got -1"),
    ("curate.py --images x --min-edge nan", "--min-edge must lie in [0, 16384], got nan"),
    ("curate.py --images x --crop-side 320000", "--crop-side must lie in [32, 1024]"),
    ("curate.py --images x --cluster-seed 99999999999", "--cluster-seed must lie in"),
    ("curate.py --imagse x", "did you mean images?"),
    ("curate.py --images=", "--images must not be empty"),
    ("curate.py --images x --out=", "--out must not be empty"),
    ("curate.py", "--images FOLDER is missing"),
    ("curate.py stats", "must be check or status or report, got stats; did you mean status?"),
    ("curate.py --images x --of 0 --piece 0", "--of must lie in [1, 1e9], got 0"),
    ("atlas.py x --tile 0", "--tile must lie in [32, 512], got 0"),
    ("atlas.py x --workers -1", "--workers must lie in"),
    ("atlas.py --synthetic 0", "--synthetic must lie in"),
    ("plan.py run --gpus nan", "--gpus must be a whole number in"),
    ("plan.py run --samples -5", "--samples must lie in"),
    ("plan.py run --memory-gib inf", "--memory-gib must lie in"),
    ("plan.py goodput --faults 0", "--faults must lie in"),
    ("plan.py goodput --save nan", "--save must lie in"),
    ("plan.py", "required: PART"),
    ("make_scenes.py --train -1", "--train must lie in"),
    ("make_scenes.py --size 20", "--size must lie in [96, 4096], got 20"),
    ("make_scenes.py --size wide", "--size must be a whole number"),
    ("make_scenes.py --seed -1", "--seed must lie in"),
    ("convert_checkpoint.py to-hf a b --shard-gb nan", "--shard-gb must lie in (0, 1e6], got nan"),
    ("convert_checkpoint.py to-hf a b --license mit:x", "--license must be the hub's name of a licence"),
    ("convert_checkpoint.py from-hf a b --image-size -4", "--image-size must lie in"),
    ("convert_checkpoint.py check a b --tolerance -1", "--tolerance must lie in"),
    ("evaluate.py x --scenes y --batch 0", "--batch must lie in"),
    ("evaluate.py x --scenes y --seed -1", "--seed must lie in"),
    ("evaluate.py x --scenes y --map-side -5", "--map-side must lie in"),
    ("evaluate.py x --scenes y --workers -1", "--workers must lie in"),
    ("report.py", "required: RUN"),
    ("report.py x --out=", "--out must not be empty"),
    ("demo.py --first-steps 0", "--first-steps must lie in"),
    ("benchmark.py head --repeats 0", "--repeats must lie in"),
    ("benchmark.py step --batch nan", "--batch must be a whole number in"),
    ("benchmark.py gpu --folder nowhere", "--folder nowhere is no folder; make it first"),
    ("benchmark.py heda", "did you mean head?"),
]


@pytest.mark.parametrize(("command", "words"), TOOLS)
def test_a_wrong_flag_of_any_tool_is_a_line_before_anything_is_read(
    command: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool, *flags = command.split()
    monkeypatch.syspath_prepend(repository() / "tools")
    monkeypatch.setattr(sys, "argv", [tool, *flags])
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(repository() / "tools" / tool))["main"]
    with pytest.raises(UserError) as refused:
        main()
    must_name(refused.value, words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "x/y: No space left on device", 1),
        (
            PermissionError(errno.EACCES, "Permission denied", "m"),
            "m: Permission denied",
            2,
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "m"), "m: Is a directory", 2),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", ".m.partial", None, "m"),
            ": m: Is a directory",
            2,
        ),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n", 1),
        (MemoryError(), "not enough memory", 1),
        (Exception("[ONNXRuntimeError] : Failed to allocate memory for requested buffer"), "not enough", 1),
        (RuntimeError("can't start new thread"), "ulimit -u", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory", 1),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory", 1),
        (RuntimeError("gloo/transport/tcp/socket.cc:24 socket: Too many open files"), "ulimit -n", 1),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory", 1),
        (OverflowError("Python int too large to convert to C long"), "a number is too large", 2),
        (UserError("say this"), "say this", 2),
        (Fenced("a newer start"), "a newer start", 86),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_what_the_machine_refuses_is_a_line_with_its_exit_code(
    error: BaseException, words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(fail)
    assert ended.value.code == code
    told = capsys.readouterr().err
    assert told.startswith("megaregion: ")
    assert told.count("\n") == 1
    assert words in told


def test_a_mistake_of_the_code_keeps_its_traceback_and_the_machines_shows_it_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run(fail)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("MEGAREGION_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run(full)
    assert "in full" in capsys.readouterr().err


def test_a_checkpoint_of_a_model_beyond_all_bounds_is_refused_and_other_settings_are_as_they_were() -> None:
    values = dataclasses.asdict(RunConfig())
    values["optimizer"]["eps"] = 0.0
    assert config_from_dict(values).optimizer.eps == 0.0
    for change, words in (
        ({"depth": 10**9}, "model.depth must lie in"),
        ({"heads": 0}, "model.heads must lie in"),
        ({"depth": "many"}, "model.depth must be a whole number"),
        ({"depth": [2]}, "model.depth must be a whole number"),
        ({"dpeth": 2}, "unknown setting model.dpeth; did you mean model.depth?"),
    ):
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            config_from_dict({**values, "model": {**values["model"], **change}})
    for values in ([], "text", {"model": 5}, None):
        with pytest.raises(UserError, match="must be settings with names"):
            config_from_dict(values)
