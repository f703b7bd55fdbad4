"""An update of an optax transformation, one parameter or one block of a parameter at a time, as `splitting` reads it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import Array

from eggroll.noise.regions import Region
from eggroll.update.per_block import per_block_p
from eggroll.update.splitting import SPREADING, Reading


class SplitUpdate:
    """An update in parts; what belongs to no parameter is computed at the beginning, once.

    Args:
        reading: of the transformation, not "whole".
        states: its flat state; of the entries that belong to parameters, anything.
        extra: the extra arguments.
    """

    def __init__(self, reading: Reading, states: Sequence[Array], extra: Any):
        self._reading, jaxpr = reading, reading.jaxpr
        self._known = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        inputs = [*reading.shared_states(states), *jax.tree.leaves(extra)]
        self._known |= zip(reading.shared_inputs(), inputs, strict=True)
        noisy = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive is per_block_p]
        given = {atom for equation in noisy for atom in equation.invars[1:] if not isinstance(atom, jexc.Literal)}
        kinds = reading.shared().items()
        once = [var for var, kind in kinds if var.aval.shape == () or (var in given and not kind.uniform)]
        self._known |= zip(once, self._run(once, self._known), strict=True)

    def shared_states(self) -> list[Array]:
        """The new entries of the optimizer's state that belong to no parameter."""
        return self._run(self._reading.shared_states(self._reading.new_states), self._known)

    def of_leaf(
        self, leaf: int, region: Region, gradient: Array, param: Array, states: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        """Update a parameter, or a block of one that splits into elements.

        Args:
            leaf: its index.
            region: of the parameter.
            gradient: descent.
            param: as the optimizer sees it.
            states: its entries of the optimizer's state, cut like the gradient.

        Returns:
            Its update and its new entries of the state.
        """
        reading = self._reading
        known = self._known | dict(zip(reading.inputs(leaf), (gradient, param, *states), strict=True))
        update, *new_states = self._run(reading.ends(leaf), known, region if reading.elementwise[leaf] else None)
        return update, new_states

    def _run(self, ends: Sequence[Any], known: dict[Any, Any], region: Region | None = None) -> list[Any]:
        """Compute variables from known ones.

        Args:
            ends: the variables.
            known: values by variable.
            region: of the values of a parameter that is updated in blocks, where arrays with equal entries are scalars.
        """
        values, block = dict(known), None if region is None else region.sizes

        def read(atom: Any) -> Any:
            return jnp.asarray(atom.val, getattr(atom.aval, "dtype", None)) if isinstance(atom, jexc.Literal) else values[atom]

        for equation in self._reading.equations_of(ends, known):
            inputs, primitive = [read(atom) for atom in equation.invars], equation.primitive
            if region is not None and primitive is per_block_p:
                pairs = zip(inputs[1:], equation.invars[1:], strict=True)
                given = [jnp.broadcast_to(value, atom.aval.shape) for value, atom in pairs]
                outputs = [equation.params["function"](region, *given)]
            elif block is not None and primitive.name in SPREADING:
                outputs = inputs[:1]
            else:
                if block is not None and any(jnp.shape(value) for value in inputs):
                    inputs = [jnp.broadcast_to(value, block) for value in inputs]
                outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
                outputs = outputs if primitive.multiple_results else [outputs]
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(end) if block is None else jnp.broadcast_to(read(end), block) for end in ends]
