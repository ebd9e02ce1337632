"""Checks of prompts, of the room for answers, and of graders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tropd.data import chat
from tropd.data.graders import GRADERS, Grader, check_answers
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.subject import Subject
from tropd.errors import DataError
from tropd.teachers.routed import share_prompts
from tropd.types import Prompt

_GRADED = 64  # answers: enough to see a wrong column
_ENCODED = 1024  # answers
_UNKNOWN = 0.02  # share of tokens: a rare character is no reason to worry
_GRADED_BY_OWN = 8  # a grader that we do not know may be slow, or cost money


def check_prompts(subject: Subject) -> Iterator[Check]:
    """How often a run visits each prompt, and whether held-out prompts are trained on."""
    run, num_prompts = subject.run, len(subject.prompts)
    if num_prompts and not run.data.streaming:
        visits = run.steps * run.rollout.num_prompts / num_prompts
        yield ok("visits", f"{num_prompts} prompts, each visited {visits:.3g} times in {run.steps} steps")
    if run.teachers and num_prompts:
        yield from _check_shares(subject)
    held_out = {prompt.token_ids for prompt in subject.held_out}
    shared = len(held_out & {prompt.token_ids for prompt in subject.prompts})
    if shared:
        yield warning(
            "held-out data",
            f"{shared} of {len(held_out)} held-out prompts are also trained on: the evaluation flatters the student.",
            "Take them out of the training data, or evaluate on another split.",
        )
    if held_out and subject.eval_grader is None:
        yield warning(
            "held-out data", "there is no grader, so an evaluation measures lengths only.", "Set evaluation.grader."
        )


def _check_shares(subject: Subject) -> Iterator[Check]:
    """Every prompt needs a teacher, and every teacher needs prompts."""
    try:
        number = share_prompts(subject.run, subject.prompts)
    except DataError as refusal:
        yield error("teachers", str(refusal))
        return
    said = "prompts for " + ", ".join(f"{name!r}: {n}" for name, n in number.items())
    idle = [repr(name) for name, n in number.items() if n == 0]
    if idle and subject.run.data.streaming:
        unseen = f"none of the first {len(subject.prompts)} prompts is for {', '.join(idle)}"
        yield warning("teachers", f"{said}; {unseen}", "What is checked on prompts was not checked there.")
    elif idle:
        yield warning(
            "teachers",
            f"{said}; {', '.join(idle)} would be loaded for nothing.",
            "Look at the rows that were left out, or leave out the sections of these teachers.",
        )
    else:
        yield ok("teachers", said)


def check_lengths(subject: Subject) -> Iterator[Check]:
    """Prompt and answer must fit the contexts of the student and of every teacher."""
    budget = subject.run.rollout.max_new_tokens
    lengths = sorted(len(prompt.token_ids) for prompt in subject.prompts)
    if not lengths:
        return
    sides = {subject.student.whose: subject.student}
    for name, side in subject.teachers.items():
        if side is not None:
            sides[f"{side.whose} {name!r}" if subject.run.teachers else side.whose] = side
    sides |= {f"reader {name!r}": side for name, side in subject.readers.items()}
    contexts = {whose: side.context for whose, side in sides.items() if side.context is not None}
    said = f"prompts of {lengths[0]} to {lengths[-1]} tokens and answers of up to {budget}"
    if not contexts:
        yield ok("lengths", f"{said}; neither model says how much it can read")
        return
    whose = min(contexts, key=lambda name: contexts[name])
    room = contexts[whose] - budget
    over = sum(length > room for length in lengths)
    known = f"the context of the {whose}, {contexts[whose]} tokens"
    if room < 1:
        yield error(
            "lengths",
            f"answers of up to {budget} tokens leave no room for a prompt in {known}.",
            "Lower rollout.max_new_tokens.",
        )
    elif over:
        cure = f"Set rollout.max_new_tokens to at most {contexts[whose] - lengths[-1]}, or shorten the prompts."
        yield (error if over == len(lengths) else warning)(
            "lengths",
            f"{over} of {len(lengths)} prompts (the longest has {lengths[-1]} tokens) leave no room for {budget} new "
            f"tokens in {known}; they would be skipped.",
            cure,
        )
    else:
        yield ok("lengths", f"{said} fit {known}")


def check_unknown(subject: Subject) -> Iterator[Check]:
    """Text without tokens in the tokenizer is lost before a model reads it."""
    tokenizer = subject.student.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) or not subject.prompts:
        return
    written = [answer for prompt in subject.prompts[:_ENCODED] if (answer := prompt.answer) is not None]
    texts = {
        "prompts": [prompt.token_ids for prompt in subject.prompts],
        "answers": [chat.encode_response(answer, tokenizer, None) for answer in written]
        + [prompt.response_ids for prompt in subject.prompts if prompt.response_ids],
    }
    for what, ids in texts.items():
        lost, number = sum(row.count(unknown) for row in ids), sum(map(len, ids))
        if not number or lost / number < _UNKNOWN:
            continue
        first = str(tokenizer.decode(list(next(row for row in ids if unknown in row))))
        yield warning(
            "unknown tokens",
            f"{lost} of {number} tokens of the {what} ({lost / number:.0%}) are {tokenizer.unk_token}: the student's "
            f"tokenizer does not know what stands there, and no model reads it. The first: {first[:100]!r}.",
            "Use a model whose tokenizer knows these characters (byte-level ones know all), or write the data in those "
            "that it knows.",
        )


def check_graders(subject: Subject) -> Iterator[Check]:
    """An answer, graded against itself, should score 1."""
    run = subject.run
    asked: list[tuple[str, str | None, Grader | None, Sequence[Prompt]]] = [
        ("grader", run.grader, subject.grader, subject.prompts),
        ("evaluation.grader", run.evaluation.grader or run.grader, subject.eval_grader, subject.held_out),
    ]
    for knob, name, grader, prompts in asked:
        if name is None or grader is None or not prompts:
            continue
        if name not in GRADERS and all(prompt.answer is None for prompt in prompts):
            yield ok(knob, f"'{name}' is your own and the prompts bring no answers, so it was not tried")
            continue
        limit = _GRADED if name in GRADERS else _GRADED_BY_OWN
        try:
            check_answers(grader, prompts, subject.student.tokenizer, limit)
        except DataError as refusal:
            built_in = name in GRADERS
            cure = "" if built_in else "If your grader means something else by 1, this is fine."
            yield (error if built_in else warning)(knob, str(refusal), cure)
        except Exception as failure:  # the user's code: any exception is a finding, with its own message
            yield error(knob, f"'{name}' failed on an answer of the data: {type(failure).__name__}: {failure}")
        else:
            yield ok(knob, f"'{name}' gives {min(len(prompts), limit)} answers, graded against themselves, 1 each")
