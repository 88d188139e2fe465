"""The journal of an evaluation: what was on disk when its process was killed is read again."""

from pathlib import Path

from modeling_ivtp.batch.answers import Answered
from modeling_ivtp.evaluation.journal import Journal


def test_a_journal_keeps_what_is_whole(tmp_path: Path) -> None:
    rows = [Answered(number, None, "yes", None, 1, 2, 0) for number in range(4)]
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add(0, rows[:2])
        journal.add(1, rows[2:3])
        journal.add(2, rows[3:])
    whole = (tmp_path / "j.jsonl").read_bytes()
    second = whole.index(b"\n") + 1
    for damaged, kept in (
        (whole[:-1], [0, 1]),
        (whole[: second + 3], [0]),
        (whole[:second] + b"\x00" * 9 + b"\n" + whole[second:], [0]),
        (whole[:5], []),
        (b"", []),
    ):
        (tmp_path / "j.jsonl").write_bytes(damaged)
        with Journal(tmp_path / "j.jsonl") as journal:
            assert list(journal.batches) == kept
        # What is after the last whole line is gone at once, not overwritten bit by bit.
        assert (tmp_path / "j.jsonl").read_bytes().count(b"\n") == len(kept)
        with Journal(tmp_path / "j.jsonl") as journal:
            journal.add(7, rows[:1])
        with Journal(tmp_path / "j.jsonl") as journal:
            assert list(journal.batches) == [*kept, 7]
            assert journal.batches[7] == rows[:1]
