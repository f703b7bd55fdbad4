"""Call an unmodified function with lazy perturbed parameters.

function -> jaxpr without derivative rules (`forward_only`) -> evaluated with the registered rules: `views`, `products`,
`lookups`, `sums`, `scaled`, `combined`, `control_flow`
"""

from collections.abc import Callable
from typing import Any

import jax

from eggroll.lazy import combined, control_flow, dense, lookups, products, scaled, sums, views  # noqa: F401  (registers the rules)
from eggroll.lazy.forward_only import forward_only, run_with_rules
from eggroll.lazy.perturbed import is_perturbed, to_plain


def apply_perturbed(function: Callable, params: Any, *args: Any) -> Any:
    """Call `function(params, *args)`, where leaves of `params` may be `PerturbedArray`.

    Args:
        function: any JAX function of a parameter pytree.
        params: the pytree, each leaf an array or a lazy one (`PerturbedArray`, `OffGrid`).
        *args: further pytrees of arrays.

    Returns:
        What the function returns, plain arrays.

    Raises:
        UseError (a ValueError): a perturbed leaf is used in a way that has no rule. Errors of the function itself are its own.
    """
    shapes = jax.tree.map(_plain_shape, params, is_leaf=is_perturbed)
    jaxpr, out_tree, in_loops = forward_only(function, shapes, *args)
    leaves = jax.tree.leaves((params, *args), is_leaf=is_perturbed)
    # Packed signs are unpacked once where a loop, such as one over tokens, would unpack them on every iteration.
    pairs = zip(leaves, in_loops, strict=True)
    leaves = [leaf.prepare_for_loops() if is_perturbed(leaf) and in_loop else leaf for leaf, in_loop in pairs]
    outputs = run_with_rules(jaxpr)(leaves)
    return jax.tree.unflatten(out_tree, [to_plain(output, "its result") for output in outputs])


def _plain_shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_perturbed(leaf) else leaf
