"""What the miniature's text encoder and LMM are taught: words, and what the words are about.

A tokenizer in which every word of the world is one token; labels for linear probes, which ask a
state what it knows about an object; and prompts of every kind with such labels.
"""

import json
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2Tokenizer

import checkpoints
from dream_engine import MINI, Condition
from lmm import VISION_TOKENS, PatchConfig, collate
from mini import world
from prompts import apply_task, reference_prompt

SEED = 0
TEXT_ENCODER = MINI / "text_encoder.safetensors"
PATCHES = PatchConfig(patch=8, merge=2, min_pixels=16 * 16, max_pixels=64 * 64)
PREFIXES = ("", "Generate Image: ", "Copy Image: ", "Edit image ")
PHRASES = (
    "Generate Image: |Copy Image: |Edit image |following: |Combine the objects: |"
    " and generate an image following: |, | change| make| turn| recolor| move| add| remove|"
    " replace| swap| the| into| with| to| from| next| object| objects| color| shape| background|"
    " it| them| keep| then| one| bigger| smaller"
)
CAPTIONS = (*world.TASKS, "scene")
NOUNS = [noun for s in world.SHAPES for noun in (s, s + ("es" if s == "cross" else "s"))]


# by caption: the kind of scene that it describes, and its share among the base's short captions
KINDS = {"single": "single", "colors": "single", "counting": "counting", "scene": "scene"}
SHARES = {"single": 2, "colors": 2, "two": 4, "counting": 5, "position": 6, "attribution": 6}
LATE_SHARES = {"single": 1, "colors": 1, "two": 4, "counting": 8, "position": 5, "attribution": 5}


# ---- words --------------------------------------------------------------------------------------


def train_tokenizer(folder):
    """A byte-level BPE as Qwen2-VL's, but small, with each of the world's words as one token."""
    rng = random.Random(f"{SEED} tokenizer")
    lines = [world.sample_caption(t, rng)[1].text for t in CAPTIONS for _ in range(1000)]
    lines += [
        part + name for part in ("", " ") for name in (*NOUNS, *world.COLORS) for _ in range(99)
    ]
    lines += 99 * PHRASES.split("|")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *VISION_TOKENS, "<|video_pad|>"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer, texts):
    """Texts, each closed by <|endoftext|>, right-padded: ids, mask (B, L)."""
    rows = [torch.tensor(tokenizer.encode(text) + [tokenizer.eos_token_id]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


class TextEncoder(nn.Module):
    """Stands for SD3's three text encoders: a small causal transformer; Qwen2-VL replaces it."""

    def __init__(self, vocabulary, width=128, depth=3):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.layers = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)

    def forward(self, ids, mask):
        """ids, mask (B, L) -> context (B, L, width), pooled (B, width)."""
        n = ids.shape[1]
        x = self.token(ids) + self.position.weight[:n]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        context = self.layers(x, mask=causal) * mask[..., None]
        return context, context.sum(1) / mask.sum(1, keepdim=True)


def load_text_encoder(device="cpu"):
    """The committed text encoder."""
    tensors = checkpoints.read(TEXT_ENCODER)
    encoder = checkpoints.empty(TextEncoder, TEXT_ENCODER, len(tensors["token.weight"]))
    part = checkpoints.Part(tensors, checkpoints.Layout(), TEXT_ENCODER)
    return checkpoints.fill(encoder, part, device, torch.float32)


def encode_text(model, encoder, tokenizer, texts):
    """Texts as SD3 itself is conditioned, through its own (miniature) text encoder -> Condition."""
    ids, mask = (x.to(model.pos_embed.device) for x in tokenize(tokenizer, texts))
    with torch.no_grad():
        context, pooled = encoder(ids, mask)
    txt, vec = model.embed_text(context, pooled)
    return Condition(txt, mask, vec)


def noun_ids(tokenizer):
    return {i for noun in NOUNS for i in tokenizer.encode(noun) + tokenizer.encode(" " + noun)}


def noun_rows(ids, nouns):
    return [i for i, token in enumerate(ids) if token in nouns]


# ---- labels -------------------------------------------------------------------------------------


class Probes(nn.Module):
    """Linear probes for what a state knows about the object that its token names.

    Training with them makes an encoder gather "red", "top left" and "left of the" at the noun, so
    that this one state describes the object, and keep which token it was; then they are thrown
    away. Label 0 is "not said" or "no object".
    """

    NAMES = ("shape", "color", "count", "place", "relation")
    SIZES = (7, 7, 5, 10, 5)

    def __init__(self, width, vocabulary):
        super().__init__()
        self.readouts = nn.ModuleList(nn.Linear(width, n) for n in (*self.SIZES, vocabulary))

    def forward(self, states, labels):
        """states (n, width), labels (n, 5 or 6) -> the sum of each probe's mean cross-entropy."""
        pairs = zip(self.readouts, labels.unbind(1))
        return sum(F.cross_entropy(readout(states), label) for readout, label in pairs)

    def token_loss(self, states, ids):
        """states (n, width), ids (n,) -> the mean cross-entropy of which token each state is of."""
        return F.cross_entropy(self.readouts[-1](states), ids)

    def read(self, states):
        """states (n, width) -> the most likely label of each probe but the token's, (n, 5)."""
        return torch.stack([r(states).argmax(1) for r in self.readouts[: len(self.SIZES)]], 1)


def object_labels(shape, color=None, count=1, place=None, relation=None):
    """What is said of one object, as labels (5,) of `Probes`; count 0: an edit takes it away."""
    labels = (
        1 + world.SHAPES.index(shape),
        1 + list(world.COLORS).index(color) if color else 0,
        count,
        0 if place is None else 1 + place,
        1 + list(world.RELATIONS).index(relation) if relation else 0,
    )
    return torch.tensor(labels)


def text_labels(prompt):
    """The labels at each noun of a world.Prompt."""
    relations = [None, prompt.relation, None, None]
    pairs = zip(prompt.mentions, relations)
    return [object_labels(m.shape, m.color, m.count, m.place, relation) for m, relation in pairs]


def word_id(tokenizer, word):
    (token,) = tokenizer.encode(f" {word}")
    return torch.tensor([token])


def image_labels(tokenizer, scene):
    """What each of an image's 4 x 4 tokens stands for, as labels (16, 6) of `Probes`.

    The last token that an object touches names it, as its noun does in a caption; any other token
    stands for the color of the background. So images speak to the adapter in the terms of words.
    """
    labels = torch.zeros(4, 4, len(Probes.SIZES) + 1, dtype=torch.long)
    labels[..., -1] = word_id(tokenizer, scene.background)
    for obj in scene.objects:
        row, col = ((0, 2, 3)[i] for i in obj.row_col)  # tokens are 16 pixels, places 24 apart
        said = object_labels(obj.shape, obj.color, 1, obj.place)
        labels[row, col] = torch.cat([said, word_id(tokenizer, obj.shape)])
    return labels.flatten(0, 1)


def crop_labels(tokenizer, obj, place=None, relation=None):
    """The same for the picture of an object alone, which is one token: (1, 6)."""
    said = object_labels(obj.shape, obj.color, 1, place, relation)
    return torch.cat([said, word_id(tokenizer, obj.shape)])[None]


def caption_batch(tokenizer, noun_tokens, rng, n):
    """n random captions: ids, mask (B, L), labels (B, L, 5), and where there are labels (B, L)."""
    prompts = [world.sample_caption(rng.choice(CAPTIONS), rng)[1] for _ in range(n)]
    ids, mask = tokenize(tokenizer, [p.text for p in prompts])
    labels = torch.zeros(*ids.shape, len(Probes.SIZES), dtype=torch.long)
    labeled = torch.zeros_like(mask)
    for i, prompt in enumerate(prompts):
        rows = noun_rows(ids[i].tolist(), noun_tokens)
        labels[i, rows], labeled[i, rows] = torch.stack(text_labels(prompt)), True
    return ids, mask, labels, labeled


# ---- lessons of the LMM -------------------------------------------------------------------------


@dataclass
class Lesson:
    """A prompt, and the labels of what its tokens' states should know."""

    prompt: list
    nouns: list  # labels (5,) for each noun of the text
    images: list = ()  # labels (n, 6) for the tokens of each image, given the text before it
    vit: list = ()  # the same for the ViT, which sees images only
    others: dict = ()  # {position from the end: labels (5,)} of further tokens


def caption_lesson(tokenizer, rng):
    _, prompt = world.sample_caption(rng.choice(CAPTIONS), rng)
    return Lesson([rng.choice(PREFIXES[:2]) + prompt.text], text_labels(prompt))


def describe(scene):
    """The full description of a scene, and the labels at its nouns."""
    labels = [object_labels(o.shape, o.color, 1, o.place) for o in scene.objects]
    return world.describe(scene), labels


def picture_lesson(tokenizer, rng):
    scene = world.sample_scene(rng.choice(CAPTIONS), rng)
    text, nouns = describe(scene)
    images = [image_labels(tokenizer, scene)]
    return Lesson([rng.choice(PREFIXES), world.render(scene), text], nouns, images, images)


def edit_lesson(tokenizer, rng):
    """The instruction's noun knows which object is meant, its last word what becomes of it."""
    edit = world.sample_edit(rng.choice(world.EDITS), rng)
    prompt, _ = apply_task("edit", [world.render(edit.source), edit.text])
    text, nouns = describe(edit.target)
    text = f": {text}" if rng.random() < 0.5 else ""
    nouns, others = nouns if text else [], {}
    if edit.before:
        o = edit.before
        nouns = [object_labels(o.shape, o.color, 0, o.place), *nouns]
    elif edit.after:
        nouns = [object_labels(edit.after.shape, edit.after.color), *nouns]
    if edit.after:
        o = edit.after
        others[1 + len(tokenizer.encode(text))] = object_labels(o.shape, o.color, 1, o.place)
    images = [image_labels(tokenizer, edit.source)]
    return Lesson([*prompt, text], nouns, images, images, others)


def reference_lesson(tokenizer, rng):
    """The picture of an object is a noun as well, described by the words before it."""
    reference = world.sample_reference(rng)
    page, pixels = world.render(reference.scene), world.SIZE / 1000
    segments = [
        (text, [page.crop([round(x * pixels) for x in world.box(o)])] if o else [])
        for text, o in reference.segments
    ]
    task, prompt = reference_prompt(segments, rng.random() < 0.5)
    pictured = {o: text for text, o in reference.segments if o}
    nouns, images = [], []
    if task == "combine":
        nouns += [object_labels(o.shape) for o in pictured]
        images += [crop_labels(tokenizer, o) for o in pictured]
    for i, (o, m) in enumerate(zip(reference.objects, reference.prompt.mentions)):
        relation = reference.prompt.relation if i == 1 else None
        if task == "combine" or o not in pictured:
            nouns.append(object_labels(o.shape, o.color, 1, m.place, relation))
            continue
        if pictured[o]:
            nouns.append(object_labels(o.shape, None, 1, m.place, relation))
        images.append(crop_labels(tokenizer, o, m.place, relation))
    vit = [crop_labels(tokenizer, o) for o in pictured]
    return Lesson(apply_task(task, prompt)[0], nouns, images, vit)


LESSONS = {caption_lesson: 3, picture_lesson: 3, edit_lesson: 4, reference_lesson: 2}  # shares


def lesson_batch(tokenizer, noun_tokens, lessons):
    """Lessons -> Batch, token ids (B, L), labels (B, L, 5), where (B, L), the ViT's labels (n, 6).

    The token id of a part of an image is that of the word it stands for.
    """
    batch = collate([lesson.prompt for lesson in lessons], tokenizer, PATCHES)
    token_ids, labeled = batch.ids.clone(), batch.image_mask.clone()
    labels = torch.zeros(*token_ids.shape, len(Probes.SIZES), dtype=torch.long)
    for i, lesson in enumerate(lessons):
        rows = noun_rows(batch.ids[i].tolist(), noun_tokens)
        by_row = dict(zip(rows, lesson.nouns, strict=True))
        length = int(batch.mask[i].sum())
        by_row |= {length - back: label for back, label in dict(lesson.others).items()}
        for row, label in by_row.items():
            labels[i, row], labeled[i, row] = label, True
        if lesson.images:
            cells = torch.cat(lesson.images)
            labels[i, batch.image_mask[i]] = cells[:, :-1]
            token_ids[i, batch.image_mask[i]] = cells[:, -1]
    none = torch.zeros(0, len(Probes.SIZES) + 1, dtype=torch.long)
    vit = torch.cat([none, *(cells for lesson in lessons for cells in lesson.vit)])
    return batch, token_ids, labels, labeled, vit
