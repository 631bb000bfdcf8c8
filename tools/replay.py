"""Take a step that was not finite again, and name where it stops being finite.

python tools/replay.py runs/NAME/captures/step-00000012
torchrun --standalone --nproc-per-node 4 tools/replay.py runs/NAME/captures/step-00000012

The guard keeps the batch and the state of such a step (guard.captures). Any number of ranks that divides its
micro-batches takes it, for samples, negatives and weights do not depend on ranks; the same ranks take it bit
for bit. Nothing of the run is changed.
"""

from __future__ import annotations

import os
from typing import Any

from megaregion.bounds import Folder, shown
from megaregion.command_line import Parser, run
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.files import read_json
from megaregion.schemas.evaluation import aligned
from megaregion.settings import read_file


def main() -> None:
    parser = Parser(
        description="Take a step that was not finite again, and name where it stops being finite."
    )
    parser.add_flag(
        "capture", Folder, None, "runs/NAME/captures/step-N, as the guard left it", metavar="CAPTURE"
    )
    folder = parser.parse_args().capture
    # After the flags: torch takes seconds.
    from megaregion.parallel import topology
    from megaregion.training.replay import replay
    from megaregion.training.state import CAPTURE

    try:
        known = read_json(folder / CAPTURE)
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is no capture: it has no {CAPTURE}; name runs/NAME/captures/step-N"
        ) from None
    config = read_file(RunConfig(), folder / "config.yaml")
    # As many ranks share the model as did, if there are so many.
    tensor = config.parallel.tensor if topology.launched_as()[1] % config.parallel.tensor == 0 else 1
    told = replay(folder, config, topology.join(tensor))
    if told:
        print(report(known, told))
    topology.leave()


def report(known: dict[str, Any], told: dict[str, str]) -> str:
    """The outcome beside what the run saw."""
    then = {
        "ranks": "tensor {tensor} x data {data}".format(**known["ranks"]),
        "loss": known["loss"], "gradient norm": known["grad_norm"],
    }  # fmt: skip
    rows = [("", "now", "then"), *((name, value, then.get(name, "")) for name, value in told.items())]
    lines = [f"step {known['step']}: {known['reason']}", aligned(rows, left=(0, 1, 2)), ""]
    if all(value == "none" for name, value in told.items() if name.startswith("first")):
        lines.append("All of it is finite here: suspect the machine that took it, or the order of its sums.")
    suspects = list(dict.fromkeys(known["not_finite"] or known["keys"]))
    lines.append(f"samples ({len(suspects)}): {', '.join(map(shown, suspects))}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(main, teardown=False)
