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

    The terminal is as before when this ends. Ctrl-C stays a signal. Ctrl-Z and Ctrl-S are keys: the one would freeze a
    process whose robot goes on, the other whoever says something.
    """
    if not os.isatty(descriptor):
        yield False
        return
    before = termios.tcgetattr(descriptor)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                ready = select.select([descriptor], [], [], LOOK_S)[0]
                pressed = os.read(descriptor, 64) if ready else b""
            except OSError:
                return  # the terminal is gone
            if ready and not pressed:
                return
            for key in pressed.decode(errors="replace"):
                handle(key)

    thread = threading.Thread(target=read, name="keys", daemon=True)
    tty.setcbreak(descriptor)
    _let_no_key_freeze(descriptor)
    try:
        thread.start()
        yield True
    finally:
        done.set()
        thread.join()
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _let_no_key_freeze(descriptor: int) -> None:
    attributes = termios.tcgetattr(descriptor)
    attributes[0] &= ~termios.IXON
    attributes[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(descriptor, termios.TCSADRAIN, attributes)
