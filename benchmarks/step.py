"""One training step from prompts to new weights: tropd against the DistillationTrainer of TRL, same models and prompts.

    python benchmarks/step.py                                          # V = 151,936, float32, every length the same
    python benchmarks/step.py --ragged --dtype bfloat16
    python benchmarks/step.py --vocabulary 8192 --ragged

tropd_tropd, tropd_opd   `tropd.training.iteration.iterate`: roll out, score, loss and gradient, optimiser, probes
trl                      `DistillationTrainer`, reverse KL over the whole vocabulary; no checkpointing, no autocast

Random models: student 4 x 256, teacher 6 x 384; 8 prompts of 64 tokens, up to 128 new.  Ragged: one token in 50 stops.
A useful token is one that a completion keeps.  One thread, CPU seconds, sides turn about in one process; a rate is all
tokens over all seconds.  Peak memory of each side in a process of its own, above what it held before its first step.
`benchmarks/gpu_check` runs the same on a GPU, in seconds of the clock.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

METHODS = {"tropd_tropd": {"name": "tropd", "guidance": False}, "tropd_opd": {"name": "opd"}}
SIDES = (*METHODS, "trl")
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Shape:
    """Fields of `Qwen3Config`."""

    num_hidden_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 768
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    tie_word_embeddings: bool = False


@dataclass
class Settings:
    vocabulary: int = 151_936
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    ragged: bool = False
    stop_every: int = 50
    num_prompts: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 128
    student: Shape = Shape()
    teacher: Shape = Shape(num_hidden_layers=6, hidden_size=384, intermediate_size=1152, num_attention_heads=6)
    repeats: int = 3
    memory: bool = True
    """Measure peak memory too."""
    profile: str = ""
    """Profile one step of this side instead."""
    only: str = ""
    """Run two steps of one side and print its peak memory (used by the script itself)."""


def make_model(shape: Shape, s: Settings) -> Any:
    torch.manual_seed(shape.num_hidden_layers)
    rest = {"max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    with torch.device(s.device):
        return Qwen3ForCausalLM(Qwen3Config(**asdict(shape), vocab_size=s.vocabulary, **rest)).to(
            getattr(torch, s.dtype)
        )


def prepare(folder: Path, s: Settings) -> None:
    """Both models, a tokenizer of one token per word, and eight prompts, on disk."""
    vocab = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, s.vocabulary)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    for name, shape in (("student", s.student), ("teacher", s.teacher)):
        model = make_model(shape, s)
        model.generation_config.eos_token_id = list(range(1, s.vocabulary, s.stop_every)) if s.ragged else 1
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids = torch.randint(2, s.vocabulary, (s.num_prompts, s.prompt_tokens), generator=torch.Generator().manual_seed(0))
    rows = [{"prompt": " ".join(f"t{i}" for i in row)} for row in ids.tolist()]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


Step = Callable[[], int]  # runs one step and says how many tokens its completions kept


def tropd_side(side: str, folder: Path, s: Settings, tell: Callable[[Any], None] = lambda record: None) -> Step:
    """`tell` is given each step's record."""
    from tropd.config.run import Run
    from tropd.monitoring.alarms import Alarms
    from tropd.run.start import assemble
    from tropd.training.iteration import iterate
    from tropd.training.source import Source

    run = Run.from_dict(
        {
            "steps": 1_000_000,
            "device": s.device,
            "student": {"path": str(folder / "student"), "dtype": s.dtype},
            "teacher": {"path": str(folder / "teacher"), "dtype": s.dtype},
            "data": {"path": str(folder / "prompts.jsonl")},
            "method": METHODS[side],
            "rollout": {
                "num_prompts": s.num_prompts,
                "num_rollouts": 1,
                "max_new_tokens": s.new_tokens,
                "save_every": 1_000_000,  # the first step's, which warms up
            },
            "optimizer": {"learning_rate": LEARNING_RATE},
        },
        "benchmarks/step.py",
    )
    directory = folder / side
    directory.mkdir()
    parts, alarms, steps = assemble(run, directory), Alarms(run.alarms), iter(range(run.steps))
    source = Source(parts)

    def step() -> int:
        record = iterate(parts, source, directory, next(steps), alarms).record
        assert record.tokens["prompt"] == s.num_prompts * s.prompt_tokens
        tell(record)
        return record.tokens["student"]

    return step


def run_trl(folder: Path, s: Settings, num_steps: int, begin: Callable[[], None], end: Callable[[int], None]) -> None:
    """Train with TRL; `begin` is called before each step and `end` after it, with its number of useful tokens."""
    from datasets import load_dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    class Counting(DistillationTrainer):
        num_tokens = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            assert int(batch["prompt_mask"].sum()) == s.num_prompts * s.prompt_tokens
            self.num_tokens = int(batch["completion_mask"].sum())
            return batch

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            end(trainer.num_tokens)

    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        use_cpu=s.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=s.num_prompts,
        max_completion_length=s.new_tokens,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=num_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": s.dtype},
        teacher_model_init_kwargs={"dtype": s.dtype},
    )
    trainer = Counting(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        callbacks=[Turns()],
    )
    trainer.train()


def now(s: Settings) -> float:
    """CPU seconds; on a GPU seconds of the clock, once it is idle."""
    if s.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(folder: Path, s: Settings) -> dict[str, list[tuple[int, float]]]:
    """Useful tokens and CPU seconds of each side, one pair per repeat; the first, unmeasured turn warms up."""
    ours = {side: tropd_side(side, folder, s) for side in METHODS}
    steps: dict[str, list[tuple[int, float]]] = {side: [] for side in SIDES}
    started = [0.0]

    def begin() -> None:
        started[0] = now(s)

    def end(num_tokens: int) -> None:
        steps["trl"].append((num_tokens, now(s) - started[0]))
        for side, step in ours.items():
            start = now(s)
            num_tokens = step()
            steps[side].append((num_tokens, now(s) - start))

    run_trl(folder, s, s.repeats + 1, begin, end)
    return {side: pairs[1:] for side, pairs in steps.items()}


def peak_megabytes(side: str, folder: Path, s: Settings) -> float:
    """Growth of the resident set over two steps of one side, which make the optimiser's state and use it."""
    before = [0.0]

    def begin() -> None:
        if not before[0]:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before[0] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    if side == "trl":
        run_trl(folder, s, 2, begin, lambda num_tokens: None)
    else:
        step = tropd_side(side, folder, s)
        begin()
        for _ in range(2):
            step()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024 - before[0]


def profile(side: str, folder: Path, s: Settings) -> None:
    """Where the second step of a side spends its time."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    turns = iter(range(2))

    def begin() -> None:
        if next(turns):
            profiler.start()

    if side == "trl":
        run_trl(folder, s, 2, begin, lambda num_tokens: None)
    else:
        step = tropd_side(side, folder, s)
        for _ in range(2):
            begin()
            step()
    profiler.stop()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=44))


def in_own_process(side: str, s: Settings) -> float:
    flags = [f"--vocabulary={s.vocabulary}", f"--dtype={s.dtype}", "--ragged" if s.ragged else "--no-ragged"]
    out = subprocess.run(
        [sys.executable, __file__, *flags, f"--only={side}"], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(out.stdout.strip().splitlines()[-1])


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), s)
        if s.only:
            return print(peak_megabytes(s.only, Path(name), s))
        if s.profile:
            return profile(s.profile, Path(name), s)
        steps = measure(Path(name), s)
    rows: dict[str, dict[str, float]] = {}
    for side, pairs in steps.items():
        tokens, seconds = (sum(x) for x in zip(*pairs, strict=True))
        rows[side] = {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds}
    for side in SIDES if s.memory else ():
        rows[side]["megabytes"] = in_own_process(side, s)
    trl = rows["trl"]
    print(f"V={s.vocabulary} {s.dtype} {'ragged' if s.ragged else 'even'}, 1 thread, torch {torch.__version__}")
    for side, row in rows.items():
        rates = [num_tokens / seconds for num_tokens, seconds in steps[side]]
        spread = f"{min(rates):.1f}..{max(rates):.1f}"
        line = f"{side:12} {row['tokens_per_second']:8.1f} useful tokens per CPU s ({spread})"
        line += f"  {row['tokens_per_second'] / trl['tokens_per_second']:5.2f}x"
        if s.memory:
            line += f"  {row['megabytes']:7.0f} MB  {row['megabytes'] / trl['megabytes']:.2f} of trl"
        print(line)
    print(json.dumps({"settings": asdict(s), "sides": rows, "repeats": steps}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
