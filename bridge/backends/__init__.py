"""Environments and robots that ship with fieldtune. Each module is imported only when its backend is asked for."""
