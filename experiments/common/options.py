"""Options that cannot take effect are errors: a table per command, one check, one wording.

    --ppo.clip has no effect with --algorithm eggroll: it belongs to ppo.

An option counts as set where its value differs from the command's defaults: the command line cannot tell `--rank 1` from a
default of 1. Suites pass options to runs of several kinds, each of which gets those that take effect there.
"""

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple


class Rule(NamedTuple):
    """Options that take effect only in some configurations of a command."""

    options: tuple[str, ...]  # such as "sigma" or "grpo.clip"; "grpo" stands for all options that begin with it
    reason: Callable[[Any], str | None]  # configuration -> None where they take effect, else "with --x y: why"


def only_with(choice: str, values: Sequence[str], *options: str) -> Rule:
    """Return the rule of options that belong to some values of another option."""
    owners = " and ".join(filter(None, (", ".join(values[:-1]), values[-1])))

    def reason(config: Any) -> str | None:
        chosen = getattr(config, choice)
        return None if chosen in values else f"with {flag(choice)} {chosen}: it belongs to {owners}"

    return Rule(options, reason)


def unless(ignored: Callable[[Any], bool], reason: str, *options: str) -> Rule:
    """Return the rule of options that have no effect where `ignored(configuration)`."""
    return Rule(options, lambda config: reason if ignored(config) else None)


def flag(option: str) -> str:
    """Return an option as on the command line."""
    return f"--{option.replace('_', '-')}"


def option_values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the options of a configuration with their values; those of a nested configuration have dotted names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        found |= option_values(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def option_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of the options of a configuration, named as `option_values` names them."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        found |= option_types(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: hint}
    return found


def replace_options(config: Any, options: Mapping[str, Any]) -> Any:
    """Return a configuration with other values of some options, named as `option_values` names them."""
    for name, value in options.items():
        group, _, option = name.rpartition(".")
        part = dataclasses.replace(getattr(config, group), **{option: value}) if group else value
        config = dataclasses.replace(config, **{group or option: part})
    return config


def check_choices(config: Any) -> None:
    """Raise ValueError for an option of a few values that has another one, as only Python or an old journal can give it."""
    values = option_values(config)
    for name, hint in option_types(config).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if choices and values[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {values[name]!r}.")


def check_integers(config: Any, *names: str, least: int = 1) -> None:
    """Raise ValueError for the first of some options that is below the least value; None is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value}.")


def check_seeds(config: Any) -> None:
    """Raise ValueError unless the seeds of the runs, seed, seed + 1, ..., are numbers that JAX's keys tell apart."""
    check_integers(config, "seeds")
    if not 0 <= config.seed <= 2**32 - config.seeds:
        raise ValueError(f"seed must be an integer from 0 to {2**32 - config.seeds}, got {config.seed}.")


def covers(rule: Rule, option: str) -> bool:
    """Return whether a rule is about an option."""
    return any(option == name or option.startswith(f"{name}.") for name in rule.options)


def ignored_options(config: Any, rules: Sequence[Rule], *defaults: Any) -> dict[str, str]:
    """Return the options that are set and have no effect, each with the error that says so.

    Args:
        config: a dataclass of options.
        rules: of the command.
        defaults: configurations; an option that differs from all of them is set.
    """
    known = [option_values(default) for default in defaults]
    found: dict[str, str] = {}
    for option, value in option_values(config).items():
        if all(value != values[option] for values in known):
            reasons = [reason for rule in rules if covers(rule, option) and (reason := rule.reason(config)) is not None]
            found |= {option: f"{flag(option)} has no effect {reasons[0]}."} if reasons else {}
    return found


def refuse(ignored: Mapping[str, str]) -> None:
    """Raise ValueError for the first of some options that have no effect."""
    for error in ignored.values():
        raise ValueError(error)


def effective(options: Mapping[str, Any], config: Any, rules: Sequence[Rule]) -> dict[str, Any]:
    """Return `options`, named as those of a configuration, without those that have no effect, set or not."""
    without = {name for rule in rules if rule.reason(config) is not None for name in rule.options}
    return {name: value for name, value in options.items() if name not in without}


def _name(argument: str) -> str | None:
    """The option that an argument of a command line names; None: a value."""
    if not argument.startswith("--"):
        return None
    *outer, last = argument[2:].partition("=")[0].replace("-", "_").split(".")
    return ".".join([*outer, last.removeprefix("no_")])


def drop_options(arguments: Sequence[str], options: Collection[str]) -> tuple[str, ...]:
    """Return a command line without some options and their values."""
    kept, name = [], None
    for argument in arguments:
        name = _name(argument) or name
        if name not in options:
            kept.append(argument)
    return tuple(kept)


def check_passed(arguments: Sequence[str], *, own: Sequence[str], ignored: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError unless every option that a suite passes on takes effect in one of its runs.

    Args:
        arguments: options that the suite passes to its runs.
        own: options that the suite sets for every run.
        ignored: `ignored_options` of every run.
    """
    for name in filter(None, map(_name, arguments)):
        if name in own:
            raise ValueError(f"{flag(name)} cannot be given to a suite, which sets it for every run.")
        if ignored and all(name in errors for errors in ignored):
            raise ValueError(ignored[0][name])
