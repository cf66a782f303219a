"""Captioned images by index: folders, shards, TensorFlow Datasets, OpenMoji."""
