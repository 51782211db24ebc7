"""A TCP relay that makes a local HTTP server as slow to answer as one far away.

    python tests/bench/relay.py --listen 9001 --to 127.0.0.1:9000 --delay 25

Each request waits once: its first bytes on a connection that is idle, or whose last answer
has begun, are passed on late, the rest of a large upload at once, like all answers. An
interim answer (100 Continue) is no answer: the body that it asks for does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

CHUNK = 256 * 1024  # bytes
INTERIM = b"HTTP/1.1 100 "


@dataclass
class Connection:
    """A client's connection, and whether its next bytes begin a request."""

    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    delay: float  # seconds
    is_new_request: bool = True

    async def pass_requests(self) -> None:
        """Passes on what the client sends, until it ends."""
        (reader, _), (_, writer) = self.client, self.server
        while chunk := await reader.read(CHUNK):
            if self.is_new_request:
                self.is_new_request = False
                await asyncio.sleep(self.delay)
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    async def pass_answers(self) -> None:
        """Passes on what the server sends, until it ends."""
        (reader, _), (_, writer) = self.server, self.client
        while chunk := await reader.read(CHUNK):
            final = chunk
            if chunk.startswith(INTERIM):
                final = chunk.partition(b"\r\n\r\n")[2]
            if final:
                self.is_new_request = True
            writer.write(chunk)
            await writer.drain()

    async def run(self) -> None:
        """Passes on both ways, until the server or a fault ends the connection."""
        answers = asyncio.ensure_future(self.pass_answers())
        requests = asyncio.ensure_future(self.pass_requests())
        try:
            with suppress(OSError):
                await asyncio.wait(
                    (answers, requests), return_when=asyncio.FIRST_COMPLETED
                )
                if not answers.done():
                    await requests  # a fault of which ends this
                await answers
        finally:
            for task in (answers, requests):
                task.cancel()
            await asyncio.gather(answers, requests, return_exceptions=True)
            for _, writer in (self.client, self.server):
                writer.close()


class Relay:
    """A relay to a server, on a socket that listens already."""

    def __init__(self, to_host: str, to_port: int, delay: float, port: int) -> None:
        """`delay` is in seconds; `port` is of 127.0.0.1, and 0 takes a free one."""
        self.server = (to_host, to_port)
        self.delay = delay
        self.socket = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port: int = self.socket.getsockname()[1]
        self.ready = threading.Event()
        # asyncio itself would let go of them amid their work.
        self.tasks: set[asyncio.Task[None] | None] = set()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serves one connection of a client."""
        self.tasks.add(asyncio.current_task())
        try:
            server = await asyncio.open_connection(*self.server)
            await Connection((reader, writer), server, self.delay).run()
        except OSError:  # the server can't be reached
            writer.close()
        except asyncio.CancelledError:  # by stop
            pass
        finally:
            self.tasks.discard(asyncio.current_task())

    async def listen(self) -> None:
        """Serves every client until stop."""
        self.loop, self.stopped = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(self.serve, sock=self.socket)
        self.ready.set()
        await self.stopped.wait()
        listener.close()

    def stop(self) -> None:
        """Ends the relay and its connections; for another thread than the relay's."""
        self.loop.call_soon_threadsafe(self.stopped.set)


@contextmanager
def run_relay(to_host: str, to_port: int, delay: float, port: int = 0) -> Iterator[int]:
    """Runs a relay that holds each request back `delay` seconds, in a thread of its own;
    gives the port of 127.0.0.1 that it listens on."""
    relay = Relay(to_host, to_port, delay, port)
    thread = threading.Thread(target=lambda: asyncio.run(relay.listen()), daemon=True)
    thread.start()
    relay.ready.wait()
    try:
        yield relay.port
    finally:
        relay.stop()
        thread.join()


def main() -> None:
    """Runs a relay until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Hold each HTTP request back a while.")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--delay", type=float, default=25, metavar="MS")
    flags = parser.parse_args()
    host, _, port = flags.to.rpartition(":")
    relay = run_relay(host, int(port), flags.delay / 1000, flags.listen)
    with suppress(KeyboardInterrupt), relay as own:
        print(f"127.0.0.1:{own} to {flags.to}, {flags.delay:g} ms later", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
