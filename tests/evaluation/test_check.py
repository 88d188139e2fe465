"""`ivtp check` on the miniature: every claim is measured, a broken model is found, and the report is not private."""

import getpass
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ivtp_cli
from modeling_ivtp import trained
from modeling_ivtp.evaluation import check
from modeling_ivtp.evaluation.check import CONTRADICTED, OPEN, SUPPORTED, Asked, Extent, Witness
from modeling_ivtp.serving.answering import load_model
from tests.support.tiny import tiny_model
from tests.support.trained import ready

pytestmark = pytest.mark.slow

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
SMALL = Extent(questions=4, repeats=1, budgets=(16,), new_tokens=2)


@pytest.fixture
def witness() -> Witness:
    model, processor = load_model(MINIATURE, device="cpu", dtype="float32")
    asked = check.questions(SMALL)
    return Witness(model, processor, [*asked, Asked(asked[0].picture, "Is a secret shown?", private=True)], SMALL)


def verdicts(witness: Witness, measure: Any) -> list[str]:
    return [finding.verdict for finding in measure(witness)]


def test_what_holds_on_every_machine_is_supported(witness: Witness) -> None:
    assert verdicts(witness, check.equal_to_stock) == [SUPPORTED]
    assert verdicts(witness, check.batch_like_rows) == [SUPPORTED]
    assert verdicts(witness, check.cost_as_counted) == [SUPPORTED, SUPPORTED]


def test_a_model_that_is_not_as_claimed_is_found(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    head = witness.stock.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight * 1.001, requires_grad=False)
    assert verdicts(witness, check.equal_to_stock) == [CONTRADICTED]
    real = check.count
    monkeypatch.setattr(check, "count", lambda config, **options: real(config, **options | {"text_tokens": 200}))
    assert verdicts(witness, check.cost_as_counted) == [CONTRADICTED, CONTRADICTED]
    mixed = witness.inputs

    def unmasked(prompts: Any) -> dict[str, Any]:
        inputs = mixed(prompts)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}

    monkeypatch.setattr(witness, "inputs", unmasked)
    assert verdicts(witness, check.batch_like_rows) == [CONTRADICTED]


def test_a_checkpoint_that_no_question_guides_decides_nothing_about_guided_pruning(
    witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An official LLaVA has no text tower of CLIP."""
    del witness.model.model.clip_text_model
    said = {"unpruned": "abcdef", "ivtp": "xxxxxx", "ivtp-extended": "abcdef", "random": "abcdef"}
    monkeypatch.setattr(check, "_answers", lambda _, arm: list(said[arm.method]))
    findings = [*check.question_guides(witness), *check.agreement(witness)]
    assert [finding.verdict for finding in findings] == [OPEN, OPEN, OPEN]
    assert findings[0].measured == "the checkpoint has no text tower of CLIP"
    report = check.report(witness, findings)
    assert "- no text tower of CLIP: the image alone guides IVTP, not the question" in report
    assert "Key words" not in report


def test_answers_are_compared_with_unpruned_ones(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"unpruned": "abcdef", "ivtp": "abcdef", "ivtp-extended": "abcdef", "random": "xxxxxx"}
    monkeypatch.setattr(check, "_answers", lambda _, arm: list(said[arm.method]))
    assert verdicts(witness, check.agreement) == [SUPPORTED, OPEN]
    said["ivtp"] = "xxxxxx"
    assert verdicts(witness, check.agreement) == [OPEN, SUPPORTED]
    said["random"] = said["unpruned"]
    assert verdicts(witness, check.agreement) == [CONTRADICTED, SUPPORTED]
    # Five to none happens to one of sixteen equal pairs, which is no evidence.
    said = {name: answers[:5] for name, answers in said.items()}
    assert verdicts(witness, check.agreement) == [OPEN, OPEN]


def test_more_methods_are_compared_by_the_names_of_their_kinds(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(trained.LVPruning(ratio=0.6), witness.model).save(tmp_path / "secret")
    more = Witness(witness.model, witness.processor, witness.asked, SMALL, [str(tmp_path / "secret"), "fastv"])
    said = {"unpruned": "abcde", "fastv": "abcdx", str(tmp_path / "secret"): "abxxx"}
    monkeypatch.setattr(check, "_answers", lambda _, arm: list(said.get(arm.method, "xxxxx")))
    findings = list(check.agreement(more))
    report = check.report(more, findings)
    assert len(findings) == 2
    assert "| visual tokens | IVTP | extended | random | lvpruning | fastv |\n|---:|---:|---:|---:|---:|---:|" in report
    assert "| 16 | 0 | 0 | 0 | 40 | 80 |" in report
    assert "secret" not in report
    with pytest.raises(ValueError, match="methods fastv, fastv; allowed: each once, beside ivtp"):
        Witness(witness.model, witness.processor, witness.asked, SMALL, ["fastv", "fastv"])


def test_a_pruner_of_another_base_is_refused_before_anything_is_measured(witness: Witness, tmp_path: Path) -> None:
    ready(trained.LVPruning(ratio=0.6), tiny_model()).save(tmp_path / "pruner")
    with pytest.raises(ValueError, match="lvpruning: this model has hidden_size="):
        Witness(witness.model, witness.processor, witness.asked, SMALL, [str(tmp_path / "pruner")])


def test_what_cannot_be_measured_is_open_and_the_others_go_on(
    witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("batch_like_rows", "cost_as_counted", "question_guides", "speed", "agreement"):
        monkeypatch.setattr(check, name, lambda witness: iter(()))

    def fails(witness: Witness) -> Any:
        """Compare nothing."""
        raise ValueError("the weights of a private project are odd")

    monkeypatch.setattr(check, "equal_to_stock", fails)
    told: list[str] = []
    (finding,) = check.check(witness, told.append)
    assert (finding.verdict, finding.measured) == (OPEN, "could not be measured: ValueError")
    assert any("private project" in line for line in told)


def test_one_question_to_several_pictures_has_the_key_words_of_each(
    witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person's own question may be one that ships; the report shows the words found in the picture that ships."""
    shipped = witness.asked[0]
    twice = Witness(witness.model, witness.processor, [shipped, Asked(shipped.picture, shipped.question, True)], SMALL)
    words = iter(["public", "private"])

    def explained(*_: Any) -> Any:
        image = SimpleNamespace(key_words=(next(words),), tokens=(), reference="pseudo_cls")
        return SimpleNamespace(images=[image])

    monkeypatch.setattr(check, "explain", explained)
    findings = list(check.question_guides(twice))
    assert twice.key_words == [("public",), ("private",)]
    report = check.report(twice, findings)
    assert f"- {shipped.question} public" in report
    assert "private" not in report


def test_a_measurement_that_ends_halfway_leaves_the_report_what_there_is(
    witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("equal_to_stock", "batch_like_rows", "cost_as_counted", "speed"):
        monkeypatch.setattr(check, name, lambda witness: iter(()))

    def answers(_: Witness, arm: Any) -> list[str]:
        if arm.method == "random":
            raise torch.OutOfMemoryError("no memory left")
        return list("abcde")

    said = iter([("cup",)])

    def explained(*_: Any) -> Any:
        if (words := next(said, None)) is None:
            raise torch.OutOfMemoryError("no memory left")
        return SimpleNamespace(images=[SimpleNamespace(key_words=words, tokens=(), reference="visual_cls")])

    monkeypatch.setattr(check, "_answers", answers)
    monkeypatch.setattr(check, "explain", explained)
    findings = list(check.check(witness))
    assert [finding.verdict for finding in findings] == [OPEN, OPEN]
    report = check.report(witness, findings)
    assert "| 16 | 100 | 100 | – |" in report
    assert report.endswith(f"Key words:\n\n- {witness.asked[0].question} cup\n")


@pytest.mark.parametrize("question", ["<image> or <image>?", "USER: What is this? ASSISTANT:"])
def test_a_question_that_is_no_prompt_for_its_picture_is_refused(witness: Witness, question: str) -> None:
    asked = [Asked(witness.asked[0].picture, question, private=True)]
    with pytest.raises(ValueError, match=r"the prompt has [02] <image>, but came with 1 image"):
        Witness(witness.model, witness.processor, asked, SMALL)


def test_the_command_writes_a_report_without_anything_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "QUICK", SMALL)
    photo = MINIATURE.parent / "images" / "coffee.jpg"
    out = tmp_path / "report.md"
    own = ("--image", str(photo), "--question", "Where is my zebra?")
    where = ("--out", str(out), "--dtype", "float32", "--device", "cpu")
    status = ivtp_cli.main(["check", str(MINIATURE), "--quick", *own, *where])
    printed = capsys.readouterr().out
    assert status == 0
    assert "key words of 'Where is my zebra?'" in printed
    report = out.read_text()
    for private in ("zebra", str(MINIATURE), "miniature", str(tmp_path), platform.node(), getpass.getuser() + "@"):
        assert private not in report
    assert "4 questions that ship, 1 of the person's own" in report
    assert (
        "| Without pruning the model is stock LLaVA, to the last bit. | **supported** | largest difference 0 |"
        in report
    )
    assert report.count("| **") == 9
    assert "- What is the woman wearing? " in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.jpg"], "1 --image and 0 --question"),
        (["--method", "magic"], "method='magic'; allowed: unpruned, random"),
        (["--method", "unpruned"], "--method unpruned: all methods are compared with the unpruned model"),
        (["--out", "nowhere/report.md"], "there is no folder nowhere to write report.md into"),
        (["--image", "a.jpg", "--question", " "], "a --question is empty"),
    ],
)
def test_wrong_calls_are_refused_before_the_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivtp_cli.main(["check", "no-such-model", *arguments]) == 1
    assert message in capsys.readouterr().err
