"""What the miniature's text encoders learn from: all that can be said, and what is to be known of it.

A state that has gathered "red", "top left" and "left of the ring" at the noun tells the MM-DiT the
whole story in one token. Encoders as small as these do not gather so by themselves. So throw-away
linear readouts (`Facts`) ask it of them while they learn.
"""

import json
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2Tokenizer, T5Tokenizer

from mini import edits, programs, world
from mini.world import COLORS, PAIRS, RELATIONS, SHAPES

CAPTIONS = (*world.TASKS, "scene")
NOUNS = {noun: shape for shape in SHAPES for noun in (shape, world.plural(shape))}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SENTENCES = ("Segment the image.", "Draw the edges.", "Describe the image.", "")


class Facts(nn.Module):
    """Linear readouts of what a state knows about the object that its token names.

    0 stands for "not said" or "no object". The last readout is the token's own word.
    """

    SIZES = (7, 7, 5, 10, 5)  # shape, color, count, place, relation
    NAMES = ("shape", "color", "count", "place", "relation")

    def __init__(self, width, vocabulary):
        super().__init__()
        self.readouts = nn.ModuleList(nn.Linear(width, n) for n in (*self.SIZES, vocabulary))

    def forward(self, states, labels):
        """states (n, width), labels (n, 5 or 6) -> the mean cross-entropy, summed over the facts."""
        pairs = zip(self.readouts, labels.unbind(1))
        return sum(F.cross_entropy(readout(states), label) for readout, label in pairs)

    def words(self, states):
        """Logits of each state's own word."""
        return self.readouts[-1](states)

    def right(self, states, labels):
        """{fact: share of states (n, width) from which it is read as in labels (n, 5)}."""
        read = torch.stack([r(states).argmax(1) for r in self.readouts[: len(self.SIZES)]], 1)
        return dict(zip(self.NAMES, (read == labels).float().mean(0).tolist()))


def object_facts(shape, color=None, count=1, place=None, relation=None):
    """What is said of one object, as the labels of `Facts`; count 0: it goes, or is denied."""
    known = (
        1 + SHAPES.index(shape) if shape else 0,
        1 + list(COLORS).index(color) if color else 0,
        count,
        0 if place is None else 1 + place,
        1 + list(RELATIONS).index(relation) if relation else 0,
    )
    return torch.tensor(known)


def mention_facts(mention, relation=None):
    return object_facts(mention.shape, mention.color, mention.count, mention.place, relation)


def noun_ids(tokenizer):
    """The tokens that are nouns, at the start of a text or within it."""
    texts = [prefix + noun for noun in NOUNS for prefix in ("", " ")]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if bad := [text for text, row in zip(texts, rows) if len(row) != 1]:
        raise ValueError(f"{bad[0]!r} is not one token")
    return {row[0] for row in rows}


# ---- texts --------------------------------------------------------------------------------------


@dataclass
class Text:
    """What can be said, and the facts (5,) at each noun of it; None where they are not asked."""

    text: str
    nouns: list | None = None


def caption_text(rng, two_sided=True):
    """A caption. An encoder that looks both ways also knows the relation at the first noun."""
    _, prompt = world.sample_caption(rng.choice(CAPTIONS), rng, PAIRS)
    relations = [None, prompt.relation, None, None]
    if two_sided and prompt.relation:
        relations = [prompt.relation, OPPOSITE[prompt.relation]]
    return Text(prompt.text, [mention_facts(*pair) for pair in zip(prompt.mentions, relations)])


def long_text(rng):
    _, prompt = programs.sample_long(rng, PAIRS)
    return Text(prompt.text, [mention_facts(m) for m in prompt.mentions])


def semantic_text(rng):
    _, prompt = programs.sample_semantic(rng, PAIRS)
    return Text(prompt.text, [mention_facts(m) for m in prompt.told])


def edit_text(rng):
    kinds = (*edits.EDITS, *edits.HARD_EDITS)
    edit = edits.sample_edit(rng.choice(kinds), rng, PAIRS)
    return Text(edit.text, [mention_facts(m) for m in edit.told])


def question_text(rng):
    scene, question = programs.sample_question(rng.choice(programs.QUESTIONS), rng, PAIRS)
    return Text(f"Q: {question.text} A: {programs.answer(question, scene)}")


def sentence_text(rng):
    return Text(rng.choice(SENTENCES), [])


TEXTS = {caption_text: 8, long_text: 2, semantic_text: 3, edit_text: 5, question_text: 3,
         sentence_text: 1}  # fmt: skip


def sample_texts(n, rng):
    return [kind(rng) for kind in rng.choices(list(TEXTS), TEXTS.values(), k=n)]


# ---- tokenizers ---------------------------------------------------------------------------------

TEMPLATES = (
    "Generate Image: |Copy Image: |Edit image |following: |Combine the objects: |"
    " and generate an image following: |, | the shape of | in the color of | the color of |"
    " in the shape of | replace| into| with| next| object| objects| it| them| keep| then| bigger|"
    " smaller| an| image| photo| picture| Edit| Draw| Segment| Describe| image."
)


def world_words():
    """Every word of the world's texts, in alphabetical order."""
    rng = random.Random("words")
    texts = [text.text for text in sample_texts(6000, rng)] + TEMPLATES.split("|")
    spaced = " ".join(texts)
    for mark in ",.:?":
        spaced = spaced.replace(mark, " ")
    return sorted({*spaced.split(), *NOUNS})


def make_t5_tokenizer(folder):
    """A T5 tokenizer, as published, in which every word of this world is one piece."""
    words = [(f"▁{word}", -1.0) for word in world_words()]
    letters = [(chr(i), -6.0) for i in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    marks = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    tokenizer = T5Tokenizer(vocab=[*special, *words, *letters, *marks], extra_ids=100)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_lmm_tokenizer(folder):
    """A byte-level BPE as Qwen2-VL's, small, in which every word of this world is one token."""
    lines = [part + word for word in world_words() for part in ("", " ") for _ in range(99)]
    lines += 99 * [", ", ": ", ". ", "?"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    images = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    special = ["<|im_start|>", "<|im_end|>", *images, "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        extra_special_tokens=special,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---- batches for the T5 -------------------------------------------------------------------------


@dataclass
class Rows:
    """Texts as the T5 meets them, closed and padded with EOS; labels for `Facts` and masked words."""

    ids: torch.Tensor  # (B, L), before any masking
    mask: torch.Tensor  # (B, L) bool, False at pads, for those who leave pads out
    masked: torch.Tensor  # (B, L) bool, True where the T5 is shown <extra_id_0>
    nouns: torch.Tensor  # (B, L) bool, True where facts are known
    facts: torch.Tensor  # (B, L, 5)

    def to(self, device):
        return Rows(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def tokenize(tokenizer, texts, length=0):
    """Texts, each closed and padded with EOS to the longest or to a length: ids, mask (B, L)."""
    rows = [torch.tensor(row) for row in tokenizer(texts).input_ids]
    length = max(length, *(len(row) for row in rows))
    ids = torch.full((len(rows), length), tokenizer.eos_token_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


def t5_rows(texts, tokenizer, nouns, rng, generator):
    """Texts as Rows: in half of them any share of the words, pads included, is masked."""
    ids, mask = tokenize(tokenizer, [text.text for text in texts])
    ids, mask = tokenize(tokenizer, [text.text for text in texts], ids.shape[1] + rng.choice(EXTRA))
    share = torch.rand(len(ids), 1, generator=generator) * 2 - 1  # half below 0: nothing masked
    masked = torch.rand(ids.shape, generator=generator) < share
    known = torch.zeros_like(mask)
    facts = torch.zeros(*ids.shape, len(Facts.SIZES), dtype=torch.long)
    for i, text in enumerate(texts):
        if text.nouns and not masked[i].any():
            places = [j for j, token in enumerate(ids[i].tolist()) if token in nouns]
            facts[i, places], known[i, places] = torch.stack(text.nouns), True
    return Rows(ids, mask, masked, known, facts)


EXTRA = (0, 0, 1, 2, 4, 8, 16, 24)  # pads beyond the longest row
