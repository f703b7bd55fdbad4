"""Tables of several axes: by default as many rows as cover every pair of values, the rest of the product at night."""

import itertools

import pytest


def covering(*axes, strength=2):
    """Return rows for `parametrize`: the product of the axes, where rows that cover no new `strength` values are slow.

    With `strength=1` every value of every axis is in some row of the default suite, with 2 every pair of values of two axes is.
    """

    def covers(row):
        return {*itertools.combinations(enumerate(row), strength)}

    rows = [*itertools.product(*(range(len(axis)) for axis in axes))]
    missing, chosen = set().union(*map(covers, rows)), set()
    while missing:
        best = max(rows, key=lambda row: len(covers(row) & missing))
        missing -= covers(best)
        chosen.add(best)
    values = [[*axis] for axis in axes]
    return [
        pytest.param(
            *(own[index] for own, index in zip(values, row, strict=True)), marks=[] if row in chosen else [pytest.mark.slow]
        )
        for row in rows
    ]


def slow(*values):
    """A slow row of a table."""
    return pytest.param(*values, marks=pytest.mark.slow)


def by_default(names, *chosen):
    """Return rows for `parametrize`: all `names`, of which those that are not chosen are slow."""
    names = [*names]
    assert {*chosen} <= {*names}
    return [name if name in chosen else slow(name) for name in names]
