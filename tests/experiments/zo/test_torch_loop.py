"""The torch loop that steps are timed against takes the steps that it claims."""

import numpy as np
import pytest

from eggroll.experiments.bench.memory.zeroth_order import SIZES
from eggroll.experiments.zo import torch_loop


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("mezo", 64), ("mezo_normal", 64), ("lozo", torch_loop.RANK)])
def test_a_step_descends_along_its_noise_by_the_projected_gradient(name, rank, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch_loop, "RATE", 0.1)
    loop = torch_loop.TorchLoop(SIZES["tiny"], np.arange(32).reshape(4, 8), np.arange(4))
    before = {path: param.detach().clone() for path, param in loop.model.named_parameters()}
    d = getattr(loop, name)()
    noise = {path: (before[path] - param.detach()) / (0.1 * d) for path, param in loop.model.named_parameters()}
    assert abs(torch.cat([z.ravel() for z in noise.values()]).std().item() - 1) < 0.1
    of_matrix = noise["model.layers.0.self_attn.q_proj.weight"]
    assert rank >= torch.linalg.matrix_rank(of_matrix, rtol=1e-3) >= (rank if rank < 64 else 60)
    assert ((of_matrix.abs() - 1).abs().max() < 1e-2) == (name == "mezo")  # signs

    def loss_at(amplitude):
        with torch.no_grad():
            for path, param in loop.model.named_parameters():
                param.copy_(before[path] + amplitude * noise[path])
        return loop.loss()

    assert d == pytest.approx((loss_at(1e-3) - loss_at(-1e-3)) / 2e-3, rel=0.05)
