"""Trains drafters in DeepSpec's stages: data, features, losses, the training loop."""
