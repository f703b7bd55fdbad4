"""The training loop: generations until a target, with a progress line, metrics on disk and a plot.

    state, history = train(es, state, batch, generations=200, target=-0.01, run_folder="runs/first")

This file owns the loop; strategies own the mathematics, `advance` how many generations run before the host looks, `record`
what a generation reports, `diagnosis` the warnings, `progress` the progress line, `plot` the figure.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eggroll.devices.processes import first_does, is_first
from eggroll.journal.lock import RunLost
from eggroll.protocol import S, Strategy
from eggroll.runs.advance import Advance
from eggroll.runs.diagnosis import Diagnosis
from eggroll.runs.durable import DurableRun
from eggroll.runs.metrics import open_metrics, write_line
from eggroll.runs.plot import plot_history
from eggroll.runs.progress import progress_line
from eggroll.runs.record import Record, read_records
from eggroll.scan import NextBatch

logger = logging.getLogger(__name__)
SCORES = ("held_out_return", "held_out_fitness")


def train(
    es: Strategy[S],
    state: S,
    batches: Any = None,
    *,
    generations: int | None = None,
    budget: tuple[str, float] | None = None,
    target: float | None = None,
    callbacks: Sequence[Callable[[S, Record], bool | None]] = (),
    run_folder: str | Path | None = None,
    durable: DurableRun[S] | None = None,
    progress: bool | None = None,
    words: Callable[[Record], str] | None = None,
    plot: Callable[[Sequence[Record], Path], None] | None = None,
    keep_arrays: bool = False,
    on_device: int = 1,
    next_batch: NextBatch | None = None,
    on_record: Callable[[Record], None] | None = None,
    quiet: Callable[[], int] | None = None,
) -> tuple[S, list[Record]]:
    """Run generations until there are enough, the budget is spent, the target is met, a callback stops or the batches end.

    Args:
        es: any strategy (`eggroll.protocol.Strategy`).
        state: from `es.init`, or from an earlier `train` to continue it.
        batches: one batch for all generations, an iterator of batches, or a function from generation (int) to batch.
        generations: how many to run at most, counted from here; 0: the run has ended, only its figure is drawn; None: the
            budget decides.
        budget: `(name, amount)`: stop once `record.extra[name]` is at least `amount`: a total (environment steps, tokens) that
            `on_record` keeps or, without `on_device`, a callback. The progress line then counts it.
        target: stop once the mean fitness of the population is at least this.
        callbacks: each is called as `callback(state, record)` after every generation, with `on_device` after the last of each
            program; True stops. The next generation consumes the state: keep `eggroll.copy_state(state)`, not its arrays. It
            may add held-out scores of the unperturbed parameters to `record.extra`; next to `held_out_return` or
            `held_out_fitness` the loop puts `held_out_minus_mean`, what they are above the mean of the population.
        run_folder: where to write `metrics.jsonl` (a line per generation, flushed) and `fitness.png`; created if missing. A
            run from generation 0 replaces them, a continued run appends.
        durable: records every generation in a journal and writes checkpoints; the caller closes it. The `held_out_return` or
            `held_out_fitness` that a callback puts into `record.extra` decides which checkpoint is the best.
        progress: True: draw the progress bar; False: be quiet; None: draw it where standard error is a terminal and rich is
            installed, and otherwise write a plain line every five seconds, later more rarely (`eggroll.runs.progress`).
        words: text of the progress line for a generation; None: best and mean fitness, the last held-out score, members per
            second. Not with `progress=False`.
        plot: `plot(history, run_folder)` at the end, instead of `fitness.png`, with the history of the whole run, of which
            the part before it was continued has no arrays; it needs a run folder.
        keep_arrays: keep `aux`, `coefficients`, `fitness` and `batch` of every generation in the history; callbacks and
            `on_record` always get them, but for the fitness of generations that ran in one program.
        on_device: k: run up to k generations in one program on the device (`eggroll.scan`), with the same results, bit for bit.
            It ends where the number of a generation is a multiple of k, or where a checkpoint is due. Then, and only then, the
            host does its part: callbacks are called with the state and the record of the last generation, files and checkpoints
            are written, and target and budget are acted on. A kill or Ctrl-C costs at most these k generations.
        next_batch: `next_batch(batch, metrics)` makes the batch of the next generation, in JAX code; `batches` is then the
            first one. `metrics` are those of `step`, without the fitness.
        on_record: called with the record of every generation, in order and before the callbacks: keeps totals, such as
            environment steps, and puts them into `record.extra`.
        quiet: asked before each program of `on_device` for the number of generations in which the callbacks will have nothing
            to do: no more run at once.

    Returns:
        `(state, history)`, one `Record` per generation run.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it.
        RuntimeError: another process of this run was lost. `RunLost`: its folder was, and nothing more is written.
    """
    _check(generations, budget, target, callbacks)
    if plot is not None and run_folder is None:
        raise ValueError("plot has no effect without run_folder, where it draws; give one, or leave it out.")
    if words is not None and progress is False:
        raise ValueError("words has no effect with progress=False, without a progress line; leave one of them out.")
    advance = Advance(es, batches, on_device=on_device, next_batch=next_batch, is_replayed=durable is not None)
    first = int(state.generation)
    history: list[Record] = []
    held_out: float | None = None  # the last one
    diagnosis = Diagnosis(es.population_size)
    check = (lambda record=None: None) if durable is None else durable.check
    folder = None if run_folder is None else Path(run_folder).absolute()  # a callback may change the working folder
    if durable is not None:
        durable.check_start(state)  # before a file is touched
    with contextlib.ExitStack() as stack:
        metrics_file = None
        if folder is not None and generations != 0:
            metrics_file = first_does(lambda: stack.enter_context(open_metrics(folder, first)))
        if folder is not None:
            draw = functools.partial(_draw, plot or _plot_fitness, folder, first, history)
            stack.push(functools.partial(_draw_last, check, draw))
        name, total = budget or ("generations", generations or 0)
        shown = progress if is_first() and generations != 0 else False
        show = stack.enter_context(progress_line(name.replace("_", " "), total, enabled=shown))
        while generations is None or len(history) < generations:
            limits = (
                on_device,
                None if generations is None else generations - len(history),
                None if durable is None else durable.generations_to_checkpoint,
                None if quiet is None else quiet(),
            )
            state, records = advance(state, min(limit for limit in limits if limit is not None))
            if not records:
                break  # the batches have ended
            stops = False
            for record in records:
                is_last = record is records[-1]
                history.append(record)
                check(record)  # before the callbacks, and the metrics, write
                if is_first():
                    diagnosis.look(record)
                if on_record is not None:
                    on_record(record)
                called = [callback(state, record) for callback in callbacks] if is_last else []
                score = next((record.extra[name] for name in SCORES if name in record.extra), None)
                if score is not None:
                    record.extra["held_out_minus_mean"] = score - record.mean_fitness
                    held_out = score
                stops |= _is_spent(budget, record) or any(called) or (target is not None and record.mean_fitness >= target)
                if metrics_file is not None:
                    write_line(metrics_file, record.to_json())
                if durable is not None:
                    durable.record(state if is_last else None, record, score=score)
                if not keep_arrays:
                    history[-1] = dataclasses.replace(record, aux=None, coefficients=None, fitness=None, batch=None)
            told = words(record) if words else _progress_words(record, held_out)
            if budget:
                show(record.extra[name], told, _likely_total(budget, generations, history))
            else:
                show(len(history), told)
            if stops:
                break
    return state, history


def _check(generations: Any, budget: Any, target: Any, callbacks: Any) -> None:
    if generations is None and budget is None:
        raise ValueError("generations or budget must be given: without either the run would not end.")
    if generations is not None and (not isinstance(generations, int) or generations < 0):
        raise ValueError(f"generations must be an integer >= 0, got {generations!r}.")
    if budget is not None and not (isinstance(budget, tuple) and len(budget) == 2 and budget[1] > 0):
        raise ValueError(f"budget must be (name, amount > 0), got {budget!r}.")
    if target is not None and not (isinstance(target, int | float) and not math.isnan(target)):
        raise ValueError(f"target must be a number or None, got {target!r}.")
    if not isinstance(callbacks, Sequence) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"callbacks must be a sequence of functions (state, record), got {callbacks!r}.")


def _is_spent(budget: tuple[str, float] | None, record: Record) -> bool:
    if budget is None:
        return False
    name, amount = budget
    if name not in record.extra:
        missing = f"budget names {name!r}, which was not in record.extra after generation {record.generation}"
        raise ValueError(f"{missing}: on_record has to put it there or, without on_device, a callback.")
    return record.extra[name] >= amount


def _likely_total(budget: tuple[str, float], generations: int | None, history: Sequence[Record]) -> float:
    """How much of the budget is spent when the run ends, should it go on as it did so far."""
    name, amount = budget
    if generations is None or len(history) < 2:
        return amount
    first, last = (record.extra[name] for record in (history[0], history[-1]))
    return min(amount, last + (generations - len(history)) * (last - first) / (len(history) - 1))


def _plot_fitness(history: Sequence[Record], folder: Path) -> None:
    plot_history(history, folder / "fitness.png")


def _draw(plot: Callable[[Sequence[Record], Path], None], folder: Path, first: int, history: Sequence[Record]) -> None:
    """Plot the history of a whole run, which was continued from generation `first`."""
    plot([*(record for record in read_records(folder) if record.generation < first), *history], folder)


def _draw_last(check_lock: Callable[[], None], draw: Callable[[], None], kind: Any, error: Any, trace: Any) -> None:
    """Plot at the end of a run, unless its folder was lost; a figure that fails is a warning, and the result is kept."""

    def draw_unless_lost() -> None:
        check_lock()
        try:
            draw()
        except Exception as failed:
            logger.warning("the figure was not drawn: %s", failed)

    if error is None:
        first_does(draw_unless_lost)
    elif is_first() and not isinstance(error, RunLost):
        with contextlib.suppress(RunLost):
            draw_unless_lost()


def _progress_words(record: Record, held_out: float | None) -> str:
    fitness = f"best {record.best_fitness:.4g}  mean {record.mean_fitness:.4g}"
    fitness += "" if held_out is None else f"  held-out {held_out:.4g}"
    return f"generation {record.generation}  {fitness}  {record.members_per_second:,.0f} members/s"
