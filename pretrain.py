"""Make the miniature SD3.5 and Qwen2-VL from nothing. Users of the published weights never need it.

    python pretrain.py vae        # the autoencoder, on rendered scenes
    python pretrain.py text       # the tokenizer, and SD3's text encoder in miniature
    python pretrain.py base       # the MM-DiT, on captions and latents
    python pretrain.py lmm        # Qwen2-VL, on captions and text
    python pretrain.py export     # weights/mini/, in the published layouts

Stages write to runs/pretrain/ and can be stopped and started again at any time: every batch is a
function of (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import flow
import shapes
from cli import Parser, one_line_errors
from dream_engine import (
    LMM,
    MINI,
    SD3,
    Condition,
    DreamEngine,
    denoise,
    noise,
)
from mmdit import MMDiT, MMDiTConfig, position_table
from prompts import PatchConfig, apply_task, collate, reference_prompt, to_images, to_tensor
from vae import SCALE, SHIFT, VAE, VAEConfig

SEED = 0
TEXT_ENCODER = MINI / "text_encoder.safetensors"
VAE_CONFIG = VAEConfig(latent_channels=8, base=16)
BASE_CONFIG = MMDiTConfig(
    6, 128, head_dim=32, channels=8, positions=16, context_dim=128, pooled_dim=128
)


def fit(name, modules, loss_of, steps, lr, args, preview=None, every=250):
    """Minimise loss_of(step, rng, generator) over the parameters of modules, resumably, by AdamW.

    lr: the peak of a learning rate that warms up, stays, and falls to zero over the last 30 % of
    the steps; or a function of the step.
    """
    file = Path(args.out, f"{name}.pt")
    file.parent.mkdir(parents=True, exist_ok=True)
    params = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start = 0
    if file.exists():
        state = torch.load(file, map_location=args.device, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    average = None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        warm = min(1.0, (step + 1) / 200)
        rate = lr(step) if callable(lr) else lr * min(warm, (steps - step) / (0.3 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = random.Random(f"{SEED} {name} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        loss = loss_of(step, rng, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 10 == 0:
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.1e}")
        if (step + 1) % every == 0 or step + 1 == steps:
            partial = file.with_suffix(".tmp")
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1}, partial)
            os.replace(partial, file)
            if preview:
                preview(step + 1)
    return modules.eval()


def grid(rows, file):
    """Save rows of PIL images as one enlarged picture."""
    w, h = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (w + 4), len(rows) * (h + 4)), (128, 128, 128))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (w + 4) + 2, y * (h + 4) + 2))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.NEAREST).save(file)


def train_vae(args):
    """Pixel loss, a small KL, and a pull of the latents to the mean and scale SD3.5's have."""
    torch.manual_seed(SEED)
    model = VAE(VAE_CONFIG).to(args.device, memory_format=torch.channels_last)
    nn.init.constant_(model.encoder.conv_out.bias[VAE_CONFIG.latent_channels :], -4.0)

    def loss_of(step, rng, generator):
        scenes = [shapes.sample_scene("scene", rng) for _ in range(16)]
        image = to_tensor([shapes.render(s) for s in scenes]).to(args.device)
        mean, std = model.posterior(image)
        z = mean + std * torch.randn(std.shape, generator=generator).to(args.device)
        error = model.decoder(z) - image
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        moments = (z.mean((0, 2, 3)) - SHIFT) ** 2 + (z.std((0, 2, 3)) - 1 / SCALE) ** 2
        return error.square().mean() + 0.5 * error.abs().mean() + 1e-4 * kl + 0.01 * moments.mean()

    @torch.no_grad()
    def preview(step):
        rng = random.Random("preview")
        scenes = [shapes.sample_scene("scene", rng, held_out=i >= 200) for i in range(400)]
        images = [shapes.render(scene) for scene in scenes]
        latent = model.encode(to_tensor(images).to(args.device))
        copies = to_images(model.decode(latent))
        right = [shapes.detect(copy) == scene for copy, scene in zip(copies, scenes)]
        read = f"{sum(right[:200])}/200, of held-out pairs {sum(right[200:])}/200"
        mse = (to_tensor(copies) - to_tensor(images)).square().mean() / 4
        moments = f"latent mean {latent.mean():.2f} std {latent.std():.2f}"
        tqdm.write(f"step {step}: {-10 * mse.log10():.1f} dB, read {read}, {moments}")
        grid(
            [images[:12], copies[:12], images[200:212], copies[200:212]], Path(args.out, "vae.png")
        )

    return fit("vae", model, loss_of, args.steps or 2000, 2e-3, args, preview)


# ---- words --------------------------------------------------------------------------------------

IMAGE = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
PHRASES = (
    "Generate Image: |Copy Image: |Edit image |following: |Combine the objects: |"
    " and generate an image following: |, | change| make| turn| recolor| move| add| remove| replace|"
    " swap| the| into| with| to| from| next| object| objects| color| shape| background| it| them|"
    " keep| then| one| bigger| smaller"
)


def train_tokenizer(folder):
    """A byte-level BPE as Qwen2-VL's, small, in which every word of this world is one token."""
    rng = random.Random(f"{SEED} tokenizer")
    lines = [shapes.sample_caption(t, rng)[1].text for t in CAPTIONS for _ in range(1000)]
    lines += [
        part + name for part in ("", " ") for name in (*NOUNS, *shapes.COLORS) for _ in range(99)
    ]
    lines += 99 * PHRASES.split("|")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    special = ["<|im_start|>", "<|im_end|>", *IMAGE, "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        extra_special_tokens=special,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


CAPTIONS = (*shapes.TASKS, "scene")
NOUNS = {n: s for s in shapes.SHAPES for n in (s, s + ("es" if s == "cross" else "s"))}


class Facts(nn.Module):
    """Throw-away linear readouts of what a state knows about the object that its token names.

    They make an encoder gather "red", "top left" and "left of the" at the noun, where one state
    tells the whole story, and keep what its own token was. 0 stands for "not said" or "no object".
    """

    SIZES = (7, 7, 5, 10, 5)  # shape, color, count, place, relation

    def __init__(self, width, vocabulary):
        super().__init__()
        self.readouts = nn.ModuleList(nn.Linear(width, n) for n in (*self.SIZES, vocabulary))

    def forward(self, states, labels):
        """states (n, width), labels (n, 5 or 6) -> the mean cross-entropy, summed over the facts."""
        pairs = zip(self.readouts, labels.unbind(1))
        return sum(F.cross_entropy(readout(states), label) for readout, label in pairs)

    def read(self, states):
        """states (n, width) -> the most likely label of each fact, (n, 5)."""
        return torch.stack([r(states).argmax(1) for r in self.readouts[: len(self.SIZES)]], 1)


def object_facts(shape, color=None, count=1, place=None, relation=None):
    """What is said of one object, as the labels of `Facts`; count 0: an edit takes it away."""
    known = (
        1 + shapes.SHAPES.index(shape),
        1 + list(shapes.COLORS).index(color) if color else 0,
        count,
        0 if place is None else 1 + place,
        1 + list(shapes.RELATIONS).index(relation) if relation else 0,
    )
    return torch.tensor(known)


def noun_ids(tokenizer):
    return {i for noun in NOUNS for i in tokenizer.encode(noun) + tokenizer.encode(" " + noun)}


def noun_rows(ids, nouns):
    return [i for i, token in enumerate(ids) if token in nouns]


def text_facts(prompt):
    """The facts to be known at each noun of a prompt."""
    relations = [None, prompt.relation, None, None]
    pairs = zip(prompt.mentions, relations)
    return [object_facts(m.shape, m.color, m.count, m.place, relation) for m, relation in pairs]


class TextEncoder(nn.Module):
    """Stands for SD3's three text encoders: a small causal transformer, never used once Qwen2-VL is."""

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


def tokenize(tokenizer, texts):
    """Texts, each closed by <|endoftext|>, right-padded: ids, mask (B, L)."""
    rows = [torch.tensor(tokenizer.encode(text) + [tokenizer.eos_token_id]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


def train_text(args):
    """The text encoder learns to gather, at every noun, the facts of the caption so far."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(Path(args.out, "tokenizer"))
    noun_tokens = noun_ids(tokenizer)
    encoder = TextEncoder(len(tokenizer))
    modules = nn.ModuleDict({"encoder": encoder, "facts": Facts(128, len(tokenizer))}).to(
        args.device
    )

    def batch(rng, n=128):
        prompts = [shapes.sample_caption(rng.choice(CAPTIONS), rng)[1] for _ in range(n)]
        ids, mask = tokenize(tokenizer, [p.text for p in prompts])
        facts = torch.zeros(*ids.shape, len(Facts.SIZES), dtype=torch.long)
        nouns = torch.zeros_like(mask)
        for i, prompt in enumerate(prompts):
            rows = noun_rows(ids[i].tolist(), noun_tokens)
            facts[i, rows], nouns[i, rows] = torch.stack(text_facts(prompt)), True
        return [x.to(args.device) for x in (ids, mask, facts, nouns)]

    def loss_of(step, rng, generator):
        ids, mask, facts, nouns = batch(rng)
        states = encoder(ids, mask)[0]
        own = F.cross_entropy(modules["facts"].readouts[-1](states[mask]), ids[mask])
        return modules["facts"](states[nouns], facts[nouns]) + own

    @torch.no_grad()
    def preview(step):
        ids, mask, facts, nouns = batch(random.Random("preview"), 512)
        read = modules["facts"].read(encoder(ids, mask)[0][nouns])
        right = (read == facts[nouns]).float().mean(0).tolist()
        names = ("shape", "color", "count", "place", "relation")
        tqdm.write(f"step {step}: " + ", ".join(f"{n} {r:.3f}" for n, r in zip(names, right)))

    return fit("text", modules, loss_of, args.steps or 1500, 1e-3, args, preview)


# ---- the base: SD3.5 in miniature ---------------------------------------------------------------


def trained(name, modules, args):
    """Put the result of an earlier stage into modules, frozen."""
    file = Path(args.out, f"{name}.pt")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: first run `python pretrain.py {name}`")
    state = torch.load(file, map_location=args.device, weights_only=True)["modules"]
    modules.load_state_dict(state)
    return modules.to(args.device).eval().requires_grad_(False)


def trained_vae(args):
    return trained("vae", VAE(VAE_CONFIG), args)


def trained_text(args):
    tokenizer = AutoTokenizer.from_pretrained(Path(args.out, "tokenizer"))
    parts = {"encoder": TextEncoder(len(tokenizer)), "facts": Facts(128, len(tokenizer))}
    return tokenizer, trained("text", nn.ModuleDict(parts), args)["encoder"]


# captions -> the kind of scene they describe, and their share among short captions
KINDS = {"single": "single", "colors": "single", "counting": "counting", "scene": "scene"}
SHARES = {"single": 2, "colors": 2, "two": 4, "counting": 5, "position": 6, "attribution": 6}
LATE_SHARES = {"single": 1, "colors": 1, "two": 4, "counting": 8, "position": 5, "attribution": 5}
POOL = {"single": 4_000, "two": 24_000, "counting": 12_000, "scene": 24_000}


def latent_pool(vae, args):
    """{kind: (scenes, latents)}: encoded once, captioned anew at every use."""
    file = Path(args.out, "latents.pt")
    latents = torch.load(file, weights_only=True) if file.exists() else {}
    pool = {}
    for kind, size in POOL.items():
        rng = random.Random(f"{SEED} pool {kind}")
        scenes = [shapes.sample_scene(kind, rng) for _ in range(size)]
        if kind not in latents:
            parts = []
            for i in tqdm(range(0, size, 100), desc=f"latents of {kind}"):
                with torch.no_grad():
                    image = to_tensor([shapes.render(s) for s in scenes[i : i + 100]])
                    parts.append(vae.encode(image.to(args.device)).cpu())
            latents[kind] = torch.cat(parts)
        pool[kind] = scenes, latents[kind]
    torch.save(latents, file)
    return pool


def encode_text(model, encoder, tokenizer, texts):
    """Texts as SD3 itself is conditioned, through its own (miniature) text encoder -> Condition."""
    ids, mask = (x.to(model.pos_embed.device) for x in tokenize(tokenizer, texts))
    with torch.no_grad():
        context, pooled = encoder(ids, mask)
    txt, vec = model.embed_text(context, pooled)
    return Condition(txt, mask, vec)


def initialise(model):
    """As DiT is: gates and output start at zero, so that every block starts as the identity."""
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    model.pos_embed.copy_(position_table(model.config.positions, model.config.width))
    return model


def train_base(args):
    """The MM-DiT, by flow matching on pairs of caption and latent, one caption in ten left empty."""
    torch.manual_seed(SEED)
    vae, (tokenizer, encoder) = trained_vae(args), trained_text(args)
    pool = latent_pool(vae, args)
    model = initialise(MMDiT(BASE_CONFIG)).to(args.device)

    def loss_of(step, rng, generator):
        # Full captions say where everything is, and so teach drawing; short ones leave it open.
        # What is learnt last, counting above all, is asked more often in the second half.
        full = rng.random() < (0.35 if step < 6_000 else 0.1)
        shares = SHARES if step < 12_000 else LATE_SHARES
        texts, latents = [], []
        for _ in range(64):
            task = "scene" if full else rng.choices(list(shares), shares.values())[0]
            scenes, encoded = pool[KINDS.get(task, "two")]
            i = rng.randrange(len(scenes))
            latents.append(encoded[i])
            dropped, said = rng.random() < 0.1, shapes.caption(scenes[i], task, rng)
            texts.append("" if dropped or shapes.is_exam(said) else said.text)
        x0 = torch.stack(latents).to(args.device)
        eps = torch.randn(x0.shape, generator=generator).to(args.device)
        t = flow.training_sigmas(len(x0), generator=generator).to(args.device)
        c = condition_of(texts)
        velocity = model(flow.add_noise(x0, eps, t), t, c.txt, c.vec, c.mask)
        return flow.velocity_loss(velocity, x0, eps).mean()

    def condition_of(texts):
        return encode_text(model, encoder, tokenizer, texts)

    @torch.no_grad()
    def preview(step):
        if step % 1000 == 0:
            prompts = shapes.benchmark(16, seed="preview")
            prompts = {task: [p for _, p in pairs] for task, pairs in prompts.items()}
            texts = [p.text for ps in prompts.values() for p in ps]
            images = draw(model, vae, condition_of, texts, steps=12)
            report(prompts, images, step, Path(args.out, "base.png"))

    steps = args.steps or 28_000

    def rate(step):
        # A high rate finds its way sooner; only a low one binds colors to shapes and counts.
        if step < 9_750:
            return 2.5e-3 * min(1.0, (step + 1) / 200)
        return 1.2e-3 * (steps - step) / (steps - 9_750)

    return fit("base", model, loss_of, steps, rate, args, preview)


@torch.no_grad()
def draw(model, vae, condition_of, texts, steps=28, guidance=4.5, seed=0):
    """One picture for each text, by the base's own text encoder."""
    condition = condition_of([*texts, *[""] * len(texts)])
    shape = (model.config.channels, 8, 8)
    latent = denoise(model, condition, noise(len(texts), shape, seed), steps, guidance)
    return to_images(vae.decode(latent))


def report(prompts, images, step, file):
    """Print the score of each task and save a grid, a row for each task."""
    images, rows, scores = iter(images), [], {}
    for task, wanted in prompts.items():
        rows.append([next(images) for _ in wanted])
        right = [shapes.matches(p, shapes.detect(image)) for p, image in zip(wanted, rows[-1])]
        scores[task] = sum(right) / len(right)
    mean = sum(scores.values()) / len(scores)
    each = ", ".join(f"{task} {score:.2f}" for task, score in scores.items())
    tqdm.write(f"step {step}: mean {mean:.3f} ({each})")
    grid([row[:16] for row in rows], file)


# ---- the LMM: Qwen2-VL in miniature -------------------------------------------------------------

PATCHES = PatchConfig(patch=8, merge=2, min_pixels=16 * 16, max_pixels=64 * 64)
PREFIXES = ("", "Generate Image: ", "Copy Image: ", "Edit image ")


def new_lmm(tokenizer):
    start, image, end = tokenizer.convert_tokens_to_ids(IMAGE)
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
            "patch_size": 8,
        },
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def own_word(tokenizer, word):
    (token,) = tokenizer.encode(f" {word}")
    return torch.tensor([token])


def image_facts(tokenizer, scene):
    """What each of an image's 4 x 4 tokens stands for, as `Facts` labels (16, 6).

    The last token that an object touches names it, as its noun does in a caption; any other token
    stands for the color of the background. So the adapter meets pictures in the terms of words.
    """
    facts = torch.zeros(4, 4, len(Facts.SIZES) + 1, dtype=torch.long)
    facts[..., -1] = own_word(tokenizer, scene.background)
    for obj in scene.objects:
        row, col = ((0, 2, 3)[i] for i in obj.row_col)  # tokens are 16 pixels, places 24 apart
        known = object_facts(obj.shape, obj.color, 1, obj.place)
        facts[row, col] = torch.cat([known, own_word(tokenizer, obj.shape)])
    return facts.flatten(0, 1)


def crop_facts(tokenizer, obj, place=None, relation=None):
    """The same of an object's own picture, which is one token: (1, 6)."""
    known = object_facts(obj.shape, obj.color, 1, place, relation)
    return torch.cat([known, own_word(tokenizer, obj.shape)])[None]


@dataclass
class Lesson:
    """A prompt, and what its tokens should have gathered."""

    prompt: list
    nouns: list  # facts (5,) at each noun of the text
    pictures: list = ()  # `Facts` labels (n, 6) of each picture's tokens, in the light of the text
    alone: list = ()  # the same without that light, for the ViT
    marks: dict = ()  # further facts: {position from the end: facts (5,)}


def caption_lesson(tokenizer, rng):
    _, said = shapes.sample_caption(rng.choice(CAPTIONS), rng)
    return Lesson([rng.choice(PREFIXES[:2]) + said.text], text_facts(said))


def described(scene):
    """The full description of a scene, and the facts at its nouns."""
    return shapes.describe(scene), [
        object_facts(o.shape, o.color, 1, o.place) for o in scene.objects
    ]


def picture_lesson(tokenizer, rng):
    scene = shapes.sample_scene(rng.choice(CAPTIONS), rng)
    text, nouns = described(scene)
    seen = [image_facts(tokenizer, scene)]
    return Lesson([rng.choice(PREFIXES), shapes.render(scene), text], nouns, seen, seen)


def edit_lesson(tokenizer, rng):
    """The noun of an instruction knows which object is meant, the last word what becomes of it."""
    edit = shapes.sample_edit(rng.choice(shapes.EDITS), rng)
    prompt, _ = apply_task("edit", [shapes.render(edit.source), edit.text])
    text, nouns = described(edit.target)
    text = f": {text}" if rng.random() < 0.5 else ""
    nouns, marks = nouns if text else [], {}
    if edit.before:
        o = edit.before
        nouns = [object_facts(o.shape, o.color, 0, o.place), *nouns]
    elif edit.after:
        nouns = [object_facts(edit.after.shape, edit.after.color), *nouns]
    if edit.after:
        o = edit.after
        marks[1 + len(tokenizer.encode(text))] = object_facts(o.shape, o.color, 1, o.place)
    seen = [image_facts(tokenizer, edit.source)]
    return Lesson([*prompt, text], nouns, seen, seen, marks)


def reference_lesson(tokenizer, rng):
    """A picture of an object is a noun as well, told by the words before it."""
    told = shapes.sample_reference(rng)
    whole, pixels = shapes.render(told.scene), shapes.SIZE / 1000
    segments = [
        (text, [whole.crop([round(x * pixels) for x in shapes.box(o)])] if o else [])
        for text, o in told.segments
    ]
    task, prompt = reference_prompt(segments, rng.random() < 0.5)
    shown = {o: text for text, o in told.segments if o}
    nouns, pictures = [], []
    if task == "combine":
        nouns += [object_facts(o.shape) for o in shown]
        pictures += [crop_facts(tokenizer, o) for o in shown]
    for i, (o, m) in enumerate(zip(told.objects, told.prompt.mentions)):
        relation = told.prompt.relation if i == 1 else None
        if task == "combine" or o not in shown:
            nouns.append(object_facts(o.shape, o.color, 1, m.place, relation))
            continue
        if shown[o]:
            nouns.append(object_facts(o.shape, None, 1, m.place, relation))
        pictures.append(crop_facts(tokenizer, o, m.place, relation))
    alone = [crop_facts(tokenizer, o) for o in shown]
    return Lesson(apply_task(task, prompt)[0], nouns, pictures, alone)


LESSONS = {caption_lesson: 3, picture_lesson: 3, edit_lesson: 4, reference_lesson: 2}


def train_lmm(args):
    """Next words of captions and descriptions, and the facts at every noun and image token."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.out, "tokenizer"))
    noun_tokens = noun_ids(tokenizer)
    lmm = new_lmm(tokenizer)
    modules = nn.ModuleDict({"lmm": lmm, "facts": Facts(192, len(tokenizer))}).to(args.device)
    engine = DreamEngine(lmm.model, tokenizer, PATCHES, None, None, None)
    facts_of = modules["facts"]

    def batch_of(lessons):
        """Tokens; each token's own word; facts and where they are known; the ViT's labels."""
        batch = collate([lesson.prompt for lesson in lessons], tokenizer, PATCHES)
        own, known = batch.ids.clone(), batch.image_mask.clone()
        facts = torch.zeros(*own.shape, len(Facts.SIZES), dtype=torch.long)
        for i, lesson in enumerate(lessons):
            rows = noun_rows(batch.ids[i].tolist(), noun_tokens)
            marks = dict(zip(rows, lesson.nouns, strict=True))
            length = int(batch.mask[i].sum())
            marks |= {length - back: label for back, label in dict(lesson.marks).items()}
            for row, label in marks.items():
                facts[i, row], known[i, row] = label, True
            if lesson.pictures:
                cells = torch.cat(lesson.pictures)
                facts[i, batch.image_mask[i]] = cells[:, :-1]
                own[i, batch.image_mask[i]] = cells[:, -1]
        none = torch.zeros(0, len(Facts.SIZES) + 1, dtype=torch.long)
        alone = torch.cat([none, *(cells for lesson in lessons for cells in lesson.alone)])
        return [x.to(args.device) for x in (batch, own, facts, known, alone)]

    def loss_of(step, rng, generator):
        kinds = rng.choices(list(LESSONS), LESSONS.values(), k=64)
        batch, own, facts, known, alone = batch_of([kind(tokenizer, rng) for kind in kinds])
        hidden, vit = engine.lmm_states(batch)
        follows = batch.mask[:, 1:] & ~batch.image_mask[:, 1:]  # words to be foretold
        words = F.cross_entropy(lmm.lm_head(hidden[:, :-1][follows]), batch.ids[:, 1:][follows])
        kept = F.cross_entropy(facts_of.readouts[-1](hidden[batch.mask]), own[batch.mask])
        return words + kept + facts_of(hidden[known], facts[known]) + facts_of(vit, alone)

    @torch.no_grad()
    def preview(step):
        if step % 500 == 0:
            rng = random.Random("preview lmm")
            scenes = [shapes.sample_scene(rng.choice(CAPTIONS), rng) for _ in range(100)]
            captions = describe_images(lmm, engine, [shapes.render(s) for s in scenes])
            right = sum(c == shapes.describe(s) for c, s in zip(captions, scenes))
            tqdm.write(f"step {step}: captions right {right}/100, such as {captions[0]!r}")
            for kind in LESSONS:
                lessons = [kind(tokenizer, rng) for _ in range(100)]
                batch, _, facts, known, _ = batch_of(lessons)
                right = facts_of.read(engine.lmm_states(batch)[0][known]) == facts[known]
                shares = ", ".join(f"{share:.3f}" for share in right.float().mean(0).tolist())
                tqdm.write(f"  {kind.__name__}: facts known {shares}")

    return fit("lmm", modules, loss_of, args.steps or 3000, 1.5e-3, args, preview)


def describe_images(lmm, engine, images, length=24):
    """Greedy captions, up to the word "background"."""
    texts = [""] * len(images)
    for _ in range(length):
        prompts = [[image, text] for image, text in zip(images, texts)]
        batch = engine.collate(prompts)
        hidden, _ = engine.lmm_states(batch)
        last = hidden[torch.arange(len(images)), batch.mask.sum(1) - 1]
        words = engine.tokenizer.batch_decode(lmm.lm_head(last).argmax(1)[:, None])
        texts = [t if t.endswith("background") else t + w for t, w in zip(texts, words)]
    return texts


# ---- the published layouts ----------------------------------------------------------------------


def export(args):
    """Write what the stages above have learnt to weights/mini/, in half precision."""
    MINI.mkdir(parents=True, exist_ok=True)
    tokenizer, encoder = trained_text(args)
    model = trained("base", MMDiT(BASE_CONFIG), args)
    tensors = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    # It has seen 64 x 64 only: the middle 4 x 4 of the table, which larger pictures would run past.
    tensors["model.diffusion_model.pos_embed"] = model.crop_positions(4, 4)
    tensors |= {f"first_stage_model.{k}": v for k, v in trained_vae(args).state_dict().items()}
    save_file(half(tensors), SD3)
    save_file(half(encoder.state_dict()), TEXT_ENCODER)

    parts = {"lmm": new_lmm(tokenizer), "facts": Facts(192, len(tokenizer))}
    lmm = trained("lmm", nn.ModuleDict(parts), args)["lmm"]
    lmm.half().save_pretrained(LMM)
    tokenizer.save_pretrained(LMM)
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCHES.patch,
        "merge_size": PATCHES.merge,
        "temporal_patch_size": 2,
        "min_pixels": PATCHES.min_pixels,
        "max_pixels": PATCHES.max_pixels,
    }
    Path(LMM, "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    print(MINI)


def half(tensors):
    return {name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()}


STAGES = {
    "vae": train_vae,
    "text": train_text,
    "base": train_base,
    "lmm": train_lmm,
    "export": export,
}


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", default="runs/pretrain")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    STAGES[args.stage](args)


if __name__ == "__main__":
    with one_line_errors():
        main()
