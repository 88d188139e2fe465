"""The training path: losses and gradients under pruning, checkpointing, Trainer, LoRA, quantised, offloaded."""

import pytest
import torch

from tests.support.reference import decoder_reference, reference_loss
from tests.support.tiny import IMAGE_TOKEN, PAD_TOKEN, prompt, tiny_model

ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]
EXTENDED = {"importance": "accumulated", "choice": "diverse"}


def labelled(rows=ROWS):
    inputs = prompt(rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill((labels == 127) | (inputs["input_ids"] == PAD_TOKEN), -100)
    first = inputs["attention_mask"].argmax(1, keepdim=True)
    inputs["labels"] = labels.scatter(1, first, -100)  # no token of the row predicts its first one
    return inputs


def positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, EXTENDED], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_agree_with_reference_mode(attention, options):
    model = tiny_model(attention=attention, **options)
    inputs = labelled()
    loss = model(**inputs, position_ids=positions(inputs), use_cache=False).loss
    loss.backward()
    mine = gradients(model)
    model.zero_grad()
    labels = inputs.pop("labels")
    expected = reference_loss(decoder_reference(model, **inputs), labels)
    expected.backward()
    theirs = gradients(model)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    used = {name for name, value in theirs.items() if value.abs().max() > 0}
    assert used == {name for name, value in mine.items() if value.abs().max() > 0}
    for name in used:
        scale = theirs[name].abs().max().clamp_min(1)
        assert (mine[name] - theirs[name]).abs().max() <= 1e-5 * scale, name


def test_a_label_behind_a_dropped_token_is_left_out():
    model = tiny_model()
    inputs = labelled([[3, "image", 7]])
    kept = model.model(**{k: v for k, v in inputs.items() if k != "labels"}).kept_tokens
    assert not kept[0, 18]
    loss = model(**inputs).loss
    inputs["labels"][0, 19] = 55
    assert torch.equal(model(**inputs).loss, loss)
    inputs["labels"][0, 21] = 55
    assert not torch.equal(model(**inputs).loss, loss)


@pytest.mark.parametrize("words", ["input_ids", "inputs_embeds", "position"])
def test_a_trainers_own_forward_gets_no_labels_on_image_tokens(words):
    model = tiny_model()
    inputs = prompt([[3, "image", 7], [2, "image", 8]])
    images = inputs["input_ids"] == IMAGE_TOKEN
    labels = inputs["input_ids"].clone()
    inputs["labels"] = labels
    inputs["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    positional = [inputs.pop("input_ids")] if words == "position" else []
    if words == "inputs_embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    # Trainers replace the forward of one object, and compute the loss from its hidden states.
    model.forward = lambda *args, **kwargs: kwargs
    passed = model(*positional, **inputs)
    assert (passed["labels"][images] == -100).all()
    assert torch.equal(passed["labels"][~images], labels[~images])
    assert torch.equal(passed["shift_labels"][:, :-1], passed["labels"][:, 1:])
    assert torch.equal(inputs["labels"], labels)


@pytest.mark.parametrize("options", [{}, EXTENDED], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, options):
    model = tiny_model(**options).train()
    inputs = labelled()
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**inputs).loss.backward()
    # Reentrant checkpoints need inputs with a gradient, which images do not have: the tower stays without, as in stock.
    expected = {n: g for n, g in expected.items() if not (reentrant and "vision_tower" in n)}
    there = {n: g for n, g in gradients(model).items() if not (reentrant and "vision_tower" in n)}
    assert there.keys() == expected.keys()
    for name, gradient in there.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
    for part in ("language_model.layers.0", *(() if reentrant else ("vision_tower.encoder.layers.0",))):
        assert any(part in name and gradient.abs().max() > 0 for name, gradient in there.items())


def test_right_padded_rows_give_the_loss_of_left_padded_ones():
    model = tiny_model()
    inputs = labelled([[3, "image", 7], [5, "image", 2, "image", 3]])
    expected = model(**inputs, position_ids=positions(inputs)).loss
    shift = int((inputs["attention_mask"][0] == 0).sum())
    for name in ("input_ids", "attention_mask", "labels", "clip_spans"):
        inputs[name][0] = inputs[name][0].roll(-shift, 0)
    torch.testing.assert_close(model(**inputs, position_ids=positions(inputs)).loss, expected)


class Conversations(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = labelled([[3, "image", 7]])
        return {name: value[0] for name, value in row.items()}


@pytest.mark.slow
def test_trainer_learns(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Conversations())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_lora_trains_and_generates_under_pruning():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    inputs = labelled()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(**inputs).loss
    for _ in range(5):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < before
    inputs.pop("labels")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_offloaded_weights_give_the_same_logits():
    from accelerate import cpu_offload

    model = tiny_model()
    inputs = prompt(ROWS)
    expected = model(**inputs).logits
    cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_weights_load_prune_and_answer(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed here")
    from transformers import BitsAndBytesConfig

    from modeling_ivtp import IVTPLlavaForConditionalGeneration

    model = tiny_model(width=128, visual_tokens=12, tower_tokens=14)
    model.save_pretrained(tmp_path)
    inputs = prompt(ROWS)
    expected = model(**inputs).logits[:, -1]
    options = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantised = IVTPLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=options, device_map={"": "cpu"}
    )
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    assert isinstance(quantised.model.language_model.layers[0].self_attn.q_proj, kind)
    outputs = quantised(**inputs, use_cache=True)
    assert outputs.past_key_values.layers[-1].keys.shape[2] < outputs.past_key_values.layers[0].keys.shape[2]
    close = torch.nn.functional.cosine_similarity(outputs.logits[:, -1].float(), expected)
    assert close.mean() > (0.95 if bits == 8 else 0.6)  # random weights bear four bits worse than trained ones
