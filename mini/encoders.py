"""The miniature T5 and Qwen2-VL: their words, how large they are, how they learn."""

import json
import random
import re
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from lmm import VISION_TOKENS, PatchConfig, Qwen2VL, load_tokenizer
from mini import lessons, scenes
from mini.fitting import SEED, fit, trained
from mini.lessons import FACTS, Facts

# ---- tokenizers ---------------------------------------------------------------------------------

NOUNS = tuple(noun for shape in scenes.SHAPES for noun in (shape, scenes.plural(shape)))
TEMPLATES = (  # words that are not in texts alone
    "Generate Image Copy Edit image following Combine the objects and generate an shape of in color"
    " replace into with next object it them keep then bigger smaller photo picture Draw Segment"
    " Describe"
)


def world_words():
    """Every word of the world's texts, in alphabetical order."""
    texts = lessons.sample_texts(6000, random.Random("words"))
    texts = " ".join([TEMPLATES, *(text.prompt[0] for text in texts)])
    return sorted({*re.findall("[^ ,.:?]+", texts), *NOUNS})


def make_t5_tokenizer(folder):
    """A T5 tokenizer, as published, in which every word of this world is one piece."""
    words = [(f"▁{word}", -1.0) for word in world_words()]
    letters = [(chr(i), -6.0) for i in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    marks = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    tokenizer = transformers.T5Tokenizer(vocab=[*special, *words, *letters, *marks], extra_ids=100)
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
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *VISION_TOKENS, "<|video_pad|>"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@cache
def noun_ids(tokenizer):
    """The tokens that are nouns, at the start of a text or within it."""
    texts = [prefix + noun for noun in NOUNS for prefix in ("", " ")]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    return {token for (token,) in rows}  # each noun is one token


def noun_places(ids, tokenizer):
    """Where the nouns stand in a row of tokens."""
    return [i for i, token in enumerate(ids.tolist()) if token in noun_ids(tokenizer)]


# ---- the text encoder ---------------------------------------------------------------------------


def tokenize(tokenizer, texts, pads=0):
    """Texts, each closed and padded with EOS to so many pads more than the longest: ids, mask (B, L)."""
    rows = tokenizer(texts).input_ids
    lengths = [len(row) for row in rows]
    longest = max(lengths) + pads
    ids = [row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.arange(longest) < torch.tensor(lengths)[:, None]


def new_t5(tokenizer):
    """The T5, and the readouts that it learns with."""
    facts = Facts(128, len(tokenizer))
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
        relative_attention_num_buckets=128, relative_attention_max_distance=128,  # exact to 32
    ))  # fmt: skip
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.data.copy_(leaning(64))
    return nn.ModuleDict({"t5": model, "facts": facts})


def leaning(side):
    """Where four heads look at first (2 side, 4): left, right, far left, far right.

    T5's own start near zero takes thousands of steps to tell a neighbour from the rest.
    """
    distance = torch.arange(side).float()
    looks = [((2 - slope * distance).clamp(-8), -3 - 0 * distance) for slope in (1.0, 0.15)]
    heads = [torch.cat(sides) for near, away in looks for sides in ((near, away), (away, near))]
    return torch.stack(heads, 1)


def t5_states(t5, tokenizer, texts, rng, generator):
    """What the T5 makes of Lessons of one text: ids, seen, masked (B, L), states (B, L, D), facts.

    seen: what is attended: in half of the batches pads, too, as UniAlignment has them. masked: shown
    as <extra_id_0>, in half of the rows. facts: the states (n, D) and labels (n, 5) of nouns.
    """
    pads = rng.choice((0, 0, 1, 2, 4, 8, 16, 24))
    ids, mask = tokenize(tokenizer, [text.prompt[0] for text in texts], pads)
    share = torch.rand(len(ids), 1, generator=generator) * 2 - 1  # half below 0: nothing masked
    masked = torch.rand(ids.shape, generator=generator) < share
    known, labels = torch.zeros_like(mask), torch.zeros(*ids.shape, len(FACTS), dtype=torch.long)
    for i, text in enumerate(texts):
        if text.nouns and not masked[i].any():
            places = noun_places(ids[i], tokenizer)
            known[i, places], labels[i, places] = True, torch.tensor(text.nouns)
    seen = mask if rng.random() < 0.5 else torch.ones_like(mask)
    ids, seen, masked, known, labels = (x.to(t5.device) for x in (ids, seen, masked, known, labels))
    shown = ids.masked_fill(masked, tokenizer.convert_tokens_to_ids("<extra_id_0>"))
    states = t5(input_ids=shown, attention_mask=seen).last_hidden_state
    return ids, seen, masked, states, (states[known], labels[known])


def train_t5(args, steps):
    """The T5 learns to foretell masked words and to gather, at every noun, all that is said of it."""
    torch.manual_seed(SEED)
    tokenizer = make_t5_tokenizer(Path(args.out, "t5-tokenizer"))
    modules = new_t5(tokenizer).to(args.device)
    t5, facts = modules["t5"], modules["facts"]

    def loss_of(step, rng, generator):
        long = rng.random() < 0.25  # rows of like length together, as pads cost as much as words
        texts = sorted(lessons.sample_texts(128, rng), key=lambda text: len(text.prompt[0]))
        texts = texts[96:] if long else rng.sample(texts[:96], 64)
        ids, seen, _, states, nouns = t5_states(t5, tokenizer, texts, rng, generator)
        return F.cross_entropy(facts.words(states[seen]), ids[seen]) + facts(*nouns)

    @torch.no_grad()
    def preview(step):
        rng, generator = random.Random("preview t5"), torch.Generator().manual_seed(0)
        texts = lessons.sample_texts(512, rng)
        ids, seen, masked, states, _ = t5_states(t5, tokenizer, texts, rng, generator)
        right = (facts.words(states).argmax(2) == ids)[masked & seen]
        return {"masked": round(right.float().mean().item(), 4)}

    return fit("t5", modules, loss_of, steps, 1.5e-3, args, preview)


def trained_t5(args):
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(args.out, "t5-tokenizer"))
    return tokenizer, trained("t5", new_t5(tokenizer), args)["t5"]


# ---- the LMM: Qwen2-VL in miniature -------------------------------------------------------------

CAPTION = "Copy Image: "  # after a picture alone the LMM may as well begin with a question
PATCHES = PatchConfig(patch=8, merge=2, min_pixels=16 * 16, max_pixels=scenes.SIZE**2)


def labels_of(asked, batch, tokenizer):
    """What is known of a Batch of Lessons: words (B, L), facts (B, L, 5), known (B, L), alone (n, 6).

    words: each token's own, and what a picture's stands for. alone: facts and words of all pictures.
    """
    names = (*scenes.SHAPES, *scenes.BACKGROUNDS, "shape", "color")
    word_ids = {name: tokenizer.encode(f" {name}")[0] for name in names}
    words, known = batch.ids.clone(), torch.zeros_like(batch.mask)
    facts = torch.zeros(*words.shape, len(FACTS), dtype=torch.long)
    for i, lesson in enumerate(asked):
        labels = {}
        if lesson.nouns is not None:
            labels = dict(zip(noun_places(words[i], tokenizer), lesson.nouns, strict=True))
        if lesson.outcome:
            last = int(batch.mask[i].sum()) - len(tokenizer.encode(lesson.prompt[-1])) - 1
            labels[last] = lesson.outcome
        places = batch.image_mask[i].nonzero().flatten().tolist()
        for place, (word, label) in zip(places, lesson.pictures, strict=True):
            words[i, place] = word_ids[word]
            if label:
                labels[place] = label
        if labels:
            places = list(labels)
            known[i, places], facts[i, places] = True, torch.tensor(list(labels.values()))
    alone = [lesson.pictures if lesson.alone is None else lesson.alone for lesson in asked]
    alone = [(*label, word_ids[word]) for tokens in alone for word, label in tokens]
    return words, facts, known, torch.tensor(alone, dtype=torch.long).reshape(-1, len(FACTS) + 1)


def new_lmm(tokenizer):
    """The LMM, and the readouts that it learns with."""
    start, image, end, video = tokenizer.convert_tokens_to_ids([*VISION_TOKENS, "<|video_pad|>"])
    text = {
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "max_position_embeddings": 512, "vocab_size": len(tokenizer), "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vit = {"depth": 2, "embed_dim": 96, "num_heads": 3, "hidden_size": 192, "patch_size": 8}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vit, tie_word_embeddings=True, image_token_id=image,
        vision_start_token_id=start, vision_end_token_id=end, video_token_id=video,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config)
    return nn.ModuleDict({"lmm": model, "facts": Facts(192, len(tokenizer))})


def train_lmm(args, steps):
    """Next words of all that is said, and the facts at every noun and image token."""
    torch.manual_seed(SEED)
    tokenizer = make_lmm_tokenizer(Path(args.out, "lmm-tokenizer"))
    modules = new_lmm(tokenizer).to(args.device)
    model, facts = modules["lmm"], modules["facts"]
    lmm = Qwen2VL(model.model, tokenizer, PATCHES)

    def loss_of(step, rng, generator):
        asked = lessons.sample_lessons(64, rng)
        batch = lmm.collate([lesson.prompt for lesson in asked])
        labels = labels_of(asked, batch.to("cpu"), tokenizer)
        words, labels, known, alone = (x.to(args.device) for x in labels)
        hidden, vit = lmm(batch)
        follows = batch.mask[:, 1:] & ~batch.image_mask[:, 1:]  # words to be foretold
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][follows]), batch.ids[:, 1:][follows])
        loss = loss + F.cross_entropy(facts.words(hidden[batch.mask]), words[batch.mask])
        loss = loss + facts(hidden[known], labels[known])
        return loss + facts(vit, alone) if len(vit) else loss

    def preview(step):
        if step % 500:
            return {}
        rng = random.Random("preview lmm")
        drawn = [scenes.sample_scene("scene", rng, exam=True) for _ in range(100)]
        prompts = [[CAPTION, scenes.render(scene)] for scene in drawn]
        texts = continued(lmm, model.lm_head, prompts, 26)
        return {"captions": fmean(map(str.startswith, texts, map(scenes.describe, drawn)))}

    return fit("lmm", modules, loss_of, steps, 1.5e-3, args, preview)


def trained_lmm(args):
    tokenizer = load_tokenizer(Path(args.out, "lmm-tokenizer"))
    return tokenizer, trained("lmm", new_lmm(tokenizer), args)["lmm"]


@torch.no_grad()
def continued(lmm, head, prompts, length):
    """The most likely words after each prompt."""
    texts = [""] * len(prompts)
    for _ in range(length):
        batch = lmm.collate([[*prompt, text] for prompt, text in zip(prompts, texts)])
        hidden, _ = lmm(batch)
        last = hidden[torch.arange(len(prompts)), batch.mask.sum(1) - 1]
        words = lmm.tokenizer.batch_decode(head(last).argmax(1)[:, None])
        texts = [text + word for text, word in zip(texts, words)]
    return texts
