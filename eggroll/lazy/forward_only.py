"""A function as one flat jaxpr without derivative rules.

Nothing in an evolution strategy is differentiated, so custom derivative rules and rematerialisation are inlined before the
function is interpreted with lazy weights: `custom_jvp`, `custom_vjp`, `remat` and nested `jit` become their forward body, at
the top and inside the bodies of scan, while and cond. The rules then meet plain primitives only (`run_with_rules`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
from jax import Array

from eggroll.lazy.perturbed import is_perturbed, run_rule
from eggroll.lazy.ragged import ragged_dot_general
from eggroll.noise.once import computed_once

# Primitive name -> parameter that holds the forward body.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",  # the same from jax 0.11
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_IDENTITY = ("stop_gradient", "name")  # they matter to derivatives only
_CONTROL_FLOW = ("scan", "while", "cond")


def forward_only(function: Callable, *args: Any) -> tuple[jexc.ClosedJaxpr, Any, list[bool]]:
    """Trace `function` at the shapes of `args` and inline its derivative rules.

    Args:
        function: any JAX-traceable function.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Returns:
        `(jaxpr, out_tree, in_loops)`: `jaxpr` takes the flattened leaves of `args` and gives the flat outputs; `out_tree` is
        the tree of the outputs; `in_loops` says for every leaf whether a loop reads all of it each iteration.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(*args)
    inlined = jax.make_jaxpr(lambda *leaves: evaluate(closed.jaxpr, closed.consts, leaves, bind=_inline))(
        *jax.tree.leaves(args)
    )
    reread = _read_in_every_turn(inlined.jaxpr)
    return inlined, jax.tree.structure(out_shape), [variable in reread for variable in inlined.jaxpr.invars]


def _read_in_every_turn(jaxpr: Any) -> set:
    """Variables that a loop of the program reads whole on every iteration: constants of `while`, unsliced inputs of `scan`."""
    found: set = set()
    for equation in jaxpr.eqns:
        name, params, atoms = equation.primitive.name, equation.params, equation.invars
        if name == "while":
            atoms = atoms[params["cond_nconsts"] :][: params["body_nconsts"]]
        elif name == "scan":
            turns = zip(atoms, _close(params["jaxpr"]).in_avals, strict=True)
            atoms = [atom for atom, inside in turns if atom.aval.shape == inside.shape]
        else:
            continue
        found.update(atom for atom in atoms if not isinstance(atom, jexc.Literal))
    return found


def _close(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, jexc.ClosedJaxpr) else jexc.ClosedJaxpr(jaxpr, ())


def _rewrite(value: Any) -> Any:
    """Inline derivative rules in a control-flow parameter that holds a jaxpr or a tuple of them."""
    if isinstance(value, tuple) and value and all(isinstance(v, jexc.ClosedJaxpr) for v in value):
        return tuple(_rewrite(v) for v in value)
    if isinstance(value, jexc.ClosedJaxpr):
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in value.in_avals]
        return jax.make_jaxpr(lambda *leaves: evaluate(value.jaxpr, value.consts, leaves, bind=_inline))(*avals)
    return value


def evaluate(jaxpr: jexc.Jaxpr, consts: Sequence[Any], leaves: Sequence[Any], *, bind: Callable) -> list:
    """Evaluate a jaxpr; `bind(equation, operands)` evaluates one of its equations."""
    environment = dict(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, leaves, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jexc.Literal) else environment[atom]

    for equation in jaxpr.eqns:
        outputs = bind(equation, [read(atom) for atom in equation.invars])
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inline(equation: jexc.JaxprEqn, operands: Sequence[Any]) -> Any:
    """Bind the primitive of an equation, or the primitives of its forward body."""
    primitive, params, name = equation.primitive, equation.params, equation.primitive.name
    if name in _IDENTITY:
        return list(operands) if primitive.multiple_results else operands[0]
    if name == "ragged_dot_general":  # whose batching in JAX does not serve a population
        return ragged_dot_general(*operands, **params)
    if name in _INLINED:
        body = _close(params[_INLINED[name]])
        return evaluate(body.jaxpr, body.consts, operands, bind=_inline)
    if name in _CONTROL_FLOW:
        params = {key: _rewrite(value) for key, value in params.items()}
    return primitive.bind(*operands, **primitive.get_bind_params(params))


def run_with_rules(jaxpr: jexc.ClosedJaxpr) -> Callable[..., list]:
    """The function of a jaxpr that `forward_only` made, for plain and lazy operands."""
    given = set(jaxpr.jaxpr.invars)

    def run(leaves: Sequence[Any]) -> list:
        read: dict[Any, Array] = {}  # values that operations have read, by their variables

        def bind(equation: jexc.JaxprEqn, operands: Sequence[Any]) -> Any:
            primitive, atoms, params = equation.primitive, equation.invars, equation.params
            settled = list(operands)
            for place, (atom, value) in enumerate(zip(atoms, operands, strict=True)):
                if is_perturbed(value) and value.is_read_by(primitive, operands, place, params):
                    if atom not in read:
                        read[atom] = value.read(f"'{primitive.name}'", "", moves=False)
                    settled[place] = read[atom]
            if primitive.name == "dot_general" and any(map(is_perturbed, settled)):  # a product reads x twice
                pairs = zip(atoms, settled, strict=True)
                settled = [value if is_perturbed(value) or atom in given else computed_once(value) for atom, value in pairs]
            return run_rule(primitive, settled, params)

        return evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, bind=bind)

    return run
