"""Stage publish: dataset.json and the label files, which make the shards a dataset."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from typing_extensions import override

from megaregion.curation.stage import Stage
from megaregion.curation.stages.cluster import CENTERS
from megaregion.curation.stages.pack import ENTRY, Pack
from megaregion.curation.stages.tokenizer import MODEL
from megaregion.curation.store import Output, Piece
from megaregion.data.info import CENTERS_NAME, INFO_NAME, TOKENIZER_NAME, ShardEntry, load_tokenizer
from megaregion.data.writer import write_dataset
from megaregion.errors import UserError


class Publish(Stage):
    """Writes shards/dataset.json, centers.npy and, if there is text, tokenizer.model."""

    name = "publish"
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        return {}

    @override
    def needs(self, number: int) -> list[Piece]:
        packed = [Piece("pack", piece) for piece in range(Pack(self.job).pieces())]
        return [*packed, Piece("cluster", 0), Piece("tokenizer", 0)]

    @override
    def work(self, number: int, output: Output) -> None:
        *packed, cluster, tokenizer = self.needs(number)
        entries = [json.loads(self.path(piece, ENTRY).read_bytes()) for piece in packed]
        shards = [ShardEntry(**entry) for entry in entries if entry is not None]
        if not shards:
            raise UserError(
                "no image has a region that can be labelled; loosen --min-edge or --min-objectness"
            )
        self._remove_others({shard.name for shard in shards})
        centers, model = self.path(cluster, CENTERS), self.path(tokenizer, MODEL)
        text = any(shard.texts for shard in shards)
        info = write_dataset(
            self.job.shards,
            shards,
            object_classes=len(np.load(centers, mmap_mode="r", allow_pickle=False)),
            text_classes=load_tokenizer(model).get_piece_size() if text else 0,
            centers=centers,
            tokenizer=model if text else None,
        )
        output.counts["samples"] = info.samples
        for name in (INFO_NAME, CENTERS_NAME, *([TOKENIZER_NAME] if text else [])):
            output.adopt(self.job.shards / name)
        output.tick()

    def _remove_others(self, names: set[str]) -> None:
        """Remove shards that a run with other settings left, and what a killed one had begun."""
        for path in self.job.shards.glob("shard-*"):
            if path.name.split(".")[0] not in names:
                path.unlink()
        for path in self.job.shards.glob(".shard-*.partial"):
            path.unlink()
