"""The whole path in small: every step of `make demo` with fewer scenes and steps, by the same commands."""

from __future__ import annotations

import json
from pathlib import Path

from launch import tool

from megaregion.schemas.evaluation import read_evaluation

SETTINGS = """
model: {image_size: 64, patch_size: 16, width: 32, depth: 2, heads: 2, mlp_width: 64, region_layers: 1}
data: {regions_per_image: 4, workers: 1}
head: {embedding_dim: 16, draw_images: 8, object: {sample_rate: 0.5}}
optimizer: {warmup_steps: 1}
train: {steps: 6, global_batch: 8, micro_batch: 4, precision: fp32}
checkpoint: {every: 100}
"""


def test_images_become_an_encoder_that_transformers_loads(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SETTINGS)
    run = tmp_path / "runs" / "small"
    done = tool(
        "tools/demo.py", "--data", tmp_path / "data", "--run", run, "--config", config,
        "--train-scenes", 56, "--test-scenes", 10, "--first-steps", 4, "--gate", -1, forks=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 ranks: tensor 2 x data 2" in done.stdout
    assert "resumed from" in done.stdout
    assert "MLCDVisionModel {'last_hidden_state': (4, 17, 32), 'pooler_output': (4, 32)}" in done.stdout

    evaluation = read_evaluation(run / "evaluation.json")
    summary = evaluation.table("summary")
    assert set(summary.rows) == {"trained", "untrained", "pixels", "curation"}
    knn = {encoder: summary.rows[encoder]["region_knn"] for encoder in summary.rows}
    assert all(share is not None and 0 <= share.mean <= 1 for share in knn.values())
    assert knn["curation"].mean > knn["untrained"].mean
    assert summary.rows["pixels"]["ocr_recall_at_5"] is None
    assert 0 <= {column.key: column.chance for column in summary.columns}["ocr_recall_at_5"] <= 1
    assert evaluation.test_regions > 0
    assert evaluation.seconds["demo: total"] > 0
    assert evaluation.demo_peak_memory_bytes > 200e6, "four ranks alone need more"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "<html" in (run / "report.html").read_text()
