"""What is trained on: pairs, prompts, worlds."""
