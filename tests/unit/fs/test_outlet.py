"""Bytes that leave a socket from many buffers (taskvm.fs.outlet)."""

import socket
import threading

from taskvm.fs.outlet import MAX_IOVECS, send_all, unread


def test_buffers_arrive_whole_and_in_order_through_a_socket_that_takes_few() -> None:
    buffers = [bytes([number % 251]) * (number % 700) for number in range(3 * MAX_IOVECS)]
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        sending = threading.Thread(target=lambda: (send_all(near, buffers), near.close()))
        sending.start()
        arrived = b"".join(iter(lambda: far.recv(1000), b""))
        sending.join()

    assert arrived == b"".join(buffers)


def test_what_the_other_side_has_not_read_is_counted() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"x" * 100)
        before = unread(near)
        far.recv(1000)

        assert before > 0
        assert unread(near) == 0
