"""Files of tensors, read defensively: safetensors, PyTorch's, shards."""
