"""From a Run to its parts: models, teacher, engines, prompts.  Every check that can fail before training is here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropd.base.names import shown
from tropd.briefings.briefing import AsStudent
from tropd.config.checks import check_policy
from tropd.config.mixtures import unread_said
from tropd.config.run import Run
from tropd.data.briefer import Briefer, check_briefings
from tropd.data.chat import stop_ids, token_id
from tropd.data.graders import Grader, resolve_grader
from tropd.data.stream import LazyPromptStream, PromptStream, name_of
from tropd.distributed.ranks import ALONE, Ranks
from tropd.errors import ConfigError
from tropd.methods.horizon import horizons
from tropd.model.forward import Forward
from tropd.model.loading import choose_device, load_model, load_tokenizer, without_dropout, wrap_student
from tropd.model.optimizer import Optimizer
from tropd.model.origins import Origin, origin_of, origin_of_objects, prompts_origin
from tropd.model.tiling import Tiling
from tropd.monitoring.probe import Probe
from tropd.monitoring.probing import open_probes
from tropd.objective.evidence import OF_TEACHER
from tropd.objective.losses import SampledForwardKL, SampledReverseKL
from tropd.objective.memory import Memory
from tropd.objective.objective import Objective
from tropd.rollout.engine import Engine
from tropd.rollout.stage import Pair
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers import loading
from tropd.teachers.combined import wholes_of
from tropd.teachers.directions import origins_of
from tropd.teachers.following import Follower
from tropd.teachers.loading import TeacherParts
from tropd.teachers.teacher import Teacher
from tropd.teachers.writing import pair_of, writer_of
from tropd.training.asked import check_evidence
from tropd.training.given import NOTHING_GIVEN, Given
from tropd.training.learner import ModelLearner
from tropd.training.prompts import open_stream, read_held_out
from tropd.types import READER, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tropd.distributed.sharding import Shards


@dataclass(kw_only=True, eq=False)
class Parts:
    """The parts of a run, loaded.  Training changes most of them: weights, moments, the cursor, the engine."""

    run: Run
    objective: Objective
    """That of the run's method, with the ids of tokens that it names by their text."""
    tokenizer: PreTrainedTokenizerBase
    model: Any
    learner: ModelLearner
    engine: Engine
    teacher: Teacher
    readers: Mapping[str, Teacher]
    """Everybody who reads the responses, by name; "teacher" is the teacher."""
    writer: Engine | None
    pair: Pair | None
    """Student and teacher writing together, where the policy asks for that."""
    stream: PromptStream | LazyPromptStream
    stop_ids: tuple[int, ...]
    grader: Grader | None
    briefer: Briefer
    held_out: tuple[Prompt, ...]
    eval_grader: Grader | None
    notes: tuple[str, ...]
    """What the user should know before it starts."""
    origins: dict[str, Origin]
    """Hashes of the files that the run reads but does not train, which no checkpoint holds."""
    world: Ranks = ALONE
    given: Given = NOTHING_GIVEN
    followers: tuple[Follower, ...] = ()
    """The moves of the teachers that follow the student."""
    probes: tuple[Probe, ...] = ()
    """What else is watched."""
    memory: Memory = dataclasses.field(default_factory=Memory)
    """What the run remembers from step to step."""

    @property
    def vocab_size(self) -> int:
        return self.learner.forward.vocab_size


def load_parts(run: Run, directory: Path, world: Ranks = ALONE, given: Given = NOTHING_GIVEN) -> Parts:
    """Load everything except the objects in `given`.  `directory` is where the teachers' texts are kept."""
    device = choose_device(run.device)
    grader = given.grader or (resolve_grader(run.grader) if run.grader else None)
    eval_grader = resolve_grader(run.evaluation.grader) if run.evaluation.grader else grader
    check_policy(run, grader is not None)
    check_briefings(run, grader is not None)
    probes = open_probes(run)
    loaded, tokenizer = given.student or (None, load_tokenizer(run.student, "student"))
    objective = run.method.objective.with_ids(partial(token_id, tokenizer=tokenizer))
    teachers = loading.find(run, tokenizer, given.teacher)  # cheap to refuse before any weights are read
    loaded = load_model(run.student, "student", device) if loaded is None else loaded.to(device).eval()
    loading.load(teachers, device)
    ends = stop_ids(tokenizer, loaded.generation_config)
    cautions = without_dropout(loaded)
    model = wrap_student(loaded, run.student, run.seed)
    size = loading.shared_size(teachers, model, tokenizer)
    objective.check_ids(size)
    tiling = Tiling(tokens_per_batch=run.tokens_per_micro_batch, tile_tokens=run.tile_tokens, tile_vocab=run.tile_vocab)
    engaged = loading.engage(run, teachers, model, size, tiling, directory, world)
    for reader in set(engaged.readers.values()):
        reader.prepare(tokenizer, size, device)
    learner = _learner(run, model, size, tiling, engaged.readers, world)
    for follower in engaged.followers:
        follower.check(learner.optimizer.masters)
    check_evidence(objective, engaged.readers, shown(run.method.name), grader is not None)
    engine = _engine(run, model, tokenizer, size, directory, world)
    with ExitStack() as opened:
        opened.callback(engine.close)
        briefer = loading.briefer_of(run, teachers, engaged, tokenizer)
        shortest = _shortest(learner.forward, engine, *engaged.readers.values())
        stream, notes = open_stream(run, tokenizer, shortest, given.prompts, briefer)
        held_out, eval_notes = read_held_out(run, tokenizer, _shortest(learner.forward, engine), given.held_out)
        origins = world.first(_origins(run, (loaded, tokenizer), teachers, held_out, given) if world.leads else {})
        texts = directory / world.own_name(loading.TEXTS)
        writer, remarks = writer_of(run, teachers, model, size, (tokenizer, stream), origins, texts)
        memory = Memory()
        for probe in probes:
            probe.begin(model, memory)
        pair = pair_of(run, teachers, engine, size)
        opened.pop_all()  # nothing was refused
    return Parts(
        run=run,
        objective=objective,
        tokenizer=tokenizer,
        model=model,
        learner=learner,
        engine=engine,
        teacher=engaged.teacher,
        readers=engaged.readers,
        writer=writer,
        pair=pair,
        stream=stream,
        stop_ids=ends,
        grader=grader,
        briefer=briefer,
        held_out=held_out,
        eval_grader=eval_grader,
        notes=(*cautions, *engaged.notes, *_cautions(run, ends), *engine.notes, *notes, *remarks, *eval_notes),
        origins=origins,
        world=world,
        given=given,
        followers=engaged.followers,
        probes=probes,
        memory=memory,
    )


def _origins(
    run: Run, student: tuple[Any, Any], teachers: Sequence[TeacherParts], held_out: Sequence[Prompt], given: Given
) -> dict[str, Origin]:
    """Hashes of what the run reads and no checkpoint holds."""
    frozen = run.student.lora is not None
    if given.student:
        origins = {"student": origin_of_objects(*student, weights=frozen)}
    else:
        origins = {"student": origin_of(run.student, student[0] if frozen else None)}
    origins |= {t.origin: _origin_of(t) for t in teachers if not t.config.is_student}
    origins |= origins_of(run)
    return origins | ({"held-out prompts": prompts_origin(map(name_of, held_out))} if held_out else {})


def _origin_of(teacher: TeacherParts) -> Origin:
    """The hashes of its files, or the names of its servers or of the user's code."""
    if teacher.own is not None:
        return {"class": type(teacher.own).__qualname__}
    if teacher.given:
        return origin_of_objects(teacher.model, teacher.tokenizer, weights=True)
    return origin_of(teacher.config, teacher.model) if teacher.served is None else {"server": teacher.served.identity}


def _engine(run: Run, model: Any, tokenizer: Any, size: int, directory: Path, world: Ranks) -> Engine:
    """The engine that writes the rollouts."""
    if run.rollout.engine is not None:
        own = run.rollout.engine.make(Engine, "engine")
        own.prepare(model, tokenizer, size)
        return own
    if not run.rollout.servers:
        return TransformersEngine(model, vocab_size=size, max_batch=run.rollout.max_batch)
    from tropd.rollout.vllm import open_engine

    if world.size == 1:
        return open_engine(run.rollout, run.sampling, model, tokenizer, size, directory)
    from tropd.rollout.shared import SharedDelivery

    delivery = partial(SharedDelivery, world)
    return open_engine(run.rollout, run.sampling, model, tokenizer, size, directory, delivery)


def _learner(
    run: Run, model: Any, vocab_size: int, tiling: Tiling, readers: Mapping[str, Teacher], world: Ranks
) -> ModelLearner:
    shards = _shards(run, model, world)
    total, add = run.steps * run.optimizer.num_updates, world.add_ if world.size > 1 else None
    if shards is not None:
        optimizer = Optimizer(shards.cut, run.optimizer, total)
    else:
        optimizer = Optimizer(model, run.optimizer, total, add)
    wholes = wholes_of(readers)
    return ModelLearner(model, optimizer, vocab_size=vocab_size, tiling=tiling, readers=wholes, shards=shards)


def shards_student(run: Run, processes: int) -> bool:
    return processes > 1 and run.parallel.student != "replicated" and run.student.lora is None


def _shards(run: Run, model: Any, world: Ranks) -> Shards | None:
    """The sharded student, if there are several processes and no adapter, which would make sharding pointless."""
    if not shards_student(run, world.size):
        return None
    readers = (*run.all_teachers.values(), *run.all_readers.values()) if run.method.needs & OF_TEACHER else ()
    if any(x.path == "student" for x in readers):
        raise ConfigError(
            'teacher.path is "student", but several processes share one student in parts, whose whole is gone while it '
            'is trained. Set parallel.student = "replicated", or teacher.path = "start".'
        )
    from tropd.distributed.sharding import Shards, check_torch

    check_torch()
    return Shards(model, world)


def _shortest(*readers: Forward | Engine | Teacher) -> int | None:
    """The longest text that all models can read."""
    return min((reader.context for reader in readers if reader.context is not None), default=None)


def _cautions(run: Run, ends: tuple[int, ...]) -> list[str]:
    notes = [*run.method.objections(run.sampling), *unread_said(run)]
    prescribed, own = run.method.readers.get(READER), AsStudent()
    if prescribed and prescribed.briefing != own and all(x.briefing == own for x in run.all_teachers.values()):
        notes.append(
            f"method {run.method.name!r} has a teacher that is told more than the student, but the run has a section "
            "[teacher], which stands in for that, and its teacher is told nothing. Give it a briefing, or leave the "
            "section out."
        )
    shortest = min(horizons(run.policy, run.rollout.max_new_tokens, run.steps))
    if run.grader is not None and shortest < run.rollout.max_new_tokens:
        notes.append(
            f"the horizon of the rollouts is {shortest} tokens at the least. The grader is shown what is cut there as "
            "it stands, and so is whoever reads rewards; the mean reward is that of the responses that ended before."
        )
    if not ends:
        notes.append("no stop token was found: every rollout will run to max_new_tokens.")
    if run.optimizer.num_updates > 1 and not torch.are_deterministic_algorithms_enabled():
        notes.append(f"{run.optimizer.num_updates} updates per batch: from the second on, rollouts are off-policy.")
    terms = run.method.objective.terms
    older = "rollout.staleness = 1" if run.rollout.staleness else "the rollout policy uses rollouts again"
    is_old = run.rollout.staleness or run.policy.oldest
    if is_old and any(isinstance(t.loss, SampledReverseKL | SampledForwardKL) for t in terms):
        notes.append(
            f"{older}, but this method's estimator has no importance ratio: its gradient takes tokens of "
            "the older student for the student's own. Use estimator = 'policy_gradient'."
        )
    return notes
