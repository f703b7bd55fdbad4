"""The figure of a run: what is on which axis."""

import pytest

from eggroll.runs.plot import plot_history

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch):
    """The figures instead of their files."""
    found = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **options: found.append(figure))
    return found


def row(generation, **more):
    numbers = {"mean_fitness": 20.0, "best_fitness": 50.0, "std_fitness": 5.0, "gradient_norm": 0.1, "tied_pairs": 0.5}
    return {"generation": generation, "env_steps": 250_000.0 * (generation + 1), **numbers, **more}


def test_steps_are_on_the_x_axis_and_nothing_else_is_drawn_as_fitness(drawn, tmp_path):
    rows = [row(0), row(1, held_out_return=30.0, held_out_minus_mean=10.0), row(2, mean_fitness=None), row(3)]
    plot_history(rows, tmp_path / "x.png", x="env_steps", references={"random actions": 22.0})
    fitness, *panels, generations = drawn[0].axes
    assert [line.get_label() for line in fitness.lines] == ["best member", "mean", "held-out return", "random actions"]
    assert fitness.lines[2].get_xydata().tolist() == [[500_000, 30]] and fitness.get_ylim()[1] < 60
    assert fitness.lines[0].get_xdata().tolist() == [250_000, 500_000, 750_000, 1_000_000]
    assert [panel.get_ylabel() for panel in panels] == ["gradient norm", "tied pairs"]
    assert all(panel.get_xlabel() == "environment steps" for panel in panels)
    assert generations.get_xlabel() == "generation" and generations.get_xticks().tolist() == [
        250_000,
        500_000,
        750_000,
        1_000_000,
    ]
    assert [label.get_text() for label in generations.get_xticklabels()] == ["0", "1", "2", "3"]


def test_a_value_without_neighbours_is_a_point(drawn, tmp_path):
    plot_history([row(0), row(1), row(2, mean_fitness=None), row(3)], tmp_path / "x.png")
    best, mean = drawn[0].axes[0].lines
    assert (best.get_markevery(), mean.get_markevery()) == ([], [3]) and mean.get_marker() == "."


def test_what_a_run_does_not_have_is_not_in_the_legend(drawn, tmp_path):
    plot_history([row(0, best_fitness=None, std_fitness=None)], tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["mean"]


def test_generations_alone_need_no_second_axis(drawn, tmp_path):
    plot_history([row(0), row(1)], tmp_path / "x.png")
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["", "generation", "generation"]
    plot_history([], tmp_path / "x.png")
    assert len(drawn) == 1
