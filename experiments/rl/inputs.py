"""The environment and the policy network that the options of `experiments.rl` name."""

from eggroll import envs
from eggroll.experiments.common.options import refuse
from eggroll.experiments.rl.config import Config, preset_defaults
from eggroll.experiments.rl.distributions import num_log_stds
from eggroll.experiments.rl.problem import MLP, Task


def ignored_in(environment: envs.Environment, config: Config) -> dict[str, str]:
    """Return the options that are set and have no effect in the environment, each with the error that says so."""
    found = {}
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


def load(config: Config) -> Task:
    """Make the environment and the policy that `config` names; ValueError for an option that has no effect there."""
    environment = envs.make(config.env, max_steps=config.max_steps)
    refuse(ignored_in(environment, config))
    sampled = config.sampled_actions and _can_sample(environment, config)
    outputs = envs.output_size(environment.action_space, sampled=sampled)
    return Task(environment, MLP(config.hidden_sizes, outputs, config.activation), sampled, config.normalise)
