"""Whether tokens mean the same to student and teacher: vocabulary, ends of answers, chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tropd.briefings.briefing import AsStudent
from tropd.config.models import TeacherConfig
from tropd.data import chat
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.readers import nobody_teaches
from tropd.doctor.subject import Side, Subject
from tropd.errors import ConfigError, DataError, VocabularyError
from tropd.teachers.local import same_vocabulary
from tropd.types import READER, Message, Sampling

_SAMPLE = (Message(role="user", content="What is 2 + 2?"),)


def check_tokenizers(subject: Subject) -> Iterator[Check]:
    """Compare the tokenizers token by token, then the number of rows of each model."""
    student, teacher = subject.student, subject.teacher
    num_tokens = len(student.tokenizer.get_vocab())
    if teacher is None:
        whose = "is your own" if subject.run.teacher.is_own else "is the base under the student's adapter"
        whose = "is the student itself" if subject.run.teacher.path == "student" else whose
        whose = "only writes, and has its own" if subject.run.teacher.only_writes else whose
        yield ok("tokenizers", f"{num_tokens} tokens; the teacher {whose}")
    elif subject.run.teacher.bridge is not None:
        return  # `check_bridge` says more
    else:
        try:
            same_vocabulary(student.tokenizer, teacher.tokenizer)
        except VocabularyError as refusal:
            yield error("tokenizers", str(refusal))
            return
        extra = len(teacher.tokenizer.get_vocab()) - num_tokens
        more = f"; the teacher has {extra} more beyond them" if extra else ""
        yield ok("tokenizers", f"{num_tokens} tokens, each with the same id for student and teacher{more}")
    ids = max(student.tokenizer.get_vocab().values()) + 1
    sides = [side for side in (student, teacher) if side is not None]
    rows = {side.whose: int(getattr(side.config, "vocab_size", ids)) for side in sides}
    said = ", ".join(f"the {whose} has {number} rows" for whose, number in rows.items())
    short = [whose for whose, number in rows.items() if number < ids]
    if short:
        yield warning(
            "vocabulary",
            f"{said}, but the student's tokenizer has ids up to {ids - 1}: the {' and the '.join(short)} cannot read "
            "or write the last ones.",
            "Resize the embeddings, or use the tokenizer that came with the model.",
        )
    else:
        yield ok("vocabulary", f"{said}; both are cut to the {ids} ids that are tokens, so padded rows take no part")


def check_named_tokens(subject: Subject) -> Iterator[Check]:
    """Each token that the method names by its text is one token of the student's."""
    try:
        subject.run.method.objective.with_ids(partial(chat.token_id, tokenizer=subject.student.tokenizer))
    except ConfigError as refusal:
        yield error("named tokens", str(refusal))


def check_stops(subject: Subject) -> Iterator[Check]:
    """A student that ends with a token that its teacher never writes is punished for ending."""
    student, teacher = subject.student, subject.teacher
    own = student.stop_ids
    if not own:
        yield warning(
            "stop tokens",
            "the student has none: no eos_token, none in its generation config, none in its chat template. "
            f"Every rollout runs to max_new_tokens = {subject.run.rollout.max_new_tokens}.",
            "Set eos_token in the tokenizer, or eos_token_id in generation_config.json.",
        )
        return
    names = ", ".join(map(student.token, own))
    if teacher is None:
        whose = "your own" if subject.run.teacher.is_own else "the student's base"
        whose = "the student" if subject.run.teacher.path == "student" else whose
        silent = nobody_teaches(subject.run) or subject.run.teacher.only_writes
        teaches = "" if silent else f"; the teacher is {whose}"
        yield ok("stop tokens", f"answers end with {names}{teaches}")
        return
    if subject.run.teacher.bridge is not None:
        yield ok("stop tokens", f"answers end with {names}; to the teacher they end with its own token")
        return
    other = teacher.stop_ids
    their = ", ".join(map(teacher.token, other)) or "nothing"
    ends: list[Any] = [student.tokenizer.eos_token_id, teacher.tokenizer.eos_token_id]
    if set(own) == set(other) and ends[0] == ends[1]:
        yield ok("stop tokens", f"student and teacher end an answer with {names}")
        return
    lone = [student.token(index) for index in own if index not in other]
    eos = [side.token(end) if end is not None else "none" for side, end in zip((student, teacher), ends, strict=True)]
    why = f"The teacher never ends with {', '.join(lone)}" if lone else f"Their eos tokens are {eos[0]} and {eos[1]}"
    yield warning(
        "stop tokens",
        f"the student's answers end with {names}, the teacher's with {their}. {why}: it gives such an end a "
        "log-probability of about -25, so the student unlearns to end and its answers grow to the limit.",
        "Give both the same eos_token (and eos_token_id in generation_config.json), usually the teacher's, or pair an "
        "instruct student with an instruct teacher.",
    )


def check_templates(subject: Subject) -> Iterator[Check]:
    """The teacher reads prompts in the student's template: does its own template give the same?"""
    student, teacher, data = subject.student, subject.teacher, subject.run.data
    if not (student.tokenizer.chat_template and data.apply_chat_template):
        instruct = teacher is not None and bool(teacher.tokenizer.chat_template)
        if instruct and not student.tokenizer.chat_template:
            yield warning(
                "chat template",
                "prompts are plain text, because the student's tokenizer has no chat template, but the teacher has "
                "one: it was made for conversations.",
                "Give the student the teacher's template, or use a base model as teacher.",
            )
        else:
            yield ok("chat template", "prompts are plain text")
        return
    if teacher is None:
        said = "whose texts the teacher reads" if subject.run.teacher.is_own else "which is the teacher's as well"
        said = "and a chat endpoint has its own" if subject.run.teacher.only_writes else said
        yield ok("chat template", f"the student's, {said}")
        return
    if not teacher.tokenizer.chat_template:
        yield warning(
            "chat template",
            "the student's prompts are conversations, but the teacher has no chat template: it was not made for them.",
            "Use an instruct teacher of the same family, or data.apply_chat_template = false.",
        )
        return
    if subject.run.teacher.bridge is not None:
        yield ok("chat template", "each reads the conversation as its own template writes it")
        return
    messages = next((prompt.messages for prompt in subject.prompts if prompt.messages), _SAMPLE)
    try:
        own, other = (_rendered(side, messages, subject) for side in (student, teacher))
    except (DataError, ConfigError) as refusal:
        yield warning("chat template", f"one of them refuses the first prompt: {refusal}", "Compare the templates.")
        return
    if own == other:
        yield ok("chat template", "student and teacher render the first prompt alike")
        return
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    start = max(0, at - 20)
    yield warning(
        "chat template",
        f"the teacher reads prompts as the student's template writes them, and its own would differ from character "
        f"{at} on: student {own[start : at + 40]!r}, teacher {other[start : at + 40]!r}.",
        "Give the student's tokenizer the teacher's chat_template, or set data.chat_template_kwargs or "
        "data.system_prompt so that both agree.",
    )


def _rendered(side: Side, messages: tuple[Message, ...], subject: Subject) -> str:
    ids = chat.render(messages, side.tokenizer, kwargs=subject.run.data.chat_template_kwargs)
    return str(side.tokenizer.decode(list(ids)))


def check_briefing(subject: Subject) -> Iterator[Check]:
    """A prompt as the student reads it, and as others do who are told more."""
    if subject.briefer is None or not subject.prompts:
        return

    def shown(ids: Sequence[int], side: Side | None = None) -> str:
        return repr(str((side or subject.student).tokenizer.decode(list(ids))))

    readers: dict[str, TeacherConfig] = {READER: subject.run.teacher, **subject.run.all_readers}
    prompt = subject.prompts[0]
    for name, who, ids, of_responses in subject.briefer.preview(prompt):
        if of_responses:
            how = "of responses, once they are graded; a prompt with ... in their place"
        else:
            lengths = sorted(len(one.told[name]) for one in subject.prompts)
            how = f"more, in prompts of {lengths[0]} to {lengths[-1]} tokens; a prompt"
        config = readers[name]
        told = f"{who} is told {how}"
        if isinstance(config.briefing, AsStudent) and config.bridge is not None:
            told = f"{who} is told the same in its own tokens; a prompt"
        own = None if config.bridge is None else subject.readers.get(name) or subject.teacher
        both = f"as the student reads it: {shown(prompt.token_ids)}\nas {who} reads it: {shown(ids, own)}"
        yield ok("briefing", f"{told}\n{both}")


def check_generation(subject: Subject) -> Iterator[Check]:
    """Notes on a model's sampling settings, which are not used: rollouts come from the unchanged student."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    found = {name: getattr(subject.student.generation, name, None) for name in names}
    set_ = [f"{name} {value}" for name, value in found.items() if value not in (None, neutral[name])]
    sampling: Sampling = subject.run.sampling
    drawn = f"rollouts are drawn at temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"
    unused = f"; the student's generation config ({', '.join(set_)}) is not used" if set_ else ""
    yield ok("sampling", drawn + unused)
