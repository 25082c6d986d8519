"""The miniature T5 and Qwen2-VL: tokenizers, sizes and training losses.

Both are small models of the transformers library, trained from scratch to predict words. Through
the linear probes of `mini.lessons`, they also learn the facts of each noun and each image token.
"""

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
from mini.lessons import FACTS, Probes

# ---- tokenizers ---------------------------------------------------------------------------------

NOUNS = tuple(noun for shape in scenes.SHAPES for noun in (shape, scenes.plural(shape)))
TEMPLATES = (  # more words, mostly from the task templates in prompts.py
    "Generate Image Copy Edit image following Combine the objects and generate an shape of in color"
    " replace into with next object it them keep then bigger smaller photo picture Draw Segment"
    " Describe"
)


def world_words():
    """Every word of the training texts, in alphabetical order."""
    texts = lessons.sample_texts(6000, random.Random("words"))
    texts = " ".join([TEMPLATES, *(text.prompt[0] for text in texts)])
    return sorted({*re.findall("[^ ,.:?]+", texts), *NOUNS})


def make_t5_tokenizer(folder):
    """Make and save a T5 tokenizer in which every word of `world_words` is one token."""
    words = [(f"▁{word}", -1.0) for word in world_words()]
    letters = [(chr(i), -6.0) for i in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    marks = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    tokenizer = transformers.T5Tokenizer(vocab=[*special, *words, *letters, *marks], extra_ids=100)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_lmm_tokenizer(folder):
    """Make and save a byte-level BPE like Qwen2-VL's; every word of `world_words` is one token."""
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
    """The token ids of all nouns, at the start of a text or after a space."""
    texts = [prefix + noun for noun in NOUNS for prefix in ("", " ")]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    return {token for (token,) in rows}  # each noun is one token


def noun_places(ids, tokenizer):
    """The positions of nouns in a row of token ids (L,)."""
    return [i for i, token in enumerate(ids.tolist()) if token in noun_ids(tokenizer)]


# ---- the text encoder ---------------------------------------------------------------------------


def tokenize(tokenizer, texts, pads=0):
    """Ids and mask (B, L) of texts, padded with EOS to `pads` tokens more than the longest."""
    rows = tokenizer(texts).input_ids
    lengths = [len(row) for row in rows]
    longest = max(lengths) + pads
    ids = [row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.arange(longest) < torch.tensor(lengths)[:, None]


def new_t5(tokenizer):
    """A new T5 with the probes for its training."""
    probes = Probes(128, len(tokenizer))
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
        relative_attention_num_buckets=128, relative_attention_max_distance=128,  # exact to 32
    ))  # fmt: skip
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.data.copy_(initial_bias(64))
    return nn.ModuleDict({"t5": model, "facts": probes})


def initial_bias(side):
    """The initial position bias (2 side, 4): heads attend left, right, far left and far right.

    From T5's usual bias near zero, training needs thousands of steps to find the adjacent tokens.
    """
    distance, heads = torch.arange(side).float(), []
    for slope in (1.0, 0.15):
        toward, away = (2 - slope * distance).clamp(-8), torch.full((side,), -3.0)
        heads += [torch.cat((toward, away)), torch.cat((away, toward))]
    return torch.stack(heads, 1)


def t5_states(t5, tokenizer, texts, rng, generator):
    """Run the T5 on texts: ids, attended, masked (B, L), states (B, L, D), nouns.

    attended: the attention mask. Half of the batches attend to padding, as UniAlignment does.
    masked: tokens replaced by <extra_id_0>, in half of the rows.
    nouns: the states (n, D) and labels (n, 5) of the nouns in rows without masked tokens.
    """
    pads = rng.choice((0, 0, 1, 2, 4, 8, 16, 24))
    ids, mask = tokenize(tokenizer, [text.prompt[0] for text in texts], pads)
    share = torch.rand(len(ids), 1, generator=generator) * 2 - 1  # half below 0: nothing masked
    masked = torch.rand(ids.shape, generator=generator) < share
    labelled, labels = torch.zeros_like(mask), torch.zeros(*ids.shape, len(FACTS), dtype=torch.long)
    for i, text in enumerate(texts):
        if text.nouns and not masked[i].any():
            places = noun_places(ids[i], tokenizer)
            labelled[i, places], labels[i, places] = True, torch.tensor(text.nouns)
    attended = mask if rng.random() < 0.5 else torch.ones_like(mask)
    tensors = (ids, attended, masked, labelled, labels)
    ids, attended, masked, labelled, labels = (x.to(t5.device) for x in tensors)
    inputs = ids.masked_fill(masked, tokenizer.convert_tokens_to_ids("<extra_id_0>"))
    states = t5(input_ids=inputs, attention_mask=attended).last_hidden_state
    return ids, attended, masked, states, (states[labelled], labels[labelled])


def train_t5(args, steps):
    """Train the T5 to predict every word, masked or not, and the facts of every noun."""
    torch.manual_seed(SEED)
    tokenizer = make_t5_tokenizer(Path(args.out, "t5-tokenizer"))
    modules = new_t5(tokenizer).to(args.device)
    t5, probes = modules["t5"], modules["facts"]

    def loss_of(step, rng, generator):
        long = rng.random() < 0.25  # batches of similar lengths have less padding to compute
        texts = sorted(lessons.sample_texts(128, rng), key=lambda text: len(text.prompt[0]))
        texts = texts[96:] if long else rng.sample(texts[:96], 64)
        ids, attended, _, states, nouns = t5_states(t5, tokenizer, texts, rng, generator)
        return F.cross_entropy(probes.words(states[attended]), ids[attended]) + probes(*nouns)

    @torch.no_grad()
    def preview(step):
        rng, generator = random.Random("preview t5"), torch.Generator().manual_seed(0)
        texts = lessons.sample_texts(512, rng)
        ids, attended, masked, states, _ = t5_states(t5, tokenizer, texts, rng, generator)
        right = (probes.words(states).argmax(2) == ids)[masked & attended]
        return {"masked": round(right.float().mean().item(), 4)}

    return fit("t5", modules, loss_of, steps, 1.5e-3, args, preview)


def trained_t5(args):
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(args.out, "t5-tokenizer"))
    return tokenizer, trained("t5", new_t5(tokenizer), args)["t5"]


# ---- the LMM: Qwen2-VL in miniature -------------------------------------------------------------

CAPTION = "Copy Image: "  # asks for a caption; after a bare picture the LMM may write a question
PATCHES = PatchConfig(patch=8, merge=2, min_pixels=16 * 16, max_pixels=scenes.SIZE**2)


def labels_of(examples, batch, tokenizer):
    """The labels of a Batch of LabelledPrompts: words, facts, labelled, vit.

    words (B, L): token ids for the probes. facts (B, L, 5): valid where labelled (B, L) is true.
    vit (n, 6): the facts and the word of each image token, for the states of the ViT.
    """
    names = (*scenes.SHAPES, *scenes.BACKGROUNDS, "shape", "color")
    word_ids = {name: tokenizer.encode(f" {name}")[0] for name in names}
    words, labelled = batch.ids.clone(), torch.zeros_like(batch.mask)
    facts, vit = torch.zeros(*words.shape, len(FACTS), dtype=torch.long), []
    for i, example in enumerate(examples):
        labels = {}
        if example.nouns is not None:
            labels = dict(zip(noun_places(words[i], tokenizer), example.nouns, strict=True))
        if example.outcome:
            last = int(batch.mask[i].sum()) - len(tokenizer.encode(example.prompt[-1])) - 1
            labels[last] = example.outcome
        places = batch.image_mask[i].nonzero().flatten().tolist()
        for place, (word, label) in zip(places, example.image_tokens, strict=True):
            words[i, place] = word_ids[word]
            if label:
                labels[place] = label
        if labels:
            places = list(labels)
            labelled[i, places], facts[i, places] = True, torch.tensor(list(labels.values()))
        tokens = example.image_tokens if example.vit_tokens is None else example.vit_tokens
        vit += [(*label, word_ids[word]) for word, label in tokens]
    return words, facts, labelled, torch.tensor(vit, dtype=torch.long).reshape(-1, len(FACTS) + 1)


def new_lmm(tokenizer):
    """A new LMM with the probes for its training."""
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
    return nn.ModuleDict({"lmm": model, "facts": Probes(192, len(tokenizer))})


def train_lmm(args, steps):
    """Train the LMM to predict the next word and, at every noun and image token, the facts."""
    torch.manual_seed(SEED)
    tokenizer = make_lmm_tokenizer(Path(args.out, "lmm-tokenizer"))
    modules = new_lmm(tokenizer).to(args.device)
    model, probes = modules["lmm"], modules["facts"]
    lmm = Qwen2VL(model.model, tokenizer, PATCHES)

    def loss_of(step, rng, generator):
        examples = lessons.sample_lessons(64, rng)
        batch = lmm.collate([example.prompt for example in examples])
        labels = labels_of(examples, batch.to("cpu"), tokenizer)
        words, facts, labelled, vit_labels = (x.to(args.device) for x in labels)
        hidden, vit = lmm(batch)
        text = batch.mask[:, 1:] & ~batch.image_mask[:, 1:]  # neither padding nor pictures
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][text]), batch.ids[:, 1:][text])
        loss = loss + F.cross_entropy(probes.words(hidden[batch.mask]), words[batch.mask])
        loss = loss + probes(hidden[labelled], facts[labelled])
        return loss + probes(vit, vit_labels) if len(vit) else loss

    def preview(step):
        if step % 500:
            return {}
        rng = random.Random("preview lmm")
        cases = [scenes.sample_scene("scene", rng, reserved=True) for _ in range(100)]
        prompts = [[CAPTION, scenes.render(scene)] for scene in cases]
        texts = continued(lmm, model.lm_head, prompts, 26)
        return {"captions": fmean(map(str.startswith, texts, map(scenes.describe, cases)))}

    return fit("lmm", modules, loss_of, steps, 1.5e-3, args, preview)


def trained_lmm(args):
    tokenizer = load_tokenizer(Path(args.out, "lmm-tokenizer"))
    return tokenizer, trained("lmm", new_lmm(tokenizer), args)["lmm"]


@torch.no_grad()
def continued(lmm, head, prompts, length):
    """Continue each prompt greedily by `length` tokens: a text for each prompt."""
    texts = [""] * len(prompts)
    for _ in range(length):
        batch = lmm.collate([[*prompt, text] for prompt, text in zip(prompts, texts)])
        hidden, _ = lmm(batch)
        last = hidden[torch.arange(len(prompts)), batch.mask.sum(1) - 1]
        words = lmm.tokenizer.batch_decode(head(last).argmax(1)[:, None])
        texts = [text + word for text, word in zip(texts, words)]
    return texts
