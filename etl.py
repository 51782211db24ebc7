#!/usr/bin/env python3
"""Sparkify data lake ETL: song and log JSON in, a star schema of Parquet tables out.

    python etl.py [--input URI] [--output URI]         on a laptop, an EMR master node
    spark-submit etl.py [--input URI] [--output URI]   on a cluster

It reads from top to bottom: the tables, reading, building, checking, the run; then the
plumbing: the lake's files, Spark and S3, the catalog, the settings.
"""

from __future__ import annotations

import argparse
import configparser
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import traceback
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import reduce
from glob import escape, glob
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

if not find_spec("pyspark"):  # A node of EMR has pyspark below its Spark home only.
    os.environ.setdefault("SPARK_HOME", "/usr/lib/spark")
    spark_python = os.path.join(os.environ["SPARK_HOME"], "python")
    sys.path += [spark_python, *glob(f"{spark_python}/lib/py4j-*.zip")]
try:
    import pyspark
    from py4j.protocol import Py4JJavaError
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
except ModuleNotFoundError as error:
    print(f"etl.py: error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("etl")


# --- Contract -------------------------------------------------------------------------


class SettingsError(Exception):
    """Wrong usage or settings, or a missing prerequisite: exit code 2."""


class RunError(Exception):
    """The run failed: exit code 1."""


@dataclass(frozen=True)
class Table:
    """A table: its primary key, its folders' columns, the order of rows in a file."""

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
# (table, column, the table whose primary key the column holds)
FOREIGN_KEYS = (
    ("songplays", "user_id", "users"),
    ("songplays", "song_id", "songs"),
    ("songplays", "artist_id", "artists"),
    ("songplays", "start_time", "time"),
    ("songs", "artist_id", "artists"),
)
# The fields that are read. ts is in ms since 1970, duration and length are in seconds.
SONG_SCHEMA = """song_id string, title string, artist_id string, artist_name string,
    artist_location string, artist_latitude double, artist_longitude double,
    duration double, year int"""
EVENT_SCHEMA = """ts bigint, userId string, sessionId bigint, itemInSession bigint,
    page string, song string, artist string, length double, level string, gender string,
    location string, userAgent string, firstName string, lastName string"""
SOURCES = {"songs": ("song_data", SONG_SCHEMA), "events": ("log_data", EVENT_SCHEMA)}
# Why a typed record is bad. A blank string is null there; the last ts is of year 9999.
SONG_FAULT = """CASE WHEN song_id IS NULL THEN 'no song_id'
    WHEN artist_id IS NULL THEN 'no artist_id'
    WHEN greatest(abs(duration), abs(artist_latitude), abs(artist_longitude))
        = double('infinity') THEN 'number out of range' END"""
EVENT_FAULT = """CASE WHEN page IS NULL THEN 'no page'
    WHEN page = 'NextSong' AND ts IS NULL THEN 'play without ts'
    WHEN ts NOT BETWEEN 0 AND 253402300799999 THEN 'ts out of range'
    WHEN page = 'NextSong' AND userId IS NULL THEN 'play without userId'
    WHEN page = 'NextSong' AND sessionId IS NULL THEN 'play without sessionId'
    WHEN abs(length) = double('infinity') THEN 'number out of range' END"""
# A play's id. Ids in lakes out there depend on it: it never changes.
SONGPLAY_ID = "xxhash64(ts, userId, sessionId, itemInSession)"


# --- Read -----------------------------------------------------------------------------

# Where a record ends and another begins: at a line end after } or ], but not before
# the next key of the same object; before a line that begins with {, even where the one
# before was cut off; between } and {"key": on one line, where an array has a comma.
LINE_END = (
    r'[ \t]*+\r?\n\s*+(?=[^,\]}\s])|(?<=\})[ \t]*+,[ \t]*+\r?\n\s*+(?=[^,\]}\s"])'
)
NEXT_OBJECT = r'(?=\{\s*+"[^"\\]*+"\s*+:)'
BOUNDARY = rf"(?<=[}}\]]){LINE_END}|\n(?=\{{)|(?<=\}})\s*+{NEXT_OBJECT}"
ARRAY_BOUNDARY = rf"{BOUNDARY}|(?<=\}})\s*+,\s*+{NEXT_OBJECT}"
ARRAY = r"^(?:\xef\xbb\xbf)?\s*+\["  # The first three bytes are a byte order mark.
JSON_OPTIONS = {
    "columnNameOfCorruptRecord": "_corrupt",
    "allowSingleQuotes": "false",
    "allowNonNumericNumbers": "false",
}
SMALL_FILE = 1024 * 1024  # bytes
WRONG_TYPE = "value of the wrong type"


def read_texts(spark: SparkSession, folder: str) -> DataFrame:
    """The texts of the *.json and *.json.gz files below a folder: a small local file is
    one, else a line is one. Out: source_file (a URL-encoded URI), text string."""
    files = spark.read.option("recursiveFileLookup", True)
    files = files.option("pathGlobFilter", "*.{json,json.gz}")
    path = F.col("_metadata.file_path").alias("source_file")
    lines = files.text(literal(folder))
    if not folder.startswith("file:"):  # A whole object would cost S3 one request more.
        return lines.select(path, F.col("value").alias("text"))
    # Reading by line costs Hadoop a copy of its settings for each file.
    is_small = (F.col("_metadata.file_size") <= SMALL_FILE) & ~path.endswith(".gz")
    whole = files.format("binaryFile").load(literal(folder)).where(is_small)
    whole = whole.select(path, F.col("content").cast("string").alias("text"))
    return whole.unionAll(lines.where(~is_small).select(path, "value"))


def literal(path: str) -> str:
    """A path whose special characters match only themselves in Spark's readers."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def is_utf8(text: Column) -> Column:
    """True where the bytes of a string are UTF-8."""
    if hasattr(F, "is_valid_utf8"):
        return F.is_valid_utf8(text)
    return F.encode(text, "UTF-8") == text.cast("binary")  # 3.5 replaces the rest.


def parse(text: Column, kind: str) -> Column:
    """The JSON values of a text, an array of a type; null where not all is of it."""
    # from_json alone ignores what follows the first value. So `whole` has to follow it.
    wrapped = F.concat(F.lit('{"values": ['), text, F.lit('], "whole": true}'))
    wanted = f"values array<{kind}>, whole boolean, _corrupt string"
    parsed = F.from_json(wrapped, wanted, JSON_OPTIONS)
    is_whole = parsed["_corrupt"].isNull() & parsed["whole"].isNotNull()
    return F.when(is_whole, parsed["values"])


def trim(text: Column) -> Column:
    """A text without what may be around an object: marks, white space, brackets."""
    is_clean = text.startswith("{") & text.endswith("}")
    marks = F.lit(" \t\r\n\ufeff[],")
    return F.when(is_clean, text).otherwise(F.btrim(text, marks))


def split_text(text: Column) -> Column:
    """The pieces of a text, an array, each of which should be one JSON object."""
    values = F.when(is_utf8(text), parse(trim(text), "string"))
    values = F.transform(values, lambda value: F.coalesce(value, F.lit("null")))
    # Each byte becomes a character, since splitting would replace what isn't UTF-8.
    latin = F.decode(text.cast("binary"), "ISO-8859-1")
    pieces = F.when(latin.rlike(ARRAY), F.split(latin, ARRAY_BOUNDARY))
    pieces = pieces.otherwise(F.split(latin, BOUNDARY))
    pieces = F.transform(pieces, lambda p: F.encode(p, "ISO-8859-1").cast("string"))
    # This is slow, and most texts are a line with one {.
    is_one = (F.substring_index(text, "{", 2) == text) & ~text.contains("\n")
    is_one |= F.size(values) == 1
    return F.when(is_one, F.array(text)).otherwise(F.coalesce(values, pieces))


def read_records(spark: SparkSession, folder: str, schema: str) -> DataFrame:
    """The typed records, good or bad, of the *.json and *.json.gz files below a folder.

    A value of the wrong type makes a bad record, no null; a blank string is null. Out:
    the schema's columns; source_file string; reason string, why a record is bad; raw
    string, the text of a bad record (its bytes as ISO-8859-1 if they aren't UTF-8).
    """
    raw, texts = F.col("raw"), read_texts(spark, folder)
    pieces = texts.withColumn("raw", F.explode(split_text(F.col("text"))))
    pieces = pieces.withColumn("raw", trim(raw)).where(raw != "")
    struct = re.sub(r"(\w+) (\w+)", r"\1: \2", schema)
    values = parse(raw, f"struct<{struct}>").alias("values")
    latin = F.decode(raw.cast("binary"), "ISO-8859-1")
    wrong = F.when(parse(raw, "string").isNull(), "not JSON").otherwise(WRONG_TYPE)
    fault = F.when(~is_utf8(raw), "not UTF-8").when(F.isnull("values"), wrong)
    records = pieces.select("source_file", "raw", values).select(
        "source_file",
        F.when(is_utf8(raw), raw).otherwise(latin).alias("raw"),
        fault.alias("fault"),
        F.explode_outer("values").alias("record"),
    )
    strings = re.findall(r"(\w+) string", schema)
    blank_is_null = {of: F.expr(f"if(trim({of}) = '', null, {of})") for of in strings}
    rules = F.expr(SONG_FAULT if schema == SONG_SCHEMA else EVENT_FAULT)
    return (
        records.select("record.*", "source_file", "fault", "raw")
        .withColumns(blank_is_null)
        .withColumn("reason", F.coalesce("fault", rules))
        .withColumn("raw", F.expr("if(reason IS NULL, null, raw)"))
        .drop("fault")
    )


# --- Build ----------------------------------------------------------------------------

IS_PLAY = """page = 'NextSong' AND ts IS NOT NULL AND userId IS NOT NULL
    AND sessionId IS NOT NULL"""
HAS_SONG_KEYS = "song_id IS NOT NULL AND artist_id IS NOT NULL"


def build_songs(songs: DataFrame) -> DataFrame:
    """One row a song_id: of several records the most complete, then the first in order.

    In: SONG_SCHEMA. Out: song_id, title, artist_id string; year int (0 is unknown);
    duration double (seconds).
    """
    gaps = "int(title IS NULL) + int(duration IS NULL) + int(year = 0)"
    best = F.expr(f"min(struct({gaps}, title, artist_id, year, duration)) AS best")
    songs = songs.where(HAS_SONG_KEYS).withColumn("year", F.expr("coalesce(year, 0)"))
    columns = ("best.title", "best.artist_id", "best.year", "best.duration")
    return songs.groupBy("song_id").agg(best).select("song_id", *columns)


def build_artists(songs: DataFrame) -> DataFrame:
    """One row an artist_id: of several records one with a name, then the most complete,
    then the one of the shortest name, then the first in alphabetical order.

    In: SONG_SCHEMA. Out: artist_id, name, location string; latitude, longitude double
    (degrees).
    """
    best = F.expr(
        """min(struct(artist_name IS NULL,
        int(artist_location IS NULL) + int(artist_latitude IS NULL)
        + int(artist_longitude IS NULL), length(artist_name), artist_name AS name,
        artist_location AS location, artist_latitude AS latitude,
        artist_longitude AS longitude)) AS best"""
    )
    artists = songs.where(HAS_SONG_KEYS).groupBy("artist_id").agg(best)
    columns = ("best.name", "best.location", "best.latitude", "best.longitude")
    return artists.select("artist_id", *columns)


def build_users(events: DataFrame) -> DataFrame:
    """One row a user id of any event, as the user's latest event describes the user; of
    several at that moment the one of the highest itemInSession.

    In: EVENT_SCHEMA. Out: user_id, first_name, last_name, gender, level string.
    """
    events = events.where("userId IS NOT NULL").withColumn(
        "ts", F.expr("ifnull(ts, -1)")
    )
    # Spark sorts to find a greatest struct, so first the rows are made few.
    newest = events.groupBy("userId").agg(F.max("ts").alias("ts"))
    latest = events.join(newest, on=["userId", "ts"], how="inner")
    order = "itemInSession, sessionId, firstName, lastName, gender, level"
    greatest = F.expr(f"max(struct({order})) AS latest")
    return (
        latest.groupBy("userId")
        .agg(greatest)
        .selectExpr(
            "userId AS user_id",
            "latest.firstName AS first_name",
            "latest.lastName AS last_name",
            "latest.gender",
            "latest.level",
        )
    )


def build_time(events: DataFrame) -> DataFrame:
    """One row a start_time of a play.

    In: EVENT_SCHEMA. Out: start_time timestamp; hour, day, week (ISO 8601), month,
    year, weekday (1 Sunday to 7 Saturday) int, in the session's time zone, UTC.
    """
    times = events.where(IS_PLAY).selectExpr("timestamp_millis(ts) AS start_time")
    return times.distinct().selectExpr(
        "start_time",
        "hour(start_time) AS hour",
        "day(start_time) AS day",
        "weekofyear(start_time) AS week",
        "month(start_time) AS month",
        "year(start_time) AS year",
        "dayofweek(start_time) AS weekday",
    )


def build_songplays(events: DataFrame, songs: DataFrame) -> DataFrame:
    """One row a distinct play (ts, userId, sessionId, itemInSession), with or without a
    song; of several deliveries the greatest, field by field.

    A play's song has exactly its title and, among the names that the catalogue gives
    the song's artist, exactly its artist; of several the nearest in duration wins, then
    the smallest song_id. A play without a song gets the artist_id of the only artist of
    that name.
    In: EVENT_SCHEMA and SONG_SCHEMA. Out: songplay_id bigint; start_time timestamp;
    user_id, level, song_id, artist_id string; session_id bigint; location, user_agent
    string; year, month int of start_time.
    """
    key = ("ts", "userId", "sessionId", "itemInSession")
    fields = "level, location, userAgent, song, artist, length"
    greatest = F.expr(f"max(struct({fields})) AS play")
    plays = events.where(IS_PLAY).repartition(*key)  # Else they are sorted twice.
    plays = plays.groupBy(*key).agg(greatest).select(*key, "play.*")
    # The least is the best fit.
    gap = "coalesce(abs(song.duration - length), double('infinity'))"
    fit = f"song -> struct({gap}, song.song_id, song.artist_id)"
    best = F.expr(f"array_min(transform(songs, {fit}))")
    titles, names = look_up_songs(songs)
    found = (
        plays
        # Each of these has one row a key, so that no join can multiply a play.
        .join(titles, on=["song", "artist"], how="left")
        .join(names, on="artist", how="left")
        .withColumns({"best": best, "start_time": F.timestamp_millis("ts")})
    )
    return found.selectExpr(
        f"{SONGPLAY_ID} AS songplay_id",
        "start_time",
        "userId AS user_id",
        "level",
        "best.song_id",
        "coalesce(best.artist_id, sole_artist_id) AS artist_id",
        "sessionId AS session_id",
        "location",
        "userAgent AS user_agent",
        "year(start_time) AS year",
        "month(start_time) AS month",
    )


def look_up_songs(songs: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The songs of each title and name of their artist: song, artist string; songs, an
    array of (duration, song_id, artist_id). And the artist of each name, null where
    several have it: artist, sole_artist_id string."""
    names = songs.where(HAS_SONG_KEYS).where("artist_name IS NOT NULL")
    names = names.selectExpr("artist_id", "artist_name AS artist").distinct()
    found = F.expr("collect_list(struct(duration, song_id, artist_id)) AS songs")
    titles = build_songs(songs).withColumnRenamed("title", "song")
    titles = titles.join(names, on="artist_id", how="inner").groupBy("song", "artist")
    sole = F.expr("if(count(*) = 1, min(artist_id), null) AS sole_artist_id")
    return titles.agg(found), names.groupBy("artist").agg(sole)


# --- Write and check ------------------------------------------------------------------


def write_files(rows: DataFrame, folder: str, kind: str, *partitions: str) -> None:
    """Writes rows below a folder as files of a kind, and no other file."""
    marker = "mapreduce.fileoutputcommitter.marksuccessfuljobs"
    # An option of a write reaches Hadoop for that write alone.
    files = rows.write.option(marker, "false").partitionBy(*partitions)
    files.format(kind).save(folder)


def write_table(rows: DataFrame, name: str, folder: str) -> None:
    """Writes a table as Parquet below folder/<name>/, in few files of even size."""
    table = TABLES[name]
    # DataFrame.hint takes no columns before Spark 4.
    hint = f"REBALANCE({', '.join(table.folders)})" if table.folders else "REBALANCE"
    sized = rows.sparkSession.sql(f"SELECT /*+ {hint} */ * FROM {{rows}}", rows=rows)
    ordered = sized.sortWithinPartitions(*table.folders, *table.order)
    write_files(ordered, f"{folder}/{name}", "parquet", *table.folders)


def check_tables(spark: SparkSession, folder: str) -> dict[str, int]:
    """Checks the five tables as written below a folder; returns the rows of each.

    Raises RunError unless each has rows, every primary key is unique and not null, and
    every foreign key that isn't null finds its row.
    """
    queries, cached = [], []
    for name, table in reversed(TABLES.items()):  # The fault of a key comes first.
        foreign = [(column, owner) for of, column, owner in FOREIGN_KEYS if of == name]
        columns = {table.key, *(column for column, _ in foreign)}
        rows = spark.read.parquet(literal(f"{folder}/{name}")).select(*columns)
        cached.append(rows.persist())  # Else a file would be opened for each query.
        rows.createOrReplaceTempView(name)
        joins, orphans = [], ["''"]
        for column, owner in foreign:
            key, value = f"{owner}.{TABLES[owner].key}", f"{name}.{column}"
            joins.append(f"LEFT JOIN {owner} ON {value} = {key}")
            orphans.append(f"min(if({key} IS NULL, '{column} ' || {value}, null))")
        queries.append(
            f"SELECT '{name}', count(*), count(DISTINCT {name}.{table.key}), "
            f"concat_ws(' ', {', '.join(orphans)}) FROM {name} {' '.join(joins)}"
        )
    found = spark.sql(" UNION ALL ".join(queries)).collect()
    for rows in cached:
        rows.unpersist()
    for name, rows, keys, orphan in found:
        fault = f"{rows:,} rows, {keys:,} different {TABLES[name].key}"
        missing = f"no row for {orphan.strip()}" if orphan.strip() else ""
        if not rows or rows != keys or missing:
            raise RunError(f"check failed: {name}: {missing or fault}")
    return {name: rows for name, rows, _, _ in found}


# --- Run ------------------------------------------------------------------------------


def run(settings: Settings) -> dict[str, Any]:
    """A whole run: reads, builds, checks, publishes. Returns its report, which is in
    OUTPUT/_reports/ too.

    Raises SettingsError for what is wrong with the settings, RunError or what Spark
    raises for the rest. The tables are as they were then, unless the error says more.
    """
    is_small = preflight(settings)
    log.info("starting Spark")
    spark = start_spark(settings, is_small)
    lake = open_lake(spark, settings.output)
    run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    with claimed(lake, run_id, settings.break_lock) as staging:
        folder = f"{lake.root}/{staging}"
        log.info("reading %s", settings.input)
        records = stage_records(spark, settings.input, folder)
        counts = {kind: count_records(kind, of) for kind, of in records.items()}
        if any(of["rejected"] for of in counts.values()):
            stage_rejected(records, f"{folder}/_rejected/{run_id}")
        if fault := find_fault(counts, settings):
            publish(lake, run_id, tables=())
            raise RunError(fault)
        log.info("building the tables")
        stage_tables(records, folder)
        log.info("checking the tables")
        rows = check_tables(spark, folder)
        if fault := find_loss(counts, rows):
            raise RunError(f"check failed: {fault}")
        found = ("count(song_id) AS with_song", "count(artist_id) AS with_artist")
        plays = spark.table("songplays").selectExpr(*found).first().asDict()
        log.info("publishing to %s", settings.output)
        report = {"run": run_id, "input": settings.input, "output": settings.output}
        tables = describe_tables(rows, lake.files(staging))
        report.update(records=counts, tables=tables, plays=plays)
        lake.write(f"{staging}/_reports/{run_id}.json", json.dumps(report, indent=2))
        publish(lake, run_id, tables=TABLES)
    if settings.database:
        log.info("registering the tables in %s", settings.database)
        register_tables(spark, lake, settings.database)
    return report


def stage_records(spark: SparkSession, uri: str, folder: str) -> dict[str, DataFrame]:
    """The records of INPUT by kind, good or bad, which are parsed once: into Parquet
    below folder/_records/."""

    def stage(kind: str) -> DataFrame:
        part, schema = SOURCES[kind]
        records = read_records(spark, f"{uri}/{part}", schema)
        staged = f"{folder}/_records/{kind}"
        write_files(records, staged, "parquet")
        return spark.read.schema(records.schema).parquet(literal(staged))

    with ThreadPoolExecutor() as pool:
        return dict(zip(SOURCES, pool.map(stage, SOURCES)))


def count_records(kind: str, records: DataFrame) -> dict[str, Any]:
    """How many records are read and, by reason, rejected; how many distinct songs or
    plays the good ones are."""
    key = "song_id" if kind == "songs" else f"if({IS_PLAY}, {SONGPLAY_ID}, null)"
    figures = (F.count("*"), F.count_distinct(F.expr(key)))
    counted = records.groupBy("reason").agg(*figures).collect()
    found = {reason: (count, keys) for reason, count, keys in counted}
    good, distinct = found.pop(None, (0, 0))
    rejected = {reason: count for reason, (count, _) in sorted(found.items())}
    read = good + sum(rejected.values())
    return {"read": read, "rejected": rejected, "distinct": distinct}


def stage_rejected(records: dict[str, DataFrame], folder: str) -> None:
    """Writes the bad records as JSON lines: source_file, reason, raw."""
    bad = [of.where("reason IS NOT NULL") for of in records.values()]
    bad = [of.select("source_file", "reason", "raw") for of in bad]
    rows = reduce(DataFrame.unionAll, bad).repartitionByRange("source_file")
    write_files(rows, folder, "json")


def find_fault(counts: dict[str, dict[str, Any]], settings: Settings) -> str | None:
    """Why a run must not publish: too much is rejected, or there is nothing."""
    read = sum(of["read"] for of in counts.values())
    bad = sum(sum(of["rejected"].values()) for of in counts.values())
    if bad > settings.max_rejected * read:
        return (
            f"{bad:,} of {read:,} records are bad, over --max-rejected "
            f"{settings.max_rejected:g}: no table is changed: see {settings.output}/"
            "_rejected (small local files alone may have objects over several lines)"
        )
    for kind, (part, _) in SOURCES.items():
        if not counts[kind]["distinct"]:
            what = "song" if kind == "songs" else "play (page NextSong)"
            return f"no {what} in {settings.input}/{part}: check --input"
    return None


def stage_tables(records: dict[str, DataFrame], folder: str) -> None:
    """Builds the five tables of the good records and writes them below a folder."""
    songs, events = (records[kind].where("reason IS NULL") for kind in SOURCES)
    tables = {
        "songplays": build_songplays(events, songs),
        "users": build_users(events),
        "songs": build_songs(songs),
        "artists": build_artists(songs),
        "time": build_time(events),
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: write_table(tables[name], name, folder), tables))


def find_loss(counts: dict[str, dict[str, Any]], rows: dict[str, int]) -> str | None:
    """Which table has not as many rows as INPUT has distinct songs or plays."""
    for name, kind in (("songs", "songs"), ("songplays", "events")):
        if rows[name] != counts[kind]["distinct"]:
            return f"{name} has {rows[name]:,} rows, INPUT {counts[kind]['distinct']:,}"
    return None


def describe_tables(rows: dict[str, int], files: dict[str, Any]) -> dict[str, Any]:
    """The rows, files and bytes of each table, of what is staged."""
    tables = {name: {"rows": rows[name], "files": 0, "bytes": 0} for name in TABLES}
    for name, status in files.items():
        if table := tables.get(name.split("/")[2]):
            table["files"] += 1
            table["bytes"] += status.getLen()
    return tables


def format_report(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    lines = [f"{'table':9} {'rows':>12} {'files':>7} {'kB':>12}"]
    for name, of in report["tables"].items():
        size = of["bytes"] / 1000
        lines.append(f"{name:9} {of['rows']:12,} {of['files']:7,} {size:12,.1f}")
    for what, count in report["plays"].items():
        lines.append(f"{'plays ' + what.replace('_', ' '):20} {count:>9,}")
    for kind, of in report["records"].items():
        lines.append(f"{kind + ' read':20} {of['read']:>9,}")
        for reason, count in of["rejected"].items():
            lines.append(f"{kind + ' rejected':20} {count:>9,}  {reason}")
    return "\n".join([*lines, f"lake       {report['output']}"])


def explain(error: BaseException) -> str:
    """An exception in one line: its first cause, and the file that it was about."""
    text = str(error).strip() or type(error).__name__  # Ctrl-C has no message.
    causes = re.findall(r"^(?:Caused by: |: )(.+)", text, re.MULTILINE)
    about = re.search(r"while reading file (.+?\.json(?:\.gz)?)", text)
    line = causes[-1] if causes else " ".join(text.splitlines()[:2])
    return f"{about[1]}: {line}" if about else line


# --- Lake -----------------------------------------------------------------------------

LEASE = 90  # seconds without a sign of life after which a run counts as dead
HEARTBEAT = 15  # seconds between two signs of life
OWN_FILE = re.compile(r"(.*/)?part-[^/]*\.parquet")  # what a run writes into a table


@dataclass(frozen=True)
class Lake:
    """OUTPUT as Hadoop's FileSystem `fs` serves it. Names are paths below `root`."""

    root: str
    fs: Any
    path_class: Any  # Looking it up by its name costs Java five calls.

    def path(self, name: str) -> Any:
        """Hadoop's Path of a file or folder."""
        return self.path_class(f"{self.root}/{name}")

    def files(self, folder: str) -> dict[str, Any]:
        """Hadoop's FileStatus of each file at any depth below a folder, by name."""
        folders, statuses = [self.path(folder)], []
        if not self.fs.exists(folders[0]):
            return {}
        if self.root.startswith("s3"):  # A request lists 1,000 objects of all folders.
            found = self.fs.listFiles(folders.pop(), True)
            while found.hasNext():
                statuses.append(found.next())
        for path in folders:  # listFiles starts a process for each local file.
            inside = list(self.fs.listStatus(path))
            folders += [status.getPath() for status in inside if status.isDirectory()]
            statuses += [status for status in inside if not status.isDirectory()]
        start = len(self.fs.makeQualified(self.path("")).toString().rstrip("/")) + 1
        return {status.getPath().toString()[start:]: status for status in statuses}

    def read(self, name: str) -> str | None:
        """The text of a small file; None if it isn't there."""
        if not self.fs.exists(self.path(name)):
            return None
        with closing(self.fs.open(self.path(name))) as stream:
            return bytes(stream.readAllBytes()).decode()

    def write(self, name: str, text: str) -> None:
        """Writes a small file, over the one that is there."""
        with closing(self.fs.create(self.path(name), True)) as stream:
            stream.write(bytearray(text.encode()))

    def move(self, source: str, target: str) -> None:
        """Renames a file. A target that exists is whole: an earlier start made it."""
        paths = (self.path(source), self.path(target))
        if not self.root.startswith("s3"):  # S3 has no folders.
            self.fs.mkdirs(paths[1].getParent())
        reason = "can't be renamed to its place"
        try:
            if self.fs.rename(*paths):
                return
        except Py4JJavaError as error:
            reason = explain(error)
        if not self.fs.exists(paths[1]):
            raise OSError(f"{self.root}/{target}: {reason}")
        self.delete(source)

    def delete(self, name: str, recursive: bool = False) -> None:
        """Deletes a file, an empty folder or, if recursive, any, where it is there."""
        path = self.path(name)
        if not self.fs.delete(path, recursive) and self.fs.exists(path):
            raise OSError(f"{self.root}/{name} can't be deleted")


def open_lake(spark: SparkSession, root: str) -> Lake:
    """The lake at a URI."""
    path_class = spark._jvm.org.apache.hadoop.fs.Path
    hadoop = spark._jsc.hadoopConfiguration()
    return Lake(root, path_class(root).getFileSystem(hadoop), path_class)


@contextmanager
def claimed(lake: Lake, run_id: str, break_lock: bool = False) -> Iterator[str]:
    """Keeps other runs from the lake while inside; first finishes or clears away what
    dead ones have left. Gives the name of the run's staging folder.

    The claim is a file that is written again every 15 s; its age by the store's clock
    tells the living from the dead, wherever they run. Raises RunError while another run
    is alive, SettingsError where OUTPUT can't be written.
    """
    staging, ended = f"_staging/{run_id}", threading.Event()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    me = {"host": socket.gethostname(), "process": os.getpid(), "start": started}
    owner = f"{staging}/_owner.json"

    def stay_alive() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(Exception):  # The next one may be in time, too.
                lake.write(f"{staging}/_alive", "")

    try:
        lake.write(f"{staging}/_alive", "")
        lake.write(owner, json.dumps(me))
    except Py4JJavaError as error:
        raise SettingsError(f"OUTPUT {lake.root}: {explain(error)}") from error
    heartbeat = threading.Thread(target=stay_alive, daemon=True)
    heartbeat.start()
    try:
        clear_others(lake, run_id, break_lock)
        yield staging
    finally:
        ended.set()
        heartbeat.join()
        with suppress(Exception):  # What else fails now would hide the reason.
            files = lake.files(staging)
            # A journal is for the next start, and a claim without owner is taken over.
            if owner in files and f"{staging}/_journal.json" not in files:
                lake.delete(staging, recursive=True)
            for name in (owner, f"{staging}/_alive", staging, "_staging"):
                lake.delete(name)  # This fails for a folder that isn't empty.


def clear_others(lake: Lake, run_id: str, break_lock: bool) -> None:
    """Finishes or clears away what dead runs have left. Raises RunError where another
    run is alive or can't be finished."""
    found = lake.files("_staging").items()
    files = {name: status.getModificationTime() for name, status in found}
    others = {"/".join(name.split("/")[:2]) for name in files} - {f"_staging/{run_id}"}
    now = files.get(f"_staging/{run_id}/_alive", 0)  # ms, by the store's clock
    for other in others:
        age = (now - files.get(f"{other}/_alive", -math.inf)) / 1000
        if f"{other}/_owner.json" in files and age < LEASE and not break_lock:
            owner = f"{lake.read(f'{other}/_owner.json')}, alive {age:.0f} s ago"
            hint = f"if it is dead, wait {LEASE} s or add --break-lock"
            raise RunError(f"{lake.root} is in use by {owner}: {hint}")
    for other in sorted(others):
        lake.delete(f"{other}/_owner.json")  # That run must not go on from here.
        journal = lake.read(f"{other}/_journal.json")
        try:
            if journal is not None:
                finish(lake, other, json.loads(journal))
        except (ValueError, RunError) as error:
            if not break_lock:
                hint = "add --break-lock to discard it and replace every table"
                name = f"{lake.root}/{other}/_journal.json"
                raise RunError(f"{name}: {error}: {hint}") from error
        lake.delete(other, recursive=True)
        log.info("finished or cleared away what was left in %s", other)


def publish(lake: Lake, run_id: str, tables: Iterable[str]) -> None:
    """Moves what a run has staged into the lake, then deletes the files that these
    tables had before. Other files stay.

    A journal of both comes first, so that the next start can finish what is cut off. A
    reader sees old rows, new rows or both, never fewer.
    """
    staging = f"_staging/{run_id}"
    names = (name[len(staging) + 1 :] for name in lake.files(staging))
    staged = {
        name: re.sub("/part-(?!.*/)", f"/part-{run_id}-", name)  # in no run's way
        for name in names
        if not re.search(r"/[_.]|^_(?!reports|rejected)", name)
    }
    old = [name for table in tables for name in lake.files(table)]
    journal = {"staged": staged, "replaced": list(filter(OWN_FILE.fullmatch, old))}
    lake.write(f"{staging}/_journal.tmp", json.dumps(journal))
    confirm_claim(lake, staging)
    lake.move(f"{staging}/_journal.tmp", f"{staging}/_journal.json")
    try:
        confirm_claim(lake, staging)
        finish(lake, staging, journal)
    except RunError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        reason = f"the next start of etl.py finishes it: {explain(error)}"
        raise RunError(f"publishing was cut off, {reason}") from error


def confirm_claim(lake: Lake, staging: str) -> None:
    """Raises RunError when another run has taken over."""
    if not lake.fs.exists(lake.path(f"{staging}/_owner.json")):
        raise RunError("another run has taken over the lake: nothing is published")


def finish(lake: Lake, staging: str, journal: dict[str, Any]) -> None:
    """Does what is left to do of a journal; nothing, where moving had not begun.

    Raises RunError, and deletes nothing, where a table's file is lost.
    """
    targets, there, published = journal["staged"], lake.files(staging), set()
    left = [name for name in targets if f"{staging}/{name}" in there]
    if len(left) < len(targets):
        published = {name for table in TABLES for name in lake.files(table)}
    gone = set(targets.values()) - {targets[name] for name in left} - published
    lost = sorted(filter(OWN_FILE.fullmatch, gone))
    if lost and not published & set(targets.values()):
        return
    if lost:
        raise RunError(f"{lake.root}/{lost[0]} is lost")
    with ThreadPoolExecutor(16) as pool:
        sources = (f"{staging}/{name}" for name in left)
        list(pool.map(lake.move, sources, (targets[name] for name in left)))
        list(pool.map(lake.delete, journal["replaced"]))
    emptied = folders_of(journal["replaced"]) - folders_of(targets.values())
    for folder in sorted(emptied, reverse=True):
        with suppress(Py4JJavaError, OSError):  # Another's file is in it.
            lake.delete(folder)
    lake.delete(f"{staging}/_journal.json")


def folders_of(names: Iterable[str]) -> set[str]:
    """The folders above some files, but the lake itself."""
    return {str(of) for name in names for of in PurePosixPath(name).parents} - {"."}


# --- Spark and S3 ---------------------------------------------------------------------

EMR = "/usr/share/aws/emr"  # a folder of every EMR node
SMALL_INPUT = 64 * 1024 * 1024  # bytes
JAVA = (
    "install Java 17 (apt-get install openjdk-17-jre-headless, dnf install "
    "java-17-amazon-corretto-headless, brew install openjdk@17); see more with --debug"
)
SQL_OPTIONS = {
    # Without these the tables would depend on the machine.
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.compression.codec": "snappy",
    # At the default, 4 MB more for each file, small files make hundreds of tasks.
    "spark.sql.files.openCostInBytes": "65536",
    # Small shuffle partitions would end up as Parquet files under 1 MB.
    "spark.sql.adaptive.advisoryPartitionSizeInBytes": "768m",
    "spark.sql.adaptive.coalescePartitions.minPartitionSize": "5m",
}
# The AWS SDK that each Hadoop was built with. S3A needs few modules of its 640 MB.
SDK_2 = "s3 s3-transfer-manager sts sso ssooidc apache-client netty-nio-client"
SDKS = {
    "3.3.4": ("com.amazonaws:aws-java-sdk-{}:1.12.262", "s3 sts dynamodb"),
    "3.4.1": ("software.amazon.awssdk:{}:2.24.6", SDK_2),
    "3.4.2": ("software.amazon.awssdk:{}:2.29.52", SDK_2),
    "3.5.0": ("software.amazon.awssdk:{}:2.35.5", SDK_2),  # 2.35.4 has no ssooidc
}
# What those packages name but Spark has already, or other clouds need.
NOT_NEEDED = (
    "software.amazon.awssdk:bundle,com.amazonaws:aws-java-sdk-bundle,joda-time:*,"
    "org.apache.hadoop:hadoop-client-*,org.apache.hadoop:hadoop-cloud-storage,"
    "org.apache.hadoop:hadoop-azure*,com.google.cloud.bigdataoss:*,"
    "com.fasterxml.jackson.*:*,org.eclipse.jetty:*"
)


def preflight(settings: Settings) -> bool:
    """Raises SettingsError for what would fail after Spark's slow start. Returns
    whether the input is known to be small."""
    on_s3 = "s3" in (settings.input[:2], settings.output[:2])
    sizes = check_s3(settings) if on_s3 and find_spec("boto3") else {}
    for part, _ in SOURCES.values() if settings.input.startswith("file:") else ():
        found = filter(os.path.exists, local_files(f"{settings.input}/{part}"))
        sizes[part] = [os.path.getsize(name) for name in found]
    if missing := [part for part in sizes if not sizes[part]]:
        lack = f"holds no {missing[0]}/ with .json or .json.gz files"
        hint = "give --input the folder of song_data/ and log_data/"
        raise SettingsError(f"INPUT {settings.input} {lack}: {hint}")
    return bool(sizes) and sum(map(sum, sizes.values())) < SMALL_INPUT


def local_files(uri: str) -> list[str]:
    """The paths of the JSON files below a folder; none for one that isn't local."""
    pattern = f"{escape(uri[len('file://') :])}/**/*.json*"
    return glob(pattern, recursive=True) if uri.startswith("file:") else []


def check_s3(settings: Settings) -> dict[str, list[int]]:
    """The bytes of each object of INPUT on S3, by its part. Raises SettingsError unless
    it can be listed, and objects in OUTPUT on S3 be written and deleted."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    aws = {key.lower(): value for key, value in settings.aws.items()}
    uri, sizes = settings.input, {}
    region, retries = aws.pop("aws_region", None), {"total_max_attempts": 2}
    style = {"addressing_style": "path" if "endpoint_url" in aws else "auto"}
    config = Config(connect_timeout=2, read_timeout=10, retries=retries, s3=style)
    try:
        client = boto3.client("s3", region_name=region, config=config, **aws)
        for part, _ in SOURCES.values() if uri.startswith("s3") else ():
            _, bucket, key = f"{uri}/{part}/".split("/", 3)[1:]
            pages = client.get_paginator("list_objects_v2")
            pages = pages.paginate(Bucket=bucket, Prefix=key)
            found = [of for page in pages for of in page.get("Contents", ())]
            sizes[part] = [of["Size"] for of in found if ".json" in of["Key"]]
        uri = settings.output
        if uri.startswith("s3"):
            _, bucket, key = f"{uri}/_probe-{uuid.uuid4().hex}".split("/", 3)[1:]
            client.delete_object(Bucket=bucket, Key=key)  # What can't go must not come.
            client.put_object(Bucket=bucket, Key=key)
            client.delete_object(Bucket=bucket, Key=key)
        credentials = boto3.Session().get_credentials()
    except (BotoCoreError, ClientError, ValueError) as error:
        raise SettingsError(f"{uri}: {explain(error)}") from error
    method = None if aws else getattr(credentials, "method", None)
    if method == "sso" and pyspark.__version__ < "4":
        hint = "install pyspark 4, or set what aws configure export-credentials prints"
        raise SettingsError(f"Spark 3.5 knows no AWS SSO: {hint}")
    return sizes


def start_spark(settings: Settings, is_small: bool = False) -> SparkSession:
    """A session of the job's own, on the Spark at hand or on pip's, which it starts."""
    given = {"SPARK_HOME", "PYSPARK_GATEWAY_PORT"} & set(os.environ)
    if not given and SparkContext._gateway is None:
        start_own_spark(settings, is_small)
    builder = SparkSession.builder
    if settings.database:
        builder = builder.enableHiveSupport()
    spark = builder.getOrCreate().newSession()
    for key, value in SQL_OPTIONS.items():
        spark.conf.set(key, value)
    for uri in (settings.input, settings.output):
        if uri.startswith("s3a:"):
            configure_s3(spark, uri.split("/")[2], settings.aws)
    is_ascii = "ANSI" in spark._jvm.java.lang.System.getProperty("sun.jnu.encoding")
    if is_ascii and not "".join(local_files(settings.input)).isascii():
        raise SettingsError("Java passes over names with é: set LC_ALL=C.UTF-8 for it")
    return spark


def start_own_spark(settings: Settings, is_small: bool) -> None:
    """Starts pip's Spark, whose log is shown only when debugging."""
    cores = os.cpu_count() or 1
    # A task waits for one small object after another; too many share the memory.
    threads = max(8, cores) if settings.input.startswith("s3") else cores
    # Java's second compiler doesn't pay; without it, Java makes too small a code cache.
    quick = " -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m"
    options = {
        "spark.master": f"local[{threads}]",
        "spark.driver.memory": "2g",
        "spark.driver.extraJavaOptions": "-XX:+UseParallelGC" + quick * is_small,
        "spark.driver.host": "127.0.0.1",  # A laptop's name may resolve to nothing.
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
        "spark.sql.shuffle.partitions": str(4 * cores),
    }
    if "s3" in (settings.input[:2], settings.output[:2]):
        options.update(s3_options())
    if os.environ.get("LC_ALL") in ("C", "POSIX"):  # Java passes over names with é.
        os.environ["LC_ALL"] = "C.UTF-8"
    reader, writer = os.pipe()
    threading.Thread(target=relay, args=(reader, settings.debug), daemon=True).start()
    try:
        conf = SparkConf(loadDefaults=False).setAll(list(options.items()))
        gateway = launch_gateway(conf, {"stdout": writer, "stderr": writer})
        conf = SparkConf(_jvm=gateway.jvm).setAppName("sparkify-etl")
        context = SparkContext(conf=conf, gateway=gateway)
    except Exception as error:
        raise SettingsError(f"Spark didn't start: {explain(error)}: {JAVA}") from error
    finally:
        os.close(writer)
    files = context._jvm.org.apache.hadoop.fs.FileSystem
    local = files.getLocal(context._jsc.hadoopConfiguration())
    local.setWriteChecksum(False)  # No .crc file beside each file of the lake.


def relay(reader: int, everything: bool) -> None:
    """Shows what a JVM prints: its progress bar, or everything."""
    for chunk in iter(lambda: os.read(reader, 65536), b""):
        if everything or chunk.startswith(b"\r"):  # The bar alone begins with it.
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()


def s3_packages() -> str:
    """The Maven packages that give S3A to the Spark at hand; "" for one that has it.
    For a Hadoop that isn't known they bring the whole SDK."""
    home = os.environ.get("SPARK_HOME", os.path.dirname(pyspark.__file__))
    jars = " ".join(os.listdir(f"{home}/jars"))
    hadoop = re.search(r"hadoop-client-api-(\S+)\.jar", jars)
    if "hadoop-aws" in jars or not hadoop:
        return ""
    packages = [f"org.apache.hadoop:hadoop-aws:{hadoop[1]}"]
    sdk, modules = SDKS.get(hadoop[1], ("", ""))
    packages += [sdk.format(module) for module in modules.split()]
    if "spark-core_2.13-4.1.1.jar" in jars:  # It then commits to S3 without copying.
        packages.append("org.apache.spark:spark-hadoop-cloud_2.13:4.1.1")
    return ",".join(packages)


def s3_options() -> dict[str, str]:
    """What an own Spark needs for S3."""
    packages, s3a = s3_packages(), "spark.hadoop.fs.s3a"
    chain = "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider"
    if "aws-java-sdk" in packages:
        chain = "com.amazonaws.auth.DefaultAWSCredentialsProviderChain"
    return {
        "spark.jars.packages": packages,
        "spark.jars.excludes": NOT_NEEDED,
        f"{s3a}.aws.credentials.provider": chain,
        # Uploads that a killed run has left go with its folder.
        f"{s3a}.directory.operations.purge.uploads": "true",
        # Fewer requests: no object for what a task has to commit, one GET a small file.
        f"{s3a}.committer.magic.track.commits.in.memory.enabled": "true",
        f"{s3a}.input.stream.type": "prefetch",
    }


def configure_s3(spark: SparkSession, bucket: str, aws: dict[str, str]) -> None:
    """Gives S3A what dl.cfg says, for this bucket alone; on the running context, since
    a session's settings stand in the JVM's command line, which every user can read."""
    loader = spark._jvm.java.lang.Thread.currentThread().getContextClassLoader()
    if not loader.getResource("org/apache/hadoop/fs/s3a/S3AFileSystem.class"):
        packages = f"{s3_packages()} --exclude-packages '{NOT_NEEDED}'"
        raise SettingsError(f"Spark has no S3A: start it with --packages {packages}")
    kind = "Temporary" if "AWS_SESSION_TOKEN" in aws else "Simple"
    provider = f"org.apache.hadoop.fs.s3a.{kind}AWSCredentialsProvider"
    has_endpoint = "ENDPOINT_URL" in aws
    options = {
        "aws.credentials.provider": provider if "AWS_ACCESS_KEY_ID" in aws else None,
        "access.key": aws.get("AWS_ACCESS_KEY_ID"),
        "secret.key": aws.get("AWS_SECRET_ACCESS_KEY"),
        "session.token": aws.get("AWS_SESSION_TOKEN"),
        "endpoint": aws.get("ENDPOINT_URL"),
        "endpoint.region": aws.get("AWS_REGION", "us-east-1" if has_endpoint else None),
        "path.style.access": "true" if has_endpoint else None,
    }
    for key, value in options.items():
        if value:
            spark._jsc.hadoopConfiguration().set(f"fs.s3a.bucket.{bucket}.{key}", value)


# --- Catalog --------------------------------------------------------------------------


def register_tables(spark: SparkSession, lake: Lake, database: str) -> None:
    """Registers the lake's tables and folders in the catalog of the Spark at hand, in
    Hive's own format, which Athena and Redshift Spectrum read, too. Raises RunError for
    a table of the same name whose data dropping it would delete."""
    spark.sql(f"CREATE DATABASE IF NOT EXISTS `{database}`")
    for name, table in TABLES.items():
        rows = spark.read.parquet(literal(f"{lake.root}/{name}"))
        location, full = lake.path(name).toString(), f"`{database}`.`{name}`"
        if os.path.isdir(EMR):  # Athena knows no s3a.
            location = location.replace("s3a:", "s3:", 1)
        if spark.catalog.tableExists(f"{database}.{name}"):
            described = spark.sql(f"DESCRIBE EXTENDED {full}").drop("comment")
            facts = dict(described.collect())
            if facts.get("Type") != "EXTERNAL":
                raise RunError(f"{full} is no external table: rename or drop it")
            if (spark.table(full).dtypes, facts["Location"]) != (rows.dtypes, location):
                spark.sql(f"DROP TABLE {full}")
        columns = {column: f"`{column}` {kind}" for column, kind in rows.dtypes}
        folders = ", ".join(columns.pop(column) for column in table.folders)
        spark.sql(
            f"CREATE EXTERNAL TABLE IF NOT EXISTS {full} "
            f"({', '.join(columns.values())}) "
            + (f"PARTITIONED BY ({folders}) " if folders else "")
            + "STORED AS PARQUET LOCATION '{}'".format(location.replace("'", r"\'"))
        )
        if folders:
            spark.sql(f"MSCK REPAIR TABLE {full} SYNC PARTITIONS")


# --- Settings -------------------------------------------------------------------------

AWS_KEYS = "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION"
CONFIG_KEYS = {"LAKE": "INPUT OUTPUT DATABASE", "AWS": f"{AWS_KEYS} ENDPOINT_URL"}


@dataclass(frozen=True)
class Settings:
    """What a run needs to know: URIs without a last slash, what dl.cfg has in [AWS].
    Without keys there, S3 is reached as the default AWS chain says."""

    input: str
    output: str
    database: str | None
    max_rejected: float
    break_lock: bool
    debug: bool
    aws: dict[str, str] = field(repr=False)


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line (first), dl.cfg (second), the defaults (last).
    Raises SettingsError for what is wrong there."""
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(
        prog="etl.py",
        allow_abbrev=False,
        description="Reads song_data/ and log_data/ under INPUT, writes Sparkify's "
        "star schema as partitioned Parquet under OUTPUT. A flag beats dl.cfg.",
    )

    def fail(message: str) -> None:  # In one line; argparse prints the usage, too.
        raise SettingsError(f"{message} (see etl.py --help)")

    parser.error = fail  # type: ignore[assignment,method-assign]
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings (default: dl.cfg, if there is one)")
    add("--input", metavar="URI", help="holds song_data/ and log_data/")
    add("--output", metavar="URI", help="the lake, whose five tables are replaced")
    add("--database", metavar="NAME", help="register the tables in Spark's catalog")
    limit = "publish nothing above this fraction of bad records (default: 0.01)"
    add("--max-rejected", metavar="FRACTION", type=float, default=0.01, help=limit)
    add("--break-lock", action="store_true", help="take over from a run that is dead")
    add("--debug", action="store_true", help="show tracebacks and Spark's own log")
    parser.set_defaults(input=f"{here}/data_sample", output="lake")
    config = read_config(parser.parse_args(argv).config, here)
    parser.set_defaults(**{key.lower(): value for key, value in config["LAKE"].items()})
    flags = vars(parser.parse_args(argv))
    if not 0 <= flags["max_rejected"] <= 1:  # NaN is neither.
        fail(f"--max-rejected {flags['max_rejected']} is not between 0 and 1")
    flags.update(input=to_uri(flags["input"]), output=to_uri(flags["output"]))
    check_apart(flags["input"], flags["output"])
    del flags["config"]
    return Settings(**flags, aws=config["AWS"])


def read_config(path: str | None, script_folder: str) -> dict[str, dict[str, str]]:
    """The values, by section and key, of a settings file: the named one, else ./dl.cfg,
    else the one beside the script. No error shows a value, which may be a secret."""
    config: dict[str, dict[str, str]] = {section: {} for section in CONFIG_KEYS}
    places = ("dl.cfg", f"{script_folder}/dl.cfg")
    path = path or next(filter(os.path.exists, places), os.devnull)
    # A secret may hold a %, so there is no interpolation.
    parser = configparser.RawConfigParser(None, inline_comment_prefixes="#")
    parser.default_section = ""
    parser.optionxform = str.upper  # type: ignore[assignment,method-assign]
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
        for section in parser.sections():
            for key, value in parser[section].items():
                if key not in CONFIG_KEYS.get(section, "").split():
                    raise ValueError
                if value.strip("'\""):
                    config[section][key] = value.strip("'\"")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: see dl.cfg.example") from None
    except (configparser.Error, ValueError):
        known = " and ".join(f"[{name}] {keys}" for name, keys in CONFIG_KEYS.items())
        raise SettingsError(
            f"{path}: write each key once, as KEY = VALUE, under its section: {known}"
        ) from None
    return config


def to_uri(path: str) -> str:
    """The absolute URI of a path or URI, without a last slash. A path without a scheme
    is local. s3:// is s3a:// but on EMR, whose own Spark serves it."""
    if re.match(r"(file:|(?!\w[\w+.-]+:)).", path, re.DOTALL):
        local = re.sub("^file:(//(?=/))?", "", path)
        return "file://" + os.path.abspath(os.path.expanduser(local))
    if not re.match("s3a?://[^/]|hdfs:|viewfs:", path):
        raise SettingsError(f"'{path}' is no path, hdfs: URI or s3a://BUCKET/PREFIX")
    if not os.path.isdir(EMR):
        path = re.sub("^s3:", "s3a:", path)
    return re.sub("(?<!:)(?<!:/)/+", "/", path).rstrip("/")


def check_apart(source: str, lake: str) -> None:
    """Raises SettingsError where a run would write into INPUT or read its own files."""
    real = [os.path.realpath(re.sub("^file:", "", uri)) + "/" for uri in (source, lake)]
    parts = tuple(f"{real[0]}{part}/" for part, _ in SOURCES.values())
    own = (*TABLES, "_staging", "_rejected", "_reports")
    reads_own = real[0].startswith(tuple(f"{real[1]}{name}/" for name in own))
    if real[0] == real[1] or real[1].startswith(parts) or reads_own:
        raise SettingsError(f"INPUT {source} and OUTPUT {lake} overlap: move one")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0 published, 1 failed, 2 wrong settings."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%X")
    log.setLevel(logging.INFO)
    if threading.current_thread() is threading.main_thread():
        # SIGTERM ends the run as Ctrl-C does, for which pyspark stops Spark's jobs.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    secrets: list[str] = []
    try:
        settings = parse_settings(argv)
        secrets = [settings.aws.get(key, "") for key in AWS_KEYS.split()[:3]]
        print(format_report(run(settings)))
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        text = f"etl.py: error: {explain(error)}"
        if "--debug" in (sys.argv if argv is None else argv):
            text = traceback.format_exc() + text
        for secret in secrets:
            if len(secret) >= 16:  # AWS has no shorter ones.
                text = text.replace(secret, "***")
        print(text, file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
