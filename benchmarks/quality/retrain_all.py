"""Retrain every system of the tables on the miniature, and the unpruned control as long; ask each what it answers.

    python -m benchmarks.quality.retrain_all --steps 400 --seed 0 --seed 1

Systems come in the order of `retrained_rows`: control, IVTP, what learns to choose, connectors, the rest of Table 1,
then the ablations. Each is written to the results as soon as it is measured, and the same command goes on where it was
stopped, within a system too. Several processes may share the results, each with systems or a seed of its own. The page
names what was not measured.
"""

import datetime
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from filelock import FileLock

from benchmarks.quality import command, report
from benchmarks.quality.checkpoint import checkpoint_fingerprint
from benchmarks.quality.examination import Asked, Examination, row_cost
from benchmarks.quality.kept_counts import Kept, joined
from benchmarks.quality.loop import set_up
from benchmarks.quality.methods import Row
from benchmarks.quality.paper_tables import points, with_interval
from benchmarks.quality.plots import plot_kept
from benchmarks.quality.retrain import ADAM, NEW, Course, load_base, retrain
from benchmarks.quality.retrained_rows import Retrained, chosen_rows, retrained_rows
from benchmarks.quality.world import Question, Scene, fingerprint, sample_questions
from modeling_ivtp.evaluation.intervals import bootstrap_interval, paired_interval
from modeling_ivtp.files.console import quiet
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.flops.formula import connector_flops, decoder_flops, head_flops, tower_flops
from modeling_ivtp.model.schedule import PruningPlan
from modeling_ivtp.trained import TrainedMethod
from modeling_ivtp.trained.adapter import describe_base

HERE = Path(__file__).parents[2]
SAMPLE = 2000
"""The sample of the quality benchmark; as many of its first questions are asked as wanted."""


class Results:
    """The results of all systems so far, on disk.

    Parameters
    ----------
    file : Path
        A JSON file; a page lies beside it.
    identity : mapping
        What all rows have in common; a file of other rows is refused.

    Raises
    ------
    ValueError
        If the file holds results of another checkpoint, world, course or sample.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)  # rather now than after an hour
        self.file, self.identity = file, json.loads(json.dumps(dict(identity)))
        self.lock = FileLock(file.with_name(f".{file.name}.lock"))
        self.rows: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {"date": datetime.date.today().isoformat()}
        self.read()

    def read(self) -> None:
        """Read what the file has by now: other processes may have added rows."""
        if not self.file.exists():
            return
        found = json.loads(self.file.read_text())
        for name, value in self.identity.items():
            if found.get(name) != value:
                raise ValueError(f"{self.file} has {name}={found.get(name)}; allowed: {value}, or another --out.")
        self.rows = found["rows"]
        self.more |= {name: value for name, value in found.items() if name not in (*self.identity, "rows")}

    def has(self, system: str, mode: str, seed: int | None) -> bool:
        """Return whether a system was measured."""
        self.read()
        return any((row["system"], row["mode"], row["seed"]) == (system, mode, seed) for row in self.rows)

    def add(self, rows: Sequence[Mapping[str, Any]], config: Any, questions: Sequence[Question]) -> None:
        """Add a system's rows, and write file, page, and the picture of adaptive systems."""
        with self.lock:
            self.read()
            self.rows += [dict(row) for row in rows]
            self._write(config, questions)

    def _write(self, config: Any, questions: Sequence[Question]) -> None:
        results = self.more | self.identity | {"rows": self.rows}
        report.write_atomically(self.file, (json.dumps(results, indent=1) + "\n").encode())
        page = markdown(results, retrained_rows(config), [question.type for question in questions])
        report.write_atomically(self.file.with_suffix(".md"), page.encode())
        layers = config.text_config.num_hidden_layers
        trained = [row for row in self.rows if row["mode"] == "retrained"]
        types = [question.type for question in questions]
        if (figure := plot_kept(trained, types, config.num_patches, layers)) is not None:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=144)
            report.write_atomically(self.file.with_name(f"{self.file.stem}-kept.png"), picture.getvalue())


def ask(
    llava: Any, processor: Any, rows: Sequence[Row], asked: Sequence[tuple[Scene, Question]], batch: int
) -> list[dict[str, Any]]:
    """Ask a model all questions under some rows: right answers, tokens, computation, tokens kept of each picture."""
    told = Asked()
    said: list[list[str]] = [[] for _ in rows]
    kept: list[list[Kept]] = [[] for _ in rows]
    for first in range(0, len(asked), batch):
        examination = Examination(llava, processor, asked[first : first + batch], first)
        ids, mask = examination.inputs["input_ids"], examination.inputs["attention_mask"].bool()
        told.text_tokens += (mask & (ids != llava.config.image_token_id)).sum(1).tolist()
        told.windows += examination.windows
        for number, row in enumerate(rows):
            answers = examination.answers(row)
            said[number] += answers.said
            kept[number].append(answers.kept)
    found = []
    for number, row in enumerate(rows):
        counts = joined(kept[number])
        right = report.right_answers(said[number], [question.answer for _, question in asked])
        found.append(
            {"method": row.method, "table": row.table, **cost(row, llava.config, told, counts), "kept": counts,
             "right": report.pack(right)}
        )  # fmt: skip
    return found


def cost(row: Row, config: Any, asked: Asked, kept: Kept) -> dict[str, Any]:
    """Return tokens and FLOPs of a row by the paper's counting rule, those of modules and connectors included."""
    texts = np.array(asked.text_tokens, dtype=np.float64)
    layers = config.text_config.num_hidden_layers
    if config.connector is not None:
        tokens, windows = config.connector.tokens, np.mean(asked.windows)
        whole = tower_flops(config, PruningPlan(config.num_patches), config.feature_depth)
        body = 0 if config.clip_text_config is None else config.clip_text_config.max_position_embeddings
        flops = whole + connector_flops(config, round(float(windows) * body))
        flops = flops + decoder_flops(config, texts, [tokens] * layers) + head_flops(config, texts + tokens)
        return {"tflops": float(np.mean(flops)) / 1e12, "final_tokens": tokens, "layer_averaged_tokens": float(tokens)}
    costs = row_cost(row, config, asked, kept)
    method = getattr(row, "method_object", None)
    if isinstance(method, TrainedMethod):
        plan = method.plan(config, config.num_patches)
        before = [config.num_patches, *(_mean_kept(group, kept) for group in plan.decoder[:-1])] if plan else []
        costs["tflops"] += sum(method.module_flops(round(n), round(float(texts.mean()))) for n in before) / 1e12
    return costs


def _mean_kept(group: Any, kept: Kept) -> float:
    counts = kept.get(str(group.last))
    return float(np.mean(counts)) if counts else float(group.keep)


def markdown(results: Mapping[str, Any], systems: Sequence[Retrained], types: Sequence[str]) -> str:
    """Return the page: each system untrained and retrained, against the control; unmeasured ones are named."""
    number, course = results["asked"], results["course"]
    right = {_key(row): report.unpack(row["right"], number) for row in results["rows"]}
    seeds = sorted({row["seed"] for row in results["rows"] if row["seed"] is not None})
    lines, missing = [], []
    for seed in seeds or [0]:
        trained = [row for row in results["rows"] if (row["mode"], row["seed"]) == ("retrained", seed)]
        measured = {row["system"] for row in trained}
        if unmeasured := [f"{system.name} ({system.table})" for system in systems if system.name not in measured]:
            missing.append(f"Not measured with seed {seed}: {'; '.join(unmeasured)}.\n")
    for system in systems:
        without = [row for row in results["rows"] if (row["system"], row["mode"]) == (system.name, "inference")]
        for row in results["rows"]:
            if (row["system"], row["mode"]) == (system.name, "retrained"):
                control = right.get(("unpruned", "unpruned", "retrained", row["seed"]))
                lines.append(_line(system, row, without, right, control))
    rates = results["learning_rates"]
    return "\n".join(
        [
            f"# Retrained on the miniature, {results['date']}\n",
            f"`{results['checkpoint']}`, {course['steps']} steps of {course['scenes']} scenes with "
            f"{course['questions']} questions each, the same for all systems of a seed; AdamW at {rates['model']:g}, "
            f"new modules at {rates['new']:g}. {number} held-out questions of {len(set(types[:number]))} types, "
            "95% bootstrap intervals over questions, differences paired by question. Inference: the checkpoint as it "
            "is, under the system or its untrained stand-in. Control: unpruned, as many steps. TFLOPs hold modules "
            "and connectors.\n",
            markdown_table(
                ("table", "system", "seed", "final tokens", "layer-averaged", "TFLOPs", "inference, %", "retrained, %",
                 "to inference", "to the control", "s a step"),
                lines,
            ),
            *missing,
        ]
    )  # fmt: skip


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["system"], row["method"], row["mode"], row["seed"]


def _line(
    system: Retrained,
    row: Mapping[str, Any],
    without: Sequence[Mapping[str, Any]],
    right: Mapping[tuple[Any, ...], np.ndarray],
    control: np.ndarray | None,
) -> tuple[Any, ...]:
    own = right[_key(row)]
    # At another ratio the untrained stand-in would be another one.
    before = right[_key(without[0])] if without and row["method"] == system.name else None
    # A run that stood still for a while tells no time.
    seconds = "–" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.2g}"
    return (
        system.table, row["method"], row["seed"], f"{row['final_tokens']:.4g}", f"{row['layer_averaged_tokens']:.1f}",
        f"{row['tflops']:.4g}", _accuracy(before), _accuracy(own), _to(own, before),
        "" if system.name == "unpruned" else _to(own, control), seconds,
    )  # fmt: skip


def _accuracy(right: np.ndarray | None) -> str:
    if right is None:
        return "–"
    return with_interval({"accuracy": float(right.mean()), "interval": bootstrap_interval(right)})


def _to(right: np.ndarray, other: np.ndarray | None) -> str:
    return "–" if other is None else points(float(right.mean() - other.mean()), paired_interval(right, other))


def measure(
    system: Retrained,
    model: Path,
    course: Course,
    asked: Sequence[tuple[Scene, Question]],
    states: Path,
    results: Results,
    batch: int,
    device: str,
) -> None:
    """Ask a system untrained, train it, and ask it again; what was done before is not done anew."""
    questions = [question for _, question in asked]

    def told(rows: list[dict[str, Any]], mode: str, seed: int | None, **more: Any) -> None:
        for row in rows:
            row |= {"system": system.name, "mode": mode, "seed": seed} | more
            row["accuracy"] = float(report.unpack(row["right"], len(asked)).mean())
            row["right"] = row.pop("right")  # long, so last
        results.add(rows, llava.config, questions)

    untrained = system.untrained is not None and not results.has(system.name, "inference", None)
    if not untrained and results.has(system.name, "retrained", course.seed):
        return
    llava, processor = load_base(model, system.connector, course.seed, device)
    if untrained and system.untrained is not None:
        told(ask(llava, processor, [system.untrained], asked, batch), "inference", None)
    if results.has(system.name, "retrained", course.seed):
        return
    name = f"{system.table} {system.name} {course.seed}".replace(" ", "-")
    method, seconds = retrain(llava, processor, system.pruned_by, system.learns, course, states / name, model)
    if isinstance(method, TrainedMethod):
        # What was trained beside the modules is their base from now on.
        method = method.with_modules(method.modules_or_raise(), describe_base(llava))
        method.save(states / name / "pruner", overwrite=True)
    llava.eval()
    with torch.no_grad():
        rows = ask(llava, processor, system.rows(llava.config, method), asked, batch)
    told(rows, "retrained", course.seed, seconds_per_step=round(seconds, 3))


def main(
    model: Annotated[Path, typer.Option(help="The checkpoint that all start from.")] = HERE / "examples" / "miniature",
    states: Annotated[Path, typer.Option(help="Folder of states, logs and modules.")] = Path("out/retrained"),
    out: Annotated[Path, typer.Option(help="The results, a JSON file; a page lies beside it.")] = (
        HERE / "benchmarks" / "results" / "retrained.json"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each system.")] = 400,
    scenes: Annotated[int, typer.Option(help="Scenes of a step.")] = 8,
    questions: Annotated[int, typer.Option(help="Questions about each scene of a step.")] = 4,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; may be repeated.", show_default="0")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Systems; may be repeated.", show_default="all")] = None,
    asked: Annotated[int, typer.Option(help="Held-out questions, of the quality benchmark's 2000.")] = SAMPLE,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 24,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Retrain all systems, or go on with it."""
    if not 1 <= asked <= SAMPLE or batch < 1:
        raise ValueError(f"asked={asked}, batch={batch}; allowed: 1 to {SAMPLE} questions, and batches of at least 1.")
    courses = [Course(steps, scenes, questions, one) for one in seed or [0]]
    llava, _ = load_base(model, None, 0, "cpu")
    config = llava.config
    systems = chosen_rows(config, system or [])
    course = {name: value for name, value in asdict(courses[0]).items() if name != "seed"}
    identity = {
        "checkpoint": checkpoint_fingerprint(model), "world": fingerprint(), "course": course,
        "learning_rates": {"model": ADAM, "new": NEW}, "asked": asked,
    }  # fmt: skip
    results = Results(out, identity)
    results.more |= {"versions": report.versions(), "machine": report.machine(llava)}
    del llava
    side = config.vision_config.image_size
    sample = list(islice(sample_questions("test", SAMPLE, side=side), asked))
    for one in courses:
        for row in systems:
            device = set_up(one.seed, threads)
            with quiet():
                measure(row, model, one, sample, states, results, batch, str(device))
            print(f"{row.name}, seed {one.seed}: done", flush=True)
    results.add([], config, [question for _, question in sample])  # the page names systems that are new since


if __name__ == "__main__":
    command.run(main)
