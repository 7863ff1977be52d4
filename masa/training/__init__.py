"""The loop of all runs, and the trainings of language models, images and detectors on it."""
