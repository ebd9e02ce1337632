"""Rollouts as their readers read them, where a reader is told more than the student.

The response stays as it is, token by token; another prompt stands before it.  What a briefing can say before the run is
rendered when prompts are loaded, and what cannot be told is refused with the number of its row.  What it says of
responses is rendered when they are scored.  A response that a reader cannot be told of, or cannot read whole, is not
read by it: nothing is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

from tropd.base.reading import nearest
from tropd.briefings.asked import Asked, Briefing, Facts, Messages, Response
from tropd.briefings.briefing import AsStudent, OwnBriefing
from tropd.briefings.demonstrations import WithDemonstrations
from tropd.config.run import Run
from tropd.data.examples import Shelves
from tropd.data.listener import Candidate, Listener
from tropd.data.rows import Row, Table
from tropd.errors import ConfigError, DataError
from tropd.types import READER, Message, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("tropd.data")
Group = dict[str, Response]
"""The responses to one prompt by the ids of their rollouts, in order."""
_PEER = Response(text="...", reward=1.0, words="...")
"""Stands for a response where none is written yet."""


class Briefer:
    """What every reader of a run reads."""

    def __init__(
        self,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        teachers: Mapping[str, Candidate],
        readers: Mapping[str, Candidate] | None = None,
    ) -> None:
        """`tokenizer` is the student's; `teachers` are those that prompts choose among, `readers` all others."""
        self.data, self.tokenizer, self.max_new_tokens = run.data, tokenizer, run.rollout.max_new_tokens
        self._teachers = self._told(teachers, _teacher, teaches=True)
        self._readers = self._told(readers or {}, _reader, teaches=False)
        self._tried: set[str] = set()
        self._said: set[tuple[str, str]] = set()
        self._shelves = Shelves()

    def _told(self, readers: Mapping[str, Candidate], said: Callable[[str], str], teaches: bool) -> dict[str, Listener]:
        found: dict[str, Listener] = {}
        for name, reader in readers.items():
            briefing = imported(reader.config.briefing)
            if isinstance(briefing, AsStudent) and not reader.config.bridge:
                continue
            found[name] = Listener(
                said=said(name),
                section=_section(name, teaches),
                briefing=briefing,
                teaches=teaches,
                tokenizer=_tokenizer_of(reader) or self.tokenizer,
                bridged=reader.config.bridge is not None,
                student=self.tokenizer,
                kwargs=self.data.chat_template_kwargs,
                context=reader.context,
            )
        return found

    @property
    def _everyone(self) -> tuple[Listener, ...]:
        return (*self._teachers.values(), *self._readers.values())

    @property
    def told(self) -> tuple[str, ...]:
        """The readers that are told something."""
        return (*([READER] if self._teachers else []), *self._readers)

    @property
    def compares(self) -> bool:
        """Whether somebody is told of other responses to the same prompt."""
        return any(Facts.GROUP in listener.briefing.needs for listener in self._everyone)

    def needs(self, reader: str) -> Facts:
        """What has to be known of responses before the reader can be told of them."""
        told = self._teachers.values() if reader == READER else filter(None, [self._readers.get(reader)])
        return reduce(Facts.__or__, (listener.briefing.needs for listener in told), Facts.NOTHING)

    def check(self, table: Table, uses_template: bool) -> None:
        """Refuse a data set that lacks a column, and text without turns for what needs them."""
        for listener in self._everyone:
            for column in listener.briefing.columns:
                if column not in table.columns:
                    has = f"{nearest(column, table.columns)}; it has {', '.join(table.columns)}"
                    raise DataError(
                        f"{listener.said} is told what stands in column '{column}', but {table.source} has none"
                        f"{has}. Set briefing.column in {listener.section}."
                    )
            if isinstance(listener.briefing, WithDemonstrations):
                if listener.briefing.source is None and self.data.streaming:
                    raise ConfigError(
                        f"{listener.said} is told examples from the data set of the run, but data.streaming reads it "
                        "row by row. Name a file in briefing.source."
                    )
                self._shelves.fetch(listener.briefing, table)
            if listener.briefing.needs_template and not uses_template:
                raise ConfigError(
                    f"{listener.said} is told a turn of a conversation, but prompts are encoded without a chat "
                    "template. Use a tokenizer with one and data.apply_chat_template = true, or leave the briefing out."
                )

    def brief(self, prompt: Prompt, row: Row, text: str, number: int) -> Prompt:
        """The prompt with what its readers read, as far as that is known; `text` is that of a prompt without turns."""
        asked = Asked(messages=prompt.messages or _turn(text), row=row, answer=prompt.answer)
        told: dict[str, tuple[int, ...]] = {}
        for name, listener in self._of(prompt).items():
            try:
                if listener.briefing.needs:
                    if listener.said not in self._tried:  # whether it will open the answer's turn as it should
                        self._try(listener, prompt, asked)
                    self._tried.add(listener.said)
                else:
                    examples = self._shelves.pick(listener.briefing, asked.messages, number)
                    messages = listener.messages(replace(asked, examples=examples))
                    told[name] = listener.render(prompt, asked.messages, messages) if messages else ()
            except DataError as problem:
                raise DataError(
                    f"row {number}: {listener.said} cannot be told more than the student: {problem}. Repair the row, "
                    f"or change the briefing in {listener.section}."
                ) from None
        return replace(prompt, told=told) if told else prompt

    def as_read(self, reader: str, rollouts: Sequence[Rollout]) -> list[Rollout | None]:
        """The rollouts as a reader reads them; None for one that it does not read.  `rollouts` are whole groups."""
        groups: dict[tuple[str, str], Group] = {}
        if self.needs(reader):
            for rollout in sorted(rollouts, key=lambda one: (len(one.id), one.id)):  # 9 before 10
                groups.setdefault(_group(rollout), {})[rollout.id] = self._response(rollout)
        return [self._as_read(reader, rollout, groups.get(_group(rollout), {})) for rollout in rollouts]

    def _as_read(self, reader: str, rollout: Rollout, group: Group) -> Rollout | None:
        of_prompt = self._teachers.get(rollout.prompt.teacher)
        listener = of_prompt if reader == READER else self._readers.get(reader)
        if listener is None:
            return rollout
        prompt = rollout.prompt
        if not listener.briefing.needs and reader not in prompt.told:
            raise DataError(
                f"{listener.said} is told more than the student, but rollout {rollout.id} brings no "
                f"prompt.told[{reader!r}]. Take the rollouts of a batch that a run kept, or leave the briefing out."
            )
        ids = self._after(listener, rollout, group) if listener.briefing.needs else prompt.told[reader]
        if not ids:
            return self._leave(listener, rollout, "there is nothing to tell of it")
        if listener.context is not None and len(ids) + len(rollout.response_ids) > listener.context:
            return self._leave(listener, rollout, f"with its briefing it is longer than {listener.context} tokens")
        return rollout.behind(ids)

    def _after(self, listener: Listener, rollout: Rollout, group: Group) -> tuple[int, ...]:
        """What a reader reads before a response that is there already; empty where there is nothing to tell."""
        place, every, prompt = list(group).index(rollout.id), tuple(group.values()), rollout.prompt
        peers = (*every[place + 1 :], *every[:place])
        asked = replace(self._asked(prompt), response=every[place], peers=peers)
        try:
            messages = listener.messages(asked)
        except DataError as problem:
            where = f"prompt '{prompt.id}': {listener.said} cannot be told of response {rollout.id}"
            raise DataError(f"{where}: {problem}. Change the briefing in {listener.section}.") from problem.__cause__
        return listener.render(prompt, asked.messages, messages) if messages else ()

    def _asked(self, prompt: Prompt) -> Asked:
        messages = prompt.messages or _turn(self._text(prompt.token_ids))
        return Asked(messages=messages, row=prompt.columns, answer=prompt.answer)

    def _response(self, rollout: Rollout) -> Response:
        return Response(text=self._text(rollout.response_ids), reward=rollout.reward, words=rollout.feedback)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _leave(self, listener: Listener, rollout: Rollout, reason: str) -> None:
        """Say so once for each reason; the step counts them."""
        if (listener.said, reason) not in self._said:
            self._said.add((listener.said, reason))
            who, which = listener.said, rollout.id
            log.warning("%s does not read response %s: %s. It teaches nothing of such responses.", who, which, reason)

    def _of(self, prompt: Prompt) -> dict[str, Listener]:
        """Who is told something of a prompt, by the names of readers."""
        mine = self._teachers.get(prompt.teacher)
        return {READER: mine, **self._readers} if mine else self._readers

    def preview(self, prompt: Prompt) -> list[tuple[str, str, tuple[int, ...], bool]]:
        """By reader: who reads what instead of a prompt, and whether that speaks of responses; "..." stands for one."""
        asked = self._asked(prompt)
        found = []
        for name, listener in self._of(prompt).items():
            later = bool(listener.briefing.needs)
            ids = self._try(listener, prompt, asked) if later else prompt.told[name]
            found.append((name, listener.said, ids, later))
        return found

    def _try(self, listener: Listener, prompt: Prompt, asked: Asked) -> tuple[int, ...]:
        """What a reader might be told of responses."""
        failed = replace(_PEER, text="....", reward=0.0)  # the same text is told once
        messages = listener.messages(replace(asked, response=replace(_PEER, text=""), peers=(_PEER, failed)))
        return listener.render(prompt, asked.messages, messages or asked.messages)

    def check_lengths(self, prompts: Sequence[Prompt], writes: bool = False) -> list[str]:
        """Notes on prompts that leave a reader no room for the longest answer.  Refused if none leaves any, if there is
        nothing to tell of any, or if the teacher `writes` from them."""
        notes = []
        for one in self._everyone:
            named = [(prompt, name) for prompt in prompts for name, x in self._of(prompt).items() if x is one]
            mine = [(prompt, len(prompt.told[name])) for prompt, name in named if name in prompt.told]
            if mine and not any(length for _, length in mine):
                raise DataError(
                    f"the briefing in {one.section} finds nothing to tell {one.said} of any of {len(mine)} prompts. "
                    "Give it more to tell, such as more examples or a smaller draw, or leave it out."
                )
            long = [x for x in mine if one.context is not None and x[1] > one.context - self.max_new_tokens]
            if not long:
                continue
            said = (
                f"{len(long)} of {len(mine)} prompts are so long for {one.said} that no room for an answer of "
                f"{self.max_new_tokens} tokens is left in the {one.context} that it can read, such as prompt "
                f"'{long[0][0].id}' with {long[0][1]} tokens"
            )
            if len(long) == len(mine) or (writes and one.teaches):
                raise DataError(f"{said}. Make the briefing shorter, or lower rollout.max_new_tokens.")
            notes.append(f"{said}. It does not read answers that do not fit.")
        return notes


def imported(briefing: Briefing) -> Briefing:
    """The briefing itself, where a run file names it."""
    return briefing.imported() if isinstance(briefing, OwnBriefing) else briefing


def check_briefings(run: Run, graded: bool) -> None:
    """Refuse before anything is loaded what a briefing could never say in this run."""
    teachers = {_teacher(name): x for name, x in run.all_teachers.items()}
    readers = {_reader(name): x for name, x in run.all_readers.items()}
    for said, config in (teachers | readers).items():
        briefing = imported(config.briefing)
        needs, kind = briefing.needs, getattr(briefing, "kind", type(briefing).__name__)
        if needs & (Facts.REWARD | Facts.WORDS) and not graded:
            what = "what the grader says" if Facts.WORDS in needs else "the rewards of responses"
            raise ConfigError(f"{said} is told {what} (briefing {kind!r}), but there is no grader. Set `grader`.")
        if Facts.GROUP in needs and run.rollout.num_rollouts < 2:
            raise ConfigError(
                f"{said} is told other responses to the same prompt (briefing {kind!r}), but rollout.num_rollouts is "
                f"{run.rollout.num_rollouts}. Set it to 2 or more."
            )
        writes = run.policy.needs_teacher_text or run.policy.writes_jointly
        if needs and writes and said not in readers:
            raise ConfigError(
                f"{said} is told of responses (briefing {kind!r}), but the method, or rollout.policy, lets the "
                "teacher write before there are any. Use one without texts or tokens of the teacher."
            )


def _teacher(name: str) -> str:
    return "the teacher" if name == "default" else f"teacher {name!r}"


def _reader(name: str) -> str:
    return f"reader {name!r}"


def _section(name: str, teaches: bool) -> str:
    return f"[readers.{name}]" if not teaches else "[teacher]" if name == "default" else f"[teachers.{name}]"


def _group(rollout: Rollout) -> tuple[str, str]:
    """Rollouts of one prompt and visit."""
    return rollout.group, rollout.id.rpartition("/")[0]


def _turn(text: str) -> Messages:
    return (Message(role="user", content=text),)


def _tokenizer_of(reader: Candidate) -> PreTrainedTokenizerBase | None:
    """Whose template writes what it reads: its own, where that has one or its tokens are others than the student's."""
    own = reader.tokenizer
    return own if own is not None and (own.chat_template or reader.config.bridge) else None
