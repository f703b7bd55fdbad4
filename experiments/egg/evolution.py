"""Pretraining EGG by evolution strategies: integers from the bytes to the updated weights."""

import contextlib
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import eggroll
from eggroll.devices.processes import first_does, local
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.common.run import print_text
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.egg.config import Config
from eggroll.experiments.egg.data.corpus import streams
from eggroll.experiments.egg.figure import plot_bits
from eggroll.experiments.egg.inputs import Inputs
from eggroll.experiments.egg.models import egg
from eggroll.experiments.egg.models.integer_loss import UNITS_PER_BIT
from eggroll.experiments.egg.models.sampling import sample
from eggroll.experiments.egg.problem import Validation
from eggroll.runs.durable import DurableRun
from eggroll.runs.record import Record, read_records
from eggroll.runs.training import train

PROMPT = b"import "
LEAST_SCHEDULE = 10_000  # generations in which the share falls; not those of the run, which may be extended


class Trained(NamedTuple):
    """Result of a run."""

    params: egg.Params
    validation_bits: float  # bits per byte of the unperturbed parameters
    generations: int
    generation_seconds: float  # median of this process, 0 if no generation was left


def make_strategy(config: Config) -> eggroll.EvolutionStrategy:
    """Make the strategy; its batch is a piece of every stream, uint8 [streams, bytes_per_update + 1]."""
    model = config.model

    def fitness(params: Any, text: Array, key: Array, state: Array) -> tuple[Array, Array]:
        state, scores = egg.sequence(params, state, text, model)
        return jnp.sum(scores), state

    return eggroll.EvolutionStrategy(
        fitness,
        population_size=config.population_size,
        sigma=None,
        optimizer=make_optimizer(config),
        perturbation=eggroll.Integer(config.rank, config.distribution, config.shift, config.update),
        shaping=config.shaping,
        members_per_batch=config.group,
        chunk_size=config.chunk_size,
        mesh=parse_mesh(config.mesh),
    )


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Make the update of the weights."""
    return eggroll.threshold(config.alpha_of, steps=max(LEAST_SCHEDULE, config.alpha_steps))


def start(config: Config, *, init_key: Array, run_key: Array) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Make the strategy, with its plan, and the initial state."""
    es = make_strategy(config)
    state = es.init(egg.init(config.model, key=init_key), key=run_key, member_state=egg.init_state(config.model))
    es.plan(state, jax.ShapeDtypeStruct((config.streams, config.bytes_per_update + 1), jnp.uint8))
    return es, state


class _Checks:
    """Callback of the training loop: adds bits per byte to the record; checks on held-out text and draws text at intervals."""

    def __init__(self, config: Config, validation: Validation, folder: Path):
        self._config, self._validation, self._folder = config, validation, folder
        self._per_byte = config.bytes_per_update * UNITS_PER_BIT[config.rounding]
        self.bits: float | None = None

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Add to the record's numbers."""
        config, done = self._config, record.generation + 1
        record.extra["mean_bits"] = -record.mean_fitness / self._per_byte
        record.extra["best_bits"] = -record.best_fitness / self._per_byte
        if done % config.validation_every and done != config.generations:
            return
        params = local(state.params)
        self.bits = self._validation(params)
        record.extra.update(validation_bits=self.bits, held_out_fitness=-self.bits)  # the latter picks the best checkpoint
        speed = f"{record.members_per_second * config.bytes_per_update:,.0f} bytes/s"
        print(f"generation {done}: validation {self.bits:.4f} bits/byte, {speed}", flush=True)
        if config.sample_length:
            first_does(lambda: self._sample(params, done))

    def _sample(self, params: egg.Params, generation: int) -> None:
        config = self._config
        drawn = sample(params, config.model, PROMPT, length=config.sample_length, temperature=config.temperature)
        text = PROMPT + drawn
        (self._folder / "samples").mkdir(exist_ok=True)
        (self._folder / "samples" / f"{generation:06d}.txt").write_bytes(text)
        print_text("    " + text.decode(errors="replace").replace("\n", "\n    "))

    def words(self, record: Record) -> str:
        """The changing part of the progress line."""
        checked = "" if self.bits is None else f"  validation {self.bits:.3f}"
        speed = f"{record.members_per_second:,.0f} members/s  {record.members_per_second * self._config.bytes_per_update:,.0f}"
        return f"best {record.extra['best_bits']:.3f}  mean {record.extra['mean_bits']:.3f}{checked} bits/byte  {speed} bytes/s"


def pretrain(config: Config, inputs: Inputs, seed_run: SeedRun) -> Trained:
    """Run the generations, resuming the run in the folder if so configured; all files of the run go to the folder.

    Raises:
        ValueError: the folder has a run with other settings, or damaged files; or the corpus file vanished.
    """
    folder, corpus = seed_run.folder, inputs.corpus
    init_key, run_key = jax.random.split(jax.random.key(seed_run.seed))
    es, initial = start(config, init_key=init_key, run_key=run_key)
    validation = Validation(corpus, config)
    checks = _Checks(config, validation, folder)
    run = DurableRun(
        folder,
        es,
        initial,
        config=config.options() | {"corpus": corpus.fingerprint},
        checkpoint_every=config.checkpoint_every,
        accept_change=config.accept_change,
        recipe=seed_run.recipe,
        lock=seed_run.lock,
    )
    with contextlib.closing(run):
        state = run.state
        state, _ = train(
            es,
            state,
            lambda generation: streams(corpus, generation, groups=config.streams, length=config.bytes_per_update),
            generations=max(0, config.generations - int(state.generation)),
            callbacks=[checks],
            run_folder=folder,
            durable=run,
            words=checks.words,
            plot=lambda _, path: plot_bits(path, inputs.references),
        )
    params = local(state.params)
    bits = validation(params) if checks.bits is None else checks.bits
    seconds = [record.seconds for record in read_records(folder)]  # before it was continued, too
    return Trained(params, bits, int(state.generation), statistics.median(seconds) if seconds else 0.0)
