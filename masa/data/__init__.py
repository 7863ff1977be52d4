"""What is read: sources, documents, tokenizers, token files, task data, images and boxes."""
