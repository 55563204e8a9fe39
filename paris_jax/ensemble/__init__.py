"""What is used and never trained: admission of experts, routing, and the sampler."""
