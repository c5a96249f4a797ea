"""The backend as its guard has it: one call at a time, and a stop with which nobody hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from bridge.backend import Backend, BackendError

LOOK_S = 0.05  # between two looks at whether a robot that is stopped or paused may go on
STOP_S = 1.0  # for a backend's stop() to return; until it has, the robot does not count as stopped


class Device:
    """`with device:` for the calls of the control loop. All methods may be called from any thread."""

    def __init__(self, backend: Backend, check_running: Callable[[], None]) -> None:
        """`check_running` raises once the robot is stopped, which ends the wait for whoever hangs in the backend."""
        self._backend, self._check_running = backend, check_running
        self._period_s = 1.0 / backend.spec.control_hz
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self._last_stop: Future[None] | None = None

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

    def stop(self) -> None:
        """Call the backend's stop, on a thread of its own. Raises what it raises, and `BackendError` where it has not
        returned in time; then it is not called a second time before it has.
        """
        with self._stopping:
            self.check_stop_returned()
            done: Future[None] = Future()
            self._last_stop = done
            threading.Thread(target=self._call_stop, args=(done,), name="stop", daemon=True).start()
            wait((done,), STOP_S)
            self.check_stop_returned()
        done.result()

    def check_stop_returned(self) -> None:
        """Raises `BackendError` if the backend still hangs in a stop: a driver does not have to bear two calls."""
        if self._last_stop is not None and not self._last_stop.done():
            raise BackendError(f"stop() of {self._backend.spec.name} has not returned")

    def _call_stop(self, done: Future[None]) -> None:
        # The present call of the loop is waited for, but not long: it may hang.
        held = self._lock.acquire(timeout=self._period_s / 2)
        try:
            self._backend.stop()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            done.set_exception(error)
        else:
            done.set_result(None)
        finally:
            if held:
                self._lock.release()
