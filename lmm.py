"""Qwen2-VL (arXiv 2409.12191) as Dream Engine uses it: prompts to tokens to hidden states.

Model and tokenizer come from transformers; patches, positions, padding and strict loading are here.
Letters: B batch, L tokens, M width, n image tokens in all rows, P patches of all images.
"""

from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path

from support.cli import UserError, reading

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from checkpoints import build, check_folder, compare, find_part, key_map, read_json, read_tensors
from prompts import to_rgb

VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
PLAIN = {"split_special_tokens": True, "add_special_tokens": False}  # encode all text as text


class Qwen2VL(nn.Module):
    """The LMM with its tokenizer and its rules for patches and positions."""

    def __init__(self, model, tokenizer, patches, mrope=True):
        """model: a transformers Qwen2VLModel. patches: a PatchConfig. mrope: see `collate`."""
        super().__init__()
        self.visual, self.language_model = model.visual, model.language_model
        self.config = model.config
        self.tokenizer, self.patches, self.mrope = tokenizer, patches, mrope

    def collate(self, prompts):
        """Make a Batch of prompts in templates, on the model's device; UserError if too long."""
        batch = collate(prompts, self.tokenizer, self.patches, self.mrope)
        limit = self.config.text_config.max_position_embeddings
        if (length := batch.ids.shape[1]) > limit:
            raise UserError(f"a prompt of {length} tokens: the LMM reads {limit} at most")
        return batch.to(self.language_model.embed_tokens.weight.device)

    def forward(self, batch):
        """A Batch -> last hidden states (B, L, M), after the final norm, and ViT features (n, M).

        The ViT runs once. Its merged features are the LMM's image tokens and the blend's h_ViT.
        """
        embeddings = self.language_model.embed_tokens(batch.ids)
        vit = embeddings.new_zeros(0, embeddings.shape[-1])
        if len(batch.grids):
            vit = self.visual(batch.patches.to(embeddings.dtype), batch.grids).pooler_output
            embeddings[batch.image_mask] = vit
        options = {"attention_mask": batch.mask.long(), "position_ids": batch.positions}
        output = self.language_model(inputs_embeds=embeddings, **options, use_cache=False)
        return output.last_hidden_state, vit


@dataclass(frozen=True)
class PatchConfig:
    """How images are cut for an LMM. Defaults: Qwen2-VL's; max_pixels is the official code's."""

    patch: int = 14  # side of a patch, in pixels
    merge: int = 2  # merge x merge patches become one token
    min_pixels: int = 56 * 56
    max_pixels: int = 512 * 28 * 28  # 512 tokens


CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def image_patches(image, config=PatchConfig()):
    """Cut an RGB image for Qwen2-VL's ViT: patches (n, 3 * 2 * patch * patch), grid (1, gh, gw).

    Bit-equal to transformers' Qwen2VLImageProcessorPil. The sides are resized to whole tokens and
    an area within the limits. Patches that merge into one token are consecutive. Each is stored
    twice, as two video frames. Raises UserError for a side over 200 times the other.
    """
    p, m = config.patch, config.merge
    with reading(f"image of {image.width}x{image.height}", "no side over 200 times the other"):
        h, w = smart_resize(*image.size[::-1], p * m, config.min_pixels, config.max_pixels)
    levels = np.asarray(image.resize((w, h), Image.BICUBIC), np.float64) * (1 / 255)
    x = torch.from_numpy((levels.astype(np.float32) - CLIP_MEAN) / CLIP_STD)
    x = rearrange(x, "(h mh p) (w mw q) c -> (h w mh mw) c p q", mh=m, mw=m, p=p, q=p)
    return repeat(x, "n c p q -> n (c t p q)", t=2), (1, h // p, w // p)


@dataclass
class Batch:
    """Right-padded rows of tokens, and the patches of all their images, row by row."""

    ids: torch.Tensor  # (B, L)
    mask: torch.Tensor  # (B, L) bool, False at padding
    image_mask: torch.Tensor  # (B, L) bool, True at image tokens
    positions: torch.Tensor  # (3, B, L): time, height and width
    patches: torch.Tensor  # (P, 3 * 2 * patch * patch); P = 0 without images
    grids: torch.Tensor  # (images, 3): 1, height and width in patches

    def to(self, device, **options):
        moved = {f.name: getattr(self, f.name).to(device, **options) for f in fields(self)}
        return type(self)(**moved)


def mrope_positions(image_mask, grids, merge=2):
    """Qwen2-VL's rotary positions (M-RoPE) of one prompt: image_mask (L,) bool -> (3, L).

    The three rows are time, height and width. Text counts up in all three. An image token has its
    image's time, its row and its column. Text after an image continues from the largest position.
    """
    parts, start, grids = [], 0, iter(grids)
    for is_image, run in groupby(image_mask.tolist()):
        part = torch.arange(len(list(run))).expand(3, -1)
        if is_image:
            _, h, w = next(grids)
            axes = torch.arange(1), torch.arange(h // merge), torch.arange(w // merge)
            part = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        parts.append(start + part)
        start = parts[-1].max() + 1
    return torch.cat(parts, dim=1)


def collate(prompts, tokenizer, config=PatchConfig(), mrope=True):
    """Tokenize and pad prompts (lists of strings and PIL images, in templates) -> Batch.

    Names of special tokens in a text are encoded as plain text. mrope=False: positions are
    0, 1, 2, ... in all three rows, as in transformers before 4.47.
    """
    start, pad, end = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    rows, patches, grids = [], [], []
    for prompt in prompts:
        ids, first = [], len(grids)
        for is_text, parts in groupby(prompt, lambda part: isinstance(part, str)):
            if is_text:
                ids += tokenizer.encode("".join(parts), **PLAIN)
                continue
            for image in parts:
                x, grid = image_patches(to_rgb(image), config)
                patches.append(x)
                grids.append(grid)
                ids += [start, *[pad] * (len(x) // config.merge**2), end]
        ids = torch.tensor(ids)
        is_image = ids == pad
        positions = torch.arange(len(ids)).expand(3, -1)
        if mrope:
            positions = mrope_positions(is_image, grids[first:], config.merge)
        rows.append((ids, is_image, positions))

    def padded(tensors, value):
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids, image_mask, positions = zip(*rows)
    return Batch(
        ids=padded(ids, tokenizer.pad_token_id or 0),
        mask=padded([torch.ones_like(x, dtype=torch.bool) for x in ids], False),
        image_mask=padded(image_mask, False),
        positions=rearrange(padded([p.T for p in positions], 0), "B L thw -> thw B L"),
        patches=torch.cat(patches) if patches else torch.zeros(0, 6 * config.patch**2),
        grids=torch.tensor(grids).reshape(-1, 3),
    )


RULES = {  # beginning of a name in the file: rules from the model's names to the file's
    "model.language_model.": key_map("*  model.*"),  # saved by transformers since 4.52
    "language_model.": (),  # the same, saved without the output layer
    "model.": key_map("language_model.*  model.*"),  # as published
}


def load_lmm(folder, device="cpu", dtype=torch.float32, mrope=True, checkpoint=None):
    """Load a Qwen2-VL, without its output layer, from its Hugging Face folder.

    checkpoint: a `trained.Checkpoint`; if it has an LMM, its weights replace those of the folder.
    mrope: see `collate`. Raises FileNotFoundError, or UserError naming what does not fit.
    """
    config, tokenizer = read_lmm_config(folder), load_tokenizer(folder)
    options = tokenizer, patch_config(folder, config), mrope
    if checkpoint and checkpoint.lmm:
        tensors, source, prefix = checkpoint.lmm, checkpoint.source, "lmm."
    else:
        tensors, source, prefix = read_tensors(folder), folder, ""
    part = find_part(tensors, source, "Qwen2-VL (model.*)", (prefix,), RULES)
    head = part.tensors.pop(f"{prefix}lm_head.weight", None)  # predicts words: not used
    if head is not None and config.tie_word_embeddings:  # a tied tensor may have only this name
        part.tensors.setdefault(part.names("language_model.embed_tokens.weight")[0], head)
    text, depth = config.text_config.num_hidden_layers, config.vision_config.depth
    layers = part.count("language_model.layers.{}.mlp.up_proj.weight")
    compare(source, {"num_hidden_layers": text}, {"num_hidden_layers": layers})
    compare(source, {"depth": depth}, {"depth": part.count("visual.blocks.{}.attn.proj.weight")})
    entries, rows = max(tokenizer.get_vocab().values()) + 1, config.text_config.vocab_size
    if entries > rows:
        raise UserError(f"{folder}: tokenizer has {entries} entries, but the LMM {rows} embeddings")
    lmm = build(part, lambda: Qwen2VL(Qwen2VLModel(config), *options), device, dtype)
    # Rotary frequencies are computed, not stored. They stay fp32.
    for model, attribute in ((lmm.visual, "rotary_pos_emb"), (lmm.language_model, "rotary_emb")):
        kind = type(getattr(model, attribute))
        setattr(model, attribute, kind(model.config).to(device))
    return lmm


def read_lmm_config(folder):
    """Read the config.json of a Qwen2-VL folder. Raises UserError if it is of another model."""
    check_folder(folder, "Qwen2-VL")
    file = Path(folder, "config.json")
    if (kind := read_json(file).get("model_type")) != "qwen2_vl":
        raise UserError(f"{file}: model_type is {str(kind)[:40]!r}; expected 'qwen2_vl'")
    with reading(file, "the config of a Qwen2-VL"):
        config = Qwen2VLConfig.from_pretrained(folder)
        text, vision = config.text_config, config.vision_config
        sections = text.rope_parameters["mrope_section"]  # no tensor shape shows these
        if 2 * sum(sections) != text.hidden_size // text.num_attention_heads or min(sections) < 0:
            raise ValueError(f"mrope_section must add up to half a head's width, got {sections}")
        if vision.embed_dim % (4 * vision.num_heads):
            raise ValueError(f"{vision.num_heads} heads do not fit embed_dim {vision.embed_dim}")
    return config


def load_tokenizer(folder):
    """Load the tokenizer of a Qwen2-VL folder. Raises UserError if it lacks the vision tokens."""
    check_folder(folder, "Qwen2-VL")
    with reading(folder, "the tokenizer of a Qwen2-VL"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.encode("a", **PLAIN):
            raise ValueError("it encodes no letters; is there a tokenizer.json?")
        [tokenizer.get_vocab()[token] for token in VISION_TOKENS]  # KeyError if one is missing
    return tokenizer


def patch_config(folder, config=None):
    """Read the PatchConfig of a Qwen2-VL folder; max_pixels does not exceed the default."""
    vision = (config or read_lmm_config(folder)).vision_config
    patches = PatchConfig(vision.patch_size, vision.spatial_merge_size)
    file = Path(folder, "processor_config.json")  # of transformers 5
    stated = read_json(file).get("image_processor") if file.exists() else None
    if stated is None:
        file = Path(folder, "preprocessor_config.json")
        stated = read_json(file) if file.exists() else {}
    with reading(file, "the image sizes of a Qwen2-VL"):
        size = stated.get("size") or {}  # transformers 5 calls these areas edges
        low = stated.get("min_pixels") or size.get("shortest_edge") or patches.min_pixels
        high = stated.get("max_pixels") or size.get("longest_edge") or patches.max_pixels
        if not 0 < low <= high:
            raise ValueError(f"expected 0 < min_pixels <= max_pixels, got {low!r} and {high!r}")
    high = min(high, patches.max_pixels)
    return replace(patches, min_pixels=min(low, high), max_pixels=high)
