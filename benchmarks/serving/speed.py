"""Speed of pruned serving beside vLLM's own stock LLaVA, in interleaved rounds of one run, on a CPU or one GPU.

    python -m benchmarks.serving.speed

Every request brings a picture that was not seen before. A round measures every arm at every concurrency, in turning
order; ratios are taken within a round. A run that was stopped goes on with the rounds that are missing.
"""

import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality.command import run
from benchmarks.quality.report import write_atomically
from benchmarks.serving.engines import MINIATURE, NEW_TOKENS, TOWER, Engine, held_out
from benchmarks.serving.page import PARTS, STOCK, Row, markdown
from modeling_ivtp.checkpoints.stock import export_stock
from modeling_ivtp.files.console import shareable_command
from modeling_ivtp.speed.bench import machine

ROOT = Path(__file__).parents[2]
STATE = ROOT / "out" / "serving-speed.jsonl"
"""The finished rounds of a run; it is removed in the end."""
ARMS: dict[str, dict[str, Any]] = {"tower": TOWER, "guided": {}}
CONCURRENCIES = (1, 8, 32)


@contextmanager
def timed_parts(engine: Engine, seconds: dict[str, float]) -> Iterator[None]:
    """Add the CPU seconds of the encoder's parts to `seconds`; a stock engine has none."""
    encoder = engine.images
    if encoder is None:
        yield
        return

    def timing(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.process_time()
            result = method(*args)
            seconds[part] = seconds.get(part, 0.0) + time.process_time() - began
            return result

        return timed

    for name, part in PARTS.items():
        setattr(encoder, name, timing(getattr(encoder, name), part))
    try:
        yield
    finally:
        for name in PARTS:
            delattr(encoder, name)


def measure(engine: Engine, requests: Sequence[Any], concurrency: int) -> Row:
    """Answer requests, as many at a time as `concurrency` says, and time it.

    Returns
    -------
    dict
        `seconds` and `cpu_seconds` of a request, and CPU seconds of its `parts`.
    """
    parts: dict[str, float] = {}
    with timed_parts(engine, parts):
        began, cpu = time.perf_counter(), time.process_time()
        for first in range(0, len(requests), concurrency):
            engine.answers(requests[first : first + concurrency])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    count = len(requests)
    return {
        "seconds": seconds / count,
        "cpu_seconds": cpu / count,
        "parts": {part: value / count for part, value in parts.items()},
    }


def engines(model: Path, folder: Path, **options: Any) -> dict[str, Engine]:
    """Start all arms; the stock LLaVA is the same weights under their official names."""
    export_stock(model, folder / "stock")
    started = {STOCK: Engine(folder / "stock", **options)}
    return started | {
        name: Engine(model, hf_overrides={"pruning": changes}, **options) for name, changes in ARMS.items()
    }


def one_round(arms: Mapping[str, Engine], number: int, asked: Iterator[Any], each: int) -> list[Row]:
    """Measure all arms at all concurrencies with the next requests; the order of arms turns from round to round."""
    names = list(arms)
    rows = []
    for concurrency in CONCURRENCIES:
        requests = list(islice(asked, max(concurrency, each)))
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found = measure(arms[name], requests, concurrency)
            rows.append({"round": number, "concurrency": concurrency, "arm": name, **found})
            print(rows[-1], file=sys.stderr)
    return rows


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint.")] = MINIATURE,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    each: Annotated[int, typer.Option(min=1, help="Least requests of a measurement.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = False,
    blocks: Annotated[int, typer.Option(min=0, help="Blocks of the KV cache; 0: as many as vLLM takes.")] = 1024,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure, and write serving-DATE.json and serving-DATE.md."""
    settings = {"model": model.name, "dtype": dtype, "eager": eager, "each": each, "new_tokens": NEW_TOKENS}
    known = [json.loads(line) for line in STATE.read_text().splitlines()] if STATE.exists() else []
    if known and known[0]["settings"] != settings:
        raise ValueError(f"{STATE} has rounds of {known[0]['settings']}; allowed: {settings}, or remove it.")
    load = os.getloadavg()[0]
    STATE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options = {"dtype": dtype, "enforce_eager": eager, "max_num_seqs": CONCURRENCIES[-1]}
        options["num_gpu_blocks_override"] = blocks or None
        arms = engines(model, Path(folder), **options) if len(known) < rounds else {}
        missing = range(len(known), rounds)
        per_round = sum(max(concurrency, each) for concurrency in CONCURRENCIES)
        drawn = held_out(per_round * (len(missing) + 1)) if arms else []
        asked = iter([(text, images) for text, images, _ in drawn])
        if arms:
            one_round(arms, 0, asked, each)  # warms up
        for number in missing:
            known.append({"settings": settings, "rows": one_round(arms, number, asked, each)})
            with open(STATE, "a") as journal:
                journal.write(json.dumps(known[-1]) + "\n")
    date = datetime.date.today().isoformat()
    results = settings | {
        "date": date,
        "command": shareable_command("python -m benchmarks.serving.speed", sys.argv[1:]),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "load": load,
        "rows": [row for one in known[:rounds] for row in one["rows"]],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"serving-{date}.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomically(out / f"serving-{date}.md", markdown(results).encode())
    STATE.unlink()
    print(markdown(results))


if __name__ == "__main__":
    run(main)
