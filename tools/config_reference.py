"""Write the reference of all settings of a run, configs/README.md, from the dataclasses that define them.

python tools/config_reference.py
python tools/config_reference.py --check     say whether it is up to date, and change nothing
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megaregion.command_line import run
from megaregion.errors import UserError
from megaregion.reference import page

PAGE = Path(__file__).resolve().parents[1] / "configs" / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the reference of all settings of a run from the dataclasses that define them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="the page, Markdown")
    parser.add_argument("--check", action="store_true", help="exit with 2 if the page is not up to date")
    arguments = parser.parse_args()
    text = page()
    if arguments.check:
        if not arguments.out.is_file() or arguments.out.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{arguments.out} is not up to date with megaregion/config.py; run tools/config_reference.py"
            )
        print(f"{arguments.out} is up to date")
        return
    try:
        arguments.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{arguments.out} cannot be written ({error}); name another file with --out"
        ) from None
    print(f"{arguments.out}: {text.count(chr(10) + '| `')} settings")


if __name__ == "__main__":
    run(main)
