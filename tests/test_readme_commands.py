"""README's aws commands, held against botocore's models of the services; no network."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, Callable

import botocore.session
import duckdb
import pytest
from botocore.validate import ParamValidator
from conftest import ROOT

import etl

README = (ROOT / "README.md").read_text(encoding="utf-8")
# A line that goes on with a command begins with a space or a bracket.
COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for command in re.findall(r"^aws .*(?:\n(?![a-z]).*)*", block, re.MULTILINE)
]
NAMES = [" ".join(words[1:3]) for words in COMMANDS]


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
    of = dict(of)
    assert of.pop("Type") == "CUSTOM_JAR"
    jar = {key: of.pop(key) for key in ("Jar", "Args")}
    return {**of, "HadoopJarStep": jar}


def steps(values: list[str]) -> dict[str, Any]:
    return {"Steps": [step(of) for of in json.loads(*values)]}


# `aws emr` has options of its own; those of other services are named as in the API.
EMR: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "--name": lambda v: {"Name": v[0]},
    "--release-label": lambda v: {"ReleaseLabel": v[0]},
    "--applications": lambda v: {"Applications": [pairs(of) for of in v]},
    "--log-uri": lambda v: {"LogUri": v[0]},
    "--use-default-roles": lambda v: {
        "ServiceRole": "EMR_DefaultRole",
        "JobFlowRole": "EMR_EC2_DefaultRole",
    },
    "--ec2-attributes": lambda v: {
        "Instances": {"Ec2SubnetIds": [pairs(v[0])["SubnetIds"]]}
    },
    "--auto-termination-policy": lambda v: {
        "AutoTerminationPolicy": {key: int(of) for key, of in pairs(v[0]).items()}
    },
    "--bootstrap-actions": lambda v: {
        "BootstrapActions": [
            {"Name": "Bootstrap action", "ScriptBootstrapAction": pairs(of)} for of in v
        ]
    },
    "--instance-fleets": lambda v: {"Instances": {"InstanceFleets": json.loads(*v)}},
    "--configurations": lambda v: {"Configurations": json.loads(*v)},
    "--cluster-id": lambda v: {"JobFlowId": v[0]},
    "--steps": steps,
}
OPERATIONS = {"create-cluster": "RunJobFlow", "add-steps": "AddJobFlowSteps"}


def api_call(words: list[str]) -> tuple[str, str, dict[str, Any]]:
    """The service, the operation and the parameters of an aws command."""
    service, verb = words[1:3]
    model = botocore.session.get_session().get_service_model(service)
    if verb in OPERATIONS:
        parameters: dict[str, Any] = {}
        for option, values in options(words).items():
            for name, value in EMR[option](values).items():
                if name == "Instances":
                    value = {**parameters.get(name, {}), **value}
                parameters[name] = value
        return service, OPERATIONS[verb], parameters
    operation = verb.title().replace("-", "")
    members = model.operation_model(operation).input_shape.members
    by_option = {
        "--" + re.sub("([A-Z])", r"-\1", name).lower().lstrip("-"): name
        for name in members
    }
    parameters = {}
    for option, values in options(words).items():
        name, (value,) = by_option[option], values
        if members[name].type_name != "string":
            value = json.loads(value) if value[0] in "[{" else pairs(value)
        parameters[name] = value
    tokens = [
        name for name, of in members.items() if of.metadata.get("idempotencyToken")
    ]
    # The aws command makes these up.
    parameters.update(dict.fromkeys(tokens, "0" * 36))
    return service, operation, parameters


def test_readme_has_the_commands_that_are_checked() -> None:
    assert set(NAMES) == {
        "athena start-query-execution",
        "emr create-cluster",
        "emr add-steps",
        "emr-serverless create-application",
        "emr-serverless start-job-run",
        "s3 cp",
    }
    assert NAMES.count("emr add-steps") == 2


@pytest.mark.parametrize(
    "words", [of for of in COMMANDS if of[1] != "s3"], ids=lambda of: of[2]
)
def test_command_is_one_that_the_service_takes(words: list[str]) -> None:
    service, operation, parameters = api_call(words)
    model = botocore.session.get_session().get_service_model(service)
    shape = model.operation_model(operation).input_shape
    errors = ParamValidator().validate(parameters, shape)
    assert not errors.has_errors(), errors.generate_report()
    assert find_wrong(shape, parameters) == []


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
        allowed = shape.metadata.get("enum", [value])
        pattern = shape.metadata.get("pattern")
        # Java's classes of characters, as of any text, are not Python's.
        is_java = pattern and re.search(r"\\u|\\p", pattern)
        if pattern and not is_java and not re.fullmatch(pattern, str(value)):
            return [f"{at}: {value} is unlike {pattern}"]
        return [] if value in allowed else [f"{at}: {value} is not of {allowed}"]
    return [e for of, part, name in inner for e in find_wrong(of, part, f"{at}/{name}")]


def test_emr_is_one_whose_spark_and_s3_dist_cp_are_there() -> None:
    (cluster,) = (api_call(of)[2] for of in COMMANDS if of[2] == "create-cluster")
    assert {of["Name"] for of in cluster["Applications"]} == {"Hadoop", "Spark"}
    fleets = cluster["Instances"]["InstanceFleets"]
    assert [of["InstanceFleetType"] for of in fleets] == ["MASTER", "CORE"]
    assert {of["Classification"] for of in cluster["Configurations"]} == {
        "spark",
        "spark-defaults",
        "spark-hive-site",
    }
    (application,) = (
        api_call(of)[2] for of in COMMANDS if of[2] == "create-application"
    )
    assert application["releaseLabel"] == cluster["ReleaseLabel"]
    assert re.fullmatch(r"emr-7\.\d+\.0", cluster["ReleaseLabel"])


def test_packed_song_files_are_json_files_to_the_job() -> None:
    (group_by,) = (
        arg.partition("=")[2]
        for words in COMMANDS
        if words[2] == "add-steps"
        for of in api_call(words)[2]["Steps"]
        for arg in of["HadoopJarStep"]["Args"]
        if arg.startswith("--groupBy=")
    )
    path = "s3://my-bucket/sparkify/song_data/A/B/C/TRABC.json"
    stem, suffix = re.fullmatch(group_by, path).groups()
    assert (stem, suffix) == ("A", ".json")
    assert etl.JSON_FILE.fullmatch(
        f"{stem}0{suffix}"
    )  # as s3-dist-cp numbers its files
    assert not re.fullmatch(group_by, "s3://my-bucket/sparkify/song_data/A/B/x.json.gz")


def job_flags() -> list[list[str]]:
    """The flags that README's commands on EMR pass to the job."""
    found = []
    for words in COMMANDS:
        if words[2] == "start-job-run":
            found.append(api_call(words)[2]["jobDriver"]["sparkSubmit"])
    flags = [of["entryPointArguments"] for of in found]
    (config,) = re.findall(r"```ini\n(\[LAKE\].*?)```", README, re.DOTALL)
    values = re.findall(r"^(\w+) = (.*)$", config, re.MULTILINE)
    return [*flags, [f"--{k.lower()}={v}" for k, v in values]]


@pytest.mark.parametrize("flags", job_flags(), ids=["serverless", "dl.cfg"])
def test_flags_of_the_job_are_ones_that_it_has(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl, "EMR_FILES", str(ROOT))  # as if it were on EMR
    settings = etl.parse_settings(["--config=/dev/null", *flags])
    assert settings.input == "s3://my-bucket/sparkify"
    assert settings.output == "s3://my-other-bucket/lake"
    assert settings.catalog == "sparkify"


def test_rights_in_the_catalog_section_are_those_of_the_calls() -> None:
    blocks = re.findall(r"```json\n(\{\n.*?)```", README, re.DOTALL)
    policies = [json.loads(of) for of in blocks if "glue:" in of]
    (statement,) = policies[0]["Statement"]
    source = (ROOT / "etl.py").read_text(encoding="utf-8")
    section = source.partition("# --- Catalog")[2].partition("# --- Report")[0]
    calls = set(re.findall(r"glue\.(\w+_(?:database|table|partitions))", section))
    calls |= {f"batch_{change}_partition" for change in etl.GLUE_BATCHES}
    used = {"glue:" + call.title().replace("_", "") for call in calls}
    assert set(statement["Action"]) == used


def test_query_for_athena_is_one_of_these_tables() -> None:
    (words,) = (of for of in COMMANDS if of[1] == "athena")
    query = api_call(words)[2]["QueryString"]
    db = duckdb.connect()
    db.sql("CREATE TABLE songplays (song_id VARCHAR, year INT, month INT)")
    db.sql("CREATE TABLE songs (song_id VARCHAR, title VARCHAR, year INT)")
    db.sql("INSERT INTO songs VALUES ('S1', 'Low Tide', 2009), ('S2', 'High', 0)")
    db.sql(
        "INSERT INTO songplays VALUES ('S2', 2018, 11), ('S1', 2018, 11), "
        "('S1', 2018, 11), ('S1', 2018, 12)"
    )
    assert db.sql(query).fetchall() == [("Low Tide", 2), ("High", 1)]
