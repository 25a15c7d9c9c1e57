"""DeepSpec's stages for drafters: data, features, losses, the training loop."""
