"""A teacher with another tokenizer, looked at on the user's own prompts: what crosses, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

from tropd.bridge.spelling import decode
from tropd.bridge.translation import Bridge, Translation
from tropd.config.bridge import BridgeConfig
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.subject import Side, Subject
from tropd.errors import VocabularyError

_FEW = 0.5
"""Share of tokens below which hardly anything is taught."""


def check_bridge(subject: Subject) -> Iterator[Check]:
    """How the student's tokens map to those of a teacher with a tokenizer of its own."""
    config, teacher = subject.run.teacher.bridge, subject.teacher
    if config is not None and teacher is not None:
        yield from _looked_at(subject, config, teacher, "teacher")


def check_bridges_of_readers(subject: Subject) -> Iterator[Check]:
    """The same for readers that have a model of their own."""
    for name, side in subject.readers.items():
        if (config := subject.run.all_readers[name].bridge) is not None:
            yield from _looked_at(subject, config, side, f"readers.{name}")


def _looked_at(subject: Subject, config: BridgeConfig, teacher: Side, section: str) -> Iterator[Check]:
    student, name = subject.student, "bridge" if section == "teacher" else f"{section}.bridge"
    bridge = Bridge(student=student.tokenizer, teacher=teacher.tokenizer, config=config)
    try:
        yield ok(name, _special(bridge, student, teacher, section))
        texts = [text for prompt in subject.prompts if (text := _text_of(prompt.token_ids, bridge))]
        found = [(text, bridge.translate(_ids(text, bridge), (), False)) for text in dict.fromkeys(texts)]
    except VocabularyError as refusal:
        yield error(name, str(refusal))
        return
    if not found:
        return
    chunks = [chunk for _, one in found for chunk in one.chunks]
    tokens = sum(chunk.sizes[0] for chunk in chunks)
    read = sum(chunk.sizes[0] for _, one in found for chunk in one.read)
    single = sum(chunk.is_single for chunk in chunks)
    longest = max(chunks, key=lambda chunk: max(chunk.sizes), default=None)
    said = (
        f"of the prompts' texts, {single / max(tokens, 1):.0%} of the student's tokens stand against one of the "
        f"teacher's, {read / max(tokens, 1):.0%} of them are taught"
    )
    if longest is not None:
        said += f"; the longest chunk, {longest.sizes[0]} tokens against {longest.sizes[1]}, is {longest.text[:60]!r}"
    few = read < _FEW * tokens
    yield (warning if few else ok)(name, said + ".", *([f"Raise {section}.bridge.longest."] if few else []))
    if lost := next((pair for one in found if (pair := _lost(*one, bridge))), None):
        yield warning(
            name,
            f"the teacher's tokenizer does not write every text: {lost[0]!r} becomes {lost[1]!r}. What it cannot "
            "write teaches nothing, and what it writes otherwise is read as the teacher writes it.",
            "Take a teacher whose tokenizer keeps text, or clean the data.",
        )


def _special(bridge: Bridge, student: Side, teacher: Side, section: str) -> str:
    """The map of special tokens, in words."""
    end = "nothing" if bridge.end is None else teacher.token(bridge.end)
    pairs = [
        f"{student.token(own)} is {teacher.token(other)}" for own, other in bridge.special.items() if other is not None
    ]
    lone = [student.token(own) for own, other in bridge.special.items() if other is None]
    parts = [f"the teacher has a tokenizer of its own; the end of a turn is {end} to it"]
    parts += [", ".join(pairs)] * bool(pairs)
    parts += [f"it has nothing for {', '.join(lone)} ({section}.bridge.special)"] * bool(lone)
    return "; ".join(parts)


def _text_of(ids: tuple[int, ...], bridge: Bridge) -> str:
    return str(bridge.student.decode(list(ids), skip_special_tokens=True)).strip()


def _ids(text: str, bridge: Bridge) -> list[int]:
    return bridge.student.encode(text, add_special_tokens=False)


def _lost(text: str, found: Translation, bridge: Bridge) -> tuple[str, str] | None:
    """A text and what the teacher's tokens say, where these differ."""
    back = decode(bridge.teacher, found.token_ids).strip()
    if "".join(back.split()) == "".join(text.split()):
        return None  # decoders differ in spaces
    at = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, at - 10)
    return text[start : at + 20], back[start : at + 20]
