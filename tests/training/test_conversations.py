"""Rows in LLaVA's format: what is read of them, and what is refused before anything is trained."""

import json

import datasets
import pytest
from PIL import Image

from modeling_ivtp.training import Preset, load_preset, preset_names
from modeling_ivtp.training.data import open_conversations, read_conversation
from modeling_ivtp.training.plan import split_batch
from tests.support.conversations import ROWS, TEXT_ROW, write_data


def turns(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


BAD = [
    ([], "row 3 is no object, but list"),
    ({"image": "a.png"}, "row 3 has no conversations; its fields: image"),
    ({"conversations": []}, "has no conversations"),
    ({"conversations": ["Hello"]}, "a turn is 'Hello'"),
    ({"conversations": [{"from": "human"}]}, "a turn is"),
    ({"id": 7, "conversations": turns("<image>\nWhy?", "So.")}, r"row 3 \(id 7\) has 1 <image> and 0 pictures"),
    ({"image": ["a", "b"], "conversations": turns("<image>\nWhy?", "So.")}, "has 1 <image> and 2 pictures"),
    ({"conversations": turns("Why?")}, "has no answer to learn from"),
    ({"conversations": turns("Why?", " ")}, "has no answer to learn from"),
    ({"conversations": [*turns("Why?"), *turns("Why?")]}, "its turns are user, user"),
    (
        {"image": "a.png", "conversations": turns("Why?", "So.", "And <image>?")},
        "row 3: its last question has an <image> and no answer; leave it out, or answer it",
    ),
    ({"conversations": turns("Why?", "So \ud83d.")}, "row 3: a turn is no text: half of a character stands at 3"),
    (
        {"image": {"bytes": None, "path": None}, "conversations": turns("<image>\nWhy?", "So.")},
        "row 3 has 1 <image> and 0 pictures",
    ),
    (
        {"image": "a.png", "images": ["b.png"], "conversations": turns("Why?", "So.")},
        "row 3 has pictures in image and in images; allowed: one of the two",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=str)
def test_a_damaged_row_is_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_conversation(row, 3, tmp_path)


def test_what_llava_leaves_out_is_left_out(tmp_path):
    spoken = [{"from": "gpt", "value": "Hello."}, *turns("Why?", "So.", "And?")]
    assert read_conversation({"conversations": spoken}, 0, tmp_path).messages == (
        ("user", "Why?"),
        ("assistant", "So."),
    )
    row = {"image": "a.png", "conversations": turns("Why?", "So.")}
    read = read_conversation(row, 0, tmp_path)
    assert read.messages[0] == ("user", "<image>\nWhy?")
    assert read.images == (tmp_path / "a.png",)


@pytest.mark.parametrize("form", ["json", "jsonl", "datasets"])
def test_every_form_of_data_gives_the_same_rows(form, tmp_path):
    source = write_data(tmp_path)
    expected = open_conversations(str(source))
    if form == "jsonl":
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if form == "datasets":
        source = tmp_path / "saved"
        table = datasets.Dataset.from_list([{**row, "image": str(tmp_path / row["image"])} for row in ROWS])
        table.cast_column("image", datasets.Image()).save_to_disk(source)
    rows = open_conversations(str(source))
    assert [rows[n].messages for n in range(8)] == [expected[n].messages for n in range(8)]
    rows.check_pictures(needed=True)
    if form != "datasets":
        assert rows.fingerprint() == expected.fingerprint()
        assert open_conversations(str(source), limit=7).fingerprint() != expected.fingerprint()
    else:
        assert isinstance(rows[0].images[0], bytes)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_separators_inside_strings_blank_lines_and_a_byte_order_mark_are_read(form, tmp_path):
    said = "one\u2028two\u2029three\x85four"
    rows = [{"conversations": turns("Why?", said)}, {"conversations": turns("Where?", "There.")}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    source = tmp_path / f"rows.{form}"
    text = f"[{','.join(lines)}]" if form == "json" else f"\r\n{lines[0]}\r\n  \t\r\n\n{lines[1]}\n \n"
    source.write_bytes(b"\xef\xbb\xbf" + text.encode())
    read = open_conversations(str(source))
    assert [read[n].messages[1][1] for n in range(len(read))] == [said, "There."]


def test_a_picture_that_is_missing_is_named_and_one_that_is_needed_is_asked_for(tmp_path):
    source = write_data(tmp_path)
    (tmp_path / "pictures" / "5.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"row 5 \(id picture-5\): its picture .*5\.png is not there"):
        open_conversations(str(source)).check_pictures(needed=False)
    source = write_data(tmp_path, [*ROWS, TEXT_ROW])
    open_conversations(str(source)).check_pictures(needed=False)
    with pytest.raises(ValueError, match=r"row 8 \(id text\) has no picture, and a batch without pictures trains nei"):
        open_conversations(str(source)).check_pictures(needed=True)
    with pytest.raises(ValueError, match="no row has a picture"):
        open_conversations(str(write_data(tmp_path, [TEXT_ROW]))).check_pictures(needed=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("{}", "holds dict; allowed: a list"), ("[]", "has no rows")],
)
def test_a_damaged_file_is_named(content, message, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_conversations(str(file))
    with pytest.raises(FileNotFoundError, match="there are no data"):
        open_conversations(str(tmp_path / "nowhere"))


def test_held_out_rows_are_the_same_ones_for_a_seed_and_are_not_learned(tmp_path):
    rows = open_conversations(str(write_data(tmp_path)))
    learn, held = rows.split(0.25, 1)
    assert (len(learn), len(held)) == (6, 2)
    assert sorted([*learn.numbers, *held.numbers]) == list(range(8))
    assert rows.split(0.25, 1)[1].numbers == held.numbers
    assert any(rows.split(0.25, seed)[1].numbers != held.numbers for seed in range(2, 6))
    assert rows.split(0, 1) == (rows, None)
    with pytest.raises(ValueError, match=r"evaluation_share=0\.01 of 8 rows is none"):
        rows.split(0.01, 1)


def test_a_step_is_divided_among_processes_and_devices():
    assert split_batch(128, 8, None) == (16, 1)
    assert split_batch(128, 1, 4) == (4, 32)
    assert split_batch(12, 1, None) == (12, 1)
    assert split_batch(34, 1, None) == (2, 17)
    with pytest.raises(ValueError, match="batch_size=10 on 4 processes; allowed: multiples of 4"):
        split_batch(10, 4, None)
    with pytest.raises(ValueError, match="device_batch_size=3 of 8 conversations"):
        split_batch(8, 1, 3)


def test_presets_are_llavas_two_stages():
    assert {"llava-1.5-stage-1", "llava-1.5-stage-2", "lvpruning"} <= set(preset_names())
    first, second = load_preset("llava-1.5-stage-1"), load_preset("llava-1.5-stage-2")
    assert (first.learning_rate, first.batch_size, first.trains) == (1e-3, 256, ("connector", "projector"))
    assert (second.learning_rate, second.batch_size) == (2e-5, 128)
    assert second.trains == ("connector", "projector", "language_model")
    for preset in (first, second):
        assert (preset.warmup_ratio, preset.scheduler, preset.weight_decay, preset.epochs) == (0.03, "cosine", 0.0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ("tower",)}, "trains=.*; allowed: some of connector, projector, language_model, pruner"),
        ({"learning_rate": 0}, "learning_rate=0; allowed: a number above 0"),
        ({"batch_size": 1.5}, "batch_size=1.5; allowed: a whole number of at least 1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0; allowed"),
        ({"scheduler": "steps"}, "scheduler='steps'; allowed: cosine"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"pruner_learning_rate": -1}, "pruner_learning_rate=-1; allowed: a number above 0, or None"),
    ],
    ids=str,
)
def test_a_bad_preset_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Preset(**{"trains": ("projector",), "learning_rate": 1e-3, "batch_size": 2} | changes)


def test_a_preset_of_ones_own_is_a_file(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"trains": ["projector"], "learning_rate": 0.1, "batch_size": 2}))
    assert load_preset(str(file)).learning_rate == 0.1
    file.write_text(json.dumps({"trains": ["projector"], "rate": 0.1}))
    with pytest.raises(ValueError, match="is no preset: it needs trains"):
        load_preset(str(file))
    with pytest.raises(
        ValueError, match=r"there is no preset 'stage-3'; allowed: a file, or one of .*llava-1\.5-stage-1"
    ):
        load_preset("stage-3")


@pytest.mark.parametrize("nothing", [None, "", [], [None], {"bytes": None, "path": None}])
def test_a_field_without_a_picture_leaves_the_other_to_hold_it(nothing, tmp_path):
    both = {"image": nothing, "images": ["a.png"], "conversations": turns("Why?", "So.")}
    assert read_conversation(both, 0, tmp_path).images == (tmp_path / "a.png",)
    both = {"image": "a.png", "images": nothing, "conversations": turns("Why?", "So.")}
    assert read_conversation(both, 0, tmp_path).images == (tmp_path / "a.png",)
    alone = {"image": nothing, "conversations": turns("Why?", "So.")}
    assert read_conversation(alone, 0, tmp_path).images == ()


def test_lists_of_pictures_of_datasets_stay_encoded(tmp_path):
    write_data(tmp_path)
    pictures = [str(tmp_path / "pictures" / f"{number}.png") for number in range(2)]
    rows = [{"images": pictures, "conversations": turns("Why?", "So.")}]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    table.save_to_disk(tmp_path / "saved")
    read = open_conversations(str(tmp_path / "saved"))[0]
    assert [image[:4] for image in read.images] == [b"\x89PNG"] * 2


def test_a_picture_may_be_bytes_or_an_open_picture(tmp_path):
    row = {"conversations": turns("Why?", "So."), "images": [{"bytes": b"..", "path": None}, Image.new("RGB", (2, 2))]}
    read = read_conversation(row, 0, tmp_path)
    assert read.images[0] == b".."
    assert read.messages[0][1].count("<image>") == 2
