"""The miniature T5 and Qwen2-VL: how large they are and what they learn."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from lmm import VISION_TOKENS, PatchConfig, Qwen2VL
from mini import lessons, picture_lessons, world
from mini.fitting import SEED, fit, trained

# ---- the text encoder ---------------------------------------------------------------------------


def new_t5(tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_heads=4,
        relative_attention_num_buckets=128,  # exact up to 32 words away
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5EncoderModel(config)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.data.copy_(leaning(config.relative_attention_num_buckets // 2))
    return model


def leaning(side):
    """Where four heads look at first (2 side, 4): left, right, far left, far right.

    From T5's own start near zero it takes thousands of steps to tell a neighbour from the rest.
    """
    distance = torch.arange(side).float()
    looks = [((2 - slope * distance).clamp(-8), -3 - 0 * distance) for slope in (1.0, 0.15)]
    heads = [torch.cat(sides) for near, away in looks for sides in ((near, away), (away, near))]
    return torch.stack(heads, 1)


def train_t5(args, steps):
    """The T5 learns to foretell masked words and to gather, at every noun, all that is said of it.

    In half of the batches pads are attended, as UniAlignment has them, in half they are not.
    """
    torch.manual_seed(SEED)
    tokenizer = lessons.make_t5_tokenizer(Path(args.out, "t5-tokenizer"))
    mask_id = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    nouns = lessons.noun_ids(tokenizer)
    facts = lessons.Facts(128, len(tokenizer))
    modules = nn.ModuleDict({"t5": new_t5(tokenizer), "facts": facts}).to(args.device)

    def states_of(texts, rng, generator):
        rows = lessons.t5_rows(texts, tokenizer, nouns, rng, generator).to(args.device)
        ids = rows.ids.masked_fill(rows.masked, mask_id)
        mask = rows.mask if rng.random() < 0.5 else torch.ones_like(rows.mask)
        states = modules["t5"](input_ids=ids, attention_mask=mask).last_hidden_state
        return rows, mask, states

    def loss_of(step, rng, generator):
        long = rng.random() < 0.25  # rows of like length together, as pads cost as much as words
        texts = sorted(lessons.sample_texts(128, rng), key=lambda text: len(text.text))
        texts = texts[96:] if long else rng.sample(texts[:96], 64)
        rows, mask, states = states_of(texts, rng, generator)
        words = F.cross_entropy(facts.words(states[mask]), rows.ids[mask])
        return words + facts(states[rows.nouns], rows.facts[rows.nouns])

    @torch.no_grad()
    def preview(step):
        rng, generator = random.Random("preview t5"), torch.Generator().manual_seed(0)
        rows, mask, states = states_of(lessons.sample_texts(512, rng), rng, generator)
        scores = facts.right(states[rows.nouns], rows.facts[rows.nouns])
        hidden, shown = rows.masked & mask, ~rows.masked & mask
        for name, where in ("masked", hidden), ("shown", shown):
            right = facts.words(states[where]).argmax(1) == rows.ids[where]
            scores[name] = right.float().mean().item()
        return {name: round(score, 4) for name, score in scores.items()}

    return fit("t5", modules, loss_of, steps, 1.5e-3, args, preview)


def trained_t5(args):
    tokenizer = AutoTokenizer.from_pretrained(Path(args.out, "t5-tokenizer"))
    facts = lessons.Facts(128, len(tokenizer))
    modules = nn.ModuleDict({"t5": new_t5(tokenizer), "facts": facts})
    return tokenizer, trained("t5", modules, args)["t5"]


# ---- the LMM: Qwen2-VL in miniature -------------------------------------------------------------

CAPTION = "Copy Image: "  # after a picture alone the LMM may as well begin with a question
PATCHES = PatchConfig(patch=8, merge=2, min_pixels=16 * 16, max_pixels=world.SIZE**2)


def new_lmm(tokenizer):
    start, image, end, video = tokenizer.convert_tokens_to_ids([*VISION_TOKENS, "<|video_pad|>"])
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 96,
            "num_heads": 3,
            "hidden_size": 192,
            "mlp_ratio": 4,
            "patch_size": PATCHES.patch,
        },
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def train_lmm(args, steps):
    """Next words of all that is said, and the facts at every noun and image token."""
    torch.manual_seed(SEED)
    tokenizer = lessons.make_lmm_tokenizer(Path(args.out, "lmm-tokenizer"))
    nouns = lessons.noun_ids(tokenizer)
    model = new_lmm(tokenizer)
    facts = lessons.Facts(192, len(tokenizer))
    modules = nn.ModuleDict({"lmm": model, "facts": facts}).to(args.device)
    lmm = Qwen2VL(model.model, tokenizer, PATCHES)

    def loss_of(step, rng, generator):
        asked = picture_lessons.sample_lessons(64, tokenizer, rng)
        batch = lmm.collate([lesson.prompt for lesson in asked])
        labels = picture_lessons.labels_of(asked, batch.to("cpu"), nouns).to(args.device)
        hidden, vit = lmm(batch)
        follows = batch.mask[:, 1:] & ~batch.image_mask[:, 1:]  # words to be foretold
        words = F.cross_entropy(model.lm_head(hidden[:, :-1][follows]), batch.ids[:, 1:][follows])
        kept = F.cross_entropy(facts.words(hidden[batch.mask]), labels.words[batch.mask])
        loss = words + kept + facts(hidden[labels.known], labels.facts[labels.known])
        return loss + facts(vit, labels.alone) if len(vit) else loss

    def preview(step):
        return {} if step % 500 else preview_lmm(lmm, model.lm_head, facts, nouns)

    return fit("lmm", modules, loss_of, steps, 1.5e-3, args, preview)


@torch.no_grad()
def preview_lmm(lmm, head, facts, nouns):
    """Shares of pictures described exactly, of questions answered, of mixtures understood; facts."""
    rng, scores = random.Random("preview lmm"), {}
    for name, pairs in (("captions", world.SEEN), ("held_out", world.HELD_OUT)):
        scenes = [world.sample_scene("scene", rng, pairs, exam=True) for _ in range(100)]
        texts = continued(lmm, head, [[CAPTION, world.render(s)] for s in scenes], 26)
        right = [text.startswith(world.describe(s)) for text, s in zip(texts, scenes)]
        scores[name] = sum(right) / len(right)
    for name, kind in (
        ("answers", picture_lessons.question_lesson),
        ("mixtures", picture_lessons.mixing_lesson),
    ):
        mark = " A:" if name == "answers" else ": a"
        prompts = [kind(lmm.tokenizer, rng).prompt for _ in range(200)]
        prompts = [prompt for prompt in prompts if mark in prompt[-1]]
        cut = [prompt[-1].rpartition(mark) for prompt in prompts]
        asked = [[*prompt[:-1], text + mark] for prompt, (text, _, _) in zip(prompts, cut)]
        texts = continued(lmm, head, asked, 3)
        right = [text.startswith(end) for text, (_, _, end) in zip(texts, cut)]
        scores[name] = sum(right) / len(right)
    kinds = [kind for group in picture_lessons.LESSONS for kind in group]
    asked = [kind(lmm.tokenizer, rng) for kind in kinds for _ in range(30)]
    batch = lmm.collate([lesson.prompt for lesson in asked])
    labels = picture_lessons.labels_of(asked, batch.to("cpu"), nouns).to(batch.ids.device)
    hidden, _ = lmm(batch)
    scores |= facts.right(hidden[labels.known], labels.facts[labels.known])
    return {name: round(score, 4) for name, score in scores.items()}


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
