"""The command: exit codes, what it prints and what it leaves on the disk."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pyspark
import pytest
from conftest import ROOT, run_command, wait_for_archive
from pyspark.sql import SparkSession

import etl

SampleRun = tuple[Path, subprocess.CompletedProcess[str]]

SONG = '{"song_id": "SO1", "title": "T", "artist_id": "AR1", "artist_name": "A"}'
PLAY = (
    '{"page": "NextSong", "ts": 1541106106796, "userId": "8", "sessionId": 139, '
    '"itemInSession": 0, "song": "T", "artist": "A"}'
)
HOME = '{"page": "Home", "ts": 1541106106795, "userId": "8", "sessionId": 139}'
TABLES = ("songplays", "users", "songs", "artists", "time")


def write_input(folder: Path, songs: str = SONG, events: str = PLAY) -> Path:
    """An input of one song file and one log file; returns its folder."""
    for kind, text in (("song_data", songs), ("log_data", events)):
        path = folder / kind / "2018" / "11" / "a.json"
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return folder


# --- Refused before Spark starts ------------------------------------------------------


@pytest.fixture
def java(tmp_path: Path) -> Path:
    """A JAVA_HOME whose Java tells its version; run for more, it leaves a file
    `started` there."""
    return fake_java(tmp_path / "java", 'openjdk version "17.0.15" 2025-04-15')


def fake_java(home: Path, version: str) -> Path:
    """A folder with a bin/java that answers a question for its version as given."""
    script = home / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(
        f"#!/bin/sh\n[ \"$1\" = -version ] && echo '{version}' >&2 && exit\n"
        f"echo >'{home}/started'\nexit 1\n"
    )
    script.chmod(0o755)
    return home


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a new one, whose `in` is good input."""
    folder = tmp_path / "cwd"
    write_input(folder / "in")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(etl, "__file__", str(tmp_path / "etl.py"))  # no dl.cfg there
    return folder


def refusal(java: Path | None, *flags: str, **environ: str) -> str:
    """The one line with which the command refuses its flags, before Spark starts."""
    env = {key: value for key, value in os.environ.items() if key != "JAVA_HOME"}
    if java:
        env["JAVA_HOME"] = str(java)
    before = sorted(Path().rglob("*"))
    done = subprocess.run(
        [sys.executable, ROOT / "etl.py", *flags],
        env={**env, **environ},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert sorted(Path().rglob("*")) == before
    assert not (java and (java / "started").exists())
    (line,) = done.stderr.splitlines()
    assert line.startswith("etl.py: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--out", "lake"], "unrecognized arguments: --out lake"),
        (["in"], "unrecognized arguments: in"),
        (["--input"], "--input: expected one argument"),
        (["--max-rejected", "2"], "--max-rejected 2.0 is not a fraction"),
        (["--max-rejected", "-1"], "--max-rejected -1.0 is not a fraction"),
        (["--max-rejected", "nan"], "--max-rejected nan is not a fraction"),
        (["--max-rejected", "abc"], "--max-rejected: invalid float value: 'abc'"),
    ],
)
def test_wrong_flag_is_refused(
    flags: list[str], reason: str, java: Path, cwd: Path
) -> None:
    line = refusal(java, *flags)
    assert reason in line
    assert "see etl.py --help" in line


SECRET = "wJalrXUtnFEMIexample"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[S3]\n", "unknown section [S3]"),
        (f"[LAKE]\nINPUTS = {SECRET}", "unknown key INPUTS"),
        (f"[AWS]\nOUTPUT = {SECRET}", "OUTPUT is in [AWS], not [LAKE]"),
        (f"[default]\nOUTPUT = {SECRET}", "OUTPUT is in [default], not [LAKE]"),
        (f"[DEFAULT]\noutput = {SECRET}", "OUTPUT is in [DEFAULT], not [LAKE]"),
        (f"[default]\nAWS_SECRET_ACCESS_KEY = {SECRET}", "AWS_SECRET_ACCESS_KEY"),
        (f"AWS_SECRET_ACCESS_KEY = {SECRET}", "line 1: wanted is each key once"),
        (f"OUTPUT = {SECRET}\n[LAKE]\n", "[LAKE]"),
        (f"[LAKE]\nINPUT = in\n{SECRET}", "line 3: wanted is each key once"),
        (f"[LAKE]\nINPUT = in\nINPUT = {SECRET}", "line 3: wanted is each key once"),
        (f"[LAKE]\nINPUT = \udce9 {SECRET}", "wanted is each key once"),
    ],
)
def test_wrong_settings_file_is_refused_without_showing_a_value(
    text: str, reason: str, java: Path, cwd: Path
) -> None:
    (cwd / "dl.cfg").write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refusal(java)
    assert reason in line
    assert "dl.cfg" in line
    assert SECRET.lower() not in line.lower()


def test_named_settings_file_must_be_there(java: Path, cwd: Path) -> None:
    line = refusal(java, "--config", "mine.cfg")
    assert "mine.cfg: No such file or directory: see dl.cfg.example" in line


def test_input_must_be_there(java: Path, cwd: Path) -> None:
    line = refusal(java, "--input", "nowhere")
    assert f"{cwd}/nowhere holds no song_data/" in line
    assert "give --input the folder" in line


def test_debug_adds_the_traceback(java: Path, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "etl.py", "--input", "nowhere", "--debug"],
        env={**os.environ, "JAVA_HOME": str(java)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith("etl.py: error: INPUT ")


@pytest.mark.parametrize("kind", ["song_data", "log_data"])
def test_each_kind_of_input_must_be_there(kind: str, java: Path, cwd: Path) -> None:
    shutil.rmtree(cwd / "in" / kind)
    assert f"/in holds no {kind}/" in refusal(java, "--input", "in")


@pytest.mark.parametrize("kind", ["song_data", "log_data"])
def test_folder_without_json_files_is_refused(kind: str, java: Path, cwd: Path) -> None:
    (cwd / "in" / kind / "2018" / "11" / "a.json").rename(cwd / "in" / kind / "a.txt")
    assert f"/in holds no {kind}/" in refusal(java, "--input", "in")


def test_link_to_nothing_is_passed_over(cwd: Path) -> None:
    source = cwd / "in"
    (source / "song_data" / "gone.json").symlink_to(cwd / "nowhere.json")
    flags = ["--config", os.devnull, f"--input={source}"]
    assert etl.preflight(etl.parse_settings(flags))


def test_input_over_the_limit_is_not_small(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cwd / "in"
    settings = etl.parse_settings(["--config", os.devnull, f"--input={source}"])
    assert etl.preflight(settings)
    monkeypatch.setattr(etl, "SMALL_INPUT", 4096)
    assert not etl.preflight(settings)


def test_output_must_not_be_a_file(java: Path, cwd: Path) -> None:
    (cwd / "lake").touch(mode=0o755)
    line = refusal(java, "--input", "in", "--output", "lake")
    assert f"{cwd}/lake is not a folder that can be written" in line


def test_output_must_not_be_below_a_file(java: Path, cwd: Path) -> None:
    (cwd / "file").touch()
    line = refusal(java, "--input", "in", "--output", "file/a/lake")
    assert f"OUTPUT file://{cwd}/file/a/lake: {cwd}/file is not a folder" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_must_be_writable(java: Path, cwd: Path) -> None:
    (cwd / "locked").mkdir(mode=0o500)
    line = refusal(java, "--input", "in", "--output", "locked/lake")
    assert f"{cwd}/locked is not a folder that can be written" in line


@pytest.mark.parametrize(
    ("source", "lake", "reason"),
    [
        ("in", "in", "INPUT and OUTPUT are both"),
        ("in", "in/song_data/lake", "is inside INPUT's song_data"),
        ("in", "in/log_data", "is inside INPUT's log_data"),
        ("in", "link/song_data/lake", "is inside INPUT's song_data"),
        ("link", "in", "INPUT and OUTPUT are both"),
        ("lake/songs/in", "lake", "is inside OUTPUT's songs"),
        ("lake/_staging", "lake", "is inside OUTPUT's _staging"),
        ("link/time", "in", "is inside OUTPUT's time"),
    ],
)
def test_input_and_output_must_lie_apart(
    source: str, lake: str, reason: str, java: Path, cwd: Path
) -> None:
    (cwd / "link").symlink_to("in")
    assert reason in refusal(java, "--input", source, "--output", lake)


@pytest.mark.parametrize("flag", ["--input", "--output"])
def test_empty_flag_is_refused(flag: str, java: Path, cwd: Path) -> None:
    assert "must not be empty" in refusal(java, flag, "")


def test_secret_on_a_line_of_its_own_is_not_shown(java: Path, cwd: Path) -> None:
    (cwd / "dl.cfg").write_text("[AWS]\nAWS_SECRET_ACCESS_KEY =\nwJalr/bPxRfi+CY=\n")
    assert "wjalr" not in refusal(java).lower()


def test_java_that_cannot_be_executed_is_told(tmp_path: Path, cwd: Path) -> None:
    (tmp_path / "home" / "bin").mkdir(parents=True)
    (tmp_path / "home" / "bin" / "java").write_bytes(b"\x00not a program")
    (tmp_path / "home" / "bin" / "java").chmod(0o755)
    assert "install Java 17" in refusal(tmp_path / "home")


@pytest.mark.parametrize("flag", ["--input", "--output"])
def test_unknown_scheme_is_refused(flag: str, java: Path, cwd: Path) -> None:
    line = refusal(java, flag, "gs://bucket/x")
    assert "gs://bucket/x: " in line
    assert "use a local path" in line


def test_missing_java_is_told_with_how_to_install_it(tmp_path: Path, cwd: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refusal(None, "--input", "in", PATH=str(tmp_path / "empty"))
    assert "no java is on the PATH: install Java 17" in line
    assert "apt-get install" in line


def test_java_home_without_java_is_told(tmp_path: Path, cwd: Path) -> None:
    line = refusal(tmp_path, "--input", "in")
    assert f"JAVA_HOME={tmp_path} has no bin/java: install Java 17" in line


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('java version "1.7.0_80"', "is Java 7"),
        pytest.param(
            'openjdk version "11.0.2" 2019-01-15',
            "is Java 11",
            marks=pytest.mark.skipif(
                pyspark.__version__.startswith("3."), reason="Spark 3 runs on Java 11"
            ),
        ),
        ('openjdk version "24" 2025-03-18', "is Java 24"),
        ("Unable to locate a Java Runtime.", "is no Java that starts"),
    ],
)
def test_java_of_another_version_is_told_with_what_to_install(
    answer: str, found: str, tmp_path: Path, cwd: Path
) -> None:
    java = fake_java(tmp_path / "other", answer)
    line = refusal(None, "--input", "in", PATH=f"{java}/bin")
    assert f"{java}/bin/java {found}: install Java 17" in line
    assert not (java / "started").exists()


def test_importing_reads_no_settings_and_starts_nothing(java: Path, cwd: Path) -> None:
    (cwd / "dl.cfg").write_text("no settings")
    done = subprocess.run(
        [sys.executable, "-c", "import etl"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAVA_HOME": str(java)},
        check=True,
        capture_output=True,
        timeout=20,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert not (java / "started").exists()
    assert sorted(path.name for path in cwd.iterdir()) == ["dl.cfg", "in"]


# --- Settings -------------------------------------------------------------------------


def test_default_is_the_sample_and_a_lake_in_the_current_folder(
    cwd: Path, tmp_path: Path
) -> None:
    settings = etl.parse_settings([])
    assert settings.input == f"file://{tmp_path}/data_sample"
    assert settings.output == f"file://{cwd}/lake"
    assert settings.max_rejected == 0.01
    assert settings.debug is False


def test_flag_beats_settings_file_beats_default(cwd: Path) -> None:
    (cwd / "dl.cfg").write_text("[LAKE]\nINPUT = /file/in\nOUTPUT = /file/lake\n")
    settings = etl.parse_settings(["--output", "/flag/lake", "--max-rejected", "0"])
    assert settings.input == "file:///file/in"
    assert settings.output == "file:///flag/lake"
    assert settings.max_rejected == 0


def test_settings_file_lies_here_or_else_beside_the_script(
    cwd: Path, tmp_path: Path
) -> None:
    (tmp_path / "dl.cfg").write_text("[LAKE]\nOUTPUT = /beside\n")
    assert etl.parse_settings([]).output == "file:///beside"
    (cwd / "dl.cfg").write_text("[LAKE]\nOUTPUT = /here\n")
    assert etl.parse_settings([]).output == "file:///here"
    (cwd / "mine.cfg").write_text("[LAKE]\nOUTPUT = /mine\n")
    assert etl.parse_settings(["--config", "mine.cfg"]).output == "file:///mine"


def test_settings_file_may_have_quotes_percent_signs_a_bom_and_gaps(cwd: Path) -> None:
    text = "\ufeff# comment\n[LAKE]\ninput = \nOutput: '/100%/a lake'\n"
    (cwd / "dl.cfg").write_text(text, encoding="utf-8")
    settings = etl.parse_settings([])
    assert settings.output == "file:///100%/a lake"
    assert settings.input.endswith("/data_sample")


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("lake", "file://{cwd}/lake"),
        ("../a/./lake//", "file://{parent}/a/lake"),
        ("/a b/%20+é#[x]", "file:///a b/%20+é#[x]"),
        ("file:/a/lake/", "file:///a/lake"),
        ("file:///a/lake", "file:///a/lake"),
        ("hdfs://host:9000/a/lake/", "hdfs://host:9000/a/lake"),
        ("hdfs:///a//lake", "hdfs:///a/lake"),
        ("s3a://bucket//a/.//b/../lake/", "s3a://bucket/a/lake"),
        ("s3a://bucket/", "s3a://bucket"),
        ("s3a://bucket", "s3a://bucket"),
        ("in/lake", "file://{cwd}/in/lake"),
    ],
)
def test_path_becomes_an_absolute_uri(path: str, uri: str, cwd: Path) -> None:
    settings = etl.parse_settings(["--input", "in", "--output", path])
    assert settings.output == uri.format(cwd=cwd, parent=cwd.parent)


# --- A run that publishes -------------------------------------------------------------


def test_run_exits_with_0(sample_run: SampleRun) -> None:
    _, done = sample_run
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "figure",
    [
        "songplays 744 1 ",
        "users 23 1 ",
        "songs 70 39 ",
        "artists 44 1 ",
        "time 743 1 ",
        "plays all 744",
        "plays with song 99 13.3%",
        "plays with artist 440 59.1%",
        "songs read 74",
        "songs rejected 1 no song_id",
        "songs rejected 1 no artist_id",
        "songs rejected 1 value of the wrong type",
        "events read 875",
        "events rejected 2 not JSON",
        "events rejected 1 play without ts",
        "events rejected 1 play without userId",
        "events rejected 1 play without sessionId",
    ],
)
def test_printed_report_has_the_figure(figure: str, sample_run: SampleRun) -> None:
    _, done = sample_run
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    if figure.endswith(" "):  # of a table, of which it is the beginning
        lines = [line[: len(figure)] for line in lines]
    assert lines.count(figure) == 1


def test_printed_report_says_where_lake_and_rejected_are(sample_run: SampleRun) -> None:
    lake, done = sample_run
    (rejected,) = (lake / "_rejected").iterdir()
    assert f"\nrejected   file://{rejected}\n" in done.stdout
    assert f"\nlake       file://{lake}  (" in done.stdout


def test_log_is_a_line_a_step_with_seconds_and_nothing_else(
    sample_run: SampleRun,
) -> None:
    _, done = sample_run
    steps = []
    for line in done.stderr.splitlines():
        step = re.fullmatch(r"\d\d:\d\d:\d\d ([a-z]+) +\S.* \(\d+\.\d s\)", line)
        assert step, line
        steps.append(step[1])
    assert steps == ["start", "read", "stage", "check", "publish"]


def test_report_file_says_the_same_as_json(sample_run: SampleRun) -> None:
    lake, _ = sample_run
    (path,) = (lake / "_reports").iterdir()
    report = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == report["run"] + ".json"
    assert report["lake"] == f"file://{lake}"
    assert report["rejected"] == f"file://{lake}/_rejected/{report['run']}"
    tables = report["tables"].items()
    assert {table: (of["rows"], of["files"]) for table, of in tables} == {
        "songplays": (744, 1),
        "users": (23, 1),
        "songs": (70, 39),
        "artists": (44, 1),
        "time": (743, 1),
    }
    for table, of in tables:
        sizes = (file.stat().st_size for file in (lake / table).rglob("*.parquet"))
        assert of["bytes"] == sum(sizes)
    assert report["plays"] == {"all": 744, "with_song": 99, "with_artist": 440}
    assert report["records"] == {
        "songs": {
            "read": 74,
            "rejected": {
                "no song_id": 1,
                "no artist_id": 1,
                "value of the wrong type": 1,
            },
        },
        "events": {
            "read": 875,
            "rejected": {
                "not JSON": 2,
                "play without ts": 1,
                "play without userId": 1,
                "play without sessionId": 1,
            },
        },
    }


def read_rejected(lake: Path) -> list[dict[str, str]]:
    """The rejected records of the only run of a lake that has any."""
    (folder,) = (lake / "_rejected").iterdir()
    files = sorted(folder.glob("*.json"))
    assert sorted(folder.iterdir()) == files
    texts = (file.read_text(encoding="utf-8") for file in files)
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_rejected_records_are_kept_with_file_reason_and_text(
    sample_run: SampleRun,
) -> None:
    lake, _ = sample_run
    rejected = read_rejected(lake)
    assert all(list(of) == ["source_file", "reason", "raw"] for of in rejected)
    assert Counter((Path(of["source_file"]).name, of["reason"]) for of in rejected) == {
        ("TRAACDW128F6BC5304.json", "no song_id"): 1,
        ("TRAACGZ128F4F3CCB5.json", "no artist_id"): 1,
        ("TRAACKC128F32B4666.json", "value of the wrong type"): 1,
        ("2018-11-28-events.json", "play without ts"): 1,
        ("2018-11-29-events.json", "not JSON"): 1,
        ("2018-11-29-events.json", "play without sessionId"): 1,
        ("2018-11-30-events.json", "play without userId"): 1,
        ("2018-11-30-events.json", "not JSON"): 1,
    }
    raw = {of["raw"] for of in rejected}
    assert "-- rotated --" in raw
    song = ROOT / "data_sample/song_data/A/A/C/TRAACKC128F32B4666.json"
    assert song.read_text(encoding="utf-8").strip() in raw


def test_run_leaves_the_tables_and_its_reports_and_nothing_else(
    sample_run: SampleRun,
) -> None:
    lake, _ = sample_run
    assert {path.name for path in lake.iterdir()} == {*TABLES, "_rejected", "_reports"}
    files = [path for path in lake.rglob("*") if path.is_file()]
    assert len(files) == 43 + 1 + 1
    for file in files:
        assert file.suffix in (".parquet", ".json")
        assert not file.name.startswith((".", "_"))
    assert {path.name for path in lake.parent.iterdir()} == {"dl.cfg", "lake"}


def rows(lake: Path) -> dict[str, list[str]]:
    """All rows of the five tables, in order."""
    return {
        table: sorted(map(str, pq.read_table(lake / table).to_pylist()))
        for table in TABLES
    }


def files_by_folder(lake: Path) -> dict[str, int]:
    """How many files are in each folder of the tables."""
    return {
        str(folder.relative_to(lake)): sum(path.is_file() for path in folder.iterdir())
        for folder in lake.rglob("*")
        if folder.is_dir() and folder.relative_to(lake).parts[0] in TABLES
    }


@pytest.fixture
def copied_lake(sample_run: SampleRun, tmp_path: Path) -> Path:
    """A copy of the lake made of data_sample."""
    return Path(shutil.copytree(sample_run[0], tmp_path / "a lake [1] 100%"))


def test_rerun_gives_the_same_rows_in_as_many_files(
    spark: SparkSession, copied_lake: Path
) -> None:
    rows_before, folders_before = rows(copied_lake), files_by_folder(copied_lake)
    files_before = {*copied_lake.rglob("*.parquet")}
    source = str(ROOT / "data_sample")
    assert etl.main(["--input", source, "--output", str(copied_lake)]) == 0
    assert rows(copied_lake) == rows_before
    assert files_by_folder(copied_lake) == folders_before
    assert files_before.isdisjoint(copied_lake.rglob("*.parquet"))
    assert {path.name for path in copied_lake.iterdir()} == {
        *TABLES,
        "_rejected",
        "_reports",
    }
    assert len([*(copied_lake / "_reports").iterdir()]) == 2
    assert len([*(copied_lake / "_rejected").iterdir()]) == 2


@pytest.mark.parametrize("ansi", [True, False])
def test_ansi_mode_changes_no_value(
    ansi: bool,
    spark: SparkSession,
    sample_run: SampleRun,
    tmp_path: Path,
) -> None:
    before = spark.conf.get("spark.sql.ansi.enabled")
    spark.conf.set("spark.sql.ansi.enabled", ansi)
    try:
        assert etl.main(["--config", os.devnull, f"--output={tmp_path / 'lake'}"]) == 0
    finally:
        spark.conf.set("spark.sql.ansi.enabled", before)
    assert rows(tmp_path / "lake") == rows(sample_run[0])


def test_settings_for_large_input_change_no_row(
    spark: SparkSession,
    sample_run: SampleRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(etl, "SMALL_INPUT", 0)
    monkeypatch.setattr(etl, "SMALL_CATALOGUE", 0)
    monkeypatch.setattr(etl, "SMALL_FILE", 0)
    for key in etl.SMALL_CONF:
        spark.conf.unset(key)
    assert etl.main(["--config", os.devnull, f"--output={tmp_path / 'lake'}"]) == 0
    assert spark.conf.get("spark.sql.adaptive.enabled") == "true"
    assert rows(tmp_path / "lake") == rows(sample_run[0])


@pytest.mark.parametrize(
    ("before", "records", "after"),
    [("200", 1_000, "2"), ("200", 2_200_000_000, "4400"), ("9", 2_200_000_000, "9")],
    ids=["one a core", "one each 500,000 records", "as the user has set it"],
)
def test_shuffles_have_partitions_for_their_records(
    spark: SparkSession,
    before: str,
    records: int,
    after: str,
) -> None:
    key = "spark.sql.shuffle.partitions"
    of_tests = spark.conf.get(key)
    spark.conf.set(key, before)
    try:
        etl.size_shuffles(spark, records)
        assert spark.conf.get(key) == after
    finally:
        spark.conf.set(key, of_tests)


ENDLESS = """
import sys
import etl
etl.read_records = lambda spark, *of: spark.range(10**15).selectExpr("max(id)").collect()
sys.exit(etl.main(sys.argv[1:]))
"""


def test_sigterm_ends_a_run_in_the_middle_of_spark_jobs(tmp_path: Path) -> None:
    line = [sys.executable, "-c", ENDLESS, "--config", os.devnull]
    line.append(f"--output={tmp_path / 'lake'}")
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            while " start " not in process.stderr.readline():
                assert process.poll() is None
            time.sleep(2)
            process.terminate()
            _, printed = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 1, printed
    assert printed == "etl.py: error: KeyboardInterrupt\n"
    assert not (tmp_path / "lake").exists()


def test_nothing_that_is_called_is_deprecated(tmp_path: Path) -> None:
    script = [sys.executable, "-W", "always", str(ROOT / "etl.py"), "--debug"]
    done = run_command([*script, "--config", os.devnull], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARN NativeCodeLoader" in done.stderr  # Spark's own log is there
    assert not re.findall("(?i).*deprecat.*|.*FutureWarning.*", done.stderr)


WITHOUT_BOTO3 = """
import sys
sys.modules["boto3"] = sys.modules["botocore"] = None
import etl
sys.exit(etl.main(sys.argv[1:]))
"""


def run_without_boto3(cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs the job in a Python that has no boto3."""
    line = [sys.executable, "-c", WITHOUT_BOTO3, "--config", os.devnull, *flags]
    return run_command(line, cwd, PYTHONPATH=str(ROOT))


def test_local_run_needs_no_boto3(tmp_path: Path) -> None:
    done = run_without_boto3(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lake" / "songplays").is_dir()


def test_s3_without_boto3_says_what_to_install(tmp_path: Path) -> None:
    done = run_without_boto3(tmp_path, "--input=s3a://bucket/in")
    assert done.returncode == 2
    assert done.stderr == "etl.py: error: S3 needs boto3: run pip install boto3\n"


# --- A run that doesn't ---------------------------------------------------------------


@pytest.fixture(scope="module")
def small_lake(
    spark: SparkSession,
    sample_run: SampleRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The sample's lake after a run on a small input, of which a quarter is bad."""
    folder = tmp_path_factory.mktemp("small")
    lake = Path(shutil.copytree(sample_run[0], folder / "lake"))
    (lake / "songs" / "README.txt").write_text("mine")
    source = write_input(folder / "in", events=f"{HOME}\n{PLAY}\nfoo")
    flags = ["--input", str(source), "--output", str(lake)]
    assert etl.main([*flags, "--max-rejected", "0.25"]) == 0
    return lake


def test_run_on_other_input_replaces_all_rows_and_leaves_no_empty_folder(
    small_lake: Path,
) -> None:
    assert files_by_folder(small_lake) == {
        "songplays": 0,
        "songplays/year=2018": 0,
        "songplays/year=2018/month=11": 1,
        "users": 1,
        "songs": 1,  # the file that no run has written
        "songs/year=0": 1,
        "artists": 1,
        "time": 0,
        "time/year=2018": 0,
        "time/year=2018/month=11": 1,
    }
    ((name, content),) = [
        (path.name, path.read_text()) for path in small_lake.glob("songs/*.txt")
    ]
    assert (name, content) == ("README.txt", "mine")


def failure(
    source: Path, lake: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> str:
    """The one line that a run prints which fails."""
    code = etl.main(["--input", str(source), "--output", str(lake), *flags])
    printed = capsys.readouterr()
    assert (code, printed.out) == (1, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("etl.py: error: ")
    return line


def test_too_many_bad_records_publish_nothing_and_are_kept(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = "\n".join([PLAY] * 94 + ["foo", "{"])
    source = write_input(tmp_path / "in", songs=SONG * 3, events=events)
    line = failure(source, tmp_path / "lake", capsys)
    assert "2 of 99 records are bad, over --max-rejected 0.01" in line
    (folder,) = (tmp_path / "lake" / "_rejected").iterdir()
    assert f"see them in file://{folder}" in line
    rejected = read_rejected(tmp_path / "lake")
    assert sorted((of["reason"], of["raw"]) for of in rejected) == [
        ("not JSON", "foo"),
        ("not JSON", "{"),
    ]
    assert [path.name for path in (tmp_path / "lake").iterdir()] == ["_rejected"]


@pytest.mark.parametrize(
    ("songs", "events", "reason"),
    [
        pytest.param(SONG, HOME, "no play (page NextSong) in ", id="no play"),
        pytest.param("foo", PLAY, "no record in ", id="no song"),
        pytest.param(SONG, "\n \n", "no record in ", id="only blank events"),
    ],
)
def test_input_without_a_song_or_a_play_leaves_the_tables_as_they_were(
    songs: str,
    events: str,
    reason: str,
    small_lake: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(small_lake.rglob("*.parquet"))
    source = write_input(tmp_path / "in", songs=songs, events=events)
    line = failure(source, small_lake, capsys, "--max-rejected", "1")
    assert f"{reason}file://{source}/" in line
    assert sorted(small_lake.rglob("*.parquet")) == before
    assert not (small_lake / "_staging").exists()


def test_truncated_gzip_file_is_named(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_input(tmp_path / "in")
    cut_off = source / "log_data" / "cut off.json.gz"
    cut_off.write_bytes(gzip.compress(PLAY.encode() * 99)[:-20])
    line = failure(source, tmp_path / "lake", capsys)
    assert re.search(r"/log_data/cut( |%20)off\.json\.gz: .*[Uu]nexpected end", line)
    assert not (tmp_path / "lake").exists()


@pytest.mark.long
def test_later_run_takes_its_classes_from_the_archive_of_the_first(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(ROOT / "etl.py"), "--config", os.devnull]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "50% 'of a cache")}
    done = run_command(command, tmp_path, **cache)
    assert done.returncode == 0, done.stderr
    archive = Path(re.search(r" java     archives .*: (/.*\.jsa)\n", done.stderr)[1])
    wait_for_archive(archive)
    classes = tmp_path / "classes.txt"
    log = f"-Xlog:class+load:file={classes}"
    done = run_command(command, tmp_path, **cache, SPARK_SUBMIT_OPTS=log)
    assert done.returncode == 0, done.stderr
    assert " java " not in done.stderr
    assert classes.read_text().count("shared objects file (top)") > 10_000


@pytest.mark.parametrize("option", ["-Xshare:auto", "-XX:SharedArchiveFile=/x.jsa"])
def test_no_archive_is_made_where_the_user_has_chosen(
    option: str, java: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    environ = {"JAVA_HOME": str(java), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, str(ROOT / "etl.py"), "--config", os.devnull]
    done = run_command(command, tmp_path, **environ, SPARK_SUBMIT_OPTS=option)
    assert "Spark didn't start" in done.stderr  # on that Java
    assert (java / "started").exists()
    assert not cache.exists()
    assert " java " not in done.stderr
