"""Group relative policy optimisation (Shao et al., arXiv 2402.03300, section 4.1) on a problem with a verifiable reward.

    a step: draw G completions of every prompt, judge them, then minimise `grpo_loss` over minibatches of them with Adam

Weights are float32; a model of lower precision draws and scores with them rounded to it. Owns one step and the loop; the
formulas are in `grpo_loss`, validation and records are the caller's.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll.envs.tasks import Row
from eggroll.experiments.reason.grpo_loss import Drawn, advantages, grpo_loss, log_likelihoods, silent
from eggroll.experiments.reason.problem import Problem, Sampling
from eggroll.llm.decoding import Completions, Prompts


@dataclasses.dataclass(frozen=True)
class GRPO:
    """Settings of GRPO."""

    prompts: int = 32
    """Problems of a step."""
    samples: int = 8
    """Completions of every problem, at least 2."""
    epochs: int = 1
    """Passes over the completions of a step."""
    minibatches: int = 1
    """Minibatches of a pass; divides prompts * samples."""
    optimizer: Literal["adam", "radam"] = "adam"
    """Adam or RAdam."""
    learning_rate: float = 3e-4
    """Step size."""
    clip: float = 0.2
    """Range of the probability ratio around 1."""
    global_std: bool = False
    """Divide by the standard deviation of all rewards of a step, in place of a prompt's."""
    token_mean: bool = False
    """Mean over all tokens of a minibatch; else over the tokens of a completion, then over completions."""
    kl_coefficient: float = 0.0
    """Weight of the divergence from the parameters that the run begins with."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this global norm."""

    def check(self) -> None:
        """Raise ValueError for settings that cannot run."""
        for name, least in (("prompts", 1), ("samples", 2), ("epochs", 1), ("minibatches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {getattr(self, name)}.")
        if self.prompts * self.samples % self.minibatches:
            raise ValueError(
                f"minibatches must divide the {self.prompts * self.samples} completions of a step, got {self.minibatches}."
            )
        if self.optimizer not in ("adam", "radam"):
            raise ValueError(f"optimizer must be adam or radam, got {self.optimizer!r}.")
        for name in ("learning_rate", "clip", "max_gradient_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}.")
        if not 0 <= self.kl_coefficient < float("inf"):
            raise ValueError(f"kl_coefficient must be a finite number >= 0, got {self.kl_coefficient}.")


class Run(NamedTuple):
    """A run between two steps."""

    params: Any  # float32
    opt_state: Any
    reference: Any  # parameters that the divergence is from; None where it has no weight


class Report(NamedTuple):
    """What a step reports."""

    reward: float  # mean
    tokens: int  # of all completions
    failures: int  # completions whose reward raised or hung; they score the scorer's minimum
    silent: float  # share of groups whose rewards are all equal: they have no signal
    clipped: float  # share of tokens whose ratio the clip holds, mean over minibatches
    gradient_norm: float  # before clipping, mean over minibatches


class Step(Protocol):
    """One step: draw, judge, learn."""

    def __call__(self, run: Run, rows: Sequence[Row], *, key: Array) -> tuple[Run, Report]:
        """Take a step with `prompts` problems; the key is consumed."""


class Trainer(NamedTuple):
    """A whole run is `init`, then `step` for every batch of problems; both are pure."""

    init: Callable[[], Run]
    step: Step
    policy: Callable[[Run], Any]  # the parameters in the dtypes of the model


class Trained(NamedTuple):
    """What a run ends with."""

    params: Any  # in the dtypes of the model
    steps: int
    seconds: float  # of training, compilation included, `on_step` not


def make(problem: Problem, sampling: Sampling, settings: GRPO) -> Trainer:
    """Make the functions of a run; each is compiled once.

    Args:
        problem: model and task.
        sampling: how completions are drawn, at a temperature above 0 from all tokens.
        settings: of GRPO.

    Returns:
        The `Trainer`.

    Raises:
        ValueError: settings that cannot run; the message names them.
    """
    settings.check()
    if not sampling.temperature > 0 or sampling.top_p != 1:
        raise ValueError(f"GRPO needs temperature > 0 and top_p 1, got {sampling.temperature} and {sampling.top_p}.")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, problem.params)
    options = {name: getattr(settings, name) for name in ("clip", "token_mean", "kl_coefficient")}
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.max_gradient_norm), getattr(optax, settings.optimizer)(settings.learning_rate)
    )

    @jax.jit
    def rounded(params: Any) -> Any:
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, dtypes)

    def score(params: Any, drawn: Drawn) -> Array:
        given = drawn.prompts, drawn.completions
        return log_likelihoods(problem.decoder, rounded(params), *given, temperature=sampling.temperature)

    def minibatch(run: Run, drawn: Drawn) -> tuple[Run, tuple[Array, Array]]:
        def loss(params: Any) -> tuple[Array, Array]:
            return grpo_loss(score(params, drawn), drawn, **options)

        (_, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(run.params)
        updates, opt_state = optimizer.update(gradient, run.opt_state, run.params)
        run = run._replace(params=optax.apply_updates(run.params, updates), opt_state=opt_state)
        return run, (clipped, optax.tree.norm(gradient))

    @jax.jit
    def draw(params: Any, prompts: Prompts, key: Array) -> Completions:
        return problem.complete(rounded(params), prompts, key, sampling=sampling)

    @jax.jit
    def learn(run: Run, drawn: Drawn, key: Array) -> tuple[Run, tuple[Array, Array]]:
        once = settings.epochs * settings.minibatches == 1
        drawn = drawn._replace(
            old=None if once else score(run.params, drawn),
            reference=None if run.reference is None else score(run.reference, drawn),
        )

        def epoch(run: Run, key: Array) -> tuple[Run, tuple[Array, Array]]:
            order = jax.random.permutation(key, len(drawn.advantages)).reshape(settings.minibatches, -1)
            return jax.lax.scan(lambda run, rows: minibatch(run, jax.tree.map(lambda leaf: leaf[rows], drawn)), run, order)

        run, reported = jax.lax.scan(epoch, run, jax.random.split(key, settings.epochs))
        return run, jax.tree.map(jnp.mean, reported)

    @jax.jit
    def begin(params: Any) -> Run:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return Run(params, optimizer.init(params), params if settings.kl_coefficient else None)

    def step(run: Run, rows: Sequence[Row], *, key: Array) -> tuple[Run, Report]:
        draw_key, order_key = jax.random.split(key)
        prompts = problem.prompts(rows, samples=settings.samples)
        completions = draw(run.params, prompts, jax.random.key_data(draw_key))
        scores = problem.judge([row for row in rows for _ in range(settings.samples)], completions).scores
        rewards = scores.values.reshape(settings.prompts, settings.samples)
        relative = advantages(rewards, global_std=settings.global_std).reshape(-1)
        run, (clipped, norm) = learn(run, Drawn(prompts, completions, relative, None, None), order_key)
        counts = int(np.sum(completions.length)), scores.errors + scores.timeouts
        return run, Report(float(rewards.mean()), *counts, float(silent(rewards).mean()), float(clipped), float(norm))

    return Trainer(lambda: begin(problem.params), step, lambda run: rounded(run.params))


def train(
    problem: Problem,
    settings: GRPO,
    *,
    sampling: Sampling,
    batches: Callable[[int], Sequence[Row]],
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    on_step: Callable[[Any, int, float, Report], bool | None] = lambda params, step, seconds, report: None,
) -> Trained:
    """Run GRPO until a limit is reached.

    Args:
        problem: model and task.
        settings: of GRPO.
        sampling: how completions are drawn.
        batches: number of a step, from 0, -> its `settings.prompts` problems.
        steps, seconds: limits, one at least; seconds of training, compilation included, of which the step that exceeds them is
            the last.
        seed: of everything that is drawn.
        on_step: called after every step with the parameters in the dtypes of the model, the steps done, the seconds of
            training and what the step reported; True stops the run.

    Returns:
        How it ended.

    Raises:
        ValueError: no limit, or settings that cannot run.
    """
    if steps is None and seconds is None:
        raise ValueError("steps or seconds must be given, got neither.")
    trainer, key = make(problem, sampling, settings), jax.random.key(seed)
    run, done, spent = trainer.init(), 0, 0.0
    while (steps is None or done < steps) and (seconds is None or spent < seconds):
        begun = time.perf_counter()
        run, report = trainer.step(run, batches(done), key=jax.random.fold_in(key, done))
        done, spent = done + 1, spent + time.perf_counter() - begun
        if on_step(trainer.policy(run), done, spent, report):
            break
    return Trained(trainer.policy(run), done, spent)
