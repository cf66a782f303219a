"""Files of tensors, read defensively: safetensors, restricted pickles, shards."""
