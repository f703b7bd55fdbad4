"""The table of uses: every row is right, and the check finds what is wrong."""

import dataclasses
import importlib.util
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import EvolutionStrategy, LowRank
from eggroll.experiments.uses.__main__ import Config, main, make_row
from eggroll.experiments.uses.check import ROLES, WEAK, check, compare_output, quiet
from eggroll.experiments.uses.report import Row, markdown, summarise
from eggroll.experiments.uses.table import COMPARED, FAMILIES, USES, select
from eggroll.experiments.uses.use import Draw, Program, Sizes, draw, measure
from eggroll.noise.leaves import FrozenLeaf
from eggroll.population.members import Population
from tests.tables import by_default

SMALL = Sizes(rows=4, width=8)
KNOWN_FAULTS: set[str] = set()
BY_DEFAULT = [  # from every family, of every role
    "int8 weights, multiplied as integers",
    "conv depthwise",
    "w[ids, ids]",
    "cond on the member",
    "w * exp(s)",
    "merged adapter, x @ (w + a @ b)",
    "RNN with a learnt initial state in the carry",
    "inner gradient step on parameters",
    "equinox GRUCell",
]


def found(program, members=16):
    return check(program, members=members, perturbation=LowRank(1))


@pytest.mark.filterwarnings("default")  # of other packages
@pytest.mark.parametrize("name", by_default(USES, *BY_DEFAULT))
def test_use_is_right(name):
    """Low-rank, dense or refused, no worse than expected; a known fault that is mended leaves the list."""
    use = USES[name]
    if not use.is_installed:
        pytest.skip(f"{use.package} is not installed")
    with quiet():
        program = use.make(SMALL)
    finding = found(program)
    assert (finding.role == "wrong") == (name in KNOWN_FAULTS), finding
    assert name in KNOWN_FAULTS or ROLES.index(finding.role) >= ROLES.index(use.expected), finding


def test_table_is_large_and_its_names_are_distinct():
    assert len(USES) == sum(len(family.USES) for family in FAMILIES.values()) >= 150
    assert sum(use.package is not None for use in USES.values()) >= 12
    assert {*COMPARED, *KNOWN_FAULTS} <= {*USES}
    assert {use.expected for use in USES.values()} <= {*ROLES} - {"wrong"}


LINEAR = Program(lambda p, x: x @ p["w"], draw({"w": "n n"}, SMALL, weights=True), draw("b n", SMALL, weights=False))


def test_unperturbed_results_are_wrong(monkeypatch):
    def unperturbed(population, function, batch):
        return jnp.stack([function(LINEAR.params, batch)] * population.size)

    monkeypatch.setattr(Population, "apply", unperturbed)
    finding = found(LINEAR)
    assert finding.role == "wrong" and finding.error == 1.0 and finding.tolerance < 1e-4


def test_a_program_that_shows_nothing_is_wrong():
    hidden = found(LINEAR._replace(function=lambda p, x: x + 0.0 * jnp.sum(x @ p["w"])))
    assert hidden.role == "wrong" and hidden.note == "the check has no power: no output is perturbed"
    coarse = found(LINEAR._replace(function=lambda p, x: x @ p["w"] + 1e7))
    assert coarse.role == "wrong" and coarse.note.startswith("the check has no power: rounding alone explains")


def test_one_unperturbed_member_is_wrong(monkeypatch):
    apply = Population.apply
    monkeypatch.setattr(Population, "apply", lambda own, f, x: apply(own, f, x).at[3].set(f(LINEAR.params, x)))
    assert found(LINEAR).role == "wrong"


@pytest.mark.parametrize(
    ("error", "role"),
    [
        (ValueError("parameter 'w' is used in a way that has no rule"), "refused"),
        (TypeError("int8 parameter 'w' is not a float"), "refused"),
        (ValueError("shapes do not fit: 'w'"), "wrong"),
        (ValueError("parameter 'v' is used in a way that has no rule"), "wrong"),
        (RuntimeError("parameter 'w' is used in a way that has no rule"), "wrong"),
        (ValueError("parameter 'w' " + "has a long dump " * 40), "wrong"),
    ],
)
def test_an_error_is_a_refusal_if_it_is_clear(error, role, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(Population, "apply", fail)
    assert found(LINEAR).role == role


def test_a_parameter_that_is_used_but_frozen_is_wrong(monkeypatch):
    plan = EvolutionStrategy.plan

    def missed(es, *args, **kwargs):
        true = plan(es, *args, **kwargs)
        frozen = [FrozenLeaf(leaf.path, leaf.shape, leaf.dtype, leaf.spec, "not used by the function") for leaf in true.leaves]
        return dataclasses.replace(true, leaves=(true.leaves[0], *frozen[1:]))

    program = LINEAR._replace(params={"a": jnp.eye(8), "w": LINEAR.params["w"]})
    both = program._replace(function=lambda p, x: x @ p["w"] + x @ p["a"])
    assert found(both).role == "low-rank"
    monkeypatch.setattr(EvolutionStrategy, "plan", missed)
    assert "'w' is silently unperturbed" in found(both).note
    assert found(program._replace(function=lambda p, x: x @ p["a"])).role == "low-rank"  # it has no effect


def test_outputs_are_compared_by_hand():
    start, truth = np.zeros((1, 2), np.float32), np.array([[1.0, -2.0]], np.float32)
    nearby = truth[None] * np.float32(1.001)
    error, tolerance = compare_output(np.array([[1.0, -1.5]], np.float32), truth, nearby, start, 1e-7)
    assert error == 0.25 and tolerance == pytest.approx(8 * 0.002 / 2, rel=1e-3)
    assert compare_output(truth[:, :1], truth, nearby, start, 1e-7)[0] == math.inf
    nan = np.where(truth > 0, np.float32(np.nan), truth)
    assert compare_output(nan, nan, nan[None], start, 1e-7)[0] == 0.0
    assert compare_output(truth, nan, nan[None], start, 1e-7)[0] == math.inf


def test_integers_may_differ_at_ties_only():
    start, truth, output = np.array([[0, 0]]), np.array([[3, 1]]), np.array([[2, 1]])
    assert compare_output(output, truth, truth[None], start, 0.0) == (1 / 3, 0.0)
    assert compare_output(output, truth, np.array([[[2, 1]]]), start, 0.0) == (0.0, 0.0)


def test_shapes_are_words():
    words = {"n": 8, "2n": 16, "n/4": 2, "9n/4": 18, "b": 4, "2b": 8, "5": 5}
    assert {word: measure(word, SMALL) for word in words} == words
    tree = draw({"w": "n 2n", "i": Draw("b", "int32", below="n")}, SMALL, weights=True)
    assert tree["w"].shape == (8, 16) and tree["i"].max() < 8
    assert np.std(tree["w"]) == pytest.approx(0.5 * 8**-0.5, rel=0.3)


def test_uses_are_chosen_by_name_family_or_glob():
    assert select("") == [*USES]
    assert select("conv*")[0] == "conv 1d" and "jnp.convolve with a learnt filter" not in select("conv*")
    assert "jnp.convolve with a learnt filter" in select("conv")
    assert {use.name for use in FAMILIES["loops"].USES} <= {*select("loops")}
    with pytest.raises(ValueError, match="only must match"):
        select("no such use")


def test_rows_are_counted_and_shown():
    finding = found(LINEAR, members=4)
    rows = [Row("x @ w", finding, 0.912), Row("jraph GraphNetwork", None)]
    summary = summarise(rows)
    assert (summary["uses"], summary["right"], summary["low_rank"], summary["skipped"]) == (2, 1, 1, 1)
    text = markdown(rows, {"x @ w": {"low-rank": 0.9, "dense": 0.01}})
    assert "| products | x @ w | low-rank |" in text and "| 0.91 |" in text and "| x @ w | 0.90 | 0.010 |" in text


def test_a_missing_package_is_skipped(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_row("haiku MLP", Config(timing=False)).role == "skipped"


@pytest.mark.parametrize("option", ["--members=3", "--size=12", "--rank=0", "--only=nothing of this name"])
def test_wrong_options_are_refused(option, tmp_path):
    with pytest.raises(SystemExit, match="error: "):
        main([option, f"--folder={tmp_path}/run"])


@pytest.mark.slow
def test_command_ends_with_json(tmp_path, capsys):
    main(["--only", "w ? exp(s)", "--members", "4", "--size", "16", "--rows", "4", "--folder", str(tmp_path / "run")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["uses"] == last["right"] == 1 and last["wrong_names"] == []
    written = json.loads((tmp_path / "run" / "uses.json").read_text())
    assert written["uses"][0]["ratio"] > 0 and written["uses"][0]["error"] < WEAK
    assert {*written["comparisons"]["w * exp(s)"]} == {"low-rank", "dense", "low-rank generation", "dense generation"}
    assert "| views | w * exp(s) |" in (tmp_path / "run" / "uses.md").read_text()
