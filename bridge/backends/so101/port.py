"""A serial port on Linux, with nothing but the standard library: raw bytes at 1 Mbit/s, and deadlines on reads."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios
import time
import tty

from bridge.backend import BackendError

SPEEDS = {
    1_000_000: "B1000000",
    500_000: "B500000",
    115_200: "B115200",
    57_600: "B57600",
}
"""Baud rates of the servos that a Linux terminal knows."""

_READ_BYTES = 4096
_TALK_S = 0.5  # the port's own buffer takes a packet at once; longer means that the adapter is stuck


class PortError(BackendError):
    """The port cannot be opened, or is gone."""


class SerialPort:
    """One open port, locked against a second bridge on this computer."""

    def __init__(self, path: str, baud: int) -> None:
        """Open it. Raises `PortError` with what to do."""
        self.path = path
        speed = getattr(termios, SPEEDS[baud], None) if baud in SPEEDS else None
        if speed is None:
            raise PortError(f"{path}: this system's serial ports cannot run at {baud} baud")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise PortError(
                f"{path}: cannot be opened: {error.strerror}; {_ADVICE.get(error.errno or 0, _PLUG)}"
            ) from error
        try:
            self._claim(speed)
        except BaseException:
            os.close(self._fd)
            raise

    def _claim(self, speed: int) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PortError(
                f"{self.path}: another process holds this arm; stop it first (`fuser {self.path}` tells which)"
            ) from error
        try:
            tty.setraw(self._fd, termios.TCSANOW)
            settings = termios.tcgetattr(self._fd)
            settings[2] |= termios.CLOCAL | termios.CREAD
            settings[4] = settings[5] = speed
            termios.tcsetattr(self._fd, termios.TCSANOW, settings)
        except termios.error as error:
            raise PortError(f"{self.path}: is not a serial port: {error.args[-1]}") from error

    def flush_input(self) -> None:
        """Throw away what has arrived: it belongs to a request that was given up."""
        try:
            termios.tcflush(self._fd, termios.TCIFLUSH)
        except termios.error as error:
            raise self._gone(error.args[-1]) from error

    def write(self, data: bytes) -> None:
        """Hand all bytes to the system. Raises `PortError` if the port is gone or stuck."""
        deadline_s = time.monotonic() + _TALK_S
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not select.select((), (self._fd,), (), left_s)[1]:
                    raise self._gone("it takes no more bytes") from None
            except OSError as error:
                raise self._gone(str(error.strerror)) from error

    def read(self, timeout_s: float) -> bytes:
        """What has arrived, after waiting for at most `timeout_s` for the first byte; empty if there is none."""
        try:
            if not select.select((self._fd,), (), (), max(timeout_s, 0.0))[0]:
                return b""
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self._gone(str(error.strerror)) from error
        if not data:
            raise self._gone("end of file")
        return data

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _gone(self, why: str) -> PortError:
        return PortError(f"{self.path}: the port is gone ({why}); {_PLUG}")


_PLUG = "see that the arm's USB cable is plugged in (`ls /dev/serial/by-id` lists the ports)"
_ADVICE = {
    errno.EACCES: "add this user to the group of the port (`sudo usermod -a -G dialout $USER`) and log in again",
    errno.EBUSY: "another process holds it",
}
