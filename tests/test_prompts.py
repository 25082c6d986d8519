"""Images and prompts: equal to transformers' own preparation, kind to files, exact in templates."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import prompts
from dream_engine import LMM
from prompts import PatchConfig, apply_task, collate, image_patches, interleave, read_image

SIZES = [(28, 28), (64, 64), (70, 42), (1, 1), (37, 200), (640, 480), (333, 777), (1204, 812)]
SIZES += [(56, 57), (14, 150), (999, 31), (1500, 8)]


def random_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 9), max(1, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch, most", [(14, 512 * 28 * 28), (14, 1280 * 28 * 28), (8, 64 * 64)])
def test_patches_equal_transformers_bit_for_bit(size, patch, most):
    image = random_image(*size)
    config = PatchConfig(patch, 2, 56 * 56, most)
    size = {"shortest_edge": 56 * 56, "longest_edge": most}
    reference = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size)(
        image, return_tensors="pt"
    )
    patches, grid = image_patches(image, config)
    assert torch.equal(patches, reference["pixel_values"])
    assert [list(grid)] == reference["image_grid_thw"].tolist()


def test_extreme_aspect_ratios_are_refused():
    with pytest.raises(ValueError, match="200 times"):
        image_patches(Image.new("RGB", (2010, 10)))


@pytest.mark.parametrize("grids", [[], [(1, 4, 6)], [(1, 4, 6), (1, 4, 4)], [(1, 2, 8), (1, 6, 2)]])
def test_mrope_positions_equal_transformers(grids):
    ids, kinds = [1, 2], [0, 0]
    for _, h, w in grids:
        ids += [3, *[4] * (h * w // 4), 5, 1]
        kinds += [0, *[1] * (h * w // 4), 0, 0]
    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig())
    expected, _ = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.ones(1, len(ids)),
    )
    assert torch.equal(prompts.mrope_positions(torch.tensor(kinds).bool(), grids), expected[:, 0])


# ---- files --------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.paste((255, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png")
    assert read.size == (4, 8)
    assert read.getpixel((1, 1)) == (255, 0, 0) and read.getpixel((1, 6)) == (255, 255, 255)


def test_transparency_is_seen_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (2, 2), (0, 128)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == (127, 127, 127)


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.gif", transparency=1)
    read = read_image(tmp_path / "a.gif")
    assert read.getpixel((0, 0)) == (0, 0, 255) and read.getpixel((1, 0)) == (255, 255, 255)


def test_cmyk_and_one_bit(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    r, g, b = read_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert r > 220 and g < 40 and b < 40
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_keep_their_gray(tmp_path):
    levels = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def damaged(folder):
    random_image(64, 64).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image at all")


@pytest.mark.parametrize("name", ["truncated", "empty", "text"])
def test_damaged_files_are_named(tmp_path, name):
    damaged(tmp_path)
    with pytest.raises(ValueError, match=f"{name}.png"):
        read_image(tmp_path / f"{name}.png")


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such image"):
            read_image(path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    random_image(64, 64).save(tmp_path / "bomb.png")
    for limit in (3000, 100):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="too large"):
            read_image(tmp_path / "bomb.png")


# ---- prompts ------------------------------------------------------------------------------------

A, B = random_image(16, 16, 1), random_image(16, 16, 2)


def test_interleave_fills_placeholders_in_order():
    assert interleave("a <image> and <image>", [A, B]) == ["a ", A, " and ", B]
    assert interleave("<image>", [A]) == [A]
    for images in ([], [A, B]):
        with pytest.raises(ValueError, match="placeholder"):
            interleave("one <image>", images)


@pytest.mark.parametrize(
    "task, prompt, positive, null",
    [
        ("t2i", ["p"], ["Generate Image: ", "p"], ["Generate Image: "]),
        (None, "p", ["Generate Image: ", "p"], ["Generate Image: "]),
        ("i2i", [A], ["Copy Image: ", A], ["Copy Image: "]),
        (
            "edit",
            [A, "p"],
            ["Edit image ", A, " following:", "p"],
            ["Edit image ", A, " following:"],
        ),
        (
            "combine",
            ["a dog ", A, ", a hat", B, " p"],
            ["Combine the objects: ", "a dog", A, ", ", "a hat", B]
            + [" and generate an image following: ", "p"],
            ["Combine the objects: ", "a dog", A, ", ", "a hat", B]
            + [" and generate an image following: "],
        ),
        (
            "combine",
            ["a dog", A, ", a hat", B, ", a car ", A, "they meet"],
            ["Combine the objects: ", "a dog", A, ", ", "a hat", B, ", ", "a car", A]
            + [" and generate an image following: ", "they meet"],
            ["Combine the objects: ", "a dog", A, ", ", "a hat", B, ", ", "a car", A]
            + [" and generate an image following: "],
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
    "task, prompt",
    [("t2i", [" "]), ("t2i", ["p", A]), ("edit", ["p"]), ("edit", [A, B, "p"]), ("i2i", [A, "p"])]
    + [("i2i", []), ("objects", ["p"]), ("objects", [A]), ("combine", ["p"]), ("draw", ["p"])],
)
def test_prompts_that_do_not_fit_their_task_are_refused(task, prompt):
    with pytest.raises(ValueError):
        apply_task(task, prompt)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LMM)


SMALL = PatchConfig(8, 2, 16 * 16, 64 * 64)


def test_special_tokens_in_text_are_plain_text(tokenizer):
    text = "a <|image_pad|> and <|im_end|> and <|endoftext|>"
    batch = collate([[text]], tokenizer, SMALL)
    assert not set(batch.ids[0].tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(batch.ids[0]) == text
    assert not batch.image_mask.any()


def test_rows_are_the_official_string_tokenized(tokenizer):
    wide = random_image(32, 16)
    batch = collate([["Edit image ", wide, " following:", "make it red"]], tokenizer, SMALL)
    vision = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    expected = tokenizer.encode(f"Edit image {vision} following:make it red")
    assert batch.ids[0].tolist() == expected
    assert batch.image_mask.sum() == 2 and batch.grids.tolist() == [[1, 2, 4]]


def test_batches_are_padded_on_the_right(tokenizer):
    prompts = [["a red circle"], ["a ", A, " and ", B], ["ring"]]
    batch = collate(prompts, tokenizer, SMALL)
    for i, prompt in enumerate(prompts):
        alone = collate([prompt], tokenizer, SMALL)
        n = alone.ids.shape[1]
        assert torch.equal(batch.ids[i, :n], alone.ids[0])
        assert torch.equal(batch.positions[:, i, :n], alone.positions[:, 0])
        assert batch.mask[i].sum() == n and batch.mask[i, :n].all()
    assert len(batch.patches) == 8 and len(batch.grids) == 2


def test_plain_positions_count_every_token(tokenizer):
    batch = collate([["a ", A]], tokenizer, SMALL, mrope=False)
    assert torch.equal(batch.positions[1, 0], torch.arange(batch.ids.shape[1]))


def test_pixels_go_to_tensors_and_back():
    (back,) = prompts.to_images(prompts.to_tensor([A]))
    assert np.array_equal(np.asarray(back), np.asarray(A))
