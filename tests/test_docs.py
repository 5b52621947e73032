"""The documents stay true: README examples run, links lead somewhere, named files exist."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from xopd.recipes.demo import Row, markdown_table
from xopd_bench.report import short_table

DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# A line of a file tree: indentation, a path, and perhaps two spaces and a remark.
TREE_LINE = re.compile(r"( *)([\w.-]+(?:/[\w.-]+)*/?)(?:\s{2,}.*)?")


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    line: int  # of its first line of text, from 1
    text: str


def read(repository: Path, name: str) -> str:
    path = repository / name
    if not path.exists():
        pytest.fail(f"{name} does not exist; the project promises it")
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    language, start, body = None, 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("```"):
            body.append(line)
        elif language is None:
            language, start, body = line[3:].strip(), number + 1, []
        else:
            found.append(Block(language, start, "\n".join(body) + "\n"))
            language = None
    assert language is None, "a fenced block is not closed"
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tree_paths(text: str) -> list[str]:
    """The paths of a file tree drawn by indentation; [] for a block that is none."""
    found: list[str] = []
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = TREE_LINE.fullmatch(line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        parent = stack[-1][1] if stack else ""
        if indent and not parent:
            continue  # a continued remark
        found.append(parent + name)
        if name.endswith("/"):
            stack.append((indent, parent + name))
    return found if any(name.endswith("/") for name in found) else []


def test_readme_examples_run(repository: Path) -> None:
    examples = [b for b in blocks(read(repository, "README.md")) if b.language == "python"]
    assert examples, "README.md shows no Python example"
    names: dict[str, object] = {"__name__": "readme"}
    for block in examples:
        where = f"README.md:{block.line}"
        if ">>>" in block.text:
            test = doctest.DocTestParser().get_doctest(block.text, names, where, where, block.line)
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
                test, clear_globs=False
            )
            assert result.failed == 0, where
            names.update(test.globs)
        else:
            exec(compile("\n" * (block.line - 1) + block.text, "README.md", "exec"), names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(repository: Path, document: str) -> None:
    lost = []
    for target in LINK.findall(without_blocks(read(repository, document))):
        if target.startswith(("https://", "mailto:", "#")):
            continue
        if not (repository / document).parent.joinpath(target.partition("#")[0]).exists():
            lost.append(target)
    assert not lost, f"{document} links to {lost}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(repository: Path, document: str) -> None:
    """Inline code that starts with a folder of the repository, and every file tree."""
    text = read(repository, document)
    folders = {path.name for path in repository.iterdir() if path.is_dir()} - {"runs"}
    named = [
        code
        for code in INLINE_CODE.findall(without_blocks(text))
        if "/" in code and re.fullmatch(r"[\w./-]+", code) and code.split("/")[0] in folders
    ]
    for block in blocks(text):
        if block.language in ("", "text"):
            named += tree_paths(block.text)
    lost = [name for name in named if not (repository / name).exists()]
    assert not lost, f"{document} names {lost}"


@pytest.mark.parametrize("module", ["linear_logprob", "linear_policy_loss"])
def test_docstring_examples_run(module: str) -> None:
    import xopd_kernels

    function = getattr(xopd_kernels, module)
    tests = doctest.DocTestFinder().find(function, module, globs={})
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).attempted > 0
    assert runner.summarize(verbose=False).failed == 0


def test_a_tree_is_read() -> None:
    text = "pkg/       what\n  a.py     one\n           goes on\n  sub/\n    b.py\nREADME.md\n"
    assert tree_paths(text) == ["pkg/", "pkg/a.py", "pkg/sub/", "pkg/sub/b.py", "README.md"]
    assert tree_paths("$ make demo\nok\n") == []


def test_the_demo_table_is_the_measured_one(repository: Path) -> None:
    """The README's figures come from the summary that the demo wrote, digit by digit."""
    summary = json.loads(read(repository, "docs/demo/summary.json"))
    rows = [Row(**row) for row in summary["rows"]]
    assert len(summary["seeds"]) >= 3
    assert markdown_table(rows) in read(repository, "README.md")


@pytest.mark.parametrize(
    ("results", "page"),
    [
        ("cpu_512x1024x32000", "README.md"),
        ("cpu_1024x2048x151936", "benchmarks/README.md"),
        ("cpu_256x3584x152064", "benchmarks/README.md"),
        ("cpu_fp32_1024x2048x151936", "benchmarks/README.md"),
        ("cpu_fp32_256x3584x152064", "benchmarks/README.md"),
        ("cpu_avx2_256x3584x152064", "benchmarks/README.md"),
    ],
)
def test_a_cpu_table_is_the_measured_one(repository: Path, results: str, page: str) -> None:
    """Figures on a page come from the file that the benchmark wrote, and its command is there."""
    text = read(repository, f"benchmarks/results/{results}.jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    shown = read(repository, page)
    assert short_table([line for line in lines if line["distribution"] == "random"]) in shown
    (commit,) = {line["commit"] for line in lines}
    # The paragraph that names the commit has the commands too.
    (said, *_) = (x.replace("\n", " ") for x in shown.split("\n\n") if f"commit {commit}" in x)
    commands = INLINE_CODE.findall(said)
    for limit_s in {line["limit_s"] for line in lines}:
        wanted = (results.rsplit("_", 1)[1], f"--limit-s {limit_s:g} ")
        assert any(all(x in command for x in wanted) for command in commands)
