"""Messages between the engine and its workers over a local socket: a JSON header, then raw arrays. Never pickle."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import aligned_zeros

_LENGTH = struct.Struct("<Q")


class Disconnected(Exception):
    """The other end is gone."""


def send(peer: socket.socket, header: dict[str, Any], arrays: Sequence[HostArray] = ()) -> None:
    """Send one message. Raises Disconnected, and TimeoutError where the socket has a timeout."""
    described = [[array.dtype.str, list(array.shape)] for array in arrays]
    text = json.dumps({"header": header, "arrays": described}).encode()
    try:
        peer.sendall(_LENGTH.pack(len(text)) + text)
        for array in arrays:
            peer.sendall(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    except TimeoutError:
        raise
    except OSError as error:
        raise Disconnected(str(error)) from error


def receive(peer: socket.socket) -> tuple[dict[str, Any], list[HostArray]]:
    """Receive one message; blocks. Raises Disconnected, and TimeoutError where the socket has a timeout."""
    (length,) = _LENGTH.unpack(_exactly(peer, _LENGTH.size).data)
    message = json.loads(bytes(_exactly(peer, length)))
    arrays = []
    for dtype, shape in message["arrays"]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays.append(_exactly(peer, size).view(dtype).reshape(shape))
    return message["header"], arrays


def _exactly(peer: socket.socket, size: int) -> HostArray:
    buffer = aligned_zeros(size)
    view, done = buffer.data, 0
    while done < size:
        try:
            got = peer.recv_into(view[done:])
        except TimeoutError:
            raise
        except OSError as error:
            raise Disconnected(str(error)) from error
        if not got:
            raise Disconnected("end of stream")
        done += got
    return buffer
