"""The job on S3, against moto's server or one that the environment names."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pyspark
import pytest
from botocore.stub import Stubber
from conftest import QUICK_JAVA, ROOT, run_command, run_quickly
from s3_server import (
    REAL_SERVER,
    Server,
    download,
    free_port,
    new_bucket,
    no_aws_settings,
    objects,
    put,
)

import etl

SampleRun = tuple[Path, subprocess.CompletedProcess[str]]

TABLES = ("songplays", "users", "songs", "artists", "time")
SONG = '{"song_id": "SO1", "title": "T", "artist_id": "AR1", "artist_name": "A"}'
PLAY = (
    '{"page": "NextSong", "ts": 1541106106796, "userId": "8", "sessionId": 139, '
    '"itemInSession": 0, "song": "T", "artist": "A"}'
)
# Seen wherever the settings of a run are shown: what the search for secrets has to find.
MARKER = "shown-on-purpose-5c1e"


@pytest.fixture
def source(server: Server) -> Iterator[str]:
    """A bucket of one song file and one log file, below `in`."""
    with new_bucket(server) as bucket:
        put(server, bucket, "in/song_data/A/a.json", SONG.encode())
        put(server, bucket, "in/log_data/2018/11/a.json", PLAY.encode())
        yield bucket


@pytest.fixture
def target(server: Server) -> Iterator[str]:
    """An empty bucket."""
    with new_bucket(server) as bucket:
        yield bucket


@pytest.fixture
def local_input(tmp_path: Path) -> Path:
    """A folder of one song file and one log file."""
    for kind, text in (("song_data", SONG), ("log_data", PLAY)):
        (tmp_path / "in" / kind).mkdir(parents=True)
        (tmp_path / "in" / kind / "a.json").write_text(text, encoding="utf-8")
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a new one, without a way to AWS."""
    monkeypatch.chdir(tmp_path)
    with no_aws_settings(tmp_path):
        yield tmp_path


def command(config: str, *flags: str) -> list[str]:
    """The job's command line, after writing its settings into ./dl.cfg."""
    Path("dl.cfg").write_text(config, encoding="utf-8")
    return [sys.executable, str(ROOT / "etl.py"), "--config", "dl.cfg", *flags]


def run_job(
    config: str, *flags: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs the job in the current folder."""
    return run_quickly(command(config, *flags), **environ)


def rows_of(lake: Path, table: str) -> tuple[Any, list[Any]]:
    """The schema of a table and its rows, sorted."""
    read = pq.read_table(lake / table)
    return read.schema.remove_metadata(), sorted(read.to_pylist(), key=repr)


# --- From S3 to S3 --------------------------------------------------------------------

PREFIX = "my data/a+b %41=é"


@dataclass(frozen=True)
class S3Run:
    """A run from bucket to bucket: what it printed, showed meanwhile and left."""

    code: int
    stdout: str
    stderr: str
    bucket: str
    command_lines: str
    web_pages: str
    event_log: str
    requests: Counter[str]


@pytest.fixture(scope="module")
def s3_run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Run]:
    """A run on data_sample, with Spark's web pages and event log on and unredacted."""
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    events = tmp_path_factory.mktemp("events")
    options = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": f"file://{events}",
        "spark.eventLog.compress": "false",
        "spark.ui.enabled": "true",
        "spark.ui.port": str(port),
        "spark.redaction.regex": "nothing-is-redacted",
        "spark.marker": MARKER,
    }
    conf = " ".join(f"--conf {key}={value}" for key, value in options.items())
    with new_bucket(server) as source, new_bucket(server) as target:
        for path in filter(Path.is_file, (ROOT / "data_sample").rglob("*")):
            key = path.relative_to(ROOT / "data_sample").as_posix()
            key = key.replace(
                "song_data/A/A/B/TRAAB", "song_data/x y/ü+1=%42/?&#/TRAAB"
            )
            put(server, source, f"{PREFIX}/{key}", path.read_bytes())
        with no_aws_settings(folder), pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("PYSPARK_SUBMIT_ARGS", f"{QUICK_JAVA} {conf} pyspark-shell")
            line = command(
                f"{server.config()}[LAKE]\nINPUT = s3a://{source}/{PREFIX}\n",
                "--debug",
                f"--output=s3://{target}/lake",
            )
            before = Counter(server.requests)
            watched = watch(line, f"http://127.0.0.1:{port}")
        yield S3Run(
            *watched[:3],
            target,
            *watched[3:],
            "\n".join(map(read, filter(Path.is_file, events.rglob("*")))),
            Counter(server.requests) - before,
        )


def read(path: Path) -> str:
    """The text of a file."""
    return path.read_bytes().decode(errors="replace")


def watch(line: list[str], ui: str) -> tuple[int, str, str, str, str]:
    """Runs a command; returns its exit code, stdout, stderr, the command lines of the
    processes that came meanwhile and the pages of Spark's web server."""
    earlier = set(Path("/proc").glob("[0-9]*"))
    lines, pages = set(), set()
    with open("stdout", "wb") as stdout, open("stderr", "wb") as stderr:
        process = subprocess.Popen(line, stdout=stdout, stderr=stderr)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() < began + 600:
            for new in set(Path("/proc").glob("[0-9]*")) - earlier:
                try:
                    lines.add(read(new / "cmdline"))
                except OSError:
                    pass  # it has ended
            try:
                apps = json.loads(get(f"{ui}/api/v1/applications"))
                pages.add(get(f"{ui}/environment/"))
                for app in apps:
                    pages.add(get(f"{ui}/api/v1/applications/{app['id']}/environment"))
            except (OSError, HTTPException, ValueError):
                pass  # it isn't up yet, or no more
            time.sleep(0.3)
        process.kill()
    return (
        process.wait(),
        read(Path("stdout")),
        read(Path("stderr")),
        "\n".join(lines),
        "\n".join(pages),
    )


def get(url: str) -> str:
    """A web page of this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return answer.read().decode()


def test_lake_on_s3_equals_that_of_a_local_run(
    s3_run: S3Run, server: Server, sample_run: SampleRun, tmp_path: Path
) -> None:
    assert s3_run.code == 0, s3_run.stderr
    lake = download(server, s3_run.bucket, "lake/", tmp_path / "lake")
    for table in TABLES:
        assert rows_of(lake, table) == rows_of(sample_run[0], table), table


def test_s3_run_leaves_only_tables_report_and_rejected(
    s3_run: S3Run, server: Server
) -> None:
    left = objects(server, s3_run.bucket)
    folders = {key.split("/")[1] for key in left}
    assert folders == {*TABLES, "_rejected", "_reports"}
    # A folder's marker has a last slash and no bytes.
    files = {k: v for k, v in left.items() if v and k.endswith((".parquet", ".json"))}
    assert left == files
    uploads = server.client().list_multipart_uploads(Bucket=s3_run.bucket)
    assert not uploads.get("Uploads")


@pytest.mark.skipif(REAL_SERVER, reason="only moto's requests are counted")
def test_s3_run_copies_each_file_once(s3_run: S3Run, server: Server) -> None:
    files = len(objects(server, s3_run.bucket))
    print(f"\n{files} objects written with", dict(s3_run.requests.most_common()))
    assert 0 < s3_run.requests["LIST"]
    assert s3_run.requests["COPY"] <= files + 5


def test_key_secret_and_token_show_nowhere_while_the_job_runs(
    s3_run: S3Run, server: Server, tmp_path: Path
) -> None:
    reports = download(server, s3_run.bucket, "lake/_reports/", tmp_path / "reports")
    (report,) = map(read, reports.iterdir())
    shown = {
        "event log": s3_run.event_log,
        "web pages": s3_run.web_pages,
        **({"command lines": s3_run.command_lines} if Path("/proc").is_dir() else {}),
    }
    for where, text in shown.items():
        assert MARKER in text, where
    for text in (s3_run.stdout, s3_run.stderr, report):
        assert s3_run.bucket in text
    shown.update(stdout=s3_run.stdout, stderr=s3_run.stderr, report=report)
    for where, text in shown.items():
        for secret in filter(None, (server.key, server.secret, server.token)):
            assert secret not in text, where


# --- One of the two on S3, credentials of the default chain ---------------------------


def test_s3_input_and_local_output_with_keys_of_the_environment(
    server: Server, source: str, tmp_path: Path
) -> None:
    keys = {
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        **({"AWS_SESSION_TOKEN": server.token} if server.token else {}),
    }
    config = server.config(keys=False)
    done = run_job(config, f"--input=s3://{source}/in", "--output=lake", **keys)
    assert done.returncode == 0, done.stderr
    assert [len(rows_of(tmp_path / "lake", table)[1]) for table in TABLES] == [1] * 5


def test_local_input_and_s3_output_with_keys_of_a_profile(
    server: Server, target: str, local_input: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "credentials"
    token = f"aws_session_token = {server.token}\n" if server.token else ""
    profile.write_text(
        f"[sparkify]\naws_access_key_id = {server.key}\n"
        f"aws_secret_access_key = {server.secret}\n{token}"
    )
    done = run_job(
        server.config(keys=False),
        f"--input={local_input}",
        f"--output=s3a://{target}",
        AWS_SHARED_CREDENTIALS_FILE=str(profile),
        AWS_PROFILE="sparkify",
    )
    assert done.returncode == 0, done.stderr
    lake = download(server, target, "", tmp_path / "lake")
    assert [len(rows_of(lake, table)[1]) for table in TABLES] == [1] * 5


# --- Refused before Spark starts ------------------------------------------------------


def refusal(config: str, *flags: str) -> str:
    """What the preflight says against a dl.cfg and flags."""
    with pytest.raises(etl.SettingsError) as caught:
        etl.preflight(etl.parse_settings(command(config, *flags)[2:]))
    message = str(caught.value)
    print(f"\netl.py: error: {message}")
    assert "\n" not in message
    return message


def test_command_refuses_in_one_line_without_starting_spark(
    server: Server, source: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    done = run_job(
        server.config(),
        f"--input=s3a://{source}/in",
        "--output=s3a://no-such-bucket-3141592653",
        JAVA_HOME=str(tmp_path),  # there is none: Spark can't start
    )
    assert time.monotonic() - began < 15
    (line,) = done.stderr.splitlines()
    assert line.startswith("etl.py: error: s3a://no-such-bucket-3141592653: no such ")
    assert (done.returncode, done.stdout) == (2, "")


def test_traceback_of_a_refusal_shows_no_secret(server: Server, source: str) -> None:
    flags = f"--input=s3a://{source}/in", "--output=s3a://no-such-bucket-3141592653"
    done = run_job(server.config(), *flags, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    for secret in filter(None, (server.key, server.secret, server.token)):
        assert secret not in done.stdout + done.stderr


def test_missing_credentials_are_named(server: Server, source: str) -> None:
    line = refusal(server.config(keys=False), f"--input=s3a://{source}/in")
    assert "no AWS credentials: put AWS_ACCESS_KEY_ID" in line


@pytest.mark.parametrize("key", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_one_key_without_the_other_is_refused(
    key: str, server: Server, source: str
) -> None:
    line = refusal(server.config(**{key: ""}), f"--input=s3a://{source}/in")
    assert "one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: give both" in line
    assert server.secret not in line


def test_missing_input_bucket_is_named(server: Server) -> None:
    line = refusal(server.config(), "--input=s3a://no-such-bucket-3141592653/in")
    assert "s3a://no-such-bucket-3141592653/in" in line
    assert "no such bucket" in line


def test_missing_output_bucket_is_named(server: Server, source: str) -> None:
    flags = f"--input=s3a://{source}/in", "--output=s3a://no-such-bucket-3141592653/x"
    line = refusal(server.config(), *flags)
    assert "s3a://no-such-bucket-3141592653/x: no such bucket" in line


def test_input_without_song_data_is_refused(server: Server, target: str) -> None:
    put(server, target, "in/log_data/a.json")
    put(server, target, "in/song_data_old/a.json")
    before = objects(server, target)
    flags = f"--input=s3a://{target}/in", f"--output=s3a://{target}/lake"
    line = refusal(server.config(), *flags)
    assert f"INPUT s3a://{target}/in holds no song_data/ with .json" in line
    assert objects(server, target) == before


def test_log_data_of_another_kind_of_file_is_refused(
    server: Server, target: str
) -> None:
    put(server, target, "in/song_data/a.json.gz")
    put(server, target, "in/log_data/a.txt")
    before = objects(server, target)
    flags = f"--input=s3a://{target}/in", f"--output=s3a://{target}/lake"
    line = refusal(server.config(), *flags)
    assert f"INPUT s3a://{target}/in holds no log_data/ with .json" in line
    assert objects(server, target) == before


def test_preflight_leaves_nothing(server: Server, source: str) -> None:
    before = objects(server, source)
    flags = f"--input=s3a://{source}/in", f"--output=s3a://{source}/lake"
    etl.preflight(etl.parse_settings(command(server.config(), *flags)[2:]))
    assert objects(server, source) == before


def test_endpoint_where_nobody_listens_is_named(server: Server) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    line = refusal(server.config(ENDPOINT_URL=endpoint), "--input=s3a://bucket/in")
    assert endpoint in line
    assert "connect" in line


def test_endpoint_that_never_answers_is_given_up(server: Server) -> None:
    began = time.monotonic()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        line = refusal(server.config(ENDPOINT_URL=endpoint), "--input=s3a://bucket/in")
    assert endpoint in line
    assert time.monotonic() - began < 30


def test_endpoint_without_scheme_is_refused(server: Server) -> None:
    config = server.config(ENDPOINT_URL="localhost:9000")
    line = refusal(config, "--input=s3a://bucket/in")
    assert "ENDPOINT_URL localhost:9000: must begin with http:// or https://" in line


@pytest.mark.parametrize("uri", ["s3a://", "s3:///in", "s3a:/bucket/in"])
def test_uri_without_a_bucket_is_refused(uri: str, server: Server) -> None:
    line = refusal(server.config(), f"--input={uri}")
    assert f"{uri}: names no bucket: write s3a://BUCKET/PREFIX" in line


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("s3a://bucket/in", "INPUT and OUTPUT are both s3a://bucket/in"),
        ("s3://bucket/in/", "INPUT and OUTPUT are both s3a://bucket/in"),
        ("s3a://bucket/in/song_data", "is inside INPUT's song_data"),
        ("s3a://bucket/in/song_data/lake", "is inside INPUT's song_data"),
    ],
)
def test_output_in_the_input_is_refused(
    output: str, reason: str, server: Server
) -> None:
    line = refusal(server.config(), "--input=s3a://bucket/in", f"--output={output}")
    assert reason in line


@pytest.fixture
def stub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    """What a client answers to the preflight: calls in this order, and no other one."""
    client = server.client()
    monkeypatch.setattr(etl, "s3_client", lambda aws: client)
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


def test_probe_that_could_not_be_deleted_is_not_written(
    stub: Stubber, local_input: Path
) -> None:
    stub.add_client_error("delete_object", "AccessDenied", http_status_code=403)
    line = refusal("", f"--input={local_input}", "--output=s3a://bucket/lake")
    assert "s3a://bucket/lake: access denied" in line
    assert "s3:DeleteObject" in line


def test_bucket_that_cannot_be_written_is_named(
    stub: Stubber, local_input: Path
) -> None:
    stub.add_response("delete_object", {})
    stub.add_client_error("put_object", "AccessDenied", http_status_code=403)
    line = refusal("", f"--input={local_input}", "--output=s3a://bucket/lake")
    assert "s3a://bucket/lake: access denied" in line
    assert "s3:PutObject" in line


def test_bucket_that_cannot_be_read_is_named(stub: Stubber) -> None:
    stub.add_response("list_objects_v2", {"Contents": [{"Key": "in/song_data/a.json"}]})
    stub.add_client_error("get_object", "AccessDenied", http_status_code=403)
    line = refusal("", "--input=s3a://bucket/in")
    assert "s3:GetObject" in line


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("AccessDenied", "s3:ListBucket"),
        ("InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
        ("InvalidToken", "check AWS_SESSION_TOKEN"),
        ("ExpiredToken", "expired"),
        ("PermanentRedirect", "AWS_REGION"),
        ("AuthorizationHeaderMalformed", "AWS_REGION"),
        ("RequestTimeTooSkewed", "clock"),
        ("SlowDown", "SlowDown"),
    ],
)
def test_error_of_the_server_says_what_to_change(
    code: str, advice: str, stub: Stubber
) -> None:
    stub.add_client_error("list_objects_v2", code, http_status_code=400)
    line = refusal("", "--input=s3a://bucket/in")
    assert line.startswith("s3a://bucket/in/song_data")
    assert advice in line


@pytest.mark.skipif(not REAL_SERVER, reason="moto checks no signature")
@pytest.mark.parametrize("key", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_key_is_named(key: str, server: Server, source: str) -> None:
    wrong = {key: "wrong0123456789wrong"}
    done = run_job(server.config(**wrong), f"--input=s3a://{source}/in")
    print(f"\n{done.stderr}", end="")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"check {key}" in line


# --- Packages -------------------------------------------------------------------------


def jars(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Makes the job believe in a pyspark with these jars alone."""
    (folder / "jars").mkdir()
    for name in names:
        (folder / "jars" / name).touch()
    monkeypatch.setattr(pyspark, "__file__", str(folder / "__init__.py"))


def test_packages_suit_the_spark_at_hand() -> None:
    hadoop, scala = {"4": ("3.4.2", "2.13"), "3": ("3.3.4", "2.12")}[
        pyspark.__version__[0]
    ]
    packages, excludes = etl.s3_packages()
    assert f"org.apache.hadoop:hadoop-aws:{hadoop}" in packages
    committer = f"org.apache.spark:spark-hadoop-cloud_{scala}:{pyspark.__version__}"
    assert committer in packages
    assert not [name for name in packages if "bundle" in name]
    assert {"software.amazon.awssdk:bundle", "com.amazonaws:aws-java-sdk-bundle"} <= {
        *excludes
    }


def test_unknown_hadoop_gets_hadoop_aws_with_its_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = "hadoop-client-api-9.9.9.jar", "spark-core_2.13-9.0.0.jar"
    jars(monkeypatch, tmp_path, *names)
    packages, excludes = etl.s3_packages()
    assert packages == ["org.apache.hadoop:hadoop-aws:9.9.9"]
    assert not [name for name in excludes if "bundle" in name]


def test_spark_with_its_own_s3a_gets_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = "hadoop-client-api-3.4.2.jar", "hadoop-aws-3.4.2.jar"
    jars(monkeypatch, tmp_path, *names)
    assert etl.s3_packages() == ([], [])


def test_spark_without_jars_of_its_own_gets_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pyspark, "__file__", str(tmp_path / "__init__.py"))
    assert etl.s3_packages() == ([], [])


def test_registry_that_cannot_be_reached_is_told_with_a_way_out(
    server: Server, source: str, tmp_path: Path
) -> None:
    registry = f"http://127.0.0.1:{free_port()}/"
    settings = tmp_path / "ivy.xml"
    settings.write_text(
        '<ivysettings><settings defaultResolver="none"/><resolvers>'
        f'<ibiblio name="none" m2compatible="true" root="{registry}"/>'
        "</resolvers></ivysettings>"
    )
    options = (
        f"--conf spark.jars.ivy={tmp_path}/ivy --conf spark.jars.ivySettings={settings}"
    )
    done = run_job(
        server.config(),
        f"--input=s3a://{source}/in",
        PYSPARK_SUBMIT_ARGS=f"{options} pyspark-shell",
    )
    print(f"\n{done.stderr}", end="")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert "org.apache.hadoop:hadoop-aws:" in line
    assert "--jars" in line


def test_spark_submit_without_s3a_is_told_the_packages_to_pass(
    server: Server, source: str
) -> None:
    spark_submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    script = command(server.config(), f"--input=s3a://{source}/in")[1:]
    submit = [str(spark_submit), "--master=local[2]", *script]
    done = run_command(submit, PYSPARK_PYTHON=sys.executable)
    printed = done.stdout.splitlines()  # where spark-submit sends Python's stderr too
    (line,) = (text for text in printed if text.startswith("etl.py: error: "))
    packages, excludes = etl.s3_packages()
    assert done.returncode == 2
    assert f"--packages {','.join(packages)} " in line
    assert f"--exclude-packages '{','.join(excludes)}'" in line
    assert not Path("lake").exists()
