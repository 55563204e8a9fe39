"""Video codecs, text encoders, vision encoders and tokenizers."""
