"""Rank 0 keeps the records of a run, and gathers what the other ranks know."""

from __future__ import annotations

from typing import Any

from tropd.distributed.ranks import Ranks
from tropd.types import StepRecord


def gathered(table: Any, world: Ranks) -> Any:
    """A pyarrow table with the rows of all ranks.  Every rank must call it."""
    if world.size == 1:
        return table
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    sent = world.gather_bytes(sink.getvalue().to_pybytes())
    return pa.concat_tables([pa.ipc.open_stream(content).read_all() for content in sent], promote_options="default")


class NoRecords:
    """Instead of a RecordWriter on all ranks but the first."""

    missing: tuple[int, ...] = ()

    def write(self, record: StepRecord) -> None:
        pass

    def close(self) -> None:
        pass
