"""A pretend cluster whose nodes have networks of their own: one can be cut off while its ranks run on.

    controller, submitter        10.213.77.1 on a bridge
    node n1 .. n9                10.213.77.11 .. 19, each in a network namespace, on one end of a veth pair

Taking the bridge's end of a pair down is pulling the cable: what runs on the node does not notice, until it
wants to reach somebody else. Needs root and iproute2's ip.
"""

from __future__ import annotations

import contextlib
import os
import subprocess

from pretend_cluster import NODES, PretendCluster

SUBNET = "10.213.77"


class IslandCluster(PretendCluster):
    """Nine nodes in network namespaces behind one bridge."""

    controller = f"{SUBNET}.1"
    _mark = f"mr{os.getpid() % 10_000}"

    def start(self) -> None:
        """Lay the cables, then start every daemon."""
        _ip("link", "add", self._mark, "type", "bridge")
        _ip("addr", "add", f"{self.controller}/24", "dev", self._mark)
        _ip("link", "set", self._mark, "up")
        for number in range(1, NODES + 1):
            self._lay_cable(number)
        super().start()

    def stop(self) -> None:
        """Stop every daemon, then take the networks away."""
        super().stop()
        for number in range(1, NODES + 1):
            with contextlib.suppress(subprocess.SubprocessError):
                _ip("netns", "del", self._space(f"n{number}"))
        with contextlib.suppress(subprocess.SubprocessError):
            _ip("link", "del", self._mark)

    def cut(self, node: str) -> None:
        """Pull a node's cable."""
        _ip("link", "set", self._cable(node), "down")

    def mend(self, node: str) -> None:
        """Plug a node's cable in again."""
        _ip("link", "set", self._cable(node), "up")

    def address(self, number: int) -> str:
        """Address of node n<number>."""
        return f"{SUBNET}.{10 + number}"

    def _inside(self, node: str) -> list[str]:
        # Not `ip netns exec`, which mounts a /sys of its own, without the cgroups that slurmd looks for.
        return ["nsenter", f"--net=/run/netns/{self._space(node)}"]

    def _space(self, node: str) -> str:
        return f"{self._mark}-{node}"

    def _cable(self, node: str) -> str:
        return f"{self._mark}-c{node}"

    def _lay_cable(self, number: int) -> None:
        space, cable = self._space(f"n{number}"), self._cable(f"n{number}")
        _ip("netns", "add", space)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", cable, "master", self._mark, "up")
        for command in (
            ("addr", "add", f"{self.address(number)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", space, *command)


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True, timeout=30)
