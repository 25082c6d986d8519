"""Images of many formats; prompts in exactly the official templates."""

import os
import struct

from support.cli import UserError

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

import prompts
from prompts import apply_task, interleave, read_image


def random_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 9), max(1, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


# ---- images -------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.paste((255, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png")
    assert read.size == (4, 8)
    assert read.getpixel((1, 1)) == (255, 0, 0) and read.getpixel((1, 6)) == (255, 255, 255)


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (2, 2), (0, 128)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == (127, 127, 127)


def test_a_transparent_palette_color_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.gif", transparency=1)
    read = read_image(tmp_path / "a.gif")
    assert read.getpixel((0, 0)) == (0, 0, 255) and read.getpixel((1, 0)) == (255, 255, 255)


def test_cmyk_and_one_bit_images_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    r, g, b = read_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert r > 220 and g < 40 and b < 40
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize(
    "levels, expected",
    [([0, 32768, 65535], [0, 128, 255]), ([200, 200, 200], [1, 1, 1]), ([0, 1, 128], [0, 0, 0])],
)
def test_sixteen_bit_gray_is_scaled_by_its_whole_range(name, levels, expected, tmp_path):
    Image.fromarray(np.array([levels], np.uint16)).save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert [read.getpixel((x, 0)) for x in range(3)] == [(x, x, x) for x in expected]


@pytest.mark.parametrize(
    "kind, top", [(np.float32, 1), (np.float32, 255), (np.int32, 255), (np.int32, 65535)]
)
def test_the_range_of_32_bit_gray_is_guessed(kind, top, tmp_path):
    Image.fromarray(np.array([[0, top]], kind)).save(tmp_path / "a.tif")
    read = read_image(tmp_path / "a.tif")
    assert [read.getpixel((x, 0))[0] for x in range(2)] == [0, 255]


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf])
def test_levels_that_are_not_finite_are_refused(level, tmp_path):
    Image.fromarray(np.array([[0.5, level]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: .*levels that are NaN or infinite"):
        read_image(tmp_path / "a.tif")


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_damaged_files_are_named(tmp_path):
    random_image(64, 64).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an image at all"):
        (tmp_path / "damaged.png").write_bytes(content)
        with pytest.raises(UserError, match="damaged.png"):
            read_image(tmp_path / "damaged.png")


def test_missing_files_and_folders_are_named(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("none.png", "a\0b.png", "fifo.png", ""):
        path = tmp_path / name
        with pytest.raises(FileNotFoundError, match="no such image"):
            read_image(path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    random_image(64, 64).save(tmp_path / "bomb.png")
    for limit in (3000, 100):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="exceeds limit of"):
            read_image(tmp_path / "bomb.png")


def test_a_photograph_of_200_megapixels_is_read(tmp_path):
    width, height = 16320, 12240
    image = Image.new("1", (width, height), 1)
    image.putpixel((width - 1, height - 1), 0)
    image.save(tmp_path / "a.png")
    del image
    read = read_image(tmp_path / "a.png")
    assert read.size == (width, height)
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((width - 1, height - 1)) == (0, 0, 0)


def test_pillow_refuses_larger_pictures_than_its_limit():
    assert 200e6 < Image.MAX_IMAGE_PIXELS < 300e6


@pytest.mark.parametrize("zipped", [False, True])
def test_a_png_with_megabytes_of_text_is_read(zipped, tmp_path):
    about = PngInfo()
    about.add_text("workflow", "a" * 3_000_000, zip=zipped)
    random_image(8, 8).save(tmp_path / "a.png", pnginfo=about)
    assert read_image(tmp_path / "a.png").tobytes() == random_image(8, 8).tobytes()
    for i in range(22):
        about.add_text(f"bomb{i}", "a" * 3_000_000, zip=zipped)
    random_image(8, 8).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(UserError, match="a.png: .*Too much memory used in text chunks"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "exif", [b"broken", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"\0"]
)
def test_a_broken_exif_chunk_is_ignored(exif, tmp_path):
    random_image(8, 4).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    assert read_image(tmp_path / "a.png").tobytes() == random_image(8, 4).tobytes()
    with Image.open(tmp_path / "a.png") as image:
        assert prompts.upright_size(image) == (8, 4)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_every_orientation_is_applied_once(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    random_image(24, 16).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        expected = ImageOps.exif_transpose(image)
    read = read_image(tmp_path / name)
    assert read.tobytes() == expected.tobytes() and read.size == expected.size
    assert prompts.to_rgb(read).tobytes() == expected.tobytes()
    with Image.open(tmp_path / name) as image:
        assert prompts.upright_size(image) == read.size


def icc(swapped=True):
    """sRGB's profile; swapped: with red's primary in the place of green's, and the reverse."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if not swapped:
        return profile
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def test_an_icc_profile_is_converted_to_srgb_once(tmp_path):
    image = Image.new("RGB", (2, 1), (250, 30, 60))
    for name in ("a.png", "a.tif", "a.webp"):
        image.save(tmp_path / name, icc_profile=icc(), lossless=True)
        read = read_image(tmp_path / name)
        assert np.abs(np.subtract(read.getpixel((0, 0)), (30, 250, 60))).max() <= 1
        assert prompts.to_rgb(read).tobytes() == read.tobytes()
    image.putalpha(Image.new("L", (2, 1), 0))
    image.putpixel((1, 0), (250, 30, 60, 255))
    image.save(tmp_path / "a.png", icc_profile=icc())
    read = read_image(tmp_path / "a.png")
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(read.getpixel((1, 0)), (30, 250, 60))).max() <= 1


@pytest.mark.parametrize("profile", [icc(swapped=False), b"broken", icc()[:200]])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "CMYK", "P"])
def test_profiles_of_srgb_and_broken_ones_change_nothing(profile, mode, tmp_path):
    name = "a.tif" if mode == "CMYK" else "a.png"
    random_image(16, 16).convert(mode).save(tmp_path / name)
    expected = read_image(tmp_path / name)
    random_image(16, 16).convert(mode).save(tmp_path / name, icc_profile=profile)
    assert read_image(tmp_path / name).tobytes() == expected.tobytes()


def test_a_gray_profile_is_applied_to_gray():
    """Gamma 1: the level 55 of 255 is the sRGB level 128."""
    curve, white = b"curv" + bytes(8), struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)
    tags = [(b"kTRC", 156, curve), (b"wtpt", 168, white)]
    table = b"".join(struct.pack(">4sII", name, at, len(data)) for name, at, data in tags)
    head = struct.pack(">I4xI4s4s4s", 188, 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    profile = head + struct.pack(">I", 2) + table + curve + white
    image = Image.new("L", (1, 1), 55)
    image.info["icc_profile"] = profile
    assert abs(prompts.to_rgb(image).getpixel((0, 0))[0] - 128) <= 1


def test_postscript_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    (tmp_path / "dog.png").write_text(text)
    with pytest.raises(
        UserError, match="dog.png: expected a whole PNG, JPEG or similar file, one of AVIF"
    ):
        read_image(tmp_path / "dog.png")


@pytest.mark.parametrize("name", ["a.avif", "a.bmp", "a.gif", "a.jpg", "a.jp2", "a.mpo", "a.png", "a.ppm",
                                  "a.tif", "a.webp"])  # fmt: skip
def test_the_usual_formats_are_read(name, tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / name)
    assert (
        np.abs(np.subtract(read_image(tmp_path / name).getpixel((8, 8)), (200, 40, 40))).max() < 5
    )


# ---- prompts ------------------------------------------------------------------------------------

A, B = random_image(16, 16, 1), random_image(16, 16, 2)


def test_interleave_fills_placeholders_in_order():
    assert interleave("a <image> and <image>", [A, B]) == ["a ", A, " and ", B]
    assert interleave("<image>", [A]) == [A]
    for images in ([], [A, B]):
        with pytest.raises(UserError, match="placeholder"):
            interleave("one <image>", images)


EDIT = ["Edit image ", A, " following:"]
DOG_AND_HAT = ["Combine the objects: ", "a dog", A, ", ", "a hat", B]
END = " and generate an image following: "


@pytest.mark.parametrize(
    "task, prompt, positive, null",
    [
        ("t2i", ["p"], ["Generate Image: ", "p"], ["Generate Image: "]),
        (None, "p", ["Generate Image: ", "p"], ["Generate Image: "]),
        ("i2i", [A], ["Copy Image: ", A], ["Copy Image: "]),
        ("edit", [A, "p"], [*EDIT, "p"], EDIT),
        (
            "combine",
            ["a dog ", A, ", a hat", B, " p"],
            [*DOG_AND_HAT, END, "p"],
            [*DOG_AND_HAT, END],
        ),
        (
            "combine",
            ["a dog", A, ", a hat", B, ", a car ", A, "they meet"],
            [*DOG_AND_HAT, ", ", "a car", A, END, "they meet"],
            [*DOG_AND_HAT, ", ", "a car", A, END],
        ),
        (
            "objects",
            [A, " and ", B, ", then ", A],
            ["Generate Image: ", A, " and ", B, ", then ", A],
            ["Generate Image: ", "and , then"],
        ),
        (
            "objects",
            [" a ", A, " by ", B, " "],
            ["Generate Image: ", "a ", A, " by ", B, ""],
            ["Generate Image: ", "a  by"],
        ),
    ],
)
def test_templates_are_the_official_ones(task, prompt, positive, null):
    assert apply_task(task, prompt) == (positive, null)


@pytest.mark.parametrize(
    "task, prompt, message",
    [
        ("t2i", [" "], "empty prompt: task t2i needs some text"),
        ("t2i", ["p", A], "task t2i takes no image, got 1"),
        ("edit", ["p"], "task edit takes one image, got 0"),
        ("edit", [A, B, "p"], "task edit takes one image, got 2"),
        ("i2i", [A, "p"], "takes no text"),
        ("i2i", [], "task i2i takes one image, got 0"),
        ("objects", ["p"], "task objects takes at least one image"),
        ("objects", [A], "empty prompt: task objects needs some text"),
        ("combine", ["p"], "task combine takes at least one image"),
        ("draw", ["p"], "unknown task 'draw': expected one of t2i, i2i, edit, combine, objects"),
        ("t2i", ["caf\udce9"], "half a letter"),
        ("t2i", ["p", 3], "a list of strings and PIL images"),
    ],
)
def test_prompts_that_do_not_fit_their_task_are_refused(task, prompt, message):
    with pytest.raises(UserError, match=message):
        apply_task(task, prompt)


def test_pixels_go_to_tensors_and_back():
    (back,) = prompts.to_images(prompts.to_tensor([A]))
    assert np.array_equal(np.asarray(back), np.asarray(A))
