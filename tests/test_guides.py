"""The guides that list names of code: messages, fields of SAELens and ours, each against the code."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from mtc.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of all rows of the page's tables but their heads."""
    lines = (DOCS / page).read_text().splitlines()
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [cells for cells in found if not set(cells[0]) <= {"-", " "}]


def nodes() -> list[ast.AST]:
    files = (file for package in ("mtc", "cluster", "jobs", "serve") for file in (ROOT / package).rglob("*.py"))
    return [node for file in files for node in ast.walk(ast.parse(file.read_text()))]


def text_of(node: ast.AST) -> str | None:
    """A string of the code, what is put into it as `…`."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def patterns() -> dict[str, re.Pattern[str]]:
    """What the page quotes, as patterns in which `…` is anything."""
    quoted = [cells[0].strip("` ") for cells in rows("troubleshooting.md") if "`" in cells[0]]
    assert len(set(quoted)) == len(quoted)
    parts = {words: [part.strip() for part in words.split("…") if part.strip()] for words in quoted}
    return {words: re.compile(".*".join(map(re.escape, some)), re.DOTALL) for words, some in parts.items()}


def test_quoted_messages_are_still_those_of_the_code() -> None:
    known = [text for node in nodes() if (text := text_of(node)) is not None]
    for words, pattern in patterns().items():
        assert any(pattern.search(message) for message in known), words


def test_every_error_that_users_meet_has_a_row() -> None:
    """Those of MtcError's kinds with words of their own: not what only passes on what somebody else says."""
    found, known = nodes(), patterns().values()
    kinds = {"MtcError", "QuickstartError", "KeyFileError"}
    classes = [node for node in found if isinstance(node, ast.ClassDef)]
    while more := {c.name for c in classes if kinds & {ast.unparse(base) for base in c.bases}} - kinds:
        kinds |= more
    raised = [
        text
        for node in found
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        if ast.unparse(node.exc.func) in kinds and (text := text_of(node.exc.args[0])) is not None
    ]
    told = [text for text in raised if len(re.findall(r"(?<![\w.=])[a-z]{2,}(?![\w.=])", text)) > 2]
    assert len(told) > 200
    assert [text for text in told if not any(pattern.search(text) for pattern in known)] == []


@pytest.mark.parametrize(("head", "names"), [
    ("## The run", ["LanguageModelSAERunnerConfig"]),
    ("## The dictionary", ["MatryoshkaBatchTopKTrainingSAEConfig", "TranscoderConfig", "JumpReLUTrainingSAEConfig"]),
])  # fmt: skip
def test_all_fields_of_saelens_have_a_row_and_ours_exist(head: str, names: list[str]) -> None:
    import sae_lens

    text = (DOCS / "coming-from-saelens.md").read_text().split(f"{head}\n")[1].split("\n## ")[0]
    pairs = re.findall(r"^\| `(\w+)` \| (?:`([\w.]+)`|-) \|", text, re.MULTILINE)
    theirs = {field.name for name in names for field in dataclasses.fields(getattr(sae_lens, name))}
    assert {left for left, _ in pairs} == theirs and len(pairs) == len(theirs)
    for _, ours in pairs:
        part, _, field = ours.partition(".")
        assert not ours or field in RunConfig.model_fields[part].annotation.model_fields, ours  # type: ignore[union-attr]


def test_the_glossary_is_in_order() -> None:
    terms = re.findall(r"^\*\*(.+)\.\*\*", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 30 and terms == sorted(terms, key=str.casefold)
