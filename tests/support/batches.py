"""Runs of `ivtp batch` on a tiny checkpoint, and what each row's answer must be."""

import json
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import ivtp_cli
from modeling_ivtp.batch import cluster
from modeling_ivtp.batch.actor import Answering
from modeling_ivtp.serving import answering

QUESTIONS = (
    "What is this?",
    "Is there a dog or a cat in the picture?",
    "What is the colour of the bird that sits on the left branch of the tree?",
    "Why?",
)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(sample, out, *more, data=None):
    usual = {"-m": sample.ivtp, "-d": data or sample.data, "-o": out, "--max-new-tokens": 5, "--device": "cpu"}
    return [str(part) for part in ["batch", *(part for pair in usual.items() for part in pair), *more]]


def batch(capsys, sample, out, *more, data=None):
    """Answer; returns the rows."""
    capsys.readouterr()
    status = ivtp_cli.main(arguments(sample, out, *more, data=data))
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return answers(out)


def fails(capsys, sample, out, *more, data=None):
    """The one line of a run that is refused, and that wrote nothing."""
    before_run = contents(out)
    capsys.readouterr()
    status = ivtp_cli.main(arguments(sample, out, *more, data=data))
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert len(captured.err.splitlines()) == 1, captured.err
    assert "should not happen" not in captured.err
    assert contents(out) == before_run
    return captured.err


def answers(out):
    """The rows of all files, in their order; a row that is there twice is in the list twice."""
    rows = [row for path in out.glob("answers-*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["row"])


def write_shard(folder, name, table):
    """Write a shard's file and its checkpoint as Ray Data does, without Ray."""
    folder.arrow.create_dir(folder.checkpoints)
    write_table(folder, f"{folder.path}/{name}-0.parquet", table)
    write_table(folder, f"{folder.checkpoints}/{name}.parquet", table.select(["row"]))


def write_table(folder, path, table):
    with folder.arrow.open_output_stream(path) as file:
        pq.write_table(table, file)


@contextmanager
def connected_here(options, need, memory):
    """In place of `cluster.connected`: one actor, which is this process."""
    machines = cluster.Machines(1, 1, 0)
    yield cluster._place(options, need, memory, cluster.share(options, machines), machines)


def answer_here(job, shards, folder, actors, progress):
    """In place of `pipeline.answer_all`: what an actor does, shard after shard."""
    actor = Answering(job)
    for number, shard in enumerate(shards):
        write_shard(folder, f"answers-{id(job)}-{number:06d}", actor(pa.table({"row": shard})))


def contents(out):
    """Every file of a folder, byte for byte."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def alone(sample, row, **options):
    """What the model says to one row, all by itself."""
    images = [Image.open(sample.root / path) for path in row["image"]]
    prompt = answering.as_prompt(sample.processor, row["question"], len(images))
    inputs = answering.prepare(sample.model, sample.processor, images, prompt)
    tokens = sample.model.generate(**inputs, do_sample=False, **{"max_new_tokens": 5} | options)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    text = sample.processor.decode(new, skip_special_tokens=True).strip()
    return text, len(new), inputs["input_ids"].shape[1]


def inputs_of(sample, row):
    images = [Image.open(sample.root / path) for path in row["image"]]
    prompt = answering.as_prompt(sample.processor, row["question"], len(images))
    return answering.prepare(sample.model, sample.processor, images, prompt)
