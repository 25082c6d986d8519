"""UniAlignment (arXiv 2509.23760): one MM-DiT draws, edits, perceives and reads.

    engine = UniAlignment.load("folder of the published pipeline")
    engine.generate(["a red circle and a blue star"])[0].save("out.png")
    engine.answer([Image.open("out.png")])    # ["top red circle, left blue star, white background"]

Two passes share all weights. Draw: the image stream is a noisy latent, followed by the pictures to
start from, the text stream a prompt; `flow.py` walks from noise to a latent. Read: the image stream is
a clean latent, the text stream a text with masked tokens; `masked.py` fills them in. Time alone
modulates the blocks, t = 0 to read. Precision: T5, which makes both text streams, and MM-DiT in
`dtype` (fp32 on CPU, bf16 on CUDA); VAE, latents, times and losses in fp32.
Letters: B batch, L text slots, N image tokens, D width, V vocabulary, C channels, M the teacher's width.
"""

from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import flow
from checkpoints import Part, check, fingerprint, load_mmdit, load_vae
from prompts import check_drawing, crop_to, split_prompt, to_images, to_rgb, to_tensor
from support import fast
from support.cli import UserError, reading
from support.files import whole, write_json
from unialignment import folder as folders
from unialignment import masked, transformer

MINI = Path(__file__).parent.parent / "weights" / "mini" / "unialignment"
LOSSES = {"velocity": 1.0, "text": 0.2, "csa": 0.05, "isa": 0.1}  # and their published weights


class UniAlignment(nn.Module):
    """Transformer, T5 and VAE, and both ways through them."""

    def __init__(self, mmdit, text_encoder, tokenizer, vae, sampling):
        """Raises UserError where the parts do not belong together."""
        super().__init__()
        self.mmdit, self.text_encoder, self.vae, self.sampling = mmdit, text_encoder, vae, sampling
        self.lmm, self.lmm_states = None, False  # the teacher, a Qwen2VL, in training
        self.weights, self.parts = LOSSES, {}  # of the losses; the last of each
        config, entries = mmdit.config, len(tokenizer)
        for found, what, expected in (
            (vae.config.latent_channels, "latent channels of the autoencoder", config.channels),
            (text_encoder.config.d_model, "numbers a state of T5", config.context_dim),
            (entries, "entries of the tokenizer", mmdit.text_head.out_features),
        ):
            if found != expected:
                raise UserError(f"{found} {what}: this transformer was trained with {expected}")
        if entries > text_encoder.config.vocab_size:
            raise UserError(f"a tokenizer of {entries} entries, more than T5 knows")
        self.tokens = folders.Tokens(tokenizer, sampling.slots, sampling.sentence)
        self.guidance = sampling.guidance

    @classmethod
    def load(cls, folder=MINI, sd3=None, device=None, dtype=None):
        """Load a published pipeline folder, or its transformer/ completed by a folder of SD3-medium.

        A mask_token_emb*.pth in the folder holds the vector that stands for MASK, if text_encoder/
        has still T5's own. Raises FileNotFoundError or UserError naming what does not fit.
        """
        device, dtype = fast.device_and_dtype(device, dtype)
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder; expected one of UniAlignment")
        places = {name: folders.find_folder(folder, sd3, name) for name in folders.PARTS}
        sampling = folders.read_sampling(places["scheduler"])
        tokenizer = folders.load_tokenizer(places["tokenizer"])
        inner = folder / "transformer"
        mmdit = transformer.load_transformer(inner if inner.is_dir() else folder, device, dtype)
        vae = load_vae(places["vae"], device)
        text_encoder = folders.load_text_encoder(places["text_encoder"], device, dtype)
        engine = cls(mmdit, text_encoder, tokenizer, vae, sampling).requires_grad_(False).eval()
        for file in sorted(folder.glob("mask_token_emb*.pth")):
            row = text_encoder.shared.weight[engine.tokens.mask_id]
            with reading(file, f"one tensor of {len(row)} numbers"):
                row.copy_(torch.load(file, map_location="cpu", weights_only=True).view(len(row)))
        return engine

    @classmethod
    def start(cls, sd3, text_encoder, device=None, dtype=None, *, slots=256, size=512, sentence=""):
        """SD3 and T5 before training: it draws what SD3 draws for a vec of zero, and reads nothing.

        sd3: single file or diffusers folder; text_encoder: the folder of a T5 whose states sd3 knows,
        its tokenizer inside or beside it. The MM-DiT is fp32; new weights come from torch's generator.
        """
        device, dtype = fast.device_and_dtype(device, dtype)
        place = Path(text_encoder)  # a tokenizer_3/ stands beside a text_encoder_3/
        tokenizer = place.with_name(place.name.replace("text_encoder", "tokenizer"))
        tokenizer = folders.load_tokenizer(tokenizer)
        mmdit = transformer.grow(load_mmdit(sd3, device), len(tokenizer))
        t5, vae = folders.load_text_encoder(place, device, dtype), load_vae(sd3, device)
        size = min(size, mmdit.config.largest)
        texts = {"text_steps": min(slots, 64), "order": "confident", "sentence": sentence}
        sampling = folders.Sampling(slots, size, negative="", **texts)
        return cls(mmdit, t5, tokenizer, vae, sampling).requires_grad_(False).eval()

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    @property
    def default_size(self):
        return min(self.sampling.size, self.mmdit.config.largest)

    def context(self, ids):
        """Token ids (B, L) -> the text stream (B, L, D): T5, frozen and without a mask, then a Linear."""
        with torch.no_grad():
            states = self.text_encoder(input_ids=ids.to(self.device)).last_hidden_state
        return self.mmdit.context_embedder(states.to(self.mmdit.pos_embed.dtype))

    def draw(self, latent, t, context, sources=(), features=None):
        """The velocity (B, C, H, W) at a noisy latent (B, C, H, W); t (B,) or a number, 1 is noise.

        sources: clean latents of the same shape, to edit one or compose several. With features=k also
        the final image features (B, N, D) and the image tokens (B, N, D) after block k, from 1.
        """
        mmdit = self.mmdit
        c = mmdit.embed_time(t, len(latent))
        img = [mmdit.embed_image(x.to(mmdit.pos_embed.dtype)) for x in (latent, *sources)]
        n = img[0].shape[1]  # the target's tokens come first, only they are read off
        with tokens_after(mmdit, features) as (_, middle):
            _, img = mmdit.run_blocks(context, torch.cat(img, dim=1), c)
        final = mmdit.final_layer.features(img[:, :n], c)
        velocity = mmdit.unpatch(mmdit.final_layer.linear(final), latent)
        return (velocity, final, middle[0][:, :n]) if features else velocity

    def read(self, latent, context, features=None):
        """Logits (B, L, V) of a text about a clean latent (B, C, H, W), from its masked context.

        With features=k also the final text features and the text tokens after block k, (B, L, D).
        """
        mmdit = self.mmdit
        img = mmdit.embed_image(latent.to(mmdit.pos_embed.dtype))
        c = mmdit.embed_time(0.0, len(latent))
        with tokens_after(mmdit, features) as (middle, _):
            txt, _ = mmdit.run_blocks(context, img, c)
        final = F.layer_norm(txt, txt.shape[-1:], eps=1e-6)
        logits = mmdit.text_head(final)
        return (logits, final, middle[0]) if features else logits

    def encode(self, images, size, generators):
        """PIL images -> latents (B, C, H, W), cut to size (width, height); each a posterior's sample."""
        pixels = (to_tensor([crop_to(to_rgb(image), *size)]) for image in images)
        latents = [self.vae.encode(x.to(self.device), g) for x, g in zip(pixels, generators)]
        return torch.cat(latents)

    @torch.inference_mode()
    def generate(
        self, prompts, images=None, steps=None, guidance=None, size=None,
        *, negative=None, seed=0, progress=iter,
    ):  # fmt: skip
        """Draw one PIL image for each prompt, a text, or a list of texts and PIL images.

        images: a list of PIL images for each prompt: none to draw, one to edit or perceive, more
        to compose (published: three); the same number for all. size: (width, height),
        multiples of 16, to which they are cut. negative: what guidance moves away from. Image i
        depends on its prompt, its images and seed + i alone. Raises UserError for what cannot be drawn.
        """
        sampling, images = self.sampling, images or [[]] * len(prompts)
        prompts = [[p] if isinstance(p, str) else p for p in prompts]
        prompts = [split_prompt([*p, *more]) for p, more in zip(prompts, images, strict=True)]
        texts, pictures = ([prompt[i] for prompt in prompts] for i in (0, 1))
        if not texts or not all(text.strip() for text in texts):
            raise UserError("empty prompt: UniAlignment draws what a text says")
        counts = sorted({len(row) for row in pictures})
        if len(counts) > 1:
            raise UserError(f"all prompts take the same number of images: found {counts}")
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

        def velocity(z, t):
            go_to(t)
            v = self.draw(z.repeat(copies, 1, 1, 1), t, context, sources).float()
            return flow.guide(*v.chunk(2), guidance) if copies == 2 else v

        sigmas = flow.sigma_schedule(steps, sampling.shift)
        with fast.prepared(self.mmdit, sigmas[:-1].tolist()) as go_to:
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
        if not images or steps < 1:
            raise UserError(f"{len(images)} images and {steps} steps: there must be at least 1")
        if questions and len(questions) != len(images):
            raise UserError(f"{len(questions)} questions to {len(images)} images")
        if questions and not all(question.strip() for question in questions):
            raise UserError("empty question")
        rows = [self.tokens.about(question) for question in questions or [None] * len(images)]
        ids, hidden = (torch.stack(column).to(self.device) for column in zip(*rows))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        latent = self.encode(images, (self.default_size, self.default_size), generators)
        slots, order = (sampling.slots, self.mmdit.text_head.out_features), order or sampling.order

        draws = (torch.stack([torch.rand(slots, generator=g) for g in generators]) for _ in count())
        with fast.prepared(self.mmdit, [0.0]) as go_to:
            go_to(0.0)
            ids = masked.unmask(
                lambda ids: self.read(latent, self.context(ids)),
                ids, steps, order, draws, self.tokens.mask_id,
            )  # fmt: skip
        return [self.tokens.text(row[new]) for row, new in zip(ids, hidden)]

    def start_training(self, *_):
        """All of the MM-DiT learns, by name; without a teacher, `lmm`, no ISA."""
        self.requires_grad_(False)
        self.mmdit.requires_grad_(True).null_image.requires_grad_(False)
        base = fingerprint(self.mmdit.final_layer.linear.weight)
        t5 = fingerprint(self.text_encoder.shared.weight)
        self.base = {"base": base, "t5": t5, "texts": [self.tokens.slots, self.tokens.sentence]}
        if self.lmm:
            self.base["lmm"] = fingerprint(self.lmm.language_model.norm.weight)
            self.mmdit.align(self.lmm.config.text_config.hidden_size)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, batch, image, noise, t, times, weighted=True):
        """The weighted sum of the four losses of B examples, (B,); `parts` keeps their means.

        batch: `data.Pairs`; image (B, 3, H, W) in [-1, 1]; noise (B, 2 + S, C, h, w): of the flow,
        of the posteriors of image and S sources; t (B,) of the picture, times (B,) of the text.
        weighted: the published weighting of the velocity, by t^2.
        """
        flow_noise, *noises = noise.unbind(1)
        with torch.no_grad():
            pictures = (image, *batch.sources.unbind(1))
            x0, *sources = (self.vae.encode(x, noise=e) for x, e in zip(pictures, noises))
            teacher = self.teach(batch) if self.lmm else None
        kind, more = self.device.type, {"teacher": teacher, "weighted": weighted}
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            losses = self.losses(batch, times, x0, flow_noise, t, sources, **more)
        self.parts = {name: x.mean().item() for name, x in losses.items()}
        return sum(self.weights[name] * x for name, x in losses.items())

    def teach(self, batch):
        """Means of the target's image features and of its words' embeddings, or states: (B, M) each."""
        lmm, first = self.lmm, batch.image_mask.int().argmax(1)
        if self.lmm_states:
            x, features = lmm(batch)
        else:
            x = lmm.language_model.embed_tokens(batch.ids)
            features = lmm.visual(batch.patches.to(x.dtype), batch.grids).pooler_output
        x[batch.image_mask] = features
        words = torch.arange(x.shape[1], device=x.device) < first[:, None] - 1  # then the picture
        masks = batch.image_mask[..., None], words[..., None]
        return [(x * mask).sum(1) / mask.sum(1) for mask in masks]

    def losses(self, batch, times, x0, noise, t, sources=(), *, teacher=None, weighted=True):
        """The four losses of both passes on clean latents x0 (B, C, H, W): {name: (B,) fp32}.

        batch, times, weighted: see `forward`; noise like x0, t (B,): of the flow; sources: latents
        to start from; teacher: its mean image and text features, (B, M) each, else ISA is 0.
        """
        k = max(1, self.mmdit.config.depth // 3)  # its tokens are aligned: block 8 of 24
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
            "text": masked.loss(logits, batch.texts, batch.hidden == mask_id, times, mask_id),
            "csa": contrast(image, text, batch.texts),
            "isa": isa,
        }

    save_frozen = folders.save_frozen  # writes the rest of what `load` reads

    def save(self, folder, **_):
        """Write what training changes, the transformer/ of a pipeline folder, as published."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.mmdit.settings())
        with whole(folder / folders.WEIGHTS) as partial:
            save_file(Part({}, folder, transformer.RULES).stored(self.mmdit), partial)

    def restore(self, folder):
        """Take back what `save` wrote, into an engine that trains the same."""
        saved = transformer.load_transformer(folder, self.device).state_dict()
        check(saved, self.mmdit.state_dict(), folder)
        self.mmdit.load_state_dict(saved)


@contextmanager
def tokens_after(mmdit, k):
    """Within, block k (from 1) of a forward adds its text and its image tokens to two lists."""
    txt, img = [], []
    if not k:
        yield txt, img
        return

    def keep(block, inputs, outputs):
        txt.append(outputs[0])
        img.append(outputs[1])

    hook = mmdit.joint_blocks[k - 1].register_forward_hook(keep)
    try:
        yield txt, img
    finally:
        hook.remove()


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
