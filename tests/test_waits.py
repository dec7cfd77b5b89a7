"""The waits that docs/reliability.md lists: their bounds are the code's, and nothing else waits without one."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtc.client import Client, Retry
from mtc.config import load_preset
from serve.contract import Settings
from serve.deployments import Control, Server

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text().partition("## Waiting\n")[2].partition("\n## ")[0]
BOUNDED, UNBOUNDED = (
    [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in table.partition("| --- |\n")[2].splitlines()
        if line.startswith("| ")
    ]
    for table in PAGE.split("| Without a bound")
)
CALLS = {"ray.get", "ray.wait", "subprocess.run", "httpx.get", "httpx.post", "httpx.request"}
METHODS = {"wait", "join", "result", "acquire", "get", "communicate"}


FOREIGN = ("RAY_", "Ray Train's ", "Serve's ", "Hugging Face's ", "fixed")
"""How the settings of others begin, and what is none."""


def value(setting: str) -> float:
    """What the code has for a setting of ours."""
    if setting.startswith("cluster.") and setting.count(".") == 1:
        return float(getattr(load_preset("tiny").cluster, setting.removeprefix("cluster.")))
    if setting in Settings.model_fields:
        return float(Settings.model_fields[setting].default)
    if setting == "health_check_timeout_s":
        (found,) = {each._deployment_config.health_check_timeout_s for each in (Control, Server)}
        return float(found)
    if setting == "Retry.deadline_s":
        return Retry().deadline_s
    if setting == "Client(timeout=)":
        return float(inspect.signature(Client).parameters["timeout"].default)
    module, _, name = setting.rpartition(".")
    return float(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("row", BOUNDED, ids=[row[0][:40] for row in BOUNDED])
def test_a_bound_is_the_codes(row: list[str]) -> None:
    _, bounds, settings, then = row
    assert then
    for bound, setting in zip(bounds.split(", "), settings.split(", "), strict=True):
        if not setting.strip("`").startswith(FOREIGN):
            assert value(setting.strip("`")) == float(bound), setting


def waits_without_bound() -> Iterator[str]:
    for package in ("mtc", "cluster", "jobs", "serve"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and not {"timeout", "timeout_s"} & {k.arg for k in node.keywords}:
                    name = ast.unparse(node.func)
                    method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.args
                    if name in CALLS or method:
                        yield str(file.relative_to(ROOT))


def test_no_other_wait_is_without_a_bound() -> None:
    allowed = {file for row in UNBOUNDED for file in re.findall(r"`([^`]+\.py)`", row[1])}
    found = set(waits_without_bound())
    assert len(BOUNDED) > 20 and found
    assert found - allowed == set()
    assert allowed - found == {"serve/app.py"}, "which sleeps"
