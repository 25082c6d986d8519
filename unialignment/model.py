"""UniAlignment (arXiv 2509.23760): one MM-DiT draws, edits, perceives and reads.

    engine = UniAlignment.load()                     # the miniature
    engine.generate(["a red circle and a blue star"])[0].save("out.png")
    engine.answer([Image.open("out.png")])    # ["top red circle, left blue star, white background"]

Two passes share all weights. To draw, the image stream is a noisy latent, followed by the latents of
source pictures, and the text stream is a prompt; `flow.euler` integrates from noise to a latent. To
read, the image stream is a clean latent, and the text stream is a text with masked tokens, which
`masked.unmask` fills in. Time alone modulates the blocks; reading uses t = 0. Precision: T5, which
encodes both texts, and the MM-DiT in `dtype` (fp32 on a CPU, bf16 on a GPU); VAE, latents, times and
losses in fp32.
Letters: B batch, L text slots, N image tokens, D width, V vocabulary, C channels, M the teacher's width.
"""

from itertools import count
from pathlib import Path

from support.cli import UserError, check_finite, check_list

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import flow
from checkpoints import check, fingerprint
from prompts import check_drawing, crop_to, split_prompt, to_images, to_rgb, to_tensor
from support import fast
from support.files import prompt_row
from unialignment.folder import Tokens, load_pipeline, new_pipeline, save_frozen, save_transformer
from unialignment.masked import loss as text_loss
from unialignment.masked import unmask
from unialignment.transformer import load_transformer

MINI = Path(__file__).parent.parent / "weights" / "mini" / "unialignment"
LOSSES = {"velocity": 1.0, "text": 0.2, "csa": 0.05, "isa": 0.1}  # their weights, as published


class UniAlignment(nn.Module):
    """A Transformer, a T5 and a VAE, with the drawing pass and the reading pass."""

    def __init__(self, mmdit, text_encoder, tokenizer, vae, sampling):
        """Raises UserError if the parts do not fit together."""
        super().__init__()
        self.mmdit, self.text_encoder, self.vae, self.sampling = mmdit, text_encoder, vae, sampling
        self.lmm, self.lmm_states = None, False  # the teacher, a Qwen2VL, in training
        self.weights, self.parts = LOSSES, {}  # of the losses; the last mean of each loss
        config, entries = mmdit.config, len(tokenizer)
        for found, what, expected in (
            (vae.config.latent_channels, "latent channels of the autoencoder", config.channels),
            (text_encoder.config.d_model, "numbers in a state of T5", config.context_dim),
            (entries, "entries of the tokenizer", mmdit.text_head.out_features),
        ):
            if found != expected:
                raise UserError(f"{found} {what}: this transformer was trained with {expected}")
        if entries > (known := text_encoder.config.vocab_size):
            raise UserError(f"a tokenizer of {entries} entries: T5 has embeddings of {known}")
        self.tokens = Tokens(tokenizer, sampling.slots, sampling.sentence)
        self.guidance = sampling.guidance

    @classmethod
    def load(cls, folder=MINI, sd3=None, device=None, dtype=None):
        """Load a published pipeline folder, or its transformer/ beside a folder of SD3-medium (sd3).

        Raises FileNotFoundError, or UserError naming what does not fit.
        """
        parts = load_pipeline(folder, sd3, *fast.device_and_dtype(device, dtype))
        return cls(*parts).requires_grad_(False).eval()

    @classmethod
    def start(cls, sd3, text_encoder, device=None, dtype=None, **texts):
        """SD3 and T5 before training: it draws what SD3 draws with a vec of zero, and cannot read yet.

        The MM-DiT is fp32; see `folder.new_pipeline`.
        """
        parts = new_pipeline(sd3, text_encoder, *fast.device_and_dtype(device, dtype), **texts)
        return cls(*parts).requires_grad_(False).eval()

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    @property
    def default_size(self):
        return min(self.sampling.size, self.mmdit.config.largest)

    def context(self, ids):
        """Ids (B, L) -> text stream (B, L, D): a frozen T5 without padding mask, a Linear."""
        with torch.no_grad():
            states = self.text_encoder(input_ids=ids.to(self.device)).last_hidden_state
        return self.mmdit.context_embedder(states.to(self.mmdit.pos_embed.dtype))

    def draw(self, latent, t, context, sources=(), features=None):
        """Predict the velocity (B, C, H, W) at a noisy latent (B, C, H, W); t (B,) or a number.

        sources: clean latents of the same shape: one to edit, several to compose. With features=k,
        also the final image features and the image tokens after block k, from 1: (B, N, D).
        """
        mmdit = self.mmdit
        c = mmdit.embed_time(t, len(latent))
        img = [mmdit.embed_image(x.to(mmdit.pos_embed.dtype)) for x in (latent, *sources)]
        n = img[0].shape[1]  # the tokens of the target come first
        middle = mmdit.run_blocks(context, torch.cat(img, dim=1), c, stop=features or 0)
        _, img = mmdit.run_blocks(*middle, c, start=features or 0)
        final = mmdit.final_layer.features(img[:, :n], c)
        velocity = mmdit.unpatch(mmdit.final_layer.linear(final), latent)
        return (velocity, final, middle[1][:, :n]) if features else velocity

    def read(self, latent, context, features=None):
        """Predict logits (B, L, V) of a text about a clean latent (B, C, H, W), from a masked context.

        With features=k, also the final text features and the text tokens after block k: (B, L, D).
        """
        mmdit = self.mmdit
        img = mmdit.embed_image(latent.to(mmdit.pos_embed.dtype))
        c = mmdit.embed_time(0.0, len(latent))
        middle = mmdit.run_blocks(context, img, c, stop=features or 0)
        txt, _ = mmdit.run_blocks(*middle, c, start=features or 0)
        final = F.layer_norm(txt, txt.shape[-1:], eps=1e-6)
        logits = mmdit.text_head(final)
        return (logits, final, middle[0]) if features else logits

    def encode(self, images, size, generators):
        """Crop PIL images to size (width, height) and sample their latents (B, C, H, W)."""
        pixels = (to_tensor([crop_to(to_rgb(image), *size)]) for image in images)
        latents = [self.vae.encode(x.to(self.device), g) for x, g in zip(pixels, generators)]
        check_finite(self, "the latent of an image (of the VAE)", *latents)
        return torch.cat(latents)

    @torch.inference_mode()
    def generate(
        self, prompts, images=None, steps=None, guidance=None, size=None,
        *, negative=None, seed=0, progress=iter,
    ):  # fmt: skip
        """Draw one PIL image for each prompt, a text or a list of texts and PIL images.

        images: a list of PIL images for each prompt, equally many: none to draw, one to edit or to
        perceive, several to compose (three, as published). size: (width, height) in pixels, multiples
        of 16; images are cropped to it. negative: the prompt that guidance moves away from. Image i
        depends on its prompt, its images and seed + i alone. Raises UserError for what cannot be drawn.
        """
        check_list(prompts, str | list | tuple, "a list of prompts, one for each picture")
        sampling, images = self.sampling, images or [[]] * len(prompts)
        check_list(images, list | tuple, "a list of PIL images for each prompt", len(prompts))
        prompts = [[p] if isinstance(p, str) else p for p in prompts]
        prompts = [split_prompt([*p, *more]) for p, more in zip(prompts, images)]
        texts, pictures = ([prompt[i] for prompt in prompts] for i in (0, 1))
        if not all(text.strip() for text in texts):
            raise UserError("empty prompt: UniAlignment needs a text to draw")
        counts = sorted({len(row) for row in pictures})
        if len(counts) > 1:
            raise UserError(f"all prompts must have the same number of images: found {counts}")
        steps = sampling.steps if steps is None else steps
        guidance = self.guidance if guidance is None else guidance
        size = size or (self.default_size, self.default_size)
        check_drawing(steps, guidance, *size, self.mmdit.config.largest)

        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        shape = self.mmdit.config.channels, size[1] // 8, size[0] // 8
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        copies = 1 if guidance == 1 else 2
        sources = [self.encode(column, size, generators) for column in zip(*pictures)]
        sources = [source.repeat(copies, 1, 1, 1) for source in sources]
        negative = sampling.negative if negative is None else negative
        context = self.context(self.tokens(texts + [negative] * len(texts) * (copies - 1)))
        check_finite(self, "the condition (of T5)", context)

        def velocity(z, t):
            v = self.draw(z.repeat(copies, 1, 1, 1), t, context, sources).float()
            return flow.guide(*v.chunk(2), guidance) if copies == 2 else v

        sigmas = flow.sigma_schedule(steps, sampling.shift)
        with fast.prepared(self.mmdit, sigmas[:-1].tolist()) as prepared:
            latent = flow.euler(prepared(velocity), noise.to(self.device), sigmas, progress)
        check_finite(self, "the latent (of the MM-DiT)", latent)
        check_finite(self, "the picture (of the VAE)", picture := self.vae.decode(latent))
        return to_images(picture)

    @torch.inference_mode()
    def answer(self, images, questions=None, steps=None, order=None, *, seed=0):
        """Write a caption of each PIL image, or answer a question about it: a list of texts.

        questions: a text for each image. order: see `masked.unmask`. Text i depends on its image, its
        question and seed + i alone. Raises UserError for a question that leaves no slot.
        """
        sampling = self.sampling
        steps = sampling.text_steps if steps is None else steps
        check_list(images, Image.Image, "a list of PIL images")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        if questions:
            check_list(questions, str, "a list of questions, one for each image", len(images))
        if questions and not all(question.strip() for question in questions):
            raise UserError("empty question")
        rows = [self.tokens.about(question) for question in questions or [None] * len(images)]
        ids, hidden = (torch.stack(column).to(self.device) for column in zip(*rows))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        latent = self.encode(images, (self.default_size, self.default_size), generators)
        slots, order = (sampling.slots, self.mmdit.text_head.out_features), order or sampling.order

        draws = (torch.stack([torch.rand(slots, generator=g) for g in generators]) for _ in count())

        def logits(ids):
            found = self.read(latent, self.context(ids))
            check_finite(self, "the logits (of T5 and MM-DiT)", found)
            return found

        with fast.prepared(self.mmdit, [0.0]):
            ids = unmask(logits, ids, steps, order, draws, self.tokens.mask_id)
        return [self.tokens.text(row[new]) for row, new in zip(ids, hidden)]

    def start_training(self):
        """Make the whole MM-DiT trainable: {name: parameter}. ISA is 0 without a teacher, `lmm`."""
        self.requires_grad_(False)
        self.mmdit.requires_grad_(True).null_image.requires_grad_(False)
        base = fingerprint(self.mmdit.final_layer.linear.weight)
        t5 = fingerprint(self.text_encoder.shared.weight)
        self.base = {"base": base, "t5": t5, "texts": [self.tokens.slots, self.tokens.sentence]}
        self.base |= {"weights": self.weights, "lmm_states": self.lmm_states}
        if self.lmm:
            self.base["lmm"] = fingerprint(self.lmm.language_model.norm.weight)
            self.mmdit.align(self.lmm.config.text_config.hidden_size)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def training_noise(self, micro, generator):
        """The random draws of a microbatch: noise (B, 2 + S, C, H/8, W/8) and t (B,) of the pictures.

        The noise is for the flow, and for samples of the posteriors of the target and S sources.
        """
        rows, _, height, width = micro.target.shape
        shape = self.mmdit.config.channels, height // 8, width // 8
        noise = torch.randn(rows, 2 + micro.batch.sources.shape[1], *shape, generator=generator)
        t = (1000 * flow.training_sigmas(rows, 1.0, generator)).ceil() / 1000  # not shifted
        return {"noise": noise, "t": t.clamp(max=0.999)}

    def forward(self, batch, image, noise, t, weighted=True):
        """The weighted sum of the four losses of B examples, (B,); `parts` gets their means.

        batch: `examples.Pairs`; image (B, 3, H, W) in [-1, 1]; noise (B, 2 + S, C, h, w) and t (B,):
        see `training_noise`. weighted: the published weighting of the velocity, by t^2.
        """
        flow_noise, *noises = noise.unbind(1)
        with torch.no_grad():
            pictures = (image, *batch.sources.unbind(1))
            x0, *sources = (self.vae.encode(x, noise=e) for x, e in zip(pictures, noises))
            teacher = self.teach(batch) if self.lmm else None
        kind, more = self.device.type, {"teacher": teacher, "weighted": weighted}
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            losses = self.losses(batch, x0, flow_noise, t, sources, **more)
        self.parts = {name: x.mean().item() for name, x in losses.items()}
        return sum(self.weights[name] * x for name, x in losses.items())

    def teach(self, batch):
        """The teacher's mean image features and mean word embeddings (or states): (B, M) each."""
        lmm, first = self.lmm, batch.image_mask.int().argmax(1)
        if self.lmm_states:
            x, features = lmm(batch)
        else:
            x = lmm.language_model.embed_tokens(batch.ids)
            features = lmm.visual(batch.patches.to(x.dtype), batch.grids).pooler_output
        x[batch.image_mask] = features
        # The words come first, then the start of the picture
        words = torch.arange(x.shape[1], device=x.device) < first[:, None] - 1
        masks = batch.image_mask[..., None], words[..., None]
        return [(x * mask).sum(1) / mask.sum(1) for mask in masks]

    def losses(self, batch, x0, noise, t, sources=(), *, teacher=None, weighted=True):
        """The four losses of both passes on clean latents x0 (B, C, H, W): {name: (B,) fp32}.

        batch, weighted: see `forward`; noise like x0 and t (B,): of the flow; sources: latents of the
        source pictures; teacher: its mean image and text features (B, M), or None: ISA is 0.
        """
        k = max(1, self.mmdit.config.depth // 3)  # ISA aligns the tokens after this block: 8 of 24
        context, masked_context = self.context(torch.cat([batch.prompts, batch.hidden])).chunk(2)
        z = flow.add_noise(x0, noise, t)
        velocity, image, image_tokens = self.draw(z, t, context, sources, k)
        logits, text, text_tokens = self.read(x0, masked_context, k)
        mask_id, isa = self.tokens.mask_id, velocity.new_zeros(len(x0))
        if teacher:
            isa = misalignment(self.mmdit.image_adapter, image_tokens, teacher[0])
            isa = isa + misalignment(self.mmdit.text_adapter, text_tokens, teacher[1])
        return {
            "velocity": flow.velocity_loss(velocity, x0, noise, t if weighted else None),
            "text": text_loss(logits, batch.texts, batch.hidden == mask_id, batch.times, mask_id),
            "csa": contrast(image, text, batch.texts),
            "isa": isa,
        }

    def tokens_of_example(self, picture, prompt):
        """Tokens of an edit in both passes: two pictures and a prompt; a picture and a caption."""
        return 3 * picture + 2 * self.sampling.slots

    def preview(self, task, prompt, target, question, text):
        """Draw and read a training example: (pictures, text), a row of `support.files.sheet`."""
        drawn = self.generate([prompt], size=target.size) if prompt else []
        (*inputs, target), words = prompt_row(task, prompt or [question], target)
        (read,) = self.answer([target], question and [question])
        return [*inputs, *drawn, target], f"{words} / read: {read} / right: {text}"

    def save(self, folder, **_):
        """Write the transformer/ of a pipeline folder, as published; nothing else is trained."""
        save_transformer(self.mmdit, folder)

    save_frozen = save_frozen  # writes the rest of the folder

    def restore(self, folder):
        """Load what `save` wrote into an engine with the same trainable parameters."""
        saved = load_transformer(folder, self.device).state_dict()
        check(saved, self.mmdit.state_dict(), folder)
        self.mmdit.load_state_dict(saved)


def contrast(image, text, ids=None, temperature=0.07):
    """CSA, a contrastive loss between mean image features and mean text features: (B,).

    image (B, N, D) of the drawing pass, text (B, L, D) of the reading pass, padding included. ids
    (B, L): rows with the same text are not negatives of each other.
    """
    g, u = (F.normalize(x.float().mean(1), dim=1) for x in (image, text))
    scores, target = g @ u.T / temperature, torch.arange(len(g), device=g.device)
    if ids is not None:
        same = (ids[:, None] == ids).all(-1).fill_diagonal_(False)
        scores = scores.masked_fill(same, -torch.inf)
    return sum(F.cross_entropy(x, target, reduction="none") for x in (scores, scores.T)) / 2


def misalignment(adapter, tokens, teacher):
    """ISA: 1 - cosine similarity between adapter(mean token) and the teacher's vector: (B,).

    tokens (B, n, D) after a middle block, before any norm; teacher (B, M).
    """
    return 1 - F.cosine_similarity(adapter(tokens.mean(1)).float(), teacher.float())
