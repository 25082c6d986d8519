"""Train the miniature SD3.5, its T5 and its Qwen2-VL from scratch.

    python -m mini.pretrain vae       # the VAE, on pictures of many kinds
    python -m mini.pretrain t5        # the text encoder of SD3.5, on texts of many kinds
    python -m mini.pretrain base      # the base MM-DiT, on captions and latents
    python -m mini.pretrain lmm       # Qwen2-VL, on captions, instructions, questions and pictures
    python -m mini.pretrain decoder   # the VAE's decoder again, on noisy latents
    python -m mini.pretrain export    # writes weights/mini/ in the published layouts

Models of the published sizes are too large to train on a CPU. `bash mini/speedrun.sh` runs all
these commands, then trains both systems. A command that was stopped resumes when started again.
"""

import random
from functools import partial
from pathlib import Path
from statistics import fmean

from support.cli import Parser, number, one_line_errors, reading

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import flow
from dream_engine import LMM, MINI, SD3, Condition, denoise
from mini import pictures, scenes
from mini.encoders import PATCHES, tokenize, train_lmm, train_t5, trained_lmm, trained_t5
from mini.fitting import EARLIER, SEED, fit, trained
from mmdit import MMDiT, MMDiTConfig
from prompts import to_images, to_tensor
from support.fast import usable_device
from support.files import sheet, whole, write_json
from vae import SCALE, SHIFT, VAE, VAEConfig

T5 = MINI / "t5-mini"

# ---- the VAE ------------------------------------------------------------------------------------

VAE_CONFIG = VAEConfig(latent_channels=8, base=16, blocks=1, groups=4)


def train_vae(args, steps):
    """Train the VAE: pixel loss, a small KL, and a pull to the moments of SD3.5's latents."""
    torch.manual_seed(SEED)
    model = VAE(VAE_CONFIG).to(args.device, memory_format=torch.channels_last)
    nn.init.constant_(model.encoder.conv_out.bias[VAE_CONFIG.latent_channels :], -4.0)

    def loss_of(step, rng, generator):
        image = to_tensor([pictures.sample(rng) for _ in range(8)]).to(args.device)
        mean, std = model.posterior(image)
        z = mean + std * torch.randn(std.shape, generator=generator).to(args.device)
        pixels = pixel_loss(model.decoder(z), image)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        moments = (z.mean((0, 2, 3)) - SHIFT) ** 2 + (z.std((0, 2, 3)) - 1 / SCALE) ** 2
        return pixels + 1e-4 * kl + 0.01 * moments.mean()

    preview = partial(preview_vae, model, args, "vae.png")
    return fit("vae", model, loss_of, steps, 2e-3, args, preview, decay=0.6)


def train_decoder(args, steps):
    """Train the decoder further, on slightly noisy latents, because drawn latents are inexact."""
    model = trained("vae", VAE(VAE_CONFIG), args).to(memory_format=torch.channels_last)
    model.decoder.requires_grad_(True).train()

    def loss_of(step, rng, generator):
        image = to_tensor([pictures.sample(rng) for _ in range(12)]).to(args.device)
        with torch.no_grad():
            z, _ = model.posterior(image)
        share = torch.rand(len(z), 1, 1, 1, generator=generator)
        noise = 0.15 / SCALE * share * torch.randn(z.shape, generator=generator)
        return pixel_loss(model.decoder(z + noise.to(args.device)), image)

    preview = partial(preview_vae, model, args, "decoder.png")
    return fit("decoder", model.decoder, loss_of, steps, 1.5e-3, args, preview, decay=0.7)


def trained_vae(args):
    """The trained VAE, with the decoder of `train_decoder` if there is one."""
    model = trained("vae", VAE(VAE_CONFIG), args).to(memory_format=torch.channels_last)
    if Path(args.out, "decoder.pt").exists():
        trained("decoder", model.decoder, args)
    return model


def pixel_loss(copy, image):
    error = copy - image
    return error.square().mean() + 0.5 * error.abs().mean()


@torch.no_grad()
def preview_vae(model, args, file, step):
    """Reconstruct 200 test scenes and 100 other pictures; write a sheet of some to file.

    right: the share of scenes that the detector recovers. db: the mean PSNR of all pictures.
    """
    rng = random.Random("preview")
    cases = [scenes.sample_scene("scene", rng, scenes.PAIRS, reserved=True) for _ in range(200)]
    images = [*map(scenes.render, cases), *(pictures.sample(rng) for _ in range(100))]
    batch = to_tensor(images).to(args.device)
    copies = model.decode(model.encode(batch))
    errors = (copies - batch).square().mean((1, 2, 3)) / 4
    copies, shown = to_images(copies), slice(190, 210)
    sheet([images[shown], copies[shown]], 96).save(Path(args.out, file))
    right = fmean(scenes.detect(copy) == scene for copy, scene in zip(copies, cases))
    return {"right": right, "db": round(-10 * errors.log10().mean().item(), 2)}


# ---- the base MM-DiT: SD3.5 in miniature --------------------------------------------------------

BASE_CONFIG = MMDiTConfig(
    6, 128, head_dim=32, channels=8, positions=16, context_dim=128, pooled_dim=128
)
POOL = {"single": 3_000, "two": 14_000, "counting": 9_000, "scene": 14_000}  # scenes of each kind
SHORT = {  # task of short captions: kind of scenes in POOL, share early in training, share later
    "single": ("single", 2, 2),
    "colors": ("single", 2, 1),
    "two": ("two", 4, 6),
    "counting": ("counting", 5, 9),
    "position": ("two", 6, 5),
    "attribution": ("two", 6, 3),
}


def latent_pool(vae, args):
    """The training set {kind: (scenes, latents)}, cached; its captions are random every time."""
    file, pool = Path(args.out, "latents.pt"), {}
    for kind, size in POOL.items():
        rng = random.Random(f"{SEED} pool {kind}")
        pool[kind] = [scenes.sample_scene(kind, rng, scenes.PAIRS) for _ in range(size)]
    if not file.exists():
        with whole(file) as partial:
            torch.save({kind: encoded(vae, rows, args) for kind, rows in pool.items()}, partial)
    with reading(file, EARLIER):
        latents = torch.load(file, weights_only=True)
        return {kind: (rows, latents[kind]) for kind, rows in pool.items()}


@torch.no_grad()
def encoded(vae, rows, args):
    parts = []
    for i in tqdm(range(0, len(rows), 100), desc="latents"):
        image = to_tensor(list(map(scenes.render, rows[i : i + 100])))
        parts.append(vae.encode(image.to(args.device)).cpu())
    return torch.cat(parts)


class TextCondition:
    """The conditioning of SD3 itself: the states of its T5 as txt, and their mean as vec."""

    def __init__(self, model, t5, tokenizer):
        self.model, self.t5, self.tokenizer = model, t5, tokenizer

    def __call__(self, texts, pads=None, pooled=None):
        """Texts -> Condition.

        pads: add this many pads and attend to all, as UniAlignment does; None: attend to none.
        pooled (n,): 0 replaces the pooled vector of a text by zeros; default: all 1.
        """
        device = self.model.pos_embed.device
        ids, mask = (x.to(device) for x in tokenize(self.tokenizer, texts, pads or 0))
        if pads is not None:
            mask = torch.ones_like(mask)
        with torch.no_grad():
            states = self.t5(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        txt, vec = self.model.embed_text(states, mean)
        if pooled is not None:
            vec = vec * pooled.to(device)[:, None]
        return Condition(txt, mask, vec)


def position_table(side, width):
    """2-D sine-cosine table (1, side * side, width) of SD3, the half of the columns first."""
    omega = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return rearrange(torch.cat([columns, rows], dim=2), "h w D -> 1 (h w) D").float()


def initialise(model):
    """Initialise as DiT: gates and output are zero, so that every block starts as the identity."""
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    model.pos_embed.copy_(position_table(model.config.positions, model.config.width))
    return model


def base_batch(pool, step, steps, rng):
    """Draw 64 texts and their latents (64, 8, 6, 6).

    A batch has only full captions, which teach drawing, or only short ones. Tasks that are learnt
    late, above all counting, are more frequent later. The null prompt replaces captions that are
    reserved for the test set, and one in ten of the others.
    """
    full = rng.random() < (0.35 if step < 0.21 * steps else 0.1)
    shares = [early if step < 0.43 * steps else late for _, early, late in SHORT.values()]
    texts, latents = [], []
    for _ in range(64):
        task = "scene" if full else rng.choices(list(SHORT), shares)[0]
        pool_scenes, pool_latents = pool["scene" if full else SHORT[task][0]]
        i = rng.randrange(len(pool_scenes))
        prompt = scenes.caption(pool_scenes[i], task, rng)
        latents.append(pool_latents[i])
        texts.append("" if rng.random() < 0.1 or scenes.is_reserved(prompt) else prompt.text)
    return texts, torch.stack(latents)


def train_base(args, steps):
    """Train the MM-DiT by flow matching on captions and latents.

    UniAlignment starts from this model, attends to padding and has no pooled vector. Half of the
    batches therefore attend to padding, and half of the examples have a pooled vector of zeros.
    """
    torch.manual_seed(SEED)
    vae, (tokenizer, t5) = trained_vae(args), trained_t5(args)
    pool = latent_pool(vae, args)
    model = initialise(MMDiT(BASE_CONFIG)).to(args.device)
    condition_of = TextCondition(model, t5, tokenizer)

    def loss_of(step, rng, generator):
        texts, x0 = base_batch(pool, step, steps, rng)
        x0 = x0.to(args.device)
        eps = torch.randn(x0.shape, generator=generator).to(args.device)
        t = flow.training_sigmas(len(x0), generator=generator).to(args.device)
        pads = rng.choice((0, 0, 1, 2, 4)) if rng.random() < 0.5 else None
        pooled = (torch.rand(len(x0), generator=generator) < 0.5).float()
        c = condition_of(texts, pads, pooled)
        velocity = model(flow.add_noise(x0, eps, t), t, c.txt, c.vec, c.mask)
        return flow.velocity_loss(velocity, x0, eps).mean()

    def preview(step):
        if step % 1000 and step != steps:
            return {}
        return preview_base(vae, condition_of, Path(args.out, "base.png"))

    return fit("base", model, loss_of, steps, 2.5e-3, args, preview, decay=0.5)


@torch.no_grad()
def draw(vae, condition_of, texts, steps, guidance, seed=0, alone=False):
    """Draw a picture for each text with the model of a TextCondition.

    alone: use no pooled vector, and attend to padding, as UniAlignment does when it starts.
    """
    model, texts = condition_of.model, [*texts, *[""] * len(texts)]
    condition = condition_of(texts, *((4, torch.zeros(len(texts))) if alone else ()))
    shape = (model.config.channels, scenes.SIZE // 8, scenes.SIZE // 8)
    start = flow.noise(len(texts) // 2, shape, seed)
    return to_images(vae.decode(denoise(model, condition, start, steps, guidance)))


def preview_base(vae, condition_of, file, n=16):
    """Score n test prompts for each of the six tasks: the share of right pictures.

    mean: drawn as SD3 draws. time_alone: without the pooled vector, as UniAlignment draws.
    """
    cases = scenes.benchmark(n, seed="preview", pairs=scenes.PAIRS).values()
    prompts, scores = [prompt for pairs in cases for _, prompt in pairs], {}
    for name, alone in (("time_alone", True), ("mean", False)):
        images = draw(vae, condition_of, [p.text for p in prompts], 12, 2.5, alone=alone)
        right = [scenes.matches(p, scenes.detect(image)) for p, image in zip(prompts, images)]
        scores[name] = round(fmean(right), 3)
    sheet([images[i : i + n] for i in range(0, len(images), n)]).save(file)
    return scores


# ---- files and command line ---------------------------------------------------------------------


def export(args):
    """Write all trained parts to weights/mini/ in the published layouts, in half precision."""
    MINI.mkdir(parents=True, exist_ok=True)
    model = trained("base", MMDiT(BASE_CONFIG), args)
    tensors = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    # Training used one size, so only the middle of the table is trained.
    side = scenes.SIZE // 16
    tensors["model.diffusion_model.pos_embed"] = model.positions(side, side)
    tensors |= {f"first_stage_model.{k}": v for k, v in trained_vae(args).state_dict().items()}
    save_file({name: x.half().contiguous().cpu() for name, x in tensors.items()}, SD3)
    for folder, (tokenizer, encoder) in ((T5, trained_t5(args)), (LMM, trained_lmm(args))):
        encoder.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCHES.patch, "merge_size": PATCHES.merge, "temporal_patch_size": 2,
        "min_pixels": PATCHES.min_pixels, "max_pixels": PATCHES.max_pixels,
    }  # fmt: skip
    write_json(LMM / "preprocessor_config.json", images)
    print(MINI)


PARTS = {  # part: training function, steps at --scale 1
    "vae": (train_vae, 4_000),
    "t5": (train_t5, 3_000),
    "base": (train_base, 8_500),
    "lmm": (train_lmm, 2_000),
    "decoder": (train_decoder, 3_000),
}


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PARTS, "export"))
    parser.add_argument("--scale", type=number(0, 1000, exclude_low=True), default=1.0,
                        help="multiplies the number of training steps; default: 1")  # fmt: skip
    parser.add_argument("--out", default="runs/pretrain", help="folder of checkpoints and logs")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if available")
    args = parser.parse_args()
    args.device = usable_device(args.device)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.part == "export":
        return export(args)
    train, steps = PARTS[args.part]
    train(args, max(1, round(args.scale * steps)))


if __name__ == "__main__":
    with one_line_errors():
        main()
