"""The job on S3: moto's server in this process, or one that the environment names."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import psutil
import pyspark
import pytest
from conftest import QUICK_SPARK, ROOT, read_table, run_command, run_etl
from makers import play, song, to_json, write_input
from pyspark.sql import SparkSession
from s3_server import (
    REAL_SERVER,
    Server,
    download,
    failing,
    new_bucket,
    objects,
    put,
    upload_folder,
)

import etl

# Shown wherever the settings of a run are: what the search for secrets has to find.
MARKER = "shown-on-purpose-5c1e"
PREFIX = "my data/a+b %41=é"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
only_moto = pytest.mark.skipif(REAL_SERVER, reason="only moto's requests can be seen")


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a new one, in an environment without a way to AWS."""
    monkeypatch.chdir(tmp_path)
    for name in filter(lambda name: name.startswith("AWS_"), list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # It keeps what it has found.
    return tmp_path


@pytest.fixture
def source(server: Server, tmp_path: Path) -> Iterator[str]:
    """A bucket of songs of 30 years, a file each, and plays of two months, below PREFIX,
    also in ./in."""
    folder = write_input(tmp_path / "in", [], [play(), play(ts=1543713934796)])
    (folder / "song_data" / "A" / "a.json").unlink()
    for number in range(30):
        path = folder / "song_data" / "x y/ü+1=%42/#&" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(song(song_id=f"S{number}", year=1990 + number)))
    with new_bucket(server) as bucket:
        upload_folder(server, bucket, f"{PREFIX}/", folder)
        yield bucket


@pytest.fixture
def target(server: Server) -> Iterator[str]:
    """An empty bucket."""
    with new_bucket(server) as bucket:
        yield bucket


def settings(config: str, *flags: str) -> etl.Settings:
    """The settings of these flags and of a dl.cfg of this text, which is written."""
    Path("dl.cfg").write_text(config, encoding="utf-8")
    return etl.parse_settings(flags)


def refusal(capsys: pytest.CaptureFixture[str], config: str, *flags: str) -> str:
    """The one line with which the command refuses flags, before Spark starts."""
    Path("dl.cfg").write_text(config, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", os.devnull)  # No Spark can be started.
        assert etl.main(flags) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == ""
    return line


def secrets_in(text: str, server: Server) -> list[str]:
    """What nothing may show."""
    return [of for of in (server.key, server.secret, server.token) if of and of in text]


# --- Runs -----------------------------------------------------------------------------


def test_run_from_bucket_to_bucket_equals_a_local_one_in_few_requests(
    spark: SparkSession, server: Server, source: str, target: str
) -> None:
    entries = spark._jsc.hadoopConfiguration().getPropsWithPrefix
    before, requests = dict(entries("fs.s3a.")), Counter(server.requests)
    flags = f"--input=s3a://{source}/{PREFIX}", f"--output=s3://{target}/{PREFIX}"
    report = etl.run(settings(server.config(), *flags))
    requests = Counter(server.requests) - requests
    etl.run(settings("", "--input=in", "--output=local"))

    lake = download(server, target, f"{PREFIX}/", Path("lake"))
    for table in etl.TABLES:
        assert read_table(lake, table) == read_table(Path("local"), table), table
        assert report["tables"][table] == len(read_table(lake, table))
    assert {path.name for path in lake.iterdir()} == {
        *etl.TABLES,
        "_records",
        "_reports",
    }
    assert [*server.bucket(target).multipart_uploads.all()] == []
    assert not [key for key in objects(server, target) if "/_staging" in key]

    files = len(list(filter(Path.is_file, lake.rglob("*"))))
    records = 1 + 2 + 2 + 1  # songs, events, the users' latest, the manifest
    assert files == 30 + 2 + 2 + 1 + 1 + 1 + records
    if pyspark.__version__.startswith("4.1") and not REAL_SERVER:  # with its committer
        assert 31 < sum(requests.values()) <= 2 * 31 + 25 * files + 150

    added = dict(entries("fs.s3a.")).items() - before.items()
    assert {key.rpartition(".")[0] for key, _ in added} >= {f"bucket.{source}.access"}
    own = (f"bucket.{source}.", f"bucket.{target}.")
    assert [key for key, _ in added if not key.startswith(own)] == []


@only_moto
def test_next_day_requests_no_object_that_is_known(
    spark: SparkSession,
    server: Server,
    source: str,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = f"--input=s3a://{source}/{PREFIX}", f"--output=s3a://{target}/lake"
    etl.run(settings(server.config(), *flags))
    put(server, source, f"{PREFIX}/log_data/new.json", to_json(play(ts=1)).encode())
    requests: list[str] = []
    monkeypatch.setattr(server, "fails", requests.append)
    etl.run(settings(server.config(), *flags))
    read = {of for of in requests if of.endswith(".json") and f"/{source}/" in of}
    assert {of.split("/")[-1] for of in read} == {"new.json"}
    written = {of for of in requests if of.startswith(("PUT", "COPY"))}
    assert [of for of in written if "/month=11" in of or "/songs/" in of] == []


@only_moto
@pytest.mark.long
def test_server_that_dies_in_mid_run_ends_the_run_within_a_minute(
    spark: SparkSession,
    server: Server,
    source: str,
    target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    died: list[float] = []

    def fails(request: str) -> str | None:
        if "/_staging/" in request and "/songplays/" in request and not died:
            died.append(time.monotonic())
        return "lost" if died else None

    flags = f"--input=s3a://{source}/{PREFIX}", f"--output=s3a://{target}/lake"
    settings(server.config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etl, "HEARTBEAT", 1)
        patch.setattr(server, "fails", fails)
        assert etl.main(flags) == 1
    assert time.monotonic() - died[0] < 60
    printed = capsys.readouterr().err
    assert f"s3a://{target}/lake fails, trying again: " in printed
    assert printed.splitlines()[-1].startswith("etl.py: error: ")


def test_folder_may_hold_more_than_1000_objects(
    spark: SparkSession, server: Server, target: str
) -> None:
    for number in range(1_001):  # Spark passes over names that begin with a dot.
        put(server, target, f"in/song_data/.{number}")
    put(server, target, "in/song_data/a.json", to_json(song()).encode())
    put(server, target, "in/log_data/a.json", to_json(play()).encode())
    flags = f"--input=s3a://{target}/in", "--output=lake"
    report = etl.run(settings(server.config(), *flags))
    assert report["records"]["songs"]["read"] == 1


def test_key_secret_and_token_show_nowhere_while_the_command_runs(
    server: Server, source: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "events").mkdir()
    options = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": f"file://{tmp_path}/events",
        "spark.eventLog.compress": "false",
        "spark.redaction.regex": "nothing-is-redacted",
        "spark.marker": MARKER,
    }
    conf = "".join(f"--conf {key}={value} " for key, value in options.items())
    settings(f"{server.config()}[LAKE]\nINPUT = s3a://{source}/{PREFIX}\n")
    line = [sys.executable, str(ROOT / "etl.py"), "--debug", f"--output=s3a://{target}"]
    environ = {**os.environ, "PYSPARK_SUBMIT_ARGS": conf + QUICK_SPARK}
    shown = {"command lines": ""}
    with open("printed", "wb") as file:
        job = subprocess.Popen(line, stdout=file, stderr=file, env=environ)
        while job.poll() is None:
            with suppress(psutil.Error):  # which says that a process has ended
                for of in psutil.Process(job.pid).children(recursive=True):
                    shown["command lines"] += " ".join(of.cmdline())
            time.sleep(0.3)
    assert job.returncode == 0, Path("printed").read_text()
    logs = filter(Path.is_file, Path("events").rglob("*"))
    shown["event log"] = "".join(log.read_text() for log in logs)
    assert [where for where, text in shown.items() if MARKER not in text] == []
    shown["printed"] = Path("printed").read_text()
    (report,) = download(server, target, "_reports/", Path("reports")).iterdir()
    shown["report"] = report.read_text()
    for where, text in shown.items():
        assert secrets_in(text, server) == [], where


@pytest.mark.long
def test_credentials_may_come_from_a_profile(
    server: Server, source: str, tmp_path: Path
) -> None:
    keys = f"aws_access_key_id={server.key}\naws_secret_access_key={server.secret}\n"
    token = f"aws_session_token={server.token}\n" if server.token else ""
    (tmp_path / "credentials").write_text(f"[sparkify]\n{keys}{token}")
    (tmp_path / "dl.cfg").write_text(server.config(**dict.fromkeys(KEYS, "")))
    profile = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_PROFILE": "sparkify"}
    flags = f"--input=s3a://{source}/{PREFIX}", "--output=lake"
    done = run_etl(*flags, cwd=tmp_path, **profile)
    assert done.returncode == 0, done.stderr
    assert len(read_table(tmp_path / "lake", "songplays")) == 2


@pytest.mark.skipif(pyspark.__version__ < "4", reason="its Hadoop knows no SSO")
@pytest.mark.parametrize("name", ["sso.SsoClient", "ssooidc.SsoOidcClient"])
def test_credentials_may_come_from_sso(name: str, spark: SparkSession) -> None:
    loader = spark._jvm.java.lang.Thread.currentThread().getContextClassLoader()
    loader.loadClass(f"software.amazon.awssdk.services.{name}")


# --- Refused before Spark starts ------------------------------------------------------


def test_input_without_songs_is_refused(
    server: Server, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(server, target, "in/log_data/a.json")
    put(server, target, "in/song_data_old/a.json")
    before = objects(server, target)
    flags = f"--input=s3a://{target}/in", f"--output=s3a://{target}/lake"
    line = refusal(capsys, server.config(), *flags)
    assert f"INPUT s3a://{target}/in holds no song_data/ with .json" in line
    assert objects(server, target) == before


class NoS3(BaseHTTPRequestHandler):
    """An HTTP server that answers each request with 501, and prints nothing."""

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


KEY_ERROR = "InvalidAccessKeyId|SignatureDoesNotMatch|No user exists"
NO_BUCKET = "s3a://no-such-bucket-314159/in"
on_real_server = pytest.mark.skipif(not REAL_SERVER, reason="moto checks no signature")


@pytest.mark.parametrize(
    ("config", "uri", "reason"),
    [
        ({}, NO_BUCKET, f"{NO_BUCKET}: .*NoSuchBucket"),
        ({}, "s3a://my_bucket!/in", 's3a://my_bucket!/in: .*nvalid bucket name "my_bu'),
        ({KEYS[0]: ""}, NO_BUCKET, "s3a://.*: .*aws_access_key_id"),
        ({KEYS[1]: ""}, NO_BUCKET, "s3a://.*: .*aws_secret_access_key"),
        (dict.fromkeys(KEYS, ""), NO_BUCKET, "s3a://.*: .*locate credentials"),
        ({"ENDPOINT_URL": "localhost:9000"}, NO_BUCKET, "localhost:9000"),
        ({"ENDPOINT_URL": "NO S3"}, NO_BUCKET, r"\(50|404\).*ENDPOINT_URL http:"),
        ({"ENDPOINT_URL": "HTTPS"}, NO_BUCKET, "SSL.*ENDPOINT_URL https:"),
        pytest.param({KEYS[0]: "wrong"}, NO_BUCKET, KEY_ERROR, marks=on_real_server),
        pytest.param({KEYS[1]: "wrong"}, NO_BUCKET, KEY_ERROR, marks=on_real_server),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_what_botocore_refuses_is_told_in_its_words(
    side: str,
    config: dict[str, str],
    uri: str,
    reason: str,
    server: Server,
    source: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {"input": f"s3a://{source}/{PREFIX}", "output": "lake", side: uri}
    flags = [f"--{key}={value}" for key, value in flags.items()]
    with ThreadingHTTPServer(("127.0.0.1", 0), NoS3) as no_s3:
        Thread(target=no_s3.serve_forever, daemon=True).start()
        text = server.config(**config).replace("HTTPS", f"https:{server.endpoint[5:]}")
        text = text.replace("NO S3", f"http://127.0.0.1:{no_s3.server_port}")
        line = refusal(capsys, text, *flags)
        no_s3.shutdown()
    assert re.search(reason, line), line
    assert "pgrade" not in line
    assert secrets_in(line, server) == []


@only_moto
@pytest.mark.parametrize(
    ("denied", "call"),
    [("LIST", "ListObjectsV2"), ("DELETE", "DeleteObject"), ("PUT", "PutObject")],
)
def test_denied_access_is_told_in_botocores_words_and_leaves_nothing(
    denied: str,
    call: str,
    server: Server,
    source: str,
    target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uris = [f"s3a://{source}/{PREFIX}", f"s3a://{target}/lake"]
    with pytest.MonkeyPatch.context() as patch:
        fails = {True: "denied", False: None}
        patch.setattr(server, "fails", lambda of: fails[of.startswith(denied)])
        flags = f"--input={uris[0]}", f"--output={uris[1]}"
        line = refusal(capsys, server.config(), *flags)
    said = f".*AccessDenied.* calling the {call} operation"
    assert re.search(re.escape(uris[denied != "LIST"]) + said, line), line
    assert objects(server, target) == {}


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_keys_are_struck_out_of_an_error_but_not_the_short_one_of_readme(
    debug: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    long = {name: f"{name}-0123456789" for name in KEYS}
    keys = "\n".join(f"{name} = {value}" for name, value in long.items())
    endpoint = f"http://127.0.0.1:1/{'/'.join(long.values())}"
    flags = ["--input=s3a://bucket/in", *debug]
    Path("dl.cfg").write_text(f"[AWS]\n{keys}\nENDPOINT_URL = {endpoint}\n")
    assert etl.main(flags) == 2
    printed = capsys.readouterr().err
    assert "/***/***/***" in printed.splitlines()[-1]
    assert [value for value in long.values() if value in printed] == []

    endpoint = "http://127.0.0.1:1/minio"
    keys = "AWS_ACCESS_KEY_ID = minio\nAWS_SECRET_ACCESS_KEY = minio-secret"
    Path("dl.cfg").write_text(f"[AWS]\n{keys}\nENDPOINT_URL = {endpoint}\n")
    assert etl.main(flags) == 2
    assert endpoint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.long
def test_spark_submit_without_s3a_is_told_the_packages_to_pass(
    server: Server, source: str, cwd: Path
) -> None:
    (cwd / "dl.cfg").write_text(server.config())
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    flags = f"--input=s3a://{source}/{PREFIX}", "--output=lake"
    line = [str(submit), "--master=local[2]", str(ROOT / "etl.py"), *flags]
    done = run_command(line, cwd, PYSPARK_PYTHON=sys.executable)
    assert done.returncode == 2
    said = (
        r"\netl.py: error: .*--packages org.apache.hadoop:hadoop-aws:.* --exclude-pack"
    )
    assert re.search(said, done.stdout + done.stderr)


# --- Faults ---------------------------------------------------------------------------

OLD = {"users/part-0.parquet", "songs/year=1999/part-0.parquet"}
STAGED = {
    "users/part-1.parquet": "users/part-run1-1.parquet",
    "songs/year=2001/part-1.parquet": "songs/year=2001/part-run1-1.parquet",
    "songs/year=0/part-1.parquet": "songs/year=0/part-run1-1.parquet",
}
NEW = set(STAGED.values())


def lay_out(server: Server, bucket: str, action: str) -> None:
    """Makes the objects that there are before a run publishes or another recovers it."""
    server.bucket(bucket).objects.delete()
    names = OLD | {f"_staging/run1/{name}" for name in STAGED}
    if action == "recover":  # One file has been moved, another one only copied.
        journal = json.dumps({"staged": STAGED, "replaced": sorted(OLD)}).encode()
        put(server, bucket, "lake/_staging/run1/_journal.json", journal)
        names -= {"_staging/run1/users/part-1.parquet"}
        names |= NEW - {"songs/year=0/part-run1-1.parquet"}
    for name in names:
        put(server, bucket, f"lake/{name}")


def act(lake: etl.Lake, action: str) -> None:
    """Publishes, or starts a run that finds a dead one."""
    with etl.claimed(lake, "run1" if action == "publish" else "run2") as staging:
        if action == "publish":
            etl.publish(lake, staging, OLD)


@only_moto
@pytest.mark.parametrize(
    ("action", "fault", "last", "every"),
    [
        ("publish", "denied", math.inf, 23),  # as if it were killed
        ("publish", "lost", 0, 23),
        ("recover", "denied", math.inf, 23),
        pytest.param("publish", "denied", math.inf, 1, marks=pytest.mark.long),
        pytest.param("publish", "denied", 0, 5, marks=pytest.mark.long),
        pytest.param("publish", "lost", 0, 5, marks=pytest.mark.long),
        pytest.param("recover", "denied", math.inf, 1, marks=pytest.mark.long),
        pytest.param("recover", "lost", 0, 5, marks=pytest.mark.long),
    ],
)
def test_request_that_fails_leaves_old_or_new_tables_and_the_next_start_goes_on(
    action: str,
    fault: str,
    last: float,
    every: int,
    spark: SparkSession,
    server: Server,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(etl, "LEASE", 0)
    of_run = settings(server.config(), f"--output=s3a://{target}/lake")
    lake = etl.open_lake(etl.start_spark(of_run, {}), of_run.output)

    def names() -> set[str]:
        return {key[len("lake/") :] for key in objects(server, target)}

    number = 1
    while True:
        lay_out(server, target, action)
        with failing(server, number, fault, last) as requests, suppress(Exception):
            act(lake, action)
        if len(requests) < number:  # No request has failed.
            break
        left, where = names(), f"request {number}: {requests[number - 1]}"
        assert left >= OLD or left >= NEW, where
        has_begun = left >= NEW or "_staging/run1/_journal.json" in left
        assert has_begun or fault == "denied", where  # What is lost is asked again.
        act(lake, "recover")
        left = {name for name in names() if not name.endswith("/")}
        assert left == (NEW if has_begun else OLD), where
        number += every
    assert names() == NEW
    assert number > 40
