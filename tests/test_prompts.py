"""Images of many formats; prompts in exactly the official templates."""

import numpy as np
import pytest
from PIL import Image

import prompts
from prompts import apply_task, interleave, read_image
from support.cli import UserError


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


def test_sixteen_bit_gray_is_scaled_to_eight_bits(tmp_path):
    levels = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


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
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such image"):
            read_image(path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    random_image(64, 64).save(tmp_path / "bomb.png")
    for limit in (3000, 100):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="exceeds limit of"):
            read_image(tmp_path / "bomb.png")


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
