"""Published models of the Stable Diffusion family, by their ids on the Hugging Face Hub.

    python sample.py --config configs/stable_diffusion.py:sdxl --prompt "a lighthouse at dusk"
    python sample.py --config configs/stable_diffusion.py --checkpoint model.safetensors --prompt "a lighthouse at dusk"

They are downloaded once. --config.sample.dtype=float32 for machines without bfloat16 arithmetic, CPUs among them.
"""

from configs.common import base, locked
from sdjax.core.config import Config

MODELS = {
    "sd1": {"checkpoint": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    "sd1_inpainting": {"checkpoint": "stable-diffusion-v1-5/stable-diffusion-inpainting"},
    "sd2": {"checkpoint": "stabilityai/stable-diffusion-2-1"},
    "sd2_depth": {"checkpoint": "stabilityai/stable-diffusion-2-depth"},
    "x4_upscaler": {"checkpoint": "stabilityai/stable-diffusion-x4-upscaler"},
    "sdxl": {"checkpoint": "stabilityai/stable-diffusion-xl-base-1.0"},
    "sdxl_refined": {
        "checkpoint": "stabilityai/stable-diffusion-xl-base-1.0",
        "refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    },
    "sdxl_turbo": {"checkpoint": "stabilityai/sdxl-turbo"},
    "lcm": {"checkpoint": "SimianLuo/LCM_Dreamshaper_v7"},
}


def get_config(arg: str = "sd1") -> Config:
    """arg: a key of MODELS."""
    if arg not in MODELS:
        raise ValueError(f"unknown variant {arg!r} of configs/stable_diffusion.py; choose one of: {', '.join(MODELS)}")
    config = base()
    config.sample = {"dtype": "bfloat16", **MODELS[arg]}
    return locked(config)
