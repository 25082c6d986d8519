"""Make the miniature SD3.5 and Qwen2-VL from nothing. Users of the published weights never need it.

    python -m mini.pretrain vae        # the autoencoder, on rendered scenes
    python -m mini.pretrain text       # the tokenizer, and SD3's text encoder in miniature
    python -m mini.pretrain base       # the MM-DiT, on captions and latents
    python -m mini.pretrain lmm        # Qwen2-VL, on captions and text
    python -m mini.pretrain export     # weights/mini/, in the published layouts

Stages write to runs/pretrain/ and can be stopped and started again at any time: every batch is a
function of (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import flow
from dream_engine import LMM, MINI, SD3, denoise
from lmm import VISION_TOKENS, Qwen2VL, load_tokenizer
from mini import lessons, world
from mini.lessons import PATCHES, SEED, TEXT_ENCODER, Probes, TextEncoder, encode_text
from mmdit import MMDiT, MMDiTConfig, position_table
from prompts import to_images, to_tensor
from support.cli import Parser, one_line_errors, reading, whole_number
from support.fast import usable_device
from support.files import sheet, whole, write_json, write_png
from vae import SCALE, SHIFT, VAE, VAEConfig

EARLIER = "what an earlier run of this stage wrote"
VAE_CONFIG = VAEConfig(latent_channels=8, base=16)
BASE_CONFIG = MMDiTConfig(6, 128, 32, channels=8, positions=16, context_dim=128, pooled_dim=128)


def fit(name, modules, loss_of, args, *, steps, lr, preview, every=250):
    """Minimise loss_of(step, rng, generator) over the parameters of modules, resumably, by AdamW.

    lr: the peak of a learning rate that warms up, is constant, and falls to zero over the last 30 %
    of the steps; or a function of the step. preview(step) is called every so many steps.
    """
    file = Path(args.out, f"{name}.pt")
    file.parent.mkdir(parents=True, exist_ok=True)
    params = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start = 0
    if file.exists():
        with reading(file, EARLIER):
            state = torch.load(file, map_location=args.device, weights_only=True)
            modules.load_state_dict(state["modules"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
    average = None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        share = min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))
        rate = lr(step) if callable(lr) else lr * share
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
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            with whole(file) as partial:
                torch.save({**state, "step": step + 1}, partial)
            preview(step + 1)
    return modules.eval()


def trained(name, modules, args):
    """Put the result of an earlier stage into modules, frozen."""
    file = Path(args.out, f"{name}.pt")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: first run `python -m mini.pretrain {name}`")
    with reading(file, EARLIER):
        state = torch.load(file, map_location=args.device, weights_only=True)
        modules.load_state_dict(state["modules"])
    return modules.to(args.device).eval().requires_grad_(False)


# ---- the autoencoder ----------------------------------------------------------------------------


def train_vae(args):
    """Pixel loss, a small KL, and a pull of the latents to the mean and scale that SD3.5's have."""
    torch.manual_seed(SEED)
    model = VAE(VAE_CONFIG).to(args.device, memory_format=torch.channels_last)
    nn.init.constant_(model.encoder.conv_out.bias[VAE_CONFIG.latent_channels :], -4.0)

    def loss_of(step, rng, generator):
        scenes = [world.sample_scene("scene", rng) for _ in range(16)]
        image = to_tensor([world.render(s) for s in scenes]).to(args.device)
        mean, std = model.posterior(image)
        z = mean + std * torch.randn(std.shape, generator=generator).to(args.device)
        error = model.decoder(z) - image
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        moments = (z.mean((0, 2, 3)) - SHIFT) ** 2 + (z.std((0, 2, 3)) - 1 / SCALE) ** 2
        return error.square().mean() + 0.5 * error.abs().mean() + 1e-4 * kl + 0.01 * moments.mean()

    @torch.no_grad()
    def preview(step):
        rng = random.Random("preview")
        scenes = [world.sample_scene("scene", rng, held_out=i >= 200) for i in range(400)]
        images = [world.render(scene) for scene in scenes]
        latent = model.encode(to_tensor(images).to(args.device))
        copies = to_images(model.decode(latent))
        right = [world.detect(copy) == scene for copy, scene in zip(copies, scenes)]
        read = f"{sum(right[:200])}/200, of held-out pairs {sum(right[200:])}/200"
        mse = (to_tensor(copies) - to_tensor(images)).square().mean() / 4
        moments = f"latent mean {latent.mean():.2f} std {latent.std():.2f}"
        tqdm.write(f"step {step}: {-10 * mse.log10():.1f} dB, read {read}, {moments}")
        rows = [part[i : i + 12] for i in (0, 200) for part in (images, copies)]
        write_png(Path(args.out, "vae.png"), sheet(rows, height=128))

    return fit("vae", model, loss_of, args, steps=args.steps or 2000, lr=2e-3, preview=preview)


# ---- the text encoder ---------------------------------------------------------------------------


def train_text(args):
    """The text encoder learns to gather, at every noun, what the caption has said so far."""
    torch.manual_seed(SEED)
    tokenizer = lessons.train_tokenizer(Path(args.out, "tokenizer"))
    noun_tokens = lessons.noun_ids(tokenizer)
    encoder, probes = TextEncoder(len(tokenizer)), Probes(128, len(tokenizer))
    modules = nn.ModuleDict({"encoder": encoder, "probes": probes}).to(args.device)

    def batch(rng, n=128):
        return [x.to(args.device) for x in lessons.caption_batch(tokenizer, noun_tokens, rng, n)]

    def loss_of(step, rng, generator):
        ids, mask, labels, labeled = batch(rng)
        states, _ = encoder(ids, mask)
        labels_loss = probes(states[labeled], labels[labeled])
        return labels_loss + probes.token_loss(states[mask], ids[mask])

    @torch.no_grad()
    def preview(step):
        ids, mask, labels, labeled = batch(random.Random("preview"), 512)
        right = probes.read(encoder(ids, mask)[0][labeled]) == labels[labeled]
        shares = zip(Probes.NAMES, right.float().mean(0).tolist())
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {x:.3f}" for name, x in shares))

    return fit("text", modules, loss_of, args, steps=args.steps or 1500, lr=1e-3, preview=preview)


def trained_text(args):
    tokenizer = load_tokenizer(Path(args.out, "tokenizer"))
    parts = {"encoder": TextEncoder(len(tokenizer)), "probes": Probes(128, len(tokenizer))}
    return tokenizer, trained("text", nn.ModuleDict(parts), args)["encoder"]


# ---- the base: SD3.5 in miniature ---------------------------------------------------------------

POOL = {"single": 4_000, "two": 24_000, "counting": 12_000, "scene": 24_000}


@torch.no_grad()
def latent_pool(vae, args):
    """{kind: (scenes, latents)}: encoded once, captioned anew at every use."""
    file = Path(args.out, "latents.pt")
    with reading(file, EARLIER):
        latents = torch.load(file, weights_only=True) if file.exists() else {}
    pool = {}
    for kind, size in POOL.items():
        rng = random.Random(f"{SEED} pool {kind}")
        scenes = [world.sample_scene(kind, rng) for _ in range(size)]
        if kind not in latents:
            parts = []
            for i in tqdm(range(0, size, 100), desc=f"latents of {kind}"):
                image = to_tensor([world.render(s) for s in scenes[i : i + 100]])
                parts.append(vae.encode(image.to(args.device)).cpu())
            latents[kind] = torch.cat(parts)
        pool[kind] = scenes, latents[kind]
    with whole(file) as partial:
        torch.save(latents, partial)
    return pool


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
    """The MM-DiT, by flow matching on captions and latents, one caption in ten left empty."""
    torch.manual_seed(SEED)
    vae = trained("vae", VAE(VAE_CONFIG), args)
    tokenizer, encoder = trained_text(args)
    pool = latent_pool(vae, args)
    model = initialise(MMDiT(BASE_CONFIG)).to(args.device)
    condition_of = partial(encode_text, model, encoder, tokenizer)

    def loss_of(step, rng, generator):
        # Full captions say where everything is, and so teach drawing; short ones leave it open.
        # What is learned last, counting above all, comes more often in the second half.
        full = rng.random() < (0.35 if step < 6_000 else 0.1)
        shares = lessons.SHARES if step < 12_000 else lessons.LATE_SHARES
        texts, latents = [], []
        for _ in range(64):
            task = "scene" if full else rng.choices(list(shares), shares.values())[0]
            scenes, encoded = pool[lessons.KINDS.get(task, "two")]
            i = rng.randrange(len(scenes))
            latents.append(encoded[i])
            dropped, prompt = rng.random() < 0.1, world.caption(scenes[i], task, rng)
            texts.append("" if dropped or world.is_exam(prompt) else prompt.text)
        x0 = torch.stack(latents).to(args.device)
        eps = torch.randn(x0.shape, generator=generator).to(args.device)
        t = flow.training_sigmas(len(x0), generator=generator).to(args.device)
        c = condition_of(texts)
        velocity = model(flow.add_noise(x0, eps, t), t, c.txt, c.vec, c.mask)
        return flow.velocity_loss(velocity, x0, eps).mean()

    @torch.no_grad()
    def preview(step):
        if step % 1000 == 0:
            prompts = world.benchmark(16, seed="preview")
            prompts = {task: [p for _, p in pairs] for task, pairs in prompts.items()}
            texts = [p.text for task in prompts.values() for p in task]
            images = draw(model, vae, condition_of(texts + [""] * len(texts)), steps=12)
            report(prompts, images, step, Path(args.out, "base.png"))

    steps = args.steps or 28_000

    def rate(step):
        # A high rate finds its way sooner; only a low one binds colors to shapes and counts.
        if step < 9_750:
            return 2.5e-3 * min(1.0, (step + 1) / 200)
        return 1.2e-3 * (steps - step) / (steps - 9_750)

    return fit("base", model, loss_of, args, steps=steps, lr=rate, preview=preview)


@torch.no_grad()
def draw(model, vae, condition, steps=28, guidance=4.5, seed=0):
    """Pictures by the base alone; condition: that of the prompts, then of as many empty texts."""
    noise = flow.noise(len(condition.vec) // 2, (model.config.channels, 8, 8), seed)
    return to_images(vae.decode(denoise(model, condition, noise, steps, guidance)))


def report(prompts, images, step, file):
    """Print the score of each task and save a sheet, a row for each task."""
    images, rows, scores = iter(images), [], {}
    for task, expected in prompts.items():
        rows.append([next(images) for _ in expected])
        right = [world.matches(p, world.detect(image)) for p, image in zip(expected, rows[-1])]
        scores[task] = sum(right) / len(right)
    each = ", ".join(f"{task} {score:.2f}" for task, score in scores.items())
    tqdm.write(f"step {step}: mean {sum(scores.values()) / len(scores):.3f} ({each})")
    write_png(file, sheet(rows, height=128))


# ---- the LMM: Qwen2-VL in miniature -------------------------------------------------------------


def new_lmm(tokenizer):
    start, image, end, video = tokenizer.convert_tokens_to_ids([*VISION_TOKENS, "<|video_pad|>"])
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "hidden_size": 192,
        "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
        "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 96, "num_heads": 3, "hidden_size": 192, "mlp_ratio": 4,
        "patch_size": PATCHES.patch,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image,
        vision_start_token_id=start, vision_end_token_id=end, video_token_id=video,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def train_lmm(args):
    """Next words of captions and descriptions, and the labels at every noun and image token."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(Path(args.out, "tokenizer"))
    noun_tokens = lessons.noun_ids(tokenizer)
    model, probes = new_lmm(tokenizer), Probes(192, len(tokenizer))
    modules = nn.ModuleDict({"lmm": model, "probes": probes}).to(args.device)
    lmm = Qwen2VL(model.model, tokenizer, PATCHES)

    def batch_of(kinds, rng):
        batch = [kind(tokenizer, rng) for kind in kinds]
        return [x.to(args.device) for x in lessons.lesson_batch(tokenizer, noun_tokens, batch)]

    def loss_of(step, rng, generator):
        kinds = rng.choices(list(lessons.LESSONS), lessons.LESSONS.values(), k=64)
        batch, token_ids, labels, labeled, vit_labels = batch_of(kinds, rng)
        hidden, vit = lmm(batch)
        is_next = batch.mask[:, 1:] & ~batch.image_mask[:, 1:]  # words to predict
        logits = model.lm_head(hidden[:, :-1][is_next])
        next_word = F.cross_entropy(logits, batch.ids[:, 1:][is_next])
        same_token = probes.token_loss(hidden[batch.mask], token_ids[batch.mask])
        known = probes(hidden[labeled], labels[labeled])
        return next_word + same_token + known + probes(vit, vit_labels)

    @torch.no_grad()
    def preview(step):
        if step % 500 == 0:
            rng = random.Random("preview lmm")
            scenes = [world.sample_scene(rng.choice(lessons.CAPTIONS), rng) for _ in range(100)]
            captions = describe_images(lmm, [world.render(s) for s in scenes])
            right = sum(c == world.describe(s) for c, s in zip(captions, scenes))
            tqdm.write(f"step {step}: captions right {right}/100, such as {captions[0]!r}")
            for kind in lessons.LESSONS:
                batch, _, labels, labeled, _ = batch_of([kind] * 100, rng)
                right = probes.read(lmm(batch)[0][labeled]) == labels[labeled]
                shares = ", ".join(f"{share:.3f}" for share in right.float().mean(0).tolist())
                tqdm.write(f"  {kind.__name__}: labels read {shares}")

    return fit("lmm", modules, loss_of, args, steps=args.steps or 3000, lr=1.5e-3, preview=preview)


def describe_images(lmm, images, length=24):
    """Greedy captions by a Qwen2VL whose head is its embedding, up to the word "background"."""
    texts = [""] * len(images)
    for _ in range(length):
        batch = lmm.collate([[image, text] for image, text in zip(images, texts)])
        hidden, _ = lmm(batch)
        last = hidden[torch.arange(len(images)), batch.mask.sum(1) - 1]
        logits = last @ lmm.language_model.embed_tokens.weight.T
        words = lmm.tokenizer.batch_decode(logits.argmax(1)[:, None])
        texts = [t if t.endswith("background") else t + w for t, w in zip(texts, words)]
    return texts


# ---- the published layouts ----------------------------------------------------------------------


def export(args):
    """Write what the stages above have learned to weights/mini/, in half precision."""
    MINI.mkdir(parents=True, exist_ok=True)
    tokenizer, encoder = trained_text(args)
    vae = trained("vae", VAE(VAE_CONFIG), args)
    model = trained("base", MMDiT(BASE_CONFIG), args)
    tensors = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    # It has seen 64 x 64 only: the middle 4 x 4 of the table, which larger pictures would run past.
    tensors["model.diffusion_model.pos_embed"] = model.positions(4, 4)
    tensors |= {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}
    save_half(tensors, SD3)
    save_half(encoder.state_dict(), TEXT_ENCODER)

    parts = {"lmm": new_lmm(tokenizer), "probes": Probes(192, len(tokenizer))}
    lmm = trained("lmm", nn.ModuleDict(parts), args)["lmm"]
    lmm.half().save_pretrained(LMM)
    tokenizer.save_pretrained(LMM)
    images = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCHES.patch,
        "merge_size": PATCHES.merge, "temporal_patch_size": 2, "min_pixels": PATCHES.min_pixels,
        "max_pixels": PATCHES.max_pixels,
    }  # fmt: skip
    write_json(LMM / "preprocessor_config.json", images)
    print(MINI)


def save_half(tensors, file):
    with whole(file) as partial:
        save_file({k: x.half().contiguous().cpu() for k, x in tensors.items()}, partial)


STAGES = {
    "vae": train_vae, "text": train_text, "base": train_base, "lmm": train_lmm, "export": export,
}  # fmt: skip


def main():
    parser = Parser(prog="python -m mini.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=whole_number(1), help="default: as many as it takes")
    parser.add_argument("--out", default="runs/pretrain")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    args = parser.parse_args()
    args.device = usable_device(args.device)
    STAGES[args.stage](args)


if __name__ == "__main__":
    with one_line_errors():
        main()
