"""The trainer: demonstrations, supervised fine-tuning, action-chunked PPO with self behaviour cloning."""
