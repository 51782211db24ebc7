#!/usr/bin/env python3
"""Sparkify data lake ETL: song and log JSON in, a star schema of partitioned Parquet out.

    python etl.py [--input URI] [--output URI]         on a laptop, an EMR master node
    spark-submit etl.py [--input URI] [--output URI]   on a cluster

It reads like the job itself: settings, session, read, build, stage, check, publish,
report, main().
"""

from __future__ import annotations

import argparse
import configparser
import gzip
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import reduce
from typing import IO, Any, Callable

try:
    import pyspark
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
except ModuleNotFoundError as error:
    print(
        f"etl.py: error: {error.name} is missing: run pip install -r requirements.txt",
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

CONFIG_SECTIONS = {"LAKE": ("INPUT", "OUTPUT")}


@dataclass(frozen=True)
class Settings:
    """What a run needs to know; `input` and `output` are URIs without a last slash."""

    input: str
    output: str
    max_rejected: float
    debug: bool


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
    add(
        "--max-rejected",
        metavar="FRACTION",
        type=float,
        default=0.01,
        help="publish nothing above this fraction of bad records (default: 0.01)",
    )
    add("--debug", action="store_true", help="show tracebacks and Spark's own log")

    def fail(message: str) -> None:  # one line, where argparse prints the usage too
        raise SettingsError(f"{message} (see etl.py --help)")

    parser.error = fail  # type: ignore[assignment,method-assign]
    flags = parser.parse_args(argv)
    if not 0 <= flags.max_rejected <= 1:  # a NaN is neither
        fail(f"--max-rejected {flags.max_rejected} is not a fraction between 0 and 1")
    config = read_config(flags.config, here)
    settings = Settings(
        input=to_uri(flags.input or config.get("INPUT") or f"{here}/data_sample"),
        output=to_uri(flags.output or config.get("OUTPUT") or "lake"),
        max_rejected=flags.max_rejected,
        debug=flags.debug,
    )
    check_apart(settings.input, settings.output)
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
        errors = getattr(error, "errors", [(getattr(error, "lineno", "?"), "")])
        raise SettingsError(
            f"{path}, line {errors[0][0]}: wanted is each key once, as KEY = VALUE, under "
            + " or ".join(f"[{section}]" for section in CONFIG_SECTIONS)
        ) from None
    section_of = {key: name for name, keys in CONFIG_SECTIONS.items() for key in keys}
    for section in parser.sections():
        for key in parser[section]:
            if key not in section_of:
                known = ", ".join(section_of)
                raise SettingsError(f"{path}: unknown key {key}; the keys are {known}")
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


def to_uri(path: str) -> str:
    """The URI of a path or URI, absolute, without a last slash.

    A path without a scheme is local, whatever Hadoop's default file system is.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", path)
    if scheme and scheme[1] in ("hdfs", "viewfs"):
        return path.rstrip("/")
    if scheme and scheme[1] != "file":
        raise SettingsError(f"{path}: unknown scheme: use a local path, file: or hdfs:")
    local = re.sub("^file:(//(?=/))?", "", path)
    return "file://" + os.path.abspath(os.path.expanduser(local))


def local_path(uri: str) -> str | None:
    """The path of a file: URI; None for another one."""
    return uri[len("file://") :] if uri.startswith("file:") else None


def check_apart(source: str, lake: str) -> None:
    """Raises SettingsError where a run would write into its input or read its output."""
    source, lake = (
        f"{os.path.realpath(local_path(uri)) if local_path(uri) else uri}/"
        for uri in (source, lake)
    )
    if source == lake:
        raise SettingsError(f"INPUT and OUTPUT are both {lake}: give OUTPUT its own")
    for folder in ("song_data", "log_data"):
        if lake.startswith(f"{source}{folder}/"):
            raise SettingsError(
                f"OUTPUT {lake} is inside INPUT's {folder}: move it out"
            )
    for folder in (*TABLES, "_staging", "_rejected", "_reports"):
        if source.startswith(f"{lake}{folder}/"):
            raise SettingsError(
                f"INPUT {source} is inside OUTPUT's {folder}: move it out"
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
    # A song file has 250 bytes; at the default, 4 MB a file, 14,896 make 466 tasks.
    "spark.sql.files.openCostInBytes": "65536",
}


def preflight(settings: Settings) -> None:
    """Raises SettingsError for what would fail later, before Spark's slow start."""
    source, lake = local_path(settings.input), local_path(settings.output)
    for folder in ("song_data", "log_data") if source else ():
        walked = os.walk(os.path.join(source, folder))
        if not any(
            name.endswith((".json", ".json.gz"))
            for _, _, names in walked
            for name in names
        ):
            raise SettingsError(
                f"INPUT {source} holds no {folder}/ with .json or .json.gz files: "
                "give --input the folder of song_data/ and log_data/"
            )
    if lake:
        while not os.path.lexists(lake):
            lake = os.path.dirname(lake)
        if not (os.path.isdir(lake) and os.access(lake, os.W_OK | os.X_OK)):
            raise SettingsError(
                f"OUTPUT {settings.output}: {lake} is not a folder that can be written: "
                "change its permissions or give another --output"
            )


def check_java() -> None:
    """Raises SettingsError unless Spark finds a Java that it can run on."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if not java or not os.access(java, os.X_OK):
        where = (
            f"JAVA_HOME={home} has no bin/java" if home else "no java is on the PATH"
        )
        raise SettingsError(f"Spark needs Java and {where}: {INSTALL_JAVA}")
    answer = subprocess.run([java, "-version"], stderr=subprocess.PIPE, check=False)
    version = re.search(rb'version "(?:1\.)?(\d+)', answer.stderr)
    oldest = 8 if pyspark.__version__.startswith("3.") else 17
    # Hadoop asks for a Subject.getSubject that Java 23 and newer refuse.
    if not version or not oldest <= int(version[1]) <= 22:
        found = f"Java {int(version[1])}" if version else "no Java that starts"
        raise SettingsError(
            f"Spark {pyspark.__version__} runs on Java {oldest} to 22 but {java} is "
            f"{found}: {INSTALL_JAVA}"
        )


def start_spark(debug: bool) -> SparkSession:
    """The session: on the JVM that spark-submit has started, else on one of its own."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ and SparkContext._gateway is None:
        check_java()
        start_context(debug)
    spark = SparkSession.builder.appName("sparkify-etl").getOrCreate()
    if not debug:
        spark.sparkContext.setLogLevel("ERROR")
    known = spark.sparkContext.getConf()
    for key, value in DEFAULT_CONF.items():
        spark.conf.set(key, known.get(key, value))
    for key, value in FIXED_CONF.items():
        spark.conf.set(key, value)
    hadoop = spark._jsc.hadoopConfiguration()
    hadoop.set("mapreduce.fileoutputcommitter.marksuccessfuljobs", "false")
    local = spark._jvm.org.apache.hadoop.fs.FileSystem.getLocal(hadoop)
    local.setWriteChecksum(False)  # no .crc file beside each file of the lake
    return spark


def start_context(debug: bool) -> None:
    """Starts a JVM with a Spark context; its log is shown only when debugging."""
    quiet = {} if debug else {"stderr": subprocess.PIPE}
    gateway = launch_gateway(popen_kwargs=quiet)
    if not debug:
        relay = threading.Thread(target=relay_progress, args=(gateway.proc.stderr,))
        relay.daemon = True
        relay.start()
    conf = SparkConf(_jvm=gateway.jvm)
    conf.set("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    if conf.get("spark.master", "").startswith("local"):
        # A laptop's host name may resolve to nothing, or to another network's address.
        conf.setIfMissing("spark.driver.host", "127.0.0.1")
        conf.setIfMissing("spark.driver.bindAddress", "127.0.0.1")
        conf.setIfMissing("spark.ui.enabled", "false")
    SparkContext(conf=conf.setAppName("sparkify-etl"), gateway=gateway)


def relay_progress(stream: IO[bytes]) -> None:
    """Passes on Spark's progress bar: all that a JVM prints that begins with a \\r."""
    for printed in iter(lambda: os.read(stream.fileno(), 65536), b""):
        if printed.startswith(b"\r"):
            sys.stderr.buffer.write(printed)
            sys.stderr.flush()


# --- Read -----------------------------------------------------------------------------

# One JSON object that holds no other and no array, in valid UTF-8 (to Java a wrong byte
# is U+FFFD). Possessive quantifiers, so that long strings can't overflow Java's stack.
FLAT_OBJECT = r'^\s*\{(?:[^"{}\[\]\x{FFFD}]++|"(?:[^"\\\x{FFFD}]++|\\.)*+")*+\}\s*$'
JSON_OPTIONS = {
    "columnNameOfCorruptRecord": "_corrupt",
    "allowSingleQuotes": "false",
    "allowNonNumericNumbers": "false",
}
UNCLEAR = "unclear"  # the reason of a line that isn't one flat object
WHOLE_FILE_LIMIT = 32 * 1024 * 1024  # bytes; only a smaller file is read again whole
MAX_TS = 253402300799999  # ms, the end of the year 9999


def read_records(
    spark: SparkSession, folder: str, schema: str, rules: Callable[[], Column]
) -> DataFrame:
    """Every record, good or bad, of the *.json and *.json.gz files below a folder.

    The files are read by line; only those with a line that isn't one flat object (cut
    off, pretty-printed, several on a line) are read again, whole. The result is cached.
    Out: the schema's columns; source_file string; raw string, the text of a bad record;
    reason string, why it is bad. Both are null for a good one.
    """
    files = spark.read.option("recursiveFileLookup", True)
    files = files.option("pathGlobFilter", "*.{json,json.gz}")
    source_file = F.col("_metadata.file_path").alias("source_file")
    lines = (
        files.text(literal(folder))
        .where(F.trim("value") != "")
        .select(
            F.col("value").alias("raw"),
            F.when(~F.col("value").rlike(FLAT_OBJECT), UNCLEAR).alias("problem"),
            source_file,
            F.col("_metadata.file_size").alias("file_size"),
        )
    )
    records = parse_records(lines, schema, rules()).persist()
    unclear = records.where(F.col("reason") == UNCLEAR)
    again = unclear.select("source_file", "file_size").distinct().collect()
    if not again:
        return records.drop("file_size")
    in_small_file = F.col("source_file").isin(
        [row.source_file for row in again if row.file_size <= WHOLE_FILE_LIMIT]
    )
    contents = (
        files.format("binaryFile")
        .load(literal(folder))
        .select("content", source_file)
        .where(in_small_file)
        .unionByName(
            unclear.where(~in_small_file).select(
                F.col("raw").cast("binary").alias("content"), "source_file"
            )
        )
    )
    split = F.udf(
        record_splitter(re.findall(r"(\w+) \w+", schema)),
        "array<struct<raw: string, problem: string>>",
        useArrow=False,
    )
    pieces = contents.select("source_file", F.explode(split("content")).alias("piece"))
    pieces = pieces.select("source_file", "piece.*", F.lit(0).alias("file_size"))
    clear = F.col("reason").isNull() | (F.col("reason") != UNCLEAR)
    return (
        records.where(clear & ~in_small_file)
        .unionByName(parse_records(pieces, schema, rules()))
        .drop("file_size")
        .persist()
    )


def literal(path: str) -> str:
    """A path with whose special characters Spark's readers match only themselves."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def parse_records(pieces: DataFrame, schema: str, rules: Column) -> DataFrame:
    """Typed records of JSON texts. A value of the wrong type makes a bad record, no null.

    In: raw string; problem string, null where raw looks like one object; source_file;
    file_size. Out: the schema's columns, source_file, file_size, raw and reason as in
    read_records.
    """
    parsed = F.from_json("raw", f"{schema}, _corrupt string", JSON_OPTIONS)
    parsed = pieces.withColumn("record", parsed).select("*", "record.*")
    is_json = F.get_json_object("raw", "$").isNotNull()
    too_large = [
        F.abs(F.col(name)) == math.inf for name in re.findall(r"(\w+) double", schema)
    ]
    reason = F.coalesce(
        F.col("problem"),
        F.when(F.col("_corrupt").isNotNull() & ~is_json, "not JSON"),
        F.when(F.col("_corrupt").isNotNull(), "value of the wrong type"),
        F.when(F.greatest(F.lit(False), *too_large), "number out of range"),
        rules,
    )
    return parsed.withColumn("reason", reason).select(
        *re.findall(r"(\w+) \w+", schema),
        "source_file",
        "file_size",
        F.when(F.col("reason").isNotNull(), F.col("raw")).alias("raw"),
        "reason",
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
    cut_off = re.compile(r'\{[ \t]*(?:\n(?:[ \t"}\]].*)?)+')

    def parse(text: str, start: int = 0) -> tuple[Any, int]:
        try:
            return json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return None, start

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

    def records(text: str) -> Iterator[tuple[str, str | None]]:
        start = blanks.match(text).end()
        while start < len(text):
            value, end = parse(text, start)
            rest = line.match(text, end)
            if end == start:
                end = (cut_off.match(text, start) or rest).end()
            elif rest[0].strip() and not rest[0].lstrip().startswith("{"):
                value, end = None, rest.end()
            if (
                value
                and isinstance(value, list)
                and all(type(v) is dict for v in value)
            ):
                yield from (judge(json.dumps(v, ensure_ascii=False), v) for v in value)
            else:
                yield judge(text[start:end].rstrip(), value)
            start = blanks.match(text, end).end()

    def split(content: bytes) -> list[tuple[str, str | None]]:
        content = bytes(content)
        if content.startswith(b"\x1f\x8b"):
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


def count_records(records: DataFrame) -> dict[str | None, int]:
    """How many records are bad for each reason; the good ones are under None."""
    return dict(records.groupBy("reason").count().collect())


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
    names = ("artist_name", "artist_location", "artist_latitude", "artist_longitude")
    artists = raw_songs.where(has_song_keys())
    artists = artists.select("artist_id", *map(text, names[:2]), *names[2:])
    best = F.min(
        F.struct(
            gaps(*names).alias("rank"),
            gaps(names[0]).alias("unnamed"),
            F.length(names[0]).alias("name_length"),
            *names,
        )
    )
    return (
        artists.groupBy("artist_id")
        .agg(best.alias("best"))
        .select(
            "artist_id",
            F.col("best.artist_name").alias("name"),
            F.col("best.artist_location").alias("location"),
            F.col("best.artist_latitude").alias("latitude"),
            F.col("best.artist_longitude").alias("longitude"),
        )
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


def build_songplays(events: DataFrame, raw_songs: DataFrame) -> DataFrame:
    """One row a distinct play (ts, userId, sessionId, itemInSession), found song or not.

    A play's song has exactly its title and, among the names that the catalogue gives the
    song's artist_id, exactly its artist name; of several it is the nearest in duration,
    then of the smallest song_id. A play without a song gets the artist_id that alone
    bears its artist name. Both are looked up in tables of one row a key: no join can
    multiply a play.
    In: EVENT_SCHEMA and SONG_SCHEMA. Out: songplay_id bigint; start_time timestamp;
    user_id, level, song_id, artist_id string; session_id bigint; location, user_agent
    string; year, month int of start_time.
    """
    key = ("ts", "userId", "sessionId", "itemInSession")
    rest = F.struct("level", "location", "userAgent", "song", "artist", "length")
    plays = events.where(is_play()).groupBy(*key).agg(F.min(rest).alias("play"))
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

    def by_fit(song: Column) -> Column:
        gap = F.coalesce(F.abs(song["duration"] - F.col("length")), F.lit(math.inf))
        return F.struct(gap, song["song_id"], song["artist_id"])

    best = F.array_min(F.transform("songs", by_fit))
    start_time = F.timestamp_millis("ts")
    return (
        plays.select(*key, "play.*")
        .join(songs_by_name, on=["song", "artist"], how="left")
        .join(artists_by_name, on="artist", how="left")
        .withColumn("best", best)
        .select(
            songplay_id().alias("songplay_id"),
            start_time.alias("start_time"),
            F.col("userId").alias("user_id"),
            text("level"),
            F.col("best.song_id").alias("song_id"),
            F.coalesce("best.artist_id", "sole_artist_id").alias("artist_id"),
            F.col("sessionId").alias("session_id"),
            text("location"),
            text("userAgent").alias("user_agent"),
            F.year(start_time).alias("year"),
            F.month(start_time).alias("month"),
        )
    )


# --- Stage ----------------------------------------------------------------------------


def write_table(rows: DataFrame, table: str, folder: str) -> float:
    """Writes a table's Parquet files below folder/<table>/; returns the seconds taken.

    A partition folder gets one file, or several where its rows are many.
    """
    began = time.monotonic()
    partitions = TABLES[table].folders
    hint = f"REBALANCE({', '.join(partitions)})" if partitions else "REBALANCE"
    (
        # DataFrame.hint takes no columns before Spark 4.
        rows.sparkSession.sql(f"SELECT /*+ {hint} */ * FROM {{rows}}", rows=rows)
        .sortWithinPartitions(*partitions, *TABLES[table].order)
        .write.partitionBy(*partitions)
        .parquet(f"{folder}/{table}")
    )
    return time.monotonic() - began


def stage_tables(
    spark: SparkSession, events: DataFrame, raw_songs: DataFrame, folder: str
) -> dict[str, float]:
    """Builds and writes the five tables below a staging folder; returns the seconds of
    each. They are written at the same time, but `time` is made of songplays as written.
    """

    def write_songplays_and_time() -> tuple[float, float]:
        songplays = build_songplays(events, raw_songs)
        seconds = write_table(songplays, "songplays", folder)
        songplays = spark.read.parquet(literal(f"{folder}/songplays"))
        return seconds, write_table(build_time(songplays), "time", folder)

    with ThreadPoolExecutor(len(TABLES)) as pool:
        fact = pool.submit(write_songplays_and_time)
        built = {
            "users": build_users(events),
            "songs": build_songs(raw_songs),
            "artists": build_artists(raw_songs),
        }
        written = {
            table: pool.submit(write_table, rows, table, folder)
            for table, rows in built.items()
        }
        seconds = {table: writing.result() for table, writing in written.items()}
        seconds["songplays"], seconds["time"] = fact.result()
        return seconds


# --- Check ----------------------------------------------------------------------------


def check_tables(spark: SparkSession, folder: str) -> dict[str, dict[str, int]]:
    """Checks the tables as written below a folder, all in one pass.

    Returns the rows of each table and `plays_with`, how many rows of songplays refer to
    each other table. Raises RunError, naming table and check, unless every table has
    rows, every primary key is unique and not null, and every foreign key finds its row.
    """
    tables = {
        table: spark.read.parquet(literal(f"{folder}/{table}")) for table in TABLES
    }

    def keys(table: str, column: str, owner: str) -> DataFrame:
        return tables[table].select(
            F.lit(owner).alias("owner"),
            F.col(column).cast("string").alias("key"),
            F.lit(table).alias("holder"),
        )

    owned = [keys(table, TABLES[table].key, table) for table in TABLES]
    foreign = [keys(*key).where(F.col("key").isNotNull()) for key in FOREIGN_KEYS]
    is_owner = F.col("holder") == F.col("owner")
    by_key = (
        reduce(DataFrame.unionAll, owned + foreign)
        .groupBy("owner", "key")
        .agg(
            F.count(F.when(is_owner, 1)).alias("rows"),
            F.count(F.when(~is_owner & (F.col("holder") == "songplays"), 1)).alias(
                "plays"
            ),
            F.max(F.when(~is_owner, F.col("holder"))).alias("holder"),
        )
    )
    missing = F.when(F.col("rows") == 0, F.struct("holder", "key"))
    found = by_key.groupBy("owner").agg(
        F.sum("rows").alias("rows"),
        F.sum("plays").alias("plays"),
        F.max(F.col("key").isNull()).alias("has_null"),
        F.max(F.when(F.col("rows") > 1, F.col("key"))).alias("repeated"),
        F.max(missing).alias("missing"),
    )
    results = {row["owner"]: row for row in found.collect()}
    for table, key in ((name, table.key) for name, table in TABLES.items()):
        result = results.get(table)
        if not result or not result["rows"]:
            raise RunError(f"check failed: table {table} has no rows")
        if result["has_null"]:
            raise RunError(f"check failed: table {table} has a row without {key}")
        if result["repeated"] is not None:
            raise RunError(
                f"check failed: {table} has {key} {result['repeated']} twice"
            )
        if result["missing"]:
            holder, value = result["missing"]
            raise RunError(f"check failed: {holder} has {key} {value}, {table} has not")
    return {
        "rows": {table: results[table]["rows"] for table in TABLES},
        "plays_with": {table: results[table]["plays"] for table in TABLES},
    }


# --- Publish --------------------------------------------------------------------------


def hadoop_path(spark: SparkSession, uri: str) -> tuple[Any, Any]:
    """The Hadoop FileSystem and Path of a URI: local disk, HDFS and S3 work alike."""
    path = spark._jvm.org.apache.hadoop.fs.Path(uri)
    return path.getFileSystem(spark._jsc.hadoopConfiguration()), path


def list_files(spark: SparkSession, folder: str) -> dict[str, int]:
    """The bytes of each file at any depth below a folder, by its path from there."""
    files, path = hadoop_path(spark, folder)
    if not files.exists(path):
        return {}
    root, sizes = files.makeQualified(path).toString(), {}
    found = files.listFiles(path, True)
    while found.hasNext():
        status = found.next()
        sizes[status.getPath().toString()[len(root) + 1 :]] = status.getLen()
    return sizes


def write_text(spark: SparkSession, uri: str, text: str) -> None:
    """Writes a small text file."""
    files, path = hadoop_path(spark, uri)
    stream = files.create(path, True)
    stream.write(bytearray(text.encode()))
    stream.close()


def delete(spark: SparkSession, uri: str) -> None:
    """Deletes a file, or a folder with all that is in it, if it is there."""
    files, path = hadoop_path(spark, uri)
    files.delete(path, True)


def delete_empty_folders(spark: SparkSession, output: str, folder: str) -> None:
    """Deletes a folder of OUTPUT and the folders around it as far as they are empty."""
    while folder:
        files, path = hadoop_path(spark, f"{output}/{folder}")
        if files.exists(path):
            if len(files.listStatus(path)):
                return
            files.delete(path, False)
        folder = os.path.dirname(folder)


def publish(spark: SparkSession, output: str, staging: str) -> None:
    """Moves the staged files into the tables, then deletes the files that they replace.

    Each file's name is its own: a reader sees old rows, new rows or both, never fewer.
    Only files that a run has written are deleted; what else is in OUTPUT stays.
    """
    replaced = [
        f"{table}/{name}"
        for table in TABLES
        for name in list_files(spark, f"{output}/{table}")
        if re.fullmatch(r"(.*/)?part-[^/]*\.parquet", name)
    ]
    for name in list_files(spark, staging):
        files, source = hadoop_path(spark, f"{staging}/{name}")
        _, target = hadoop_path(spark, f"{output}/{name}")
        files.mkdirs(target.getParent())
        if not files.rename(source, target):
            raise RunError(f"{target.toString()} can't be written")
    for name in replaced:
        delete(spark, f"{output}/{name}")
    for folder in sorted({os.path.dirname(name) for name in replaced}):
        delete_empty_folders(spark, output, folder)


def discard(spark: SparkSession, output: str, staging: str) -> None:
    """Deletes a staging folder."""
    delete(spark, staging)
    delete_empty_folders(spark, output, "_staging")


# --- Report ---------------------------------------------------------------------------


def describe_records(counts: dict[str | None, int]) -> dict[str, Any]:
    """Records read, and rejected by reason, of what count_records found."""
    rejected = {why: counts[why] for why in sorted(filter(None, counts))}
    return {"read": sum(counts.values()), "rejected": rejected}


def describe_tables(
    sizes: dict[str, int], rows: dict[str, int], seconds: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Rows, files, bytes and seconds by table, of the files' sizes by path and more."""
    found = {}
    for table in TABLES:
        of_table = [
            size for name, size in sizes.items() if name.startswith(f"{table}/")
        ]
        found[table] = {
            "rows": rows[table],
            "files": len(of_table),
            "bytes": sum(of_table),
            "seconds": round(seconds[table], 1),
        }
    return found


def format_report(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    lines = [f"{'table':9} {'rows':>12} {'files':>7} {'kB':>12} {'seconds':>8}"]
    for table, of in report["tables"].items():
        lines.append(
            f"{table:9} {of['rows']:12,} {of['files']:7,} {of['bytes'] / 1000:12,.1f} "
            f"{of['seconds']:8.1f}"
        )
    plays = report["plays"]
    for what, count in plays.items():
        share = "" if what == "all" else f"  {count / plays['all']:.1%}"
        lines.append(f"{'plays ' + what.replace('_', ' '):20} {count:>9,}{share}")
    for kind in ("songs", "events"):
        figures = report["records"][kind]
        lines.append(f"{kind + ' read':20} {figures['read']:>9,}")
        for why, count in figures["rejected"].items():
            lines.append(f"{kind + ' rejected':20} {count:>9,}  {why}")
    if "rejected" in report:
        lines.append(f"rejected   {report['rejected']}")
    lines.append(f"lake       {report['lake']}  ({report['seconds']} s)")
    return "\n".join(lines)


# --- Main -----------------------------------------------------------------------------


def read_input(
    spark: SparkSession, folder: str
) -> tuple[dict[str, DataFrame], dict[str, dict[str | None, int]]]:
    """The records of song_data and log_data, read at the same time, and their counts."""
    kinds = {
        "songs": (f"{folder}/song_data", SONG_SCHEMA, song_rules),
        "events": (f"{folder}/log_data", EVENT_SCHEMA, event_rules),
    }
    with ThreadPoolExecutor(len(kinds)) as pool:
        reading = {
            kind: pool.submit(read_records, spark, *how) for kind, how in kinds.items()
        }
        records = {kind: frame.result() for kind, frame in reading.items()}
        counts = dict(zip(records, pool.map(count_records, records.values())))
    return records, counts


def check_records(
    spark: SparkSession,
    records: dict[str, DataFrame],
    counts: dict[str, dict[str | None, int]],
    settings: Settings,
    folder: str,
) -> None:
    """Keeps the bad records below a folder, as JSON: source_file, reason and raw text.

    Raises RunError when more of the records are bad than --max-rejected allows, or when
    one kind of them has none that is good.
    """
    read = sum(sum(of.values()) for of in counts.values())
    bad = read - sum(of.get(None, 0) for of in counts.values())
    if bad:
        songs, events = (
            frame.where(F.col("reason").isNotNull()).select(
                "source_file", "reason", "raw"
            )
            for frame in records.values()
        )
        songs.unionByName(events).hint("rebalance").write.json(folder)
    if bad > settings.max_rejected * read:
        raise RunError(
            f"{bad:,} of {read:,} records are bad, over --max-rejected "
            f"{settings.max_rejected:g}, so nothing is published: see them in {folder}"
        )
    for kind, where in (("songs", "song_data"), ("events", "log_data")):
        if not counts[kind].get(None):
            raise RunError(f"no record in {settings.input}/{where}: check --input")


def run(settings: Settings) -> dict[str, Any]:
    """A whole run: read, build, stage, check, publish. Returns its report."""
    started = datetime.now(timezone.utc)
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    lake, staging = settings.output, f"{settings.output}/_staging/{run_id}"
    rejected = f"{lake}/_rejected/{run_id}"
    clock = [time.monotonic()]

    def log_step(step: str, what: str) -> None:
        clock.append(time.monotonic())
        log.info("%-8s %s (%.1f s)", step, what, clock[-1] - clock[-2])

    preflight(settings)
    spark = start_spark(settings.debug)
    log_step("start", f"Spark {spark.version} on {spark.sparkContext.master}")

    records, counts = read_input(spark, settings.input)
    described = {kind: describe_records(of) for kind, of in counts.items()}
    log_step("read", ", ".join(f"{of['read']:,} {k}" for k, of in described.items()))
    check_records(spark, records, counts, settings, rejected)
    raw_songs = records["songs"].where(F.col("reason").isNull())
    events = records["events"].where(F.col("reason").isNull())
    plays = events.where(is_play()).select(songplay_id()).distinct().count()
    if not plays:
        raise RunError(f"no play (page NextSong) in {settings.input}/log_data")

    try:
        seconds = stage_tables(spark, events, raw_songs, staging)
        sizes = list_files(spark, staging)
        log_step("stage", f"{len(sizes):,} files of {len(TABLES)} tables")
        found = check_tables(spark, staging)
        rows = found["rows"]
        if rows["songplays"] != plays:
            raise RunError(
                f"check failed: songplays has {rows['songplays']:,} rows for {plays:,} plays"
            )
        log_step("check", f"{sum(rows.values()):,} rows, all keys unique and found")
        publish(spark, lake, staging)
        log_step("publish", lake)
    finally:
        discard(spark, lake, staging)
    report = {
        "run": run_id,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(clock[-1] - clock[0], 1),
        "lake": lake,
        "tables": describe_tables(sizes, rows, seconds),
        "plays": {
            "all": plays,
            "with_song": found["plays_with"]["songs"],
            "with_artist": found["plays_with"]["artists"],
        },
        "records": described,
        **(
            {"rejected": rejected}
            if any(of["rejected"] for of in described.values())
            else {}
        ),
    }
    write_text(
        spark, f"{lake}/_reports/{run_id}.json", json.dumps(report, indent=2) + "\n"
    )
    return report


def explain(error: BaseException) -> str:
    """An exception in one line: its first cause, and the file that it was about."""
    text = str(error).strip() or type(error).__name__  # of Ctrl-C: KeyboardInterrupt
    causes = re.findall(r"^(?:Caused by: |: )(.+)", text, re.MULTILINE)
    about = re.search(r"while reading file (.+?\.json(\.gz)?)", text)
    line = causes[-1] if causes else text.splitlines()[0]
    return f"{about[1]}: {line}" if about else line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0 published, 1 failed, 2 wrong settings."""
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%X"
    )
    log.setLevel(logging.INFO)
    try:
        print(format_report(run(parse_settings(argv))))
        return 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise  # of --help
        code = 2 if isinstance(error, SettingsError) else 1
        message = explain(error)
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
    print(f"etl.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
