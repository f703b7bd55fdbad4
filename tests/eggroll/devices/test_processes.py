"""Several processes are one run: 2 and 4 real processes over loopback (gloo) against one, a death among them, wrong use."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from eggroll import launch
from eggroll.devices import processes
from eggroll.devices.processes import LAUNCHED
from eggroll.devices.rendezvous import HELLO, MAGIC, meet
from eggroll.experiments.common.mesh import parse_mesh

ROOT = Path(__file__).parents[3]


def start(count, folder, check):
    """Launch the processes; return what the command ended with and what it said."""
    command = [
        sys.executable,
        "-m",
        "eggroll.launch",
        str(count),
        str(ROOT / "tests" / "eggroll" / "devices" / "process_runs.py"),
        str(folder),
        check,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, said = start(1, folder, "same")
    assert code == 0, said
    return np.load(folder / "same.npz")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_the_run_of_one(alone, tmp_path, count):
    code, said = start(count, tmp_path, "same")
    assert code == 0, said
    found = np.load(tmp_path / "same.npz")
    assert found["resumed"] and alone["resumed"]
    for name in set(alone.files) - {"resumed"}:
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-5 * np.abs(alone[name]).max(), err_msg=name)
    np.testing.assert_allclose(found["mean"], alone["mean"], rtol=1e-6)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5  # written by one of them


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_the_next_start_resumes(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert start(2, tmp_path / "whole", "killed")[0] == 0
    (tmp_path / "parts" / "deadly").touch()
    code, said = start(2, tmp_path / "parts", "killed")
    assert code == 1 and "process 1 of 2 was killed by SIGKILL; the others were terminated" in said.splitlines()[-1]
    assert start(2, tmp_path / "parts", "killed")[0] == 0
    whole, parts = (json.loads((tmp_path / name / "killed.json").read_text()) for name in ("whole", "parts"))
    assert parts["fingerprint"] == whole["fingerprint"] and whole["generations"] == 9
    assert 3 <= parts["generations"] <= 4  # generation 5 was recorded by the first process, or was not yet


@pytest.mark.slow
def test_processes_with_different_keys_are_told(tmp_path):
    assert start(2, tmp_path, "different")[0] == 0
    for index in (0, 1):
        assert "the processes of this run have different values" in (tmp_path / f"different-{index}").read_text()


@pytest.mark.slow
def test_what_the_first_process_alone_finds_all_are_told(tmp_path):
    assert start(2, tmp_path, "refused")[0] == 0
    told = [json.loads((tmp_path / f"told-{index}.json").read_text()) for index in (0, 1)]
    assert told[0] == told[1]
    assert [name for name, _ in told[0][:-1]] == ["RunInUse", "JournalError", "IsADirectoryError", "ValueError"]
    assert "is in use by process" in told[0][0][1] and "is damaged at generation 3" in told[0][1][1]
    assert told[0][-1] == "nothing"


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_job_at_once(tmp_path):
    start_time = time.monotonic()
    code, said = start(2, tmp_path, "alone")
    assert code == 1 and "process 0 of 2 exited with 1" in said.splitlines()[-1]
    assert "OSError: [Errno 28] No space left on device" in said and time.monotonic() - start_time < 100


class Odd(Exception):
    """One that cannot be rebuilt from its arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("raised", [OSError(28, "full", "file"), Odd(1, 2), None], ids=["rebuilt", "not rebuilt", "none"])
def test_what_the_first_process_raises_all_raise(monkeypatch, raised):
    """As the first process, then as another one that receives what it sent."""
    sent, calls = [], []

    def action():
        calls.append(jax.process_index())
        if raised is not None:
            raise raised
        return "its own"

    def outcome():
        try:
            return processes.first_does(action)
        except Exception as error:
            return type(error), str(error)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: sent.append(value) or value)
    first = outcome()
    assert first == ("its own" if raised is None else (type(raised), str(raised)))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: sent.pop(0))
    expected = (RuntimeError, "Odd: 1 and 2") if isinstance(raised, Odd) else None if raised is None else first
    assert outcome() == expected and calls == [0]


def test_a_process_that_was_started_again_replaces_the_one_that_ended():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, "127.0.0.1", port, count=3, index=0, timeout=5)
        with socket.socket() as ended:
            while ended.connect_ex(("127.0.0.1", port)):
                time.sleep(0.01)
            ended.sendall(HELLO.pack(MAGIC, 3, 1))
        others = [pool.submit(meet, "127.0.0.1", port, count=3, index=index, timeout=5) for index in (1, 2)]
        for process in (first, *others):
            process.result(10)


def test_a_first_process_that_is_not_there_is_told():
    with pytest.raises(RuntimeError, match=r"the first process of this run was not found at 127.0.0.1:9 within 1 s"):
        processes.join(coordinator_address="127.0.0.1:9", num_processes=2, process_id=1, timeout=1)


def test_a_first_process_alone_names_those_that_did_not_come(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: pytest.fail("jaxlib would end the process"))
    port = free_port()
    with pytest.raises(RuntimeError, match=rf"process 0 of 3 waited 0.2 s at port {port} for 1, 2, which did not come"):
        processes.join(coordinator_address=f"127.0.0.1:{port}", num_processes=3, process_id=0, timeout=0.2)


def test_a_port_in_use_is_told():
    with socket.create_server(("", 0)) as other, pytest.raises(RuntimeError, match=r"port \d+ .* is in use: choose another"):
        processes.join(coordinator_address=f"127.0.0.1:{other.getsockname()[1]}", num_processes=2, process_id=0, timeout=1)


@pytest.mark.parametrize(("second", "told"), [((3, 2), None), ((3, 1), "process 1 of 3 came"), ((2, 1), "process 1 of 2 came")])
def test_processes_meet_before_jax_connects_them(second, told):
    """Two others, the second with a number of its own, or with one that is taken, or in a run of another size."""
    port, errors = free_port(), []

    def come(count, index):
        try:
            meet("127.0.0.1", port, count=count, index=index, timeout=5 if told is None else 0.5)
        except RuntimeError as error:
            errors.append(str(error))

    with socket.socket() as stranger, concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(come, 3, 0)
        while stranger.connect_ex(("127.0.0.1", port)):  # one that only connects
            time.sleep(0.01)
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        pool.submit(come, 3, 1).add_done_callback(lambda _: None)
        time.sleep(0.1)
        pool.submit(come, *second)
        first.result(20)
    assert not errors if told is None else any(told in error for error in errors)


def free_port():
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def test_a_process_alone_has_nobody_to_meet(monkeypatch):
    for name in (*LAUNCHED, *processes.SCHEDULED):
        monkeypatch.delenv(name, raising=False)
    assert processes.join() is False and processes.is_first()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert processes.join() is False
    assert processes.join(coordinator_address="localhost:1234", num_processes=1, process_id=0) is False
    processes.wait_for_all("nobody")


def test_slurm_and_open_mpi_are_recognised(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: called.append((given, options)))
    for name in processes.SCHEDULED:
        with monkeypatch.context() as context:
            context.setenv(name, "4" if name == "OMPI_COMM_WORLD_SIZE" else "4(x2)")
            processes.join(timeout=7)
    assert [options["initialization_timeout"] for _, options in called] == [7, 7]
    assert called[0][0] == (None, None, None)  # jax reads the rest from the scheduler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_processes=2), "missing: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (dict(coordinator_address="a:1", num_processes="two", process_id=0), "must be integers"),
        (dict(coordinator_address="a:1", num_processes=2, process_id=2), "process 2 of 2 at 'a:1': need 0 <= process < number"),
        (dict(coordinator_address="host", num_processes=2, process_id=1), "an address host:port"),
        (dict(coordinator_address="host:0", num_processes=2, process_id=1), "'host:0': .* a port from 1 to 65535"),
        (dict(coordinator_address="host:99999", num_processes=2, process_id=1), "'host:99999': .* a port from 1 to 65535"),
    ],
)
def test_incomplete_or_wrong_processes_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        processes.join(**options)


@pytest.mark.parametrize("arguments", [[], ["2"], ["two", "-m", "x"], ["0", "-m", "x"]])
def test_launch_says_how_it_is_used(arguments):
    with pytest.raises(SystemExit, match=r"usage: python -m eggroll.launch PROCESSES"):
        launch.main(arguments)


def test_launch_explains_itself(capsys):
    launch.main(["--help"])
    assert "python -m eggroll.launch 4 -m" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_ending_the_launcher_ends_its_processes(tmp_path, how):
    script = tmp_path / "one.py"
    script.write_text("import os, time\nopen(os.environ['JAX_PROCESS_ID'], 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    if how == signal.SIGINT:  # the first Ctrl-C waits for processes that take their time, a second one does not
        script.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + script.read_text())
    # Python leaves SIGINT ignored where a shell in the background has ignored it.
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from eggroll.launch import main; main()"
    )
    command, environment = [sys.executable, "-c", start, "2", str(script)], os.environ | {"PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment)
    numbers, deadline = [tmp_path / str(index) for index in (0, 1)], time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(how)
    if how == signal.SIGINT:
        time.sleep(0.3)
        launcher.send_signal(how)
    assert launcher.wait(30) == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 1}[how]
    for path in numbers:
        deadline = time.monotonic() + 5
        while (status := Path(f"/proc/{path.read_text()}/stat")).exists() and time.monotonic() < deadline:
            if status.read_text().split()[2] == "Z":  # ended; whoever adopted it has not looked yet
                break
            time.sleep(0.02)
        else:
            assert not status.exists()


def test_launch_ends_the_others_when_one_fails(tmp_path):
    script = tmp_path / "one.py"
    script.write_text("import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(3)\ntime.sleep(60)\n")
    assert launch.launch(3, [str(script)]).startswith("process 1 of 3 exited with 3; the others were terminated.")
    script.write_text("")
    assert launch.launch(2, [str(script)]) is None


def test_launch_that_is_interrupted_says_so_clearly(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch", interrupted)
    with pytest.raises(SystemExit, match="interrupted: the processes were terminated"):
        launch.main(["2", "-m", "x"])


def test_lost_processes_are_told_only_where_there_are_several():
    with pytest.raises(ValueError, match=r"^Gloo failed$"), processes.report_lost_process("generation 3"):
        raise ValueError("Gloo failed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("members=2", "mesh must be such as population=4,data=2"),
        ("population", "mesh must be such as"),
        ("population=0", "mesh must be such as"),
        ("population=1,population=1", "names an axis twice"),
        ("population=512", "mesh 'population=512' has 512 devices, this run has "),
    ],
)
def test_wrong_meshes_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_mesh(text)


def test_meshes_of_the_command_line():
    assert parse_mesh(None) is None
    assert dict(parse_mesh("population=1,data=1").shape) == {"population": 1, "data": 1}
