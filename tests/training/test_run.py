"""Runs on a tiny LLaVA: what moves, resuming, folders, methods and connectors, and what is refused first."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

import ivtp_cli
from modeling_ivtp import IVTPLlavaForConditionalGeneration, methods, trained
from modeling_ivtp.training import load_preset, train
from modeling_ivtp.training import run as running
from modeling_ivtp.training.batches import Collator
from modeling_ivtp.training.data import open_conversations
from modeling_ivtp.training.folder import RunFolder
from modeling_ivtp.training.parts import PrunedBy, linked_to_pictures, training_module
from tests.support.conversations import ROWS, SECOND, TEXT_ROW, run_options, write_data
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for

FIRST = ("connector", "projector")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A folder with a model, its processor and data."""
    root = tmp_path_factory.mktemp("training")
    processor = make_processor(size=56)
    model_for(processor).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    write_data(root)
    return root


def weights(folder):
    return load_file(folder / "model.safetensors")


def moved(sample, folder):
    """The parts whose weights changed."""
    before, after = weights(sample / "model"), weights(folder)
    assert set(before) <= set(after)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = ("projector", "lm_head", "language_model", "vision_tower", "clip", "visual_projection")
    return {next(part for part in parts if part in name) for name in changed}


def test_stage_2_moves_projector_and_language_model_and_lowers_the_loss(sample, tmp_path):
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "run", max_steps=6, evaluation_share=0.25)
    summary = train(options)
    assert summary.losses[-1] < summary.losses[0]
    assert summary.held_out_loss is not None
    assert moved(sample, summary.model) == {"projector", "lm_head", "language_model"}
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in log if "loss" in entry] == list(summary.losses)
    assert {"step", "learning_rate", "grad_norm"} <= set(log[0])
    assert any("eval_loss" in entry for entry in log)
    assert not list(summary.model.parent.glob(".model*"))
    assert not (summary.model / "training_args.bin").exists()
    again = train(options)
    assert again.was_finished


def test_stage_1_moves_connector_and_projector_alone(sample, tmp_path):
    connector = {"name": "c_abstractor", "tokens": 4, "depth": 1}
    options = run_options(sample / "model", sample / "rows.json", tmp_path, FIRST, connector=connector, max_steps=2)
    summary = train(options)
    assert moved(sample, summary.model) == {"projector"}
    assert summary.plan.visual_tokens == 4
    model = IVTPLlavaForConditionalGeneration.from_pretrained(summary.model)
    assert model.config.connector.to_dict() == connector | {"positions": True}
    second = run_options(summary.model, sample / "rows.json", tmp_path / "second", max_steps=1)
    again = train(second)
    assert again.losses[0] < summary.losses[0] + 1
    # It goes on from this connector: its one step is the first of a warm-up, with a rate of 0.
    first, after = weights(summary.model), weights(again.model)
    connected = [name for name in first if "connector" in name]
    assert connected
    assert all(torch.equal(after[name], first[name]) for name in connected)
    assert again.plan.visual_tokens == 4


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "fastv"}, "method='fastv' with "),
        ({"method": "lvpruning", "trains": ("pruner",), "tokens": 3}, "method='lvpruning', tokens=3 with "),
        ({"tokens": 3}, "tokens=3 with "),
        ({"method_options": {"strict": True}}, "options={'strict': True} with "),
    ],
    ids=str,
)
def test_a_method_or_a_budget_beside_a_model_s_own_connector_is_refused(given, named, tmp_path):
    processor = make_processor(size=56)
    connector = {"name": "c_abstractor", "tokens": 4, "depth": 1}
    model_for(processor, connector=connector).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data = write_data(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="leaves no patches to choose among; allowed: method='unpruned'") as error:
            train(run_options(tmp_path / "model", data, tmp_path / "run", **given), dry_run=dry_run)
        assert str(error.value).startswith(named)
    assert not (tmp_path / "run").exists()


class Stop(TrainerCallback):
    """Interrupts a run after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt(options, step, monkeypatch):
    """Train until a person interrupts after a step."""
    build = running._trainer

    def interrupted(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Stop(step))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(running, "_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options)


def test_an_interrupted_run_goes_on_with_the_same_losses(sample, tmp_path, monkeypatch):
    whole = train(run_options(sample / "model", sample / "rows.json", tmp_path / "whole", max_steps=5))
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "parts", max_steps=5)
    interrupt(options, 3, monkeypatch)
    assert not (tmp_path / "parts" / "model").exists()
    half = tmp_path / "parts" / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut short")
    resumed = train(options)
    assert resumed.losses == whole.losses
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name


def test_a_checkpoint_without_the_state_of_its_step_is_no_whole_one(tmp_path):
    states = {2: '{"global_step": 2}', 4: "", 6: '{"global', 8: '{"global_step": 6}', 10: "[]", 12: None}
    for step, state in states.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    folder = RunFolder(tmp_path)
    assert folder.checkpoint(clean=False) == str(tmp_path / "checkpoint-2")
    assert len(list(tmp_path.iterdir())) == 6
    assert folder.checkpoint(clean=True) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_folder_with_another_run_or_anything_else_is_left_alone(sample, tmp_path):
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "run", max_steps=1)
    train(options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = run_options(sample / "model", sample / "rows.json", tmp_path / "run", max_steps=1, seed=3)
    with pytest.raises(ValueError, match=r"another run was begun in .*: seed=0 there, 3 here; choose another folder"):
        train(other)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "full"))


def test_a_run_that_a_full_disk_ended_as_it_began_can_be_begun_again(tmp_path, monkeypatch):
    folder, settings = RunFolder(tmp_path / "run"), {"seed": 0}

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            folder.begin(settings)
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / ".run.json.77").write_text("{")  # of a process that was killed
    assert folder.check(settings) is False
    folder.begin(settings)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


REFUSED = [
    ({"trains": ("connector",)}, "nothing of the model learns: it has no connector"),
    ({"method": "atp-llava", "method_options": {"target": 99}}, r"target=99 tokens on average cannot be reached"),
    ({"method": "sparse-attention", "method_options": {"sparsity": "l2"}}, "sparsity='l2'; allowed: l1, entropy"),
    ({"method": "magic"}, "method='magic'; allowed: unpruned, random"),
    ({"method": "sparsevlm", "tokens": 0}, "tokens=0"),
    ({"batch_size": 4, "device_batch_size": 3}, "device_batch_size=3 of 4 conversations"),
    ({"max_length": 20}, "no answer is left within max_length=20|pictures do not fit"),
    ({"evaluation_share": 1.0}, r"evaluation_share=1\.0; allowed"),
    ({"connector": {"name": "c_abstractor", "tokens": 25}}, r"connector\.tokens=25 are 5 x 5 places"),
    ({"connector": {"name": "resampler", "tokens": 4}, "method": "fastv"}, "leaves no patches to choose among"),
    ({"trains": ("pruner",), "method": "lvpruning", "tokens": 16}, "keep=16 leaves all visual tokens"),
    ({"trains": ("pruner",), "method": "fastv"}, r"trains=\['pruner'\] with method='fastv', which has no modules"),
    ({"method": "lvpruning", "method_options": {"speed": 1}}, "lvpruning has no option speed; allowed: "),
    ({"method": "fastv", "method_options": {"speed": 1}}, "fastv has no option speed; allowed"),
    ({"method": "fastv", "method_options": {"keep": 3}}, "fastv has no option keep here; allowed: --tokens 3"),
    ({"method": "unpruned", "method_options": {"speed": 1}}, "method='unpruned' has no options"),
    ({"method": "ivtp", "method_options": {"speed": 1}}, r"Unknown pruning option\(s\) speed"),
    ({"dtype": "int8"}, "dtype='int8'; allowed: float32, bfloat16"),
    ({"device": "cuda:1"}, r"device='cuda:1'; allowed: cpu, cuda\. CUDA_VISIBLE_DEVICES=1 chooses among GPUs"),
    ({"device": "cuda0"}, "device='cuda0'; allowed: cpu, cuda"),
    ({"log_to": "paper"}, "log_to='paper'; allowed: auto, none, tensorboard, trackio"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_what_is_wrong_is_said_before_anything_is_written(options, message, sample, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_said_before_anything_is_written(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'device="cuda", but PyTorch finds no GPU here; allowed: cpu'):
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_several_gpus_ask_for_as_many_processes(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "PartialState", lambda cpu: SimpleNamespace(num_processes=1, is_main_process=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "run", device=None)
    with pytest.raises(ValueError, match=r"2 GPUs and one process; allowed: .* --num_processes 2 .*CUDA_VISIBLE_DEV"):
        train(options)
    assert not (tmp_path / "run").exists()
    assert train(options, dry_run=True).plan.processes == 1


def test_a_held_out_row_without_an_answer_in_the_length_is_refused_before_anything_is_written(sample, tmp_path):
    _, held_out = open_conversations(str(sample / "rows.json")).split(0.25, 0)
    rows = json.loads(json.dumps(ROWS))
    long = rows[held_out.numbers[0]]
    long["conversations"] = [{"from": "human", "value": "<image>\n" + "a bird " * 200}, {"from": "gpt", "value": "red"}]
    data = write_data(tmp_path / "data", rows)
    options = run_options(sample / "model", data, tmp_path / "run", evaluation_share=0.25)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=rf"\(id {long['id']}\): no answer is left within max_length=256"):
            train(options, dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_said_before_anything_is_written(sample, tmp_path, monkeypatch):
    plan = train(run_options(sample / "model", sample / "rows.json", tmp_path / "run"), dry_run=True).plan
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.disk_bytes - 1))
    with pytest.raises(OSError, match=r"run needs .*, but only .* are free"):
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("full", ["checkpoint-1", ".model.partial"])
def test_a_disk_that_gets_full_is_an_error_of_the_system_and_the_run_goes_on_later(full, sample, tmp_path, monkeypatch):
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "run", max_steps=1)
    save = running.LlavaTrainer.save_model

    def cut_short(trainer, folder, *arguments, **more):
        if folder.endswith(full):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(trainer, folder, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(running.LlavaTrainer, "save_model", cut_short)
        with pytest.raises(OSError, match=r"No space left on device: .*run'") as error:
            train(options)
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "run").glob("*model*"))
    assert train(options).model.is_dir()


@pytest.mark.parametrize("gathers", [True, False])
def test_weights_that_processes_share_are_put_together_or_the_run_says_so(gathers, sample, tmp_path, monkeypatch):
    """FSDP needs GPUs: here `Trainer` believes in it once training has ended, with accelerate's default for saving."""
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "run", max_steps=1)
    plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT", set_state_dict_type=lambda kind: None)
    if gathers:
        plugin.set_state_dict_type = lambda kind: setattr(plugin, "state_dict_type", f"StateDictType.{kind}")
    save = running._save

    def sharded(trainer, *arguments):
        trainer.is_fsdp_enabled = True
        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
            save(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running, "_save", sharded)
        if gathers:
            assert set(weights(train(options).model)) == set(weights(sample / "model"))
            return
        with pytest.raises(OSError, match=r"the weights were not put together, so .*model was not written"):
            train(options)
    assert not list((tmp_path / "run").glob("*model*"))
    assert not train(options).was_finished


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_shared_weights_beside_modules_are_refused_before_anything_is_written(variable, sample, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    options = {"trains": ("pruner",), "method": "lvpruning", "tokens": 4}
    with pytest.raises(ValueError, match=r"method='lvpruning' with .*, which divides the weights"):
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_and_writes_nothing(sample, tmp_path, capsys):
    arguments = ["train", "-m", sample / "model", "-d", sample / "rows.json", "-o", tmp_path / "run", "--batch-size", 4]
    arguments += ["--method", "fastv", "--tokens", 4, "--epochs", 3, "--device", "cpu", "--dry-run", "--json"]
    assert ivtp_cli.main([str(argument) for argument in [*arguments, "--evaluation-share", 0.25]]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["rows"], plan["held_out"], plan["steps"], plan["visual_tokens"]) == (6, 2, 6, 4)
    assert plan["tokens"]["image"] == 6 * 16
    model = IVTPLlavaForConditionalGeneration.from_pretrained(sample / "model")
    assert plan["weights"] == sum(weight.numel() for weight in model.parameters())
    frozen = [model.model.vision_tower, model.model.clip_text_model, model.model.visual_projection]
    assert plan["weights"] - plan["learning"] == sum(p.numel() for part in frozen for p in part.parameters())
    assert plan["optimizer_bytes"] == 8 * plan["learning"]
    assert plan["disk_bytes"] == 2 * (4 * plan["weights"] + plan["optimizer_bytes"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trains", [("pruner",), ("pruner", "projector"), ("pruner", "projector", "language_model")])
def test_the_disk_that_modules_take_is_what_their_folder_takes_in_the_end(trains, sample, tmp_path):
    options = run_options(
        sample / "model", sample / "rows.json", tmp_path / "run", trains, method="lvpruning", tokens=4,
        method_options={"blocks": 1}, max_steps=2,
    )  # fmt: skip
    plan = train(options).plan
    files = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
    assert (tmp_path / "run" / "model").exists() == (trains != ("pruner",))
    taken, names = sum(path.stat().st_size for path in files), len(load_file(sample / "model" / "model.safetensors"))
    assert plan.disk_bytes > taken - 2048 * names  # without the headers of files


@pytest.mark.parametrize("method", ["unpruned", "ivtp", "fastv"])
def test_the_first_loss_is_that_of_the_method(method, sample, tmp_path):
    options = {"max_steps": 1, "method": method, "tokens": 3, "limit": 4}
    summary = train(run_options(sample / "model", sample / "rows.json", tmp_path, **options))
    model = IVTPLlavaForConditionalGeneration.from_pretrained(sample / "model")
    rows = open_conversations(str(sample / "rows.json"))
    batch = Collator(make_processor(size=56), 256)([rows[number] for number in range(4)])
    contexts = {
        "unpruned": lambda: model.pruning(enabled=False),
        "ivtp": lambda: model.pruning(visual_tokens=3, tower_tokens=9),
        "fastv": lambda: methods.FastV(3)(model),
    }
    expected = {}
    for name, context in contexts.items():
        with context(), torch.no_grad():
            expected[name] = model(**batch).loss.item()
    assert summary.losses[0] == pytest.approx(expected.pop(method), abs=1e-5)
    assert all(abs(summary.losses[0] - loss) > 1e-4 for loss in expected.values())
    saved = IVTPLlavaForConditionalGeneration.from_pretrained(summary.model).pruning_config
    assert saved.enabled
    assert saved.visual_tokens == (3 if method == "ivtp" else 4)


def test_a_method_is_on_inside_and_leaves_no_trace(sample):
    model = IVTPLlavaForConditionalGeneration.from_pretrained(sample / "model")
    before = model.pruning_config
    with training_module(model, PrunedBy("fastv", 3), SECOND) as module:
        assert module is model
        assert model.model.plan().final_tokens == 3
        assert model.model.plan().tower == ()
    with training_module(model, PrunedBy("unpruned"), SECOND):
        assert model.model.plan() is None
    assert model.pruning_config == before


def test_a_batch_without_pictures_reaches_the_projector_with_nothing(sample, tmp_path):
    model = IVTPLlavaForConditionalGeneration.from_pretrained(sample / "model").train()
    rows = open_conversations(str(write_data(tmp_path, [*ROWS, TEXT_ROW])))
    batch = Collator(make_processor(size=56), 256)([rows[8]])
    loss = model(**batch).loss
    linked_to_pictures(model, loss).backward()
    projector = model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(projector.grad, torch.zeros_like(projector))
    model.zero_grad()
    model(**batch).loss.backward()
    assert projector.grad is None
    options = run_options(sample / "model", tmp_path / "rows.json", tmp_path / "run", max_steps=3, batch_size=1)
    assert all(loss > 0 for loss in train(options).losses)


def test_modules_of_a_method_learn_beside_a_model_that_stays(sample, tmp_path):
    first = {"trains": ("pruner",), "method": "lvpruning", "max_steps": 2}
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "run", **first, tokens=4)
    summary = train(options)
    assert summary.model == tmp_path / "run" / "pruner"
    assert not (tmp_path / "run" / "model").exists()
    method = trained.load(summary.model)
    count = sum(weight.numel() for weight in method.learned.parameters())
    assert summary.plan.learning == count
    model = IVTPLlavaForConditionalGeneration.from_pretrained(sample / "model")
    new = trained.LVPruning(4).for_model(model).learned.state_dict()
    assert any(not torch.equal(value, new[name]) for name, value in method.learned.state_dict().items())
    with method(model):
        assert model.model.plan().final_tokens == 4
    assert train(options).was_finished
    # A folder goes on with its modules, and the model may learn, too.
    both = {"trains": ("pruner", "language_model"), "method": str(summary.model), "max_steps": 2}
    again = train(run_options(sample / "model", sample / "rows.json", tmp_path / "both", **both))
    assert moved(sample, again.model) == {"language_model", "lm_head"}  # the first step of a warm-up has rate 0
    assert trained.is_adapter(tmp_path / "both" / "pruner")


def test_a_method_s_name_wins_over_a_folder_of_that_name(sample, tmp_path, monkeypatch):
    model = IVTPLlavaForConditionalGeneration.from_pretrained(sample / "model")
    for name in ("lvpruning", "fastv", "unpruned"):
        trained.LVPruning(3, heads=4).for_model(model).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert PrunedBy("lvpruning", 5).make().learned is None
    assert PrunedBy("lvpruning").make() == trained.LVPruning(64)
    assert PrunedBy("./lvpruning").make() == trained.LVPruning(3, heads=4)
    assert PrunedBy("./lvpruning").make().learned is not None
    assert not PrunedBy("fastv").is_trained
    assert PrunedBy("fastv", 5).make() == methods.FastV(5) == trained.make("fastv", 5)
    assert PrunedBy("./fastv").make() == trained.LVPruning(3, heads=4) == trained.make("./fastv")
    assert not PrunedBy("unpruned").is_trained


@pytest.mark.parametrize(
    ("other", "message"),
    [({"seed": 5}, "embeddings are not those of the adapter's base"), ({"width": 64}, "hidden_size=32; allowed: 64")],
)
def test_modules_of_another_model_are_refused_before_anything_is_written(other, message, sample, tmp_path):
    stranger = model_for(make_processor(size=56), **other)
    trained.LVPruning(4).for_model(stranger).save(tmp_path / "pruner")
    options = {"trains": ("pruner",), "method": str(tmp_path / "pruner")}
    with pytest.raises(ValueError, match="lvpruning") as error:
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "run", **options))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_modules_in_their_own_type_and_refuses_those_of_another_shape(sample, tmp_path):
    options = {"trains": ("pruner",), "method": "lvpruning", "tokens": 4, "dtype": "bfloat16"}
    plan = train(run_options(sample / "model", sample / "rows.json", tmp_path / "run", **options), dry_run=True).plan
    assert (plan.gradient_bytes, plan.optimizer_bytes) == (4 * plan.learning, 8 * plan.learning)
    assert plan.weight_bytes == 2 * (plan.weights - plan.learning) + 4 * plan.learning
    trained.LVPruning(4).for_model(model_for(make_processor(size=56), width=64)).save(tmp_path / "wide")
    options = {"trains": ("pruner",), "method": str(tmp_path / "wide")}
    with pytest.raises(ValueError, match="hidden_size=32; allowed: 64"):
        train(run_options(sample / "model", sample / "rows.json", tmp_path / "run", **options), dry_run=True)


def test_options_of_a_method_come_from_the_command_line_and_are_kept(sample, tmp_path, capsys):
    arguments = ["train", "-m", sample / "model", "-d", sample / "rows.json", "-o", tmp_path / "run", "--device", "cpu"]
    arguments += ["--preset", "atp-llava", "--method", "atp-llava", "--method-option", "target=6"]
    arguments += ["--method-option", "layers=[2,3,4]", "--method-option", "rope=1d", "--batch-size", 4]
    arguments = [str(argument) for argument in [*arguments, "--max-steps", 2, "--no-progress", "--log-to", "none"]]
    assert ivtp_cli.main(arguments) == 0
    assert "done: 2 steps" in capsys.readouterr().out
    method = trained.load(tmp_path / "run" / "pruner")
    assert (method.target, method.layers, method.rope) == (6, (2, 3, 4), "1d")
    assert moved(sample, tmp_path / "run" / "model") == {"projector", "language_model", "lm_head"}
    model = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    with method(model):
        assert not model.model.plan().exact
    assert ivtp_cli.main([*arguments, "--method-option", "target"]) == 1
    assert "--method-option='target'; allowed: NAME=VALUE" in capsys.readouterr().err


def test_a_run_of_a_trained_pruner_that_was_interrupted_goes_on_with_the_same_losses(sample, tmp_path, monkeypatch):
    """Modules, model and what the method logs, with both learning rates."""
    preset = load_preset("sparse-attention")
    more = {
        "method": "sparse-attention", "tokens": 4, "method_options": {"layers": (2, 4), "sparsity": "entropy"},
        "pruner_learning_rate": preset.pruner_learning_rate, "max_steps": 4,
    }  # fmt: skip
    whole = train(run_options(sample / "model", sample / "rows.json", tmp_path / "whole", preset.trains, **more))
    options = run_options(sample / "model", sample / "rows.json", tmp_path / "parts", preset.trains, **more)
    interrupt(options, 2, monkeypatch)
    assert not (tmp_path / "parts" / "pruner").exists()
    resumed = train(options)
    assert resumed.losses == whole.losses
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    entries = [[entry for entry in map(json.loads, log) if "loss" in entry] for log in logs]
    measured = [[entry["attention_entropy"] for entry in log] for log in entries]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 4
    assert min(measured[0]) > 0
    one, other = (trained.load(tmp_path / name / "pruner") for name in ("whole", "parts"))
    for name, value in one.learned.state_dict().items():
        assert torch.equal(value, other.learned.state_dict()[name])
    assert moved(sample, resumed.model) == {"projector", "language_model", "lm_head"}
    model = IVTPLlavaForConditionalGeneration.from_pretrained(resumed.model)
    with other(model):
        assert model.model.plan().final_tokens == 4
