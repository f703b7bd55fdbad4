"""What is refused: uses of a parameter without a rule, each named with the parameter and what to write instead."""

from collections.abc import Sequence


class UseError(ValueError):
    """A parameter is used in a way that its perturbation does not allow."""


class UnsupportedUse(UseError):
    """A parameter planned as low-rank is used in a way that has no rule."""

    def __init__(self, path: str, where: str):
        self.path, self.where = path, where
        super().__init__(
            f"Parameter '{path}' is planned as low-rank but the function uses it in {where}, which has no low-rank rule; "
            f"put the rule ('{path}', eggroll.Dense()) first in `perturbation`."
        )


class UnconvertedUse(UseError):
    """An int8 parameter with floating noise is used in arithmetic before its conversion to a float."""

    def __init__(self, path: str, where: str):
        super().__init__(
            f"int8 parameter '{path}' has floating noise but is used in {where} before it is a float: write "
            "param.astype(x.dtype) first, or give it the rule Integer() or Frozen()."
        )


class FailedUse(UseError):
    """The rule of a primitive raised an error, or the primitive itself did, with a perturbed parameter as an operand."""

    def __init__(self, paths: Sequence[str], primitive: str, error: Exception):
        names = " and ".join(f"'{path}'" for path in paths)
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        super().__init__(
            f"'{primitive}' failed with perturbed parameter {names}, where the function alone could be traced: "
            f"{type(error).__name__}: {reason}. Put the rule ('{paths[0]}', eggroll.Dense()) first in `perturbation`."
        )
