"""Data in forms that people's tools write: kinds of Parquet columns, encodings of JSON, pictures as base64."""

import base64
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ivtp_cli
from modeling_ivtp.batch.data import open_data
from modeling_ivtp.files.images import load_image
from tests.support.batches import QUESTIONS, alone, batch, fails

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VIEWS = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
COLUMNS = {
    "binary": (pa.binary(), lambda file: file),
    "large_binary": (pa.large_binary(), lambda file: file),
    "binary_view": (pa.binary_view(), lambda file: file),
    "struct of views": (VIEWS, lambda file: {"bytes": file, "path": None}),
    "list": (pa.list_(pa.binary()), lambda file: [file]),
    "large_list": (pa.large_list(pa.binary_view()), lambda file: [file]),
    "fixed_size_list": (pa.list_(pa.binary(), 1), lambda file: [file]),
    "fixed_size_list of structs": (pa.list_(FILE, 1), lambda file: [{"bytes": file, "path": None}]),
    "dictionary": (pa.dictionary(pa.int32(), pa.binary()), lambda file: file),
}
"""Types that hold files, and how they hold one."""


def write_parquet(table, path):
    try:
        pq.write_table(table, path)
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this pyarrow does not write such columns: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_columns_of_every_type_that_holds_files(capsys, sample, loaded, tmp_path, name):
    """Rows without a picture are among them, of which some types count the places."""
    kind, stored = COLUMNS[name]
    files = [(sample.root / f"pictures/{number}.png").read_bytes() for number in range(3)]
    cells = [stored(files[0]), None, stored(files[1]), stored(files[2])]
    column = pa.array([cell and files.index(cell) for cell in cells], pa.int32()) if name == "dictionary" else None
    if column is not None:
        column = pa.DictionaryArray.from_arrays(column, pa.array(files, pa.binary()))
    table = pa.table({"image": column if column is not None else pa.array(cells, kind), "question": [QUESTIONS[0]] * 4})
    write_parquet(table, tmp_path / "rows.parquet")
    rows = batch(capsys, sample, tmp_path / "out", data=tmp_path / "rows.parquet")
    wanted = [[f"pictures/{number}.png"] for number in (0, 1, 2)]
    wanted.insert(1, [])
    assert [row["error"] for row in rows] == [None] * 4
    assert [row["answer"] for row in rows] == [
        alone(sample, {"image": images, "question": QUESTIONS[0]})[0] for images in wanted
    ]


@pytest.mark.slow
def test_files_of_one_length(capsys, sample, loaded, tmp_path):
    file = (sample.root / "pictures/0.png").read_bytes()
    table = pa.table({"image": pa.array([file, None], pa.binary(len(file))), "question": [QUESTIONS[0]] * 2})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [row["images"] for row in batch(capsys, sample, tmp_path / "out", data=tmp_path / "rows.parquet")] == [1, 0]


def test_texts_that_are_views(capsys, sample, loaded, tmp_path):
    columns = {"image": [str(sample.root / "pictures/0.png")], "question": [QUESTIONS[0]], "id": ["a"]}
    table = pa.table({name: pa.array(values, pa.string_view()) for name, values in columns.items()})
    write_parquet(table, tmp_path / "rows.parquet")
    (row,) = batch(capsys, sample, tmp_path / "out", "--id-column", "id", data=tmp_path / "rows.parquet")
    assert row["id"] == "a"
    assert row["answer"] == alone(sample, {"image": ["pictures/0.png"], "question": QUESTIONS[0]})[0]


def test_a_column_that_the_reader_does_not_know_is_named(capsys, sample, tmp_path):
    table = pa.table({"image": pa.array([[b"x"]], pa.list_view(pa.binary())), "question": ["Why?"]})
    write_parquet(table, tmp_path / "rows.parquet")
    line = fails(capsys, sample, tmp_path / "out", data=tmp_path / "rows.parquet")
    assert "rows.parquet cannot be read as a data set" in line
    assert "list_view" in line


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def test_lines_in_another_encoding_say_so(tmp_path):
    line = '{"image": null, "question": "caf\u00e9"}\n'.encode("latin-1")
    (tmp_path / "rows.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=r"no row that can be read; of the first, its line is not UTF-8 \(byte 0xe9\)"):
        open_data(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_bytes(b'{"image": null, "question": "tea"}\n' + line)
    assert "not UTF-8 (byte 0xe9)" in open_data(str(tmp_path / "rows.jsonl")).rows(1, 2)[0].problem


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_in_every_encoding_of_unicode(tmp_path, encoding, ending):
    """Windows' own tools write UTF-16, where a line's end is two bytes and ਊ has one of them."""
    rows = [{"image": None, "question": f"{number} ਊ\u2028 caf\u00e9?"} for number in range(3)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n{torn"
    text = lines if ending == "jsonl" else json.dumps(rows, ensure_ascii=False)
    (tmp_path / f"rows.{ending}").write_bytes(text.encode(encoding))
    data = open_data(str(tmp_path / f"rows.{ending}"))
    found = data.rows(0, 9)
    assert [row.question for row in found[:3]] == [row["question"] for row in rows]
    if ending == "jsonl":
        assert len(found) == 4
        assert found[3].problem.startswith("its line is no JSON")
    (part,) = open_data(str(tmp_path / f"rows.{ending}"), split="train[1:2]").rows(0, 9)
    assert part.question == rows[1]["question"]


def test_a_torn_line_is_told_by_its_character(tmp_path):
    """Not by a line, which would be taken for one of the file's."""
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n{"question": \n')
    (_, torn) = open_data(str(tmp_path / "rows.jsonl"), image_column=None).rows(0, 9)
    assert torn.problem == "its line is no JSON (Expecting value at character 15)"


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_is_no_text_is_refused_with_its_name(capsys, sample, tmp_path, ending):
    (tmp_path / f"rows.{ending}").write_bytes(b"[\0{\0\x00\xd8")
    line = fails(capsys, sample, tmp_path / "out", data=tmp_path / f"rows.{ending}")
    assert f"rows.{ending} is damaged" in line


def test_base64_in_a_column_of_pictures_is_read(capsys, sample, loaded, tmp_path):
    """Wrapped or not; what is damaged is an error that does not repeat it."""
    text = base64.b64encode((sample.root / "pictures/0.png").read_bytes()).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    cells = [text, wrapped, [text], text[:-3], "long/" * 2000, f"{text}://x"]
    rows = [{"image": cell, "question": QUESTIONS[0]} for cell in cells]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = batch(capsys, sample, tmp_path / "out", data=tmp_path / "rows.json")
    answer = alone(sample, {"image": ["pictures/0.png"], "question": QUESTIONS[0]})[0]
    assert [row["answer"] for row in found] == [answer] * 3 + [None] * 3
    for row in found[3:]:
        assert len(row["error"]) < 300
    assert "is not valid base64" in found[3]["error"]
    assert "there is no image" in found[4]["error"]


def test_no_error_repeats_a_long_value(capsys, sample, loaded, tmp_path):
    long = "x" * 5000
    rows = [
        {"image": None, "question": {"text": long}, "id": "a"},
        {"image": None, "question": f"{long}\ud83d", "id": "b"},
        {"image": None, "question": "Why?", "id": f"{long}\ud83d"},
        {"image": long, "question": "Why?", "id": "d"},
        {"image": f"ftp://{long}", "question": "Why?", "id": "e"},
        {"image": None, "question": "Why?", "id": "f"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = batch(capsys, sample, tmp_path / "out", "--id-column", "id", data=tmp_path / "rows.json")
    assert found.pop()["error"] is None
    for row in found:
        assert "x" * 50 in row["error"]
        assert len(row["error"]) < 400


@pytest.mark.slow
def test_the_other_commands_read_base64_and_repeat_no_long_source(capsys, sample, tmp_path):
    text = base64.b64encode((sample.root / "pictures/0.png").read_bytes()).decode()
    assert load_image(text).tobytes() == load_image(sample.root / "pictures/0.png").tobytes()
    with pytest.raises(ValueError, match="is not an http, https or data URL"):
        load_image(text, from_stranger=True)
    assert ivtp_cli.main(["generate", "-m", str(sample.ivtp), "-i", "no" * 3000, "-p", "What?"]) == 1
    line = capsys.readouterr().err
    assert "there is no image 'nono" in line
    assert len(line) < 300
    # A file's name wins.
    path = tmp_path / "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    shutil.copy(sample.root / "pictures/1.png", path)
    assert load_image(path).tobytes() == load_image(sample.root / "pictures/1.png").tobytes()
