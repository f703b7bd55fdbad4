"""MeZO and LOZO as plain torch loops over transformers' Llama, which `bench zo` times a step against.

    theta += sigma z;  l+ = loss;  theta -= 2 sigma z;  l- = loss;  theta += (sigma - rate d) z        d = (l+ - l-) / (2 sigma)

z is drawn again from its seed each time, one parameter after the other, and added in place: MeZO (arXiv 2305.17333) with the
last two of its four sweeps in one. LOZO (arXiv 2410.07698) has z = U V^T / sqrt(rank) of a matrix, V of `REFRESH` steps.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from eggroll.llm.models.transformer import TransformerConfig, to_fields

SIGMA, RATE, RANK, REFRESH = 1e-3, 1e-6, 2, 50


class TorchLoop:
    """A Llama with random weights, and steps that update it in place, with as many threads as this process has cores.

    Args:
        config: sizes, of model_type "llama".
        tokens: int32 [B, T].
        labels: int32 [B], the token after each text.

    Raises:
        ImportError: torch or transformers is missing; `make parity` installs them.
    """

    def __init__(self, config: TransformerConfig, tokens: np.ndarray, labels: np.ndarray):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self._torch: Any = torch
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig.from_dict(to_fields(config))).eval()
        self._batch = torch.tensor(tokens, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)
        self._step, self._right = 0, dict[str, Any]()

    def mezo(self) -> float:
        """Run a step of MeZO with Rademacher noise; return its projected gradient d."""
        return self._run_step(self._add_signs)

    def mezo_normal(self) -> float:
        """Run a step of MeZO with normal noise; return its projected gradient d."""
        return self._run_step(self._add_dense)

    def lozo(self) -> float:
        """Run a step of LOZO; return its projected gradient d."""
        return self._run_step(self._add_low_rank)

    def loss(self) -> float:
        """Mean of -log p of the labels."""
        tokens, labels = self._batch
        with self._torch.inference_mode():
            logits = self.model(tokens, logits_to_keep=1, use_cache=False).logits[:, 0]
            return float(self._torch.nn.functional.cross_entropy(logits, labels))

    def _run_step(self, add: Callable[[Any, str, float, Any], None]) -> float:
        if self._step % REFRESH == 0:
            self._right = {}
        self._sweep(add, SIGMA)
        plus = self.loss()
        self._sweep(add, -2 * SIGMA)
        d = (plus - self.loss()) / (2 * SIGMA)
        self._sweep(add, SIGMA - RATE * d)
        self._step += 1
        return d

    def _sweep(self, add: Callable[[Any, str, float, Any], None], amplitude: float) -> None:
        generator = self._torch.Generator().manual_seed(self._step)
        with self._torch.no_grad():
            for name, param in self.model.named_parameters():
                add(param, name, amplitude, generator)

    def _add_dense(self, param: Any, name: str, amplitude: float, generator: Any) -> None:
        param.add_(self._torch.randn(param.shape, generator=generator), alpha=amplitude)

    def _add_signs(self, param: Any, name: str, amplitude: float, generator: Any) -> None:
        bits = self._torch.randint(0, 2, param.shape, generator=generator, dtype=param.dtype)  # faster than bernoulli_
        param.add_(bits.mul_(2).sub_(1), alpha=amplitude)

    def _add_low_rank(self, param: Any, name: str, amplitude: float, generator: Any) -> None:
        if param.ndim != 2:
            self._add_dense(param, name, amplitude, generator)
            return
        if name not in self._right:
            self._right[name] = self._torch.randn((RANK, param.shape[1]))
        left = self._torch.randn((param.shape[0], RANK), generator=generator)
        param.addmm_(left, self._right[name], alpha=amplitude / math.sqrt(RANK))
