"""As much of a runtime as a bridge needs to begin an episode: `runtime_process.py ENDPOINT`; made to be killed.

Each chunk takes minutes to play, and its actions cannot be taken for the hold action.
"""

from __future__ import annotations

import sys

import numpy as np
import zmq

from bridge.endpoint import claim_ipc
from bridge.messages import (
    Assignment,
    Chunk,
    Hello,
    Infer,
    Message,
    NextEpisode,
    Orders,
    Watch,
    Welcome,
    decode_request,
    encode,
)

ACTION = 0.25


def main(endpoint: str) -> None:
    """Serve until killed."""
    claim = claim_ipc(endpoint)
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    while claim:
        identity, *frames = socket.recv_multipart()
        message, _ = decode_request(frames)
        arrays, reply = {}, Message()
        match message:
            case Hello():
                reply = Welcome(request=message.request, session="s", version="v", horizon=10_000)
            case NextEpisode():
                reply = Assignment(request=message.request, episode="e", task="reach", seed=0, horizon_steps=1_000_000)
            case Infer():
                reply = Chunk(request=message.request, episode="e", decision=1, version="v")
                arrays = {"actions": np.full((10_000, 2), ACTION, np.float32)}
            case Watch():
                reply = Orders(request=message.request)
        socket.send_multipart([identity, *encode(reply, arrays)])


if __name__ == "__main__":
    main(*sys.argv[1:])
