"""`megaregion`: one command for all tools, and `megaregion fit`, from images to an encoder in one go."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megaregion import __version__
from megaregion.bounds import File, Folder, Text, did_you_mean, shown
from megaregion.command_line import Parser, run
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.files import home, read_json, write_text
from megaregion.schemas.curation import SUMMARY
from megaregion.schemas.evaluation import aligned
from megaregion.settings import read_file

COMMANDS = {
    "fit": ("", "images in, an encoder out, with settings chosen from the data and the machine"),
    "check": ("curate.py check", "what curation would use of a folder, and why not the rest"),
    "curate": ("curate.py", "regions, their labels and shards, from images"),
    "atlas": ("atlas.py", "clusters, tokens and samples as pages"),
    "train": ("pretrain.py", "an encoder on shards; torchrun --no-python and srun start many ranks of it"),
    "evaluate": ("evaluate.py", "scores of an encoder on annotated images or scenes"),
    "watch": ("report.py --watch", "a run's curves, events and state on a page while it trains"),
    "replay": ("replay.py", "a step that was not finite, once more: where the first NaN is"),
    "report": ("report.py", "several runs side by side on a page"),
    "convert": ("convert_checkpoint.py", "a checkpoint to HuggingFace and back, and to the Hub"),
    "plan": ("plan.py", "memory, time and cost of a run or of curation before it starts"),
    "study": ("study.py", "the paper's trends in small"),
    "scenes": ("make_scenes.py", "scenes with known truth"),
    "benchmark": ("benchmark.py", "a part beside its peers"),
}
"""Tool with its first words, and what it is for, by command."""
FEWEST = 8
"""Images that a run needs at least."""
SMALL = 1024
"""Classes of which every one is a negative: a tenth of them would be too few."""


def main() -> None:
    """Run the command that the first word names; all after it is the tool's own."""
    run(_main)


def _main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(__version__)
    elif name in ("-h", "--help"):
        print("usage: megaregion COMMAND ...; megaregion COMMAND --help tells its flags\n")
        print(aligned([[name, told] for name, (_, told) in COMMANDS.items()], left=(0, 1), indent="  "))
    elif name not in COMMANDS:
        raise UserError(
            f"no command {shown(name)}{did_you_mean(name, COMMANDS)}; megaregion --help lists them"
        )
    elif name == "fit":
        arguments = _parser().parse_args(words)
        given = Given(arguments.annotations_file, arguments.init, arguments.config)
        fit(arguments.images, arguments.out, given, arguments.dry_run)
    else:
        # In place of this process: signals, exit codes and worker processes are the tool's own.
        os.execv(sys.executable, [sys.executable, *_tool(name), *words])


def _tool(name: str) -> list[str]:
    file, *words = COMMANDS[name][0].split()
    return [str(home("tools") / file), *words]


def _parser() -> Parser:
    parser = Parser(prog="megaregion fit", description="From a folder of images to an encoder that AutoModel "
        "loads. What is done is skipped, so that the same command goes on where it was.")  # fmt: skip
    add = parser.add_flag
    add("--images", Text("FOLDER"), None, "what `megaregion curate --images` reads", required=True)
    add("--out", Folder, Path("runs/fit"), "folder of all that is made; the encoder is OUT/encoder")
    add("--annotations-file", File, None, "boxes or masks in place of proposals; they score the encoder, too")
    add("--init", Folder, None, "HuggingFace folder of an encoder to begin with: RICE, MLCD, a CLIP tower")
    add("--config", File, None, "settings of training that go before those that are chosen")
    add("--dry-run", bool, False, "list the images, print what is chosen and the commands, and end")
    return parser


@dataclass(frozen=True)
class Machine:
    """What a fit runs on."""

    cores: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cores} cores, {self.gpus or 'no'} GPU{'s' if self.gpus > 1 else ''}"


@dataclass(frozen=True)
class Chosen:
    """The settings of a fit that depend on the data and the machine."""

    clusters: int
    """Object classes: one for about 16 images."""
    regions: int
    """Most regions that are kept of an image: no fewer than training takes."""
    vocabulary: int
    """Text classes."""
    config: str
    """Settings of training, a file of configs/."""
    ranks: int
    """Processes that train."""
    settings: dict[str, Any]
    """Settings of training that differ from the config's."""


@dataclass(frozen=True)
class Given:
    """What a fit may be told beside its images."""

    annotations: Path | str | None = None
    """Annotation file: boxes or masks in place of proposals, which also score the encoder."""
    init: Path | str | None = None
    """HuggingFace folder of an encoder to begin with."""
    config: Path | str | None = None
    """Settings of training that go before those that are chosen."""


def choose(images: int, machine: Machine) -> Chosen:
    """Settings for so many images on a machine: its size fits the machine, the passes over them their number.

    Raises:
        UserError: There are too few images.
    """
    if images < FEWEST:
        raise UserError(f"{images} images are too few to learn from; give at least {FEWEST}")
    clusters = min(2 ** max(2, round(images / 16).bit_length() - 1), 2**20)
    vocabulary = 384 if images < 5_000 else 4_096 if images < 100_000 else 32_000
    # A hundred passes over ten thousand images, 32 over a million: those of configs/own_images.md.
    passes = min(100.0, max(10.0, 1000 / images**0.25))
    config = "vit_b16_1gpu.yaml" if machine.gpus else "demo.yaml"
    recipe = read_file(RunConfig(), home("configs") / config)
    batch, most = recipe.train.global_batch, 100_000 if machine.gpus else recipe.train.steps
    steps = min(most, max(200, round(passes * images / batch)))
    # Powers of two divide the batch.
    ranks = 2 ** (min(machine.gpus or machine.cores // 2, 8).bit_length() - 1) if machine.cores > 1 else 1
    # A resolution begins after as great a share of the images as in the recipe.
    share = steps / recipe.train.steps
    stages = [
        {"image_size": one.image_size, "from_image": round(share * one.from_image / batch) * batch}
        for one in recipe.stages
    ]
    settings: dict[str, Any] = {
        "stages": stages,
        "train": {"steps": steps, "micro_batch": min(recipe.train.micro_batch, batch // ranks)},
        "optimizer": {"warmup_steps": max(1, min(1000, steps // 20))},
        "checkpoint": {"every": max(1, steps // 5)},
        "parallel": {"tensor": 1},
        "data": {"workers": max(1, (machine.cores - ranks) // ranks)},
    }
    if clusters <= SMALL:
        settings["head"] = {"object": {"sample_rate": 1.0}}
    # Some more than the default of training, which draws among them.
    regions = max(12, recipe.data.regions_per_image)
    return Chosen(clusters, regions, vocabulary, config, ranks, settings)


def fit(images: Path | str, out: Path | str, given: Given | None = None, dry_run: bool = False) -> Path:
    """Curate images, train on them, score and export the encoder; gives the folder that AutoModel loads.

    Every step is one of the project's commands, printed before it runs; what is done is skipped.

    Raises:
        UserError: A step fails; it has said why.
    """
    images, out, given = str(images), Path(out), given or Given()
    listing = ["--images", images, "--out", str(out / "data")]
    if given.annotations is not None:
        listing += ["--annotations-file", str(given.annotations)]
    _run("list", [*_tool("curate"), *listing, "--stage", "list"], quiet=True)
    summary, machine = read_json(out / "data" / SUMMARY), _machine()
    count = summary["files"] - summary["duplicates"]
    chosen = choose(count, machine)
    if given.init is not None:
        # Those of configs/own_images.md; the encoder has a size of its own.
        chosen.settings["optimizer"] |= {"lr": 1e-4, "layer_decay": 0.8}
        chosen.settings["stages"] = []
    write_text(out / "fit.yaml", yaml.safe_dump(chosen.settings))
    rows = [
        ("images", f"{count:,}"),
        ("machine", str(machine)),
        ("classes", f"{chosen.clusters:,} of objects, {chosen.vocabulary:,} of text"),
        ("training", f"{chosen.settings['train']['steps']:,} steps, {chosen.config}, {chosen.ranks} ranks"),
    ]
    print(f"\n{aligned(rows, left=(0, 1))}")
    for name, command in _steps(images, out, listing, chosen, given):
        if dry_run:
            print(f"\n# {name}\n{_shown(command)}")
            continue
        if name == "export":
            shutil.rmtree(out / "encoder", ignore_errors=True)
        _run(name, command)
    if not dry_run:
        print(f"\nencoder   AutoModel.from_pretrained({str(out / 'encoder')!r}, trust_remote_code=True)")
        print(f"labels    {out / 'atlas' / 'index.html'}")
        if given.annotations is None:
            how = f"megaregion evaluate {out / 'run'} --annotations FILE --images {images}"
            print(f"score     none, as no truth was given; with one: {how}")
    return out / "encoder"


def _steps(
    images: str, out: Path, listing: list[str], chosen: Chosen, given: Given
) -> Iterator[tuple[str, list[str]]]:
    """Name and command of every step after the list, in order."""
    data, trained = out / "data", out / "run"
    labels = ["--clusters", str(chosen.clusters), "--vocab", str(chosen.vocabulary)]
    yield "curate", [*_tool("curate"), *listing, *labels, "--max-regions", str(chosen.regions)]
    yield "judge the labels", [*_tool("curate"), "report", "--out", str(data)]
    yield "atlas", [*_tool("atlas"), str(data), "--out", str(out / "atlas")]
    configs: list[object] = [home("configs") / chosen.config, out / "fit.yaml"]
    begin = []
    if given.init is not None:
        start = out / f"start-{Path(given.init).name}"
        if not start.is_dir():
            yield "start", [*_tool("convert"), "from-hf", str(given.init), str(start)]
        configs, begin = [*configs, start / "model.yaml"], ["--init", str(start)]
    configs += [] if given.config is None else [given.config]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(chosen.ranks)]
    yield "train", [
        *(many if chosen.ranks > 1 else []), *_tool("train"),
        *(word for config in configs for word in ("--config", str(config))), *begin,
        "--data.path", str(data / "shards"), "--output", str(out), "--name", "run", "--resume", "auto",
    ]  # fmt: skip
    if given.annotations is not None:
        known = ["--annotations", str(given.annotations), "--images", images]
        yield "score", [*_tool("evaluate"), str(trained), *known]
    yield "export", [*_tool("convert"), "to-hf", str(trained), str(out / "encoder"), "--regions", "--check"]


def _machine() -> Machine:
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Machine(cores, torch.cuda.device_count())


def _shown(command: list[str]) -> str:
    """A command as a person types it here."""
    return shlex.join(["python", *(word.removeprefix(f"{Path.cwd()}/") for word in command)])


def _run(name: str, command: list[str], quiet: bool = False) -> None:
    print(f"\n== {name} ==\n$ {_shown(command)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    told = subprocess.DEVNULL if quiet else None
    code = subprocess.run([sys.executable, *command], env=environment, stdout=told, check=False).returncode
    if code:
        raise UserError(f"stopped in step '{name}' (exit code {code}); see above, and start again to go on")


if __name__ == "__main__":
    main()
