"""Turn a checkpoint into a folder that other libraries load, or such a folder into the start of a run.

python tools/convert_checkpoint.py to-hf runs/demo exported/demo --check
python tools/convert_checkpoint.py to-hf runs/demo exported/demo-regions --regions --dtype bf16
python tools/convert_checkpoint.py from-hf rice-vit-large-patch14-560 start/rice --image-size 336
python tools/convert_checkpoint.py check runs/demo exported/demo --images photos
python tools/convert_checkpoint.py push exported/demo somebody/demo --dry-run
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.bounds import Choice, File, Folder, NonNegative, Pixels, Real, shown
from megaregion.command_line import Parser, run
from megaregion.errors import UserError
from megaregion.schemas.evaluation import aligned

if TYPE_CHECKING:
    import torch

    from megaregion.config import ModelConfig

FORMATS = ("mlcd", "llava-onevision-1.5")
"""The layouts of megaregion.export, which would bring torch along before a flag is read."""
TOLERANCE = 1e-4
"""Largest difference of features, as a share of the largest feature, that rounding can explain."""


def main() -> None:
    arguments = _parser().parse_args()
    arguments.command(arguments)


def _to_hf(arguments: argparse.Namespace) -> None:
    import torch

    from megaregion.export import ExportOptions, export_checkpoint

    if arguments.check and arguments.format != "mlcd":
        raise UserError(f"--check cannot load --format {arguments.format}; leave one of them out")
    options = ExportOptions(
        dtype=torch.bfloat16 if arguments.dtype == "bf16" else torch.float32,
        layout=arguments.format,
        regions=arguments.regions,
        license=arguments.license,
        shard_bytes=max(1, int(arguments.shard_gb * 1e9)),
        evaluation=arguments.evaluation,
        llm=arguments.llm,
    )
    exported = export_checkpoint(arguments.checkpoint, arguments.out, options)
    print(f"{'checkpoint':<12}{exported.checkpoint}")
    print(f"{'step':<12}{exported.step:,}")
    _print_model(exported.model, exported.parameters)
    print(f"{'weights':<12}{exported.size / 2**20:.1f} MiB, {arguments.dtype}")
    print(f"{'written to':<12}{arguments.out}")
    if arguments.check:
        _compare(exported.checkpoint, arguments.out, TOLERANCE, None, options.dtype)


def _from_hf(arguments: argparse.Namespace) -> None:
    from megaregion.export import write_start

    start, parameters = write_start(arguments.folder, arguments.out, arguments.image_size)
    for notice in start.notices:
        print(f"{'notice':<12}{notice}")
    print(f"{'folder':<12}{arguments.folder}")
    _print_model(start.model, parameters)
    print(f"{'written to':<12}{arguments.out}")
    out = arguments.out
    print(f"{'train with':<12}tools/pretrain.py --config RUN.yaml --config {out}/model.yaml --init {out}")


def _print_model(model: ModelConfig, parameters: int) -> None:
    print(f"{'model':<12}{model.depth} blocks, width {model.width}, {model.heads} heads, {model.activation}")
    print(f"{'parameters':<12}{parameters:,}")
    print(f"{'image':<12}{model.image_size} px, patch {model.patch_size} px")


def _check(arguments: argparse.Namespace) -> None:
    _compare(arguments.a, arguments.b, arguments.tolerance, arguments.images)


def _compare(
    a: Path, b: Path, tolerance: float, images: Path | None, dtype: torch.dtype | None = None
) -> None:
    from megaregion.export.parity import compare, open_encoder, picture_files

    pictures = picture_files(images) if images is not None else []
    found = compare(open_encoder(a, dtype) if dtype else open_encoder(a), open_encoder(b), pictures)
    told = f"{len(pictures)} images" if pictures else "noise"
    print(f"\n{'largest difference':<20}{'patches':>10}{'class':>10}{'pooled':>10}   on {told}")
    for each in found:
        size = f"{each.height} x {each.width}"
        print(f"{size:<20}{each.patches:>10.1e}{each.class_token:>10.1e}{each.pooled:>10.1e}")
    worst = max(each.share for each in found)
    if not worst <= tolerance:
        raise UserError(
            f"{b} gives features that differ from those of {a} by {worst:.1e} of the largest, more than "
            f"{tolerance:.0e}; do not use it for the other, and compare the installed transformers with "
            "requirements.txt"
        )
    print(f"{'checked':<12}features equal to {worst:.1e} of the largest")


def _push(arguments: argparse.Namespace) -> None:
    from megaregion.export.hub import files_to_push, push

    files = files_to_push(arguments.folder)
    rows = [[name, f"{size / 2**20:,.2f} MiB"] for name, size in files.items()]
    print(aligned([*rows, [f"{len(files)} files", f"{sum(files.values()) / 2**20:,.2f} MiB"]]))
    kind = "private" if arguments.private else "public"
    if arguments.dry_run:
        print(f"{'would go to':<12}{arguments.repo}, {kind} if it is new; nothing was sent")
    else:
        told = push(arguments.folder, arguments.repo, list(files), arguments.private, arguments.message)
        print(f"{'pushed to':<12}{told}")


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "to-hf", help="a HuggingFace folder for AutoModel and AutoImageProcessor",
        description="Write the encoder of a checkpoint as a HuggingFace folder (MLCDVisionModel), on one "
        "processor, whatever topology wrote it.",
    )  # fmt: skip
    to_hf.set_defaults(command=_to_hf)
    _add_to_hf(to_hf.add_flag)
    from_hf = commands.add_parser(
        "from-hf", help="a starting checkpoint from an MLCD or RICE folder, or a CLIP vision tower",
        description="Write a checkpoint that tools/pretrain.py --init begins with, at any topology.",
    )  # fmt: skip
    from_hf.set_defaults(command=_from_hf)
    add = from_hf.add_flag
    add("folder", Folder, None, "folder with config.json and safetensors files")
    add("out", Folder, None, "folder to write; must be absent or empty", metavar="OUT")
    add("--image-size", Pixels, None, "side of the images to train on; the folder's own if not given")
    check = commands.add_parser(
        "check", help="the largest difference between two encoders' features",
        description="Compare the features of two encoders: checkpoints are run by megaregion, HuggingFace "
        "folders by transformers. Exit code 2 if they differ by more than --tolerance.",
    )  # fmt: skip
    check.set_defaults(command=_check)
    add = check.add_flag
    add("a", Folder, None, f"{_OURS}, or a HuggingFace folder", metavar="A")
    add("b", Folder, None, "the same", metavar="B")
    add("--images", Folder, None, "folder of images, of which 8 are taken; noise if not given")
    add("--tolerance", NonNegative, TOLERANCE, "largest difference, as a share of the largest feature",
        metavar="SHARE")  # fmt: skip
    to_hub = commands.add_parser(
        "push", help="an exported folder to a model of the HuggingFace Hub",
        description="Send an exported folder with its card to the HuggingFace Hub in one commit, under the "
        "token of HF_TOKEN or of `hf auth login`.",
    )  # fmt: skip
    to_hub.set_defaults(command=_push)
    add = to_hub.add_flag
    add("folder", Folder, None, "what to-hf has written", metavar="FOLDER")
    add("repo", _repo, None, "OWNER/NAME of the model, which is made if there is none", metavar="REPO")
    add("--private", bool, False, "make it private, where it is new")
    add("--message", str, "Encoder trained with megaregion", "of the commit", metavar="TEXT")
    add("--dry-run", bool, False, "show what would go, and send nothing")
    return parser


def _add_to_hf(add: Callable[..., None]) -> None:
    add("checkpoint", Folder, None, _OURS, metavar="CHECKPOINT")
    add("out", Folder, None, "folder to write; must be absent or empty", metavar="OUT")
    add("--format", Choice(FORMATS), "mlcd", "whose names and settings to write")
    add("--llm", File, None, "config.json of the LLM that --format llava-onevision-1.5 will feed",
        metavar="CONFIG")  # fmt: skip
    add("--dtype", Choice(("fp32", "bf16")), "fp32", "type of the written weights")
    add("--regions", bool, False, "add get_region_features: the projection, region tokens' own weights and a "
        "class that AutoModel loads with trust_remote_code")  # fmt: skip
    add("--license", _license, "unknown", "licence of the weights, as the hub calls it", metavar="ID")
    add("--evaluation", File, None, "evaluation.json for the card; the run's own if not given")
    add("--shard-gb", Real(0, 10**6, "GB", above=True), 5.0, "most gigabytes of weights in one file")
    add("--check", bool, False, "load OUT with transformers and compare its features with ours")


def _license(text: str) -> str:
    """An identifier of the hub's; anything else could write into the card's head."""
    if not re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be the hub's name of a licence, as mit, got {shown(text)}")
    return text


def _repo(text: str) -> str:
    name = r"[A-Za-z0-9]([\w.-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(rf"({name}/)?{name}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be OWNER/NAME, as somebody/photos-vit, got {shown(text)}")
    return text


_OURS = "a run's folder, its checkpoints folder or one step-... folder"


if __name__ == "__main__":
    run(main)
