"""The engine against reference mode: the same method with masks alone, on full-length sequences, without a cache."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.reference import Selection, decoder_reference
from tests.support.tiny import VOCABULARY, prompt, rows_alone, tiny_model

TOLERANCE = 1e-5
SINGLE = [[3, "image", 7]]
BATCH = [[3, "image", 7], [5], [2, "image", 4, "image", 3], [1, "image", "image", 2]]
ROWS = {"single": SINGLE, "batch": BATCH}


def new_cache(kind, model, length):
    if kind == "dynamic":
        return DynamicCache(config=model.config.text_config)
    return StaticCache(config=model.config.text_config, max_cache_len=length)


def guided(inputs):
    return {name: inputs.get(name) for name in ("pixel_values", "clip_input_ids", "clip_spans")}


def reference(model, inputs, extra=None, **options):
    """Reference mode on the prompt with `extra` tokens after it."""
    ids, mask, guide = inputs["input_ids"], inputs["attention_mask"], guided(inputs)
    if extra is not None:
        ids, mask = torch.cat([ids, extra], 1), torch.cat([mask, torch.ones_like(extra)], 1)
        if guide["clip_spans"] is not None:
            guide["clip_spans"] = torch.nn.functional.pad(guide["clip_spans"], (0, 0, 0, extra.shape[1]))
    with torch.no_grad():
        return decoder_reference(model, ids, mask, **guide, **options)


def position_ids(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def assert_agree(logits, expected, columns=slice(None)):
    present = torch.from_numpy(np.asarray(expected.alive))[:, columns]
    difference = (logits - expected.logits[:, columns])[present].abs().max()
    assert difference <= TOLERANCE, float(difference)


def assert_same_selection(model, inputs, expected):
    assert_same_choices(model.explain(**inputs).images, expected.images)


def assert_same_choices(images, expected, start=0):
    """Compare traces with reference mode; `start` is the column where the turn of these images starts."""
    for mine, theirs in zip(images, expected, strict=True):
        others = [group for group in [*theirs.tower, *theirs.decoder] if len(group.kept) < len(group.candidates)]
        for group, other in zip(mine.groups, others, strict=True):
            assert group.layers == other.layers
            np.testing.assert_array_equal(group.candidates, other.candidates)
            np.testing.assert_allclose(group.importance, other.importance, rtol=1e-4, atol=TOLERANCE)
            np.testing.assert_array_equal(group.kept, other.kept)
        keys = [start + token.position for token in mine.tokens if token.is_key]
        assert keys == list(theirs.key_columns)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_prefill_ten_steps_and_four_tokens_at_once_agree_with_reference_mode(cache, attention, rows):
    model = tiny_model(attention=attention)
    inputs = prompt(ROWS[rows])
    batch, length = inputs["input_ids"].shape
    later = torch.randint(3, 120, (batch, 14), generator=torch.Generator().manual_seed(5))
    expected = reference(model, inputs, later)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
    positions = position_ids(mask)
    past = new_cache(cache, model, length + 14)
    outputs = model(**inputs, position_ids=positions[:, :length], past_key_values=past, use_cache=True)
    assert_agree(outputs.logits, expected, slice(0, length))
    end = length
    for count in [1] * 10 + [4]:
        outputs = model(
            input_ids=later[:, end - length : end - length + count],
            attention_mask=mask[:, : end + count],
            position_ids=positions[:, end : end + count],
            past_key_values=past,
            use_cache=True,
        )
        assert_agree(outputs.logits, expected, slice(end, end + count))
        end += count
        assert int(past.get_seq_length()) == end
    for index, layer in enumerate(past.layers):
        seen = expected.layer_alive[index].sum(1).max()
        assert (layer.keys.shape[2] if cache == "dynamic" else layer.entries) == seen
        if cache == "static":
            assert layer.keys.shape[2] == seen
    assert_same_selection(model, inputs, reference(model, inputs))


@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_another_selection_gives_other_logits(rows):
    model = tiny_model()
    inputs = prompt(ROWS[rows])
    logits = model(**inputs, position_ids=position_ids(inputs["attention_mask"])).logits
    selection = [
        Selection([group.kept for group in image.tower], [group.kept for group in image.decoder])
        for image in reference(model, inputs).images
    ]
    for image in selection:
        image.decoder[-1] = np.setdiff1d(image.decoder[0], image.decoder[-1])[:4]
    other = reference(model, inputs, selection=selection)
    assert (logits - other.logits)[:, -1].abs().amax() > 100 * TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_beam_scores_agree_with_reference_mode(cache, attention):
    model = tiny_model(attention=attention)
    inputs = prompt([[3, "image", 7], [2, "image", "image", 3]])
    length = inputs["input_ids"].shape[1]
    beams = model.generate(
        **inputs,
        max_new_tokens=6,
        num_beams=4,
        num_return_sequences=3,
        do_sample=False,
        length_penalty=0.0,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for number, sequence in enumerate(beams.sequences):
        row = rows_alone(inputs, [[3, "image", 7], [2, "image", "image", 3]])[number // 3]
        extra = sequence[None, length:]
        start = row["input_ids"].shape[1]
        logits = reference(model, row, extra).logits[0, start - 1 : -1].log_softmax(-1)
        score = logits.gather(1, extra[0, :, None]).sum()
        assert abs(score - beams.sequences_scores[number]) <= 5 * TOLERANCE


OPTIONS = [
    {"aggregation": "mean"},
    {"aggregation": "max"},
    {"aggregation": "multiply"},
    {"aggregation": "last"},
    {"guidance": "mean_text"},
    {"guidance": "text_similarity", "relevance_threshold": 0.0},
    {"guidance": "visual_cls"},
    {"pseudo_cls": "pool"},
    {"positions": "compact"},
    {"positions": "compact", "pseudo_cls": "pool", "layers_per_group": 1},
    {"layers_per_group": None},
    {"layers_per_group": 3, "decoder_layers": 6},
    {"layers_per_group": 1, "tower_layers": 2},
    {"tower_layers": 0, "tower_tokens": None},
    {"decoder_layers": 0, "tower_tokens": 4},
    {"tower_tokens": 16},
    {"visual_tokens": 1, "tower_tokens": 1},
    {"relevance_threshold": 1.0},
    {"relevance_threshold": -1.0},
    {"importance": "accumulated"},
    {"importance": "accumulated", "aggregation": "mean", "layers_per_group": 3, "decoder_layers": 6},
    {"choice": "diverse"},
    {"choice": "diverse", "sharpness": 0, "layers_per_group": 1},
    {"choice": "diverse", "sharpness": 2.0, "aggregation": "max", "guidance": "mean_text"},
    {"importance": "accumulated", "choice": "diverse"},
    {"importance": "accumulated", "choice": "diverse", "aggregation": "last", "layers_per_group": 1},
    {"importance": "accumulated", "choice": "diverse", "decoder_layers": 0, "tower_tokens": 4},
    {"importance": "accumulated", "choice": "diverse", "tower_layers": 0, "tower_tokens": None},
    {"importance": "accumulated", "choice": "diverse", "positions": "compact", "pseudo_cls": "pool"},
    {"decoder_choice": "ahead"},
    {"decoder_choice": "ahead", "positions": "compact", "guidance": "mean_text"},
    {"decoder_choice": "ahead", "layers_per_group": 3, "decoder_layers": 6},
    {"decoder_choice": "ahead", "tower_layers": 0, "tower_tokens": None, "guidance": "visual_cls"},
    {"decoder_choice": "ahead", "tower_tokens": 4},
    {"decoder_choice": "ahead", "decoder_layers": 0, "tower_tokens": 4},
    {"decoder_choice": "ahead", "importance": "accumulated", "choice": "diverse", "layers_per_group": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
@torch.no_grad()
def test_every_option_agrees_with_reference_mode(options):
    model = tiny_model(**options)
    inputs = prompt(BATCH)
    batch, length = inputs["input_ids"].shape
    later = torch.randint(3, 120, (batch, 3), generator=torch.Generator().manual_seed(5))
    expected = reference(model, inputs, later)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
    positions = position_ids(mask)
    outputs = model(**inputs, position_ids=positions[:, :length], use_cache=True)
    assert_agree(outputs.logits, expected, slice(0, length))
    outputs = model(
        input_ids=later,
        attention_mask=mask,
        position_ids=positions[:, length:],
        past_key_values=outputs.past_key_values,
    )
    assert_agree(outputs.logits, expected, slice(length, length + 3))
    assert_same_selection(model, inputs, reference(model, inputs))


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
@torch.no_grad()
def test_other_decoders_of_llamas_layout_agree_with_reference_mode(decoder):
    model = tiny_model(decoder)
    inputs = prompt(BATCH)
    logits = model(**inputs, position_ids=position_ids(inputs["attention_mask"])).logits
    assert_agree(logits, reference(model, inputs))
    assert logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("decoder_choice", ["within", "ahead"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_second_turn_with_a_new_image_agrees_with_reference_mode(cache, positions, decoder_choice):
    model = tiny_model(positions=positions, decoder_choice=decoder_choice)
    first, second = (
        prompt([[3, "image", 7], [2, "image", 4]], seed=3),
        prompt([[4, "image", 3], [2, "image", 6]], seed=4),
    )
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    places = position_ids(mask)
    turn = first["input_ids"].shape[1]
    later = torch.randint(3, 120, (2, 2), generator=torch.Generator().manual_seed(5))
    past = new_cache(cache, model, ids.shape[1] + 2)
    a = model(**first, position_ids=places[:, :turn], past_key_values=past)
    trace = model.explain(**second | {"attention_mask": mask, "position_ids": places[:, turn:]}, past_key_values=past)
    b = model(**second | {"attention_mask": mask}, position_ids=places[:, turn:], past_key_values=past)
    whole_mask = torch.cat([mask, torch.ones_like(later)], 1)
    c = model(
        input_ids=later, attention_mask=whole_mask, position_ids=position_ids(whole_mask)[:, -2:], past_key_values=past
    )
    windows = max(first["clip_input_ids"].shape[1], second["clip_input_ids"].shape[1])
    both_windows = torch.cat(
        [
            torch.nn.functional.pad(turn_["clip_input_ids"], (0, 0, windows - turn_["clip_input_ids"].shape[1], 0))
            for turn_ in (first, second)
        ],
        1,
    )
    context = both_windows.shape[2]
    early = first["clip_spans"] - windows * context * (first["clip_spans"][..., :1] < first["clip_spans"][..., 1:])
    expected = decoder_reference(
        model,
        torch.cat([ids, later], 1),
        whole_mask,
        pixel_values=torch.stack(
            [p for pair in zip(first["pixel_values"], second["pixel_values"], strict=True) for p in pair]
        ),
        clip_input_ids=both_windows,
        clip_spans=torch.cat([early, second["clip_spans"], torch.zeros(2, 2, 2, dtype=torch.long)], 1),
        turns=(0, turn),
    )
    assert_agree(a.logits, expected, slice(0, turn))
    assert_agree(b.logits, expected, slice(turn, ids.shape[1]))
    assert_agree(c.logits, expected, slice(ids.shape[1], ids.shape[1] + 2))
    assert_same_choices(trace.images, expected.images[1::2], turn)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_turn_after_a_padded_turn_of_text_agrees_with_reference_mode(cache):
    """What the cache holds of the text has a mask of its own, after that of the pruned prompt."""
    model = tiny_model(guidance="mean_text")
    turns = [prompt([[3, "image", 7], [2, "image", 4]], seed=3), prompt([[6], [2]]), prompt([[4, "image", 3]] * 2)]
    turns[1]["clip_spans"] = torch.zeros_like(turns[1]["clip_spans"])
    ids, mask, spans = (
        torch.cat([turn[name] for turn in turns], 1) for name in ("input_ids", "attention_mask", "clip_spans")
    )
    places, past, end = position_ids(mask), new_cache(cache, model, ids.shape[1]), 0
    for turn in turns:
        start, end = end, end + turn["input_ids"].shape[1]
        new = turn | {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        trace = model.explain(**new, past_key_values=past) if turn is turns[2] else None
        logits = model(**new, past_key_values=past).logits
    first, last = turns[0]["pixel_values"], turns[2]["pixel_values"]
    pixels = torch.stack([image for pair in zip(first, last, strict=True) for image in pair])
    starts = (0, turns[0]["input_ids"].shape[1], start)
    expected = decoder_reference(model, ids, mask, pixel_values=pixels, clip_spans=spans, turns=starts)
    assert_agree(logits, expected, slice(start, end))
    assert_same_choices(trace.images, expected.images[1::2], start)


@pytest.mark.slow
@torch.no_grad()
def test_a_text_turn_before_the_image_agrees_with_reference_mode():
    model = tiny_model()
    inputs = prompt([[9, "image", 5], [6, "image", 5]])
    mask = inputs["attention_mask"]
    places = position_ids(mask)
    past = DynamicCache()
    model(
        input_ids=inputs["input_ids"][:, :5],
        attention_mask=mask[:, :5],
        position_ids=places[:, :5],
        past_key_values=past,
    )
    outputs = model(
        **inputs | {"input_ids": inputs["input_ids"][:, 5:]}, position_ids=places[:, 5:], past_key_values=past
    )
    expected = reference(model, inputs, turns=(0, 5))
    assert_agree(outputs.logits, expected, slice(5, None))


@torch.no_grad()
def test_threads_that_share_a_model_accumulate_apart():
    model = tiny_model(importance="accumulated", choice="diverse", layers_per_group=1)
    prompts = [prompt(SINGLE, seed=seed) for seed in range(6)]

    def logits(inputs):
        with torch.no_grad():
            return model(**inputs).logits[:, -1]

    expected = [logits(inputs) for inputs in prompts]
    with ThreadPoolExecutor(6) as threads:
        for found, right in zip(threads.map(logits, prompts * 4), expected * 4, strict=True):
            assert torch.equal(found, right)
