"""Single keys from the terminal, while a command runs."""

from __future__ import annotations

import os
import select
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LOOK_S = 0.2  # how long the end of the command may wait for the reader


@contextmanager
def keys(handle: Callable[[str], None], descriptor: int) -> Iterator[bool]:
    """Call `handle` with each key that is pressed, on a thread of its own; yields whether there is a terminal.

    The terminal is as before when this ends. Ctrl-C stays a signal.
    """
    if not os.isatty(descriptor):
        yield False
        return
    before = termios.tcgetattr(descriptor)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if select.select([descriptor], [], [], LOOK_S)[0]:
                with suppress(OSError):
                    for key in os.read(descriptor, 64).decode(errors="replace"):
                        handle(key)

    thread = threading.Thread(target=read, name="keys", daemon=True)
    tty.setcbreak(descriptor)
    try:
        thread.start()
        yield True
    finally:
        done.set()
        thread.join()
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
