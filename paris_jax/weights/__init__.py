"""Published weights: their files, the names and layouts of their tensors, and ours."""
