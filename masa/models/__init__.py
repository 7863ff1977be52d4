"""What is trained, scored and compressed: the language model, Vision Transformers, detectors, pretrained models."""
