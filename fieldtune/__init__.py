"""The command line of fieldtune."""

__version__ = "0.1.0"
