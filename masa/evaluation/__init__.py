"""What a model is worth: held-out loss, lm-eval, accuracies, COCO's scores, and the analysis of its weights."""
