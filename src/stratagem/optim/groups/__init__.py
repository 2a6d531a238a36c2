"""Parameter groups: which options each parameter gets, and the constructors that apply them."""
