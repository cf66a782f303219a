"""A small CLIP on OpenMoji, sized for two CPU cores: the judge of this repository's own models.

    python train.py --config configs/clip.py:openmoji --workdir runs/clip

3,743 drawings with their captions, 34 times over, in about twenty minutes; the loss ends near 0.25, and 86 % of the
held-out drawings find their own caption among 210. Figures stand in checkpoints/openmoji_clip/README.md. `tiny` is for
the tests.
"""

from configs.common import base, locked
from sdjax.core.config import Config

CHECKPOINT = "checkpoints/openmoji_clip"
TOKENIZER = "checkpoints/openmoji/tokenizer"
VOCABULARY, END_OF_TEXT = 2048, 2047  # of that tokenizer


def get_config(arg: str = "openmoji") -> Config:
    """arg: "openmoji" for the model, "tiny" for the tests."""
    makers = {"openmoji": openmoji, "tiny": lambda: tiny(openmoji())}
    if arg not in makers:
        raise ValueError(f"unknown variant {arg!r} of configs/clip.py; choose one of: {', '.join(makers)}")
    return locked(makers[arg]())


def openmoji() -> Config:
    """Captions of at most 20 tokens, images of 64 px in patches of 16."""
    config = base()
    config.model.text_encoder = {
        "variant": "clip_l",
        "vocab_size": VOCABULARY,
        "eos_token_id": END_OF_TEXT,
        "max_length": 20,
        "width": 128,
        "layers": 3,
        "heads": 2,
        "feed_forward": 512,
        "projection_dim": 192,
    }
    config.model.image_encoder = {
        "variant": "clip_l",
        "size": 64,
        "patch": 16,
        "width": 192,
        "layers": 4,
        "heads": 3,
        "feed_forward": 768,
        "projection_dim": 192,
    }
    config.model.tokenizer = TOKENIZER
    config.task = {"name": "contrastive", "initial": "", "export_dtype": "float16"}
    config.data.update(source="openmoji", size=64, crop="random", crop_sides=(0.85, 1.0))
    config.optim.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100, weight_decay=0.1, b2=0.98, eps=1e-6)
    config.optim.ema_decay = 0.99
    config.train.update(steps=1000, batch_size=128, sample_every=500, checkpoint_every=100)
    config.sample = {"checkpoint": CHECKPOINT, "count": 64, "columns": 16}
    config.eval = {"held_out": "held_out", "batch_size": 70}
    return config


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    sizes = {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64, "projection_dim": 16}
    config.model.text_encoder.update(sizes)
    config.model.image_encoder.update(sizes, size=32)
    config.data.size = 32
    config.optim.warmup_steps = 1
    config.train.update(steps=4, batch_size=8, sample_every=4, checkpoint_every=2, log_every=1)
    config.sample.update(count=4, columns=2)
    return config
