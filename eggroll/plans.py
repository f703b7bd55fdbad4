"""The plan of a strategy's parameters: made by the first function that uses them, compared with every later one.

Plans are kept in the memo (`programs`), by the value of the strategy and the shapes and dtypes of the parameters.
"""

from collections.abc import Callable
from typing import Any

from eggroll import programs
from eggroll.noise.plan import Plan
from eggroll.state import check_not_consumed


def known_plan(strategy: Any, params: Any, *, needed_by: str) -> Plan:
    """Return the plan of parameters; ValueError, naming what needed it, when there is none yet, or they were consumed."""
    check_not_consumed(params)
    plan = programs.find("plan", strategy, programs.signature(params))
    if plan is None:
        own = hasattr(strategy, "loss")  # a strategy that knows the function it plans for
        how = "plan(state, batch)" if own else "ask(state).apply(fn, batch) or plan(state, batch, function=fn)"
        raise ValueError(f"{needed_by} needs the plan: call {how}")
    return plan


def checked_plan(strategy: Any, function: Any, params: Any, inputs: Any, *, make: Callable[[], Plan]) -> Plan:
    """Return the plan of parameters, checked against their uses in a function; the first function makes it.

    Args:
        strategy: a frozen value.
        function: the user's function.
        params: pytree of parameters.
        inputs: what else decides the trace, such as the batch; only shapes and dtypes count.
        make: reads the plan of the function.

    Raises:
        ValueError: the function uses a parameter differently from the function that came first; the message names it.
    """
    shapes = programs.signature(params)
    planned = programs.find("plan", strategy, shapes)
    own = programs.remember("uses", strategy, function, shapes, programs.signature(inputs), make=make)
    if planned is None:
        programs.store("plan", strategy, shapes, value=own)
        return own
    planned.check_uses(own)
    return planned


def plans_of(strategy: Any) -> list[Plan]:
    """Return all plans of a strategy, to send them along with it."""
    return programs.find_all("plan", strategy)


def adopt_plans(strategy: Any, plans: list[Plan]) -> None:
    """Take over plans that were made for the same strategy in another process; ValueError where there is a different one."""
    for plan in plans:
        known = programs.find("plan", strategy, programs.signature(plan.shapes))
        if known not in (None, plan):
            raise ValueError("the strategy has another plan for parameters of these shapes.")
        programs.store("plan", strategy, programs.signature(plan.shapes), value=plan)
