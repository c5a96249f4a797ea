"""Transactions on the bus: ask, wait for the answers, ask again a few times, and count what went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bridge.backend import BackendError
from bridge.backends.so101 import packets
from bridge.backends.so101.packets import Decoder
from bridge.backends.so101.port import SerialPort
from bridge.backends.so101.registers import Register

_Request = Callable[[Sequence[int]], bytes]  # for the servos that have not answered yet


class BusError(BackendError):
    """Servos do not answer; `missing` has their ids."""

    def __init__(self, message: str, missing: tuple[int, ...]) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class Answer:
    """What a servo answered: its error byte and the bytes that were asked for."""

    error: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BusCounts:
    """Since the bus was opened. `retries` are repeated requests, `timeouts` those of them and before that were not
    answered in full, `checksum_errors` frames that arrived damaged, `strangers` whole packets that nobody asked for.
    """

    requests: int = 0
    retries: int = 0
    timeouts: int = 0
    checksum_errors: int = 0
    strangers: int = 0


class Bus:
    """The servos on one port, by id. Several threads may use it: a transaction is never mixed with another, and what
    must not wait goes `first`.

    Requests have no numbers. An answer that comes after its deadline can therefore be taken for that of the repeated
    request: it is then older than it seems, by `(1 + retries) * timeout_s` at most.
    """

    def __init__(self, port: SerialPort, names: Mapping[int, str], *, timeout_s: float, retries: int) -> None:
        """`names` are the joints' names for messages; `timeout_s` is for each of `1 + retries` attempts."""
        self._port = port
        self._names = dict(names)
        self._timeout_s = timeout_s
        self._retries = retries
        self._decoder = Decoder()
        self._lock = threading.Lock()
        self._turn = threading.RLock()
        self._requests = self._repeated = self._timeouts = self._strangers = 0

    @property
    def counts(self) -> BusCounts:
        """What has happened so far."""
        return BusCounts(self._requests, self._repeated, self._timeouts, self._decoder.checksum_errors, self._strangers)

    def ping(self, servo: int) -> bool:
        """Whether a servo answers."""
        return servo in self._ask([servo], lambda _: packets.ping(servo), 0)

    def read(self, servo: int, register: Register) -> int:
        """One register of one servo. Raises `BusError`."""
        answers = self._ask([servo], lambda _: packets.read(servo, register.address, register.size), register.size)
        self._need([servo], answers)
        return register.decode(answers[servo].data)

    def write(self, servo: int, register: Register, value: int) -> None:
        """One register of one servo, acknowledged by it. Raises `BusError`."""
        request = packets.write(servo, register.address, register.encode(value))
        self._need([servo], self._ask([servo], lambda _: request, 0))

    def sync_read(self, servos: Sequence[int], address: int, size: int) -> dict[int, Answer]:
        """The same registers of several servos. Only those that did not answer are asked again. Raises `BusError`."""
        answers = self.try_sync_read(servos, address, size)
        self._need(servos, answers)
        return answers

    def try_sync_read(self, servos: Sequence[int], address: int, size: int, *, once: bool = False) -> dict[int, Answer]:
        """The same from whoever answers; with `once` in a single attempt."""
        attempts = 1 if once else None
        return self._ask(servos, lambda missing: packets.sync_read(missing, address, size), size, attempts)

    def sync_write(self, address: int, data: Mapping[int, bytes]) -> None:
        """The same registers of several servos at once. None acknowledges it: a read tells what became of it."""
        with self._turn, self._lock:
            self._requests += 1
            self._port.write(packets.sync_write(address, data))

    @contextmanager
    def first(self) -> Iterator[None]:
        """Meanwhile only this thread's requests go out. One attempt that is under way is waited for, and no more."""
        with self._turn:
            yield

    def close(self) -> None:
        """Close the port; idempotent."""
        with self._lock:
            self._port.close()

    def _ask(
        self, servos: Sequence[int], request: _Request, size: int, attempts: int | None = None
    ) -> dict[int, Answer]:
        """Answers of `size` bytes by servo, of those who gave one within all attempts."""
        answers: dict[int, Answer] = {}
        for attempt in range(1 + self._retries if attempts is None else attempts):
            missing = [servo for servo in servos if servo not in answers]
            if not missing:
                break
            # Whoever is `first` has its turn between two attempts; a lock alone might come back to this thread.
            with self._turn:
                pass
            with self._lock:
                self._requests += 1
                self._repeated += attempt > 0
                # The protocol has no request numbers: what is left of an earlier request must not answer this one.
                self._port.flush_input()
                self._decoder.clear()
                self._port.write(request(missing))
                self._collect(missing, size, answers)
        return answers

    def _collect(self, missing: Sequence[int], size: int, answers: dict[int, Answer]) -> None:
        waiting = set(missing)
        deadline_s = time.monotonic() + self._timeout_s
        while waiting:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self._timeouts += 1
                return
            for packet in self._decoder.feed(self._port.read(left_s)):
                if packet.servo in waiting and len(packet.parameters) == size:
                    answers[packet.servo] = Answer(packet.code, packet.parameters)
                    waiting.discard(packet.servo)
                else:
                    self._strangers += 1

    def _need(self, servos: Sequence[int], answers: Mapping[int, Answer]) -> None:
        missing = tuple(servo for servo in servos if servo not in answers)
        if not missing:
            return
        who = " and ".join(f"{self._names.get(servo, 'unknown joint')} (servo {servo})" for servo in missing)
        attempts = f"{1 + self._retries} attempts of {1000 * self._timeout_s:g} ms"
        advice = (
            "no servo answers: see that the arm has power and that this is its port"
            if len(missing) == len(self._names)
            else "see the cable to that servo and to the one before it"
        )
        raise BusError(
            f"{self._port.path}: no answer from {who} in {attempts}; {advice} "
            f"(on this bus so far: {self._timeouts} timeouts, {self._decoder.checksum_errors} damaged packets)",
            missing,
        )
