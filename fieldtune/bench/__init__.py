"""What serving, rollout, swap and logging cost on this computer, each against its goal in one run."""
