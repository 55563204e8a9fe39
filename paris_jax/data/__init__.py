"""Sources of clips, the latent cache, and the Grain pipeline that feeds training."""
