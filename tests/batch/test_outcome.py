"""What a run says at its end, and the names that its rows carry."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ivtp_cli
from modeling_ivtp.batch.data import open_data
from tests.support.batches import alone, answers, arguments, batch, write_rows

SOUND, FAILING = {"image": None, "question": "Why?"}, {"image": None, "question": ""}


def outcome(capsys, sample, out, data, *more):
    """Exit status, standard output and standard error."""
    capsys.readouterr()
    status = ivtp_cli.main(arguments(sample, out, *more, data=data))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_a_run_whose_rows_all_failed_is_a_failure(capsys, sample, loaded, tmp_path):
    """Also if it was finished before; its answers are written all the same."""
    data = write_rows(tmp_path / "rows.jsonl", [FAILING] * 3)
    for done in ("done", "was finished before"):
        assert outcome(capsys, sample, tmp_path / "out", data) == (
            1,
            f"{done}: 3 rows, 3 of them errors, in {tmp_path / 'out'}\n",
            "ivtp: all 3 rows failed; the first: row 0: the prompt is empty\n",
        )
    assert len(answers(tmp_path / "out")) == 3


@pytest.mark.slow
def test_some_failed_rows_are_a_failure_only_if_asked(capsys, sample, loaded, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [SOUND, FAILING, FAILING])
    status, out, err = outcome(capsys, sample, tmp_path / "out", data)
    assert (status, err) == (0, "")
    assert "3 rows, 2 of them errors" in out
    status, out, err = outcome(capsys, sample, tmp_path / "out", data, "--fail-on-error")
    assert status == 1
    assert "3 rows, 2 of them errors" in out
    assert err == "ivtp: 2 of 3 rows failed; the first: row 1: the prompt is empty\n"
    sound = write_rows(tmp_path / "sound.jsonl", [SOUND])
    assert outcome(capsys, sample, tmp_path / "sound", sound, "--fail-on-error")[0] == 0


def test_the_first_failed_row_is_the_first_of_all_shards(capsys, sample, loaded, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [SOUND] * 3 + [FAILING] * 2)
    _, _, err = outcome(capsys, sample, tmp_path / "out", data, "--fail-on-error", "--shard-rows", 2)
    assert err == "ivtp: 2 of 5 rows failed; the first: row 3: the prompt is empty\n"


def test_a_column_of_ids_is_used_by_itself(capsys, sample, loaded, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [SOUND | {"id": "a", "key": 1}, SOUND | {"id": 7, "key": 2}])
    assert [row["id"] for row in batch(capsys, sample, tmp_path / "itself", data=data)] == ["a", "7"]
    assert json.loads((tmp_path / "itself" / "_run.json").read_text())["settings"]["id_column"] == "id"
    # It goes on under the column's name too, which means the same.
    assert len(batch(capsys, sample, tmp_path / "itself", "--id-column", "id", data=data)) == 2
    rows = batch(capsys, sample, tmp_path / "other", "--id-column", "key", data=data)
    assert [row["id"] for row in rows] == ["1", "2"]
    assert [row["id"] for row in batch(capsys, sample, tmp_path / "none", "--id-column", "", data=data)] == [None] * 2


def test_ids_and_questions_that_are_stored_as_bytes(capsys, sample, loaded, tmp_path):
    """Some writers of Parquet know no text; others name rows by numbers of 16 bytes."""
    table = pa.table(
        {
            "image": pa.nulls(2, pa.string()),
            "question": pa.array(["Why caf\u00e9?".encode(), b"Why caf\xe9?"], pa.binary()),
            "id": pa.array([b"\x00\xff" * 8, b"0123456789abcdef"], pa.binary(16)),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    first, second = batch(capsys, sample, tmp_path / "out", data=tmp_path / "rows.parquet")
    assert (first["id"], second["id"]) == ("00ff" * 8, "0123456789abcdef")
    asked = [row.question for row in open_data(str(tmp_path / "rows.parquet")).rows(0, 2)]
    assert asked == ["Why caf\u00e9?", "Why caf\ufffd?"]
    assert first["answer"] == alone(sample, {"image": [], "question": asked[0]})[0]
    # Of questions the fingerprint sees more than their length.
    other = table.set_column(1, "question", pa.array(["Who caf\u00e9?".encode(), b"Why caf\xe9?"]))
    pq.write_table(other, tmp_path / "other.parquet")
    prints = {open_data(str(tmp_path / f"{name}.parquet")).fingerprint() for name in ("rows", "other")}
    assert len(prints) == 2


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["batch", "dev"])
def test_filelock_stays_below_4_beside_lmms_eval(extra):
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (listed,) = re.findall(rf"^{extra} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    (requirement,) = re.findall(r'"(filelock[^"]*)"', listed)
    assert requirement == "filelock>=3.16,<4"
