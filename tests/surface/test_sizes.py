"""The promise that every file can be read in one sitting, and that one idea has one name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("tropd", "tests") for path in (ROOT / top).rglob("*.py"))
LARGEST = {ast.FunctionDef: 80, ast.AsyncFunctionDef: 80, ast.ClassDef: 200}
FILE_LINES = 300
BANNED_MODULES = {"utils", "helpers", "manager", "handler", "core"}
BANNED_WORD = re.compile(r"(?:^|_)(?:logps?|log_probs?|lps?|topk_num|num_logits|coefs?)(?:_|$)")
# torch names its operation `topk`; a tensor may say whose top-k it holds if it also says its axes.
SUFFIXED_TOP_K = re.compile(r"_[NSTBKJV]+$")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def too_large(path: Path, tree: ast.Module) -> Iterator[str]:
    name = path.relative_to(ROOT)
    lines = len(path.read_text().splitlines())
    if lines > FILE_LINES:
        yield f"{name}: {lines} lines, at most {FILE_LINES}"
    for node in ast.walk(tree):
        limit = LARGEST.get(type(node))
        if limit is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > limit:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {limit}"


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names that are introduced here: what other libraries call their own is theirs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def is_banned(identifier: str) -> bool:
    has_top_k = re.search(r"(?:^|_)topk(?:_|$)", identifier) and not SUFFIXED_TOP_K.search(identifier)
    return bool(BANNED_WORD.search(identifier) or has_top_k)


def test_every_file_function_and_class_is_small() -> None:
    assert SOURCES
    offenders = [line for path in SOURCES for line in too_large(path, parse(path))]
    assert not offenders, "\n".join(["too large to read:", *offenders])


def test_one_idea_has_one_name() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for line, name in identifiers(parse(path))
        if is_banned(name)
    ]
    offenders += [str(path.relative_to(ROOT)) for path in SOURCES if path.stem in BANNED_MODULES]
    assert not offenders, "\n".join(["banned names (CONTRIBUTING.md, Names):", *offenders])


@pytest.mark.parametrize("name", ["logps", "old_logp", "lp", "log_probs_N", "topk", "teacher_topk", "topk_num"])
def test_a_banned_name_is_found(name: str) -> None:
    assert is_banned(name)


@pytest.mark.parametrize("name", ["logprobs_N", "top_k", "teacher_topk_ids_NK", "topk_logprobs_TK", "help", "alpha"])
def test_a_good_name_is_left_alone(name: str) -> None:
    assert not is_banned(name)


def test_an_oversized_function_is_found() -> None:
    source = "def long():\n" + "    pass\n" * 80
    assert [line.split(": ")[1] for line in too_large(ROOT / "tests" / "tiny.py", ast.parse(source))] == [
        "long has 81 lines, at most 80"
    ]
