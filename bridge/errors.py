"""The base of all errors whose message alone tells a user what is wrong and what to do; others are bugs."""


class FieldtuneError(Exception):
    """An error for people: the command line prints its message without a traceback and exits with 1."""
