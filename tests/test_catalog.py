"""The tables in AWS Glue, as moto has it: in this process, and once behind the command."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Callable

import boto3
import pytest
from botocore.stub import Stubber
from conftest import ROOT, run_quickly
from moto import mock_aws
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from pyspark.sql import SparkSession
from werkzeug.serving import make_server

import etl

SONG_TYPES = [
    ("song_id", "string"),
    ("title", "string"),
    ("artist_id", "string"),
    ("duration", "double"),
    ("year", "int"),
]
USER_TYPES = [("user_id", "string"), ("first_name", "string")]
KEYS = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "secret"}
FLAGS = (f"--input={ROOT}/data_sample", "--output=s3://bucket/lake")


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a new one, without a way to AWS but the keys' names."""
    monkeypatch.chdir(tmp_path)
    for name in filter(lambda name: name.startswith("AWS_"), list(os.environ)):
        monkeypatch.delenv(name)
    isolated = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        **KEYS,
    }
    for name, value in isolated.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps what it has found
    return tmp_path


@dataclass
class Glue:
    """A Glue client of moto's and the calls that it got, but for those that only read."""

    client: Any
    writes: Counter[str] = field(default_factory=Counter)

    def count(self, model: Any, **_: Any) -> None:
        if not model.name.startswith("Get"):
            self.writes[model.name] += 1

    def register(self, folders: set[str], types: Any = SONG_TYPES) -> Counter[str]:
        """Registers `songs` with these folders; returns the calls that it took."""
        table = etl.glue_table("s3a://bucket/lake", "songs", types)
        self.writes.clear()
        etl.register_table(self.client, "db", table, folders)
        return Counter(self.writes)

    def locations(self) -> dict[tuple[str, ...], str]:
        """Where each partition of `songs` is, by its values."""
        found = self.client.get_partitions(DatabaseName="db", TableName="songs")
        return {
            tuple(of["Values"]): of["StorageDescriptor"]["Location"]
            for of in found["Partitions"]
        }

    def table(self, name: str = "songs") -> dict[str, Any]:
        return self.client.get_table(DatabaseName="db", Name=name)["Table"]


@pytest.fixture
def glue() -> Iterator[Glue]:
    """Glue with an empty database `db`."""
    with mock_aws():
        glue = Glue(boto3.client("glue", region_name="us-east-1"))
        glue.client.create_database(DatabaseInput={"Name": "db"})
        glue.client.meta.events.register("before-call.glue", glue.count)
        yield glue


# --- Tables and partitions ------------------------------------------------------------


def test_new_table_is_one_that_athena_reads(glue: Glue) -> None:
    glue.register({"year=1999", "year=0"})
    table = glue.table()
    assert table["TableType"] == "EXTERNAL_TABLE"
    assert table["Parameters"] == {"EXTERNAL": "TRUE", "classification": "parquet"}
    assert table["PartitionKeys"] == [{"Name": "year", "Type": "int"}]
    assert table["StorageDescriptor"] == {
        "Columns": [
            {"Name": "song_id", "Type": "string"},
            {"Name": "title", "Type": "string"},
            {"Name": "artist_id", "Type": "string"},
            {"Name": "duration", "Type": "double"},
        ],
        "Location": "s3://bucket/lake/songs/",
        "InputFormat": "org.apache.hadoop.hive.ql.io.parquet.MapredParquetInputFormat",
        "OutputFormat": "org.apache.hadoop.hive.ql.io.parquet.MapredParquetOutputFormat",
        "SerdeInfo": {
            "SerializationLibrary": "org.apache.hadoop.hive.ql.io.parquet.serde."
            "ParquetHiveSerDe",
            "Parameters": {"serialization.format": "1"},
        },
    }
    assert glue.locations() == {
        ("1999",): "s3://bucket/lake/songs/year=1999/",
        ("0",): "s3://bucket/lake/songs/year=0/",
    }


def test_partition_has_the_columns_and_the_format_of_its_table(glue: Glue) -> None:
    glue.register({"year=1999"})
    found = glue.client.get_partitions(DatabaseName="db", TableName="songs")
    (partition,) = found["Partitions"]
    assert partition["StorageDescriptor"] == {
        **glue.table()["StorageDescriptor"],
        "Location": "s3://bucket/lake/songs/year=1999/",
    }


def test_table_without_folders_has_no_partition(glue: Glue) -> None:
    table = etl.glue_table("s3://bucket", "users", USER_TYPES)
    etl.register_table(glue.client, "db", table, set())
    assert glue.writes == {"CreateTable": 1}
    found = glue.table("users")
    assert found["PartitionKeys"] == []
    assert found["StorageDescriptor"]["Location"] == "s3://bucket/users/"


def test_two_folders_are_two_values_in_order(glue: Glue) -> None:
    types = [("start_time", "timestamp"), ("year", "int"), ("month", "int")]
    table = etl.glue_table("s3a://bucket/a/b", "time", types)
    etl.register_table(glue.client, "db", table, {"year=2018/month=11"})
    found = glue.client.get_partitions(DatabaseName="db", TableName="time")
    (partition,) = found["Partitions"]
    assert partition["Values"] == ["2018", "11"]
    location = partition["StorageDescriptor"]["Location"]
    assert location == "s3://bucket/a/b/time/year=2018/month=11/"
    assert [key["Name"] for key in glue.table("time")["PartitionKeys"]] == [
        "year",
        "month",
    ]


def test_same_again_changes_nothing(glue: Glue) -> None:
    folders = {"year=1999", "year=0"}
    assert glue.register(folders) == {"CreateTable": 1, "BatchCreatePartition": 1}
    assert glue.register(folders) == {}


def test_what_others_added_stays_and_is_no_difference(glue: Glue) -> None:
    glue.register({"year=1999"})
    table = etl.glue_table("s3a://bucket/lake", "songs", SONG_TYPES)
    table["Parameters"]["recordCount"] = "3"
    table["Description"] = "ours"
    table["StorageDescriptor"]["Columns"][0]["Comment"] = "the key"
    glue.client.update_table(DatabaseName="db", TableInput=table)
    assert glue.register({"year=1999"}) == {}
    assert glue.table()["Description"] == "ours"


def test_partition_that_came_and_one_that_went(glue: Glue) -> None:
    glue.register({"year=1999", "year=2000"})
    calls = glue.register({"year=2000", "year=2001"})
    assert calls == {"BatchCreatePartition": 1, "BatchDeletePartition": 1}
    assert sorted(glue.locations()) == [("2000",), ("2001",)]


def test_other_types_update_the_table_and_its_partitions(glue: Glue) -> None:
    glue.register({"year=1999"})
    sent = []
    glue.client.meta.events.register(
        "provide-client-params.glue.UpdateTable",
        lambda params, **_: sent.append(params["SkipArchive"]),
    )
    types = [(name, "float" if name == "duration" else of) for name, of in SONG_TYPES]
    calls = glue.register({"year=1999"}, types)
    assert calls == {"UpdateTable": 1, "BatchUpdatePartition": 1}
    assert sent == [True]  # no version is kept
    found = glue.client.get_partitions(DatabaseName="db", TableName="songs")
    for of in (glue.table(), *found["Partitions"]):
        types_found = {c["Name"]: c["Type"] for c in of["StorageDescriptor"]["Columns"]}
        assert types_found["duration"] == "float"
    assert glue.register({"year=1999"}, types) == {}


def test_column_that_went_updates_the_table(glue: Glue) -> None:
    glue.register({"year=1999"})
    types = [pair for pair in SONG_TYPES if pair[0] != "duration"]  # the last of a file
    calls = glue.register({"year=1999"}, types)
    assert calls == {"UpdateTable": 1, "BatchUpdatePartition": 1}


def test_lake_that_moved_moves_the_table_and_its_partitions(glue: Glue) -> None:
    glue.register({"year=1999"})
    moved = etl.glue_table("s3://other", "songs", SONG_TYPES)
    etl.register_table(glue.client, "db", moved, {"year=1999"})
    assert glue.table()["StorageDescriptor"]["Location"] == "s3://other/songs/"
    assert glue.locations() == {("1999",): "s3://other/songs/year=1999/"}


def test_partition_that_another_moved_is_put_right(glue: Glue) -> None:
    glue.register({"year=1999", "year=2000"})
    table = etl.glue_table("s3://elsewhere", "songs", SONG_TYPES)
    wrong = {"Values": ["1999"], "StorageDescriptor": table["StorageDescriptor"]}
    glue.client.update_partition(
        DatabaseName="db",
        TableName="songs",
        PartitionValueList=["1999"],
        PartitionInput=wrong,
    )
    calls = glue.register({"year=1999", "year=2000"})
    assert calls == {"BatchUpdatePartition": 1}
    assert glue.locations()[("1999",)] == "s3://bucket/lake/songs/year=1999/"


def test_many_partitions_go_in_batches(glue: Glue) -> None:
    years = {f"year={year}" for year in range(1000, 1201)}
    assert glue.register(years)["BatchCreatePartition"] == 3
    assert len(glue.locations()) == 201
    types = [(name, "float" if name == "duration" else of) for name, of in SONG_TYPES]
    assert glue.register(years, types)["BatchUpdatePartition"] == 3
    assert glue.register(set(), types) == {"BatchDeletePartition": 9}
    assert glue.locations() == {}


# --- What Glue refuses ----------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    """What a Glue client answers: calls in this order, and no other one."""
    client = boto3.client("glue", region_name="us-east-1")
    monkeypatch.setattr(etl, "glue_client", lambda settings: client)
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


def settings(*flags: str) -> etl.Settings:
    """The settings of a run with a catalog, on top of which come these flags."""
    return etl.parse_settings([*FLAGS, "--catalog=glue:db", *flags])


def test_all_pages_of_partitions_are_read(stub: Stubber) -> None:
    table = etl.glue_table("s3://bucket/lake", "songs", SONG_TYPES)
    stub.add_response("get_table", {"Table": table})
    for year, token in (("1", {"NextToken": "more"}), ("2", {})):
        at = {
            **table["StorageDescriptor"],
            "Location": f"s3://bucket/lake/songs/year={year}/",
        }
        page = {"Partitions": [{"Values": [year], "StorageDescriptor": at}], **token}
        stub.add_response("get_partitions", page)
    etl.register_table(stub.client, "db", table, {"year=1", "year=2"})


@pytest.mark.parametrize(
    ("change", "years", "error"),
    [
        ("create", ["7"], {"PartitionValues": ["7"]}),
        ("update", ["8"], {"PartitionValueList": ["8"]}),
        ("delete", [], {"PartitionValues": ["8"]}),
    ],
)
def test_partition_that_glue_refuses_is_told(
    change: str, years: list[str], error: dict[str, Any], stub: Stubber
) -> None:
    table = etl.glue_table("s3://bucket/lake", "songs", SONG_TYPES)
    stub.add_response("get_table", {"Table": table})
    old = [] if change == "create" else [{"Values": ["8"]}]
    stub.add_response("get_partitions", {"Partitions": old})
    detail = {"ErrorCode": "InternalServiceException", "ErrorMessage": "try later"}
    refusal = {"Errors": [{**error, "ErrorDetail": detail}]}
    stub.add_response(f"batch_{change}_partition", refusal)
    with pytest.raises(etl.CatalogError) as caught:
        etl.register_table(stub.client, "db", table, {f"year={y}" for y in years})
    (values,) = error.values()
    assert str(caught.value) == f"{change} partition {values[0]} of songs: try later"


@pytest.mark.parametrize("denied", ["get_database", "get_table", "get_partitions"])
def test_missing_right_is_named_before_spark_starts(
    denied: str, stub: Stubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl, "check_s3_output", lambda aws, uri: None)
    for call in ("get_database", "get_table", "get_partitions"):
        if call == denied:
            stub.add_client_error(call, "AccessDeniedException", http_status_code=400)
            break
        stub.add_client_error(call, "EntityNotFoundException", http_status_code=400)
    with pytest.raises(etl.SettingsError) as caught:
        etl.preflight(settings())
    action = denied.title().replace("_", "")
    assert str(caught.value) == (
        f"glue:db: access denied: allow these credentials glue:{action}"
    )


def test_preflight_lets_a_database_be_missing(
    stub: Stubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl, "check_s3_output", lambda aws, uri: None)
    for call in ("get_database", "get_table", "get_partitions"):
        stub.add_client_error(call, "EntityNotFoundException", http_status_code=400)
    etl.preflight(settings())


def test_nothing_asks_glue_without_the_flag(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_client(settings: etl.Settings) -> None:
        raise AssertionError

    monkeypatch.setattr(etl, "glue_client", no_client)
    monkeypatch.setattr(etl, "check_s3_output", lambda aws, uri: None)
    etl.preflight(etl.parse_settings(FLAGS))
    songs_and_play(tmp_path / "in")
    etl.run(etl.parse_settings([f"--input={tmp_path}/in", "--output=lake"]))
    assert Path("lake/songs").is_dir()


def test_glue_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_GLUE", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with pytest.raises(etl.SettingsError) as caught:
        etl.check_glue(settings())
    line = str(caught.value)
    assert line.startswith("glue:db: Could not connect")
    assert "http://127.0.0.1:9/" in line
    assert line.endswith("; check AWS_REGION and the network")


# --- Settings -------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["lake", "file:///tmp/lake", "hdfs:///lake"])
def test_output_that_is_not_on_s3_is_refused(output: str) -> None:
    with pytest.raises(etl.SettingsError, match="^Glue needs an OUTPUT on S3, not "):
        settings(f"--output={output}")


@pytest.mark.parametrize(
    "catalog", ["sparkify", "glue:", "glue:Sparkify", "glue:a-b", "glue:a b", "hive:a"]
)
def test_other_name_is_refused(catalog: str) -> None:
    with pytest.raises(etl.SettingsError) as caught:
        settings(f"--catalog={catalog}")
    assert str(caught.value).startswith(f"--catalog {catalog}: write glue:DATABASE")


def test_catalog_of_the_settings_file() -> None:
    Path("dl.cfg").write_text("[LAKE]\nCATALOG = glue:of_file_1\n")
    assert etl.parse_settings(FLAGS).catalog == "of_file_1"
    assert settings().catalog == "db"
    Path("dl.cfg").write_text("")
    assert etl.parse_settings(FLAGS).catalog is None


def test_client_has_the_keys_but_not_the_endpoint_of_s3() -> None:
    Path("dl.cfg").write_text(
        "[AWS]\nAWS_ACCESS_KEY_ID = of-file\nAWS_SECRET_ACCESS_KEY = s\n"
        "AWS_REGION = eu-west-1\nENDPOINT_URL = http://127.0.0.1:9000\n"
    )
    client = etl.glue_client(settings())
    assert client.meta.endpoint_url == "https://glue.eu-west-1.amazonaws.com"
    keys = client._request_signer._credentials  # there is no public way to them
    assert keys.access_key == "of-file"


def test_region_is_that_of_the_bucket_where_none_is_set() -> None:
    with mock_aws():
        boto3.client("s3", region_name="eu-west-3").create_bucket(
            Bucket="bucket",
            CreateBucketConfiguration={"LocationConstraint": "eu-west-3"},
        )
        assert etl.glue_client(settings()).meta.region_name == "eu-west-3"


def test_command_refuses_a_local_output_without_starting_spark(tmp_path: Path) -> None:
    done = run_job("--catalog=glue:db", "--output=lake", JAVA_HOME=str(tmp_path))
    (line,) = done.stderr.splitlines()
    assert line.startswith("etl.py: error: Glue needs an OUTPUT on S3, not file:///")
    assert (done.returncode, done.stdout) == (2, "")
    assert not Path("lake").exists()


# --- The command ----------------------------------------------------------------------


def run_job(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the job in the current folder, without a dl.cfg."""
    line = [sys.executable, str(ROOT / "etl.py"), "--config", os.devnull, *flags]
    return run_quickly(line, **environ)


@dataclass
class Server:
    """S3 and Glue: the Glue operations it got, and those that it denies."""

    endpoint: str = ""
    calls: list[str] = field(default_factory=list)
    denied: set[str] = field(default_factory=set)

    def client(self, service: str) -> Any:
        return boto3.client(
            service, endpoint_url=self.endpoint, region_name="us-east-1"
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A moto server of this module's own."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server, moto = Server(), DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        service, _, operation = environ.get("HTTP_X_AMZ_TARGET", "").partition(".")
        if service == "AWSGlue":
            server.calls.append(operation)
            if operation in server.denied:
                respond("400 Bad Request", [("Content-Type", "application/json")])
                return [json.dumps({"__type": "AccessDeniedException"}).encode()]
        return moto(environ, respond)

    http = make_server("127.0.0.1", 0, app, True, request_handler=MotoRequestHandler)
    server.endpoint = f"http://127.0.0.1:{http.server_port}"
    thread = Thread(target=http.serve_forever)
    thread.start()
    yield server
    http.shutdown()
    thread.join()
    http.server_close()


def songs_and_play(folder: Path) -> None:
    """An input of songs of 1999, 2009 and an unknown year, and a play of November 2018."""
    songs = [
        {
            "song_id": f"SO{n}",
            "title": "T",
            "artist_id": "AR1",
            "artist_name": "A",
            **of,
        }
        for n, of in enumerate(({"year": 1999}, {"year": 2009}, {}))
    ]
    play = {"page": "NextSong", "ts": 1541106106796, "userId": "8", "sessionId": 139}
    for kind, records in (("song_data", songs), ("log_data", [play])):
        (folder / kind).mkdir(parents=True)
        text = "\n".join(map(json.dumps, records))
        (folder / kind / "a.json").write_text(text, encoding="utf-8")


@pytest.mark.long
def test_runs_register_what_they_publish(server: Server, tmp_path: Path) -> None:
    songs_and_play(tmp_path / "in")
    server.client("s3").create_bucket(Bucket="lake-bucket")
    prefix = "my lake/a+b é"

    def run(*flags: str) -> tuple[int, str, list[str], list[str]]:
        server.calls.clear()
        done = run_job(
            f"--input={tmp_path}/in",
            f"--output=s3a://lake-bucket/{prefix}",
            *flags,
            AWS_ENDPOINT_URL=server.endpoint,  # boto3 and the job heed it, for Glue too
            AWS_REGION="us-east-1",
        )
        print(done.stdout, done.stderr)
        writes = [name for name in server.calls if not name.startswith("Get")]
        return done.returncode, done.stderr, list(server.calls), writes

    # The tables are there when registering fails, and the error says so.
    server.denied = {"BatchCreatePartition"}
    code, stderr, _, _ = run("--catalog=glue:sparkify")
    assert code == 1
    assert stderr.splitlines()[-1] == (
        "etl.py: error: the tables are published, but not all are registered in "
        "glue:sparkify: access denied: allow these credentials "
        "glue:BatchCreatePartition: the next run registers them"
    )
    reports = server.client("s3").list_objects_v2(
        Bucket="lake-bucket", Prefix=f"{prefix}/_reports/"
    )
    assert reports["KeyCount"] == 1

    # The next run does what is left.
    server.denied = set()
    code, stderr, _, writes = run("--catalog=glue:sparkify")
    assert code == 0
    assert re.search(
        r"catalog  glue:sparkify: 5 tables, 5 partitions \(\d+\.\d s\)", stderr
    )
    assert Counter(writes) == {"CreateTable": 4, "BatchCreatePartition": 3}
    check_catalog(server.client("glue"), f"s3://lake-bucket/{prefix}")

    # And one more changes nothing.
    code, _, calls, writes = run("--catalog=glue:sparkify")
    assert (code, writes) == (0, [])
    assert "GetPartitions" in calls


def check_catalog(glue: Any, lake: str) -> None:
    """Checks the five tables, and where their partitions are."""
    tables = glue.get_tables(DatabaseName="sparkify")["TableList"]
    found = {
        of["Name"]: " by ".join(
            ", ".join(f"{c['Name']} {c['Type']}" for c in columns)
            for columns in (of["StorageDescriptor"]["Columns"], of["PartitionKeys"])
        )
        for of in tables
    }
    assert found == {
        "songplays": "songplay_id bigint, start_time timestamp, user_id string, "
        "level string, song_id string, artist_id string, session_id bigint, "
        "location string, user_agent string by year int, month int",
        "users": "user_id string, first_name string, last_name string, gender string, "
        "level string by ",
        "songs": "song_id string, title string, artist_id string, duration double "
        "by year int",
        "artists": "artist_id string, name string, location string, latitude double, "
        "longitude double by ",
        "time": "start_time timestamp, hour int, day int, week int, weekday int "
        "by year int, month int",
    }
    for table in tables:
        location = table["StorageDescriptor"]["Location"]
        assert location == f"{lake}/{table['Name']}/"
    partitions = {
        of["StorageDescriptor"]["Location"]: of["Values"]
        for table in ("songplays", "songs", "time")
        for of in glue.get_partitions(DatabaseName="sparkify", TableName=table)[
            "Partitions"
        ]
    }
    assert partitions == {
        f"{lake}/songplays/year=2018/month=11/": ["2018", "11"],
        f"{lake}/songs/year=1999/": ["1999"],
        f"{lake}/songs/year=2009/": ["2009"],
        f"{lake}/songs/year=0/": ["0"],
        f"{lake}/time/year=2018/month=11/": ["2018", "11"],
    }
