"""The environment and the policy network that the options of `experiments.rl` name."""

from eggroll import envs
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.distributions import num_log_stds
from eggroll.experiments.rl.problem import MLP, Task


def load(config: Config) -> Task:
    """Make the environment and the policy that `config` names."""
    environment = envs.make(config.env, max_steps=config.max_steps)
    # The continuous policy of PPO has standard deviations of its own, outside the network.
    sampled = config.sampled_actions and not (config.algorithm == "ppo" and num_log_stds(environment.action_space))
    outputs = envs.output_size(environment.action_space, sampled=sampled)
    return Task(environment, MLP(config.hidden_sizes, outputs, config.activation), sampled, config.normalise)
