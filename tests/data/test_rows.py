from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from tropd.data.rows import open_table
from tropd.errors import DataError

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}, {"prompt": "c", "answer": None}]
NUMBERED = list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_rows_every_time(tmp_path: Path, streaming: bool) -> None:
    data = Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_json(tmp_path / "rows.jsonl")
    data.to_json(tmp_path / "lines.json")
    data.to_json(tmp_path / "array.json", lines=False)
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    for name in ("rows.parquet", "rows.jsonl", "lines.json", "array.json", "saved", "splits"):
        table = open_table(str(tmp_path / name), streaming=streaming)
        assert table.columns == ("prompt", "answer"), name
        assert list(table.read()) == NUMBERED and list(table.read()) == NUMBERED, name


def test_blank_lines_and_a_byte_order_mark_are_no_rows_but_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b", "level": 2}\n')
    table = open_table(str(path))
    assert [number for number, _ in table.read()] == [1, 3]
    assert table.columns == ("prompt", "level"), "of all rows, not of the first"
    (tmp_path / "array.json").write_bytes(b'\xef\xbb\xbf\n[{"prompt": "a"}]')
    assert list(open_table(str(tmp_path / "array.json")).read()) == [(1, {"prompt": "a"})]


@pytest.mark.parametrize("bad", ['{"prompt": ', '["a"]', "\udcff"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_line_is_named_by_its_number(tmp_path: Path, bad: str, streaming: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + bad.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="line 2 "):
        list(open_table(str(path), streaming=streaming).read())


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    for path in (tmp_path / "trian.jsonl", tmp_path / "train"):
        with pytest.raises(DataError, match=r"does not exist.*did you mean 'train\.jsonl'"):
            open_table(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_data_set_is_refused(tmp_path: Path, name: str, streaming: bool) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        Dataset.from_dict({"prompt": []}).to_parquet(path)
    else:
        path.write_text("[]" if path.suffix == ".json" else "\n")
    with pytest.raises(DataError, match="is empty"):
        open_table(str(path), streaming=streaming)


def test_a_broken_parquet_file_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    for name, says in (("rows.parquet", "not a readable parquet"), ("rows.csv", "'.csv' files are not read")):
        (tmp_path / name).write_text("a,b")
        with pytest.raises(DataError, match=says):
            open_table(str(tmp_path / name))


def test_a_missing_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"no split 'trian' .did you mean 'train'.*it has train"):
        open_table(str(tmp_path / "saved"), split="trian")


def test_a_hub_data_set_that_cannot_be_reached_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data set 'tropd-test/none' \(main\), split 'test' cannot be loaded.*network"):
        open_table("tropd-test/none", name="main", split="test")
