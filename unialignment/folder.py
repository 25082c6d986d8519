"""UniAlignment's network, T5 and settings, and the folder that holds them as published.

transformer/  vae/  text_encoder/  tokenizer/  scheduler/
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import checkpoints
from support.cli import UserError, reading
from support.files import whole, write_json

PARTS = {  # of a pipeline folder: where it lies in a folder of SD3-medium
    "vae": "vae",
    "text_encoder": "text_encoder_3",
    "tokenizer": "tokenizer_3",
    "scheduler": "scheduler",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MASK = "<extra_id_0>"  # the entry of T5's vocabulary that stands for a hidden token


def load_text_encoder(folder, device="cpu", dtype=torch.float32):
    """The encoder of a T5, strictly; bfloat16 instead of float16, in which its states run over."""
    with reading(folder, "the folder of a T5 encoder"):
        config = T5Config.from_dict(checkpoints.read_json(Path(folder, "config.json")))
    layouts = {"encoder.block.": checkpoints.key_map("encoder.embed_tokens.weight  shared.weight")}
    part = checkpoints.find_part(
        checkpoints.read_tensors(folder), folder, "T5 encoder", ("",), layouts
    )
    embeddings = part.tensors.pop("encoder.embed_tokens.weight", None)
    if embeddings is not None:  # a file may keep either name, or both
        part.tensors.setdefault("shared.weight", embeddings)
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    model = checkpoints.build(part, lambda: T5EncoderModel(config), device, dtype)
    model.encoder.set_input_embeddings(model.shared)  # one table again
    return model


def load_tokenizer(folder):
    """The tokenizer of a T5, with its entry for MASK."""
    with reading(folder, f"a T5 tokenizer with {MASK}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.get_vocab()[MASK], tokenizer.eos_token_id + 0
    return tokenizer


class Tokens:
    """T5's tokenizer as UniAlignment knows it: rows of so many slots, ended and padded with EOS."""

    def __init__(self, tokenizer, slots, sentence=""):
        self.tokenizer, self.slots, self.end = tokenizer, slots, tokenizer.eos_token_id
        self.sentence = sentence  # in front of every caption
        self.mask_id = tokenizer.convert_tokens_to_ids(MASK)

    def ids(self, text, slots=None):
        """As a list, special tokens left out. With slots padded, or cut to leave one EOS at least."""
        special = {self.mask_id, *self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = [i for i in ids if i not in special]
        return ids if slots is None else ids[: slots - 1] + [self.end] * max(1, slots - len(ids))

    def __call__(self, texts):
        """Texts -> ids (B, L)."""
        return torch.tensor([self.ids(text, self.slots) for text in texts])

    def about(self, question=None, text=None):
        """A caption, or the answer to a question, as ids (L,), and which slots hold it, (L,) bool.

        Without a text MASK stands in these slots. Raises UserError where the question leaves none.
        """
        asked = self.ids(f"Q: {question.strip()} A:" if question else self.sentence)
        room = self.slots - len(asked)
        if room < 1:
            raise UserError(f"a question of all {self.slots} slots leaves no room to answer")
        row = asked + ([self.mask_id] * room if text is None else self.ids(text, room))
        return torch.tensor(row), torch.arange(self.slots) >= len(asked)

    def text(self, ids):
        """ids -> the text, without the EOS that end it and pad it."""
        return self.tokenizer.decode(ids[ids != self.end]).strip()


@dataclass(frozen=True)
class Sampling:
    """How weights are used best: what their scheduler_config.json says, else as the authors do."""

    slots: int = 256  # of every text: padding is attended, so it is part of a prompt
    size: int = 512  # side of a picture
    steps: int = 28
    guidance: float = 7.0
    negative: str = (
        "low quality, blurry, low resolution, backlit, cartoon, animated, deformed, oversaturated, "
        "undersaturated, out of frame"
    )
    text_steps: int = 32
    order: str = "sampled"  # see `masked.unmask`
    sentence: str = ""  # in front of every caption: of masks alone T5 cannot tell the places
    shift: float = 3.0  # of the noise levels; all that published ones say


def read_sampling(scheduler):
    """The Sampling of a folder's scheduler/."""
    file = Path(scheduler, "scheduler_config.json")
    with reading(file, "settings of sampling"):
        stated = checkpoints.read_json(file)
        known = {x.name: x.type(stated[x.name]) for x in fields(Sampling) if x.name in stated}
        if wrong := [name for name, x in known.items() if x != stated[name]]:
            raise ValueError(f"{wrong[0]} {stated[wrong[0]]!r}")
        s = Sampling(**known)
        if min(s.slots, s.steps, s.text_steps, s.size) < 1 or s.size % 16 or not 0 < s.shift < 1000:
            raise ValueError("slots, steps, size (a multiple of 16) and shift must be positive")
        if s.order not in ("sampled", "confident"):
            raise ValueError(f"order {s.order!r}")
    return s


def find_folder(folder, sd3, name):
    """Where a part of the pipeline lies; raises UserError if neither folder has it."""
    for found in (Path(folder, name), Path(sd3 or folder, PARTS[name])):
        if found.is_dir():
            return found
    raise UserError(f"{folder}: holds no {name}/; a folder of SD3-medium (--sd3) would complete it")


def save_frozen(engine, folder):
    """Write all parts of a UniAlignment that training does not change: settings, VAE, T5."""
    for name in PARTS:
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    config, kind = engine.vae.config, {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    write_json(folder / "scheduler" / "scheduler_config.json", kind | asdict(engine.sampling))
    engine.text_encoder.save_pretrained(folder / "text_encoder")
    engine.tokens.tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"latent_channels": config.latent_channels, "norm_num_groups": config.groups}
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", **sizes})
    tensors = checkpoints.Part({}, folder, checkpoints.VAE_DIFFUSERS).stored(engine.vae)
    for name, x in tensors.items():
        if ".to_" in name and x.ndim == 4:  # 1x1 convolutions, there plain matrices
            tensors[name] = x.flatten(1)
    with whole(folder / "vae" / WEIGHTS) as partial:
        save_file(tensors, partial)
