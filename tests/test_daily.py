"""A run that reads only what is new makes the lake of a full one, whatever happens."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from conftest import read_table
from makers import play, song, to_json
from pyspark.sql import SparkSession
from test_crash import run
from test_publish import long

import etl

DAY = 24 * 3600 * 1000  # ms
MONTHS = [1541000000000 + 31 * DAY * n for n in range(4)]  # a ts in each of four


def contents(lake: Path) -> dict[str, list[str]]:
    """The rows of the five tables and of the records, in order."""
    found = {}
    for name in etl.FOLDERS:
        files = list(map(str, (lake / name).rglob("*.parquet")))
        rows = ds.dataset(files, partitioning="hive").to_table().to_pylist()
        found[name] = sorted(map(repr, rows))
    return found


def files_of(lake: Path) -> dict[str, int]:
    """When each file of a lake was changed, by name."""
    files = filter(Path.is_file, lake.rglob("*"))
    return {str(path.relative_to(lake)): path.stat().st_mtime_ns for path in files}


def write(path: Path, *texts: str) -> None:
    """Writes a file that is seen to have changed, though it may have the same size."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts))
    if path.stat().st_mtime_ns // 10**6 <= before // 10**6:
        os.utime(path, ns=(before + 10**7,) * 2)


def random_song(rng: random.Random) -> str:
    """A song of few ids, titles and names, or a bad one."""
    fields = {
        "song_id": f"S{rng.randrange(6)}" if rng.random() < 0.9 else None,
        "artist_id": f"A{rng.randrange(3)}",
        "artist_name": rng.choice(["Adele", "Band", None]),
        "title": rng.choice(["Hello", "Other"]),
    }
    return to_json(song(**fields))


def random_event(rng: random.Random) -> str:
    """An event of few users, in one of four months, or a bad one."""
    fields: dict[str, Any] = {
        "ts": rng.choice(MONTHS) + rng.randrange(3) * DAY,
        "userId": str(rng.randrange(3)),
        "sessionId": rng.randrange(2),
        "itemInSession": rng.randrange(3),
        "level": rng.choice(["free", "paid"]),
        "song": rng.choice(["Hello", "Other", "None"]),
        "page": rng.choice(["NextSong", "NextSong", "NextSong", "Upgrade"]),
    }
    if rng.random() < 0.1:
        fields.update(rng.choice([{"ts": None}, {"page": None}, {"ts": -5}]))
    return to_json(play(**fields)) if rng.random() < 0.95 else "{not JSON"


def change(rng: random.Random, source: Path) -> str:
    """Makes a random change of an input; says which."""
    kind = rng.choice(["song_data", "log_data", "log_data"])
    make = random_song if kind == "song_data" else random_event
    files = sorted((source / kind).rglob("*.json"))
    ways = "new new replaced touched emptied cut grown renamed deleted"
    what = rng.choice(ways.split())
    path = rng.choice(files)
    if what == "new":
        name = f"é {rng.randrange(99)}%20+'\n:x.json"
        write(source / kind / str(rng.randrange(2)) / name, make(rng), make(rng))
    elif what == "replaced":  # by a file of the same size
        lines = path.read_text().splitlines()
        write(path, *(line.replace('"free"', '"paid"') for line in reversed(lines)))
    elif what in ("touched", "emptied"):
        write(path, *path.read_text().splitlines() * (what == "touched"))
    elif what == "cut":
        path.write_text(path.read_text()[:-20])
    elif what == "grown":
        write(path, path.read_text(), make(rng))
    elif what == "renamed":
        path.rename(path.with_name(f"renamed {rng.randrange(10**6)}.json"))
    elif len(files) > 2:
        path.unlink()
    return f"{kind} {what}"


@pytest.mark.parametrize("seed", long(*range(1, 11)))
def test_random_history_gives_the_lake_of_a_full_run_at_each_step(
    seed: int, spark: SparkSession, tmp_path: Path
) -> None:
    rng, source, lake = random.Random(seed), tmp_path / "in", tmp_path / "lake"
    for number in range(3):
        write(source / f"song_data/{number}.json", to_json(song()), random_song(rng))
        events = [random_event(rng) for _ in range(4)]
        write(source / f"log_data/{number}.json", to_json(play()), *events)
    run(source, lake)
    for step in range(4):
        done = [change(rng, source) for _ in range(rng.randrange(1, 4))]
        run(source, lake)
        run(source, tmp_path / f"full {step}")
        assert contents(lake) == contents(tmp_path / f"full {step}"), (seed, step, done)
    assert not (lake / "_staging").exists()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Songs and the plays of three months, a file each."""
    write(tmp_path / "in/song_data/1.json", to_json(song()))
    for number, ts in enumerate(MONTHS[:3]):
        write(tmp_path / f"in/log_data/{number}.json", to_json(play(ts=ts)))
    os.utime(tmp_path / "in/log_data/1.json", (-5, -5))  # before 1970
    return tmp_path / "in"


@pytest.fixture
def lake(spark: SparkSession, source: Path, tmp_path: Path) -> Path:
    """The lake of that input."""
    run(source, tmp_path / "lake")
    return tmp_path / "lake"


def changed(lake: Path, before: dict[str, int]) -> set[str]:
    """The folders of which files are new or gone, by table and month."""
    names = {name for name, _ in files_of(lake).items() ^ before.items()}
    return {name.rpartition("/")[0] for name in names}


def test_run_reads_only_news_and_builds_what_changes(lake: Path, source: Path) -> None:
    """A day changes its month and users, a song the plays of every month."""
    before = files_of(lake)
    for path in source.rglob("*.json"):  # The size and time stay: it isn't opened.
        of = path.stat()
        path.write_text("x" * of.st_size)
        os.utime(path, ns=(of.st_atime_ns, of.st_mtime_ns))
    assert run(source, lake) == {}
    assert files_of(lake) == before
    write(source / "log_data/9.json", to_json(play(ts=MONTHS[1] + DAY, song="Later")))
    report = run(source, lake)
    found = [of["records"]["events"]["read"] for of in (report["new"], report)]
    assert (found, report["tables"]["songplays"]) == ([1, 4], 4)
    month = {f"{of}/year=2018/month=12" for of in ("songplays", "time")}
    records = {f"_records/{of}/year=2018/month=12" for of in ("events", "users")}
    assert changed(lake, before) == {*month, *records, "users", "_records", "_reports"}
    before = files_of(lake)
    write(source / "song_data/2.json", to_json(song(song_id="S9", title="Later")))
    run(source, lake)
    songs = [row["song_id"] for row in read_table(lake, "songplays")]
    assert sorted(songs) == ["S1", "S1", "S1", "S9"]
    assert not [of for of in changed(lake, before) if of.startswith("_records/events")]


def test_file_seen_after_the_listing_leaves_no_row(lake: Path, source: Path) -> None:
    before, list_files = contents(lake), etl.list_files
    late = source / "log_data/9.json"
    write(late, to_json(play(ts=MONTHS[1] + 1)))

    def list_before(lines: Any) -> dict[str, list[int]]:
        return {of: at for of, at in list_files(lines).items() if "/9." not in of}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etl, "list_files", list_before)
        run(source, lake, "--full")
    assert contents(lake) != before
    late.unlink()
    run(source, lake)
    assert contents(lake) == before


def test_news_without_a_record_change_no_table(lake: Path, source: Path) -> None:
    before = contents(lake)
    write(source / "log_data/new\n:.json")
    assert run(source, lake)["records"]["events"]["kept"] == 3
    assert contents(lake) == before
    assert run(source, lake) == {}


def test_emptied_month_goes_but_never_the_last(lake: Path, source: Path) -> None:
    (source / "log_data/0.json").unlink()
    run(source, lake)
    assert not list(lake.glob("*/year=2018/month=10*"))
    for path in (source / "log_data").glob("*.json"):
        write(path, "")
    before = files_of(lake)
    with pytest.raises(etl.RunError, match="no play"):
        run(source, lake)
    assert files_of(lake) == before


@pytest.mark.long
def test_full_run_says_why(
    lake: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(lake)
    reasons = {
        "--full": "--full or --break-lock tells so.",
        "missing": "the lake has no manifest.",
        "damaged": "the manifest is damaged or not the only one.",
        "second": "the manifest is damaged or not the only one.",
        "input": "INPUT is another.",
        "script": "etl.py has changed.",
        "table": "a table is missing.",
    }
    for case, reason in reasons.items():
        (manifest,) = (lake / "_records").glob("_manifest-*.json")
        text = manifest.read_text()
        if case == "missing":
            manifest.unlink()
        elif case == "damaged":
            manifest.write_text(text[:-9])
        elif case == "second":
            manifest.with_name("_manifest-other.json").write_text(text)
        elif case == "table":
            shutil.rmtree(lake / "users")
        elif case in ("input", "script"):
            manifest.write_text(json.dumps({**json.loads(text), case: "other"}))
        flags = ["--full"] if case == "--full" else []
        assert run(source, lake, *flags)["records"]["events"]["read"] == 3
        assert re.findall("since (.*)", capsys.readouterr().err) == [reason]
        assert contents(lake) == before


def test_limit_judges_what_the_run_would_leave(lake: Path, source: Path) -> None:
    write(source / "log_data/bad.json", "{not JSON")
    before = files_of(lake)
    with pytest.raises(etl.RunError, match="1 of 5 records are bad"):
        run(source, lake, "--max-rejected=0.19")
    (kept,) = files_of(lake).keys() - before.keys()
    assert kept.startswith("_rejected/")
    run(source, lake, "--max-rejected=0.2")
    assert run(source, lake, "--max-rejected=0.19") == {}
