"""A few conversations about small pictures in LLaVA's format, and options of a run on them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_ivtp.training import Options, Preset

SECOND = ("connector", "projector", "language_model")
ROWS: list[dict[str, Any]] = [
    {
        "id": f"picture-{number}",
        "image": f"pictures/{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is the colour of the bird?"},
            {"from": "gpt", "value": ("brown", "red", "blue")[number % 3]},
            {"from": "human", "value": "Is there a dog in the picture?"},
            {"from": "gpt", "value": ("Is there? No, there is no dog.", "Yes.")[number % 2]},
        ],
    }
    for number in range(8)
]
TEXT_ROW = {"id": "text", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}


def write_data(folder: Path, rows: list[Any] = ROWS) -> Path:
    """Write rows and their pictures; returns the JSON file."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(len(ROWS)):
        picture = Image.effect_mandelbrot((70 + number, 60), (-2, -1.5, 1, 1.5), 10 + 9 * number).convert("RGB")
        picture.save(folder / "pictures" / f"{number}.png")
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return file


def run_options(model: Path, data: Path, out: Path, trains: tuple[str, ...] = SECOND, **options: Any) -> Options:
    """Four steps of four rows on the CPU."""
    preset = Preset(trains=trains, learning_rate=3e-3, batch_size=4, max_length=256)
    usual = {"max_steps": 4, "save_steps": 2, "log_steps": 1, "device": "cpu", "progress": False, "log_to": "none"}
    changed = {
        name: options.pop(name) for name in ("batch_size", "max_length", "pruner_learning_rate") if name in options
    }
    return Options(str(model), str(data), out, preset.changed(**changed), **usual | options)
