"""The sections of a run that name models: the student and its adapter, teachers, and the servers of either."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import PlainValidator
from tyro.conf import Fixed, Suppress

from tropd.base.names import is_name, offered
from tropd.base.ranges import Count, Positive, Range, Ranged, Seconds
from tropd.base.reading import shortened
from tropd.briefings.briefing import AsStudent, Briefing, read_briefing
from tropd.briefings.follow import Follow, Frozen, read_follow
from tropd.briefings.mixtures import Mixture, Steered, mixture_of
from tropd.briefings.reader import Direction
from tropd.config.bridge import BridgeConfig
from tropd.config.chat import ChatConfig
from tropd.errors import ConfigError
from tropd.types import READER

GIVEN = "(given in Python)"
"""Stands in a run file for an object that no file can hold."""
NATS = {"float32": 0.002}
NATS_OF_HALF_PRECISION = 0.1
"""By how many nats per token a server may differ from itself, or from a forward pass of the same weights."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Ranged):
    """How servers are spoken to."""

    section = "server"

    kind: Literal["vllm", "sglang", "openai"] = "vllm"
    """Whose API it is.  "openai" is any compatible server: it can write texts, but it cannot score token ids."""
    model: str | None = None
    """The name it is served under; by default the only one that the server lists."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key.  The key itself is never written anywhere."""
    text: Literal["tokens", "chat"] = "tokens"
    """How texts are asked for: token ids in and out, or messages, whose answer is tokenised again."""
    deadline_seconds: Seconds = 600.0
    """A request that keeps failing is tried again for so long; then the run stops. In (0, 1000000]."""
    answer_seconds: Seconds = 300.0
    """An answer that takes longer is given up, and the request is tried again. In (0, 1000000]."""
    connect_seconds: Seconds = 10.0
    """A server that does not take a connection in so long is asked again later. In (0, 1000000]."""
    max_tokens_in_flight: Count = 32768
    """Tokens that one server is asked about at the same time; fewer need less memory there. At least 1."""
    max_requests: Count = 32
    """Requests that one server is asked at the same time. At least 1."""
    canary_nats: Positive | None = None
    """By how many nats per token a teacher's server may differ from itself: in the known text that every scoring
    request brings along, in texts that it wrote, in shared beginnings.  By default 0.1, for half precision, and 0.002
    where teacher.dtype is float32. Above 0."""
    allow_plain_http: bool = False
    """Send the key over http:// to another machine, readable to whoever is in between."""

    def nats_for(self, dtype: str = "auto") -> float:
        """`canary_nats`, or what is usual of servers that compute in `dtype`."""
        usual = NATS.get(dtype, NATS_OF_HALF_PRECISION)
        return usual if self.canary_nats is None else self.canary_nats


def base_url(url: str) -> str:
    """The address without a trailing /v1; refused if it is no plain http(s) address."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a bracket that is not closed, a port that is no number
        raise _no_address(url) from None
    if parts.username or parts.password or parts.query or parts.fragment:
        host = parts.hostname or "?"
        raise ConfigError(
            f"the address of server {host} holds a name, a password or a query, and addresses are recorded. Put the "
            "key into an environment variable and name that in api_key_env."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise _no_address(url)
    return url.rstrip("/").removesuffix("/v1")


def _no_address(url: str) -> ConfigError:
    return ConfigError(f"{shortened(url)!r} is no address of a server. Give one such as http://127.0.0.1:8000.")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Ranged):
    """Train an adapter instead of the weights."""

    section = "student.lora"

    rank: Count = 32
    """Columns of the adapter's matrices. At least 1."""
    alpha: Count = 64
    """What the adapter adds is multiplied by alpha / rank. At least 1."""
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Above 0 the student that samples differs from the student that is trained. In [0, 1)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names, or "all-linear"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ConfigError('student.lora.targets is empty. Name modules, or leave it out for "all-linear".')


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model in the Hugging Face layout."""

    path: str
    """A folder or a hub id."""
    gguf_file: str | None = None
    """Read the weights from this GGUF file in the folder."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    trust_remote_code: bool = False
    """Run code that comes with the model.  Off unless you have read it."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(ModelConfig):
    path: str = GIVEN
    """A folder or a hub id."""
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(ModelConfig):
    path: str = "base"
    """A folder, a hub id, "start": the student before training, "base": the student without its adapter (LoRA only),
    "student": the student as it is now, or a teacher of your own, as "package.module:Class" or "file.py:Class"."""
    knobs: Annotated[dict[str, Any], Fixed, Suppress] = field(default_factory=dict)
    """What a teacher of your own is made with."""
    briefing: Annotated[Briefing, PlainValidator(read_briefing), Fixed, Suppress] = AsStudent()
    """What it is told and the student is not, such as { kind = "column", column = "solution" }."""
    follow: Annotated[Follow, PlainValidator(read_follow), Fixed, Suppress] = Frozen()
    """How the student before training follows the student, such as { rule = "ema", decay = 0.999 }."""
    direction: Annotated[Direction | None, Fixed, Suppress] = None
    """What is added to one of its layers while it reads, such as { file = "refusal.npy", layer = 12 }."""
    chat: ChatConfig | None = None
    """It only writes, on a chat endpoint: how it is asked to continue answers, and what that may cost.  Then `path` is
    not read."""
    bridge: BridgeConfig | None = None
    """It has another tokenizer than the student: how its log-probabilities cross."""
    text_cache: bool = True
    """Keep the texts it writes on disk, in the run's folder."""
    score_cache: bool = False
    """Keep what servers say on disk as well: texts that come again are not scored again."""
    servers: tuple[str, ...] = ()
    """Addresses that serve it, such as http://127.0.0.1:8000; of `path` only the tokenizer and config are read then."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """How they are spoken to."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "briefing", read_briefing(self.briefing))
        object.__setattr__(self, "follow", read_follow(self.follow))

    @property
    def is_model(self) -> bool:
        """Whether `path` names a model of transformers."""
        return not self.is_student and not self.is_own and not self.only_writes

    @property
    def title(self) -> str:
        """What people know it by."""
        return (self.server.model or self.servers[0]) if self.only_writes else self.path

    @property
    def only_writes(self) -> bool:
        """Whether it is a chat endpoint that is asked for texts alone; `path` is not read then."""
        return bool(self.servers) and self.chat is not None

    @property
    def chats(self) -> bool:
        """Whether its texts are asked for as messages."""
        return self.only_writes or self.server.text == "chat"

    @property
    def is_student(self) -> bool:
        """Whether its weights are those that are trained: it has none of its own."""
        return self.path in ("base", "student") and not self.only_writes

    @property
    def follows(self) -> bool:
        """Whether it has weights of its own that move while the student is trained."""
        return not isinstance(self.follow, Frozen)

    @property
    def moves(self) -> bool:
        """Whether what it says of a text changes while the student is trained."""
        return self.follows or self.path == "student"

    def check_follow(self, student: StudentConfig) -> None:
        """Refuse a teacher that cannot follow the student."""
        if not self.follows:
            return
        said = f"teacher.follow asks for a teacher that moves by the rule {self.follow.rule!r}, but teacher.path"
        if self.path == "student":
            raise ConfigError(
                f'{said} is "student", which is the student at every step already. Leave teacher.follow out, or set '
                'teacher.path = "start".'
            )
        if self.path == "base":
            raise ConfigError(
                f'{said} is "base", the student without its adapter, which stays as it is. Set teacher.path = "start".'
            )
        if self.path != "start":
            raise ConfigError(
                f"{said} is {shortened(self.path)}, a teacher of its own, which stays as it is. Set teacher.path = "
                '"start", or leave teacher.follow out.'
            )
        if self.score_cache:
            raise ConfigError(
                "teacher.score_cache keeps what servers say of a text, but teacher.follow has the teacher move, and "
                "then it says something else. Leave teacher.score_cache out."
            )
        if self.dtype not in ("auto", student.dtype):
            raise ConfigError(
                f"teacher.dtype is {self.dtype}, but a teacher that follows the student has the student's, "
                f"{student.dtype}. Leave teacher.dtype out."
            )

    def lacks(self, student: StudentConfig, graded: bool) -> str:
        """What a complete run has and this one does not; `graded`: it has a grader."""
        if self.bridge is not None and not self.is_model:
            return (
                f"it has a bridge, which is for a model with a tokenizer of its own, but its path is {self.path!r}, "
                "which reads the student's tokens. Leave the bridge out, or set its path to a model."
            )
        if self.path == "base" and student.lora is None and not self.only_writes:
            return (
                'teacher.path is "base", the student without its adapter, but the student has no adapter: it would be '
                "its own teacher and learn nothing. Set teacher.path, or a [student.lora] section."
            )
        if self.follow.reads_answers and not graded:
            return (
                f"teacher.follow has the rule {self.follow.rule!r}, which waits until the reward rises, but there is "
                "no grader. Set `grader`, or choose the rule 'ema' or 'copy'."
            )
        return ""

    @property
    def is_own(self) -> bool:
        """Whether it is a teacher of the user's own: code that `path` names, or an object that was given in Python."""
        if self.path == GIVEN or is_name(self.path):
            return True
        return not Path(self.path).exists() and self.path in offered("teachers")


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(TeacherConfig):
    """Somebody else who reads every response; the method's pieces say what they look at."""

    path: str = READER
    """As for a teacher, or "teacher": the model of [teacher], told something else."""
    mean: Annotated[tuple[str, ...] | None, Fixed, Suppress] = None
    """It has no model but is the mean of these readers."""
    steered: Annotated[Steered | None, Fixed, Suppress] = None
    """It has no model but is one reader steered by others: { base = "teacher", plus = [...], minus = [...] }."""

    @property
    def made_of(self) -> Mixture | None:
        """How it is made of other readers; None if it has a model."""
        return mixture_of(self.mean, self.steered)
