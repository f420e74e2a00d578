"""A picture as a person sees it: upright, on white, in the colours that it was taken in."""

from __future__ import annotations

import importlib.util
import io
import warnings
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features

from prumerge_fast.errors import PictureError

HEIF = "HEIF"  # as pillow-heif calls the format of .heic files
NEEDS = {HEIF: "needs pillow-heif: pip install pillow-heif", "AVIF": "needs Pillow >= 11.3"}

# As a HEIC file says after "ftyp", whatever its name.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # that Pillow may lack
# Of the longer side to the shorter; resized to a model's height, a line of pixels fills the memory.
_MOST_STRETCHED = 200


def read_image(path: Path) -> Image.Image:
    """The picture in a file as a person sees it, in RGB: `as_seen` of its first frame.

    Raises:
        PictureError: There is no such file, or it is no picture that can be decoded, or one that
            `as_seen` refuses.
    """
    _register_heif()
    try:
        if not path.is_file() and not path.is_dir():  # who opens a pipe waits for its other end
            raise PictureError(f"expected an existing file, got {path}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of pictures that are merely large
            with Image.open(path) as image:
                image.load()
                return as_seen(image, path)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"expected an image file, got {path} ({_unidentified(path)})") from None
    except Exception as error:  # decoders raise any for data that ends early or is garbled
        raise PictureError(
            f"expected a readable image, got {path} ({str(error) or type(error).__name__})"
        ) from None


def as_seen(image: Image.Image, name: object = "one") -> Image.Image:
    """The picture as viewers show it, in RGB; `image` stays as it is.

    It is turned as its EXIF orientation says, laid on white where it is transparent, and its
    colours are converted from its ICC profile to sRGB. A profile that cannot be read, or is of
    another kind of picture, is left out of account, as viewers do; so is a garbled EXIF block.

    Args:
        image: Of any of Pillow's modes.
        name: For the error.

    Raises:
        PictureError: It has 16 or 32 bits a channel, no pixels, or is stretched beyond measure.
        Exception: Whatever Pillow raises where the pixels are still to be read and cannot be.
    """
    if image.mode.startswith(("I", "F")):  # Pillow would cut values off, not scale them
        raise PictureError(f"expected 8 bits a channel, got {name} (Pillow's mode {image.mode})")
    if not min(image.size) or max(image.size) > _MOST_STRETCHED * min(image.size):
        raise PictureError(
            f"expected a side at most {_MOST_STRETCHED} times the other, got {name} "
            f"({image.width} x {image.height} pixels)"
        )
    profile = image.info.get("icc_profile")
    grey = image.mode in ("1", "L", "LA", "La")
    upright = _on_white(_upright(image))
    if profile or upright.mode == "LAB":
        upright = _in_srgb(upright.convert("L") if grey else upright, profile)
    return upright.convert("RGB")


def opens(format: str) -> bool:
    """Whether the Pillow that is installed, with its plug-ins, opens a format of this name."""
    if format == HEIF:
        return _register_heif()
    Image.init()
    codec = _CODECS.get(format)
    return format in Image.OPEN and (codec is None or bool(features.check(codec)))


@cache
def _register_heif() -> bool:
    """Has Pillow open HEIC where pillow-heif is installed, and says whether it is."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _unidentified(path: Path) -> str:
    """Why Pillow does not know what is in a file."""
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        return "which is empty"
    if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS and not _register_heif():
        return f"HEIC {NEEDS[HEIF]}"
    return "unknown format"


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # garbled EXIF raises any, and no viewer turns the picture by it
        return image
    if orientation in (None, 1):
        return image
    # With that tag alone: `exif_transpose` writes the others anew and fails where one is odd.
    turned = image.copy()
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        turned.info.pop(name, None)
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(turned)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # which Pillow converts to LA alone
        image = image.convert("LA")
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours that `profile` says, in sRGB; without one, those of CIELAB.

    As it is, where the profile cannot be read or is of another mode, which is an error as well.
    """
    if not features.check("littlecms2"):
        return image
    image = image.convert("RGB") if image.mode in ("P", "RGBX", "YCbCr") else image
    try:
        found = ImageCms.ImageCmsProfile(
            io.BytesIO(profile) if profile else ImageCms.createProfile("LAB")
        )
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, found, srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
