#!/usr/bin/env python3
"""Sparkify data lake ETL: song and log JSON in, a star schema of partitioned Parquet out.

    python etl.py [--input URI] [--output URI]         on a laptop, an EMR master node
    spark-submit etl.py [--input URI] [--output URI]   on a cluster

It reads like the job itself: settings, session, read, build, stage, check, publish,
catalog, report, main().
"""

from __future__ import annotations

import argparse
import configparser
import fcntl
import gzip
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import reduce
from glob import glob
from importlib.util import find_spec
from typing import Any, Callable, Union

SPARK_HOME = os.environ.get("SPARK_HOME", "/usr/lib/spark")
if not find_spec("pyspark"):  # as on a node of EMR: a Spark home has its own
    sys.path += [f"{SPARK_HOME}/python", *glob(f"{SPARK_HOME}/python/lib/py4j-*.zip")]
    if os.path.isdir(SPARK_HOME):
        os.environ.setdefault("SPARK_HOME", SPARK_HOME)
try:
    import pyspark
    from py4j.protocol import Py4JJavaError
    from pyspark import SparkConf, SparkContext, StorageLevel
    from pyspark.errors import AnalysisException
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import Column, DataFrame, Observation, Row, SparkSession
    from pyspark.sql import functions as F
except ModuleNotFoundError as error:
    print(
        f"etl.py: error: {error.name} is missing: run pip install -r requirements.txt, "
        "or set SPARK_HOME",
        file=sys.stderr,
    )
    sys.exit(2)

log = logging.getLogger("etl")


@dataclass(frozen=True)
class Table:
    """A table of the lake: its primary key, its folders' columns, the order in a file."""

    key: str
    folders: tuple[str, ...]
    order: tuple[str, ...]


TABLES = {
    "songplays": Table("songplay_id", ("year", "month"), ("start_time",)),
    "users": Table("user_id", (), ("user_id",)),
    "songs": Table("song_id", ("year",), ("artist_id", "song_id")),
    "artists": Table("artist_id", (), ("artist_id",)),
    "time": Table("start_time", ("year", "month"), ("start_time",)),
}
# (table, column, table whose primary key the column holds)
FOREIGN_KEYS = (
    ("songplays", "user_id", "users"),
    ("songplays", "song_id", "songs"),
    ("songplays", "artist_id", "artists"),
    ("songplays", "start_time", "time"),
    ("songs", "artist_id", "artists"),
)

SONG_SCHEMA = """song_id string, title string, artist_id string, artist_name string,
    artist_location string, artist_latitude double, artist_longitude double,
    duration double, year int"""
EVENT_SCHEMA = """ts bigint, userId string, sessionId bigint, itemInSession bigint,
    page string, song string, artist string, length double, level string,
    location string, userAgent string, firstName string, lastName string, gender string"""


class SettingsError(Exception):
    """Wrong usage or settings, a missing prerequisite: exit code 2, nothing written."""


class RunError(Exception):
    """The run failed, and the published tables are as they were: exit code 1."""


# --- Settings -------------------------------------------------------------------------

EMR_FILES = "/usr/share/aws/emr"  # a folder of every EMR node
CONFIG_SECTIONS = {
    "AWS": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "ENDPOINT_URL",
    ),
    "LAKE": ("INPUT", "OUTPUT", "CATALOG"),
}


@dataclass(frozen=True)
class Aws:
    """How to reach S3. Without keys: as the default AWS chain finds them (environment,
    profile, instance role)."""

    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint: str | None = None

    def hide_in(self, text: str) -> str:
        """A text with the keys, the secret and the token in it struck out."""
        secrets = (self.access_key, self.secret_key, self.session_token)
        return reduce(
            lambda t, secret: t.replace(secret, "***"), filter(None, secrets), text
        )


@dataclass(frozen=True)
class Settings:
    """What a run needs to know; `input` and `output` are URIs without a last slash,
    `catalog` is a Glue database."""

    input: str
    output: str
    max_rejected: float
    debug: bool
    break_lock: bool
    aws: Aws
    catalog: str | None = None


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line (first), dl.cfg (second), the defaults (last).

    Raises SettingsError for a wrong flag, section, key or value and for folders that
    overlap.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(
        prog="etl.py",
        allow_abbrev=False,
        description="Reads song_data/ and log_data/ under INPUT, writes Sparkify's star "
        "schema as partitioned Parquet under OUTPUT. A flag beats dl.cfg.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings (default: dl.cfg, if there is one)")
    add("--input", metavar="URI", help="holds song_data/ and log_data/")
    add("--output", metavar="URI", help="the lake, whose five tables are replaced")
    add("--catalog", metavar="glue:DATABASE", help="register the tables in AWS Glue")
    add(
        "--max-rejected",
        metavar="FRACTION",
        type=float,
        default=0.01,
        help="publish nothing above this fraction of bad records (default: 0.01)",
    )
    add("--break-lock", action="store_true", help="take over the lock of a dead run")
    add("--debug", action="store_true", help="show tracebacks and Spark's own log")

    def fail(message: str) -> None:  # one line, where argparse prints the usage too
        raise SettingsError(f"{message} (see etl.py --help)")

    parser.error = fail  # type: ignore[assignment,method-assign]
    flags = parser.parse_args(argv)
    if not 0 <= flags.max_rejected <= 1:  # a NaN is neither
        fail(f"--max-rejected {flags.max_rejected} is not a fraction between 0 and 1")
    config = read_config(flags.config, here)
    given = {"INPUT": flags.input, "OUTPUT": flags.output, "CATALOG": flags.catalog}
    config.update({key: uri for key, uri in given.items() if uri is not None})
    settings = Settings(
        input=to_uri(config.get("INPUT", f"{here}/data_sample")),
        output=to_uri(config.get("OUTPUT", "lake")),
        max_rejected=flags.max_rejected,
        debug=flags.debug,
        break_lock=flags.break_lock,
        aws=read_aws(config),
        catalog=read_catalog(config),
    )
    check_apart(settings.input, settings.output)
    if settings.catalog and not s3_place(settings.output):
        raise SettingsError(
            f"Glue needs an OUTPUT on S3, not {settings.output}: write --output "
            "s3a://BUCKET/PREFIX, or leave --catalog out"
        )
    return settings


def read_config(path: str | None, script_folder: str) -> dict[str, str]:
    """The values, by key, of a settings file: the named one, else ./dl.cfg, else the
    dl.cfg beside the script, else {}.

    Raises SettingsError, which never shows a value: the file may hold a secret.
    """
    if path is None:
        candidates = ("dl.cfg", os.path.join(script_folder, "dl.cfg"))
        path = next(filter(os.path.exists, candidates), None)
        if path is None:
            return {}
    # A secret may hold a %: no interpolation. A [DEFAULT] section is as wrong as any.
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.optionxform = str.upper  # type: ignore[assignment,method-assign]
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: see dl.cfg.example") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        errors = getattr(error, "errors", [(getattr(error, "lineno", 1), "")])
        raise SettingsError(
            f"{path}, line {errors[0][0]}: wanted is each key once, as KEY = VALUE, under "
            + " or ".join(f"[{section}]" for section in CONFIG_SECTIONS)
        ) from None
    section_of = {key: name for name, keys in CONFIG_SECTIONS.items() for key in keys}
    for section in parser.sections():
        for key in parser[section]:
            if key not in section_of:
                known = ", ".join(section_of)
                # What isn't like a key may be a secret that has come to a line of its own.
                shown = f" {key}" if re.fullmatch("[A-Z_]{1,30}", key) else ""
                raise SettingsError(f"{path}: unknown key{shown}; the keys are {known}")
            if section_of[key] != section:
                wanted = section_of[key]
                raise SettingsError(f"{path}: {key} is in [{section}], not [{wanted}]")
        if section not in CONFIG_SECTIONS:
            known = ", ".join(CONFIG_SECTIONS)
            raise SettingsError(f"{path}: unknown section [{section}]; known: {known}")
    return {
        key: value.strip("'\"")
        for section in parser.sections()
        for key, value in parser[section].items()
        if value.strip("'\"")
    }


def read_aws(config: dict[str, str]) -> Aws:
    """The AWS settings of a dl.cfg; of the environment, region and endpoint."""
    keys = config.get("AWS_ACCESS_KEY_ID"), config.get("AWS_SECRET_ACCESS_KEY")
    if (keys[0] is None) != (keys[1] is None):
        raise SettingsError(
            "dl.cfg has one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: "
            "give both, or neither to use the default AWS chain"
        )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get(
        "AWS_ENDPOINT_URL"
    )
    endpoint = config.get("ENDPOINT_URL", endpoint)
    if endpoint and not re.match("https?://[^/]", endpoint):
        raise SettingsError(
            f"ENDPOINT_URL {endpoint}: must begin with http:// or https://"
        )
    token = config.get("AWS_SESSION_TOKEN")
    return Aws(*keys, token, config.get("AWS_REGION", region), endpoint)


def read_catalog(config: dict[str, str]) -> str | None:
    """The Glue database of a CATALOG setting; None without one."""
    catalog = config.get("CATALOG")
    match = re.fullmatch("glue:([a-z0-9_]{1,255})", catalog or "")
    if catalog is not None and not match:
        raise SettingsError(
            f"--catalog {catalog}: write glue:DATABASE, where DATABASE has only "
            "lower-case letters, digits and underscores"
        )
    return match[1] if match else None


def to_uri(path: str) -> str:
    """The URI of a path or URI, absolute, without a last slash.

    A path without a scheme is local, whatever Hadoop's default file system is. s3:// is
    s3a:// except on EMR, whose own file system serves it.
    """
    if not path:
        raise SettingsError("--input and --output must not be empty")
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+):", path)
    if not scheme or scheme[1] == "file":
        local = re.sub("^file:(//(?=/))?", "", path)
        return "file://" + os.path.abspath(os.path.expanduser(local))
    if scheme[1] not in ("s3", "s3a", "hdfs", "viewfs"):
        raise SettingsError(f"{path}: use a local path, file:, hdfs:, s3:// or s3a://")
    if scheme[1].startswith("s3") and not re.match("s3a?://[^/]", path):
        raise SettingsError(f"{path}: names no bucket: write s3a://BUCKET/PREFIX")
    if scheme[1] == "s3" and not os.path.isdir(EMR_FILES):
        path = path.replace("s3:", "s3a:", 1)
    # As Hadoop does, which finds a//b in a/b. S3 by itself doesn't.
    root, place = re.fullmatch("([^:]+:(?://[^/]*)?)(.*)", path, re.DOTALL).groups()
    return root + os.path.normpath(re.sub("/+", "/", f"{place}/")).rstrip("/")


def local_path(uri: str) -> str | None:
    """The path of a file: URI; None for another one."""
    return uri[len("file://") :] if uri.startswith("file:") else None


def s3_place(uri: str) -> tuple[str, str] | None:
    """The bucket and the key of an S3 URI; None for another one."""
    match = re.fullmatch("s3a?://([^/]+)/?(.*)", uri)
    return (match[1], match[2]) if match else None


def check_apart(source: str, lake: str) -> None:
    """Raises SettingsError where a run would write into its input or read its output."""
    source, lake = (
        f"{os.path.realpath(local_path(uri)) if local_path(uri) else uri}/"
        for uri in (source, lake)
    )
    if source == lake:
        raise SettingsError(
            f"INPUT and OUTPUT are both {lake[:-1]}: give OUTPUT its own"
        )
    for folder in ("song_data", "log_data"):
        if lake.startswith(f"{source}{folder}/"):
            raise SettingsError(
                f"OUTPUT {lake[:-1]} is inside INPUT's {folder}: move it out"
            )
    for folder in (*TABLES, "_staging", "_rejected", "_reports"):
        if source.startswith(f"{lake}{folder}/"):
            raise SettingsError(
                f"INPUT {source[:-1]} is inside OUTPUT's {folder}: move it out"
            )


# --- Session --------------------------------------------------------------------------

INSTALL_JAVA = (
    "install Java 17 (Debian/Ubuntu: sudo apt-get install -y openjdk-17-jre-headless; "
    "Amazon Linux: sudo dnf install -y java-17-amazon-corretto-headless; "
    "macOS: brew install openjdk@17, then export JAVA_HOME=$(brew --prefix openjdk@17))"
)
# Without these the tables would depend on the machine.
FIXED_CONF = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.compression.codec": "snappy",
}
# Set where the user's own spark-defaults and --conf say nothing.
DEFAULT_CONF = {
    # The records are read a few times at most: packing them takes longer.
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
    # A song file has 250 bytes; at the default, 4 MB a file, 14,896 make 466 tasks.
    "spark.sql.files.openCostInBytes": "65536",
    # Of shuffles, lz4: 258 MB of plays are 56 MB of Parquet. So no file need be under 1 MB,
    # and of many plays a file has some 150 MB.
    "spark.sql.adaptive.advisoryPartitionSizeInBytes": "768m",
    "spark.sql.adaptive.coalescePartitions.minPartitionSize": "5m",
}
# And these where the input is small.
SMALL_CONF = {
    "spark.sql.adaptive.enabled": "false",  # to plan each stage anew takes 5 s of 38
    "spark.sql.shuffle.partitions": "1",
}


SMALL_INPUT = 64 * 1024 * 1024  # bytes, of files that count as 2,048 more each
JSON_FILE = re.compile(r"(.*/)?[^_./][^/]*\.json(\.gz)?")  # as Spark finds them


def preflight(settings: Settings) -> bool:
    """Raises SettingsError for what would fail later, before Spark's slow start. Returns
    whether the input is known to be small."""
    lake, size = local_path(settings.output), 0
    for folder in ("song_data", "log_data"):
        found, before = input_files(settings, folder), size
        for name, length in found or ():
            if JSON_FILE.fullmatch(name):
                size += 2048 + length * (10 if name.endswith(".gz") else 1)
                if size > SMALL_INPUT:
                    break
        if found is not None and size == before:
            raise SettingsError(
                f"INPUT {settings.input} holds no {folder}/ with .json or .json.gz files: "
                "give --input the folder of song_data/ and log_data/"
            )
    if s3_place(settings.output):
        check_s3_output(settings.aws, settings.output)
        if settings.catalog:
            check_glue(settings)
    elif lake:
        while not os.path.lexists(lake):
            lake = os.path.dirname(lake)
        if not (os.path.isdir(lake) and os.access(lake, os.W_OK | os.X_OK)):
            raise SettingsError(
                f"OUTPUT {settings.output}: {lake} is not a folder that can be written: "
                "change its permissions or give another --output"
            )
    if is_without_jvm():
        check_java()
    return 0 < size <= SMALL_INPUT


def input_files(settings: Settings, folder: str) -> Iterator[tuple[str, int]] | None:
    """The name and bytes of each file of a folder of INPUT; None where only Spark has
    access to it."""
    source = local_path(settings.input)
    if source:
        walk = os.walk(f"{source}/{folder}", followlinks=True)
        paths = (os.path.join(top, name) for top, _, names in walk for name in names)
        return ((path, os.path.getsize(path)) for path in paths if os.path.exists(path))
    if s3_place(settings.input):
        return s3_keys(settings.aws, f"{settings.input}/{folder}/")
    return None


S3_ADVICE = {
    "InvalidAccessKeyId": "the access key is unknown there: check AWS_ACCESS_KEY_ID",
    "XAdminUserNotFound": "the access key is unknown there: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "the session token is wrong: check AWS_SESSION_TOKEN",
    "ExpiredToken": "the session token has expired: get new keys",
    "NoSuchBucket": "no such bucket: check the name, or create it",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "EndpointConnectionError": "can't connect to ENDPOINT: check ENDPOINT_URL, "
    "AWS_REGION and the network",
    "ConnectTimeoutError": "ENDPOINT doesn't answer: check ENDPOINT_URL and the network",
    "ReadTimeoutError": "ENDPOINT doesn't answer: check ENDPOINT_URL and the network",
    "ParamValidationError": "this boto3 is too old: run pip install --upgrade boto3",
    "NoCredentialsError": "no AWS credentials: put AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY under [AWS] in dl.cfg or into the environment, or run where "
    "a role gives them",
}


def s3_client(aws: Aws, patient: bool = False) -> Any:
    """A boto3 client for S3 that gives up within seconds, unless it is patient."""
    import boto3
    from botocore.config import Config

    style = {"addressing_style": "path"} if aws.endpoint else None
    return boto3.client(
        "s3",
        aws_access_key_id=aws.access_key,
        aws_secret_access_key=aws.secret_key,
        aws_session_token=aws.session_token,
        region_name=aws.region,
        endpoint_url=aws.endpoint,
        config=Config(
            connect_timeout=10 if patient else 2,
            read_timeout=300 if patient else 4,
            retries={"total_max_attempts": 5 if patient else 2},
            max_pool_connections=32,
            s3=style,
        ),
    )


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Turns what boto3 raises inside into a SettingsError that says what to change."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ModuleNotFoundError as error:
        raise SettingsError("S3 needs boto3: run pip install boto3") from error
    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        advice = S3_ADVICE.get(code)
        if code in ("AccessDenied", "403", "Forbidden"):
            action = error.operation_name.replace("ListObjectsV2", "ListBucket")
            action = action.replace("Copy", "Put").replace("Objects", "Object")
            advice = f"access denied: allow these credentials s3:{action} there"
        raise SettingsError(f"{uri}: {advice or explain(error)}") from error
    except BotoCoreError as error:
        advice = S3_ADVICE.get(type(error).__name__, explain(error))
        endpoint = re.search('https?://[^/"]+', str(error))
        if endpoint:
            advice = re.sub("ENDPOINT(?!_)", endpoint[0], advice)
        raise SettingsError(f"{uri}: {advice}") from error


def s3_keys(aws: Aws, uri: str) -> Iterator[tuple[str, int]]:
    """The key and bytes of each object below a URI; the first is tried for reading."""
    bucket, prefix = s3_place(uri)
    with s3_errors(uri):
        client = s3_client(aws)
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix
        )
        for page in pages:
            for number, entry in enumerate(page.get("Contents", ())):
                if number == 0:
                    client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].close()
                yield entry["Key"], entry["Size"]


def check_s3_output(aws: Aws, uri: str) -> None:
    """Raises SettingsError unless objects can be deleted and written below a URI."""
    bucket, prefix = s3_place(uri)
    probe = {"Bucket": bucket, "Key": f"{prefix}/_probe-{uuid.uuid4().hex}".lstrip("/")}
    with s3_errors(uri):
        client = s3_client(aws)
        client.delete_object(**probe)  # first: a probe that can't go must not come
        client.put_object(**probe, Body=b"")
        client.delete_object(**probe)


def java_path() -> str | None:
    """The Java that Spark will run on, if there is one."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    return java if java and os.access(java, os.X_OK) else None


def check_java() -> None:
    """Raises SettingsError unless Spark finds a Java that it can run on."""
    java = java_path()
    if not java:
        home = os.environ.get("JAVA_HOME")
        where = (
            f"JAVA_HOME={home} has no bin/java" if home else "no java is on the PATH"
        )
        raise SettingsError(f"Spark needs Java and {where}: {INSTALL_JAVA}")
    try:
        answer = subprocess.run([java, "-version"], stderr=subprocess.PIPE, check=False)
        version = re.search(rb'version "(?:1\.)?(\d+)', answer.stderr)
    except OSError:  # of another machine's kind, or no program
        version = None
    oldest = 8 if pyspark.__version__.startswith("3.") else 17
    # Hadoop asks for a Subject.getSubject that Java 23 and newer refuse.
    if not version or not oldest <= int(version[1]) <= 22:
        found = f"Java {int(version[1])}" if version else "no Java that starts"
        raise SettingsError(
            f"Spark {pyspark.__version__} runs on Java {oldest} to 22 but {java} is "
            f"{found}: {INSTALL_JAVA}"
        )


# The AWS SDK modules that S3A needs of its 640 MB bundle, by Hadoop version.
SDK_1, SDK_2 = "com.amazonaws:aws-java-sdk-", "software.amazon.awssdk:"
MODULES_2 = ("s3", "s3-transfer-manager", "sts", "apache-client", "netty-nio-client")
SDK_MODULES = {
    "3.3.4": [f"{SDK_1}{name}:1.12.262" for name in ("s3", "sts", "dynamodb")],
    "3.4.2": [f"{SDK_2}{name}:2.29.52" for name in MODULES_2],
}
# What those packages name but Spark has already, or other clouds need.
NOT_NEEDED = (
    "software.amazon.awssdk:bundle",
    "com.amazonaws:aws-java-sdk-bundle",
    "org.apache.hadoop:hadoop-client-*",
    "org.apache.hadoop:hadoop-cloud-storage",
    "org.apache.hadoop:hadoop-azure*",
    "com.microsoft.azure:*",
    "com.google.cloud.bigdataoss:*",
    "com.huaweicloud:*",
    "com.squareup.*:*",
    "com.fasterxml.jackson.*:*",
    "joda-time:*",
    "org.eclipse.jetty:*",
)


def s3_packages(jars: str | None = None) -> tuple[list[str], list[str]]:
    """Maven packages that give the Spark at hand S3A with its magic committer, and what
    to exclude of them. Both are empty for a Spark that brings its own S3A.

    For a Hadoop not in SDK_MODULES: hadoop-aws with its whole bundle, no committer.
    """
    jars = jars or os.path.join(os.path.dirname(pyspark.__file__), "jars")
    names = os.listdir(jars) if os.path.isdir(jars) else []
    hadoop = next((n for n in names if n.startswith("hadoop-client-api-")), None)
    if hadoop is None or any(name.startswith("hadoop-aws-") for name in names):
        return [], []
    hadoop = hadoop[len("hadoop-client-api-") : -len(".jar")]
    core = re.search(r"spark-core_(\S+?)-(\S+?)\.jar", " ".join(names))
    packages = [f"org.apache.hadoop:hadoop-aws:{hadoop}"]
    if hadoop not in SDK_MODULES:
        return packages, ["org.apache.hadoop:hadoop-client-*"]
    committer = f"org.apache.spark:spark-hadoop-cloud_{core[1]}:{core[2]}"
    return [*packages, *SDK_MODULES[hadoop], committer], list(NOT_NEEDED)


def is_without_jvm() -> bool:
    """Whether neither spark-submit nor this process has started a JVM yet."""
    return "PYSPARK_GATEWAY_PORT" not in os.environ and SparkContext._gateway is None


def start_spark(settings: Settings, small: bool = False) -> SparkSession:
    """The session: on the JVM that spark-submit has started, else on one of its own, which
    may suit small input."""
    on_s3 = bool(s3_place(settings.input) or s3_place(settings.output))
    if is_without_jvm():
        start_context(settings, on_s3, small)
    spark = SparkSession.builder.appName("sparkify-etl").getOrCreate()
    if not settings.debug:
        spark.sparkContext.setLogLevel("ERROR")
    known = spark.sparkContext.getConf()
    for key, value in DEFAULT_CONF.items():
        spark.conf.set(key, known.get(key, value))
    if small and not any(map(known.contains, SMALL_CONF)):  # both or neither
        for key, value in SMALL_CONF.items():
            spark.conf.set(key, value)
    for key, value in FIXED_CONF.items():
        spark.conf.set(key, value)
    hadoop = spark._jsc.hadoopConfiguration()
    hadoop.set("mapreduce.fileoutputcommitter.marksuccessfuljobs", "false")
    local = spark._jvm.org.apache.hadoop.fs.FileSystem.getLocal(hadoop)
    local.setWriteChecksum(False)  # no .crc file beside each file of the lake
    if on_s3:
        configure_s3(spark, settings.aws)
    if settings.aws.session_token:
        # Its provider fails one of two threads that use it first.
        for uri in filter(s3_place, (settings.input, settings.output)):
            path = spark._jvm.org.apache.hadoop.fs.Path(uri)
            path.getFileSystem(hadoop).exists(path)
    return spark


def start_context(settings: Settings, on_s3: bool, small: bool) -> None:
    """Starts a JVM with a Spark context; its log is shown only when debugging."""
    os.environ.setdefault("SPARK_DRIVER_MEMORY", "2g")  # with 1g large sorts spill
    options = os.environ.get("SPARK_SUBMIT_OPTS", "")
    if small:  # Java's second compiler would take 8 s of 39 and not pay
        options = f"-XX:TieredStopAtLevel=1 {options}"
    else:
        # It compiles less often: 147 s of processor time instead of 157; inlines as Java
        # 13 did: 35 s of compiling instead of 42; and code that waits for the second
        # compiler runs without slow counters: 121 s of processor time instead of 124.
        inlining = "-XX:MaxInlineLevel=9 -XX:InlineSmallCode=1000"
        compiling = f"-XX:CompileThresholdScaling=4 {inlining} -XX:Tier3DelayOn=0"
        options = f"{compiling} {options}"
    # Else eight garbage collections, 0.5 s in all, make room for classes at the start.
    options = f"-XX:MetaspaceSize=256m {options}"
    # A choice of garbage collector, of which Java takes one only, may be in each of these.
    given = [v for k, v in os.environ.items() if re.search("SUBMIT|JAVA.*OPTIONS", k)]
    of_spark = {"SPARK_HOME", "SPARK_CONF_DIR"} & set(os.environ)
    if "GC" not in " ".join(given) and not of_spark:
        options = f"-XX:+UseParallelGC {options}"  # 105 s instead of 131 for 1 M events
    if not re.search("Xshare|Archive", " ".join(given)) and not of_spark:
        options = f"{archive_option()} {options}"
    os.environ["SPARK_SUBMIT_OPTS"] = options
    conf = SparkConf(loadDefaults=False)
    packages, excludes = s3_packages() if on_s3 else ([], [])
    if on_s3 and "AWS_SHARED_CREDENTIALS_FILE" in os.environ:  # by its name in SDK 1
        profiles = os.environ["AWS_SHARED_CREDENTIALS_FILE"]
        os.environ.setdefault("AWS_CREDENTIAL_PROFILES_FILE", profiles)
    if "hadoop-aws" in os.environ.get("PYSPARK_SUBMIT_ARGS", ""):
        packages = []
    if packages:
        conf.set("spark.jars.packages", ",".join(packages))
        conf.set("spark.jars.excludes", ",".join(excludes))
    printed: deque[bytes] = deque(maxlen=1000)
    reader, writer = os.pipe()
    threading.Thread(
        target=relay, args=(reader, printed, settings.debug), daemon=True
    ).start()
    try:
        gateway = launch_gateway(conf, {"stdout": writer, "stderr": writer})
    except Exception as error:
        text = b"".join(printed).decode(errors="replace")
        if "unresolved dependency" in text or "download failed" in text:
            raise SettingsError(
                f"S3 needs packages that can't be downloaded: {','.join(packages)}: give "
                'them as files, PYSPARK_SUBMIT_ARGS="--jars FILE,... pyspark-shell", or '
                "name your registry in spark.jars.ivySettings in spark-defaults.conf"
            ) from error
        raise SettingsError(
            f"Spark didn't start: {explain(error)}; try --debug"
        ) from error
    finally:
        os.close(writer)
    conf = SparkConf(_jvm=gateway.jvm)
    conf.set("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    if conf.get("spark.master", "").startswith("local"):
        # A laptop's host name may resolve to nothing, or to another network's address.
        conf.setIfMissing("spark.driver.host", "127.0.0.1")
        conf.setIfMissing("spark.driver.bindAddress", "127.0.0.1")
        conf.setIfMissing("spark.ui.enabled", "false")
        # The python3 on the PATH may be of another version than this one.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if conf.get("spark.master", "") == "local[*]" and s3_place(settings.input):
        # A task waits for one small object after another; at 25 ms a request 1,943 of
        # them take 62 s on local[2], 12 s on local[32].
        conf.setMaster(f"local[{max(32, os.cpu_count() or 1)}]")
    SparkContext(conf=conf.setAppName("sparkify-etl"), gateway=gateway)


def archive_option() -> str:
    """Java's option to take Spark's classes from an archive, which brings the first job
    after 4.7 s, not 8.3; while there is none, the one to write it as the process ends.

    Of 170 MB, for each Java and Spark its own. Java passes over one that isn't whole or
    is of other classes.
    """
    java, home = os.path.realpath(java_path() or ""), os.path.dirname(pyspark.__file__)
    key = f"{java} {os.path.getmtime(java)} {home} {os.path.getmtime(home)}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"spark-{pyspark.__version__}-{zlib.crc32(key.encode()):08x}.jsa"
    archive, option = os.path.join(cache, "sparkify-etl", name), "SharedArchiveFile"
    if not os.path.exists(archive):
        try:
            os.makedirs(os.path.dirname(archive), exist_ok=True)
        except OSError:  # the home of some system users is no folder
            return ""
        option = "ArchiveClassesAtExit"
        log.info("java     archives Spark's classes after this run, once: %s", archive)
    # Java 12 and older know neither.
    return f"-XX:+IgnoreUnrecognizedVMOptions {shlex.quote(f'-XX:{option}={archive}')}"


def relay(reader: int, printed: deque[bytes], everything: bool) -> None:
    """Keeps what a JVM prints. Passes on its progress bar, which alone begins with a \\r,
    or everything."""
    for chunk in iter(lambda: os.read(reader, 65536), b""):
        printed.append(chunk)
        if everything or chunk.startswith(b"\r"):
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()


def configure_s3(spark: SparkSession, aws: Aws) -> None:
    """Gives S3A the credentials, region, endpoint and committer.

    On the running context, because the settings of a session are in the JVM's command
    line, which every user of the machine can read.
    """
    hadoop = spark._jsc.hadoopConfiguration()
    # forName would not find the classes of packages: they have a class loader of their own.
    loader = spark._jvm.java.lang.Thread.currentThread().getContextClassLoader()

    def has_class(name: str) -> bool:
        return loader.getResource(name.replace(".", "/") + ".class") is not None

    if not has_class("org.apache.hadoop.fs.s3a.S3AFileSystem"):
        # Under spark-submit pyspark is a zip below SPARK_HOME, without jars of its own.
        home = os.environ.get("SPARK_HOME", os.path.dirname(pyspark.__file__))
        packages, excludes = s3_packages(os.path.join(home, "jars"))
        raise SettingsError(
            "this Spark has no S3A: add to spark-submit --packages "
            f"{','.join(packages)} --exclude-packages '{','.join(excludes)}'"
        )
    chain = "com.amazonaws.auth.DefaultAWSCredentialsProviderChain"
    if has_class("software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider"):
        chain = "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider"
    provider = "org.apache.hadoop.fs.s3a.SimpleAWSCredentialsProvider"
    if aws.session_token:
        provider = "org.apache.hadoop.fs.s3a.TemporaryAWSCredentialsProvider"
    options = {
        "fs.s3a.aws.credentials.provider": provider if aws.access_key else chain,
        "fs.s3a.access.key": aws.access_key,
        "fs.s3a.secret.key": aws.secret_key,
        "fs.s3a.session.token": aws.session_token,
        "fs.s3a.endpoint": aws.endpoint,
        "fs.s3a.endpoint.region": aws.region or ("us-east-1" if aws.endpoint else None),
        "fs.s3a.path.style.access": "true" if aws.endpoint else None,
        "fs.s3a.connection.maximum": "200",
        # Of a folder's marker object, which 3.3 would delete with each file written in it.
        "fs.s3a.directory.marker.retention": "keep",
        # The committer that writes to S3 without renaming, which there is copying.
        "fs.s3a.committer.name": "magic",
        "fs.s3a.committer.magic.enabled": "true",
        # In the task's memory, not in two more objects a file: 1,715 requests, now 1,375.
        "fs.s3a.committer.magic.track.commits.in.memory.enabled": "true",
        "mapreduce.outputcommitter.factory.scheme.s3a": (
            "org.apache.hadoop.fs.s3a.commit.S3ACommitterFactory"
        ),
    }
    for key, value in options.items():
        if value:
            hadoop.set(key, value)
    cloud = "org.apache.spark.internal.io.cloud"
    if has_class(f"{cloud}.PathOutputCommitProtocol"):
        spark.conf.set(
            "spark.sql.sources.commitProtocolClass", f"{cloud}.PathOutputCommitProtocol"
        )
        spark.conf.set(
            "spark.sql.parquet.output.committer.class",
            f"{cloud}.BindingParquetOutputCommitter",
        )


# --- Read -----------------------------------------------------------------------------

# One JSON object that holds no other and no array, in valid UTF-8 (to Java a wrong byte
# is U+FFFD). Possessive quantifiers, so that long strings can't overflow Java's stack.
# Java's \s and $ would take more than JSON's white space around it.
FLAT_OBJECT = (
    r'^[ \t]*\{(?:[^"{}\[\]\x{FFFD}]++|"(?:[^"\\\x{FFFD}]++|\\.)*+")*+\}[ \t]*\z'
)
JSON_OPTIONS = {
    "columnNameOfCorruptRecord": "_corrupt",
    "allowSingleQuotes": "false",
    "allowNonNumericNumbers": "false",
}
UNCLEAR = "unclear"  # the reason of a line that isn't one flat object
SMALL_FILE = 1024 * 1024  # bytes
WHOLE_FILE_LIMIT = 32 * 1024 * 1024  # bytes; only a smaller file is read again whole
SMALL_CATALOGUE = 100_000  # songs, of about 100 bytes each
MAX_TS = 253402300799999  # ms, the end of the year 9999


@dataclass(frozen=True)
class Source:
    """A folder of INPUT: its records' schema, why one is bad, and the count of the good
    ones that a table is checked against."""

    folder: str
    schema: str
    rules: Callable[[], Column]
    tally: Callable[[], Column]


@dataclass(frozen=True)
class Records:
    """What a folder holds: its records, good or bad; how many are bad for each reason
    (the good ones are under None); their tally: distinct songs, or plays, each delivery."""

    rows: DataFrame
    counts: dict[str | None, int]
    tally: int


def read_records(spark: SparkSession, folder: str, source: Source) -> Records:
    """Every record, good or bad, of the *.json and *.json.gz files below a folder.

    Only files with a line that isn't one flat object (cut off, pretty-printed, several
    on a line) are read again, whole. The rows are cached: the schema's columns; file_id
    bigint, a hash of the file's path; source_file, raw, reason string, the path, the text
    and the fault of a bad record, which are null for a good one.
    """
    files = spark.read.option("recursiveFileLookup", True)
    files = files.option("pathGlobFilter", "*.{json,json.gz}")
    path, size = F.col("_metadata.file_path"), F.col("_metadata.file_size")
    # Two files may have the same: then what befalls one befalls both, and nothing is lost.
    file_id = F.xxhash64(path).alias("file_id")
    of_file = (file_id, path.alias("source_file"), size.alias("file_size"))

    def whole_files() -> DataFrame:
        return files.format("binaryFile").load(literal(folder))

    lines, line = files.text(literal(folder)), F.col("value").alias("raw")
    if s3_place(folder):  # a request more for each file that is read whole
        pieces = lines.select(line, *of_file)
    else:
        # 14,896 songs take 2.4 s, not 10.8: reading by line copies Hadoop's 1,076
        # settings for each file.
        is_small = (size <= SMALL_FILE) & ~path.endswith(".gz")
        ends = r"^\x{FEFF}|\r\n?|\n"  # a byte order mark, then the lines' ends
        text = F.split(F.col("content").cast("string"), ends)
        pieces = lines.where(~is_small).select(line, *of_file)
        pieces = pieces.unionAll(
            whole_files().where(is_small).select(F.explode(text).alias("raw"), *of_file)
        )
    problem = F.when(~is_flat_object("raw"), UNCLEAR).alias("problem")
    pieces = pieces.where(F.trim("raw") != "").select("*", problem)
    # In memory it would crowd out sorting: 1 M events took 131 s in all, not 121.
    on_disk = StorageLevel.DISK_ONLY
    records = parse_records(pieces, source).persist(on_disk)
    unclear = F.col("reason") == UNCLEAR
    file = F.when(unclear, F.struct("file_id", "file_size"))
    counts = count_records(records, source, file)
    again = [row.file for row in counts if row.file]
    if not again:
        return as_records(records, counts)
    in_small_file = F.col("file_id").isin(
        [file.file_id for file in again if file.file_size <= WHOLE_FILE_LIMIT]
    )
    in_large_file = records.where(unclear & ~in_small_file)
    raw = F.col("raw").cast("binary").alias("content")
    contents = whole_files().select("content", *of_file).where(in_small_file)
    contents = contents.unionByName(
        in_large_file.select(raw, "file_id", "source_file", "file_size")
    )
    split = F.udf(
        record_splitter(re.findall(r"(\w+) \w+", source.schema)),
        "array<struct<raw: string, problem: string>>",
        useArrow=False,
    )
    pieces = contents.withColumn("piece", F.explode(split("content")))
    pieces = pieces.select("file_id", "source_file", "file_size", "piece.*")
    clear = F.col("reason").isNull() | ~unclear
    records = (
        records.where(clear & ~in_small_file)
        .unionByName(parse_records(pieces, source))
        .persist(on_disk)
    )
    return as_records(records, count_records(records, source, F.lit(None)))


def is_flat_object(name: str) -> Column:
    """True where a string column is one JSON object that holds no other and no array, in
    valid UTF-8."""
    line, is_utf8 = F.col(name), F.encode(name, "UTF-8") == F.col(name).cast("binary")
    if hasattr(F, "is_valid_utf8"):  # Spark 4, whose encode checks nothing
        is_utf8 = F.is_valid_utf8(name)
    within = line.cast("binary").substr(F.lit(2), F.octet_length(name) - 2)
    within = within.cast("string")
    # Most lines are as plain as this: 3 M events take 158 s of processor time, not 162.
    is_plain = line.startswith("{") & line.endswith("}") & is_utf8
    for mark in "{}[\ufffd":  # a ] alone is no JSON; the last stands for wrong bytes
        is_plain &= ~within.contains(mark)
    return is_plain | line.rlike(FLAT_OBJECT)


def count_records(records: DataFrame, source: Source, file: Column) -> list[Row]:
    """How many records there are by reason and file, and their tally."""
    return (
        records.groupBy("reason", file.alias("file"))
        .agg(F.count("*").alias("records"), source.tally().alias("tally"))
        .collect()
    )


def as_records(rows: DataFrame, counts: Sequence[Row]) -> Records:
    """The records of which count_records has counted all."""
    tally = sum(row.tally for row in counts if row.reason is None)
    return Records(rows.drop("file_size"), {c.reason: c.records for c in counts}, tally)


def literal(path: str) -> str:
    """A path with whose special characters Spark's readers match only themselves."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def parse_records(pieces: DataFrame, source: Source) -> DataFrame:
    """Typed records of JSON texts. A value of the wrong type makes a bad record, no null.

    In: raw string; problem string, null where raw looks like one object; file_id;
    source_file; file_size. Out: the schema's columns, file_size and the others as in
    read_records.
    """
    schema = source.schema
    parsed = F.from_json("raw", f"{schema}, _corrupt string", JSON_OPTIONS)
    parsed = pieces.withColumn("record", parsed).select("*", "record.*")
    # Not by get_json_object, which takes single quotes and control characters.
    any_json = F.from_json("raw", "_ string, _corrupt string", JSON_OPTIONS)
    is_json = any_json["_corrupt"].isNull()
    too_large = [
        F.abs(F.col(name)) == math.inf for name in re.findall(r"(\w+) double", schema)
    ]
    reason = F.coalesce(
        F.col("problem"),
        F.when(F.col("_corrupt").isNotNull() & ~is_json, "not JSON"),
        F.when(F.col("_corrupt").isNotNull(), "value of the wrong type"),
        F.when(F.greatest(F.lit(False), *too_large), "number out of range"),
        source.rules(),
    )
    # Paths of good records, too, would take 3 % of the run's processor time.
    of_bad = (
        F.when(reason.isNotNull(), F.col(n)).alias(n) for n in ("source_file", "raw")
    )
    columns = re.findall(r"(\w+) \w+", schema)
    return parsed.select(
        *columns, "file_id", "file_size", *of_bad, reason.alias("reason")
    )


def is_blank(name: str) -> Column:
    """True where a string column is null, empty or all spaces."""
    return F.col(name).isNull() | (F.trim(name) == "")


def song_rules() -> Column:
    """Why a song record is bad; null where it is good."""
    return F.when(is_blank("song_id"), "no song_id").when(
        is_blank("artist_id"), "no artist_id"
    )


def event_rules() -> Column:
    """Why a log event is bad; null where it is good."""
    play = F.col("page") == "NextSong"
    return (
        F.when(is_blank("page"), "no page")
        .when(play & F.col("ts").isNull(), "play without ts")
        .when(~F.col("ts").between(0, MAX_TS), "ts out of range")
        .when(play & is_blank("userId"), "play without userId")
        .when(play & F.col("sessionId").isNull(), "play without sessionId")
    )


def record_splitter(
    columns: Sequence[str],
) -> Callable[[bytes], list[tuple[str, str | None]]]:
    """A function that finds the records in a file's bytes: (text, problem or None) each.

    A line that is one JSON object is a record. Between such lines, so are an object over
    several lines, each of several on one line, and each object of an array. What else
    there is counts as a bad record a line, or one for a whole pretty-printed object that
    is cut off. (A closure: Spark's workers get it by value and need no etl module.)
    """
    blank = " \t\n\ufeff"  # the last is a byte order mark, which may come in mid-file
    blanks, line = re.compile(f"[{blank}]*"), re.compile(".*")
    separated = re.compile(r"[ \t\ufeff]*(?:[{\n]|\Z)")
    cut_off = re.compile(r'\{[ \t]*(?:\n(?:[ \t"}\]].*)?)+')

    def parse(text: str, start: int = 0) -> tuple[Any, int]:
        # In a window, since a failure costs a look at all of the text that was given.
        size = 65536
        while True:
            try:
                window = text[start : start + size]
                value, end = json.JSONDecoder().raw_decode(window)
            except (ValueError, RecursionError) as error:
                at_end = getattr(error, "pos", 0) > size - 16
                if start + size >= len(text) or not (at_end or "Unter" in str(error)):
                    return None, start
                size *= 2
            else:
                return value, start + end

    def judge(text: str, value: Any) -> tuple[str, str | None]:
        raw = text.encode("utf-8", "surrogateescape").decode(
            "utf-8", "backslashreplace"
        )
        if raw != text:
            return raw, "not UTF-8"
        if not isinstance(value, dict):
            return raw, "not JSON" if value is None else "not a JSON object"
        nested = any(isinstance(value.get(name), (dict, list)) for name in columns)
        return raw, "value of the wrong type" if nested else None

    def is_array_of_objects(value: Any) -> bool:
        return isinstance(value, list) and {type(item) for item in value} == {dict}

    def records(text: str) -> Iterator[tuple[str, str | None]]:
        start = blanks.match(text).end()
        while start < len(text):
            value, end = parse(text, start)
            if end == start:
                end = (cut_off.match(text, start) or line.match(text, start)).end()
            elif not separated.match(text, end):
                value, end = None, line.match(text, end).end()
            raw, problem = judge(text[start:end].rstrip(blank), value)
            if problem == "not a JSON object" and is_array_of_objects(value):
                yield from (judge(json.dumps(item), item) for item in value)
            else:
                yield raw, problem
            start = blanks.match(text, end).end()

    def split(content: bytes) -> list[tuple[str, str | None]]:
        content = bytes(content)
        if content.startswith(b"\x1f\x8b"):
            with suppress(EOFError, OSError, zlib.error):  # only looks like gzip
                content = gzip.decompress(content)
        text = content.decode("utf-8", "surrogateescape")
        text = re.sub("\r\n?", "\n", text).strip(blank)
        found, unclear = [], []
        array = text.startswith("[") and parse(text)[1] == len(text)
        for piece in [text] if array else text.split("\n"):
            value, end = parse(piece.strip(blank))
            if isinstance(value, dict) and end == len(piece.strip(blank)):
                found += records("\n".join(unclear))
                found.append(judge(piece.strip(blank), value))
                unclear = []
            else:
                unclear.append(piece)
        return found + list(records("\n".join(unclear)))

    return split


# --- Build ----------------------------------------------------------------------------


def text(name: str) -> Column:
    """A string column, null where it is blank."""
    return F.when(~is_blank(name), F.col(name)).alias(name)


def gaps(*names: str) -> Column:
    """How many of the columns are null."""
    return reduce(Column.__add__, [F.col(n).isNull().cast("int") for n in names])


def is_play() -> Column:
    """True for a log event that is a play and has what identifies it."""
    keys = F.col("ts").isNotNull() & F.col("sessionId").isNotNull()
    return (F.col("page") == "NextSong") & keys & ~is_blank("userId")


def has_song_keys() -> Column:
    """True for a song record that has its two keys."""
    return ~is_blank("song_id") & ~is_blank("artist_id")


def songplay_id() -> Column:
    """A play's bigint id: the same in every run, whatever else is in the input."""
    return F.xxhash64("ts", "userId", "sessionId", "itemInSession")


SOURCES = {
    "songs": Source(
        "song_data", SONG_SCHEMA, song_rules, lambda: F.count_distinct("song_id")
    ),
    "events": Source(
        "log_data", EVENT_SCHEMA, event_rules, lambda: F.count_if(is_play())
    ),
}


def build_songs(raw_songs: DataFrame) -> DataFrame:
    """One row a song_id: of several records the most complete, then the first in order.

    In: SONG_SCHEMA. Out: song_id, title, artist_id string; year int (0 is unknown);
    duration double (seconds).
    """
    year = F.coalesce("year", F.lit(0)).alias("year")
    songs = raw_songs.where(has_song_keys())
    songs = songs.select("song_id", text("title"), "artist_id", year, "duration")
    rank = (gaps("title", "duration") + (F.col("year") == 0).cast("int")).alias("rank")
    best = F.min(F.struct(rank, "title", "artist_id", "year", "duration"))
    return (
        songs.groupBy("song_id")
        .agg(best.alias("best"))
        .select("song_id", "best.title", "best.artist_id", "best.year", "best.duration")
    )


def build_artists(raw_songs: DataFrame) -> DataFrame:
    """One row an artist_id: of several records the most complete, then the one of the
    shortest name, then the first in alphabetical order.

    In: SONG_SCHEMA. Out: artist_id, name, location string; latitude, longitude double
    (degrees).
    """
    names = ("name", "location", "latitude", "longitude")
    artists = raw_songs.where(has_song_keys()).select(
        "artist_id", *(F.col(f"artist_{name}").alias(name) for name in names)
    )
    artists = artists.withColumns({name: text(name) for name in names[:2]})
    best = F.struct(
        gaps(*names).alias("rank"),
        gaps("name").alias("unnamed"),
        F.length("name").alias("name_length"),
        *names,
    )
    return (
        artists.groupBy("artist_id")
        .agg(F.min(best).alias("best"))
        .select("artist_id", *(f"best.{name}" for name in names))
    )


def build_users(events: DataFrame) -> DataFrame:
    """One row a user id of any event, as the user's latest event (then the highest
    itemInSession) describes the user.

    In: EVENT_SCHEMA. Out: user_id, first_name, last_name, gender, level string.
    """
    order = ("ts", "itemInSession", "sessionId")
    attributes = map(text, ("firstName", "lastName", "gender", "level"))
    return (
        events.where(~is_blank("userId"))
        .groupBy("userId")
        .agg(F.max(F.struct(*order, *attributes)).alias("latest"))
        .select(
            F.col("userId").alias("user_id"),
            F.col("latest.firstName").alias("first_name"),
            F.col("latest.lastName").alias("last_name"),
            "latest.gender",
            "latest.level",
        )
    )


def build_time(songplays: DataFrame) -> DataFrame:
    """One row a start_time of a play.

    In: start_time timestamp. Out: start_time; hour, day, week (ISO 8601), month, year,
    weekday (1 Sunday to 7 Saturday) int, of the session's time zone, which is UTC.
    """
    start_time = F.col("start_time")
    return (
        songplays.where(start_time.isNotNull())
        .select(start_time)
        .repartitionByRange(start_time)  # for the order in the files
        .distinct()
        .select(
            start_time,
            F.hour(start_time).alias("hour"),
            F.dayofmonth(start_time).alias("day"),
            F.weekofyear(start_time).alias("week"),
            F.month(start_time).alias("month"),
            F.year(start_time).alias("year"),
            F.dayofweek(start_time).alias("weekday"),
        )
    )


def build_songplays(
    events: DataFrame,
    raw_songs: DataFrame,
    small_catalogue: bool = False,
    counts: Observation | None = None,
) -> DataFrame:
    """One row a distinct play (ts, userId, sessionId, itemInSession), found song or not.

    A play's song has exactly its title and, among the names that the catalogue gives the
    song's artist_id, exactly its artist name; of several it is the nearest in duration,
    then of the smallest song_id. A play without a song gets the artist_id that alone
    bears its artist name. Both are looked up in tables of one row a key: no join can
    multiply a play. A small catalogue is sent to every task, which spares a shuffle.
    Where the rows are written, counts gets their number and, as plays, the number of plays
    that they were made of.
    In: EVENT_SCHEMA and SONG_SCHEMA. Out: songplay_id bigint; start_time timestamp;
    user_id, level, song_id, artist_id string; session_id bigint; location, user_agent
    string; year, month int of start_time.
    """
    start_time = F.timestamp_millis("ts").alias("start_time")
    key = ("start_time", "userId", "sessionId", "itemInSession")
    rest = ("level", "location", "userAgent")
    plays = events.where(is_play()).withColumn("start_time", start_time)
    plays = plays.select(*key, *rest, "song", "artist", "length")
    names = raw_songs.where(has_song_keys() & ~is_blank("artist_name"))
    names = names.select("artist_id", F.col("artist_name").alias("artist")).distinct()
    songs_by_name = (
        build_songs(raw_songs)
        .join(names, on="artist_id", how="inner")
        .groupBy(F.col("title").alias("song"), "artist")
        .agg(
            F.collect_list(F.struct("duration", "song_id", "artist_id")).alias("songs")
        )
    )
    artists_by_name = (
        names.groupBy("artist")
        .agg(F.count("*").alias("bearers"), F.min("artist_id").alias("artist_id"))
        .where(F.col("bearers") == 1)
        .select("artist", F.col("artist_id").alias("sole_artist_id"))
    )
    if small_catalogue:
        songs_by_name = songs_by_name.hint("broadcast")
        artists_by_name = artists_by_name.hint("broadcast")
        plays = plays.repartitionByRange("start_time")

    def by_fit(song: Column) -> Column:
        gap = F.coalesce(F.abs(song["duration"] - F.col("length")), F.lit(math.inf))
        return F.struct(gap, song["song_id"], song["artist_id"])

    best = F.array_min(F.transform("songs", by_fit))
    found = (
        plays.join(songs_by_name, on=["song", "artist"], how="left")
        .join(artists_by_name, on="artist", how="left")
        .withColumn("best", best)
        .select(*key, *rest, "best.song_id", "best.artist_id", "sole_artist_id")
        .withColumns({"year": F.year("start_time"), "month": F.month("start_time")})
    )
    if not small_catalogue:  # whose joins have shuffles of their own
        found = found.repartitionByRange("start_time")
    # That shuffle and the sort of this aggregate find the plays that were delivered twice,
    # and put the others in the files and the order of the table.
    play = F.struct(*rest, "song_id", "artist_id", "sole_artist_id")
    distinct = found.groupBy("year", "month", *key).agg(
        F.max(play).alias("play"), F.count("*").alias("copies")
    )
    if counts:
        plays = F.sum("copies").alias("plays")
        distinct = distinct.observe(counts, F.count("*").alias("rows"), plays)
    return (
        distinct.select("year", "month", *key, "play.*")
        .withColumn("ts", F.unix_millis("start_time"))
        .select(
            songplay_id().alias("songplay_id"),
            "start_time",
            F.col("userId").alias("user_id"),
            text("level"),
            "song_id",
            F.coalesce("artist_id", "sole_artist_id").alias("artist_id"),
            F.col("sessionId").alias("session_id"),
            text("location"),
            text("userAgent").alias("user_agent"),
            "year",
            "month",
        )
    )


# --- Stage ----------------------------------------------------------------------------


def size_shuffles(spark: SparkSession, records: int) -> None:
    """Gives the shuffles of so many records a partition for each 500,000, and no fewer than
    there are cores, where nobody else has set the number."""
    if spark.conf.get("spark.sql.shuffle.partitions") == "200":  # Spark's own default
        # 3 M events: 114 s of processor time, not 124; and a billion don't get 1 GB each.
        cores = spark.sparkContext.defaultParallelism
        partitions = max(cores, records // 500_000)
        spark.conf.set("spark.sql.shuffle.partitions", partitions)


def rebalance(rows: DataFrame, *folders: str) -> DataFrame:
    """The rows, those of a folder together, or apart where they are many."""
    hint = f"REBALANCE({', '.join(folders)})" if folders else "REBALANCE"
    # DataFrame.hint takes no columns before Spark 4.
    return rows.sparkSession.sql(f"SELECT /*+ {hint} */ * FROM {{rows}}", rows=rows)


def write_table(rows: DataFrame, table: str, folder: str) -> float:
    """Writes a table's Parquet files below folder/<table>/; returns the seconds taken.

    A Spark partition of the rows makes a file in each folder that it has rows of.
    """
    began = time.monotonic()
    partitions, order = TABLES[table].folders, TABLES[table].order
    files = rows.sortWithinPartitions(*partitions, *order).write
    files = files.option("maxRecordsPerFile", 25_000_000)  # of time, 6 bytes each
    files.partitionBy(*partitions).parquet(f"{folder}/{table}")
    return time.monotonic() - began


def stage_tables(
    spark: SparkSession,
    events: DataFrame,
    raw_songs: DataFrame,
    folder: str,
    small_catalogue: bool,
) -> tuple[dict[str, float], dict[str, int]]:
    """Builds and writes the five tables below a staging folder; returns the seconds of
    each, and songplays' rows and the plays that they were made of. They are written at
    the same time, but `time` is made of songplays as written.
    """
    counts = Observation()

    def write_songplays_and_time() -> tuple[float, float]:
        songplays = build_songplays(events, raw_songs, small_catalogue, counts)
        seconds = write_table(songplays, "songplays", folder)
        songplays = spark.read.parquet(literal(f"{folder}/songplays"))
        return seconds, write_table(build_time(songplays), "time", folder)

    with ThreadPoolExecutor(len(TABLES)) as pool:
        fact = pool.submit(write_songplays_and_time)
        built = {
            "users": rebalance(build_users(events)),
            "songs": rebalance(build_songs(raw_songs), "year"),
            "artists": rebalance(build_artists(raw_songs)),
        }
        written = {
            table: pool.submit(write_table, rows, table, folder)
            for table, rows in built.items()
        }
        seconds = {table: writing.result() for table, writing in written.items()}
        seconds["songplays"], seconds["time"] = fact.result()
        return seconds, observed(counts)


def observed(counts: Observation, patience: float = 60) -> dict[str, int]:
    """What was counted where rows were written. Raises RunError where Spark, which tells
    it by an event that may be dropped, doesn't say within so many seconds."""
    found: list[dict[str, int]] = []
    asking = threading.Thread(target=lambda: found.append(counts.get), daemon=True)
    asking.start()
    asking.join(patience)
    if not any(found):
        raise RunError("Spark didn't say how many plays it has written: run again")
    return found[0]


# --- Check ----------------------------------------------------------------------------


def check_tables(spark: SparkSession, folder: str) -> dict[str, dict[str, int]]:
    """Checks the tables as written below a folder, all in one pass.

    Returns the rows of each table and `plays_with`, how many rows of songplays refer to
    each other table. Raises RunError, naming table and check, unless every table has
    rows, every primary key is unique and not null, and every foreign key finds its row.
    """
    tables = {}
    for table in TABLES:
        try:
            tables[table] = spark.read.parquet(literal(f"{folder}/{table}"))
        except AnalysisException as error:  # Parquet files are what has the columns
            raise RunError(f"check failed: table {table} has no file") from error

    owners = list(TABLES)

    def keys(table: str) -> DataFrame:  # of one scan: owner, key, holder
        columns = [(TABLES[table].key, table)]
        columns += [
            (column, owner) for of, column, owner in FOREIGN_KEYS if of == table
        ]
        types = dict(tables[table].dtypes)
        pairs = []
        for name, owner in columns:
            number = {"bigint": F.col(name), "timestamp": F.unix_micros(name)}
            number = number.get(types[name], F.lit(None).cast("bigint"))
            text = (
                F.col(name) if types[name] == "string" else F.lit(None).cast("string")
            )
            pair = {"owner": F.lit(owners.index(owner)), "number": number, "text": text}
            pairs.append(F.struct(*(value.alias(n) for n, value in pair.items())))
        pair = F.explode(F.array(*pairs)).alias("pair")
        holder = F.lit(owners.index(table)).alias("holder")
        return tables[table].select(pair, holder).select("pair.*", "holder")

    # Only counts and numbers are aggregated, and texts not turned into others: Spark
    # sorts for all else, and a million events took 45 s, not 14.
    no_key = F.col("number").isNull() & F.col("text").isNull()
    is_owner = F.col("holder") == F.col("owner")
    is_play = F.col("holder") == owners.index("songplays")
    by_key = (
        reduce(DataFrame.unionAll, map(keys, TABLES))
        .where(is_owner | ~no_key)
        .groupBy("owner", "number", "text")
        .agg(
            F.count(F.when(is_owner, 1)).alias("rows"),
            F.count(F.when(~is_owner & is_play, 1)).alias("plays"),
            F.max(F.when(~is_owner, F.col("holder"))).alias("holder"),
        )
    )
    wrong = F.when(no_key, 1).when(F.col("rows") > 1, 2).when(F.col("rows") == 0, 3)
    found = by_key.groupBy("owner").agg(
        F.sum("rows").alias("rows"),
        F.sum("plays").alias("plays"),
        F.count(wrong).alias("wrong"),
    )
    results = {owners[row["owner"]]: row for row in found.collect()}
    for table in TABLES:
        if table not in results or not results[table]["rows"]:
            raise RunError(f"check failed: table {table} has no rows")
    if any(row["wrong"] for row in results.values()):
        number = F.col("number")
        is_time = F.col("owner") == owners.index("time")
        time = F.when(is_time, F.timestamp_micros(number).cast("string"))
        value = F.coalesce("text", time, number.cast("string")).alias("value")
        bad = by_key.where(wrong.isNotNull()).orderBy("owner", wrong)
        owner, holder, rows, value = bad.select(
            "owner", "holder", "rows", value
        ).first()
        table, key = owners[owner], TABLES[owners[owner]].key
        if value is None:
            raise RunError(f"check failed: table {table} has a row without {key}")
        if rows:
            raise RunError(f"check failed: {table} has {key} {value} twice")
        raise RunError(
            f"check failed: {owners[holder]} has {key} {value}, {table} has not"
        )
    return {
        "rows": {table: results[table]["rows"] for table in TABLES},
        "plays_with": {table: results[table]["plays"] for table in TABLES},
    }


# --- Files ----------------------------------------------------------------------------

# What publishing and locking do with a lake's files, by their names from its root. Three
# kinds with the same methods: on S3, Hadoop's renaming costs ten requests a file.


@dataclass(frozen=True)
class LocalFiles:
    """The files of a lake on local disk."""

    root: str

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of each file at any depth below a folder, by its path from there."""
        top = os.path.join(self.root, folder)
        paths = [
            os.path.join(parent, name)
            for parent, _, names in os.walk(top)
            for name in names
            if not name.startswith(".")  # Hadoop's checksums
        ]
        return {os.path.relpath(path, top): os.path.getsize(path) for path in paths}

    def read(self, name: str) -> str | None:
        """The text of a small file; None if it isn't there."""
        try:
            with open(f"{self.root}/{name}", encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def create(self, name: str, text: str) -> bool:
        """Writes a small file unless there is one; returns whether it did."""
        path = f"{self.root}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            open(path, "x").close()
        except FileExistsError:
            return False
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:  # such as of a full disk, which names no file
            os.remove(path)
            raise OSError(error.errno, error.strerror, path) from error
        return True

    def move(self, source: str, target: str) -> None:
        """Renames a file. (On S3 the source may stay.)"""
        os.makedirs(os.path.dirname(f"{self.root}/{target}"), exist_ok=True)
        os.replace(f"{self.root}/{source}", f"{self.root}/{target}")

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files that are there, and the folders that this leaves empty."""
        for name in names:
            with suppress(FileNotFoundError):
                os.remove(f"{self.root}/{name}")
            with suppress(OSError):
                while name:
                    name = os.path.dirname(name)
                    os.rmdir(f"{self.root}/{name}")

    def delete_folder(self, name: str) -> None:
        """Deletes a folder with all that is in it, if it is there."""
        if os.path.exists(f"{self.root}/{name}"):
            shutil.rmtree(f"{self.root}/{name}")


@dataclass(frozen=True)
class S3Files:
    """The files of a lake in a bucket, by boto3: an object has no folder to make."""

    client: Any
    bucket: str
    root: str  # of each key; "" or with a last slash

    def call(self, operation: str, **parameters: Any) -> Any:
        """Does a request; raises SettingsError when it is refused."""
        with s3_errors(f"s3a://{self.bucket}/{parameters.get('Key', self.root)}"):
            return getattr(self.client, operation)(Bucket=self.bucket, **parameters)

    def entries(self, operation: str, what: str, folder: str) -> list[dict[str, Any]]:
        """What a paged listing finds below a folder."""
        with s3_errors(f"s3a://{self.bucket}/{self.root}{folder}"):
            pages = self.client.get_paginator(operation).paginate(
                Bucket=self.bucket, Prefix=f"{self.root}{folder}/"
            )
            return [entry for page in pages for entry in page.get(what, ())]

    def sizes(self, folder: str) -> dict[str, int]:
        start = len(f"{self.root}{folder}/")
        found = self.entries("list_objects_v2", "Contents", folder)
        # A folder's marker ends with a slash.
        files = (of for of in found if not of["Key"].endswith("/"))
        return {of["Key"][start:]: of["Size"] for of in files}

    def read(self, name: str) -> str | None:
        try:
            found = self.call("get_object", Key=self.root + name)
            return found["Body"].read().decode()
        except SettingsError as error:
            if "NoSuchKey" in str(error.__cause__):
                return None
            raise

    def create(self, name: str, text: str) -> bool:
        try:
            key = self.root + name
            self.call("put_object", Key=key, Body=text.encode(), IfNoneMatch="*")
        except SettingsError as error:
            if re.search("PreconditionFailed|Conditional", str(error.__cause__)):
                return False
            raise
        return True

    def move(self, source: str, target: str) -> None:
        source = {"Bucket": self.bucket, "Key": self.root + source}
        self.call("copy_object", Key=self.root + target, CopySource=source)

    def delete(self, names: Sequence[str]) -> None:
        keys = [{"Key": self.root + name} for name in names]
        for start in range(0, len(keys), 1000):
            some = {"Objects": keys[start : start + 1000], "Quiet": True}
            for error in self.call("delete_objects", Delete=some).get("Errors", ()):
                raise RunError(
                    f"{error.get('Key')} can't be deleted: {error.get('Code')}"
                )

    def delete_folder(self, name: str) -> None:
        start = len(self.root)
        found = self.entries("list_objects_v2", "Contents", name)
        self.delete([of["Key"][start:] for of in found])
        # S3 keeps, and charges, the unfinished uploads of killed runs unseen.
        for upload in self.entries("list_multipart_uploads", "Uploads", name):
            which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            self.call("abort_multipart_upload", **which)


@dataclass(frozen=True)
class HadoopFiles:
    """The files of a lake on HDFS or another file system that Hadoop knows."""

    spark: SparkSession
    root: str

    def path(self, name: str) -> tuple[Any, Any]:
        """Hadoop's FileSystem and Path of a file."""
        path = self.spark._jvm.org.apache.hadoop.fs.Path(f"{self.root}/{name}")
        return path.getFileSystem(self.spark._jsc.hadoopConfiguration()), path

    def sizes(self, folder: str) -> dict[str, int]:
        fs, path = self.path(folder)
        if not fs.exists(path):
            return {}
        start, sizes = len(fs.makeQualified(path).toString()) + 1, {}
        found = fs.listFiles(path, True)
        while found.hasNext():
            status = found.next()
            sizes[status.getPath().toString()[start:]] = status.getLen()
        return sizes

    def read(self, name: str) -> str | None:
        fs, path = self.path(name)
        if not fs.exists(path):
            return None
        with closing(fs.open(path)) as stream:
            return self.spark._jvm.org.apache.commons.io.IOUtils.toString(
                stream, "UTF-8"
            )

    def create(self, name: str, text: str) -> bool:
        fs, path = self.path(name)
        try:
            with closing(fs.create(path, False)) as stream:
                stream.write(bytearray(text.encode()))
        except Py4JJavaError as error:
            if "AlreadyExists" in str(error):  # the Java exception's class
                return False
            raise
        return True

    def move(self, source: str, target: str) -> None:
        fs, path = self.path(source)
        _, target_path = self.path(target)
        fs.mkdirs(target_path.getParent())
        if not fs.rename(path, target_path):
            raise RunError(f"{self.root}/{target} can't be written: renaming failed")

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            fs, path = self.path(name)
            fs.delete(path, False)
        for folder in {os.path.dirname(name) for name in names}:
            with suppress(Py4JJavaError):  # for a folder that isn't empty
                while folder:
                    fs, path = self.path(folder)
                    fs.delete(path, False)
                    folder = os.path.dirname(folder)

    def delete_folder(self, name: str) -> None:
        fs, path = self.path(name)
        fs.delete(path, True)


Files = Union[LocalFiles, S3Files, HadoopFiles]


def lake_files(settings: Settings) -> Files:
    """The files of OUTPUT. Neither local disk nor S3 needs Spark's slow start."""
    path, place = local_path(settings.output), s3_place(settings.output)
    if path:
        return LocalFiles(path)
    if place:
        client = s3_client(settings.aws, patient=True)
        return S3Files(client, place[0], f"{place[1]}/".lstrip("/"))
    return HadoopFiles(start_spark(settings), settings.output)


# --- Publish --------------------------------------------------------------------------

OWN_FILE = re.compile(r"(.*/)?part-[^/]*\.parquet")  # what a run writes into a table


def publish(
    files: Files, run_id: str, staged: Sequence[str], tables: Sequence[str]
) -> None:
    """Moves a run's staged files into the lake, then deletes the files that the tables
    had.

    A journal of both is written first. When moving fails, what was moved is deleted;
    when the run is killed, the next start finds the journal and finishes. Each file has a
    name of its own: a reader sees old rows, new rows or both, never fewer. Files that no
    run has written stay.
    """
    replaced = [
        f"{table}/{name}"
        for table in tables
        for name in files.sizes(table)
        if OWN_FILE.fullmatch(name)
    ]
    journal = {"run": run_id, "staged": list(staged), "replaced": replaced}
    outcome = "the tables are as they were"
    try:
        confirm_lock(files, run_id)
        write_journal(files, journal)
        outcome = "the next start of etl.py finishes it"
        try:
            move_staged(files, run_id, staged)
        except BaseException:
            # Not moved back: deleting is still allowed where writing is no more.
            confirm_lock(files, run_id)
            clean_up(files, staged)
            outcome = "the tables are as they were"
            raise
        clean_up(files, replaced)
    except (Exception, KeyboardInterrupt) as error:
        raise RunError(f"publishing failed, {outcome}: {explain(error)}") from error


def write_journal(files: Files, journal: dict[str, Any]) -> None:
    """Writes the journal, which is there whole or not at all."""
    text = json.dumps(journal)
    files.create("_staging/_journal.json", text)
    files.move("_staging/_journal.json", "_journal.json")


def move_staged(files: Files, run_id: str, names: Sequence[str]) -> None:
    """Moves these staged files of a run into the lake."""
    with ThreadPoolExecutor(32) as pool:
        staged = (f"_staging/{run_id}/{name}" for name in names)
        list(pool.map(files.move, staged, names))


def clean_up(files: Files, names: Sequence[str]) -> None:
    """Deletes files of the lake, the staging folder and at last the journal."""
    files.delete(names)
    files.delete_folder("_staging")
    files.delete(["_journal.json"])


def recover(files: Files) -> None:
    """Finishes the publish that a killed run had begun, or deletes what it had staged."""
    text = files.read("_journal.json")
    if text:
        journal = json.loads(text)
        run_id, names = journal["run"], journal["staged"]
        staged = files.sizes(f"_staging/{run_id}")
        folders = {name.split("/")[0] for name in names}
        there = {f"{folder}/{n}" for folder in folders for n in files.sizes(folder)}
        if there.issuperset(name for name in names if name not in staged):
            move_staged(files, run_id, [name for name in names if name in staged])
            clean_up(files, journal["replaced"])
            log.info("recover  finished publishing what run %s had checked", run_id)
        else:  # They were being deleted, because moving had failed.
            clean_up(files, names)
            log.info("recover  undid what run %s had begun to publish", run_id)
        return
    if files.sizes("_staging"):
        log.info("recover  deleted what an unfinished run had staged")
    files.delete_folder("_staging")  # and on S3 the unfinished uploads, unseen above


# --- Lock -----------------------------------------------------------------------------


def read_lock(files: Files) -> dict[str, Any]:
    """Who holds the lock; {} where nobody does or its holder is just writing it."""
    try:
        return json.loads(files.read("_lock") or "{}")
    except ValueError:
        return {}


def confirm_lock(files: Files, run_id: str) -> None:
    """Raises RunError when another run has taken over the lock of this one."""
    other = read_lock(files)
    if other.get("run", run_id) != run_id:
        raise RunError(f"run {other['run']} has taken over the lock")


def this_system() -> str:
    """What tells this host since its start, and a container on it, from all others that
    count their processes by themselves."""
    names = [socket.gethostname()]
    with suppress(OSError):  # of a system without /proc
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            names.append(file.read().strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


def process_start(pid: int) -> str | None:
    """What tells a process of this system from a later one with its number; None if it
    has ended; "unknown" where that can't be seen."""
    with suppress(OSError):  # of a system without /proc, or one that hides processes
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            state = file.read().rpartition(")")[2].split()
        return None if state[0] in "ZX" else state[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # a process of another user
        pass
    return "unknown"


def is_dead(lock: dict[str, Any]) -> bool:
    """Whether the holder of a lock is known to have ended."""
    if lock.get("system") != this_system():
        return False
    start = process_start(lock["pid"])
    return start != "unknown" and start != lock["process_start"]


@contextmanager
def hold_lock(files: Files, run_id: str, lake: str, break_lock: bool) -> Iterator[None]:
    """Keeps other runs from the lake while inside. Takes over the lock of a run that was
    killed on this host since its start, or any with --break-lock.

    Raises RunError, naming the holder, when another run holds it.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    me = {"run": run_id, "host": socket.gethostname(), "pid": os.getpid()}
    me.update(started=started, system=this_system())
    me["process_start"] = process_start(os.getpid())
    # Of several starts that find the same dead lock, one at a time may look at it.
    guard = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        while not files.create("_lock", json.dumps(me)):
            other = read_lock(files)
            if other.get("run") == run_id:  # a request to S3 that was sent once more
                break
            if not (break_lock or is_dead(other)):
                raise RunError(
                    f"another run writes to {lake}: process "
                    f"{other.get('pid')} on {other.get('host')}, since "
                    f"{other.get('started')}: wait for its end; if it is dead, run with "
                    "--break-lock"
                )
            log.info("lock     taken over from run %s", other.get("run"))
            files.delete(["_lock"])
    finally:
        os.close(guard)
    try:
        yield
    finally:
        try:
            if read_lock(files).get("run") == run_id:
                files.delete(["_lock"])
        except Exception as error:  # noqa: BLE001  # must not hide how the run ended
            log.info("lock     stays, since it can't be deleted: %s", explain(error))


# --- Catalog --------------------------------------------------------------------------

HIVE_PARQUET = "org.apache.hadoop.hive.ql.io.parquet"
# For each change of partitions: its argument, and how many a call takes.
GLUE_BATCHES = {
    "create": ("PartitionInputList", 100),
    "update": ("Entries", 100),
    "delete": ("PartitionsToDelete", 25),
}


class CatalogError(Exception):
    """The tables are published, but not all are registered: exit code 1."""


def glue_client(settings: Settings) -> Any:
    """A boto3 client for Glue, in the region that is set, else in the output's bucket's.

    ENDPOINT_URL is of S3 alone; boto3 by itself heeds AWS_ENDPOINT_URL_GLUE.
    """
    import boto3
    from botocore.config import Config

    aws = settings.aws
    region = aws.region or boto3.session.Session().region_name
    if not region:  # as on a node of EMR
        bucket, _ = s3_place(settings.output)
        region = s3_client(aws).head_bucket(Bucket=bucket).get("BucketRegion")
    return boto3.client(
        "glue",
        aws_access_key_id=aws.access_key,
        aws_secret_access_key=aws.secret_key,
        aws_session_token=aws.session_token,
        region_name=region,
        config=Config(
            connect_timeout=2,
            read_timeout=20,
            retries={"mode": "standard", "total_max_attempts": 4},
        ),
    )


def explain_glue(error: BaseException) -> str:
    """An error of a Glue client in one line, which names a right that is missing."""
    from botocore.exceptions import BotoCoreError

    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    if code == "AccessDeniedException":
        return f"access denied: allow these credentials glue:{error.operation_name}"
    hint = "; check AWS_REGION and the network"
    return explain(error) + (hint if isinstance(error, BotoCoreError) else "")


def check_glue(settings: Settings) -> None:
    """Raises SettingsError unless Glue answers and lets these credentials read."""
    from botocore.exceptions import BotoCoreError, ClientError

    database, table = settings.catalog, next(iter(TABLES))
    try:
        glue = glue_client(settings)
        for call, names in (
            (glue.get_database, {"Name": database}),
            (glue.get_table, {"DatabaseName": database, "Name": table}),
            (glue.get_partitions, {"DatabaseName": database, "TableName": table}),
        ):
            with suppress(glue.exceptions.EntityNotFoundException):
                call(**names)
    except (BotoCoreError, ClientError) as error:
        raise SettingsError(f"glue:{database}: {explain_glue(error)}") from error


def glue_table(
    lake: str, table: str, dtypes: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Glue's TableInput for a table of a lake on S3; `dtypes` are of its DataFrame, whose
    types have the names that Hive gives them."""
    columns = {name: {"Name": name, "Type": kind} for name, kind in dtypes}
    keys = [columns.pop(name) for name in TABLES[table].folders]
    place = "/".join(filter(None, s3_place(lake)))
    return {
        "Name": table,
        "TableType": "EXTERNAL_TABLE",
        "Parameters": {"EXTERNAL": "TRUE", "classification": "parquet"},
        "PartitionKeys": keys,
        "StorageDescriptor": {
            "Columns": list(columns.values()),
            "Location": f"s3://{place}/{table}/",  # Athena knows no s3a://
            "InputFormat": f"{HIVE_PARQUET}.MapredParquetInputFormat",
            "OutputFormat": f"{HIVE_PARQUET}.MapredParquetOutputFormat",
            "SerdeInfo": {
                "SerializationLibrary": f"{HIVE_PARQUET}.serde.ParquetHiveSerDe",
                "Parameters": {"serialization.format": "1"},
            },
        },
    }


def agrees(found: Any, wanted: Any) -> bool:
    """Whether Glue has all that is wanted; it may have more, such as comments."""
    if isinstance(wanted, dict):
        return all(agrees((found or {}).get(key), of) for key, of in wanted.items())
    if isinstance(wanted, list):
        found = found or []
        return len(found) == len(wanted) and all(map(agrees, found, wanted))
    return found == wanted


def register_table(
    glue: Any, database: str, table: dict[str, Any], folders: set[str]
) -> None:
    """Makes Glue's table agree with a TableInput, and its partitions with the table's
    folders, such as year=2018/month=11. Changes only what differs.

    Raises CatalogError for a partition that Glue refuses.
    """
    try:
        found = glue.get_table(DatabaseName=database, Name=table["Name"])["Table"]
    except glue.exceptions.EntityNotFoundException:
        glue.create_table(DatabaseName=database, TableInput=table)
    else:
        if not agrees(found, table):
            glue.update_table(DatabaseName=database, TableInput=table, SkipArchive=True)
    if not table["PartitionKeys"]:
        return
    storage, names = table["StorageDescriptor"], {"DatabaseName": database}
    names["TableName"] = table["Name"]
    wanted = {}
    for folder in sorted(folders):
        values = [part.partition("=")[2] for part in folder.split("/")]
        at = {**storage, "Location": f"{storage['Location']}{folder}/"}
        wanted[tuple(values)] = {"Values": values, "StorageDescriptor": at}
    # With their columns: Athena refuses a partition whose types aren't the table's.
    pages = glue.get_paginator("get_partitions").paginate(**names)
    old = {tuple(of["Values"]): of for page in pages for of in page["Partitions"]}
    changes = {
        "create": [of for key, of in wanted.items() if key not in old],
        "update": [
            {"PartitionValueList": of["Values"], "PartitionInput": of}
            for key, of in wanted.items()
            if key in old and not agrees(old[key], of)
        ],
        "delete": [{"Values": list(key)} for key in sorted(old.keys() - wanted.keys())],
    }
    for change, (argument, size) in GLUE_BATCHES.items():
        call, items = getattr(glue, f"batch_{change}_partition"), changes[change]
        for start in range(0, len(items), size):
            batch = {argument: items[start : start + size]}
            for error in call(**names, **batch).get("Errors", ()):
                values = error.get("PartitionValues") or error["PartitionValueList"]
                reason = error["ErrorDetail"].get("ErrorMessage")
                raise CatalogError(
                    f"{change} partition {'/'.join(values)} of {table['Name']}: {reason}"
                )


def register_tables(
    spark: SparkSession, settings: Settings, files: Sequence[str]
) -> str:
    """Registers the published tables in Glue, with a database where there is none.

    `files` are those of the tables, by their paths in the lake. Returns what is there.
    Raises CatalogError.
    """
    lake, database, partitions = settings.output, settings.catalog, 0
    try:
        glue = glue_client(settings)
        try:
            glue.get_database(Name=database)
        except glue.exceptions.EntityNotFoundException:
            glue.create_database(DatabaseInput={"Name": database})
        for table in TABLES:
            own = [name for name in files if name.startswith(f"{table}/")]
            folders = {os.path.dirname(name)[len(table) + 1 :] for name in own} - {""}
            # One file has all the columns, and its folders' names those of the folders.
            rows = spark.read.option("basePath", f"{lake}/{table}")
            dtypes = rows.parquet(literal(f"{lake}/{own[0]}")).dtypes
            register_table(glue, database, glue_table(lake, table, dtypes), folders)
            partitions += len(folders)
    except (Exception, KeyboardInterrupt) as error:
        raise CatalogError(
            f"the tables are published, but not all are registered in glue:{database}: "
            f"{explain_glue(error)}: the next run registers them"
        ) from error
    return f"glue:{database}: {len(TABLES)} tables, {partitions:,} partitions"


# --- Report ---------------------------------------------------------------------------


def describe_tables(
    sizes: dict[str, int], rows: dict[str, int], seconds: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Rows, files, bytes and seconds by table; `sizes` are bytes by a file's path."""
    return {
        table: {
            "rows": rows[table],
            "files": sum(name.startswith(f"{table}/") for name in sizes),
            "bytes": sum(sizes[n] for n in sizes if n.startswith(f"{table}/")),
            "seconds": round(seconds[table], 1),
        }
        for table in TABLES
    }


def format_report(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    lines = [f"{'table':9} {'rows':>12} {'files':>7} {'kB':>12} {'seconds':>8}"]
    for table, of in report["tables"].items():
        size = of["bytes"] / 1000
        figures = (
            f"{of['rows']:12,} {of['files']:7,} {size:12,.1f} {of['seconds']:8.1f}"
        )
        lines.append(f"{table:9} {figures}")
    plays = report["plays"]
    for what, count in plays.items():
        share = "" if what == "all" else f"  {count / plays['all']:.1%}"
        lines.append(f"{'plays ' + what.replace('_', ' '):20} {count:>9,}{share}")
    for kind, of in report["records"].items():
        lines.append(f"{kind + ' read':20} {of['read']:>9,}")
        for why, count in of["rejected"].items():
            lines.append(f"{kind + ' rejected':20} {count:>9,}  {why}")
    if "rejected" in report:
        lines.append(f"rejected   {report['rejected']}")
    lines.append(f"lake       {report['lake']}  ({report['seconds']} s)")
    return "\n".join(lines)


# --- Main -----------------------------------------------------------------------------


def read_input(spark: SparkSession, folder: str) -> dict[str, Records]:
    """The records of song_data and log_data, read at the same time."""
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        found = {
            kind: pool.submit(read_records, spark, f"{folder}/{source.folder}", source)
            for kind, source in SOURCES.items()
        }
        return {kind: records.result() for kind, records in found.items()}


def stage_rejected(records: dict[str, Records], folder: str) -> None:
    """Writes the bad records below a folder as JSON lines: source_file, reason, raw."""
    frames = [of.rows.where(F.col("reason").isNotNull()) for of in records.values()]
    frames = [frame.select("source_file", "reason", "raw") for frame in frames]
    rejected = reduce(DataFrame.unionAll, frames)
    rejected.repartitionByRange("source_file").write.json(folder)  # to few files


def run(settings: Settings) -> dict[str, Any]:
    """A whole run. Returns its report, which, but for the time of publishing, is in
    OUTPUT/_reports/ too."""
    run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    small = preflight(settings)
    files = lake_files(settings)
    with hold_lock(files, run_id, settings.output, settings.break_lock):
        clock = [time.monotonic()]
        spark = start_spark(settings, small)
        log_step(
            clock, "start", f"Spark {spark.version} on {spark.sparkContext.master}"
        )
        if threading.current_thread() is threading.main_thread():
            # As by Ctrl-C, for which pyspark stops the jobs first.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        try:
            recover(files)
            return build_lake(spark, files, settings, run_id, clock)
        except BaseException as error:
            with suppress(Exception):  # what else fails now would hide the reason
                confirm_lock(files, run_id)
                if not files.read("_journal.json"):
                    files.delete_folder("_staging")
            if isinstance(error, SettingsError):  # of S3, which was in order before
                raise RunError(str(error)) from error
            raise


def log_step(clock: list[float], step: str, what: str) -> None:
    """Logs a step with the seconds since the one before."""
    clock.append(time.monotonic())
    log.info("%-8s %s (%.1f s)", step, what, clock[-1] - clock[-2])


def build_lake(
    spark: SparkSession,
    files: Files,
    settings: Settings,
    run_id: str,
    clock: list[float],
) -> dict[str, Any]:
    """Read, build, stage, check, publish. Returns the report; raises RunError when the
    input or the staged tables fail a check."""
    lake, staging = settings.output, f"{settings.output}/_staging/{run_id}"
    records = read_input(spark, settings.input)
    described = {
        kind: {
            "read": sum(of.counts.values()),
            "rejected": {
                why: of.counts[why] for why in sorted(filter(None, of.counts))
            },
        }
        for kind, of in records.items()
    }
    read = sum(of["read"] for of in described.values())
    bad = sum(sum(of["rejected"].values()) for of in described.values())
    log_step(
        clock, "read", ", ".join(f"{of['read']:,} {k}" for k, of in described.items())
    )
    rejected = f"_rejected/{run_id}"
    if bad:
        stage_rejected(records, f"{staging}/{rejected}")
    if bad > settings.max_rejected * read:
        publish(files, run_id, list(files.sizes(f"_staging/{run_id}")), tables=())
        raise RunError(
            f"{bad:,} of {read:,} records are bad, over --max-rejected "
            f"{settings.max_rejected:g}: no table is changed: see them in {lake}/{rejected}"
        )
    for kind, source in SOURCES.items():
        if not records[kind].counts.get(None):
            folder = f"{settings.input}/{source.folder}"
            raise RunError(f"no record in {folder}: check --input")
    if not records["events"].tally:
        raise RunError(f"no play (page NextSong) in {settings.input}/log_data")
    raw_songs, events = (of.rows.where("reason IS NULL") for of in records.values())
    size_shuffles(spark, read)
    small = records["songs"].counts[None] <= SMALL_CATALOGUE
    seconds, made = stage_tables(spark, events, raw_songs, staging, small)
    sizes = files.sizes(f"_staging/{run_id}")
    # Not what a task that died has left for Spark, which passes over such names.
    sizes = {name: size for name, size in sizes.items() if not re.search("/[_.]", name)}
    log_step(clock, "stage", f"{len(sizes):,} files")
    checked = check_tables(spark, staging)
    rows = checked["rows"]
    tables = describe_tables(sizes, rows, seconds)
    for table, of in tables.items():
        if not of["files"]:
            raise RunError(f"check failed: files of table {table} are not in {staging}")
    for what, found, wanted in (
        ("songplays holds %s plays, not %s", made["plays"], records["events"].tally),
        ("songplays has %s rows, not %s", rows["songplays"], made["rows"]),
        ("songs has %s rows, not %s", rows["songs"], records["songs"].tally),
    ):
        if found != wanted:
            what %= f"{found:,}", f"{wanted:,}"
            raise RunError(f"check failed: {what} as in the input")
    log_step(clock, "check", f"{sum(rows.values()):,} rows, all keys unique and found")
    report = {
        "run": run_id,
        "lake": lake,
        "seconds": round(clock[-1] - clock[0], 1),
        "tables": tables,
        "plays": {
            "all": rows["songplays"],
            "with_song": checked["plays_with"]["songs"],
            "with_artist": checked["plays_with"]["artists"],
        },
        "records": described,
        **({"rejected": f"{lake}/{rejected}"} if bad else {}),
    }
    text = json.dumps(report, indent=2) + "\n"
    files.create(f"_staging/{run_id}/_reports/{run_id}.json", text)
    publish(files, run_id, [*sizes, f"_reports/{run_id}.json"], tuple(TABLES))
    log_step(clock, "publish", lake)
    if settings.catalog:
        log_step(clock, "catalog", register_tables(spark, settings, list(sizes)))
    return {**report, "seconds": round(clock[-1] - clock[0], 1)}


def explain(error: BaseException) -> str:
    """An exception in one line: its first cause, and the file that it was about."""
    text = str(error).strip() or type(error).__name__  # of Ctrl-C: KeyboardInterrupt
    causes = re.findall(r"^(?:Caused by: |: )(.+)", text, re.MULTILINE)
    if "Python worker" in text:
        causes = re.findall(r"^[\w.]*(?:Error|Exception): .+", text, re.MULTILINE)
    about = re.search(r"while reading file (.+?\.json(\.gz)?)", text)
    line = causes[-1] if causes else text.splitlines()[0]
    return f"{about[1]}: {line}" if about else line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0 published, 1 failed, 2 wrong settings."""
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%X"
    )
    log.setLevel(logging.INFO)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    aws = Aws()
    try:
        settings = parse_settings(argv)
        aws = settings.aws
        print(format_report(run(settings)))
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        if "--debug" in (sys.argv if argv is None else argv):
            print(aws.hide_in(traceback.format_exc()), file=sys.stderr)
        print(f"etl.py: error: {aws.hide_in(explain(error))}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
