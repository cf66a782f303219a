"""Floor 0: kernels, one choice by platform each, and how activations are split over a mesh."""
