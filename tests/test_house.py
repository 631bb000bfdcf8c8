"""The house does not grow unseen: each of its numbers has a ceiling."""

from __future__ import annotations

import pytest
from house import CEILINGS, GOALS, read_house

FIGURES = read_house().figures()


@pytest.mark.parametrize("name", GOALS)
def test_a_figure_of_the_house_is_below_its_ceiling(name: str) -> None:
    assert FIGURES[name] <= CEILINGS[name], "make it smaller; `python tests/house.py` names the worst places"
