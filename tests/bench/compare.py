"""Measure etl.py beside other ways to the same tables, as whole processes in turn.

    python tests/bench/compare.py small      and textbook_etl.py; many small song files
    python tests/bench/compare.py large      and duckdb_etl.py; 3 million events
    python tests/bench/compare.py s3         and textbook_etl.py; S3 that is 25 ms away
    python tests/bench/compare.py s3-large   alone; 3 million events there
    python tests/bench/compare.py daily      alone; after a first run a day is added, then
                                             nothing, then a song that was played before
    python tests/bench/compare.py daily-s3   the same on S3, with fewer events

Prints Markdown tables of medians. Made input stays below ~/.cache/sparkify-bench. S3 is a
versitygw, which is on the PATH or which $VERSITYGW names. For Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from make_data import write_input
from relay import KINDS, Relay

BENCH = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "sparkify-bench")
DELAY = 0.025  # seconds that a request to S3 waits
SAMPLE_SECONDS = 0.1  # between two looks at the memory
PATIENCE = 120  # seconds that what a contender leaves behind may take to end
PSS_LIMIT = 256_000_000  # bytes; to read the PSS of a larger process would slow it down
WALL = "wall, s"
DAILY = ("first run", "one more day", "nothing new", "one more song")
Runs = dict[str, list[dict[str, float]]]  # of each contender the figures of each run
Contender = tuple[str, Path, dict[str, str]]  # name, script, more for its environment


class Scenario(NamedTuple):
    """How much input, who is compared with etl.py, where, what is run on the same lake."""

    sizes: tuple[int, int, int]  # songs, events, days
    rival: str | None = None
    on_s3: bool = False
    steps: tuple[str, ...] = ("one run",)


SCENARIOS = {
    "small": Scenario((14_896, 8_056, 30), "textbook"),
    "large": Scenario((14_896, 3_000_000, 365), "duckdb"),
    "s3": Scenario((1_943, 8_056, 30), "textbook", on_s3=True),
    "s3-large": Scenario((1_943, 3_000_000, 365), on_s3=True),
    "daily": Scenario((14_896, 3_000_000, 365), steps=DAILY),
    "daily-s3": Scenario((1_943, 8_056, 30), on_s3=True, steps=DAILY),
}


def memory(process: psutil.Process) -> int:
    """The bytes of memory of a process: its PSS, which counts what Spark's Python workers
    share once in all, but its RSS where it is large, as a JVM, which shares little.

    What a JVM starts is at first, under the JVM's command line, in the JVM's own memory.
    """
    with suppress(psutil.Error):
        rss = process.memory_info().rss
        if rss < PSS_LIMIT:
            return process.memory_full_info().pss
        parent = process.parent()
        return 0 if parent and parent.cmdline() == process.cmdline() else rss
    return 0  # it has ended


def reap_orphans(helper: int | None, patience: float) -> None:
    """Waits for all children of this process but the helper, so that their processor time
    counts; kills what is there after so many seconds."""
    deadline = time.monotonic() + patience
    while orphans := [p for p in psutil.Process().children() if p.pid != helper]:
        for process in orphans:
            with suppress(psutil.Error, ChildProcessError):
                if time.monotonic() >= deadline:
                    process.kill()
                os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.02)


def measure(
    command: Sequence[str], folder: Path, env: dict[str, str], helper: int | None
) -> dict[str, float]:
    """Runs a command in a folder; returns its figures. Ends the program, with the end of
    what the command printed, unless its exit code is 0."""
    log, total, largest = folder / "log.txt", 0, 0
    began, cpu = time.monotonic(), sum(os.times()[2:4])  # of the ended children
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out)
    tree, end = psutil.Process(process.pid), os.pidfd_open(process.pid)
    while not select.select([end], [], [], SAMPLE_SECONDS)[0]:
        with suppress(psutil.Error):
            sizes = [memory(p) for p in (tree, *tree.children(recursive=True))]
            total, largest = max(total, sum(sizes)), max(largest, *sizes)
    wall, code = time.monotonic() - began, process.wait()
    os.close(end)
    reap_orphans(helper, PATIENCE)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        sys.exit(f"{tail}\ncompare.py: error: exit code {code} of {' '.join(command)}")
    return {
        WALL: wall,
        "CPU, s": sum(os.times()[2:4]) - cpu,
        "memory of all processes, MB": total / 1e6,
        "memory of the largest, MB": largest / 1e6,
    }


@dataclass
class Place:
    """Where lakes and their input are: a local folder, or a bucket that is kept in one."""

    root: Path
    uri: str
    client: Any = None  # of the bucket
    helper: int | None = None  # the process that serves it
    counts: Counter[str] = field(default_factory=Counter)  # of requests, by kind

    def put(self, name: str, path: Path) -> None:
        """Puts a file there."""
        if self.client:
            self.client.put_object(Bucket="bench", Key=name, Body=path.read_bytes())
        else:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, self.root / name)

    def files(self, name: str) -> set[tuple[Path, int]]:
        """The files of a lake, each with a number that changes when it is replaced."""
        paths = [path for path in (self.root / name).rglob("*") if path.is_file()]
        return {(path, path.stat().st_mtime_ns) for path in paths}


def start_s3(folder: Path) -> Place:
    """A bucket of a versitygw behind a relay; input is put there past the relay."""
    import boto3

    server = os.environ.get("VERSITYGW") or shutil.which("versitygw")
    if not server:
        sys.exit("compare.py: error: no versitygw on the PATH: name it in $VERSITYGW")
    (folder / "bench").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [server, "--quiet", "--keep-alive", f"--port=127.0.0.1:{port}", "posix"]
    env = {**os.environ, "ROOT_ACCESS_KEY": "bench", "ROOT_SECRET_KEY": "bench-secret"}
    process = subprocess.Popen([*command, folder], env=env, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    relay = Relay(port, DELAY)
    os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench-secret")
    os.environ.update(AWS_REGION="us-east-1", AWS_DEFAULT_REGION="us-east-1")
    endpoint = os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{relay.start()}"
    keys = "AWS_ACCESS_KEY_ID = bench\nAWS_SECRET_ACCESS_KEY = bench-secret\n"
    Path(folder, "dl.cfg").write_text(f"[AWS]\n{keys}ENDPOINT_URL = {endpoint}\n")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    return Place(folder / "bench", "s3a://bench", client, process.pid, relay.counts)


def make_input(sizes: tuple[int, int, int]) -> Path:
    """The folder with so many songs, events and days; it is made unless it is there."""
    target = CACHE / "songs-{}-events-{}-days-{}".format(*sizes)
    if not target.exists():
        print(f"making {target}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=CACHE) as draft:
            write_input(Path(draft, "input"), *sizes, 1, date(2018, 11, 1))
            Path(draft, "input").rename(target)
    return target


def change_input(place: Place, name: str, source: Path, step: str) -> None:
    """Adds to the input of a lake, by its name there, what a step is about."""
    logs = sorted((source / "log_data").rglob("*.json"))
    songs = sorted((source / "song_data").rglob("*.json"))
    late = {"one more day": logs[-1:], "nothing new": [], "one more song": songs[:1]}
    held_back = (logs[-1], songs[0]) if step == "first run" else ()
    paths = late.get(step, [path for path in (*logs, *songs) if path not in held_back])
    with ThreadPoolExecutor(8) as pool:
        names = [f"{name}/{path.relative_to(source)}" for path in paths]
        list(pool.map(place.put, names, paths))


def run_once(place: Place, source: str, lake: str, who: Contender) -> dict[str, float]:
    """Runs a contender, from one folder of a place to another; returns its figures."""
    _, script, env = who
    uris = [f"{place.uri}/{source}", f"{place.uri}/{lake}"]
    if script.parent != BENCH:
        config = str(place.root.parent / "dl.cfg") if place.client else os.devnull
        uris = ["--config", config, "--input", uris[0], "--output", uris[1]]
    old = place.files(lake)
    place.counts.clear()
    command = [sys.executable, str(script), *uris]
    run = measure(command, place.root.parent, {**os.environ, **env}, place.helper)
    run["files written"] = len(place.files(lake) - old)
    if place.client:
        run["requests"] = sum(place.counts.values())
        run.update({kind: place.counts[kind] for kind in KINDS})
    return run


def run_all(
    scenario: Scenario, contenders: Sequence[Contender], pairs: int, place: Place
) -> dict[str, Runs]:
    """Runs the contenders in turn, so many times on new lakes; the runs of each step."""
    made = make_input(scenario.sizes)
    names = [name for name, _, _ in contenders]
    runs: dict[str, Runs] = {s: {name: [] for name in names} for s in scenario.steps}
    for pair in range(pairs):
        for step in scenario.steps:
            for number, contender in enumerate(contenders):
                # Only where it changes has each lake an input of its own.
                source = f"in-{pair}-{number}" if step in DAILY else "in"
                if step in DAILY or not (place.root / source).exists():
                    change_input(place, source, made, step)
                run = run_once(place, source, f"lake-{pair}-{number}", contender)
                runs[step][contender[0]].append(run)
                print(f"{step}, {contender[0]}: {run[WALL]:.1f} s", file=sys.stderr)
        for lake in place.root.glob(f"lake-{pair}-*"):
            shutil.rmtree(lake)
    return runs


def format_table(runs: Runs) -> str:
    """The medians as a Markdown table, and the ratio of each pair's wall time; ratios are
    to the first contender."""
    base, *others = runs
    head = ["", base, *(text for name in others for text in (name, f"{name} / {base}"))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for figure in runs[base][0]:
        first, *rest = (median(run[figure] for run in runs[name]) for name in runs)
        digits = 1 if figure.endswith(", s") else 0
        line = [figure, f"{first:,.{digits}f}"]
        for value in rest:
            line += [f"{value:,.{digits}f}", f"{value / first:.2f}" if first else ""]
        lines.append(line)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for name in others:
        ratios = [run[WALL] / own[WALL] for run, own in zip(runs[name], runs[base])]
        listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        text += f"\n\n{name} / {base}, {WALL}: {listed}; median {median(ratios):.3f}"
    return text


def choose(flags: argparse.Namespace, rival: str | None) -> list[Contender]:
    """The contenders that the arguments ask for."""
    etl = BENCH.parents[1] / "etl.py"
    contenders: list[Contender] = [("etl.py", etl, {})]
    if flags.threads:
        key, value = "PYSPARK_SUBMIT_ARGS", "--master local[{}] pyspark-shell"
        counts = flags.threads.split(",")
        contenders = [(f"{n} threads", etl, {key: value.format(n)}) for n in counts]
    env = dict(pair.split("=", 1) for pair in flags.rival_env)
    if flags.rival and not flags.no_rival:
        contenders.append(("rival", flags.rival.resolve(), env))
    elif rival and not flags.no_rival:
        contenders.append((rival, BENCH / f"{rival}_etl.py", env))
    return contenders


def main() -> None:
    """Does what the arguments ask for; wrong ones end the program with exit code 2."""
    parser = argparse.ArgumentParser(description="Measure etl.py beside other ways.")
    add = parser.add_argument
    add("scenario", choices=SCENARIOS)
    add("--pairs", type=int, default=1, metavar="N", help="runs of each contender (1)")
    add("--scale", type=float, default=1, metavar="X", help="so many times the input")
    add("--threads", default="", metavar="N,...", help="etl.py with each of these")
    add("--rival", type=Path, metavar="FILE", help="another etl.py as the rival")
    add("--rival-env", action="append", default=[], metavar="NAME=VALUE")
    add("--no-rival", action="store_true", help="etl.py alone")
    flags = parser.parse_args()
    scenario = SCENARIOS[flags.scenario]
    songs, events, days = (max(2, round(n * flags.scale)) for n in scenario.sizes)
    scenario = scenario._replace(sizes=(songs, events, days))
    for name in filter(lambda name: name.startswith("AWS_"), list(os.environ)):
        del os.environ[name]
    os.environ["PYSPARK_PYTHON"] = sys.executable
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What etl.py leaves behind shall be this one's child: PR_SET_CHILD_SUBREAPER.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=CACHE) as name:
        folder = Path(name, "lakes")  # on the disk of the input, since that is linked
        os.environ["SPARK_LOCAL_DIRS"] = f"{name}/spark"
        try:
            place = start_s3(folder) if scenario.on_s3 else Place(folder, str(folder))
            runs = run_all(scenario, choose(flags, scenario.rival), flags.pairs, place)
        finally:
            reap_orphans(None, patience=0)
    size = f"{songs:,} songs in as many files, {events:,} events in {days} files"
    print(f"{flags.scenario}: {size}; {os.cpu_count()} cores; medians of {flags.pairs}")
    for step in runs:
        print(f"\n{step}:\n\n{format_table(runs[step])}")


if __name__ == "__main__":
    main()
