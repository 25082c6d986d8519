"""A pipeline folder of UniAlignment with random tiny weights, as the published one lies."""

import json

from cases import T5, UNI, VOCABULARY, t5_tokenizer
from safetensors.torch import save_file
from tiny import GOLDEN, tensors
from transformers import T5Config

NAMES = json.loads((GOLDEN / "unialignment.json").read_text())


def transformer_weights(case="published"):
    return tensors(NAMES[case])


def publish(folder, vae, case="published", *, weights=None, names=None, **sampling):
    """Write the folder; vae: names and shapes of an AutoencoderKL; names: other names of the parts."""
    inside = {
        k: folder / (names or {}).get(k, k)
        for k in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    }
    for part in inside.values():
        part.mkdir(parents=True)
    stated = {
        "_class_name": "SD3JointModelFlexible", "attention_head_dim": 64, "dual_attention_layers": [],
        "caption_projection_dim": UNI["width"], "in_channels": 16, "num_layers": UNI["depth"],
        "joint_attention_dim": UNI["context"], "num_attention_heads": UNI["heads"],
        "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "sample_size": 64,
        "pos_embed_max_size": UNI["positions"], "vocab_size": VOCABULARY,
        "qk_norm": None if case == "published" else "rms_norm",
    }  # fmt: skip
    (inside["transformer"] / "config.json").write_text(json.dumps(stated))
    weights = transformer_weights(case) if weights is None else weights
    save_file(weights, inside["transformer"] / "diffusion_pytorch_model.safetensors")
    (inside["vae"] / "config.json").write_text(
        json.dumps({"norm_num_groups": 4, "latent_channels": 16})
    )
    save_file(tensors(vae), inside["vae"] / "diffusion_pytorch_model.safetensors")
    T5Config(**T5).save_pretrained(inside["text_encoder"])
    save_file(tensors(NAMES["t5"]), inside["text_encoder"] / "model.safetensors")
    t5_tokenizer().save_pretrained(inside["tokenizer"])
    sampling = {"shift": 3.0, "num_train_timesteps": 1000, "slots": 12, "size": 32, **sampling}
    (inside["scheduler"] / "scheduler_config.json").write_text(json.dumps(sampling))
    return folder
