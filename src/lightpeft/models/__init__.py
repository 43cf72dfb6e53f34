"""Foundation models: supported families, kinds of linear layers, and loading."""
