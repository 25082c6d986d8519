"""Inputs for both the reference implementations (make_golden.py) and ours (the tests)."""

LATENTS = {"square": (8, 8, 5), "tall": (12, 6, 1), "wide": (6, 10, 13)}  # height, width, text
SCHEDULES = [(shift, steps) for shift in (1.0, 3.0, 5.0) for steps in (1, 2, 4, 12, 28, 40)]


def drift(z, t):
    """A velocity field to integrate."""
    return 0.5 * z * (1 + t) - 0.3


IMAGE, START, END = 190, 191, 192  # token ids
TEXT = [5, 17, 33, 8]
PICTURES = [5, START, *[IMAGE] * 6, END, 17, 33, START, *[IMAGE] * 4, END, 8]
GRIDS = [[1, 4, 6], [1, 4, 4]]

OFFICIAL = {
    "lmm": {
        "text_config": {
            "vocab_size": 200,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
        },
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "hidden_size": 64,
            "mlp_ratio": 4,
            "patch_size": 14,
        },
        "image_token_id": IMAGE,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "video_token_id": 193,
        "tie_word_embeddings": True,
    },
    "dit": {
        "sample_size": 64,
        "num_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 32,
        "qk_norm": "rms_norm",
    },
    "lmm_lora": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "dit_lora": [
        f"attn.{name}"
        for name in [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
        ]
    ],
    "cases": {  # LoRA scale, r, M-RoPE, token ids, grids
        "text": (1, 0.0, True, TEXT, []),
        "text, scale 2": (2, 0.0, True, TEXT, []),
        "pictures": (1, 0.0, True, PICTURES, GRIDS),
        "pictures, r 0.3, scale 2": (2, 0.3, True, PICTURES, GRIDS),
        "pictures, r 1": (1, 1.0, True, PICTURES, GRIDS),
        "pictures, plain positions": (1, 0.3, False, PICTURES, GRIDS),
    },
}


# ---- UniAlignment: its smallest relative, its T5, and a vocabulary ------------------------------

WORDS = [
    "a", "the", "red", "green", "blue", "circle", "star", "ring", "and", "left", "right", "of", "on",
    "make", "it", "Q:", "A:", "how", "many",
]  # fmt: skip
SLOTS = 12
UNI = {"width": 128, "heads": 2, "depth": 3, "context": 48, "positions": 24, "aligned": (40, 28)}
T5 = {
    "vocab_size": 40,
    "d_model": 48,
    "d_kv": 16,
    "num_heads": 3,
    "d_ff": 64,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
PROMPTS = ["a red circle and a blue star on the left", "make the star green"]


def t5_tokenizer():
    """A tokenizer that ends texts as T5's does, with <extra_id_0> as its last entry."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "</s>", "<unk>", *WORDS, "<extra_id_0>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"], model_max_length=512,
    )  # fmt: skip


VOCABULARY = 3 + len(WORDS) + 1
