from __future__ import annotations

import pytest
import torch
import transformers
from fidelity import fidelity
from tiny_checkpoints import tiny_checkpoint, write_tokenizer
from torch_critics import vgg16
from torch_reference import randomised

from sdjax.checkpoints import metric_weights
from sdjax.checkpoints.clip_pair import NAME
from sdjax.checkpoints.layouts.diffusers import write_checkpoint


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder for weights under their published names, drawn at random; VGG16's are there."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(randomised(vgg16()).state_dict(), folder / "vgg16-397923af.pth")
    return folder


@pytest.fixture(scope="session")
def networks(weights):
    """torch-fidelity's Inception with random weights, and ours, read from where users have theirs."""
    name = "weights-inception-2015-12-05-6726825d.pth"
    module, layers = fidelity("feature_extractor_inceptionv3"), ["2048", "logits_unbiased"]
    made: dict = {}

    def remember(self, state, *args, **kwargs):
        # The constructor loads a file; there is none before the module that it makes.
        made["module"] = self
        torch.save(randomised(self).state_dict(), weights / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", remember)
        torch.save({}, weights / "empty.pth")
        theirs = module.FeatureExtractorInceptionV3("inception", layers, str(weights / "empty.pth"))
        for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
            norm.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
        torch.save(theirs.state_dict(), weights / name)
        patch.setenv("SDJAX_WEIGHTS", str(weights))
        return theirs.eval(), metric_weights.load("inception")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP with a tokenizer, as the Hub has them."""
    folder = tmp_path_factory.mktemp("clips") / NAME
    count = write_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": count, "max_position_embeddings": 12, "eos_token_id": count - 1}
    vision = {**sizes, "image_size": 28, "patch_size": 7}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    randomised(transformers.CLIPModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Stable Diffusion with random weights."""
    root = tmp_path_factory.mktemp("models")
    count = write_tokenizer(root / "tokenizer")
    write_checkpoint(root / "sd1", tiny_checkpoint("sd1", root / "tokenizer", count))
    return root / "sd1"
