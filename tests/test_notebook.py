"""README's notebook, executed in a Jupyter kernel whose session the job finds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import QUICK_SPARK, ROOT
from nbclient import NotebookClient
from test_readme import README

SECTION = README[README.index("## Notebook") : README.index("## Queries")]
START, RUN = re.findall(r"(?ms)^```python\n(.*?)^```$", SECTION)
(ON_EMR,) = re.findall(r"`(sc\..+?)`", SECTION)
# What a caller has; of its views all but README's.
STATE = """sc.appName, {row.key: row.value for row in spark.sql("SET").collect()}, \\
    [of.name for of in spark.catalog.listTables() if of.name != "songplays"], \\
    dict(sc._jsc.hadoopConfiguration().getPropsWithPrefix("")), \\
    [signal.getsignal(number) for number in (2, 15)]"""
MINE = f"""
import signal
spark.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
spark.range(3).createOrReplaceTempView("mine")
before = {STATE}
"""


def test_notebook_runs_the_job_on_its_session_which_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "data_sample", tmp_path / "data_sample")
    (tmp_path / "dl.cfg").write_text("[LAKE]\nINPUT = data_sample\n")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", QUICK_SPARK)
    ready = f"{START}sc = spark.sparkContext\n{ON_EMR}"
    ready = ready.replace("s3://my-bucket/code", str(ROOT))
    found = f"after = {STATE}\n[of for of in zip(before, after) if of[0] != of[1]]"
    cells = [ready, MINE, RUN, found, "report['tables']['songplays']", "etl.main()"]
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=made)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=where).execute()
    _, _, ran, changed, plays, code = (
        "".join(of.get("text") or of["data"]["text/plain"] for of in cell.outputs)
        for cell in notebook.cells
    )
    rows = re.findall(r"\| *(\w+)\| *(\d+)\|", ran)
    assert f"This shows {', '.join(map(' '.join, sorted(rows)))}." in SECTION
    assert "5/5 Publish" in ran
    assert (changed, plays) == ("[]", "744")
    assert "Nothing is new" in code and code.endswith("0")
