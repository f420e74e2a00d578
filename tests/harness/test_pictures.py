"""Pictures as a person sees them, in whatever way a phone, a scanner or a program stored them."""

import io
import os
import warnings

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageOps

from prumerge_fast.errors import PictureError
from prumerge_fast.harness import pictures
from prumerge_fast.harness.pictures import as_seen, read_image

# What undoes each orientation: how a camera held so would have stored an upright scene.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture
def scene():
    """No two of its eight orientations are alike; in blocks, so that it survives compression."""
    image = Image.new("RGB", (96, 64), "navy")
    image.paste("orange", (0, 0, 32, 16))
    image.paste("white", (32, 0, 48, 32))
    return image


def exif(orientation, **others):
    found = Image.Exif()
    found[0x0112] = orientation
    for tag, value in others.items():
        found[int(tag[1:], 16)] = value
    return found.tobytes()


def difference(one, other):
    assert one.size == other.size
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean()


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    "name", ["a.jpg", "a.mpo", "a.png", "a.tif", "a.webp", "a.avif", "a.heic", "a.jfif"]
)
def test_orientation_is_applied(tmp_path, scene, name, orientation):
    pillow_heif.register_heif_opener()
    path = tmp_path / name
    scene.transpose(STORED[orientation]).save(path, exif=exif(orientation), quality=95)
    seen = read_image(path)
    assert seen.mode == "RGB"
    assert difference(seen, scene) < 3


def test_orientation_in_xmp_alone(tmp_path, scene):
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    scene.transpose(STORED[6]).save(tmp_path / "a.webp", xmp=xmp.encode(), lossless=True)
    assert difference(read_image(tmp_path / "a.webp"), scene) == 0


def test_odd_exif_tags_neither_refuse_the_picture_nor_leave_it_lying(tmp_path, scene):
    """Pillow's `exif_transpose` alone raises here: it writes all tags anew."""
    path = tmp_path / "a.jpg"
    block = exif(3, x011A=72.0)  # the resolution, as bytes in place of a fraction
    odd = block.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07")
    scene.rotate(180).save(path, exif=odd, quality=95)
    with Image.open(path) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)
    assert difference(read_image(path), scene) < 3


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0MU\0*\0\0\0\x08", b"Exif\0\0II*\0\xff"]
)
def test_garbled_exif_is_left_out_of_account(tmp_path, scene, block):
    scene.save(tmp_path / "a.webp", exif=block, lossless=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference(read_image(tmp_path / "a.webp"), scene) == 0


def test_exif_that_points_nowhere_makes_no_noise(tmp_path, scene, recwarn):
    block = bytearray(exif(1, x010F="Some Maker of cameras"))
    block[-40:-36] = b"\xff\xff\xff\x7f"
    scene.save(tmp_path / "a.jpg", exif=bytes(block))
    read_image(tmp_path / "a.jpg")
    assert not list(recwarn)


def transparent(mode):
    """Red on the left, and on the right what nobody sees."""
    drawn = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    drawn.paste((255, 0, 0, 255), (0, 0, 4, 4))
    return drawn.convert(mode)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.gif", "a.tga", "a.avif", "a.heic"])
def test_transparency_is_white(tmp_path, name):
    pillow_heif.register_heif_opener()
    transparent("RGBA").resize((64, 32)).save(tmp_path / name)
    seen = read_image(tmp_path / name)
    for place, colour in (((8, 16), RED), ((56, 16), WHITE)):
        assert np.abs(np.subtract(seen.getpixel(place), colour)).max() <= 4


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_transparency_of_every_mode(mode):
    image = transparent("LA" if mode == "La" else "RGBA").convert(mode)
    seen = as_seen(image)
    assert seen.getpixel((6, 1)) == WHITE
    assert seen.getpixel((1, 1)) == (RED if "RGB" in mode else (76, 76, 76))


def test_half_transparent_red_is_pink():
    assert as_seen(Image.new("RGBA", (4, 4), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("PA", (4, 4), (1, 128))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert as_seen(palette).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(
    ("mode", "colour", "key"),
    [("RGB", RED, RED), ("L", 7, 7), ("1", 0, 0), ("P", 1, 1), ("P", 1, b"\xff\x00")],
)
def test_a_colour_that_stands_for_nothing(tmp_path, mode, colour, key):
    image = Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "a.png", transparency=key)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo", "a.avif"])
def test_the_first_frame_of_several(tmp_path, name):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert np.abs(np.subtract(read_image(tmp_path / name).getpixel((9, 9)), RED)).max() <= 4


@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, "a.tif") for mode in ("1", "L", "P", "CMYK", "YCbCr")]
    + [(mode, "a.jpg") for mode in ("1", "L", "CMYK", "YCbCr")],
)
def test_other_kinds_of_pixels(tmp_path, mode, name):
    white = Image.new("RGB", (16, 16), "white").convert(mode)
    white.save(tmp_path / name)
    assert read_image(tmp_path / name).getpixel((8, 8)) == WHITE


def srgb(swapped=False):
    """The bytes of a profile: sRGB, or one whose red is sRGB's blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swapped:
        profile = profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1)
        profile = profile.replace(b"????", b"bXYZ", 1)
    return profile


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_profile(tmp_path, mode):
    image = Image.new("RGB", (16, 16), "red").convert(mode)
    image.save(tmp_path / "a.png", icc_profile=srgb(swapped=True))
    assert (
        np.abs(np.subtract(read_image(tmp_path / "a.png").getpixel((8, 8)), (0, 0, 255))).max() < 3
    )


@pytest.mark.parametrize("profile", [srgb(), b"no profile", srgb()[:200], srgb()[:-1]])
def test_srgb_and_unreadable_profiles_change_nothing(tmp_path, profile):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png", icc_profile=profile)
    assert difference(read_image(tmp_path / "a.png"), noise) == 0


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_profiles_of_another_kind_of_picture_change_nothing(mode):
    image = Image.new("RGB", (16, 16), (10, 200, 30)).convert(mode)
    plain = as_seen(image)
    image.info["icc_profile"] = srgb(swapped=True)
    assert difference(as_seen(image), plain) == 0


def test_cielab_and_the_image_itself_stays():
    lab = ImageCms.createProfile("LAB")
    srgb_ = ImageCms.createProfile("sRGB")
    red = Image.new("RGB", (8, 8), "red")
    image = ImageCms.profileToProfile(red, srgb_, lab, outputMode="LAB")
    before = image.tobytes()
    assert np.abs(np.subtract(as_seen(image).getpixel((4, 4)), RED)).max() < 8
    assert (image.mode, image.tobytes()) == ("LAB", before)


def test_the_given_image_stays(scene):
    image = scene.copy()
    image.info["exif"] = exif(6)
    assert as_seen(image).size == (64, 96)
    assert image.size == (96, 64)
    assert image.info == {"exif": exif(6)}
    assert as_seen(scene).tobytes() == scene.tobytes()


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_more_than_eight_bits(mode):
    with pytest.raises(
        PictureError, match=r"image: expected 8 bits a channel, got the scan \(Pill"
    ):
        as_seen(Image.new(mode, (8, 8)), "the scan")


def test_stretched_and_empty_pictures():
    assert as_seen(Image.new("RGB", (1, 200))).size == (1, 200)
    for size in ((1, 201), (40_000, 100), (0, 5), (0, 0)):
        with pytest.raises(PictureError, match="expected a side at most 200 times the other, got "):
            as_seen(Image.new("RGB", size))


def test_what_is_wrong_with_a_file(tmp_path, scene, monkeypatch):
    def says(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PictureError) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in caught.value.says
        return caught.value.says

    assert "expected an image file" in says("empty.jpg", b"")
    assert "which is empty" in says("empty.jpg", b"")
    assert "unknown format" in says("._a.jpg", b"\0\5\x16\7")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(PictureError, match=r"folder\.jpg"):
        read_image(tmp_path / "folder.jpg")
    with pytest.raises(PictureError, match="expected an existing file"):
        read_image(tmp_path / "gone.jpg")
    stored = io.BytesIO()
    scene.save(stored, "PNG")
    for cut in (40, 60, len(stored.getvalue()) // 2):
        assert "expected" in says("cut.png", stored.getvalue()[:cut])
    heic = io.BytesIO()
    pillow_heif.register_heif_opener()
    scene.save(heic, "HEIF")
    monkeypatch.setattr(pictures, "_register_heif", lambda: False)
    with monkeypatch.context() as without:
        without.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
        for name in ("IMG_1.HEIC", "sent.jpg"):  # phones and messengers rename
            message = says(name, heic.getvalue())
            assert "HEIC needs pillow-heif: pip install pillow-heif" in message


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.avif", "a.heic"])
def test_garbled_files_raise_nothing_else(tmp_path, scene, name):
    pillow_heif.register_heif_opener()
    scene.save(tmp_path / name)
    good = (tmp_path / name).read_bytes()
    generator = np.random.default_rng(7)
    for _ in range(60):
        content = bytearray(good)
        for place in generator.integers(0, len(good), 4):
            content[place] = generator.integers(0, 256)
        (tmp_path / name).write_bytes(content[: generator.integers(1, len(good))])
        try:
            read_image(tmp_path / name)
        except PictureError:
            continue


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes of that kind")
def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    with pytest.raises(PictureError, match=r"expected an existing file, got .*pipe\.jpg"):
        read_image(path)
