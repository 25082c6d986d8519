"""UniAlignment (arXiv 2509.23760): one MM-DiT draws, edits, perceives and reads.

    engine = UniAlignment.load("folder of the published pipeline")
    engine.generate(["a red circle and a blue star"])[0].save("out.png")
    engine.answer([Image.open("out.png")])            # ["a red circle and a blue star"]

Two passes share all weights. Draw: the image stream is a noisy latent, followed by the pictures to
start from, the text stream a prompt; `flow.py` walks from noise to a latent. Read: the image stream is
a clean latent, the text stream a text with masked tokens; `masked.py` fills them in. T5 makes the text
stream in both. Nothing but the time modulates the blocks, and reading is at t = 0. Precision: T5 and
MM-DiT in `dtype` (fp32 on CPU, bf16 on CUDA); VAE, latents, times and losses in fp32.
Letters: B batch, L text slots, N image tokens, D width, V vocabulary, C channels, M the teacher's width.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import flow
import masked
import pipeline
from checkpoints import check, load_mmdit, load_vae
from prompts import centre_crop, check_drawing, to_images, to_rgb, to_tensor
from support import fast
from support.cli import UserError
from vae import SCALE, SHIFT

MINI = Path(__file__).parent / "weights" / "mini" / "unialignment"
LOSSES = {"velocity": 1.0, "text": 0.2, "csa": 0.05, "isa": 0.1}  # and their published weights


class Texts(NamedTuple):
    """What both passes of B examples read, each text (B, L) ids."""

    prompts: torch.Tensor  # that shall draw the picture
    ids: torch.Tensor  # the text about it
    hidden: torch.Tensor  # the same with MASK at some slots
    t: torch.Tensor  # (B,), how many of them


class UniAlignment(nn.Module):
    """Transformer, T5 and VAE, and both ways through them."""

    def __init__(self, mmdit, text_encoder, tokenizer, vae, sampling):
        """Raises UserError where the parts do not belong together."""
        super().__init__()
        self.mmdit, self.text_encoder, self.vae = mmdit, text_encoder, vae
        self.sampling, self.lmm = sampling, None
        self.weights, self.parts = list(LOSSES.values()), {}
        config, rows = mmdit.config, text_encoder.config.vocab_size
        for found, what, expected in (
            (vae.config.latent_channels, "latent channels of the autoencoder", config.channels),
            (text_encoder.config.d_model, "numbers a state of T5", config.context_dim),
            (len(tokenizer), "entries of the tokenizer", mmdit.text_head.out_features),
        ):
            if found != expected:
                raise UserError(f"{found} {what}: this transformer was trained with {expected}")
        if len(tokenizer) > rows:
            raise UserError(f"a tokenizer of {len(tokenizer)} entries, but T5 knows {rows}")
        self.tokens = pipeline.Tokens(tokenizer, sampling.slots)

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    @property
    def default_size(self):
        return min(self.sampling.size, self.mmdit.config.largest)

    @classmethod
    def load(cls, folder=MINI, sd3=None, device=None, dtype=None, *, mask=None):
        """Load a published pipeline folder, or its transformer/ completed by a folder of SD3-medium.

        mask: the file of the vector that stands for MASK, a bare tensor, where text_encoder/ still has
        T5's own; a mask_token_emb*.pth in the folder is found. Raises FileNotFoundError or UserError,
        with one line that says what is missing or does not fit.
        """
        device = fast.usable_device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        places = {name: pipeline.find_folder(folder, sd3, name) for name in pipeline.PARTS}
        sampling = pipeline.read_sampling(folder, places["scheduler"])
        tokenizer = pipeline.load_tokenizer(places["tokenizer"])
        mmdit = pipeline.load_transformer(places["transformer"], device, dtype)
        vae = load_vae(places["vae"], device)
        text_encoder = pipeline.load_text_encoder(places["text_encoder"], device, dtype)
        engine = cls(mmdit, text_encoder, tokenizer, vae, sampling).requires_grad_(False).eval()
        mask = mask or next(iter(sorted(Path(folder).glob("mask_token_emb*.pth"))), None)
        if mask:
            embeddings = text_encoder.shared.weight
            embeddings[engine.tokens.mask_id] = pipeline.read_vector(mask, embeddings.shape[1]).to(
                embeddings
            )
        return engine

    @classmethod
    def start(cls, sd3, text_encoder, device=None, dtype=None, *, slots=256, size=512):
        """SD3 and T5 before training: it draws what SD3 draws for a vec of zero, and reads nothing.

        sd3: single file or diffusers folder; text_encoder: the folder of a T5 whose states sd3 knows,
        its tokenizer inside or beside it. The MM-DiT is fp32; new weights come from torch's generator.
        """
        device = fast.usable_device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        tokenizer = pipeline.load_tokenizer(pipeline.tokenizer_of(text_encoder))
        mmdit = pipeline.Transformer.grow(load_mmdit(sd3, device), len(tokenizer))
        t5, vae = pipeline.load_text_encoder(text_encoder, device, dtype), load_vae(sd3, device)
        size = min(size, mmdit.config.largest)
        sampling = pipeline.Sampling(slots, size, negative="", text_steps=8, order="confident")
        return cls(mmdit, t5, tokenizer, vae, sampling).requires_grad_(False).eval()

    # ---- the two passes ----

    def context(self, ids):
        """Token ids (B, L) -> the text stream (B, L, D): T5, frozen and without a mask, then a Linear."""
        with torch.no_grad():
            states = self.text_encoder(input_ids=ids.to(self.device)).last_hidden_state
        return self.mmdit.context_embedder(states.to(self.mmdit.context_embedder.weight.dtype))

    def draw(self, latent, t, context, sources=(), features=None):
        """The velocity (B, C, H, W) at a noisy latent (B, C, H, W); t (B,) or a number, 1 is noise.

        sources: clean latents of the same shape, to edit one or compose several. With features=k also
        the final image features (B, N, D) and the image tokens (B, N, D) after block k, from 1.
        """
        mmdit, dtype = self.mmdit, context.dtype
        for source in sources:
            if source.shape != latent.shape:
                shapes = f"{tuple(source.shape)} beside a target of {tuple(latent.shape)}"
                raise UserError(f"a source latent of {shapes}: they must have one shape")
        c = mmdit.embed_time(t, len(latent), dtype)
        img = torch.cat([mmdit.embed_image(x.to(dtype)) for x in (latent, *sources)], dim=1)
        n = img.shape[1] // (1 + len(sources))  # the target's come first, only they are read off
        _, img, pair = mmdit.run_blocks(context, img, c, middle=features)
        final = mmdit.final_layer.features(img[:, :n], c)
        velocity = mmdit.unpatch(mmdit.final_layer.linear(final), latent)
        return velocity if features is None else (velocity, final, pair[1][:, :n])

    def read(self, latent, context, features=None):
        """Logits (B, L, V) of a text about a clean latent (B, C, H, W), from its masked context.

        With features=k also the final text features and the text tokens after block k, (B, L, D).
        """
        mmdit, dtype = self.mmdit, context.dtype
        c = mmdit.embed_time(0.0, len(latent), dtype)
        txt, _, pair = mmdit.run_blocks(
            context, mmdit.embed_image(latent.to(dtype)), c, middle=features
        )
        final = F.layer_norm(txt, txt.shape[-1:], eps=1e-6)
        logits = mmdit.text_head(final)
        return logits if features is None else (logits, final, pair[0])

    # ---- use ----

    def encode(self, images, size, generators):
        """PIL images -> latents (B, C, H, W), cut to size (width, height); each a posterior's sample."""
        pixels = [to_tensor([centre_crop(to_rgb(image), *size)]) for image in images]
        latents = [self.vae.encode(x.to(self.device), g) for x, g in zip(pixels, generators)]
        return torch.cat(latents)

    @torch.inference_mode()
    def generate(
        self, prompts, images=None, steps=None, guidance=None, size=None,
        *, negative=None, seed=0, progress=iter,
    ):  # fmt: skip
        """Draw one PIL image for each prompt, a text, or a list of texts and PIL images.

        images: a list of PIL images for each prompt: none to draw, one to edit or perceive, three to
        compose; the same number for all. size: (width, height), multiples of 16; pictures are cut to
        it. negative: what guidance moves away from, while the pictures stay. Image i depends on its
        prompt, its pictures and seed + i alone. Raises UserError for what cannot be drawn.
        """
        sampling, texts, pictures = self.sampling, [], []
        for prompt, more in zip(prompts, images or [[]] * len(prompts), strict=True):
            parts = [prompt] if isinstance(prompt, str) else prompt
            texts.append("".join(part for part in parts if isinstance(part, str)))
            pictures.append([*(part for part in parts if not isinstance(part, str)), *more])
        if not texts or not all(text.strip() for text in texts):
            raise UserError("empty prompt: UniAlignment draws what a text says")
        if len({len(row) for row in pictures}) > 1:
            raise UserError("prompts with different numbers of images cannot be drawn together")
        if (count := len(pictures[0])) not in (0, 1, 3):
            raise UserError(
                f"UniAlignment takes no image, one to edit or three, but {count} were given"
            )
        steps = sampling.steps if steps is None else steps
        guidance = sampling.guidance if guidance is None else guidance
        size = size or (self.default_size, self.default_size)
        self.check(steps, guidance, *size)

        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        shape = self.mmdit.config.channels, size[1] // 8, size[0] // 8
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        copies = 1 if guidance == 1 else 2
        sources = [self.encode(column, size, generators) for column in zip(*pictures)]
        sources = [source.repeat(copies, 1, 1, 1) for source in sources]
        negative = sampling.negative if negative is None else negative
        asked = texts + [negative] * len(texts) * (copies - 1)
        context = self.context(self.tokens(asked))

        def velocity(z, t):
            go_to(t)
            v = self.draw(z.repeat(copies, 1, 1, 1), t, context, sources).float()
            return flow.guide(*v.chunk(2), guidance) if copies == 2 else v

        sigmas = flow.sigma_schedule(steps, sampling.shift)
        with fast.prepared(self.mmdit, sigmas[:-1].tolist(), self._no_vec()) as go_to:
            latent = flow.euler(velocity, noise.to(self.device), sigmas, progress)
        return to_images(self.vae.decode(latent))

    @torch.inference_mode()
    def answer(self, images, questions=None, steps=None, order=None, *, seed=0):
        """A caption of each PIL image, or the answer to the question about it: list of texts.

        questions: a text for each image. order: see `masked.unmask`. Text i depends on its image, its
        question and seed + i alone. Raises UserError for a question that leaves no slot.
        """
        sampling = self.sampling
        steps = sampling.text_steps if steps is None else steps
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        if not images:
            raise UserError("no image to read")
        if questions and not all(question.strip() for question in questions):
            raise UserError("empty question")
        rows = [self.tokens.about(question) for question in questions or [None] * len(images)]
        ids, hidden = (torch.stack(column).to(self.device) for column in zip(*rows))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        latent = self.encode(images, (self.default_size, self.default_size), generators)
        slots = sampling.slots, self.mmdit.text_head.out_features
        draws = (
            torch.stack([torch.rand(slots, generator=g) for g in generators]) for _ in range(steps)
        )
        with fast.prepared(self.mmdit, [0.0], self._no_vec()) as go_to:
            go_to(0.0)
            ids = masked.unmask(
                lambda x: self.read(latent, self.context(x)),
                ids,
                steps,
                order or sampling.order,
                draws,
                self.tokens.mask_id,
            )
        return [self.tokens.text(row[new]) for row, new in zip(ids, hidden)]

    def _no_vec(self):
        """What `support.fast` adds to the time: nothing, for all rows."""
        return self.mmdit.pos_embed.new_zeros(1, self.mmdit.config.width)

    def check(self, steps, guidance, width, height):
        """Raise UserError for settings that cannot be drawn, before any long work."""
        check_drawing(steps, guidance, width, height, self.mmdit.config.largest)

    # ---- training ----

    def start_training(self, *_):
        """All of the MM-DiT learns but what is never used; returns the parameters that do, by name.

        The teacher is `lmm`, a Qwen2VL; without it ISA is left out.
        """
        self.requires_grad_(False)
        self.mmdit.requires_grad_(True).null_image.requires_grad_(False)
        if self.lmm:
            self.mmdit.align(self.lmm.config.text_config.hidden_size)
        elif hasattr(self.mmdit, "image_adapter"):
            self.mmdit.image_adapter.requires_grad_(False)
            self.mmdit.text_adapter.requires_grad_(False)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def restore(self, folder):
        """Take back what `save_transformer` wrote, into an engine that trains the same."""
        saved = pipeline.load_transformer(folder, self.device, torch.float32).state_dict()
        check(saved, {k: x.shape for k, x in self.mmdit.state_dict().items()}, folder)
        self.mmdit.load_state_dict(saved)

    def forward(self, batch, image, noise, t, times, weighted=True):
        """The weighted sum of the four losses of B examples, (B,); `parts` keeps their means.

        batch: `pairs.Pairs`; image (B, 3, H, W) in [-1, 1] the target; noise (B, 2 + S, C, h, w): of the
        flow, then of the posterior samples of the target and its S sources; t (B,) of the picture, times
        (B,) of the text. weighted: the published weighting of the velocity, by t^2.
        """
        pictures = [image, *batch.sources.unbind(1)]
        flow_noise, *noises = noise.unbind(1)
        with torch.no_grad():
            posteriors = [self.vae.posterior(picture) for picture in pictures]
            teacher = self.teach(batch) if self.lmm else None
        x0, *sources = (
            (mean + std * e - SHIFT) * SCALE for (mean, std), e in zip(posteriors, noises)
        )
        texts = Texts(batch.prompts, batch.texts, batch.hidden, times)
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            losses = self.losses(x0, flow_noise, t, texts, sources, teacher, weighted=weighted)
        self.parts = dict(zip(LOSSES, losses.detach().mean(1).tolist()))
        return losses.new_tensor(self.weights) @ losses

    def teach(self, batch):
        """The teacher's mean image features of the target, and mean embedding of the words: (B, M)."""
        lmm, first = self.lmm, batch.image_mask.int().argmax(1)
        x = lmm.language_model.embed_tokens(batch.ids)
        x[batch.image_mask] = lmm.visual(batch.patches.to(x.dtype), batch.grids).pooler_output
        words = torch.arange(x.shape[1], device=x.device) < first[:, None] - 1  # then the picture
        masks = (batch.image_mask[..., None], words[..., None])
        return [(x * mask).sum(1) / mask.sum(1) for mask in masks]

    @property
    def middle(self):
        """The block whose tokens are aligned with the teacher: number 8 of 24."""
        return max(1, self.mmdit.config.depth // 3)

    def losses(self, x0, noise, t, texts, sources=(), teacher=None, *, weighted=True):
        """The four losses of both passes on clean latents x0 (B, C, H, W), unweighted: (4, B) fp32.

        In the order of LOSSES; velocity times t^2 if weighted. noise like x0, t (B,);
        texts: see there; sources: latents to start from; teacher: its mean image features and mean
        text features, (B, M) each; without it ISA is 0.
        """
        context = self.context(torch.cat([texts.prompts, texts.hidden]))
        context, masked_context = context.chunk(2)
        z = flow.add_noise(x0, noise, t)
        velocity, image, image_tokens = self.draw(z, t, context, sources, self.middle)
        logits, text, text_tokens = self.read(x0, masked_context, self.middle)
        hidden = texts.hidden == self.tokens.mask_id
        isa = velocity.new_zeros(len(x0))
        if teacher:
            isa = misalignment(self.mmdit.text_adapter, text_tokens, teacher[1])
            isa = isa + misalignment(self.mmdit.image_adapter, image_tokens, teacher[0])
        return torch.stack(
            [
                flow.velocity_loss(velocity, x0, noise, t if weighted else None),
                masked.loss(logits, texts.ids, hidden, texts.t, self.tokens.mask_id),
                contrast(image, text, texts.ids),
                isa,
            ]
        )

    # ---- saving ----

    def save(self, folder):
        """Write all parts into a pipeline folder as published, which `load` reads."""
        self.save_frozen(folder)
        self.save_transformer(Path(folder, "transformer"))

    def save_transformer(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.save_transformer(self.mmdit, folder)

    def save_frozen(self, folder):
        """Write what training does not change."""
        for name in pipeline.PARTS:
            Path(folder, name).mkdir(parents=True, exist_ok=True)
        pipeline.save_vae(self.vae, Path(folder, "vae"))
        pipeline.save_settings(self.sampling, Path(folder))
        self.text_encoder.save_pretrained(Path(folder, "text_encoder"))
        self.tokens.tokenizer.save_pretrained(Path(folder, "tokenizer"))


# ---- losses -------------------------------------------------------------------------------------


def contrast(image, text, ids=None, temperature=0.07):
    """CSA: the mean image features of a row shall be nearest to its own mean text features: (B,).

    image (B, N, D) of the drawing pass, text (B, L, D) of the reading pass; padding counts. ids
    (B, L): rows that read the same text are no counterexamples to each other.
    """
    g, u = (F.normalize(x.float().mean(1), dim=1) for x in (image, text))
    scores, target = g @ u.T / temperature, torch.arange(len(g), device=g.device)
    if ids is not None:
        same = (ids[:, None] == ids).all(-1).fill_diagonal_(False)
        scores = scores.masked_fill(same, -torch.inf)
    return sum(F.cross_entropy(x, target, reduction="none") for x in (scores, scores.T)) / 2


def misalignment(adapter, tokens, teacher):
    """ISA: 1 - cosine between what an adapter makes of the mean token and the teacher's vector: (B,).

    tokens (B, n, D) from a middle layer, before any norm; teacher (B, M).
    """
    return 1 - F.cosine_similarity(adapter(tokens.mean(1)).float(), teacher.float())
