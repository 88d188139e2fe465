"""A model with a trained pruner in a loop and in Trainer: what learns, what is frozen, what is refused."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_ivtp import trained
from tests.support.tiny import IMAGE_TOKEN, tiny_model
from tests.support.trained import answered, assert_same_bits, bits, ready


def seeded(training, inputs, seed=7):
    torch.manual_seed(seed)
    return training(**inputs)


def gradients(training):
    return {name: weight.grad.clone() for name, weight in training.named_parameters() if weight.grad is not None}


def test_only_the_modules_learn_and_the_base_stays_bit_equal():
    model = tiny_model()
    method = ready(trained.LVPruning(ratio=0.5), model)
    before, flags = bits(model), [weight.requires_grad for weight in model.parameters()]
    with trained.PrunerTraining(model, method) as training:
        training.train()
        optimizer = torch.optim.AdamW(training.parameter_groups(1e-2))
        start = {name: weight.clone() for name, weight in training.learned.named_parameters()}
        for _ in range(2):
            training(**answered()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {name for name, weight in training.named_parameters() if weight.requires_grad} == {
            f"learned.{name}" for name in start
        }
        assert set(training.state_dict()) == {f"learned.{name}" for name in start}
        assert all(not torch.equal(weight, start[name]) for name, weight in training.learned.named_parameters())
        assert_same_bits(model, before)
    assert_same_bits(model, before)
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert not method.learned.training
    assert model.model.applied_pruner is None


def test_evaluation_drops_tokens_and_returns_the_language_loss():
    model = tiny_model()
    method, inputs = ready(trained.LVPruning(ratio=0.5), model), answered(answer=2)
    with trained.PrunerTraining(model, method) as training, torch.no_grad():
        outputs = training.eval()(**inputs)
        assert outputs.past_key_values.layers[-1].keys.shape[2] < inputs["input_ids"].shape[1]
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    language = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    torch.testing.assert_close(outputs.loss, language)


@pytest.mark.parametrize("text", ["prompt", "all"])
@torch.no_grad()
def test_the_answer_is_not_read_unless_it_is_asked_for(text):
    model = tiny_model()
    method, inputs = ready(trained.LVPruning(ratio=0.5, text=text), model), answered()
    with trained.PrunerTraining(model, method) as training:
        training.train()
        seeded(training, inputs)
        before = [one.weights[one.present] for one in method.batch.weighed]
        inputs["input_ids"][:, -3:] = 40
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] != -100, 40)
        seeded(training, inputs)
        same = [
            torch.equal(one.weights[one.present], old) for one, old in zip(method.batch.weighed, before, strict=True)
        ]
    assert all(same) == (text == "prompt")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_gives_the_same_gradients(attention):
    model = tiny_model(attention=attention)
    method, inputs = ready(trained.LVPruning(ratio=0.5), model), answered()
    with trained.PrunerTraining(model, method) as training:
        training.train()
        loss = seeded(training, inputs).loss
        loss.backward()
        expected = gradients(training)
        training.zero_grad()
        training.gradient_checkpointing_enable({"use_reentrant": False})
        again = seeded(training, inputs).loss
        again.backward()
        assert torch.equal(again, loss)
        found = gradients(training)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
        assert max(gradient.abs().max() for gradient in found.values()) > 1e-4
        training.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant=True: reentrant checkpoints lose the gradient"):
            training(**inputs)


def test_weights_carry_the_language_loss_to_the_modules():
    model = tiny_model()
    method, inputs = ready(trained.LVPruning(ratio=0.5, ratio_weight=0), model), answered()
    with trained.PrunerTraining(model, method) as training:
        training.train()(**inputs).loss.backward()
        found = gradients(training)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_bfloat16_trains():
    model = tiny_model().to(torch.bfloat16)
    method, inputs = ready(trained.LVPruning(ratio=0.5), model), answered()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with trained.PrunerTraining(model, method) as training:
        outputs = training.train()(**inputs)
        outputs.loss.backward()
        assert outputs.logits.dtype == torch.bfloat16
        assert all(
            gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(training).values()
        )
    with method(model), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        other = tiny_model()
        method = ready(trained.LVPruning(ratio=0.5), other)
        with trained.PrunerTraining(other, method) as training:
            loss = training.train()(**answered()).loss
            loss.backward()
            assert loss.isfinite()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[0] for name, value in answered([[3, "image", 7]], seed=index % 3).items()}


def arguments(folder, **options):
    fixed = {
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(str(folder), **fixed | options)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_runs_with_gradient_checkpointing_and_resumes(tmp_path, accumulate):
    def train(folder, resume=None, **options):
        model = tiny_model()
        before = bits(model)
        method = ready(trained.LVPruning(ratio=0.5), model)
        with trained.PrunerTraining(model, method) as training:
            settings = arguments(
                folder,
                max_steps=2,
                save_steps=1,
                learning_rate=1e-2,
                gradient_checkpointing=True,
                gradient_accumulation_steps=accumulate,
                bf16=True,
                **options,
            )
            trainer = Trainer(
                model=training,
                args=settings,
                train_dataset=Rows(),
                callbacks=[training.callback()],
                eval_dataset=Rows(),
            )
            trainer.train(resume_from_checkpoint=resume)
            assert_same_bits(model, before)
            progress, result = method.batch.progress, trainer.evaluate()
            assert result["eval_loss"] > 0
            return progress, {name: weight.clone() for name, weight in method.learned.state_dict().items()}

    progress, once = train(tmp_path / "once")
    assert progress == 0.5  # the second of two steps
    checkpoint = tmp_path / "once" / "checkpoint-1"
    _, resumed = train(tmp_path / "again", resume=str(checkpoint))
    assert once.keys() == resumed.keys()
    for name, weight in once.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-6, rtol=0)
    start = ready(trained.LVPruning(ratio=0.5), tiny_model()).learned.state_dict()
    assert all((once[name] - start[name]).abs().max() > 1e-3 for name in once)


def test_of_several_batches_of_a_step_each_counts_by_its_targets():
    model = tiny_model()
    method, inputs = ready(trained.LVPruning(ratio=0.5), model), answered(answer=2)
    with trained.PrunerTraining(model, method) as training:
        training.train()
        whole = seeded(training, inputs).loss
        own = method.loss()
        part = seeded(training, inputs | {"num_items_in_batch": torch.tensor(12)}).loss
    torch.testing.assert_close(part, (whole - own) * 6 / 12 + own * 6 / 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "pixel_values=None: a batch without pictures"),
        ({"pixel_values": torch.zeros(0, 3, 56, 56)}, "pixel_values=(0, 3, 56, 56): a batch without pictures"),
        ({"labels": "ignored"}, "labels of shape (3, 41) hold nothing but -100 and image tokens"),
        ({"labels": "images"}, "labels of shape (3, 41) hold nothing but -100 and image tokens"),
    ],
)
def test_a_batch_that_trains_nothing_is_refused(change, message):
    model = tiny_model()
    inputs = answered()
    ids = inputs["input_ids"]
    if change.get("labels") == "ignored":
        change = {"labels": torch.full_like(ids, -100)}
    elif change.get("labels") == "images":
        change = {"labels": ids.masked_fill(ids != IMAGE_TOKEN, -100)}
    with trained.PrunerTraining(model, ready(trained.LVPruning(ratio=0.5), model)) as training:
        training.train()
        with pytest.raises(ValueError, match=r"allowed: at least one") as error:
            training(**inputs | change)
        assert message in str(error.value)
        training(**answered())


def test_what_cannot_be_trained_is_refused_before_anything_changes():
    model = tiny_model()
    flags = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(ValueError, match="learns=vision_tower; allowed: language_model"):
        trained.PrunerTraining(model, ready(trained.LVPruning(ratio=0.5), model), learns=("vision_tower",))
    with pytest.raises(ValueError, match="lvpruning has no modules"):
        trained.PrunerTraining(model, trained.LVPruning(ratio=0.5))
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert model.model.applied_pruner is None
    with trained.PrunerTraining(model, ready(trained.LVPruning(ratio=0.5), model)) as training:
        training.train()
        with pytest.raises(ValueError, match="weighs tokens and drops none, so no cache"):
            training.generate(**{name: value for name, value in answered().items() if name != "labels"})
        with pytest.raises(ValueError, match="learned=0; allowed: a learning rate above 0"):
            training.parameter_groups(0)
        with pytest.raises(RuntimeError, match="missing or unknown"):
            training.load_state_dict({})


def test_parts_of_the_base_learn_if_asked_for():
    model = tiny_model()
    before = bits(model)
    method = ready(trained.LVPruning(ratio=0.5), model)
    with trained.PrunerTraining(model, method, learns=("language_model", "lm_head")) as training:
        training.train()
        optimizer = torch.optim.AdamW(training.parameter_groups(1e-2, 1e-3))
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
        training(**answered()).loss.backward()
        optimizer.step()
        names = {name for name in training.state_dict() if not name.startswith("learned.")}
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in changed)
    assert {f"model.{name}" for name in changed} <= names


@pytest.mark.parametrize("assign", [False, True])
def test_a_parent_s_state_holds_its_other_children_and_loads_strictly(assign):
    model = tiny_model()
    method = ready(trained.LVPruning(ratio=0.5), model)
    with trained.PrunerTraining(model, method, learns=("lm_head",)) as training:
        parent = torch.nn.Sequential(torch.nn.Linear(2, 2), training, torch.nn.Linear(2, 2))
        saved = {name: value.clone() for name, value in parent.state_dict().items()}
        assert {f"1.{name}" for name in training.state_dict()} == {name for name in saved if name.startswith("1.")}
        assert {name for name in saved if not name.startswith("1.")} == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert set(training.state_dict(destination={"other": 1})) == {"other", *training.state_dict()}
        before = bits(model)
        with torch.no_grad():
            for weight in (*parent[0].parameters(), *training.learned.parameters(), model.lm_head.weight):
                weight.add_(1)
        parent.load_state_dict(saved, strict=True, assign=assign)
        assert all(torch.equal(value, saved[name]) for name, value in parent.state_dict().items())
        assert_same_bits(model, before)
        frozen = next(name for name in (f"1.model.{name}" for name in before) if "vision_tower" in name)
        for name in (frozen, "1.learned.more"):
            with pytest.raises(RuntimeError, match="Unexpected key"):
                parent.load_state_dict(saved | {name: torch.ones(1)})
        saved.pop("1.model.lm_head.weight")
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"1\.model\.lm_head\.weight\""):
            parent.load_state_dict(saved)


def test_a_lora_beside_it_trains_too():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    method = ready(trained.LVPruning(ratio=0.5), model)
    with trained.PrunerTraining(model, method) as training:
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name and "clip_text" not in name and "vision" not in name)
        training.train()(**answered()).loss.backward()
        assert {name.split(".")[0] for name in gradients(training)} == {"learned", "model"}
