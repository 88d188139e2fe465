"""Speed of `ivtp batch` with a second process on this machine's CPUs, and its results when it is killed ten times.

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
"""The runs that are timed by turns, with the number of processes and the threads of each (None: all).

The ratio to one process of one thread is the gain of a second process; the ratio to one process of all threads is its
gain on this machine, where both use the same cores."""

NEW_TOKENS, BATCH, SHARD, MEMORY = 8, 8, 16, "2GB"


def write_data(folder: Path, rows: int) -> Path:
    """Write a data set of drawn scenes, each with one question: a JSONL file and its pictures."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, (scene, question) in enumerate(sample_questions("validation", rows)):
        Image.fromarray(scene.pixels).save(folder / "pictures" / f"{number}.png")
        lines.append(json.dumps({"image": f"pictures/{number}.png", "question": question.prompt}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def command(data: Path, model: Path, out: Path, processes: int) -> list[str]:
    """Return the command of a run with a number of processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # accelerate calls several processes of any kind "multi_gpu"; port 0 is a free one, so that runs can follow at once.
    launch += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    batch = ["-m", "modeling_ivtp.cli", "batch", "--model", str(model), "--data", str(data), "--out", str(out)]
    batch += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS), "--memory", MEMORY]
    return [*launch, *batch, "--batch-size", str(BATCH), "--shard-rows", str(SHARD), "--no-progress"]


def start(arguments: list[str], threads: int | None = 1) -> subprocess.Popen[bytes]:
    """Start a run whose processes have `threads` threads each; None: as many as PyTorch takes."""
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment = os.environ | limits
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def timed(arguments: list[str], out: Path, threads: int | None = 1) -> dict[str, float]:
    """Time a run to its end, with `threads` threads in each process.

    Returns
    -------
    dict
        `seconds` of the whole command, and of `answering`: from the first claim of a shard to the last file, without
        imports and loading.
    """
    began, claimed = time.time(), 0.0
    process = start(arguments, threads)
    while process.poll() is None:
        if not claimed and next((out / "_unfinished").glob("0*.lock"), None):
            claimed = time.time()
        time.sleep(0.01)
    ended = time.time()
    _, errors = process.communicate()
    if process.returncode:
        raise ValueError(f"the run failed: {errors.decode()[-500:]}")
    last = max(path.stat().st_mtime for path in out.glob("answers-*.parquet"))
    return {"seconds": ended - began, "answering": last - claimed}


def kill(process: subprocess.Popen[bytes]) -> int:
    """Send SIGKILL to the launcher and every process below it, and return how many were alive."""
    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.communicate()
    return len(family)


def killed(
    data: Path, model: Path, out: Path, rows: int, kills: int, undisturbed: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """Kill a run of two processes at random moments, then let it finish.

    Three of ten kills come at a random moment before an undisturbed run would begin to answer, the others at a random
    moment after a new row is on disk, soon enough that all kills come before the last row.

    Parameters
    ----------
    undisturbed : mapping
        The result of `timed` for such a run.
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
    """Count the rows on disk, in finished files and in journals."""
    return Counter(OutFolder(out), rows, SHARD, shards).done() if out.is_dir() else 0


def same(first: Path, second: Path) -> bool:
    """Return whether two runs left the same files, byte for byte."""
    names = [sorted(path.name for path in out.iterdir()) for out in (first, second)]
    _, differing, odd = filecmp.cmpfiles(first, second, names[0], shallow=False)
    return names[0] == names[1] and not differing and not odd


def measure(model: Path, rows: int, pairs: int, kills: int, seed: int) -> dict[str, Any]:
    """Time one process of one thread, one of all threads, and two of one thread by turns; kill a run of two."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", rows)
        reference = Path(folder) / "reference"
        # This run also reads the data into the cache of `datasets`, from which later runs read.
        undisturbed = timed(command(data, model, reference, 2), reference)
        times, agree = [], []
        for pair in range(pairs):
            runs = {}
            for kind, processes, threads in _KINDS if pair % 2 == 0 else reversed(_KINDS):
                out = Path(folder) / f"{pair}-{kind.replace(' ', '-')}"
                runs[kind] = timed(command(data, model, out, processes), out, threads)
                agree.append(same(reference, out))
                print(f"turn {pair + 1} of {pairs}, {kind}: {runs[kind]}", file=sys.stderr)
            times.append(runs)
        out = Path(folder) / "killed"
        found = killed(data, model, out, rows, kills, undisturbed, seed) if kills else {"kills": []}
        numbers = pq.read_table(out)["row"].to_pylist() if kills else []
        return {
            "pairs": times,
            "all_runs_wrote_the_same_bytes": all(agree),
            "killed": found
            | {"same_bytes_as_undisturbed": same(reference, out), "every_row_once": numbers == list(range(rows))}
            if kills
            else found,
        }


def ratios(pairs: list[Mapping[str, Any]], kind: str, what: str) -> list[float]:
    """Return how many times faster two processes are than one of a kind, for each pair."""
    return [pair[kind][what] / pair[_TWO][what] for pair in pairs]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page of the results."""
    host, pairs, killed_run = results["machine"], results["pairs"], results["killed"]
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    lines = [
        f"# Batches by two processes, {results['date']}\n",
        f"{host['device']}, {host['cpus']} CPUs, load average {results['load']:.2f} "
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
    if kills := killed_run["kills"]:
        once = "every row once" if killed_run["every_row_once"] else "NOT every row once"
        bytes_ = "the bytes" if killed_run["same_bytes_as_undisturbed"] else "NOT the bytes"
        rows_done = ", ".join(str(kill["rows"]) for kill in kills)
        lines.append(
            f"Killed {len(kills)} times at random with SIGKILL, launcher and both processes, with {rows_done} rows on "
            f"disk: it ended with {once} and {bytes_} of an undisturbed run.\n"
        )
    return "\n".join(lines)


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint.")] = MINIATURE,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the data set.")] = 1024,
    pairs: Annotated[int, typer.Option(min=0, help="Runs of one process and of two, by turns.")] = 3,
    kills: Annotated[int, typer.Option(min=0, help="How often a run is killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
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
