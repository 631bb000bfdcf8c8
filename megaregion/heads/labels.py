"""Labels of all data ranks on their way to this host, which draws classes from them.

Shapes: r rows on this rank, R rows over all data ranks, T columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.communication import RowsUnderWay
from megaregion.heads.targets import send
from megaregion.parallel.topology import NodeGroups


class LabelsUnderWay:
    """Labels of a micro-step's rows.

    What a GPU does for them is queued when they are sent, ahead of the encoder's pass: the host then waits
    while the GPU is busy with the pass. They come back by a stream of their own, since the pass need not
    wait for the other ranks.
    """

    def __init__(
        self,
        labels: Tensor,
        device: torch.device,
        group: dist.ProcessGroup,
        nodes: NodeGroups | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Send this rank's labels.

        Args:
            labels: On the host, [r, T].
            device: Where collectives run.
            group: The data ranks.
            nodes: The group by nodes, to go node by node.
            stream: The stream they come back by; None on a processor.
        """
        self._rows = RowsUnderWay(send(labels, device), group, nodes=nodes)
        self._stream = stream
        if stream is not None:
            with torch.cuda.stream(stream):
                # Held here, since the copy reads it later.
                self._arrived = self._rows.arrive()
                self._host = labels.new_empty(self._arrived.shape, pin_memory=True)
                self._host.copy_(self._arrived, non_blocking=True)

    def arrive(self) -> Tensor:
        """Wait for the labels of all data ranks, [R, T], on the host. Call it once."""
        if self._stream is None:
            return self._rows.arrive()
        self._stream.synchronize()
        return self._host
