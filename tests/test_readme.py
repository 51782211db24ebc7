"""README's commands, policies, output, SQL and tables, held against what takes them."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import botocore.session
import duckdb
import pyarrow.parquet as pq
import pytest
import sqlglot
from botocore.validate import ParamValidator
from conftest import ROOT, run_command
from pyspark.sql import SparkSession
from sqlglot import exp

import etl

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)
HOME = "/home/me/sparkify"  # where README has its clone


def blocks(language: str, part: str = "") -> list[str]:
    """README's code blocks of a language that hold some text."""
    return [text for kind, text in BLOCKS if kind == language and part in text]


# A line that goes on with a command begins with a space or a bracket.
COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for block in blocks("bash")
    for command in re.findall(r"(?m)^(?:aws|python) .*(?:\n(?![a-z#]).*)*", block)
]
CUSTOM = {"s3", "create-default-roles"}  # what the command line alone knows
AWS = [of for of in COMMANDS if of[0] == "aws" and not CUSTOM & set(of[1:3])]
# Actions that IAM knows, which are not the API's names.
KNOWN = {"sts:AssumeRole", "s3:ListBucket", "s3:ListBucketMultipartUploads"}
KNOWN |= {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
# SQL's types by those in the files, as sqlglot names them.
OF_FILE = {"int64": "BIGINT", "int32": "INT", "string": "TEXT", "double": "DOUBLE"}
OF_FILE["timestamp[us, tz=UTC]"] = "TIMESTAMP"


def pairs(value: str) -> dict[str, str]:
    """What KEY=VALUE,... says."""
    return dict(pair.split("=", 1) for pair in value.split(","))


def parse(shape: Any, *values: str) -> Any:
    """A parameter as its shape wants it, given as text, JSON or KEY=VALUE,..."""
    if shape.type_name == "list" and values[0][0] not in "[{":
        return [parse(shape.member, value) for value in values]
    (value,) = values
    if shape.type_name == "string":
        return blocks("json")[0] if value == "file://policy.json" else value
    if value[0] in "[{" or shape.type_name in ("integer", "long"):
        return json.loads(value)
    return {key: parse(shape.members[key], of) for key, of in pairs(value).items()}


OPERATIONS = {"create-cluster": "RunJobFlow", "add-steps": "AddJobFlowSteps"}
OPERATIONS["terminate-clusters"] = "TerminateJobFlows"


def api_call(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """The shape that an aws command's service wants, and the command's parameters."""
    service, verb = words[1:3]
    model = botocore.session.get_session().get_service_model(service)
    operation = OPERATIONS.get(verb, verb.title().replace("-", ""))
    shape = model.operation_model(operation).input_shape
    given: dict[str, list[str]] = {}
    for word in words[3:]:
        if word.startswith("--"):
            values = given.setdefault(word, [])
        else:
            values.append(word)
    given.pop("--query", None)  # Every command has it.
    if verb == "create-cluster":  # The API has these in other places.
        nodes = pairs(*given.pop("--ec2-attributes"))
        kind, count = given.pop("--instance-type") + given.pop("--instance-count")
        instances = f"MasterInstanceType={kind},InstanceCount={count}"
        given["--instances"] = [f"{instances},Ec2SubnetId={nodes['SubnetId']}"]
        given["--job-flow-role"] = [nodes["InstanceProfile"]]
    names, parameters = {name.lower(): name for name in shape.members}, {}
    for option, values in given.items():
        name = option.replace("-", "")
        name = names.get(name) or names[name.replace("cluster", "jobflow")]
        parameters[name] = parse(shape.members[name], *values)
    for of in parameters.get("Steps", ()):
        arguments = ["spark-submit", *of.pop("Args")]
        of["HadoopJarStep"] = {"Jar": "command-runner.jar", "Args": arguments}
        assert of.pop("Type") == "Spark"
    for name, member in shape.members.items():
        if member.metadata.get("idempotencyToken"):  # The command makes these up.
            parameters[name] = "0" * 36
    return shape, parameters


def find_wrong(shape: Any, value: Any, at: str = "") -> list[str]:
    """Where a value isn't of its shape's enumeration or pattern, unseen by botocore."""
    if shape.type_name == "structure":
        inner = [(shape.members[name], of, name) for name, of in value.items()]
    elif shape.type_name == "list":
        inner = [(shape.member, of, "") for of in value]
    elif shape.type_name == "map":
        inner = [(shape.value, of, name) for name, of in value.items()]
    else:
        pattern = shape.metadata.get("pattern", "")
        is_java = re.search(r"\\u|\\p", pattern)  # Python has other classes of letters.
        if pattern and not is_java and not re.fullmatch(pattern, str(value)):
            return [f"{at}: {value} is unlike {pattern}"]
        allowed = shape.metadata.get("enum", [value])
        return [] if value in allowed else [f"{at}: {value} is not of {allowed}"]
    return [e for of, part, name in inner for e in find_wrong(of, part, f"{at}/{name}")]


@pytest.fixture(scope="module")
def sample(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The current folder, which has the lake of data_sample; what the job printed."""
    folder = tmp_path_factory.mktemp("sample")
    flags = ["--config", os.devnull, f"--output={folder}/lake"]
    out = io.StringIO()
    with redirect_stderr(out), redirect_stdout(out):
        assert etl.main(flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder, out.getvalue()


def test_readme_is_one_sitting_long() -> None:
    assert len(README.splitlines()) <= 340


@pytest.mark.parametrize("words", AWS, ids=lambda words: " ".join(words[1:3]))
def test_aws_command_is_one_that_the_service_takes(words: list[str]) -> None:
    shape, parameters = api_call(words)
    errors = ParamValidator().validate(parameters, shape)
    assert not errors.has_errors(), errors.generate_report()
    assert find_wrong(shape, parameters) == []


def test_policies_allow_known_actions_on_every_folder_that_commands_name() -> None:
    glue = botocore.session.get_session().get_service_model("glue").operation_names
    texts = [*blocks("json"), api_call(AWS[0])[1]["AssumeRolePolicyDocument"]]
    statements = [of for text in texts for of in json.loads(text)["Statement"]]
    actions = re.findall(r"\w+:[A-Z]\w+", str([of["Action"] for of in statements]))
    assert KNOWN <= set(actions) <= KNOWN | {f"glue:{name}" for name in glue}
    allowed = re.findall(r"arn:aws:s3:::([^\"]+)", texts[0])
    for name in re.findall(r"s3://(my-bucket/(?!athena)[\w./-]+)", str(COMMANDS)):
        assert any(fnmatch(f"{name}/x", pattern) for pattern in allowed), name


def test_flags_and_settings_are_those_of_the_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        etl.parse_settings(["--help"])
    known = re.findall(r"(?m)^  (--.+?)\s{2,}(.+)$", capsys.readouterr().out)
    rows = re.findall(r"(?m)^\| `(--[^`]+)` \| (\S+ \w+` )?\| (.+) \|$", README)
    assert [(flag, words) for flag, _, words in rows] == known
    lake = [f"`[LAKE] {key.upper()}` " for key in etl.CONFIG_KEYS["LAKE"]]
    assert [key for _, key, _ in rows if key] == lake
    example = (ROOT / "dl.cfg.example").read_text(encoding="utf-8")
    every_key = re.sub(r"(?m)^# (?=[A-Z_]+ =)", "", example)
    keys = re.findall(r"(?m)^([A-Z_]+) =", every_key)
    assert keys == [of.upper() for keys in etl.CONFIG_KEYS.values() for of in keys]
    (tmp_path / "dl.cfg").write_text(example)
    (tmp_path / "every.cfg").write_text(every_key)
    monkeypatch.chdir(tmp_path)
    os.system(*re.findall(r"(?m)^printf .+ >moto.cfg$", README))
    lines = [words[2:] for words in COMMANDS if words[:2] == ["python", "etl.py"]]
    lines += [of.split() for of in re.findall(r"`python etl\.py ([^`]+)`", README)]
    lines += [["--config", "dl.cfg"], ["--config", "every.cfg"]]
    calls = {words[2]: api_call(words)[1] for words in AWS}
    arguments = calls["add-steps"]["Steps"][0]["HadoopJarStep"]["Args"]
    lines.append(arguments[arguments.index("s3://my-bucket/code/etl.py") + 1 :])
    driver = calls["start-job-run"]["jobDriver"]["sparkSubmit"]
    lines.append(driver["entryPointArguments"])
    assert len(lines) > 7
    for flags in lines:
        etl.parse_settings(flags)


def test_quick_start_prints_what_readme_shows(sample: tuple[Path, str]) -> None:
    folder, printed = sample
    printed = printed.replace(str(ROOT), HOME).replace(str(folder), HOME)
    shown, answer = blocks("")
    varies = r"(?m) +\d+ s$|(?<=_rejected/)\S+"  # seconds and the run
    both = [re.sub(varies, "", text).splitlines() for text in (shown, printed)]
    assert sorted(both[0]) == sorted(both[1])
    (words,) = (of for of in COMMANDS if of[:2] == ["python", "-c"])
    asked = run_command([sys.executable, *words[1:]], folder, PYTHONUTF8="1")
    assert asked.stdout.strip() == answer.strip()
    (rejected,) = re.findall(r'(?m)^`(\{"source_file.+)`$', README)
    kept = "".join(of.read_text() for of in folder.glob("lake/_rejected/*/*.json"))
    assert rejected in kept.replace(str(ROOT), HOME).splitlines()


def test_example_records_are_of_the_sample_and_have_every_field() -> None:
    (table,) = re.findall(r"(?m)^\| song \|.*\n.*\n((?:\|.*\n)+)", README)
    examples: dict[str, str] = {}
    for row in table.splitlines():
        cells = [of.strip() for of in row.split("|")[1:-1]]
        for names, values in zip(cells[::2], cells[1::2]):
            found = re.sub(r" \(m?s\)| …", "", values)
            several = found.split(", ") if "," in names else [found]
            examples.update(zip(re.findall(r"\w+", names), several))
    fields = re.findall(r"(\w+) (?:string|double|bigint|int)", str(etl.SCHEMAS))
    assert sorted(examples) == sorted(fields)
    files = (ROOT / "data_sample").rglob("*.json")
    text = "".join(of.read_text(encoding="utf-8") for of in files)
    text = re.sub(r'\\"|\\(?=/)', "", text)
    for field, value in examples.items():
        assert re.search(f'"{field}":"?{re.escape(value)}', text), field


def test_queries_give_what_readme_shows_in_duckdb_and_spark(
    spark: SparkSession, sample: tuple[Path, str]
) -> None:
    session, (view,) = spark.newSession(), re.findall(r'f"(CREATE VIEW .+)"', README)
    for table in etl.TABLES:
        duckdb.sql(view.format(table=table))
        rows = session.read.parquet(f"{sample[0]}/lake/{table}")
        rows.createOrReplaceTempView(table)
    (bars,) = re.findall(r'"plays.*\n +bar (\[.*\])', README)
    queries = re.findall(r"(SELECT[^;]+);((?:\n-->.*)*)", *blocks("sql", "-->"))
    assert len(queries) == 2
    for query, shown in queries:
        assert isinstance(sqlglot.parse_one(query, read="athena"), exp.Select)
        rows = duckdb.sql(query).fetchall()
        assert rows == list(map(tuple, session.sql(query).collect()))
        in_text = "".join(f"\n--> {' | '.join(map(str, row))}" for row in rows)
        assert in_text == shown or rows == list(enumerate(json.loads(bars)))


def test_sql_of_athena_and_redshift_and_the_erd_have_the_columns_of_the_files(
    sample: tuple[Path, str],
) -> None:
    (athena,), (redshift,) = blocks("sql", "MSCK"), blocks("sql", "COPY")
    (erd,) = blocks("mermaid", "erDiagram")
    defined: dict[str, list[str]] = {}
    for dialect, text in (("athena", athena), ("redshift", redshift)):
        text = text.replace("VARCHAR(MAX)", "TEXT").replace("VARCHAR", "TEXT")
        for statement in sqlglot.parse(text, read=dialect):
            parts = statement.find_all(exp.ColumnDef, bfs=False)
            if columns := [f"{of.name} {of.kind.this.name}" for of in parts]:
                defined[f"{dialect}.{statement.find(exp.Table).name}"] = columns
    assert "FROM DATA CATALOG DATABASE 'sparkify'" in redshift
    for table, contract in etl.TABLES.items():
        file = next((sample[0] / "lake" / table).rglob("*.parquet"))
        in_file = [f"{of.name} {OF_FILE[str(of.type)]}" for of in pq.read_schema(file)]
        every = in_file + [f"{name} INT" for name in contract.folders]
        (entity,) = re.findall(rf"(?s) {table} \{{ (.*?) \}}", erd)
        drawn = re.findall(r"(\w+) (\w+)(?: [PF]K)?", entity.replace("string", "text"))
        assert [f"{name} {of.upper()}" for of, name in drawn] == every
        assert defined[f"athena.{table}"] == every
        assert f"LOCATION 's3://my-bucket/lake/{table}/';" in athena
        repaired = re.search(rf"MSCK REPAIR TABLE sparkify\.`?{table}`?;", athena)
        assert bool(repaired) == bool(contract.folders)
        copy = rf"COPY \"?{table}\"? FROM 's3://my-bucket/lake/{table}/' .*PARQUET;"
        if re.search(copy, redshift):  # It loads what is in the files, in their order.
            assert defined[f"redshift.{table}"] == in_file
        else:
            assert f"CREATE TABLE {table} AS SELECT * FROM lake.{table};" in redshift
