"""The server's socket: no message is left lying because another thread used the socket in the meantime."""

import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest
import zmq

from bridge.client import PolicyClient
from bridge.config import ConfigError
from bridge.messages import GetStatus, Serving, decode_reply, decode_request, encode
from runtime.router import Router

ENOUGH_S = 30.0
WAIT_MS = int(4 * ENOUGH_S * 1000)  # longer than any client waits: who is not woken is not answered


def test_the_receiver_is_woken_when_another_thread_used_the_socket_up() -> None:
    router = Router("tcp://127.0.0.1:*", None)
    with PolicyClient(router.endpoint, client="c") as client:
        client.post(GetStatus())
        while not router.waiting:
            router.wait(100)
        router.receive()
        assert not router.waiting
        client.post(GetStatus())
        router.wait(WAIT_MS)  # it has arrived, and nobody has looked at the socket since
        time.sleep(0.05)  # ZeroMQ looks for arrivals while it sends, but not within milliseconds of the last time
        other = threading.Thread(target=router.send, args=(b"nobody", Serving(version="v", previous="")))
        other.start()
        other.join()
        receiver = threading.Thread(target=router.wait, args=(WAIT_MS,), daemon=True)
        receiver.start()
        receiver.join(ENOUGH_S)
        assert not receiver.is_alive(), "a message was left lying"
        assert router.waiting
    router.close()


def test_clients_are_answered_by_another_thread_while_more_requests_arrive() -> None:
    router = Router("tcp://127.0.0.1:*", None)
    lock, stop = threading.Lock(), threading.Event()
    asked: SimpleQueue[tuple[bytes, int] | None] = SimpleQueue()

    def receive() -> None:
        while not stop.is_set():
            with lock:
                waiting = router.waiting
                if waiting:
                    identity, frames = router.receive()
                    asked.put((identity, decode_request(frames)[0].request))
            if not waiting:
                router.wait(WAIT_MS)

    def answer() -> None:
        while (item := asked.get()) is not None:
            with lock:
                router.send(item[0], Serving(request=item[1], version="v", previous=""))

    errors: list[BaseException] = []

    def ask() -> None:
        try:
            with PolicyClient(router.endpoint, client="c", timeout_s=ENOUGH_S) as client:
                for _ in range(300):
                    client.request(GetStatus(), Serving)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target, daemon=True) for target in (receive, answer)]
    clients = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads + clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert not errors, errors
    stop.set()
    with PolicyClient(router.endpoint, client="last") as client:
        client.post(GetStatus())  # wakes the receiver
        threads[0].join(ENOUGH_S)
    asked.put(None)
    for thread in threads:
        thread.join(ENOUGH_S)
        assert not thread.is_alive()
    router.close()
    router.close()


def test_what_is_sent_to_a_client_that_is_gone_is_counted() -> None:
    router = Router("tcp://127.0.0.1:*", None)
    context: zmq.Context[Any] = zmq.Context()
    with context.socket(zmq.DEALER) as dealer:
        dealer.connect(router.endpoint)
        dealer.send_multipart(encode(GetStatus(request=1)))
        while not router.waiting:
            router.wait(100)
        identity, _ = router.receive()
        assert not router.waiting
        router.send(identity, Serving(request=1, version="v", previous=""))
        assert dealer.poll(int(ENOUGH_S * 1000))
        assert decode_reply(dealer.recv_multipart())[0] == Serving(request=1, version="v", previous="")
    assert router.undeliverable == 0
    router.send(b"nobody", Serving(request=1, version="v", previous=""))
    assert router.undeliverable == 1
    context.destroy(linger=0)
    router.close()


def test_an_address_is_bound_once() -> None:
    router = Router("tcp://127.0.0.1:*", None)
    with pytest.raises(ConfigError, match="cannot listen on"):
        Router(router.endpoint, None)
    router.close()
