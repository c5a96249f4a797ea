"""Data in and out: episodes as LeRobotDataset v3 or MCAP, datasets as demonstrations (docs/data.md)."""
