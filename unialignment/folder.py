"""Read and write UniAlignment's pipeline folder: T5, its tokenizer, settings of sampling.

transformer/  vae/  text_encoder/  tokenizer/  scheduler/
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from support.cli import UserError, reading

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import checkpoints
from prompts import check_text
from support.files import whole, write_json
from unialignment.transformer import RULES, grow, load_transformer

IN_SD3 = {"text_encoder": "text_encoder_3", "tokenizer": "tokenizer_3"}  # names in SD3-medium
PARTS = "vae", "text_encoder", "tokenizer", "scheduler"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MASK = "<extra_id_0>"  # the entry of T5's vocabulary that replaces a hidden token


def load_pipeline(folder, sd3=None, device="cpu", dtype=torch.float32):
    """Load all parts of a pipeline folder: transformer, T5, tokenizer, VAE, Sampling.

    sd3: a folder of SD3-medium, for the parts that the folder lacks. If the folder holds a
    mask_token_emb*.pth, that vector replaces T5's embedding of MASK.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected one of UniAlignment")
    places = {name: find_folder(folder, sd3, name) for name in PARTS}
    sampling = read_sampling(places["scheduler"])
    tokenizer = load_tokenizer(places["tokenizer"])
    transformer = load_transformer(checkpoints.part_folder(folder, "transformer"), device, dtype)
    vae = checkpoints.load_vae(places["vae"], device)
    text_encoder = load_text_encoder(places["text_encoder"], device, dtype)
    for file in sorted(folder.glob("mask_token_emb*.pth")):
        row = text_encoder.shared.weight[tokenizer.convert_tokens_to_ids(MASK)]
        with reading(file, f"one tensor of {len(row)} numbers"):
            row.copy_(torch.load(file, map_location="cpu", weights_only=True).view(len(row)))
    return transformer, text_encoder, tokenizer, vae, sampling


def new_pipeline(sd3, text_encoder, device, dtype, *, slots=256, size=512, sentence=""):
    """The same parts before training, from SD3 and T5; new weights come from torch's generator.

    sd3: single file or diffusers folder; text_encoder: the folder of the T5 that sd3 was trained with,
    its tokenizer inside or beside it.
    """
    place = Path(text_encoder)  # a tokenizer_3/ stands beside a text_encoder_3/
    tokenizer = load_tokenizer(place.parent / place.name.replace("text_encoder", "tokenizer"))
    transformer = grow(checkpoints.load_mmdit(sd3, device), len(tokenizer))
    size, texts = min(size, transformer.config.largest), {"negative": "", "sentence": sentence}
    sampling = Sampling(slots, size, text_steps=min(slots, 64), order="confident", **texts)
    t5, vae = load_text_encoder(place, device, dtype), checkpoints.load_vae(sd3, device)
    return transformer, t5, tokenizer, vae, sampling


def load_text_encoder(folder, device="cpu", dtype=torch.float32):
    """Load the encoder of a T5, in bfloat16 instead of float16, in which its states overflow."""
    checkpoints.check_folder(folder, "T5 encoder")
    with reading(folder, "the folder of a T5 encoder"):
        config = T5Config.from_dict(checkpoints.read_json(Path(folder, "config.json")))
        far = config.relative_attention_max_distance  # no tensor shape shows this
        if not 0 < (near := config.relative_attention_num_buckets // 4) < far:
            raise ValueError(f"relative_attention_max_distance {far} must be above {near}")
    layouts = {"encoder.block.": checkpoints.key_map("encoder.embed_tokens.weight  shared.weight")}
    tensors = checkpoints.read_tensors(folder)
    part = checkpoints.find_part(tensors, folder, "T5 encoder", ("",), layouts)
    embeddings = part.tensors.pop("encoder.embed_tokens.weight", None)
    if embeddings is not None:  # a file may hold either name, or both
        part.tensors.setdefault("shared.weight", embeddings)
    layers = part.count("encoder.block.{}.layer.0.SelfAttention.q.weight")
    checkpoints.compare(folder, {"num_layers": config.num_layers}, {"num_layers": layers})
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    model = checkpoints.build(part, lambda: T5EncoderModel(config), device, dtype)
    model.encoder.set_input_embeddings(model.shared)  # the same tensor, not two
    return model


def load_tokenizer(folder):
    """Load the tokenizer of a T5; UserError if it has no MASK."""
    checkpoints.check_folder(folder, "T5 encoder")
    with reading(folder, f"a T5 tokenizer with {MASK}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.get_vocab()[MASK], tokenizer.eos_token_id + 0
        Tokens(tokenizer, 2)(["a"])
    return tokenizer


class Tokens:
    """T5's tokenizer as UniAlignment uses it: rows of `slots` tokens, ended and padded with EOS."""

    def __init__(self, tokenizer, slots, sentence=""):
        self.tokenizer, self.slots, self.end = tokenizer, slots, tokenizer.eos_token_id
        self.sentence = sentence  # in front of every caption
        self.mask_id = tokenizer.convert_tokens_to_ids(MASK)

    def ids(self, text, slots=None):
        """The ids of a text, without special tokens. With slots: cut or padded, EOS at the end."""
        special = {self.mask_id, *self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        check_text(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = [i for i in ids if i not in special]
        return ids if slots is None else ids[: slots - 1] + [self.end] * max(1, slots - len(ids))

    def __call__(self, texts):
        """Texts -> ids (B, L)."""
        return torch.tensor([self.ids(text, self.slots) for text in texts])

    def about(self, question=None, text=None):
        """Ids (L,) of a caption, or of a question and answer, and which slots to predict (L,) bool.

        Without a text, these slots hold MASK. Raises UserError if the question leaves no slot.
        """
        given = self.ids(f"Q: {question.strip()} A:" if question else self.sentence)
        room = self.slots - len(given)
        if room < 1:
            raise UserError(f"the question fills all {self.slots} slots, leaves no room to answer")
        row = given + ([self.mask_id] * room if text is None else self.ids(text, room))
        return torch.tensor(row), torch.arange(self.slots) >= len(given)

    def text(self, ids):
        """ids -> the text, without EOS."""
        return self.tokenizer.decode(ids[ids != self.end]).strip()


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, from the folder's scheduler_config.json; defaults: the authors'."""

    slots: int = 256  # of every text; padding is attended to, so their number matters
    size: int = 512  # side of a picture
    steps: int = 28
    guidance: float = 7.0
    negative: str = (
        "low quality, blurry, low resolution, backlit, cartoon, animated, deformed, oversaturated, "
        "undersaturated, out of frame"
    )
    text_steps: int = 32
    order: str = "sampled"  # see `masked.unmask`
    sentence: str = ""  # before every caption; T5 gives all MASKs the same state without it
    shift: float = 3.0  # of the noise levels; the only setting that published folders state


def read_sampling(scheduler):
    """The Sampling of a folder's scheduler/."""
    file = Path(scheduler, "scheduler_config.json")
    with reading(file, "settings of sampling"):
        stated = checkpoints.read_json(file)
        known = {x.name: x.type(stated[x.name]) for x in fields(Sampling) if x.name in stated}
        if wrong := [name for name, x in known.items() if x != stated[name]]:
            raise ValueError(f"{wrong[0]} {stated[wrong[0]]!r}")
        s = Sampling(**known)
        counts = s.slots, s.steps, s.text_steps, s.size
        if min(counts) < 1 or max(counts) > 10_000 or s.size % 16 or not 0 < s.shift < 1000:
            raise ValueError(
                "slots, steps, size (of 16s) and shift must be positive and not above 10000"
            )
        if s.order not in ("sampled", "confident"):
            raise ValueError(f"order {s.order!r}")
        check_text(s.sentence + s.negative, file)
    return s


def find_folder(folder, sd3, name):
    """Find the folder of a part of the pipeline; UserError if neither folder holds it."""
    for found in (Path(folder, name), Path(sd3 or folder, IN_SD3.get(name, name))):
        if found.is_dir():
            return found
    raise UserError(f"{folder}: holds no {name}/; give a folder of SD3-medium with --sd3")


def save_transformer(transformer, folder):
    """Write a transformer/ as published."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", transformer.settings())
    with whole(folder / WEIGHTS) as partial:
        save_file(checkpoints.Part({}, folder, RULES).stored(transformer), partial)


def save_frozen(engine, folder):
    """Write all parts of a UniAlignment that are not trained: settings, VAE, T5, tokenizer."""
    for name in PARTS:
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    kind, config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}, engine.vae.config
    write_json(folder / "scheduler" / "scheduler_config.json", kind | asdict(engine.sampling))
    engine.text_encoder.save_pretrained(folder / "text_encoder")
    engine.tokens.tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"latent_channels": config.latent_channels, "norm_num_groups": config.groups}
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", **sizes})
    tensors = checkpoints.Part({}, folder, checkpoints.VAE_DIFFUSERS).stored(engine.vae)
    for name, x in tensors.items():
        if ".to_" in name and x.ndim == 4:  # 1x1 convolutions, which diffusers stores as matrices
            tensors[name] = x.flatten(1)
    with whole(folder / "vae" / WEIGHTS) as partial:
        save_file(tensors, partial)
