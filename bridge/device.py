"""The backend as its guard has it: one call at a time, and a stop with which nobody hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from bridge.backend import Backend, BackendError

LOOK_S = 0.05  # between two looks at whether a robot that is stopped or paused may go on
STOP_S = 1.0  # for a backend's stop() to return; until it has, the robot does not count as stopped


class _Stop:
    """One call of the backend's stop."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.done: Future[int] = Future()
        """Gives how often something had been sent when the call was made."""


class Device:
    """`with device:` for the calls of the control loop. All methods may be called from any thread."""

    def __init__(self, backend: Backend, check_running: Callable[[], None]) -> None:
        """`check_running` raises once the robot is stopped, which ends the wait for whoever hangs in the backend."""
        self._backend, self._check_running = backend, check_running
        self._period_s = 1.0 / backend.spec.control_hz
        self._lock = threading.Lock()
        self._stops = threading.Lock()
        self._under_way: _Stop | None = None
        self._sent = 0

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=LOOK_S):
            self._check_running()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def take(self) -> bool:
        """Enter if nobody is inside; whether that was so. Leave with `give_back`."""
        return self._lock.acquire(blocking=False)

    def give_back(self) -> None:
        """Leave."""
        self._lock.release()

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._lock.locked()

    def sent(self) -> None:
        """Something was sent that may move the robot: a stop that was called before does not count any more."""
        self._sent += 1

    def check_free(self) -> None:
        """Raises `BackendError` if the backend hangs in a call; a driver does not have to bear two at once."""
        stop = self._under_way
        if stop is not None and not stop.done.done():
            raise BackendError(f"stop() of {self._backend.spec.name} has not returned")
        if not self._lock.acquire(timeout=STOP_S):
            raise BackendError(f"a call of {self._backend.spec.name} has not returned")
        self._lock.release()

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Have the backend's stop called, on a thread of its own, and wait for it.

        Raises what it raises, and `BackendError` where it has not returned `timeout_s` after it was called; then it is
        not called a second time, and whoever stops next waits for the same call.
        """
        while True:
            with self._stops:
                if self._under_way is None:
                    self._under_way = self._begin()
                stop = self._under_way
            wait((stop.done,), max(0.0, stop.began_s + timeout_s - time.monotonic()))
            if not stop.done.done():
                raise BackendError(f"stop() of {self._backend.spec.name} has not returned")
            with self._stops:
                if self._under_way is stop:
                    self._under_way = None
            if stop.done.result() == self._sent:
                return

    def _begin(self) -> _Stop:
        stop = _Stop()
        try:
            threading.Thread(target=self._call, args=(stop,), name="stop", daemon=True).start()
        except RuntimeError:
            self._call(stop)  # no thread is to be had: better hang than not stop
        return stop

    def _call(self, stop: _Stop) -> None:
        # The present call of the loop is waited for, but not long: it may hang.
        held = self._lock.acquire(timeout=self._period_s / 2)
        sent = self._sent
        failure: BaseException | None = None
        try:
            self._backend.stop()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            failure = error
        finally:
            if held:
                self._lock.release()
        if failure is None:
            stop.done.set_result(sent)
        else:
            stop.done.set_exception(failure)
