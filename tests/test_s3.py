"""The job on S3: moto's server in this process, or one that the environment names."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import psutil
import pyspark
import pytest
from conftest import QUICK_SPARK, ROOT, read_table, run_command, run_etl
from makers import play, song, to_json, write_input
from pyspark.sql import SparkSession
from s3_server import KEYS, REAL_SERVER, Server, failing, new_bucket, serve

import etl

PREFIX = "my data/a+b %41=é"
server = pytest.fixture(serve, scope="module")
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


@pytest.fixture(scope="module")
def source(server: Server) -> Iterator[str]:
    """A bucket with, below PREFIX, songs of 30 years, a file each, and plays of two
    months; also 1,001 objects that S3 lists first and Spark skips for their dot."""
    plays = [to_json(play()), to_json(play(ts=1543713934796))]
    bodies = {"log_data/2018/11/a.json": "\n".join(plays)}
    bodies.update(dict.fromkeys([f"song_data/.{n}" for n in range(1_001)], ""))
    for n in range(30):
        record = to_json(song(song_id=f"S{n}", year=1990 + n))
        bodies[f"song_data/x y/ü+1=%42/#&/{n}.json"] = record
    with new_bucket(server) as bucket:
        for key, body in bodies.items():
            server.put(bucket, f"{PREFIX}/{key}", body)
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


def secrets_in(text: str, server: Server) -> list[str]:
    """What nothing may show."""
    return [of for of in (server.key, server.secret, server.token) if of and of in text]


def test_run_from_bucket_to_bucket_equals_a_local_one_in_few_requests(
    spark: SparkSession, server: Server, source: str, target: str
) -> None:
    """So does the run of the next day, which requests no object that is known."""
    entries = spark._jsc.hadoopConfiguration().getPropsWithPrefix
    before, start = dict(entries("fs.s3a.")), len(server.requests)
    flags = f"--input=s3a://{source}/{PREFIX}", f"--output=s3://{target}/{PREFIX}"
    report = etl.run(settings(server.config(), *flags))
    requests = server.requests[start:]
    server.download(source, f"{PREFIX}/", Path("in"))
    etl.run(settings("", "--input=in", "--output=local"))

    lake = server.download(target, f"{PREFIX}/", Path("lake"))
    for table in etl.TABLES:
        assert read_table(lake, table) == read_table(Path("local"), table), table
        assert report["tables"][table] == len(read_table(lake, table))
    assert {of.name for of in lake.iterdir()} == {*etl.TABLES, "_records", "_reports"}
    assert [*server.bucket(target).multipart_uploads.all()] == []
    assert not [key for key in server.objects(target) if "/_staging" in key]

    files = len(list(filter(Path.is_file, lake.rglob("*"))))
    records = 1 + 2 + 2 + 1  # songs, events, the users' latest, the manifest
    assert files == 30 + 2 + 2 + 1 + 1 + 1 + records
    if pyspark.__version__.startswith("4.1") and not REAL_SERVER:  # with its committer
        assert 31 < len(requests) <= 2 * 31 + 25 * files + 150

    added = dict(entries("fs.s3a.")).items() - before.items()
    assert {key.rpartition(".")[0] for key, _ in added} >= {f"bucket.{source}.access"}
    own = (f"bucket.{source}.", f"bucket.{target}.")
    assert [key for key, _ in added if not key.startswith(own)] == []

    server.put(source, f"{PREFIX}/log_data/new.json", to_json(play(ts=1)))
    start = len(server.requests)
    etl.run(settings(server.config(), *flags))
    server.bucket(source).Object(f"{PREFIX}/log_data/new.json").delete()
    if not REAL_SERVER:
        requests = server.requests[start:]
        read = {of for of in requests if of.endswith(".json") and f"/{source}/" in of}
        assert {of.split("/")[-1] for of in read} == {"new.json"}
        written = {of for of in requests if of.startswith(("PUT", "COPY"))}
        assert [of for of in written if "/month=11" in of or "/songs/" in of] == []


@only_moto
@pytest.mark.long
def test_server_that_dies_in_mid_run_ends_the_run_within_a_minute(
    spark: SparkSession, server: Server, source: str, target: str, capsys: Any
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


def test_key_secret_and_token_show_nowhere_while_the_command_runs(
    server: Server, source: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "events").mkdir()
    marker = "shown-on-purpose-5c1e"  # wherever the settings of a run are shown
    conf = f"--conf spark.eventLog.dir=file://{tmp_path}/events "
    conf += "--conf spark.eventLog.enabled=true --conf spark.eventLog.compress=false "
    conf += f"--conf spark.redaction.regex=nothing --conf spark.marker={marker} "
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
    assert [where for where, text in shown.items() if marker not in text] == []
    shown["printed"] = Path("printed").read_text()
    (report,) = server.download(target, "_reports/", Path("reports")).iterdir()
    shown["report"] = report.read_text()
    for where, text in shown.items():
        assert secrets_in(text, server) == [], where


@pytest.mark.long
def test_credentials_may_come_from_a_profile(server: Server, source: str) -> None:
    keys = f"aws_access_key_id={server.key}\naws_secret_access_key={server.secret}\n"
    token = f"aws_session_token={server.token}\n" if server.token else ""
    Path("credentials").write_text(f"[sparkify]\n{keys}{token}")
    Path("dl.cfg").write_text(server.config(**dict.fromkeys(KEYS, "")))
    profile = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_PROFILE": "sparkify"}
    done = run_etl(f"--input=s3a://{source}/{PREFIX}", **profile)
    assert done.returncode == 0, done.stderr
    assert len(read_table(Path("lake"), "songplays")) == 2


@pytest.mark.skipif(pyspark.__version__ < "4", reason="its Hadoop knows no SSO")
def test_credentials_may_come_from_sso(spark: SparkSession) -> None:
    loader = spark._jvm.java.lang.Thread.currentThread().getContextClassLoader()
    for name in ("sso.SsoClient", "ssooidc.SsoOidcClient"):
        loader.loadClass(f"software.amazon.awssdk.services.{name}")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("song_data_old/a.json", "INPUT s3a://{}/in holds no song_data/ with .json"),
        pytest.param("song_data//a.json", "'s3a://{}/in/song_data//", marks=only_moto),
    ],
)
def test_input_without_songs_or_of_keys_that_hadoop_cannot_read_is_refused(
    key: str, told: str, server: Server, target: str, failure: Any
) -> None:
    server.put(target, "in/log_data/a.json")
    server.put(target, f"in/{key}")
    before = server.objects(target)
    flags = f"--input=s3a://{target}/in", f"--output=s3a://{target}/lake"
    assert told.format(target) in failure(2, *flags, config=server.config())
    assert server.objects(target) == before


KEY_ERROR = "InvalidAccessKeyId|SignatureDoesNotMatch|No user exists"
NO_BUCKET = "s3a://no-such-bucket-314159/in"
on_real_server = pytest.mark.skipif(not REAL_SERVER, reason="moto checks no signature")


@pytest.mark.parametrize(
    ("config", "uri", "told"),
    [
        ({}, NO_BUCKET, rf"{NO_BUCKET}: .*NoSuchBucket.* \(ENDPOINT_URL http:"),
        ({}, "s3a://my_bucket!/in", 's3a://my_bucket!/in: .*nvalid bucket name "my_bu'),
        ({KEYS[0]: ""}, NO_BUCKET, "s3a://.*: .*aws_access_key_id"),
        ({KEYS[1]: ""}, NO_BUCKET, "s3a://.*: .*aws_secret_access_key"),
        (dict.fromkeys(KEYS, ""), NO_BUCKET, "s3a://.*: .*locate credentials"),
        ({"ENDPOINT_URL": "localhost:9000"}, NO_BUCKET, "localhost:9000"),
        ({"ENDPOINT_URL": "NO S3"}, NO_BUCKET, r"occurred \(.*ENDPOINT_URL http:.*api"),
        ({"ENDPOINT_URL": "HTTPS"}, NO_BUCKET, "SSL.*ENDPOINT_URL https:"),
        pytest.param({KEYS[0]: "wrong"}, NO_BUCKET, KEY_ERROR, marks=on_real_server),
        pytest.param({KEYS[1]: "wrong"}, NO_BUCKET, KEY_ERROR, marks=on_real_server),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_what_botocore_refuses_is_told_in_its_words(
    side: str, config: dict[str, str], uri: str, told: str, server: Server, failure: Any
) -> None:
    write_input(Path("in"), [song()], [play()])
    text = server.config(**config).replace("HTTPS", f"https:{server.endpoint[5:]}")
    text = text.replace("NO S3", f"{server.endpoint}/moto-api")
    line = failure(2, "--input=in", f"--{side}={uri}", config=text)
    assert re.search(told, line), line
    assert "pgrade" not in line
    assert secrets_in(line, server) == []


@only_moto
@pytest.mark.parametrize(
    ("denied", "call"),
    [("LIST", "ListObjects"), ("DELETE", "DeleteObject"), ("PUT", "PutObject")],
)
def test_denied_access_is_told_in_botocores_words_and_leaves_nothing(
    denied: str, call: str, server: Server, source: str, target: str, failure: Any
) -> None:
    uris = [f"s3a://{source}/{PREFIX}", f"s3a://{target}/lake"]
    flags = f"--input={uris[0]}", f"--output={uris[1]}"
    fails = {True: "denied", False: None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "fails", lambda of: fails[of.startswith(denied)])
        line = failure(2, *flags, config=server.config())
    said = f".*AccessDenied.* calling the {call} operation"
    assert re.search(re.escape(uris[denied != "LIST"]) + said, line), line
    assert server.objects(target) == {}


def test_keys_are_struck_out_of_an_error_but_not_the_short_one_of_readme(
    failure: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"{name}-0123456789" for name in KEYS]
    long = Server(f"http://127.0.0.1:1/{'/'.join(keys)}", *keys)
    line = failure(2, "--input=s3a://bucket/in", config=long.config())
    assert "127.0.0.1:1/***/***/***" in line
    assert etl.main(["--input=s3a://bucket/in", "--debug"]) == 2
    printed = capsys.readouterr().err
    assert printed.endswith(f"\n{line}\n")
    assert [key for key in keys if key in printed] == []
    short = Server("http://127.0.0.1:1/minio", "minio", "minio-secret")
    line = failure(2, "--input=s3a://bucket/in", config=short.config())
    assert short.endpoint in line


@pytest.mark.long
def test_spark_submit_without_s3a_is_told_the_packages_to_pass(
    server: Server, source: str
) -> None:
    Path("dl.cfg").write_text(server.config())
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    line = [str(submit), "--master=local[2]", str(ROOT / "etl.py")]
    line.append(f"--input=s3a://{source}/{PREFIX}")
    done = run_command(line, PYSPARK_PYTHON=sys.executable)
    assert done.returncode == 2
    said = r"\netl.py: error: .*--packages org.apache.hadoop:hadoop-aws:.* --exclude-p"
    assert re.search(said, done.stdout + done.stderr)


OLD = {"users/part-0.parquet", "songs/year=1999/part-0.parquet"}
CHANGED = ("users", "songs/year=2001", "songs/year=0")
STAGED = {f"{of}/part-1.parquet": f"{of}/part-run1-1.parquet" for of in CHANGED}
NEW = set(STAGED.values())


def lay_out(server: Server, bucket: str, action: str) -> None:
    """Makes the objects there before a run publishes or another finishes it."""
    server.bucket(bucket).objects.delete()
    names = OLD | {f"_staging/run1/{name}" for name in STAGED}
    if action == "recover":  # One file has been moved, another one only copied.
        journal = json.dumps({"staged": STAGED, "replaced": sorted(OLD)})
        server.put(bucket, "_staging/run1/_journal.json", journal)
        names -= {"_staging/run1/users/part-1.parquet"}
        names |= NEW - {"songs/year=0/part-run1-1.parquet"}
    for name in names:
        server.put(bucket, name)


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
    monkeypatch.setattr(etl, "LATE_TASKS", 0)
    of_run = settings(server.config(), f"--output=s3a://{target}")
    lake = etl.open_lake(etl.start_spark(of_run, {}), of_run.output)
    for number in count(1, every):
        lay_out(server, target, action)
        with failing(server, number, fault, last) as requests, suppress(Exception):
            act(lake, action)
        left = set(server.objects(target))
        if len(requests) < number:  # No request has failed.
            break
        where = f"request {number}: {requests[number - 1]}"
        assert left >= OLD or left >= NEW, where
        has_begun = left >= NEW or "_staging/run1/_journal.json" in left
        assert has_begun or fault == "denied", where  # What is lost is asked again.
        act(lake, "recover")
        left = {name for name in server.objects(target) if not name.endswith("/")}
        assert left == (NEW if has_begun else OLD), where
    assert left == NEW and number > 40
