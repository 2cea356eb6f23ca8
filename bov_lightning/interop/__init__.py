"""Other formats: transformers directories, the paper's authors' checkpoints."""
