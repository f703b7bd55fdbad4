"""Models that do not fit are refused before they are copied, by how much; the sizes are of `tiny_blocks`, counted by hand."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from eggroll import zo
from eggroll.zo import room
from tests.zo.tiny_blocks import PIECES, init

RESIDENT, BLOCKS = 4 * (88 + 8), 4 * 4 * (64 + 64 + 8)  # bytes of float32, four blocks
ON_DEVICE = RESIDENT + BLOCKS // 4 * 3
ON_ONE_OF_TWO = RESIDENT + BLOCKS // 4 + BLOCKS // 4 * 3 // 2
FEWER = "the model does not fit: each device holds the parameters. That needs 5.12e-06 GB on 2 cpu devices; .*"


def refused(message):
    return contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)


@pytest.mark.parametrize(
    ("devices", "donate", "free", "message"),
    [
        (1, False, RESIDENT + BLOCKS, None),
        (
            1,
            False,
            2000,
            "the model does not fit: the device holds the parameters. That needs 2.56e-06 GB on 1 cpu device; 2e-06 GB are "
            "free, 5.6e-07 GB too few. Try zo.Offload with transfer_dtype=jnp.bfloat16, or bfloat16 parameters with "
            "precision='stochastic'.",
        ),
        (1, True, 0, None),
        (
            2,
            False,
            5000,
            FEWER + " 1.2e-07 GB too few. Try fewer devices, or zo.Offload with transfer_dtype=jnp.bfloat16, or bfloat16",
        ),
        (2, True, RESIDENT + BLOCKS, None),
    ],
)
def test_parameters_on_every_device(devices, donate, free, message, monkeypatch):
    monkeypatch.setattr(room, "free_host_bytes", lambda: free)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("population",)) if devices > 1 else None
    with refused(message):
        zo.mezo(PIECES, learning_rate=0.1, mesh=mesh).init(init(), key=jax.random.key(0), donate=donate)


@pytest.mark.parametrize(("precision", "bytes_of_one"), [("master", 2 + 4), ("stochastic", 2)])
def test_short_parameters_may_have_masters(precision, bytes_of_one, monkeypatch):
    params, need = init(), (RESIDENT + BLOCKS) // 4 * bytes_of_one
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tuner = zo.mezo(PIECES, learning_rate=0.1, precision=precision)
    monkeypatch.setattr(room, "free_host_bytes", lambda: need)
    tuner.init(params, key=jax.random.key(0))
    monkeypatch.setattr(room, "free_host_bytes", lambda: need - 1)
    advice = "zo.Offload, or precision='stochastic'" if precision == "master" else "a smaller model"
    with pytest.raises(ValueError, match=rf"\. Try {advice}\.$"):
        tuner.init(params, key=jax.random.key(0))


def test_arrays_of_numpy_are_copied_though_they_are_donated(monkeypatch):
    monkeypatch.setattr(room, "free_host_bytes", lambda: 2000)
    with refused("5.6e-07 GB too few"):
        zo.mezo(PIECES, learning_rate=0.1).init(jax.tree.map(np.asarray, init()), key=jax.random.key(0), donate=True)


@pytest.mark.parametrize(
    ("dtype", "transfer_dtype", "blocks", "need", "advice"),
    [
        ("float32", None, 4, BLOCKS + ON_DEVICE, "transfer_dtype=jnp.bfloat16, or bfloat16 parameters, or more blocks"),
        ("float32", jnp.bfloat16, 4, BLOCKS // 2 + RESIDENT + BLOCKS // 8 * 3, "bfloat16 parameters, or more blocks"),
        ("bfloat16", None, 4, (BLOCKS + ON_DEVICE) // 2, "more blocks of fewer layers"),
        ("float32", None, 1, BLOCKS // 4 + RESIDENT + BLOCKS // 4, "transfer_dtype"),
    ],
)
def test_blocks_in_the_host_and_three_on_a_device(dtype, transfer_dtype, blocks, need, advice, monkeypatch):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init(blocks=blocks))
    away = zo.Offload(zo.mezo(PIECES, learning_rate=0.1), transfer_dtype=transfer_dtype)
    monkeypatch.setattr(room, "free_host_bytes", lambda: need)
    away.init(params, key=jax.random.key(0))
    monkeypatch.setattr(room, "free_host_bytes", lambda: need - 1)
    with refused(f"the host holds all blocks. That needs .* on 1 cpu device; .* 1e-09 GB too few. Try {advice}"):
        away.init(params, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("on_device", "limit", "message"),
    [
        (ON_ONE_OF_TWO, "1", None),
        (
            ON_ONE_OF_TWO - 48,
            "1",
            "a block and slices of 3 of 4. That needs .* on each of 2 gpu devices; .* 4.8e-08 GB too few",
        ),
        (
            ON_ONE_OF_TWO,
            "1e-6",
            f"the host holds all blocks. That needs .* on the host, pinned; .* or a higher {room.PINNED_LIMIT}",
        ),
    ],
)
def test_devices_with_memory_of_their_own(on_device, limit, message, monkeypatch):
    monkeypatch.setenv(room.PINNED_LIMIT, limit)
    stats = [{"bytes_limit": 10 * ON_DEVICE, "bytes_in_use": used} for used in (0, 10 * ON_DEVICE - on_device)]
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda own=own: own) for own in stats]
    with refused(message):
        room.check_offloaded(init(), SimpleNamespace(local_devices=devices, size=2), transfer_dtype=None)


def test_the_model_that_is_read_is_not_pinned(monkeypatch):
    monkeypatch.setenv(room.PINNED_LIMIT, "1")
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 10, "bytes_in_use": 0})
    need = room.Need("nothing", 0, host=2**29, read=2**30)
    monkeypatch.setattr(room, "free_host_bytes", lambda: 3 * 2**29)
    room.check_room(need, [device], [])
    monkeypatch.setattr(room, "free_host_bytes", lambda: 3 * 2**29 - 1)
    with refused(
        "the host holds all blocks and, at start and end, the model. That needs 1.61 GB on the host; 1.61 GB are free"
    ):
        room.check_room(need, [device], [])
