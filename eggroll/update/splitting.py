"""How far the update of an optax transformation can be split, read from its jaxpr.

    "elements"   every entry of a parameter is updated on its own: blocks of a parameter can be updated one after the other
    "leaves"     every parameter is updated on its own, such as by `lamb` or `adafactor`: one parameter after the other
    "whole"      parameters are mixed, such as by clipping to a global norm: everything at once

What depends on no parameter (step counters, schedules) is computed once for all. Nothing is assumed of how optax is written:
a transformation that is not recognised as elementwise is merely split less.
"""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import optax

from eggroll.lazy.forward_only import forward_only
from eggroll.update.per_block import per_block_p

# fmt: off
ELEMENTWISE = frozenset((
    "abs", "add", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul",
    "ne", "neg", "not", "or", "pow", "reduce_precision", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub",
    "tanh", "xor",
))
# fmt: on
SPREADING = ("broadcast_in_dim", "reshape", "squeeze")  # they keep that all entries are equal


@dataclasses.dataclass(frozen=True)
class Owned:
    """A value that depends on parameters."""

    elementwise: bool  # entry by entry
    through: str  # the first primitive that is not elementwise, or ""


@dataclasses.dataclass(frozen=True)
class Shared:
    """A value that depends on no parameter."""

    uniform: bool  # all entries are equal


class Reading:
    """An update of an optax transformation as one jaxpr, and what of it belongs to which parameter.

    Args:
        optimizer: with support for extra arguments.
        gradients: pytree of shapes and dtypes.
        opt_state: of the optimizer; shapes and dtypes count.
        params: pytree of shapes and dtypes, as the optimizer sees the parameters.
        extra: extra arguments of the update, pytrees by name; shapes and dtypes count.
    """

    def __init__(
        self, optimizer: optax.GradientTransformationExtraArgs, gradients: Any, opt_state: Any, params: Any, extra: Any
    ):
        def update(gradients: Any, params: Any, opt_state: Any, extra: Any) -> Any:
            return optimizer.update(gradients, opt_state, params, **extra)

        given = jax.eval_shape(lambda *trees: trees, gradients, params, opt_state, extra)
        self.jaxpr, _, _ = forward_only(update, *given)
        self.state_tree = jax.tree.structure(opt_state)
        num_leaves, num_states = len(jax.tree.leaves(gradients)), len(jax.tree.leaves(opt_state))
        inputs, outputs = self.jaxpr.jaxpr.invars, self.jaxpr.jaxpr.outvars
        self._gradients, self._params = inputs[:num_leaves], inputs[num_leaves : 2 * num_leaves]
        self._states, self._extra = inputs[2 * num_leaves :][:num_states], inputs[2 * num_leaves + num_states :]
        self._updates, self.new_states = outputs[:num_leaves], outputs[num_leaves:]
        self._makers = {out: eqn for eqn in self.jaxpr.jaxpr.eqns for out in eqn.outvars}
        self._analyse(constants_owned=True)
        if self.mixed:
            self._analyse(constants_owned=False)

    def _analyse(self, *, constants_owned: bool) -> None:
        """Find what every value depends on; constant arrays of the state may belong to the parameter they are used with."""
        owned_states = self._states_that_follow_parameters()
        self._parent: dict[Any, Any] = {}
        inputs = (*self.jaxpr.jaxpr.constvars, *self._extra, *self._states)
        self._kind: dict[Any, Owned | Shared] = {var: Shared(var.aval.shape == ()) for var in inputs}
        for gradient, param in zip(self._gradients, self._params, strict=True):
            self._kind[gradient] = self._kind[param] = Owned(True, "")
            self._union(gradient, param)
        for var, new in zip(self._states, self.new_states, strict=True):
            if var in owned_states or (constants_owned and new is var and var.aval.shape):
                self._kind[var] = Owned(True, "")
        for equation in self.jaxpr.jaxpr.eqns:
            self._analyse_equation(equation)
        ends = zip((*self._gradients, *self._states), (*self._updates, *self.new_states), strict=True)
        for before, after in ends:  # an update or a state may come from another parameter without an equation
            if isinstance(self._kind_of(before), Owned) and isinstance(self._kind_of(after), Owned):
                self._union(before, after)
        self._assign()

    def _states_that_follow_parameters(self) -> set:
        """Entries of the optimizer's state whose new value depends on a parameter or gradient, at once or over steps."""
        outputs = {var: self._inputs_of([out]) for var, out in zip(self._states, self.new_states, strict=True)}
        owned: set = set()
        moving = {*self._gradients, *self._params}
        while new := {var for var, inputs in outputs.items() if var not in owned and inputs & (moving | owned)}:
            owned |= new
        return owned

    def _analyse_equation(self, equation: Any) -> None:
        name, out = equation.primitive.name, equation.outvars[0]
        kinds = [self._kind_of(atom) for atom in equation.invars]
        own = [(kind, atom) for kind, atom in zip(kinds, equation.invars, strict=True) if isinstance(kind, Owned)]
        if not own:
            spreads = name in ELEMENTWISE or name in SPREADING
            uniform = spreads and all(kind.uniform for kind in kinds if isinstance(kind, Shared))
            self._kind.update((var, Shared(var.aval.shape == () or uniform)) for var in equation.outvars)
            return
        for _, atom in own:
            self._union(own[0][1], atom)
        through = next((kind.through for kind, _ in own if kind.through), "")
        of_noise = equation.primitive is per_block_p and len(own) == 1 and own[0][1] is equation.invars[0]
        fits = all(
            kind.uniform or of_noise if isinstance(kind, Shared) else kind.elementwise and atom.aval.shape == out.aval.shape
            for kind, atom in zip(kinds, equation.invars, strict=True)
        )
        elementwise = fits and (name in ELEMENTWISE or of_noise or (name == "broadcast_in_dim" and len(own) == 1))
        for var in equation.outvars:
            self._kind[var] = Owned(elementwise, through if elementwise or through else name)
            self._union(own[0][1], var)

    def _assign(self) -> None:
        """Which states belong to which parameter, and how far each parameter can be split."""
        roots = [self._find(gradient) for gradient in self._gradients]
        self.mixed = len(set(roots)) < len(roots)
        self._of_leaf, self._shared = [list[int]() for _ in roots], list[int]()
        alone = dict(zip(roots, range(len(roots)), strict=True))
        for index, (var, new) in enumerate(zip(self._states, self.new_states, strict=True)):
            owned = [self._find(v) for v in (new, var) if isinstance(self._kind_of(v), Owned)]
            root = next((own for own in owned if own in alone), None)
            if root is None:
                self._shared.append(index)
                self.mixed |= new is not var and isinstance(self._kind_of(new), Owned)
            else:
                self._of_leaf[alone[root]].append(index)
        self.elementwise = [self._splits(index) for index in range(len(roots))]

    def _splits(self, leaf: int) -> bool:
        shape = self._gradients[leaf].aval.shape
        states = [self._states[k] for k in self._of_leaf[leaf]]
        ends = [self._updates[leaf], *(self.new_states[k] for k in self._of_leaf[leaf])]
        kinds = [self._kind_of(end) for end in ends]
        same = all(var.aval.shape == shape for var in (*states, *ends))
        return same and all(kind.elementwise if isinstance(kind, Owned) else kind.uniform for kind in kinds)

    def reads_only_gradient(self, leaf: int) -> bool:
        """Whether a parameter's update is a function of its gradient alone: of no parameter, state or extra argument."""
        constant = {self._gradients[leaf], *self.jaxpr.jaxpr.constvars}
        return not self._of_leaf[leaf] and self._inputs_of([self._updates[leaf]]) <= constant

    @property
    def split(self) -> str:
        """How far the update can be split: "elements", "leaves" or "whole"."""
        if self.mixed:
            return "whole"
        return "elements" if all(self.elementwise) else "leaves"

    @property
    def reason(self) -> str:
        """The first primitive that is in the way of a finer split, or ""."""
        kinds = [self._kind_of(end) for end in (*self._updates, *self.new_states)]
        return next((kind.through for kind in kinds if isinstance(kind, Owned) and kind.through), "")

    def states_of(self, leaf: int, states: Sequence[Any]) -> list[Any]:
        """Those entries of a flat optimizer state that belong to a parameter."""
        return [states[k] for k in self._of_leaf[leaf]]

    def join_states(self, of_leaves: Iterable[Sequence[Any]], shared: Sequence[Any]) -> Any:
        """The optimizer's state from the entries of every parameter and the shared ones."""
        states: list[Any] = [None] * len(self._states)
        for places, values in zip((*self._of_leaf, self._shared), (*of_leaves, shared), strict=True):
            for place, value in zip(places, values, strict=True):
                states[place] = value
        return jax.tree.unflatten(self.state_tree, states)

    def shared_states(self, states: Sequence[Any]) -> list[Any]:
        """Those entries of a flat optimizer state that belong to no parameter."""
        return [states[k] for k in self._shared]

    def ends(self, leaf: int) -> list[Any]:
        """Variables of the results of a parameter: its update, and its new entries of the state."""
        return [self._updates[leaf], *(self.new_states[k] for k in self._of_leaf[leaf])]

    def inputs(self, leaf: int) -> list[Any]:
        """Variables that a parameter's update starts from: gradient, parameter, its entries of the state."""
        return [self._gradients[leaf], self._params[leaf], *(self._states[k] for k in self._of_leaf[leaf])]

    def shared_inputs(self) -> list[Any]:
        """Variables of the entries of the state that belong to no parameter, and of the extra arguments."""
        return [*self.shared_states(self._states), *self._extra]

    def shared(self) -> dict[Any, Shared]:
        """Variables that belong to no parameter, as far as an update reads them."""
        used = [atom for equation in self.jaxpr.jaxpr.eqns for atom in equation.invars]
        named = [atom for atom in (*used, *self._updates, *self.new_states) if not isinstance(atom, jexc.Literal)]
        kinds = {atom: self._kind[atom] for atom in named}
        return {atom: kind for atom, kind in kinds.items() if isinstance(kind, Shared)}

    def equations_of(self, ends: Sequence[Any], known: Container[Any]) -> list[Any]:
        """The equations that lead from known variables to `ends`, in order."""
        needed, waiting = set(), [end for end in ends if not isinstance(end, jexc.Literal)]
        while waiting:
            var = waiting.pop()
            if var in known or id(self._makers[var]) in needed:
                continue
            needed.add(id(self._makers[var]))
            waiting.extend(atom for atom in self._makers[var].invars if not isinstance(atom, jexc.Literal))
        return [equation for equation in self.jaxpr.jaxpr.eqns if id(equation) in needed]

    def _inputs_of(self, ends: Sequence[Any]) -> set:
        seen, waiting = set(), [*ends]
        while waiting:
            atom = waiting.pop()
            if not isinstance(atom, jexc.Literal) and atom not in seen:
                seen.add(atom)
                waiting.extend(self._makers[atom].invars if atom in self._makers else ())
        return seen - self._makers.keys()

    def _kind_of(self, atom: Any) -> Owned | Shared:
        return Shared(jnp.shape(atom.val) == ()) if isinstance(atom, jexc.Literal) else self._kind[atom]

    def _find(self, node: Any) -> Any:
        while self._parent.get(node, node) != node:
            node = self._parent[node]
        return node

    def _union(self, a: Any, b: Any) -> None:
        self._parent.setdefault(a, a)
        self._parent.setdefault(b, b)
        self._parent[self._find(b)] = self._find(a)
