"""A run that reads only what is new makes the lake of a full one, whatever has happened."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from conftest import read_table
from makers import play, song, to_json
from pyspark.sql import SparkSession

import etl

DAY = 24 * 3600 * 1000  # ms
MONTHS = [1541000000000 + 31 * DAY * n for n in range(4)]  # a ts in each of four


def run(source: Path, lake: Path, *flags: str) -> dict[str, Any]:
    """The report of a run in this process."""
    flags = ("--config", os.devnull, f"--input={source}", f"--output={lake}", *flags)
    return etl.run(etl.parse_settings([*flags, "--max-rejected=1"]))


def contents(lake: Path) -> dict[str, list[str]]:
    """The rows of the five tables and of the records, in order."""
    found = {table: list(map(repr, read_table(lake, table))) for table in etl.TABLES}
    for kind in ("songs", "events", "users"):
        files = list(map(str, (lake / "_records" / kind).rglob("*.parquet")))
        rows = ds.dataset(files, partitioning="hive").to_table().to_pylist()
        found[f"_records/{kind}"] = sorted(map(repr, rows))
    return found


def files_of(lake: Path) -> dict[str, int]:
    """When each file of a lake was changed, by name."""
    return {
        str(path.relative_to(lake)): path.stat().st_mtime_ns
        for path in lake.rglob("*")
        if path.is_file()
    }


def write(path: Path, *texts: str) -> None:
    """Writes a file that is seen to be another one, though it may have the same size."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts))
    if path.stat().st_mtime_ns // 10**6 <= before // 10**6:
        os.utime(path, ns=(before + 10**7,) * 2)


# --- Random histories -----------------------------------------------------------------


def random_song(rng: random.Random) -> str:
    """A song of few ids, titles and names, or a bad one."""
    if rng.random() < 0.1:
        return to_json(song(song_id=None))
    number = rng.randrange(6)
    artist = f"A{rng.randrange(3)}"
    name = rng.choice(["Adele", "Band", None])
    title = rng.choice(["Hello", "Other"])
    return to_json(
        song(song_id=f"S{number}", artist_id=artist, artist_name=name, title=title)
    )


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
    what = rng.choice(["new", "new", "replaced", "cut", "grown", "renamed", "deleted"])
    path = rng.choice(files)
    if what == "new":
        name = f"é {rng.randrange(99)}%20+'x.json"
        write(source / kind / str(rng.randrange(2)) / name, make(rng), make(rng))
    elif what == "replaced":  # by a file of the same size
        lines = path.read_text().splitlines()
        write(path, *(line.replace('"free"', '"paid"') for line in reversed(lines)))
    elif what == "cut":
        path.write_text(path.read_text()[:-20])
    elif what == "grown":
        write(path, path.read_text(), make(rng))
    elif what == "renamed":
        path.rename(path.with_name(f"renamed {rng.randrange(10**6)}.json"))
    elif len(files) > 2:
        path.unlink()
    return f"{kind} {what}"


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.long) for n in range(1, 11)]
)
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


# --- What a run decides ---------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Songs and the plays of three months, a file each."""
    write(tmp_path / "in/song_data/1.json", to_json(song()))
    for number, ts in enumerate(MONTHS[:3]):
        write(tmp_path / f"in/log_data/{number}.json", to_json(play(ts=ts)))
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


def test_nothing_new_writes_nothing(lake: Path, source: Path) -> None:
    before = files_of(lake)
    assert run(source, lake) == {}
    assert files_of(lake) == before


def test_a_new_day_changes_its_month_and_users_alone(lake: Path, source: Path) -> None:
    before = files_of(lake)
    write(source / "log_data/new.json", to_json(play(ts=MONTHS[1] + DAY, level="paid")))
    run(source, lake)
    month = {f"{of}/year=2018/month=12" for of in ("songplays", "time")}
    records = {f"_records/{of}/year=2018/month=12" for of in ("events", "users")}
    assert changed(lake, before) == {*month, *records, "users", "_records", "_reports"}
    assert len(read_table(lake, "songplays")) == 4


def test_a_new_song_changes_the_plays_of_every_month(lake: Path, source: Path) -> None:
    write(source / "log_data/new.json", to_json(play(ts=MONTHS[3], song="Later")))
    run(source, lake)
    before = files_of(lake)
    write(source / "song_data/2.json", to_json(song(song_id="S9", title="Later")))
    run(source, lake)
    songs = [row["song_id"] for row in read_table(lake, "songplays")]
    assert sorted(songs) == ["S1", "S1", "S1", "S9"]
    assert not [of for of in changed(lake, before) if of.startswith("_records/events")]


def test_a_file_that_is_known_is_not_opened(lake: Path, source: Path) -> None:
    before = {path: path.read_text() for path in (source / "log_data").glob("*.json")}
    for path, text in before.items():  # It has the size and time of before.
        times = path.stat()
        path.write_text("x" * (len(text) - 1) + "\n")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    write(source / "log_data/new.json", to_json(play(ts=MONTHS[0] + 1)))
    run(source, lake)
    assert len(read_table(lake, "songplays")) == 4


def test_a_file_that_came_after_the_listing_and_went_leaves_no_row(
    lake: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, late = contents(lake), source / "log_data/late.json"
    write(late, to_json(play(ts=MONTHS[1] + 1)))
    with monkeypatch.context() as patch:
        list_files = etl.list_files

        def without_late(lines: Any) -> dict[str, list[int]]:
            files = list_files(lines).items()
            return {name: of for name, of in files if not name.endswith("late.json")}

        patch.setattr(etl, "list_files", without_late)
        run(source, lake, "--full")
    assert contents(lake) != before
    late.unlink()
    run(source, lake)
    assert contents(lake) == before


def test_a_month_that_becomes_empty_goes_but_never_the_last(
    lake: Path, source: Path
) -> None:
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
    before, reasons = contents(lake), []
    for case in ("--full", "missing", "damaged", "second", "input", "script"):
        (manifest,) = (lake / "_records").glob("_manifest-*.json")
        text = manifest.read_text()
        if case == "missing":
            manifest.unlink()
        elif case == "damaged":
            manifest.write_text(text[:-9])
        elif case == "second":
            manifest.with_name("_manifest-other.json").write_text(text)
        elif case in ("input", "script"):
            manifest.write_text(json.dumps({**json.loads(text), case: "other"}))
        flags = ["--full"] if case == "--full" else []
        assert run(source, lake, *flags)["records"]["events"]["read"] == 3
        reasons += re.findall(
            "^All files are read, since (.*)", capsys.readouterr().err, re.MULTILINE
        )
        assert contents(lake) == before
    assert reasons == [
        "--full or --break-lock tells so.",
        "the lake has no manifest.",
        "the manifest is damaged or not the only one.",
        "the manifest is damaged or not the only one.",
        "INPUT is another.",
        "etl.py has changed.",
    ]


def test_limit_of_rejected_judges_the_lake_as_the_run_would_leave_it(
    lake: Path, source: Path
) -> None:
    write(source / "log_data/bad.json", "{not JSON")
    flags = ["--config", os.devnull, f"--input={source}", f"--output={lake}"]
    bad = etl.parse_settings([*flags, "--max-rejected=0.19"])
    before = files_of(lake)
    with pytest.raises(etl.RunError, match="1 of 5 records are bad"):
        etl.run(bad)
    (kept,) = files_of(lake).keys() - before.keys()
    assert kept.startswith("_rejected/")
    etl.run(etl.parse_settings([*flags, "--max-rejected=0.2"]))
    assert etl.run(bad) == {}
