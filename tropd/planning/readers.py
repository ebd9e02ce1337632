"""The sizes of the models that read beside the teacher's."""

from __future__ import annotations

import torch

from tropd.config.run import Run
from tropd.doctor.cost import without_storage
from tropd.doctor.readers import asked_of, has_teachers_model
from tropd.model.loading import choose_dtype
from tropd.planning.work import Size, size_of


def reader_sizes(run: Run, student: Size, device: torch.device) -> dict[str, Size]:
    """The sizes of the readers in this process that are asked something and have another model than the teacher."""
    found: dict[str, Size] = {}
    for name in asked_of(run):
        reader = run.all_readers.get(name)
        if reader is None or reader.made_of is not None or reader.servers or has_teachers_model(run, name):
            continue
        if not reader.is_model:  # the student, or code of the user's own, which is taken to be as large
            found[name] = student
            continue
        model, width = without_storage(reader), choose_dtype(reader.dtype, device).itemsize
        found[name] = size_of(model.config, float(sum(p.numel() for p in model.parameters())), width)
    return found
