"""The file formats of checkpoints, and the choice between them."""
