"""What reward models, DPO, GRPO and PPO share: losses, log-probabilities, references, rollouts and rewards."""
