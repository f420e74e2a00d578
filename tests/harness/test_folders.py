"""Which files of a folder are asked about."""

import pytest
from PIL import Image, features

from prumerge_fast.errors import InputError
from prumerge_fast.harness import pictures
from prumerge_fast.harness.folders import find_images, find_videos


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "elsewhere" / "picture.png"
    path.parent.mkdir()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    return path


def fill(folder, picture, *names):
    for name in names:
        (folder / name).write_bytes(picture.read_bytes())


def names(found):
    return [path.name for path in found.files]


def test_folders_give_their_images_by_name(folder, picture):
    (folder / "folder.png").mkdir()
    fill(folder, picture, "b.JPG", "a.png", "notes.txt")
    found = find_images([folder, picture])
    assert names(found) == ["a.png", "b.JPG", "picture.png"]
    assert found.remark() == ""


def test_every_suffix_of_a_photograph(folder, picture):
    taken = ["bmp", "dib", "gif", "heic", "heif", "hif", "jfif", "jpe", "jpeg", "jpg", "mpo"]
    taken += ["png", "apng", "tif", "tiff", "webp"]
    taken += ["avif"] * features.check("avif")
    fill(folder, picture, *(f"a.{suffix}" for suffix in taken))
    fill(folder, picture, "B.HEIC", "B.JFIF", "B.Jpe")
    assert sorted(names(find_images([folder]))) == sorted(
        [*(f"a.{suffix}" for suffix in taken), "B.HEIC", "B.JFIF", "B.Jpe"]
    )


def test_what_systems_leave_beside_pictures(folder, picture):
    fill(folder, picture, "a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "~$b.png")
    fill(folder, picture, "IMG_1.AAE", "IMG_1.MOV", ".c.jpg", "d.jpg.json", "e.tmp", "Icon\r")
    fill(folder, picture, ".IMG_2.HEIC.icloud", "ehthumbs.db", "f.jpg.part", "Picasa.ini")
    (folder / "__MACOSX").mkdir()
    fill(folder / "__MACOSX", picture, "._a.jpg")
    found = find_images([folder])
    assert (names(found), found.remark()) == (["a.jpg"], "")
    with pytest.raises(InputError, match=r"which holds none$"):
        find_images([folder / "__MACOSX"])


def test_a_file_by_name_is_never_skipped(folder, picture):
    fill(folder, picture, "._a.jpg", "notes.txt", "a.dng")
    given = [folder / "._a.jpg", folder / "notes.txt", folder / "a.dng"]
    assert find_images(given).files == given


def test_pictures_that_cannot_be_read_are_named(folder, picture, monkeypatch):
    monkeypatch.setattr(pictures, "_register_heif", lambda: False)
    fill(folder, picture, "a.jpg", "b.HEIC", "c.heic", "d.heic", "e.heic", "f.dng", "g.svg")
    (folder / "h.jpg").symlink_to(folder / "gone.jpg")
    found = find_images([folder])
    assert names(found) == ["a.jpg"]
    assert found.remark() == (
        "skipped: b.HEIC, c.heic, d.heic and 1 more (.heic needs pillow-heif: pip install "
        "pillow-heif); f.dng (.dng is not supported); g.svg (.svg is not supported); "
        "h.jpg (no file, or a link to none)"
    )
    (folder / "a.jpg").unlink()
    with pytest.raises(
        InputError, match=r"which holds none; skipped: b\.HEIC.* pip install pillow"
    ):
        find_images([folder])


def test_empty_folder_and_missing_path(tmp_path):
    with pytest.raises(InputError, match=r"--images: expected a folder with images .* holds none"):
        find_images([tmp_path])
    with pytest.raises(InputError, match=r"--images: expected an existing file or folder"):
        find_images([tmp_path / "gone"])


def test_videos_of_phones_cameras_and_windows(folder):
    taken = ["a.3gp", "b.MTS", "c.wmv", "d.mpg", "e.MOV", "f.mp4", "g.m2ts"]
    for name in (*taken, "._f.mp4", "notes.txt", "f.THM", "g.jpg"):
        (folder / name).write_bytes(b"")
    (folder / "h.mp4").symlink_to(folder / "gone.mp4")
    (folder / "i.mp4").mkdir()
    found = find_videos([folder])
    assert names(found) == taken
    assert found.remark() == "skipped: h.mp4 (no file, or a link to none)"


def test_folders_in_folders(folder, picture):
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for place in (folder, folder / "b", folder / "b" / "c", folder / ".hidden"):
        fill(place, picture, "a.png")
    found = find_images([folder], deep=True)
    assert [str(path.relative_to(folder)) for path in found.files] == [
        "a.png",
        "b/a.png",
        "b/c/a.png",
    ]
    assert found.remark() == ""
    assert names(find_images([folder])) == ["a.png"]


def test_links_to_folders_are_named(folder, picture):
    """They may lead anywhere, and back: nothing in them is asked about."""
    fill(folder, picture, "a.png")
    (folder / "loop").symlink_to(folder)
    (folder / "more").symlink_to(picture.parent)
    found = find_images([folder], deep=True)
    assert names(found) == ["a.png"]
    assert found.remark() == "skipped: loop, more (a link to a folder)"
