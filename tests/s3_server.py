"""An S3 server for tests: moto's in this process, whose requests can be seen and fail,
or the one of S3_TEST_ENDPOINT, S3_TEST_KEY and S3_TEST_SECRET."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, Callable

import boto3
import pytest
from botocore.config import Config
from moto.moto_server import werkzeug_app as moto
from werkzeug.serving import make_server

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REAL_SERVER = "S3_TEST_ENDPOINT" in os.environ


@dataclass
class Server:
    """An S3 server and who may use it; of moto's, the requests that it got, "PUT
    /bucket/key" for one, and how a request fails: "denied", "lost" or not at all."""

    endpoint: str
    key: str
    secret: str
    token: str | None = None
    requests: list[str] = field(default_factory=list)
    fails: Callable[[str], str | None] = lambda request: None

    @cached_property
    def bucket(self) -> Any:
        """Gives boto3's view of a bucket by its name."""
        session = boto3.Session(self.key, self.secret, self.token, "us-east-1")
        config = Config(s3={"addressing_style": "path"})
        return session.resource("s3", endpoint_url=self.endpoint, config=config).Bucket

    def objects(self, bucket: str) -> dict[str, int]:
        """The bytes of each object of a bucket by its key."""
        return {of.key: of.size for of in self.bucket(bucket).objects.all()}

    def put(self, bucket: str, key: str, text: str = "{}") -> None:
        """Makes an object."""
        self.bucket(bucket).put_object(Key=key, Body=text.encode())

    def download(self, bucket: str, prefix: str, folder: Path) -> Path:
        """Copies the objects below a prefix into a folder."""
        for of in self.bucket(bucket).objects.filter(Prefix=prefix):
            path = folder / of.key[len(prefix) :]
            if of.size:  # A folder's marker has no bytes.
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(of.get()["Body"].read())
        return folder

    def config(self, **values: str) -> str:
        """The text of a dl.cfg for this server; an empty value leaves a key out."""
        aws = dict(zip(KEYS, (self.key, self.secret, self.token or "")))
        aws = {"ENDPOINT_URL": self.endpoint, **aws, **values}
        return "[AWS]\n" + "".join(f"{k} = {v}\n" for k, v in aws.items() if v)


def serve() -> Iterator[Server]:
    """The S3 server: moto's, or the one that the environment names."""
    if REAL_SERVER:
        names = ("S3_TEST_ENDPOINT", "S3_TEST_KEY", "S3_TEST_SECRET")
        yield Server(*(os.environ[name] for name in names))
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    serve_s3 = moto.DomainDispatcherApplication(moto.create_backend_app)

    def app(environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        kind, query = environ["REQUEST_METHOD"], environ["QUERY_STRING"]
        if kind == "GET" and ("list-type" in query or "prefix" in query):
            kind = "LIST"
        if "HTTP_X_AMZ_COPY_SOURCE" in environ:
            kind = "COPY"
        server.requests.append(f"{kind} {environ['PATH_INFO']}")
        fault = server.fails(f"{kind} {environ['PATH_INFO']}")
        if fault == "lost":  # The request is carried out, and its answer lost.
            b"".join(serve_s3(environ, lambda *_: None))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if fault:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH", 0)))
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        return serve_s3(environ, respond)

    handler = moto.MotoRequestHandler
    http = make_server("127.0.0.1", 0, app, True, request_handler=handler)
    server = Server(
        f"http://127.0.0.1:{http.server_port}",
        "AKIATESTACCESSKEY0123",
        "TestSecretKeyThatNothingMayShow0123456789",
        "TestSessionTokenThatNothingMayShow0123456789",
    )
    Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


@contextmanager
def failing(
    server: Server, first: int, fault: str = "denied", last: float = 0
) -> Iterator[list[str]]:
    """Makes the first to the last request from now on fail. Gives those that came."""
    seen: list[str] = []
    numbers = count(1)  # next() on it is atomic.

    def fails(request: str) -> str | None:
        seen.append(request)
        return fault if first <= next(numbers) <= max(first, last) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "fails", fails)
        yield seen


@contextmanager
def new_bucket(server: Server) -> Iterator[str]:
    """A bucket of its own name, deleted at the end with all that is in it."""
    bucket = server.bucket(f"test-{uuid.uuid4().hex[:16]}")
    bucket.create()
    try:
        yield bucket.name
    finally:
        for upload in bucket.multipart_uploads.all():
            upload.abort()
        bucket.objects.delete()
        for key in sorted(server.objects(bucket.name), reverse=True):
            bucket.Object(key).delete()  # a folder that had something in it
        bucket.delete()
