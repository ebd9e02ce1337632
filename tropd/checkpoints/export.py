"""Export the trained student: a Hugging Face folder, or a PEFT folder for an adapter."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tropd.base.names import shown
from tropd.checkpoints.checkpoint import atomic_folder
from tropd.config.models import GIVEN
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError
from tropd.methods import Method, NamedMethod
from tropd.methods.describe import paper_link
from tropd.model.loading import base_of, load_as_stored
from tropd.model.weights import load_adapter
from tropd.version import __version__


def export(model: Any, tokenizer: Any, run: Run, folder: Path, *, step: int, results: dict[str, float]) -> Path:
    """Write weights, tokenizer, chat template, generation config and a model card; transformers loads it unmodified."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(run, step=step, results=results))
        (temporary / "run.toml").write_text(run.dump())
    return folder


def export_untied(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Export the student for a server that will get new weights: its head is a separate tensor.

    A server with tied embeddings may load new weights into the embedding and keep the old head.
    """
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    state = dict(model.state_dict())
    state |= {f"{name}.weight": state[f"{name}.weight"].clone() for name in heads}
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        path = temporary / "config.json"
        config = json.loads(path.read_text())
        for part in (config, *(x for x in config.values() if isinstance(x, dict) and "tie_word_embeddings" in x)):
            part["tie_word_embeddings"] = False
        path.write_text(json.dumps(config, indent=2))
    return folder


def export_adapter(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Export the adapter alone, for a server that holds the base."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
    return folder


def merge(adapter: Path, folder: Path, *, device: torch.device) -> Path:
    """Merge an adapter and its base into one plain model."""
    from transformers import AutoTokenizer

    if not (adapter / "adapter_config.json").exists():
        raise ConfigError(f"{adapter} holds no adapter_config.json: name the folder of an exported LoRA student.")
    base = base_of(adapter)
    try:
        model = load_as_stored(base, "base", device)
    except ConfigError as error:
        raise ConfigError(
            f"{error} It is the base of {adapter}, named as in the run file: a path that is not absolute counts from "
            "the folder where the run was started."
        ) from error
    merged = load_adapter(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with atomic_folder(folder) as temporary:
        merged.merge_and_unload().save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        card = adapter / "README.md"
        if card.exists():
            (temporary / "README.md").write_text(card.read_text())
    return folder


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub; the token comes from the environment or `hf auth login`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The bases: the HTTP library behind the hub's raises its own error if the hub does not answer.
    refused: Any = (*HfHubHTTPError.__bases__, OfflineModeIsEnabled, ValueError)
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))
    except refused as error:
        raise CheckpointError(
            f"{folder} could not be pushed to {repository}: {str(error).splitlines()[0].rstrip('. ')}. "
            f"The folder itself is complete: log in with `hf auth login`, then `hf upload {repository} {folder} .`"
        ) from error


def _title(method: Method) -> str:
    """A method that is not imported has the name of its class."""
    return method.name.rpartition(":")[2] if isinstance(method, NamedMethod) else type(method).__name__


def model_card(run: Run, *, step: int, results: dict[str, float]) -> str:
    """The model card: how the model was made, from what, and how good it is."""
    method = run.method
    settings = run.evaluation.sampling
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(results.items())]
    measured = ["| measure | value |", "|---|---|", *rows] if rows else ["Not evaluated."]
    link = f" ({paper_link(method.paper)})" if method.paper else ""
    # The hub refuses a card whose base model is a local folder.
    local = run.student.path == GIVEN or Path(run.student.path).expanduser().exists()
    base = [] if local else [f"base_model: {json.dumps(run.student.path)}"]
    lines = [
        "---",
        *base,
        "library_name: " + ("peft" if run.student.lora else "transformers"),
        "tags: [tropd, on-policy-distillation]",
        "---",
        f"# {Path(run.student.path).name} distilled with {_title(method)}",
        "",
        f"- student: `{run.student.path}`" + (f", LoRA of rank {run.student.lora.rank}" if run.student.lora else ""),
        f"- teacher: `{run.teachers_said}`",
        *([f"- readers: `{run.readers_said}`"] if run.said_readers else []),
        f"- method: `{shown(method.name)}`{link}",
        f"- data: `{run.data.path}` ({run.data.split})",
        f"- trained for {step} of {run.steps} steps, {run.rollout.num_prompts} prompts x "
        f"{run.rollout.num_rollouts} rollouts of at most {run.rollout.max_new_tokens} tokens each, seed {run.seed}",
        f"- tropd {__version__}, torch {torch.__version__}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}",
        "",
        "## Results",
        "",
        *measured,
        "",
        f"Sampled at temperature {settings.temperature:g}, top_p {settings.top_p:g}, at most "
        f"{run.evaluation.max_new_tokens} tokens, seed {run.evaluation.seed}.",
        "",
        "The whole configuration is in `run.toml`.",
        "",
    ]
    return "\n".join(lines)
