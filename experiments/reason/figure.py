"""The picture of a reasoning run: reward of training and accuracy on validation problems against seconds of training."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.tuning import read_metrics


def draw(folder: Path) -> None:
    """Draw `curves.png` from the folder's `metrics.jsonl`."""
    rows = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    trained = [row for row in rows if row.get("mean_fitness") is not None]
    seconds, rewards = ([row[name] for row in trained] for name in ("seconds_spent", "mean_fitness"))
    axes.plot(seconds, rewards, color="tab:blue", alpha=0.5, linewidth=0.9, label="reward in training")
    checked = [row for row in rows if row.get("validation_accuracy") is not None]
    at, accuracies = ([row[name] for row in checked] for name in ("seconds_spent", "validation_accuracy"))
    axes.plot(at, accuracies, "o-", color="tab:orange", label="validation, unperturbed parameters")
    axes.set(xlabel="seconds of training", ylabel="score")
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
