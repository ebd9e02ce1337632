from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.report.folders import write_folder
from tropd.report.history import read_history
from tropd.report.transcripts import collect, spread


def rewrite(path: Path, change: dict[str, object], drop: tuple[str, ...] = ()) -> None:
    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names if name not in drop}
    pq.write_table(pa.table({**columns, **change}), path)


def test_each_token_comes_with_its_author_fate_and_opinions(tmp_path: Path) -> None:
    shelf = collect([read_history(write_folder(tmp_path / "run", saved=[0], texts=["né!"]))])
    [one] = shelf.transcripts
    assert "".join(one["texts"]) == "né!" and one["prompt"] == "Q?" and one["response"] is None
    assert one["authors"] == "tsss"
    assert one["fates"] == ["guidance", "outlier", "trusted", "trusted"]
    assert one["student"] == [-100, -110, -120, -130]
    assert one["teacher"] == [-100, -110 - 5000, -120, -130]
    assert one["tops"] == [None, [("x", -500), ("y", -1500), ("z", -3000)], None, None]
    assert one["gap"] == 5.0
    assert (shelf.num_kept, shelf.problems) == (1, [])
    data = shelf.as_data()
    [packed] = data["transcripts"]
    assert [data["fates"][i] for i in packed["fates"]] == one["fates"]
    assert packed["tops"][1] == [0, -500, 1, -1500, 2, -3000] and data["words"] == ["x", "y", "z"]


def test_a_limit_is_spread_over_runs_and_steps(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(6)]
    runs = [
        read_history(write_folder(tmp_path / name, steps=20, saved=range(0, 20, 2), texts=texts)) for name in ("a", "b")
    ]
    shelf = collect(runs, num_transcripts=24)
    assert [one["run"] for one in shelf.transcripts] == [0] * 12 + [1] * 12
    assert sorted({one["step"] for one in shelf.transcripts}) == [0, 8, 18]
    assert shelf.num_kept == 120
    assert collect(runs, num_transcripts=0).transcripts == []
    few = collect(runs, num_tokens=2 * 3 * 8)
    assert 6 <= len(few.transcripts) < 24


def test_a_spread_holds_both_ends() -> None:
    assert spread(range(100), 3) == [0, 50, 99]
    assert spread(range(2), 3) == [0, 1]
    assert (spread([], 3), spread([4, 5], 1), spread([4, 5], 0)) == ([], [5], [])


def test_an_old_file_without_the_newer_columns_opens(tmp_path: Path) -> None:
    run = read_history(write_folder(tmp_path / "run", saved=[0]))
    newer = ("token_texts", "student_logprobs", "teacher_top_ids", "teacher_top_texts", "teacher_top_logprobs")
    rewrite(run.rollouts[0], {}, newer)
    [one] = collect([run]).transcripts
    assert one["response"] == " the cat sat"
    assert one["texts"][0] == f"⟨{one['ids'][0]}⟩"
    assert one["student"][:3] == [None, -500, -1000]  # what the sampler said; the teacher's token was not sampled
    assert set(one["tops"]) == {None}


def test_broken_files_and_rows_are_named_and_left_out(tmp_path: Path) -> None:
    run = read_history(write_folder(tmp_path / "run", saved=[0, 1, 2, 3], texts=["one", "two"]))
    run.rollouts[1].write_bytes(b"PAR1 torn")
    rewrite(run.rollouts[2], {}, ("authors",))
    authors = pq.read_table(run.rollouts[3])["authors"].to_pylist()
    rewrite(run.rollouts[3], {"authors": [authors[0], authors[1][:-1]]})
    shelf = collect([run])
    assert [one["step"] for one in shelf.transcripts] == [0, 0, 3]
    assert [problem.split(" ")[1] for problem in shelf.problems] == [
        f"rollouts/step_00000{i}.parquet" for i in (1, 2)
    ] + ["rollouts/step_000003.parquet,"]


def test_no_rollouts_are_no_transcripts(tmp_path: Path) -> None:
    assert collect([read_history(write_folder(tmp_path / "run"))]).as_data() == {
        "transcripts": [],
        "words": [],
        "fates": [""],
        "kept": 0,
    }
