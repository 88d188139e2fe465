"""Training of the miniature: its shortcuts are exact, and it goes on where it was stopped."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.quality import processes
from benchmarks.quality.assemble import assemble
from benchmarks.quality.captions_for_clip import texts_of
from benchmarks.quality.loop import Stopped, TrainingRun, cosine_rate, saved_weights
from benchmarks.quality.miniature import vision_config
from benchmarks.quality.muon import FloatMuon
from benchmarks.quality.question_batches import UNKNOWN, ask, name_all
from benchmarks.quality.recipes import PLAIN, RECIPES, TAUGHT
from benchmarks.quality.speaker import NAMING, Speaker
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.train_clip import PATCH_LABELS, Batch, Teacher, patch_labels
from benchmarks.quality.train_llava import NO_CORNERS, TWO_THINGS, draw_batch, losses
from benchmarks.quality.world import COLOURS, GRID, SIZES, TYPES, answer_words, draw_scene, kinds
from tests.support import train_in_parts


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher(TAUGHT).eval()


@torch.no_grad()
def test_the_tower_sees_what_transformers_tower_sees(teacher):
    batch = Batch(0, 2, 336)
    assert batch.window == (0, 0)
    states, features = teacher.see(batch.pixels, batch.window)
    stock = teacher.clip.vision_model(batch.pixels, output_hidden_states=True)
    torch.testing.assert_close(features, stock.hidden_states[-2][:, 1:])
    torch.testing.assert_close(states[-1], stock.last_hidden_state)


@pytest.mark.slow
@torch.no_grad()
def test_questions_side_by_side_get_the_answers_they_get_alone():
    torch.manual_seed(0)
    asked = ask(0, 2, 3, TYPES)
    speaker = Speaker(TAUGHT).eval()
    features = torch.randn(2, 576, 192)
    together, *_ = speaker(features, asked.lead, asked.tokens)
    for row in range(2):
        for question in range(3):
            words = torch.cat([asked.lead, asked.tokens[row, question]])
            embeds = speaker.language.embed_tokens(words)
            lead = len(asked.lead)
            embeds = torch.cat([embeds[:lead], speaker.project(features[row]), embeds[lead:]])[None]
            alone = speaker.language(inputs_embeds=embeds).last_hidden_state[0, lead + 576 :]
            torch.testing.assert_close(together[row, question], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_patches_of_a_small_scene_stand_where_they_would_in_a_whole_one():
    torch.manual_seed(0)
    asked = ask(1, 1, 2, NO_CORNERS, side=168)
    assert asked.patches[0] == asked.window[0] * GRID + asked.window[1]
    assert asked.patches.shape == (144,)
    speaker = Speaker(TAUGHT).eval()
    features = torch.randn(1, 144, 192)
    together, *_ = speaker(features, asked.lead, asked.tokens, asked.patches)
    lead = len(asked.lead)
    for question in range(2):
        embeds = speaker.language.embed_tokens(torch.cat([asked.lead, asked.tokens[0, question]]))
        embeds = torch.cat([embeds[:lead], speaker.project(features[0]), embeds[lead:]])[None]
        after = torch.arange(asked.tokens.shape[-1]) + lead + 576
        places = torch.cat([torch.arange(lead), lead + asked.patches, after])[None]
        alone = speaker.language(inputs_embeds=embeds, position_ids=places).last_hidden_state[0, lead + 144 :]
        torch.testing.assert_close(together[0, question], alone, atol=1e-4, rtol=1e-4)


def test_padding_left_out_changes_neither_answers_nor_gradients():
    torch.manual_seed(0)
    asked = ask(1, 2, 4, NO_CORNERS, side=168)
    assert (asked.answers + 2 < asked.tokens.shape[2]).any(), "some padding, else nothing is shown here"
    speaker = Speaker(replace(TAUGHT, decoder_layers=4))
    features = torch.randn(2, 144, 192)
    places = torch.stack([asked.answers, asked.answers + 1], -1)[..., None].expand(-1, -1, -1, 192)
    found = []
    for lengths in (None, asked.answers + 2):
        hidden, halfway, _ = speaker(features, asked.lead, asked.tokens, asked.patches, lengths=lengths)
        read = [states.gather(2, places) for states in (hidden, *halfway)]
        speaker.zero_grad()
        sum(states.square().sum() for states in read).backward()
        gradients = [one.grad.clone() for one in speaker.parameters() if one.grad is not None]
        found.append((read, gradients))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_in_float32_steps_as_torchs_own_does(shape):
    torch.manual_seed(0)
    start = torch.randn(2, *shape)
    ours, torchs = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    optimizers = [
        kind(those, lr=0.01, momentum=0.9, weight_decay=0.1)
        for kind, those in ((FloatMuon, ours), (torch.optim.Muon, torchs))
    ]
    for _ in range(3):
        gradients = torch.randn(2, *shape)
        for those, optimizer in zip((ours, torchs), optimizers, strict=True):
            for parameter, gradient in zip(those, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    moved = (torchs[0] - start[0]).norm()
    for one, other in zip(ours, torchs, strict=True):
        assert (one - other).norm() < 0.02 * moved
    optimizers[0].load_state_dict(optimizers[1].state_dict())  # a run goes on with either


@pytest.mark.subprocess
def test_two_processes_train_as_one_does(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*launcher, train_in_parts.__name__, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    train_in_parts.train(tmp_path / "one")
    train_in_parts.train(tmp_path / "half", slice(0, 2))
    one, two, half = (saved_weights(tmp_path / name, "head")[".weight"] for name in ("one", "two", "half"))
    # AdamW divides a gradient by its size, so that rounding shows in weights whose gradient is almost zero.
    share_alone = (half - one).norm()  # what a process's share alone would have made of it
    assert (two - one).norm() < 1e-3 * share_alone
    assert share_alone > 0.1


def test_pictures_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(ValueError, match="8 pictures of a step cannot be divided among 3 processes"):
        processes.share(8)


@pytest.mark.parametrize("settling", [False, True])
@torch.no_grad()
def test_what_is_paid_idly_is_what_eager_attention_shows(settling):
    torch.manual_seed(0)
    asked = ask(1, 1, 1, NO_CORNERS, side=168)
    speaker = Speaker(replace(TAUGHT, decoder_layers=3)).eval()
    features = torch.randn(1, 144, 192)
    ground = asked.shown[..., 0] == len(kinds())
    assert 0 < ground.sum() < 144
    things = asked.shown[..., 0] * 9 + asked.shown[..., 1]
    answers = int(asked.answers[0, 0])
    asking = torch.zeros(asked.tokens.shape)
    asking[0, 0, :answers], asking[0, 0, answers] = 1 / answers, 1.0
    *_, idle = speaker(
        features, asked.lead, asked.tokens, asked.patches, ground, *((things, asking) if settling else ())
    )
    speaker.language.set_attn_implementation("eager")
    lead = len(asked.lead)
    embeds = speaker.language.embed_tokens(torch.cat([asked.lead, asked.tokens[0, 0]]))
    embeds = torch.cat([embeds[:lead], speaker.project(features[0]), embeds[lead:]])[None]
    after = torch.arange(asked.tokens.shape[-1]) + lead + 576
    places = torch.cat([torch.arange(lead), lead + asked.patches, after])[None]
    maps = speaker.language(inputs_embeds=embeds, position_ids=places, output_attentions=True).attentions
    paid = []
    for one in maps:
        to_patches = one[0][..., lead : lead + 144].mean(0)
        to_ground = to_patches[:, ground[0]].sum(-1)
        of_objects, of_question = to_ground[lead : lead + 144], to_ground[lead + 144 :]
        weights = asking[0, 0] / asking.sum() if settling else torch.ones(len(of_question)) / len(of_question)
        if settling:
            others = things[0] != things[0][:, None]
            of_objects = (to_patches[lead : lead + 144] * others).sum(-1)
        paid.append((of_objects[~ground[0]].mean() + (of_question * weights).sum()) / 2)
    assert float(idle) == pytest.approx(float(sum(paid) / 3), rel=1e-4)
    assert float(speaker(features, asked.lead, asked.tokens, asked.patches)[-1]) == 0


def test_labels_of_patches_are_what_the_scene_says():
    scene = draw_scene("train", 3, side=168)
    labels = patch_labels(scene, (5, 7))
    assert labels.shape == (12, 12, len(PATCH_LABELS))
    for number, thing in enumerate(scene.objects):
        here = labels[scene.patch_objects() == number]
        wanted = [thing.kind, thing.colour, thing.y // 14 + 5, thing.x // 14 + 7, SIZES.index(thing.size)]
        assert len(here)
        assert (here == wanted).all()
    ground = labels[0, 11] if scene.patch_objects()[0, 11] < 0 else labels[11, 0]
    assert ground[[0, 1, 4]].tolist() == [len(kinds()), len(COLOURS), len(SIZES)]
    assert (labels >= 0).all()
    assert (labels.max((0, 1)) < list(PATCH_LABELS.values())).all()


def test_cls_is_told_how_much_of_every_cell_things_cover():
    batch = Batch(2, 2, 168)
    assert batch.covered.shape == (2, 6, 6)
    for row in range(2):
        scene = draw_scene("train", 2 * 64 + row, side=168)
        assert float(batch.covered[row].sum()) * 16 == pytest.approx((scene.patch_objects() >= 0).sum())
    top, left = (start // 4 for start in batch.window)
    assert batch.covered[:, :top].sum() == 0
    assert batch.covered[:, :, :left].sum() == 0


def test_the_place_asked_for_is_that_of_the_thing_named():
    tokenizer = decoder_tokenizer()
    asked = ask(5, 4, 24, TYPES)
    seen = {"named": 0, "source": 0}
    for row in range(4):
        scene = draw_scene("train", 1_000_000 + 5 * 64 + row)
        for question in range(24):
            ids = asked.tokens[row, question].tolist()
            until = tokenizer.decode(ids[: asked.nouns[row, question] + 1]).lower()
            nouns = [kind.name for kind in kinds() if until.endswith((f" {kind.name}", f" {kind.plural}"))]
            noun = max(nouns, key=len)
            answer = tokenizer.decode(ids[asked.answers[row, question] + 1]).strip()
            for which, words in (("named", {noun}), ("source", {noun, answer})):
                place = getattr(asked, which)[row, question].tolist()
                if place != [UNKNOWN, UNKNOWN]:
                    seen[which] += 1
                    there = [thing for thing in scene.objects if [thing.y // 14, thing.x // 14] == place]
                    assert there
                    if TYPES[asked.types[row, question]] != "colour_of_neighbour" or which == "named":
                        assert there[0].name in words
    assert min(seen.values()) > 40


def a_course(recipe=TAUGHT, **parts):
    """A recipe's course with other numbers of steps, 0 for the parts that are not named."""
    names = ("align", "name", "middle", "whole", "sentences", "practice", "settle")
    return replace(recipe.course, **{name: parts.get(name, 0) for name in names})


@pytest.mark.slow
def test_practice_is_about_two_things_in_every_second_step_and_crowded_where_it_is_small():
    course = a_course(practice=12)
    batches = [draw_batch(course, step) for step in range(12)]
    for step, batch in enumerate(batches):
        types = {TYPES[one] for one in batch.types.flatten().tolist()}
        assert (types <= {*TWO_THINGS, "existence"}) == bool(step % 2)
        ground = (batch.shown[..., 0] == len(kinds())).float().mean(1)
        if step % 3 == 2:
            assert batch.pixels.shape[-1] == 224
            assert ground.min() < 0.3
        else:
            assert batch.pixels.shape[-1] == 336
            assert ground.min() > 0.5


def test_a_recipe_can_relate_two_things_before_practice():
    course = replace(PLAIN.course, related_from=10)
    assert [step for step in range(6, 18) if course.relates(step)] == [11, 13, 15, 17]
    course = a_course(whole=4, sentences=3, practice=6)
    assert [step for step in range(13) if course.relates(step)] == [7, 9, 11]


def test_a_picture_with_nothing_to_relate_is_asked_what_is_there():
    asked = ask(4, 12, 2, ("next_to",), side=168)
    types = {TYPES[one] for one in asked.types.flatten().tolist()}
    assert types == {"next_to", "existence"}


def test_some_pictures_are_blank_and_tell_no_places():
    blank = 0
    for step in range(30):
        asked = ask(step, 4, 2, NO_CORNERS, side=168, style="terse")
        for row in range(4):
            if (asked.pixels[row].std((1, 2)) == 0).all():
                blank += 1
                assert (asked.named[row] == UNKNOWN).all()
                assert (asked.source[row] == UNKNOWN).all()
    assert 0 < blank < 15


def test_what_is_known_of_every_name_is_what_the_scene_says():
    named = name_all(2, 3, side=168)
    assert named.known.keys() == NAMING.keys()
    for row in range(3):
        scene = draw_scene("train", 1_000_000 + 2 * 64 + row, side=168)
        counts = scene.counts()
        assert named.known["there"][row].nonzero().flatten().tolist() == sorted(counts)
        alone = [thing for thing in scene.objects if counts[thing.kind] == 1]
        for name in ("colour", "row", "column", "size"):
            assert int((named.known[name][row] != UNKNOWN).sum()) == len(alone)
        for thing in alone:
            told = [int(named.known[name][row, thing.kind]) for name in ("colour", "row", "column", "size")]
            place = [thing.y // 14 + named.window[0], thing.x // 14 + named.window[1]]
            assert told == [thing.colour, *place, SIZES.index(thing.size)]
    words = decoder_tokenizer().convert_ids_to_tokens(named.words.tolist())
    assert words == [f"▁{kind.name}" for kind in kinds()]


def first_pictures(batch, number):
    """A batch with fewer pictures: gradients of a whole one take gigabytes, and no part of the course needs them."""
    per_picture = {"pixels", "shown", "tokens", "answers", "types", "nouns", "named", "source", "known"}

    def cut(value):
        return {name: rows[:number] for name, rows in value.items()} if isinstance(value, dict) else value[:number]

    return replace(batch, **{name: cut(value) for name, value in vars(batch).items() if name in per_picture})


@pytest.mark.slow
def test_every_part_of_the_course_can_be_learned_from(teacher):
    torch.manual_seed(0)
    course = a_course(align=1, name=1, middle=1, whole=1, sentences=3, practice=2, settle=1)
    speaker = Speaker(TAUGHT)
    styles = []
    for step in range(course.steps):
        batch = first_pictures(draw_batch(course, step), 1)  # two take a gigabyte
        with torch.no_grad():
            features = teacher.see(batch.pixels, batch.window)[1]
        told = losses(speaker, features, batch, course, step)
        assert torch.isfinite(told["loss"])
        speaker.zero_grad()
        told["loss"].backward()
        reached = {name.split(".")[0] for name, one in speaker.named_parameters() if one.grad is not None}
        styles.append((batch.pixels.shape[-1], reached))
    assert [side for side, _ in styles] == [168, 168, 224, 336, 336, 224, 336, 336, 224, 336]
    assert styles[0][1] == {"language", "linear_1", "linear_2"}
    assert styles[1][1] == {"language", "linear_1", "linear_2", "naming"}
    assert styles[2][1] == {"language", "linear_1", "linear_2", "naming", "source", "head"}
    assert styles[-1][1] == {"language", "linear_1", "linear_2", "head"}


def test_help_on_the_way_fades_before_training_ends():
    course = a_course(align=1, name=2, middle=3, whole=10, sentences=4, practice=4, settle=2)
    weights = [course.help(step) for step in range(course.steps)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 0
    assert weights[-10:] == [0] * 10
    plain = [PLAIN.course.help(step) for step in range(PLAIN.course.steps)]
    assert plain[int(0.75 * PLAIN.course.terse)] == PLAIN.course.places_weight
    assert [step for step, weight in enumerate(plain) if weight > 0][-1] == PLAIN.course.terse - 1
    assert min(map(course.rate, range(course.steps))) > 0


@pytest.mark.slow
@torch.no_grad()
def test_the_assembled_model_answers_what_was_trained(teacher):
    torch.manual_seed(0)
    asked = ask(0, 1, 1, TYPES)
    speaker = Speaker(TAUGHT).eval()
    features = teacher.see(asked.pixels, (0, 0))[1]
    speaker.mean.copy_(features.mean((0, 1)))
    speaker.deviation.copy_(features.std())
    expected = speaker.head(speaker(features, asked.lead, asked.tokens)[0])[0, 0]
    model = assemble(teacher, speaker)
    image = torch.full((576,), model.config.image_token_id)
    ids = torch.cat([asked.lead, image, asked.tokens[0, 0]])[None]
    with model.pruning(enabled=False):
        logits = model(input_ids=ids, pixel_values=asked.pixels).logits[0, len(asked.lead) + 576 :]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert model.pruning_config.visual_tokens == 64
    assert sum(parameter.numel() * 2 for parameter in model.parameters()) < 40e6


def test_the_answer_is_looked_for_where_it_stands():
    tokenizer = decoder_tokenizer()
    asked = ask(3, 2, 8, TYPES)
    for row in range(2):
        for question in range(8):
            at = asked.answers[row, question]
            ids = asked.tokens[row, question].tolist()
            assert tokenizer.convert_ids_to_tokens(ids[at]) == "▁ASSISTANT:"
            assert tokenizer.decode([ids[at + 1]]).strip() in answer_words()
            assert ids[at + 2] == tokenizer.eos_token_id


def test_every_answer_is_one_token():
    tokenizer = decoder_tokenizer()
    assert all(len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in answer_words())


def test_a_text_names_what_stands_before_its_end():
    import numpy as np

    scenes = [draw_scene("train", index, side=168) for index in range(40)]
    texts = texts_of(scenes, np.random.Generator(np.random.PCG64(0)), question_share=0)
    present = torch.zeros(40, len(kinds()), dtype=torch.bool)
    for row, scene in enumerate(scenes):
        present[row, [thing.kind for thing in scene.objects]] = True
    assert not (texts.names & ~present).any()
    assert texts.names.any(1).float().mean() > 0.5
    assert (texts.ends > 0).all()


def a_run(folder, steps=8, **settings):
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1)]
    return TrainingRun(folder, module, optimizers, {"steps": steps} | settings)


def one_step_of(run):
    def one_step(step):
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (run.modules(x) - x).square().mean()
        loss.backward()
        for optimizer in run.optimizers:
            optimizer.step()
        return {"loss": float(loss.detach())}

    return one_step


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole = a_run(tmp_path / "whole")
    whole.train(8, one_step_of(whole), title="whole")
    begun = a_run(tmp_path / "parts")
    step_of = one_step_of(begun)

    def stop_at_three(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(step)

    with pytest.raises(Stopped, match="stopped at step 4 of 8"):
        begun.train(8, stop_at_three, title="parts")
    again = a_run(tmp_path / "parts")
    assert again.step == 4
    again.train(8, one_step_of(again), title="parts")
    for mine, theirs in zip(again.modules.parameters(), whole.modules.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not list(tmp_path.glob("*/*.partial"))


def test_a_state_of_other_settings_is_refused(tmp_path):
    a_run(tmp_path).save()
    with pytest.raises(ValueError, match=r"other settings \(steps\)"):
        a_run(tmp_path, steps=9)


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    from benchmarks.quality import loop

    run = a_run(tmp_path)
    run.save()
    before = run.state_file.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_file", full)
    run.step = 5
    with pytest.raises(OSError, match="No space"):
        run.save()
    assert run.state_file.read_bytes() == before


def test_the_learning_rate_warms_up_and_comes_down():
    rates = [cosine_rate(step, 1000) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_miniature_has_the_real_geometry(recipe):
    config = vision_config(recipe)
    assert (config.image_size, config.patch_size) == (336, 14)
    assert config.hidden_size % 64 == 0
    assert config.num_attention_heads == config.hidden_size // 64
