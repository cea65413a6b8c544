"""A web server for the tests of the downloader: images by name, and every way to answer badly."""

import io
import socket
import struct
import threading
from collections import Counter
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image


def picture(seed, height=9, width=13):
    """A JPEG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


class Server:
    """Answers GET /train/NAME; `bad` says by name how its first answers fail: one word each, "ok" for a good one."""

    def __init__(self, images, bad, pause):
        self.images, self.bad, self.pause = images, {name: list(words) for name, words in bad.items()}, pause
        self.asked, self.lines, self.over, self.connections = Counter(), [], threading.Event(), 0
        self._lock, self._socket = threading.Lock(), socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self):
        self.over.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self):
        while not self.over.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection):
        with connection, suppress(OSError):
            connection.settimeout(0.1)
            rest = b""
            while not self.over.is_set():
                try:
                    data = connection.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    return
                rest += data
                while b"\r\n\r\n" in rest:
                    head, rest = rest.split(b"\r\n\r\n", 1)
                    if not self._answer(connection, head.decode()):
                        return

    def _answer(self, connection, head):
        """Whether the connection stays open."""
        target = head.split(" ")[1]
        name = target.rsplit("/", 1)[1].removesuffix(".jpg")
        with self._lock:
            self.asked[name] += 1
            self.lines.append(head)
            words = self.bad.get(name)
            word = words.pop(0) if words else "ok"
        self.over.wait(self.pause)
        body = self.images.get(name)
        if body is None:
            word = "404"
        if word == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if word == "nothing":
            return False
        if word == "stall":
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:50])
            self.over.wait(60)
            return False
        if word == "drip":  # a byte now and then, so that no single wait is too long
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            for i in range(len(body)):
                connection.sendall(body[i : i + 1])
                if self.over.wait(0.05):
                    return False
            return True
        if word == "short":
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:-100])
            return False
        if word == "endless":  # no length, and the connection ends too early
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body[:-100])
            return False
        if word in ("chunks", "torn"):
            half, whole = len(body) // 2, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            for part in (body[:half], body[half:], b""):
                whole += f"{len(part):x}\r\n".encode() + part + b"\r\n"
            connection.sendall(whole if word == "chunks" else whole[:-120])
            return word == "chunks"
        if word == "last":  # the connection ends without a word after a good answer
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            return False
        status, headers = "200 OK", ""
        if word == "html":
            body = b"<!doctype html><title>Sign in</title>"
        elif word == "empty":
            body = b""
        elif word == "garbage":
            body = b"\xff\xd8\xff" + bytes(50) + b"\xff\xd9"
        elif word.isdigit():
            status, body, headers = f"{word} Told So", b"<Error/>", "Retry-After: 1\r\n" if word == "429" else ""
        elif word.startswith("to "):
            status, body, headers = "302 Found", b"", f"Location: {word[3:]}\r\n"
        connection.sendall(f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return True


@contextmanager
def serving(images, bad=None, pause=0.0):
    """A server for as long as the block lasts."""
    server = Server(images, bad or {}, pause)
    try:
        yield server
    finally:
        server.close()
