"""A backend in another process or on another computer: `bridge.backends.remote` is the near side of it."""
