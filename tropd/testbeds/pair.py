"""A teacher, a student and their prompts on disk, made from a testbed and a seed.

A pair is made beside its folder and moved there when it is complete.  So an existing folder is complete, even if
processes were killed or several made it at once.  With the same seed and one thread the files are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tropd.config.stages import DataConfig, EvalConfig
from tropd.data.chat import stop_ids
from tropd.data.graders import resolve_grader
from tropd.data.prompts import load_prompts
from tropd.errors import ConfigError, TeacherError
from tropd.evaluation.runner import evaluate
from tropd.rollout.transformers import TransformersEngine
from tropd.testbeds.beds import TESTBEDS
from tropd.testbeds.task import Lesson, Problem, Task, Testbed
from tropd.testbeds.tokenizer import make_tokenizer, vocabulary_of
from tropd.testbeds.training import fine_tune, make_model, seed_of

EMBEDDED = Path(__file__).parent / "nano"
"""The models that come with the package; `tropd.testbeds.embed` makes them."""
_ATTEMPTS, _EXTENSIONS = 3, 2
_WRITTEN_LAST = "pair.json"
_OTHER = "teacher-{}"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The paths of a pair, and measurements of it."""

    testbed: str
    teacher: Path
    student: Path
    prompts: Path
    """For training: JSON lines with the columns prompt and answer."""
    held_out: Path
    """For evaluation: different prompts from those for training."""
    grader: str
    max_new_tokens: int
    others: dict[str, Path] = field(default_factory=dict)
    """More teachers, by the names of their folders: "teacher-" and the testbed's name for it."""
    facts: dict[str, float]
    """Accuracies at temperature 1 and greedy, parameters, CPU seconds."""


def make_pair(testbed: Testbed, seed: int, directory: Path, *, teacher: Path | None = None) -> Pair:
    """The pair of a seed, from `directory` if it exists.  A given `teacher` is copied instead of trained."""
    if (directory / _WRITTEN_LAST).exists():
        return _read(testbed, seed, directory)
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} holds something else than a pair. Name a folder that is empty or not there.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        facts = _make(testbed, seed, work, teacher)
        said = {"testbed": testbed.name, "recipe": _recipe(testbed), "seed": seed, "facts": facts}
        (work / _WRITTEN_LAST).write_text(json.dumps(said, indent=2) + "\n")
        work.chmod(0o755)
        try:
            work.replace(directory)
        except OSError:  # another process was first
            if not (directory / _WRITTEN_LAST).exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _read(testbed, seed, directory)


def embedded(name: str) -> Pair:
    """A pair that comes with the package: nano-mild or nano-hard, made with seed 0."""
    facts = json.loads((EMBEDDED / "facts.json").read_text())
    if name not in facts:
        raise ConfigError(
            f"testbed '{name}' does not come with the package; {', '.join(facts)} do. Make it: "
            "tropd.testbeds.make_pair(TESTBEDS[name], seed, directory)."
        )
    bed, manner = TESTBEDS[name], name.rpartition("-")[2]
    return _pair(bed, EMBEDDED, EMBEDDED / f"student-{manner}", facts[name])


def _make(testbed: Testbed, seed: int, folder: Path, given: Path | None) -> dict[str, float]:
    started = time.process_time()
    write_prompts(testbed, seed, folder)
    teacher = make_teacher(testbed, seed, folder) if given is None else load(given)
    facts = {f"teacher_{name}": value for name, value in measure(testbed, teacher, folder).items()}
    facts["teacher_seconds"] = time.process_time() - started
    save(teacher, testbed.task, folder / "teacher")
    for name, task in testbed.others.items():
        other = dataclasses.replace(testbed, task=task, others={})
        model = make_teacher(other, seed_of(seed, "teacher", name), folder)
        save(model, task, folder / _OTHER.format(name))
        facts |= {f"teacher_{name}_{of}": value for of, value in measure(other, model, folder).items()}
    student = make_student(testbed, seed, teacher)
    save(student, testbed.task, folder / "student")
    facts |= {f"student_{name}": value for name, value in measure(testbed, student, folder).items()}
    return facts | {"seconds": time.process_time() - started}


def make_teacher(testbed: Testbed, seed: int, folder: Path) -> Any:
    """Train until the teacher solves the held-out prompts in `folder`: first longer, then from other weights."""
    best = 0.0
    for attempt in range(_ATTEMPTS):
        model = make_model(testbed.task, testbed.teacher, _longest(testbed), seed_of(seed, "teacher", attempt))
        last = testbed.teacher_training[-1]
        for number, training in enumerate((*testbed.teacher_training, *[last] * _EXTENSIONS)):
            fine_tune(model, testbed.task, training, seed_of(seed, "teacher", attempt, number))
            if number + 1 < len(testbed.teacher_training):
                continue
            accuracy = measure(testbed, model, folder)["accuracy"]
            if accuracy >= testbed.teacher_accuracy:
                return model
            best = max(best, accuracy)
    raise TeacherError(
        f"no teacher of testbed '{testbed.name}' with seed {seed} solves {testbed.teacher_accuracy:.0%} of the "
        f"held-out prompts: the best of {_ATTEMPTS} solves {best:.0%}. Take another seed, or "
        "train longer (teacher_training)."
    )


def make_student(testbed: Testbed, seed: int, teacher: Any) -> Any:
    """A copy of the teacher, or a new model, after the student's training."""
    model = make_model(
        testbed.task, testbed.student or testbed.teacher, _longest(testbed), seed_of(seed, "student weights")
    )
    if testbed.student is None:
        model.load_state_dict(teacher.state_dict())
    for number, training in enumerate(testbed.student_training):
        fine_tune(model, testbed.task, training, seed_of(seed, "student", number))
    return model


def measure(testbed: Testbed, model: Any, folder: Path) -> dict[str, float]:
    """Accuracy on the held-out prompts, evaluated as in a run."""
    tokenizer = make_tokenizer(testbed.task)
    prompts = load_prompts(DataConfig(path=str(folder / "held_out.jsonl"), on_bad_row="refuse"), tokenizer).prompts
    engine = TransformersEngine(model.eval(), vocab_size=len(vocabulary_of(testbed.task)), max_batch=256)
    config = EvalConfig(num_samples=2, max_new_tokens=testbed.max_new_tokens, prompts_per_call=256)
    grader = resolve_grader(testbed.task.grader)
    ends = stop_ids(tokenizer, model.generation_config)
    result = evaluate(engine, prompts, grader, tokenizer, config, stop_ids=ends)
    assert result.mean is not None and result.greedy is not None
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "accuracy": result.mean,
        "greedy": result.greedy,
        "length": result.mean_length,
        "parameters": float(parameters),
    }


def write_prompts(testbed: Testbed, seed: int, folder: Path) -> None:
    """Write prompts without duplicates, within and between training and held-out prompts."""
    seen: set[tuple[str, ...]] = set()
    for name, num in (("prompts", testbed.num_train), ("held_out", testbed.num_held_out)):
        rng = random.Random(seed_of(seed, name))
        rows = [_row(testbed.task, _new_problem(testbed.task.problem, rng, seen)) for _ in range(num)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _new_problem(draw: Callable[[random.Random], Problem], rng: random.Random, seen: set[tuple[str, ...]]) -> Problem:
    for _ in range(1000):
        problem = draw(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise ConfigError(f"the task has no more than about {len(seen)} different problems. Ask for fewer prompts.")


def _row(task: Task, problem: Problem) -> dict[str, str]:
    said = {"prompt": task.space.join(problem.question), "answer": task.space.join(problem.answer)}
    return {**said, **problem.columns}


def save(model: Any, task: Task, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save a folder that transformers can load, with tokenizer."""
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(task).save_pretrained(folder)
    model.float()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _longest(testbed: Testbed) -> int:
    """Room for question and answer, as a power of two; lessons may ask longer questions."""
    lessons = (*testbed.teacher_training, *testbed.student_training)
    tasks = [testbed.task, *(lesson.task for lesson in lessons if isinstance(lesson, Lesson))]
    rng = random.Random(0)
    questions: Sequence[int] = [len(task.problem(rng).question) for task in tasks for _ in range(200)]
    return 1 << (max(questions) + testbed.max_new_tokens + 8).bit_length()


def _recipe(testbed: Testbed) -> str:
    """A hash of everything that the files depend on besides the seed."""
    made_of = dataclasses.replace(testbed, facts={}, steps=1, num_prompts=1, learning_rate=1.0)
    others = repr(testbed.others) if testbed.others else ""
    return hashlib.sha256((repr(made_of) + others).encode()).hexdigest()[:16]


def _read(testbed: Testbed, seed: int, directory: Path) -> Pair:
    said = json.loads((directory / _WRITTEN_LAST).read_text())
    if (said["recipe"], said["seed"]) != (_recipe(testbed), seed):
        raise ConfigError(
            f"{directory} holds a pair of testbed '{said['testbed']}' with seed {said['seed']}, made by another recipe "
            f"than '{testbed.name}' with seed {seed} asks for. Name another folder, or remove this one."
        )
    return _pair(testbed, directory, directory / "student", said["facts"])


def _pair(testbed: Testbed, folder: Path, student: Path, facts: dict[str, float]) -> Pair:
    return Pair(
        testbed=testbed.name,
        teacher=folder / "teacher",
        student=student,
        prompts=folder / "prompts.jsonl",
        held_out=folder / "held_out.jsonl",
        grader=testbed.task.grader,
        max_new_tokens=testbed.max_new_tokens,
        others={(other := _OTHER.format(name)): folder / other for name in testbed.others},
        facts=facts,
    )
