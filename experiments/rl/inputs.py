"""The environment and the policy network that the options of `experiments.rl` name."""

import dataclasses

import flax.linen as nn

from eggroll import envs
from eggroll.envs.checks import describe_error
from eggroll.experiments.rl.config import Config, preset_defaults
from eggroll.experiments.rl.distributions import num_log_stds
from eggroll.experiments.rl.imports import find_class, import_code
from eggroll.experiments.rl.networks import CNN, GRU, MLP, check_network, is_image
from eggroll.experiments.rl.problem import Task


def ignored_in(environment: envs.Environment, config: Config) -> dict[str, str]:
    """Return the options that are set and have no effect in the environment, each with the error that says so."""
    named = dataclasses.replace(config, network=_network_name(config, environment)).ignored()
    found = {"activation": named["activation"]} if "activation" in named else {}
    if config.render and environment.draw is None:
        found["render"] = (
            f"--render has no effect with --env {config.env}: it cannot be drawn; leave it out or say --no-render."
        )
    if config.sampled_actions and not preset_defaults(config).sampled_actions and not _can_sample(environment, config):
        found["sampled_actions"] = (
            f"--sampled-actions has no effect with --algorithm ppo and --env {config.env}: PPO always samples in training, and "
            "never samples continuous actions in evaluation."
        )
    return found


def _can_sample(environment: envs.Environment, config: Config) -> bool:
    """Whether the network's actions can be sampled: the continuous policy of PPO has standard deviations outside of it."""
    return not (config.algorithm == "ppo" and num_log_stds(environment.action_space))


def _network_name(config: Config, environment: envs.Environment) -> str:
    return config.network or ("cnn" if is_image(environment) else "mlp")


def make_environment(config: Config) -> envs.Environment:
    """Make the environment that `config` names, after the imports that register it; an error of it is a ValueError."""
    for source in config.imports:
        import_code(source, "--import")
    try:
        return envs.make(config.env, max_steps=config.max_steps)
    except TypeError as error:  # of the checks of a registered environment
        raise ValueError(str(error)) from error


def make_network(config: Config, environment: envs.Environment, *, outputs: int) -> nn.Module:
    """Make the policy network; ValueError where it does not fit the environment or the algorithm."""
    name = _network_name(config, environment)
    if name == "cnn" and not is_image(environment):
        shape = environment.observation_shape
        raise ValueError(f"--network cnn needs images [height, width, channels], env '{config.env}' has observations {shape}.")
    if ":" in name:
        found = find_class(name, "--network")
        try:
            network = found(outputs=outputs)
        except Exception as error:  # the user's code
            made = f"--network {name} is made as {found.__name__}(outputs={outputs}), which"
            raise ValueError(f"{describe_error(made, error)}.") from error
    else:
        network = {"mlp": MLP, "cnn": CNN, "gru": GRU}[name](config.hidden_sizes, outputs, config.activation)
    if config.algorithm == "ppo" and hasattr(network, "initial_memory"):
        raise ValueError(f"--network {name} has a memory, which --algorithm ppo does not train; use eggroll or openes.")
    try:
        check_network(name, network, environment, outputs=outputs)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return network


def make_critic(config: Config, task: Task) -> nn.Module:
    """Make PPO's value network: convolutional where the policy is, else dense."""
    kind = CNN if isinstance(task.network, CNN) and not isinstance(task.environment.action_space, envs.PerAgent) else MLP
    return kind(config.hidden_sizes, 1, config.activation)


def load(config: Config) -> Task:
    """Make the environment and the policy that `config` names. A run that begins refuses options that are `ignored_in` it."""
    environment = make_environment(config)
    sampled = config.sampled_actions and _can_sample(environment, config)
    outputs = envs.output_size(environment.action_space, sampled=sampled)
    return Task(environment, make_network(config, environment, outputs=outputs), sampled, config.normalise)
