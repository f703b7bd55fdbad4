"""GRPO by backprop, in the same frame as the evolution: its problems, sampler, rewards, training loop, checks and files.

    a step: draw G completions of every prompt, score them, then minimise `grpo_loss` over minibatches of them

Weights are float32; a model of lower precision draws and scores with the weights rounded to its dtypes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll.envs import tasks
from eggroll.experiments.common.backprop import gradient_metrics
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.figure import draw
from eggroll.experiments.reason.grpo import GRPO, Batch, advantages, groups_without_signal, grpo_loss, log_likelihoods
from eggroll.experiments.reason.problem import Problem, Sampling
from eggroll.experiments.reason.progress import Improved, Progress, Report, why_ended
from eggroll.llm.decoding import Completions, Prompts
from eggroll.population.metrics import Metrics
from eggroll.population.moves import move_as_integers
from eggroll.runs.training import Record, train
from eggroll.state import copy_state

OPTIMIZERS = {"adam": optax.adam, "radam": optax.radam}


class TrainState(NamedTuple):
    """A run of GRPO between two steps."""

    params: Any  # the weights in the dtypes of the model; float32 ones are the weights themselves
    weights: Any  # float32
    opt_state: Any
    reference: Any  # weights that the divergence is measured from; None without a divergence
    generation: Array  # int32 [], steps done
    key: Array


class Trainer:
    """The steps of GRPO, compiled once; `eggroll.train` runs them like the generations of a strategy.

    Args:
        problem: model and task.
        sampling: of completions, at a temperature above 0 and from all tokens.
        settings: of GRPO.

    Raises:
        ValueError: settings out of range; the message names them.
    """

    def __init__(self, problem: Problem, sampling: Sampling, settings: GRPO):
        settings.check()
        if not sampling.temperature > 0 or sampling.top_p != 1:
            raise ValueError(f"GRPO needs temperature > 0 and top_p 1, got {sampling.temperature} and {sampling.top_p}.")
        self.population_size = math.nan  # it has no members
        self._problem, self._sampling, self._settings = problem, sampling, settings
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(settings.max_gradient_norm), OPTIMIZERS[settings.optimizer](settings.learning_rate)
        )
        self._dtypes: Any = None  # of the model
        self._draw, self._start = jax.jit(move_as_integers(self._draw_completions)), jax.jit(self._optimizer.init)
        self._learn, self._narrow = jax.jit(self._update, donate_argnums=0), jax.jit(self._round)

    def init(self, *, key: Array) -> TrainState:
        """Return the state before the first step; the key is consumed."""
        params = self._problem.params
        self._dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)  # the same array if it is float32
        reference = copy_state(weights) if self._settings.kl_coefficient else None
        return TrainState(params, weights, self._start(weights), reference, jnp.int32(0), key)

    def step(self, state: TrainState, rows: Sequence[tasks.Row]) -> tuple[TrainState, Metrics]:
        """Draw completions of the rows' problems, score them, learn from them; the state is consumed."""
        problem, settings = self._problem, self._settings
        draw_key, order_key = jax.random.split(jax.random.fold_in(state.key, state.generation))
        prompts = problem.prompts(rows, samples=settings.samples)
        completions = self._draw(state.params, prompts, jax.random.key_data(draw_key))
        scores = problem.score([row for row in rows for _ in range(settings.samples)], completions).scores
        rewards = scores.values.reshape(settings.prompts, settings.samples)
        relative = advantages(rewards, global_std=settings.global_std).reshape(-1) * scores.has_score
        read = completions._replace(length=problem.count_tokens(completions))  # what follows a stop text is not rewarded
        batch = Batch(prompts, read, relative, None, None)
        run, (clipped, norm) = self._learn((state.weights, state.opt_state), state.reference, batch, order_key)
        params = run[0] if self._is_float32 else self._narrow(run[0])
        state = state._replace(params=params, weights=run[0], opt_state=run[1])
        extra = {"silent": float(groups_without_signal(rewards).mean()), "clipped": float(clipped)}
        report = Report(int(np.sum(completions.length)), float(np.mean(completions.ended)), scores, [], extra)
        metrics = gradient_metrics(int(state.generation), fitness=float(rewards.mean()), gradient_norm=float(norm), aux=report)
        return state._replace(generation=state.generation + 1), metrics

    @property
    def _is_float32(self) -> bool:
        return all(dtype == jnp.float32 for dtype in jax.tree.leaves(self._dtypes))

    def _round(self, weights: Any) -> Any:
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), weights, self._dtypes)

    def _draw_completions(self, params: Any, prompts: Prompts, key: Array) -> Completions:
        return self._problem.complete(params, prompts, key, sampling=self._sampling)

    def _log_likelihoods(self, weights: Any, batch: Batch) -> Array:
        model, temperature = self._problem.decoder, self._sampling.temperature
        return log_likelihoods(model, self._round(weights), batch.prompts, batch.completions, temperature=temperature)

    def _update(self, run: Any, reference: Any, batch: Batch, key: Array) -> tuple[Any, tuple[Array, Array]]:
        """Pass over the minibatches; also return the clipped share and the gradient norm, means over minibatches."""
        settings = self._settings
        if settings.epochs * settings.minibatches > 1:
            batch = batch._replace(old=self._log_likelihoods(run[0], batch))
        if reference is not None:
            batch = batch._replace(reference=self._log_likelihoods(reference, batch))

        def epoch(run: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
            order = jax.random.permutation(key, len(batch.advantages)).reshape(settings.minibatches, -1)
            return jax.lax.scan(lambda run, rows: self._descend(run, jax.tree.map(lambda leaf: leaf[rows], batch)), run, order)

        run, reported = jax.lax.scan(epoch, run, jax.random.split(key, settings.epochs))
        return run, jax.tree.map(jnp.mean, reported)

    def _descend(self, run: tuple[Any, Any], batch: Batch) -> tuple[tuple[Any, Any], tuple[Array, Array]]:
        """Take a gradient step on one minibatch."""
        weights, opt_state = run
        gradient, clipped = self._gradient(weights, batch)
        updates, opt_state = self._optimizer.update(gradient, opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state), (clipped, optax.tree.norm(gradient))

    def _gradient(self, weights: Any, batch: Batch) -> tuple[Any, Array]:
        """Add up the gradients of the microbatches; also return the clipped share of the tokens."""
        settings, tokens = self._settings, batch.completions.length.sum()

        def loss(weights: Any, part: Batch) -> tuple[Array, Array]:
            share = part.completions.length.sum() / tokens
            mean, clipped = grpo_loss(
                self._log_likelihoods(weights, part),
                part,
                clip=settings.clip,
                token_mean=settings.token_mean,
                kl_coefficient=settings.kl_coefficient,
            )
            return mean * (share if settings.token_mean else 1 / settings.microbatches), clipped * share

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            (_, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(weights, part)
            return jax.tree.map(jnp.add, total, (gradient, clipped)), None

        parts = jax.tree.map(lambda leaf: leaf.reshape(settings.microbatches, -1, *leaf.shape[1:]), batch)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (weights, jnp.float32(0))), parts)[0]


class PolicyGradient:
    """GRPO on a problem; compiled once, run with any number of seeds."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling):
        self._config, self._problem, self._rows = config, problem, problem.task.split("train")
        self._trainer = Trainer(problem, sampling, config.grpo)

    def train(self, seed_run: SeedRun, *, progress: Progress) -> Improved:
        """Run as `Evolution.train`, without checkpoints; the best parameters are kept in memory."""
        config, trainer, seed, folder = self._config, self._trainer, seed_run.seed, seed_run.folder
        strategy: Any = trainer  # implements what the loop needs of a strategy and its state
        best: Any = None

        def keep_best(state: Any, record: Record) -> None:
            nonlocal best
            if progress.best_generation == record.generation + 1:
                best = copy_state(state.params)

        state, _ = train(
            strategy,
            trainer.init(key=jax.random.key(seed)),
            tasks.Batches(self._rows, batch_size=config.grpo.prompts, seed=seed),
            generations=config.generations,
            budget=config.budget,
            callbacks=[progress, keep_best],
            run_folder=folder,
            words=progress.words,
            plot=lambda history, path: draw(path),
        )
        ended = why_ended(config, int(state.generation), seconds=progress.seconds)
        progress.finish(state, folder)
        if progress.best_generation == int(state.generation):
            best = state.params
        return Improved(self._problem.params if best is None else best, int(state.generation), ended)
