"""vLLM as engine of evaluations: vLLM itself where it is installed, and elsewhere a stand-in with its interface.

`make vllm-test` runs them on vLLM. The stand-in answers by transformers: it shows what vLLM is asked, not what it says.
"""

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.quality.world import sample_questions
from modeling_ivtp.evaluation.answerer import Answerer, Generation
from modeling_ivtp.evaluation.arm import Arm
from modeling_ivtp.evaluation.prompts import Prompt
from modeling_ivtp.evaluation.vllm_answerer import VLLMAnswerer
from modeling_ivtp.serving.answering import load_model

pytestmark = pytest.mark.slow

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
INSTALLED = find_spec("vllm") is not None
QUESTIONS = 8


@dataclass
class SamplingParams:
    """Those of vLLM's that evaluations use."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: list[str] | None = None


class LLM:
    """vLLM's `LLM`, which answers by transformers one after the other."""

    def __init__(
        self,
        model: str,
        dtype: str,
        enforce_eager: bool,
        mm_processor_kwargs: dict[str, Any] | None = None,
        hf_overrides: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = load_model(model, device="cpu", dtype=dtype)
        self.model.set_pruning(
            decoder_choice="ahead", **mm_processor_kwargs or {}, **(hf_overrides or {}).get("pruning", {})
        )

    def generate(self, prompts: list[dict[str, Any]], sampling: SamplingParams, use_tqdm: bool) -> list[Any]:
        return [self._output(prompt, sampling) for prompt in prompts]

    @torch.inference_mode()
    def _output(self, prompt: dict[str, Any], sampling: SamplingParams) -> Any:
        assert sampling.temperature == 0
        images = prompt.get("multi_modal_data", {}).get("image")
        inputs = self.processor(images=images, text=prompt["prompt"], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        new = self.model.generate(**inputs, max_new_tokens=sampling.max_tokens, do_sample=False)[0, length:].tolist()
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        for stop in sampling.stop or ():
            text = text.partition(stop)[0]
        # The number of an image's placeholders is that of the tokens that stay.
        plan = self.model.model.plan()
        kept = self.model.config.num_patches if plan is None else plan.final_tokens
        ids = [token for token in inputs["input_ids"][0].tolist() if token != self.model.config.image_token_index]
        ids += [self.model.config.image_token_index] * kept * len(images or ())
        return SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(text=text, token_ids=new)])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    if INSTALLED:
        return
    module = ModuleType("vllm")
    vars(module).update(__version__="0.32.0", LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture(scope="module")
def right() -> Any:
    model, processor = load_model(MINIATURE, device="cpu", dtype="float32")
    model.set_pruning(decoder_choice="ahead")
    return model, processor


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    sampled = islice(sample_questions("validation", QUESTIONS), QUESTIONS)
    prompts = [Prompt(question.prompt, (Image.fromarray(scene.pixels),)) for scene, question in sampled]
    return [*prompts, Prompt("USER: Say yes. ASSISTANT:", ())]


GREEDY = Generation.of({"max_new_tokens": 4, "temperature": 0})


@pytest.mark.parametrize("arm", [Arm("unpruned"), Arm("ivtp", 16), Arm()], ids=lambda arm: arm.name)
def test_answers_and_token_counts_are_those_of_the_other_engine(
    engine: None, right: Any, asked: list[Prompt], arm: Arm
) -> None:
    vllm = VLLMAnswerer(str(MINIATURE), arm, "float32")
    replies, expected = vllm.answer(asked, GREEDY), Answerer(*right, arm).answer(asked, GREEDY)
    assert replies == expected
    assert replies[0].prompt_tokens > 576
    if arm.method == "unpruned":
        (first,) = vllm.answer(asked[:1], Generation.of({"max_new_tokens": 4, "until": [expected[0].text[1]]}))
        assert first.text == expected[0].text[0]


def test_a_budget_decides_what_a_cache_knows_the_engine_by(engine: None) -> None:
    assert VLLMAnswerer(str(MINIATURE), Arm("ivtp", 16), "float32").decides["pruning"]["visual_tokens"] == 16
    assert not VLLMAnswerer(str(MINIATURE), Arm("unpruned"), "float32").decides["pruning"]["enabled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "num_beams above 1"),
        ({"no_repeat_ngram_size": 3}, "with engine='vllm' neither is allowed"),
    ],
)
def test_generation_that_vllm_lacks_is_refused(engine: None, arguments: dict[str, Any], message: str) -> None:
    from modeling_ivtp.evaluation.vllm_answerer import _sampling

    with pytest.raises(ValueError, match=message):
        _sampling(Generation.of(arguments))
    sampled = _sampling(Generation.of({"temperature": 0.5, "top_p": 0.9, "min_new_tokens": 2, "max_new_tokens": 8}))
    assert (sampled.temperature, sampled.top_p, sampled.min_tokens, sampled.max_tokens) == (0.5, 0.9, 2, 8)


def test_vllm_sends_no_reports(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_ivtp.evaluation.vllm_answerer import _vllm

    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    _vllm()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_other_methods_models_and_versions_are_refused(
    engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="method='fastv' with engine='vllm'; allowed: ivtp, unpruned"):
        VLLMAnswerer(str(MINIATURE), Arm("fastv", 64))
    stock = tmp_path / "stock"
    stock.mkdir()
    for file in MINIATURE.iterdir():
        if file.is_file():
            (stock / file.name).symlink_to(file)
    config = (stock / "config.json").read_text()
    (stock / "config.json").unlink()
    (stock / "config.json").write_text(config.replace("IVTPLlavaForConditional", "LlavaForConditional"))
    with pytest.raises(ValueError, match="is no IVTP-LLaVA, and vLLM prunes no other"):
        VLLMAnswerer(str(stock), Arm("ivtp", 64))
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    with pytest.raises(ImportError, match=r"vLLM 0\.31\.0 is installed"):
        VLLMAnswerer(str(MINIATURE), Arm("ivtp", 64))


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_the_way_to_it_is_named() -> None:
    with pytest.raises(ImportError, match=r"pip install 'ivtp-llava\[vllm\]'"):
        VLLMAnswerer(str(MINIATURE), Arm("ivtp", 64))
