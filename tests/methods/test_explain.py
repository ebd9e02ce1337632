"""What is shown about a method is read off the method, and the generated page is up to date."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from tropd.config.stages import RolloutConfig
from tropd.errors import ConfigError
from tropd.methods import METHODS, TrOPD
from tropd.methods.describe import EVIDENCE, OVER, describe
from tropd.methods.explain import explain, explain_as_data, methods, methods_as_data, page
from tropd.methods.extras import EXTRAS
from tropd.methods.ideas import IDEAS
from tropd.methods.knobs import field_docstrings
from tropd.methods.policies import TeacherPrefix
from tropd.methods.stacked import POLICIES
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.objective.terms import Over
from tropd.servers.dialects import DIALECTS
from tropd.teachers.chat import ChatTeacher

ROOT = Path(__file__).parents[2]


def shown(picture, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(picture)
    return out.getvalue()


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_defines_a_method_is_shown(name):
    cls, text = METHODS[name], " ".join(shown(explain(name), width=1000).split())
    for line in cls.__doc__.splitlines():
        assert " ".join(line.split()) in text
    for term in cls().objective.terms:
        assert str(term.where) in text and str(term.loss) in text
    for knob in dataclasses.fields(cls):
        assert knob.name in ("name", "plus") or knob.name in text
    for meaning in field_docstrings(cls).values():
        assert meaning in text
    for reading in cls.readings:
        assert reading in text
    assert describe(name).paper in text


@pytest.mark.parametrize("name", METHODS)
def test_a_definition_fits_a_terminal_of_80_columns(name):
    """76: the frame that `tropd train RUN.toml --help` draws takes four."""
    definition = describe(name).definition.splitlines()
    assert max(map(len, definition)) <= 76
    lines = [line.strip() for line in shown(explain(name), width=80).splitlines()]
    assert [line.strip() for line in definition] == lines[2 : 2 + len(definition)]


@pytest.mark.parametrize("name", METHODS)
def test_the_evidence_shown_is_the_evidence_needed(name):
    assert {e.name for e in describe(name).evidence} == {n.name for n in METHODS[name]().needs}


def test_every_kind_of_evidence_that_a_method_reads_and_every_denominator_has_words():
    assert {need for cls in METHODS.values() for need in cls().needs} <= set(EVIDENCE) <= set(Needs)
    assert set(OVER) == set(get_args(Over))


def test_no_server_is_promised_where_none_can_do_it():
    assert describe("tip").teacher.startswith("A teacher in this process: no server gives FULL or REVERSE_KL.")
    assert describe("eopd").teacher.startswith("A teacher in this process: no server gives TEACHER_ENTROPY.")
    assert describe("many_faces").teacher.startswith("A teacher in this process: no server gives STUDENT_TOPK.")
    assert describe("opd").teacher == "A teacher in this process, or a server that can do what is named above."
    assert describe("seqkd").teacher.startswith("The teacher is never asked for a probability. It also writes text")


def test_the_server_that_is_promised_for_some_evidence_is_one_that_gives_it():
    """What `tropd explain` says of servers is what the clients of servers say of themselves."""
    offered = reduce(Needs.__or__, (dialect.capabilities for dialect in DIALECTS.values()), ChatTeacher.capabilities)
    for need in OF_TEACHER & ~Needs.HIDDEN:
        if need in EVIDENCE:
            assert EVIDENCE[need][1].startswith("no server") == (need not in offered), need.name


def test_what_differs_from_the_paper_in_a_runs_defaults_is_said():
    run = RolloutConfig()
    text = shown(explain("tropd"), width=1000)
    assert f"defaults, {run.num_prompts} and {run.max_new_tokens}, suit" in text
    assert "rollout.num_prompts = 128 and rollout.max_new_tokens = 8096" in text
    for knob in ("num_prompts", "max_new_tokens"):
        assert "TrOPD: " in field_docstrings(RolloutConfig)[knob]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lsm", "masks the first occurrence of each special id"),
        ("tropd_aopd", "guide_outliers = false counts it once"),
        ("minillm", "own_reward = 'twice'"),
        ("opd", "reward_logprobs = 'sampler' is Tinker's"),
        ("eopd", "The clip does nothing in the first update"),
        ("eopd", "optimizer.num_updates = 4"),
    ],
)
def test_where_code_and_paper_differ_the_reading_is_said(name, words):
    assert words in shown(explain(name), width=1000)


def test_choices_and_defaults_are_those_of_the_field():
    knobs = {k.name: k for k in describe("tropd").knobs}
    assert (knobs["trust"].default, knobs["trust"].choices) == ("bernoulli", "bernoulli | threshold | soft")
    assert (knobs["prefix"].default, knobs["prefix"].choices) == ("cosine 1 -> 0", "Schedule")
    assert (knobs["beta"].default, knobs["beta"].choices) == ("0.001", "number")
    assert {k.name: k.choices for k in describe("reopold").knobs}["floor"] == "number | none"
    assert {k.name: k.choices for k in describe("lsm").knobs}["special_ids"] == "list of integer"


def test_the_rollout_policy_is_said_with_its_own_numbers():
    assert "50% of the responses" in TeacherPrefix(share=0.5).description
    assert "cosine 1 -> 0" in TrOPD().rollout.description
    assert describe("lsm").rollout.endswith("Drawn with top_p 0.9.")
    assert "probability 0.5" in describe("gkd").rollout


def test_the_data_survive_json():
    for one in methods_as_data():
        assert json.loads(json.dumps(one))["name"] == one["name"]
    assert explain_as_data("opd")["terms"][0]["loss"] == "PolicyGradient(LogRatio)"


def test_the_list_of_methods_names_each_once_below_its_idea():
    listed = shown(methods(), width=400)
    lines = [line.split() for line in listed.splitlines()]
    named = {idea: [name for name, cls in METHODS.items() if cls.idea == idea] for idea in IDEAS}
    assert [words[0] for words in lines if words and words[0] in METHODS] == [
        x for names in named.values() for x in names
    ]
    headings = [line for line in listed.splitlines() if line.lower() in IDEAS]
    assert headings == [idea.capitalize() for idea in IDEAS if named[idea]]
    extras = [name for idea in IDEAS for name, cls in EXTRAS.items() if cls.idea == idea]
    assert [words[1] for words in lines if words[:1] == ["+"] and words[2] == "extra"] == extras
    assert {words[1] for words in lines if words[:1] == ["+"] and words[2] == "policy"} == set(POLICIES)


@pytest.mark.parametrize("name", [*EXTRAS, *POLICIES])
def test_an_extra_and_a_policy_explain_themselves(name):
    text = " ".join(shown(explain(name), width=1000).split())
    tables: Any = (EXTRAS, POLICIES)
    for cls in (table[name] for table in tables if name in table):
        assert " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split()) in text
        for knob in dataclasses.fields(cls):
            assert knob.name == "name" or knob.name in text
        for meaning in field_docstrings(cls).values():
            assert meaning in text
    assert name in METHODS or explain_as_data(name)["kind"] in ("extra", "policy")


def test_an_extra_and_a_policy_of_ones_own_explain_themselves(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom tropd import RolloutPolicy\n"
        "from tropd.methods.extras import Choose\n\n"
        '@dataclass(frozen=True, kw_only=True)\nclass Few(Choose):\n    """Few tokens."""\n    few: int = 3\n\n'
        '@dataclass(frozen=True, kw_only=True)\nclass Late(RolloutPolicy):\n    """Late at night."""\n'
    )
    few, late = (shown(explain(f"{tmp_path}/mine.py:{name}"), width=1000) for name in ("Few", "Late"))
    assert "Few tokens." in few and "few" in few and "[[method.plus]]" in few
    assert "Late at night." in late and "[[rollout.plus]]" in late


def test_a_method_and_an_extra_of_one_name_are_explained_together():
    both = [name for name in METHODS if name in EXTRAS]
    for name in both:
        text = " ".join(shown(explain(name), width=1000).split())
        assert METHODS[name].__name__ in text and EXTRAS[name].__name__ in text and "[[method.plus]]" in text
        assert [d["kind"] for d in explain_as_data(name)["also"]] == ["extra"]
    assert "gndpo" in both


def test_a_near_miss_of_an_extra_is_named():
    with pytest.raises(ConfigError, match="Did you mean 'random_mask'"):
        explain("random_maks")


def test_the_page_lists_every_name_below_its_idea_with_a_link_to_its_chapter():
    text = page()
    anchors = {re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-") for line in re.findall("^## .*$", text, re.M)}
    linked = re.findall(r"^\| (?:\+ )?\[`(\w+)`\]\(#([\w-]+)\)", text, re.M)
    assert sorted(name for name, _ in linked) == sorted([*METHODS, *EXTRAS, *POLICIES])
    assert {anchor for _, anchor in linked} <= anchors


def test_the_page_of_methods_is_up_to_date():
    written = (ROOT / "docs" / "methods.md").read_text()
    assert written == page(), "run: python -m tropd.methods.explain > docs/methods.md"
