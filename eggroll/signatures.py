"""How a function of the user's is called: one wording of the error for fitness, losses, environments and policies."""

import inspect
from collections.abc import Callable, Sequence


def check_signature(role: str, function: Callable, arguments: Sequence[str]) -> None:
    """Raise TypeError unless a function of the user's can be called with some positional arguments.

    Args:
        role: what the function is, for the message.
        function: any callable; one without a readable signature is accepted.
        arguments: their names.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{role} is called as {role}({', '.join(arguments)}), but {name}{signature} {_reason(error)}."
        ) from None


def _reason(error: TypeError) -> str:
    """What is wrong with a call: "missing a required argument: 'x'" and the like."""
    return {"too many positional arguments": "takes fewer arguments"}.get(str(error), f"is {error}")
