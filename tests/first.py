"""One training step of two tiny models, evaluation and export included: what every other test builds on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    from tests.small_runs import run_of, write_models
    from tropd.run.start import train

    with tempfile.TemporaryDirectory() as folder:
        where = write_models(Path(folder))
        data = {"path": str(where / "data.jsonl"), "limit": 2}
        train(run_of(where, steps=1, evaluation={"data": data, "max_new_tokens": 4}))


if __name__ == "__main__":
    main()
