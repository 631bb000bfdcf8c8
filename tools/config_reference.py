"""Write the reference of all settings, configs/README.md, from the dataclasses that define them.

python tools/config_reference.py
python tools/config_reference.py --check     say whether it is up to date, and change nothing
"""

from __future__ import annotations

from pathlib import Path

from megaregion.atlas.settings import AtlasSettings
from megaregion.bounds import File
from megaregion.command_line import Parser, run, written
from megaregion.config import RunConfig
from megaregion.curation.settings import CurationSettings
from megaregion.errors import UserError
from megaregion.settings import Section, Setting, sections

PAGE = Path(__file__).resolve().parents[1] / "configs" / "README.md"

HEAD = """# Settings

Written by `python tools/config_reference.py` from the dataclasses that define them; a test compares both.

A training run is one set of settings: YAML files merged in order, then flags with dots:

    python tools/pretrain.py --config configs/demo.yaml --optimizer.lr 5e-4 --name try-5e-4

A curation and an atlas take `--config` too, and flags by the last part of a name: `propose.min_edge` below is
`--min-edge` of `tools/curate.py`. `--print_config` prints all settings of a command line as YAML. What is
unknown, empty or out of bounds is refused in a line that names the key. The files beside this page are runs:
`demo.yaml` and `study.yaml` for two cores, the others for GPUs.
"""

PARTS = {
    "Training: tools/pretrain.py": RunConfig(),
    "Curation: tools/curate.py": CurationSettings(),
    "Atlas: tools/atlas.py": AtlasSettings(),
}


def main() -> None:
    parser = Parser(description="Write the reference of all settings from the dataclasses that define them.")
    parser.add_flag("--out", File, PAGE, "the page, Markdown")
    parser.add_flag("--check", bool, False, "exit with 2 if the page is not up to date")
    arguments = parser.parse_args()
    text = page()
    if not arguments.check:
        arguments.out.write_text(text, encoding="utf-8")
        print(f"{arguments.out}: {text.count(chr(10) + '| `')} settings")
    elif arguments.out.is_file() and arguments.out.read_text(encoding="utf-8") == text:
        print(f"{arguments.out} is up to date")
    else:
        raise UserError(f"{arguments.out} is not up to date with the code; run tools/config_reference.py")


def page() -> str:
    """The reference as Markdown."""
    parts = [HEAD]
    for title, settings in PARTS.items():
        parts += [f"## {title}\n", *(_table(section) for section in sections(settings) if section.settings)]
    return "\n".join(parts)


def _table(section: Section) -> str:
    title = [f"### `{section.key}`", ""] if section.key else []
    rows = [_row(setting) for setting in section.settings]
    head = ["| setting | values | default | effect |", "|---|---|---|---|"]
    return "\n".join([*title, section.told, "", *head, *rows, ""])


def _row(setting: Setting) -> str:
    kind = setting.kind.told.removeprefix("a ")
    default = written(setting.default)
    shown = default if default in ("empty", "none") else f"`{default}`"
    cells = (f"`{setting.key}`", kind, shown, setting.told)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    run(main)
