"""A plan as tables that fit a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megaregion.models.costs import RECOMPUTE
from megaregion.planning.hardware import GIB
from megaregion.planning.plan import Plan
from megaregion.schemas.evaluation import aligned


def text(stages: Sequence[Plan], best: Sequence[Plan], scaled: Sequence[Plan]) -> str:
    """The run's resolutions; of the first, the best choices, and more and fewer ranks."""
    plan = stages[0]
    texts = [_head(plan), _assumptions(plan), _memory(plan), _time(plan), _traffic(plan), _totals(plan)]
    texts += [_stages(stages)] if len(stages) > 1 else []
    texts += [_choices(best, plan)] if best else []
    texts += [_scaling(scaled)] if scaled else []
    return "\n\n".join(texts)


def values(stages: Sequence[Plan], best: Sequence[Plan], scaled: Sequence[Plan]) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "plan": plan_values(stages[0]),
        "stages": [plan_values(plan) for plan in stages],
        "choices": [plan_values(plan) for plan in best],
        "scaling": [plan_values(plan) for plan in scaled],
    }


COLUMNS: dict[str, Callable[[Plan], str]] = {
    "GPUs": lambda plan: f"{plan.hardware.gpus:,}",
    "batch": lambda plan: f"{plan.layout.config.train.global_batch:,}",
    "tensor": lambda plan: str(plan.layout.tensor),
    "sequence": lambda plan: "yes" if plan.layout.config.parallel.tokens_cut else "no",
    "data": lambda plan: str(plan.layout.data),
    "ZeRO": lambda plan: str(plan.layout.config.parallel.zero_stage),
    "pixels": lambda plan: str(plan.layout.config.model.image_size),
    "micro-batch": lambda plan: f"{plan.layout.micro_steps} x {plan.layout.micro_batch}",
    "recomputed": lambda plan: _recomputed(plan),
    "GiB": lambda plan: f"{plan.memory.peak / GIB:.1f}{'' if plan.fits else '!'}",
    "s/step": lambda plan: f"{plan.time.total:.3f}",
    "img/s": lambda plan: f"{plan.images_per_second:,.0f}",
    "MFU": lambda plan: f"{plan.mfu:.1%}",
    "comm": lambda plan: f"{plan.time.phases['communication'] / plan.time.total:.1%}",
    "head": lambda plan: f"{plan.time.phases['head'] / plan.time.total:.1%}",
    "goodput": lambda plan: f"{plan.goodput:.2%}",
    "days": lambda plan: f"{plan.days:.2f}",
    "samples": lambda plan: f"{plan.samples:,}",
    "hours": lambda plan: f"{plan.days * 24:,.1f}",
}
"""What tables of several plans show, by the columns' heads."""


def _table(plans: Sequence[Plan], names: str, **more: Sequence[str]) -> list[Sequence[str]]:
    """Plans below each other, with columns by name and further ones behind."""
    columns = {name: [COLUMNS[name](plan) for plan in plans] for name in names.split()} | more
    return [tuple(columns), *zip(*columns.values(), strict=True)]


def _choices(best: Sequence[Plan], own: Plan) -> str:
    """The best choices below each other, and the config's own for comparison."""
    names = "tensor sequence data ZeRO micro-batch recomputed GiB s/step img/s MFU"
    choices = ["choice", *(str(number) for number, _ in enumerate(best, 1)), "config"]
    rows = _table([*best, own], names)
    return "best of the legal choices\n" + _rows(
        [(choice, *row) for choice, row in zip(choices, rows, strict=True)]
    )


def _stages(plans: Sequence[Plan]) -> str:
    """The run's resolutions below each other, and their sum."""
    names = "pixels micro-batch recomputed GiB s/step img/s MFU samples hours"
    samples, days = sum(plan.samples for plan in plans), sum(plan.days for plan in plans)
    total = ("all", "", "", "", "", "", "", f"{samples:,}", f"{days * 24:,.1f}")
    hours = sum(plan.gpu_hours for plan in plans)
    return (
        f"resolutions\n{_rows([*_table(plans, names), total])}\n"
        f"  {days:.2f} days, {hours:,.0f} GPU-hours, faults included"
    )


def _scaling(plans: Sequence[Plan]) -> str:
    """Weak scaling as a table; efficiency is per GPU, against the first line."""
    names = "GPUs batch GiB s/step img/s comm head goodput days"
    rows = _table(plans, names, efficiency=[f"{efficiency(plan, plans[0]):.1%}" for plan in plans])
    return "weak scaling: the same images a rank, the same samples in all\n" + _rows(rows)


def efficiency(plan: Plan, first: Plan) -> float:
    """Images per second and GPU, as a share of another plan's."""
    alone = first.images_per_second / first.hardware.gpus
    return plan.images_per_second / plan.hardware.gpus / alone


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan's numbers for JSON: bytes, seconds, shares."""
    layout = plan.layout
    return {
        "name": layout.config.name,
        "cluster": dataclasses.asdict(plan.hardware),
        "labels": dataclasses.asdict(layout.labels),
        "tensor": layout.tensor,
        "sequence": layout.config.parallel.tokens_cut,
        "data": layout.data,
        "zero_stage": layout.zero_stage,
        "image_size": layout.config.model.image_size,
        "recompute": layout.config.train.recompute,
        "levels": {level: layout.recompute.count(level) for level in RECOMPUTE},
        "micro_batch": layout.micro_batch,
        "micro_steps": layout.micro_steps,
        "global_batch": layout.config.train.global_batch,
        "parameters": layout.all_parameters,
        "memory": {
            "kinds": plan.memory.kinds,
            "moments": plan.memory.moments,
            "peak": plan.memory.peak,
            "usable": plan.hardware.usable_bytes,
        },
        "time": {
            "phases": plan.time.phases,
            "links": {one.name: one.seconds for one in plan.time.transfers},
            "step": plan.time.total,
        },
        "traffic": {one.name: {"sent": one.sent, "network": one.network} for one in plan.time.transfers},
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "goodput": plan.goodput,
        "samples": plan.samples,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
    }


def _head(plan: Plan) -> str:
    config, layout, hardware = plan.layout.config, plan.layout, plan.hardware
    model, cut = config.model, ", tokens cut," if layout.spread > 1 else ""
    return (
        f"{config.name} on {hardware.name}: {hardware.gpus} ranks on {hardware.nodes} nodes\n"
        f"  ViT {layout.all_parameters / 1e6:,.0f}M, {model.image_size} px, patch {model.patch_size}, "
        f"{config.data.regions_per_image} regions, {config.train.precision}\n"
        f"  tensor {layout.tensor}{cut} x data {layout.data}, ZeRO {layout.zero_stage}, "
        f"recompute {_recomputed(plan)}, batch {config.train.global_batch:,} = "
        f"{layout.data} x {layout.micro_steps} x {layout.micro_batch}"
    )


def _recomputed(plan: Plan) -> str:
    counts = {level: plan.layout.recompute.count(level) for level in ("cheap", "full")}
    told = [f"{count} {level}" for level, count in counts.items() if count]
    return ", ".join(told) or "nothing"


def _assumptions(plan: Plan) -> str:
    hardware, labels = plan.hardware, plan.layout.labels
    lines = [
        f"{labels.object_classes:,} object and {labels.text_classes:,} text classes, "
        f"{labels.text_share:.0%} of regions text ({labels.source})",
        f"products {hardware.matrix_tflops:g} TFLOP/s, of which linears reach {hardware.linear_share:.0%}, "
        f"attention {hardware.attention_share:.0%}; memory {hardware.memory_gbytes:,.0f} GB/s",
        f"collectives {hardware.inside_gbytes:g} GB/s inside a node, {hardware.across_gbytes:g} between "
        f"nodes, {hardware.latency_us:g} us each; a kernel {hardware.launch_us:g} us of the host",
        f"loader {hardware.decode_images:g} images/s a process, {plan.layout.config.data.workers} processes "
        f"a rank; storage reads {hardware.read_gbytes:g} and writes {hardware.write_gbytes:g} GB/s",
        f"{hardware.reserve_gib:g} of {hardware.memory_gib:g} GiB kept for driver, NCCL and gaps; draws of "
        f"negatives over {plan.layout.config.head.draw_images or 'all'} images",
        "faults at Llama 3's rate (419 in 54 days on 16,384 GPUs), 4 minutes from each to the next step",
    ]
    if path := plan.layout.config.distill.teacher:
        one = plan.layout.teacher
        counted = f"{one.parameters / 1e6:,.0f}M, {one.flops / 1e9:,.3g} GFLOP an image, forward alone"
        lines.append(f"teacher {path}: {counted if one.width else 'not counted, it cannot be read here'}")
    return "assumed (plan.py run --help, configs/clusters/)\n" + "\n".join(f"  {line}" for line in lines)


def _memory(plan: Plan) -> str:
    memory = plan.memory
    rows = [
        (kind, f"{size / GIB:.2f} GiB", f"{size / memory.peak:.0%}") for kind, size in memory.kinds.items()
    ]
    verdict = "fits" if plan.fits else f"{plan.over:.1f} GiB TOO MUCH"
    rows.append(("peak", f"{memory.peak / GIB:.2f} GiB", ""))
    usable = plan.hardware.usable_bytes / GIB
    head = f"memory of a rank, greatest in: {memory.when} ({verdict}; {usable:.1f} GiB usable)"
    return f"{head}\n{_rows(rows)}"


def _time(plan: Plan) -> str:
    total = plan.time.total
    rows = [(name, f"{1e3 * part:.1f} ms", f"{part / total:.1%}") for name, part in plan.time.phases.items()]
    rows.append(("step", f"{1e3 * total:.1f} ms", f"MFU {plan.mfu:.1%}"))
    text = "time of a step\n" + _rows(rows)
    if muon := plan.time.notes.get("muon"):
        text += f"\n  the optimizer with muon's {muon / 1e12:.3g} TFLOP over all ranks"
    starts, head = plan.time.notes["head_kernels"], plan.time.phases["head"]
    if starts >= head > 0.05 * total:
        text += (
            "\n  note: the head waits for the host to start its kernels: one set for each draw"
            "\n  (head.draw_images) and for each tile of scores (heads/tiles.py)"
        )
    return text


def _traffic(plan: Plan) -> str:
    rows = [("per step", "each GPU sends", "each node sends", "links busy")]
    rows += [
        (one.name, f"{one.sent / 1e6:,.0f} MB", f"{one.network / 1e6:,.0f} MB", f"{1e3 * one.seconds:.1f} ms")
        for one in plan.time.transfers
    ]
    notes = plan.time.notes
    rows.append(("shards read", "", f"{notes['images_read'] / 1e6:,.0f} MB", ""))
    every = plan.layout.config.checkpoint.every
    return (
        "traffic\n"
        + _rows(rows)
        + f"\n  a save every {every:,} steps stops training {notes['save_blocks']:.2f} s and is on the disk "
        f"after {notes['save_writes']:.1f} s"
    )


def _totals(plan: Plan) -> str:
    return (
        f"{plan.images_per_second:,.0f} images/s; {plan.samples:,} samples take {plan.days:.2f} days "
        f"({plan.days * 24:,.1f} hours), {plan.gpu_hours:,.0f} GPU-hours, {1 - plan.goodput:.2%} of it "
        "lost to faults"
    )


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return aligned(rows, indent="  ")
