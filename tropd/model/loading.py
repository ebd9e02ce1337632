"""Models and tokenizers from disk or hub, with an explanation for the user if loading fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tropd.base.reading import check_file, first_line, read_json, refusing
from tropd.config.models import LoraConfig, ModelConfig, StudentConfig
from tropd.errors import ConfigError
from tropd.model import hf
from tropd.model.weights import check_read
from tropd.version import cannot_import

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("tropd.models")
LARGEST_SIZE, MOST_LAYERS = 10**9, 10**4
"""Limits of a model: larger sizes are a slip or an attack, and would be built for hours before they fail."""

_AT_ONCE = 1 << 24
"""Values that are hashed at once: 64 MiB of float32."""


def choose_device(asked: str) -> torch.device:
    if asked != "auto":
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there[asked]:
            raise ConfigError(f"device {asked!r} was asked for, but torch {torch.__version__} finds none here.")
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, asked)


def load_tokenizer(config: ModelConfig, whose: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source = config.tokenizer or config.path
    _check_path(source, f"{whose}.tokenizer" if config.tokenizer else f"{whose}.path")
    options = _options(config) if config.tokenizer is None else {"trust_remote_code": config.trust_remote_code}
    remedy = (
        f"Set {whose}.tokenizer to a folder that has one."
        if Path(source).expanduser().is_dir()
        else f"Check the name and the network, or set {whose}.path to a folder that holds the model."
    )
    with refusing(lambda why: f"the {whose}'s tokenizer cannot be read from {source}: {why}. {remedy}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        tokenizer.decode(tokenizer.encode("a"))  # some of what is wrong in its files shows only when it is used
        return tokenizer


def load_model(config: ModelConfig, whose: str, device: torch.device) -> Any:
    """The causal language model of a configuration, in evaluation mode, with every tensor read from its files."""
    _check_path(config.path, f"{whose}.path")
    return _read(config, choose_dtype(config.dtype, device), whose).to(device).eval()


def as_pair(given: Any, whose: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model of transformers and its tokenizer: a given pair, or the tokenizer from the model's `name_or_path`."""
    model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise ConfigError(
            f"{whose}: a {type(model).__name__} was given. Give a model of AutoModelForCausalLM, or (model, tokenizer)."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{whose}: weights of the model are on the device 'meta', so there are none. Load it first.")
    if tokenizer is None:
        source = source_of(model)
        if source is None:
            raise ConfigError(f"{whose}: the model says nowhere where its tokenizer is. Give (model, tokenizer).")
        tokenizer = load_tokenizer(ModelConfig(path=source), whose)
    return model, tokenizer


def source_of(model: Any) -> str | None:
    """The path or id that a model was read from, if any."""
    path = str(getattr(model, "name_or_path", "") or "")
    return path if path and (Path(path).expanduser().is_dir() or not looks_local(path)) else None


def load_as_stored(path: str, whose: str, device: torch.device) -> Any:
    """The causal language model in a folder, in the precision of its files."""
    return _read(ModelConfig(path=path), "auto", whose).to(device).eval()


def _read(config: ModelConfig, dtype: torch.dtype | str, whose: str) -> Any:
    from transformers import AutoModelForCausalLM

    # With sizes ignored, a tensor of another shape is listed with the others that do not fit.
    how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    said = f"the {whose} {config.path} cannot be loaded as a causal language model"
    with refusing(lambda why: f"{said}: {why}. tropd trains and asks models that AutoModelForCausalLM reads."):
        loaded: Any = AutoModelForCausalLM.from_pretrained(config.path, dtype=dtype, **how, **_options(config))
    model, info = loaded
    check_read(model, info, config.path, whose)
    return model


def free_memory(device: torch.device) -> int | None:
    """Bytes of free memory, if the system tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if device.type != "cpu" or not facts.exists():
        return None
    lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def wrap_student(model: Any, config: StudentConfig, seed: int) -> nn.Module:
    """The student as it is trained: adapter, gradient checkpointing, modes."""
    student: Any = add_adapter(model, config.lora, seed) if config.lora else model.requires_grad_(True)
    if config.gradient_checkpointing:
        hf.enable_checkpointing(student)
    return student


def add_adapter(model: Any, lora: LoraConfig, seed: int) -> nn.Module:
    try:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
    except ImportError as error:
        raise cannot_import(error, "peft", "lora", "a [student.lora] section") from None
    widest = max((min(p.shape) for p in model.parameters() if p.dim() == 2), default=0)
    if lora.rank > widest:
        raise ConfigError(
            f"student.lora.rank = {lora.rank} was asked for, but the student's widest matrix has rank {widest}: an "
            "adapter that is no smaller saves nothing. Give less, or leave out [student.lora] to train the weights."
        )
    targets = list(lora.targets) if lora.targets != ("all-linear",) else "all-linear"
    asked = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)  # the adapter's random half is part of the run, not of the process's history
    try:
        return get_peft_model(model, asked)
    except ValueError as error:
        raise ConfigError(f"the adapter does not fit the student: {first_line(error)}.") from error
    finally:
        torch.set_rng_state(state)


def base_of(adapter: Path) -> str:
    """The model that an exported adapter belongs to."""
    check_folder(adapter, "the adapter")
    settings = read_json(adapter / "adapter_config.json")
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{adapter / 'adapter_config.json'} does not name the model that the adapter belongs to.")
    return base


def _options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision:
        options["revision"] = config.revision
    if config.gguf_file:
        options["gguf_file"] = config.gguf_file
    return options


def looks_local(path: str) -> bool:
    """Whether a name is a path on this machine, existing or not, rather than a hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).expanduser().parent.is_dir()


def _check_path(path: str, field: str) -> None:
    """Refuse a path that looks like a folder but is none; it would be taken for a hub id, with a confusing error."""
    place = Path(path).expanduser()
    if looks_local(path) and not place.is_dir():
        raise ConfigError(f"{field} is {path}, but there is no such folder.")
    if place.is_dir():
        check_folder(place, field)
    else:
        log.warning("%s: there is no folder %s here; asking the Hugging Face hub for it.", field, path)


def check_folder(folder: Path, field: str) -> None:
    """Refuse files that another library would wait for forever, or sizes that it would build forever."""
    for file in (f for f in folder.iterdir() if f.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt")):
        check_file(file)
    found = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        found[name] = read_json(folder / name, unique=False) if (folder / name).exists() else {}
        if not isinstance(found[name], dict):
            raise ConfigError(f"{field} is {folder}, but its {name} holds no object of names and values.")
    config = found["config.json"]
    huge = {name: x for name, x in config.items() if isinstance(x, int) and abs(x) > LARGEST_SIZE}
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(layers, int) and layers > MOST_LAYERS:
        huge["num_hidden_layers"] = layers
    if huge:
        said = ", ".join(f"{name} = {x}" for name, x in huge.items())
        raise ConfigError(f"{field} is {folder}, but its config.json says {said}: no model is that large.")


def model_fingerprint(model: nn.Module, *, whole: bool = False) -> str:
    """A hash of the weights: shapes, types and 64 evenly spread values of every parameter, or all values."""
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // 64)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for part in flat.split(_AT_ONCE) if whole else [flat[::stride][:64]]:
            digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def without_dropout(model: Any) -> list[str]:
    """Switch off the checkpoint's dropout: the student that is trained must be the student that sampled.

    Modules keep their rates as numbers (`p` of nn.Dropout, `attention_dropout`, `layerdrop`); the config stays.
    """
    rates: set[str] = set()
    for module in model.modules():
        names = ["p"] if isinstance(module, torch.nn.Dropout) else [n for n in vars(module) if "drop" in n]
        for name in names:
            if isinstance(value := getattr(module, name), float) and value > 0:
                setattr(module, name, 0.0)
                rates.add(f"{value:g}")
    if not rates:
        return []
    return [
        f"the student's own dropout ({', '.join(sorted(rates))}) is switched off: rollouts are drawn without it, and "
        "with it the trained student would differ from the student that wrote. You may still set student.lora.dropout."
    ]
