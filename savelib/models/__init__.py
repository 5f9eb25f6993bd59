"""What is trained: the policy and the reward model."""
