"""A folder that 0.1.0 saved loads and answers as it did then, with the package and without, and after it is saved anew.

`tests/fixtures/saved-by-0.1.0.zip` holds a tiny model with its code of then, a prompt, and the tokens that 0.1.0
answered with.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPLlavaModel
from tests.support import stranger

FIXTURE = Path(__file__).parents[1] / "fixtures" / "saved-by-0.1.0.zip"
NEW_CODE = {path.name for path in (Path(__file__).parents[2] / "modeling_ivtp" / "model").glob("[!_]*.py")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    with zipfile.ZipFile(FIXTURE) as archive:
        archive.extractall(root)
    return root / "saved-by-0.1.0"


@pytest.fixture(scope="module")
def saved_again(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, saved by today's code."""
    folder = tmp_path_factory.mktemp("again")
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(saved: Path) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """The prompt, and the answer of then."""
    tensors = load_file(saved / "prompt_and_answer.safetensors")
    answer = tensors.pop("answer").tolist()
    return tensors, answer


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
@pytest.mark.parametrize("trust", [False, True])
def test_it_answers_as_it_did_with_the_package(saved: Path, asked: Any, auto: Any, trust: bool) -> None:
    """The package's classes are registered, so they load it in place of its own code, whatever the flag says."""
    inputs, answer = asked
    model = auto.from_pretrained(saved, trust_remote_code=trust).eval()
    assert type(model) is IVTPLlavaForConditionalGeneration
    tokens = model.generate(**inputs, max_new_tokens=len(answer[0]), do_sample=False)
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == answer


def test_its_configuration_and_base_model_load_with_the_package(saved: Path, asked: Any) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is IVTPLlavaConfig
    stated = json.loads((saved / "config.json").read_text())["pruning"]
    # These mean what 0.1.0 did.
    newer = {"coverage": None, "min_visual_tokens": None, "importance": "own", "choice": "top", "sharpness": None}
    newer |= {"decoder_choice": "within"}
    assert config.pruning.to_dict() == stated | newer
    generating, info = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert type(generating) is IVTPLlavaForConditionalGeneration
    assert not info["missing_keys"]
    base = IVTPLlavaModel.from_pretrained(saved)
    inputs, _ = asked
    whole = AutoModelForImageTextToText.from_pretrained(saved).eval()
    with torch.no_grad():
        assert torch.equal(base.eval()(**inputs).last_hidden_state, whole.model(**inputs).last_hidden_state)


STRANGER = """
import json
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
folder, questions = sys.argv[1:]
inputs = load_file(questions)
answer = inputs.pop("answer")
trust = dict(trust_remote_code=True)
assert AutoConfig.from_pretrained(folder, **trust).model_type == "ivtp_llava"
loaded = AutoModel.from_pretrained(folder, **trust).eval()
# A folder of 0.1.0 runs its own code, whose AutoModel is the bare model.
hidden = getattr(loaded, "model", loaded)(**inputs).last_hidden_state
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, **trust).eval()
    assert type(model).__module__.startswith("transformers_modules")
    assert model.model(**inputs).last_hidden_state.equal(hidden)
    tokens = model.generate(**inputs, max_new_tokens=answer.shape[1], do_sample=False)
    print(json.dumps(tokens[:, inputs["input_ids"].shape[1]:].tolist()))
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("folder", ["saved", "saved_again"])
def test_it_answers_as_it_did_without_the_package(
    request: pytest.FixtureRequest, saved: Path, asked: Any, tmp_path: Path, folder: str
) -> None:
    where: Path = request.getfixturevalue(folder)
    printed = stranger.run(STRANGER, where, saved / "prompt_and_answer.safetensors", home=tmp_path)
    assert [json.loads(line) for line in printed.splitlines()] == [asked[1]] * 2


@pytest.mark.slow
def test_what_is_saved_anew_carries_the_code_of_today(saved: Path, saved_again: Path) -> None:
    assert not {path.name for path in saved.glob("*.py")} <= NEW_CODE
    # The processor's files come with a processor.
    assert {path.name for path in saved_again.glob("*.py")} <= NEW_CODE
    assert (saved_again / "language_ivtp.py").read_text() != (saved / "language_ivtp.py").read_text()
