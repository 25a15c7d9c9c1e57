"""`dspark data`: prompts, answers, features and n-grams for training."""
