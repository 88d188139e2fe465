"""The folder of answers after a kill at any moment, and on file systems that are not this machine's."""

import subprocess
import sys
import zipfile
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

import ivtp_cli
from modeling_ivtp.batch import pipeline
from modeling_ivtp.batch.answers import Answered, table
from modeling_ivtp.batch.data import open_data
from modeling_ivtp.batch.folder import OutFolder
from tests.support.batches import (
    QUESTIONS,
    alone,
    answer_here,
    answers,
    arguments,
    batch,
    contents,
    fails,
    write_rows,
    write_shard,
    write_table,
)


def shard(*rows):
    return table(Answered(row, None, "yes", None, 1, 2, 0) for row in rows)


@pytest.fixture
def begun(tmp_path):
    """A folder with the rows 0 to 3 of 8, in two files."""
    folder = OutFolder(str(tmp_path / "out"))
    with folder.held():
        folder.begin({"settings": {}})
    write_shard(folder, "answers-a-000000", shard(0, 1))
    write_shard(folder, "answers-a-000001", shard(2, 3))
    return folder


def rows_of(folder):
    return [row["row"] for row in answers(Path(folder.path))]


def test_whole_shards_stay_as_they_are(begun):
    before = contents(Path(begun.path))
    assert begun.settle(8).tolist() == [True] * 4 + [False] * 4
    assert contents(Path(begun.path)) == before


@pytest.mark.parametrize("state", ["no checkpoint", "half a file", "not there yet"])
def test_a_shard_that_was_being_written_is_answered_again(begun, state):
    """A pending checkpoint comes first, then the file, then the checkpoint takes its name."""
    write_table(begun, f"{begun.checkpoints}/answers-b-000000.pending.parquet", shard(4, 5).select(["row"]))
    file = Path(begun.path) / "answers-b-000000-0.parquet"
    if state != "not there yet":
        write_table(begun, str(file), shard(4, 5))
    if state == "half a file":
        file.write_bytes(file.read_bytes()[:-20])
    assert begun.settle(8).tolist() == [True] * 4 + [False] * 4
    assert rows_of(begun) == [0, 1, 2, 3]
    assert not list(Path(begun.checkpoints).glob("*b-*"))


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_file_that_was_lost_is_written_again(begun, damage):
    """The checkpoint alone would have its rows missing for ever."""
    file = Path(begun.path) / "answers-a-000001-0.parquet"
    file.unlink() if damage == "removed" else file.write_bytes(file.read_bytes()[:-20])
    assert begun.settle(8).tolist() == [True] * 2 + [False] * 6
    assert rows_of(begun) == [0, 1]
    write_shard(begun, "answers-c-000000", shard(2, 3, 4, 5, 6, 7))
    assert begun.settle(8).all()


def test_rows_that_a_late_process_wrote_again_are_there_once(begun):
    write_shard(begun, "answers-z-000007", shard(2, 3))
    assert begun.settle(8).tolist() == [True] * 4 + [False] * 4
    assert rows_of(begun) == [0, 1, 2, 3]
    assert len(list(Path(begun.checkpoints).glob("*.parquet"))) == 2


def test_a_second_command_in_the_same_folder_is_refused(capsys, sample, loaded, tmp_path, monkeypatch):
    told = []

    def meanwhile(*run):
        folder = OutFolder(str(tmp_path / "out"))
        with pytest.raises(FileExistsError, match="another ivtp batch answers into"), folder.held():
            told.append("never")
        answer_here(*run)
        told.append("answered")

    monkeypatch.setattr(pipeline, "answer_all", meanwhile)
    batch(capsys, sample, tmp_path / "out", "--limit", 2)
    assert told == ["answered"]


def test_the_lock_ends_with_its_process(begun):
    hold = (
        "import sys, time; from modeling_ivtp.batch.folder import OutFolder\n"
        "with OutFolder(sys.argv[1]).held():\n    print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", hold, begun.path], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(FileExistsError), begun.held():
        pass
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with begun.held():
        pass


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_data_and_answers_elsewhere(capsys, sample, loaded, tmp_path, memory):
    """Data, the pictures beside them, and answers, on a file system that is not this machine's."""
    rows = [{"image": ["pictures/1.png"], "question": QUESTIONS[0]}, {"image": ["none.png"], "question": "Why?"}]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"image": ["memory://in/pictures/2.png"], "question": "Why?"}])
    memory.put(str(path), "/in/rows.jsonl")
    memory.put(str(sample.root / "pictures"), "/in/pictures", recursive=True)
    more = ["-d", "memory://in/rows.jsonl", "-o", "memory://out"]
    for done in ("done", "was finished before"):
        assert ivtp_cli.main(arguments(sample, tmp_path / "none", *more)) == 0
        assert f"{done}: 3 rows, 1 of them errors, in memory://out" in capsys.readouterr().out
    found = [row for name in memory.glob("/out/answers-*") for row in pq.read_table(memory.open(name)).to_pylist()]
    assert [row["row"] for row in found] == [0, 1, 2]
    assert found[0]["answer"] == alone(sample, rows[0])[0]
    assert found[1]["error"].startswith("row 1: there is no image '/in/none.png'")
    assert found[2]["answer"] == alone(sample, {"image": ["pictures/2.png"], "question": "Why?"})[0]
    # Another run's folder is known there as well.
    assert "other settings" in fails(capsys, sample, tmp_path / "none", *more, "--limit", 2)


def test_data_in_an_archive(sample, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(sample.data, "deep/rows.jsonl")
        archive.write(sample.root / "pictures/1.png", "deep/pictures/1.png")
    data = open_data(f"zip://deep/*.jsonl::file://{tmp_path}/data.zip")
    assert len(data) == 40
    assert data.rows(1, 2)[0].images[0].read() == (sample.root / "pictures/1.png").read_bytes()
    here = open_data(str(sample.data))
    assert data.fingerprint() == here.fingerprint()


def test_addresses_that_lead_nowhere(capsys, sample, tmp_path, memory):
    memory.mkdir("/folder/within")
    assert "there are no data at memory://no.jsonl" in fails(
        capsys, sample, tmp_path / "out", "-d", "memory://no.jsonl"
    )
    line = fails(capsys, sample, tmp_path / "out", "-d", "memory://folder")
    assert "memory://folder is a folder; of addresses allowed: files in .jsonl, .json, .parquet, or a pattern" in line


def dies(*_):
    raise RuntimeError("the first row was the last")


@pytest.mark.parametrize("kind", ["new", "empty", "notes", "link", "."])
def test_a_run_without_answers_removes_nothing_but_itself(capsys, sample, tmp_path, monkeypatch, kind):
    """The folder goes if the run made it; a link, or a file that somebody else wrote meanwhile, stays."""
    monkeypatch.setattr(pipeline, "answer_all", dies)
    out, real = tmp_path / "out", tmp_path / "real"
    real.mkdir()
    if kind == "link":
        out.symlink_to(real)
    elif kind != "new":
        out.mkdir()
    if kind == "notes":
        monkeypatch.setattr(pipeline, "answer_all", lambda *_: (out / "notes.txt").write_text("mine") and dies())
    if kind == ".":
        monkeypatch.chdir(out)
    assert ivtp_cli.main(arguments(sample, "." if kind == "." else out)) == 1
    captured = capsys.readouterr()
    assert "the first row was the last" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert real.is_dir()
    assert out.is_symlink() is (kind == "link")
    assert out.exists() is (kind != "new")
    assert [path.name for path in tmp_path.glob("*/*")] == (["notes.txt"] if kind == "notes" else [])


def test_an_error_while_a_run_is_removed_does_not_hide_its_own(capsys, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "answer_all", dies)
    monkeypatch.setattr(LocalFileSystem, "rm_file", lambda *_: 1 / 0)
    assert ivtp_cli.main(arguments(sample, tmp_path / "out")) == 1
    captured = capsys.readouterr().err
    assert "could not be removed" in captured
    assert "the first row was the last" in captured
