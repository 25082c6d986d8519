"""Load weights: read the tensors of a file, rename them by a key map, fill a model strictly.

Tensors are memory-mapped and copied only where needed. A missing, unknown or misshapen tensor is a
UserError that gives its name in the file. A pickle may hold nothing but tensors.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from support.cli import UserError, reading

import torch
from safetensors import safe_open

from mmdit import AdaLN, MMDiT, MMDiTConfig
from vae import SCALE, SHIFT, VAE, VAEConfig

SUFFIXES = (".safetensors", ".bin", ".gguf")  # of weights, in order of preference
WRAPPERS = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
NO_WEIGHTS = {  # first bytes of a file: what it is, and what would be right
    rb"GGUF": "a GGUF file, quantised for llama.cpp; expected the model's .safetensors",
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to get the weights",
    rb"(?i)\s*<(!doctype|html|\?xml)": "a web page; download the weights again, logged in if need be",
}
FOREIGN = {  # in a tensor's name: what the file holds
    r"[._](scale_weight|weight_scale(_2)?|weight_packed|comfy_quant)$|scaled_fp8$": "weights scaled to fp8",
    r"\.(qweight|qzeros|wscales)$": "weights quantised by AWQ or GPTQ",
    r"\.(absmax|quant_map|SCB|quant_state)\b": "weights quantised by bitsandbytes",
    r"(^|[._])(lora_(?!magnitude)|lokr_|loha_|hada_)|[._]lora\.": "a LoRA of another program",
}


def read_tensors(path):
    """Read all tensors of a .safetensors or .bin file, or of a folder with one such file or shards.

    Returns {name: tensor}, memory-mapped, without what DDP, FSDP and torch.compile add to the names.
    Raises FileNotFoundError, or UserError if a file is damaged or is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a checkpoint")
    tensors = {}
    for file in _files(path):
        for name, x in _read_file(file).items():
            name = re.sub(WRAPPERS, "", name)
            if name in tensors:
                raise UserError(f"{path}: {name} is stored twice, again in {file.name}")
            tensors[name] = x
    return tensors


def _files(path):
    """The files of a checkpoint: the shards of the first index that has them all, or a single file."""
    if not path.is_dir():
        return [path]
    missing, order = None, lambda f: (".bin." in f.name, f.name.count("."), f.name)
    for index in sorted(path.glob("*.index*.json"), key=order):  # those of variants come last
        with reading(index, "a JSON object whose 'weight_map' names files in this folder"):
            files = sorted({path / name for name in read_json(index)["weight_map"].values()})
            if not files or any(file.parent != path for file in files):
                raise ValueError("no files, or files in another folder")
        if all(file.exists() for file in files):
            return files
        absent = next(file for file in files if not file.exists())
        missing = missing or f"{absent}: no such file; {index.name} names it"
    found = next(filter(None, (sorted(path.glob(f"*{x}")) for x in SUFFIXES)), [])
    found = [file for file in found if not (missing and "-of-" in file.name)]  # no lone shards
    files = [f for f in found if f.name.count(".") == 1] or found  # not a variant: x.fp16.bin
    if len(files) > 1 and not missing:
        raise UserError(f"{path}: has {len(files)} weight files and no index; name one file")
    if len(files) != 1:
        raise FileNotFoundError(missing or f"{path}: has no .safetensors or .bin file")
    return files


def _read_file(file):
    with reading(file, "weights"), open(file, "rb") as stream:
        head = stream.read(64)
    for pattern, kind in NO_WEIGHTS.items():
        if re.match(pattern, head):
            raise UserError(f"{file}: is {kind}")
    if file.suffix == ".safetensors":
        with reading(file, "a whole .safetensors file"), safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    with reading(file, "a checkpoint; a pickle may hold tensors only, by name"):
        zipped = head.startswith(b"PK")  # as torch.save writes since 1.6
        tensors = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
        for key in 2 * ("state_dict", "model", "module"):  # where training programs put tensors
            tensors = x if isinstance(x := tensors.get(key), dict) else tensors
        for name, x in tensors.items():
            if not isinstance(name, str) or x.layout != torch.strided or x.is_meta:
                raise TypeError(f"{name!r} is not the name of a plain tensor")
    return tensors


def metadata(file):
    """Read the metadata of a .safetensors file: {text: text}."""
    with reading(file, "a whole .safetensors file"), safe_open(file, framework="pt") as f:
        return f.metadata() or {}


def read_json(file, text=None):
    """Read the JSON object in a file, or in text, which was read from that file."""
    hook = check_settings if Path(file).name.endswith("config.json") else None
    with reading(file, "a JSON object"):
        text = Path(file).read_text(encoding="utf-8-sig") if text is None else text
        if not isinstance(value := json.loads(text, object_hook=hook), dict):
            raise TypeError(f"got a {type(value).__name__}")
    return value


def check_settings(config):
    """Return a config; ValueError for a value that would make a library hang or fail later."""
    for name, x in config.items():
        is_list = name in ("num_hidden_layers", "num_layers", "depth", "num_labels", "extra_ids")
        no_text = (name, x) == ("unk_token", "") or name == "model_max_length" and type(x) is str
        if no_text or type(x) in (int, float) and not abs(x) < (10_001 if is_list else 1e300):
            raise ValueError(f"{name!r} cannot be {x!r:.40}")
    return config


def check_folder(folder, kind):
    """Check each *config.json of a model's folder, before a library reads it; UserError if damaged."""
    if Path(folder).is_file():
        raise UserError(f"{folder}: is one file; expected the folder of a {kind}")
    for file in sorted(Path(folder).glob("*config.json")):
        read_json(file)


def part_folder(path, name):
    """A part of a diffusers folder, path/name; or path itself, if that holds the part's weights."""
    if (inner := Path(path, name)).is_dir():
        return inner
    path = Path(path)
    if path.is_dir() and not any(file.suffix in SUFFIXES for file in path.iterdir()):
        raise FileNotFoundError(f"{path}: has no {name}/, and no .safetensors or .bin file")
    return path


def refuse_foreign(names, source):
    """Raise UserError if names of tensors are those of quantised weights or of a LoRA."""
    for pattern, kind in FOREIGN.items():
        if name := next((k for k in names if re.search(pattern, k)), None):
            right = "expected a whole model in fp32, fp16, bf16 or plain fp8"
            raise UserError(f"{source}: holds {kind} ({name}); {right}")


def read_config(folder):
    """Read the config.json of a diffusers folder; {} if there is none."""
    file = Path(folder, "config.json")
    config = read_json(file) if file.exists() else {}
    for name in (*MMDIT_CONFIG, "norm_num_groups", "latent_channels", "layers_per_block"):
        if type(config.get(name)) not in (int, type(None)):
            raise UserError(f"{file}: {name!r} must be a whole number, got {config[name]!r}")
    return config


def key_map(text):
    """Parse lines "name in the model  names in the file" into rules; # is a number, * anything."""
    rules = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, *templates = line.split()
        pattern = re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")
        rules.append((pattern, [re.sub(r"[#*]", "{}", template) for template in templates]))
    return rules


@dataclass
class Part:
    """One model's tensors as a file names them, with rules from the model's names to the file's.

    The first rule that matches a name applies; a name without a rule is the same in the file.
    """

    tensors: dict  # {name in the file: tensor}
    source: Path | str  # for error messages
    rules: list = ()  # of `key_map`
    prefix: str = ""  # of all names in the file

    def names(self, name):
        """Names in the file of a tensor of the model: several if the model fuses these tensors."""
        for pattern, templates in self.rules:
            if match := re.fullmatch(pattern, name):
                return [self.prefix + template.format(*match.groups()) for template in templates]
        return [self.prefix + name]

    def shape(self, name):
        """Shape of the (first) tensor in the file for a name in the model; None if missing."""
        tensor = self.tensors.get(self.names(name)[0])
        return None if tensor is None else tuple(tensor.shape)

    def dimension(self, name, axis):
        """One dimension of that shape. Raises UserError if it is missing or 0."""
        shape, file_name = self.shape(name), self.names(name)[0]
        if shape is None:
            raise UserError(f"{self.source}: missing {file_name}")
        if not -len(shape) <= axis < len(shape) or 0 in shape:
            raise UserError(f"{self.source}: {file_name} has shape {shape}")
        return shape[axis]

    def count(self, name):
        """Of how many modules, name.format(0), name.format(1), ..., the file has any tensor."""
        start = os.path.commonprefix([self.names(name.format(i))[0] for i in (0, 1)])
        found = {k[len(start) :].split(".")[0] for k in self.tensors if k.startswith(start)}
        return next(i for i in count() if str(i) not in found)

    def stored(self, model):
        """A model's tensors by their names in the file: the inverse of `build`."""
        swapped, tensors = swapped_names(model, self.rules), {}
        for name, tensor in model.state_dict().items():
            names = self.names(name)
            tensor = torch.cat(tensor.chunk(2)[::-1]) if name in swapped else tensor
            tensors |= zip(names, (x.contiguous() for x in tensor.chunk(len(names))))
        return tensors


def find_part(tensors, source, kind, prefixes, layouts):
    """Return the Part with the first prefix and the first of {mark: rules} that begin a name."""
    refuse_foreign(tensors, source)
    for prefix in prefixes:
        for mark, rules in layouts.items():
            if any(name.startswith(prefix + mark) for name in tensors):
                inside = {k: x for k, x in tensors.items() if k.startswith(prefix)}
                return Part(inside, source, rules, prefix)
    raise UserError(f"{source}: holds no {kind}")


def build(part, make, device="cpu", dtype=None):
    """Build the model that make() returns and fill it with a Part; every name and shape must fit.

    A tensor with the right dtype and device is not copied. Returns the model frozen. Raises
    UserError naming each tensor that is missing, unknown or misshapen.
    """
    with reading(part.source, "a model that can be built"), torch.device("meta"):
        model = make()
    check(part.tensors, part.stored(model), part.source)
    swapped, filled = swapped_names(model, part.rules), {}
    for name, x in model.state_dict().items():
        parts = [part.tensors[k] for k in part.names(name)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = torch.cat(tensor.chunk(2)[::-1]) if name in swapped else tensor
        filled[name] = tensor.reshape(x.shape).to(device, dtype or tensor.dtype)
    model.load_state_dict(filled, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def swapped_names(model, rules):
    """Names in the model that diffusers stores as (scale, shift): those of AdaLNs without gates."""
    linears = {k: m[1] for k, m in model.named_modules() if rules and isinstance(m, AdaLN)}
    pairs = [k for k, linear in linears.items() if linear.out_features == 2 * linear.in_features]
    return {f"{name}.1.{kind}" for name in pairs for kind in ("weight", "bias")}


def check(tensors, expected, source):
    """Raise UserError unless names and shapes are as expected; 1x1 convolutions may be matrices."""
    faults = [f"missing {k}" for k in expected.keys() - tensors.keys()]
    faults += [f"unknown {k}" for k in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        shape, right = tuple(tensors[name].shape), tuple(expected[name].shape)
        if shape != right and (right[2:] != (1, 1) or shape != right[:2]):
            faults.append(f"{name} has shape {shape}, expected {right}")
        elif not tensors[name].is_floating_point():
            faults.append(f"{name} holds {tensors[name].dtype}, expected floating point")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"{source}: does not fit: {'; '.join(sorted(faults)[:4])}{more}")


MMDIT_DIFFUSERS = key_map("""
    pos_embed                            pos_embed.pos_embed
    x_embedder.proj.*                    pos_embed.proj.*
    t_embedder.mlp.0.*                   time_text_embed.timestep_embedder.linear_1.*
    t_embedder.mlp.2.*                   time_text_embed.timestep_embedder.linear_2.*
    y_embedder.mlp.0.*                   time_text_embed.text_embedder.linear_1.*
    y_embedder.mlp.2.*                   time_text_embed.text_embedder.linear_2.*
    joint_blocks.#.x_block.attn.qkv.*    BLOCK.attn.to_q.* BLOCK.attn.to_k.* BLOCK.attn.to_v.*
    joint_blocks.#.x_block.attn2.qkv.*   BLOCK.attn2.to_q.* BLOCK.attn2.to_k.* BLOCK.attn2.to_v.*
    joint_blocks.#.x_block.*.ln_*.*      BLOCK.*.norm_*.*
    joint_blocks.#.x_block.*.proj.*      BLOCK.*.to_out.0.*
    joint_blocks.#.x_block.mlp.fc1.*     BLOCK.ff.net.0.proj.*
    joint_blocks.#.x_block.mlp.fc2.*     BLOCK.ff.net.2.*
    joint_blocks.#.x_block.adaLN_modulation.1.*        BLOCK.norm1.linear.*
    joint_blocks.#.context_block.attn.qkv.*            BLOCK.attn.add_q_proj.* BLOCK.attn.add_k_proj.* BLOCK.attn.add_v_proj.*
    joint_blocks.#.context_block.attn.ln_*.*           BLOCK.attn.norm_added_*.*
    joint_blocks.#.context_block.attn.proj.*           BLOCK.attn.to_add_out.*
    joint_blocks.#.context_block.mlp.fc1.*             BLOCK.ff_context.net.0.proj.*
    joint_blocks.#.context_block.mlp.fc2.*             BLOCK.ff_context.net.2.*
    joint_blocks.#.context_block.adaLN_modulation.1.*  BLOCK.norm1_context.linear.*
    final_layer.adaLN_modulation.1.*     norm_out.linear.*
    final_layer.linear.*                 proj_out.*
""".replace("BLOCK", "transformer_blocks.#"))  # fmt: skip
MMDIT_CONFIG = {  # name in diffusers' config.json: name in MMDiTConfig
    "num_layers": "depth",
    "attention_head_dim": "head_dim",
    "patch_size": "patch",
    "in_channels": "channels",
    "pos_embed_max_size": "positions",
    "joint_attention_dim": "context_dim",
    "pooled_projection_dim": "pooled_dim",
}


def load_mmdit(path, device="cpu", dtype=torch.float32):
    """Load the MMDiT of an SD3 / SD3.5 file or diffusers folder; UserError if there is none."""
    folder = part_folder(path, "transformer")
    return build_mmdit(read_tensors(folder), path, device, dtype, read_config(folder))


def build_mmdit(tensors, source, device="cpu", dtype=torch.float32, stated=None):
    """Build an MMDiT from {name: tensor}; stated: the content of its config.json, to check."""
    prefixes = ("model.diffusion_model.", "transformer.", "dit.", "")
    layouts = {"joint_blocks.": (), "transformer_blocks.": MMDIT_DIFFUSERS}
    part = find_part(tensors, source, "SD3 or SD3.5 transformer", prefixes, layouts)
    config = infer_mmdit(part, stated or {})
    return build(part, lambda: MMDiT(config), device, dtype)


def infer_mmdit(part, stated):
    """Infer an MMDiTConfig from the shapes. Raises UserError if config.json (stated) disagrees."""
    block = "joint_blocks.{}.x_block."
    depth = part.count(block + "adaLN_modulation.1.weight")
    norm = block.format(0) + "attn.ln_q.weight"
    has_norm = part.shape(norm) is not None
    text_out = part.shape("text_head.weight") is not None  # UniAlignment: no pooled text
    config = MMDiTConfig(
        depth=depth,
        width=part.dimension("x_embedder.proj.weight", 0),
        head_dim=part.dimension(norm, 0) if has_norm else stated.get("attention_head_dim") or 64,
        channels=part.dimension("x_embedder.proj.weight", 1),
        patch=part.dimension("x_embedder.proj.weight", 3),
        positions=math.isqrt(part.dimension("pos_embed", 1)),
        context_dim=part.dimension("context_embedder.weight", 1),
        pooled_dim=None if text_out else part.dimension("y_embedder.mlp.0.weight", 1),
        qk_norm=has_norm,
        dual=tuple(i for i in range(depth) if part.shape(f"{block.format(i)}attn2.qkv.weight")),
        text_out=text_out,
    )
    width, head = config.width, config.head_dim
    if not depth or not 0 < head <= width or width % head or config.patch not in (1, 2):
        sizes = f"{depth} blocks, width {width}, heads of {head}, patches of {config.patch}"
        raise UserError(f"{part.source}: not an SD3 transformer: {sizes}")
    compare(part.source, stated, mmdit_settings(config))
    return config


def mmdit_settings(config):
    """The part of diffusers' config.json that follows from an MMDiTConfig."""
    return {k: x for k, name in MMDIT_CONFIG.items() if (x := getattr(config, name)) is not None}


def compare(source, stated, found):
    """Raise UserError if a config.json (stated) and values found in the tensors disagree."""
    for name, value in found.items():
        if stated.get(name) not in (None, value):
            says = f"config.json says {name} {stated[name]!r}, its tensors say {value!r}"
            raise UserError(f"{source}: {says}")


VAE_DIFFUSERS = key_map("""
    *.norm_out.*                            *.conv_norm_out.*
    encoder.down.#.block.#.nin_shortcut.*   encoder.down_blocks.#.resnets.#.conv_shortcut.*
    encoder.down.#.block.*                  encoder.down_blocks.#.resnets.*
    encoder.down.#.downsample.*             encoder.down_blocks.#.downsamplers.0.*
    *.mid.block_1.*                         *.mid_block.resnets.0.*
    *.mid.block_2.*                         *.mid_block.resnets.1.*
    *.mid.attn_1.norm.*                     *.mid_block.attentions.0.group_norm.*
    *.mid.attn_1.proj_out.*                 *.mid_block.attentions.0.to_out.0.*
    *.mid.attn_1.*                          *.mid_block.attentions.0.to_*
""" + "".join(f"""
    decoder.up.{i}.block.#.nin_shortcut.*   decoder.up_blocks.{3 - i}.resnets.#.conv_shortcut.*
    decoder.up.{i}.block.*                  decoder.up_blocks.{3 - i}.resnets.*
    decoder.up.{i}.upsample.*               decoder.up_blocks.{3 - i}.upsamplers.0.*
""" for i in range(4)))  # fmt: skip
# diffusers counts the decoder's levels from coarse to fine, hence 3 - i


def load_vae(path, device="cpu", dtype=torch.float32):
    """Load the VAE of an SD3 / SD3.5 file or a diffusers folder; UserError if there is none."""
    folder = part_folder(path, "vae")
    layouts = {"encoder.down.": (), "encoder.down_blocks.": VAE_DIFFUSERS}
    prefixes = ("first_stage_model.", "vae.", "")
    part = find_part(read_tensors(folder), path, "SD3.5 autoencoder", prefixes, layouts)
    config = infer_vae(part, read_config(folder))
    model = build(part, lambda: VAE(config), device, dtype)
    return model.to(memory_format=torch.channels_last)  # 20 % faster on a CPU


def infer_vae(part, stated):
    """Infer a VAEConfig from the shapes and, for the norms' groups, from config.json (stated)."""
    conv = "encoder.down.{}.block.{}.conv2.weight"
    base = part.dimension("encoder.conv_in.weight", 0)
    levels = part.count(conv.format("{}", 0))
    widths = [part.dimension(conv.format(i, 0), 0) for i in range(levels)]
    groups = stated.get("norm_num_groups")
    config = VAEConfig(
        latent_channels=part.dimension("decoder.conv_in.weight", 1),
        base=base,
        multipliers=tuple(width // base for width in widths),
        blocks=part.count(conv.format(0, "{}")),
        groups=max(1, min(32, base // 4)) if groups is None else groups,
    )
    if levels != 4 or any(w % base for w in widths) or config.groups < 1 or base % config.groups:
        sizes = f"{levels} levels of widths {widths}, norms with {config.groups} groups"
        raise UserError(f"{part.source}: not an SD3 autoencoder: {sizes}")
    found = {"latent_channels": config.latent_channels, "layers_per_block": config.blocks}
    compare(part.source, stated, found | {"scaling_factor": SCALE, "shift_factor": SHIFT})
    return config


def fingerprint(weight):
    """The norm of a weight, rounded, which identifies a trained model in any dtype."""
    return round(weight.float().norm().item(), 4)
