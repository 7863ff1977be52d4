"""Vision Transformers and detectors with shared weights: data, models, training, evaluation."""
