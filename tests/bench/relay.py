"""A TCP relay that makes a local S3 server as slow to answer as one far away, and counts.

Each request waits once, before its first bytes are passed on; the rest of a large upload
and all answers are passed on at once.
"""

from __future__ import annotations

import asyncio
import re
import threading
from asyncio import StreamReader, StreamWriter
from collections import Counter
from contextlib import suppress

CHUNK = 256 * 1024  # bytes
# What a client sends next on a connection begins so only where it is a request.
REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
LISTING = re.compile(rb"[?&](list-type|prefix|uploads|uploadId)\b")
KINDS = ("GET", "HEAD", "LIST", "PUT", "COPY", "POST", "DELETE")


def kind_of(request: bytes) -> str | None:
    """The kind of the request that these bytes begin: its HTTP method, but LIST for a
    listing and COPY for a copy. None where they begin none."""
    if not (match := REQUEST.match(request)):
        return None
    if match[1] == b"GET" and LISTING.search(match[2]):
        return "LIST"
    if match[1] == b"PUT" and b"\r\nx-amz-copy-source:" in request.lower():
        return "COPY"
    return match[1].decode()


class Relay:
    """A relay to a port of 127.0.0.1 that holds each request back so many seconds; `counts`
    has the requests by kind."""

    def __init__(self, server_port: int, delay: float) -> None:
        self.server_port = server_port
        self.delay = delay
        self.counts: Counter[str] = Counter()

    async def pass_on(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Passes on what one side sends, until it ends; requests are counted and wait."""
        while chunk := await reader.read(CHUNK):
            kind = kind_of(chunk)
            if kind:
                self.counts[kind] += 1
                await asyncio.sleep(self.delay)
            writer.write(chunk)
            await writer.drain()

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Serves one connection of a client until either side ends it."""
        with suppress(OSError):
            ends = await asyncio.open_connection("127.0.0.1", self.server_port)
            pairs = (reader, ends[1]), (ends[0], writer)
            ways = [asyncio.ensure_future(self.pass_on(*pair)) for pair in pairs]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            ends[1].close()
        writer.close()

    def start(self) -> int:
        """Serves in a thread that ends with this process; returns the port of 127.0.0.1."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        server = asyncio.start_server(self.serve, "127.0.0.1", 0, backlog=1024)
        listening = asyncio.run_coroutine_threadsafe(server, loop)
        return listening.result().sockets[0].getsockname()[1]
