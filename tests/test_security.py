"""No file of the repository runs code from data: pickles, eval, shells, unsafe YAML."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.save", "numpy.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
}
BANNED_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}

# File and call that may stay, each with its reason.
ALLOWED = {
    ("tests/test_docs.py", "exec"): "runs the README's own examples",
    ("xopd/vllm/server.py", "torch.save"): "vLLM's route takes embeddings in no other form",
    ("tests/test_docs.py", "compile"): "gives those examples a file name in tracebacks",
}


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every banned construct in one Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in BANNED_MODULES:
                yield node.lineno, name
        if not isinstance(node, ast.Call):
            continue
        if (called := dotted(node.func)) in BANNED_CALLS:
            yield node.lineno, called
        for keyword in node.keywords:
            value = keyword.value
            is_true = isinstance(value, ast.Constant) and value.value is True
            if keyword.arg in BANNED_KEYWORDS and is_true:
                yield node.lineno, f"{keyword.arg}=True"


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def test_no_banned_construct(repository: Path) -> None:
    folders = ("xopd", "xopd_bench", "xopd_kernels", "benchmarks", "tests", "csrc")
    files = sorted(p for folder in folders for p in (repository / folder).rglob("*.py"))
    assert len(files) > 50
    found = []
    for path in files:
        name = path.relative_to(repository).as_posix()
        for line, what in findings(path.read_text(encoding="utf-8")):
            if (name, what) not in ALLOWED:
                found.append(f"{name}:{line}: {what}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import torch; torch.load('x')",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "eval('1')",
        "import os; os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_search_finds_each_of_them(source: str) -> None:
    assert list(findings(source))


def test_the_search_lets_safe_neighbours_pass() -> None:
    source = "yaml.safe_load(t); model.eval(); re.compile('x'); f(trust_remote_code=flag, shell=0)"
    assert not list(findings(source))
