"""A plan as tables that fit a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megaregion.models.costs import RECOMPUTE
from megaregion.planning.hardware import GIB
from megaregion.planning.plan import Plan
from megaregion.tables import aligned

if TYPE_CHECKING:
    from megaregion.planning.dry_run import DryRun


def text(
    stages: Sequence[Plan],
    best: Sequence[Plan],
    scaled: Sequence[Plan],
    ran: DryRun | None = None,
) -> str:
    """Everything that was planned.

    Args:
        stages: The run's resolutions.
        best: The best choices for the first of them.
        scaled: The first of them on more and fewer ranks.
        ran: One rank beside its plan.
    """
    texts = [plan_text(stages[0])]
    texts += [_stages(stages)] if len(stages) > 1 else []
    texts += [_choices(best, stages[0])] if best else []
    texts += [_scaling(scaled)] if scaled else []
    texts += [ran.text()] if ran else []
    return "\n\n".join(texts)


def values(
    stages: Sequence[Plan],
    best: Sequence[Plan],
    scaled: Sequence[Plan],
    ran: DryRun | None = None,
) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "plan": plan_values(stages[0]),
        "stages": [plan_values(plan) for plan in stages],
        "choices": [plan_values(plan) for plan in best],
        "scaling": [plan_values(plan) for plan in scaled],
        **(ran.values() if ran else {"dry_run": None, "gpu_step": None}),
    }


def plan_text(plan: Plan) -> str:
    """Head line, assumptions, memory, time and traffic of one plan."""
    parts = [_head(plan), _assumptions(plan), _memory(plan), _time(plan), _traffic(plan), _totals(plan)]
    return "\n\n".join(parts)


def _choices(plans: Sequence[Plan], own: Plan) -> str:
    """The best choices below each other, and the config's own for comparison."""
    head = (
        "choice", "tensor", "sequence", "data", "ZeRO", "micro-batch", "recompute", "GiB", "s/step", "img/s",
        "MFU",
    )  # fmt: skip
    rows = [_choice(str(number), plan) for number, plan in enumerate(plans, 1)]
    return "best of the legal choices\n" + _rows([head, *rows, _choice("config", own)])


def _stages(plans: Sequence[Plan]) -> str:
    """The run's resolutions below each other, and their sum."""
    head = ("pixels", "micro-batch", "recomputed", "GiB", "s/step", "img/s", "MFU", "samples", "hours")
    rows = [
        (
            str(plan.layout.config.model.image_size),
            f"{plan.layout.micro_steps} x {plan.layout.micro_batch}",
            _recomputed(plan),
            f"{plan.memory.peak / GIB:.1f}{'' if plan.fits else '!'}",
            f"{plan.time.total:.3f}",
            f"{plan.images_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.samples:,}",
            f"{plan.days * 24:,.1f}",
        )
        for plan in plans
    ]
    samples, days = sum(plan.samples for plan in plans), sum(plan.days for plan in plans)
    total = ("all", "", "", "", "", "", "", f"{samples:,}", f"{days * 24:,.1f}")
    hours = sum(plan.gpu_hours for plan in plans)
    return (
        "resolutions\n"
        + _rows([head, *rows, total])
        + f"\n  {days:.2f} days, {hours:,.0f} GPU-hours, faults included"
    )


def _scaling(plans: Sequence[Plan]) -> str:
    """Weak scaling as a table; efficiency is per GPU, against the first line."""
    head = ("GPUs", "batch", "GiB", "s/step", "img/s", "efficiency", "comm", "head", "goodput", "days")
    rows = []
    for plan in plans:
        phases, total = plan.time.phases, plan.time.total
        rows.append(
            (
                f"{plan.hardware.gpus:,}",
                f"{plan.layout.config.train.global_batch:,}",
                f"{plan.memory.peak / GIB:.1f}",
                f"{total:.3f}",
                f"{plan.images_per_second:,.0f}",
                f"{efficiency(plan, plans[0]):.1%}",
                f"{phases['communication'] / total:.1%}",
                f"{phases['head'] / total:.1%}",
                f"{plan.goodput:.2%}",
                f"{plan.days:.2f}",
            )
        )
    return "weak scaling: the same images a rank, the same samples in all\n" + _rows([head, *rows])


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
        "parameters": layout.body.on_rank(1),
        "memory": {
            "kinds": plan.memory.kinds,
            "moments": plan.memory.moments,
            "peak": plan.memory.peak,
            "usable": plan.hardware.usable_bytes,
        },
        "time": {"phases": plan.time.phases, "links": plan.time.links, "step": plan.time.total},
        "traffic": {
            one.name: {"sent": one.sent, "network": one.network(plan.hardware, layout.tensor)}
            for one in plan.transfers
        },
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
        f"  ViT {layout.body.on_rank(1) / 1e6:,.0f}M, {model.image_size} px, patch {model.patch_size}, "
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
    starts, head = plan.time.notes["head_kernels"], plan.time.phases["head"]
    if starts >= head > 0.05 * total:
        text += (
            "\n  note: the head waits for the host to start its kernels: one set for each draw"
            "\n  (head.draw_images) and for each tile of scores (heads/portions.py)"
        )
    return text


def _traffic(plan: Plan) -> str:
    hardware, tensor = plan.hardware, plan.layout.tensor
    rows = [("per step", "each GPU sends", "each node sends", "links busy")]
    rows += [
        (
            one.name,
            f"{one.sent / 1e6:,.0f} MB",
            f"{one.network(hardware, tensor) / 1e6:,.0f} MB",
            f"{1e3 * plan.time.links[one.name]:.1f} ms",
        )
        for one in plan.transfers
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


def _choice(name: str, plan: Plan) -> tuple[str, ...]:
    config, layout = plan.layout.config, plan.layout
    return (
        name,
        str(layout.tensor),
        "yes" if config.parallel.tokens_cut else "no",
        str(layout.data),
        str(config.parallel.zero_stage),
        str(layout.micro_batch),
        "yes" if config.train.recompute else "no",
        f"{plan.memory.peak / GIB:.1f}{'' if plan.fits else '!'}",
        f"{plan.time.total:.3f}",
        f"{plan.images_per_second:,.0f}",
        f"{plan.mfu:.1%}",
    )


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return aligned(rows, indent="  ")
