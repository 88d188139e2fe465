"""`ivtp batch` on Ray: speed with a second actor, and its results when driver, actors, workers and a node are killed.

python -m benchmarks.batch_cluster --work out/batch-cluster

Every run is kept in the work's folder: a command that was stopped goes on with the first that is missing.
"""

import datetime
import json
import os
import random
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from ray.util import get_node_ip_address

from benchmarks.quality.command import run
from benchmarks.quality.evaluate_quality import MINIATURE
from benchmarks.quality.readme import RESULTS, ROOT
from benchmarks.quality.report import write_atomically
from benchmarks.quality.world import sample_questions
from modeling_ivtp.files.console import shareable_command
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.speed.bench import machine

NEW_TOKENS, BATCH, SHARD, MEMORY = 8, 8, 16, "2GB"
_KINDS = ("driver", "actor", "worker")


def write_data(folder: Path, rows: int) -> Path:
    """Write a data set of drawn scenes, each with one question: a JSONL file and its pictures."""
    if (folder / "rows.jsonl").is_file():
        return folder / "rows.jsonl"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, question) in enumerate(sample_questions("validation", rows)):
        Image.fromarray(scene.pixels).save(folder / "pictures" / f"{number}.png")
        lines.append(json.dumps({"image": f"pictures/{number}.png", "question": question.prompt}) + "\n")
    write_atomically(folder / "rows.jsonl", "".join(lines).encode())
    return folder / "rows.jsonl"


def start(model: Path, data: Path, out: Path, rows: int, *more: str) -> subprocess.Popen[bytes]:
    """Start a run whose actors have one thread each."""
    batch = [sys.executable, "-m", "modeling_ivtp.cli", "batch", "-m", str(model), "-d", str(data), "-o", str(out)]
    batch += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS), "--memory", MEMORY]
    batch += ["--batch-size", str(BATCH), "--shard-rows", str(SHARD), "--limit", str(rows), "--threads", "1", *more]
    return subprocess.Popen(
        [*batch, "--no-progress"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run's end."""
    _, errors = process.communicate()
    if process.returncode:
        raise ValueError(f"the run failed: {errors.decode()[-500:]}")


def files(out: Path) -> list[Path]:
    """Return the committed checkpoints: one for each file of answers."""
    return [path for path in out.glob("_checkpoint/*.parquet") if not path.name.endswith(".pending.parquet")]


def answers(out: Path) -> list[tuple[int, str | None, str | None]]:
    """Return row, answer and error of everything that was written, in the order of the rows."""
    table = pq.read_table(out, columns=["row", "answer", "error"]).to_pylist()
    return sorted((row["row"], row["answer"], row["error"]) for row in table)


def rate(out: Path) -> float:
    """Return the rows per second between the first and the last file: without imports and loading."""
    times = sorted(path.stat().st_mtime for path in out.glob("answers-*.parquet"))
    return SHARD * (len(times) - 1) / (times[-1] - times[0])


def below(pid: int) -> dict[psutil.Process, str]:
    """Return the processes below one, by what they are called."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found[child] = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def kill(kind: str, process: subprocess.Popen[bytes], draws: random.Random) -> bool:
    """Send SIGKILL to the driver, to an actor, or to a worker that reads or writes; False if there is none."""
    family = below(process.pid)
    if kind == "driver":
        process.kill()
        process.communicate()
        psutil.wait_procs([one for one, name in family.items() if "Agent" not in name], timeout=120)
        return True
    names = ("ray::MapWorker",) if kind == "actor" else ("ray::Write", "ray::Read", "ray::IDLE")
    chosen = [one for one, name in family.items() if name.startswith(names)]
    if not chosen:
        return False
    draws.choice(chosen).kill()
    return True


def killed(begin: Callable[[], subprocess.Popen[bytes]], out: Path, rows: int, kills: int, seed: int) -> list[Any]:
    """Kill a run again and again: after a new file, a random moment later; driver, actor and worker by turns.

    The kills are spread over all files, so that each comes before the last row.
    """
    draws, moments, process = random.Random(seed), list[Any](), begin()
    for number in range(kills):
        kind, least = _KINDS[number % 3], (number + 1) * (rows // SHARD) // (kills + 2)
        while process.poll() is None and len(files(out)) < max(1, least):
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 2))
        if process.poll() is not None or not kill(kind, process, draws):
            continue
        moments.append({"killed": kind, "rows": SHARD * len(files(out))})
        print(moments[-1], file=sys.stderr)
        if kind == "driver":
            process = begin()
    end(process)
    return moments


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def nodes(begin: Callable[[str], subprocess.Popen[bytes]], out: Path, rows: int) -> dict[str, Any]:
    """Answer on a cluster of two nodes on this machine; kill the second when it has an actor and there are files."""
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats", "--block"]
    ray += ["--object-store-memory", str(100 * 2**20)]
    address, folder = f"{get_node_ip_address()}:{free_port()}", Path(tempfile.gettempdir(), f"ivtp-nodes-{os.getpid()}")
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    # Nodes and driver know each other by a token.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    first = [*ray, "--head", "--port", address.rpartition(":")[2], "--num-cpus", "2", "--include-dashboard", "false"]
    started = [subprocess.Popen([*first, "--temp-dir", str(folder)], **options)]
    family: dict[psutil.Process, str] = {}
    try:
        time.sleep(20)
        started.append(subprocess.Popen([*ray, "--address", address, "--num-cpus", "2"], **options))
        time.sleep(20)
        process = begin(address)
        # Ray shares the actors among the nodes; the second has one for certain when a process of that name is below it.
        while process.poll() is None and not (
            len(files(out)) >= rows // SHARD // 4
            and any("MapWorker" in name for name in below(started[1].pid).values())
        ):
            time.sleep(0.1)
        found = {"rows": SHARD * len(files(out)), "actors": 0}
        if process.poll() is None:
            second = below(started[1].pid)
            found["actors"] = sum("MapWorker" in name for name in second.values())
            for one in [*second, psutil.Process(started[1].pid)]:
                if one.is_running():
                    one.send_signal(signal.SIGKILL)
        end(process)
        return found
    finally:
        for node in started:
            if node.poll() is None:
                family |= below(node.pid)
                node.terminate()
        for node in started:
            node.wait()
        for one in psutil.wait_procs(family, timeout=30)[1]:
            one.kill()
        shutil.rmtree(folder, ignore_errors=True)


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """Return what a file holds, or measure it and write the file."""
    if not file.is_file():
        write_atomically(file, (json.dumps(measure(), indent=2) + "\n").encode())
    return json.loads(file.read_text())


def measure(model: Path, work: Path, rows: int, pairs: int, timed: int, kills: int, seed: int) -> dict[str, Any]:
    """Measure all parts that are not in the work's folder."""
    data = write_data(work / "data", rows)

    def pair(number: int) -> dict[str, float]:
        found = {}
        for actors in (1, 2) if number % 2 == 0 else (2, 1):
            out = work / f"pair-{number}-{actors}"
            shutil.rmtree(out, ignore_errors=True)
            end(start(model, data, out, timed, "--actors", str(actors)))
            found[str(actors)] = rate(out)
        print(found, file=sys.stderr)
        return found

    def undisturbed() -> dict[str, float]:
        end(start(model, data, work / "whole", rows, "--actors", "2"))
        return {"rows_per_second": rate(work / "whole")}

    found: dict[str, Any] = {"pairs": [kept(work / f"pair-{n}.json", lambda n=n: pair(n)) for n in range(pairs)]}
    kept(work / "whole.json", undisturbed)
    whole = answers(work / "whole")

    def compared(out: Path) -> dict[str, bool]:
        got = answers(out)
        return {
            "every_row_once": [row for row, *_ in got] == list(range(rows)),
            "same_answers": got == whole,
        }

    def with_kills() -> dict[str, Any]:
        out = work / "killed"
        shutil.rmtree(out, ignore_errors=True)
        moments = killed(lambda: start(model, data, out, rows, "--actors", "2"), out, rows, kills, seed)
        return {"kills": moments, **compared(out)}

    def with_nodes() -> dict[str, Any]:
        out = work / "nodes"
        shutil.rmtree(out, ignore_errors=True)
        begin = lambda address: start(model, data, out, rows, "--actors", "2", "--address", address)  # noqa: E731
        return {**nodes(begin, out, rows), **compared(out)}

    found["killed"] = kept(work / "killed.json", with_kills)
    found["nodes"] = kept(work / "nodes.json", with_nodes)
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page of the results."""
    host, pairs, killed_run, cluster = (results[name] for name in ("machine", "pairs", "killed", "nodes"))
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    lines = [
        f"# Batches on Ray, {results['date']}\n",
        f"{host['device']}, {host['cpus']} CPUs, load average {results['load']:.2f} before; {versions}, ray "
        f"{results['ray']}; the miniature in float32, {results['rows']} rows, batches of up to {BATCH}.\n",
        f"`{results['command']}`\n",
    ]
    if results["load"] > 1:
        lines.append("Other programs ran on the machine: compare the two numbers of a pair, and nothing else.\n")
    if pairs:
        ratios = [pair["2"] / pair["1"] for pair in pairs]
        rows = [
            (number + 1, f"{pair['1']:.1f}", f"{pair['2']:.1f}", f"{ratio:.2f}")
            for number, (pair, ratio) in enumerate(zip(pairs, ratios, strict=True))
        ]
        lines.append(f"Rows per second from the first file to the last, {results['timed_rows']} rows.\n")
        lines.append(markdown_table(("pair", "one actor of one thread", "two", "times as fast"), rows))
        lines.append(f"Median: {statistics.median(ratios):.2f} times as fast.\n")
    told = ", ".join(f"{kill['killed']} at {kill['rows']}" for kill in killed_run["kills"])
    lines.append(
        f"SIGKILL {len(killed_run['kills'])} times, with so many rows written: {told}. {_verdict(killed_run)}\n"
    )
    lines.append(
        f"A cluster of two nodes on one machine, the second killed with {cluster['rows']} rows written; actors of the "
        f"run on it: {cluster['actors']}. {_verdict(cluster)}\n"
    )
    return "\n".join(lines)


def _verdict(found: Mapping[str, bool]) -> str:
    once = "every row once" if found["every_row_once"] else "NOT every row once"
    same = "the answers" if found["same_answers"] else "NOT the answers"
    return f"It ended with {once} and {same} of an undisturbed run."


def main(
    work: Annotated[Path, typer.Option(help="Folder of the runs; a command that was stopped goes on there.")],
    model: Annotated[Path, typer.Option(help="The checkpoint.")] = MINIATURE,
    rows: Annotated[int, typer.Option(min=64, help="Rows of the data set.")] = 2000,
    pairs: Annotated[int, typer.Option(min=0, help="Runs of one actor and of two, by turns.")] = 3,
    timed: Annotated[int, typer.Option(min=64, help="Rows of these runs.")] = 512,
    kills: Annotated[int, typer.Option(min=0, help="How often a run is killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write batch-ray-DATE.json and batch-ray-DATE.md."""
    import ray

    work.mkdir(parents=True, exist_ok=True)
    load = kept(work / "load.json", lambda: os.getloadavg()[0])
    date = datetime.date.today().isoformat()
    results = {
        "date": date,
        "command": shareable_command("python -m benchmarks.batch_cluster", sys.argv[1:]),
        "machine": machine(torch.device("cpu")),
        "ray": ray.__version__,
        "load": load,
        "rows": rows,
        "timed_rows": timed,
    } | measure(model.resolve(), work.resolve(), rows, pairs, timed, kills, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"batch-ray-{date}.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomically(out / f"batch-ray-{date}.md", markdown(results).encode())
    print(markdown(results))


if __name__ == "__main__":
    run(main)
