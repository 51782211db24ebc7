"""Measure etl.py beside other ways to the same tables, as whole processes in turn.

    python tests/bench/compare.py small     etl.py and textbook_etl.py, as many songs as
                                            the real catalogue, one file each
    python tests/bench/compare.py large     etl.py and duckdb_etl.py, 3 million events
    python tests/bench/compare.py s3        etl.py and textbook_etl.py on a versitygw that
                                            is 25 ms away
    python tests/bench/compare.py growth    etl.py alone, with ten times the input

Prints a Markdown table of medians, and etl.py's own steps. For Linux: it reads /proc.
Exit code 1: a contender failed. 2: wrong usage, or something is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

from make_data import whole_number, write_clean
from relay import run_relay

BENCH = Path(__file__).resolve().parent
ETL = BENCH.parents[1] / "etl.py"
SCRIPTS = {
    "etl.py": [str(ETL), "--config", "dl.cfg", "--input", "{in}", "--output", "{out}"],
    "textbook": [str(BENCH / "textbook_etl.py"), "{in}", "{out}"],
    "duckdb": [str(BENCH / "duckdb_etl.py"), "{in}", "{out}"],
}
SAMPLE_SECONDS = 0.05  # between two looks at the memory
PSS_LIMIT = 256_000_000  # bytes; to read the PSS of a larger process would slow it down
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes
STEP = re.compile(r"\d\d:\d\d:\d\d (\w+) +(.*) \((\d+\.\d) s\)\n")  # in etl.py's log
KINDS = ("GET", "HEAD", "LIST", "PUT", "COPY", "DELETE", "POST")


class Failure(Exception):
    """A contender failed: exit code 1."""


class UsageError(Exception):
    """Wrong usage, or something is missing: exit code 2."""


# --- Scenarios ------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much input: song files, log events, days (a log file each), listeners."""

    songs: int
    events: int
    days: int

    @property
    def users(self) -> int:
        """One for every 100 events, but never fewer than 99."""
        return max(99, self.events // 100)

    def grown(self, songs: int = 1, events: int = 1) -> Size:
        """So many times the songs and events, in as many days."""
        return Size(self.songs * songs, self.events * events, self.days)

    def __str__(self) -> str:
        return (
            f"{self.songs:,} songs in as many files, "
            f"{self.events:,} events in {self.days:,} files"
        )


@dataclass(frozen=True)
class Contender:
    """What a column of the table shows: a script of SCRIPTS on an input."""

    name: str
    script: str
    size: Size


SIZES = {
    "small": Size(14_896, 8_056, 30),
    "large": Size(14_896, 3_000_000, 30),
    "s3": Size(2_000, 8_056, 30),
    "growth": Size(14_896, 300_000, 30),
}


def contenders(scenario: str, size: Size) -> list[Contender]:
    """Who takes part; the others are compared with the first."""
    if scenario == "growth":
        return [
            Contender("1x", "etl.py", size),
            Contender("10x-events", "etl.py", size.grown(events=10)),
            Contender("10x-songs", "etl.py", size.grown(songs=10)),
        ]
    rival = "duckdb" if scenario == "large" else "textbook"
    return [Contender(name, name, size) for name in ("etl.py", rival)]


# --- Processes ------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, as etl.py's JVM."""
    set_child_subreaper = 36  # see prctl(2)
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def descendants(helpers: Sequence[int] = ()) -> dict[int, int]:
    """The process ids of this process's children and all of theirs, but of the helpers;
    each with its parent's."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8") as file:
            parent = int(file.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found: dict[int, int] = {}
    parents = [os.getpid()]
    for parent in parents:  # which grows meanwhile
        pids = [pid for pid in children.get(parent, ()) if pid not in helpers]
        found.update(dict.fromkeys(pids, parent))
        parents += pids
    return found


def memory(pid: int, parent: int) -> int:
    """The bytes of memory of a process: its PSS, but its RSS where it is large.

    PSS counts a page that processes share once in all, as Spark's Python workers do. A
    large process, which is a JVM or DuckDB, shares next to nothing; but what a JVM starts
    is at first, under the JVM's own command line, in the memory of the JVM.
    """
    with suppress(OSError):
        with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
            rss = int(file.read().split()[1]) * PAGE
        if rss > PSS_LIMIT:
            lines = [Path(f"/proc/{p}/cmdline").read_bytes() for p in (pid, parent)]
            return 0 if lines[0] == lines[1] else rss
        with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
            pss = re.search(r"^Pss: +(\d+)", file.read(), re.MULTILINE)
            return int(pss[1]) * 1024 if pss else 0
    return 0  # it has ended


class MemorySampler(threading.Thread):
    """Keeps the highest memory of the descendants, in bytes: of all together (`total`)
    and of one process (`largest`)."""

    def __init__(self, helpers: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self.helpers = helpers
        self.ended = threading.Event()
        self.total = self.largest = 0

    def run(self) -> None:
        """Looks, until `ended` is set."""
        while not self.ended.wait(SAMPLE_SECONDS):
            sizes = [memory(*pair) for pair in descendants(self.helpers).items()]
            self.total = max(self.total, sum(sizes))
            self.largest = max(self.largest, *sizes, 0)


def reap(pid: int, flags: int) -> tuple[int | None, float]:
    """The exit code and the CPU seconds, with those of its children, of a child that has
    ended; (None, 0) for another one. `flags` are of wait4(2)."""
    with suppress(ChildProcessError):
        ended, status, usage = os.wait4(pid, flags)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code, usage.ru_utime + usage.ru_stime
    return None, 0.0


def reap_orphans(helpers: Sequence[int] = (), patience: float = 10) -> float:
    """Waits for what an ended process has left behind; returns its CPU seconds. What is
    there after so many seconds of patience is killed."""
    cpu, deadline = 0.0, time.monotonic() + patience
    while pids := descendants(helpers):
        for pid in pids:
            if time.monotonic() >= deadline:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            cpu += reap(pid, os.WNOHANG)[1]
        time.sleep(0.005)
    return cpu


def end_all() -> None:
    """Kills every process that this one has started. No second Ctrl-C stops that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    reap_orphans(patience=0)


@dataclass
class Run:
    """What a run took: figures by name, and etl.py's steps as (text, seconds) by name."""

    figures: dict[str, float] = field(default_factory=dict)
    steps: dict[str, tuple[str, float]] = field(default_factory=dict)


def measure(
    command: Sequence[str], folder: Path, env: dict[str, str], helper: int
) -> Run:
    """Runs a command in a folder; `helper` is a process that isn't measured, or 0.

    Raises Failure, with the end of what it printed, unless its exit code is 0.
    """
    sampler, printed = MemorySampler([helper]), []
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C is for this process, which ends that one
    )
    sampler.start()

    def read() -> None:
        printed.extend((time.monotonic() - began, line) for line in process.stdout)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    process.returncode, cpu = reap(process.pid, 0)
    wall = time.monotonic() - began
    sampler.ended.set()
    cpu += reap_orphans([helper])
    reader.join()
    process.stdout.close()
    if process.returncode:
        tail = "".join(line for _, line in printed[-25:])
        raise Failure(f"{' '.join(command)}: exit code {process.returncode}\n{tail}")
    run = Run({"wall, s": wall})
    for seconds, line in printed:
        step = STEP.fullmatch(line)
        if step:
            run.steps[step[1]] = (step[2], float(step[3]))
        if step and step[1] == "start":
            run.figures["to the line 'start', s"] = seconds
            run.figures["after it, s"] = wall - seconds
    run.figures["CPU, s"] = cpu
    run.figures["memory of all processes, MB"] = sampler.total / 1e6
    run.figures["memory of the largest, MB"] = sampler.largest / 1e6
    return run


# --- Places ---------------------------------------------------------------------------


def make_input(size: Size, folder: Path) -> Path:
    """The folder, below another, of input of a size; made unless it is there."""
    name = f"songs-{size.songs}-events-{size.events}-days-{size.days}"
    target, draft = folder / name, folder / f"{name}.part"
    if not target.exists():
        print(f"making {size}", file=sys.stderr)
        shutil.rmtree(draft, ignore_errors=True)
        sizes = (size.songs, size.events, size.days, size.users)
        write_clean(draft, *sizes, seed=1, start=date(2018, 11, 1))
        draft.rename(target)
    return target


class Disk:
    """A local folder that holds the lakes."""

    helper = 0  # no process serves it

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = ""  # the text of etl.py's dl.cfg
        self.env: dict[str, str] = {}  # what textbook_etl.py gets instead

    def load(self, folder: Path) -> str:
        """The URI of the input in a folder."""
        return str(folder)

    def uri(self, name: str) -> str:
        """The URI of a lake."""
        return str(self.root / name)

    def take(self, name: str) -> dict[str, float]:
        """Figures on a lake just written, which is deleted."""
        files = sum(len(names) for _, _, names in os.walk(self.root / name))
        shutil.rmtree(self.root / name)
        return {"files written": files}


class Bucket(Disk):
    """A bucket of a versitygw, which keeps it as the folder `root`."""

    def __init__(
        self, folder: Path, server: str, delay: float, stack: ExitStack
    ) -> None:
        """Starts the server, and a relay in front of it that holds a request back `delay`
        seconds; the stack ends both."""
        super().__init__(folder / "s3" / "bench-lake")
        (folder / "s3" / "bench-input").mkdir(parents=True)
        self.root.mkdir()
        self.log = folder / "access.log"
        self.key, self.secret = secrets.token_hex(10), secrets.token_hex(20)
        self.port = free_port()
        self.helper = self.start(server, folder / "s3", stack)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        relay = stack.enter_context(run_relay("127.0.0.1", self.port, delay))
        self.env = {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "ENDPOINT_URL": f"http://127.0.0.1:{relay}",
        }
        self.config = "[AWS]\n" + "".join(f"{k} = {v}\n" for k, v in self.env.items())
        self.env["AWS_ENDPOINT_URL"] = self.env.pop("ENDPOINT_URL")

    def start(self, server: str, folder: Path, stack: ExitStack) -> int:
        """Starts the server and waits until it answers; returns its process id."""
        command = [
            server,
            "--quiet",
            "--keep-alive",
            "--port",
            f"127.0.0.1:{self.port}",
        ]
        process = subprocess.Popen(
            [*command, "--access-log", str(self.log), "posix", str(folder)],
            env={
                **os.environ,
                "ROOT_ACCESS_KEY": self.key,
                "ROOT_SECRET_KEY": self.secret,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder.parent / "server.txt").open("w", encoding="utf-8"),
            start_new_session=True,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        while process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return process.pid
            time.sleep(0.05)
        said = (folder.parent / "server.txt").read_text(encoding="utf-8")
        raise UsageError(f"{server} doesn't start: {said}")

    def load(self, folder: Path) -> str:
        """The URI of the input in a folder, once it is uploaded, past the relay."""
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=16),
        )

        def upload(path: Path) -> None:
            key = f"{folder.name}/{path.relative_to(folder)}"
            client.put_object(Bucket="bench-input", Key=key, Body=path.read_bytes())

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(upload, folder.rglob("*.json")))
        self.requests()
        return f"s3a://bench-input/{folder.name}"

    def uri(self, name: str) -> str:
        """The URI of a lake."""
        return f"s3a://bench-lake/{name}"

    def take(self, name: str) -> dict[str, float]:
        """Figures on a lake just written, which is deleted, and the requests till now."""
        kinds = self.requests()
        figures = {"requests": sum(kinds.values()), **{k: kinds[k] for k in KINDS}}
        return {**super().take(name), **figures}

    def requests(self) -> Counter[str]:
        """The requests since the last call, by kind."""
        size = -1
        while size != self.log.stat().st_size:
            size = self.log.stat().st_size
            time.sleep(0.3)
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        os.truncate(self.log, 0)
        return Counter(map(kind_of, lines))


# What versitygw's log calls a request, by the kind that it is; the first that fits.
NAMES = {
    "COPY": "CopyObject|UploadPartCopy",
    "LIST": "List",
    "HEAD": "Head",
    "PUT": "Put|UploadPart",
    "POST": "DeleteObjects|CreateMultipart|CompleteMultipart",
    "DELETE": "Delete|Abort",
    "GET": "Get",
}


def kind_of(line: str) -> str:
    """The kind of a request of a line of versitygw's access log: its HTTP method, but
    LIST for a listing and COPY for a copy."""
    name = re.search(r"\] \S+ \S+ \S+ s3_(\w+)", line)
    kinds = (k for k, names in NAMES.items() if name and re.match(names, name[1]))
    return next(kinds, "other")


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# --- Runs -----------------------------------------------------------------------------


def run_all(
    wanted: Sequence[Contender], repeat: int, place: Disk, folder: Path, inputs: Path
) -> dict[str, list[Run]]:
    """Runs the contenders in turn, each so many times on a new lake; the runs by name."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    env["PYSPARK_PYTHON"] = sys.executable
    env["SPARK_LOCAL_DIRS"] = str(folder / "spark")
    (folder / "dl.cfg").write_text(place.config, encoding="utf-8")
    sources = {size: make_input(size, inputs) for size in {c.size for c in wanted}}
    uris = {size: place.load(source) for size, source in sources.items()}
    runs: dict[str, list[Run]] = {contender.name: [] for contender in wanted}
    for number in range(1, repeat + 1):
        for contender in wanted:
            lake = f"{contender.name}-{number}"
            uri = {"{in}": uris[contender.size], "{out}": place.uri(lake)}
            command = [uri.get(word, word) for word in SCRIPTS[contender.script]]
            own = {} if contender.script == "etl.py" else place.env
            run = measure(
                [sys.executable, *command], folder, {**env, **own}, place.helper
            )
            run.figures.update(place.take(lake))
            runs[contender.name].append(run)
            wall = run.figures["wall, s"]
            print(f"{number}/{repeat} {contender.name} {wall:.1f} s", file=sys.stderr)
    return runs


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """The median of each figure."""
    return {name: median(r.figures[name] for r in runs) for name in runs[0].figures}


def format_table(runs: dict[str, list[Run]]) -> str:
    """The medians as a Markdown table; ratios are to the first contender."""
    base, *others = names = list(runs)
    found = {name: medians(runs[name]) for name in names}
    head = ["", base, *(text for n in others for text in (n, f"{n} / {base}"))]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for figure in max(found.values(), key=len):
        first = found[base].get(figure)
        row = [figure, format_figure(figure, first)]
        for name in others:
            value = found[name].get(figure)
            row += [format_figure(figure, value), format_ratio(value, first)]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_figure(figure: str, value: float | None) -> str:
    """A figure: seconds with a decimal, all else whole."""
    if value is None:
        return ""
    return f"{value:,.1f}" if figure.endswith(", s") else f"{value:,.0f}"


def format_ratio(value: float | None, base: float | None) -> str:
    """How many times the base a value is; nothing where one is missing or 0."""
    return f"{value / base:.2f}" if value is not None and base else ""


def format_steps(runs: Sequence[Run]) -> str:
    """The steps of etl.py as it logs them, with the medians of their seconds."""
    steps = runs[-1].steps
    seconds = {s: median(r.steps[s][1] for r in runs if s in r.steps) for s in steps}
    return "\n".join(
        f"{step:8} {text} ({seconds[step]:.1f} s)" for step, (text, _) in steps.items()
    )


# --- Command line ---------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; wrong ones end the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description="Measure etl.py beside other ways to the same tables."
    )
    add = parser.add_argument
    add("scenario", choices=SIZES)
    add("--repeat", type=whole_number, default=3, metavar="N", help="runs of each (3)")
    add("--songs", type=whole_number, metavar="N", help="another size of input")
    add("--events", type=whole_number, metavar="N")
    add("--days", type=whole_number, metavar="N")
    add("--only", nargs="+", metavar="NAME", help="of the contenders only these")
    add(
        "--keep", type=Path, metavar="FOLDER", help="keep the input there for next time"
    )
    add("--server", default="versitygw", metavar="FILE", help="for s3 (on the PATH)")
    add("--delay", type=float, default=25, metavar="MS", help="of each S3 request (25)")
    return parser.parse_args(argv)


def choose(flags: argparse.Namespace) -> list[Contender]:
    """The contenders that the arguments ask for. Raises UsageError for unknown names."""
    usual = SIZES[flags.scenario]
    size = Size(
        flags.songs or usual.songs,
        flags.events or usual.events,
        flags.days or usual.days,
    )
    known = contenders(flags.scenario, size)
    names = [contender.name for contender in known]
    unknown = set(flags.only or ()) - set(names)
    if unknown:
        raise UsageError(f"no {', '.join(unknown)}: there are {', '.join(names)}")
    return [contender for contender in known if contender.name in (flags.only or names)]


def compare(flags: argparse.Namespace) -> None:
    """Runs a scenario and prints its table. Raises Failure and UsageError."""
    wanted = choose(flags)
    server = shutil.which(flags.server)
    if flags.scenario == "s3" and not server:
        raise UsageError(f"no {flags.server}: name versitygw with --server")
    with ExitStack() as stack:
        temp = tempfile.TemporaryDirectory(prefix="compare-")
        folder = Path(stack.enter_context(temp))
        stack.callback(end_all)
        place = Disk(folder / "lakes")
        if server and flags.scenario == "s3":
            place = Bucket(folder, server, flags.delay / 1000, stack)
        inputs = (flags.keep or folder / "inputs").resolve()
        runs = run_all(wanted, flags.repeat, place, folder, inputs)
    cores = len(os.sched_getaffinity(0))
    distance = f", {flags.delay:g} ms a request" if flags.scenario == "s3" else ""
    print(
        f"{flags.scenario}: medians of {flags.repeat} runs, {cores} cores{distance}\n"
    )
    print("".join(f"- {c.name}: {c.size}\n" for c in wanted))
    print(format_table(runs))
    for name in (n for n in runs if runs[n][0].steps):
        print(f"\n{name}:\n\n```\n{format_steps(runs[name])}\n```")


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments ask for; returns the exit code."""
    flags = parse_arguments(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    adopt_orphans()
    try:
        compare(flags)
    except (Failure, UsageError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
