"""The runtime: serves action chunks, logs episodes, swaps and guards policy versions."""
