"""The parts of `fieldtune walk`: one deployment with its accidents, step by step."""
