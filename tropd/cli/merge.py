"""tropd merge ADAPTER -o FOLDER: an exported adapter and its base as one plain model."""

from __future__ import annotations

from pathlib import Path

from tropd.base.terminal import tell
from tropd.cli.arguments import Arguments, new_folder


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd merge", description="Write an adapter and its base as one plain model.")
    parser.add_argument("adapter", type=Path, help="the folder of an exported LoRA student")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    asked = parser.parse_args(argv)
    new_folder(asked.output)
    from tropd.checkpoints.export import merge
    from tropd.model.loading import choose_device

    merge(asked.adapter, asked.output, device=choose_device(asked.device))
    tell(f"the merged model is in {asked.output}")
    return 0
