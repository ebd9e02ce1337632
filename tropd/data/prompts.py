"""Rows -> prompts.  A row that makes no prompt is counted by reason and reported, never lost.

load_prompts(config, tokenizer)    every prompt, in memory
PromptReader(config, tokenizer)    one lazy pass; tropd.data.stream makes it endless and resumable
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tropd.base.reading import nearest
from tropd.config.stages import DataConfig
from tropd.data import chat
from tropd.data.briefer import Briefer
from tropd.data.rows import Row, Table, open_table, read_scalar, read_text
from tropd.errors import ConfigError, DataError
from tropd.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reason = Literal["empty", "malformed", "too long", "duplicate"]
_NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """How many rows made prompts, and why the others did not."""

    num_rows: int
    num_prompts: int
    skipped: Mapping[Reason, int]
    examples: Mapping[Reason, tuple[str, ...]]
    """The first rows of each reason, with their numbers."""
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.num_rows} rows read, {self.num_prompts} prompts"]
        lines += [f"  {self.skipped[why]} {why}: {'; '.join(self.examples[why])}" for why in self.skipped]
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True, kw_only=True)
class LoadedPrompts:
    prompts: tuple[Prompt, ...]
    report: RowReport


class _BadRow(DataError):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    table: Table | None = None,
    briefer: Briefer | None = None,
) -> LoadedPrompts:
    """Every prompt of the data set, and a report on the rows that made none.  `table`: rows given in Python.
    `briefer` says what teachers read."""
    if config.streaming:
        raise ConfigError("data.streaming is set, so prompts cannot all be loaded. Use LazyPromptStream, or unset it.")
    reader = PromptReader(config, tokenizer, table, briefer)
    prompts = tuple(reader)
    reader.check()
    return LoadedPrompts(prompts=prompts, report=reader.report)


class PromptReader:
    """One pass over the rows, in order, yielding those that make a prompt."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        table: Table | None = None,
        briefer: Briefer | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.table = table or open_table(config.path, split=config.split, name=config.name, streaming=config.streaming)
        self.source = _source_column(config, self.table)
        self.uses_template = bool(tokenizer.chat_template) and config.apply_chat_template
        _check_template_use(config, self.uses_template)
        self.briefer = briefer
        if briefer is not None:
            briefer.check(self.table, self.uses_template)
        self._end_id = chat.response_end_id(tokenizer, self.uses_template)
        self._num_rows = self._num_prompts = 0
        self._skipped: Counter[Reason] = Counter()
        self._examples: dict[Reason, list[str]] = {}
        self._first_row_of: dict[bytes, int] = {}
        self._warnings = tuple(_find_warnings(self))

    def __iter__(self) -> Iterator[Prompt]:
        for number, row in self.table.read():
            if self._num_prompts == self.config.limit:
                return
            self._num_rows += 1
            try:
                prompt = self._make_prompt(row)
                self._refuse_repeats(prompt, number)
            except _BadRow as bad:
                self._skip(bad.reason, number, bad)
            except DataError as bad:
                self._skip("malformed", number, bad)
            else:
                self._num_prompts += 1
                yield self._briefed(prompt, row, number)

    def _briefed(self, prompt: Prompt, row: Row, number: int) -> Prompt:
        if self.briefer is None:
            return prompt
        return self.briefer.brief(prompt, row, "" if prompt.messages else str(row[self.source]), number)

    @property
    def report(self) -> RowReport:
        examples: dict[Reason, tuple[str, ...]] = {reason: tuple(rows) for reason, rows in self._examples.items()}
        return RowReport(
            num_rows=self._num_rows,
            num_prompts=self._num_prompts,
            skipped=dict(self._skipped),
            examples=examples,
            warnings=self._warnings,
        )

    def check(self) -> None:
        """Refuse bad rows if the configuration says so, and a data set without a single prompt in any case."""
        if self._skipped and self.config.on_bad_row == "refuse":
            raise DataError(f"{self.table.source}: {self.report}\nRepair these rows, or set data.on_bad_row = 'skip'.")
        if not self._num_prompts:
            raise DataError(f"no row of {self.table.source} makes a prompt: {self.report}")

    def _skip(self, reason: Reason, number: int, bad: DataError) -> None:
        self._skipped[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(f"row {number}: {bad}")

    def _refuse_repeats(self, prompt: Prompt, number: int) -> None:
        """Refuse one id twice; the same prompt for two teachers counts as two."""
        rendered = hashlib.blake2b(repr((prompt.token_ids, prompt.teacher)).encode(), digest_size=16).digest()
        if rendered in self._first_row_of:
            raise _BadRow("duplicate", f"the same prompt as row {self._first_row_of[rendered]}")
        named = b"id/" + prompt.id.encode("utf-8", "surrogatepass")
        if named in self._first_row_of:
            raise _BadRow("duplicate", f"the same id '{prompt.id}' as row {self._first_row_of[named]}")
        self._first_row_of[rendered] = self._first_row_of[named] = number

    def _make_prompt(self, row: Row) -> Prompt:
        config = self.config
        text, messages, response = self._read_conversation(row)
        teacher = None if config.teacher_column is None else read_scalar(row, config.teacher_column)
        content_id = _hash_content(messages or (Message(role="user", content=text),), teacher)
        if messages:
            messages = chat.with_system(messages, config.system_prompt)
            token_ids = chat.render(messages, self.tokenizer, kwargs=config.chat_template_kwargs)
        else:
            token_ids = chat.encode_plain(text, self.tokenizer)
        self._check_length(token_ids)
        if config.response_column is not None:
            response = read_text(row, config.response_column)
        named = (config.id_column, config.teacher_column, config.response_column)
        taken = {self.source, *named, *(["answer"] if config.answer_column == "answer" else [])}
        return Prompt(
            id=content_id if config.id_column is None else read_scalar(row, config.id_column),
            token_ids=token_ids,
            messages=messages,
            answer=read_scalar(row, config.answer_column) if row.get(config.answer_column) is not None else None,
            teacher="default" if teacher is None else teacher,
            response_ids=chat.encode_response(response, self.tokenizer, self._end_id) if response else (),
            columns={column: value for column, value in row.items() if column not in taken},
        )

    def _read_conversation(self, row: Row) -> tuple[str, tuple[Message, ...], str | None]:
        """The prompt as text or as messages (the other is empty), and the assistant's text behind it, if kept."""
        value = row.get(self.source)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise _BadRow("empty", f"nothing in '{self.source}'")
        if isinstance(value, str):
            return value, (Message(role="user", content=value),) if self.uses_template else (), None
        if not isinstance(value, list | tuple):
            kind = type(value).__name__
            raise _BadRow("malformed", f"'{self.source}' is a {kind}, neither text nor a list of messages")
        if not self.uses_template:
            raise ConfigError(
                f"{self.table.source} holds conversations, which need a chat template: the tokenizer has none, or "
                "data.apply_chat_template is false. Use an instruction-tuned student, or give prompts as text."
            )
        messages, response = chat.parse_messages(value), None
        if messages and messages[-1].role == "assistant":
            messages, last = messages[:-1], messages[-1].content
            if self.config.last_assistant == "prefix":
                response = last
                if not last.strip():
                    raise _BadRow("malformed", "the assistant's last turn is empty, and is asked for")
        if not any(message.content.strip() for message in messages):
            raise _BadRow("empty", f"no text in '{self.source}' before the assistant's answer")
        if messages[-1].role == "assistant":
            raise _BadRow("malformed", "two turns of the assistant at the end, so it is unclear what to answer")
        return "", messages, response

    def _check_length(self, token_ids: tuple[int, ...]) -> None:
        longest = self.config.max_prompt_tokens
        if not token_ids:
            raise _BadRow("empty", "the prompt encodes to no token")
        if longest is not None and len(token_ids) > longest:
            raise _BadRow("too long", f"{len(token_ids)} tokens, and at most {longest} fit")


def _source_column(config: DataConfig, table: Table) -> str:
    defaults = {"prompt": config.prompt_column, "messages": config.messages_column}
    for knob, column in (
        ("id_column", config.id_column),
        ("teacher_column", config.teacher_column),
        ("response_column", config.response_column),
        ("answer_column", config.answer_column if config.answer_column != "answer" else None),
        *((f"{default}_column", column if column != default else None) for default, column in defaults.items()),
    ):
        if column is not None and column not in table.columns:
            raise _no_column(f"data.{knob}", column, table)
    for column in defaults.values():
        if column in table.columns:
            return column
    raise _no_column("data.prompt_column or data.messages_column", config.prompt_column, table)


def _no_column(knob: str, column: str, table: Table) -> DataError:
    has = f"{nearest(column, table.columns)}; it has {', '.join(table.columns)}"
    return DataError(f"{table.source} has no column '{column}'{has}. Set {knob}.")


def _check_template_use(config: DataConfig, uses_template: bool) -> None:
    for knob in ("system_prompt", "chat_template_kwargs"):
        if getattr(config, knob) and not uses_template:
            raise ConfigError(
                f"data.{knob} is set, but prompts are encoded without a chat template, so it would do nothing. "
                "Use a tokenizer with a chat template and data.apply_chat_template = true, or leave it out."
            )


def _find_warnings(reader: PromptReader) -> Iterator[str]:
    config, tokenizer, columns = reader.config, reader.tokenizer, reader.table.columns
    if reader.source == config.prompt_column and config.messages_column in columns:
        yield (
            f"there are columns '{reader.source}' and '{config.messages_column}'; '{reader.source}' is read. "
            f"To read the other, set data.prompt_column = '{config.messages_column}'."
        )
    if not tokenizer.chat_template and config.apply_chat_template:
        yield (
            "the tokenizer has no chat template: prompts that are text are encoded as they are. "
            "If that is meant, say so: data.apply_chat_template = false."
        )
    if reader.uses_template:
        if not chat.adds_generation_prompt(tokenizer, config.chat_template_kwargs):
            yield "the chat template adds no generation prompt: the student has to open the assistant's turn itself."
        for key in chat.unread_kwargs(tokenizer, config.chat_template_kwargs):
            yield f"the chat template never mentions '{key}' of data.chat_template_kwargs: it does nothing."


def _hash_content(messages: tuple[Message, ...], teacher: str | None) -> str:
    content = json.dumps([[message.role, message.content] for message in messages] + ([teacher] if teacher else []))
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
