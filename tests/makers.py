"""Song and log records for tests, good but for what a test changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# 2018-11-02 01:25:34.796 UTC
TS = 1541121934796


def song(**changes: Any) -> Record:
    """A song record with all fields that the job reads."""
    record: Record = {"song_id": "S1", "title": "Hello", "artist_id": "A1"}
    record.update(artist_name="Adele", artist_location="London")
    record.update(artist_latitude=51.5, artist_longitude=-0.1)
    return {**record, "duration": 295.5, "year": 2015, **changes}


def play(**changes: Any) -> Record:
    """A log event with all fields that the job reads: a play of song()."""
    record: Record = {"ts": TS, "userId": "39", "sessionId": 38, "itemInSession": 0}
    record.update(page="NextSong", song="Hello", artist="Adele", length=295.5)
    record.update(level="free", location="Reno, NV", userAgent="Firefox")
    return {**record, "firstName": "Ann", "lastName": "Lee", "gender": "F", **changes}


def to_json(record: Record) -> str:
    """A record as JSON on one line."""
    return json.dumps(record, ensure_ascii=False)


def write_input(
    folder: Path,
    songs: Iterable[Record | str] = (),
    events: Iterable[Record | str] = (),
) -> Path:
    """Writes song_data/ and log_data/ below a folder, a file each, a record a line."""
    files = {"song_data/A/a.json": songs}
    files["log_data/2018/11/2018-11-01-events.json"] = events
    for name, records in files.items():
        lines = [of if isinstance(of, str) else to_json(of) for of in records]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
