"""What turns pixels and words into tensors: codecs, text encoders and clip features."""
