"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drill import NODES, Drill
from pretend_cluster import pretend_cluster

pytest_plugins = ["sharing"]


@pytest.fixture(scope="session")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    with pretend_cluster() as cluster:
        yield Drill(cluster, folder)


@pytest.fixture(scope="session")
def undisturbed(drill: Drill) -> str:
    """A run that nothing happened to, started by torchrun on as many ranks; returns its name."""
    drill.torchrun("undisturbed", NODES)
    return "undisturbed"
