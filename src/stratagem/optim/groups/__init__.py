"""Parameter groups: the rules for each parameter's options, and the constructors that apply them."""
