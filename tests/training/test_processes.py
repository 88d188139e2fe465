"""Two processes train as one does."""

import json
import os
import socket
import subprocess
import sys

import pytest

from modeling_ivtp.training import train
from tests.support.conversations import run_options, write_data
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes_have_the_losses_of_one(tmp_path):
    processor = make_processor(size=56)
    model_for(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data = write_data(tmp_path)
    alone = train(run_options(tmp_path / "model", data, tmp_path / "alone", method="fastv", tokens=3))
    command = ["train", "-m", tmp_path / "model", "-d", data, "-o", tmp_path / "both", "--device", "cpu", "--json"]
    command += ["--method", "fastv", "--tokens", 3, "--batch-size", 4, "--learning-rate", 3e-3, "--max-length", 256]
    command += ["--max-steps", 4, "--save-steps", 2, "--log-steps", 1, "--log-to", "none", "--no-progress"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "modeling_ivtp.cli", *map(str, command)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert not told[1][0].strip()  # one process speaks
    found = json.loads(told[0][0])
    assert found["plan"]["processes"] == 2
    assert found["plan"]["device_batch_size"] == 2
    assert found["losses"] == pytest.approx(list(alone.losses), abs=2e-4)
    assert (tmp_path / "both" / "model" / "model.safetensors").is_file()
