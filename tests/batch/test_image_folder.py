"""A folder of images: every picture in it and below gets a row, and what is no picture is counted."""

import json
import os
import shutil
import sys
import zipfile

import pytest
from PIL import Image

import ivtp_cli
from modeling_ivtp.batch.data import open_data
from tests.support.batches import QUESTIONS, alone, answers, arguments, write_rows


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), "red").save(path, format="PNG")
    return path


def opened(folder, **options):
    return open_data(str(folder), **{"prompt": "What?", "prompt_column": None} | options)


def places(folder, **options):
    """The pictures of a folder's rows, relative to it."""
    data = opened(folder, **options)
    return [os.path.relpath(image, folder) for row in data.rows(0, len(data)) for image in row.images]


def test_linked_folders_are_read_once_and_links_in_a_circle_end(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    picture(folder / "real" / "0.png")
    picture(elsewhere / "1.png")
    picture(elsewhere / "deep" / "2.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to("real")
    (folder / "circle").symlink_to("circle")
    (elsewhere / "deep" / "back").symlink_to(folder)
    (elsewhere / "other").symlink_to(elsewhere / "deep")
    assert places(folder) == ["linked/1.png", "linked/deep/2.png", "real/0.png"]
    # One that leads nowhere is counted, unless it is called like a picture; then it is a row, and an error.
    assert "left out 1 file that is not a picture (1 with no ending)" in opened(folder).left_out
    (folder / "gone.png").symlink_to("nowhere.png")
    assert places(folder)[0] == "gone.png"


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_is_an_error_row(capsys, sample, loaded, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(sample.root / "pictures/0.png", folder / "a.png")
    (folder / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "c.png").symlink_to("nowhere.png")
    (folder / "d.svg").write_text("<svg/>")
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", "--prompt", QUESTIONS[1], data=folder)) == 0
    assert capsys.readouterr().err == ""
    sound, heic, gone, drawing = answers(tmp_path / "out")
    assert sound["answer"] == alone(sample, {"image": ["pictures/0.png"], "question": QUESTIONS[1]})[0]
    assert heic["error"].startswith(f"row 1: {folder}/b.HEIC is not an image in a known format")
    assert gone["error"] == f"row 2: there is no image '{folder}/c.png'"
    assert drawing["error"].startswith(f"row 3: {folder}/d.svg is not an image in a known format")


@pytest.mark.slow
def test_what_is_no_picture_is_counted_in_one_warning(capsys, sample, loaded, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    picture(folder / "a.png")
    picture(folder / "5f0c1a")  # as caches name them
    (folder / "a.json").write_text('{"taken": "2024-05-01"}')
    (folder / "notes.txt").write_text("of a holiday")
    (folder / "README").write_text("more notes")
    (folder / ".hidden.txt").write_text("nobody minds")
    picture(folder / "private" / "b.png")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    options = ["--prompt", QUESTIONS[1], "--limit", 2]
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", *options, data=folder)) == 0
    assert capsys.readouterr().err == (
        f"ivtp: warning: {folder}: left out 3 files that are not pictures (1 with .json, 1 with .txt, 1 with no "
        "ending) and 1 folder that cannot be read, such as private\n"
    )
    assert [row["error"] for row in answers(tmp_path / "out")] == [None, None]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "content",
    [
        {"title": "IMG_2.jpg", "taken": {"timestamp": "1"}},
        {"images": [{"file_name": "0.png"}], "annotations": []},
        [{"id": 1, "caption": "a dog"}],
        "x",
    ],
)
def test_json_files_do_not_hide_the_pictures(tmp_path, content, count):
    """Neither what cameras and labelling tools leave beside pictures, nor more of it than there are pictures."""
    for number in range(2):
        picture(tmp_path / f"{number}.png")
    for number in range(count):
        (tmp_path / f"{number}.json").write_text(json.dumps(content, indent=None if number else 2))
    (tmp_path / "labels.csv").write_text("name,label\n0.png,dog\n")
    assert places(tmp_path) == ["0.png", "1.png"]
    assert f"{count} with .json" in opened(tmp_path).left_out


def test_a_table_beside_its_pictures_is_read(tmp_path):
    """It has the column of images; `datasets` would take whatever there is more of."""
    rows = [{"image": "pictures/1.png", "question": "Why?"}]
    for number in range(3):
        picture(tmp_path / "pictures" / f"{number}.png")
    write_rows(tmp_path / "rows.jsonl", rows)
    (row,) = opened(tmp_path, prompt=None, prompt_column="question").rows(0, 9)
    assert (row.images, row.question) == ((str(tmp_path / "pictures/1.png"),), "Why?")
    (tmp_path / "rows.jsonl").rename(tmp_path / "rows.txt")
    (tmp_path / "rows.csv").write_text("image,question\npictures/2.png,Who?\n")
    (row,) = opened(tmp_path, prompt=None, prompt_column="question").rows(0, 9)
    assert (row.images, row.question) == ((str(tmp_path / "pictures/2.png"),), "Who?")
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"several tables with a column 'image'; give one of them: rows.csv, rows.js"):
        opened(tmp_path)


ONE_ROW = {
    "metadata": ("metadata.csv", b"file_name,question\na.png,Why?\n"),
    "a table": ("rows.json", b'[{"image": "a.png", "question": "Why?"}]'),
    "paired files": ("a.json", b'{"image": "a.png", "question": "Why?"}'),
}


@pytest.mark.parametrize(("name", "content"), ONE_ROW.values(), ids=ONE_ROW)
def test_pictures_that_no_row_names_are_counted(tmp_path, name, content):
    for picture_name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / picture_name)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("of a holiday")
    assert places(tmp_path) == ["a.png"]
    assert "without a row" not in opened(tmp_path, split="train[:1]").left_out
    left_out = opened(tmp_path).left_out
    assert left_out == (
        f"{tmp_path}: left out 2 pictures without a row, such as b.png and 1 file that is not a picture (1 with .txt)"
    )
    for name in ("b.png", "c.png", "notes.txt"):
        (tmp_path / name).unlink()
    assert opened(tmp_path).left_out is None


def test_files_beside_an_archive_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "inside/z.png")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert len(opened(tmp_path)) == 2
    assert opened(tmp_path).left_out == f"{tmp_path}: left out 1 file that is not a picture (1 with .csv)"


def test_pictures_of_another_split_are_not_missed(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "a.png")
        (tmp_path / split / "metadata.csv").write_text("file_name,question\na.png,Why?\n")
    assert opened(tmp_path, split="test").left_out is None
    picture(tmp_path / "test" / "b.png")
    assert "1 picture without a row, such as test/b.png" in opened(tmp_path, split="test").left_out


def test_metadata_of_an_image_folder_is_joined_with_its_pictures(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    write_rows(
        tmp_path / "metadata.jsonl", [{"file_name": name, "question": f"{name}?"} for name in ("a.png", "b.png")]
    )
    rows = opened(tmp_path, prompt=None, prompt_column="question").rows(0, 9)
    assert [row.question for row in rows] == ["a.png?", "b.png?"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take such names")
def test_a_name_that_is_no_text_is_a_row_too(capsys, sample, loaded, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(sample.root / "pictures/0.png", os.fsencode(folder) + b"/caf\xe9.png")
    with open(os.fsencode(folder) + b"/d\xe9.png", "wb") as file:
        file.write(b"nothing")
    assert ivtp_cli.main(arguments(sample, tmp_path / "out", "--prompt", QUESTIONS[1], data=folder)) == 0
    sound, damaged = answers(tmp_path / "out")
    assert sound["answer"] == alone(sample, {"image": ["pictures/0.png"], "question": QUESTIONS[1]})[0]
    assert "d\\udce9.png is not an image" in damaged["error"]
