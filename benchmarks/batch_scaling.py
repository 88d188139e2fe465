"""What a second process is worth to `ivtp batch` on this machine's CPUs, and what is left when it is killed ten times.

python -m benchmarks.batch_scaling
"""

import datetime
import filecmp
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image

from benchmarks.quality.command import run
from benchmarks.quality.evaluate_quality import MINIATURE
from benchmarks.quality.readme import RESULTS, ROOT
from benchmarks.quality.report import write_atomically
from benchmarks.quality.world import sample_questions
from modeling_ivtp.batch.folder import OutFolder
from modeling_ivtp.batch.progress import Counter
from modeling_ivtp.files.console import shareable_command
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.speed.bench import machine

_TWO = "two processes of one thread"
_KINDS = (("of one thread", 1, 1), ("of all threads", 1, None), (_TWO, 2, 1))
"""What is timed by turns, the number of processes, and the threads of each. Two of one thread use as many cores as one
of all does on two: the first ratio tells what a second process is worth, the second what it is worth here."""

NEW_TOKENS, BATCH, SHARD, MEMORY = 8, 8, 16, "2GB"


def write_data(folder: Path, rows: int) -> Path:
    """A data set of drawn scenes, each with one question: a JSONL file and its pictures."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, (scene, question) in enumerate(sample_questions("validation", rows)):
        Image.fromarray(scene.pixels).save(folder / "pictures" / f"{number}.png")
        lines.append(json.dumps({"image": f"pictures/{number}.png", "question": question.prompt}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def command(data: Path, model: Path, out: Path, processes: int) -> list[str]:
    """The command of a run with so many processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # The name is accelerate's for processes of any kind; a free port lets runs follow each other at once.
    launch += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    batch = ["-m", "modeling_ivtp.cli", "batch", "--model", str(model), "--data", str(data), "--out", str(out)]
    batch += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS), "--memory", MEMORY]
    return [*launch, *batch, "--batch-size", str(BATCH), "--shard-rows", str(SHARD), "--no-progress"]


def start(arguments: list[str], threads: int | None = 1) -> subprocess.Popen[bytes]:
    """A run whose processes have so many threads each; None: as many as PyTorch takes."""
    told = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment = os.environ | told
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def timed(arguments: list[str], out: Path, threads: int | None = 1) -> dict[str, float]:
    """Run to the end, with so many threads in each process.

    Returns
    -------
    dict
        `seconds` of the whole command, and `answering` from the first claim of a shard to the last file, which leaves
        out imports and loading.
    """
    began, claimed = time.time(), 0.0
    process = start(arguments, threads)
    while process.poll() is None:
        if not claimed and next((out / "_unfinished").glob("0*.lock"), None):
            claimed = time.time()
        time.sleep(0.01)
    ended = time.time()
    _, said = process.communicate()
    if process.returncode:
        raise ValueError(f"the run failed: {said.decode()[-500:]}")
    last = max(path.stat().st_mtime for path in out.glob("answers-*.parquet"))
    return {"seconds": ended - began, "answering": last - claimed}


def kill(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to the launcher and every process below it; returns how many were alive."""
    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        one.kill()
    psutil.wait_procs(family)
    process.communicate()
    return len(family)


def killed(
    data: Path, model: Path, out: Path, rows: int, kills: int, undisturbed: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """Kill a run of two processes at random moments, then let it end.

    Three of ten kills come at any moment from the start to where an undisturbed run begins to answer, the others at any
    moment after a new row is there, soon enough that all of them come before the last row.

    Parameters
    ----------
    undisturbed : mapping
        What `timed` says of such a run.
    """
    draws, moments, shards = random.Random(seed), [], -(-rows // SHARD)
    arguments = command(data, model, out, 2)
    for _ in range(kills):
        before = answered(out, rows, shards)
        process, at_work = start(arguments), draws.random() < 0.7
        while at_work and process.poll() is None and answered(out, rows, shards) == before:
            time.sleep(0.01)
        longest = undisturbed["answering"] / kills if at_work else undisturbed["seconds"] - undisturbed["answering"]
        time.sleep(draws.uniform(0, longest))
        if process.poll() is not None:
            process.communicate()
            break
        killed_processes = kill(process)
        moments.append({"rows": answered(out, rows, shards), "at_work": at_work, "processes": killed_processes})
    end = timed(arguments, out)
    return {"kills": moments, "seconds_of_the_last_run": end["seconds"]}


def answered(out: Path, rows: int, shards: int) -> int:
    """Rows that are on disk, in finished files and in journals."""
    return Counter(OutFolder(out), rows, SHARD, shards).done() if out.is_dir() else 0


def same(first: Path, second: Path) -> bool:
    """Whether two runs left the same files, byte for byte."""
    names = [sorted(path.name for path in out.iterdir()) for out in (first, second)]
    _, differing, odd = filecmp.cmpfiles(first, second, names[0], shallow=False)
    return names[0] == names[1] and not differing and not odd


def measure(model: Path, rows: int, pairs: int, kills: int, seed: int) -> dict[str, Any]:
    """Time one process of one thread, one of all, and two of one by turns, and kill a run of two."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", rows)
        reference = Path(folder) / "reference"
        # Also reads the data into the cache of `datasets`, which later runs find.
        undisturbed = timed(command(data, model, reference, 2), reference)
        times, agree = [], []
        for pair in range(pairs):
            of_pair = {}
            for kind, processes, threads in _KINDS if pair % 2 == 0 else reversed(_KINDS):
                out = Path(folder) / f"{pair}-{kind.replace(' ', '-')}"
                of_pair[kind] = timed(command(data, model, out, processes), out, threads)
                agree.append(same(reference, out))
                print(f"turn {pair + 1} of {pairs}, {kind}: {of_pair[kind]}", file=sys.stderr)
            times.append(of_pair)
        out = Path(folder) / "killed"
        told = killed(data, model, out, rows, kills, undisturbed, seed) if kills else {"kills": []}
        numbers = pq.read_table(out)["row"].to_pylist() if kills else []
        return {
            "pairs": times,
            "all_runs_wrote_the_same_bytes": all(agree),
            "killed": told
            | {"same_bytes_as_undisturbed": same(reference, out), "every_row_once": numbers == list(range(rows))}
            if kills
            else told,
        }


def ratios(pairs: list[Mapping[str, Any]], kind: str, what: str) -> list[float]:
    """How much faster two processes are than one of some kind, in each pair."""
    return [pair[kind][what] / pair[_TWO][what] for pair in pairs]


def markdown(results: Mapping[str, Any]) -> str:
    """The results, for people."""
    machine_, pairs, told = results["machine"], results["pairs"], results["killed"]
    versions = ", ".join(f"{name} {number}" for name, number in machine_["versions"].items())
    lines = [
        f"# Batches by two processes, {results['date']}\n",
        f"{machine_['device']}, {machine_['cpus']} CPUs, load average {results['load']:.2f} "
        f"before; {versions}; the miniature in float32, {results['rows']} rows, batches of up to {BATCH}.\n",
        f"`{results['command']}`\n",
    ]
    if pairs:
        rows = []
        for name, what in (("the whole command", "seconds"), ("answering alone", "answering")):
            for kind, *_ in _KINDS[:-1]:
                found = ratios(pairs, kind, what)
                one, two = (statistics.median(pair[number][what] for pair in pairs) for number in (kind, _TWO))
                spread = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
                rows.append((name, kind, f"{one:.1f}", f"{two:.1f}", spread))
        header = ("", "one process", "s", f"{_TWO}, s", f"times as fast, median of {len(pairs)} turns (least to most)")
        agreed = "same bytes" if results["all_runs_wrote_the_same_bytes"] else "NOT the same bytes"
        lines += [markdown_table(header, rows), f"All runs wrote the {agreed}.\n"]
    if told["kills"]:
        once = "every row once" if told["every_row_once"] else "NOT every row once"
        bytes_ = "the bytes" if told["same_bytes_as_undisturbed"] else "NOT the bytes"
        there = ", ".join(str(one["rows"]) for one in told["kills"])
        lines.append(
            f"Killed {len(told['kills'])} times at random with SIGKILL, launcher and both processes, when {there} rows "
            f"were there: it ended with {once} and {bytes_} of an undisturbed run.\n"
        )
    return "\n".join(lines)


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint.")] = MINIATURE,
    rows: Annotated[int, typer.Option(min=2, help="Of the data set.")] = 1024,
    pairs: Annotated[int, typer.Option(min=0, help="Runs of one process and of two, by turns.")] = 3,
    kills: Annotated[int, typer.Option(min=0, help="Times a run is killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write batch-DATE.json and batch-DATE.md."""
    load = os.getloadavg()[0]
    date = datetime.date.today().isoformat()
    results = {
        "date": date,
        "command": shareable_command("python -m benchmarks.batch_scaling", sys.argv[1:]),
        "machine": machine(torch.device("cpu")),
        "load": load,
        "rows": rows,
    } | measure(model.resolve(), rows, pairs, kills, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"batch-{date}.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomically(out / f"batch-{date}.md", markdown(results).encode())
    print(markdown(results))


if __name__ == "__main__":
    run(main)
