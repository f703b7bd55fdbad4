"""Inputs of `experiments.zo`: the model and the task that the options name, read from files."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from eggroll.devices.processes import first_does
from eggroll.envs.tasks.records import Record, read_records
from eggroll.experiments.common.contents import Contents
from eggroll.experiments.common.finished import read_run
from eggroll.experiments.common.models import model_folder
from eggroll.experiments.zo.capacity import check_capacity
from eggroll.experiments.zo.config import Config
from eggroll.experiments.zo.data import sentiment
from eggroll.experiments.zo.data.examples import Examples, encode
from eggroll.experiments.zo.problem import FineTuning
from eggroll.experiments.zo.warm_start import warm_start
from eggroll.llm import hf
from eggroll.llm.sums import digest_file
from eggroll.llm.tokenizers import load_tokenizer

SPLITS = ("train", "validation", "test")


class Loaded(NamedTuple):
    """A model with its task."""

    source: Path  # the folder of the checkpoint
    config: hf.Config
    read: Callable[[], Any]
    task: FineTuning

    @property
    def params(self) -> Any:
        """The parameters that a run starts with, read again at every use: nothing keeps them while they are tuned."""
        return self.read()


def load(config: Config) -> Loaded:
    """Read the model and the task.

    Raises:
        ValueError, OSError: a file is missing, damaged, or does not fit; the message names it. Or the model does not fit into
            memory.
    """
    records = _read_task(config)
    source, dtype = model_folder(config.model) or warm_start(config.start), config.dtype if config.model else "float32"
    check_capacity(config, hf.check(source))
    with where(config):
        model, decoder, params = hf.load(source, dtype)
    tokenizer = load_tokenizer(source, vocab_size=model.vocab_size)
    everything = [record for split in records for record in split]
    examples = encode(everything, config.language_task, tokenizer, max_length=config.max_length)
    ends = np.cumsum([0, *map(len, records)])
    parts = [Examples(*(array[first:end] for array in examples)) for first, end in itertools.pairwise(ends)]
    if config.batch_size > len(records[0]) and not config.evaluate:
        raise ValueError(f"batch_size must be at most the {len(records[0])} training examples, got {config.batch_size}.")
    unused = [params]

    def read() -> Any:
        with where(config):
            return unused.pop() if unused else hf.load(source, dtype)[2]

    return Loaded(source, model, read, FineTuning(decoder, *parts))


def where(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Where weights are read to: the device, or the host's memory for a model that a device need not hold."""
    if config.offload:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    return contextlib.nullcontext()


def _read_task(config: Config) -> list[list[Record]]:
    if config.data is not None:
        return read_splits(config.data)
    with tempfile.TemporaryDirectory() as own:  # of every process
        sentiment.write(own, short=config.model is None)
        return read_splits(Path(own))


def check_task(config: Config, folder: Path) -> None:
    """Raise ValueError where the shipped task would replace data in the folder of a run that no run wrote there."""
    own = [path for name in SPLITS if (path := folder / "data" / f"{name}.jsonl").exists()]
    if config.data is not None or not own:
        return
    if (config.accept_change or not config.resume) and _was_of_shipped_task(folder):
        return
    shipped = [sentiment.contents(short=short) for short in (False, True)]
    for path in own:
        if path.read_bytes() not in [contents[path.stem] for contents in shipped]:
            words = "is not of the task that ships, which a run without --data would write there"
            raise ValueError(f"{path} {words}; give --data, or choose another folder.")


def _was_of_shipped_task(folder: Path) -> bool:
    """Whether the run in a folder was one without --data, as far as it is recorded."""
    with contextlib.suppress(OSError, ValueError):
        return read_run(folder, experiment="zo", names=("data",)).options["data"] is None
    return False


def keep_task(config: Config, folder: Path) -> None:
    """Write the shipped task, where that is what is tuned on, into the folder of a run."""
    if config.data is None:
        first_does(lambda: sentiment.write(folder / "data", short=config.model is None))


def read_contents(data: Path | None) -> Contents | None:
    """Return the digests of the files that `read_splits` reads; None for the shipped task.

    Raises:
        OSError: a file cannot be read.
    """
    if data is None:
        return None
    files = [data / f"{name}.jsonl" for name in SPLITS] if data.is_dir() else [data]
    return {str(file): digest_file(file) for file in files if file.is_file()}  # `read_splits` names one that is missing


def read_splits(data: Path) -> list[list[Record]]:
    """Records for training, validation and test: three files of a folder, or 80, 10 and 10 % of one file.

    Raises:
        ValueError, OSError: a file is missing, damaged, or too short.
    """
    if data.is_dir():
        missing = [f"{name}.jsonl" for name in SPLITS if not (data / f"{name}.jsonl").is_file()]
        if missing:
            raise ValueError(f"data {data} has no {', '.join(missing)}.")
        return [read_records(data / f"{name}.jsonl") for name in SPLITS]
    if not data.is_file():
        raise ValueError(f"data must be a JSONL file or a folder with train, validation and test, got {data}.")
    records = read_records(data)
    if len(records) < 10:
        raise ValueError(f"data {data} has {len(records)} records, 10 are needed to split one file.")
    mixed = [records[index] for index in np.random.default_rng(0).permutation(len(records))]
    held = len(records) // 10
    return [mixed[2 * held :], mixed[:held], mixed[held : 2 * held]]
