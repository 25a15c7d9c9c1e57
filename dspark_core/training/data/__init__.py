"""The data stage: prompts, answers by the target, and the target's features of both."""
