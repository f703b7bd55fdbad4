"""Processes that score: what they can do to the trainer, and that they end with it."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eggroll.envs.tasks import Scorer
from eggroll.envs.tasks.workers import Pool
from tests.envs import reward_functions as rewards
from tests.tables import by_default


@pytest.fixture(scope="module")
def scorer():
    with Scorer(rewards.hostile, workers=1, timeout=1.0, memory=1 << 30) as scorer:
        yield scorer


TOLD = {
    "half": "exceeded its time limit of 1 s",
    "garbage": "wrote over what its process sends",
    "huge": "wrote over what its process sends",
    "nested": "wrote over what its process sends",
    "more": "wrote over what its process sends",
    "memory": "raised MemoryError",
}


@pytest.mark.parametrize("what", by_default(TOLD, "half", "more", "memory"))
def test_what_a_reward_sends_is_never_more_than_a_failed_reward(scorer, what):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"failed on all 1 completions; the first error: reward 'hostile' {TOLD[what]}"):
        scorer([""], [what])
    assert time.monotonic() - start < 10
    assert scorer([""], ["fine"]).values.tolist() == [1.0]  # it was replaced


def test_a_worker_that_does_not_read_is_stopped_in_time(scorer):
    assert scorer([""], ["stop reading"]).values.tolist() == [1.0]
    time.sleep(0.4)
    with pytest.raises(RuntimeError, match="exceeded its time limit of 1 s"):
        scorer([""], ["x" * (8 << 20)])  # more than a socket holds
    assert scorer([""], ["fine"]).values.tolist() == [1.0]


def test_a_reward_that_forks_shifts_no_score():
    """The child's reply would be taken for that of the next job, in this batch and in all that follow."""
    texts = ["fork", "a", "bb", "ccc", "dddd", "eeeee"]
    with Scorer(rewards.forks, workers=1) as scorer:
        for batch in (texts, texts[1:], texts[1:]):
            assert scorer([""] * len(batch), batch).values.tolist() == [float(len(text)) for text in batch]


def test_a_worker_that_trickles_is_stopped_in_time():
    with (
        Scorer(rewards.trickle, workers=1, timeout=0.5) as scorer,
        pytest.raises(RuntimeError, match="exceeded its time limit"),
    ):
        scorer([""], ["x"])


def test_a_process_with_many_open_files_scores(tmp_path):
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1400:
        pytest.skip("fewer files may be open")
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        with Scorer(rewards.length, workers=1) as scorer:
            assert scorer([""], ["abc"]).values.tolist() == [3.0]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_and_what_they_started_end_with_a_trainer_that_is_killed(tmp_path):
    script = (
        "from eggroll.envs.tasks import Scorer\nfrom tests.envs import reward_functions as rewards\n"
        f"if __name__ == '__main__':\n    Scorer(rewards.spin, timeout=600)([''], [''], file=[{str(tmp_path / 'pids')!r}])\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    trainer = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.05)
    trainer.kill()
    trainer.wait()
    waiting = {Path(f"/proc/{pid}/stat") for pid in (tmp_path / "pids").read_text().split()}
    deadline = time.monotonic() + 5
    while waiting and time.monotonic() < deadline:
        waiting = {stat for stat in waiting if stat.exists() and stat.read_text().split()[2] != "Z"}
        time.sleep(0.05)
    assert not waiting


class Slow:
    """A function that has to import a lot first."""

    def prepare(self):
        time.sleep(1.0)

    def __call__(self, job):
        return job


def test_imports_do_not_count_as_time_of_the_first_call():
    pool = Pool(Slow(), workers=1, timeout=0.5, memory=1 << 30)
    assert pool.map([[1.0]]) == [[1.0]]
    pool.close()


def test_a_memory_that_nothing_can_have_is_refused():
    with pytest.raises(ValueError, match="memory must be bytes, a MiB or more, got 10"):
        Scorer(rewards.length, memory=10)
    with pytest.raises(ValueError, match="memory has no effect with workers=0"):
        Scorer(rewards.length, workers=0, memory=1 << 30)
