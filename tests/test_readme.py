"""README's commands, policies, settings and queries, held against what takes them."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any, Callable

import botocore.session
import duckdb
import pytest
from botocore.validate import ParamValidator
from conftest import ROOT
from pyspark.sql import SparkSession

import etl

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# A line that goes on with a command begins with a space or a bracket.
COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for block in blocks("bash")
    for command in re.findall(r"(?m)^(?:aws|python) .*(?:\n(?![a-z#]).*)*", block)
]
AWS = [words for words in COMMANDS if words[0] == "aws" and words[1] != "s3"]
# Actions that IAM knows, which are not the API's names.
S3_ACTIONS = "ListBucket ListBucketMultipartUploads GetObject PutObject DeleteObject"
S3_ACTIONS += " AbortMultipartUpload"


def options(words: list[str]) -> dict[str, list[str]]:
    """The values of each --option of a command."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        elif found:
            values.append(word)
    return found


def pairs(value: str) -> dict[str, Any]:
    """What KEY=VALUE,... says."""
    return dict(pair.split("=", 1) for pair in value.split(","))


def step(of: dict[str, Any]) -> dict[str, Any]:
    """The API's form of a step of the command line."""
    assert of["Type"] == "CUSTOM_JAR"
    rest = {key: of[key] for key in ("Name", "ActionOnFailure")}
    return {**rest, "HadoopJarStep": {key: of[key] for key in ("Jar", "Args")}}


# `aws emr` has options of its own; those of other services are named as in the API.
EMR: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "--name": lambda v: {"Name": v[0]},
    "--release-label": lambda v: {"ReleaseLabel": v[0]},
    "--applications": lambda v: {"Applications": [pairs(of) for of in v]},
    "--log-uri": lambda v: {"LogUri": v[0]},
    "--use-default-roles": lambda v: {"ServiceRole": "EMR_DefaultRole"},
    "--ec2-attributes": lambda v: {
        "Instances": {"Ec2SubnetIds": [pairs(v[0])["SubnetIds"]]}
    },
    "--auto-termination-policy": lambda v: {
        "AutoTerminationPolicy": {key: int(of) for key, of in pairs(v[0]).items()}
    },
    "--bootstrap-actions": lambda v: {
        "BootstrapActions": [{"Name": "", "ScriptBootstrapAction": pairs(v[0])}]
    },
    "--instance-fleets": lambda v: {"Instances": {"InstanceFleets": json.loads(*v)}},
    "--configurations": lambda v: {"Configurations": json.loads(*v)},
    "--cluster-id": lambda v: {"JobFlowId": v[0]},
    "--steps": lambda v: {"Steps": [step(of) for of in json.loads(*v)]},
}
OPERATIONS = {"create-cluster": "RunJobFlow", "add-steps": "AddJobFlowSteps"}


def api_call(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """The shape that an aws command's service wants, and the command's parameters."""
    service, verb = words[1:3]
    model = botocore.session.get_session().get_service_model(service)
    operation = OPERATIONS.get(verb, verb.title().replace("-", ""))
    shape, parameters = model.operation_model(operation).input_shape, {}
    of_option = {
        "--" + re.sub("([A-Z])", r"-\1", name).lower().lstrip("-"): name
        for name in shape.members
    }
    for option, values in options(words).items():
        if verb in OPERATIONS:
            for name, value in EMR[option](values).items():
                both = parameters.get(name, {}) if name == "Instances" else None
                parameters[name] = {**both, **value} if both is not None else value
            continue
        name, (value,) = of_option[option], values
        if shape.members[name].type_name != "string":
            value = json.loads(value) if value[0] in "[{" else pairs(value)
        parameters[name] = value
    for name, member in shape.members.items():
        if member.metadata.get("idempotencyToken"):  # The command makes these up.
            parameters[name] = "0" * 36
    return shape, parameters


def find_wrong(shape: Any, value: Any, at: str = "") -> list[str]:
    """Where a value is none of its shape's enumeration or unlike its pattern; botocore
    leaves both to the service."""
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


@pytest.mark.parametrize("words", AWS, ids=lambda words: " ".join(words[1:3]))
def test_aws_command_is_one_that_the_service_takes(words: list[str]) -> None:
    shape, parameters = api_call(words)
    errors = ParamValidator().validate(parameters, shape)
    assert not errors.has_errors(), errors.generate_report()
    assert find_wrong(shape, parameters) == []


def test_actions_of_policies_are_ones_that_iam_knows() -> None:
    model = botocore.session.get_session().get_service_model("glue")
    on_s3 = {f"s3:{name}" for name in S3_ACTIONS.split()}
    known = on_s3 | {f"glue:{name}" for name in model.operation_names}
    policies = [json.loads(of) for of in blocks("json") if '"Statement"' in of]
    statements = [statement for of in policies for statement in of["Statement"]]
    actions = {action for statement in statements for action in statement["Action"]}
    assert actions >= on_s3
    assert actions - known == set()


def test_flags_and_settings_are_those_of_the_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        etl.parse_settings(["--help"])
    known = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert set(re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)) == known
    lines = [words[2:] for words in COMMANDS if words[:2] == ["python", "etl.py"]]
    runs = [api_call(of)[1] for of in AWS if of[2] == "start-job-run"]
    lines += [of["jobDriver"]["sparkSubmit"]["entryPointArguments"] for of in runs]
    assert len(lines) > 2
    example = (ROOT / "dl.cfg.example").read_text(encoding="utf-8")
    every_key = re.sub(r"^# (?=[A-Z_]+ =)", "", example, flags=re.MULTILINE)
    for text in [*blocks("ini"), example, every_key]:
        (tmp_path / "dl.cfg").write_text(text)
        lines.append([f"--config={tmp_path}/dl.cfg"])
    for flags in lines:
        etl.parse_settings(flags)
    keys = re.findall(r"^([A-Z_]+) =", every_key, re.MULTILINE)
    assert sorted(keys) == sorted(re.findall(r"\b[A-Z_]{5,}\b", str(etl.CONFIG_KEYS)))


def test_sql_runs_in_duckdb_beside_the_samples_lake(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etl.run(etl.parse_settings(["--config", os.devnull, f"--output={tmp_path}/lake"]))
    monkeypatch.chdir(tmp_path)
    queries, db = blocks("sql"), duckdb.connect()
    assert len(queries) >= 4
    for name in etl.TABLES:  # as Athena has them
        db.sql(f"CREATE VIEW {name} AS FROM 'lake/{name}/**/*.parquet'")
    queries += [api_call(of)[1]["QueryString"] for of in AWS if of[1] == "athena"]
    for query in queries:
        rows = db.sql(query).fetchall()
        assert rows, query
        assert all(any(of is not None for of in column) for column in zip(*rows)), query
