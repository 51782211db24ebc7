"""The command: what it refuses, how it ends, what it prints, what it leaves alone."""

from __future__ import annotations

import gzip
import importlib
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, STEP, error_in, read_table, run_command, run_etl
from makers import play, song, to_json, write_input
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import etl

SECRET = "wJalrXUtnFEMIexample"
PLAYS = [play(itemInSession=number) for number in range(97)]
TOO_MANY = "3 of 101 records are bad, over --max-rejected 0.0199: "
TOO_MANY += r"2 events are 'not JSON', as in \S*/in/log_data/\S*\.json; see "


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a new one, with good input in `in` and an empty dl.cfg."""
    folder = write_input(tmp_path / "cwd" / "in", [song()], [play()]).parent
    (folder / "dl.cfg").touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def java(tmp_path: Path) -> Path:
    """A JAVA_HOME whose Java leaves a file `started` and fails."""
    script = tmp_path / "java" / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\necho no >'{tmp_path}/java/started'\nexit 1\n")
    script.chmod(0o755)
    return tmp_path / "java"


# --- Refused before Spark starts ------------------------------------------------------


def test_command_refuses_in_one_line_before_spark_starts(cwd: Path, java: Path) -> None:
    before = sorted(cwd.rglob("*"))
    done = run_etl("--input=nowhere", JAVA_HOME=str(java))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"{cwd}/nowhere/song_data: No such file" in error_in(line)
    assert sorted(cwd.rglob("*")) == before
    assert not (java / "started").exists()


@pytest.mark.parametrize("home", ["", "java"])
def test_java_that_is_missing_or_fails_is_one_line_that_says_which_to_install(
    home: str, java: Path, tmp_path: Path
) -> None:
    for name in ("bash", "dirname", "env", "sh"):  # Spark's own scripts call these.
        (tmp_path / name).symlink_to(shutil.which(name))
    environ = {"JAVA_HOME": home and str(java), "PATH": str(tmp_path)}
    done = run_etl("--input=in", **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search("Java 17 .*apt-get install openjdk-17-jre", error_in(done.stderr))
    assert (java / "started").exists() == bool(home)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--outpu=/lake", "unrecognized arguments: --outpu=/lake"),
        ("--config=mine.cfg", "mine.cfg: No such file or directory"),
        ("--input=", "s3a://BUCKET/PREFIX"),
        ("--output=gs://bucket/x", "'gs://bucket/x'"),
        ("--input=s3a://", "'s3a://'"),
        ("--output=lak\udce9", r"lak\udce9': rename it"),
        ("--max-rejected=2", "--max-rejected 2.0 is not"),
        ("--max-rejected=nan", "--max-rejected nan is not"),
    ],
)
def test_wrong_flag_is_refused(flag: str, reason: str, failure: Any) -> None:
    assert reason in failure(2, flag)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("song_data", "a.txt", "/in holds no song_data/ with .json or"),
        ("log_data", "a.txt", "/in holds no log_data/ with .json or"),
        ("log_data", "caf\udce9.json", r"/log_data/2018/11/caf\udce9.json': rename it"),
    ],
)
def test_each_part_of_the_input_needs_json_files_of_names_that_hadoop_reads(
    kind: str, name: str, told: str, failure: Any
) -> None:
    (path,) = Path("in", kind).rglob("*.json")
    path.rename(path.with_name(name))
    assert told in failure(2, "--input=in")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"[LAKE]\nINPUTS = {SECRET}", "write"),
        (f"[AWS]\nOUTPUT = {SECRET}", r"move OUTPUT under \[LAKE\]: write"),
        (f"[DEFAULT]\nOUTPUT = {SECRET}", r"move OUTPUT under \[LAKE\]: write"),
        ("[aws]", "write"),
        (f"AWS_SECRET_ACCESS_KEY = {SECRET}", "write"),
        (f"[LAKE]\nINPUT = in\n{SECRET}", "write"),
        (f"[LAKE]\nINPUT = in\nINPUT = {SECRET}", "write"),
        (f"[AWS]\nAWS_SECRET_ACCESS_KEY =\n{SECRET}=", "write"),
        (f"[AWS]\nAWS_SESSION_TOKEN = {SECRET}\n {SECRET}", "write"),
        (f"[LAKE]\nINPUT = \udce9 {SECRET}", "write"),
    ],
)
def test_wrong_settings_file_is_told_the_sections_and_keys_without_showing_a_value(
    text: str, told: str, failure: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(2, config=text)
    assert re.search(rf"dl\.cfg: {told} .*\[LAKE\] INPUT,? OUTPUT,? DATABASE\b", line)
    assert re.search(r"\[AWS\] AWS_ACCESS_KEY_ID,? .*\bENDPOINT_URL\b", line)
    assert etl.main(["--debug"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.splitlines()[-1] == line
    assert SECRET.lower() not in printed.lower()


def test_importing_reads_no_settings_and_starts_nothing(cwd: Path, java: Path) -> None:
    (cwd / "dl.cfg").write_text("no settings")
    code = "import etl, logging as log, signal as of, threading as t\n"
    code += "print(t.active_count(), of.getsignal(15) == of.SIG_DFL, log.root.handlers)"
    environ = {"PYTHONPATH": str(ROOT), "JAVA_HOME": str(java)}
    done = run_command([sys.executable, "-c", code], cwd, **environ)
    assert (done.stdout, done.stderr) == ("1 True []\n", "")
    assert not (java / "started").exists()


# --- Settings -------------------------------------------------------------------------


def test_flag_beats_settings_file_beats_default(cwd: Path) -> None:
    places = f"file://{ROOT}/data_sample", f"file://{cwd}/lake"
    default = etl.Settings(*places, None, 0.01, False, False, False, {})
    assert etl.parse_settings() == default
    text = "[LAKE]\nINPUT = /file/in\nOUTPUT = /file/lake\nDATABASE = of_file\n"
    (cwd / "dl.cfg").write_text(text)
    flags = ["--output=/flag/lake", "--max-rejected=0", "--break-lock", "--debug"]
    places = "file:///file/in", "file:///flag/lake"
    given = etl.Settings(*places, "of_file", 0, False, True, True, {})
    assert etl.parse_settings(flags) == given
    assert etl.parse_settings(["--database=of_flag"]).database == "of_flag"


def test_settings_file_lies_here_or_else_beside_the_script(
    cwd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "etl.py", tmp_path / "copied_etl.py")
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied_etl")
    for path in (tmp_path / "dl.cfg", cwd / "dl.cfg", cwd / "mine.cfg"):
        path.write_text(f"[LAKE]\nOUTPUT = {path}.lake")
    mine = copied.parse_settings(["--config", "mine.cfg"])
    assert mine.output == f"file://{cwd}/mine.cfg.lake"
    assert copied.parse_settings([]).output == f"file://{cwd}/dl.cfg.lake"
    (cwd / "dl.cfg").unlink()
    assert copied.parse_settings([]).output == f"file://{tmp_path}/dl.cfg.lake"


def test_settings_file_may_have_quotes_percent_signs_comments_a_bom_and_gaps() -> None:
    text = "\ufeff# comment\n[LAKE]\ninput = \nOutput: '/100%/a lake'  # my lake\n"
    Path("dl.cfg").write_text(text, encoding="utf-8")
    assert etl.parse_settings().output == "file:///100%/a lake"
    assert etl.parse_settings().input.endswith("/data_sample")


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("../a/./lake//", "file://{cwd.parent}/a/lake"),
        ("~/lake", "file:///home/me/lake"),
        ("/a b/%20+é#[x]", "file:///a b/%20+é#[x]"),
        ("file:///a/lake", "file:///a/lake"),
        ("hdfs://host:9000/a//lake/", "hdfs://host:9000/a/lake"),
        ("s3://bucket//a//lake/", "s3a://bucket/a/lake"),
        ("s3a://bucket/", "s3a://bucket"),
    ],
)
def test_path_becomes_an_absolute_uri(
    path: str, uri: str, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert etl.parse_settings([f"--output={path}"]).output == uri.format(cwd=cwd)


# --- A run that fails -----------------------------------------------------------------


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of 100 records, of which 29 are bad, just as many as allowed."""
    folder = tmp_path_factory.mktemp("lake")
    write_input(folder / "in", [song()], [*PLAYS[:70], *["{"] * 29])
    flags = ["--config", os.devnull, f"--input={folder}/in", f"--output={folder}/lake"]
    assert etl.main([*flags, "--max-rejected=0.29"]) == 0
    assert len(read_table(folder / "lake", "songplays")) == 70
    return folder / "lake"


@pytest.mark.parametrize(
    ("songs", "events", "reason"),
    [
        ([song(), "foo"], [*PLAYS, "foo", "{"], TOO_MANY),
        ([""], [play()], "no song in /.*/song_data: check --input"),
        ([song()], [play(page="Home")], r"no play \(page NextSong\) in /.*/log_data: "),
    ],
    ids=["too many bad records", "no song", "no play"],
)
def test_input_that_is_not_worth_publishing_ends_with_1_and_leaves_the_tables(
    songs: list[Any], events: list[Any], reason: str, lake: Path, failure: Any
) -> None:
    write_input(Path("in"), songs, events)
    tables = {path: path.read_bytes() for path in lake.rglob("*.parquet")}
    rejected = len([*lake.glob("_rejected/*")])
    flags = ["--input=in", "--max-rejected=0.0199"]
    line = failure(1, *flags, f"--output={lake}")
    assert re.search(reason, line), line
    assert {path: path.read_bytes() for path in lake.rglob("*.parquet")} == tables
    folders = {*etl.TABLES, "_records", "_reports", "_rejected"}
    assert {of.name for of in lake.iterdir()} == folders
    if reason == TOO_MANY:
        assert f"; see {lake}/_rejected (" in line
        assert len([*lake.glob("_rejected/*")]) == rejected + 1
        failure(1, *flags)  # into a lake of its own
        assert [path.name for path in Path("lake").iterdir()] == ["_rejected"]


def test_output_that_cannot_be_a_folder_ends_with_2(
    spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("dl.cfg", "dl.cfg/lake"):
        assert etl.main(["--input=in", f"--output={output}"]) == 2
        assert "/dl.cfg" in error_in(capsys.readouterr().err)


def test_corrupt_gzip_file_is_named_in_one_line(
    spark: SparkSession, failure: Any
) -> None:
    packed = gzip.compress(to_json(play()).encode() * 99)[:-20]
    Path("in/log_data/cut off.json.gz").write_bytes(packed)
    line = failure(1, "--input=in")
    assert re.search(r"/log_data/cut( |%20)off\.json\.gz: .*[Uu]nexpected end", line)
    assert [*Path("lake").iterdir()] == []


def test_report_that_cannot_be_printed_is_no_failure(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("printed", "w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert etl.main(["--input=in", "--output=laké"]) == 0


def test_explanation_is_one_line_and_never_empty(spark: SparkSession) -> None:
    assert etl.explain(ValueError(" \n ")) == "ValueError"
    assert etl.explain(KeyboardInterrupt()) == "interrupted"
    assert etl.explain(ConnectionRefusedError(111)).startswith("Java has ended, ")
    with pytest.raises(Exception) as of_worker:
        spark.range(1).select(F.udf(lambda number: 1 // number)("id")).collect()
    (line,) = etl.explain(of_worker.value).splitlines()
    assert line.strip()


# --- The Spark at hand ----------------------------------------------------------------


def facts_of(caller: SparkSession) -> dict[str, Any]:
    """What of a caller's session and process a run must leave as it is."""
    context, logs = caller.sparkContext, caller._jvm.org.apache.logging.log4j
    hadoop = context._jsc.hadoopConfiguration().iterator()
    entries = (hadoop.next() for _ in iter(hadoop.hasNext, False))
    return {
        "active": SparkSession.active().conf.get("spark.sql.session.timeZone"),
        "SQL": {row.key: row.value for row in caller.sql("SET").collect()},
        "Hadoop": {of.getKey(): of.getValue() for of in entries},
        "Spark": (context.appName, dict(context.getConf().getAll())),
        "tables": [table.name for table in caller.catalog.listTables()],
        "logs": logs.LogManager.getRootLogger().getLevel().toString(),
        "signals": [signal.getsignal(of) for of in (signal.SIGINT, signal.SIGTERM)],
        "log": (list(logging.root.handlers), logging.root.level),
    }


def test_run_leaves_the_callers_session_and_process_as_they_are(
    spark: SparkSession, cwd: Path
) -> None:
    caller = SparkSession.builder.getOrCreate()
    settings = {
        "spark.sql.session.timeZone": "Asia/Tokyo",
        "spark.sql.parquet.outputTimestampType": "INT96",
    }
    for key, value in settings.items():
        caller.conf.set(key, value)
    before = facts_of(caller)
    for name in ("early", "late"):  # The second run finds no new song.
        Path(f"in/log_data/{name}.json").write_text(to_json(play(location=name)))
        etl.run(etl.parse_settings(["--input=in"]))
    after = facts_of(caller)
    for key in settings:
        caller.conf.unset(key)
    assert after == before
    assert len(read_table(cwd / "lake", "songplays")) == 1


def test_terminal_shows_the_jobs_own_lines_and_sparks_progress_bar(cwd: Path) -> None:
    terminal, end = pty.openpty()
    line = [sys.executable, str(ROOT / "etl.py")]
    # The bar shows stages of half a second. So the reading gets hundreds of tasks.
    conf = "--conf spark.sql.files.maxPartitionBytes=999 pyspark-shell"
    environ = {**os.environ, "PYSPARK_SUBMIT_ARGS": conf}
    job = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=end, env=environ)
    os.close(end)
    printed = ""
    with suppress(OSError):  # This is how Linux says that the other end is closed.
        while chunk := os.read(terminal, 65536):
            printed += chunk.decode()
    os.close(terminal)
    report = job.communicate()[0].decode()
    assert job.returncode == 0, printed
    assert "\r[Stage " in printed
    lines = [line.split("\r")[-1] for line in printed.split("\r\n")[:-1]]
    assert [line for line in lines if not STEP.fullmatch(line)] == []
    titles = ["1/5 Start", "2/5 Read", "3/5 Build", "4/5 Check", "5/5 Publish"]
    assert re.search(".* ".join(titles), " ".join(lines)), lines
    assert re.search(r"^songplays +744$", report, re.MULTILINE)
    assert (cwd / "lake/_reports").is_dir()
    assert sorted(path.name for path in cwd.iterdir()) == ["dl.cfg", "in", "lake"]
