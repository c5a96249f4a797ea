"""The inference thread: joins waiting requests into one batch, runs the live policy once, samples each chunk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from bridge.backend import Float32
from runtime.bundle import PolicySpec
from runtime.policy import first_log_prob, log_prob, sample_chunk


class Infers(Protocol):
    """A policy as the server needs it; `runtime.policy.Policy` is one."""

    @property
    def spec(self) -> PolicySpec:
        """What it sees and gives."""
        ...

    @property
    def version(self) -> str:
        """Its content hash."""
        ...

    def tokens(self, instruction: str) -> NDArray[np.int64]:
        """The instruction as int64 `[L]`."""
        ...

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Float32, Float32]:
        """Batched inputs -> (mean, log_std), float32 `[B, h, d]` each."""
        ...


@dataclass(slots=True, eq=False)
class Pending:
    """A request that waits for its chunk. `tensors` are those of the observation, unbatched, and `prefix` `[c, d]` if
    actions are committed."""

    identity: bytes
    session: str
    request: int
    episode: str
    decision: int
    step: int
    instruction: str
    tensors: dict[str, NDArray[Any]]
    explore: bool
    arrived_s: float
    arm: str = ""
    """The version that its episode is to be driven by; empty for whatever is live."""


@dataclass(slots=True)
class Decided:
    """A finished decision: `actions` `[h, d]` and, if sampled, `log_probs`: the tensors of the log; or `error` if
    inference failed."""

    pending: Pending
    version: str
    actions: Float32
    log_probs: dict[str, Float32]
    error: str = ""


def decision_rng(episode: str, decision: int) -> np.random.Generator:
    """The generator of one decision's noise: it follows from the log alone, so any decision can be drawn again.

    Philox is made for that: the episode is its key, and a decision has 2^64 blocks of its counter to itself. Ids of
    episodes have at most 32 hexadecimal digits.
    """
    # Any `ISeedSequence` will do, as numpy documents; its stubs know one class only.
    counter = np.array([0, decision, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(_Key(episode), counter=counter))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """The id of an episode as the key of Philox. Given as `key=` it is the same, but numpy first asks the system for
    entropy that it then does not use, which takes longer than all else that a decision needs of its generator."""

    def __init__(self, episode: str) -> None:
        number = int(episode, 16)
        self._words = np.array([number % 2**64, number >> 64], np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[np.uint64]:
        """Philox asks for two words of 64 bits."""
        assert (n_words, dtype) == (2, np.uint64)
        return self._words


class InferenceThread:
    """Runs the policies on what is queued, at most `max_batch` requests at a time.

    `policy_of` gives the policy of an arm. It is asked for once a batch, so every chunk comes from exactly one version
    and a swap takes effect between two batches. Each session has at most one request waiting, hence first come, first
    served is fair.
    """

    def __init__(
        self, policy_of: Callable[[str], Infers], max_batch: int, done: Callable[[list[Decided]], None]
    ) -> None:
        self._policy_of = policy_of
        self._max_batch = max_batch
        self._done = done
        self._queue: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.batches = 0
        self.busy_s = 0.0
        """Wall time."""
        self.cpu_s = 0.0
        """Processor time of this thread; onnxruntime's own threads, if it has any, are not in it."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs; without it no request is answered."""
        return self._thread.is_alive()

    def submit(self, pending: Pending) -> None:
        """Queue a request; its `Decided` comes through `done`, on the inference thread."""
        with self._changed:
            self._queue.append(pending)
            self._changed.notify()

    def withdraw(self, pending: Pending) -> bool:
        """Take a request back, so that nothing is computed for it; False if that has begun already."""
        with self._changed:
            try:
                self._queue.remove(pending)
            except ValueError:
                return False
            return True

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish what is queued and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next():
            started_s, started_cpu_s = time.monotonic(), time.thread_time()
            arms = dict.fromkeys(pending.arm for pending in batch)
            decided = [
                item
                for arm in arms
                for item in decide(self._policy_of(arm), [pending for pending in batch if pending.arm == arm])
            ]
            self.busy_s += time.monotonic() - started_s
            self.cpu_s += time.thread_time() - started_cpu_s
            self.batches += 1
            self._done(decided)

    def _next(self) -> list[Pending]:
        """The next batch, once there is one; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            return [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]


def decide(policy: Infers, batch: list[Pending]) -> list[Decided]:
    """One inference for all of `batch`, then a chunk for each; if that fails, one inference for each."""
    try:
        mean, log_std = policy.infer(batch_inputs(policy, batch))
        expected = (len(batch), policy.spec.horizon, len(policy.spec.action.names))
        if mean.shape != expected or log_std.shape != expected:
            raise ValueError(f"the policy gave {mean.shape} and {log_std.shape}, expected {expected}")
    except Exception as error:  # noqa: BLE001 - whatever a foreign graph raises is reported to the client
        if len(batch) > 1:
            # One client's request must not cost the others their chunk.
            return [decided for pending in batch for decided in decide(policy, [pending])]
        return [_failed(batch[0], policy, f"inference failed: {error}")]
    return [_chunk(pending, policy, mean[i], log_std[i]) for i, pending in enumerate(batch)]


def _chunk(pending: Pending, policy: Infers, mean: Float32, log_std: Float32) -> Decided:
    """The chunk `[h, d]` of one request: a sample with its log-prob, or the mean."""
    if not np.isfinite(mean).all():
        return _failed(pending, policy, "the policy gave an action that is not finite")
    prefix = pending.tensors.get("prefix", mean[:0])
    if not pending.explore:
        return Decided(pending, policy.version, np.concatenate([prefix, mean[len(prefix) :]]), {})
    rng = decision_rng(pending.episode, pending.decision)
    correlation = policy.spec.noise_correlation
    actions = sample_after(prefix, mean, log_std, correlation, rng)
    log_probs = log_probs_after(len(prefix), actions, mean, log_std, correlation)
    if not (np.isfinite(actions).all() and all(np.isfinite(array).all() for array in log_probs.values())):
        return _failed(pending, policy, "the policy gave a standard deviation that cannot be sampled from")
    return Decided(pending, policy.version, actions, log_probs)


def sample_after(
    prefix: Float32, mean: Float32, log_std: Float32, noise_correlation: float, rng: np.random.Generator
) -> Float32:
    """A chunk `[h, d]` that begins with the committed actions `prefix` `[c, d]`; the rest is drawn as a chunk of its
    own, so that the noise begins where the policy's part does.
    """
    c = len(prefix)
    drawn = sample_chunk(mean[c:], log_std[c:], noise_correlation, rng)
    return np.concatenate([prefix, drawn]) if c else drawn


def log_probs_after(
    c: int, actions: Float32, mean: Float32, log_std: Float32, noise_correlation: float
) -> dict[str, Float32]:
    """What is logged of a sampled chunk: `log_prob` `[h]` and, where the noise is correlated, `first_log_prob` `[h]`;
    0 for the first `c` actions, which were not drawn.
    """
    nothing = np.zeros(c, np.float32)
    drawn = actions[c:], mean[c:], log_std[c:]
    log_probs = {"log_prob": np.concatenate([nothing, log_prob(*drawn, noise_correlation)])}
    if noise_correlation:
        log_probs["first_log_prob"] = np.concatenate([nothing, first_log_prob(*drawn)])
    return log_probs


def _failed(pending: Pending, policy: Infers, error: str) -> Decided:
    return Decided(pending, policy.version, np.zeros((0, 0), np.float32), {}, error)


def batch_inputs(policy: Infers, batch: list[Pending]) -> dict[str, NDArray[Any]]:
    """The graph's inputs `[B, ...]`, only those that the policy's spec names."""
    spec = policy.spec
    names = [f"image/{camera.name}" for camera in spec.cameras]
    if spec.state.names:
        names.append("state")
    inputs = {name: _stack([pending.tensors[name] for pending in batch]) for name in names}
    if spec.tokens:
        inputs["tokens"] = _stack([policy.tokens(pending.instruction) for pending in batch])
    if spec.prefix_steps:
        inputs["prefix"], inputs["prefix_mask"] = _prefixes(spec, batch)
    return inputs


def _prefixes(spec: PolicySpec, batch: list[Pending]) -> tuple[Float32, Float32]:
    """The committed actions `[B, p, d]` and their mask `[B, p]`, 0 behind them."""
    prefix = np.zeros((len(batch), spec.prefix_steps, len(spec.action.names)), np.float32)
    mask = np.zeros((len(batch), spec.prefix_steps), np.float32)
    for i, pending in enumerate(batch):
        committed = pending.tensors.get("prefix", prefix[i, :0])
        prefix[i, : len(committed)], mask[i, : len(committed)] = committed, 1.0
    return prefix, mask


def _stack(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
