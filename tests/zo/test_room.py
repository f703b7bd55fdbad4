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

RESIDENT, BLOCKS = 4 * (88 + 8), 4 * 4 * (64 + 64 + 8)  # bytes of float32
ON_DEVICE = RESIDENT + BLOCKS // 2


def refused(message):
    return contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)


@pytest.mark.parametrize(
    ("devices", "donate", "free", "message"),
    [
        (1, False, RESIDENT + BLOCKS, None),
        (1, False, 2000, r"the parameters need 2.56e-06 GB on 1 cpu device, 2e-06 GB are free, 5.6e-07 GB too few: zo.Offload"),
        (1, True, 0, None),
        (2, False, 5000, r"need 5.12e-06 GB on 2 cpu devices, .* 1.2e-07 GB too few: fewer devices, zo.Offload or"),
        (2, True, RESIDENT + BLOCKS, None),
    ],
)
def test_parameters_on_every_device(devices, donate, free, message, monkeypatch):
    monkeypatch.setattr(room, "free_host_bytes", lambda: free)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("population",)) if devices > 1 else None
    with refused(message):
        zo.mezo(PIECES, learning_rate=0.1, mesh=mesh).init(init(), key=jax.random.key(0), donate=donate)


@pytest.mark.parametrize(
    ("transfer_dtype", "free", "message"),
    [
        (None, BLOCKS + ON_DEVICE, None),
        (None, BLOCKS + ON_DEVICE - 48, "on 1 cpu device, .* 4.8e-08 GB too few: transfer_dtype=jnp.bfloat16 needs less"),
        (jnp.bfloat16, BLOCKS // 2 + ON_DEVICE, None),
        (jnp.bfloat16, BLOCKS // 2 + ON_DEVICE - 48, "4.8e-08 GB too few: bfloat16 parameters need less"),
    ],
)
def test_blocks_in_the_host_and_two_on_a_device(transfer_dtype, free, message, monkeypatch):
    monkeypatch.setattr(room, "free_host_bytes", lambda: free)
    with refused(message):
        zo.Offload(zo.mezo(PIECES, learning_rate=0.1), transfer_dtype=transfer_dtype).init(init(), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("on_device", "limit", "message"),
    [
        (ON_DEVICE, "1", None),
        (
            ON_DEVICE - 48,
            "1",
            "resident parameters and two blocks, on each device, need .* on 2 gpu devices, .* 4.8e-08 GB too",
        ),
        (ON_DEVICE, "1e-6", f"the blocks, in the host's memory, need .* too few: .*; {room.PINNED_LIMIT} limits"),
    ],
)
def test_devices_with_memory_of_their_own(on_device, limit, message, monkeypatch):
    monkeypatch.setenv(room.PINNED_LIMIT, limit)
    stats = [{"bytes_limit": 10 * ON_DEVICE, "bytes_in_use": used} for used in (0, 10 * ON_DEVICE - on_device)]
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda own=own: own) for own in stats]
    with refused(message):
        room.check_offloaded(init(), SimpleNamespace(local_devices=devices, size=2), transfer_dtype=None)
