"""The data stage: prompts, the target's answers, and the target's features of both."""
