"""An S3 server for tests: moto's, or the one of S3_TEST_ENDPOINT, S3_TEST_KEY and
S3_TEST_SECRET."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Callable

import boto3
import pytest
from botocore.config import Config
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

REAL_SERVER = "S3_TEST_ENDPOINT" in os.environ


@dataclass(frozen=True)
class Server:
    """An S3 server and who may use it; of moto's, the requests it got by kind and what
    decides for each request whether it fails: "denied", "lost" or None."""

    endpoint: str
    key: str
    secret: str
    token: str | None = None
    requests: Counter[str] | None = None
    faults: list[Callable[[dict[str, Any]], str | None]] = field(default_factory=list)

    def client(self) -> Any:
        """A client that doesn't share its settings with the job's."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            aws_session_token=self.token,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def config(self, keys: bool = True, **values: str) -> str:
        """The text of a dl.cfg for this server; an empty value leaves a key out."""
        aws = {"ENDPOINT_URL": self.endpoint}
        if keys:
            aws["AWS_ACCESS_KEY_ID"] = self.key
            aws["AWS_SECRET_ACCESS_KEY"] = self.secret
            aws["AWS_SESSION_TOKEN"] = self.token or ""
        aws.update(values)
        return "[AWS]\n" + "".join(f"{k} = {v}\n" for k, v in aws.items() if v)


def kind_of(environ: dict[str, Any]) -> str:
    """The kind of a request: its method, but LIST for a listing, COPY for a copy."""
    query = environ["QUERY_STRING"]
    if environ["REQUEST_METHOD"] == "GET" and (
        "list-type" in query or "prefix" in query
    ):
        return "LIST"
    return "COPY" if "HTTP_X_AMZ_COPY_SOURCE" in environ else environ["REQUEST_METHOD"]


@contextmanager
def running_server() -> Iterator[Server]:
    """The S3 server: moto's, or the one that the environment names."""
    if REAL_SERVER:
        names = ("S3_TEST_ENDPOINT", "S3_TEST_KEY", "S3_TEST_SECRET")
        yield Server(*(os.environ[name] for name in names))
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    requests: Counter[str] = Counter()
    faults: list[Callable[[dict[str, Any]], str | None]] = []
    moto = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        requests[kind_of(environ)] += 1
        fault = next(filter(None, (fails(environ) for fails in faults)), None)
        if fault == "lost":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if fault:
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        return moto(environ, respond)

    http = make_server("127.0.0.1", 0, app, True, request_handler=MotoRequestHandler)
    thread = Thread(target=http.serve_forever)
    thread.start()
    yield Server(
        f"http://127.0.0.1:{http.server_port}",
        "AKIATESTACCESSKEY0123",
        "TestSecretKeyThatNothingMayShow0123456789",
        "TestSessionTokenThatNothingMayShow0123456789",
        requests,
        faults,
    )
    http.shutdown()
    thread.join()
    http.server_close()


def objects(server: Server, bucket: str) -> dict[str, int]:
    """The bytes of each object of a bucket by its key."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {of["Key"]: of["Size"] for page in pages for of in page.get("Contents", ())}


def put(server: Server, bucket: str, key: str, body: bytes = b"{}") -> None:
    """Makes an object."""
    server.client().put_object(Bucket=bucket, Key=key, Body=body)


@contextmanager
def new_bucket(server: Server) -> Iterator[str]:
    """A bucket of its own name, deleted at the end with all that is in it."""
    client, bucket = server.client(), f"test-{uuid.uuid4().hex[:16]}"
    client.create_bucket(Bucket=bucket)
    try:
        yield bucket
    finally:
        for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
            client.abort_multipart_upload(
                Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        for key in sorted(objects(server, bucket), reverse=True):  # a marker last
            client.delete_object(Bucket=bucket, Key=key)
        client.delete_bucket(Bucket=bucket)


def download(server: Server, bucket: str, prefix: str, folder: Path) -> Path:
    """Copies the objects below a prefix into a folder."""
    for key, size in objects(server, bucket).items():
        if key.startswith(prefix) and size:
            path = folder / key[len(prefix) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            server.client().download_file(bucket, key, str(path))
    return folder


@contextmanager
def no_aws_settings(folder: Path) -> Iterator[None]:
    """An environment in which the default AWS chain finds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(lambda name: name.startswith("AWS_"), list(os.environ)):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "no-credentials"))
        patch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps what it has found
        yield


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
