"""Hold the project's claims against a real checkpoint: `ivtp check`.

Each claim is measured by a function of its own, on pictures and questions that ship and on those that a person gives.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..batch.settings import versions
from ..files.images import load_image
from ..files.shipped import shipped
from ..flops import count
from ..methods.names import UNPRUNED
from ..model.compat import cache_of
from ..serving.answering import explain, kv_bytes, missing_guidance
from ..speed.models import stock_twin
from ..speed.timing import Arm as TimedArm
from ..speed.timing import interleaved, ratio
from .answerer import Answerer, Generation
from .arm import Arm
from .intervals import LEVEL, sign_test
from .prompts import Prompt, prompt_of

SUPPORTED, CONTRADICTED, OPEN = "supported", "not supported", "open"
SHORT = "\nAnswer the question using a single word or phrase."
QUESTIONS = {
    "astronaut.jpg": (
        "What is the woman wearing?",
        "What colour is the suit?",
        "Is the woman smiling?",
        "What flag is behind her?",
        "What model stands on the right?",
        "How many people are in the picture?",
        "What is she holding?",
        "What colour is her hair?",
        "Is there a dog in the picture?",
        "What is the job of the person?",
    ),
    "coffee.jpg": (
        "What is in the cup?",
        "What colour is the cup?",
        "What lies beside the cup?",
        "What is the table made of?",
        "How many cups are there?",
        "Is there a spoon in the picture?",
        "Is the drink hot or cold?",
        "What colour is the table?",
        "Is there a cat in the picture?",
        "What is under the cup?",
    ),
}
"""Questions to the pictures that ship."""
_SAME_LOGITS = 1e-3
_EXTENDED = "ivtp-extended"
_COMPARED = ("ivtp", _EXTENDED, "random")


@dataclass(frozen=True)
class Asked:
    """A question to a picture.

    Attributes
    ----------
    picture : PIL.Image.Image
    question : str
    private : bool
        Whether a person gave it, so that no report may show it.
    """

    picture: Image.Image
    question: str
    private: bool = False


@dataclass(frozen=True)
class Extent:
    """Amount of work in a check.

    Attributes
    ----------
    questions : int
        Of those that ship, evenly over the pictures.
    repeats : int
        Pairs of timed runs.
    budgets : tuple of int
        Visual tokens at which answers are compared.
    new_tokens : int
        Length of the timed answers.
    """

    questions: int = 20
    repeats: int = 15
    budgets: tuple[int, ...] = (192, 64, 16)
    new_tokens: int = 64


QUICK = Extent(questions=6, repeats=5, new_tokens=16)


@dataclass(frozen=True)
class Finding:
    """Finding about a claim.

    Attributes
    ----------
    claim : str
    verdict : str
        `SUPPORTED`, `CONTRADICTED`, or `OPEN` where the measurement does not decide.
    measured : str
        In words and numbers, without anything private.
    """

    claim: str
    verdict: str
    measured: str


@dataclass
class Witness:
    """A checkpoint with the questions that it is asked.

    Attributes
    ----------
    model : IVTPLlavaForConditionalGeneration
        On one device.
    processor : IVTPLlavaProcessor
    asked : sequence of Asked
    extent : Extent
    methods : sequence of str
        More methods whose answers are compared, each as in `Arm`; no claim is about them.
    agreement : dict
        Filled by `agreement`: for each arm, where its answers are the unpruned ones, bool (n,).
    key_words : list of tuple of str
        Filled by `question_guides`: the key words of each of `asked`, up to the first that could not be measured.
    """

    model: Any
    processor: Any
    asked: Sequence[Asked]
    extent: Extent = field(default_factory=Extent)
    methods: Sequence[str] = ()
    agreement: dict[str, np.ndarray] = field(default_factory=dict)
    key_words: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a model, methods or questions that cannot be measured.

        Raises
        ------
        ValueError
            For quantised weights, methods that do not fit the model, two of one name, or a question that is no prompt
            for its picture.
        """
        if getattr(self.model.config, "quantization_config", None) is not None:
            raise ValueError(
                "the checkpoint is quantised, and stock LLaVA cannot share its weights; give the one it was made of"
            )
        for method in (_EXTENDED, *self.methods):
            for tokens in self.budgets:
                with Arm(method, tokens).applied(self.model):
                    self.model.model.plan()
        if len({*_COMPARED, *self.labels}) < len(_COMPARED) + len(self.methods):
            raise ValueError(f"methods {', '.join(self.labels)}; allowed: each once, beside {', '.join(_COMPARED)}")
        _ = self.prompts

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompt of each question, which asks for a short answer."""
        parts = [
            [{"type": "image", "url": one.picture}, {"type": "text", "text": one.question + SHORT}]
            for one in self.asked
        ]
        return [prompt_of([{"role": "user", "content": content}], self.processor) for content in parts]

    @cached_property
    def stock(self) -> Any:
        """Stock LLaVA on the same weights."""
        return stock_twin(self.model)

    @property
    def budgets(self) -> list[int]:
        """The budgets below the number of patches."""
        return [tokens for tokens in self.extent.budgets if tokens < self.model.config.num_patches]

    @cached_property
    def labels(self) -> list[str]:
        """The names of `methods`; a trained pruner has that of its kind, as its folder may be private."""
        return [Arm(method).pruner.name for method in self.methods]

    @property
    def budget(self) -> int:
        """The budget of the checks that need one: 64, or a quarter of the patches of a small model."""
        return min(64, self.model.config.num_patches // 4)

    @property
    def arm(self) -> Arm:
        """IVTP at this budget."""
        return Arm("ivtp", self.budget)

    @cached_property
    def unguided(self) -> str:
        """What the checkpoint lacks for questions to guide IVTP; empty if nothing."""
        with self.arm.applied(self.model):
            return missing_guidance(self.model, self.processor)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return the model's inputs for prompts side by side."""
        made = self.processor(
            images=[image for prompt in prompts for image in prompt.images],
            text=[prompt.text for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(made.to(self.model.device, self.model.dtype))


def questions(extent: Extent, own: Sequence[Asked] = ()) -> list[Asked]:
    """Return the questions that ship, as many as the extent says, and after them a person's own."""
    pictures = {name: load_image(shipped(f"examples/images/{name}")) for name in QUESTIONS}
    turns = [Asked(pictures[name], each[turn]) for turn in range(10) for name, each in QUESTIONS.items()]
    return [*turns[: extent.questions], *own]


def check(witness: Witness, advance: Callable[[str], None] = lambda claim: None) -> Iterator[Finding]:
    """Measure every claim, one after the other.

    Parameters
    ----------
    witness : Witness
    advance : callable
        Called with what is measured next.

    Yields
    ------
    Finding
        A claim that cannot be measured is open, with the reason.
    """
    for measure in (equal_to_stock, batch_like_rows, cost_as_counted, question_guides, speed, agreement):
        what = str(measure.__doc__).split(".")[0]
        advance(what)
        try:
            yield from measure(witness)
        except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
            advance(f"{what}: {error}")  # for the person alone; an error may name what no report should
            yield Finding(f"{what}.", OPEN, f"could not be measured: {type(error).__name__}")


@torch.inference_mode()
def equal_to_stock(witness: Witness) -> Iterator[Finding]:
    """Compare logits without pruning with stock LLaVA's."""
    farthest = 0.0
    for prompt in witness.prompts[:4]:
        inputs = witness.inputs([prompt])
        with witness.model.pruning(enabled=False):
            ours = witness.model(**inputs).logits
        farthest = max(farthest, float((ours - witness.stock(**_of_stock(inputs)).logits).abs().max()))
    verdict = SUPPORTED if farthest == 0 else CONTRADICTED
    yield Finding(
        "Without pruning the model is stock LLaVA, to the last bit.", verdict, f"largest difference {farthest:g}"
    )


def _of_stock(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("clip_")}


@torch.inference_mode()
def batch_like_rows(witness: Witness) -> Iterator[Finding]:
    """Compare the logits of a batch with those of its rows."""
    prompts = witness.prompts[:4]
    with witness.arm.applied(witness.model):
        together = witness.model(**witness.inputs(prompts), logits_to_keep=1).logits[:, -1].float()
        alone = [
            witness.model(**witness.inputs([prompt]), logits_to_keep=1).logits[0, -1].float() for prompt in prompts
        ]
    rows = torch.stack(alone)
    farthest, tokens = float((together - rows).abs().max()), int((together.argmax(-1) == rows.argmax(-1)).sum())
    exact = witness.model.dtype != torch.float32 or farthest <= _SAME_LOGITS
    yield Finding(
        "A batch with padding answers as its rows do.",
        SUPPORTED if tokens == len(prompts) and exact else CONTRADICTED,
        f"{tokens} of {len(prompts)} next tokens are the same; largest difference of logits {farthest:.2g}",
    )


@torch.inference_mode()
def cost_as_counted(witness: Witness) -> Iterator[Finding]:
    """Compare the cache's bytes and the FLOPs of a prompt with what `ivtp flops` counts."""
    model, inputs = witness.model, witness.inputs(witness.prompts[:1])
    patches = model.config.num_patches
    text = inputs["input_ids"].shape[1] - patches
    clip = inputs.get("clip_input_ids")
    model.model.instruction_cache.clear()
    with witness.arm.applied(model):
        counted = count(
            model.config,
            text_tokens=text,
            instruction_tokens=None if clip is None else _body(model) * int(clip.any(-1).sum()),
            value_bytes=model.dtype.itemsize,
        )
        # torch's counter knows attention as plain products on every device, and its CPU kernel not at all.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as executed:
            output = model(**inputs, use_cache=True, logits_to_keep=1)
    stored, expected = kv_bytes(cache_of(output)), counted.kv_cache_bytes
    yield Finding(
        "The KV cache has as many bytes as `ivtp flops` says.",
        SUPPORTED if stored == expected else CONTRADICTED,
        f"{stored:,} stored, {expected:,} counted, at {witness.budget} visual tokens and {text} of text",
    )
    vocabulary, width = model.get_output_embeddings().weight.shape
    measured = executed.get_total_flops() - 2 * vocabulary * width
    most = 1e12 * (counted.total_tflops - counted.parts["head"])
    # Kernels of our own, which score and choose on a GPU, are not seen by torch's counter, and CLIP reads the words
    # alone, where whole windows are counted.
    least = most - 1e12 * sum(counted.parts[part] for part in ("scoring", "selection", "text_tower"))
    yield Finding(
        "A prompt costs as many FLOPs as `ivtp flops` says.",
        SUPPORTED if 0.98 * least <= measured <= 1.02 * most else CONTRADICTED,
        f"{measured / 1e12:.4g} TFLOPs run, {most / 1e12:.4g} counted, without the head",
    )


def _body(model: Any) -> int:
    return int(model.config.clip_text_config.max_position_embeddings) - 2


def question_guides(witness: Witness) -> Iterator[Finding]:
    """Look at the key words of the questions."""
    claim = "Some words of a question guide the pruning, and not all."
    if witness.unguided:
        yield Finding(claim, OPEN, f"the checkpoint has no {witness.unguided}")
        return
    guided = 0
    witness.key_words.clear()
    with witness.arm.applied(witness.model):
        for prompt in witness.prompts:
            trace = explain(witness.model, witness.processor, witness.inputs([prompt]))
            image = trace.images[0]
            witness.key_words.append(image.key_words)
            keys = sum(token.is_key for token in image.tokens)
            guided += image.reference == "pseudo_cls" and 0 < keys < len(image.tokens)
    number = len(witness.asked)
    yield Finding(
        claim,
        SUPPORTED if guided == number else CONTRADICTED,
        f"true of {guided} of {number} questions",
    )


def speed(witness: Witness) -> Iterator[Finding]:
    """Time prefill and decoding in pairs with stock LLaVA."""
    model, inputs = witness.model, witness.inputs(witness.prompts[:1])
    arms = [TimedArm("stock", witness.stock), TimedArm("ivtp", model, partial(witness.arm.applied, model))]
    runs = interleaved(arms, inputs, new_tokens=witness.extent.new_tokens, repeats=witness.extent.repeats)
    claims = {
        "prefill": (1.0, "The first token comes sooner than with stock LLaVA."),
        "decode": (0.95, "Each further token comes as soon as with stock LLaVA, or sooner."),
    }
    for part, (least, claim) in claims.items():
        middle, low, high = ratio(*([run[part] for run in runs[arm.name]] for arm in arms))
        yield Finding(
            claim,
            SUPPORTED if low > least else CONTRADICTED if high < least else OPEN,
            f"{middle:.2f} times as fast at {witness.budget} visual tokens ({low:.2f} to {high:.2f}), "
            f"{witness.extent.repeats} pairs",
        )


def agreement(witness: Witness) -> Iterator[Finding]:
    """Compare answers with those of the unpruned model."""
    unpruned = _answers(witness, Arm(UNPRUNED))
    for tokens in witness.budgets:
        for method in (*_COMPARED, *witness.methods):
            same = [
                said == wanted for said, wanted in zip(_answers(witness, Arm(method, tokens)), unpruned, strict=True)
            ]
            witness.agreement[f"{method}@{tokens}"] = np.array(same)
        for method, other, claim in (
            ("ivtp", "random", f"At {tokens} visual tokens IVTP keeps more answers than random patches."),
            (_EXTENDED, "ivtp", f"At {tokens} visual tokens extended IVTP keeps more answers than the published one."),
        ):
            better, worse = (witness.agreement[f"{name}@{tokens}"] for name in (method, other))
            chance = sign_test(better, worse)
            # The claims are about IVTP that a question guides.
            decided = not witness.unguided and chance < 1 - LEVEL
            yield Finding(
                claim,
                (SUPPORTED if better.sum() > worse.sum() else CONTRADICTED) if decided else OPEN,
                f"{better.sum()} against {worse.sum()} of {len(better)} answers as without pruning "
                f"(exact sign test: p = {chance:.2g})",
            )


def _answers(witness: Witness, arm: Arm) -> list[str]:
    answerer, prompts = Answerer(witness.model, witness.processor, arm), witness.prompts
    generation = Generation.of({"max_new_tokens": 16})
    return [
        reply.text
        for first in range(0, len(prompts), 8)
        for reply in answerer.answer(prompts[first : first + 8], generation)
    ]


def machine(model: Any) -> str:
    """Name the processor that the model runs on, and the system; never the machine."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return f"{name}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}"


def report(witness: Witness, findings: Sequence[Finding], *, name: str = "", quick: bool = False) -> str:
    """Return the report, in Markdown. It holds no path, no name of a machine, and nothing that a person asked.

    Parameters
    ----------
    witness : Witness
    findings : sequence of Finding
    name : str
        The checkpoint's name, if it may be shown.
    quick : bool
        Whether less was measured than usual.
    """
    config, shown = witness.model.config, [asked for asked in witness.asked if not asked.private]
    text, vision = config.text_config, config.vision_config
    own = len(witness.asked) - len(shown)
    lines = [
        f"## ivtp check{' --quick' if quick else ''}: {name or 'a checkpoint without a name'}",
        "",
        f"- Decoder {text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}; tower "
        f"{vision.num_hidden_layers} layers of {vision.hidden_size}, {config.num_patches} patches; "
        f"{str(witness.model.dtype).removeprefix('torch.')}",
        f"- {machine(witness.model)}",
        f"- {', '.join(f'{package} {version}' for package, version in versions().items())}",
        f"- {len(shown)} questions that ship, {own} of the person's own, which are not shown",
        *([f"- no {witness.unguided}: the image alone guides IVTP, not the question"] if witness.unguided else []),
        "",
        "| claim | verdict | measured |",
        "|---|---|---|",
        *(f"| {finding.claim} | **{finding.verdict}** | {finding.measured} |" for finding in findings),
    ]
    if witness.agreement:
        lines += [
            "",
            "Answers as without pruning, in %:",
            "",
            "| " + " | ".join(["visual tokens", "IVTP", "extended", "random", *witness.labels]) + " |",
            "|" + "---:|" * (1 + len(_COMPARED) + len(witness.labels)),
        ]
        for tokens in witness.budgets:
            # none where an arm could not be measured, such as for want of memory
            same = [witness.agreement.get(f"{method}@{tokens}") for method in (*_COMPARED, *witness.methods)]
            shares = ("–" if each is None else f"{100 * each.mean():.0f}" for each in same)
            lines.append(f"| {tokens} | " + " | ".join(shares) + " |")
    if witness.key_words:
        lines += ["", "Key words:", ""]
        lines += [
            f"- {asked.question} {', '.join(words) or '(none)'}"
            for asked, words in zip(witness.asked, witness.key_words, strict=False)
            if not asked.private
        ]
    return "\n".join(lines) + "\n"
