"""A demonstration for the browser: one question, answered with all visual tokens and with a few of them.

    python examples/space/app.py

The checkpoint is MODEL_ID (at MODEL_REVISION), with the code it brings along; without it, the small one that ships with
the project and the installed package.
"""

import base64
import html
import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).parent
MINIATURE = HERE.parent / "miniature"
EXAMPLES = json.loads((HERE / "examples.json").read_text())
MAX_NEW_TOKENS = 48

CSS = """
.gradio-container {max-width: 1080px !important; margin: 0 auto !important}
.answers {display: grid; grid-template-columns: 1fr 1fr; gap: 12px}
.answer {border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 14px 16px; min-width: 0}
.answer.pruned {border-color: #f59e0b; box-shadow: 0 0 0 1px #f59e0b inset}
.answer h3 {margin: 0; font-size: .8rem; font-weight: 600; color: var(--body-text-color-subdued)}
.answer p {margin: 4px 0 10px; font-size: 1.5rem; font-weight: 600; overflow-wrap: anywhere; line-height: 1.25}
.answer dl {display: grid; grid-template-columns: auto 1fr; gap: 2px 10px; margin: 0; font-size: .85rem}
.answer dt {color: var(--body-text-color-subdued)}
.answer dd {margin: 0; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums}
.words {font-size: 1.15rem; line-height: 1.9; overflow-wrap: anywhere}
.words mark {color: #1c2128; border-radius: 5px; padding: 2px 3px}
.stages {display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 14px 12px}
.stages figure {margin: 0; min-width: 0}
.stages img {width: 100%; border-radius: 8px; display: block}
.stages figcaption {font-size: .8rem; line-height: 1.3; margin-top: 5px; color: var(--body-text-color-subdued)}
.stages b {color: var(--body-text-color); font-size: 1rem; margin-right: 4px}
.note {color: var(--body-text-color-subdued); font-size: .85rem}
@media (max-width: 480px) {.answer {padding: 10px 12px} .answer p {font-size: 1.15rem} .answer dl {font-size: .78rem}}
"""


class Demo:
    """A model and what is shown of it.

    Parameters
    ----------
    source : str
        Folder or Hub id.
    revision : str, optional
        Of a Hub repository.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        if source == str(MINIATURE):
            import modeling_ivtp  # noqa: F401  (registers the classes of a folder that brings no code)
        options: dict[str, Any] = {"trust_remote_code": True, "revision": revision}
        device = "auto" if torch.cuda.is_available() else "cpu"
        # Half precision has no fast kernels on most CPUs.
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        self.model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, device_map=device, **options
        ).eval()
        self.processor = AutoProcessor.from_pretrained(source, **options)
        self.patches = self.model.config.num_patches
        # The budget belongs to the model: visitors take turns.
        self._turn = threading.Lock()

    def ask(self, image: Any, question: str, budget: float) -> tuple[str, str, str]:
        """Both answers, the question with its key words, and what every group of layers left of the image.

        Parameters
        ----------
        image : PIL.Image.Image or None
        question : str
        budget : float
            Visual tokens in the end; a slider gives floats.

        Raises
        ------
        gr.Error
            If there is nothing to ask, or nothing to ask about.
        """
        if image is None:
            raise gr.Error("Choose or upload an image first.", print_exception=False)
        if not question.strip():
            raise gr.Error("Ask a question about the image.", print_exception=False)
        if self.processor.image_token in question:
            raise gr.Error(f"{self.processor.image_token} stands for the image; leave it out.", print_exception=False)
        image = image.convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": question.strip()}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=image, text=prompt, return_tensors="pt").to(self.model.device, self.model.dtype)
        budget = min(int(budget), self.patches - 1)
        with self._turn, torch.inference_mode():
            with self.model.pruning(enabled=False):
                unpruned = self._answer(inputs)
            with self.model.pruning(enabled=True, visual_tokens=budget, tower_tokens=None):
                pruned = self._answer(inputs)
                trace = self.model.explain(self.processor, **inputs)
        full, few = (
            _card("All visual tokens", unpruned, self.patches, self.patches, trace.kv_bytes_unpruned),
            _card("Pruned", pruned, trace.final_tokens[0], trace.layer_averaged_tokens, trace.kv_bytes, "pruned"),
        )
        stages = "".join(map(_figure, trace.pictures(image, stages="all")))
        return (
            f'<div class="answers">{full}{few}</div>',
            _words(trace.images[0].instruction),
            f'<div class="stages">{stages}</div>',
        )

    def _answer(self, inputs: Any) -> tuple[str, float]:
        start = time.perf_counter()
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        text = self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip(), time.perf_counter() - start


def _card(title: str, answer: tuple[str, float], tokens: int, averaged: float, kv_bytes: int, kind: str = "") -> str:
    text, seconds = answer
    facts = {
        "visual tokens, final": f"{tokens}",
        "layer-averaged": f"{averaged:.0f}",
        "KV cache": f"{kv_bytes / 1e6:.2f} MB",
        "seconds": f"{seconds:.2f}",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f'<div class="answer {kind}"><h3>{title}</h3><p>{html.escape(text) or "(nothing)"}</p><dl>{rows}</dl></div>'


def _figure(picture: Any) -> str:
    """Draw what one group of layers left of the image, small enough for a phone's connection."""
    file = io.BytesIO()
    picture.image.resize((384, 384 * picture.image.height // picture.image.width)).save(file, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    label = html.escape(picture.label)
    return (
        f'<figure><img src="{source}" alt="{picture.tokens} patches, {label}">'
        f"<figcaption><b>{picture.tokens}</b>{label}</figcaption></figure>"
    )


def _words(marked: Any) -> str:
    """The question, its key words on amber by relevance."""
    parts, start = [], 0
    for place in range(1, len(marked.text) + 1):
        if place < len(marked.text) and marked.strengths[place] == marked.strengths[start]:
            continue
        text, strength = marked.text[start:place], marked.strengths[start]
        # A token holds the space before its word, which is no part of what was found.
        gap, text = text[: len(text) - len(text.lstrip())], html.escape(text.lstrip())
        if strength is not None:
            text = f'<mark style="background: rgba(245, 158, 11, {0.25 + 0.6 * strength:.2f})">{text}</mark>'
        parts.append(gap + text)
        start = place
    key = any(strength is not None for strength in marked.strengths)
    said = "Marked words are visible in the image, by CLIP's judgement, and decided what stayed."
    if not key:
        said = "No word of it is visible in the image, by CLIP's judgement, so the image alone decided what stayed."
    return f'<div class="words">{"".join(parts)}</div><div class="note">{said}</div>'


def build(demo: Demo) -> gr.Blocks:
    """The page."""
    first = EXAMPLES[0]
    with gr.Blocks(title="See what a question keeps", analytics_enabled=False) as page:
        gr.Markdown(
            f"# See what a question keeps\nA picture costs this model **{demo.patches} visual tokens**. "
            "Instruction-guided visual token pruning keeps the few that the question needs."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                options, most = demo.model.pruning_config, min(512, demo.patches - 1)
                # Code of older checkpoints has no floor.
                least = max(8, getattr(options, "min_visual_tokens", None) or 0)
                image = gr.Image(str(HERE / first["image"]), type="pil", label="Image", height=320)
                question = gr.Textbox(first["question"], label="Question", lines=1, max_lines=4, elem_id="question")
                budget = gr.Slider(
                    least,
                    most,
                    value=max(least, min(options.visual_tokens, most)),
                    step=8,
                    label="Visual tokens to keep",
                    elem_id="budget",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=280):
                answers = gr.HTML(elem_id="answers")
                words = gr.HTML(elem_id="words")
        gr.Markdown("### What is left behind each group of layers")
        stages = gr.HTML(elem_id="stages")
        examples = [[str(HERE / one["image"]), one["question"]] for one in EXAMPLES]
        gr.Examples(examples, [image, question], label="Examples", examples_per_page=8)
        gr.Markdown(
            "Seconds are of this machine, each answer once; the first question warms up. Counts and cache are exact.",
            elem_classes="note",
        )
        for event in (ask.click, question.submit, budget.release, page.load):
            event(
                demo.ask,
                [image, question, budget],
                [answers, words, stages],
                api_name="ask" if event is ask.click else None,
                concurrency_id="model",
                concurrency_limit=1,
            )
    return page


def main() -> None:
    """Serve the page."""
    source = os.environ.get("MODEL_ID") or str(MINIATURE)
    if source == str(MINIATURE) and not MINIATURE.is_dir():
        raise SystemExit("MODEL_ID: not set; give a checkpoint that `ivtp push` published, in the Space's settings.")
    demo = Demo(source, os.environ.get("MODEL_REVISION") or None)
    theme = gr.themes.Default(primary_hue="amber", neutral_hue="slate")
    build(demo).launch(theme=theme, css=CSS)


if __name__ == "__main__":
    main()
