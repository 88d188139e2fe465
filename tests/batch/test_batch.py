"""`ivtp batch` without Ray: every row once, with the answer it has alone, whatever was answered before."""

import base64
import json
import random
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ivtp_cli
from modeling_ivtp.batch import actor, budget, pipeline
from modeling_ivtp.batch.asking import Asker
from modeling_ivtp.batch.budget import Task, plan_batches
from modeling_ivtp.batch.data import Data, Row, open_data
from modeling_ivtp.batch.options import Options
from modeling_ivtp.batch.run import default_shard_rows, run
from modeling_ivtp.batch.tables import ArrowTable
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.serving import answering
from tests.support.batches import QUESTIONS, alone, answers, arguments, batch, contents, fails, inputs_of, write_rows
from tests.support.checkpoints import PRUNING

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected(sample):
    """All rows, each answered alone."""
    answered = []
    for number, row in enumerate(sample.rows):
        answer, tokens, prompt_tokens = alone(sample, row)
        answered.append(
            {
                "row": number, "id": row["name"], "answer": answer, "error": None, "tokens": tokens,
                "prompt_tokens": prompt_tokens, "images": len(row["image"]),
            }
        )  # fmt: skip
    assert len({item["answer"] for item in answered}) > 10
    return answered


@pytest.mark.slow
def test_a_row_gets_the_answer_it_has_alone(capsys, sample, expected, tmp_path):
    assert batch(capsys, sample, tmp_path / "out", "--id-column", "name") == expected
    # One table to whoever reads Parquet.
    assert pq.read_table(tmp_path / "out").num_rows == 40
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[:2] == ["_checkpoint", "_run.json"]
    assert len(names) == 2 + 3


@pytest.mark.slow
def test_an_answer_ends_where_it_ends_alone(capsys, sample, loaded, tmp_path, monkeypatch):
    """A word that many answers have is made an end; what is after it, in rows that go on for others, is no answer."""
    replies = [
        sample.model.generate(**inputs_of(sample, row), max_new_tokens=5)[0, -5:].tolist() for row in sample.rows
    ]
    counts = {
        token: sum(token in tokens for tokens in replies)
        for token in {token for reply in replies for token in reply[1:]}
    }
    end = min(counts, key=lambda token: abs(counts[token] - 20))
    monkeypatch.setattr(sample.model.generation_config, "eos_token_id", [2, end])
    rows = batch(capsys, sample, tmp_path / "out")
    ends = [tokens.index(end) + 1 if end in tokens else 5 for tokens in replies]
    assert [row["tokens"] for row in rows] == ends
    assert len(set(ends)) > 1
    assert [row["answer"] for row in rows] == [alone(sample, row, eos_token_id=[2, end])[0] for row in sample.rows]


@pytest.fixture(scope="module")
def sources(sample):
    """The same rows in every form that is read, one picture in each."""
    root = sample.root / "sources"
    (root / "files").mkdir(parents=True)
    rows = [{"image": f"{sample.root}/pictures/{n % 5}.png", "question": QUESTIONS[n % 4]} for n in range(8)]
    write_rows(root / "rows.jsonl", rows)
    (root / "rows.json").write_text(json.dumps(rows))
    for part in (0, 1):
        write_rows(root / "files" / f"part-{part}.jsonl", rows[part * 4 : part * 4 + 4])
    stored = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    stored.to_parquet(root / "paths.parquet")
    contents = [{"bytes": Path(row["image"]).read_bytes(), "path": None} for row in rows]
    table = pa.Table.from_pylist(
        [row | {"image": item, "raw": item["bytes"]} for row, item in zip(rows, contents, strict=True)]
    )
    pq.write_table(table, root / "bytes.parquet")
    stored.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": stored.select([0]), "test": stored}).save_to_disk(root / "splits")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("rows.jsonl", []),
        ("rows.json", []),
        ("files/part-*.jsonl", []),
        ("files", []),
        ("paths.parquet", []),
        ("bytes.parquet", []),
        ("bytes.parquet", ["--image-column", "raw"]),
        ("saved", []),
        ("splits", ["--split", "test"]),
    ],
)
def test_data_in_every_form(capsys, sample, loaded, sources, tmp_path, name, more):
    rows = batch(capsys, sample, tmp_path / "out", *more, data=sources / name)
    wanted = [{"image": [f"pictures/{number % 5}.png"], "question": QUESTIONS[number % 4]} for number in range(8)]
    assert [row["answer"] for row in rows] == [alone(sample, row)[0] for row in wanted]


def test_a_folder_of_images_and_one_question(capsys, sample, loaded, tmp_path):
    rows = batch(capsys, sample, tmp_path / "out", "-p", QUESTIONS[1], "--limit", 3, data=sample.root / "pictures")
    wanted = [{"image": [f"pictures/{number}.png"], "question": QUESTIONS[1]} for number in range(3)]
    assert [row["answer"] for row in rows] == [alone(sample, row)[0] for row in wanted]


def test_questions_without_pictures(capsys, sample, loaded, tmp_path):
    rows = batch(capsys, sample, tmp_path / "out", "--image-column", "", "--limit", 4)
    assert [row["answer"] for row in rows] == [alone(sample, row | {"image": []})[0] for row in sample.rows[:4]]
    assert [row["images"] for row in rows] == [0] * 4


def test_the_method_none_drops_nothing(capsys, sample, tmp_path, monkeypatch):
    """A budget of all tokens is no such thing where a coverage decides."""
    seen = []

    def load(*_, **__):
        sample.model.set_pruning(coverage=0.5, min_visual_tokens=1, choice="diverse", importance="accumulated")
        seen.append(sample.model)
        return sample.model, sample.processor

    monkeypatch.setattr(actor, "load_model", load)
    before = sample.model.pruning_config
    try:
        rows = batch(capsys, sample, tmp_path / "out", "--limit", 3, "--method", "unpruned")
        assert not seen[0].pruning_config.enabled
        with sample.model.pruning(enabled=False):
            assert [row["answer"] for row in rows] == [alone(sample, row)[0] for row in sample.rows[:3]]
    finally:
        sample.model.set_pruning(**before.to_dict())
    line = fails(capsys, sample, tmp_path / "out", "--limit", 3, "--method", "unpruned", "--visual-tokens", 3)
    assert "visual_tokens=3 with method='unpruned', which drops nothing" in line


def test_a_budget_on_a_checkpoint_without_pruning_is_warned_of_too(capsys, sample, loaded, tmp_path):
    """It switches pruning on, which nothing guides here."""
    shutil.copytree(sample.ivtp, tmp_path / "off")
    shutil.rmtree(tmp_path / "off" / "clip_tokenizer")
    config = json.loads((tmp_path / "off" / "config.json").read_text())
    config["pruning"]["enabled"] = False
    (tmp_path / "off" / "config.json").write_text(json.dumps(config))
    for budget_of, warned in (([], False), (["--visual-tokens", 4], True)):
        out = tmp_path / f"out-{warned}"
        assert ivtp_cli.main(arguments(sample, out, "-m", tmp_path / "off", "--limit", 1, *budget_of)) == 0
        assert ("--out FOLDER` joins it" in capsys.readouterr().err) is warned


@pytest.mark.slow
def test_another_system_and_another_budget(capsys, sample, tmp_path):
    for number, more in enumerate((["--visual-tokens", 2], ["--method", "divprune", "--visual-tokens", 3])):
        (row,) = batch(
            capsys,
            sample,
            tmp_path / str(number),
            "--limit",
            1,
            "--prompt",
            QUESTIONS[0],
            *more,
            data=sample.root / "pictures",
        )
        generate = ["-m", sample.ivtp, "-i", sample.root / "pictures/0.png", "-p", QUESTIONS[0], "--max-new-tokens", 5]
        assert ivtp_cli.main(["generate", *map(str, [*generate, *more])]) == 0
        assert capsys.readouterr().out.strip() == row["answer"]
        about = json.loads((tmp_path / str(number) / "_run.json").read_text())["settings"]
        assert about["visual_tokens"] == more[-1]


BAD = [
    ({"image": "pictures/none.png"}, "row 0: there is no image '{root}/pictures/none.png'"),
    ({"image": "damaged.png"}, "row 1: {root}/damaged.png is not an image in a known format"),
    ({"image": "pictures"}, "row 2: the image '{root}/pictures' is not a file"),
    ({"image": "moon://host/picture.png"}, "row 3: moon://host/picture.png is not supported; images come from files"),
    ({"image": ["pictures/0.png", None]}, "row 4: image 2 is neither a path nor a file's bytes"),
    ({"image": 7}, "row 5: image 1 is neither a path nor a file's bytes"),
    ({"question": None}, "row 6: the prompt is missing"),
    ({"question": "  "}, "row 7: the prompt is empty"),
    ({"question": "<image> and <image>?"}, "row 8: the prompt has 2 <image>, but came with 1 image(s)"),
    ({"question": 5}, "row 9: the prompt is no text, but int 5"),
    ({"question": "what \ud83d"}, "row 10: the prompt holds half of a character: 'what \\ud83d'"),
]


def test_a_bad_row_is_an_error_row_and_the_others_go_on(capsys, sample, loaded, tmp_path):
    (sample.root / "damaged.png").write_bytes(b"this is no picture")
    sound = {"image": "pictures/1.png", "question": QUESTIONS[0]}
    url = "data:image/png;base64," + base64.b64encode((sample.root / "pictures/1.png").read_bytes()).decode()
    others = [sound, sound | {"image": url}, sound | {"image": None}]
    path = write_rows(sample.root / "bad.jsonl", [*(sound | bad for bad, _ in BAD), *others])
    capsys.readouterr()
    rows = batch(capsys, sample, tmp_path / "out", data=path)
    for row, (_, error) in zip(rows, BAD, strict=False):
        assert row["error"].startswith(error.format(root=sample.root))
        assert (row["answer"], row["tokens"], row["prompt_tokens"]) == (None, 0, 0)
    assert [row["error"] for row in rows[len(BAD) :]] == [None] * 3
    picture = {"image": ["pictures/1.png"], "question": QUESTIONS[0]}
    assert rows[-3]["answer"] == rows[-2]["answer"] == alone(sample, picture)[0]
    assert rows[-1]["answer"] == alone(sample, picture | {"image": []})[0]
    ivtp_cli.main(arguments(sample, tmp_path / "out", data=path))
    assert "14 rows, 11 of them errors" in capsys.readouterr().out


def test_an_id_that_no_file_takes_is_an_error_row(capsys, sample, loaded, tmp_path):
    sound = {"image": "pictures/1.png", "question": QUESTIONS[0]}
    path = write_rows(sample.root / "ids.jsonl", [sound | {"id": "a\ud800"}, sound | {"id": "b"}])
    broken, whole = batch(capsys, sample, tmp_path / "out", "--id-column", "id", data=path)
    assert (broken["id"], broken["error"]) == (None, "row 0: the id holds half of a character: 'a\\ud800'")
    assert (whole["id"], whole["error"]) == ("b", None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-column", "photo"], "has no column 'photo'; it has: name, image, question"),
        (["--prompt-column", "asked", "--id-column", "key"], "has no column 'asked', 'key'; it has: name, image"),
        (["--prompt", "What?", "--prompt-column", "question"], "one of --prompt and --prompt-column"),
        (["--split", "test"], 'Unknown split "test"'),
        (["--memory", "lots"], "--memory='lots'; allowed: a number above zero"),
        (["--memory", "1KB"], "beside the weights, and --memory gives 1 KB"),
        (["--visual-tokens", "0"], "visual_tokens=0; allowed: a whole number from 1"),
        (["--method", "magic"], "magic"),
        (["--device", "toaster"], "device='toaster' cannot be used"),
        (["--engine", "magic"], "engine='magic'; allowed: transformers, vllm"),
        (["--actors", "0"], "--actors"),
        (["--address", "somewhere"], "address='somewhere'; allowed: auto or HOST:PORT"),
        (["--address", "ray://127.0.0.1:10001"], "allowed: auto or HOST:PORT, on a machine of the cluster"),
        (["--address", "127.0.0.1:1"], "no Ray cluster can be reached at 127.0.0.1:1 ("),
        (["--address", "127.0.0.1:1", "--device", "cuda:1"], "device='cuda:1'; allowed on a cluster: cpu, cuda"),
        (["--out", "moon://answers"], "Protocol not known: moon"),
        (["--dtype", "int3"], "dtype='int3'; allowed: auto"),
        (["-m", "./no/model"], "neither a folder here nor"),
        (["-d", "./no/rows.jsonl"], "there are no data './no/rows.jsonl'"),
        (["-d", "no-*.parquet"], "there are no data 'no-*.parquet'"),
        (["-d", __file__], "ends in .py; allowed: one of .jsonl, .json, .parquet"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(capsys, sample, tmp_path, more, message):
    assert message in fails(capsys, sample, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_read(capsys, sample, tmp_path):
    (tmp_path / "torn.json").write_text('[{"image": "a.png", "question": "What?"}, {"image": ')
    assert "torn.json is damaged: Expecting value" in fails(
        capsys, sample, tmp_path / "out", data=tmp_path / "torn.json"
    )
    (tmp_path / "lines.jsonl").write_text("\n\n")
    assert "lines.jsonl has no rows" in fails(capsys, sample, tmp_path / "out", data=tmp_path / "lines.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl is empty" in fails(capsys, sample, tmp_path / "out", data=tmp_path / "empty.jsonl")
    assert "has no rows" in fails(capsys, sample, tmp_path / "out", "--split", "train[:0]")
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "none.parquet has no rows" in fails(capsys, sample, tmp_path / "out", data=tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    assert "text.parquet is no Parquet file" in fails(capsys, sample, tmp_path / "out", data=tmp_path / "text.parquet")
    none = datasets.Dataset.from_dict({"image": [], "question": []})
    with pytest.raises(ValueError, match="x has no rows"):
        Data(none, "x", tmp_path, image_column="image", prompt_column="question")
    (tmp_path / "nothing").mkdir()
    assert "contain any data files" in fails(capsys, sample, tmp_path / "out", data=tmp_path / "nothing")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"image": ["a.png"]})})
    splits.save_to_disk(tmp_path / "splits")
    assert "has no split 'test'; it has: train" in fails(
        capsys, sample, tmp_path / "out", "--split", "test", data=tmp_path / "splits"
    )


def test_answers_do_not_become_data(capsys, sample, tmp_path):
    (tmp_path / "pictures").mkdir()
    shutil.copy(sample.root / "pictures/0.png", tmp_path / "pictures")
    inside = tmp_path / "pictures" / "answers"
    assert "answers would become data" in fails(capsys, sample, inside, "-p", "What?", data=tmp_path / "pictures")
    assert not inside.exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_left_alone(capsys, sample, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "holds no run of ivtp batch" in fails(capsys, sample, tmp_path / "out")
    assert "is a file, not a folder" in fails(capsys, sample, tmp_path / "out" / "thesis.txt")


def test_other_settings_are_refused_with_every_difference(capsys, sample, loaded, tmp_path):
    batch(capsys, sample, tmp_path / "out", "--limit", 4)
    line = fails(capsys, sample, tmp_path / "out", "--limit", 5, "--batch-size", 2, "--visual-tokens", 3)
    for difference in (
        "rows is 4 there and 5 now",
        "batch_size is 64 there and 2 now",
        "visual_tokens is null there and 3",
    ):
        assert difference in line
    line = fails(capsys, sample, tmp_path / "out", "--limit", 4, "--dtype", "bfloat16")
    assert 'dtype is "float32" there and "bfloat16" now' in line
    other = write_rows(sample.root / "other.jsonl", [row | {"question": "Who?"} for row in sample.rows[:4]])
    assert "data is" in fails(capsys, sample, tmp_path / "out", data=other)
    (tmp_path / "out" / "_run.json").write_text("{")
    assert "_run.json is damaged" in fails(capsys, sample, tmp_path / "out", "--limit", 4)


def test_another_kind_of_device_is_refused(capsys, sample, loaded, tmp_path):
    """Its answers would differ. Folders of older versions do not say where they were begun, and go on."""
    out = tmp_path / "out"
    batch(capsys, sample, out, "--limit", 2)
    begun = json.loads((out / "_run.json").read_text())
    assert begun["settings"]["device"] == "cpu"
    next(out.glob("answers-*")).unlink()
    begun["settings"]["device"] = "cuda"
    (out / "_run.json").write_text(json.dumps(begun))
    said = 'device is "cuda" there and "cpu" now'
    assert said in fails(capsys, sample, out, "--limit", 2)
    with pytest.raises(ValueError, match=said):
        run(Options(str(sample.ivtp), str(sample.data), out, max_new_tokens=5, limit=2))
    del begun["settings"]["device"]
    (out / "_run.json").write_text(json.dumps(begun))
    assert [row["row"] for row in batch(capsys, sample, out, "--limit", 2)] == [0, 1]


@pytest.mark.slow
def test_another_models_weights_are_refused(capsys, sample, tmp_path):
    convert(sample.root / "llava", sample.root / "clip", tmp_path / "model", pruning=PRUNING)
    batch(capsys, sample, tmp_path / "out", "--limit", 2, "-m", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert "other settings: model is" in fails(capsys, sample, tmp_path / "out", "--limit", 2, "-m", tmp_path / "model")


def test_the_same_rows_elsewhere_are_the_same_rows(sample, sources, tmp_path):
    """Wherever the folder lies, whatever the caches: processes on other machines must agree."""
    rows = [{"image": f"pictures/{n}.png", "question": "What?"} for n in range(3)]
    prints = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        table = open_data(str(write_rows(tmp_path / place / "rows.jsonl", rows)))
        prints.add(table.fingerprint())
    assert len(prints) == 1
    changed = open_data(str(write_rows(tmp_path / "rows.jsonl", [rows[1], rows[0], rows[2]])))
    assert changed.fingerprint() not in prints
    stored = open_data(str(sources / "bytes.parquet"))
    assert stored.fingerprint() != open_data(str(sources / "bytes.parquet"), limit=7).fingerprint()


def test_a_finished_run_does_nothing(capsys, sample, tmp_path, monkeypatch):
    batch(capsys, sample, tmp_path / "out", "--limit", 4)
    before_run, times = contents(tmp_path / "out"), [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()]
    monkeypatch.setattr(pipeline, "answer_all", None)
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", "--limit", 4)) == 0
    assert "was finished before: 4 rows, 0 of them errors" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before_run
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()] == times


@pytest.mark.slow
def test_ctrl_c_costs_what_is_not_written(capsys, sample, loaded, expected, tmp_path, monkeypatch):
    options = ["--id-column", "name", "--batch-size", 4, "--shard-rows", 8, "--memory", "1GB"]
    answer, asked = Asker.answer, []

    def stop_at_the_sixth(self, tasks, prepared=None):
        asked.append(len(tasks))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answer(self, tasks, prepared)

    monkeypatch.setattr(Asker, "answer", stop_at_the_sixth)
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", *options)) == 130
    assert capsys.readouterr().err == "ivtp: stopped; the same command goes on from here\n"
    # Two shards of two batches each; the fifth batch's shard is not whole.
    assert answers(tmp_path / "out") == expected[:16]
    assert batch(capsys, sample, tmp_path / "out", *options) == expected
    assert len(asked) == 6 + 3 * 2


def test_a_run_that_answered_nothing_leaves_nothing(capsys, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(actor, "load_model", lambda *_, **__: 1 / 0)
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", "--limit", 4)) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_accelerate_launch_is_told_what_to_type(capsys, sample, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["cli.py", "batch", "-m", "a model", "-o", "out"])
    line = fails(capsys, sample, tmp_path / "out")
    assert line.endswith("in place of accelerate launch, type: ivtp batch -m 'a model' -o out --actors 2\n")
    monkeypatch.setenv("RANK", "1")
    assert ivtp_cli.main(arguments(sample, tmp_path / "out")) == 1
    assert capsys.readouterr().err == ""


def limited(monkeypatch, model, most, error):
    """Have `generate` fail above so many rows; returns the sizes it was asked for."""
    generate, sizes = model.generate, []

    def fail(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most:
            raise error
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", fail)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch(capsys, sample, loaded, expected, tmp_path, monkeypatch, error):
    sizes = limited(monkeypatch, sample.model, 3, error)
    options = ["--id-column", "name", "--shard-rows", 8, "--limit", 16, "--memory", "1GB"]
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", *options)) == 0
    assert answers(tmp_path / "out") == expected[:16]
    lines = capsys.readouterr().err.splitlines()
    # The second shard's batch is known to be too large if it is no shorter; its halves may be tried again.
    assert sizes[:4] == [8, 4, 2, 2]
    assert len(lines) == sum(size > 3 for size in sizes)
    assert "out of memory with 8 rows of up to" in lines[0]
    assert lines[0].endswith("going on with 4")


@pytest.mark.slow
def test_memory_that_runs_out_over_pictures_halves_the_batch_too(
    capsys, sample, loaded, expected, tmp_path, monkeypatch
):
    prepare = Asker.prepare

    def fail(self, tasks):
        if len(tasks) > 3:
            raise MemoryError
        return prepare(self, tasks)

    monkeypatch.setattr(Asker, "prepare", fail)
    options = ["--id-column", "name", "--limit", 8, "--memory", "1GB"]
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", *options)) == 0
    assert answers(tmp_path / "out") == expected[:8]
    assert capsys.readouterr().err.count("out of memory with") == 3


@pytest.mark.slow
def test_a_row_that_does_not_fit_alone_is_an_error_row(capsys, sample, loaded, tmp_path, monkeypatch):
    limited(monkeypatch, sample.model, 0, torch.OutOfMemoryError("CUDA out of memory."))
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", "--limit", 2)) == 1
    assert [row["error"] for row in answers(tmp_path / "out")] == [
        f"row {number}: out of memory, with this row alone" for number in (0, 1)
    ]
    warning, error = capsys.readouterr().err.splitlines()
    assert "out of memory with 2 rows" in warning
    assert error == "ivtp: all 2 rows failed; the first: row 0: out of memory, with this row alone"


@pytest.mark.slow
def test_what_goes_wrong_with_one_row_costs_that_row(capsys, sample, loaded, expected, tmp_path, monkeypatch):
    generate = sample.model.generate

    def stumble(**inputs):
        # Rows with two pictures, of which the first eight rows have two.
        if (inputs["input_ids"] == sample.model.config.image_token_id).sum(1).max() > sample.model.config.num_patches:
            raise KeyError("no such thing")
        return generate(**inputs)

    monkeypatch.setattr(sample.model, "generate", stumble)
    rows = batch(capsys, sample, tmp_path / "out", "--id-column", "name", "--limit", 8)
    bad = [number for number in range(8) if number % 3 == 2]
    assert [row["row"] for row in rows if row["error"]] == bad
    assert rows[bad[0]]["error"] == "row 2: KeyError: 'no such thing'"
    assert [row for row in rows if not row["error"]] == [row for row in expected[:8] if row["row"] not in bad]


def test_a_device_that_fails_ends_the_run(capsys, sample, loaded, tmp_path, monkeypatch):
    """Every row after that would be an error, and none of them is to blame."""
    limited(
        monkeypatch, sample.model, 0, torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    )
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", "--limit", 8)) == 1
    assert "illegal memory access" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_batches_stay_under_the_budget():
    draws = random.Random(1)
    config = SimpleNamespace(rows=0)

    def cost(rows, length, images):
        config.rows += 1
        return rows * length * 10 + images * 300

    for _ in range(50):
        tasks = [
            Task(Row(number, None, "", ("x",) * draws.randrange(3)), "", draws.randrange(1, 200))
            for number in range(draws.randrange(1, 60))
        ]
        budget_bytes, largest = draws.randrange(600, 9000), draws.randrange(1, 20)
        batches, too_large = plan_batches(tasks, cost, budget_bytes, largest)
        rows = [task.row.number for group in batches for task in group]
        assert sorted([*rows, *too_large]) == [task.row.number for task in tasks]
        lengths = [task.tokens for group in batches for task in group]
        assert lengths == sorted(lengths, reverse=True)
        for group in batches:
            assert cost(len(group), group[0].tokens, sum(len(task.row.images) for task in group)) <= budget_bytes
            assert len(group) <= largest
        for task in tasks:
            assert (cost(1, task.tokens, len(task.row.images)) > budget_bytes) == (task.row.number in too_large)
        for group, following in pairwise(batches):
            images = sum(len(task.row.images) for task in [*group, following[0]])
            assert len(group) == largest or cost(len(group) + 1, group[0].tokens, images) > budget_bytes


def test_a_row_beyond_the_budget_is_an_error_row_and_the_others_are_in_small_batches(
    capsys, sample, loaded, expected, tmp_path, monkeypatch
):
    sizes = limited(monkeypatch, sample.model, 99, None)
    cost = budget.Cost(sample.model.config, 4, 5)
    longest = max(row["prompt_tokens"] for row in expected[:9])
    memory = cost(1, longest, 2) - 1
    rows = batch(
        capsys, sample, tmp_path / "out", "--limit", 9, "--memory", f"{memory / 1000:.3f}KB", "--id-column", "name"
    )
    errors = [row["error"] for row in rows if row["error"]]
    assert len(errors) == 1
    assert f"{longest} tokens need" in errors[0]
    assert [row for row in rows if not row["error"]] == [row for row in expected[:9] if row["prompt_tokens"] < longest]
    assert len(sizes) > 1


def test_the_cost_covers_the_cache(sample):
    """Unpruned, a batch's cache is what the formula says, and the cost is more than that."""
    row = {"image": ["pictures/0.png"], "question": QUESTIONS[2]}
    with sample.model.pruning(enabled=False):
        output = sample.model.generate(**inputs_of(sample, row), max_new_tokens=5, return_dict_in_generate=True)
    _, _, length = alone(sample, row)
    cost = budget.Cost(sample.model.config, 4, 5)
    assert answering.kv_bytes(output.past_key_values) < cost(1, length, 1) < cost(1, length, 2) < cost(2, length, 2)
    assert 2 * cost(1, length, 1) == cost(2, length, 2)


def test_what_the_machine_cannot_hold_is_refused_with_the_bytes(capsys, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    line = fails(capsys, sample, tmp_path / "out")
    assert "weights and one row need at least" in line
    assert "1 MB are free on cpu" in line
    assert "3 actors need at least" in fails(capsys, sample, tmp_path / "out", "--actors", 3)
    assert not (tmp_path / "out").exists()


def test_the_default_budget_is_a_part_of_what_is_free(monkeypatch):
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert budget.default_budget(2_000, 10, "cpu", 1) == 4_000
    assert budget.default_budget(2_000, 10, "cpu", 2) == 1_500
    assert budget.default_budget(5_000, 10, "cpu", 2) == 10


def test_shards_are_neither_tiny_nor_huge():
    assert [default_shard_rows(rows) for rows in (1, 1024, 1025, 10_000, 10**7)] == [16, 16, 17, 157, 1024]


def test_without_its_libraries_one_line_tells_what_to_install(capsys, sample, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'ivtp-llava[batch]'" in fails(capsys, sample, tmp_path / "out")


def test_values_stay_what_they_are(capsys, sample, loaded, tmp_path):
    """One odd row changes no other; what a torn line or a byte of another encoding spoils is its own row."""
    lines = [json.dumps({"name": "2024-01-01", "image": [], "question": '12 or "13"?', "notes": "x" * 3000})] * 2
    lines += [json.dumps({"name": "007", "image": [], "question": 5}), '{"image": [], "question": "Why', "[1]"]
    lines += [json.dumps({"name": 12345678901234567890123, "image": "pictures/0.png", "question": "null"})]
    content = "\n".join(lines).encode() + b'\n{"image": [], "question": "caf\xe9"}\n'
    (sample.root / "odd.jsonl").write_bytes(content)
    answered = batch(capsys, sample, tmp_path / "out", "--id-column", "name", data=sample.root / "odd.jsonl")
    assert [row["id"] for row in answered] == ["2024-01-01"] * 2 + ["007", None, None, "12345678901234567890123", None]
    sound = alone(sample, {"image": [], "question": '12 or "13"?'})
    assert [(row["answer"], row["tokens"], row["prompt_tokens"]) for row in answered[:2]] == [sound] * 2
    assert answered[5]["answer"] == alone(sample, {"image": ["pictures/0.png"], "question": "null"})[0]
    assert "row 2: the prompt is no text, but int 5" in answered[2]["error"]
    assert "row 3: its line is no JSON" in answered[3]["error"]
    assert "row 4: its line is no object, but list" in answered[4]["error"]
    assert "row 6: its line is not UTF-8 (byte 0xe9)" in answered[6]["error"]


def test_shards_in_which_nothing_can_be_asked(capsys, sample, loaded, tmp_path):
    rows = [{"image": [], "question": ""}] * 16 + [{"image": [], "question": "Why?"}]
    answered = batch(
        capsys, sample, tmp_path / "out", "--shard-rows", "16", data=write_rows(tmp_path / "bad.jsonl", rows)
    )
    assert [row["error"] is None for row in answered] == [False] * 16 + [True]


def test_pictures_that_are_none_are_told(capsys, sample, loaded, tmp_path):
    cells = [{"url": "http://x/y.png"}, {"file": "a.png"}, "~nobody-here/x.png", {"path": None, "bytes": None}]
    rows = [{"image": cell, "question": "Why?"} for cell in cells]
    answered = batch(capsys, sample, tmp_path / "out", data=write_rows(tmp_path / "cells.jsonl", rows))
    assert [row["error"] is None for row in answered] == [False, False, False, True]
    assert "neither a path nor a file's bytes" in answered[0]["error"]


def test_names_that_mean_something_elsewhere(capsys, sample, loaded, tmp_path):
    folder = tmp_path / "pics[1]"
    folder.mkdir()
    for name in ("train", "test", "zebra"):
        Image.open(sample.root / "pictures" / "0.png").save(folder / f"{name}.png")
    answered = batch(capsys, sample, tmp_path / "out", "--prompt", "What is this?", data=folder)
    assert [row["images"] for row in answered] == [1, 1, 1]
    file = write_rows(folder / "a[1].jsonl", [{"image": "zebra.png", "question": "What is this?"}])
    assert batch(capsys, sample, tmp_path / "more", data=file)[0]["answer"] == answered[0]["answer"]


def test_a_prompt_beyond_the_models_positions_is_an_error_row(capsys, sample, loaded, tmp_path):
    room = sample.model.config.text_config.max_position_embeddings
    rows = [{"image": [], "question": "why " * room}, {"image": [], "question": "Why?"}]
    answered = batch(capsys, sample, tmp_path / "out", data=write_rows(tmp_path / "long.jsonl", rows))
    assert f"the model was made for {room}" in answered[0]["error"]
    assert answered[1]["error"] is None


def test_a_large_picture_is_kept_as_small_as_the_model_sees_it(sample):
    image = Image.effect_noise((900, 400), 80).convert("RGB")
    small = sample.processor.as_seen(image)
    side = sample.model.config.vision_config.image_size
    assert small.size == (side, side)
    pixels = [sample.processor.image_processor(item, return_tensors="pt")["pixel_values"] for item in (image, small)]
    assert torch.equal(*pixels)


def test_a_checkpoint_that_cannot_be_loaded_begins_nothing(capsys, sample, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(sample.ivtp, broken)
    (broken / "tokenizer.json").unlink()
    fails(capsys, sample, tmp_path / "out", "-m", str(broken))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stored_pictures_of_more_than_two_gigabytes(tmp_path):
    """Sizes are read chunk by chunk; here the chunks are one and the same in memory."""
    chunk = pa.array([{"bytes": b"x" * 25_000_000, "path": None}])
    stored = datasets.table.InMemoryTable(pa.table({"image": pa.chunked_array([chunk] * 90)}))
    table = datasets.Dataset(stored, fingerprint="large")
    cells = list(ArrowTable(table).cells("image", 0, 90))
    assert {cell["bytes"] for cell in cells} == {25_000_000}
