"""The other formats a checkpoint can have, and the choice between them."""
