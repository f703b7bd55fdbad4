"""PPO and uniform random actions, compared at equal steps."""
